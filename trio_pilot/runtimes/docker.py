"""The runtime `docker`: containers by Docker's Engine API."""

from collections.abc import Mapping
from contextlib import AbstractAsyncContextManager
from pathlib import Path
from typing import Any

from trio_pilot.errors import NodeError
from trio_pilot.runtimes import Limits, Options
from trio_pilot.runtimes.engine import EngineRuntime, fault_of, open_engine
from trio_pilot.runtimes.engine_dialect import MOST_LOG, SCRATCH, CreateRequest, Dialect, Spec, labels

OLDEST, NEWEST = (1, 40), (1, 51)  # versions of the API that we know

# Without a network docker would still make the sandbox for one, which is half of what a container costs. All that gives is a
# loopback device, which is there in any case, and names for it: this machine's are as good.
HOSTS = Path("/etc/hosts")

LOG_FILES = 2  # a full one is thrown away as a whole, so half of MOST_LOG is the least that is kept


async def fault(options: Options) -> str | None:  # noqa: ARG001 -- none matters
    """Say what keeps docker from working here, if anything does."""
    return await fault_of(DOCKER)


def open_runtime(options: Options) -> AbstractAsyncContextManager[EngineRuntime]:
    """Open the runtime. Raises NodeError if it does not work here."""
    return open_engine(DOCKER, options)


def prefix(headers: Mapping[str, str]) -> str:
    """Choose the newest version that both sides know."""
    said = headers.get("api-version", "none")
    try:
        theirs = tuple(map(int, said.split(".")))
    except ValueError:
        raise NodeError(f"this is no docker: it gives {said!r} as its API version") from None
    if theirs < OLDEST:
        raise NodeError(f"docker is too old: it speaks API version {said}, and 1.40 (docker 19.03) is needed at least")
    return "/v{}.{}".format(*min(theirs, NEWEST))


def spec(order: CreateRequest) -> Spec:
    """Say what the container is to be. What is not said is the image's: the working directory, the entrypoint."""
    container, options = order.container, order.options
    is_alone = options.network == "none"
    return {
        "NetworkDisabled": is_alone,
        "Image": order.image,
        **({"Entrypoint": container.args} if container.plain else {"Cmd": container.args}),
        "Env": [f"{name}={value}" for name, value in container.env.items()],
        "User": options.user,
        "Labels": labels(order),
        "HostConfig": {
            "Init": True,
            "Mounts": [
                _mount(container.scratch, SCRATCH, writable=True),
                *([_mount(HOSTS, str(HOSTS), writable=False)] if is_alone else []),
                *(_mount(mount.source, mount.target, writable=mount.writable) for mount in container.mounts),
            ],
            "NetworkMode": options.network or "default",
            "LogConfig": {
                "Type": "local",
                "Config": {"max-size": str(MOST_LOG // LOG_FILES), "max-file": str(LOG_FILES), "compress": "false"},
            },
            **({"ShmSize": options.shm_size} if options.shm_size else {}),
            **_limits(container.limits),
            **({"CpusetCpus": ",".join(map(str, container.pinned))} if container.pinned else {}),
        },
    }


def _mount(source: Path, target: str, *, writable: bool) -> Spec:
    return {"Type": "bind", "Source": str(source), "Target": target, "ReadOnly": not writable}


def _limits(limits: Limits) -> Spec:
    settings = {
        "Memory": limits.memory,
        "MemorySwap": limits.memory,  # both together: so there is no swap
        "NanoCpus": limits.cpus and int(limits.cpus * 1e9),
        "PidsLimit": limits.pids and limits.pids + 1,  # the init is none of the task's
    }
    return {name: value for name, value in settings.items() if value is not None}


def _exit_code(answer: Any) -> int:
    return int(answer["StatusCode"])


DOCKER = Dialect(
    name="docker",
    variable="DOCKER_HOST",
    socket=lambda: Path("/var/run/docker.sock"),
    cure="start it, or name its socket in DOCKER_HOST; who is not root must be in the group docker",
    prefix=prefix,
    pull_prefix=None,
    spec=spec,
    wait=lambda _interval: {},
    exit_code=_exit_code,
    ends_its_containers=True,
    tells_of_memory=True,
)
