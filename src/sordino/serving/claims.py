"""The privacy that a prompt, a summary or a manifest states, held against its ledger, which is counted anew.

What is published is written from the ledger alone. So a text in other words, as an earlier version wrote it, is
replaced; one with another epsilon, delta or unit is refused, as one of the two is of something else.
"""

from __future__ import annotations

import math
import re
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from sordino.errors import PromptError, RunError
from sordino.privacy.ledger import Ledger, Unit
from sordino.privacy.statement import as_summary
from sordino.prompt_file import PrivacyRecord
from sordino.results import rounded_up

COUNTED = {"epsilon": 1e-4}  # by another machine; a delta is given, not counted
FIELDS = ("private", "simulated", "epsilon", "delta", "unit")

# The claim in a statement, as every version has worded it. Some of them rounded to the nearest number instead of up.
NUMBER = r"[\d.e+-]+"
CLAIM = re.compile(
    rf"epsilon (?:=|is) (?P<epsilon>{NUMBER})(?: at delta = (?P<delta>{NUMBER}))? for each (?P<unit>\w+)"
)
ROUNDING = {"epsilon": 6e-3, "delta": 0.1}


@dataclass(frozen=True)
class Spending:
    """The privacy that a ledger comes to: the fields of a summary, and the statement in words."""

    private: bool
    simulated: bool
    epsilon: float | None
    delta: float | None
    unit: Unit | None
    statement: str

    @classmethod
    def of(cls, ledger: Ledger) -> Spending:
        """Count a ledger anew, by the unit of its releases."""
        unit = ledger.releases[0].unit if ledger.releases else "example"
        counted = as_summary(ledger, unit)
        return cls(**{name: counted[name] for name in (*FIELDS, "statement")})

    def difference(self, said: Mapping[str, Any]) -> str:
        """Return in words where fields are not the ledger's; "" if all are. Fields that are not given are not said."""
        for name in FIELDS:
            if name in said and not _same(name, said[name], getattr(self, name), COUNTED):
                return _words(name, said[name], getattr(self, name))
        return ""

    def difference_in_words(self, text: str) -> str:
        """Return in words where the claim in a statement's text is not the ledger's; "" if it is, or if it has none."""
        for claim in CLAIM.finditer(text):
            for name, said in claim.groupdict().items():
                holds = getattr(self, name)
                if said is not None and not _same(name, _read(name, said), holds, ROUNDING):
                    return _words(name, said, holds)
        return ""

    def as_said(self, epsilon: float | None) -> str:
        """Return the statement with an epsilon that another machine counted."""
        if epsilon is None or self.epsilon is None:
            return self.statement
        before, after = (f"epsilon = {rounded_up(value, 4)} " for value in (self.epsilon, epsilon))
        text = self.statement.replace(before, after, 1)
        return text.replace(f"epsilon is {self.epsilon:.3g} ", f"epsilon is {epsilon:.3g} ", 1)


def check_prompt(said: PrivacyRecord, spent: Spending, source: str) -> None:
    """Check that a prompt's file says the privacy of its ledger, if perhaps in other words.

    Raises:
        PromptError: it says another one.
    """
    flags = {name: getattr(said, name) for name in ("private", "simulated")}
    if wrong := spent.difference(flags) or spent.difference_in_words(said.statement):
        raise PromptError(
            f"{source}: says another privacy than its ledger: {wrong}; take both from the run again, as it wrote them"
        )


def check_summary(said: Any, spent: Spending, place: str) -> None:
    """Check that a summary states the privacy of its ledger.

    Args:
        said: its entry `privacy`.
        spent: of the ledger.
        place: the beginning of a message.

    Raises:
        RunError: it states another one.
    """
    if wrong := spent.difference({name: getattr(said, name) for name in FIELDS}):
        raise RunError(
            f"{place} states another privacy than its ledger: {wrong}; put it back as the run wrote it, or run the "
            "experiment again"
        )


def _same(name: str, said: Any, holds: Any, tolerances: Mapping[str, float]) -> bool:
    if isinstance(said, float) and isinstance(holds, float):
        return math.isclose(said, holds, rel_tol=tolerances.get(name, 0))
    return bool(said == holds)


def _read(name: str, word: str) -> Any:
    """Return the value of a word in a claim; a sentence may end behind it. What is no number is none that holds."""
    if name == "unit":
        return word
    try:
        return float(word.rstrip("."))
    except ValueError:
        return math.nan


def _words(name: str, said: Any, holds: Any) -> str:
    return f"{name} = {said}, and the ledger comes to {holds}"
