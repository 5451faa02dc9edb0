from collections.abc import Iterator
from contextlib import suppress
from pathlib import Path

import pytest

from tests.support.disks import small_disk
from tests.support.pilots import PilotCommand, RunningPilot
from tests.support.users import UNPRIVILEGED, needs_root

COPY = ("sh", "-c", 'cp "$0" "$1"', "{{INFILE}}", "{{OUTFILE}}")
RETURNED, FAILED_ONCE = (0, False), (1, False)  # (attempts, claimed) of a message in a queue
NODE_ERROR = 4  # the exit code


@pytest.fixture
def disk(tmp_path: Path) -> Iterator[Path]:
    with small_disk(tmp_path / "disk", 256) as disk:
        yield disk


def fill(disk: Path, *, but: int = 0) -> None:
    with (disk / "filling").open("wb", buffering=0) as file:
        with suppress(OSError):
            while True:
                file.write(b"x" * 4096)
        file.truncate(max(0, file.tell() - but))


def failed_for_the_node(pilot: RunningPilot, why: str) -> None:
    assert pilot.wait() == NODE_ERROR
    assert pilot.last_line.startswith("trio-pilot: ")
    assert pilot.last_line.endswith(why)
    assert [line for line in pilot.stderr.splitlines() if line.startswith("trio-pilot: ")] == [pilot.last_line]


@needs_root
def test_a_full_disk_is_seen_before_an_event_is_taken(pilots: PilotCommand, runtime: str, disk: Path) -> None:
    pilots.send("event")
    fill(disk)
    pilot = pilots.run(*COPY, runtime=runtime, data_dir_parent_path_on_host=disk)
    failed_for_the_node(pilot, f"cannot write the data directory {disk}/ewms-pilot-data: No space left on device")
    assert "listening" not in pilot.stderr
    assert pilots.queue() == [RETURNED]


@needs_root
def test_a_disk_that_an_event_does_not_fit_on_gives_it_back(pilots: PilotCommand, runtime: str, disk: Path) -> None:
    pilots.send("x" * 100_000, "small")
    fill(disk, but=65_536)
    pilot = pilots.run(*COPY, runtime=runtime, data_dir_parent_path_on_host=disk)
    assert pilot.wait() == NODE_ERROR
    assert pilot.last_line.startswith("trio-pilot: cannot write the input file")
    assert "No space left on device" in pilot.last_line
    assert pilots.queue() == [RETURNED] * 2
    assert [entry.name for entry in disk.iterdir()] == ["filling"]


@needs_root
def test_a_disk_without_inodes_gives_an_event_back(pilots: PilotCommand, runtime: str, tmp_path: Path) -> None:
    pilots.send("event")
    # Enough for the data directory and the first directory of a task.
    with small_disk(tmp_path / "disk", 256, inodes=7) as disk:
        pilot = pilots.run(*COPY, runtime=runtime, data_dir_parent_path_on_host=disk)
        assert pilot.wait() == NODE_ERROR
        assert "No space left on device" in pilot.last_line
        assert pilots.queue() == [RETURNED]
        assert list(disk.iterdir()) == []


@needs_root
@pytest.mark.parametrize("inodes", [4, 6, 8, 9, 11])
def test_with_few_inodes_an_event_is_done_or_given_back(pilots: PilotCommand, tmp_path: Path, inodes: int) -> None:
    pilots.send("event")
    with small_disk(tmp_path / "disk", 256, inodes=inodes) as disk:
        pilot = pilots.run("true", data_dir_parent_path_on_host=disk)
        assert (pilot.wait(), pilots.queue()) in [(0, []), (NODE_ERROR, [RETURNED])]
        assert list(disk.iterdir()) == []


@needs_root
def test_a_task_that_fills_the_disk_fails_and_leaves_it_empty(pilots: PilotCommand, runtime: str, disk: Path) -> None:
    pilots.send("event")
    script = 'cat /dev/zero > filling; cat /dev/zero > "$0"; echo the disk is full >&2; exit 1'
    pilot = pilots.run("sh", "-c", script, "{{OUTFILE}}", runtime=runtime, data_dir_parent_path_on_host=disk)
    assert pilot.wait() == 1
    reason = "(there is no room left on the disk)"  # so the task could not write the reason
    assert pilot.last_line == f"1 TASK(S) FAILED: ContainerRunError('task failed (exit code 1): {reason}')"
    assert pilots.queue() == [FAILED_ONCE]
    assert list(disk.iterdir()) == []


