"""Sources of brokers that count failures by copies.

RabbitMQ, NATS and Pulsar count deliveries, whatever came of them: by such a count, a failure cannot be told from an eviction
or a lost connection. So an event that failed goes back as a copy of itself, to the end of its queue, with the number of its
failures in a header. The original is acknowledged once the copy is confirmed: an event may come twice, but is never lost.
"""

import hashlib
from collections import OrderedDict
from collections.abc import AsyncIterator, Iterator, Mapping
from contextlib import asynccontextmanager, contextmanager
from typing import Any, ClassVar, Generic, Protocol, TypeVar

import trio
from trio_util import AsyncValue

from trio_pilot.brokers import (
    LONGEST_LEASE,
    Consumer,
    Delivery,
    Patience,
    QueueAddress,
    Settlement,
    dead_letter_queue,
    dead_letters,
)
from trio_pilot.brokers.headers import FAILURES, attempt_of
from trio_pilot.brokers.reconnecting import LostError, ReconnectingQueue, Session, Timeouts, TooLargeError
from trio_pilot.errors import DeliveryLostError, DeliveryReplacedError, NotSetAsideError
from trio_pilot.log import LOGGER

MOST_UNCOUNTED = 1000  # events to remember whose failures no copy can tell
STOP_TIMEOUT = 5.0  # seconds to release what was sent ahead; else the broker takes it back, at the latest after its lease


class ReceivedMessage(Protocol):
    """A message as a broker delivered it; the tag of its delivery."""

    settled: bool

    @property
    def is_lost(self) -> bool:
        """Whether the broker is known to have taken it back."""


C = TypeVar("C", contravariant=True)


class SessionConsumer(Consumer, Protocol[C]):
    """A consumer that receives messages by one session after the other."""

    async def listen(self, session: C) -> None:
        """Receive messages by a session, as many as may be held. It may return before the session ends."""

    def lost(self) -> None:
        """Note that the session has ended."""

    async def stop(self) -> None:
        """Receive no more messages, and release those that were not taken."""

    def refill(self) -> None:
        """Ask for more messages where fewer are held now."""


S = TypeVar("S", bound=Session)
M = TypeVar("M", bound=ReceivedMessage)


