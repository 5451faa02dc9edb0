"""Control groups of our own: made below the group that this process is in, wherever the kernel says that is.

Version 1 has a hierarchy for each controller or some, version 2 one for all; both may be there at once, with a controller in
either. A container has a group in each hierarchy that it needs, with its limits, and in that another, in which it runs: a
container that mounts the hierarchy for itself sees no more than the group it runs in, and the limits are one further up.

    the group we are in / trio-pilot-PILOT / CONTAINER / payload

Version 2 wants no processes in a group that has controllers for those below: where it insists, this process, and those of
its family that are in the same group, go to `trio-pilot-PILOT/pilot`.

Everything here blocks, and needs no more than the standard library: the guardian has no more.
"""

import errno
import os
import re
import signal
import time
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path

from trio_pilot.processes.identity import DEAD_STATES, PARENT, STATE, Identity, own, stat_of

PREFIX = "trio-pilot-"
PAYLOAD, PILOT = "payload", "pilot"

REMOVE_TIMEOUT = 5.0  # seconds for the kernel to let go of a group whose last process has ended; as a rule it takes none
REMOVE_INTERVAL = 0.002  # seconds between two tries

# The file that each controller must have in a group of ours, in version 1 and 2.
MAIN_FILES = {
    "memory": ("memory.limit_in_bytes", "memory.max"),
    "cpu": ("cpu.cfs_quota_us", "cpu.max"),
    "pids": ("pids.max", "pids.max"),
}
NO_MEMORY_LIMIT = 2**62  # bytes: version 1 has no word for none, and says the largest number of whole pages
CPU_PERIOD, LEAST_CPU_QUOTA = 100_000, 1_000  # microseconds; the kernel takes no smaller quota


@dataclass(frozen=True, slots=True)
class Setting:
    """A limit, as a file of a controller says it."""

    controller: str
    v1: Sequence[tuple[str, str]]  # files and what to write into them
    v2: Sequence[tuple[str, str]]

    def write(self, group: Path, *, unified: bool) -> None:
        """Write it. The first file must be there; that of swap may not. Raises OSError if it cannot be written."""
        for number, (name, value) in enumerate(self.v2 if unified else self.v1):
            if number == 0 or (group / name).exists():
                (group / name).write_text(value)


def memory(size: int) -> Setting:
    """Limit memory, and with it swap: what does not fit must not go on there."""
    v1 = (("memory.limit_in_bytes", str(size)), ("memory.memsw.limit_in_bytes", str(size)))
    return Setting("memory", v1, (("memory.max", str(size)), ("memory.swap.max", "0")))


def cpus(number: float) -> Setting:
    """Limit the time on all CPUs together."""
    quota = max(int(number * CPU_PERIOD), LEAST_CPU_QUOTA)
    v1 = (("cpu.cfs_period_us", str(CPU_PERIOD)), ("cpu.cfs_quota_us", str(quota)))
    return Setting("cpu", v1, (("cpu.max", f"{quota} {CPU_PERIOD}"),))


def pids(number: int) -> Setting:
    """Limit processes and threads."""
    files = (("pids.max", str(number)),)
    return Setting("pids", files, files)


@dataclass(frozen=True, slots=True)
class Hierarchy:
    """A mounted hierarchy, and the group of this process in it."""

    mount: Path
    here: Path
    controllers: frozenset[str]
    unified: bool  # version 2

    @property
    def top(self) -> Path:
        """The group of all containers of this pilot."""
        return self.here / f"{PREFIX}{own()}"


def hierarchies(proc: Path = Path("/proc/self")) -> list[Hierarchy]:
    """Find the hierarchies that have a controller for us."""
    try:
        mounts = [_Mount.parse(line) for line in _lines(proc / "mountinfo") if " - cgroup" in line]
        lines = _lines(proc / "cgroup")
    except OSError:
        return []
    found = (_hierarchy(line, mounts) for line in lines)
    return [one for one in found if one and one.controllers]


def _lines(file: Path) -> list[str]:
    """Read a file of names: they may have any bytes in them, but no line feed."""
    return [line for line in os.fsdecode(file.read_bytes()).split("\n") if line]


