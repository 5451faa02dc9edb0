from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.runtimes_support import PilotCommand, bubblewrap_fault


@pytest.fixture(params=["process", "bubblewrap"])
def runtime(request: pytest.FixtureRequest) -> str:
    if request.param == "bubblewrap" and (fault := bubblewrap_fault()):
        pytest.skip(f"bubblewrap does not work here: {fault}")
    return str(request.param)


@pytest.fixture
def pilots(tmp_path: Path) -> Iterator[PilotCommand]:
    with PilotCommand(tmp_path) as pilots:
        yield pilots
