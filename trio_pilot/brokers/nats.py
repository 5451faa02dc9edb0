"""NATS JetStream: a queue is a stream with one subject, and a consumer that all clients of the queue share.

Streams and consumers have the names and settings that oms-mqclient gives them, so that either takes what the other has sent.
A stream keeps messages that were acknowledged, until it is purged or its limits are reached.

A delivery is a lease: the connection's thread renews it while the message is held, also while a task runs; once it has run
out, the message is delivered again. JetStream counts every delivery, so failures are counted by copies (`requeue`).
"""

import hashlib
import re
import secrets
import uuid
from collections.abc import AsyncIterator, Mapping
from contextlib import AbstractAsyncContextManager, asynccontextmanager, suppress
from dataclasses import replace
from functools import partial
from typing import Any
from urllib.parse import unquote

import trio

from trio_pilot.brokers import Delivery, Patience, QueueAddress, addresses, tokens
from trio_pilot.brokers.headers import MESSAGE_ID, UNNAMED, from_text, given_id, id_headers, to_text
from trio_pilot.brokers.kinds import NATS
from trio_pilot.brokers.nats_connection import NatsAddress, NatsConnection, NatsTimeouts
from trio_pilot.brokers.nats_errors import GoneError, RefusedError
from trio_pilot.brokers.nats_headers import MOST_HEADERS, copied, size_of
from trio_pilot.brokers.nats_listener import NatsListener
from trio_pilot.brokers.nats_messages import ACK, NAK, TERM, HeldMessages, NatsMessage, StreamPosition
from trio_pilot.brokers.prefetch import PrefetchConsumer
from trio_pilot.brokers.reconnecting import LostError, ReconnectingQueue, TooLargeError, opened
from trio_pilot.brokers.requeue import RequeueingSource
from trio_pilot.brokers.thread_bridge import driven
from trio_pilot.errors import BrokerError, DeliveryLostError, DeliveryReplacedError, PublishRefusedError, SettingsError
from trio_pilot.log import LOGGER

CONSUMER = "psub"  # the name that oms-mqclient gives to the consumer of every stream

# JetStream drops a message with an id that it has seen in the last two minutes. So the id is that of one `send`, which may
# send its message twice; the outputs of two events may well have the same message id.
ONCE = "Nats-Msg-Id"

TIMEOUTS = NatsTimeouts()


def open_source(
    address: QueueAddress, patience: Patience, timeouts: NatsTimeouts = TIMEOUTS
) -> AbstractAsyncContextManager["NatsSource"]:
    """Open an incoming queue; it connects in the background."""
    return opened(partial(NatsSource, address, patience, timeouts))


def open_sink(
    address: QueueAddress, patience: Patience, timeouts: NatsTimeouts = TIMEOUTS
) -> AbstractAsyncContextManager["NatsSink"]:
    """Open an outgoing queue; it connects in the background."""
    return opened(partial(NatsSink, address, patience, timeouts))


class NatsQueue(ReconnectingQueue[NatsConnection]):
    """A queue, and the connection to it while there is one."""

    def __init__(self, address: QueueAddress, patience: Patience, timeouts: NatsTimeouts) -> None:
        self._address = parse_address(address)
        self._token = address.token
        self._timeouts = timeouts
        self.place = place_of(address.queue)
        super().__init__(address, f"NATS at {self._address.host}", patience, timeouts)

    @asynccontextmanager
    async def connect(self, threads: trio.Nursery) -> AsyncIterator[NatsConnection]:
        """Connect, and find the stream."""
        secret = await tokens.current(self._token) or self._address.secret
        async with driven(NatsConnection(replace(self._address, secret=secret), self._timeouts), threads) as connection:
            await self._find(connection)
            yield connection

    async def _find(self, connection: NatsConnection) -> None:
        try:
            await connection.find_stream(self.place)
        except RefusedError as error:
            LOGGER.info("%s refuses to make the stream %s, which may exist (%s)", self.broker, self.place.stream, error)


