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
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import IO, Any

from trio_pilot.errors import DecodeError, NodeError, OutfileError, SettingsError, map_exceptions
from trio_pilot.log import LOGGER
from trio_pilot.runtimes import DATA_DIRECTORY, Mount

FORBIDDEN = tuple(map(Path, ("/proc", "/dev", "/sys", "/run", "/boot")))
NEVER_WRITABLE = tuple(
    map(
        Path,
        ("/etc", "/usr", "/lib", "/lib64", "/bin", "/sbin", "/root", "/var/log", "/var/cache", "/var/spool"),
    )
)


@dataclass(frozen=True, slots=True)
class Workspace:
    """The data directory of a pilot, and the directories that all its containers see."""

    root: Path
    external: tuple[Mount, ...]

    @property
    def data_hub(self) -> Path:
        """What the init container writes, and tasks read."""
        return self.root / "data-hub"

    def mounts(self, files: "TaskFiles | None") -> tuple[Mount, ...]:
        """List the mounts of a task's container; of the init container's, with no files."""
        hub = Mount(self.data_hub, f"/{DATA_DIRECTORY}/data-hub", writable=True)
        io = [Mount(files.io, f"/{DATA_DIRECTORY}/task-io", writable=True)] if files else []
        return (hub, *io, *self.external)


@dataclass(frozen=True, slots=True)
class TaskFiles:
    """The directory of one run of a container, and the names in it."""

    root: Path
    infile: str
    outfile: str

    @property
    def io(self) -> Path:
        """Where the input file and the output file are."""
        return self.root / "task-io"

    @property
    def scratch(self) -> Path:
        """The container's own."""
        return self.root / "scratch"

    @property
    def stdout(self) -> Path:
        """What the container writes to its stdout."""
        return self.root / "outputs" / "stdoutfile"

    @property
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
    mounts = tuple(_checked(path) for path in external)
    root = parent.resolve() / DATA_DIRECTORY
    _refuse(root, NEVER_WRITABLE + FORBIDDEN, "task directories cannot be made below")
    with map_exceptions({OSError: NodeError}, f"cannot write the data directory {root}"):
        keep = _made_by_hand(root)
        root.mkdir(parents=True, exist_ok=True)
        lock = _lock(root / ".lock")
        (root / "data-hub").mkdir(exist_ok=True)
    try:
        yield Workspace(root, mounts)
    finally:
        if not keep and _is_alone(lock):
            _remove_if_unused(root)
        lock.close()


def make(files: TaskFiles, *, with_io: bool = True) -> None:
    """Make the directories of a task. Raises NodeError if the disk does not take them."""
    with map_exceptions({OSError: NodeError}, f"cannot make the task directory {files.root}"):
        for directory in (files.root, files.scratch, files.stdout.parent, *([files.io] if with_io else [])):
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
        (files.io / files.infile).write_bytes(content)


def read_outfile(files: TaskFiles, max_size: int) -> bytes | None:
    """Read what a task has written; None if it has written nothing.

    Raises:
        OutfileError: it is not a plain file, or has more than `max_size` bytes.
    """
    path = files.io / files.outfile
    try:
        # Neither following a link out of the directory nor waiting for the other end of a FIFO.
        descriptor = os.open(path, os.O_RDONLY | os.O_NOFOLLOW | os.O_NONBLOCK | os.O_CLOEXEC)
    except FileNotFoundError:
        return None
    except OSError as error:
        what = "a symbolic link" if error.errno == errno.ELOOP else error.strerror
        raise OutfileError(f"the output file must be a plain file that can be read, not {what}") from error
    with os.fdopen(descriptor, "rb") as file:
        facts = os.fstat(descriptor)
        if not stat.S_ISREG(facts.st_mode):
            raise OutfileError("the output file must be a plain file, not a directory, FIFO or device")
        if facts.st_size > max_size:
            raise OutfileError(f"the output file has {facts.st_size} bytes, more than the {max_size} of --max-payload")
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


def remove(files: TaskFiles) -> None:
    """Remove the directory of a task. What cannot be removed is logged: no good task fails by it."""
    shutil.rmtree(files.root, onerror=lambda _function, path, _error: _unlock(Path(path)))
    if files.root.exists():
        shutil.rmtree(files.root, ignore_errors=True)
    if files.root.exists():
        LOGGER.warning("cannot remove all of %s", files.root)


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


def _checked(path: Path) -> Mount:
    if not path.is_absolute() or not path.is_dir():
        raise SettingsError(f"EWMS_PILOT_EXTERNAL_DIRECTORIES must name absolute, existing directories, not {str(path)!r}")
    _refuse(path.resolve(), FORBIDDEN, "EWMS_PILOT_EXTERNAL_DIRECTORIES must not name directories below")
    return Mount(path, str(path))


def _refuse(path: Path, forbidden: Sequence[Path], why: str) -> None:
    for one in forbidden:
        if path.is_relative_to(one):
            raise SettingsError(f"{why} {one}: {path}")


def _unlock(path: Path) -> None:
    """Let us into a directory that a task has locked, for a second try to remove it."""
    for directory in (path.parent, path):
        with suppress(OSError):
            directory.chmod(0o700)


def _made_by_hand(root: Path) -> bool:
    return root.exists() and not (root / ".lock").exists()


def _lock(path: Path) -> IO[bytes]:
    """Share the lock file with the other pilots of this directory; the one that finds itself alone cleans up."""
    while True:
        path.parent.mkdir(exist_ok=True)
        file = path.open("ab")
        with suppress(OSError):  # a file system without locks: nobody cleans up then
            fcntl.flock(file, fcntl.LOCK_SH)
        if path.exists() and path.stat().st_ino == os.fstat(file.fileno()).st_ino:
            return file
        file.close()  # the last one before us has just removed it


def _is_alone(lock: IO[bytes]) -> bool:
    try:
        fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except OSError:
        return False
    return True


def _remove_if_unused(root: Path) -> None:
    """Remove the data directory, but for task directories that were to be kept."""
    if {entry.name for entry in root.iterdir()} <= {".lock", "data-hub"}:
        shutil.rmtree(root, ignore_errors=True)
