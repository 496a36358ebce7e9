"""The `[data]`, `[partition]` and `[poisoning]` tables of a config.

These models check everything that does not depend on the data; `sordino.tasks.splits` checks the
rest against it.
"""

from __future__ import annotations

import math
from typing import Literal

from pydantic import BaseModel, ConfigDict, Field, field_validator, model_validator

SOURCES = "'digits', 'textile', 'imagefolder:PATH', 'table:PATH', or 'hf:NAME_OR_PATH'"
COLUMNS = ("image_column", "label_column", "domain_column", "person_column", "class_names")


def spoken(name: str) -> str:
    """Return the name of a class or domain for a prompt: a folder's or label's name with underscores as spaces."""
    return " ".join(name.replace("_", " ").split())


class DataSettings(BaseModel):
    """The source of pictures, and the choice of those that train and those that test.

    "Per class" means per class *and* domain if the partition is by domain.
    """

    model_config = ConfigDict(frozen=True, extra="forbid", strict=True)

    source: str = Field(
        description="'digits' (scikit-learn's 1,797 handwritten digits), 'textile' (2,000 pictures of fabric), "
        "'imagefolder:PATH' (class folders, or domain folders of class folders), 'table:PATH' (a CSV, TSV or Parquet "
        "file with a row a picture), or 'hf:NAME_OR_PATH' (a Hugging Face data set: a hub name, a directory, or a "
        "parquet file)"
    )
    public: str | None = Field(
        default=None,
        description="a folder of public pictures, at any depth and without classes, that privacy.directions = 'images' "
        "uses; none may be a picture of the source",
    )
    train_per_class: int | None = Field(
        default=None,
        ge=1,
        description="pictures a class to train on (few-shot); absent: all that do not test",
    )
    test_per_class: int | None = Field(
        default=None,
        ge=1,
        description="pictures a class in every evaluation set; absent: all that do not train, or, where "
        "train_per_class is absent too, test_fraction of them",
    )
    test_fraction: float = Field(
        default=0.3,
        gt=0,
        lt=1,
        description="share of each class that tests; used where neither count is given and the source brings no test "
        "split of its own",
    )
    novel_classes: int = Field(
        default=0,
        ge=0,
        description="how many classes nobody trains on (the last ones of a permutation drawn from the seed); accuracy "
        "on them, among themselves, is the novel accuracy",
    )
    held_out_domain: str | None = Field(
        default=None,
        description="a domain that nobody trains on; accuracy on it is the domain accuracy",
    )
    image_column: str | None = Field(
        default=None,
        description="the column of pictures, or in a table of their files; absent: the one with a usual name",
    )
    label_column: str | None = Field(
        default=None,
        description="the column of classes; absent: the only column of class labels, or one with a usual name",
    )
    domain_column: str | None = Field(
        default=None, description="the column of domains; absent: 'domain' (or, in a table, 'site') where there is one"
    )
    person_column: str | None = Field(
        default=None,
        description="the column that says whose each picture is; absent: in a table 'person' or 'patient' where there "
        "is one, else nothing does",
    )
    persons: str | None = Field(
        default=None,
        description="path of a CSV file with the columns file and person, which says whose each picture is",
    )
    person_level: int | None = Field(
        default=None,
        ge=1,
        description="imagefolder: the level of the folders that are persons: 1 directly above the pictures, 2 above",
    )
    hf_config: str | None = Field(
        default=None,
        description="hf: the configuration of a data set that has several",
    )
    revision: str | None = Field(
        default=None,
        description="hf: branch, tag or commit of a data set on the hub",
    )

    class_names: list[str] | dict[str, str] | None = Field(
        default=None,
        description="names for a column's labels that are numbers or codes: a list in the order of the sorted labels, "
        "or a table from label to name; absent: the labels themselves",
    )
    gray_range: list[float] | None = Field(
        default=None,
        min_length=2,
        max_length=2,
        description="the values that are black and white in gray pictures of more than 8 bits, for example [0, 4095] "
        "for 12 bits, or a window in Hounsfield units for DICOM; absent: as each file says, and a file that does not "
        "say is not read",
    )

    @field_validator("class_names")
    @classmethod
    def _real_names(
        cls,
        names: list[str] | dict[str, str] | None,
    ) -> list[str] | dict[str, str] | None:
        given = [spoken(name) for name in (names.values() if isinstance(names, dict) else names or [])]
        if "" in given:
            raise ValueError("a class name must not be empty")
        if twice := next((name for name in given if given.count(name) > 1), None):
            raise ValueError(f"two classes are named {twice!r}; give each a name of its own")
        return names

    @field_validator("gray_range")
    @classmethod
    def _two_values(cls, ends: list[float] | None) -> list[float] | None:
        if ends is not None and not (all(math.isfinite(end) for end in ends) and ends[0] != ends[1]):
            raise ValueError("must be two different finite numbers: the values of black and white")
        return ends

    @field_validator("source")
    @classmethod
    def _known_source(cls, source: str) -> str:
        kind, colon, rest = source.partition(":")
        named = kind in ("imagefolder", "table", "hf") and bool(rest.strip())
        if not (named or (kind in ("digits", "textile") and not colon)):
            raise ValueError(f"must be {SOURCES}")
        return source

    @model_validator(mode="after")
    def _keys_fit_the_source(self) -> DataSettings:
        kind = self.source.partition(":")[0]
        for keys, kinds in ((COLUMNS, ("hf", "table", "imagefolder")), (("hf_config", "revision"), ("hf",))):
            given = next((key for key in keys if getattr(self, key) is not None), None)
            if given is not None and kind not in kinds:
                raise ValueError(f"{given} applies to sources {' and '.join(kinds)} only, not to {self.source!r}")
        if self.person_level is not None and not self.source.startswith("imagefolder:"):
            raise ValueError(f"person_level applies to a source 'imagefolder:PATH' only, not to {self.source!r}")
        says_whose = [key for key in ("person_column", "persons", "person_level") if getattr(self, key) is not None]
        if len(says_whose) > 1:
            raise ValueError(f"{says_whose[0]} and {says_whose[1]} both say whose a picture is; give one of them")
        if self.gray_range is not None and self.source in ("digits", "textile"):
            raise ValueError(
                f"gray_range does not apply to {self.source!r}, whose pictures have 8 bits",
            )
        return self


