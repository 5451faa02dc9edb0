"""The files of the embedded broker's queues, and who may use them. Everything here blocks.

Only the user who made a queue file may use it. Users that share one give it to their group by chmod and chown: it keeps the
mode that it has. Older versions made the files for all users to read; such a reader could lock them for ever.
"""

import errno
import os
import stat
from contextlib import suppress
from pathlib import Path

from trio_pilot.files.ownership import ROOT, open_plain

BESIDE = "", "-wal", "-shm", "-bell"
WRITABLE_BY_OTHERS, USABLE_BY_OTHERS = 0o022, 0o077


def open_both(path: Path, bell: Path) -> int:
    """Make the queue file and the bell beside it if they are missing; return the bell, open.

    Raises:
        OSError: they cannot be opened, or are links or files that another user put there.
    """
    _refuse_foreign_link(path)
    target = Path(os.path.realpath(path))
    queue = open_plain(target, os.O_RDWR | os.O_CREAT)
    try:
        facts = os.fstat(queue)
    finally:
        os.close(queue)
    _close_to_readers(path, facts)
    with suppress(FileExistsError):
        made = open_plain(bell, os.O_RDWR | os.O_CREAT | os.O_EXCL)
        os.fchmod(made, stat.S_IMODE(facts.st_mode) & 0o666)  # for those with whom the queue file is shared
        return made
    found = open_plain(bell, os.O_RDWR)
    if os.fstat(found).st_uid not in (os.geteuid(), facts.st_uid, ROOT):
        os.close(found)
        raise OSError(errno.EPERM, "it belongs to another user than the queue file: remove it", str(bell))
    return found


def _refuse_foreign_link(path: Path) -> None:
    """Refuse a queue file that another user has made or linked in a directory that all may write to."""
    with suppress(FileNotFoundError):
        facts, directory = path.lstat(), path.parent.stat()
        if facts.st_uid in (os.geteuid(), ROOT):
            return
        if stat.S_ISLNK(facts.st_mode) or directory.st_mode & stat.S_IWOTH:
            raise OSError(errno.EPERM, f"it belongs to user {facts.st_uid}: name another file", str(path))


def _close_to_readers(path: Path, facts: os.stat_result) -> None:
    """Close the files of this user that others may only read: no other pilot can use them."""
    if facts.st_uid != os.geteuid() or facts.st_mode & WRITABLE_BY_OTHERS or not facts.st_mode & USABLE_BY_OTHERS:
        return
    for suffix in BESIDE:
        with suppress(OSError):
            beside = open_plain(path.with_name(path.name + suffix).resolve(), os.O_RDWR)
            try:
                if os.fstat(beside).st_uid == os.geteuid():
                    os.fchmod(beside, stat.S_IMODE(facts.st_mode) & ~USABLE_BY_OTHERS)
            finally:
                os.close(beside)