@dataclass(frozen=True, slots=True)
class _Mount:
    kind: str
    root: Path
    point: Path
    options: frozenset[str]

    @classmethod
    def parse(cls, line: str) -> "_Mount":
        """Read a line of proc_pid_mountinfo(5)."""
        ours, _, theirs = line.partition(" - ")
        _, _, _, root, point, *_ = ours.split(" ")
        kind, _, options = theirs.split(" ")
        return cls(kind, Path(_unescaped(root)), Path(_unescaped(point)), frozenset(options.split(",")))


def _unescaped(name: str) -> str:
    return re.sub(r"\\([0-7]{3})", lambda found: chr(int(found[1], 8)), name)


def _hierarchy(line: str, mounts: Iterable[_Mount]) -> Hierarchy | None:
    """Make sense of a line of /proc/PID/cgroup: `ID:CONTROLLERS:PATH`, those of version 2 unnamed."""
    _, names, path = line.split(":", 2)
    named = frozenset(names.split(",")) if names else frozenset[str]()
    for mount in mounts:
        is_it = named <= mount.options and mount.kind == "cgroup" if named else mount.kind == "cgroup2"
        if is_it and Path(path).is_relative_to(mount.root) and ".." not in path:
            here = _outside(mount.point / Path(path).relative_to(mount.root))
            controllers = named or _words(here / "cgroup.controllers")
            return Hierarchy(mount.point, here, controllers & MAIN_FILES.keys(), unified=not named)
    return None


def _outside(group: Path) -> Path:
    """Give the group that a pilot was in before it made one for itself."""
    return group.parent.parent if group.name == PILOT and group.parent.name.startswith(PREFIX) else group


def _words(file: Path) -> frozenset[str]:
    try:
        return frozenset(file.read_text().split())
    except OSError:
        return frozenset()


class Groups:
    """The groups of this pilot's containers, in every hierarchy in which it may make some."""

    def __init__(self) -> None:
        self.faults: dict[str, str] = {}  # by controller: why it cannot be used
        self._usable: list[Hierarchy] = []
        self._enabled: dict[Path, frozenset[str]] = {}
        for hierarchy in hierarchies():
            try:
                self._open(hierarchy)
                self._usable.append(hierarchy)
            except OSError as error:
                fault = f"no control group can be made in {hierarchy.here}: {error.strerror}"
                self.faults |= dict.fromkeys(hierarchy.controllers, fault)
                _remove_empty(hierarchy.top)

    @property
    def controllers(self) -> frozenset[str]:
        """What can be limited."""
        return frozenset[str]().union(*(hierarchy.controllers for hierarchy in self._usable))

    def fault(self, controller: str) -> str:
        """Say why a controller cannot be used."""
        return self.faults.get(controller, f"there is no control group hierarchy for {controller}")

    def make(self, name: str, settings: Collection[Setting]) -> "Group":
        """Make a container's groups, with its limits. Raises OSError if it cannot be done."""
        group = Group(
            name, [one for one in self._usable if any(setting.controller in one.controllers for setting in settings)]
        )
        try:
            group.make(settings)
        except OSError:
            group.remove()
            raise
        return group

    def close(self) -> None:
        """Remove what has been made, as far as it is empty, and leave the rest as it was."""
        for hierarchy in self._usable:
            if hierarchy.unified:
                _go_back(hierarchy.top, self._enabled[hierarchy.here])
            _remove_empty(hierarchy.top)

    def _open(self, hierarchy: Hierarchy) -> None:
        hierarchy.top.mkdir(exist_ok=True)
        if hierarchy.unified:
            missing = hierarchy.controllers - _words(hierarchy.here / "cgroup.subtree_control")
            self._enabled[hierarchy.here] = missing
            if missing:
                _enable(hierarchy, missing)
            _control(hierarchy.top, "+", hierarchy.controllers)
        for controller in hierarchy.controllers:
            # A group of ours is ours, but on a disk: somebody has mounted something else there.
            if not (hierarchy.top / MAIN_FILES[controller][hierarchy.unified]).exists():
                raise FileNotFoundError(errno.ENOENT, f"it has no {MAIN_FILES[controller][hierarchy.unified]}")


