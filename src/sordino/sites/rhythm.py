"""How long a site rests after an answer, before it asks for the next question.

Engines have sites ask for work. Asking all the time costs more than small messages do, and asking seldom makes rounds
long. After an answer nothing can come before the other sites have answered too, and that takes about as long as it took
before.
"""

from __future__ import annotations

import time
from collections import deque
from collections.abc import Callable

SHARE = 0.7  # of the shortest pause lately: rounds that get shorter are waited for less soon
LATELY = 3  # pauses
LONGEST = 10.0  # seconds
IDLE = 0.1  # of the time since the last question: a site that nobody asks asks seldom


class Rhythm:
    """The pauses between a site's answers and the next questions.

    Args:
        least: seconds between two questions for work.
        most: the same of a site that was not asked for long.
        clock: seconds that only grow.
    """

    def __init__(self, least: float, most: float, clock: Callable[[], float] = time.monotonic) -> None:
        self._least, self._most, self._clock = least, most, clock
        self._pauses: deque[float] = deque(maxlen=LATELY)
        self._answered: float | None = None
        self._last = clock()

    def asked(self) -> None:
        """A question is there."""
        self._last = self._clock()
        if self._answered is not None:
            self._pauses.append(self._last - self._answered)
            self._answered = None

    def answered(self) -> float:
        """The answer is sent; return the seconds to rest now."""
        self._last = self._answered = self._clock()
        return min(SHARE * min(self._pauses), LONGEST) if len(self._pauses) == LATELY else 0.0

    def nothing(self) -> float:
        """There is no question; return the seconds until the next look."""
        return min(max(self._least, IDLE * (self._clock() - self._last)), self._most)
