"""The data directory of a pilot: made, shared with other pilots, and removed by the last one. Everything here blocks.

A data directory that a pilot made has a lock file in it. It appears and disappears together with that file, by renaming, so
there is no moment at which it has none. A data directory without a lock file was made by hand, or has task directories in
it that are kept: no pilot removes it.
"""

import errno
import fcntl
import os
import shutil
import stat
import tempfile
import time
import uuid
from collections.abc import Collection, Iterator, Sequence
from contextlib import ExitStack, contextmanager, nullcontext, suppress
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import IO, Any

from trio_pilot.errors import NodeError, SettingsError
from trio_pilot.files.filesystem import is_directory, opened, remove_tree
from trio_pilot.files.ownership import flaw, is_own, open_plain
from trio_pilot.processes import identity
from trio_pilot.processes.identity import Identity

DATA_DIRECTORY = "ewms-pilot-data"  # in the root of every container, and in the pilot's own directory
LOCK = ".lock"  # in a data directory that a pilot made; the pilots that use it share a lock on this file
KEPT = b"task directories are kept\n"  # what is in the lock file if a pilot keeps its task directories
OWNER = ".pilot-"  # an owner file is .pilot-PREFIX-PILOT@NODE; PREFIX begins the names of that pilot's task directories
PREFIX_DIGITS = 8  # of a UUID
LOCK_TIMEOUT = 10.0  # seconds to wait for another process that holds a lock; pilots hold one for milliseconds
LOCK_INTERVAL = 0.01  # seconds between two attempts to lock a file
NOT_OF_TASKS = "init", "probe", "clearing"  # how the names of the directories of other containers begin, before PREFIX

FORBIDDEN = tuple(map(Path, ("/proc", "/dev", "/sys", "/run", "/boot")))
NEVER_WRITABLE = tuple(
    map(
        Path,
        ("/etc", "/usr", "/lib", "/lib64", "/bin", "/sbin", "/root", "/var/log", "/var/cache", "/var/spool"),
    )
)

CLOSED_TO_READERS = 0o711  # an engine may have to pass
HUB = "data-hub"  # in the data directory, here and in containers
HUB_MODE = 0o1777  # of the data hub if containers may be any user
TASK_IO = "task-io"
OF_CONTAINERS = ("tmp",), (DATA_DIRECTORY,), (DATA_DIRECTORY, HUB), (DATA_DIRECTORY, TASK_IO)  # mounted in each container


