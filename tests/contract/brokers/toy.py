"""A broker in memory: an exercise in what a new broker takes to pass the contract."""

import math
from collections import defaultdict, deque
from collections.abc import AsyncIterator, Mapping
from contextlib import AbstractContextManager, asynccontextmanager, nullcontext
from dataclasses import dataclass, field, replace
from typing import Any

import trio

from trio_pilot.brokers import Consumer, Delivery, Settlement, Sink, Source, dead_letter_queue, dead_letters
from trio_pilot.errors import DeliveryLostError


@dataclass(frozen=True)
class Message:
    body: bytes
    message_id: str
    failures: int = 0
    redelivered: bool = False
    headers: Mapping[str, Any] = field(default_factory=dict)


class Toy:
    counts_losses = False
    keeps_unsent = False

    def __init__(self) -> None:
        self.queues: defaultdict[str, deque[Message]] = defaultdict(deque)
        self.changed = trio.Event()

    def put(self, queue: str, message: Message) -> None:
        self.queues[queue].append(message)
        self.changed.set()
        self.changed = trio.Event()

    @asynccontextmanager
    async def source(self, queue: str) -> AsyncIterator[Source]:
        source = ToySource(self, queue)
        yield source
        for message in source.unsettled.values():
            self.put(queue, replace(message, redelivered=True))

    @asynccontextmanager
    async def sink(self, queue: str) -> AsyncIterator[Sink]:
        yield ToySink(self, queue)

    def dead_letters(self, queue: str) -> list[tuple[bytes, str, str]]:
        found = self.queues[dead_letter_queue(queue)]
        return [(message.body, message.message_id, message.headers["x-trio-pilot-reason"]) for message in found]


class ToySink:
    def __init__(self, broker: Toy, queue: str) -> None:
        self._broker, self._queue = broker, queue

    async def ready(self) -> None:
        await trio.lowlevel.checkpoint()

    async def send(self, body: bytes, message_id: str) -> None:
        await trio.lowlevel.checkpoint()
        self._broker.put(self._queue, Message(body, message_id))


class ToySource:
    def __init__(self, broker: Toy, queue: str) -> None:
        self.broker, self.queue = broker, queue
        self.unsettled: dict[object, Message] = {}

    async def ready(self) -> None:
        await trio.lowlevel.checkpoint()

    @asynccontextmanager
    async def consume(self, prefetch: int, lease: float = math.inf) -> AsyncIterator[Consumer]:  # noqa: ARG002
        yield ToyConsumer(self)

    def has_lost(self, delivery: Delivery) -> bool:  # noqa: ARG002
        return False

    def held(self, delivery: Delivery) -> AbstractContextManager[None]:  # noqa: ARG002
        return nullcontext()

    async def settle(self, delivery: Delivery, settlement: Settlement, reason: str = "", error: str = "") -> None:
        await trio.lowlevel.checkpoint()
        if (message := self.unsettled.pop(delivery.tag, None)) is None:
            raise DeliveryLostError(f"the event {delivery.message_id} was settled before")
        match settlement:
            case Settlement.RELEASE:
                self.broker.put(self.queue, replace(message, redelivered=True))
            case Settlement.REJECT:
                self.broker.put(self.queue, replace(message, redelivered=True, failures=delivery.attempt))
            case Settlement.DEAD_LETTER:
                headers = dead_letters.headers(dead_letters.facts(delivery, reason, error))
                self.broker.put(dead_letter_queue(self.queue), replace(message, headers=headers))


class ToyConsumer:
    def __init__(self, source: ToySource) -> None:
        self.listening_since = trio.current_time()
        self._source, self._ready = source, source.broker.queues[source.queue]

    async def take(self) -> Delivery | None:
        await trio.lowlevel.checkpoint()
        return self._deliver(self._ready.popleft()) if self._ready else None

    def _deliver(self, message: Message) -> Delivery:
        source, tag = self._source, object()
        source.unsettled[tag] = message
        facts = source, source.queue, message.body, message.message_id, message.failures + 1, tag
        return Delivery(*facts, redelivered=message.redelivered, headers=message.headers)

    async def wait(self) -> None:
        await trio.lowlevel.checkpoint()
        if not self._ready:
            await self._source.broker.changed.wait()

    async def is_idle(self) -> bool:
        await trio.lowlevel.checkpoint()
        return not self._ready
