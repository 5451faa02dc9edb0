"""`trio-pilot receive`: messages of a queue, to stdout or to a directory; acknowledged once they are written."""

import base64
import json
import re
import uuid
from collections import OrderedDict, deque
from collections.abc import Callable, Iterator
from contextlib import suppress
from functools import partial
from pathlib import Path
from typing import Any

import trio

from trio_pilot.brokers import Consumer, Delivery, Settlement, open_source
from trio_pilot.brokers.listening import next_delivery
from trio_pilot.cli.signals import report, run_until_signalled
from trio_pilot.errors import BrokerError, DecodeError, DeliveryLostError, NodeError, SettingsError, map_exceptions
from trio_pilot.files.filesystem import exists, is_directory, write_all, write_durably
from trio_pilot.files.task_directory import STDOUT
from trio_pilot.log import LOGGER
from trio_pilot.settings import Settings
from trio_pilot.wire import WIRES

AHEAD = 64  # messages to have at hand while one is written
GIVE_BACK_TIMEOUT = 1.0
MOST_KNOWN = 100_000  # ids to remember; some 15 MB
SUFFIXES = ".bin", ".txt", ".json"

Write = Callable[[str, Any], None]  # takes the id of a message, and its data; may block


def receive(settings: Settings, queue: str, to: Path | None, count: int | None, idle: float, *, unique: bool = False) -> int:
    """Receive until `count` messages are here, or none has come for `idle` seconds; `unique`: those of one id once."""
    if not idle > 0:
        raise SettingsError(f"--idle must be a number of seconds > 0, not {idle}")
    if count is not None and count < 1:
        raise SettingsError(f"--count must be an integer ≥ 1, not {count}")
    if to:
        if exists(to) and not is_directory(to):
            raise SettingsError(f"--to must be a directory, and {to} is none")
        with map_exceptions({OSError: NodeError}, f"cannot make the directory {to}"):
            to.mkdir(parents=True, exist_ok=True)
    known = Known(to) if unique else None
    receiving = Receiving(settings, queue, partial(_to_directory, to) if to else _to_stdout, known)
    with report(receiving.summary):
        run_until_signalled(receiving.receive, count, idle)
    return 0


class Receiving:
    """Receives the messages of a queue, has them written, and acknowledges each after that."""

    def __init__(self, settings: Settings, queue: str, write: Write, known: "Known | None" = None) -> None:
        self.received = 0
        self._dropped = 0
        self._known = known
        self._address = settings.at_broker(queue)
        self._patience = settings.broker_patience
        self._most = settings.max_payload
        self._wire = WIRES[settings.wire]
        self._write = write

    def summary(self) -> str:
        """Say what was done."""
        dropped = f", {self._dropped} duplicate(s) dropped" if self._known else ""
        return f"{self.received} message(s) received from {self._address.queue}{dropped}"

    async def receive(self, count: int | None, idle: float) -> None:
        """Receive `count` messages, or until none has come for `idle` seconds."""
        async with (
            open_source(self._address, lambda seconds: seconds < self._patience) as source,
            source.consume(min(AHEAD, count or AHEAD)) as consumer,
        ):
            consumers: deque[Consumer] = deque([consumer])
            while self.received != count and (delivery := await next_delivery(consumers, idle)):
                try:
                    await self._take(delivery)
                except DeliveryLostError as error:
                    LOGGER.warning("message %s was received, and may come again: %s", delivery.message_id, error)
                except BaseException:
                    await _give_back(delivery)
                    raise

    async def _take(self, delivery: Delivery) -> None:
        if self._known and delivery.named and delivery.message_id in self._known:
            await delivery.source.settle(delivery, Settlement.ACK)
            self._dropped += 1
            return
        try:
            message = self._wire.decode(delivery.body, self._most)
        except DecodeError as error:
            LOGGER.warning("message %s is set aside: %s", delivery.message_id, error)
            await delivery.source.settle(delivery, Settlement.DEAD_LETTER, str(error), type(error).__name__)
            return
        # Who reads from us may have stopped: then the thread is left behind.
        write = partial(self._write, delivery.message_id, message.data)
        await trio.to_thread.run_sync(write, abandon_on_cancel=True)
        if self._known:
            self._known.add(delivery.message_id)
        await delivery.source.settle(delivery, Settlement.ACK)
        self.received += 1


class Known:
    """The ids of messages that were received: the last of them, and those that have a file in a directory."""

    def __init__(self, directory: Path | None) -> None:
        self._directory = directory
        self._ids: OrderedDict[str, None] = OrderedDict()

    def __contains__(self, message_id: str) -> bool:
        return message_id in self._ids or (
            _stem(message_id) == message_id and any(map(Path.exists, self._files(message_id)))
        )

    def add(self, message_id: str) -> None:
        """Know one more."""
        self._ids[message_id] = None
        if len(self._ids) > MOST_KNOWN:
            self._ids.popitem(last=False)

    def _files(self, name: str) -> Iterator[Path]:
        return (self._directory / f"{name}{suffix}" for suffix in SUFFIXES) if self._directory else iter(())


async def _give_back(delivery: Delivery) -> None:
    """Give a message back at once; the broker would take it back in any case when we are gone."""
    with trio.move_on_after(GIVE_BACK_TIMEOUT, shield=True), suppress(BrokerError):
        await delivery.source.settle(delivery, Settlement.RELEASE)


def _to_stdout(_message_id: str, data: Any) -> None:
    """Write a line. Past sys.stdout, whose lock would be held at exit by a thread that waits in it."""
    line = json.dumps(_base64(data) if isinstance(data, bytes) else data).encode() + b"\n"
    try:
        write_all(STDOUT, line)
    except BrokenPipeError:
        raise
    except OSError as error:
        raise NodeError(f"cannot write to stdout: {error.strerror}") from error


def _to_directory(to: Path, message_id: str, data: Any) -> None:
    with map_exceptions({OSError: NodeError}, f"cannot write to {to}"):
        suffix, content = _file(data)
        stem = _stem(message_id) or uuid.uuid4().hex
        path = to / f"{stem}{suffix}"
        if not path.exists():
            write_durably(path, content)
        elif path.read_bytes() != content:  # another message of the same name; no file is ever written over
            write_durably(to / f"{stem}-{uuid.uuid4().hex}{suffix}", content)


def _stem(message_id: str) -> str:
    return re.sub(r"[^A-Za-z0-9._-]", "_", message_id)[:100].lstrip(".")


def _file(data: Any) -> tuple[str, bytes]:
    if isinstance(data, bytes):
        return ".bin", data
    if isinstance(data, str):
        return ".txt", data.encode("utf-8", "surrogatepass")
    return ".json", json.dumps(data).encode()


def _base64(data: bytes) -> dict[str, str]:
    return {"encoding": "base64", "data": base64.b64encode(data).decode()}
