"""`trio-pilot receive`: messages of a queue, to stdout or to a directory; acknowledged once they are written."""

import base64
import json
import os
import re
import sys
import uuid
from collections import deque
from pathlib import Path
from typing import Any

import trio

from trio_pilot.brokers import Consumer, Settlement, open_source
from trio_pilot.errors import DecodeError, NodeError, SettingsError, map_exceptions
from trio_pilot.log import LOGGER
from trio_pilot.pilot import next_delivery
from trio_pilot.settings import Settings
from trio_pilot.wire import WIRES

AHEAD = 64  # messages to have at hand while one is written


def receive(settings: Settings, queue: str, to: Path | None, count: int | None, idle: float) -> int:
    """Receive until `count` messages are here, or none has come for `idle` seconds."""
    if not idle > 0:
        raise SettingsError(f"--idle must be a number of seconds > 0, not {idle}")
    if count is not None and count < 1:
        raise SettingsError(f"--count must be an integer ≥ 1, not {count}")
    received = trio.run(_receive, settings, queue, to, count, idle)
    print(f"{received} message(s) received from {queue}", file=sys.stderr)
    return 0


async def _receive(settings: Settings, queue: str, to: Path | None, count: int | None, idle: float) -> int:
    wire, received = WIRES[settings.wire], 0
    if to:
        with map_exceptions({OSError: NodeError}, f"cannot write to {to}"):
            await trio.Path(to).mkdir(parents=True, exist_ok=True)
    async with open_source(settings.at_broker(queue), lambda seconds: seconds < settings.broker_patience) as source:
        await source.ready()
        async with source.consume(min(AHEAD, count or AHEAD)) as consumer:
            consumers: deque[Consumer] = deque([consumer])
            while received != count and (delivery := await next_delivery(consumers, idle)):
                try:
                    message = wire.decode(delivery.body, settings.max_payload)
                except DecodeError as error:
                    LOGGER.warning("message %s is set aside: %s", delivery.message_id, error)
                    await source.settle(delivery, Settlement.DEAD_LETTER, str(error))
                    continue
                await trio.to_thread.run_sync(_write, to, delivery.message_id, message.data)
                await source.settle(delivery, Settlement.ACK)
                received += 1
    return received


def _write(to: Path | None, message_id: str, data: Any) -> None:
    if to is None:
        print(json.dumps(_base64(data) if isinstance(data, bytes) else data), flush=True)
        return
    with map_exceptions({OSError: NodeError}, f"cannot write to {to}"):
        suffix, content = _file(data)
        stem = re.sub(r"[^A-Za-z0-9._-]", "_", message_id)[:100].lstrip(".") or uuid.uuid4().hex
        path = to / f"{stem}{suffix}"
        if path.exists():  # another message of the same name; a file that is there is never written over
            path = to / f"{stem}-{uuid.uuid4().hex}{suffix}"
        _write_durably(path, content)


def _file(data: Any) -> tuple[str, bytes]:
    if isinstance(data, bytes):
        return ".bin", data
    if isinstance(data, str):
        return ".txt", data.encode("utf-8", "surrogatepass")
    return ".json", json.dumps(data).encode()


def _base64(data: bytes) -> dict[str, str]:
    return {"encoding": "base64", "data": base64.b64encode(data).decode()}


def _write_durably(path: Path, content: bytes) -> None:
    """Write a file that is either there as a whole, on disk, or not at all."""
    temporary = path.with_name(f".{path.name}.part")
    with temporary.open("wb") as file:
        file.write(content)
        file.flush()
        os.fsync(file.fileno())
    temporary.rename(path)
    directory = os.open(path.parent, os.O_RDONLY | os.O_DIRECTORY)
    try:
        os.fsync(directory)
    finally:
        os.close(directory)
