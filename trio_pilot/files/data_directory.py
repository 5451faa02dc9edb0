"""The data directory of a pilot: made, shared with other pilots, and removed by the last. Everything here blocks."""

import errno
import fcntl
import os
import shutil
import tempfile
import uuid
from collections.abc import Collection, Iterator, Sequence
from contextlib import ExitStack, contextmanager, nullcontext, suppress
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import IO, Any

from trio_pilot.errors import NodeError, SettingsError
from trio_pilot.files.filesystem import is_directory, opened, remove_tree
from trio_pilot.processes import identity
from trio_pilot.processes.identity import Identity

DATA_DIRECTORY = "ewms-pilot-data"  # in the root of every container, and in the pilot's own directory
LOCK = ".lock"  # in a data directory that a pilot made; its pilots share a lock on it
OWNER = ".pilot-"  # with what the names of its task directories begin with, and PILOT@NODE: a file that is locked
PREFIX_DIGITS = 8  # of a UUID
ASIDES = "init", "probe", "clearing"  # how directories of containers begin that are no tasks'

FORBIDDEN = tuple(map(Path, ("/proc", "/dev", "/sys", "/run", "/boot")))
NEVER_WRITABLE = tuple(
    map(
        Path,
        ("/etc", "/usr", "/lib", "/lib64", "/bin", "/sbin", "/root", "/var/log", "/var/cache", "/var/spool"),
    )
)

HUB = "data-hub"  # in the data directory, here and in containers
TASK_IO = "task-io"
OF_CONTAINERS = ("tmp",), (DATA_DIRECTORY,), (DATA_DIRECTORY, HUB), (DATA_DIRECTORY, TASK_IO)  # what is mounted there anyway


@dataclass(frozen=True)
class DataDirectory:
    """The data directory of a pilot, and the directories that all its containers see."""

    root: Path
    external: tuple[Path, ...]
    prefix: str = field(default_factory=lambda: uuid.uuid4().hex[:PREFIX_DIGITS])  # of all that this pilot makes

    def new_name(self) -> str:
        """Make up the name of a task: a UUID by which its directory is known to be this pilot's."""
        return str(uuid.UUID(self.prefix + uuid.uuid4().hex[PREFIX_DIGITS:]))

    @cached_property
    def data_hub(self) -> Path:
        """What the init container writes, and tasks read."""
        return self.root / HUB


def root_in(parent: Path) -> Path:
    """Name the data directory."""
    return _real(parent) / DATA_DIRECTORY


def _real(path: Path) -> Path:
    """Follow all links. Of a circle of them, Path.resolve would end in a RuntimeError: who uses it finds out."""
    return Path(os.path.realpath(path))


@contextmanager
def open_data_directory(parent: Path, external: Sequence[Path], *, keep: bool = False) -> Iterator[DataDirectory]:
    """Make the data directory; the last pilot that leaves it removes it, unless it was there before.

    With `keep`, nobody will remove the task directories that are left in it.

    Raises:
        NodeError: it cannot be written.
        SettingsError: a directory is not one that containers may see, or write.
    """
    mounts = _checked(external)
    root = root_in(parent)
    _refuse(_real(root), NEVER_WRITABLE + FORBIDDEN, "task directories cannot be made below")
    with _writing(root):
        lock = _enter(root)
    try:
        with _writing(root):
            _try_to_write(root)
        data_directory = DataDirectory(root, mounts)
        with nullcontext() if keep else _owning(data_directory):
            yield data_directory
    finally:
        if lock:
            with lock, suppress(OSError):
                _leave(root, lock)


def _checked(paths: Sequence[Path]) -> tuple[Path, ...]:
    variable = "EWMS_PILOT_EXTERNAL_DIRECTORIES"
    for path in paths:
        if not path.is_absolute() or ".." in path.parts or not is_directory(path):
            raise SettingsError(f"{variable} must name absolute, existing directories, not {str(path)!r}")
        if path.resolve() == Path("/"):
            raise SettingsError(f"{variable} must not name all of this machine: {path}")
        if path.parts[1:] in OF_CONTAINERS:
            raise SettingsError(f"{variable} must not name {path}: that is each container's own")
        for side in (path, path.resolve()):
            _refuse(side, FORBIDDEN, f"{variable} must not name directories below")
    if len(set(paths)) < len(paths):
        raise SettingsError(f"{variable} must not name a directory twice: {', '.join(map(str, paths))}")
    return tuple(paths)


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
        with suppress(FileNotFoundError), opened(root, os.O_DIRECTORY) as directory, ExitStack() as stack:
            lock = _lock(directory)
            if lock:
                stack.enter_context(lock)
            if os.path.samestat(root.stat(), os.fstat(directory)):
                stack.pop_all()
                return lock


