"""NATS JetStream: a queue is a stream with one subject, and a consumer that all who take from it share.

They are named as oms-mqclient names them, and made as it makes them, so that each takes what the other has sent. A stream
keeps what was acknowledged, until somebody purges it or its limits are reached.

A delivery is a lease: of what is held, the connection's thread renews it, also while a task runs; once it has run out, the
message is delivered again. As JetStream counts every delivery, whatever came of it, an event that failed is sent anew, with
the number of its failures in a header, before the one that was delivered is dropped: so no other delivery is counted.
"""

import re
import uuid
from collections.abc import AsyncIterator, Iterator, Mapping
from contextlib import AbstractAsyncContextManager, asynccontextmanager, contextmanager, suppress
from dataclasses import replace
from typing import Any
from urllib.parse import unquote

import trio

from trio_pilot.brokers import (
    LONGEST_LEASE,
    Delivery,
    Patience,
    QueueAddress,
    Settlement,
    addresses,
    dead_letter_queue,
    dead_letters,
    tokens,
)
from trio_pilot.brokers.headers import FAILURES, MESSAGE_ID, attempt, read, said
from trio_pilot.brokers.nats_connection import (
    ACK,
    NAK,
    TERM,
    GoneError,
    HeldMessages,
    NatsAddress,
    NatsConnection,
    NatsListener,
    NatsMessage,
    RefusedError,
    StreamPosition,
    TooLargeError,
)
from trio_pilot.brokers.prefetch import PrefetchConsumer
from trio_pilot.brokers.reconnecting import LostError, ReconnectingQueue, opened
from trio_pilot.brokers.thread_bridge import driven
from trio_pilot.errors import (
    BrokerError,
    DeliveryLostError,
    DeliveryReplacedError,
    PublishRefusedError,
    SettingsError,
)
from trio_pilot.log import LOGGER

STOP_TIMEOUT = 5.0  # seconds to give back what was sent ahead; else its lease runs out
PORT = 4222
SCHEMES = ("nats", "tls")

CONSUMER = "psub"  # oms-mqclient's, of every stream

# JetStream drops a message with an id that it has seen in the last two minutes. That id is of one `send`, whose message may
# be sent twice; two events may well have outputs with the same message id.
ONCE = "Nats-Msg-Id"
INSTRUCTION = "nats-"  # how headers begin that tell the server what to do with a message


def open_source(address: QueueAddress, patience: Patience) -> AbstractAsyncContextManager["NatsSource"]:
    """Open an incoming queue; it connects in the background."""
    return opened(NatsSource, address, patience)


def open_sink(address: QueueAddress, patience: Patience) -> AbstractAsyncContextManager["NatsSink"]:
    """Open an outgoing queue; it connects in the background."""
    return opened(NatsSink, address, patience)


class NatsQueue(ReconnectingQueue[NatsConnection]):
    """A queue, and the connection to it while there is one."""

    def __init__(self, address: QueueAddress, patience: Patience) -> None:
        self._address = parse_address(address)
        self._token = address.token
        self.place = place_of(address.queue)
        super().__init__(address.queue, f"NATS at {self._address.host}", patience)

    @asynccontextmanager
    async def connect(self, threads: trio.Nursery) -> AsyncIterator[NatsConnection]:
        """Connect, to a stream that is there."""
        secret = await tokens.current(self._token) or self._address.secret
        async with driven(NatsConnection(replace(self._address, secret=secret)), threads) as connection:
            await self._find(connection)
            yield connection

    async def _find(self, connection: NatsConnection) -> None:
        try:
            await connection.find_stream(self.place)
        except RefusedError as error:
            LOGGER.info("%s lets us make no stream: %s is there, or not (%s)", self.broker, self.place.stream, error)


