"""Files and directories of this machine that no container may see, although one of its mounts contains them.

They are covered at each path at which a container would see them, after all that is mounted there. Hard links to a file are
not found. A file that is replaced while a container runs is seen in that container from then on: the kernel removes what is
mounted on a file that is renamed or deleted in another mount namespace (mount_namespaces(7)).
"""

import os
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path, PurePath

from trio_pilot.runtimes import Mount
from trio_pilot.runtimes.mount_table import TABLE, path_of

NOTHING = Path(os.devnull)  # what covers a file


@dataclass(frozen=True, slots=True)
class HiddenPath:
    """A path in a container that has to be covered."""

    source: Path  # on this machine
    place: str  # in the container
    is_directory: bool


class HiddenPaths:
    """The paths to hide from the containers of a runtime."""

    def __init__(self, paths: Iterable[Path], own: Path, not_of_root: Callable[[PurePath], bool] = lambda _: False) -> None:
        """Remember some paths, whether they exist or not.

        Args:
            paths: those to hide.
            own: the directory that has the files of tasks: mounts of what is below it show none of the paths.
            not_of_root: returns whether a path is not seen through a mount at the root.
        """
        self._not_of_root = not_of_root
        self._paths = tuple(dict.fromkeys(path.absolute() for path in paths))
        self._own = f"{own}/"
        # A link may lead to another file with each container.
        self._links = tuple(path for path in self._paths if os.path.realpath(path) != str(path))
        self._found: dict[object, Sequence[HiddenPath]] = {}

    def seen_through(self, mounts: Iterable[Mount]) -> list[HiddenPath]:
        """Return those that exist and that a container with such mounts would see, in the order to cover them."""
        if not self._paths:
            return []
        shown = tuple((one.target, str(one.source)) for one in mounts if not str(one.source).startswith(self._own))
        if not shown:
            return []
        key = shown, *map(os.path.realpath, self._links)
        if key not in self._found:
            self._found[key] = list(self._seen_through(dict(shown)))
        return [replaced for one in self._found[key] if (replaced := _if_there(one))]

    def _seen_through(self, shown: Mapping[str, str]) -> Iterator[HiddenPath]:
        """Yield the paths of a container, whether they exist or not."""
        tops = {target: Path(os.path.realpath(source)) for target, source in shown.items()}
        places: dict[str, Path] = {}
        mounts = _mounts()
        for path in self._paths:
            for source in _names(Path(os.path.realpath(path)), mounts):
                for target, top in tops.items():
                    if source.is_relative_to(top):
                        seen = PurePath(target, source.relative_to(top))
                        if target != "/" or not self._not_of_root(seen):
                            places[str(seen)] = source
        directories = [place for place, source in places.items() if os.path.isdir(source)]  # noqa: PTH112 -- no error
        for place, source in places.items():
            if not any(place.startswith(f"{directory}/") for directory in directories):
                yield HiddenPath(source, place, place in directories)


def _if_there(path: HiddenPath) -> HiddenPath | None:
    """Return a path with its present kind; None if it does not exist, or this user cannot reach it."""
    if os.path.isdir(path.source):  # noqa: PTH112 -- no error where it cannot be reached
        return path if path.is_directory else HiddenPath(path.source, path.place, is_directory=True)
    return HiddenPath(path.source, path.place, is_directory=False) if os.path.exists(path.source) else None  # noqa: PTH110


def _mounts() -> list[tuple[bytes, Path, Path]]:
    """Return what is mounted: the device, the directory of it that is, and the place."""
    entries = [line.split()[2:5] for line in TABLE.read_bytes().splitlines()]
    return [(device, path_of(root), path_of(place)) for device, root, place in entries]


def _names(path: Path, mounts: Sequence[tuple[bytes, Path, Path]]) -> Iterator[Path]:
    """Yield a path without links, and the others that it has because its directory is mounted at several places."""
    yield path
    above = [one for one in mounts if path.is_relative_to(one[2])]
    if not above:
        return
    device, root, place = max(above, key=lambda one: len(one[2].parts))
    inside = root / path.relative_to(place)
    for other, its_root, its_place in mounts:
        if other == device and inside.is_relative_to(its_root):
            name = its_place / inside.relative_to(its_root)
            if name != path and _is_same(name, path):
                yield name


def _is_same(one: Path, other: Path) -> bool:
    try:
        return one.samefile(other)
    except OSError:  # one of them is not there yet, or is covered by another mount
        return False
