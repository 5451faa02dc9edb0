"""The processes of this machine, as tests see them."""

import os
from collections.abc import Iterator
from pathlib import Path


def processes_with(mark: str) -> list[int]:
    """List the processes, zombies too, that have the mark in their command line or environment."""
    return [pid for pid in _all_processes() if mark.encode() in _told(pid)]


def command_line(pid: int) -> list[str]:
    """Give the arguments of a process, none if it is gone."""
    try:
        return Path(f"/proc/{pid}/cmdline").read_text().split("\0")[:-1]
    except OSError:
        return []


def _all_processes() -> Iterator[int]:
    return (int(entry.name) for entry in Path("/proc").iterdir() if entry.name.isdigit() and int(entry.name) != os.getpid())


def _told(pid: int) -> bytes:
    told = b""
    for name in ("cmdline", "environ"):
        try:
            told += Path(f"/proc/{pid}/{name}").read_bytes()
        except OSError:
            continue
    return told


def own_children() -> set[int]:
    """List the children of this process, zombies too."""
    return set(map(int, Path(f"/proc/self/task/{os.getpid()}/children").read_text().split()))


def new_children(before: set[int]) -> list[str]:
    """Say of each child that was not there before what it is."""
    return [f"{pid} {_words_of(pid)}" for pid in own_children() - before]


def _words_of(pid: int) -> str:
    try:
        facts = Path(f"/proc/{pid}/stat").read_text(errors="replace").split()
    except OSError:
        return "gone meanwhile"
    return " ".join([*facts[1:6], *command_line(pid)])


def open_files() -> int:
    return len(list(Path("/proc/self/fd").iterdir()))
