"""Which tests run beside which: a plugin for pytest, of use where pytest-xdist has several workers (`.ci/test`).

Any two tests may run at once, in two workers, but for one that is marked `alone`: none runs beside it, and it comes last.
Tests that need the same server (or whatever is SHARED) run in the same worker, one after the other: it is started once.
"""

import fcntl
import os
from collections.abc import Generator
from pathlib import Path

import pytest

ALONE = "alone"
# Fixtures that take long to make, and words in the names of parameters and modules that ask for them.
SHARED = "pool", "onefile", "docker", "podman", "apptainer", "rabbitmq", "nats", "linux"
ROOM = Path(__file__).parent  # whatever all workers can lock


def is_worker(config: pytest.Config) -> bool:
    return hasattr(config, "workerinput")


@pytest.hookimpl(tryfirst=True)  # before pytest-xdist looks at the groups
def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    if not is_worker(config):
        return
    for item in items:
        if group := group_of(item):
            item.add_marker(pytest.mark.xdist_group(group))
    items.sort(key=lambda item: (is_alone(item), group_of(item) is None))


def group_of(item: pytest.Item) -> str | None:
    if is_alone(item):
        return ALONE
    parameters = item.name.partition("[")[2].strip("]").split("-")
    words = {*getattr(item, "fixturenames", ()), *parameters, *item.path.stem.split("_")}
    return next((name for name in SHARED if name in words), None)


def is_alone(item: pytest.Item) -> bool:
    return item.get_closest_marker(ALONE) is not None


@pytest.hookimpl(wrapper=True)
def pytest_runtest_protocol(item: pytest.Item) -> Generator[None, object, object]:
    if not is_worker(item.config):
        return (yield)
    room = os.open(ROOM, os.O_RDONLY)
    try:
        fcntl.flock(room, fcntl.LOCK_EX if is_alone(item) else fcntl.LOCK_SH)
        return (yield)
    finally:
        os.close(room)