class NatsSource(NatsQueue, RequeueingSource[NatsConnection, NatsMessage]):
    """An incoming queue.

    `settle` returns once the server has settled the delivery; a lost connection is waited out. If it is cancelled meanwhile,
    the delivery is settled when the connection is back. Of a lease that has run out only an ACK is sent: it keeps the event
    from coming again, if that has not happened yet.
    """

    refusals = (RefusedError, TooLargeError)

    def __init__(self, address: QueueAddress, patience: Patience, timeouts: NatsTimeouts) -> None:
        super().__init__(address, patience, timeouts)
        self.hold = HeldMessages()
        self.lease = 0.0  # seconds; known once connected
        self._has_left = False  # there will be no other connection
        self._secret = secrets.token_bytes()

    @asynccontextmanager
    async def connect(self, threads: trio.Nursery) -> AsyncIterator[NatsConnection]:
        """Connect, and renew the leases of held messages; when cancelled, release them."""
        async with super().connect(threads) as connection:
            self.lease = await connection.find_consumer(self.place)
            connection.renew(self.hold, self.lease)
            try:
                yield connection
            except trio.Cancelled:
                self._has_left = True
                connection.give_back_at_close(self.place, self.hold)
                raise

    def new_consumer(self, prefetch: int, lease: float) -> "NatsConsumer":  # noqa: ARG002
        """Make a consumer. Leases are renewed for as long as they are needed."""
        return NatsConsumer(self, prefetch)

    def delivery(self, message: NatsMessage) -> Delivery:
        """Make the delivery of a message. One without an id is known by its place in its stream."""
        facts = from_text(message.headers)
        given = given_id(facts, MESSAGE_ID, ONCE)
        message_id = given or f"{self.place.stream}.{message.sequence}"
        return Delivery(
            self,
            self.name,
            message.body,
            message_id=message_id,
            attempt=self.attempt_of(facts, message_id, message.body),
            tag=message,
            redelivered=message.redelivered,
            named=given is not None and not facts.get(UNNAMED),
            headers=facts,
            origin=(message.sequence, message.stored),
            is_unique=True,
        )

    async def ack(self, message: NatsMessage) -> None:
        """Acknowledge a message."""
        await self._answer(message, ACK)

    async def nack(self, message: NatsMessage) -> None:
        """Return a message to its queue."""
        await self._answer(message, NAK)

    async def ack_original(self, delivery: Delivery) -> None:
        """Drop a message whose copy is stored."""
        await self._answer(delivery.tag, TERM)

    async def _answer(self, message: NatsMessage, answer: bytes) -> None:
        """Answer a delivery, on each new connection again."""
        try:
            while not (was_lost := message.is_lost) or answer is not NAK:
                if self._has_left:
                    message.late_answer = answer  # sent by the connection, as it closes
                    raise DeliveryLostError(f"message {message.sequence} of {self.place.stream} was given back at the end")
                connection = await self.connected()
                try:
                    await connection.settle(self.place, message, answer)
                    break
                except GoneError:
                    raise
                except LostError:
                    await self.after(connection)
        except trio.Cancelled:
            message.late_answer = answer
            raise
        if was_lost:
            raise (DeliveryReplacedError if answer is TERM else DeliveryLostError)(self._too_late(message))

    def _too_late(self, message: NatsMessage) -> str:
        return f"the lease of message {message.sequence} of {self.place.stream} has run out"

    async def send_copy(self, delivery: Delivery, queue: str, facts: Mapping[str, Any]) -> None:
        """Send a copy of an event, confirmed; stored once only, however many attempts it takes."""
        message: NatsMessage = delivery.tag
        ours = {**facts, **id_headers(delivery.message_id, delivery)}
        once = {ONCE: self._name_of_copy(message, delivery.attempt)}
        while not message.is_lost:
            connection = await self.connected()
            room = connection.client.max_payload - len(delivery.body) - size_of(once)
            headers = copied(message.headers, ours, room, delivery.message_id) | once
            try:
                return await _publish(place_of(queue), delivery.body, headers, connection)
            except LostError:
                await self.after(connection)
        raise DeliveryLostError(self._too_late(message))

    def _name_of_copy(self, message: NatsMessage, attempt: int) -> str:
        """Return a name that is the same for each copy of one attempt, and that no sender can foresee and use before."""
        what = f"{self.place.stream}.{message.sequence}.{message.stored.timestamp()}.{attempt}"
        return hashlib.blake2b(what.encode(), key=self._secret, digest_size=16).hexdigest()

    def forget(self, message: NatsMessage) -> None:
        """Hold a message no longer, unless it is still to be settled."""
        if not message.late_answer:
            self.hold.drop(message)
        message.body = b""  # a settled delivery may be remembered for long
        self.refill()

    async def give_back(self, message: NatsMessage) -> None:
        """Release a message that was not taken: now, or once there is a connection."""
        message.settled = True
        try:
            if connection := self._session.value:
                with suppress(LostError):
                    await connection.settle(self.place, message, NAK)
                    self.hold.drop(message)
        finally:
            message.late_answer = NAK  # sent if it is still held


