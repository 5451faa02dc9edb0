"""In what the engines differ."""

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from trio_pilot.cleanup.engine_containers import DATA_LABEL, LABEL
from trio_pilot.files.data_directory import root_in
from trio_pilot.processes.identity import own
from trio_pilot.runtimes import Container, Options

EVENT_LABEL = "trio-pilot.event"

# The container's own, where its scratch directory is mounted: temporary files are no layer of the engine's, and have no end.
SCRATCH = "/tmp"  # noqa: S108

# Bytes of a container's output that an engine keeps on its disk: more than are read from it in the end.
MOST_LOG = 160 * 2**20

Spec = Mapping[str, Any]


@dataclass(frozen=True, slots=True)
class CreateRequest:
    """A container as an engine is to make it."""

    container: Container
    name: str
    image: str  # its id
    options: Options


@dataclass(frozen=True, slots=True)
class Dialect:
    """How to speak with one kind of engine."""

    name: str
    variable: str  # of the environment, which says where its socket is
    socket: Callable[[], Path]  # where it is else
    cure: str  # for an engine that does not answer
    prefix: Callable[[Mapping[str, str]], str]
    """The version of the API, from the headers of the answer to a ping. Raises NodeError if it is too old."""
    pull_prefix: str | None  # of the path by which images are pulled, where that is another
    spec: Callable[[CreateRequest], Spec]  # what create is told
    wait: Callable[[float], Mapping[str, str]]
    """What is asked to be told of the end of a container, so many seconds sooner or later."""
    exit_code: Callable[[Any], int]  # from the answer to that
    ends_its_containers: bool  # when it is stopped, or killed and started again
    tells_of_memory: bool  # whether OOMKilled can be relied on


def labels(order: CreateRequest) -> Mapping[str, str]:
    """Say whose a container is: given as it is made, they are there from its first moment to its last."""
    return {LABEL: str(own()), DATA_LABEL: str(root_in(order.options.data_parent)), EVENT_LABEL: order.container.name}
