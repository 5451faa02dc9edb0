"""Services that tests share, and the tests that cannot have them."""

import os
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager
from typing import NoReturn, TypeVar

import pytest

from tests.support import servers

T = TypeVar("T")

SERVICES: list[str] = []  # those that ran


def cannot(reason: str) -> NoReturn:
    """Skip a test that lacks something, or fail it where no test may be skipped."""
    if os.environ.get("CI", "").lower() == "true" or os.environ.get("TRIO_PILOT_NO_SKIP") == "1":
        pytest.fail(f"must not be skipped here, but: {reason}", pytrace=False)
    pytest.skip(reason)


@contextmanager
def open_service(opening: AbstractContextManager[T], name_of: Callable[[T], str]) -> Iterator[T]:
    """Open a service that is named in the summary, or skip the test where this machine cannot run it."""
    try:
        with opening as service:
            SERVICES.append(name_of(service))
            yield service
    except servers.UnavailableError as error:
        cannot(str(error))


def open_rabbitmq(suite: str = "", config: str = "", plugins: str = "") -> AbstractContextManager[servers.RabbitServer]:
    """Run a server, or skip the test; see `servers.rabbitmq`."""
    return open_service(servers.rabbitmq(suite, config, plugins), lambda server: f"RabbitMQ {server.version}")
