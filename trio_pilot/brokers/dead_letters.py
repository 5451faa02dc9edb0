"""Dead letters: events that failed for the last time, set aside with the facts of the failure.

The facts are text, except `attempts`: `reason`, `error` (the name of its class), `attempts` (how often the event was tried),
`pilot` (`identity.Identity` of the last one that tried), `host` (its machine), `queue` (that of the event) and `time` (ISO
8601, UTC).

At a broker a dead letter is a message of the queue `dead_letter_queue`: the event's body and message id as they came, and
each fact in a header `x-trio-pilot-NAME`. Where the broker refuses such a queue, it is two files in a directory, unless that
is removed with the job of the pilot:

    DIRECTORY/QUEUE/TIME-RANDOM.body    the body as it came
    DIRECTORY/QUEUE/TIME-RANDOM.json    the facts and `message_id`, as a JSON object

QUEUE is the queue's name, with `_` for each character that a file name may not have; the names sort by time. The .json is
written last: a .body without one is not (yet) a dead letter, and its event is still in its queue.
"""

import json
import os
import re
import uuid
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path

from trio_pilot.brokers import Delivery
from trio_pilot.errors import NodeError, NotSetAsideError, map_exceptions
from trio_pilot.files.filesystem import make_durably, write_durably
from trio_pilot.files.lasting import is_lasting
from trio_pilot.files.ownership import flaw, open_plain
from trio_pilot.log import LOGGER
from trio_pilot.processes import identity, threads

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
    """Return the facts of an event that has failed for the last time."""
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
    """Return a reason cut and encoded so that every broker can store it."""
    return reason[:MOST_REASON].encode(errors="replace").decode()


def headers(facts: Facts) -> dict[str, str | int]:
    """Return facts as headers of a message."""
    return {PREFIX + name: value for name, value in facts.items()}


async def write_aside(directory: Path, delivery: Delivery, facts: Facts, why: Exception) -> None:
    """Write a dead letter that its queue refused to a directory, and log it.

    It is written even if this is cancelled.

    Raises:
        NotSetAsideError: it cannot be written, or not to a directory that outlasts this job.
    """
    try:
        path = await write(directory, delivery, facts)
    except NodeError as error:
        raise NotSetAsideError(f"nothing lasting takes it as a dead letter (queue: {why}; directory: {error})") from error
    LOGGER.warning("event %s is the dead letter %s: cannot send it to a queue (%s)", delivery.message_id, path, why)


async def write(directory: Path, delivery: Delivery, facts: Facts) -> Path:
    """Write a dead letter to a directory; return the path of its .json once both files are on disk.

    It is written even if this is cancelled.

    Raises:
        NodeError: it cannot be written, or the directory would be removed with this job.
    """
    return await threads.run_sync(_write, directory, delivery, facts)


def _write(directory: Path, delivery: Delivery, facts: Facts) -> Path:
    folder = _folder(directory, delivery.queue)
    stem = folder / f"{datetime.now(UTC):%Y%m%dT%H%M%S.%f}-{uuid.uuid4().hex[:8]}"
    text = json.dumps({**facts, "message_id": delivery.message_id}, indent=1)
    with map_exceptions({OSError: NodeError}, f"cannot write a dead letter in {directory}"):
        if not is_lasting(directory, os.environ):
            raise NodeError(f"{directory} is removed with this job; --dead-letter-directory may name another")
        make_durably(folder)
        for place in (directory, folder):
            if why := flaw(place):
                raise NodeError(f"{place} {why}; --dead-letter-directory may name another")
        write_durably(stem.with_name(f"{stem.name}.body"), delivery.body)
        write_durably(path := stem.with_name(f"{stem.name}.json"), text.encode())
    return path


def read(directory: Path, queue: str) -> Iterator[DeadLetter]:
    """Yield the dead letters of a queue that are in a directory, the oldest first. Blocks.

    Raises:
        NodeError: a file cannot be read, or is not a dead letter.
    """
    for path in sorted(_folder(directory, queue).glob("*.json")):
        with map_exceptions({OSError: NodeError, ValueError: NodeError}, f"cannot read the dead letter {path}"):
            letter = DeadLetter(path, json.loads(_content(path)), _content(path.with_suffix(".body")))
        yield letter


def _content(path: Path) -> bytes:
    with os.fdopen(open_plain(path, os.O_RDONLY), "rb") as file:
        return file.read()


def _folder(directory: Path, queue: str) -> Path:
    return directory / (re.sub(r"[^A-Za-z0-9._-]", "_", queue)[:200].lstrip(".") or "_")
