"""Control groups of other machines, and with faults."""

import fnmatch
import os
from collections.abc import Collection, Iterator
from pathlib import Path

from trio_pilot.processes import cgroups
from trio_pilot.processes.cgroup_hierarchies import PREFIX, hierarchies
from trio_pilot.processes.identity import Identity

NOWHERE = Path("/nowhere/cgroup.procs")


class NoGroups(cgroups.Groups):
    """The control groups of a machine that has no hierarchy."""

    def __init__(self) -> None:
        self.faults = {}

    @property
    def controllers(self) -> frozenset[str]:
        return frozenset()

    def close(self) -> None:
        """Do nothing."""


class GroupsWithoutLimit(cgroups.Groups):
    """Control groups in which a limit cannot be written."""

    def make(self, name: str, settings: Collection[cgroups.Setting]) -> cgroups.Group:
        missing = [("nowhere/limit", "1")]
        return super().make(name, [*settings, cgroups.Setting("memory", missing, missing)])


class GroupsWithoutEntrance(cgroups.Groups):
    """Control groups that a process cannot enter."""

    def make(self, name: str, settings: Collection[cgroups.Setting]) -> cgroups.Group:
        return _GroupWithoutEntrance(super().make(name, settings))


class _GroupWithoutEntrance(cgroups.Group):
    def __init__(self, group: cgroups.Group) -> None:
        super().__init__("", [])
        self.group = group

    @property
    def entrances(self) -> list[Path]:
        return [NOWHERE]

    def remove(self) -> bool:
        return self.group.remove()


def tops_of(pilot: Identity) -> Iterator[Path]:
    """Find a pilot's own group in each hierarchy."""
    for one in hierarchies():
        for parent, names, _ in os.walk(one.mount):  # it passes over groups that another test has just removed
            yield from (Path(parent, name) for name in fnmatch.filter(names, f"{PREFIX}{pilot}"))
