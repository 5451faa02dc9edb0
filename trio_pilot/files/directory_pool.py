"""Task directories that are used again.

Making and removing the four directories and three files of a task costs 1.5 ms of CPU on ext4 (measured), as much as a
short task itself: for a minute, ext4 avoids the inodes that were just deleted. The directory of a task that leaves nothing
behind is as good as new: it is renamed for the next task. The event of that task is written over the last one, and its
runtime empties the files of stdout and stderr.

Everything here blocks.
"""

import os
import stat
from contextlib import suppress
from pathlib import Path

from trio_pilot.files import task_directory
from trio_pilot.files.task_directory import TaskFiles


class DirectoryPool:
    """The directories that wait for a next task; never more than the events that the pilot had at the same time."""

    def __init__(self, *, any_user: bool = False, root_mode: int = task_directory.CLOSED) -> None:
        self._any_user = any_user
        self._root_mode = root_mode  # if containers may be any user
        self._clean: list[TaskFiles] = []

    def make(self, files: TaskFiles) -> None:
        """Make the directory of a task. Raises NodeError if it cannot be made."""
        with suppress(IndexError, OSError):  # there is none, or it was removed by hand
            clean = self._clean.pop()
            clean.root.rename(files.root)
            os.rename(f"{files.io}/{clean.infile}", files.infile_path)  # noqa: PTH104 -- a Path costs as much again
            return
        task_directory.make(files, any_user=self._any_user, root_mode=self._root_mode)

    def take_back(self, files: TaskFiles) -> bool:
        """Keep the directory of a task for the next one, if it is as good as new; return whether it is kept."""
        try:
            files.outfile_path.unlink(missing_ok=True)
            is_clean = _is_as_new(files, self._root_mode if self._any_user else None)
        except OSError:
            return False
        if is_clean:
            self._clean.append(files)
        return is_clean

    def close(self) -> None:
        """Remove the directories that are kept."""
        while self._clean:
            task_directory.remove(self._clean.pop())


def _is_as_new(files: TaskFiles, root_mode: int | None) -> bool:
    """Return whether the directories contain only what they should, and all have the modes that they were made with.

    A `root_mode` is that of directories for any user; None: they are for this user.
    """
    mode = stat.S_IMODE(files.outputs.lstat().st_mode)
    directories = dict.fromkeys((files.root, files.io, files.scratch, files.outputs), mode)
    directories |= {} if root_mode is None else task_directory.modes(files, root_mode)
    log_mode = mode & 0o666
    infile_mode = log_mode if root_mode is None else task_directory.READABLE
    return (
        mode & stat.S_IRWXU == stat.S_IRWXU
        and _names(files.io) == [files.infile]
        and not _names(files.scratch)
        and all(_is_plain(path, stat.S_IFDIR | one) for path, one in directories.items())
        and _is_plain(files.infile_path, stat.S_IFREG | infile_mode)
        and all(_is_plain(path, stat.S_IFREG | log_mode) for path in (files.stdout, files.stderr))
    )


def _names(directory: Path) -> list[str]:
    return os.listdir(directory)  # noqa: PTH208 -- a Path for each costs more than the call


def _is_plain(path: Path, mode: int) -> bool:
    facts = path.lstat()
    has_one_name = facts.st_nlink == 1 or stat.S_ISDIR(mode)
    return facts.st_mode == mode and has_one_name and facts.st_uid == os.geteuid()
