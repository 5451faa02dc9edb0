# Nodes on which every task fails, and events that fail on every node.

import shutil
from collections.abc import Callable
from pathlib import Path

import pytest

from tests.support.pilots import PilotCommand
from tests.support.waiting import until_sync
from trio_pilot.errors import NodeError

EVENTS = 60
COPY = ("sh", "-c", 'sleep 0.05; cat "$1" > "$2"', "copy", "{{INFILE}}", "{{OUTFILE}}")


@pytest.fixture
def own_image(image: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(image, tmp_path / "own-image", symlinks=True))


def goes_away(image: Path) -> None:
    (image / "bin/busybox").unlink()


def cannot_be_read(image: Path) -> None:
    (image / "bin/other").touch(0o755)
    (image / "bin/other").rename(image / "bin/busybox")  # the file itself cannot be written while it runs


def may_not_be_run(image: Path) -> None:
    (image / "bin/busybox").chmod(0o600)


@pytest.mark.parametrize("breaks", [goes_away, cannot_be_read, may_not_be_run])
@pytest.mark.parametrize("slots", [1, 8])
def test_a_node_that_breaks_takes_one_event_a_slot_and_charges_none(
    pilots: PilotCommand, own_image: Path, breaks: Callable[[Path], None], slots: int, need: Callable[[str, str], None]
) -> None:
    need("bwrap", "bubblewrap")
    pilots.send(*range(EVENTS))
    pilot = pilots.start(
        *COPY,
        runtime="bubblewrap",
        task_image=own_image,
        stop_listening_on_task_error=False,
        retry_delay=0,
        max_concurrent_tasks=slots,
    )
    until_sync(lambda: len(pilots.queue("outputs")) >= 3, "three outputs")
    breaks(own_image)
    assert pilot.wait() == NodeError.exit_code
    assert "this node breaks tasks: " in pilot.last_line
    assert sum(" WARNING event " in line and ", attempt " in line for line in pilot.stderr.splitlines()) <= slots
    waiting = pilots.queue()
    assert waiting == [(0, False)] * (EVENTS - len(pilots.queue("outputs")))


@pytest.mark.parametrize("breaks", [cannot_be_read, may_not_be_run])
def test_a_node_bad_from_the_start_takes_no_event_and_holds_its_slot(
    pilots: PilotCommand, own_image: Path, breaks: Callable[[Path], None], need: Callable[[str, str], None]
) -> None:
    need("bwrap", "bubblewrap")
    pilots.send(*range(3))
    breaks(own_image)
    pilot = pilots.run(*COPY, runtime="bubblewrap", task_image=own_image, quarantine_time=0.1)
    assert pilot.wait() == NodeError.exit_code
    assert "holding the slot for 0.1 s" in pilot.stderr
    assert "listening" not in pilot.stderr
    assert pilots.queue() == [(0, False)] * 3


def test_an_image_without_the_command_true_is_good(
    pilots: PilotCommand, own_image: Path, need: Callable[[str, str], None]
) -> None:
    need("bwrap", "bubblewrap")
    (own_image / "bin/true").unlink()
    pilots.send("event")
    pilot = pilots.run(*COPY, runtime="bubblewrap", task_image=own_image)
    assert pilot.wait() == 0, pilot.stderr
    assert pilots.receive() == ["event"]


@pytest.mark.usefixtures("runtime")
def test_poison_does_not_stop_a_good_node(pilots: PilotCommand, runtime: str) -> None:
    pilots.send(*range(20))
    script = 'n=$(cat "$1"); [ $((n % 10)) -gt 2 ] || exit 3; cat "$1" > "$2"'
    pilot = pilots.run(
        *("sh", "-c", script, "some", "{{INFILE}}", "{{OUTFILE}}"),
        runtime=runtime,
        stop_listening_on_task_error=False,
        max_attempts=2,
        retry_delay=0,
        max_concurrent_tasks=2,
    )
    assert pilot.wait() == 1, pilot.stderr
    assert sorted(map(int, map(str, pilots.receive()))) == [number for number in range(20) if number % 10 > 2]
    assert len(pilots.queue("events.dead-letters")) == 6
