"""The guardian: a small process of its own that outlives the pilot. It needs only the standard library.

The pilot writes to a pipe what is to be cleaned up after its death: `engine SOCKET`, `data DIRECTORY`, `images DIRECTORY`, a
line each, the paths in hex. At the line `done` the guardian ends. If the pipe ends without that line, the pilot is dead,
however it died: then the guardian kills its processes and removes its containers, control groups, task directories and
unfinished images.
"""

import itertools
import os
import sys
import time
from collections.abc import Callable, Collection, Iterable
from functools import partial
from importlib import import_module
from pathlib import Path

from trio_pilot.cleanup import image_builds
from trio_pilot.files import data_directory
from trio_pilot.processes import cgroups, orphans
from trio_pilot.processes.identity import Identity

DEATH_TIMEOUT = 5.0  # seconds from the end of the pipe to the end of the pilot: freeing its memory may take a moment
LOOK_INTERVAL, LONGEST_INTERVAL = 0.02, 0.5  # seconds between two looks
# Seconds of the first round, for an engine that answers, and of the second, for one that has to come back. After that, the
# next pilot's sweep removes the rest.
CLEAN_TIMEOUTS = 5.0, 120.0


def main() -> None:
    """Watch the pilot that the first argument names; the other arguments are lines that an earlier guardian was sent."""
    import_module("trio_pilot.processes.secrecy").keep_secrets()
    os.chdir("/")  # so that no file system is kept from being unmounted
    pilot = Identity.parse(sys.argv[1])
    if pilot is None:
        sys.exit(f"{sys.argv[1]!r} is not the identity of a pilot")
    watched: dict[str, set[Path]] = {"engine": set(), "data": set(), "images": set()}
    for line in itertools.chain(sys.argv[2:], sys.stdin):
        if line.strip() == "done":
            return
        what, path = parsed(line)
        if what == "engine":
            # Imported now: the package may be removed by the time the pilot is dead.
            import_module("trio_pilot.cleanup.engine_containers")
        watched[what].add(path)
    if _has_died(pilot):
        clean_up(pilot, watched["engine"], watched["data"], watched["images"])


def parsed(line: str) -> tuple[str, Path]:
    """Return the kind and the path in a line."""
    what, name = line.split()
    return what, Path(os.fsdecode(bytes.fromhex(name)))


def clean_up(
    pilot: Identity,
    engines: Collection[Path],
    data: Iterable[Path],
    images: Iterable[Path] = (),
    timeouts: Iterable[float] = CLEAN_TIMEOUTS,
) -> None:
    """Remove all that a pilot has left. Directories do not wait for an engine that is away.

    Args:
        pilot: the dead pilot.
        engines: the sockets of its engines.
        data: its data directories.
        images: its directories of unpacked images.
        timeouts: the end of each round, in seconds from now.
    """
    begun = time.monotonic()
    for seconds in timeouts:
        dead = {directory: data_directory.owner_files_of_dead(directory, pilot) for directory in data}
        is_clean = _cleaned(pilot, engines, begun + seconds)
        for directory, owner_files in dead.items():
            _found(partial(data_directory.sweep, removable=owner_files if is_clean or not engines else ()), directory)
        for directory in images:  # now that no process of that pilot unpacks one and holds its lock
            _found(image_builds.remove_unfinished, directory)
        if is_clean:
            return


def _cleaned(pilot: Identity, engines: Iterable[Path], deadline: float) -> bool:
    """Look until two looks in a row have found nothing: a request of the pilot may still have been under way."""
    quiet, pause = 0, LOOK_INTERVAL
    while quiet < 2 and time.monotonic() < deadline:
        quiet = quiet + 1 if _is_clean(pilot, engines) else 0
        time.sleep(pause)
        pause = min(1.5 * pause, LONGEST_INTERVAL)
    return quiet == 2


def _is_clean(pilot: Identity, engines: Iterable[Path]) -> bool:
    """Remove what there is of each kind; return whether there was nothing."""
    looks = [partial(orphans.end_processes, lambda one: one == pilot), partial(cgroups.sweep, lambda one: one == pilot)]
    for engine in engines:
        from trio_pilot.cleanup import engine_containers

        looks.append(partial(engine_containers.remove_containers, engine, lambda one: one == pilot))
    return not sum(map(_found, looks))


def _found(look: Callable[..., int], *arguments: Path) -> int:
    """Return how much a look has found; 1 if it fails: what is left is unknown then, and no process reads an error."""
    try:
        return look(*arguments)
    except Exception:  # one kind that cannot be looked for must not keep the others
        return 1


def _has_died(pilot: Identity) -> bool:
    deadline = time.monotonic() + DEATH_TIMEOUT
    while not pilot.is_dead and time.monotonic() < deadline:
        time.sleep(LOOK_INTERVAL)
    return pilot.is_dead
