import subprocess
from pathlib import Path

import pytest

from tests.contract.subjects import SUBJECTS, Subject


@pytest.fixture(scope="session")
def sif(apptainer: Path, image: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    file = tmp_path_factory.mktemp("sif") / "image.sif"
    subprocess.run([apptainer / "apptainer", "--silent", "build", file, image], check=True, timeout=60)
    return file


@pytest.fixture
def subject(request: pytest.FixtureRequest, tmp_path: Path) -> Subject:
    return SUBJECTS[request.param](request, tmp_path)
