"""Waiting for what other processes do, with a limit for each kind of them.

A limit ends a test that waits in vain. It measures nothing: each is far above what a busy machine needs, and costs no time
where all is well.
"""

import time
from collections.abc import Callable
from dataclasses import dataclass

import trio


@dataclass(frozen=True)
class Limit:
    """How long a test waits for something, and how often it looks."""

    seconds: float
    interval: float  # between two looks


# A process of this machine: it takes milliseconds.
PROCESS = Limit(20.0, 0.005)
# A broker, or a pilot that waits for one: it takes milliseconds, but a connection that was lost is tried again only every
# 10 s, and it takes up to 40 s to miss a heartbeat.
BROKER = Limit(60.0, 0.02)
# Docker or podman: on an idle machine a container starts, and is removed, within a second. Each takes several processes of
# the engine, which may serve other tests at the same time.
ENGINE = Limit(60.0, 0.02)
# An HTCondor pool: a job takes 2 to 5 s to start on an idle machine. It waits for one interval, of 1 or 2 s, of each of
# negotiator, schedd, shadow and starter, then for a dozen new processes, one of them a pilot that unpacks itself. A look is
# a command of HTCondor, 0.1 s of a core on an idle machine: more looks would slow down what is waited for.
POOL = Limit(180.0, 0.25)

# In seconds.
SERVER_START = 90.0  # it takes 2 to 10 on an idle machine
SERVER_STOP = 15.0  # it is killed
PILOT_RUN = 120.0  # the longest run of a test takes 10 to 20 on an idle machine
POOL_COMMAND = 60.0  # a command of HTCondor gives up an answer after 20, and may ask two daemons

PATIENCE = PROCESS.seconds


async def until(condition: Callable[[], object], what: str = "", limit: Limit = PROCESS) -> None:
    """Wait until a condition holds, which is looked at again and again; fail if it does not within the limit."""
    with trio.move_on_after(limit.seconds) as scope:
        while not condition():  # noqa: ASYNC110 -- another process sets no event
            await trio.sleep(limit.interval)
    assert not scope.cancelled_caught, f"in vain: {what or condition}"


def until_sync(condition: Callable[[], object], what: str = "", limit: Limit = PROCESS) -> None:
    """Wait like `until`, outside of Trio."""
    deadline = time.monotonic() + limit.seconds
    while not condition():
        assert time.monotonic() < deadline, f"in vain: {what or condition}"
        time.sleep(limit.interval)
