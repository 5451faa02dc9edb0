import math
import threading
from pathlib import Path

import pytest
import trio

from tests.support.lab import Lab
from tests.support.waiting import PATIENCE, until
from trio_pilot.errors import TasksFailedError
from trio_pilot.files import task_logs
from trio_pilot.files.blocking_calls import BlockingCalls
from trio_pilot.files.error_summary import error_summary
from trio_pilot.files.task_directory import TaskFiles
from trio_pilot.files.task_logs import TAIL, TaskLogs, cut, finish, open_log
from trio_pilot.runtimes import Container
from trio_pilot.settings import Settings

NOTE = b"\n[trio-pilot: output beyond %d bytes was dropped]\n"


@pytest.fixture
def output(tmp_path: Path) -> Path:
    return tmp_path / "stdoutfile"


def test_an_output_that_fits_is_left_alone(output: Path) -> None:
    for content in (b"", b"x" * 100):
        output.write_bytes(content)
        cut(output, 100)
        finish(output, 100)
        assert output.read_bytes() == content


def test_of_an_output_that_is_complete_the_beginning_is_kept_and_the_rest_said_to_be_dropped(output: Path) -> None:
    output.write_bytes(b"x" * 100 + b"y")
    finish(output, 100)
    assert output.read_bytes() == b"x" * 100 + NOTE % 100


def test_what_cannot_be_told_from_the_end_yet_is_not_cut(output: Path) -> None:
    output.write_bytes(b"x" * (100 + TAIL))
    cut(output, 100)
    assert output.stat().st_size == 100 + TAIL


def test_a_writer_goes_on_after_beginning_and_end(output: Path) -> None:
    with open_log(output) as writer:
        writer.write(b"begin" + b"x" * 10 * TAIL + b"\nthe last words so far\n")
        cut(output, 5)
        assert output.stat().st_size == 5 + TAIL
        assert error_summary(output) == "the last words so far"
        writer.write(b"and some more\n")
    assert output.stat().st_size == 5 + TAIL + 14
    assert error_summary(output) == "and some more"
    assert output.read_bytes().startswith(b"beginxxx")
    finish(output, 5)
    assert output.read_bytes() == b"begin" + NOTE % 5


def test_an_output_is_empty_when_it_is_opened(output: Path) -> None:
    output.write_bytes(b"of the task before")
    open_log(output).close()
    assert output.read_bytes() == b""


def test_what_a_task_puts_in_the_place_of_its_output_is_left_alone(output: Path, tmp_path: Path) -> None:
    (other := tmp_path / "other").write_bytes(b"x" * 10 * TAIL)
    output.symlink_to(other)
    cut(output, 5)
    finish(output, 5)
    assert other.stat().st_size == 10 * TAIL
    for missing in (output.parent / "missing", output.parent):
        cut(missing, 0)
        finish(missing, 0)


async def test_outputs_are_looked_at_while_they_grow_and_no_longer(
    autojump_clock: trio.testing.MockClock, tmp_path: Path
) -> None:
    task_logs = TaskLogs(5, BlockingCalls())
    (growing := tmp_path / "growing").write_bytes(b"x" * 10 * TAIL)
    (other := tmp_path / "other").write_bytes(b"x" * 10 * TAIL)
    async with trio.open_nursery() as nursery:
        nursery.start_soon(task_logs.watch)
        with task_logs.growing(growing):
            await trio.sleep(1.5)
            assert growing.stat().st_size == 5 + TAIL
            growing.write_bytes(b"x" * 10 * TAIL)
        await trio.sleep(10)
        assert growing.stat().st_size == other.stat().st_size == 10 * TAIL
        task_logs.close()
    assert autojump_clock.current_time() == 11.5


async def test_nobody_wakes_up_to_look_at_nothing(tmp_path: Path) -> None:
    task_logs = TaskLogs(5, BlockingCalls())
    async with trio.open_nursery() as nursery:
        nursery.start_soon(task_logs.watch)
        with task_logs.growing(tmp_path):
            pass
        await trio.testing.wait_all_tasks_blocked()
        assert trio.lowlevel.current_statistics().seconds_to_next_deadline == math.inf
        task_logs.close()


# Of a pilot.


class Talker:
    """A task that writes a MiB to each output ten times a second for some seconds, and fails."""

    def __init__(self, seconds: float, code: int = 1) -> None:
        self.most = 0
        self._times = int(10 * seconds)
        self._code = code

    async def __call__(self, container: Container) -> int:
        with open_log(container.stdout) as stdout, open_log(container.stderr) as stderr:
            for _ in range(self._times):
                stdout.write(b"o" * 2**20)
                stderr.write(b"e" * 2**20)
                self.most = max(self.most, *(path.stat().st_size for path in (container.stdout, container.stderr)))
                await trio.sleep(0.1)
            stderr.write(b"\nwhy it failed\n")
        return self._code


def contents(lab: Lab) -> list[bytes]:
    files = (lab.directory / "ewms-pilot-data").glob("*/outputs/*")
    return [path.read_bytes() for path in sorted(files, key=lambda path: path.name)]


KEPT = [b"e" * 2**20 + NOTE % 2**20, b"o" * 2**20 + NOTE % 2**20]


@pytest.mark.mock_clock
async def test_a_task_that_talks_without_end_fills_no_disk_and_its_last_words_are_heard(lab: Lab) -> None:
    lab.runtime.script = talker = Talker(seconds=5)
    lab.put("event")
    with pytest.raises(TasksFailedError, match=r"task failed \(exit code 1\): why it failed'"):
        await run(lab)
    assert talker.most <= 13 * 2**20
    assert contents(lab) == KEPT


@pytest.mark.mock_clock
async def test_what_an_init_container_says_is_bounded_as_well(lab: Lab) -> None:
    lab.runtime.script = talker = Talker(seconds=5, code=0)
    await run(lab, init_args=("prepare",))
    assert talker.most <= 13 * 2**20
    assert contents(lab) == KEPT


@pytest.mark.mock_clock
@pytest.mark.parametrize("times", [[0.55], [0.55, 0.55]])
async def test_what_a_task_that_is_not_done_in_time_said_is_bounded_as_well(lab: Lab, times: list[float]) -> None:
    lab.runtime.script = Talker(seconds=30)
    lab.put("event")
    await lab.run_signalled(times, max_output=2**20, keep_all_task_files=True, grace=0.3)
    assert contents(lab) == KEPT


async def run(lab: Lab, **more: object) -> None:
    await lab.run(max_output=2**20, keep_all_task_files=True, **more)


def test_sixteen_mebibytes_are_kept_unless_told_otherwise() -> None:
    assert Settings().max_output == 16 * 2**20


async def test_a_stdout_that_nobody_reads_costs_one_task_a_while_and_others_nothing(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(task_logs, "SHOW_TIMEOUT", 0.05)
    shown: list[TaskFiles] = []
    reads_on = threading.Event()

    def dump(files: TaskFiles) -> None:
        reads_on.wait()
        shown.append(files)

    monkeypatch.setattr(task_logs, "dump", dump)
    first, second, third = (TaskFiles(tmp_path / str(number), "", "") for number in range(3))
    showing = TaskLogs(100, BlockingCalls())
    with trio.fail_after(PATIENCE):
        await showing.show(first)
        monkeypatch.setattr(task_logs, "SHOW_TIMEOUT", 1000)
        await showing.show(second)
        reads_on.set()
        await until(lambda: showing._showing.available_tokens)
        await showing.show(third)
    assert shown == [first, third]
