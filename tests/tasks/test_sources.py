"""Sources: real files on disk, in every layout that is accepted, and what is said of those that are not."""

import io
import os
from importlib.util import find_spec
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from pictures.pictures_of_a_ramp import RAMP, png16, wide
from sordino.errors import ConfigError, DataError
from sordino.files import read_regular
from sordino.pictures.decoding import MAX_BYTES, decode, suffixes
from sordino.tasks import DataSettings
from sordino.tasks.passed_over import PassedOver, told
from sordino.tasks.sources import load_images, public_images


def load(source, **settings):
    return load_images(DataSettings(source=str(source), **settings))


def picture(shade, size=(6, 5)):
    return Image.new("RGB", size, (shade, 0, 0))


def content(image, suffix="PNG", **options):
    buffer = io.BytesIO()
    image.save(buffer, suffix, **options)
    return buffer.getvalue()


def write_folders(root, layout):
    """Files of a layout {folder: number of pictures}, each of another shade of red."""
    shade = 0
    for folder, count in layout.items():
        (root / folder).mkdir(parents=True, exist_ok=True)
        for number in range(count):
            (root / folder / f"{number}.png").write_bytes(content(picture(shade)))
            shade += 1
    return f"imagefolder:{root}"


# --- folders ---------------------------------------------------------------------------------------------------------


def test_class_folders(tmp_path):
    source = write_folders(tmp_path, {"polar_bear": 3, "ant": 2, ".cache": 1})
    (tmp_path / "ant" / "notes.txt").write_text("not a picture")
    (tmp_path / "ant" / ".hidden.png").write_text("not one either")
    images = load(source)
    assert images.class_names == ("ant", "polar bear")
    assert images.labels.tolist() == [0, 0, 1, 1, 1]
    assert images.names == ["ant/0.png", "ant/1.png", *(f"polar_bear/{i}.png" for i in range(3))]
    assert (images.domains, images.domain_names, images.is_test) == (None, None, None)
    assert images.passed_over == (PassedOver(".txt", "ant", 1), PassedOver("hidden", "ant", 1))
    assert images.raw(0) == (tmp_path / "ant" / "0.png").read_bytes()
    assert images.image(3).getpixel((0, 0)) == (1, 0, 0)


def test_domain_folders_share_the_union_of_their_classes(tmp_path):
    source = write_folders(tmp_path, {"sketch/dog": 1, "sketch/cat": 1, "photo/dog": 2, "photo/elk": 1})
    images = load(source)
    assert images.class_names == ("cat", "dog", "elk")
    assert images.domain_names == ("photo", "sketch")
    assert images.domains.tolist() == [0, 0, 0, 1, 1]
    assert images.labels.tolist() == [1, 1, 2, 0, 1]


def test_train_and_test_folders_are_a_split_and_not_domains(tmp_path):
    images = load(write_folders(tmp_path, {"train/a": 2, "train/b": 2, "val/a": 1, "val/b": 1, "test/a": 1}))
    assert images.domains is None
    assert sorted(images.names) == ["test/a/0.png", "train/a/0.png", "train/a/1.png", "train/b/0.png", "train/b/1.png"]
    assert [images.names[row] for row in np.flatnonzero(images.is_test)] == ["test/a/0.png"]


def test_a_subset_keeps_names_labels_and_content(tmp_path):
    images = load(write_folders(tmp_path, {"p/a": 2, "p/b": 2, "q/a": 2}))
    part = images.subset([4, 1]).subset([1, 0])
    assert part.names == [images.names[1], images.names[4]]
    assert [part.raw(0), part.raw(1)] == [images.raw(1), images.raw(4)]
    assert part.domains.tolist() == images.domains[[1, 4]].tolist()
    assert len(part) == 2


@pytest.mark.parametrize(
    ("layout", "expected"),
    [
        ({"a": 1, "b": 0}, "folder .*b' holds no picture"),
        ({"p/a": 1, "p/b": 0, "q/a": 1}, "folder .*b' holds no picture"),
        ({"a": 1, "p/b": 1}, "folder 'a' holds pictures, but 'p' holds folders"),
        ({"a": 1, "a/b": 1}, "folder .*a' holds both pictures and a folder of pictures \\('b'\\)"),
        ({"p/a": 1, "p/a/b": 1}, "folder .*a' holds both"),
        ({"p/q/a": 1}, "holds no picture"),
        ({"a": 1}, "only one class \\('a'\\)"),
        ({"a_b": 1, "a b": 1}, "name the same class 'a b'"),
        ({}, "no class folders"),
    ],
)
def test_a_wrong_layout_is_an_error_that_names_the_folder(tmp_path, layout, expected):
    with pytest.raises(DataError, match=expected) as caught:
        load(write_folders(tmp_path, layout))
    assert "\n" not in str(caught.value)


