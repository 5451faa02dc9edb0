"""Which tests run at the same time: a plugin for pytest, for runs with several workers of pytest-xdist (`.ci/test`).

Any two tests may run at the same time, except a test that is marked `alone`: those come last, and no other test runs then.
Tests that need the same server, or another of SHARED, run in the same worker: it is started once.
"""

import fcntl
import os
from collections.abc import Generator
from pathlib import Path

import pytest

ALONE = "alone"
# Fixtures that take long to set up; parameters and modules with such a word in their names need them.
SHARED = "onefile", "docker", "podman", "apptainer", "rabbitmq", "nats", "linux"
LOCKED = Path(__file__).parent  # any directory that all workers can lock


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
    lock = os.open(LOCKED, os.O_RDONLY)
    try:
        fcntl.flock(lock, fcntl.LOCK_EX if is_alone(item) else fcntl.LOCK_SH)
        return (yield)
    finally:
        os.close(lock)
