import subprocess
from collections.abc import Iterator
from contextlib import AbstractContextManager
from pathlib import Path

import pytest

from tests import engines
from tests.conftest import SERVICES, cannot
from tests.contract.subjects import SUBJECTS, Subject
from tests.runtimes_support import make_image
from tests.servers import UnavailableError


@pytest.fixture(scope="session")
def image(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_image(tmp_path_factory.mktemp("image"))


@pytest.fixture(scope="session")
def sif(apptainer: Path, image: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    file = tmp_path_factory.mktemp("sif") / "image.sif"
    subprocess.run([apptainer / "apptainer", "--silent", "build", file, image], check=True, timeout=60)
    return file


@pytest.fixture(scope="session")
def docker(image: Path) -> Iterator[engines.Engine]:
    yield from _running(engines.docker(image))


@pytest.fixture(scope="session")
def podman(image: Path) -> Iterator[engines.Engine]:
    yield from _running(engines.podman(image))


def _running(opening: AbstractContextManager[engines.Engine]) -> Iterator[engines.Engine]:
    try:
        with opening as engine:
            SERVICES.append(engine.name)
            yield engine
    except UnavailableError as error:
        cannot(str(error))


@pytest.fixture
def subject(request: pytest.FixtureRequest, tmp_path: Path) -> Subject:
    return SUBJECTS[request.param](request, tmp_path)