class RequeueingSource(ReconnectingQueue[S], Generic[S, M]):
    """An incoming queue of a broker that counts failures by copies.

    A subclass makes consumers and deliveries, and has the actions `ack`, `nack` and `send_copy`, which raise LostError where
    the broker has taken a message back.
    """

    refusals: ClassVar[tuple[type[Exception], ...]]  # errors of `send_copy` that leave the original where it is

    def __init__(self, address: QueueAddress, broker: str, patience: Patience, timeouts: Timeouts) -> None:
        super().__init__(address, broker, patience, timeouts)
        self.held_back = AsyncValue(0)  # deliveries that do not count towards the prefetch
        self._directory = address.dead_letters
        self._uncounted: OrderedDict[tuple[str, bytes], int] = OrderedDict()  # failures of events too large for a copy
        self._consumer: SessionConsumer[S] | None = None

    def new_consumer(self, prefetch: int, lease: float) -> SessionConsumer[S]:
        """Make a consumer."""
        raise NotImplementedError

    def delivery(self, message: M) -> Delivery:
        """Make the delivery of a message."""
        raise NotImplementedError

    def attempt_of(self, headers: Mapping[str, Any], message_id: str, body: bytes) -> int:
        """Return the number of this attempt at an event, from 1."""
        known = self._uncounted.get(_key(message_id, body), 0) if self._uncounted else 0
        return max(attempt_of(headers), known + 1)

    async def ack(self, message: M) -> None:
        """Acknowledge a message."""
        raise NotImplementedError

    async def nack(self, message: M) -> None:
        """Return a message to its queue as it is."""
        raise NotImplementedError

    async def send_copy(self, delivery: Delivery, queue: str, facts: Mapping[str, Any]) -> None:
        """Send a copy of a message to a queue, with some headers added, and wait until it is confirmed."""
        raise NotImplementedError

    def forget(self, message: M) -> None:
        """Let go of a message after `settle`, however that ended."""
        raise NotImplementedError

    def begin_settling(self, delivery: Delivery) -> None:
        """Mark a delivery as settled.

        Raises:
            DeliveryLostError: it was settled before.
        """
        if delivery.tag.settled:
            raise DeliveryLostError(f"the event {delivery.message_id} was settled before")
        delivery.tag.settled = True

    def undo_settling(self, delivery: Delivery) -> None:
        """Mark a delivery as one that is still to be settled."""
        delivery.tag.settled = False

    async def release(self, delivery: Delivery) -> None:
        """Return an event to its queue, uncounted."""
        await self.nack(delivery.tag)

    async def ack_original(self, delivery: Delivery) -> None:
        """Acknowledge a delivery whose copy is stored.

        Raises:
            DeliveryReplacedError: the broker has taken it back.
        """
        try:
            await self.ack(delivery.tag)
        except LostError as lost:
            raise DeliveryReplacedError(
                f"{self.broker} has taken back the event {delivery.message_id}, of which it has a copy: {lost}"
            ) from lost

    def check_refusal(self, delivery: Delivery, refusal: Exception) -> None:
        """Raise LostError if a copy was not refused, but could not be sent as the broker has taken the original back."""

    @asynccontextmanager
    async def consume(self, prefetch: int, lease: float = LONGEST_LEASE) -> AsyncIterator[SessionConsumer[S]]:
        """Listen to the queue, on each new connection again."""
        consumer = self._consumer = self.new_consumer(prefetch, lease)
        async with trio.open_nursery() as nursery:
            nursery.start_soon(self._keep_listening, consumer)
            try:
                yield consumer
            finally:
                nursery.cancel_scope.cancel()
                self._consumer = None
                with trio.move_on_after(STOP_TIMEOUT, shield=True):
                    await consumer.stop()

    async def _keep_listening(self, consumer: SessionConsumer[S]) -> None:
        while True:
            session = await self.connected()
            await consumer.listen(session)
            await self.gone(session)
            consumer.lost()

    @contextmanager
    def held(self, delivery: Delivery) -> Iterator[None]:  # noqa: ARG002 -- one delivery is like another
        """Receive one more delivery in place of one that is held back."""
        self.held_back.value += 1
        self.refill()
        try:
            yield
        finally:
            self.held_back.value -= 1

    def refill(self) -> None:
        """Ask for more messages where fewer are held now."""
        if self._consumer:
            self._consumer.refill()

    def has_lost(self, delivery: Delivery) -> bool:
        """Return whether the broker is known to have taken a delivery back."""
        return bool(delivery.tag.is_lost)

    async def settle(self, delivery: Delivery, settlement: Settlement, reason: str = "", error: str = "") -> None:
        """Settle a delivery; a copy, where there is one, is confirmed before the original is acknowledged."""
        await trio.lowlevel.checkpoint_if_cancelled()
        self.begin_settling(delivery)
        try:
            match settlement:
                case Settlement.ACK:
                    await self.ack(delivery.tag)
                case Settlement.RELEASE:
                    await self.release(delivery)
                case Settlement.REJECT:
                    await self.requeue(delivery, delivery.attempt)
                case Settlement.DEAD_LETTER:
                    await self._set_aside(delivery, dead_letters.facts(delivery, reason, error))
        except LostError as lost:
            raise DeliveryLostError(f"{self.broker} has taken the event {delivery.message_id} back: {lost}") from lost
        except NotSetAsideError:
            self.undo_settling(delivery)
            raise
        finally:
            if delivery.tag.settled:
                self.forget(delivery.tag)

    async def requeue(self, delivery: Delivery, failures: int) -> None:
        """Send an event to the end of its queue with a number of failures; without the number where that is refused."""
        try:
            await self.send_copy(delivery, self.name, {FAILURES: failures})
        except self.refusals as error:
            LOGGER.warning("event %s goes back without its count: cannot send a copy (%s)", delivery.message_id, error)
            if isinstance(error, TooLargeError):  # as will be each other copy: else it would be tried without end
                self._uncounted[_key(delivery.message_id, delivery.body)] = failures
                if len(self._uncounted) > MOST_UNCOUNTED:
                    self._uncounted.popitem(last=False)
            await self.nack(delivery.tag)
        else:
            await self.ack_original(delivery)

    async def _set_aside(self, delivery: Delivery, facts: dead_letters.Facts) -> None:
        """Move an event to its dead letters: to their queue, else to their directory."""
        try:
            await self.send_copy(delivery, dead_letter_queue(self.name), dead_letters.headers(facts))
        except self.refusals as error:
            self.check_refusal(delivery, error)
            await dead_letters.write_aside(self._directory, delivery, facts, error)
        await self.ack_original(delivery)


def _key(message_id: str, body: bytes) -> tuple[str, bytes]:
    return message_id, hashlib.sha256(body).digest()
