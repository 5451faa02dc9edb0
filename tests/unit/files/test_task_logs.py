import math
import os
import re
from collections.abc import Iterator
from io import BufferedReader
from pathlib import Path

import pytest
import trio

from tests.support.lab import Lab
from tests.support.waiting import PATIENCE
from trio_pilot.errors import TasksFailedError
from trio_pilot.files import log_copies, task_logs
from trio_pilot.files.blocking_calls import BlockingCalls
from trio_pilot.files.error_summary import error_summary
from trio_pilot.files.task_directory import TaskFiles
from trio_pilot.files.task_logs import TAIL, TaskLogs, cut, finish, open_log
from trio_pilot.runtimes import Container
from trio_pilot.settings import Settings

NOTE = b"\n[trio-pilot: output beyond %d bytes was dropped]\n"


@pytest.fixture
def log(tmp_path: Path) -> Path:
    return tmp_path / "stdoutfile"


def test_a_log_that_fits_is_not_changed(log: Path) -> None:
    for content in (b"", b"x" * 100):
        log.write_bytes(content)
        cut(log, 100)
        finish(log, 100)
        assert log.read_bytes() == content


def test_the_beginning_of_a_complete_log_is_kept_with_a_note(log: Path) -> None:
    log.write_bytes(b"x" * 100 + b"y")
    finish(log, 100)
    assert log.read_bytes() == b"x" * 100 + NOTE % 100


def test_a_log_is_not_cut_while_beginning_and_end_are_all_of_it(log: Path) -> None:
    log.write_bytes(b"x" * (100 + TAIL))
    cut(log, 100)
    assert log.stat().st_size == 100 + TAIL


def test_a_writer_goes_on_after_beginning_and_end(log: Path) -> None:
    with open_log(log) as writer:
        writer.write(b"begin" + b"x" * 10 * TAIL + b"\nthe last line so far\n")
        cut(log, 5)
        assert log.stat().st_size == 5 + TAIL
        assert error_summary(log) == "the last line so far"
        writer.write(b"and some more\n")
    assert log.stat().st_size == 5 + TAIL + 14
    assert error_summary(log) == "and some more"
    assert log.read_bytes().startswith(b"beginxxx")
    finish(log, 5)
    assert log.read_bytes() == b"begin" + NOTE % 5


def test_a_log_is_empty_when_it_is_opened(log: Path) -> None:
    log.write_bytes(b"of the task before")
    open_log(log).close()
    assert log.read_bytes() == b""


def test_what_a_task_puts_in_the_place_of_its_log_is_not_changed(log: Path, tmp_path: Path) -> None:
    (other := tmp_path / "other").write_bytes(b"x" * 10 * TAIL)
    log.symlink_to(other)
    cut(log, 5)
    finish(log, 5)
    assert other.stat().st_size == 10 * TAIL
    for missing in (log.parent / "missing", log.parent):
        cut(missing, 0)
        finish(missing, 0)


async def test_logs_are_cut_while_they_grow_and_no_longer(autojump_clock: trio.testing.MockClock, tmp_path: Path) -> None:
    logs = TaskLogs(5, BlockingCalls())
    (growing := tmp_path / "growing").write_bytes(b"x" * 10 * TAIL)
    (other := tmp_path / "other").write_bytes(b"x" * 10 * TAIL)
    async with trio.open_nursery() as nursery:
        nursery.start_soon(logs.watch)
        with logs.growing(growing):
            await trio.sleep(1.5)
            assert growing.stat().st_size == 5 + TAIL
            growing.write_bytes(b"x" * 10 * TAIL)
        await trio.sleep(10)
        assert growing.stat().st_size == other.stat().st_size == 10 * TAIL
        logs.close()
    assert autojump_clock.current_time() == 11.5


async def test_without_running_tasks_nothing_wakes_up(tmp_path: Path) -> None:
    logs = TaskLogs(5, BlockingCalls())
    async with trio.open_nursery() as nursery:
        nursery.start_soon(logs.watch)
        with logs.growing(tmp_path):
            pass
        await trio.testing.wait_all_tasks_blocked()
        assert trio.lowlevel.current_statistics().seconds_to_next_deadline == math.inf
        logs.close()


# In a pilot.


class Writer:
    """A task that writes a MiB to each log ten times a second for some seconds, and fails."""

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
async def test_a_task_that_writes_without_end_is_cut_and_its_error_is_reported(lab: Lab) -> None:
    lab.runtime.script = task = Writer(seconds=5)
    lab.put("event")
    with pytest.raises(TasksFailedError, match=r"task failed \(exit code 1\): why it failed'"):
        await run(lab)
    assert task.most <= 13 * 2**20
    assert contents(lab) == KEPT


@pytest.mark.mock_clock
async def test_the_logs_of_an_init_container_are_cut_too(lab: Lab) -> None:
    lab.runtime.script = task = Writer(seconds=5, code=0)
    await run(lab, init_args=("prepare",))
    assert task.most <= 13 * 2**20
    assert contents(lab) == KEPT