@dataclass(frozen=True)
class DataDirectory:
    """The data directory of a pilot, and the external directories that all its containers see."""

    root: Path
    external: tuple[Path, ...]
    prefix: str = field(default_factory=lambda: uuid.uuid4().hex[:PREFIX_DIGITS])  # of all that this pilot makes
    lock: IO[bytes] | None = None  # its lock file, locked; None: it was made by hand

    def new_name(self) -> str:
        """Return a new name for a task: a UUID that begins with this pilot's prefix."""
        return str(uuid.UUID(self.prefix + uuid.uuid4().hex[PREFIX_DIGITS:]))

    @cached_property
    def data_hub(self) -> Path:
        """The directory that the init container writes and tasks read."""
        return self.root / HUB

    def open_hub(self, group: int | None = None) -> None:
        """Let containers of any user write in the data hub, and keep other users of this machine out. Blocks.

        A data directory that was made by hand keeps its mode, and so does a data hub of another user.

        Args:
            group: the group of an engine that cannot pass a closed directory; None: it can.
        """
        with suppress(OSError):
            if self.lock:
                self._close_to_others(group)
            self.data_hub.chmod(HUB_MODE)

    def _close_to_others(self, group: int | None) -> None:
        if group is None:
            self.root.chmod(0o700)
        elif os.geteuid() == 0:
            os.chown(self.root, -1, group)
            self.root.chmod(0o710)
        else:  # no group of this user's own may be the engine's
            self.root.chmod(0o711)

    def take_hub(self, destination: Path) -> bool:
        """Move the data hub away if this pilot is the last one, and would remove it at its end. Blocks.

        Returns:
            Whether it was moved.

        Raises:
            OSError: It cannot be moved.
        """
        if self.lock is None:
            return False
        try:
            fcntl.flock(self.lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
            is_last = not os.fstat(self.lock.fileno()).st_size and not self._entries_of_others()
            if is_last:
                self.data_hub.rename(destination)
        except BlockingIOError:  # another pilot uses it
            return False
        finally:
            _lock_if_possible(self.lock, fcntl.LOCK_SH)
        return is_last

    def is_used_by_others(self) -> bool:
        """Return whether another pilot uses the data directory, or may use it. Blocks."""
        if self.lock is None:
            return bool(self._entries_of_others())
        try:
            fcntl.flock(self.lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError:
            return True
        _lock_if_possible(self.lock, fcntl.LOCK_SH)
        return False

    def _entries_of_others(self) -> set[str]:
        own = f"{OWNER}{self.prefix}-", f"{self.prefix}-", *(f"{what}-{self.prefix}" for what in NOT_OF_TASKS)
        return {entry.name for entry in self.root.iterdir() if not entry.name.startswith(own)} - {LOCK, HUB}


def root_in(parent: Path) -> Path:
    """Return the path of the data directory in `parent`."""
    return _real(parent) / DATA_DIRECTORY


def _real(path: Path) -> Path:
    """Follow all links. A circle of links is left for the caller's next call to find; Path.resolve raises RuntimeError."""
    return Path(os.path.realpath(path))


@contextmanager
def open_data_directory(parent: Path, external: Sequence[Path], *, keep: bool = False) -> Iterator[DataDirectory]:
    """Make the data directory; the last pilot that uses it removes it, unless it was made by hand.

    With `keep`, the task directories that are left in it are never removed, and nothing else is left beside them and the
    data hub.

    Raises:
        NodeError: The data directory cannot be written.
        SettingsError: A directory is not one that containers may see, or write.
    """
    mounts = _checked(external)
    root = root_in(parent)
    _refuse(_real(root), NEVER_WRITABLE + FORBIDDEN, "task directories cannot be made below")
    with _mapped_errors(root):
        lock = _make_and_share(root, keep=keep)
    try:
        with _mapped_errors(root):
            _try_to_write(root)
        data_directory = DataDirectory(root, mounts, lock=lock)
        with nullcontext() if keep else _owner_file(data_directory):
            yield data_directory
    finally:
        if lock:
            with lock, suppress(OSError):
                _remove_unused(root, lock)


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


def _make_and_share(root: Path, *, keep: bool) -> IO[bytes] | None:
    """Make the data directory if it is missing, and return its lock file, locked; None if it has none."""
    while True:
        if not root.exists():
            _make_root(root)
        _refuse_foreign(root)
        # At any moment, the last of the other pilots may remove the data directory, or the lock file alone.
        with suppress(FileNotFoundError), opened(root, os.O_DIRECTORY) as directory, ExitStack() as stack:
            lock = _share_lock(directory)
            if lock:
                stack.enter_context(lock)
                os.stat(LOCK, dir_fd=directory)  # now that it is locked, it stays
                if keep:
                    os.pwrite(lock.fileno(), KEPT, 0)
            if os.path.samestat(root.stat(), os.fstat(directory)):
                if lock:  # older versions made it for others to read
                    os.fchmod(directory, stat.S_IMODE(os.fstat(directory).st_mode) & CLOSED_TO_READERS)
                stack.pop_all()
                return lock


def _refuse_foreign(directory: Path) -> None:
    """Refuse a directory whose files another user decides on. Raises SettingsError."""
    with suppress(FileNotFoundError):
        if why := flaw(directory):
            advice = "remove it, or name another place with --data-dir-parent-path-on-host"
            raise SettingsError(f"the directory {directory} {why}: {advice}")


def _make_root(root: Path) -> None:
    with _directory_beside(root) as new:
        try:
            (new / HUB).mkdir(mode=0o700)
            (new / LOCK).touch(mode=0o600)
            new.rename(root)
        except OSError as error:
            shutil.rmtree(new, ignore_errors=True)
            if error.errno not in (errno.EEXIST, errno.ENOTEMPTY):  # another pilot was quicker
                raise


def _new_name_beside(root: Path) -> Path:
    """Return a name for a data directory that is being made or removed. It tells a sweep whose directory it is."""
    return root.with_name(f".{root.name}-{_pilot_at_node()}-{uuid.uuid4().hex}")


def _pilot_at_node() -> str:
    """Return PILOT@NODE for this process, as `_is_orphaned` reads it."""
    return f"{identity.own()}@{os.uname().nodename}"


@contextmanager
def _directory_beside(root: Path) -> Iterator[Path]:
    """Make a directory beside the data directory, locked while the body runs. Child processes do not inherit the lock."""
    with ExitStack() as stack:
        while True:
            new = _new_name_beside(root)
            new.mkdir(mode=0o700)
            # Before it is locked, a sweep may remove it: one in another PID namespace takes this pilot for dead.
            with suppress(FileNotFoundError):
                directory = stack.enter_context(opened(new, os.O_DIRECTORY))
                if _lock_directory(directory) and new.exists():
                    break
            with suppress(OSError):
                new.rmdir()
        yield new


def _lock_directory(directory: int) -> bool:
    """Lock a directory; return False if a sweep has locked it, to look at it or to remove it."""
    try:
        fcntl.flock(directory, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except OSError as error:  # on a file system without locks, a sweep goes by the name alone
        return not isinstance(error, BlockingIOError)
    return True


@contextmanager
def open_temporary(parent: Path) -> Iterator[Path]:
    """Make a temporary directory beside the data directory in `parent`. If this process dies, a sweep removes it.

    Raises:
        NodeError: The directory, or what is in it, cannot be written.
    """
    root = root_in(parent)
    with _mapped_errors(root), _directory_beside(root) as temporary:
        try:
            yield temporary
        finally:
            remove_tree(temporary)


def _share_lock(directory: int) -> IO[bytes] | None:
    try:
        file = os.fdopen(os.open(LOCK, os.O_RDWR | os.O_NOFOLLOW | os.O_CLOEXEC, dir_fd=directory), "r+b")
    except FileNotFoundError:
        return None
    try:
        _lock_if_possible(file, fcntl.LOCK_SH)
    except NodeError:
        file.close()
        raise
    return file


def _lock_if_possible(file: IO[Any], how: int) -> None:
    deadline = time.monotonic() + LOCK_TIMEOUT
    while True:
        try:
            return fcntl.flock(file, how | fcntl.LOCK_NB)
        except BlockingIOError:
            if time.monotonic() > deadline:
                raise NodeError(
                    f"the lock file {LOCK} of the data directory was locked by another process for {LOCK_TIMEOUT:g} s"
                ) from None
            time.sleep(LOCK_INTERVAL)
        except OSError:  # on a file system without locks, the data directory is never removed
            return None


@contextmanager
def _mapped_errors(root: Path) -> Iterator[None]:
    try:
        yield
    except OSError as error:  # the file named in it would mean nothing to a reader
        raise NodeError(f"cannot write the data directory {root}: {error.strerror}") from error


def _try_to_write(root: Path) -> None:
    """Find out before the first event whether the directory is read-only, or the disk full."""
    hub = root / HUB
    if hub.is_symlink():  # containers would write to its target
        raise SettingsError(f"{hub} must be a directory, not a link: remove it")
    hub.mkdir(mode=0o700, exist_ok=True)
    _refuse_foreign(hub)
    with tempfile.TemporaryFile(dir=root) as file:
        file.write(b"!")


@contextmanager
def _owner_file(data_directory: DataDirectory) -> Iterator[None]:
    """Hold a locked file that names this pilot: if it dies, a sweep removes the task directories by that."""
    owner = data_directory.root / f"{OWNER}{data_directory.prefix}-{_pilot_at_node()}"
    with ExitStack() as stack:
        with _mapped_errors(data_directory.root):
            # Before it is locked, a sweep may remove it: one in another PID namespace takes this pilot for dead.
            while not owner.exists():
                new = os.fdopen(open_plain(owner, os.O_RDWR | os.O_CREAT | os.O_EXCL), "r+b")
                _lock_if_possible(stack.enter_context(new), fcntl.LOCK_EX)
        try:
            yield
        finally:
            owner.unlink(missing_ok=True)


def sweep(root: Path, removable: Collection[Path] | None = None) -> int:
    """Remove what dead pilots left in a data directory, and the directory itself if no pilot uses it.

    Args:
        root: The data directory.
        removable: The owner files of dead pilots that may be removed too, because the containers of these pilots are gone;
            None: all.

    Returns:
        The number of task directories that were removed.
    """
    removed = 0
    for owner, prefix, pilot_at_node in _owner_files(root):
        with suppress(OSError), _opened_own(owner) as file:
            if _is_orphaned(pilot_at_node, file):
                removed += _remove_task_directories(root, prefix)
                if removable is None or owner in removable:
                    owner.unlink()
    with suppress(OSError):
        if not flaw(root):
            with os.fdopen(open_plain(root / LOCK, os.O_RDWR), "r+b") as lock:
                _remove_unused(root, lock)
    for directory in _entries(root.parent, f".{root.name}-"):
        with suppress(OSError), opened(directory, os.O_DIRECTORY | os.O_NOFOLLOW) as descriptor:
            pilot_at_node = directory.name.removeprefix(f".{root.name}-").rpartition("-")[0]
            if is_own(os.fstat(descriptor), directory) and _is_orphaned(pilot_at_node, descriptor):
                remove_tree(directory)
    return removed


def _entries(directory: Path, *beginnings: str) -> list[Path]:
    """Return the entries of a directory whose names begin with a text; none if it cannot be listed."""
    with suppress(OSError, ValueError), os.scandir(directory) as entries:
        return [Path(entry.path) for entry in entries if entry.name.startswith(beginnings)]
    return []


@contextmanager
def _opened_own(path: Path) -> Iterator[int]:
    """Open a plain file of this user. Raises OSError for any other."""
    descriptor = open_plain(path, os.O_RDONLY)
    try:
        if not is_own(os.fstat(descriptor), path.parent):
            raise PermissionError(errno.EPERM, "it belongs to another user", str(path))
        yield descriptor
    finally:
        os.close(descriptor)


def owner_files_of_dead(root: Path, dead: Identity | None = None) -> set[Path]:
    """Return the owner files in a data directory whose pilots are dead. Never raises an Exception.

    Args:
        root: The data directory.
        dead: A pilot that is known to be dead, although one of its threads may still hold its lock for a moment.
    """
    with suppress(Exception):  # whatever other users have put there; a later sweep may find them
        files = _owner_files(root)
        return {owner for owner, _, name in files if _is_of(dead, name) or _is_owner_file_of_dead(owner, name)}
    return set()


def has_orphaned(root: Path, pilot: Identity) -> bool:
    """Return whether a pilot is dead by its owner file in a data directory; False if it has none there."""
    return any(_is_of(pilot, name) and _is_owner_file_of_dead(owner, name) for owner, _, name in _owner_files(root))


def _is_of(pilot: Identity | None, pilot_at_node: str) -> bool:
    return pilot_at_node.partition("@")[0] == str(pilot)


def _is_owner_file_of_dead(owner: Path, pilot_at_node: str) -> bool:
    with suppress(OSError), _opened_own(owner) as file:
        return _is_orphaned(pilot_at_node, file, fcntl.LOCK_SH)  # several pilots may check at once
    return False


def _owner_files(root: Path) -> Iterator[tuple[Path, str, str]]:
    """Yield each owner file, the prefix of its pilot's task directories, and PILOT@NODE."""
    for owner in _entries(root, OWNER):
        prefix, _, pilot_at_node = owner.name.removeprefix(OWNER).partition("-")
        if is_prefix(prefix):
            yield owner, prefix, pilot_at_node


def is_prefix(text: str) -> bool:
    """Return whether a text can be the prefix of a pilot."""
    return len(text) == PREFIX_DIGITS and set(text) <= set("0123456789abcdef")


def _is_orphaned(pilot_at_node: str, descriptor: int, how: int = fcntl.LOCK_EX) -> bool:
    """Return whether the pilot that made a file or a directory is dead. A living pilot holds its lock; a crash releases it.

    Args:
        pilot_at_node: The pilot and its node, from the name of the file or directory.
        descriptor: The file or directory, open.
        how: The lock to take on it: LOCK_EX keeps others from checking it at the same time, LOCK_SH does not.
    """
    who, _, node = pilot_at_node.partition("@")
    pilot = Identity.parse(who)
    if pilot is None:
        return False
    try:
        fcntl.flock(descriptor, how | fcntl.LOCK_NB)
    except BlockingIOError:
        return False
    except OSError:  # a file system without locks
        return pilot.is_dead
    # Where a file system is mounted with local locks only, a lock shows the processes of one kernel.
    here = identity.own()
    if pilot.boot != here.boot:
        return node == os.uname().nodename
    return pilot.is_dead or pilot.namespace != here.namespace


def _remove_task_directories(root: Path, prefix: str) -> int:
    directories = _entries(root, f"{prefix}-", *(f"{what}-{prefix}" for what in NOT_OF_TASKS))
    for directory in directories:
        remove_tree(directory)
    return len(directories)


def _remove_unused(root: Path, lock: IO[bytes]) -> None:
    """Remove the data directory, unless another pilot uses it or something is in it.

    If task directories are kept in it, remove the lock file alone, or leave that to the sweep that removes the owner files
    of dead pilots. A pilot that is about to lock the file finds it gone (`_make_and_share`), and tries again.

    Args:
        root: The data directory.
        lock: Its lock file, open.

    Raises:
        OSError: There is no lock file any more, or something cannot be removed.
    """
    is_locked = True
    try:
        fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:  # another pilot uses it
        return
    except OSError:  # a file system without locks: another pilot may use it
        is_locked = False
    if not os.path.samestat((root / LOCK).stat(), os.fstat(lock.fileno())):
        return  # the data directory was removed in the meantime, and another pilot has made a new one
    entries = {entry.name for entry in root.iterdir()} - {LOCK, HUB}
    if is_locked and not entries:
        with opened(root, os.O_DIRECTORY) as directory:
            _lock_directory(directory)  # no sweep is to remove it at the same time
            gone = _new_name_beside(root)
            root.rename(gone)
            remove_tree(gone)
    elif os.fstat(lock.fileno()).st_size and not any(name.startswith(OWNER) for name in entries):
        (root / LOCK).unlink()
