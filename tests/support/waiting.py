"""Waiting for what other processes do."""

import time
from collections.abc import Callable

import trio

PATIENCE = 20.0  # seconds for what should take milliseconds, on a machine that may be busy


async def until(condition: Callable[[], object], what: str = "") -> None:
    """Wait for what another process does."""
    with trio.move_on_after(PATIENCE) as scope:
        while not condition():  # noqa: ASYNC110 -- another process tells nobody
            await trio.sleep(0.005)
    assert not scope.cancelled_caught, f"in vain: {what or condition}"


def until_sync(condition: Callable[[], object], what: str = "") -> None:
    deadline = time.monotonic() + PATIENCE
    while not condition():
        assert time.monotonic() < deadline, f"in vain: {what or condition}"
        time.sleep(0.005)
