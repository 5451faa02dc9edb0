"""What a pilot that is no more has left of images that it was unpacking. Everything here blocks.

For the guardian, which has no more than the standard library; for the sweep at the start of the next pilot; and for the next
that unpacks an image.
"""

import fcntl
import os
import stat
from pathlib import Path

from trio_pilot.files.filesystem import remove_tree

UNFINISHED = ".building-"  # in the name of an image that is: KEY.building-UUID, while somebody has the lock KEY.lock


def remove_unfinished(images: Path, ours: str = "") -> int:
    """Remove what is half unpacked: of images whose lock nobody has, and of the one whose lock is ours; give the number.

    Args:
        images: a directory of unpacked images, which need not be there.
        ours: the key of that one.
    """
    if not is_own(images):
        return 0
    removed = 0
    for half in images.glob(f"*{UNFINISHED}*"):
        key = half.name.partition(UNFINISHED)[0]
        lock = open_lock(images, key)
        try:
            if key == ours or try_to_lock(lock):
                remove_tree(half)
                removed += 1
        finally:
            os.close(lock)
    return removed


def is_own(directory: Path) -> bool:
    """Tell whether nobody else can have put anything into a directory: its parent may be everybody's."""
    try:
        found = directory.lstat()
    except FileNotFoundError:
        return False
    return stat.S_ISDIR(found.st_mode) and found.st_uid == os.geteuid() and not found.st_mode & 0o022


def open_lock(images: Path, key: str) -> int:
    """Open the lock of an image. It is never removed: somebody else may be about to lock it."""
    return os.open(images / f"{key}.lock", os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o600)


def try_to_lock(lock: int) -> bool:
    """Lock an image, unless somebody else has."""
    try:
        fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        return False
    return True
