"""`trio-pilot send`: send files, or JSON lines, to a queue as events."""

import json
import os
import uuid
from collections.abc import Iterator, Sequence
from functools import partial
from pathlib import Path
from typing import IO, Any

import trio

from trio_pilot.brokers import Sink, open_sink
from trio_pilot.cli.signals import print_summary, run_until_signalled
from trio_pilot.errors import EncodeError, PilotError, SettingsError, map_exceptions
from trio_pilot.files.task_directory import parse_outfile
from trio_pilot.processes import threads
from trio_pilot.settings import Settings
from trio_pilot.wire import WIRES, Message

MAX_UNCONFIRMED = 64  # messages sent that the broker has not confirmed yet


class BadInputError(PilotError):
    """An input file, or a line of one, cannot be sent as an event."""

    exit_code = SettingsError.exit_code


def send(settings: Settings, queue: str, files: Sequence[str], *, lines: bool) -> int:
    """Send each file, or each line, as an event; print how many. Raises BadInputError at the first that cannot be sent."""
    sender = Sender(settings, queue)
    with print_summary(lambda: f"{sender.sent} event(s) sent to {queue}"):
        run_until_signalled(sender.send, _events(settings, files, lines=lines))
    return 0


class Sender:
    """Sends events to a queue, many at once, and counts those that the broker has confirmed."""

    def __init__(self, settings: Settings, queue: str) -> None:
        self.sent = 0
        self._address = settings.at_broker(queue)
        self._patience = settings.broker_patience
        self._encode = WIRES[settings.wire].encode
        self._unconfirmed = trio.CapacityLimiter(MAX_UNCONFIRMED)

    async def send(self, events: Iterator[Any]) -> None:
        """Send all events. An error of the iterator is raised once the events before it are sent."""
        input_error: PilotError | None = None
        async with (
            open_sink(self._address, lambda seconds: seconds < self._patience) as sink,
            trio.open_nursery() as nursery,
        ):
            await sink.ready()
            # Reading may block, for example on a pipe, so it is done in a thread; None is the end.
            next_body = partial(threads.run_sync, self._next_body, events, abandon_on_cancel=True)
            try:
                while (body := await next_body()) is not None:
                    message = object()
                    await self._unconfirmed.acquire_on_behalf_of(message)
                    nursery.start_soon(self._send_one, sink, body, message)
            except PilotError as error:
                input_error = error
        if input_error:
            raise input_error

    def _next_body(self, events: Iterator[Any]) -> bytes | None:
        for event in events:
            with map_exceptions({EncodeError: BadInputError}, "an event cannot be sent"):
                return self._encode(Message(event))
        return None

    async def _send_one(self, sink: Sink, body: bytes, message: object) -> None:
        try:
            await sink.send(body, uuid.uuid4().hex)
            self.sent += 1
        finally:
            self._unconfirmed.release_on_behalf_of(message)


def _events(settings: Settings, files: Sequence[str], *, lines: bool) -> Iterator[Any]:
    for name in files:
        if lines or name == "-" or name.endswith(".jsonl"):
            yield from _read_lines(name)
        else:
            yield _read_file(name, settings.max_payload)


def _read_file(name: str, max_size: int) -> Any:
    try:
        content = Path(name).read_bytes()
        event = json.loads(content) if name.endswith(".json") else parse_outfile(content, is_json=False)
    except (OSError, ValueError, RecursionError) as error:
        raise BadInputError(f"{name} cannot be sent: {_reason(error)}") from error
    if len(content) > max_size:
        raise BadInputError(f"{name} cannot be sent: it has {len(content)} bytes, more than the {max_size} of --max-payload")
    return event


def _read_lines(name: str) -> Iterator[Any]:
    source = "stdin" if name == "-" else name
    try:
        with _open(name) as file:
            for number, line in enumerate(file, 1):
                if line.strip():
                    yield _parse_line(source, number, line)
    except OSError as error:
        raise BadInputError(f"{source} cannot be read: {_reason(error)}") from error


def _open(name: str) -> IO[bytes]:
    # Not sys.stdin: a thread that waits in it while the interpreter shuts down is a fatal error.
    return os.fdopen(os.dup(0), "rb") if name == "-" else Path(name).open("rb")


def _parse_line(source: str, number: int, line: bytes) -> Any:
    try:
        return json.loads(line)
    except (ValueError, RecursionError) as error:
        raise BadInputError(f"{source}, line {number}, must be JSON, not {line[:60]!r}: {error}") from error


def _reason(error: Exception) -> str:
    return (error.strerror if isinstance(error, OSError) else None) or str(error)
