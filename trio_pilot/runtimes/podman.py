"""The runtime `podman`: containers by podman's own API.

Podman translates requests of Docker's API into its own command line, in which a comma in a path is lost, and then polls for
the end of a container every 250 ms. Only images are pulled by Docker's API: their names then mean the same as for Docker.
"""

import os
from collections.abc import Mapping
from contextlib import AbstractAsyncContextManager
from pathlib import Path
from typing import Any

from trio_pilot.errors import NodeError
from trio_pilot.runtimes import Container, Mount, Options
from trio_pilot.runtimes.engine import EngineRuntime, fault_of, open_engine
from trio_pilot.runtimes.engine_dialect import (
    DROPPED_CAPABILITIES,
    HIDDEN_MODE,
    HIDDEN_SIZE,
    KEPT_CAPABILITIES,
    MOST_LOG,
    SCRATCH,
    CreateRequest,
    Dialect,
    Spec,
    labels,
)
from trio_pilot.runtimes.engine_timeouts import DEFAULT_TIMEOUTS, EngineTimeouts
from trio_pilot.runtimes.hidden_paths import NOTHING, HiddenPath

OLDEST = 4  # supported major version

CPU_PERIOD = 100_000  # microseconds

# Podman's own words for kinds of network; any other word is the name of a network.
NETWORK_MODES = {name: name for name in ("none", "host", "bridge", "private", "slirp4netns", "pasta", "container")} | {
    "ns": "path"
}


async def fault(options: Options) -> str | None:  # noqa: ARG001 -- as for any other runtime
    """Return the reason why podman does not work here; None if it works."""
    return await fault_of(PODMAN)


def open_runtime(
    options: Options, timeouts: EngineTimeouts = DEFAULT_TIMEOUTS
) -> AbstractAsyncContextManager[EngineRuntime]:
    """Open the runtime. Raises NodeError if podman does not work here."""
    return open_engine(PODMAN, options, timeouts)


def default_socket() -> Path:
    """Return the socket of this user's own podman, which for root is the machine's."""
    directory = os.environ.get("XDG_RUNTIME_DIR") or f"/run/user/{os.geteuid()}"
    return Path(directory if os.geteuid() else "/run", "podman/podman.sock")


def prefix(headers: Mapping[str, str]) -> str:
    """Return the prefix of the version of the API that podman 4 and all later ones support."""
    version = headers.get("libpod-api-version", "none")
    major = version.partition(".")[0]
    if not major.isdecimal():
        raise NodeError("this is no podman, it may be docker: choose the runtime docker")
    if int(major) < OLDEST:
        raise NodeError(f"podman is too old: it is version {version}, and {OLDEST} is needed at least")
    return "/v4.0.0/libpod"


def spec(request: CreateRequest) -> Spec:
    """Return the body of a create request. What it does not set is the image's: the working directory, the entrypoint."""
    container, options = request.container, request.options
    return {
        "name": request.name,
        "image": request.image,
        # Without arguments the image's own apply.
        **({"entrypoint" if container.without_entrypoint else "command": container.args} if container.args else {}),
        "env": dict(container.env),
        "user": options.user,
        "labels": labels(request),
        "init": True,
        "mounts": [
            _mount(Mount(container.scratch, SCRATCH, writable=True)),
            *map(_mount, container.mounts),
            *map(_cover, request.hidden),
        ],
        # Any that is added here is effective for every user of a container, not for root alone.
        "cap_drop": sorted(DROPPED_CAPABILITIES - request.added_capabilities),
        "cap_add": sorted(request.added_capabilities - DROPPED_CAPABILITIES - KEPT_CAPABILITIES),
        "no_new_privileges": not request.may_gain_privileges,
        "log_configuration": {"driver": "k8s-file", "size": MOST_LOG},
        "resource_limits": _limits(container),
        **({"shm_size": options.shm_size} if options.shm_size else {}),
        **(_network(options.network) if options.network else {}),
    }


def _mount(mount: Mount) -> Spec:
    options = ["rbind", "rprivate", "rw"] if mount.writable else ["rbind", "rslave", "ro"]
    return {"type": "bind", "source": str(mount.source), "destination": mount.target, "options": options}


def _cover(path: HiddenPath) -> Spec:
    if not path.is_directory:
        return _mount(Mount(NOTHING, path.place))
    options = ["ro", "nosuid", "nodev", "notmpcopyup", f"size={HIDDEN_SIZE}", f"mode={HIDDEN_MODE:o}"]
    return {"type": "tmpfs", "source": "tmpfs", "destination": path.place, "options": options}


def _limits(container: Container) -> Spec:
    limits = container.limits
    settings: dict[str, Spec] = {}
    if limits.memory is not None:
        # The limit of swap is that of both together: so there is no swap.
        settings["memory"] = {"limit": limits.memory, "swap": limits.memory}
    if limits.cpus is not None:
        settings["cpu"] = {"quota": int(limits.cpus * CPU_PERIOD), "period": CPU_PERIOD}
    if container.cpu_set:
        settings["cpu"] = {**settings.get("cpu", {}), "cpus": ",".join(map(str, container.cpu_set))}
    if limits.pids is not None:
        settings["pids"] = {"limit": limits.pids + 1}  # the init does not count as the task's
    return settings


def _network(network: str) -> Spec:
    word, _, value = network.partition(":")
    if word in NETWORK_MODES:
        return {"netns": {"nsmode": NETWORK_MODES[word], "value": value}}
    return {"netns": {"nsmode": "bridge"}, "networks": {network: {}}}


def _wait_query(interval: float) -> Mapping[str, str]:
    return {"condition": "exited", "interval": f"{int(interval * 1000)}ms"}


def _exit_code(answer: Any) -> int:
    return int(answer)


SYSTEMCTL = "systemctl --user" if os.geteuid() else "systemctl"

PODMAN = Dialect(
    name="podman",
    variable="CONTAINER_HOST",
    socket=default_socket,
    advice=f"start it ({SYSTEMCTL} start podman.socket), or name its socket in CONTAINER_HOST",
    prefix=prefix,
    pull_prefix="/v1.40",
    spec=spec,
    wait_query=_wait_query,
    exit_code=_exit_code,
    ends_its_containers=False,
    reports_out_of_memory=False,  # not where some control groups are of version 1 and some of version 2
    refuses_private_mounts=False,
)
