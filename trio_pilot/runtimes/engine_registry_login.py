"""Credentials for registries of private images, from the files that `docker login` and `podman login` write.

Both write the same format: an object `auths` of entries by registry, or by registry and namespace, and the names of helper
programs that keep credentials instead. See containers-auth.json(5), and `docker login` in Docker's reference.
"""

import base64
import json
import os
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from trio_pilot.errors import NodeError, map_exceptions
from trio_pilot.files.filesystem import is_file
from trio_pilot.log import LOGGER
from trio_pilot.runtimes.docker_config import config_file
from trio_pilot.runtimes.engine_login_helper import HelperError, ask_helper

HUB = "docker.io"
MALFORMED = (OSError, ValueError, TypeError, AttributeError)  # errors while a file of another format is read
HUBS_ENTRY = "https://index.docker.io/v1/"  # docker's entry for its own registry
HUBS_HOSTS = (HUB, "index.docker.io", "registry-1.docker.io")
API_VERSIONS = ("v1", "v2")  # paths of the API, which some entries end with

Login = Mapping[str, str]


def login_header(image: str) -> dict[str, str]:
    """Return the header that lets an engine pull an image; none if there is no login.

    Reads small files, and may ask helper programs. In a thread of Trio's, it ends when it is cancelled.

    Raises:
        NodeError: a file of logins cannot be read.
    """
    for path in login_files():
        if is_file(path):
            with map_exceptions(dict.fromkeys(MALFORMED, NodeError), f"the logins in {path} cannot be read"):
                if login := _login(json.loads(path.read_text()), image):
                    login = {**login, "serveraddress": registry_of(image)}
                    return {"X-Registry-Auth": base64.urlsafe_b64encode(json.dumps(login).encode()).decode()}
    return {}


def registry_of(image: str) -> str:
    """Return the registry of an image: the part before the first slash, if it looks like a host."""
    first, slash, _ = image.partition("/")
    return first if slash and (set(".:") & set(first) or first == "localhost") else HUB


def login_files() -> Iterator[Path]:
    """Yield the paths of the files that may have logins, whether they exist or not."""
    env = os.environ
    if file := env.get("REGISTRY_AUTH_FILE"):
        yield Path(file)
    if directory := env.get("XDG_RUNTIME_DIR"):
        yield Path(directory, "containers/auth.json")
    yield config_file()


def _login(file: Any, image: str) -> Login | None:
    """Return the login for an image in a file's content. As docker does, ask helpers first."""
    if not isinstance(file, dict):
        return None
    scopes = list(_scopes(image))
    for helper, server in _helpers(file, scopes):
        try:
            if login := ask_helper(helper, server):
                return login
        except HelperError as error:
            LOGGER.warning("no login for %s from docker-credential-%s: %s", registry_of(image), helper, error)
            break
    entries = file.get("auths") or {}
    return next(filter(None, (_of_entry(entries[key]) for key in _matching(entries, scopes))), None)


def _scopes(image: str) -> Iterator[str]:
    """Yield what an entry for an image may be for, from its repository to its registry."""
    registry = registry_of(image)
    name = image.partition("@")[0]
    path, slash, last = name.rpartition("/")
    repository = f"{path}{slash}{last.partition(':')[0]}"
    if not repository.startswith(f"{registry}/"):
        repository = f"{registry}/{'' if slash else 'library/'}{repository}"
    while repository:
        yield repository
        repository = repository.rpartition("/")[0]


def _scope_of(key: str) -> str:
    """Return what the entry of a key is for. A key that is a URL is for a registry, whatever its path."""
    _, scheme, rest = key.rpartition("://")
    registry, _, path = rest.strip("/").partition("/")
    registry = HUB if registry in HUBS_HOSTS else registry
    return f"{registry}/{path}" if path and path not in API_VERSIONS and not scheme else registry


def _matching(entries: Mapping[str, Any], scopes: list[str]) -> list[str]:
    """List the keys of the entries for some scopes, those for the first one first."""
    ranks = {key: scopes.index(_scope_of(key)) for key in entries if _scope_of(key) in scopes}
    return sorted(ranks, key=lambda key: (ranks[key], key not in scopes))


def _helpers(file: Mapping[str, Any], scopes: list[str]) -> Iterator[tuple[str, str]]:
    """Yield the name of each helper program that may have a login, and what it calls the registry."""
    helpers = file.get("credHelpers") or {}
    for key in _matching(helpers, scopes):
        yield str(helpers[key]), key
    if store := file.get("credsStore"):
        registry = scopes[-1]
        for server in (HUBS_ENTRY, HUB) if registry == HUB else (registry, f"https://{registry}"):
            yield str(store), server


def _of_entry(entry: Mapping[str, str] | None) -> Login | None:
    entry = entry or {}
    for token in ("identitytoken", "registrytoken"):
        if entry.get(token):
            return {token: entry[token]}
    user, colon, password = base64.b64decode(entry.get("auth") or "", validate=True).decode().partition(":")
    if colon:
        return {"username": user, "password": password.strip("\0")}
    user, password = entry.get("username") or "", entry.get("password") or ""
    return {"username": user, "password": password} if user and password else None
