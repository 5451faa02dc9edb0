"""The differences between the engines."""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from trio_pilot.cleanup.engine_containers import DATA_LABEL, LABEL
from trio_pilot.files.data_directory import root_in
from trio_pilot.processes.identity import own
from trio_pilot.runtimes import CAPABILITIES, SET_UID, Container, Options
from trio_pilot.runtimes.hidden_paths import HiddenPath

EVENT_LABEL = "trio-pilot.event"

# Where the scratch directory is mounted: so temporary files are not written to a layer of the engine, and are not limited.
SCRATCH = "/tmp"  # noqa: S108 -- the container's own

# Bytes of a container's output that an engine keeps on its disk: more than the pilot reads in the end.
MOST_LOG = 160 * 2**20

# The engines' default capabilities are these: those that images rarely need and that reach beyond their own files, and those
# that entrypoints need which change their user.
DROPPED_CAPABILITIES = {"AUDIT_WRITE", "MKNOD", "NET_BIND_SERVICE", "NET_RAW", "SETFCAP", "SETPCAP", "SYS_CHROOT"}
KEPT_CAPABILITIES = {"CHOWN", "DAC_OVERRIDE", "FOWNER", "FSETID", "KILL", "SETGID", "SETUID"}

HIDDEN_MODE, HIDDEN_SIZE = 0o555, 4096  # of what covers a directory

Spec = Mapping[str, Any]


@dataclass(frozen=True, slots=True)
class CreateRequest:
    """A container for an engine to create."""

    container: Container
    name: str
    image: str  # the image's id
    options: Options
    hidden: Sequence[HiddenPath] = ()

    @property
    def capabilities(self) -> list[str]:
        """The capabilities that root has in the container."""
        return sorted(KEPT_CAPABILITIES | self.added_capabilities)

    @property
    def added_capabilities(self) -> frozenset[str]:
        """Those of them that the settings add."""
        return self.options.privileges & set(CAPABILITIES)

    @property
    def may_gain_privileges(self) -> bool:
        """Whether programs may have the rights of another user or capabilities of their own."""
        return SET_UID in self.options.privileges


@dataclass(frozen=True, slots=True)
class Dialect:
    """How one kind of engine is spoken to."""

    name: str
    variable: str  # the environment variable that names its socket
    socket: Callable[[], Path]  # its socket if that variable is not set
    advice: str  # what to do about an engine that does not answer
    prefix: Callable[[Mapping[str, str]], str]
    """The version of the API, from the headers of the answer to a ping. Raises NodeError if it is too old."""
    pull_prefix: str | None  # the prefix of the path for pulling images, if it is another one
    spec: Callable[[CreateRequest], Spec]  # the body of a create request
    wait_query: Callable[[float], Mapping[str, str]]
    """The query of a request to wait for a container's end; the engine may notice it so many seconds late."""
    exit_code: Callable[[Any], int]  # from the answer to that request
    ends_its_containers: bool  # when it is stopped, or killed and started again
    reports_out_of_memory: bool  # whether its field OOMKilled is reliable
    refuses_private_mounts: bool  # as sources of mounts that propagate
    stand_in: Callable[[Mapping[str, str]], "Dialect | None"] = lambda _headers: None
    """The dialect of another engine that listens at the socket, from the headers of the answer to a ping; None: this."""


def labels(request: CreateRequest) -> Mapping[str, str]:
    """Return the labels that name a container's pilot: set by the create request, they exist as long as the container."""
    pilot, data = str(own()), str(root_in(request.options.data_parent))
    return {LABEL: pilot, DATA_LABEL: data, EVENT_LABEL: request.container.name}
