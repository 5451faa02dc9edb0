"""Directories and files, where the standard library leaves something to wish for. Everything here blocks."""

import os
import shutil
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

from trio_pilot.log import LOGGER


@contextmanager
def opened(path: Path, flags: int) -> Iterator[int]:
    """Open a file (open(2)) for a while."""
    descriptor = os.open(path, flags | os.O_CLOEXEC)
    try:
        yield descriptor
    finally:
        os.close(descriptor)


def remove_tree(root: Path) -> None:
    """Remove a directory with all that is in it, locked directories too; log what cannot be removed."""
    with suppress(RecursionError):  # a thousand directories in each other
        shutil.rmtree(root, ignore_errors=True)
        if root.exists():
            _unlock(root)
            shutil.rmtree(root, ignore_errors=True)
    if root.exists():
        LOGGER.warning("cannot remove all of %s", root)


def _unlock(root: Path) -> None:
    """Let us into the directories that a task has locked, from the top down."""
    with suppress(OSError):
        root.chmod(0o700)
    for directory, names, _ in os.walk(root):
        for path in (Path(directory, name) for name in names):
            if not path.is_symlink():  # what it leads to is none of ours
                with suppress(OSError):
                    path.chmod(0o700)


def write_durably(path: Path, content: bytes) -> None:
    """Write a file that is either there as a whole, on disk, or not at all."""
    temporary = path.with_name(f".{path.name}.part")
    try:
        with temporary.open("wb") as file:
            file.write(content)
            file.flush()
            os.fsync(file.fileno())
        temporary.rename(path)
    except BaseException:
        with suppress(OSError):
            temporary.unlink(missing_ok=True)
        raise
    sync(path.parent)


def write_all(descriptor: int, content: bytes) -> None:
    """Write to a descriptor, for as long as it takes."""
    rest = memoryview(content)
    while rest:
        rest = rest[os.write(descriptor, rest) :]


def make_durably(directory: Path) -> None:
    """Make a directory, and those above it, so that they are there after a power failure."""
    if not directory.is_dir():
        make_durably(directory.parent)
        directory.mkdir(exist_ok=True)
        sync(directory.parent)


def sync(path: Path) -> None:
    """Have a file, or the names in a directory, on disk."""
    with opened(path, os.O_RDONLY) as descriptor:
        os.fsync(descriptor)
