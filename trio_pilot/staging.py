"""Files: the data directory of a pilot, a task's directory in it, what goes in and what comes out.

Everything here blocks: call it in a thread.
"""

import errno
import fcntl
import json
import os
import shutil
import stat
import sys
import tempfile
import uuid
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager, suppress
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import IO, Any

from trio_pilot.errors import DecodeError, NodeError, OutfileError, SettingsError, map_exceptions
from trio_pilot.log import LOGGER
from trio_pilot.runtimes import DATA_DIRECTORY, Mount

LOCK = ".lock"  # in a data directory that a pilot made; its pilots share a lock on it

FORBIDDEN = tuple(map(Path, ("/proc", "/dev", "/sys", "/run", "/boot")))
NEVER_WRITABLE = tuple(
    map(
        Path,
        ("/etc", "/usr", "/lib", "/lib64", "/bin", "/sbin", "/root", "/var/log", "/var/cache", "/var/spool"),
    )
)


@dataclass(frozen=True)
class Workspace:
    """The data directory of a pilot, and the directories that all its containers see."""

    root: Path
    external: tuple[Mount, ...]

    @cached_property
    def data_hub(self) -> Path:
        """What the init container writes, and tasks read."""
        return self.root / "data-hub"

    def mounts(self, files: "TaskFiles | None") -> tuple[Mount, ...]:
        """List the mounts of a task's container; of the init container's, with no files."""
        hub = Mount(self.data_hub, f"/{DATA_DIRECTORY}/data-hub", writable=True)
        io = [Mount(files.io, f"/{DATA_DIRECTORY}/task-io", writable=True)] if files else []
        return (hub, *io, *self.external)


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
    def stdout(self) -> Path:
        """What the container writes to its stdout."""
        return self.root / "outputs" / "stdoutfile"

    @cached_property
    def stderr(self) -> Path:
        """What the container writes to its stderr."""
        return self.root / "outputs" / "stderrfile"


@contextmanager
def open_workspace(parent: Path, external: Sequence[Path]) -> Iterator[Workspace]:
    """Make the data directory; the last pilot that leaves it removes it, unless it was there before.

    Raises:
        NodeError: it cannot be written.
        SettingsError: a directory is not one that containers may see.
    """
    mounts = _checked(external)
    root = parent.resolve() / DATA_DIRECTORY
    _refuse(root.resolve(), NEVER_WRITABLE + FORBIDDEN, "task directories cannot be made below")
    with _writing(root):
        lock = _enter(root)
    try:
        with _writing(root):
            _try_to_write(root)
        yield Workspace(root, mounts)
    finally:
        if lock:
            with lock, suppress(OSError):
                _leave(root, lock)


def make(files: TaskFiles) -> None:
    """Make the directories of a task; the init container has no input file, and no place for one.

    Raises:
        NodeError: the disk does not take them.
    """
    with map_exceptions({OSError: NodeError}, f"cannot make the task directory {files.root}"):
        for directory in (files.root, files.scratch, files.stdout.parent, *([files.io] if files.infile else [])):
            directory.mkdir()


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
        files.infile_path.write_bytes(content)


def read_outfile(files: TaskFiles, max_size: int) -> bytes | None:
    """Read what a task has written; None if it has written nothing.

    Raises:
        OutfileError: it is not a plain file, or has more than `max_size` bytes.
    """
    try:
        # Neither following a link out of the directory nor waiting for the other end of a FIFO.
        flags = os.O_RDONLY | os.O_NOFOLLOW | os.O_NONBLOCK
        with _opened(files.outfile_path, flags) as descriptor:
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
    with map_exceptions({OSError: NodeError}, "cannot read the output file"), open(descriptor, "rb", closefd=False) as file:
        return file.read()


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
    _remove_tree(files.root)


def dump(files: TaskFiles) -> None:
    """Copy what a container has written to our own stdout and stderr."""
    _copy(files.stdout, sys.stdout.buffer)
    _copy(files.stderr, sys.stderr.buffer)


def _text(data: Any) -> str:
    return data if isinstance(data, str) else json.dumps(data)


def _copy(path: Path, stream: IO[bytes]) -> None:
    with suppress(OSError), path.open("rb") as file:
        shutil.copyfileobj(file, stream)
        stream.flush()