@needs_root
def test_the_output_of_a_task_that_fills_the_disk_and_succeeds_is_sent(
    pilots: PilotCommand, runtime: str, disk: Path
) -> None:
    pilots.send("event")
    script = 'echo done > "$0"; cat /dev/zero > filling; exit 0'
    pilot = pilots.run("sh", "-c", script, "{{OUTFILE}}", runtime=runtime, data_dir_parent_path_on_host=disk)
    assert pilot.wait() == 0
    assert pilots.receive() == ["done\n"]
    assert list(disk.iterdir()) == []


@needs_root
def test_a_disk_that_a_task_filled_is_free_for_the_next(pilots: PilotCommand, runtime: str, disk: Path) -> None:
    pilots.send("one", "two", "three")
    script = "cat /dev/zero; cat /dev/zero > filling; exit 1"
    pilot = pilots.run(
        *("sh", "-c", script),
        runtime=runtime,
        data_dir_parent_path_on_host=disk,
        stop_listening_on_task_error="false",
        max_attempts=1,
    )
    assert pilot.wait() == 1
    assert pilot.last_line.startswith("3 TASK(S) FAILED: ")
    assert list(disk.iterdir()) == []


def test_a_directory_that_cannot_be_written_is_one_clear_line(pilots: PilotCommand, tmp_path: Path) -> None:
    pilots.send("event")
    (locked := tmp_path / "locked").mkdir(mode=0o555)
    for file in tmp_path.glob("*.sqlite*"):
        file.chmod(0o666)
    tmp_path.chmod(0o777)  # for the queue file, which the user of the pilot has to write
    pilot = pilots.run(*COPY, prefix=UNPRIVILEGED, data_dir_parent_path_on_host=locked)
    failed_for_the_node(pilot, f"cannot write the data directory {locked}/ewms-pilot-data: Permission denied")
    assert pilots.queue() == [RETURNED]


def test_a_data_directory_of_another_user_is_one_clear_line(pilots: PilotCommand, tmp_path: Path) -> None:
    pilots.send("event")
    (tmp_path / "ewms-pilot-data").mkdir(mode=0o555)
    for file in tmp_path.glob("*.sqlite*"):
        file.chmod(0o666)
    tmp_path.chmod(0o777)
    pilot = pilots.run(*COPY, prefix=UNPRIVILEGED)
    failed_for_the_node(pilot, f"cannot write the data directory {tmp_path}/ewms-pilot-data: Permission denied")
    assert pilots.queue() == [RETURNED]
    (tmp_path / "ewms-pilot-data").rmdir()


def test_a_missing_parent_is_one_clear_line_and_not_created(pilots: PilotCommand, tmp_path: Path, runtime: str) -> None:
    pilots.send("event")
    missing = tmp_path / "missing" / "deep"
    pilot = pilots.run(*COPY, runtime=runtime, data_dir_parent_path_on_host=missing)
    failed_for_the_node(pilot, f"cannot write the data directory {missing}/ewms-pilot-data: No such file or directory")
    assert pilots.queue() == [RETURNED]
    assert not missing.parent.exists()


@pytest.mark.parametrize("kind", ["mkdir", "ln -s /etc/passwd", "mkfifo"])
def test_an_output_of_the_wrong_kind_fails_the_event_and_not_the_pilot(
    pilots: PilotCommand, runtime: str, kind: str
) -> None:
    pilots.send("event")
    pilot = pilots.run("sh", "-c", f'{kind} "$0"', "{{OUTFILE}}", runtime=runtime)
    assert pilot.wait() == 1
    assert pilot.last_line.startswith("1 TASK(S) FAILED: OutfileError('the output file must be a plain file")
    assert pilots.queue() == [FAILED_ONCE]
    assert not pilots.data.exists()


FILL_THE_HUB = 'grep -q bad "$0" && { echo x > "$2/more"; cat /dev/zero > "$2/big"; exit 1; }; cat "$2/first" > "$1"'


@needs_root
def test_an_event_that_fills_the_data_hub_is_charged_and_others_are_done(
    pilots: PilotCommand, runtime: str, disk: Path
) -> None:
    pilots.send("bad", "good", "good")
    pilot = pilots.run(
        *("sh", "-c", FILL_THE_HUB, "{{INFILE}}", "{{OUTFILE}}", "{{DATA_HUB}}"),
        init_args="sh -c 'echo first > {{DATA_HUB}}/first'",
        runtime=runtime,
        data_dir_parent_path_on_host=disk,
        stop_listening_on_task_error=False,
        retry_delay=0,
        max_attempts=2,
    )
    assert pilot.wait() == 1, pilot.stderr
    assert "what tasks have added to the data hub is removed" in pilot.stderr
    assert len(pilots.queue("outputs")) == 2
    assert pilots.queue() == []
