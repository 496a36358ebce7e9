"""Whose pictures are whose: read from columns, tables and folders, and splits in which persons stay whole."""

from dataclasses import replace

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image
from pydantic import ValidationError

from sordino.errors import ConfigError, DataError
from sordino.tasks import DataSettings, PartitionSettings
from sordino.tasks.images import ImageSet
from sordino.tasks.persons import with_persons
from sordino.tasks.poisoning import poisoned, with_triggers
from sordino.tasks.settings import PoisoningSettings
from sordino.tasks.sources import load_images
from sordino.tasks.splits import build_task


def write(root, files):
    """Small pictures at these paths, each of another shade."""
    for shade, name in enumerate(files):
        (root / name).parent.mkdir(parents=True, exist_ok=True)
        Image.new("RGB", (6, 5), (shade, 0, 0)).save(root / name)
    return f"imagefolder:{root}"


def load(source, **values):
    return load_images(DataSettings(source=str(source), **values))


def owners(images):
    """Whose each picture is, by its name."""
    return {name: images.person_names[number] for name, number in zip(images.names, images.persons, strict=True)}


FILES = [f"{label}/{number}.png" for label in ("cat", "dog") for number in range(4)]


# --- a table ---------------------------------------------------------------------------------------------------------


def table(path, lines):
    path.write_text("\n".join(lines) + "\n", encoding="utf-8")
    return str(path)


def test_a_table_of_files_and_persons(tmp_path):
    source = write(tmp_path / "pictures", FILES)
    lines = ["\ufefffile,person,age", "elsewhere/7.png,zoe,7", *(f'{name},"ann, {name[4]}",50' for name in FILES)]
    images = load(source, persons=table(tmp_path / "persons.csv", lines))
    assert images.person_names == ("ann, 0", "ann, 1", "ann, 2", "ann, 3")
    assert owners(images) == {name: f"ann, {name[4]}" for name in FILES}
    assert owners(images.subset([6, 1])) == {"dog/2.png": "ann, 2", "cat/1.png": "ann, 1"}
    triggered = with_triggers(images, len(images), 0.25)
    assert triggered.persons.tolist() == images.persons.tolist() * 2


@pytest.mark.parametrize(
    ("lines", "expected"),
    [
        (["file,person", *(f"{name},ann" for name in FILES if name != "dog/0.png")], "no line for 'dog/0.png'"),
        (["file,patient", *(f"{name},ann" for name in FILES)], "no column 'person'"),
        (["person", "ann"], "no column 'file'"),
        (["file,person", *(f"{name},ann" for name in FILES), "cat/0.png,eve"], "two persons for 'cat/0.png'"),
        (["file,person", "cat/0.png,ann", "cat/1.png, "], "no person in line 3"),
        (["file,person", "cat/0.png"], "no person in line 2"),
        (["file,person", 'cat/0.png,"ann'], "not a CSV file"),
        ([""], "no column 'file'"),
    ],
)
def test_a_table_that_leaves_a_person_open_is_refused(tmp_path, lines, expected):
    source = write(tmp_path / "pictures", FILES)
    with pytest.raises(DataError, match=expected):
        load(source, persons=table(tmp_path / "persons.csv", lines))


def test_a_table_that_is_not_there_is_named(tmp_path):
    with pytest.raises(DataError, match="persons.csv"):
        load(write(tmp_path / "pictures", FILES), persons=str(tmp_path / "persons.csv"))


# --- a column --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("words", [True, False])
def test_a_column_of_persons(tmp_path, monkeypatch, words):
    datasets = pytest.importorskip("datasets")
    monkeypatch.setenv("HF_HOME", str(tmp_path / "hub"))
    numbers = [3, 1, 3, 2, 1, 1]
    rows = {
        "image": [Image.new("RGB", (6, 5), (shade, 0, 0)) for shade in range(6)],
        "label": ["cat", "dog"] * 3,
        "patient": [f"patient {number}" for number in numbers] if words else numbers,
    }
    features = datasets.Features(
        image=datasets.Image(),
        label=datasets.Value("string"),
        patient=datasets.Value("string" if words else "int64"),
    )
    datasets.Dataset.from_dict(rows, features).save_to_disk(str(tmp_path / "saved"))
    images = load(f"hf:{tmp_path / 'saved'}", person_column="patient")
    prefix = "patient " if words else ""
    assert [images.person_names[number] for number in images.persons] == [f"{prefix}{number}" for number in numbers]
    with pytest.raises(ConfigError, match=r"data\.person_column = 'nobody': there is no such column"):
        load(f"hf:{tmp_path / 'saved'}", person_column="nobody")
    rows["patient"][2] = None
    datasets.Dataset.from_dict(rows, features).save_to_disk(str(tmp_path / "missing"))
    with pytest.raises(DataError, match="column 'patient' must hold a word or a whole number"):
        load(f"hf:{tmp_path / 'missing'}", person_column="patient")


# --- folders ---------------------------------------------------------------------------------------------------------

PLACES = [(person, number) for person in ("ann", "eve_b") for number in range(2)]


