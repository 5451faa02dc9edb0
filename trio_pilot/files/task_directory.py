"""A task's directory: what goes in and what comes out. Everything here blocks."""

import errno
import json
import os
import stat
from collections.abc import Mapping
from contextlib import suppress
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

from trio_pilot.errors import DecodeError, NodeError, OutfileError, map_exceptions
from trio_pilot.files import filesystem
from trio_pilot.files.filesystem import opened, remove_tree, write_all

STDOUT, STDERR = 1, 2
PIECE = 65536  # bytes that are copied at once


@dataclass(frozen=True)
class TaskFiles:
    """The directory of one run of a container, and the names in it."""

    root: Path
    infile: str
    outfile: str

    @cached_property
    def io(self) -> Path:
        """Where the input file and the output file are."""
        return self.root / "task-io"

    @cached_property
    def infile_path(self) -> Path:
        """The event."""
        return self.io / self.infile

    @cached_property
    def outfile_path(self) -> Path:
        """What the task makes of it."""
        return self.io / self.outfile

    @cached_property
    def scratch(self) -> Path:
        """The container's own."""
        return self.root / "scratch"

    @cached_property
    def outputs(self) -> Path:
        """Where the container's stdout and stderr are."""
        return self.root / "outputs"

    @cached_property
    def stdout(self) -> Path:
        """What the container writes to its stdout."""
        return self.outputs / "stdoutfile"

    @cached_property
    def stderr(self) -> Path:
        """What the container writes to its stderr."""
        return self.outputs / "stderrfile"


def make(files: TaskFiles, *, any_user: bool = False) -> None:
    """Make the directories of a task; the init container has no input file, and no place for one.

    With `any_user`, a container may write in them whoever it is there, and nobody else of this machine may enter.

    Raises:
        NodeError: the disk does not take them.
    """
    with map_exceptions({OSError: NodeError}, f"cannot make the task directory {files.root}"):
        for directory in (files.root, files.scratch, files.outputs, *([files.io] if files.infile else [])):
            directory.mkdir()
            if any_user and directory != files.outputs:
                directory.chmod(modes(files)[directory])


def modes(files: TaskFiles) -> Mapping[Path, int]:
    """Give the modes of the directories that are for any user."""
    return {files.root: 0o700, files.io: 0o777, files.scratch: 0o1777}


def write_infile(files: TaskFiles, data: Any) -> None:
    """Write an event: text and bytes as they are, any other value as JSON.

    Raises:
        DecodeError: it is text that cannot be written as UTF-8.
        NodeError: the disk does not take it.
    """
    try:
        content = data if isinstance(data, bytes) else _text(data).encode()
    except UnicodeEncodeError as error:
        raise DecodeError(f"the event is not text that can be written as UTF-8: {error}") from error
    with map_exceptions({OSError: NodeError}, f"cannot write the input file in {files.io}"):
        _overwrite(files.infile_path, content)


def _overwrite(path: Path, content: bytes) -> None:
    """Write a file that may be there already. Emptied first, ext4 would send it to the disk as it is closed."""
    with open(path, "wb", opener=_open_as_it_is) as file:
        file.write(content)
        file.truncate()


def _open_as_it_is(path: str, flags: int) -> int:
    return os.open(path, flags & ~os.O_TRUNC | os.O_NOFOLLOW, 0o666)


def read_outfile(files: TaskFiles, max_size: int) -> bytes | None:
    """Read what a task has written; None if it has written nothing.

    Raises:
        OutfileError: it is not a plain file, or has more than `max_size` bytes.
    """
    try:
        # Neither following a link out of the directory nor waiting for the other end of a FIFO.
        flags = os.O_RDONLY | os.O_NOFOLLOW | os.O_NONBLOCK
        with opened(files.outfile_path, flags) as descriptor:
            return _content(descriptor, max_size)
    except FileNotFoundError:
        return None
    except OSError as error:
        what = "it is a symbolic link" if error.errno == errno.ELOOP else error.strerror
        raise OutfileError(f"the output file must be a plain file that can be read: {what}") from error


def _content(descriptor: int, max_size: int) -> bytes:
    facts = os.fstat(descriptor)
    if not stat.S_ISREG(facts.st_mode):
        raise OutfileError("the output file must be a plain file, not a directory, FIFO or device")
    if facts.st_size > max_size:
        raise OutfileError(f"the output file has {facts.st_size} bytes, more than the {max_size} of --max-payload")
    with (
        map_exceptions({OSError: NodeError}, "cannot read the output file"),
        open(descriptor, "rb", 0, closefd=False) as file,
    ):
        return file.readall()


def parse_outfile(content: bytes, *, is_json: bool) -> Any:
    """Give the value of an output file: of JSON what it says, else text as it is, or bytes if it is no UTF-8.

    Raises:
        OutfileError: it should be JSON, and is not.
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
    """Tell how many bytes a task has written, 0 for none."""
    try:
        return files.outfile_path.lstat().st_size
    except OSError:
        return 0


def remove(files: TaskFiles) -> None:
    """Remove the directory of a task. What cannot be removed is logged: no good task fails by it."""
    remove_tree(files.root)


def try_to_remove(files: TaskFiles) -> bool:
    """Remove it, and tell whether it is gone."""
    return filesystem.try_to_remove(files.root)


def keep_only_files(files: TaskFiles) -> None:
    """Remove what a kept directory is not to have: its scratch directory, or all of it if no container was started."""
    remove_tree(_not_kept(files))


def try_to_keep_only_files(files: TaskFiles) -> bool:
    """Do the same, and return whether it worked: in the scratch directory may be files of another user."""
    return filesystem.try_to_remove(_not_kept(files))


def _not_kept(files: TaskFiles) -> Path:
    was_started = os.path.lexists(files.stdout) or os.path.lexists(files.stderr)
    return files.scratch if was_started else files.root


def dump(files: TaskFiles) -> None:
    """Copy what a container has written to our own stdout and stderr."""
    _copy(files.stdout, STDOUT)
    _copy(files.stderr, STDERR)


def _text(data: Any) -> str:
    return data if isinstance(data, str) else json.dumps(data)


def _copy(path: Path, descriptor: int) -> None:
    """Copy a file to who reads a descriptor. Past sys.stdout: its lock would be held by a thread that waits in it."""
    with suppress(OSError), path.open("rb") as file:
        while piece := file.read(PIECE):
            write_all(descriptor, piece)
