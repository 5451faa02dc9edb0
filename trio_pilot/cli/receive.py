"""`trio-pilot receive`: write messages of a queue to stdout or to a directory; each is acknowledged once it is written."""

import base64
import json
import re
import uuid
from collections import OrderedDict, deque
from collections.abc import Callable, Iterator
from contextlib import AsyncExitStack, suppress
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import trio

from trio_pilot.brokers import Consumer, Delivery, Settlement, open_source
from trio_pilot.brokers.listening import next_delivery
from trio_pilot.cli.signals import print_summary, run_until_signalled
from trio_pilot.errors import (
    BrokerError,
    DecodeError,
    DeliveryLostError,
    NodeError,
    NotSetAsideError,
    SettingsError,
    map_exceptions,
)
from trio_pilot.files.filesystem import exists, is_directory, write_all, write_durably
from trio_pilot.files.log_copies import STDOUT
from trio_pilot.log import LOGGER
from trio_pilot.processes import threads
from trio_pilot.settings import Settings
from trio_pilot.wire import WIRES

PREFETCH = 64  # messages that the broker sends ahead while one is written
FOR_THE_UMASK = 0o666  # the mode of files that are made for the user
RELEASE_TIMEOUT = 1.0  # seconds
MAX_SEEN = 100_000  # ids to remember; they take about 15 MB
SUFFIXES = ".bin", ".txt", ".json"

UNACKED = ".unacked"  # ends the name of an empty file beside one whose message may come again

# Writes a message, given its data; may block. Returns what is to be called once the message is acknowledged, if anything.
Write = Callable[[Delivery, Any], Callable[[], None] | None]


@dataclass(frozen=True)
class ReceiveOptions:
    """Which messages to receive, and where to write them."""

    directory: Path | None = None  # none: stdout
    count: int | None = None  # messages after which to end
    idle: float = 1.0  # seconds without a message after which to end
    unique: bool = False  # whether to drop messages whose id has been seen


def receive(settings: Settings, queue: str, options: ReceiveOptions) -> int:
    """Receive messages until there are `count` of them, or none has come for `idle` seconds."""
    if not options.idle > 0:
        raise SettingsError(f"--idle must be a number of seconds > 0, not {options.idle}")
    if options.count is not None and options.count < 1:
        raise SettingsError(f"--count must be an integer ≥ 1, not {options.count}")
    directory = options.directory
    if directory:
        _make_directory(directory)
    write = partial(_write_file, directory) if directory else _write_line
    receiver = Receiver(settings, queue, write, SeenIds(directory) if options.unique else None)
    with print_summary(receiver.summary):
        run_until_signalled(receiver.receive, options.count, options.idle)
    return 0


def _make_directory(directory: Path) -> None:
    if exists(directory) and not is_directory(directory):
        raise SettingsError(f"--to must be a directory, and {directory} is not one")
    with map_exceptions({OSError: NodeError}, f"cannot make the directory {directory}"):
        directory.mkdir(parents=True, exist_ok=True)


class Receiver:
    """Receives the messages of a queue, writes each, and then acknowledges it."""

    def __init__(self, settings: Settings, queue: str, write: Write, seen: "SeenIds | None" = None) -> None:
        self.received = 0
        self._dropped = 0
        self._seen = seen
        self._address = settings.at_broker(queue)
        self._patience = settings.broker_patience
        self._max_size = settings.max_payload
        self._wire = WIRES[settings.wire]
        self._write = write

    def summary(self) -> str:
        """Return a line with the numbers of messages."""
        dropped = f", {self._dropped} duplicate(s) dropped" if self._seen else ""
        return f"{self.received} message(s) received from {self._address.queue}{dropped}"

    async def receive(self, count: int | None, idle: float) -> None:
        """Receive messages until there are `count` of them, or none has come for `idle` seconds."""
        async with (
            open_source(self._address, lambda seconds: seconds < self._patience) as source,
            AsyncExitStack() as at_the_end,
            source.consume(min(PREFETCH, count or PREFETCH)) as consumer,
        ):
            consumers: deque[Consumer] = deque([consumer])
            while self.received != count and (delivery := await next_delivery(consumers, idle)):
                try:
                    await self._take(delivery)
                except DeliveryLostError as error:
                    LOGGER.warning("message %s was received, but may come again: %s", delivery.message_id, error)
                except NotSetAsideError as error:
                    LOGGER.warning("message %s goes back to its queue at the end: %s", delivery.message_id, error)
                    at_the_end.enter_context(source.held(delivery))
                    at_the_end.push_async_callback(_release, delivery)
                except BaseException:
                    await _release(delivery)
                    raise

    async def _take(self, delivery: Delivery) -> None:
        if self._seen and delivery.named and delivery.message_id in self._seen:
            await delivery.source.settle(delivery, Settlement.ACK)
            self._dropped += 1
            return
        try:
            message = self._wire.decode(delivery.body, self._max_size)
        except DecodeError as error:
            await delivery.source.settle(delivery, Settlement.DEAD_LETTER, str(error), type(error).__name__)
            LOGGER.warning("message %s is set aside as a dead letter: %s", delivery.message_id, error)
            return
        # The reader of stdout may have stopped reading: when cancelled, the thread that waits for it is abandoned.
        write = partial(self._write, delivery, message.data)
        written = await threads.run_sync(write, abandon_on_cancel=True)
        if self._seen and delivery.named:
            self._seen.add(delivery.message_id)
        await delivery.source.settle(delivery, Settlement.ACK)
        if written:
            written()
        self.received += 1


