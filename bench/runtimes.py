"""The runtimes of a measurement, each as it works on this machine: engines of our own, and a small image."""

import json
import os
import shutil
import subprocess
import tempfile
from collections.abc import Iterator, Mapping
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from tests.support import engines
from tests.support.apptainer import open_apptainer
from tests.support.images import make_image
from tests.support.servers import UnavailableError, need

__all__ = ["Runtime", "UnavailableError", "open_runtime"]


@dataclass(frozen=True, slots=True)
class Runtime:
    """What runs the tasks, and how both sides of a comparison are told of it."""

    name: str
    settings: Mapping[str, Any]  # of a pilot
    version: str
    env: Mapping[str, str] = field(default_factory=dict)
    image: str = "/"

    @property
    def socket(self) -> Path:
        """Where its engine is."""
        return Path(self.env["DOCKER_HOST"].removeprefix("unix://"))


@contextmanager
def open_runtime(name: str) -> Iterator[Runtime]:
    """Have a runtime of that name. Raises UnavailableError where this machine has none, and none can be made."""
    with ExitStack() as stack:
        match name:
            case "process":
                yield Runtime(name, {"runtime": name}, "")
            case "bubblewrap":
                need("bwrap", "bubblewrap")
                yield Runtime(name, {"runtime": name, "task_image": "/"}, _version("bwrap"))
            case "apptainer":
                image, programs = stack.enter_context(_image()), stack.enter_context(open_apptainer())
                env = {"PATH": f"{programs}:{os.environ['PATH']}"}
                yield Runtime(name, {"runtime": name, "task_image": image}, _version("apptainer", env), env, str(image))
            case _:
                engine = stack.enter_context(
                    {"docker": engines.docker, "podman": engines.podman}[name](stack.enter_context(_image()))
                )
                env = {"DOCKER_HOST": f"unix://{engine.socket}", "CONTAINER_HOST": f"unix://{engine.socket}"}
                settings = {"runtime": name, "task_image": engines.IMAGE, "task_network": "none"}
                version = json.loads(engine.api("GET", "/version"))["Version"]
                yield Runtime(name, settings, version, env, engines.IMAGE)


@contextmanager
def _image() -> Iterator[Path]:
    """Make an image; as one of apptainer's, it runs what it is told to."""
    directory = Path(tempfile.mkdtemp(prefix="trio-pilot-bench-image-"))
    runscript = directory / ".singularity.d/runscript"
    try:
        make_image(directory)
        runscript.parent.mkdir()
        runscript.write_text('#!/bin/sh\nexec "$@"\n')
        runscript.chmod(0o755)
        yield directory
    finally:
        shutil.rmtree(directory)


def _version(program: str, env: Mapping[str, str] | None = None) -> str:
    done = subprocess.run(
        [program, "--version"], env={**os.environ, **(env or {})}, capture_output=True, text=True, check=False
    )
    return done.stdout.strip()
