"""The control group hierarchies of this machine, and the group of this process in each. Everything here blocks.

Version 1 has one hierarchy for each controller or for several, version 2 one for all. Both may be there at once, with each
controller in either. Standard library only: the guardian loads nothing else.
"""

import os
import re
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path

from trio_pilot.processes.identity import own

PREFIX = "trio-pilot-"  # of the name of a pilot's group; its Identity follows
PILOT = "pilot"  # the group in it that the pilot itself moves to, where version 2 insists
PAYLOAD = "payload"  # the group in a container's group that the container runs in

# The file that a controller has in each group but the root: in version 1 and in version 2.
MAIN_FILES = {
    "memory": ("memory.limit_in_bytes", "memory.max"),
    "cpu": ("cpu.cfs_quota_us", "cpu.max"),
    "pids": ("pids.max", "pids.max"),
}


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

    def main_file(self, controller: str) -> str:
        """Return the name of the file that a controller has in each group."""
        v1, v2 = MAIN_FILES[controller]
        return v2 if self.unified else v1

    def pilot_groups(self) -> Iterator[Path]:
        """Yield the top groups of all pilots of this user in this hierarchy; others may have made some of such a name."""
        for directory, names, _ in os.walk(self.mount):
            found = (Path(directory, name) for name in names if name.startswith(PREFIX))
            yield from (top for top in found if _is_own(top))
            names[:] = [name for name in names if not name.startswith(PREFIX)]


def _is_own(group: Path) -> bool:
    try:
        return group.stat().st_uid == os.geteuid() and os.access(group, os.W_OK)
    except OSError:  # it has been removed meanwhile
        return False


def hierarchies(proc: Path = Path("/proc/self")) -> list[Hierarchy]:
    """Return the hierarchies that have a controller of MAIN_FILES.

    Args:
        proc: The directory of this process in /proc.
    """
    try:
        mounts = [_Mount.parse(line) for line in _lines(proc / "mountinfo") if " - cgroup" in line]
        lines = _lines(proc / "cgroup")
    except OSError:
        return []
    found = (_hierarchy(line, mounts) for line in lines)
    return [one for one in found if one and one.controllers]


def _lines(file: Path) -> list[str]:
    """Read a file that contains names: they may have any bytes in them, but no line feed."""
    return [line for line in os.fsdecode(file.read_bytes()).split("\n") if line]


@dataclass(frozen=True, slots=True)
class _Mount:
    kind: str
    root: Path
    point: Path
    options: frozenset[str]

    @classmethod
    def parse(cls, line: str) -> "_Mount":
        """Parse a line of proc_pid_mountinfo(5)."""
        of_mount, _, of_file_system = line.partition(" - ")
        _, _, _, root, point, *_ = of_mount.split(" ")
        kind, _, options = of_file_system.split(" ")
        return cls(kind, Path(_unescaped(root)), Path(_unescaped(point)), frozenset(options.split(",")))


def _unescaped(name: str) -> str:
    return re.sub(r"\\([0-7]{3})", lambda found: chr(int(found[1], 8)), name)


def _hierarchy(line: str, mounts: Iterable[_Mount]) -> Hierarchy | None:
    """Return the hierarchy in a line of /proc/PID/cgroup: `ID:CONTROLLERS:PATH`, without controllers in version 2."""
    _, names, path = line.split(":", 2)
    named = frozenset(names.split(",")) if names else frozenset[str]()
    for mount in mounts:
        is_it = named <= mount.options and mount.kind == "cgroup" if named else mount.kind == "cgroup2"
        if is_it and Path(path).is_relative_to(mount.root) and ".." not in path:
            here = _original(mount.point / Path(path).relative_to(mount.root))
            controllers = named or read_words(here / "cgroup.controllers")
            return Hierarchy(mount.point, here, controllers & MAIN_FILES.keys(), unified=not named)
    return None


def _original(group: Path) -> Path:
    """Return the group that this process was in before a pilot moved it to a group of its own."""
    return group.parent.parent if group.name == PILOT and group.parent.name.startswith(PREFIX) else group


def read_words(file: Path) -> frozenset[str]:
    """Return the words in a file; none if it cannot be read."""
    try:
        return frozenset(file.read_text().split())
    except OSError:
        return frozenset()