def _go_back(top: Path, enabled: Collection[str]) -> None:
    """Have the processes of a pilot where they were, unless another pilot has its groups there by now."""
    here, members = top.parent, _processes(top / PILOT)
    with suppress(OSError):
        _control(top, "-", _words(top / "cgroup.subtree_control"))
        if [entry for entry in here.glob(f"{PREFIX}*") if entry != top] == []:
            _control(here, "-", enabled)
            _move(members, here)


def _enable(hierarchy: Hierarchy, controllers: Collection[str]) -> None:
    """Have the controllers in groups below ours, for which ours may have to be empty."""
    try:
        _control(hierarchy.here, "+", controllers)
    except OSError as error:
        if error.errno != errno.EBUSY:
            raise
        members = _processes(hierarchy.here)
        if strangers := [pid for pid in members if not _is_family(pid)]:
            raise OSError(errno.EBUSY, f"others are in it too, such as process {strangers[0]}") from error
        (hierarchy.top / PILOT).mkdir(exist_ok=True)
        _move(members, hierarchy.top / PILOT)
        try:
            _control(hierarchy.here, "+", controllers)
        except OSError:
            _move(members, hierarchy.here)
            raise


def _control(group: Path, sign: str, controllers: Collection[str]) -> None:
    if controllers:
        (group / "cgroup.subtree_control").write_text(" ".join(f"{sign}{name}" for name in sorted(controllers)))


def _move(members: Iterable[int], group: Path) -> None:
    for pid in members:
        with suppress(ProcessLookupError):
            (group / "cgroup.procs").write_text(str(pid))


def _is_family(pid: int) -> bool:
    """Tell whether we come from a process, or it from us."""
    return pid in _line(os.getpid()) or os.getpid() in _line(pid)


def _line(pid: int) -> Iterator[int]:
    """List a process and those that it comes from."""
    while pid:
        yield pid
        facts = stat_of(pid)
        pid = int(facts[PARENT]) if facts else 0


class Group:
    """The groups of one container."""

    def __init__(self, name: str, places: Iterable[Hierarchy]) -> None:
        self._places: Mapping[Path, Hierarchy] = {place.top / name: place for place in places}

    def make(self, settings: Iterable[Setting]) -> None:
        """Make them, and write the limits. Raises OSError."""
        for group, place in self._places.items():
            group.mkdir()
            (group / PAYLOAD).mkdir()
            for setting in settings:
                if setting.controller in place.controllers:
                    setting.write(group, unified=place.unified)

    @property
    def entrances(self) -> list[Path]:
        """The files into which a process writes 0 to enter."""
        return [group / PAYLOAD / "cgroup.procs" for group in self._places]

    @property
    def out_of_memory(self) -> bool:
        """Whether a process in it was killed for want of memory."""
        return any(map(_oom_kills, self._places))

    def remove(self) -> bool:
        """Remove them, with whatever is still in them; tell whether they are gone."""
        return sum(_remove(group) for group in self._places) == len(self._places)


def _oom_kills(group: Path) -> int:
    """Give the number of kills. Version 1 counts them in the very group of the process, version 2 in that of the limit."""
    for counts in (group / "memory.events", group / PAYLOAD / "memory.oom_control"):
        with suppress(OSError):
            found = re.search(r"^oom_kill (\d+)$", counts.read_text(), re.MULTILINE)
            return int(found[1]) if found else 0
    return 0


def sweep(theirs: Callable[[Identity], bool]) -> int:
    """Remove the groups of some pilots, and kill what is in them; give the number of containers that there were."""
    tops = [top for hierarchy in hierarchies() for top in _tops(hierarchy.mount)]
    return sum(_sweep(top) for top in tops if (pilot := Identity.parse(top.name.removeprefix(PREFIX))) and theirs(pilot))