def test_folders_of_persons_inside_classes(tmp_path):
    files = [f"{label}/{person}/{number}.png" for label in ("polar_bear", "ant") for person, number in PLACES]
    images = load(write(tmp_path, files), person_level=1)
    assert images.class_names == ("ant", "polar bear")
    assert owners(images) == {name: name.split("/")[1] for name in files}
    assert [images.class_names[label] for label in images.labels] == ["ant"] * 4 + ["polar bear"] * 4
    assert (images.domains, images.is_test, images.passed_over) == (None, None, ())


def test_folders_of_persons_above_classes_are_no_domains(tmp_path):
    files = [f"{person}/{label}/{number}.png" for label in ("ant", "bee") for person, number in PLACES]
    source = write(tmp_path, files)
    images = load(source, person_level=2)
    assert images.class_names == ("ant", "bee")
    assert owners(images) == {name: name.split("/")[0] for name in files}
    assert images.domains is None
    assert [images.class_names[label] for label in images.labels] == [name.split("/")[1] for name in images.names]
    assert load(source).domain_names == ("ann", "eve b")


@pytest.mark.parametrize("level", [1, 2, 3])
def test_folders_of_persons_beside_domains(tmp_path, level):
    def path(domain, label, person, number):
        folders = [domain, label]
        folders.insert(3 - level, person)
        return "/".join([*folders, f"{number}.png"])

    files = [path(domain, label, *place) for domain in ("lab", "ward") for label in ("ant", "bee") for place in PLACES]
    images = load(write(tmp_path, files), person_level=level)
    assert (images.class_names, images.domain_names) == (("ant", "bee"), ("lab", "ward"))
    assert owners(images) == {name: name.split("/")[3 - level] for name in files}
    for name, domain, label in zip(images.names, images.domains, images.labels, strict=True):
        assert {images.domain_names[domain], images.class_names[label]} <= set(name.split("/"))
    assert images.image(0).getpixel((0, 0)) == (files.index(images.names[0]), 0, 0)


def test_train_and_test_folders_with_persons_are_a_split(tmp_path):
    files = [f"{part}/{label}/{part}{person}/0.png" for part in ("train", "test") for label in "ab" for person in "xy"]
    images = load(write(tmp_path, files), person_level=1)
    assert images.domains is None
    assert images.is_test.tolist() == [name.startswith("test") for name in images.names]
    assert images.person_names == ("testx", "testy", "trainx", "trainy")


@pytest.mark.parametrize(
    ("files", "level", "expected"),
    [
        (["a/0.png", "b/0.png"], 1, "pictures lie 1 folders deep, as in 'a'"),
        (["a/x/0.png", "b/x/0.png"], 3, "at level 3 above"),
        (["a/x/0.png", "b/0.png"], 1, "at two depths"),
        (["a/x/0.png", "a/1.png", "b/x/0.png"], 1, "at two depths"),
        (["a/x/y/z/0.png", "b/x/y/z/0.png"], 1, "pictures lie 4 folders deep"),
        (["a/x/0.png", "a/y/0.png"], 1, "only one class"),
        (["a_b/x/0.png", "a b/y/0.png"], 1, "name the same class 'a b'"),
        (["0.png"], 1, "no folders with pictures"),
    ],
)
def test_folders_that_are_no_layout_with_a_person_are_refused(tmp_path, files, level, expected):
    with pytest.raises(DataError, match=expected):
        load(write(tmp_path, files), person_level=level)


@pytest.mark.parametrize(
    ("values", "expected"),
    [
        ({"source": "digits", "person_level": 1}, "person_level applies to a source 'imagefolder:PATH' only"),
        ({"source": "digits", "person_column": "p"}, "person_column applies to sources hf and table"),
        ({"source": "imagefolder:x", "person_level": 0}, "greater than or equal to 1"),
        ({"source": "imagefolder:x", "person_level": 1, "persons": "p.csv"}, "persons and person_level both say"),
        ({"source": "hf:x", "person_column": "p", "persons": "p.csv"}, "person_column and persons both say"),
    ],
)
def test_ways_that_do_not_fit_are_refused(values, expected):
    with pytest.raises(ValidationError, match=expected):
        DataSettings(**values)


# --- splits ----------------------------------------------------------------------------------------------------------

DOMAINS = ("lab", "ward")


@st.composite
def patients(draw):
    """Pictures of patients, each of whom may have several in each class and domain."""
    classes, persons = draw(st.integers(3, 4)), draw(st.integers(16, 30))
    rows = [
        (person, draw(st.integers(0, 1)), (person + shift) % classes)
        for person in range(persons)
        for shift in draw(st.sampled_from([(0,), (0, 0), (0, 1), (0, 0, 0, 1)]))
    ]
    owner, domain, label = np.array(rows).T
    images = ImageSet(
        source="made up",
        class_names=tuple(f"class {index}" for index in range(classes)),
        labels=label,
        names=[f"{row}.png" for row in range(len(rows))],
        read=lambda index: bytes([index]),
        domain_names=DOMAINS,
        domains=domain,
        is_test=draw(st.sampled_from([None, owner % 3 == 0, np.arange(len(rows)) % 3 == 0])),
    )
    return with_persons(images, [f"p{number:02}" for number in owner])