def test_public_pictures_are_found_at_any_depth(tmp_path):
    write_folders(tmp_path, {".": 1, "a": 2, "a/b/c": 1, ".hidden": 1, "__MACOSX": 1})
    (tmp_path / "a" / "notes.txt").write_text("nothing")
    (tmp_path / "circle").symlink_to(tmp_path)
    images = public_images(DataSettings(source="digits", public=str(tmp_path)))
    assert list(images.names) == ["0.png", "a/0.png", "a/1.png", "a/b/c/0.png"]
    assert images.image(3).getpixel((0, 0)) == (3, 0, 0)
    assert told(images.passed_over)


def test_a_missing_folder_is_named(tmp_path):
    with pytest.raises(DataError, match=r"there is no folder .*nowhere"):
        load(f"imagefolder:{tmp_path / 'nowhere'}")


# --- what is read of a file ------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("bad", "expected"),
    [
        (b"", "empty"),
        (b"no picture at all", "not a picture in a known format"),
        (content(picture(9, (200, 200)), "JPEG")[:400], "damaged picture"),
        (content(Image.effect_noise((64, 64), 50))[:900], "damaged picture"),
        (b"P6 10000 10000 255 ", "10000 x 10000 pixels, more than"),
        (b"P6 99999 99999 255 ", "more than the"),
        (b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 10 10\n%%EndComments\nshowpage\n", "not a picture"),
    ],
    ids=["empty", "text", "truncated JPEG", "truncated PNG", "large", "bomb", "PostScript"],
)
@pytest.mark.filterwarnings("ignore::PIL.Image.DecompressionBombWarning")
def test_a_bad_file_is_a_reason_and_never_another_error(bad, expected):
    with pytest.raises(DataError, match=expected) as caught:
        decode(bad)
    assert "\n" not in str(caught.value)


def test_every_kind_of_picture_becomes_a_plain_one():
    wide = Image.fromarray(np.full((4, 4), 0x8000, dtype=np.uint16))
    assert decode(content(wide)).getpixel((0, 0)) == 128
    clear = Image.new("RGBA", (4, 4), (255, 0, 0, 0))
    assert decode(content(clear)).getpixel((0, 0)) == (255, 255, 255)
    assert decode(content(picture(7).convert("P"), "GIF")).mode == "RGB"
    assert decode(content(Image.new("1", (4, 4), 1))).getpixel((0, 0)) == 255
    assert decode(content(Image.new("CMYK", (4, 4)), "JPEG")).mode == "RGB"
    turned = Image.Exif()
    turned[0x0112] = 6  # the camera was held upright
    assert decode(content(picture(7, (8, 4)), "JPEG", exif=turned)).size == (4, 8)


def test_a_file_that_vanished_is_a_reason(tmp_path):
    images = load(write_folders(tmp_path, {"a": 1, "b": 1}))
    (tmp_path / "a" / "0.png").unlink()
    with pytest.raises(DataError, match="No such file"):
        images.image(0)


# --- what comes with packages ----------------------------------------------------------------------------------------


def test_digits():
    images = load("digits")
    assert len(images) == 1797
    assert images.class_names[3] == "three"
    assert images.image(0).size == (8, 8)
    assert images.image(0).getextrema() == (0, 239)  # ink of 15 of 16, light on dark
    assert images.labels[:10].tolist() == list(range(10))


def test_textile():
    images = load("textile")
    assert np.bincount(images.labels).tolist() == [1000, 500, 500]
    assert images.class_names[1] == "fabric with a local defect"
    assert images.names[1000].startswith("local/")
    assert images.image(0).size == (250, 250)


# --- Hugging Face ----------------------------------------------------------------------------------------------------


@pytest.fixture(autouse=True)
def hugging_face_cache(tmp_path_factory, monkeypatch):
    import datasets

    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path_factory.mktemp("hf"))


