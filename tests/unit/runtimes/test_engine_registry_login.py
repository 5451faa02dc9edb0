import json
import os
from base64 import b64encode, urlsafe_b64decode
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import trio

from tests.support.users import as_nobody
from trio_pilot.errors import NodeError
from trio_pilot.runtimes import engine_login_helper
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


@pytest.mark.parametrize(
    "content",
    [
        {},
        {"auths": None, "credHelpers": None, "credsStore": None},
        {"auths": {"docker.io": {}}},
        {"auths": {"docker.io": None}},
        {"auths": {"docker.io": {"auth": None}}},
        {"auths": {"docker.io": {"auth": "", "email": "me@example.org"}}},
        None,
    ],
)
def test_a_file_may_have_no_login(home: Path, content: Any) -> None:
    write(home / ".docker/config.json", content)
    assert login_header("debian:12") == {}


@pytest.mark.parametrize(
    ("key", "image"),
    [
        ("https://registry.example/v2/", "registry.example/a/b:c"),
        ("https://registry.example", "registry.example/a"),
        ("http://registry.example:5000/v1/", "registry.example:5000/a"),
        ("registry.example/v2", "registry.example/a/b"),
        ("registry.example/", "registry.example/a"),
        ("quay.io/ours", "quay.io/ours/tool:1"),
        ("quay.io/ours/tool", "quay.io/ours/tool@sha256:0"),
        ("quay.io/ours/tool", "quay.io/ours/tool:1@sha256:0"),
        ("localhost:5000/ours", "localhost:5000/ours/deep/tool"),
        ("docker.io", "library/debian"),
        ("docker.io/library", "debian:12"),
        ("docker.io/library/debian", "debian"),
        ("docker.io/someone", "someone/debian"),
        ("docker.io/someone", "docker.io/someone/debian"),
        ("index.docker.io", "debian"),
        ("https://index.docker.io/v1/", "docker.io/someone/debian"),
        ("https://registry-1.docker.io", "debian"),
    ],
)
def test_a_key_may_be_a_url_or_a_namespace(home: Path, key: str, image: str) -> None:
    write(home / ".docker/config.json", {"auths": {key: {"auth": ME}}})
    assert login(image) == {"username": "me", "password": "secret", "serveraddress": registry_of(image)}


@pytest.mark.parametrize("key", ["quay.io/others", "quay.io/our", "quay.io/ours/tool/more", "quay", "io", "xquay.io", ""])
def test_a_key_for_something_else_is_not_used(home: Path, key: str) -> None:
    write(home / ".docker/config.json", {"auths": {key: {"auth": ME}}})
    assert login("quay.io/ours/tool") is None


def test_the_entry_for_the_smallest_part_is_used(home: Path) -> None:
    keys = ("quay.io", "quay.io/ours", "quay.io/ours/tool", "https://quay.io/v2/")
    entries = {key: {"auth": b64encode(f"{key}:x".encode()).decode()} for key in keys}
    write(home / ".docker/config.json", {"auths": {**entries, "quay.io/ours/empty": {}}})
    assert login("quay.io/ours/tool:1")["username"] == "quay.io/ours/tool"
    assert login("quay.io/ours/other")["username"] == "quay.io/ours"
    assert login("quay.io/ours/empty")["username"] == "quay.io/ours"
    assert login("quay.io/theirs/tool")["username"] == "quay.io"


def test_names_and_passwords_may_be_in_plain_text(home: Path) -> None:
    write(home / ".docker/config.json", {"auths": {"a.example.org": {"username": "me", "password": "it"}}})
    assert login("a.example.org/b") == {"username": "me", "password": "it", "serveraddress": "a.example.org"}


# Helper programs.

HELPER = """#!/bin/sh
test "$1" = get || exit 9
echo "$EWMS_PILOT_TOKEN" > {asked}.token
server=$(cat)
echo "$server" >> {asked}
test -e "{answers}/$(echo "$server" | tr /: __)" || {{ echo "credentials not found in native keychain"; exit 1; }}
cat "{answers}/$(echo "$server" | tr /: __)"
"""


@dataclass
class Helper:
    """A helper program, and what it is asked."""

    directory: Path

    def knows(self, server: str, user: str, secret: str) -> None:
        answer = {"ServerURL": server, "Username": user, "Secret": secret}
        write(self.directory / server.translate(str.maketrans("/:", "__")), answer)

    @property
    def asked(self) -> list[str]:
        file = self.directory / "asked"
        return file.read_text().splitlines() if file.exists() else []

    def replace(self, script: str) -> None:
        (self.directory / "docker-credential-keys").write_text(f"#!/bin/sh\n{script}\n")