class NatsSource(NatsQueue):
    """An incoming queue."""

    def __init__(self, address: QueueAddress, patience: Patience) -> None:
        super().__init__(address, patience)
        self.hold = HeldMessages()
        self.lease = 0.0  # seconds; known once connected
        self._directory = address.dead_letters
        self._consumer: NatsConsumer | None = None
        self._has_left = False  # there will be no other connection

    @asynccontextmanager
    async def connect(self, threads: trio.Nursery) -> AsyncIterator[NatsConnection]:
        """Connect, and renew the leases of what is held; when told to end, give it back."""
        async with super().connect(threads) as connection:
            self.lease = await connection.find_consumer(self.place)
            connection.renew(self.hold, self.lease)
            try:
                yield connection
            except trio.Cancelled:
                self._has_left = True
                connection.leave(self.place, self.hold)
                raise

    @asynccontextmanager
    async def consume(self, prefetch: int, lease: float = LONGEST_LEASE) -> AsyncIterator["NatsConsumer"]:  # noqa: ARG002
        """Listen to the queue, on each new connection anew. A lease lasts as long as we renew it."""
        consumer = self._consumer = NatsConsumer(self)
        async with trio.open_nursery() as nursery:
            nursery.start_soon(self._keep_listening, consumer, prefetch)
            try:
                yield consumer
            finally:
                nursery.cancel_scope.cancel()
                self._consumer = None
                with trio.move_on_after(STOP_TIMEOUT, shield=True):
                    await consumer.stop()

    async def _keep_listening(self, consumer: "NatsConsumer", prefetch: int) -> None:
        while True:
            connection = await self.connected()
            try:
                await consumer.listen(NatsListener(connection, self.place, prefetch, self.hold, self.lease))
            except LostError:
                connection.hang_up()
            await self.gone(connection)
            consumer.lost()

    @contextmanager
    def held(self, delivery: Delivery) -> Iterator[None]:  # noqa: ARG002 -- one is like another
        """Have one more delivery sent for one that is held back."""
        self.hold.aside += 1
        self._refill()
        try:
            yield
        finally:
            self.hold.aside -= 1

    def has_lost(self, delivery: Delivery) -> bool:
        """Tell whether the lease has run out, or the event has come again."""
        return bool(delivery.tag.is_lost)

    async def settle(self, delivery: Delivery, settlement: Settlement, reason: str = "", error: str = "") -> None:
        """Settle a delivery, and return once the server has done so; a lost connection is waited out.

        Cancelled meanwhile, it is settled when the connection is back. Of a lease that has run out only an ACK is sent: it
        keeps the event from coming again, if that has not happened yet.
        """
        await trio.lowlevel.checkpoint_if_cancelled()
        arrival: NatsMessage = delivery.tag
        if arrival.settled:
            raise DeliveryLostError(f"the event {delivery.message_id} was settled before")
        arrival.settled = True
        try:
            match settlement:
                case Settlement.ACK:
                    await self._answer(arrival, ACK)
                case Settlement.RELEASE:
                    await self._answer(arrival, NAK)
                case Settlement.REJECT:
                    await self._send_anew(delivery)
                case Settlement.DEAD_LETTER:
                    await self._set_aside(delivery, dead_letters.facts(delivery, reason, error))
        except GoneError as gone:
            raise DeliveryLostError(f"NATS knows nothing of the event {delivery.message_id} any more: {gone}") from gone
        finally:
            self._let_go(arrival)

    def _let_go(self, arrival: NatsMessage) -> None:
        if not arrival.late_answer:
            self.hold.drop(arrival)
        arrival.body = b""  # who remembers that it was settled is not to hold what was in it
        self._refill()

    def _refill(self) -> None:
        if self._consumer:
            self._consumer.refill()

    async def _answer(self, arrival: NatsMessage, answer: bytes) -> None:
        """Answer a delivery, on each new connection anew."""
        try:
            while not (was_lost := arrival.is_lost) or answer is not NAK:
                if self._has_left:
                    arrival.late_answer = answer  # by the connection, as it closes
                    raise DeliveryLostError(f"message {arrival.sequence} of {self.place.stream} was given back at the end")
                connection = await self.connected()
                try:
                    await connection.settle(self.place, arrival, answer)
                    break
                except GoneError:
                    raise
                except LostError:
                    await self._after(connection)
        except trio.Cancelled:
            arrival.late_answer = answer
            raise
        if was_lost:
            raise (DeliveryReplacedError if answer is TERM else DeliveryLostError)(self._too_late(arrival))

    def _too_late(self, arrival: NatsMessage) -> str:
        return f"the lease of message {arrival.sequence} of {self.place.stream} has run out"

    async def give_back(self, arrival: NatsMessage) -> None:
        """Give an arrival back that nobody has taken: now, or once there is a connection."""
        arrival.settled = True
        try:
            if connection := self._session.value:
                with suppress(LostError):
                    await connection.settle(self.place, arrival, NAK)
                    self.hold.drop(arrival)
        finally:
            arrival.late_answer = NAK  # of what is still held

    async def _send_anew(self, delivery: Delivery) -> None:
        """Put an event that failed at the end of its queue, counted, and drop the delivery."""
        try:
            await self._copy(delivery, self.place, {FAILURES: delivery.attempt})
        except (RefusedError, TooLargeError) as error:
            LOGGER.warning("the event %s goes back without its count: %s", delivery.message_id, error)
            await self._answer(delivery.tag, NAK)
        else:
            await self._answer(delivery.tag, TERM)

    async def _set_aside(self, delivery: Delivery, facts: dead_letters.Facts) -> None:
        """Move an event to the dead letters: to their queue, else to their directory, else it stays."""
        try:
            await self._copy(delivery, place_of(dead_letter_queue(self.name)), dead_letters.headers(facts))
        except (RefusedError, TooLargeError) as why:
            if not await dead_letters.write_aside(self._directory, delivery, facts, why):
                await self._send_anew(delivery)
                return
        await self._answer(delivery.tag, TERM)

    async def _copy(self, delivery: Delivery, place: StreamPosition, facts: Mapping[str, Any]) -> None:
        """Send a copy of an event, confirmed; once only, however often it takes."""
        arrival: NatsMessage = delivery.tag
        kept = {name: value for name, value in arrival.headers.items() if not name.lower().startswith(INSTRUCTION)}
        facts = {**facts, MESSAGE_ID: delivery.message_id}
        once = f"{self.place.stream}.{arrival.sequence}.{delivery.attempt}"
        while not arrival.is_lost:
            connection = await self.connected()
            try:
                return await _publish(connection, place, delivery.body, {**kept, **said(facts), ONCE: once})
            except LostError:
                await self._after(connection)
        raise DeliveryLostError(self._too_late(arrival))


