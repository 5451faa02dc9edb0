"""Services that tests share, and what becomes of a test that cannot have one."""

import os
from collections.abc import Iterator
from contextlib import contextmanager
from typing import NoReturn

import pytest

from tests.support import servers

SERVICES: list[str] = []  # those that ran


def cannot(reason: str) -> NoReturn:
    """Skip a test for want of something; where nothing may be skipped, fail."""
    if os.environ.get("CI", "").lower() == "true" or os.environ.get("TRIO_PILOT_NO_SKIP") == "1":
        pytest.fail(f"must not be skipped here, but: {reason}", pytrace=False)
    pytest.skip(reason)


@contextmanager
def open_rabbitmq(suite: str = "", config: str = "", plugins: str = "") -> Iterator[servers.RabbitServer]:
    """Run a server, or skip the test; see `servers.rabbitmq`."""
    try:
        with servers.rabbitmq(suite, config, plugins) as server:
            SERVICES.append(f"RabbitMQ {server.version}")
            yield server
    except servers.UnavailableError as error:
        cannot(str(error))
