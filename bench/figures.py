"""Figures: quantities that were measured several times, and the spread of the samples."""

import os
import statistics
import time
from collections.abc import Callable, Hashable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, TypeVar

Label = str | int | float
Side = TypeVar("Side", bound=Hashable)


@dataclass(frozen=True, slots=True)
class Figure:
    """A quantity under some conditions; no other figure of the report has the same `labels`."""

    labels: Mapping[str, Label]
    unit: str
    samples: Sequence[float]

    @property
    def median(self) -> float:
        """Return the median of the samples, which is the value of the figure."""
        return statistics.median(self.samples)

    @property
    def low(self) -> float:
        """Return the smallest sample."""
        return min(self.samples)

    @property
    def high(self) -> float:
        """Return the largest sample."""
        return max(self.samples)

    def as_json(self) -> dict[str, Any]:
        """Return the figure as it is in a report."""
        facts = {"unit": self.unit, "median": self.median, "low": self.low, "high": self.high}
        return {"labels": dict(self.labels), **facts, "samples": list(self.samples)}

    @classmethod
    def from_json(cls, facts: Mapping[str, Any]) -> "Figure":
        """Return a figure from a report."""
        return cls(facts["labels"], facts["unit"], facts["samples"])


def alternate(rounds: int, sides: Mapping[Side, Callable[[], float]], pause: float = 0) -> dict[Side, list[float]]:
    """Measure each side once in each round, in every other round backwards, so that other load affects all sides alike.

    In a pause, in seconds, the kernel finishes the work that one side has left to it, before the next side begins.
    """
    samples: dict[Side, list[float]] = {side: [] for side in sides}
    for number in range(rounds):
        for side in list(sides)[:: 1 if number % 2 == 0 else -1]:
            if pause:
                os.sync()
                time.sleep(pause)
            samples[side].append(sides[side]())
    return samples


def compared(labels: Mapping[str, Label], unit: str, samples: Mapping[str, Sequence[float]], one: str) -> Iterator[Figure]:
    """Yield the figure of each side, and the ratio of one of them to each other, taken round by round."""
    for name, values in samples.items():
        yield Figure({**labels, "what": name}, unit, values)
    for name, values in samples.items():
        if name != one:
            ratios = [mine / other for mine, other in zip(samples[one], values, strict=True)]
            yield Figure({**labels, "what": f"{one} / {name}"}, "ratio", ratios)
