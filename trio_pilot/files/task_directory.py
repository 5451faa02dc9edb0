"""The directory of a task: its input file, output file and logs. Everything here blocks."""

import errno
import json
import os
import stat
from collections.abc import Mapping
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

from trio_pilot.errors import DecodeError, NodeError, OutfileError, map_exceptions
from trio_pilot.files import filesystem
from trio_pilot.files.filesystem import opened, remove_tree


@dataclass(frozen=True)
class TaskFiles:
    """The paths of the directory of one run of a container."""

    root: Path
    infile: str
    outfile: str

    @cached_property
    def io(self) -> Path:
        """The directory of the input file and the output file."""
        return self.root / "task-io"

    @cached_property
    def infile_path(self) -> Path:
        """The file with the event."""
        return self.io / self.infile

    @cached_property
    def outfile_path(self) -> Path:
        """The file that the task writes."""
        return self.io / self.outfile

    @cached_property
    def scratch(self) -> Path:
        """The directory that only the container uses."""
        return self.root / "scratch"

    @cached_property
    def outputs(self) -> Path:
        """The directory of the container's stdout and stderr."""
        return self.root / "outputs"

    @cached_property
    def stdout(self) -> Path:
        """The file with the container's stdout."""
        return self.outputs / "stdoutfile"

    @cached_property
    def stderr(self) -> Path:
        """The file with the container's stderr."""
        return self.outputs / "stderrfile"


CLOSED, PASSABLE = 0o700, 0o711  # modes of a task's directory: for an engine that passes any, and for one that does not
READABLE = 0o644  # the mode of an input file that any user may read


def make(files: TaskFiles, *, any_user: bool = False, root_mode: int = CLOSED) -> None:
    """Make the directories of a task; the init container has no input file, and no directory for one.

    With `any_user`, containers of any user may write in them, and `root_mode` keeps other users of this machine out.

    Raises:
        NodeError: They cannot be made.
    """
    with map_exceptions({OSError: NodeError}, f"cannot make the task directory {files.root}"):
        for directory in (files.root, files.scratch, files.outputs, *([files.io] if files.infile else [])):
            directory.mkdir(mode=CLOSED)
            if any_user and directory != files.outputs:
                directory.chmod(modes(files, root_mode)[directory])


def modes(files: TaskFiles, root_mode: int = CLOSED) -> Mapping[Path, int]:
    """Return the modes of directories in which any user may write."""
    return {files.root: root_mode, files.io: 0o777, files.scratch: 0o1777}


def write_infile(files: TaskFiles, data: Any, *, any_user: bool = False) -> None:
    """Write an event: text and bytes as they are, any other value as JSON.

    With `any_user`, containers of any user may read it, whatever the umask.

    Raises:
        DecodeError: It is text that cannot be written as UTF-8.
        NodeError: The file cannot be written.
    """
    try:
        content = data if isinstance(data, bytes) else _text(data).encode()
    except UnicodeEncodeError as error:
        raise DecodeError(f"the event is not text that can be written as UTF-8: {error}") from error
    with map_exceptions({OSError: NodeError}, f"cannot write the input file in {files.io}"):
        _overwrite(files.infile_path, content, READABLE if any_user else None)


def _overwrite(path: Path, content: bytes, mode: int | None) -> None:
    """Write a file that may exist already. It is not emptied first: ext4 would write it to disk when it is closed."""
    with open(path, "wb", opener=_open_without_emptying) as file:
        if mode is not None:
            os.fchmod(file.fileno(), mode)
        file.write(content)
        file.truncate()


def _open_without_emptying(path: str, flags: int) -> int:
    return os.open(path, flags & ~os.O_TRUNC | os.O_NOFOLLOW, 0o600)


def read_outfile(files: TaskFiles, max_size: int) -> bytes | None:
    """Return the content of the output file; None if there is none.

    Raises:
        OutfileError: It is not a plain file, or has more than `max_size` bytes.
        NodeError: The disk fails.
    """
    try:
        # This neither follows a link out of the directory nor waits for the other end of a FIFO.
        flags = os.O_RDONLY | os.O_NOFOLLOW | os.O_NONBLOCK
        with opened(files.outfile_path, flags) as descriptor:
            return _content(descriptor, max_size)
    except FileNotFoundError:
        return None
    except OSError as error:
        what = "it is a symbolic link" if error.errno == errno.ELOOP else error.strerror
        raise OutfileError(f"the output file must be a plain file that can be read: {what}") from error


def is_plain_outfile(files: TaskFiles, max_size: int) -> bool:
    """Return whether there is an output file, one that may be read.

    Raises:
        OutfileError: It is not a plain file, or has more than `max_size` bytes.
        NodeError: The disk fails.
    """
    try:
        _check(files.outfile_path.lstat(), max_size)
    except FileNotFoundError:
        return False
    except OSError as error:
        raise NodeError(f"cannot look for the output file in {files.io}: {error.strerror}") from error
    return True


def replace_outfile(files: TaskFiles, copy: Path) -> None:
    """Replace the output file by a file on the same file system. Raises NodeError if that fails."""
    with map_exceptions({OSError: NodeError}, f"cannot replace the output file in {files.io}"):
        copy.replace(files.outfile_path)


def _check(facts: os.stat_result, max_size: int) -> None:
    if not stat.S_ISREG(facts.st_mode):
        raise OutfileError("the output file must be a plain file, not a directory, FIFO or device")
    if facts.st_size > max_size:
        raise OutfileError(f"the output file has {facts.st_size} bytes, more than the {max_size} of --max-payload")


def _content(descriptor: int, max_size: int) -> bytes:
    _check(os.fstat(descriptor), max_size)
    with (
        map_exceptions({OSError: NodeError}, "cannot read the output file"),
        open(descriptor, "rb", 0, closefd=False) as file,
    ):
        return file.readall()


def parse_outfile(content: bytes, *, is_json: bool) -> Any:
    """Return the value of an output file: parsed if it is JSON, else as text, or as bytes if it is no UTF-8.

    Raises:
        OutfileError: It should be JSON, and is not.
    """
    if is_json:
        try:
            return json.loads(content)
        except (ValueError, RecursionError) as error:
            raise OutfileError(f"the output file is not JSON: {error}") from error
    try:
        return content.decode()
    except UnicodeDecodeError:
        return content


def outfile_size(files: TaskFiles) -> int:
    """Return the size of the output file in bytes; 0 if there is none."""
    try:
        return files.outfile_path.lstat().st_size
    except OSError:
        return 0


def remove(files: TaskFiles) -> None:
    """Remove the directory of a task. What cannot be removed is logged: the task does not fail by that."""
    remove_tree(files.root)


def try_to_remove(files: TaskFiles) -> bool:
    """Remove the directory of a task; return whether it is gone."""
    return filesystem.try_to_remove(files.root)


def keep_only_files(files: TaskFiles) -> None:
    """Remove from a task directory what is not kept: scratch, or the whole of it if no container was started."""
    remove_tree(_not_kept(files))


def try_to_keep_only_files(files: TaskFiles) -> bool:
    """Remove what `keep_only_files` does; return whether it is gone: scratch may have files of another user."""
    return filesystem.try_to_remove(_not_kept(files))


def _not_kept(files: TaskFiles) -> Path:
    was_started = os.path.lexists(files.stdout) or os.path.lexists(files.stderr)
    return files.scratch if was_started else files.root


def _text(data: Any) -> str:
    return data if isinstance(data, str) else json.dumps(data)
