"""The files of the embedded broker: the queue file, those of SQLite beside it (-wal, -shm), and the bell.

All are for this user alone: one who reads them sees the events, and can lock them for ever. A queue file that others may
write is shared on purpose: it keeps its mode, and the other files have the same users.

Where every user can write, as in /tmp, each of the files must be this user's, root's or the directory's owner's: that is the
rule of `protected_regular` (proc_sys_fs(5)), whether the kernel keeps it or not. Everything here blocks.
"""

import errno
import os
import stat
from contextlib import suppress
from pathlib import Path

from trio_pilot.files.filesystem import opened
from trio_pilot.files.ownership import PLAIN, ROOT, open_plain

BESIDE = "-wal", "-shm", "-journal"  # that SQLite makes beside a file, sqlite.org/tempfiles.html
PRIVATE = 0o600
READABLE, WRITABLE = 0o044, 0o022  # by other users


def real_path(path: Path) -> Path:
    """Return the path of the queue file itself, of whatever link: all processes are to have one bell, beside it.

    Raises:
        OSError: the link is another user's, in a directory that all users may write.
    """
    with suppress(FileNotFoundError):
        _check(path, path.lstat(), may_be_link=True)
    return Path(os.path.realpath(path))


def bell_path(path: Path) -> Path:
    """Return the path of the bell of a queue file."""
    return _beside(path, "-bell")


def all_of(path: Path) -> list[Path]:
    """Return the paths of a queue file and of all that is beside it, whether it exists or not."""
    return [*_of_sqlite(path), bell_path(path)]


def _of_sqlite(path: Path) -> list[Path]:
    return [path, *(_beside(path, ending) for ending in BESIDE)]


def _beside(path: Path, ending: str) -> Path:
    return path.with_name(path.name + ending)


def open_bell(path: Path) -> int:
    """Make the queue file and the bell beside it if they are missing; return the bell, open.

    Raises:
        OSError: they cannot be opened, or one is no plain file, or another user may have put it there.
    """
    with suppress(FileExistsError):
        os.close(os.open(path, os.O_RDWR | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC, PRIVATE))
    for name in _of_sqlite(path):
        with suppress(FileNotFoundError):
            _close_to_readers(name)
    bell = bell_path(path)
    descriptor = open_plain(bell, os.O_RDWR | os.O_CREAT, PRIVATE)
    try:
        _check(bell, os.fstat(descriptor))
        _share(descriptor, path.stat().st_mode & WRITABLE)
    except OSError:
        os.close(descriptor)
        raise
    return descriptor


def _close_to_readers(name: Path) -> None:
    """Check a file, and close it to those who may only read it: an older version made it so."""
    # By O_PATH: closing another descriptor would release the locks that this process has on the file, fcntl(2).
    with opened(name, os.O_PATH | PLAIN) as file:
        facts = os.fstat(file)
        _check(name, facts)
        mode = stat.S_IMODE(facts.st_mode)
        if mode & READABLE and not mode & WRITABLE and facts.st_uid == os.geteuid():
            os.chmod(f"/proc/self/fd/{file}", mode & PRIVATE)  # noqa: PTH101 -- a descriptor of O_PATH has no fchmod(2)


def _share(bell: int, writers: int) -> None:
    """Let those who may write the queue file ring the bell, and no others read it."""
    mode, facts = PRIVATE | writers | writers << 1, os.fstat(bell)
    if facts.st_uid == os.geteuid() and stat.S_IMODE(facts.st_mode) != mode:
        os.fchmod(bell, mode)


def _check(name: Path, facts: os.stat_result, *, may_be_link: bool = False) -> None:
    around = name.parent.stat()
    if not stat.S_ISREG(facts.st_mode) and not (may_be_link and stat.S_ISLNK(facts.st_mode)):
        raise OSError(errno.EINVAL, "it is not a plain file", str(name))
    if around.st_mode & stat.S_IWOTH and facts.st_uid not in (os.geteuid(), ROOT, around.st_uid):
        raise OSError(errno.EPERM, f"it belongs to user {facts.st_uid}: name another file", str(name))
