"""Hostile tasks: hundreds of tries in one container of each runtime, as the task of root's and of another user's pilot."""

import os
import tempfile
from collections.abc import Iterator, Mapping
from pathlib import Path

import pytest

from tests.support.engines import Engine
from tests.support.hostile.exceptions import reason_for
from tests.support.hostile.python_image import PYTHON, make_python_image
from tests.support.hostile.run import hostile_run, make_world
from tests.support.images import bubblewrap_fault, make_docker_archive
from tests.support.users import NOBODY, needs_root

pytestmark = needs_root

IMAGE = "python:local"
ENGINES = {"docker": "DOCKER_HOST", "podman": "CONTAINER_HOST"}
LEAST_TRIES = 200


@pytest.fixture(scope="module")
def python_image() -> Iterator[Path]:
    with tempfile.TemporaryDirectory(prefix="trio-pilot-image-") as directory:
        Path(directory).chmod(0o755)
        yield make_python_image(Path(directory))


@pytest.fixture(scope="module")
def archive(python_image: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    file = tmp_path_factory.mktemp("archive") / "image.tar"
    make_docker_archive(python_image, file, IMAGE, {"Env": ["PATH=/bin"], "WorkingDir": "/tmp"})
    return file


@pytest.fixture
def world() -> Iterator[Path]:
    """A directory that the root of a container shows, as it does not show /tmp."""
    with tempfile.TemporaryDirectory(dir="/opt", prefix="trio-pilot-test-") as directory:
        Path(directory).chmod(0o755)
        yield Path(directory)


def found_runtime(request: pytest.FixtureRequest, runtime: str) -> tuple[str, Mapping[str, str]]:
    """Return the image for a runtime, and the variables that it needs."""
    if runtime == "bubblewrap-own-root":
        if fault := bubblewrap_fault():
            pytest.skip(f"bubblewrap does not work here: {fault}")
        return "/", {}
    if runtime in ENGINES:
        engine: Engine = request.getfixturevalue(runtime)
        engine.directory.chmod(0o711)
        engine.socket.chmod(0o666)
        if not engine.has_image(IMAGE):
            engine.load_archive(request.getfixturevalue("archive"))
        return IMAGE, {ENGINES[runtime]: f"unix://{engine.socket}"}
    if runtime == "bubblewrap":
        found_runtime(request, "bubblewrap-own-root")
        return str(request.getfixturevalue("python_image")), {}
    programs = request.getfixturevalue("apptainer")
    return str(request.getfixturevalue("python_image")), {"PATH": f"{programs}:{os.environ['PATH']}"}


@pytest.mark.parametrize("user", [0, NOBODY], ids=["root", "user"])
@pytest.mark.parametrize("runtime", ["bubblewrap", "bubblewrap-own-root", "apptainer", "docker", "podman"])
def test_a_hostile_task_is_refused_all_but_the_known_exceptions(
    request: pytest.FixtureRequest, world: Path, runtime: str, user: int
) -> None:
    image, env = found_runtime(request, runtime)
    make_world(world, user)
    name = runtime.removesuffix("-own-root")
    if user and image == "/" and not os.access(PYTHON, os.X_OK):
        pytest.skip("other users cannot execute this Python")
    verdicts = hostile_run(user, name, image, world, {"HOME": "/tmp", **env})
    assert len(verdicts) >= LEAST_TRIES
    allowed = {try_: why for try_, (verdict, why) in verdicts.items() if verdict == "allowed"}
    unknown = [f"{try_} ({why})" for try_, why in allowed.items() if not reason_for(name, user, try_)]
    assert not unknown, "\n".join(unknown)
