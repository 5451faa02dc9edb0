"""Plots of reports, as SVG. Only this module imports matplotlib."""

from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import matplotlib as mpl

from bench.figures import Figure
from bench.pilot import TRIO_PILOT
from bench.report import Report
from bench.timing_pilot import STAGES

mpl.use("svg")
# So that equal figures give equal files.
mpl.rcParams.update(
    {"svg.hashsalt": "trio-pilot", "svg.fonttype": "none", "axes.spines.top": False, "axes.spines.right": False}
)

from matplotlib import pyplot  # noqa: E402 -- the backend has to be chosen before
from matplotlib.ticker import LogFormatter  # noqa: E402

WIDTH, HEIGHT = 4.2, 3.2  # inches of each of the axes of a plot


def plot(report: Report, directory: Path) -> Path | None:
    """Draw a report, and return the path of the plot; None if reports of its kind are not drawn."""
    draw = DRAW.get(report.name)
    if draw is None:
        return None
    figure = draw(report)
    path = directory / f"{report.name}.svg"
    figure.savefig(path, metadata={"Date": None, "Creator": None})
    pyplot.close(figure)
    return path


def _axes(number: int) -> tuple[Any, list[Any]]:
    figure, axes = pyplot.subplots(1, number, figsize=(WIDTH * number, HEIGHT), layout="constrained", squeeze=False)
    return figure, list(axes[0])


def _line(axes: Any, figures: list[Figure], label: str, x: str = "slots", **style: Any) -> None:
    """Draw figures by one of their labels, with their spread."""
    places, medians = [figure.labels[x] for figure in figures], [figure.median for figure in figures]
    spread = [[figure.median - figure.low for figure in figures], [figure.high - figure.median for figure in figures]]
    axes.errorbar(places, medians, spread, marker="o", markersize=4, capsize=2, label=label, **style)


def _over_slots(axes: Any, title: str) -> None:
    axes.set_title(title)
    axes.set_xscale("log", base=2)
    axes.set_yscale("log")
    for axis in (axes.xaxis, axes.yaxis):
        axis.set_major_formatter("{x:g}")
    axes.yaxis.set_minor_formatter(LogFormatter(labelOnlyBase=False, minor_thresholds=(1, 0.4)))
    axes.set_xlabel("slots")
    axes.set_ylabel("events a second")
    axes.grid(visible=True, which="major", alpha=0.3)
    axes.legend(frameon=False, fontsize="small")


def _values(report: Report, label: str) -> list[Any]:
    return list(dict.fromkeys(figure.labels[label] for figure in report.figures if label in figure.labels))


def _having(report: Report, **labels: Any) -> list[Figure]:
    return [figure for figure in report.figures if labels.items() <= figure.labels.items()]


def _throughput(report: Report) -> Any:
    runtimes = _values(report, "runtime")
    figure, all_axes = _axes(len(runtimes))
    for axes, runtime in zip(all_axes, runtimes, strict=True):
        for seconds in _values(report, "task s"):
            chosen = {"runtime": runtime, "task s": seconds, "bytes": 1000, "what": "events"}
            _line(axes, _having(report, **chosen), f"tasks of {seconds:g} s")
        _over_slots(axes, f"{runtime}, 1 kB events")
    return figure


def _sides(by: str) -> Callable[[Report], Any]:
    """Return a function that draws the sides of a comparison by slots, in axes for each value of a label."""

    def draw(report: Report) -> Any:
        kinds = _values(report, by)
        figure, all_axes = _axes(len(kinds))
        for axes, kind in zip(all_axes, kinds, strict=True):
            rates = [figure for figure in _having(report, **{by: kind}) if figure.unit == "1/s"]
            for side in sorted(
                {str(figure.labels["what"]) for figure in rates}, key=lambda side: (side != TRIO_PILOT, side)
            ):
                _line(axes, [figure for figure in rates if figure.labels["what"] == side], side)
            _over_slots(axes, str(kind))
        return figure

    return draw


def _overhead(report: Report) -> Any:
    runtimes = [runtime for runtime in _values(report, "runtime") if _having(report, runtime=runtime, what="ran")]
    figure, all_axes = _axes(len(runtimes))
    for axes, runtime in zip(all_axes, runtimes, strict=True):
        bars = [str(figure.labels["slots"]) for figure in _having(report, runtime=runtime, what="ran")]
        bottom = [0.0] * len(bars)
        for stage in STAGES:
            heights = [figure.median for figure in _having(report, runtime=runtime, what=stage)]
            axes.bar(bars, heights, bottom=bottom, label=stage, width=0.6)
            bottom = [below + height for below, height in zip(bottom, heights, strict=True)]
        axes.set_title(runtime)
        axes.set_xlabel("slots")
        axes.set_ylabel("ms of a slot, for each event")
    figure.legend(*all_axes[0].get_legend_handles_labels(), loc="outside right center", frameon=False, reverse=True)
    return figure


def _scale(report: Report) -> Any:
    figure, (memory, together) = _axes(2)
    _line(memory, _having(report, what="memory of the pilot"), "memory", x="events")
    memory.set_xscale("log")
    memory.set_ylim(bottom=0)
    memory.set_xlabel("events done by one pilot")
    memory.set_ylabel("MB")
    _line(together, _having(report, what="events"), "events", x="pilots")
    together.set_ylim(bottom=0)
    together.set_xlabel("pilots on one queue, of one machine")
    together.set_ylabel("events a second")
    return figure


DRAW: Mapping[str, Callable[[Report], Any]] = {
    "throughput": _throughput,
    "limit": _sides("runtime"),
    "peer": _sides("engine"),
    "overhead": _overhead,
    "scale": _scale,
}
