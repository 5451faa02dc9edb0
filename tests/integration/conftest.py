from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.support.containment import CONTAINMENTS, Containment
from tests.support.images import bubblewrap_fault
from tests.support.pilots import PilotCommand


@pytest.fixture(params=["process", "bubblewrap"])
def runtime(request: pytest.FixtureRequest) -> str:
    if request.param == "bubblewrap" and (fault := bubblewrap_fault()):
        pytest.skip(f"bubblewrap does not work here: {fault}")
    return str(request.param)


@pytest.fixture(params=CONTAINMENTS)
def containment(request: pytest.FixtureRequest, pilots: PilotCommand) -> Containment:
    containment = CONTAINMENTS[request.param](request)
    pilots.variables.update(containment.variables)
    return containment


@pytest.fixture
def pilots(tmp_path: Path) -> Iterator[PilotCommand]:
    with PilotCommand(tmp_path) as pilots:
        yield pilots
