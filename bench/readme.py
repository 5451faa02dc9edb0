"""The README's section on speed: one plot and one table, made of the reports in bench/results.

`python -m bench readme` writes it, and a test checks that it agrees with the reports.
"""

import re
from collections.abc import Iterator
from pathlib import Path

from bench.figures import Figure
from bench.report import RESULTS, ROOT, Report, rounded

README = ROOT / "README.md"
SECTION = re.compile(r"(<!-- speed: .*? -->\n)(.*?)(<!-- end of speed -->)", re.DOTALL)

NOTHING_YET = "No figures yet.\n"


def write() -> None:
    """Write the section into the README."""
    README.write_text(SECTION.sub(lambda found: found[1] + markdown() + found[3], README.read_text()))


def markdown(results: Path = RESULTS) -> str:
    """Return the section for the reports in a directory."""
    peer, limit = (results / f"{name}.json" for name in ("peer", "limit"))
    if not (peer.exists() and limit.exists()):
        return NOTHING_YET
    reports = Report.read(peer), Report.read(limit)
    return "\n".join(["![Events a second](bench/results/peer.svg)", "", *_table(*reports), "", _conditions(*reports), ""])


def _table(peer: Report, limit: Report) -> Iterator[str]:
    yield "| with | slots | events/s | against | events/s | ratio (least to most) |"
    yield "|---|---|---|---|---|---|"
    for report, kind in ((peer, "engine"), (limit, "runtime")):
        for ratio in report.figures:
            if ratio.unit == "ratio":
                yield _row(report, kind, ratio)


def _row(report: Report, kind: str, ratio: Figure) -> str:
    side, other = str(ratio.labels["what"]).split(" / ")
    where = {name: ratio.labels[name] for name in (kind, "slots")}
    rates = [rounded(report.find(**where, what=what).median) for what in (side, other)]
    spread = f"{rounded(ratio.median)} ({rounded(ratio.low)} to {rounded(ratio.high)})"
    return f"| {where[kind]} | {where['slots']} | {rates[0]} | {other} | {rates[1]} | {spread} |"


def _conditions(peer: Report, limit: Report) -> str:
    """Return the line on the machine and the versions."""
    versions = {**limit.versions, **peer.versions}
    named = ", ".join(f"{name} {versions[name]}" for name in ("python", "rabbitmq", "ewms-pilot"))
    cores = f"{peer.machine['cores']} cores ({peer.machine['cpu']}), shared with RabbitMQ"
    commits = " and ".join(sorted({peer.commit, limit.commit}))
    return f"Medians; {cores}; {named}; {peer.made[:10]}, commit {commits}."
