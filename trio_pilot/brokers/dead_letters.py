"""Dead letters: events that failed for the last time, set aside with what is known of it.

The facts are text, `attempts` apart: `reason`, `error` (the name of its class), `attempts` (how often it was tried), `pilot`
(`identity.Identity` of the last that did), `host` (its machine), `queue` (where the event was) and `time` (ISO 8601, UTC).

At a broker a dead letter is a message of the queue `dead_letter_queue`: the event's body and message id as they came, and
each fact in a header `x-trio-pilot-NAME`. Where the broker lets us have no such queue, it is two files of a directory:

    DIRECTORY/QUEUE/TIME-RANDOM.body    the body as it came
    DIRECTORY/QUEUE/TIME-RANDOM.json    the facts and `message_id`, as a JSON object

QUEUE is the queue's name with `_` for what a file name may not hold; the names sort by time. The .json is written last: a
.body without one is not (yet) a dead letter, and its event is still in its queue.
"""

import json
import os
import re
import uuid
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path

import trio

from trio_pilot.brokers import Delivery
from trio_pilot.errors import NodeError, map_exceptions
from trio_pilot.files.filesystem import make_durably, write_durably
from trio_pilot.log import LOGGER
from trio_pilot.processes import identity

Facts = Mapping[str, str | int]

PREFIX = "x-trio-pilot-"
MOST_REASON = 4000  # characters; a header that does not fit into a frame would end the connection


@dataclass(frozen=True, slots=True)
class DeadLetter:
    """A dead letter in a directory."""

    path: Path  # of its .json
    facts: Facts
    body: bytes


def facts(delivery: Delivery, reason: str, error: str) -> Facts:
    """Tell of an event that has failed for the last time what is to be known of it."""
    return {
        "reason": storable(reason),
        "error": error,
        "attempts": delivery.attempt,
        "pilot": str(identity.own()),
        "host": os.uname().nodename,
        "queue": delivery.queue,
        "time": datetime.now(UTC).isoformat(timespec="milliseconds"),
    }


def storable(reason: str) -> str:
    """Word a reason so that every broker can store it."""
    return reason[:MOST_REASON].encode(errors="replace").decode()


def headers(facts: Facts) -> dict[str, str | int]:
    """Write facts as headers of a message."""
    return {PREFIX + name: value for name, value in facts.items()}


async def write_aside(directory: Path, delivery: Delivery, facts: Facts, why: Exception) -> bool:
    """Write to a directory what may not go to the queue of dead letters, and log `why`; tell whether it is there.

    Cancelled, it is written all the same.
    """
    try:
        path = await write(directory, delivery, facts)
    except NodeError as error:
        LOGGER.error("the event %s goes back: no dead letters for us (%s; %s)", delivery.message_id, why, error)
        return False
    LOGGER.warning("the event %s is now the dead letter %s: no queue for it (%s)", delivery.message_id, path, why)
    return True


async def write(directory: Path, delivery: Delivery, facts: Facts) -> Path:
    """Write a dead letter to a directory, and give the path of its .json once both files are on disk.

    Cancelled, it is written all the same.

    Raises:
        NodeError: the disk does not take it.
    """
    return await trio.to_thread.run_sync(_write, directory, delivery, facts)


def _write(directory: Path, delivery: Delivery, facts: Facts) -> Path:
    place = _place(directory, delivery.queue)
    stem = place / f"{datetime.now(UTC):%Y%m%dT%H%M%S.%f}-{uuid.uuid4().hex[:8]}"
    said = json.dumps({**facts, "message_id": delivery.message_id}, indent=1)
    with map_exceptions({OSError: NodeError}, f"cannot write a dead letter in {directory}"):
        make_durably(place)
        write_durably(stem.with_name(f"{stem.name}.body"), delivery.body)
        write_durably(path := stem.with_name(f"{stem.name}.json"), said.encode())
    return path


def read(directory: Path, queue: str) -> Iterator[DeadLetter]:
    """Read the dead letters of a queue that are in a directory, the oldest first. Blocks.

    Raises:
        NodeError: a file cannot be read, or is none of ours.
    """
    for path in sorted(_place(directory, queue).glob("*.json")):
        with map_exceptions({OSError: NodeError, ValueError: NodeError}, f"cannot read the dead letter {path}"):
            letter = DeadLetter(path, json.loads(path.read_bytes()), path.with_suffix(".body").read_bytes())
        yield letter


def _place(directory: Path, queue: str) -> Path:
    return directory / (re.sub(r"[^A-Za-z0-9._-]", "_", queue)[:200].lstrip(".") or "_")
