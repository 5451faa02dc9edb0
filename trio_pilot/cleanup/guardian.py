"""The guardian: a small process of its own, with nothing but the standard library, that outlives the pilot.

It reads from the pilot's end of a pipe what there is to look after: `engine SOCKET`, `data DIRECTORY`, `images DIRECTORY`,
a line each, the paths in hex. At `done` it goes. At the end of the pipe without that, the pilot is dead, however it died:
then the guardian kills its processes and removes its containers, control groups, task directories and half-unpacked images.
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

DEATH_TIMEOUT = 5.0  # seconds from the end of the pipe to the end of the pilot: its memory may take a moment to go
LOOK_INTERVAL, LONGEST_INTERVAL = 0.02, 0.5  # seconds between two looks
CLEAN_TIMEOUTS = 5.0, 120.0  # seconds for an engine to answer, and to come back; then it is for the next pilot's sweep


def main() -> None:
    """Watch over the pilot named by the first argument; the others are lines that were told to the guardian before."""
    os.chdir("/")  # keeping no file system from being unmounted
    pilot = Identity.parse(sys.argv[1])
    if pilot is None:
        sys.exit(f"{sys.argv[1]!r} is no pilot")
    watched: dict[str, set[Path]] = {"engine": set(), "data": set(), "images": set()}
    for line in itertools.chain(sys.argv[2:], sys.stdin):
        if line.strip() == "done":
            return
        what, path = parsed(line)
        if what == "engine":
            import_module(
                "trio_pilot.cleanup.engine_containers"
            )  # now: what we are imported from may be gone when the pilot is
        watched[what].add(path)
    if _has_died(pilot):
        clean_up(pilot, watched["engine"], watched["data"], watched["images"])


def parsed(line: str) -> tuple[str, Path]:
    """Read what there is to look after."""
    what, name = line.split()
    return what, Path(os.fsdecode(bytes.fromhex(name)))


def clean_up(pilot: Identity, engines: Collection[Path], data: Iterable[Path], images: Iterable[Path] = ()) -> None:
    """Remove all that a pilot has left. Directories do not wait for an engine that is away."""
    begun = time.monotonic()
    for seconds in CLEAN_TIMEOUTS:
        dead = {directory: data_directory.owner_files_of_dead(directory, pilot) for directory in data}
        is_clean = _cleaned(pilot, engines, begun + seconds)
        for directory, words in dead.items():
            _found(partial(data_directory.sweep, forget=words if is_clean or not engines else ()), directory)
        for directory in images:  # now that nobody builds one for that pilot, and has its lock
            _found(image_builds.remove_unfinished, directory)
        if is_clean:
            return


def _cleaned(pilot: Identity, engines: Iterable[Path], deadline: float) -> bool:
    """Look until two looks have found nothing: what the pilot had asked for may still have been coming."""
    quiet, pause = 0, LOOK_INTERVAL
    while quiet < 2 and time.monotonic() < deadline:
        quiet = quiet + 1 if _is_clean(pilot, engines) else 0
        time.sleep(pause)
        pause = min(1.5 * pause, LONGEST_INTERVAL)
    return quiet == 2


def _is_clean(pilot: Identity, engines: Iterable[Path]) -> bool:
    """Remove what there is of each kind; tell whether there was nothing."""
    looks = [partial(orphans.end_processes, lambda one: one == pilot), partial(cgroups.sweep, lambda one: one == pilot)]
    for engine in engines:
        from trio_pilot.cleanup import engine_containers

        looks.append(partial(engine_containers.remove_containers, engine, lambda one: one == pilot))
    return not sum(map(_found, looks))


def _found(look: Callable[..., int], *arguments: Path) -> int:
    """Give what a look has found. If it fails, whatever by, we do not know, and nobody is there to be told."""
    try:
        return look(*arguments)
    except Exception:  # a kind that cannot be looked for is no reason to leave the others
        return 1


def _has_died(pilot: Identity) -> bool:
    deadline = time.monotonic() + DEATH_TIMEOUT
    while not pilot.is_dead and time.monotonic() < deadline:
        time.sleep(LOOK_INTERVAL)
    return pilot.is_dead
