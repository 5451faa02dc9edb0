"""`python -m bench compare A.json B.json`: list what has changed between two reports by more than the noise of both."""

from collections.abc import Iterator
from pathlib import Path

from bench.figures import Figure
from bench.report import Report, aligned, rounded

LEAST_CHANGE = 0.03  # part of the figure; the same machine differs by that much from day to day
LEAST_CHANGE_OF_ONE = 0.2  # of figures with one sample only, whose noise is not known


def compare(before: Path, after: Path) -> str:
    """Return a comparison of two reports, or of two directories. Raises SystemExit if the reports differ in kind."""
    if before.is_dir() and after.is_dir():
        names = sorted({path.name for path in before.glob("*.json")} & {path.name for path in after.glob("*.json")})
        return "\n\n".join(compare(before / name, after / name) for name in names) or "no report is in both directories"
    old, new = _read(before), _read(after)
    if old.name != new.name:
        raise SystemExit(f"{before} is a report of {old.name}, and {after} one of {new.name}: compare two of the same")
    rows = list(_changes(old, new))
    changes = aligned([["figure", "before", "after", "change"], *rows]) if rows else "nothing has changed beyond the noise"
    return "\n".join(
        [f"{old.name}: {old.commit} ({old.made}) and {new.commit} ({new.made})", *_conditions(old, new), changes]
    )


def _read(path: Path) -> Report:
    try:
        return Report.read(path)
    except (OSError, ValueError, LookupError, TypeError) as error:
        raise SystemExit(f"{path} is not a report: {error}") from error


def _conditions(old: Report, new: Report) -> Iterator[str]:
    """Yield a line for each other difference between the reports."""
    for what in ("machine", "versions", "settings"):
        one, other = getattr(old, what), getattr(new, what)
        for name in sorted({**one, **other}):
            if name != "load before" and one.get(name) != other.get(name):
                yield f"not the same {what}: {name}: {one.get(name)} before, {other.get(name)} after"


def _changes(old: Report, new: Report) -> Iterator[list[str]]:
    found = {_name(figure): figure for figure in new.figures}
    for figure in old.figures:
        name = _name(figure)
        other = found.pop(name, None)
        if other is None:
            yield [name, rounded(figure.median), "", "gone"]
        elif has_changed(figure, other):
            yield [name, rounded(figure.median), rounded(other.median), _change(figure, other)]
    yield from ([name, "", rounded(figure.median), "new"] for name, figure in found.items())


def has_changed(old: Figure, new: Figure) -> bool:
    """Return whether the samples do not overlap, and the medians differ by more than the least change."""
    apart = new.low > old.high or new.high < old.low
    least = LEAST_CHANGE if min(len(old.samples), len(new.samples)) > 1 else LEAST_CHANGE_OF_ONE
    return apart and abs(new.median - old.median) > least * abs(old.median)


def _change(old: Figure, new: Figure) -> str:
    return f"{100 * (new.median / old.median - 1):+.0f} %" if old.median else "from nothing"


def _name(figure: Figure) -> str:
    return ", ".join(f"{name} {value}" for name, value in figure.labels.items()) + (
        f" [{figure.unit}]" if figure.unit else ""
    )
