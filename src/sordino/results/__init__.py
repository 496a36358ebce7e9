"""`summary.json`, the results of one run: written, read and aggregated here and nowhere else.

Every place that shows results (the terminal's table, `comparison.csv`, the report) takes its numbers from `Results`, so
that all show the same mean, the same deviation and the same seconds. Three rules decide what these numbers are:

- A `Spread` is over what its mean is over. Several runs differ in their seed: the mean is over seeds, of each run's
  mean over clients, and the deviation is over seeds too. One run has one seed: the mean is the run's own, over its
  clients, and the deviation is over these clients.
- One value has no deviation. It is None then, and never 0, which would claim that values agree.
- Seconds are seconds of training. A run's total holds the encoding of images too, which the first run of a comparison
  does for all the others; totals do not compare.
"""

from sordino.results.aggregate import Best, Claim, Results, Spread
from sordino.results.interval import Interval, crossed, paired, points
from sordino.results.summary import (
    FILE,
    MEASURES,
    Accuracy,
    BestRound,
    ClientResult,
    Communication,
    Copies,
    Count,
    Durations,
    Effort,
    HandWritten,
    Images,
    Measure,
    ObserverEpsilon,
    PassedOver,
    PictureVariance,
    Privacy,
    SkippedImage,
    Summary,
    complaint,
)
from sordino.results.wording import dataset_name, human_bytes, human_seconds, listed, rounded_up, without_places
from sordino.results.worth import BEST_NOT_OFFERED, BEST_TOO_HIGH, gain_words, unequal_steps, verdict

__all__ = [
    "BEST_NOT_OFFERED",
    "BEST_TOO_HIGH",
    "FILE",
    "MEASURES",
    "Accuracy",
    "Best",
    "BestRound",
    "Claim",
    "ClientResult",
    "Communication",
    "Copies",
    "Count",
    "Durations",
    "Effort",
    "HandWritten",
    "Images",
    "Interval",
    "Measure",
    "ObserverEpsilon",
    "PassedOver",
    "PictureVariance",
    "Privacy",
    "Results",
    "SkippedImage",
    "Spread",
    "Summary",
    "complaint",
    "crossed",
    "dataset_name",
    "gain_words",
    "human_bytes",
    "human_seconds",
    "listed",
    "paired",
    "points",
    "rounded_up",
    "unequal_steps",
    "verdict",
    "without_places",
]
