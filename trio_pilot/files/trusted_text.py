"""Files of settings in the working directory, which another user may have put there. Everything here blocks.

HTCondor gives the files that it transfers to the user of the job. In a user namespace, the owner may be one that cannot be
named there (a container of which only some users are mapped): such a file counts in a directory that not all may write to.
"""

import os
import stat
from pathlib import Path

from trio_pilot.errors import SettingsError
from trio_pilot.files.ownership import ROOT, is_own, is_unmapped, open_plain, writers

READABLE_BY_ALL, PASSABLE_BY_ALL = 0o004, 0o001


def read_trusted(file: Path, errors: str = "strict") -> str:
    """Return the text of a file in the working directory.

    Args:
        file: its path.
        errors: what becomes of bytes that are not UTF-8, as for `open`.

    Raises:
        OSError: it cannot be read.
        SettingsError: another user may have written it, or may replace it.
        ValueError: it is not UTF-8.
    """
    facts, directory = file.lstat(), file.parent.stat()
    _refuse_foreign(file, facts, directory)
    _refuse_writable(file, "its directory", directory)
    target = file.resolve() if stat.S_ISLNK(facts.st_mode) else file  # the user's own link, or root's
    with os.fdopen(open_plain(target, os.O_RDONLY), encoding="utf-8", errors=errors) as text:
        found = os.fstat(text.fileno())
        _refuse_foreign(file, found, directory)
        _refuse_writable(file, "it", found)
        return text.read()


def _refuse_foreign(file: Path, facts: os.stat_result, directory: os.stat_result) -> None:
    is_of_unmapped = is_unmapped(facts.st_uid) and not directory.st_mode & stat.S_IWOTH
    if not (facts.st_uid == ROOT or is_own(facts, file.parent) or is_of_unmapped):
        raise SettingsError(f"{file} belongs to user {facts.st_uid}: remove it, or make it your own with chown")


def _refuse_writable(file: Path, what: str, facts: os.stat_result) -> None:
    if by := writers(facts):
        raise SettingsError(f"{file} is not obeyed, for {what} {by}: remove it, or take that right away with chmod")


def is_public(file: Path) -> bool:
    """Return whether all users of this machine may read a file, as far as it and its directories show."""
    try:
        path = file.resolve()
        return bool(path.stat().st_mode & READABLE_BY_ALL) and all(
            parent.stat().st_mode & PASSABLE_BY_ALL for parent in path.parents
        )
    except (OSError, RuntimeError):
        return False
