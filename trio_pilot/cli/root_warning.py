"""A warning for a pilot that is root where nothing needs it."""

import os
from pathlib import Path

ALL_USERS = ["0", "0", "4294967295"]  # a user namespace in which each user is the same as outside: user_namespaces(7)
UID_MAP = Path("/proc/self/uid_map")
OF_CONTAINERS = "/.dockerenv", "/run/.containerenv", "/.singularity.d"  # files by which a container is known

WARNING = (
    "this pilot runs as root, and so do its tasks with the runtimes process, bubblewrap and apptainer:"
    " start it as an ordinary user, none of these needs more"
)


def root_warning() -> str | None:
    """Return a warning if this process is root on this machine, not only in a container or a user namespace."""
    is_root = os.geteuid() == 0 and UID_MAP.read_text().split() == ALL_USERS
    return WARNING if is_root and not any(map(os.path.exists, OF_CONTAINERS)) else None