@pytest.mark.mock_clock
@pytest.mark.parametrize("times", [[0.55], [0.55, 0.55]])
async def test_the_logs_of_a_task_that_is_killed_are_cut_too(lab: Lab, times: list[float]) -> None:
    lab.runtime.script = Writer(seconds=30)
    lab.put("event")
    await lab.run_signalled(times, max_output=2**20, keep_all_task_files=True, grace=0.3)
    assert contents(lab) == KEPT


async def run(lab: Lab, **more: object) -> None:
    await lab.run(max_output=2**20, keep_all_task_files=True, **more)


def test_sixteen_mebibytes_are_kept_by_default() -> None:
    assert Settings().max_output == 16 * 2**20


def files_of(directory: Path, stdout: bytes) -> TaskFiles:
    files = TaskFiles(directory, "", "")
    files.stdout.parent.mkdir(parents=True)
    files.stdout.write_bytes(stdout)
    files.stderr.write_bytes(b"")
    return files


@pytest.fixture
def pipe(monkeypatch: pytest.MonkeyPatch) -> Iterator[BufferedReader]:
    """The end to read of a pipe in the place of this process's stdout and stderr."""
    read_end, write_end = os.pipe()
    with os.fdopen(read_end, "rb") as reader, os.fdopen(write_end, "wb") as writer:
        monkeypatch.setattr(log_copies, "STDOUT", writer.fileno())
        monkeypatch.setattr(log_copies, "STDERR", writer.fileno())
        monkeypatch.setattr(log_copies, "are_files", lambda: False)
        yield reader


@pytest.mark.parametrize("failed", [False, True])
async def test_while_stdout_is_not_read_only_one_task_waits_for_it(
    tmp_path: Path, pipe: BufferedReader, failed: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(task_logs, "FAILED_SHOW_TIMEOUT" if failed else "SHOW_TIMEOUT", 0.5)
    content = b"x" * 2**17  # a pipe has room for 64 KiB
    first, second, third = (files_of(tmp_path / str(number), content) for number in range(3))
    logs, received = TaskLogs(2**20, BlockingCalls()), b""
    with trio.fail_after(PATIENCE):
        begun = trio.current_time()
        await logs.show(first, failed=failed)
        assert trio.current_time() - begun < 1.5
        begun = trio.current_time()
        await logs.show(second, failed=failed)
        assert trio.current_time() - begun < 0.5
        async with trio.open_nursery() as nursery:
            nursery.start_soon(show_until_read, logs, third, failed)
            while received.count(b"x") < 2 * len(content):
                received += await trio.to_thread.run_sync(pipe.read1, 2**16)
            nursery.cancel_scope.cancel()
    names = [f"start of stdout of {number}" in received.decode() for number in range(3)]
    assert names == ([True, False, True] if failed else [False, False, False])


async def show_until_read(logs: TaskLogs, files: TaskFiles, failed: bool) -> None:
    while True:  # until the thread that was given up has ended
        await logs.show(files, failed=failed)
        await trio.sleep(0.01)


@pytest.mark.mock_clock
@pytest.mark.parametrize(("name", "code", "task_timeout"), [("event", 3, None), ("event", 0, 0.25), ("init", 3, None)])
async def test_the_logs_of_what_fails_are_shown_between_marks(
    lab: Lab, capfd: pytest.CaptureFixture[str], name: str, code: int, task_timeout: float | None
) -> None:
    async def script(container: Container) -> int:
        container.stdout.write_text("to stdout")
        await trio.sleep(1)
        return code

    lab.runtime.script = script
    lab.put("event")
    with pytest.raises((TasksFailedError, BaseExceptionGroup)):
        await lab.run(task_timeout=task_timeout, **({"init_args": ("prepare",)} if name == "init" else {}))
    out, err = capfd.readouterr()
    assert re.fullmatch(r"\[trio-pilot: start of stdout of (\S+)\]\nto stdout\n\[trio-pilot: end of stdout of \1\]\n", out)
    assert re.search(
        r"\[trio-pilot: start of stderr of (\S+)\]\n<no stderr logs>\n\[trio-pilot: end of stderr of \1\]\n", err
    )


@pytest.mark.mock_clock
async def test_of_what_a_failing_task_writes_the_bound_is_shown(lab: Lab, capfd: pytest.CaptureFixture[str]) -> None:
    lab.runtime.script = Writer(seconds=1)
    lab.put("event")
    with pytest.raises(TasksFailedError):
        await lab.run(max_output=1000)
    out, err = capfd.readouterr()
    assert out.count("o" * 100) == 10
    assert NOTE.decode() % 1000 in out
    assert NOTE.decode() % 1000 in err
    assert len(out) < 1500


@pytest.mark.mock_clock
async def test_the_logs_of_a_task_that_succeeds_are_not_shown(lab: Lab, capfd: pytest.CaptureFixture[str]) -> None:
    lab.runtime.script = Writer(seconds=1, code=0)
    lab.put("event")
    await lab.run()
    assert capfd.readouterr().out == ""