def dataset(count=6, *, label=None, first=0):
    """`count` pictures of classes 'wild_cat' and 'dog' by turns."""
    import datasets

    names = datasets.ClassLabel(names=["wild_cat", "dog", "never seen"])
    columns = {
        "image": [picture(first + row) for row in range(count)],
        "label": [row % 2 if label is None else label for row in range(count)],
        "domain": [("photo", "sketch")[row // 2 % 2] for row in range(count)],
    }
    features = datasets.Features({"image": datasets.Image(), "label": names, "domain": datasets.Value("string")})
    return datasets.Dataset.from_dict(columns, features=features)


def check(images, count=6):
    assert images.class_names == ("wild cat", "dog")  # in the label's order, without the class that never occurs
    assert images.labels[:4].tolist() == [0, 1, 0, 1]
    assert images.domain_names == ("photo", "sketch")
    assert images.domains[:4].tolist() == [0, 0, 1, 1]
    assert len(images) == len(images.names) == count
    assert [images.image(row).getpixel((0, 0)) for row in range(count)] == [(row, 0, 0) for row in range(count)]


def test_parquet_file(tmp_path, capfd):
    dataset().to_parquet(tmp_path / "some.parquet")
    capfd.readouterr()
    images = load(f"hf:{tmp_path / 'some.parquet'}")
    check(images)
    assert images.names[5] == "train[5]"
    assert images.is_test is None
    assert capfd.readouterr() == ("", "")


def test_parquet_file_of_another_tool(tmp_path):
    import pyarrow
    from pyarrow import parquet

    rows = [{"bytes": content(picture(row)), "path": None} for row in range(4)]
    parquet.write_table(pyarrow.table({"image": rows, "class": [7, 3, 7, 3]}), tmp_path / "some.parquet")
    images = load(f"hf:{tmp_path / 'some.parquet'}")
    assert images.class_names == ("3", "7")
    assert images.labels.tolist() == [1, 0, 1, 0]
    assert images.image(2).getpixel((0, 0)) == (2, 0, 0)


def test_saved_folder_with_its_own_test_split(tmp_path):
    import datasets

    parts = {"train": dataset(), "test": dataset(3, first=6), "validation": dataset(2)}
    datasets.DatasetDict(parts).save_to_disk(tmp_path / "saved")
    images = load(f"hf:{tmp_path / 'saved'}")
    check(images, 9)
    assert images.is_test.tolist() == [False] * 6 + [True] * 3
    assert images.names[6] == "test[0]"


def test_a_test_split_without_labels_gives_way_to_the_validation_split(tmp_path):
    import datasets

    parts = {"train": dataset(), "test": dataset(3, label=-1), "validation": dataset(2, first=6)}
    datasets.DatasetDict(parts).save_to_disk(tmp_path / "saved")
    images = load(f"hf:{tmp_path / 'saved'}")
    assert images.names[6:] == ["validation[0]", "validation[1]"]


def test_saved_single_split_and_folder_of_parquet_files(tmp_path):
    dataset().save_to_disk(tmp_path / "saved")
    check(load(f"hf:{tmp_path / 'saved'}"))
    (tmp_path / "files" / "data").mkdir(parents=True)
    dataset().to_parquet(tmp_path / "files" / "data" / "train-00000-of-00001.parquet")
    check(load(f"hf:{tmp_path / 'files'}"))


def test_columns_are_checked_and_may_be_chosen(tmp_path):
    source = f"hf:{tmp_path / 'saved'}"
    dataset().save_to_disk(tmp_path / "saved")
    assert load(source, label_column="domain").class_names == ("photo", "sketch")
    for key in ("image_column", "label_column", "domain_column"):
        with pytest.raises(ConfigError, match=f"data.{key} = 'nope': .*columns: image, label, domain"):
            load(source, **{key: "nope"})
    with pytest.raises(ConfigError, match=r"data.image_column = 'domain': it holds no pictures; .*: image"):
        load(source, image_column="domain")


@pytest.mark.filterwarnings("ignore")
def test_what_cannot_be_loaded_is_told_in_one_line(tmp_path, monkeypatch):
    import datasets

    (tmp_path / "broken.parquet").write_bytes(b"PAR1 and then nothing")
    (tmp_path / "table.csv").write_text("a,b\n1,2\n")
    (tmp_path / "empty").mkdir()

    def unreachable(*_, **__):
        raise ConnectionError("Couldn't reach 'owner/name' on the Hub\nand more")

    for where in ("broken.parquet", "table.csv", "empty", "nowhere"):
        with pytest.raises(DataError, match=r"^hf:") as caught:
            load(f"hf:{tmp_path / where}")
        assert "\n" not in str(caught.value)
    monkeypatch.setattr(datasets, "load_dataset", unreachable)
    with pytest.raises(DataError, match="the hub cannot be reached") as caught:
        load("hf:owner/name")
    assert "\n" not in str(caught.value)


# --- real data -------------------------------------------------------------------------------------------------------


def test_real_folders_of_both_depths(real_data):
    caltech, pacs = load(f"imagefolder:{real_data('caltech101')}"), load(f"imagefolder:{real_data('pacs')}")
    assert (len(caltech), len(caltech.class_names), caltech.domains) == (3100, 100, None)
    assert "windsor chair" in caltech.class_names
    assert pacs.domain_names == ("art painting", "cartoon", "photo", "sketch")
    assert np.all(np.bincount(pacs.domains * 7 + pacs.labels) == 80)
    assert pacs.image(0).mode == "RGB"


# --- what is passed over ---------------------------------------------------------------------------------------------


def test_files_passed_over_are_counted_by_kind_and_folder(tmp_path):
    source = write_folders(tmp_path, {"ant": 2, "bee": 1, "bee/old": 0})
    for name in ("ant/1.XYZ", "ant/2.xyz", "bee/3.xyz", "bee/scan", "bee/old/4.xyz", "stray.png", "notes"):
        (tmp_path / name).write_bytes(b"something")
    (tmp_path / "ant" / "gone.png").symlink_to(tmp_path / "nowhere.png")
    (tmp_path / "ant" / "itself.png").symlink_to(tmp_path / "ant" / "itself.png")
    (tmp_path / "ant" / ".secret.png").write_bytes(content(picture(1)))
    (tmp_path / "ant" / ".bashrc").write_text("")
    os.mkfifo(tmp_path / "bee" / "pipe.png")
    images = load(source)
    assert images.names == ["ant/0.png", "ant/1.png", "bee/0.png"]
    assert set(images.passed_over) == {
        PassedOver(".xyz", "ant", 2),
        PassedOver(".xyz", "bee", 1),
        PassedOver(".xyz", "bee/old", 1),
        PassedOver("no extension", "bee", 1),
        PassedOver("no extension", ".", 1),
        PassedOver("misplaced .png", ".", 1),
        PassedOver("dangling link", "ant", 2),
        PassedOver("hidden", "ant", 1),
        PassedOver("no regular file", "bee", 1),
    }
    line = told(images.passed_over)
    assert line.startswith("passed over 11 files: ")
    assert "4 .xyz in 'ant', 'bee', 'bee/old'" in line
    assert "2 no extension in '.', 'bee' (give them the ending" in line
    assert "\n" not in line


def test_all_files_are_taken_or_passed_over_or_junk(tmp_path):
    """Conservation, in every layout: nothing vanishes without a word."""
    for layout in (["a", "b"], ["p/a", "p/b", "q/a"], ["train/a", "train/b", "val/a", "test/a", "test/b"]):
        root = tmp_path / str(len(layout))
        source = write_folders(root, dict.fromkeys(layout, 2))
        for folder in ("", *layout, *(f"{name}/deeper" for name in layout)):
            (root / folder).mkdir(exist_ok=True)
            for name in ("one.txt", "two.tar.gz", "three"):
                (root / folder / name).write_text("x")
        images = load(source)
        there = sum(path.is_file() for path in root.rglob("*"))
        assert len(images) + sum(part.files for part in images.passed_over) == there


@pytest.mark.parametrize("junk", ["__MACOSX/a", "@eaDir", "ant/@eaDir", "lost+found", "ant/__MACOSX"])
def test_what_systems_leave_stops_nothing(tmp_path, junk):
    source = write_folders(tmp_path, {"ant": 1, "bee": 1, junk: 2})
    for name in ("Thumbs.db", "ant/Thumbs.db", "bee/.DS_Store", "ant/._0.png", "bee/desktop.ini", ".DS_Store"):
        (tmp_path / name).write_bytes(b"junk")
    images = load(source)
    assert images.names == ["ant/0.png", "bee/0.png"]
    assert images.passed_over == ()


def test_a_folder_without_pictures_says_what_it_holds(tmp_path, monkeypatch):
    source = write_folders(tmp_path, {"ant": 1, "bee": 0})
    (tmp_path / "bee" / "1.heic").write_bytes(b"x")
    (tmp_path / "bee" / "2.dcm").write_bytes(b"x")
    monkeypatch.setattr("sordino.pictures.decoding.find_spec", lambda name: None)
    for module in ("folders", "passed_over"):
        monkeypatch.setattr(f"sordino.tasks.{module}.suffixes", lambda: frozenset({".png"}))
    with pytest.raises(DataError, match="holds no picture") as caught:
        load(source)
    assert "1 .dcm in '.' (pip install 'sordino[medical]')" in str(caught.value)
    assert "1 .heic in '.' (pip install 'sordino[heif]')" in str(caught.value)
    assert "\n" not in str(caught.value)


def test_endings_of_optional_formats_count_where_their_package_is_there(monkeypatch):
    suffixes.cache_clear()
    assert (".dcm" in suffixes()) == (find_spec("pydicom") is not None)
    assert (".heic" in suffixes()) == (find_spec("pillow_heif") is not None)
    monkeypatch.setattr("sordino.pictures.decoding.find_spec", lambda name: None)
    suffixes.cache_clear()
    assert ".dcm" not in suffixes()
    monkeypatch.undo()
    suffixes.cache_clear()


def test_heic_pictures_are_read(tmp_path):
    pytest.importorskip("pillow_heif")
    suffixes()  # registers the format
    source = write_folders(tmp_path, {"ant": 1, "bee": 1})
    (tmp_path / "bee" / "photo.HEIC").write_bytes(content(picture(200, (16, 16)), "HEIF", quality=95))
    images = load(source)
    assert images.names[2] == "bee/photo.HEIC"
    assert images.passed_over == ()
    assert abs(images.image(2).getpixel((3, 3))[0] - 200) <= 3


# --- names -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("layout", "expected"),
    [
        ({"_": 1, "a": 1}, "folder '_' gives its class no name"),
        ({"p/_": 1, "p/a": 1}, "folder '_' gives its class no name"),
        ({"__/a": 1, "q/b": 1}, "folder '__' gives its domain no name"),
        ({"p_q/a": 1, "p q/b": 1}, "name the same domain 'p q'"),
    ],
)
def test_names_of_nothing_and_names_alike_are_refused(tmp_path, layout, expected):
    with pytest.raises(DataError, match=expected):
        load(write_folders(tmp_path, layout))


def table_of(tmp_path, labels, key="label"):
    import pyarrow
    from pyarrow import parquet

    rows = [{"bytes": content(picture(row)), "path": None} for row in range(len(labels))]
    parquet.write_table(pyarrow.table({"image": rows, key: labels}), tmp_path / "some.parquet")
    return f"hf:{tmp_path / 'some.parquet'}"


def test_labels_that_are_numbers_can_be_named(tmp_path):
    source = table_of(tmp_path, [7, 3, 7, 3])
    for given in (["polar_bear", "ant"], {"7": "ant", "3": "polar bear", "9": "never seen"}):
        images = load(source, class_names=given)
        assert images.class_names == ("polar bear", "ant")
        assert images.labels.tolist() == [1, 0, 1, 0]
    with pytest.raises(ConfigError, match=r"data.class_names = .*has 3 names, and .* 2 labels \(3, 7\)"):
        load(source, class_names=["a", "b", "c"])
    with pytest.raises(ConfigError, match=r"data.class_names = .*no name for label '7'.* labels 3, 7"):
        load(source, class_names={"3": "a"})


def test_the_domain_keeps_its_own_names(tmp_path):
    dataset().to_parquet(tmp_path / "some.parquet")
    images = load(f"hf:{tmp_path / 'some.parquet'}", class_names=["cat of the woods", "hound"])
    assert images.class_names == ("cat of the woods", "hound")
    assert images.domain_names == ("photo", "sketch")


def test_a_column_that_cannot_be_labels_is_named_by_its_key(tmp_path):
    source = table_of(tmp_path, [0.5, 1.5, 0.5, 1.5])
    with pytest.raises(ConfigError, match=r"^data.label_column = 'label': .*holds float"):
        load(source)
    with pytest.raises(DataError, match="column 'label' has an empty value '_'"):
        load(table_of(tmp_path, ["_", "a"]))


def test_a_domain_column_that_cannot_be_one_is_named_by_its_key(tmp_path):
    import pyarrow
    from pyarrow import parquet

    rows = [{"bytes": content(picture(row)), "path": None} for row in range(2)]
    columns = {"image": rows, "label": ["a", "b"], "where": [0.5, 1.5]}
    parquet.write_table(pyarrow.table(columns), tmp_path / "some.parquet")
    with pytest.raises(ConfigError, match=r"^data.domain_column = 'where': .*holds float"):
        load(f"hf:{tmp_path / 'some.parquet'}", domain_column="where")


# --- files that others name ------------------------------------------------------------------------------------------


def rows_of_paths(tmp_path, paths):
    import pyarrow
    from pyarrow import parquet

    (tmp_path / "data").mkdir(exist_ok=True)
    rows = [{"bytes": None, "path": path} for path in paths]
    kind = pyarrow.struct([("bytes", pyarrow.binary()), ("path", pyarrow.string())])
    columns = {"image": pyarrow.array(rows, kind), "label": ["ab"[row % 2] for row in range(len(paths))]}
    parquet.write_table(pyarrow.table(columns), tmp_path / "data" / "some.parquet")
    return load(f"hf:{tmp_path / 'data' / 'some.parquet'}")


def test_relative_paths_start_at_the_data_sets_folder(tmp_path, monkeypatch):
    (tmp_path / "data" / "pictures").mkdir(parents=True)
    (tmp_path / "elsewhere" / "pictures").mkdir(parents=True)
    (tmp_path / "data" / "pictures" / "0.png").write_bytes(content(picture(11)))
    (tmp_path / "elsewhere" / "pictures" / "0.png").write_bytes(content(picture(99)))
    monkeypatch.chdir(tmp_path / "elsewhere")
    images = rows_of_paths(tmp_path, ["pictures/0.png", str(tmp_path / "elsewhere" / "pictures" / "0.png")])
    assert [images.image(row).getpixel((0, 0))[0] for row in range(2)] == [11, 99]


def test_a_row_that_names_no_regular_file_is_an_unreadable_picture(tmp_path, monkeypatch):
    os.mkfifo(tmp_path / "pipe")
    (tmp_path / "link").symlink_to(tmp_path / "pipe")
    (tmp_path / "large").write_bytes(b"")
    os.truncate(tmp_path / "large", MAX_BYTES + 1)  # a hole: no disk is used
    bad = {
        str(tmp_path / "pipe"): "not a regular file",
        "../link": "not a regular file",
        "/dev/zero": "not a regular file",
        "/dev/stdin": "not a regular file|No such",
        str(tmp_path): "not a regular file",
        "nowhere.png": "No such file",
        "a\0b": "no file can have its path",
        "https://example.invalid/0.png": "No such file",
        "": "the file is empty",
        None: "the file is empty",
        str(tmp_path / "large"): "larger than the .* bytes that are read",
    }
    images = rows_of_paths(tmp_path, [*bad, *bad])
    for row, expected in enumerate(bad.values()):
        with pytest.raises(DataError, match=expected) as caught:
            images.image(row)
        assert "\n" not in str(caught.value)


def test_a_file_that_grows_or_says_no_size_is_bounded(tmp_path):
    (tmp_path / "a").write_bytes(b"12345678")
    assert read_regular(tmp_path / "a", 8) == b"12345678"
    with pytest.raises(DataError, match="larger than the 7 bytes"):
        read_regular(tmp_path / "a", 7)
    if Path("/proc/self/status").exists():  # says that it has no bytes, and has some
        with pytest.raises(DataError, match="larger than the 7 bytes"):
            read_regular(Path("/proc/self/status"), 7)


def test_a_picture_that_became_a_pipe_is_unreadable(tmp_path):
    images = load(write_folders(tmp_path, {"a": 1, "b": 1}))
    (tmp_path / "a" / "0.png").unlink()
    os.mkfifo(tmp_path / "a" / "0.png")
    with pytest.raises(DataError, match="not a regular file"):
        images.image(0)


# --- depth -----------------------------------------------------------------------------------------------------------


def test_a_given_gray_range_is_taken_and_is_part_of_what_identifies_a_picture(tmp_path):
    source = write_folders(tmp_path, {"a": 1, "b": 1})
    (tmp_path / "a" / "0.png").write_bytes(png16(wide(12)))
    with pytest.raises(DataError, match="set gray_range"):
        load(source).image(0)
    images = load(source, gray_range=[0, 4095])
    np.testing.assert_array_equal(np.asarray(images.image(0)), RAMP)
    assert images.image(1) == load(source).image(1)  # 8 bits need nothing said
    other = load(source, gray_range=[0, 8190])
    assert len({images.raw(0), other.raw(0), load(source).raw(0)}) == 3
    np.testing.assert_array_equal(np.asarray(images.subset([0]).image(0)), RAMP)
