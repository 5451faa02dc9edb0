import hashlib
import json
import os
from pathlib import Path
from typing import Any

import pytest

from tests.support.users import NOBODY, as_user
from trio_pilot.errors import NodeError
from trio_pilot.runtimes import docker_config
from trio_pilot.runtimes.docker import DOCKER
from trio_pilot.runtimes.docker_config import docker_socket
from trio_pilot.runtimes.engine import socket_of


@pytest.fixture
def usual(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The usual socket, which is not there."""
    monkeypatch.setattr(docker_config, "SOCKET", tmp_path / "usual.sock")
    return tmp_path / "usual.sock"


@pytest.fixture(autouse=True)
def home(usual: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    for variable in ("DOCKER_HOST", "DOCKER_CONTEXT", "DOCKER_CONFIG"):
        monkeypatch.delenv(variable, raising=False)
    monkeypatch.setenv("HOME", str(usual.parent))
    monkeypatch.setenv("XDG_RUNTIME_DIR", str(usual.parent / "run"))
    return usual.parent


def configure(directory: Path, **content: Any) -> None:
    directory.mkdir(exist_ok=True)
    (directory / "config.json").write_text(json.dumps(content))


def make_context(directory: Path, name: str, content: Any) -> None:
    meta = directory / "contexts/meta" / hashlib.sha256(name.encode()).hexdigest()
    meta.mkdir(parents=True)
    (meta / "meta.json").write_text(json.dumps(content))


def endpoint(host: str) -> Any:
    return {"Name": "any", "Metadata": {}, "Endpoints": {"docker": {"Host": host, "SkipTLSVerify": False}}}


def test_without_contexts_the_usual_socket_is_used(usual: Path, home: Path) -> None:
    assert docker_socket() == usual
    configure(home / ".docker", auths=None)
    assert docker_socket() == usual


def test_the_current_context_names_the_socket(home: Path) -> None:
    configure(home / ".docker", currentContext="rootless")
    make_context(home / ".docker", "rootless", endpoint("unix:///run/user/7/docker.sock"))
    assert docker_socket() == Path("/run/user/7/docker.sock")


def test_the_environment_names_another_context(home: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("DOCKER_CONFIG", str(home / "elsewhere"))
    configure(home / "elsewhere", currentContext="rootless")
    make_context(home / "elsewhere", "mine", endpoint("unix:///mine.sock"))
    monkeypatch.setenv("DOCKER_CONTEXT", "mine")
    assert socket_of(DOCKER) == Path("/mine.sock")
    monkeypatch.setenv("DOCKER_HOST", "unix:///host.sock")
    assert socket_of(DOCKER) == Path("/host.sock")


@pytest.mark.parametrize("name", ["default", ""])
def test_the_default_context_is_the_usual_socket(
    usual: Path, home: Path, monkeypatch: pytest.MonkeyPatch, name: str
) -> None:
    configure(home / ".docker", currentContext=name)
    assert docker_socket() == usual
    configure(home / ".docker", currentContext="missing")
    monkeypatch.setenv("DOCKER_CONTEXT", "default")
    assert docker_socket() == usual


def test_a_context_may_name_no_host(usual: Path, home: Path) -> None:
    configure(home / ".docker", currentContext="empty")
    make_context(home / ".docker", "empty", {"Endpoints": {"docker": {}}})
    assert docker_socket() == usual


def test_a_context_that_does_not_exist_is_an_error(home: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    configure(home / ".docker", currentContext="gone")
    with pytest.raises(NodeError, match=r"^the docker context gone \(currentContext in .*config.json\) does not exist"):
        docker_socket()
    monkeypatch.setenv("DOCKER_CONTEXT", "lost")
    with pytest.raises(NodeError, match=r"^the docker context lost \(DOCKER_CONTEXT\) does not exist: there is no .*meta"):
        docker_socket()


@pytest.mark.parametrize("host", ["tcp://host:2376", "ssh://me@host", "npipe:////./pipe/docker", "unix://relative"])
def test_a_context_for_another_machine_is_an_error(home: Path, host: str) -> None:
    configure(home / ".docker", currentContext="far")
    make_context(home / ".docker", "far", endpoint(host))
    with pytest.raises(NodeError, match=f"must be for unix:// and the path of a socket, not '{host}'"):
        docker_socket()


@pytest.mark.parametrize("content", [{}, [], {"Endpoints": None}, {"Endpoints": {"docker": "x"}}, {"Endpoints": {}}])
def test_a_context_of_another_form_is_an_error(home: Path, content: Any) -> None:
    configure(home / ".docker", currentContext="odd")
    make_context(home / ".docker", "odd", content)
    with pytest.raises(NodeError, match=r"the docker context odd .* cannot be read from"):
        docker_socket()


@pytest.mark.parametrize("text", ["{", "[]", "\xff"])
def test_a_malformed_configuration_has_no_context(
    usual: Path, home: Path, caplog: pytest.LogCaptureFixture, text: str
) -> None:
    configure(home / ".docker")
    (home / ".docker/config.json").write_text(text, "latin-1")
    assert docker_socket() == usual
    assert "so docker's default context is used" in caplog.text


def test_a_rootless_docker_is_found_where_no_other_can_be_used(usual: Path, home: Path) -> None:
    (home / "run").mkdir()
    rootless = home / "run/docker.sock"
    rootless.touch()
    assert docker_socket() == rootless
    usual.touch()
    assert docker_socket() == usual


def test_a_rootless_docker_is_found_beside_one_of_others(
    usual: Path, home: Path, open_to_all: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    if os.geteuid() != 0:
        pytest.skip("only root can make a socket that another user cannot use")
    del usual, home
    monkeypatch.setattr(docker_config, "SOCKET", open_to_all / "usual.sock")
    monkeypatch.setenv("XDG_RUNTIME_DIR", str(open_to_all))
    monkeypatch.setenv("HOME", str(open_to_all))
    (open_to_all / "usual.sock").touch(mode=0o600)
    (open_to_all / "docker.sock").touch()
    (open_to_all / "docker.sock").chmod(0o666)
    with as_user(NOBODY):
        assert docker_socket() == open_to_all / "docker.sock"