def _sweep(top: Path) -> int:
    containers = [group for group in top.glob("*") if group.is_dir() and group.name != PILOT]
    found = sum([_remove(group) for group in containers])
    if _processes(top / PILOT):  # of its family, such as its guardian; had others enabled controllers, it would not be here
        _go_back(top, _words(top.parent / "cgroup.subtree_control"))
    _remove_empty(top)
    return found


def _tops(mount: Path) -> Iterator[Path]:
    for directory, names, _ in os.walk(mount):
        found = (Path(directory, name) for name in names if name.startswith(PREFIX))
        yield from (top for top in found if os.access(top, os.W_OK))  # the others are another user's
        names[:] = [name for name in names if not name.startswith(PREFIX)]


def _remove(group: Path) -> bool:
    """Kill and reap what is in a group, and remove it with those below it; tell whether it is gone."""
    deadline = time.monotonic() + REMOVE_TIMEOUT
    killed: set[int] = set()
    while True:
        _rmdir(group)
        killed = {pid for pid in killed if not _is_seen_to(pid, killed)}
        if not killed and not group.exists():
            return True
        if time.monotonic() > deadline:
            return False
        for pid in {pid for one in _below(group) for pid in _processes(one)}:
            with suppress(ProcessLookupError, PermissionError):
                os.kill(pid, signal.SIGKILL)
                killed.add(pid)
        time.sleep(REMOVE_INTERVAL)


def _rmdir(group: Path) -> None:
    """Remove a group and those below it, as far as they are empty. First the way it is as a rule."""
    with suppress(OSError):
        (group / PAYLOAD).rmdir()
        group.rmdir()
        return
    for one in reversed(list(_below(group))):
        with suppress(OSError):
            one.rmdir()


def _remove_empty(top: Path) -> None:
    for one in (top / PILOT, top):
        with suppress(OSError):
            one.rmdir()


def _is_seen_to(pid: int, killed: Collection[int]) -> bool:
    """Tell whether nobody here has to reap a process that we have killed: it is gone, or dead and another's child.

    What it leaves to us when it dies becomes our child a moment later than it was killed with it.
    """
    with suppress(ChildProcessError):
        return os.waitpid(pid, os.WNOHANG)[0] == pid
    facts = stat_of(pid)
    return facts is None or (facts[STATE] in DEAD_STATES and int(facts[PARENT]) not in {*killed, os.getpid()})


def _below(group: Path) -> Iterator[Path]:
    """List a group and all that are below it, from the top down."""
    return (Path(directory) for directory, _, _ in os.walk(group))


def _processes(group: Path) -> list[int]:
    """List the processes in a group, but for those of another PID namespace, which have no number in ours: they read 0."""
    with suppress(OSError):
        return [int(pid) for pid in (group / "cgroup.procs").read_text().split() if pid != "0"]
    return []


def most_memory() -> int | None:
    """Give the bytes of memory that the group we are in, or one above it, allows; None if none of them sets a limit."""
    words = [_text(group / MAIN_FILES["memory"][unified]) for group, unified in _ours("memory")]
    return min((int(word) for word in words if word.isdecimal() and int(word) < NO_MEMORY_LIMIT), default=None)


def most_cpus() -> float | None:
    """Give the CPUs that the group we are in, or one above it, allows; None if none of them sets a limit."""
    files = {True: ("cpu.max",), False: ("cpu.cfs_quota_us", "cpu.cfs_period_us")}
    quotas = [" ".join(_text(group / name) for name in files[unified]) for group, unified in _ours("cpu")]
    found = [re.fullmatch(r"(\d+) (\d+)", quota) for quota in quotas]  # no quota is `max`, or -1
    return min((int(quota[1]) / int(quota[2]) for quota in found if quota), default=None)


def _ours(controller: str) -> Iterator[tuple[Path, bool]]:
    """List the group that we are in and those above it, and whether they are of version 2."""
    for hierarchy in hierarchies():
        if controller in hierarchy.controllers:
            yield from (
                (group, hierarchy.unified)
                for group in (hierarchy.here, *hierarchy.here.parents)
                if group.is_relative_to(hierarchy.mount)
            )


def _text(file: Path) -> str:
    try:
        return file.read_text().strip()
    except OSError:
        return ""
