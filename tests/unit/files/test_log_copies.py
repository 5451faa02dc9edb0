import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from trio_pilot.files import log_copies
from trio_pilot.files.filesystem import opened
from trio_pilot.files.log_copies import copy_logs, copy_marked_logs
from trio_pilot.files.task_directory import TaskFiles

Capture = pytest.CaptureFixture[bytes]


@pytest.fixture
def files(tmp_path: Path) -> TaskFiles:
    files = TaskFiles(tmp_path / "name", "in", "out")
    files.stdout.parent.mkdir(parents=True)
    return files


def marked(stream: bytes, content: bytes) -> bytes:
    return b"[trio-pilot: start of %b of name]\n%b[trio-pilot: end of %b of name]\n" % (stream, content, stream)


def test_logs_are_copied_to_stdout_and_stderr(files: TaskFiles, capfdbinary: Capture) -> None:
    files.stdout.write_bytes(b"out \xff\n")
    files.stderr.write_bytes(b"err \xff\n")
    copy_logs(files)
    assert capfdbinary.readouterr() == (b"out \xff\n", b"err \xff\n")


def test_logs_that_do_not_exist_are_not_copied(files: TaskFiles, capfdbinary: Capture) -> None:
    copy_logs(files)
    assert capfdbinary.readouterr() == (b"", b"")


@pytest.mark.parametrize("end", [b"", b"\n"])
def test_marked_logs_end_with_a_line(files: TaskFiles, capfdbinary: Capture, end: bytes) -> None:
    files.stdout.write_bytes(b"out \xff" + end)
    files.stderr.write_bytes(b"e" * 2**17 + end)
    copy_marked_logs(files)
    assert capfdbinary.readouterr() == (marked(b"stdout", b"out \xff\n"), marked(b"stderr", b"e" * 2**17 + b"\n"))


@pytest.mark.parametrize("are_there", [True, False])
def test_logs_that_are_empty_are_marked_as_such(files: TaskFiles, capfdbinary: Capture, are_there: bool) -> None:
    if are_there:
        files.stdout.touch()
        files.stderr.touch()
    copy_marked_logs(files)
    nothing = marked(b"stdout", b"<no stdout logs>\n"), marked(b"stderr", b"<no stderr logs>\n")
    assert capfdbinary.readouterr() == nothing


def test_what_a_task_puts_in_the_place_of_its_logs_is_not_copied(files: TaskFiles, capfdbinary: Capture) -> None:
    os.mkfifo(files.stdout)
    files.stderr.symlink_to(__file__)
    copy_marked_logs(files)
    copy_logs(files)
    assert b"no stdout logs" in (found := capfdbinary.readouterr()).out
    assert b"import" not in found.err


def without_stdout(program: str, *arguments: str | Path) -> "subprocess.CompletedProcess[bytes]":
    command = ["sh", "-c", 'exec "$@" >&-', "sh", sys.executable, "-c", program, *arguments]
    return subprocess.run(command, stderr=subprocess.DEVNULL, check=False)


def test_logs_are_not_copied_to_a_file_in_the_place_of_stdout(files: TaskFiles, tmp_path: Path) -> None:
    files.stdout.write_bytes(b"out\n")
    program = """
import sys
from pathlib import Path
from typing import Any
from trio_pilot.files.log_copies import copy_marked_logs
from trio_pilot.files.task_directory import TaskFiles
with open(sys.argv[1], "w") as file:
    copy_marked_logs(TaskFiles(Path(sys.argv[2]), "in", "out"))
    sys.exit(file.fileno())
"""
    assert without_stdout(program, tmp_path / "queues", files.root).returncode == 1  # it is file descriptor 1
    assert (tmp_path / "queues").read_bytes() == b""


@pytest.mark.parametrize(("stdout", "expected"), [("file", 0), ("null", 0), ("pipe", 1)])
def test_only_a_reader_is_waited_for(tmp_path: Path, stdout: str, expected: int) -> None:
    program = "import sys; from trio_pilot.files.log_copies import are_files; sys.exit(not are_files())"
    with (tmp_path / "stdout").open("wb") as file:
        streams: dict[str, Any] = {"file": file, "null": subprocess.DEVNULL, "pipe": subprocess.PIPE}
        done = subprocess.run([sys.executable, "-c", program], stdout=streams[stdout], stderr=file, check=False)
    assert done.returncode == expected
    if stdout == "file":
        assert without_stdout(program).returncode == 0


def test_a_terminal_shows_escapes_of_what_it_would_obey(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    main, terminal = os.openpty()
    monkeypatch.setattr(log_copies, "STDOUT", terminal)
    monkeypatch.setattr(log_copies, "_write", os.write)
    (tmp_path / "log").write_bytes(b"a\x1b[2Jb\xffc\xc2\x9bd\n")
    with opened(tmp_path / "log", os.O_RDONLY) as log:
        log_copies._copy(log, terminal)
    assert os.read(main, 100) == rb"a\x1b[2Jb\xffc\x9bd" + b"\r\n"
    os.close(main)
    os.close(terminal)
