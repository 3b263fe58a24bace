"""The progress bar of a search: what is scored, the best so far, and how long the search will take."""

from __future__ import annotations

import statistics
from collections.abc import Mapping, Sequence

from ..processes import is_first, world_size
from ..progress import progress_bar, say
from .journal import Part, Scores, Total
from .selection import Candidate
from .texts import describe_estimate, describe_score

MEASURED = 10  # scores that an estimate is made from


class SearchBar:
    """A bar over the parts that a search scores, shown on rank 0 alone. Use it in a ``with`` block.

    After the first :data:`MEASURED` scores a line on stderr says how long the search will take.

    Args:
        candidates: of the whole search.
        sizes: of every part of theirs, in samples.
        scores: where the parts are scored.
        metric: what scores are.
        shown: False for no bar and no line.
    """

    def __init__(self, candidates: int, sizes: Sequence[int], scores: Scores, metric: str, shown: bool):
        self.candidates, self.scores, self.metric = candidates, scores, metric
        self.known_before = len({part.candidate for part in scores.known})
        self.samples = sum(sizes) - scores.samples
        self._waits = shown and is_first()  # for the first scores
        self._bar = progress_bar(total=len(sizes), desc="search", unit="path", shown=self._waits)

    def __enter__(self) -> SearchBar:
        return self

    def __exit__(self, *error: object) -> None:
        self._bar.close()

    def update(self, count: int) -> None:
        """So many more parts are scored."""
        self._bar.update(count)
        if self._waits and len(self.scores.new) >= MEASURED and self._bar.n < self._bar.total:
            self._waits = False
            seconds = estimate(self.scores.new, self.samples, world_size())
            say(describe_estimate(self.candidates, self.known_before, seconds))

    def show_best(self, best: Candidate) -> None:
        self._bar.set_postfix_str(f"best {describe_score(self.metric, best.score)} with {best.parameters:,} parameters")


def estimate(scored: Mapping[Part, Total], samples: int, processes: int) -> float:
    """The seconds that ``samples`` take: by the median of ``scored``, as the first on a device is slow.

    Args:
        processes: that share the work.
    """
    per_sample = statistics.median(total.seconds / (part.stop - part.start) for part, total in scored.items())
    return samples * per_sample / processes
