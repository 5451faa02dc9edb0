"""The runtime `docker`: containers by Docker's Engine API."""

from collections.abc import Mapping
from contextlib import AbstractAsyncContextManager
from pathlib import Path
from typing import Any

from trio_pilot.errors import NodeError
from trio_pilot.runtimes import Limits, Mount, Options
from trio_pilot.runtimes.docker_config import docker_socket
from trio_pilot.runtimes.engine import EngineRuntime, fault_of, open_engine
from trio_pilot.runtimes.engine_dialect import (
    HIDDEN_MODE,
    HIDDEN_SIZE,
    MOST_LOG,
    SCRATCH,
    CreateRequest,
    Dialect,
    Spec,
    labels,
)
from trio_pilot.runtimes.engine_timeouts import DEFAULT_TIMEOUTS, EngineTimeouts
from trio_pilot.runtimes.hidden_paths import NOTHING, HiddenPath
from trio_pilot.runtimes.podman import PODMAN

OLDEST, NEWEST = (1, 40), (1, 51)  # supported versions of the API

# Without a network docker would still make a network sandbox, which is half of what a container costs. All that this adds is
# a loopback device, which exists in any case, and names for it: those of this machine do as well.
HOSTS = Path("/etc/hosts")

LOG_FILES = 2  # a full one is deleted as a whole, so at least half of MOST_LOG is kept


async def fault(options: Options) -> str | None:  # noqa: ARG001 -- as for any other runtime
    """Return the reason why docker does not work here; None if it works."""
    return await fault_of(DOCKER)


def open_runtime(
    options: Options, timeouts: EngineTimeouts = DEFAULT_TIMEOUTS
) -> AbstractAsyncContextManager[EngineRuntime]:
    """Open the runtime. Raises NodeError if docker does not work here."""
    return open_engine(DOCKER, options, timeouts)


def prefix(headers: Mapping[str, str]) -> str:
    """Return the prefix of the newest version of the API that docker and the pilot support."""
    version = headers.get("api-version", "none")
    try:
        newest = tuple(map(int, version.split(".")))
    except ValueError:
        raise NodeError(f"this is no docker: it gives {version!r} as its API version") from None
    if newest < OLDEST:
        raise NodeError(f"docker is too old: it speaks API version {version}, and 1.40 (docker 19.03) is needed at least")
    return "/v{}.{}".format(*min(newest, NEWEST))


def spec(request: CreateRequest) -> Spec:
    """Return the body of a create request. What it does not set is the image's: the working directory, the entrypoint."""
    container, options = request.container, request.options
    is_alone = not options.has_network
    return {
        "NetworkDisabled": is_alone,
        "Image": request.image,
        # Without arguments the image's own apply.
        **({"Entrypoint" if container.without_entrypoint else "Cmd": container.args} if container.args else {}),
        "Env": [f"{name}={value}" for name, value in container.env.items()],
        "User": options.user,
        "Labels": labels(request),
        "HostConfig": {
            "Init": True,
            "Mounts": [
                _mount(Mount(container.scratch, SCRATCH, writable=True)),
                *([_mount(Mount(HOSTS, str(HOSTS), propagates=False))] if is_alone else []),
                *map(_mount, container.mounts),
                *map(_cover, request.hidden),
            ],
            # The daemon's own filter of system calls applies: there is no word for it that all versions know.
            "CapDrop": ["ALL"],
            "CapAdd": request.capabilities,
            "SecurityOpt": [] if request.may_gain_privileges else ["no-new-privileges"],
            "IpcMode": "private",
            "NetworkMode": options.network or "default",
            "LogConfig": {
                "Type": "local",
                "Config": {"max-size": str(MOST_LOG // LOG_FILES), "max-file": str(LOG_FILES), "compress": "false"},
            },
            **({"ShmSize": options.shm_size} if options.shm_size else {}),
            **_limits(container.limits),
            **({"CpusetCpus": ",".join(map(str, container.cpu_set))} if container.cpu_set else {}),
        },
    }


def _mount(mount: Mount) -> Spec:
    """Return a bind mount. From version 1.44 of the API on, docker itself makes it read-only to the bottom, if it can."""
    spec = {"Type": "bind", "Source": str(mount.source), "Target": mount.target, "ReadOnly": not mount.writable}
    return spec if mount.writable or not mount.propagates else {**spec, "BindOptions": {"Propagation": "rslave"}}


def _cover(path: HiddenPath) -> Spec:
    if not path.is_directory:
        return _mount(Mount(NOTHING, path.place, propagates=False))
    options = {"SizeBytes": HIDDEN_SIZE, "Mode": HIDDEN_MODE}
    return {"Type": "tmpfs", "Target": path.place, "ReadOnly": True, "TmpfsOptions": options}


def _limits(limits: Limits) -> Spec:
    settings = {
        "Memory": limits.memory,
        "MemorySwap": limits.memory,  # the limit of both together: so there is no swap
        "NanoCpus": limits.cpus and int(limits.cpus * 1e9),
        "PidsLimit": limits.pids and limits.pids + 1,  # the init does not count as the task's
    }
    return {name: value for name, value in settings.items() if value is not None}


def _exit_code(answer: Any) -> int:
    return int(answer["StatusCode"])


def _stand_in(headers: Mapping[str, str]) -> Dialect | None:
    """Return podman's dialect if podman listens at docker's socket (podman-docker)."""
    return PODMAN if "libpod-api-version" in headers else None


DOCKER = Dialect(
    name="docker",
    variable="DOCKER_HOST",
    socket=docker_socket,
    advice="start it, or name its socket in DOCKER_HOST or a context; a user other than root must be in the group docker",
    prefix=prefix,
    pull_prefix=None,
    spec=spec,
    wait_query=lambda _interval: {},
    exit_code=_exit_code,
    ends_its_containers=True,
    reports_out_of_memory=True,
    refuses_private_mounts=True,
    stand_in=_stand_in,
)