@given(
    patients(),
    st.sampled_from([{}, {"train_per_class": 2}, {"test_per_class": 2}, {"train_per_class": 3, "test_per_class": 1}]),
    st.sampled_from([{"novel_classes": 0}, {"novel_classes": 1}, {"held_out_domain": "ward"}]),
    st.sampled_from([{"scheme": "iid"}, {"scheme": "dirichlet", "beta": 3.0}, {"scheme": "domain"}]),
    st.integers(0, 2**31),
)
@settings(max_examples=150)
def test_a_person_trains_at_one_client_or_tests(images, counts, aside, scheme, seed):
    clients = 2 if scheme["scheme"] != "domain" or "held_out_domain" in aside else 3
    data = DataSettings(source="digits", **counts, **aside)
    try:
        task = build_task(images, data, PartitionSettings(clients=clients, **scheme), seed)
    except DataError as error:  # there may be too few pictures; nothing else may go wrong
        if any(text in str(error) for text in ("at least", "no test picture", "no training picture")):
            return
        raise
    train = [set(images.persons[rows].tolist()) for rows in task.train]
    for one in range(clients):
        for other in range(one):
            assert not train[one] & train[other]
    tested = set(images.persons[np.concatenate([task.test, task.novel, task.domain])].tolist())
    assert not tested & set().union(*train)
    together = np.concatenate([task.test, *task.train])
    assert len(np.unique(together)) == len(together)
    shots, tests = counts.get("train_per_class"), counts.get("test_per_class")
    cells = images.labels if scheme["scheme"] != "domain" else images.labels + 10 * images.domains
    for cell in np.unique(cells[task.test]):
        trained, testing = (int((cells[rows] == cell).sum()) for rows in (np.concatenate(task.train), task.test))
        assert trained == shots if shots else trained >= 1
        assert testing == tests if tests else testing >= 1
    if images.is_test is not None:
        assert np.all(images.is_test[task.test])
        assert not np.any(images.is_test[np.concatenate(task.train)])


def many(count=60, each=4):
    """Patients with pictures of one class, of three."""
    owner = np.repeat(np.arange(count), each)
    images = ImageSet(
        source="made up",
        class_names=("a", "b", "c"),
        labels=owner % 3,
        names=[f"{row}.png" for row in range(len(owner))],
        read=lambda index: bytes([index]),
    )
    return with_persons(images, [f"p{number:03}" for number in owner])


def test_a_fraction_of_the_pictures_of_whole_persons_tests():
    task = build_task(
        many(), DataSettings(source="digits", test_fraction=0.25), PartitionSettings(scheme="iid", clients=3), 0
    )
    assert len(task.test) == 60
    assert sum(map(len, task.train)) == 180


def test_persons_go_to_clients_alike_where_pictures_do_not_decide():
    """Four pictures at ten clients, at random: equal counts are not all for the first client."""
    partition = PartitionSettings(scheme="iid", clients=10)
    task = build_task(many(300), DataSettings(source="digits", test_per_class=4), partition, 0)
    sizes = np.array([len(rows) for rows in task.train]) / 4
    # About 297 persons, each at a client by a draw that is alike for all: 30 of a binomial's deviation 5.2.
    assert np.all(np.abs(sizes - sizes.mean()) < 5 * 5.2)


def test_too_few_persons_for_both_sides_are_told():
    images = many(4)
    with pytest.raises(
        DataError, match="class 'b' has 0 readable pictures in the test split, where each person either"
    ):
        build_task(images, DataSettings(source="digits"), PartitionSettings(scheme="iid", clients=2), 0)


def test_a_client_that_persons_leave_is_told():
    images = with_persons(many(9), ["p"] * 12 + ["q"] * 12 + ["r"] * 12)
    with pytest.raises(
        DataError, match=r"client \d has no training picture left once each of 2 persons is at one client"
    ):
        build_task(images, DataSettings(source="digits"), PartitionSettings(scheme="iid", clients=3), 0)


def test_nothing_changes_where_persons_are_unknown():
    images = many()
    unknown = replace(images, persons=None, person_names=None)
    alone = with_persons(images, images.names)  # a person a picture: other draws, the same counts
    partition = PartitionSettings(scheme="iid", clients=3)
    task, of_alone = (build_task(each, DataSettings(source="digits"), partition, 0) for each in (unknown, alone))
    assert [len(rows) for rows in task.train] == [len(rows) for rows in of_alone.train]
    assert len(task.test) == len(of_alone.test)


def test_a_poisoned_picture_stays_its_persons(tmp_path):
    images = many()
    task = build_task(images, DataSettings(source="digits"), PartitionSettings(scheme="iid", clients=3), 0)
    attacked = poisoned(task, PoisoningSettings(target="a", rate=1.0), len(images), 0)
    both = with_triggers(images, len(images), 0.25)
    for before, after in zip(task.train, attacked.train, strict=True):
        assert both.persons[after].tolist() == both.persons[before].tolist()
