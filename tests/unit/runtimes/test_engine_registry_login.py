import json
from base64 import b64encode, urlsafe_b64decode
from pathlib import Path
from typing import Any

import pytest

from tests.support.users import as_nobody
from trio_pilot.errors import NodeError
from trio_pilot.runtimes.engine_registry_login import HUBS_ENTRY, login_header, registry_of

ME = b64encode(b"me:secret").decode()


@pytest.fixture
def home(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    for variable in ("REGISTRY_AUTH_FILE", "XDG_RUNTIME_DIR", "DOCKER_CONFIG"):
        monkeypatch.delenv(variable, raising=False)
    monkeypatch.setenv("HOME", str(tmp_path))
    return tmp_path


def write(path: Path, content: Any) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(content))


def login(image: str) -> Any:
    header = login_header(image)
    return json.loads(urlsafe_b64decode(header["X-Registry-Auth"])) if header else None


@pytest.mark.parametrize(
    ("image", "registry"),
    [
        ("debian", "docker.io"),
        ("someone/debian:12", "docker.io"),
        ("localhost/debian", "localhost"),
        ("here:5000/a/b:c", "here:5000"),
        ("a.example.org/b@sha256:0", "a.example.org"),
    ],
)
def test_the_registry_of_an_image(image: str, registry: str) -> None:
    assert registry_of(image) == registry


def test_without_a_login_there_is_no_header(home: Path) -> None:
    assert login_header("debian:12") == {}
    write(home / ".docker/config.json", {"auths": {"elsewhere.example.org": {"auth": ME}}})
    assert login_header("debian:12") == {}


def test_a_locked_home_directory_has_no_logins(locked: Path, monkeypatch: pytest.MonkeyPatch, home: Path) -> None:
    del home
    monkeypatch.setenv("HOME", str(locked))
    with as_nobody():
        assert login_header("debian:12") == {}


@pytest.mark.parametrize("content", [{}, {"auths": {"docker.io": {}}}, {"credsStore": "secretservice"}])
def test_credentials_of_helper_programs_are_not_used(home: Path, content: Any) -> None:
    write(home / ".docker/config.json", content)
    assert login_header("debian:12") == {}


@pytest.mark.parametrize("entry", ["docker.io", HUBS_ENTRY])
def test_the_login_of_dockers_own_registry_has_two_names(home: Path, entry: str) -> None:
    write(home / ".docker/config.json", {"auths": {entry: {"auth": ME}}})
    assert login("debian:12") == {"username": "me", "password": "secret", "serveraddress": "docker.io"}


def test_a_token_is_preferred_to_a_password(home: Path) -> None:
    write(home / ".docker/config.json", {"auths": {"a.example.org": {"auth": ME, "identitytoken": "it"}}})
    assert login("a.example.org/b") == {"identitytoken": "it", "serveraddress": "a.example.org"}


def test_the_first_file_with_a_login_is_used(home: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("XDG_RUNTIME_DIR", str(home / "run"))
    write(home / "run/containers/auth.json", {"auths": {"a.example.org": {"auth": b64encode(b"podman:x").decode()}}})
    write(home / ".docker/config.json", {"auths": {name: {"auth": ME} for name in ("a.example.org", "b.example.org")}})
    assert login("a.example.org/b")["username"] == "podman"
    assert login("b.example.org/b")["username"] == "me"


@pytest.mark.parametrize("text", ["{", '{"auths": {"docker.io": {"auth": "?"}}}', '{"auths": {"docker.io": "me"}}', "\xff"])
def test_a_malformed_file_of_logins_is_an_error_that_names_it(home: Path, text: str) -> None:
    (home / ".docker").mkdir()
    (home / ".docker/config.json").write_text(text, "latin-1")
    with pytest.raises(NodeError, match=r"the logins in .*config.json cannot be read"):
        login_header("debian:12")