class SeenIds:
    """The ids of messages received before: the latest of them, and those that have a file in a directory."""

    def __init__(self, directory: Path | None) -> None:
        self._directory = directory
        self._ids: OrderedDict[str, None] = OrderedDict()

    def __contains__(self, message_id: str) -> bool:
        return message_id in self._ids or (
            _stem(message_id) == message_id and any(map(Path.exists, self._files(message_id)))
        )

    def add(self, message_id: str) -> None:
        """Add the id of a message."""
        self._ids[message_id] = None
        if len(self._ids) > MAX_SEEN:
            self._ids.popitem(last=False)

    def _files(self, name: str) -> Iterator[Path]:
        return (self._directory / f"{name}{suffix}" for suffix in SUFFIXES) if self._directory else iter(())


async def _release(delivery: Delivery) -> None:
    """Release a message now; when the connection is closed the broker takes it back in any case."""
    with trio.move_on_after(RELEASE_TIMEOUT, shield=True), suppress(BrokerError):
        await delivery.source.settle(delivery, Settlement.RELEASE)


def _write_line(_delivery: Delivery, data: Any) -> None:
    """Write a line to stdout. Not by sys.stdout: a thread that waits in it would hold its lock at exit."""
    line = json.dumps(_base64(data) if isinstance(data, bytes) else data).encode() + b"\n"  # ASCII, and so escaped
    try:
        write_all(STDOUT, line)
    except BrokenPipeError:
        raise
    except OSError as error:
        raise NodeError(f"cannot write to stdout: {error.strerror}") from error


def _write_file(directory: Path, delivery: Delivery, data: Any) -> Callable[[], None]:
    """Write a file of its own for each message, be it equal to another; no file is ever overwritten.

    Only a message that comes again, written before and not acknowledged, has its file already.
    """
    with map_exceptions({OSError: NodeError}, f"cannot write to {directory}"):
        suffix, content = _file_content(data)
        stem = _stem(delivery.message_id) or uuid.uuid4().hex
        path = _written_before(directory, stem, suffix, content) if delivery.redelivered else None
        if path is None:
            path = directory / f"{stem}{suffix}"
            if path.exists():
                path = directory / f"{stem}-{uuid.uuid4().hex}{suffix}"
            _mark(path).touch()
            write_durably(path, content, FOR_THE_UMASK)
    return partial(_unmark, path)


def _written_before(directory: Path, stem: str, suffix: str, content: bytes) -> Path | None:
    """Return the file that has this content, and whose message was not acknowledged, as far as is known."""
    for mark in directory.glob(f".{stem}*{suffix}{UNACKED}"):
        path = mark.with_name(mark.name[1 : -len(UNACKED)])
        with suppress(FileNotFoundError):
            if path.read_bytes() == content:
                return path
    return None


def _mark(path: Path) -> Path:
    return path.with_name(f".{path.name}{UNACKED}")


def _unmark(path: Path) -> None:
    with suppress(OSError):
        _mark(path).unlink()


def _stem(message_id: str) -> str:
    return re.sub(r"[^A-Za-z0-9._-]", "_", message_id)[:100].lstrip(".")


def _file_content(data: Any) -> tuple[str, bytes]:
    if isinstance(data, bytes):
        return ".bin", data
    if isinstance(data, str):
        return ".txt", data.encode("utf-8", "surrogatepass")
    return ".json", json.dumps(data).encode()


def _base64(data: bytes) -> dict[str, str]:
    return {"encoding": "base64", "data": base64.b64encode(data).decode()}
