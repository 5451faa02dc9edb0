"""The runtimes as settings of a pilot: name, image and environment variables."""

import os
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

import pytest

from tests.support.engines import IMAGE, Engine
from tests.support.images import bubblewrap_fault


@dataclass(frozen=True)
class Containment:
    """The settings that make a pilot run its tasks in a runtime."""

    runtime: str
    image: str = "/"
    variables: Mapping[str, str] = field(default_factory=dict)
    containers: Callable[[], list[str]] = list  # lists those at the engine, in any state

    @property
    def settings(self) -> dict[str, Any]:
        return {"runtime": self.runtime, "task_image": self.image}


def in_process(_request: pytest.FixtureRequest) -> Containment:
    return Containment("process")


def in_bubblewrap(_request: pytest.FixtureRequest) -> Containment:
    if fault := bubblewrap_fault():
        pytest.skip(f"bubblewrap does not work here: {fault}")
    return Containment("bubblewrap")


def in_apptainer(request: pytest.FixtureRequest) -> Containment:
    programs, image = request.getfixturevalue("apptainer"), request.getfixturevalue("image")
    return Containment("apptainer", str(image), {"PATH": f"{programs}:{os.environ['PATH']}"})


def in_docker(request: pytest.FixtureRequest) -> Containment:
    engine: Engine = request.getfixturevalue("docker")
    return Containment("docker", IMAGE, {"DOCKER_HOST": f"unix://{engine.socket}"}, engine.containers)


def in_podman(request: pytest.FixtureRequest) -> Containment:
    engine: Engine = request.getfixturevalue("podman")
    return Containment("podman", IMAGE, {"CONTAINER_HOST": f"unix://{engine.socket}"}, engine.containers)


CONTAINMENTS: dict[str, Callable[[pytest.FixtureRequest], Containment]] = {
    "process": in_process,
    "bubblewrap": in_bubblewrap,
    "apptainer": in_apptainer,
    "docker": in_docker,
    "podman": in_podman,
}
