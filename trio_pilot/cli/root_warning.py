"""A warning for a pilot that is root where nothing needs it."""

import os

from trio_pilot.processes.proc import knows_all_users

OF_CONTAINERS = "/.dockerenv", "/run/.containerenv", "/.singularity.d"  # files by which a container is known

WARNING = (
    "this pilot runs as root, and so do its tasks with the runtimes process, bubblewrap and apptainer:"
    " start it as an ordinary user, none of these needs more"
)


def root_warning() -> str | None:
    """Return a warning if this process is root on this machine, not only in a container or a user namespace."""
    is_root = os.geteuid() == 0 and knows_all_users()
    return WARNING if is_root and not any(map(os.path.exists, OF_CONTAINERS)) else None
