"""The runtimes of a measurement, as they work on this machine, with engines started for it and a small image."""

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
    """A runtime of tasks, with the settings and variables by which both sides of a comparison use it."""

    name: str
    settings: Mapping[str, Any]  # of a pilot
    version: str
    env: Mapping[str, str] = field(default_factory=dict)
    image: str = "/"

    @property
    def socket(self) -> Path:
        """Return the socket of the engine."""
        return Path(self.env["DOCKER_HOST"].removeprefix("unix://"))


@contextmanager
def open_runtime(name: str) -> Iterator[Runtime]:
    """Open the runtime of that name. Raises UnavailableError if this machine does not have it, and it cannot be made."""
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
    """Make an image, whose runscript for apptainer runs its arguments; remove it at the end."""
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
