from collections.abc import Callable, Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from trio_pilot.errors import NodeError
from trio_pilot.processes.identity import own
from trio_pilot.runtimes import Container, Limits, Options, docker, podman
from trio_pilot.runtimes.engine import socket_of
from trio_pilot.runtimes.engine_dialect import CreateRequest

NO_LIMITS = Limits()


def order(options: Options, limits: Limits = NO_LIMITS) -> CreateRequest:
    here = Path("/task")
    container = Container("name", "image", ("true",), {"A": "1=2,3"}, (), here, here / "out", here / "err", limits)
    return CreateRequest(container, "trio-pilot-name", "sha256:0", options)


def test_labels_name_the_pilot_and_its_data_directory(tmp_path: Path) -> None:
    (tmp_path / "link").symlink_to(".")
    ordered = order(Options(data_parent=tmp_path / "link"))
    labels = {"trio-pilot.pilot": str(own()), "trio-pilot.data": f"{tmp_path}/ewms-pilot-data", "trio-pilot.event": "name"}
    assert docker.spec(ordered)["Labels"] == podman.spec(ordered)["labels"] == labels


@pytest.mark.parametrize(("said", "prefix"), [("1.40", "/v1.40"), ("1.41", "/v1.41"), ("1.51", "/v1.51"), ("2.0", "/v1.51")])
def test_the_newest_version_that_both_sides_support_is_used(said: str, prefix: str) -> None:
    assert docker.prefix({"api-version": said}) == prefix


def test_a_docker_that_is_too_old_is_an_error() -> None:
    with pytest.raises(NodeError, match=r"^docker is too old: it speaks API version 1\.39, and 1\.40 "):
        docker.prefix({"api-version": "1.39"})


@pytest.mark.parametrize("headers", [{}, {"api-version": "new"}])
def test_a_server_other_than_docker_is_an_error(headers: dict[str, str]) -> None:
    with pytest.raises(NodeError, match=r"^this is no docker"):
        docker.prefix(headers)


def test_a_podman_that_is_too_old_and_a_docker_are_errors() -> None:
    assert podman.prefix({"libpod-api-version": "5.2.1"}) == "/v4.0.0/libpod"
    with pytest.raises(NodeError, match=r"^podman is too old: it is version 3\.4\.4"):
        podman.prefix({"libpod-api-version": "3.4.4"})
    with pytest.raises(NodeError, match="choose the runtime docker"):
        podman.prefix({"api-version": "1.41"})


@pytest.mark.parametrize(
    ("network", "mode", "named"),
    [
        ("host", {"nsmode": "host", "value": ""}, None),
        ("none", {"nsmode": "none", "value": ""}, None),
        ("ns:/run/netns/a", {"nsmode": "path", "value": "/run/netns/a"}, None),
        ("mine", {"nsmode": "bridge"}, {"mine": {}}),
    ],
)
def test_a_network_is_a_mode_of_podman_or_the_name_of_a_network(network: str, mode: object, named: object) -> None:
    spec = podman.spec(order(Options(network=network)))
    assert spec["netns"] == mode
    assert spec.get("networks") == named


@pytest.mark.parametrize(
    ("spec", "entrypoint", "command"), [(docker.spec, "Entrypoint", "Cmd"), (podman.spec, "entrypoint", "command")]
)
def test_a_plain_container_replaces_the_entrypoint_of_its_image(
    spec: Callable[[CreateRequest], Mapping[str, Any]], entrypoint: str, command: str
) -> None:
    as_usual = order(Options())
    assert (spec(as_usual)[command], entrypoint in spec(as_usual)) == (("true",), False)
    plain = replace(as_usual, container=replace(as_usual.container, without_entrypoint=True))
    assert (spec(plain)[entrypoint], command in spec(plain)) == (("true",), False)


def test_options_that_are_not_set_are_not_sent() -> None:
    said = docker.spec(order(Options()))
    assert said["NetworkDisabled"] is False
    assert not {"ShmSize", "Memory", "MemorySwap", "NanoCpus", "PidsLimit"} & said["HostConfig"].keys()
    assert not {"netns", "networks", "shm_size"} & podman.spec(order(Options())).keys()


def test_memory_is_limited_together_with_swap() -> None:
    limits = Limits(memory=2**30, cpus=1.5, pids=10)
    said = docker.spec(order(Options(), limits))["HostConfig"]
    assert (said["Memory"], said["MemorySwap"], said["NanoCpus"], said["PidsLimit"]) == (2**30, 2**30, 1_500_000_000, 11)
    assert podman.spec(order(Options(), limits))["resource_limits"] == {
        "memory": {"limit": 2**30, "swap": 2**30},
        "cpu": {"quota": 150_000, "period": 100_000},
        "pids": {"limit": 11},
    }


def test_the_environment_can_name_the_socket(monkeypatch: pytest.MonkeyPatch) -> None:
    for variable in ("DOCKER_HOST", "CONTAINER_HOST", "XDG_RUNTIME_DIR"):
        monkeypatch.delenv(variable, raising=False)
    monkeypatch.setattr("os.geteuid", lambda: 1234)
    assert socket_of(docker.DOCKER) == Path("/var/run/docker.sock")
    assert socket_of(podman.PODMAN) == Path("/run/user/1234/podman/podman.sock")
    monkeypatch.setenv("XDG_RUNTIME_DIR", "/mine")
    assert socket_of(podman.PODMAN) == Path("/mine/podman/podman.sock")
    monkeypatch.setattr("os.geteuid", lambda: 0)
    assert socket_of(podman.PODMAN) == Path("/run/podman/podman.sock")
    monkeypatch.setenv("CONTAINER_HOST", "unix:///else/where")
    assert socket_of(podman.PODMAN) == Path("/else/where")
    monkeypatch.setenv("CONTAINER_HOST", "ssh://somewhere")
    with pytest.raises(NodeError, match=r"^CONTAINER_HOST must be unix:// and the path of a socket, not 'ssh://somewhere'"):
        socket_of(podman.PODMAN)
