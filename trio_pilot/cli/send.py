"""`trio-pilot send`: files, or JSON lines, to a queue."""

import json
import os
import uuid
from collections.abc import Iterator, Sequence
from functools import partial
from pathlib import Path
from typing import IO, Any

import trio

from trio_pilot.brokers import Sink, open_sink
from trio_pilot.cli.signals import report, run_until_signalled
from trio_pilot.errors import EncodeError, PilotError, SettingsError, map_exceptions
from trio_pilot.files.task_directory import parse_outfile
from trio_pilot.settings import Settings
from trio_pilot.wire import WIRES, Message

IN_FLIGHT = 64  # messages that wait for their confirms at once


class BadInputError(PilotError):
    """An input file, or a line of one, is no event."""

    exit_code = SettingsError.exit_code


def send(settings: Settings, queue: str, files: Sequence[str], *, lines: bool) -> int:
    """Send each file, or each line, as an event; say how many. Raises BadInputError at the first that is none."""
    sending = Sending(settings, queue)
    with report(lambda: f"{sending.sent} event(s) sent to {queue}"):
        run_until_signalled(sending.send, _events(settings, files, lines=lines))
    return 0


class Sending:
    """Sends events to a queue, many at once, and counts those that the broker has for good."""

    def __init__(self, settings: Settings, queue: str) -> None:
        self.sent = 0
        self._address = settings.at_broker(queue)
        self._patience = settings.broker_patience
        self._encode = WIRES[settings.wire].encode
        self._places = trio.CapacityLimiter(IN_FLIGHT)

    async def send(self, events: Iterator[Any]) -> None:
        """Send them all. An error of the iterator's is raised once those before it are sent."""
        refusal: PilotError | None = None
        async with (
            open_sink(self._address, lambda seconds: seconds < self._patience) as sink,
            trio.open_nursery() as nursery,
        ):
            await sink.ready()
            # Reading may block, on a pipe say, so it is done in a thread; None is the end.
            step = partial(trio.to_thread.run_sync, self._next_body, events, abandon_on_cancel=True)
            try:
                while (body := await step()) is not None:
                    place = object()
                    await self._places.acquire_on_behalf_of(place)
                    nursery.start_soon(self._send_one, sink, body, place)
            except PilotError as error:
                refusal = error
        if refusal:
            raise refusal

    def _next_body(self, events: Iterator[Any]) -> bytes | None:
        for event in events:
            with map_exceptions({EncodeError: BadInputError}, "an event cannot be sent"):
                return self._encode(Message(event))
        return None

    async def _send_one(self, sink: Sink, body: bytes, place: object) -> None:
        try:
            await sink.send(body, uuid.uuid4().hex)
            self.sent += 1
        finally:
            self._places.release_on_behalf_of(place)


def _events(settings: Settings, files: Sequence[str], *, lines: bool) -> Iterator[Any]:
    for name in files:
        if lines or name == "-" or name.endswith(".jsonl"):
            yield from _lines(name)
        else:
            yield _whole(name, settings.max_payload)


def _whole(name: str, most: int) -> Any:
    try:
        content = Path(name).read_bytes()
        event = json.loads(content) if name.endswith(".json") else parse_outfile(content, is_json=False)
    except (OSError, ValueError, RecursionError) as error:
        raise BadInputError(f"{name} cannot be sent: {_reason(error)}") from error
    if len(content) > most:
        raise BadInputError(f"{name} cannot be sent: it has {len(content)} bytes, more than the {most} of --max-payload")
    return event


def _lines(name: str) -> Iterator[Any]:
    where = "stdin" if name == "-" else name
    try:
        with _open(name) as file:
            for number, line in enumerate(file, 1):
                if line.strip():
                    yield _value(where, number, line)
    except OSError as error:
        raise BadInputError(f"{where} cannot be read: {_reason(error)}") from error


def _open(name: str) -> IO[bytes]:
    # Not sys.stdin: a thread that waits in it while the program ends would be a fatal error of Python's.
    return os.fdopen(os.dup(0), "rb") if name == "-" else Path(name).open("rb")


def _value(where: str, number: int, line: bytes) -> Any:
    try:
        return json.loads(line)
    except (ValueError, RecursionError) as error:
        raise BadInputError(f"{where}, line {number}, must be JSON, not {line[:60]!r}: {error}") from error


def _reason(error: Exception) -> str:
    return (error.strerror if isinstance(error, OSError) else None) or str(error)