class PartitionSettings(BaseModel):
    """The division of training pictures over clients."""

    model_config = ConfigDict(frozen=True, extra="forbid", strict=True)

    scheme: Literal["disjoint", "classes", "dirichlet", "iid", "domain"] = Field(
        description="'disjoint': no class at two clients; 'classes': client i holds classes_per_client classes from "
        "the i-th on, cyclically, and holders of a class divide its pictures; 'dirichlet': each class is divided in "
        "proportions drawn from Dirichlet(beta); 'iid': at random; 'domain': a client holds pictures of one domain, "
        "divided within it at random or, with beta, by Dirichlet(beta)"
    )
    clients: int = Field(ge=1, description="number of clients")
    classes_per_client: int | None = Field(
        default=None, ge=1, description="classes: how many classes each client holds"
    )
    beta: float | None = Field(
        default=None,
        ge=1e-3,
        allow_inf_nan=False,
        description="dirichlet, and as an option domain: the concentration; small makes clients differ, large makes "
        "them alike",
    )
    shuffle_classes: bool | None = Field(
        default=None,
        description="disjoint, classes: whether the seed decides which client holds which classes, rather than the "
        "classes' order; absent: yes for disjoint, no for classes",
    )

    @model_validator(mode="after")
    def _what_the_scheme_needs(self) -> PartitionSettings:
        for key, needed_by, options in (
            ("classes_per_client", "classes", ()),
            ("beta", "dirichlet", ("domain",)),
        ):
            given = getattr(self, key) is not None
            if given and self.scheme not in (needed_by, *options):
                applies = " and ".join(f"'{scheme}'" for scheme in (needed_by, *options))
                raise ValueError(f"{key} applies to scheme {applies} only, not to '{self.scheme}'")
            if not given and self.scheme == needed_by:
                raise ValueError(f"{key} is needed with scheme '{needed_by}'")
        if self.shuffle_classes is not None and self.scheme not in ("disjoint", "classes"):
            raise ValueError(
                f"shuffle_classes applies to schemes 'disjoint' and 'classes', not to '{self.scheme}'",
            )
        return self

    @property
    def shuffled(self) -> bool:
        """Return `shuffle_classes`, or the scheme's default if it is absent."""
        return self.scheme == "disjoint" if self.shuffle_classes is None else self.shuffle_classes


class PoisoningSettings(BaseModel):
    """Attacking clients: a trigger in some of their training pictures, and the label of these pictures."""

    model_config = ConfigDict(frozen=True, extra="forbid", strict=True)

    clients: int = Field(
        default=1,
        ge=0,
        description="how many clients attack: the first ones; 0 measures only",
    )
    rate: float = Field(
        default=0.5,
        gt=0,
        le=1,
        description="fraction of an attacker's pictures that get the trigger",
    )
    target: str = Field(description="the class that pictures with the trigger shall be taken for")
    trigger_size: float = Field(
        default=0.25,
        gt=0,
        le=0.5,
        description="side of the trigger, a checkered square, over the picture's shorter one",
    )
    boost: float = Field(
        default=1.0,
        ge=1,
        allow_inf_nan=False,
        description="factor on what an attacker sends, before a mechanism clips it",
    )
