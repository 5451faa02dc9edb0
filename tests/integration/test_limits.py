import re
from pathlib import Path

import pytest

from tests.support.pilots import PilotCommand
from tests.support.waiting import until_sync
from trio_pilot.files.error_summary import MOST
from trio_pilot.processes import cgroups

TASK_FAILED = 1  # the exit code
BOUND = 2**20
NOTE = f"\n[trio-pilot: output beyond {BOUND} bytes was dropped]\n".encode()
FILL = ("sh", "-c", "for stream in 1 2; do dd if=/dev/zero bs=1048576 count=64 >&$stream; done; echo 'no sky' >&2; exit 3")
ALLOCATE = ("dd", "if=/dev/zero", "of=/dev/null", "bs=200M", "count=1")


def outputs(pilots: PilotCommand) -> dict[str, Path]:
    return {path.name: path for path in pilots.data.glob("*/outputs/*")}


def test_a_task_that_writes_much_and_fails_reports_why_and_leaves_little(pilots: PilotCommand, runtime: str) -> None:
    pilots.send("event")
    settings = {"max_output": "1m", "keep_all_task_files": True}
    pilot = pilots.run(*FILL, runtime=runtime, **settings)
    assert pilot.wait() == TASK_FAILED
    assert "task failed (exit code 3): no sky" in pilot.last_line
    files = outputs(pilots)
    assert files.keys() == {"stdoutfile", "stderrfile"}
    for path in files.values():
        assert path.stat().st_size == BOUND + len(NOTE)
        assert path.read_bytes().endswith(NOTE)
    mark, _, rest = pilot.stdout.partition(b"\n")
    assert mark.startswith(b"[trio-pilot: start of stdout of ")
    assert rest.startswith(b"\0" * BOUND + NOTE)


def test_a_task_that_writes_without_end_is_held_to_the_bound_while_it_runs(pilots: PilotCommand, runtime: str) -> None:
    pilots.send("event")
    more = "dd if=/dev/zero bs=1048576 count=8 2> /dev/null; sleep 0.05"
    script = f"until test -e $0/enough; do {more}; done; echo ends >&2; exit 3"
    pilot = pilots.start("sh", "-c", script, "{{DATA_HUB}}", runtime=runtime, max_output="1m", keep_all_task_files=True)
    most = 0

    def is_cut() -> bool:
        nonlocal most
        size = next((path.stat().st_size for name, path in outputs(pilots).items() if name == "stdoutfile"), 0)
        most = max(most, size)
        return most > BOUND + MOST >= size > 0

    for _ in range(2):
        until_sync(is_cut, "the output to be cut")
        most = 0
    (pilots.data / "data-hub" / "enough").touch()
    assert pilot.wait() == TASK_FAILED
    assert "task failed (exit code 3): ends" in pilot.last_line
    assert outputs(pilots)["stdoutfile"].stat().st_size == BOUND + len(NOTE)


def test_a_task_that_uses_more_memory_than_it_may_fails_by_that(pilots: PilotCommand, runtime: str) -> None:
    found = cgroups.Groups()
    found.close()
    if "memory" not in found.controllers:
        pytest.skip(f"no control groups here: {found.fault('memory')}")
    pilots.send("event")
    pilot = pilots.run(*ALLOCATE, runtime=runtime, task_memory="64m", task_cpus=1, task_pids=20)
    assert pilot.wait() == TASK_FAILED
    assert "task failed (exit code 137): out of memory: it used more than 67108864 bytes" in pilot.last_line
    assert not [line for line in pilot.stderr.splitlines() if re.search("control group|not enforced", line)]
    assert pilots.queue() == [(1, False)]
