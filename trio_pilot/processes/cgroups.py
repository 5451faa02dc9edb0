"""The control groups of a pilot's containers, made below the group that this process is in. Everything here blocks.

A container has a group in each hierarchy that it needs, with its limits, and another below it, in which it runs: a container
that mounts the hierarchy for itself sees only the group it runs in, and the limits are one further up.

    the group of this process / trio-pilot-PILOT / CONTAINER / payload

Version 2 wants no processes in a group that has controllers for those below: where it insists, this process moves to
`trio-pilot-PILOT/pilot`, together with its ancestors and descendants that are in the same group.

Standard library only: the guardian loads nothing else.
"""

import errno
import re
from collections.abc import Callable, Collection, Iterable, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path

from trio_pilot.processes.cgroup_hierarchies import PAYLOAD, PILOT, PREFIX, Hierarchy, hierarchies, read_words
from trio_pilot.processes.cgroup_removal import processes_in, remove, remove_empty
from trio_pilot.processes.identity import Identity
from trio_pilot.processes.proc import is_relative

CPU_PERIOD, LEAST_CPU_QUOTA = 100_000, 1_000  # microseconds; the kernel takes no smaller quota


@dataclass(frozen=True, slots=True)
class Setting:
    """A limit, as it is written to the files of a controller."""

    controller: str
    v1: Sequence[tuple[str, str]]  # names of files, and what to write into them
    v2: Sequence[tuple[str, str]]

    def write(self, group: Path, *, unified: bool) -> None:
        """Write the limit. The first file must be there; the second, that of swap, may be missing.

        Raises:
            OSError: It cannot be written.
        """
        for number, (name, value) in enumerate(self.v2 if unified else self.v1):
            if number == 0 or (group / name).exists():
                (group / name).write_text(value)


def memory(size: int) -> Setting:
    """Limit memory to `size` bytes, and swap with it: what does not fit must not go on there."""
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
                remove_empty(hierarchy.top)

    @property
    def controllers(self) -> frozenset[str]:
        """The controllers that can be used."""
        return frozenset[str]().union(*(hierarchy.controllers for hierarchy in self._usable))

    def fault(self, controller: str) -> str:
        """Return why a controller cannot be used."""
        return self.faults.get(controller, f"there is no control group hierarchy for {controller}")

    def make(self, name: str, settings: Collection[Setting]) -> "Group":
        """Make the groups of a container, with its limits.

        Raises:
            OSError: They cannot be made; nothing is left of them.
        """
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
        """Remove the groups that are empty, and undo all other changes."""
        for hierarchy in self._usable:
            if hierarchy.unified:
                _move_back(hierarchy.top, self._enabled[hierarchy.here])
            remove_empty(hierarchy.top)

    def _open(self, hierarchy: Hierarchy) -> None:
        hierarchy.top.mkdir(exist_ok=True)
        if hierarchy.unified:
            missing = hierarchy.controllers - read_words(hierarchy.here / "cgroup.subtree_control")
            self._enabled[hierarchy.here] = missing
            if missing:
                _enable(hierarchy, missing)
            _control(hierarchy.top, "+", hierarchy.controllers)
        for controller in hierarchy.controllers:
            # A plain directory on a disk, for example: something else may be mounted there.
            if not (hierarchy.top / hierarchy.main_file(controller)).exists():
                raise FileNotFoundError(errno.ENOENT, f"it has no {hierarchy.main_file(controller)}")


def _move_back(top: Path, enabled: Collection[str]) -> None:
    """Move the processes of a pilot back to the group they came from, unless another pilot has groups there by now."""
    here, members = top.parent, processes_in(top / PILOT)
    with suppress(OSError):
        _control(top, "-", read_words(top / "cgroup.subtree_control"))
        if [entry for entry in here.glob(f"{PREFIX}*") if entry != top] == []:
            _control(here, "-", enabled)
            _move(members, here)


def _enable(hierarchy: Hierarchy, controllers: Collection[str]) -> None:
    """Enable controllers for groups below that of this process, which may have to be empty for that."""
    try:
        _control(hierarchy.here, "+", controllers)
    except OSError as error:
        if error.errno != errno.EBUSY:
            raise
        members = processes_in(hierarchy.here)
        if strangers := [pid for pid in members if not is_relative(pid)]:
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


class Group:
    """The groups of one container, one in each hierarchy that it needs."""

    def __init__(self, name: str, places: Iterable[Hierarchy]) -> None:
        self._places: Mapping[Path, Hierarchy] = {place.top / name: place for place in places}

    def make(self, settings: Iterable[Setting]) -> None:
        """Make the groups, and write the limits. Raises OSError."""
        for group, place in self._places.items():
            group.mkdir()
            (group / PAYLOAD).mkdir()
            for setting in settings:
                if setting.controller in place.controllers:
                    setting.write(group, unified=place.unified)

    @property
    def entrances(self) -> list[Path]:
        """The files to which a process writes 0 to enter the groups."""
        return [group / PAYLOAD / "cgroup.procs" for group in self._places]

    @property
    def out_of_memory(self) -> bool:
        """Whether a process in it was killed for want of memory."""
        return any(map(_oom_kills, self._places))

    def remove(self) -> bool:
        """Remove the groups, and kill the processes that are still in them; return whether they are gone."""
        return sum(remove(group) for group in self._places) == len(self._places)


def _oom_kills(group: Path) -> int:
    """Return the number of kills. Version 1 counts them in the group of the process, version 2 in that of the limit."""
    for counts in (group / "memory.events", group / PAYLOAD / "memory.oom_control"):
        with suppress(OSError):
            found = re.search(r"^oom_kill (\d+)$", counts.read_text(), re.MULTILINE)
            return int(found[1]) if found else 0
    return 0


def sweep(theirs: Callable[[Identity], bool]) -> int:
    """Remove the groups of other pilots, and kill the processes in them.

    Args:
        theirs: Selects the pilots whose groups are removed.

    Returns:
        The number of containers that were removed.
    """
    tops = [top for hierarchy in hierarchies() for top in hierarchy.pilot_groups()]
    # The names are any user's to choose, but no other user's group can be written to.
    return sum(_sweep(top) for top in tops if (pilot := Identity.parse(top.name.removeprefix(PREFIX))) and theirs(pilot))


def _sweep(top: Path) -> int:
    containers = [group for group in top.glob("*") if group.is_dir() and group.name != PILOT]
    removed = sum([remove(group) for group in containers])
    if processes_in(top / PILOT):  # relatives of that pilot, such as its guardian
        # They were moved because nothing had enabled controllers in the group above: so that pilot has enabled all of them.
        _move_back(top, read_words(top.parent / "cgroup.subtree_control"))
    remove_empty(top)
    return removed
