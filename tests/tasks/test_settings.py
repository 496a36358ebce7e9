"""Settings: what is refused before any data is looked at, and that saying so costs no heavy import."""

import subprocess
import sys

import pytest
from pydantic import ValidationError

from sordino.tasks import DataSettings, PartitionSettings


@pytest.mark.parametrize("source", ["digits", "textile", "imagefolder:/some/where", "hf:owner/name"])
def test_known_sources(source):
    assert DataSettings(source=source).source == source


@pytest.mark.parametrize("source", ["", "mnist", "digits:8", "imagefolder:", "hf: ", "imagefolder"])
def test_an_unknown_source_is_refused_with_what_is_allowed(source):
    with pytest.raises(ValidationError, match="'imagefolder:PATH'"):
        DataSettings(source=source)


@pytest.mark.parametrize(
    ("model", "values", "expected"),
    [
        (DataSettings, {"source": "digits", "shots": 4}, "Extra inputs"),
        (DataSettings, {"source": "digits", "train_per_class": 0}, "greater than or equal to 1"),
        (DataSettings, {"source": "digits", "train_per_class": "4"}, "valid integer"),
        (DataSettings, {"source": "digits", "test_fraction": 1.0}, "less than 1"),
        (DataSettings, {"source": "digits", "label_column": "y"}, "label_column applies to sources hf and table"),
        (DataSettings, {"source": "digits", "class_names": ["a", "b"]}, "class_names applies to sources hf and table"),
        (DataSettings, {"source": "table:x.csv", "revision": "main"}, "revision applies to sources hf only"),
        (DataSettings, {"source": "table:"}, "must be 'digits', 'textile', 'imagefolder:PATH', 'table:PATH'"),
        (DataSettings, {"source": "hf:x", "class_names": ["a", "_"]}, "must not be empty"),
        (DataSettings, {"source": "hf:x", "class_names": {"0": "a_b", "1": "a b"}}, "two classes are named 'a b'"),
        (DataSettings, {"source": "hf:x", "gray_range": [1.0, 1.0]}, "two different finite numbers"),
        (DataSettings, {"source": "hf:x", "gray_range": [0.0, float("inf")]}, "two different finite numbers"),
        (DataSettings, {"source": "hf:x", "gray_range": [0.0]}, "at least 2 items"),
        (DataSettings, {"source": "digits", "gray_range": [0, 9]}, "whose pictures have 8 bits"),
        (PartitionSettings, {"scheme": "random", "clients": 2}, "'disjoint', 'classes'"),
        (PartitionSettings, {"scheme": "iid", "clients": 0}, "greater than or equal to 1"),
        (
            PartitionSettings,
            {"scheme": "iid", "clients": 2, "beta": 1.0},
            "applies to scheme 'dirichlet' and 'domain' only",
        ),
        (PartitionSettings, {"scheme": "dirichlet", "clients": 2}, "beta is needed"),
        (PartitionSettings, {"scheme": "dirichlet", "clients": 2, "beta": float("inf")}, "finite"),
        (PartitionSettings, {"scheme": "classes", "clients": 2}, "classes_per_client is needed"),
        (PartitionSettings, {"scheme": "domain", "clients": 2, "shuffle_classes": True}, "not to 'domain'"),
    ],
)
def test_bad_values_are_refused(model, values, expected):
    with pytest.raises(ValidationError, match=expected):
        model(**values)


def test_every_setting_is_described():
    for model in (DataSettings, PartitionSettings):
        assert all(field.description for field in model.model_fields.values())


def test_settings_import_nothing_heavy():
    heavy = "[name for name in ('torch', 'numpy', 'PIL', 'datasets', 'sklearn') if name in sys.modules]"
    code = f"import sys, sordino.tasks.settings; print({heavy})"
    assert subprocess.check_output([sys.executable, "-c", code], text=True).strip() == "[]"