def _make_root(root: Path) -> None:
    with _made_beside(root) as new:
        try:
            (new / HUB).mkdir()
            (new / LOCK).touch()
            new.rename(root)
        except OSError as error:
            shutil.rmtree(new, ignore_errors=True)
            if error.errno not in (errno.EEXIST, errno.ENOTEMPTY):  # another pilot was quicker
                raise


def _beside(root: Path) -> Path:
    """Make up the name of a data directory that is not one yet, or not any more: whoever finds it knows whose it is."""
    return root.with_name(f".{root.name}-{_us()}-{uuid.uuid4().hex}")


def _us() -> str:
    """Say who we are, and where, for `_is_orphaned`."""
    return f"{identity.own()}@{os.uname().nodename}"


@contextmanager
def _made_beside(root: Path) -> Iterator[Path]:
    """Make a directory beside the data directory, and hold its lock for as long as it is used; no child of ours has that."""
    with ExitStack() as stack:
        while True:
            new = _beside(root)
            new.mkdir()
            # A sweep may come between that and the lock, and one in another PID namespace takes us for dead.
            with suppress(FileNotFoundError):
                directory = stack.enter_context(opened(new, os.O_DIRECTORY))
                if _hold(directory) and new.exists():
                    break
            with suppress(OSError):
                new.rmdir()
        yield new


