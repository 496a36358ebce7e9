"""The table of a comparison, for Python."""

from __future__ import annotations

import importlib
import io
from typing import Any

from sordino.errors import SordinoError
from sordino.experiments.compare import Row, to_csv


class Comparison(list[Row]):
    """The rows of a comparison, one for each method and setting."""

    def frame(self) -> Any:
        """Return a pandas frame with the columns of `comparison.csv`, a line a row.

        A number that does not apply, such as the accuracy on novel classes where there are none, is NaN.

        Raises:
            SordinoError: pandas is not installed.
        """
        try:
            pandas: Any = importlib.import_module("pandas")
        except ImportError:
            raise SordinoError(
                "a frame needs pandas, which is not installed: pip install pandas; or read comparison.csv"
            ) from None
        words = dict.fromkeys(("algorithm", "variation", "best_rounds"), str)
        return pandas.read_csv(io.StringIO(to_csv(self)), converters=words)
