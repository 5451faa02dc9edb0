"""A broker in memory: an exercise in what it takes for a new broker to pass the contract."""

from collections import defaultdict, deque
from collections.abc import AsyncIterator
from contextlib import AbstractContextManager, asynccontextmanager, nullcontext
from dataclasses import replace

import trio

from trio_pilot.brokers import Delivery, Settlement, dead_letter_queue, dead_letters
from trio_pilot.errors import DeliveryLostError


class Toy:
    counts_losses = False
    keeps_unsent = False

    def __init__(self) -> None:
        self.queues: defaultdict[str, deque[Delivery]] = defaultdict(deque)
        self.changed = trio.Event()

    def put(self, queue: str, delivery: Delivery) -> None:
        self.queues[queue].append(delivery)
        self.changed.set()
        self.changed = trio.Event()

    @asynccontextmanager
    async def source(self, queue: str) -> AsyncIterator["ToyQueue"]:
        source = ToyQueue(self, queue)
        yield source
        for delivery in source.unsettled.values():
            self.put(queue, replace(delivery, redelivered=True))

    @asynccontextmanager
    async def sink(self, queue: str) -> AsyncIterator["ToyQueue"]:
        yield ToyQueue(self, queue)

    def dead_letters(self, queue: str) -> list[tuple[bytes, str, str]]:
        found = self.queues[dead_letter_queue(queue)]
        return [(one.body, one.message_id, one.headers["x-trio-pilot-reason"]) for one in found]


class ToyQueue:
    """A source, its consumer, and a sink."""

    def __init__(self, broker: Toy, name: str) -> None:
        self.listening_since = trio.current_time()
        self.unsettled: dict[object, Delivery] = {}
        self._broker, self._name, self._ready = broker, name, broker.queues[name]

    async def ready(self) -> None:
        await trio.lowlevel.checkpoint()

    async def send(self, body: bytes, message_id: str, original: Delivery | None = None) -> None:  # noqa: ARG002
        await trio.lowlevel.checkpoint()
        self._broker.put(self._name, Delivery(self, self._name, body, message_id, 1, None))

    @asynccontextmanager
    async def consume(self, prefetch: int, lease: float = 0) -> AsyncIterator["ToyQueue"]:  # noqa: ARG002
        yield self

    async def take(self) -> Delivery | None:
        await trio.lowlevel.checkpoint()
        if not self._ready:
            return None
        delivery = replace(self._ready.popleft(), source=self, queue=self._name, tag=object())
        self.unsettled[delivery.tag] = delivery
        return delivery

    async def wait(self) -> None:
        await trio.lowlevel.checkpoint()
        if not self._ready:
            await self._broker.changed.wait()

    async def is_idle(self) -> bool:
        await trio.lowlevel.checkpoint()
        return not self._ready

    def has_lost(self, delivery: Delivery) -> bool:
        return delivery.tag not in self.unsettled

    def held(self, delivery: Delivery) -> AbstractContextManager[None]:  # noqa: ARG002
        return nullcontext()

    async def settle(self, delivery: Delivery, settlement: Settlement, reason: str = "", error: str = "") -> None:
        await trio.lowlevel.checkpoint()
        if self.unsettled.pop(delivery.tag, None) is None:
            raise DeliveryLostError(f"the event {delivery.message_id} was settled before")
        match settlement:
            case Settlement.RELEASE | Settlement.REJECT:
                attempt = delivery.attempt + (settlement is Settlement.REJECT)
                self._broker.put(self._name, replace(delivery, attempt=attempt, redelivered=True))
            case Settlement.DEAD_LETTER:
                headers = dead_letters.headers(dead_letters.facts(delivery, reason, error))
                self._broker.put(dead_letter_queue(self._name), replace(delivery, headers=headers))
