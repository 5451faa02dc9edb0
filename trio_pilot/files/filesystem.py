"""Directories and files, where the standard library does not suffice. Everything here blocks."""

import os
import shutil
import stat
import subprocess
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

from trio_pilot.log import LOGGER

# Before Python 3.14, those of pathlib raise if a directory may not be read, or a name is too long. These return False.
exists, is_directory, is_file, is_link = os.path.exists, os.path.isdir, os.path.isfile, os.path.islink

RM_TIMEOUT = 60.0  # seconds that rm may take


@contextmanager
def opened(path: Path, flags: int) -> Iterator[int]:
    """Open a file (open(2)) for the body."""
    descriptor = os.open(path, flags | os.O_CLOEXEC)
    try:
        yield descriptor
    finally:
        os.close(descriptor)


def remove_tree(root: Path) -> None:
    """Remove a directory with all that is in it, also directories without permissions. Log it if something is left."""
    if not try_to_remove(root):
        LOGGER.warning("cannot remove all of %s", root)


def try_to_remove(root: Path) -> bool:
    """Remove a directory as `remove_tree` does; return whether it is gone."""
    for remove in (_remove, _unlock, _remove, _remove_by_rm):
        if os.path.lexists(root):
            remove(root)
    return not os.path.lexists(root)


def _remove(root: Path) -> None:
    with suppress(RecursionError):  # a thousand nested directories
        shutil.rmtree(root, ignore_errors=True)


def _unlock(root: Path) -> None:
    """Restore this user's permissions on the directories of a tree, from the top down: a task may have removed them."""
    for directory in _directories(root):
        with suppress(OSError):
            directory.chmod(0o700)


def _directories(root: Path) -> Iterator[Path]:
    """Yield `root` and the directories below it, as far as they can be listed; each one before it is listed."""
    directories = [root]
    while directories:  # os.walk goes no deeper than a thousand
        yield (directory := directories.pop())
        with suppress(OSError), os.scandir(directory) as entries:
            # The target of a symbolic link is not part of the tree.
            directories += [Path(entry.path) for entry in entries if entry.is_dir(follow_symlinks=False)]


def _remove_by_rm(root: Path) -> None:
    """Remove directories that are nested deeper than Python's recursion goes."""
    nothing = subprocess.DEVNULL
    with suppress(OSError, subprocess.TimeoutExpired):
        subprocess.run(
            ["rm", "-rf", "--", str(root)],
            env={},  # rm is found by os.defpath then: the guardian has no PATH
            stdin=nothing,
            stdout=nothing,
            stderr=nothing,
            start_new_session=True,
            timeout=RM_TIMEOUT,
            check=False,
        )


def is_locked(directory: Path) -> bool:
    """Return whether this user cannot empty a directory: it denies something, or is another's and has the sticky bit."""
    facts = directory.lstat()
    is_sticky = bool(facts.st_mode & stat.S_ISVTX) and os.geteuid() not in (0, facts.st_uid)
    return is_sticky or not os.access(directory, os.R_OK | os.W_OK | os.X_OK, effective_ids=True)


def locked_directories(root: Path) -> set[Path]:
    """Return `root` and the directories below it, those that this user cannot empty, as far as they can be found."""
    locked: set[Path] = set()
    for directory in _directories(root):
        with suppress(OSError):
            if is_locked(directory):
                locked.add(directory)
    return locked


def write_durably(path: Path, content: bytes) -> None:
    """Write a file and sync it to disk; after a crash it is there as a whole, or not at all."""
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
    """Write all of `content` to a descriptor, however many calls it takes."""
    rest = memoryview(content)
    while rest:
        rest = rest[os.write(descriptor, rest) :]


def make_durably(directory: Path) -> None:
    """Make a directory and its parents, and sync them to disk: they survive a power failure."""
    if not directory.is_dir():
        make_durably(directory.parent)
        directory.mkdir(exist_ok=True)
        sync(directory.parent)


def sync(path: Path) -> None:
    """Sync a file, or the names in a directory, to disk."""
    with opened(path, os.O_RDONLY) as descriptor:
        os.fsync(descriptor)
