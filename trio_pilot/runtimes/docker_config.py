"""Docker's own configuration: where its command finds the socket and the logins of this user."""

import hashlib
import json
import os
from pathlib import Path
from typing import Any

from trio_pilot.errors import NodeError
from trio_pilot.log import LOGGER

SOCKET = Path("/var/run/docker.sock")
DEFAULT = "default"  # the context of DOCKER_HOST, or of the usual socket


def config_file() -> Path:
    """Return the path of the configuration file."""
    directory = os.environ.get("DOCKER_CONFIG") or Path("~/.docker").expanduser()
    return Path(directory, "config.json")


def docker_socket() -> Path:
    """Return the socket that docker's command would use without DOCKER_HOST: that of its context, or the usual one.

    Where the usual one cannot be used, and this user has a docker without root, it is that one's.

    Raises:
        NodeError: the context does not exist, or is for something else than a Unix socket.
    """
    name, origin = os.environ.get("DOCKER_CONTEXT"), "DOCKER_CONTEXT"
    if not name:
        name, origin = _current_context(), f"currentContext in {config_file()}"
    host = _host_of(name, origin) if name and name != DEFAULT else ""
    if not host:
        return _usual_socket()
    scheme, _, path = host.partition("://")
    if scheme != "unix" or not path.startswith("/"):
        raise NodeError(
            f"the docker context {name} ({origin}) must be for unix:// and the path of a socket, not {host!r}:"
            " choose another, or set DOCKER_HOST"
        )
    return Path(path)


def _usual_socket() -> Path:
    directory = os.environ.get("XDG_RUNTIME_DIR") or f"/run/user/{os.geteuid()}"
    own = Path(directory, "docker.sock")
    return own if not _can_use(SOCKET) and _can_use(own) else SOCKET


def _can_use(socket: Path) -> bool:
    return os.access(socket, os.W_OK, effective_ids=True)


def _current_context() -> str:
    file = config_file()
    try:
        return str(_read(file).get("currentContext") or "")
    except FileNotFoundError:
        return ""
    except (OSError, ValueError, AttributeError) as error:  # docker's command goes on, too
        LOGGER.warning("%s cannot be read, so docker's default context is used: %s", file, error)
        return ""


def _host_of(context: str, origin: str) -> str:
    digest = hashlib.sha256(context.encode(errors="surrogateescape")).hexdigest()
    file = config_file().parent / "contexts/meta" / digest / "meta.json"
    try:
        return str(_read(file)["Endpoints"]["docker"].get("Host") or "")
    except FileNotFoundError:
        raise NodeError(f"the docker context {context} ({origin}) does not exist: there is no {file}") from None
    except (OSError, ValueError, TypeError, LookupError, AttributeError) as error:
        raise NodeError(f"the docker context {context} ({origin}) cannot be read from {file}: {error!r}") from error


def _read(file: Path) -> Any:
    return json.loads(file.read_bytes())
