"""Directories and files, where the standard library does not suffice. Everything here blocks."""

import os
import shutil
import stat
import subprocess
import uuid
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, suppress
from pathlib import Path

from trio_pilot.log import LOGGER

# Before Python 3.14, those of pathlib raise if a directory may not be read, or a name is too long. These return False.
exists, is_directory, is_file, is_link = os.path.exists, os.path.isdir, os.path.isfile, os.path.islink

Inode = tuple[int, int]  # of a device, and of a file there

O_DIRECTORY_PATH = os.O_PATH | os.O_NOFOLLOW | os.O_DIRECTORY | os.O_CLOEXEC  # a directory, even one that is closed
RM_TIMEOUT = 60.0  # seconds that rm may take


@contextmanager
def opened(path: Path | str, flags: int, mode: int = 0o600, directory: int | None = None) -> Iterator[int]:
    """Open a file for the body, as open(2) does; its path may be relative to a directory that is open."""
    descriptor = os.open(path, flags | os.O_CLOEXEC, mode, dir_fd=directory)
    try:
        yield descriptor
    finally:
        os.close(descriptor)


def inode(facts: os.stat_result) -> Inode:
    """Return what makes a file the same under any name."""
    return facts.st_dev, facts.st_ino


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
    for _, descriptor in _directories(root):
        with suppress(OSError):  # fchmod(2) refuses a descriptor of O_PATH; its name in /proc can be
            Path(f"/proc/self/fd/{descriptor}").chmod(0o700)


def _directories(root: Path) -> Iterator[tuple[Path, int]]:
    """Yield `root` and the directories below it, as far as they can be listed; each one before it is listed.

    Each comes with a descriptor (O_PATH), which is open until the next one: another user may replace a path by a link.
    """
    waiting: list[tuple[str, ...]] = [()]
    while waiting:  # os.walk goes no deeper than a thousand
        names = waiting.pop()
        with suppress(OSError), _opened_below(root, names) as descriptor:
            yield root.joinpath(*names), descriptor
            with opened(".", os.O_RDONLY, directory=descriptor) as listed, os.scandir(listed) as entries:
                # The target of a symbolic link is not part of the tree.
                waiting += [(*names, entry.name) for entry in entries if entry.is_dir(follow_symlinks=False)]


@contextmanager
def _opened_below(root: Path, names: Sequence[str]) -> Iterator[int]:
    """Open a directory below `root`, with no link followed on the way, however long its path is."""
    descriptor = os.open(root, O_DIRECTORY_PATH)
    try:
        for name in names:
            outer, descriptor = descriptor, os.open(name, O_DIRECTORY_PATH, dir_fd=descriptor)
            os.close(outer)
        yield descriptor
    finally:
        os.close(descriptor)


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
    for directory, _ in _directories(root):
        with suppress(OSError):
            if is_locked(directory):
                locked.add(directory)
    return locked


def write_durably(path: Path, content: bytes, mode: int = 0o600) -> None:
    """Write a file and sync it to disk; after a crash it is there as a whole, or not at all.

    A link with its name is replaced, not followed. Until then the file has a name that no other user can guess.
    """
    temporary = f".{uuid.uuid4().hex}.part"
    with opened(path.parent, os.O_RDONLY | os.O_DIRECTORY) as directory:
        try:
            with opened(temporary, os.O_WRONLY | os.O_CREAT | os.O_EXCL, mode, directory) as file:
                write_all(file, content)
                os.fsync(file)
            os.rename(temporary, path.name, src_dir_fd=directory, dst_dir_fd=directory)
        except BaseException:
            with suppress(OSError):
                os.unlink(temporary, dir_fd=directory)
            raise
        os.fsync(directory)


def write_all(descriptor: int, content: bytes) -> None:
    """Write all of `content` to a descriptor, however many calls it takes."""
    rest = memoryview(content)
    while rest:
        rest = rest[os.write(descriptor, rest) :]


def make_durably(directory: Path) -> None:
    """Make a directory and its parents, for this user only, and sync them to disk: they survive a power failure."""
    if not directory.is_dir():
        make_durably(directory.parent)
        directory.mkdir(mode=0o700, exist_ok=True)
        sync(directory.parent)


def sync(path: Path) -> None:
    """Sync a file, or the names in a directory, to disk."""
    with opened(path, os.O_RDONLY) as descriptor:
        os.fsync(descriptor)
