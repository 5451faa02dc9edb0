"""Images that a dead pilot has left unfinished. Everything here blocks.

Used by the guardian, which has only the standard library; by the sweep at the start of the next pilot; and by the next pilot
that unpacks an image.
"""

import fcntl
import os
import stat
from pathlib import Path

from trio_pilot.files.filesystem import remove_tree
from trio_pilot.files.ownership import open_plain

UNFINISHED = ".building-"  # in the name of an unfinished image: KEY.building-UUID, while its pilot holds the lock KEY.lock


def remove_unfinished(images: Path, locked: str = "") -> int:
    """Remove the unfinished images whose lock no process holds, and those whose lock the caller holds; return their number.

    Args:
        images: a directory of unpacked images, which need not exist.
        locked: the key of the image whose lock the caller holds.
    """
    if not is_own(images):
        return 0
    removed = 0
    for unfinished in images.glob(f"*{UNFINISHED}*"):
        key = unfinished.name.partition(UNFINISHED)[0]
        try:
            lock = open_lock(images, key)
        except OSError:  # it is no key: a file name of any length and kind may stand before the mark
            continue
        try:
            if key == locked or try_to_lock(lock):
                remove_tree(unfinished)
                removed += 1
        finally:
            os.close(lock)
    return removed


def is_own(directory: Path) -> bool:
    """Return whether no other user can have put anything into a directory: its parent may be writable by all."""
    try:
        found = directory.lstat()
    except FileNotFoundError:
        return False
    return stat.S_ISDIR(found.st_mode) and found.st_uid == os.geteuid() and not found.st_mode & 0o022


def open_lock(images: Path, key: str) -> int:
    """Open the lock file of an image. It is never removed: another process may be about to lock it."""
    return open_plain(images / f"{key}.lock", os.O_RDWR | os.O_CREAT)


def try_to_lock(lock: int) -> bool:
    """Lock an image; return False if another process holds the lock."""
    try:
        fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        return False
    return True
