"""Figures: what was measured, several times, and how far the samples lie apart."""

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
    """A quantity under some conditions: `labels` tell it from all others of its report."""

    labels: Mapping[str, Label]
    unit: str
    samples: Sequence[float]

    @property
    def median(self) -> float:
        """The figure itself."""
        return statistics.median(self.samples)

    @property
    def low(self) -> float:
        """The least sample."""
        return min(self.samples)

    @property
    def high(self) -> float:
        """The largest sample."""
        return max(self.samples)

    def as_json(self) -> dict[str, Any]:
        """Give what a report keeps of it."""
        facts = {"unit": self.unit, "median": self.median, "low": self.low, "high": self.high}
        return {"labels": dict(self.labels), **facts, "samples": list(self.samples)}

    @classmethod
    def from_json(cls, facts: Mapping[str, Any]) -> "Figure":
        """Read one of a report."""
        return cls(facts["labels"], facts["unit"], facts["samples"])


def alternate(rounds: int, sides: Mapping[Side, Callable[[], float]], pause: float = 0) -> dict[Side, list[float]]:
    """Measure each side once a round, every other round backwards: what else happens to the machine happens to all.

    In a pause, in seconds, the kernel does what one side has left to it, and not in the time of the next.
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
    """Give each side's figure, and of one of them the ratio to each other, taken round by round."""
    for name, values in samples.items():
        yield Figure({**labels, "what": name}, unit, values)
    for name, values in samples.items():
        if name != one:
            ratios = [mine / other for mine, other in zip(samples[one], values, strict=True)]
            yield Figure({**labels, "what": f"{one} / {name}"}, "ratio", ratios)
