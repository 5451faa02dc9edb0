"""A report: the figures of a measurement, with the machine, versions and settings for which they hold."""

import json
import os
import platform
import subprocess
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from datetime import UTC, datetime
from importlib import metadata
from pathlib import Path
from typing import Any

from bench.figures import Figure

ROOT = Path(__file__).parent.parent
RESULTS = ROOT / "bench" / "results"

LOAD = os.getloadavg()[0]  # of the machine, before the measurements

LIBRARIES = ("cyclopts", "httpx", "pika", "trio", "trio-pilot", "trio-util", "zstandard")


@dataclass(frozen=True, slots=True)
class Report:
    """The figures of one measurement, and its conditions."""

    name: str
    figures: Sequence[Figure]
    settings: Mapping[str, Any]  # of the measurement and of the servers beside it
    versions: Mapping[str, str]
    machine: Mapping[str, Any] = field(default_factory=lambda: machine())
    commit: str = field(default_factory=lambda: commit())
    made: str = field(default_factory=lambda: datetime.now(UTC).isoformat(timespec="seconds"))

    def find(self, **labels: Any) -> Figure:
        """Return the figure that has these labels. Raises LookupError if there is not exactly one."""
        found = [figure for figure in self.figures if labels.items() <= figure.labels.items()]
        if len(found) != 1:
            raise LookupError(f"{len(found)} figures of {self.name} have {labels}")
        return found[0]

    def write(self, directory: Path) -> Path:
        """Write the report as JSON, and return its path."""
        facts = {name: getattr(self, name) for name in ("name", "made", "commit", "machine", "versions", "settings")}
        path = directory / f"{self.name}.json"
        directory.mkdir(parents=True, exist_ok=True)
        path.write_text(json.dumps({**facts, "figures": [figure.as_json() for figure in self.figures]}, indent=1) + "\n")
        return path

    @classmethod
    def read(cls, path: Path) -> "Report":
        """Read a report."""
        facts = json.loads(path.read_text())
        return cls(**{**facts, "figures": [Figure.from_json(figure) for figure in facts["figures"]]})

    def table(self) -> str:
        """Return a table with a line for each figure, under the names of the labels."""
        names = [*dict.fromkeys(name for figure in self.figures for name in figure.labels)]
        rows = [[str(figure.labels.get(name, "")) for name in names] + list(_amounts(figure)) for figure in self.figures]
        return aligned([[*names, "median", "low", "high", "unit"], *rows])


def _amounts(figure: Figure) -> Iterator[str]:
    yield from (rounded(number) for number in (figure.median, figure.low, figure.high))
    yield figure.unit


def rounded(number: float) -> str:
    """Return a number with three significant digits."""
    return f"{number:.0f}" if abs(number) >= 100 else f"{number:.3g}"


def aligned(rows: Sequence[Sequence[str]]) -> str:
    """Return rows of words in columns, with numbers aligned to the right."""
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    is_number = [all(_is_number(word) for word in column[1:]) for column in zip(*rows, strict=True)]
    lines = (
        "  ".join(
            word.rjust(width) if right else word.ljust(width)
            for word, width, right in zip(row, widths, is_number, strict=True)
        )
        for row in rows
    )
    return "\n".join(line.rstrip() for line in lines)


def _is_number(word: str) -> bool:
    try:
        float(word or "0")
    except ValueError:
        return False
    return True


def machine() -> dict[str, Any]:
    """Return the facts about this machine on which speed depends."""
    facts = {name.strip(): value.strip() for name, _, value in _lines(Path("/proc/cpuinfo"))}
    memory = {name: value.strip() for name, _, value in _lines(Path("/proc/meminfo"))}
    return {
        "cpu": facts.get("model name", platform.machine()),
        "cores": len(os.sched_getaffinity(0)),
        "memory": memory["MemTotal"],
        "kernel": platform.release(),
        "load before": LOAD,
    }


def _lines(path: Path) -> Iterator[tuple[str, str, str]]:
    return (line.partition(":") for line in path.read_text().splitlines())


def commit() -> str:
    """Return the commit that is measured, with `-dirty` if files differ from it."""
    command = ["git", "-C", str(ROOT), "describe", "--always", "--dirty", "--abbrev=12", "--exclude=*"]
    try:
        return subprocess.run(command, capture_output=True, text=True, check=True).stdout.strip()
    except (OSError, subprocess.CalledProcessError):
        return "unknown"


def versions(**programs: str) -> dict[str, str]:
    """Return the versions of Python, of the libraries that the pilot uses, and of these programs."""
    return {"python": platform.python_version(), **{name: metadata.version(name) for name in LIBRARIES}, **programs}