class NatsConsumer(PrefetchConsumer):
    """Holds what was sent ahead."""

    def __init__(self, source: NatsSource) -> None:
        super().__init__(source.has_lost)
        self._source = source
        self._listener: NatsListener | None = None

    async def is_idle(self) -> bool:
        """Ask the server: what it has sent before it answers has arrived before the answer."""
        if self._listener is None:
            return False
        with suppress(LostError):
            await self._listener.ask()
            return not self._arrived
        return False

    async def listen(self, listener: NatsListener) -> None:
        """Have messages sent, as many as may be held."""
        self._listener = listener
        await listener.start(self._on_arrival)
        self._note_listening(is_so=True)

    def refill(self) -> None:
        """Have more sent, where less is held by now."""
        if self._listener:
            self._listener.refill()

    def lost(self) -> None:
        """Stop listening. What has arrived is still ours."""
        self._listener = None
        self._note_listening(is_so=False)

    async def stop(self) -> None:
        """Have no more sent, and give back what was not taken."""
        if self._listener:
            with suppress(LostError):
                await self._listener.stop()
        while self._arrived:
            await self._source.give_back(self._arrived.popleft().tag)

    def _on_arrival(self, arrival: NatsMessage) -> None:
        self._note_arrival(self._delivery(arrival))

    def _delivery(self, arrival: NatsMessage) -> Delivery:
        source, facts = self._source, read(arrival.headers)
        return Delivery(
            source,
            source.name,
            arrival.body,
            # Of a message without an id the place in its stream is as good as one.
            message_id=str(facts.get(MESSAGE_ID) or facts.get(ONCE) or f"{source.place.stream}.{arrival.sequence}"),
            attempt=attempt(facts),
            tag=arrival,
            redelivered=arrival.redelivered,
            headers=facts,
        )


class NatsSink(NatsQueue):
    """An outgoing queue. Any number of messages may be waiting for their confirms at once."""

    async def send(self, body: bytes, message_id: str) -> None:
        """Send a message, on each new connection anew until it is confirmed; once only, however often it takes."""
        headers = {**said({MESSAGE_ID: message_id}), ONCE: uuid.uuid4().hex}
        while True:
            connection = await self.connected()
            try:
                await _publish(connection, self.place, body, headers)
            except TooLargeError as error:
                raise PublishRefusedError(f"NATS refuses an output of {len(body)} bytes: {error}") from error
            except RefusedError as error:
                raise BrokerError(f"{self.broker} refuses us: {error}") from error
            except LostError:
                await self._after(connection)
            else:
                return


async def _publish(connection: NatsConnection, place: StreamPosition, body: bytes, headers: Mapping[str, str]) -> None:
    """Publish a message to a stream; one that is not there is made."""
    try:
        await connection.publish(place.subject, body, headers)
    except GoneError:
        await connection.find_stream(place)
        await connection.publish(place.subject, body, headers)


def place_of(queue: str) -> StreamPosition:
    """Name the parts of a queue as oms-mqclient does; it has no names with a dot, which no stream may have.

    Raises:
        SettingsError: there can be no such subject.
    """
    if not queue or re.search(r"[\s*>/\\\x00-\x1f]|^\.|\.$|\.\.", queue):
        raise SettingsError(
            f"NATS can have no queue {queue!r}: its name must be without spaces, *, > and /, and no empty part"
        )
    return StreamPosition(f"{queue.replace('.', '_')}-stream", f"{queue}-subject", CONSUMER)


def parse_address(address: QueueAddress) -> NatsAddress:
    """Read `[nats://|tls://][USER:PASS@|TOKEN@]HOST[:PORT]`; the token that is given apart replaces the secret.

    Raises:
        SettingsError: it is not of that form.
    """
    parts, host, port = addresses.split(address.address, SCHEMES, _wrong_address)
    if parts.path.strip("/"):
        raise _wrong_address("a path")
    user, secret = unquote(parts.username or ""), unquote(parts.password or "")
    if user and not secret and not address.token:
        user, secret = "", user
    return NatsAddress(host, port or PORT, user, address.token or secret, parts.scheme == "tls")


def _wrong_address(found: str) -> SettingsError:
    return SettingsError(f"a NATS address must be [nats|tls://][USER:PASS@|TOKEN@]HOST[:PORT], but has {found}")
