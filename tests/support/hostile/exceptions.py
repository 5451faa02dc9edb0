"""What the runtimes cannot refuse a hostile task, and why that does no harm, or what does help."""

from collections.abc import Mapping
from fnmatch import fnmatchcase

# By runtime, or runtime and kind of user; the names of tries are patterns as of a shell.
PAGE_FLAGS = "root may read of what kind each page of memory is, not what is in it"
OWN_COPY = "the container has a copy of the image of its own"
OWN_GROUPS = "with control groups of version 1, it is an empty file system of the container's own"
NO_HYPERVISOR = "the engine's filter is older than Docker 25; what listens there is to check who calls"
EXCEPTIONS: Mapping[str, Mapping[str, str]] = {
    "bubblewrap, root": {
        "/proc: read kpageflags": PAGE_FLAGS,
        "/proc: read timer_list": "root may read which timers the kernel has; to hide it costs a fiftieth of a container",
        "keyring: /proc/keys": "the names of root's keys are seen; the filter of system calls keeps their content",
    },
    "bubblewrap, user": {
        "/proc/sys: kernel/*": "it is of a namespace of the container's own (messages, shared memory, processes)",
        "keyring: /proc/keys": "the names of the user's keys are seen; the filter of system calls keeps their content",
    },
    "apptainer, root": {"/proc: read kpageflags": PAGE_FLAGS},
    "apptainer, user": {},
    "docker": {
        "files: make one in /*": OWN_COPY,
        "/proc: read kpageflags": PAGE_FLAGS,
        "cgroups: make a group in /sys/fs/cgroup": OWN_GROUPS,
        "kernel: io_uring_setup": "the filter of Docker before 25 lets it through; the kernel's own checks apply",
        "sockets: hypervisor": NO_HYPERVISOR,
    },
    "podman": {
        "files: make one in /*": OWN_COPY,
        "/proc: read kpageflags": PAGE_FLAGS,
        "cgroups: make a group in /sys/fs/cgroup": OWN_GROUPS,
        "kernel: io_uring_setup": "podman's filter lets it through; the kernel's own checks apply",
        "keyring: *": "podman's filter lets them through; that of the session is the container's, that of the user is not",
        "namespaces: *user*": "podman's filter lets user namespaces through, so that containers can be nested",
        "namespaces: clone3 by a tracer": "podman's filter lets user namespaces through, so that containers can be nested",
        "mounts: * in a user namespace": "the same; the files of the kernel that podman hides stay hidden",
        "processes: take a descriptor of process 1": "process 1 is the container's own",
        "sockets: hypervisor": NO_HYPERVISOR,
    },
}


def reason_for(runtime: str, user: int, name: str) -> str | None:
    """Return why a runtime may allow a try; None if it may not."""
    kinds = [runtime, f"{runtime}, {'user' if user else 'root'}"]
    known = (item for kind in kinds for item in EXCEPTIONS.get(kind, {}).items())
    return next((why for pattern, why in known if fnmatchcase(name, pattern)), None)
