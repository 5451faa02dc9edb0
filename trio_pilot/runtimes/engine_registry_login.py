"""Credentials for registries of private images, from the files that `docker login` and `podman login` write.

Both write the same format, an object `auths` of entries by registry; see containers-auth.json(5). Credentials that a helper
program keeps instead are not used.
"""

import base64
import json
import os
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from trio_pilot.errors import NodeError, map_exceptions
from trio_pilot.files.filesystem import is_file

HUB = "docker.io"
MALFORMED = (OSError, ValueError, TypeError, AttributeError)  # errors while a file of another format is read
HUBS_ENTRY = "https://index.docker.io/v1/"  # docker's entry for its own registry


def login_header(image: str) -> dict[str, str]:
    """Return the header that lets an engine pull an image; none if there is no login. Reads small files.

    Raises:
        NodeError: a file of logins cannot be read.
    """
    for path in _files():
        if is_file(path):
            with map_exceptions(dict.fromkeys(MALFORMED, NodeError), f"the logins in {path} cannot be read"):
                if login := _login(json.loads(path.read_text()), registry_of(image)):
                    return {"X-Registry-Auth": base64.urlsafe_b64encode(json.dumps(login).encode()).decode()}
    return {}


def registry_of(image: str) -> str:
    """Return the registry of an image: the part before the first slash, if it looks like a host."""
    first, slash, _ = image.partition("/")
    return first if slash and (set(".:") & set(first) or first == "localhost") else HUB


def _files() -> Iterator[Path]:
    env = os.environ
    if file := env.get("REGISTRY_AUTH_FILE"):
        yield Path(file)
    if directory := env.get("XDG_RUNTIME_DIR"):
        yield Path(directory, "containers/auth.json")
    home = env.get("HOME", "/nonexistent")
    yield Path(env.get("DOCKER_CONFIG") or f"{home}/.docker", "config.json")


def _login(file: Any, registry: str) -> Mapping[str, str] | None:
    entries = file.get("auths", {}) if isinstance(file, dict) else {}
    names = [registry, f"https://{registry}", *([HUBS_ENTRY] if registry == HUB else [])]
    entry: Mapping[str, str] = next((entries[name] for name in names if name in entries), {})
    if token := entry.get("identitytoken"):
        return {"identitytoken": token, "serveraddress": registry}
    user, colon, password = base64.b64decode(entry.get("auth", ""), validate=True).decode().partition(":")
    return {"username": user, "password": password, "serveraddress": registry} if colon else None
