"""The sweep at the start of a pilot: remove what dead pilots left behind. It blocks."""

from collections.abc import Collection
from pathlib import Path

from trio_pilot.cleanup import image_builds
from trio_pilot.files import data_directory
from trio_pilot.log import LOGGER
from trio_pilot.processes import cgroups, orphans
from trio_pilot.processes.identity import Identity


def sweep(watched: Collection[tuple[str, Path]]) -> None:
    """Remove what dead pilots left at each of the watched places, and their processes and control groups."""
    found = {"process(es)": orphans.end_processes(_is_dead), "control group(s)": cgroups.sweep(_is_dead)}
    # Engines before data directories: a container's pilot may be known to be dead only by its owner file there. The owner
    # files are listed before: that of a pilot that dies meanwhile is kept for the next sweep.
    dead = {path: data_directory.owner_files_of_dead(path) for what, path in watched if what == "data"}
    for what, path in sorted(watched, key=lambda one: one[0] != "engine"):
        try:
            if what == "engine":
                from trio_pilot.cleanup import engine_containers

                found["container(s)"] = engine_containers.remove_containers(path, _is_dead)
            elif what == "images":
                found["half-unpacked image(s)"] = image_builds.remove_unfinished(path)
            else:
                found["task directory(ies)"] = data_directory.sweep(path, removable=dead.get(path, ()))
        except OSError as error:
            if what == "engine":
                dead.clear()
            LOGGER.warning("cannot look for what dead pilots left at %s: %s", path, error)
    for what, number in found.items():
        if number:
            LOGGER.warning("removed %d %s of pilots that are no more", number, what)


def _is_dead(pilot: Identity) -> bool:
    return pilot.is_dead
