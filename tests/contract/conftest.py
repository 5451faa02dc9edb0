import subprocess
from collections.abc import Iterator
from pathlib import Path

import pulsar
import pytest

from tests.contract.runtimes.subjects import SUBJECTS, Subject
from tests.support.brokers import new_name
from tests.support.pulsar_stand_in import StandIn


@pytest.fixture(scope="session")
def sif(apptainer: Path, image: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    file = tmp_path_factory.mktemp("sif") / "image.sif"
    subprocess.run([apptainer / "apptainer", "--silent", "build", file, image], check=True, timeout=60)
    return file


@pytest.fixture
def subject(request: pytest.FixtureRequest, tmp_path: Path) -> Subject:
    return SUBJECTS[request.param].make(request, tmp_path)


@pytest.fixture
def queue() -> str:
    return new_name()


@pytest.fixture
def pulsar_stand_in(monkeypatch: pytest.MonkeyPatch) -> Iterator[StandIn]:
    with StandIn() as server:
        monkeypatch.setattr(pulsar, "Client", server.client)
        yield server
