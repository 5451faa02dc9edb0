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