@pytest.fixture
def helper(home: Path, monkeypatch: pytest.MonkeyPatch) -> Helper:
    program = home / "keys/docker-credential-keys"
    program.parent.mkdir()
    program.write_text(HELPER.format(asked=program.parent / "asked", answers=program.parent))
    program.chmod(0o755)
    monkeypatch.setenv("PATH", f"{program.parent}:{os.environ['PATH']}")
    monkeypatch.setenv("EWMS_PILOT_TOKEN", "of the pilot")
    return Helper(program.parent)


def test_a_helper_of_a_registry_is_asked(home: Path, helper: Helper) -> None:
    helper.knows("a.example.org:5000", "me", "it's secret")
    write(home / ".docker/config.json", {"auths": {"a.example.org:5000": {}}, "credHelpers": {"a.example.org:5000": "keys"}})
    expected = {"username": "me", "password": "it's secret", "serveraddress": "a.example.org:5000"}
    assert login("a.example.org:5000/ours/tool:1") == expected
    assert login("b.example.org/tool") is None
    assert helper.asked == ["a.example.org:5000"]
    assert (helper.directory / "asked.token").read_text() == "\n"


@pytest.mark.parametrize(
    ("image", "server"), [("debian", HUBS_ENTRY), ("debian", "docker.io"), ("a.example.org/b", "a.example.org")]
)
def test_a_helper_of_all_registries_is_asked(home: Path, helper: Helper, image: str, server: str) -> None:
    helper.knows(server, "<token>", "it")
    write(home / ".docker/config.json", {"credsStore": "keys"})
    assert login(image) == {"identitytoken": "it", "serveraddress": registry_of(image)}


def test_a_helper_of_one_registry_is_asked_before_that_of_all(home: Path, helper: Helper) -> None:
    helper.knows(HUBS_ENTRY, "me", "it")
    write(home / ".docker/config.json", {"credsStore": "missing", "credHelpers": {HUBS_ENTRY: "keys"}})
    assert login("debian")["username"] == "me"


def test_podmans_file_may_name_a_helper(home: Path, helper: Helper, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("XDG_RUNTIME_DIR", str(home / "run"))
    helper.knows("quay.io", "me", "it")
    write(home / "run/containers/auth.json", {"credHelpers": {"quay.io": "keys"}})
    assert login("quay.io/ours/tool")["username"] == "me"


def test_without_a_login_of_the_helper_that_of_the_file_is_used(
    home: Path, helper: Helper, caplog: pytest.LogCaptureFixture
) -> None:
    write(home / ".docker/config.json", {"credsStore": "keys", "auths": {"a.example.org": {"auth": ME}}})
    assert login("a.example.org/b")["username"] == "me"
    assert helper.asked == ["a.example.org", "https://a.example.org"]
    assert caplog.text == ""


@pytest.mark.parametrize(
    ("script", "reason"),
    [
        ("rm $0; exit 1", "exit code 1: it says nothing"),
        ("echo 'the keyring is locked'; exit 3", "exit code 3: the keyring is locked"),
        ("echo the secret", "its answer is not an object of JSON"),
        ("echo '[\"the secret\"]'", "its answer is not an object of JSON"),
        ("exec sleep 1000", "it has not answered in 0.3 s"),
        ("kill -9 $$", "exit code -9: it says nothing"),
    ],
)
def test_a_helper_that_fails_is_named_and_no_secret_is_told(
    home: Path, helper: Helper, caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch, script: str, reason: str
) -> None:
    monkeypatch.setattr(engine_login_helper, "TIMEOUT", 0.3)
    helper.replace(script)
    write(home / ".docker/config.json", {"credHelpers": {"a.example.org": "keys"}})
    assert login_header("a.example.org/b") == {}
    assert f"no login for a.example.org from docker-credential-keys: {reason}" in caplog.text
    assert "the secret" not in caplog.text


def test_a_helper_that_is_not_there_is_named(home: Path, caplog: pytest.LogCaptureFixture) -> None:
    write(home / ".docker/config.json", {"credsStore": "secretservice"})
    assert login_header("debian:12") == {}
    assert "no login for docker.io from docker-credential-secretservice: it is not on PATH" in caplog.text


async def test_a_helper_that_hangs_is_killed_when_the_pull_is_cancelled(home: Path, helper: Helper) -> None:
    helper.replace(f"echo $$ > {helper.directory}/pid; exec sleep 1000")
    write(home / ".docker/config.json", {"credHelpers": {"a.example.org": "keys"}})
    with trio.move_on_after(0.5) as scope:
        await trio.to_thread.run_sync(login_header, "a.example.org/b")
    assert scope.cancelled_caught
    assert not Path("/proc", (helper.directory / "pid").read_text().strip()).exists()  # noqa: ASYNC240


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
