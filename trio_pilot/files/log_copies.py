"""Copies of a container's logs on the stdout and stderr of this process. Everything here blocks."""

import os
import stat
import sys
from contextlib import ExitStack, suppress
from pathlib import Path

from trio_pilot.files.filesystem import opened, write_all
from trio_pilot.files.task_directory import TaskFiles
from trio_pilot.log import shown

STDOUT, STDERR = 1, 2
PIECE = 65536  # bytes that are copied in one step
READ = os.O_RDONLY | os.O_NOFOLLOW | os.O_NONBLOCK  # a task may have put anything in the place of its logs


def are_files() -> bool:
    """Return whether stdout and stderr are files or /dev/null, as in a job of HTCondor: no write waits for a reader."""
    try:
        return all(_takes_all(os.fstat(descriptor)) for descriptor in (STDOUT, STDERR))
    except OSError:  # one is closed
        return True


def _takes_all(facts: os.stat_result) -> bool:
    return stat.S_ISREG(facts.st_mode) or os.path.samestat(facts, Path(os.devnull).stat())


def copy_logs(files: TaskFiles) -> None:
    """Copy the logs of a container to stdout and stderr."""
    with ExitStack() as stack:
        stdout, stderr = _opened(files.stdout, stack), _opened(files.stderr, stack)
        for descriptor, log in ((STDOUT, stdout), (STDERR, stderr)):
            with suppress(OSError):
                _copy(log, descriptor)


def copy_marked_logs(files: TaskFiles) -> None:
    """Copy the logs of a container to stdout and stderr, with a line before and after each, even if it is empty."""
    with ExitStack() as stack:
        # Both are opened first: they may be removed while this waits for a reader.
        stdout, stderr = _opened(files.stdout, stack), _opened(files.stderr, stack)
        for name, descriptor, log in (("stdout", STDOUT, stdout), ("stderr", STDERR, stderr)):
            with suppress(OSError):
                _write(descriptor, f"[trio-pilot: start of {name} of {files.root.name}]\n".encode())
                last = _copy(log, descriptor)
                if not last:
                    _write(descriptor, f"<no {name} logs>".encode())  # upstream's words
                newline = "" if last.endswith(b"\n") else "\n"
                _write(descriptor, f"{newline}[trio-pilot: end of {name} of {files.root.name}]\n".encode())


def _opened(path: Path, stack: ExitStack) -> int | None:
    try:
        log = stack.enter_context(opened(path, READ))
        return log if stat.S_ISREG(os.fstat(log).st_mode) else None
    except OSError:
        return None


def _copy(log: int | None, descriptor: int) -> bytes:
    """Copy a log, and return its last piece. Not through sys.stdout: a thread that waits there would hold its lock."""
    last = b""
    escaped = _escaped if os.isatty(descriptor) else bytes
    while log is not None and (piece := os.read(log, PIECE)):
        _write(descriptor, escaped(piece))
        last = piece
    return last


def _escaped(piece: bytes) -> bytes:
    """Return what a terminal shows of a piece and does not obey. A character at its end may be shown as its bytes."""
    return shown(piece.decode(errors="backslashreplace")).encode(errors="backslashreplace")


def _write(descriptor: int, content: bytes) -> None:
    if {STDOUT: sys.__stdout__, STDERR: sys.__stderr__}[descriptor]:  # else it was closed, and is another file by now
        write_all(descriptor, content)
