"""`trio-pilot send`: files, or JSON lines, to a queue."""

import json
import sys
import uuid
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import trio

from trio_pilot.brokers import open_sink
from trio_pilot.errors import EventError, PilotError, SettingsError
from trio_pilot.settings import Settings
from trio_pilot.staging import parse_outfile
from trio_pilot.wire import WIRES, Message

IN_FLIGHT = 64  # messages that wait for their confirms at once


class BadInputError(PilotError):
    """An input file, or a line of one, is no event."""

    exit_code = SettingsError.exit_code


def send(settings: Settings, queue: str, files: Sequence[str], *, lines: bool) -> int:
    """Send each file, or each line, as an event; say how many. Raises BadInputError at the first that is none."""
    count = trio.run(_send, settings, queue, _bodies(settings, files, lines=lines))
    print(f"{count} event(s) sent to {queue}", file=sys.stderr)
    return 0


async def _send(settings: Settings, queue: str, bodies: Iterator[bytes]) -> int:
    count = 0
    limit = trio.CapacityLimiter(IN_FLIGHT)
    async with (
        open_sink(settings.at_broker(queue), lambda seconds: seconds < settings.broker_patience) as sink,
        trio.open_nursery() as nursery,
    ):
        await sink.ready()

        async def send_one(body: bytes, place: object) -> None:
            try:
                await sink.send(body, uuid.uuid4().hex)
            finally:
                limit.release_on_behalf_of(place)

        # Reading may block, on a pipe say, so it is done in a thread; None is the end.
        while (body := await trio.to_thread.run_sync(next, bodies, None, abandon_on_cancel=True)) is not None:
            place = object()
            await limit.acquire_on_behalf_of(place)
            nursery.start_soon(send_one, body, place)
            count += 1
    return count


def _bodies(settings: Settings, files: Sequence[str], *, lines: bool) -> Iterator[bytes]:
    wire = WIRES[settings.wire]
    for name in files:
        events = _lines(name) if lines or name == "-" or name.endswith(".jsonl") else iter([_whole(name)])
        for event in events:
            yield wire.encode(Message(event))


def _whole(name: str) -> Any:
    try:
        return parse_outfile(Path(name).read_bytes(), is_json=name.endswith(".json"))
    except (OSError, EventError) as error:
        raise BadInputError(f"{name} cannot be sent: {error}") from error


def _lines(name: str) -> Iterator[Any]:
    try:
        with sys.stdin.buffer if name == "-" else Path(name).open("rb") as file:
            for number, line in enumerate(file, 1):
                if line.strip():
                    yield _value(name, number, line)
    except OSError as error:
        raise BadInputError(f"{name} cannot be read: {error}") from error


def _value(name: str, number: int, line: bytes) -> Any:
    try:
        return json.loads(line)
    except (ValueError, RecursionError) as error:
        where = "stdin" if name == "-" else name
        raise BadInputError(f"{where}, line {number}, must be JSON, not {line[:60]!r}: {error}") from error
