"""The runtime `podman`: containers by podman's own API.

Of the API that it has in common with Docker it makes its own command line, in which no comma in a path survives, and waits
for the end of a container by looking each 250 ms. But images are pulled by it: so their names mean what they mean to Docker.
"""

import os
from collections.abc import Mapping
from contextlib import AbstractAsyncContextManager
from pathlib import Path
from typing import Any

from trio_pilot.errors import NodeError
from trio_pilot.runtimes import Container, Options
from trio_pilot.runtimes.engine import EngineRuntime, fault_of, open_engine
from trio_pilot.runtimes.engine_dialect import MOST_LOG, SCRATCH, CreateRequest, Dialect, Spec, labels

OLDEST = 4  # major version

CPU_PERIOD = 100_000  # microseconds

# Kinds of network that podman knows by a word; any other word is the name of a network.
NETWORK_MODES = {name: name for name in ("none", "host", "bridge", "private", "slirp4netns", "pasta", "container")} | {
    "ns": "path"
}


async def fault(options: Options) -> str | None:  # noqa: ARG001 -- none matters
    """Say what keeps podman from working here, if anything does."""
    return await fault_of(PODMAN)


def open_runtime(options: Options) -> AbstractAsyncContextManager[EngineRuntime]:
    """Open the runtime. Raises NodeError if it does not work here."""
    return open_engine(PODMAN, options)


def default_socket() -> Path:
    """Name the socket of a user's own podman, or root's."""
    own = os.environ.get("XDG_RUNTIME_DIR") or f"/run/user/{os.geteuid()}"
    return Path(own if os.geteuid() else "/run", "podman/podman.sock")


def prefix(headers: Mapping[str, str]) -> str:
    """Ask for the version of the API that every podman since the fourth speaks."""
    said = headers.get("libpod-api-version", "none")
    major = said.partition(".")[0]
    if not major.isdecimal():
        raise NodeError("this is no podman, it may be docker: choose the runtime docker")
    if int(major) < OLDEST:
        raise NodeError(f"podman is too old: it is version {said}, and {OLDEST} is needed at least")
    return "/v4.0.0/libpod"


def spec(order: CreateRequest) -> Spec:
    """Say what the container is to be. What is not said is the image's: the working directory, the entrypoint."""
    container, options = order.container, order.options
    return {
        "name": order.name,
        "image": order.image,
        **({"entrypoint": container.args} if container.plain else {"command": container.args}),
        "env": dict(container.env),
        "user": options.user,
        "labels": labels(order),
        "init": True,
        "mounts": [
            _mount(container.scratch, SCRATCH, writable=True),
            *(_mount(mount.source, mount.target, writable=mount.writable) for mount in container.mounts),
        ],
        "log_configuration": {"driver": "k8s-file", "size": MOST_LOG},
        "resource_limits": _limits(container),
        **({"shm_size": options.shm_size} if options.shm_size else {}),
        **(_network(options.network) if options.network else {}),
    }


def _mount(source: Path, target: str, *, writable: bool) -> Spec:
    options = ["rbind", "rprivate", "rw" if writable else "ro"]
    return {"type": "bind", "source": str(source), "destination": target, "options": options}


def _limits(container: Container) -> Spec:
    limits = container.limits
    settings: dict[str, Spec] = {}
    if limits.memory is not None:
        settings["memory"] = {"limit": limits.memory, "swap": limits.memory}  # both together: so there is no swap
    if limits.cpus is not None:
        settings["cpu"] = {"quota": int(limits.cpus * CPU_PERIOD), "period": CPU_PERIOD}
    if container.pinned:
        settings["cpu"] = {**settings.get("cpu", {}), "cpus": ",".join(map(str, container.pinned))}
    if limits.pids is not None:
        settings["pids"] = {"limit": limits.pids + 1}  # the init is none of the task's
    return settings


def _network(network: str) -> Spec:
    word, _, value = network.partition(":")
    if word in NETWORK_MODES:
        return {"netns": {"nsmode": NETWORK_MODES[word], "value": value}}
    return {"netns": {"nsmode": "bridge"}, "networks": {network: {}}}


def _wait(interval: float) -> Mapping[str, str]:
    return {"condition": "exited", "interval": f"{int(interval * 1000)}ms"}


def _exit_code(answer: Any) -> int:
    return int(answer)


SYSTEMCTL = "systemctl --user" if os.geteuid() else "systemctl"

PODMAN = Dialect(
    name="podman",
    variable="CONTAINER_HOST",
    socket=default_socket,
    cure=f"start it ({SYSTEMCTL} start podman.socket), or name its socket in CONTAINER_HOST",
    prefix=prefix,
    pull_prefix="/v1.40",
    spec=spec,
    wait=_wait,
    exit_code=_exit_code,
    ends_its_containers=False,
    tells_of_memory=False,  # it does not see it where control groups are half of version 1, half of version 2
)
