"""The containers that a dead pilot has left at an engine (docker, podman). Everything here blocks.

Used by the guardian, which has only the standard library, and by the sweep at the start of the next pilot.
"""

import http.client
import json
import socket
import time
from collections.abc import Iterable, Mapping
from concurrent.futures import ThreadPoolExecutor
from contextlib import closing, suppress
from functools import partial
from pathlib import Path
from typing import Any
from urllib.parse import quote

from trio_pilot.files.data_directory import has_orphaned
from trio_pilot.processes.identity import Identity, own
from trio_pilot.processes.orphans import PilotFilter

LABEL = "trio-pilot.pilot"  # the label of a container that names its pilot
DATA_LABEL = "trio-pilot.data"  # the label that names the data directory, where its pilot has its owner file
AT_ONCE = 8  # containers that are removed at once: each takes an engine some 0.2 s
OK = 200
SHOWN = 200  # bytes of an answer in an error
ENGINE_TIMEOUT = 10.0  # seconds for an engine to answer, and to remove a container


def remove_containers(engine: Path, theirs: PilotFilter) -> int:
    """Remove the containers of some pilots, and of those that their owner files show to be dead; return their number.

    Args:
        engine: the socket of the engine.
        theirs: whether a pilot is one of them.

    Raises:
        OSError: the engine does not answer, or not as expected.
    """
    found = [one["Id"] for one in _containers(engine) if _is_left(one, theirs)]
    with ThreadPoolExecutor(AT_ONCE) as threads:
        list(threads.map(partial(_remove, engine), found))
    return len(found)


def _remove(engine: Path, container: str) -> None:
    # A running one is killed first: otherwise podman would send SIGTERM, and wait for 10 s.
    _request(engine, "POST", f"/containers/{container}/kill")
    _request(engine, "DELETE", f"/containers/{container}?force=1&v=1")


def _containers(engine: Path) -> Iterable[Mapping[str, Any]]:
    filters = quote(json.dumps({"label": [LABEL]}))
    status, answer = _request(engine, "GET", f"/containers/json?all=1&filters={filters}")
    if status != OK:
        raise ConnectionError(f"{engine} answers {status} to a request to list containers: {answer[:SHOWN]!r}")
    try:
        listed: list[Mapping[str, Any]] = json.loads(answer)
    except (ValueError, RecursionError) as error:
        raise ConnectionError(f"{engine} does not speak JSON: {answer[:SHOWN]!r}") from error
    if not isinstance(listed, list) or not all(map(_is_container, listed)):
        raise ConnectionError(f"{engine} does not list containers: {answer[:SHOWN]!r}")
    return listed


def _is_container(one: object) -> bool:
    return isinstance(one, dict) and isinstance(one.get("Id"), str) and isinstance(one.get("Labels"), dict | None)


def _label(container: Mapping[str, Any], name: str) -> str:
    return str((container.get("Labels") or {}).get(name, ""))


def _is_left(container: Mapping[str, Any], theirs: PilotFilter) -> bool:
    pilot = Identity.parse(_label(container, LABEL))
    return pilot is not None and (theirs(pilot) or _is_past(container, pilot) or _is_orphaned(container, pilot))


def _is_orphaned(container: Mapping[str, Any], pilot: Identity) -> bool:
    """Return whether a container's pilot has died, even in another PID namespace, whose end also ends its guardian."""
    root = Path(_label(container, DATA_LABEL))
    with suppress(OSError, ValueError):  # any text may be a label, and need not be a path
        return root.is_absolute() and has_orphaned(root, pilot)
    return False


def _is_past(container: Mapping[str, Any], pilot: Identity) -> bool:
    """Return whether a container is older than this machine's boot. One that runs may be another machine's."""
    booted = time.time() - time.clock_gettime(time.CLOCK_BOOTTIME)
    created = container.get("Created", 0)
    is_old = isinstance(created, int) and created < booted
    return pilot.boot != own().boot and container.get("State") != "running" and is_old


def _request(engine: Path, method: str, path: str) -> tuple[int, bytes]:
    with closing(UnixConnection(engine)) as connection:
        try:
            connection.request(method, path, headers={"Host": "engine"})
            answer = connection.getresponse()
            return answer.status, answer.read()
        except http.client.HTTPException as error:
            raise ConnectionError(f"{engine} does not speak HTTP: {error!r}") from error


class UnixConnection(http.client.HTTPConnection):
    """A connection to the server at a Unix socket."""

    def __init__(self, path: Path, timeout: float = ENGINE_TIMEOUT) -> None:
        super().__init__("engine", timeout=timeout)
        self._path = str(path)

    def connect(self) -> None:
        """Connect. A request does this if it is not done yet."""
        self.sock = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
        self.sock.settimeout(self.timeout)
        self.sock.connect(self._path)
