"""Which files and directories another user of this machine may have made, or may change. Everything here blocks.

A group that only its user is in (useradd(8), USERGROUPS_ENAB) is the user: with it the umask is often 002, and what the user
makes may be written by that group.
"""

import errno
import grp
import os
import pwd
import stat
import tempfile
from pathlib import Path

from trio_pilot.processes.proc import knows_all_users

OVERFLOW_USER = 65534  # the owner of what belongs to a user that is not in this user namespace, user_namespaces(7)
PLAIN = os.O_NOFOLLOW | os.O_NONBLOCK | os.O_CLOEXEC  # to open a file without following a link or waiting for a FIFO
ROOT = 0


def is_own(facts: os.stat_result, directory: Path | None = None) -> bool:
    """Return whether this user made a file, by the owner that the file system gives to what this user makes.

    Args:
        facts: those of the file.
        directory: where it is; there, the files of root may belong to another user (exports(5), root_squash).
    """
    if facts.st_uid == os.geteuid():
        return True
    return directory is not None and os.geteuid() == ROOT and facts.st_uid == _owner_of_new_files(directory)


def _owner_of_new_files(directory: Path) -> int:
    try:
        with tempfile.TemporaryFile(dir=directory) as file:
            return os.fstat(file.fileno()).st_uid
    except OSError:
        return os.geteuid()


def writers(facts: os.stat_result) -> str:
    """Return which other users may write a file or directory, as text; an empty text if none may.

    In a directory with the sticky bit, users may remove only what is theirs.
    """
    if stat.S_ISDIR(facts.st_mode) and facts.st_mode & stat.S_ISVTX:
        return ""
    if facts.st_mode & stat.S_IWOTH:
        return "may be written by all users"
    if facts.st_mode & stat.S_IWGRP and not _is_private_group(facts.st_gid, facts.st_uid):
        return f"may be written by group {facts.st_gid}"
    return ""


def _is_private_group(group: int, user: int) -> bool:
    """Return whether only one user is in a group; one that has no name is the user's if it has the user's number."""
    try:
        entry, name = grp.getgrgid(group), pwd.getpwuid(user).pw_name
    except KeyError:
        return group == user
    return entry.gr_name == name and set(entry.gr_mem) <= {name}


def flaw(path: Path) -> str:
    """Return what lets another user than root decide what is in a file or directory, as text; an empty text: nothing.

    A symbolic link may be this user's, or root's. See protected_symlinks in proc_sys_fs(5).

    Raises:
        OSError: there is no such file.
    """
    for facts in (path.lstat(), path.stat()):
        if not (facts.st_uid == ROOT or is_own(facts, path if stat.S_ISDIR(facts.st_mode) else path.parent)):
            return f"belongs to user {facts.st_uid}"
    return writers(facts)


def is_unmapped(user: int) -> bool:
    """Return whether a file's owner is unknown because this process is in a user namespace without that user."""
    return user == OVERFLOW_USER and not knows_all_users()


def open_plain(path: Path, flags: int, mode: int = 0o600) -> int:
    """Open a plain file; return its descriptor.

    Raises:
        OSError: it cannot be opened, or is something else: a link (ELOOP), FIFO, directory or device (EINVAL).
    """
    descriptor = os.open(path, flags | PLAIN, mode)
    if not stat.S_ISREG(os.fstat(descriptor).st_mode):
        os.close(descriptor)
        raise OSError(errno.EINVAL, "it is not a plain file", str(path))
    return descriptor