class NatsConsumer(PrefetchConsumer):
    """Holds what was sent ahead."""

    def __init__(self, source: NatsSource, prefetch: int) -> None:
        super().__init__(source.has_lost)
        self._source = source
        self._prefetch = prefetch
        self._listener: NatsListener | None = None

    async def is_idle(self) -> bool:
        """Ask the server for an answer: what it has sent before the answer has arrived before it."""
        if self._listener is None:
            return False
        with suppress(LostError):
            await self._listener.ask()
            return not self._arrived
        return False

    async def listen(self, connection: NatsConnection) -> None:
        """Start to receive messages, as many as may be held."""
        source = self._source
        self._listener = NatsListener(connection, source.place, self._most, source.hold, source.lease)
        try:
            await self._listener.start(self._on_arrival)
            self._note_listening(is_so=True)
        except LostError:
            connection.hang_up()

    def refill(self) -> None:
        """Ask for more messages, where fewer are held now."""
        if self._listener:
            self._listener.refill()

    def lost(self) -> None:
        """Stop listening. Messages that have arrived are still held."""
        self._listener = None
        self._note_listening(is_so=False)

    async def stop(self) -> None:
        """Receive no more messages, and release those that were not taken."""
        if self._listener:
            with suppress(LostError):
                await self._listener.stop()
        while self._arrived:
            await self._source.give_back(self._arrived.popleft().tag)

    def _most(self) -> int:
        """Return how many messages may be held. Called in the connection's thread."""
        return int(self._prefetch + self._source.held_back.value)

    def _on_arrival(self, message: NatsMessage) -> None:
        self._note_arrival(self._source.delivery(message))


class NatsSink(NatsQueue):
    """An outgoing queue. Any number of messages may wait for their confirms at once."""

    async def send(self, body: bytes, message_id: str, original: Delivery | None = None) -> None:
        """Send a message, on each new connection again until it is confirmed; stored once only."""
        headers = {**to_text({MESSAGE_ID: message_id}), ONCE: uuid.uuid4().hex}
        if original:
            ours = id_headers(message_id, original)
            headers |= copied(original.tag.headers, ours, MOST_HEADERS, message_id)
        try:
            await self.until_done(partial(_publish, self.place, body, headers))
        except TooLargeError as error:
            raise PublishRefusedError(f"NATS refuses an output of {len(body)} bytes: {error}") from error
        except RefusedError as error:
            raise BrokerError(f"{self.broker} refuses the pilot: {error}") from error


async def _publish(place: StreamPosition, body: bytes, headers: Mapping[str, str], connection: NatsConnection) -> None:
    """Publish a message to a stream, which is made where it does not exist."""
    try:
        await connection.publish(place.subject, body, headers)
    except GoneError:
        await connection.find_stream(place)
        await connection.publish(place.subject, body, headers)


def place_of(queue: str) -> StreamPosition:
    """Return the names of the parts of a queue, as oms-mqclient makes them, but without the dots that no stream may have.

    Raises:
        SettingsError: there can be no such subject.
    """
    if not queue or re.search(r"[\s*>/\\\x00-\x1f]|^\.|\.$|\.\.", queue):
        raise SettingsError(
            f"NATS can have no queue {queue!r}: its name must be without spaces, *, > and /, and no empty part"
        )
    return StreamPosition(f"{queue.replace('.', '_')}-stream", f"{queue}-subject", CONSUMER)


def parse_address(address: QueueAddress) -> NatsAddress:
    """Read `[nats://|tls://][USER:PASS@|TOKEN@]HOST[:PORT]`; a separate token replaces the secret.

    Raises:
        SettingsError: the address is not of that form.
    """
    parts, host, port = addresses.split(address.address, NATS, _wrong_address)
    if parts.path.strip("/"):
        raise _wrong_address("a path")
    user, secret = unquote(parts.username or ""), unquote(parts.password or "")
    if user and not secret and not address.token:
        user, secret = "", user
    return NatsAddress(host, port, user, address.token or secret, parts.scheme == "tls")


def _wrong_address(found: str) -> SettingsError:
    return SettingsError(f"a NATS address must be [nats|tls://][USER:PASS@|TOKEN@]HOST[:PORT], but has {found}")
