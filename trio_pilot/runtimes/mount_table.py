"""The mounts of this machine below the directories that containers may read.

A bind mount brings along what is mounted below it, but where it is read-only, most engines make its top read-only, and no
more. So each file system below is mounted once more, read-only. What is mounted there later is seen if the mount of this
machine propagates (it is shared, or a slave of a shared one); it is as writable as on this machine.
"""

import os
import re
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from pathlib import Path

from trio_pilot.log import LOGGER
from trio_pilot.runtimes import Mount

TABLE = Path("/proc/self/mountinfo")
SPECIAL, ESCAPE = re.compile(rb"[ \t\n\\]"), re.compile(rb"\\([0-7]{3})")  # letters of a path, and what is written for them


@dataclass(frozen=True, slots=True)
class Entry:
    """A line of the mount table: proc_pid_mountinfo(5)."""

    number: int
    parent: int
    place: Path
    is_writable: bool  # and can be mounted once more at another place
    propagates: bool
    only_user: int | None  # the only user who may use a file system in user space; None: any user

    @classmethod
    def of(cls, line: bytes) -> "Entry":
        """Read a line."""
        left, _, right = line.partition(b" - ")
        number, parent, _, _, place, options, *tags = left.split()
        kind, _, more = right.split(b" ", 2)
        propagates = any(tag.startswith((b"shared:", b"master:")) for tag in tags)
        user = re.search(rb"\buser_id=(\d+)", more)
        is_closed = kind.startswith(b"fuse") and b"allow_other" not in more and user is not None
        is_writable = b"ro" not in options.split(b",") and b"unbindable" not in tags
        only_user = int(user[1]) if user and is_closed else None
        return cls(int(number), int(parent), path_of(place), is_writable, propagates, only_user)


def path_of(word: bytes) -> Path:
    """Return the path that a word of the table stands for."""
    return Path(os.fsdecode(ESCAPE.sub(lambda found: bytes([int(found[1], 8)]), word)))


class MountTable:
    """What is mounted at, above and below some directories of this machine, as this process sees it."""

    def __init__(self, lines: Iterable[bytes]) -> None:
        self._entries: Mapping[int, Entry] = {entry.number: entry for entry in map(Entry.of, lines)}

    @classmethod
    def read(cls, directories: Iterable[Path]) -> "MountTable":
        """Read the table of this process. No file system is touched by that, so one that hangs does no harm."""
        tops = [SPECIAL.sub(lambda found: b"\\%03o" % found[0][0], os.fsencode(path)) for path in directories]
        lines = TABLE.read_bytes().splitlines()
        return cls(line for line in lines if _is_near(line.split(b" ", 5)[4], tops))

    def below(self, directory: Path) -> Iterator[Entry]:
        """Yield the visible mounts below a directory without links, from the top down."""
        found = [entry for entry in self._entries.values() if directory in entry.place.parents and self._is_visible(entry)]
        yield from sorted(found, key=lambda entry: entry.place)

    def propagates(self, path: Path) -> bool:
        """Return whether what is mounted below a path without links is seen in containers that see that path."""
        above = [entry for entry in self._entries.values() if path.is_relative_to(entry.place) and self._is_visible(entry)]
        return max(above, key=lambda entry: len(entry.place.parts)).propagates if above else False

    @cached_property
    def _children(self) -> Mapping[int, Sequence[Entry]]:
        children: dict[int, list[Entry]] = {}
        for entry in self._entries.values():
            children.setdefault(entry.parent, []).append(entry)
        return children

    def _is_visible(self, entry: Entry) -> bool:
        """Return whether no other mount covers the place of this one, or this one itself."""
        own = self._children.get(entry.number, ())
        if any(other.place == entry.place for other in own if other is not entry):
            return False
        while (parent := self._entries.get(entry.parent)) and parent is not entry:
            siblings = self._children[parent.number]
            if any(other is not entry and _covers(other, entry) for other in siblings):
                return False
            entry = parent
        return True


def _is_near(place: bytes, tops: Sequence[bytes]) -> bool:
    """Return whether a place is above or below one of some directories, or is about to be: there may be a few more."""
    return any(place.startswith(top) or top.startswith(place) for top in tops)


def _covers(other: Entry, entry: Entry) -> bool:
    return other.place in entry.place.parents


def to_the_bottom(mounts: Sequence[Mount], user: int) -> tuple[Mount, ...]:
    """Return some mounts, and after each one that is read-only what is mounted below it and could be written.

    Of those that are read-only, `propagates` says what the mount table does.

    Args:
        mounts: the mounts of a container.
        user: the id of the user that makes them.
    """
    tops = {mount: Path(os.path.realpath(mount.source)) for mount in mounts if not mount.writable}
    if not tops:
        return tuple(mounts)
    table, targets = MountTable.read(tops.values()), {mount.target for mount in mounts}
    made: list[Mount] = []
    for mount in mounts:
        if mount.writable:
            made.append(mount)
        else:
            made.append(replace(mount, propagates=table.propagates(tops[mount])))
            made += (one for one in _below(table, mount, tops[mount], user) if one.target not in targets)
    return tuple(made)


def _below(table: MountTable, mount: Mount, top: Path, user: int) -> Iterator[Mount]:
    for entry in table.below(top):
        if entry.is_writable and entry.only_user in (None, user):
            target = str(Path(mount.target, entry.place.relative_to(top)))
            yield replace(mount, source=entry.place, target=target, propagates=entry.propagates)


class PrivateMounts:
    """The directories below which containers do not see what is mounted later. Each is logged once."""

    def __init__(self, name: str) -> None:
        self._name = name
        self._logged: set[Path] = set()

    def log(self, directories: Iterable[Path]) -> None:
        """Log those directories that were not logged before."""
        for directory in set(directories) - self._logged:
            self._logged.add(directory)
            LOGGER.warning(
                "%s: what is mounted below %r while a container runs is not seen in it:"
                " its mount is private (mount --make-rshared)",
                self._name,
                str(directory),
            )
