"""The processes of this machine."""

import os
from collections.abc import Iterator
from pathlib import Path


def processes_with(mark: str) -> list[int]:
    """Return the processes, zombies too, that have the mark in their command line or environment."""
    return [pid for pid in _other_processes() if mark.encode() in _command_line_and_environment(pid)]


def processes_of(directory: Path) -> list[str]:
    """Describe the processes that have a directory in their command line or environment, or work in it or below."""
    marked = set(processes_with(str(directory)))
    found = [pid for pid in _other_processes() if pid in marked or _works_in(pid, directory)]
    return [f"{pid}: {_command_line_and_environment(pid)[:200]!r}" for pid in found]


def command_line(pid: int) -> list[str]:
    """Return the arguments of a process, none if it has ended."""
    return _read(pid, "cmdline").decode(errors="replace").split("\0")[:-1]


def own_children() -> set[int]:
    """Return the children of this process, zombies too."""
    return set(map(int, Path(f"/proc/self/task/{os.getpid()}/children").read_text().split()))


def new_children(before: set[int]) -> list[str]:
    """Describe each child of this process that was not there before."""
    return [f"{pid} {_description(pid)}" for pid in own_children() - before]


def open_files() -> int:
    """Return the number of files that this process has open."""
    return len(list(Path("/proc/self/fd").iterdir()))


def _other_processes() -> Iterator[int]:
    return (int(entry.name) for entry in Path("/proc").iterdir() if entry.name.isdigit() and int(entry.name) != os.getpid())


def _command_line_and_environment(pid: int) -> bytes:
    return _read(pid, "cmdline") + _read(pid, "environ")


def _works_in(pid: int, directory: Path) -> bool:
    try:
        return str(Path(f"/proc/{pid}/cwd").readlink()).startswith(str(directory))
    except OSError:
        return False


def _description(pid: int) -> str:
    facts = _read(pid, "stat").decode(errors="replace").split()
    return " ".join([*facts[1:6], *command_line(pid)]) if facts else "has ended meanwhile"


def _read(pid: int, name: str) -> bytes:
    """Return a file of a process, empty if the process has ended."""
    try:
        return Path(f"/proc/{pid}/{name}").read_bytes()
    except OSError:
        return b""
