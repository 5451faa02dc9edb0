"""docs/security.md and what the suites of hostile tasks know."""

from tests.support.hostile.exceptions import EXCEPTIONS
from tests.support.paths import ROOT

HEAD = "| runtime | try | why |\n|---|---|---|\n"


def table() -> str:
    rows = [f"| {runtime} | {name} | {why} |\n" for runtime, known in EXCEPTIONS.items() for name, why in known.items()]
    return HEAD + "".join(rows)


def test_the_page_lists_what_the_runtimes_do_not_refuse() -> None:
    assert table() in (ROOT / "docs/security.md").read_text()
