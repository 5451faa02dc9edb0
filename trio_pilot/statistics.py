"""Run times, summed up in constant memory."""

import math
from collections.abc import Iterator

BUCKETS_PER_DOUBLING = 16  # a percentile is right within 2.2 %
BAR = 40  # characters of the longest bar of a histogram


class RunTimes:
    """Counts run times in buckets that grow with the time, as HdrHistogram does."""

    def __init__(self) -> None:
        self.count = 0
        self._sum = 0.0
        self._least, self._most = math.inf, 0.0
        self._buckets: dict[int, int] = {}

    def add(self, seconds: float) -> None:
        """Count one run."""
        self.count += 1
        self._sum += seconds
        self._least, self._most = min(self._least, seconds), max(self._most, seconds)
        bucket = round(BUCKETS_PER_DOUBLING * math.log2(max(seconds, 1e-6)))
        self._buckets[bucket] = self._buckets.get(bucket, 0) + 1

    def percentile(self, percent: float) -> float:
        """Give the time that `percent` of the runs did not exceed, in seconds."""
        wanted = max(1, math.ceil(self.count * percent / 100))
        for bucket in sorted(self._buckets):
            wanted -= self._buckets[bucket]
            if wanted <= 0:
                return float(min(max(2.0 ** (bucket / BUCKETS_PER_DOUBLING), self._least), self._most))
        return math.nan

    def lines(self) -> Iterator[str]:
        """Say it for people."""
        if not self.count:
            return
        yield f"run times: mean {_time(self._sum / self.count)}, median {_time(self.percentile(50))}"
        marks = ", ".join(f"{percent} % {_time(self.percentile(percent))}" for percent in (90, 95, 99))
        yield f"percentiles: least {_time(self._least)}, {marks}, most {_time(self._most)}"
        yield from self._histogram()

    def _histogram(self) -> Iterator[str]:
        doublings: dict[int, int] = {}
        for bucket, count in self._buckets.items():
            doubling = bucket // BUCKETS_PER_DOUBLING
            doublings[doubling] = doublings.get(doubling, 0) + count
        largest = max(doublings.values())
        for doubling in range(min(doublings), max(doublings) + 1):
            count = doublings.get(doubling, 0)
            bar = "#" * math.ceil(BAR * count / largest)
            yield f"{_time(2.0**doubling):>8} to {_time(2.0 ** (doubling + 1)):<8} {count:>8} {bar}".rstrip()


def _time(seconds: float) -> str:
    return f"{seconds:.3g} s" if seconds >= 1 else f"{seconds * 1000:.3g} ms"
