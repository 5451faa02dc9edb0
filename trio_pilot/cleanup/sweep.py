"""The sweep at the start of a pilot: remove what dead pilots left behind. It blocks."""

from collections.abc import Callable, Collection
from functools import partial
from pathlib import Path

from trio_pilot.cleanup import image_builds
from trio_pilot.files import data_directory
from trio_pilot.log import LOGGER
from trio_pilot.processes import cgroups, orphans
from trio_pilot.processes.identity import Identity


def sweep(watched: Collection[tuple[str, Path]]) -> None:
    """Remove what dead pilots left at each of the watched places, and their processes and control groups.

    What other users have put where it looks is no reason to end this pilot, or not to look elsewhere: each look may fail.
    """
    # Engines before data directories: a container's pilot may be known to be dead only by its owner file there. The owner
    # files are listed before: that of a pilot that dies meanwhile is kept for the next sweep.
    _look("process(es)", "/proc", lambda: orphans.end_processes(_is_dead))
    _look("control group(s)", "the control groups", lambda: cgroups.sweep(_is_dead))
    dead = {path: data_directory.owner_files_of_dead(path) for what, path in watched if what == "data"}
    for what, path in sorted(watched, key=lambda one: one[0] != "engine"):
        if what == "engine":
            if not _look("container(s)", path, partial(_remove_containers, path)):
                dead.clear()
        elif what == "images":
            _look("half-unpacked image(s)", path, partial(image_builds.remove_unfinished, path))
        else:
            _look("task directory(ies)", path, partial(data_directory.sweep, path, removable=dead.get(path, ())))


def _look(what: str, place: object, remove: Callable[[], int]) -> bool:
    """Remove things of one kind, and log how many they were; return False if that failed, which is logged too."""
    try:
        number = remove()
    except Exception as error:  # one kind that cannot be looked for must not keep the others
        LOGGER.warning("cannot look for what dead pilots left at %s: %s", place, error or type(error).__name__)
        return False
    if number:
        LOGGER.warning("removed %d %s of pilots that are no more", number, what)
    return True


def _remove_containers(engine: Path) -> int:
    from trio_pilot.cleanup import engine_containers

    return engine_containers.remove_containers(engine, _is_dead)


def _is_dead(pilot: Identity) -> bool:
    return pilot.is_dead