def _hold(directory: int) -> bool:
    """Lock a directory, unless a sweep has, which looks at it or removes it."""
    try:
        fcntl.flock(directory, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except OSError as error:  # a file system without locks: a sweep goes by what else it knows then
        return not isinstance(error, BlockingIOError)
    return True


@contextmanager
def open_temporary(parent: Path) -> Iterator[Path]:
    """Make a directory for a moment, beside the data directory of that parent: a sweep of that removes it, if we cannot.

    Raises:
        NodeError: it, or what is to be in it, cannot be written.
    """
    root = root_in(parent)
    with _writing(root), _made_beside(root) as passing:
        try:
            yield passing
        finally:
            remove_tree(passing)


def _lock(directory: int) -> IO[bytes] | None:
    try:
        file = os.fdopen(os.open(LOCK, os.O_RDWR | os.O_CLOEXEC, dir_fd=directory), "r+b")
    except FileNotFoundError:
        return None
    _try_to_lock(file, fcntl.LOCK_SH)
    return file


def _try_to_lock(file: IO[Any], how: int = fcntl.LOCK_EX) -> None:
    with suppress(OSError):  # a file system without locks: nobody cleans up then
        fcntl.flock(file, how)


@contextmanager
def _writing(root: Path) -> Iterator[None]:
    try:
        yield
    except OSError as error:  # its file name would be one that nobody knows
        raise NodeError(f"cannot write the data directory {root}: {error.strerror}") from error


def _try_to_write(root: Path) -> None:
    """Find out now, rather than with the first event, that the directory is read-only or the disk full."""
    hub = root / HUB
    if hub.is_symlink():  # containers would write to where it leads
        raise SettingsError(f"{hub} must be a directory, not a link: remove it")
    hub.mkdir(exist_ok=True)
    with tempfile.TemporaryFile(dir=root) as file:
        file.write(b"!")


@contextmanager
def _owning(data_directory: DataDirectory) -> Iterator[None]:
    """Leave word of whose the task directories are, for when we have no time to remove them."""
    owner = data_directory.root / f"{OWNER}{data_directory.prefix}-{_us()}"
    with ExitStack() as stack:
        with _writing(data_directory.root):
            # A sweep may come between that and the lock, and one in another PID namespace takes us for dead.
            while not owner.exists():
                _try_to_lock(stack.enter_context(owner.open("xb")))
        try:
            yield
        finally:
            owner.unlink(missing_ok=True)


def sweep(root: Path, forget: Collection[Path] | None = None) -> int:
    """Remove what pilots that are no more have left in a data directory, and itself if they were the last.

    Gives the number of task directories.

    Args:
        root: the data directory.
        forget: words of the dead whose containers are gone, for which others are needed still; None: all of them.
    """
    removed = 0
    for owner, prefix, said in _owners(root):
        with suppress(OSError), owner.open("rb") as file:
            if _is_orphaned(said, file.fileno()):
                removed += _remove_of(root, prefix)
                if forget is None or owner in forget:
                    owner.unlink()
    with suppress(OSError), (root / LOCK).open("r+b") as lock:
        _leave(root, lock)
    for directory in root.parent.glob(f".{root.name}-*"):
        with suppress(OSError), opened(directory, os.O_DIRECTORY | os.O_NOFOLLOW) as descriptor:
            if _is_orphaned(directory.name.removeprefix(f".{root.name}-").rpartition("-")[0], descriptor):
                remove_tree(directory)
    return removed


def owner_files_of_dead(root: Path, dead: Identity | None = None) -> set[Path]:
    """List the words that pilots which are dead by now have left in a data directory.

    One of them may be known to be: a thread of it may still hold its lock for a moment.
    """
    found: set[Path] = set()
    with suppress(OSError):
        found.update(owner for owner, _, said in _owners(root) if _is_of(dead, said) or _is_owner_file_of_dead(owner, said))
    return found


def has_orphaned(root: Path, pilot: Identity) -> bool:
    """Tell whether a pilot is dead by the word that it has left in a data directory. If there is none here, nobody knows."""
    return any(_is_of(pilot, said) and _is_owner_file_of_dead(owner, said) for owner, _, said in _owners(root))


def _is_of(pilot: Identity | None, said: str) -> bool:
    return said.partition("@")[0] == str(pilot)


def _is_owner_file_of_dead(owner: Path, said: str) -> bool:
    with suppress(OSError), owner.open("rb") as file:
        return _is_orphaned(said, file.fileno(), fcntl.LOCK_SH)  # many may ask at once
    return False


def _owners(root: Path) -> Iterator[tuple[Path, str, str]]:
    """List the words that pilots have left, each with what the names of its task directories begin with, and PILOT@NODE."""
    for owner in root.glob(f"{OWNER}*"):
        prefix, _, said = owner.name.removeprefix(OWNER).partition("-")
        yield owner, prefix, said


def _is_orphaned(said: str, descriptor: int, how: int = fcntl.LOCK_EX) -> bool:
    """Tell whether the pilot that made a file or a directory is dead: it would hold the lock, which a crash takes from it.

    Args:
        said: who and where it is, as the name says: PILOT@NODE.
        descriptor: of what it made.
        how: to lock it, which keeps others from doing the same, or not.
    """
    who, _, node = said.partition("@")
    pilot = Identity.parse(who)
    if pilot is None:
        return False
    try:
        fcntl.flock(descriptor, how | fcntl.LOCK_NB)
    except BlockingIOError:
        return False
    except OSError:  # a file system without locks
        return pilot.is_dead
    # A lock tells of the processes of one kernel, where a file system is mounted with local locks only.
    here = identity.own()
    if pilot.boot != here.boot:
        return node == os.uname().nodename
    return pilot.is_dead or pilot.namespace != here.namespace


def _remove_of(root: Path, prefix: str) -> int:
    asides = [directory for what in ASIDES for directory in root.glob(f"{what}-{prefix}*")]
    directories = [*root.glob(f"{prefix}-*"), *asides]
    for directory in directories:
        remove_tree(directory)
    return len(directories)


def _leave(root: Path, lock: IO[bytes]) -> None:
    """Remove the data directory, if no other pilot is in it, nor a task directory that was to be kept."""
    fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)  # fails if another pilot is there
    if {entry.name for entry in root.iterdir()} <= {LOCK, HUB}:
        with opened(root, os.O_DIRECTORY) as directory:
            _hold(directory)  # no sweep is to remove it at the same time
            gone = _beside(root)
            root.rename(gone)
            remove_tree(gone)