def _checked(paths: Sequence[Path]) -> tuple[Mount, ...]:
    variable = "EWMS_PILOT_EXTERNAL_DIRECTORIES"
    for path in paths:
        if not path.is_absolute() or ".." in path.parts or not path.is_dir():
            raise SettingsError(f"{variable} must name absolute, existing directories, not {str(path)!r}")
        if path.resolve() == Path("/"):
            raise SettingsError(f"{variable} must not name all of this machine: {path}")
        for side in (path, path.resolve()):
            _refuse(side, FORBIDDEN, f"{variable} must not name directories below")
    if len(set(paths)) < len(paths):
        raise SettingsError(f"{variable} must not name a directory twice: {', '.join(map(str, paths))}")
    return tuple(Mount(path, str(path)) for path in paths)


def _refuse(path: Path, forbidden: Sequence[Path], why: str) -> None:
    for one in forbidden:
        if path.is_relative_to(one):
            raise SettingsError(f"{why} {one}: {path}")


def _enter(root: Path) -> IO[bytes] | None:
    """Share the lock of the data directory, made if it is not there; None if it was made by hand, and is nobody's to remove.

    A directory of ours comes into being, and goes, together with its lock file, by renaming: there is no moment in between.
    """
    while True:
        if not root.exists():
            _make_root(root)
        # The last of its pilots may remove it at any moment.
        with suppress(FileNotFoundError), _opened(root, os.O_DIRECTORY) as directory, ExitStack() as stack:
            lock = _lock(directory)
            if lock:
                stack.enter_context(lock)
            if os.path.samestat(root.stat(), os.fstat(directory)):
                stack.pop_all()
                return lock


@contextmanager
def _opened(path: Path, flags: int) -> Iterator[int]:
    descriptor = os.open(path, flags | os.O_CLOEXEC)
    try:
        yield descriptor
    finally:
        os.close(descriptor)


def _make_root(root: Path) -> None:
    new = root.with_name(f".{root.name}-{uuid.uuid4().hex}")
    new.mkdir()
    try:
        (new / "data-hub").mkdir()
        (new / LOCK).touch()
        new.rename(root)
    except OSError as error:
        shutil.rmtree(new, ignore_errors=True)
        if error.errno not in (errno.EEXIST, errno.ENOTEMPTY):  # another pilot was quicker
            raise


def _lock(directory: int) -> IO[bytes] | None:
    try:
        file = os.fdopen(os.open(LOCK, os.O_RDWR | os.O_CLOEXEC, dir_fd=directory), "r+b")
    except FileNotFoundError:
        return None
    with suppress(OSError):  # a file system without locks: nobody cleans up then
        fcntl.flock(file, fcntl.LOCK_SH)
    return file


@contextmanager
def _writing(root: Path) -> Iterator[None]:
    try:
        yield
    except OSError as error:  # its file name would be one that nobody knows
        raise NodeError(f"cannot write the data directory {root}: {error.strerror}") from error


def _try_to_write(root: Path) -> None:
    """Find out now, rather than with the first event, that the directory is read-only or the disk full."""
    (root / "data-hub").mkdir(exist_ok=True)
    with tempfile.TemporaryFile(dir=root) as file:
        file.write(b"!")


def _leave(root: Path, lock: IO[bytes]) -> None:
    """Remove the data directory, if no other pilot is in it, nor a task directory that was to be kept."""
    fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)  # fails if another pilot is there
    if {entry.name for entry in root.iterdir()} <= {LOCK, "data-hub"}:
        gone = root.with_name(f".{root.name}-{uuid.uuid4().hex}")
        root.rename(gone)
        _remove_tree(gone)


def _remove_tree(root: Path) -> None:
    """Remove a directory with all that is in it, locked directories too; log what cannot be removed."""
    with suppress(RecursionError):  # a thousand directories in each other
        shutil.rmtree(root, ignore_errors=True)
        if root.exists():
            _unlock(root)
            shutil.rmtree(root, ignore_errors=True)
    if root.exists():
        LOGGER.warning("cannot remove all of %s", root)


def _unlock(root: Path) -> None:
    """Let us into the directories that a task has locked, from the top down."""
    with suppress(OSError):
        root.chmod(0o700)
    for directory, names, _ in os.walk(root):
        for path in (Path(directory, name) for name in names):
            if not path.is_symlink():  # what it leads to is none of ours
                with suppress(OSError):
                    path.chmod(0o700)
