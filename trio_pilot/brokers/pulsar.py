"""Apache Pulsar: a queue is a topic, and a shared subscription that all who take from it have.

They are named as oms-mqclient names them, so that each takes what the other has sent. As Pulsar's own count is one of
deliveries, whatever came of them, an event that failed is sent anew, with the number of its failures as a property, before
the one that was delivered is acknowledged.
"""

import os
from collections.abc import AsyncIterator, Iterator, Mapping
from contextlib import AbstractAsyncContextManager, asynccontextmanager, contextmanager, suppress
from dataclasses import dataclass
from functools import partial
from typing import Any

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
from trio_pilot.brokers.prefetch import PrefetchConsumer
from trio_pilot.brokers.pulsar_connection import CONNECT_TIMEOUT, PulsarConnection, TooLargeError
from trio_pilot.brokers.reconnecting import ConnectError, LostError, ReconnectingQueue, opened
from trio_pilot.errors import (
    BrokerError,
    DeliveryLostError,
    DeliveryReplacedError,
    PublishRefusedError,
    SettingsError,
    first,
)
from trio_pilot.log import LOGGER

PORTS = {"pulsar": 6650, "pulsar+ssl": 6651}


def open_source(address: QueueAddress, patience: Patience) -> AbstractAsyncContextManager["PulsarSource"]:
    """Open an incoming queue; it connects in the background."""
    return opened(PulsarSource, address, patience)


def open_sink(address: QueueAddress, patience: Patience) -> AbstractAsyncContextManager["PulsarSink"]:
    """Open an outgoing queue; it connects in the background."""
    return opened(PulsarSink, address, patience)


class PulsarQueue(ReconnectingQueue[PulsarConnection]):
    """A queue, and the session with its broker while there is one."""

    def __init__(self, address: QueueAddress, patience: Patience) -> None:
        self._scheme, self._host, self._port = parse_address(address.address)
        self._token = address.token
        super().__init__(address.queue, f"Pulsar at {self._host}", patience)

    @asynccontextmanager
    async def connect(self, threads: trio.Nursery) -> AsyncIterator[PulsarConnection]:
        """Connect, to a topic that is there by then."""
        token = await tokens.current(self._token)
        await self._reach()
        session = PulsarConnection(f"{self._scheme}://{_bracketed(self._host)}:{self._port}", token)
        try:
            await self._open(session)
            threads.start_soon(session.watch)
            yield session
        finally:
            await session.close()

    async def _open(self, session: PulsarConnection) -> None:
        raise NotImplementedError

    async def _reach(self) -> None:
        """See whether anybody listens: the library would try again and again, and then say that its time is over."""
        try:
            with trio.fail_after(CONNECT_TIMEOUT):
                await (await trio.open_tcp_stream(self._host, self._port)).aclose()
        except trio.TooSlowError:
            raise ConnectError(f"there was no connection after {CONNECT_TIMEOUT:g} s") from None
        except OSError as error:
            raise ConnectError(_text(error)) from error


def _text(error: OSError) -> str:
    """Word why trio could connect to none of a host's addresses; what it says itself is long."""
    cause = first(error.__cause__ or error)
    if not isinstance(cause, OSError) or not cause.errno:
        return str(cause)
    return os.strerror(cause.errno) if cause.errno > 0 else str(cause.strerror)  # below 0: the name has no address


@dataclass(slots=True, eq=False)
class PulsarMessage:
    """A message as the broker delivers it."""

    session: PulsarConnection
    id: Any  # the library's
    headers: Mapping[str, str]
    settled: bool = False
    is_replaced: bool = False  # it has come again

    @property
    def is_lost(self) -> bool:
        """Whether the broker has it again."""
        return self.is_replaced or self.session.closed.is_told


class PulsarSource(PulsarQueue):
    """An incoming queue."""

    def __init__(self, address: QueueAddress, patience: Patience) -> None:
        super().__init__(address, patience)
        self.holding: dict[str, PulsarMessage] = {}  # what was delivered and is not settled, by its place in the topic
        self.aside = 0  # how many of them do not count towards the prefetch
        self._directory = address.dead_letters
        self._consumer: PulsarConsumer | None = None

    async def _open(self, session: PulsarConnection) -> None:
        session.consumer = await session.subscribe(self.name)

    @asynccontextmanager
    async def consume(self, prefetch: int, lease: float = LONGEST_LEASE) -> AsyncIterator["PulsarConsumer"]:  # noqa: ARG002
        """Listen to the queue, on each new connection anew. Pulsar takes nothing back while there is a connection."""
        consumer = self._consumer = PulsarConsumer(self, prefetch)
        async with trio.open_nursery() as nursery:
            nursery.start_soon(self._keep_listening, consumer)
            try:
                yield consumer
            finally:
                nursery.cancel_scope.cancel()
                self._consumer = None
                consumer.stop()

    async def _keep_listening(self, consumer: "PulsarConsumer") -> None:
        while True:
            session = await self.connected()
            consumer.listen(session)
            await self.gone(session)
            consumer.lost()

    @contextmanager
    def held(self, delivery: Delivery) -> Iterator[None]:  # noqa: ARG002 -- one is like another
        """Have one more delivery sent for one that is held back."""
        self.aside += 1
        self._refill()
        try:
            yield
        finally:
            self.aside -= 1

    def has_lost(self, delivery: Delivery) -> bool:
        """Tell whether the connection that it came by is closed, or it has come again."""
        return bool(delivery.tag.is_lost)

    async def settle(self, delivery: Delivery, settlement: Settlement, reason: str = "", error: str = "") -> None:
        """Settle a delivery, on the connection that it came by. Only a copy of it is confirmed, before it is acked."""
        await trio.lowlevel.checkpoint_if_cancelled()
        arrival: PulsarMessage = delivery.tag
        if arrival.settled or arrival.is_lost:
            raise DeliveryLostError(f"the event {delivery.message_id} was settled before, or Pulsar has it again")
        arrival.settled = True
        try:
            match settlement:
                case Settlement.ACK:
                    await arrival.session.ack(arrival.id)
                case Settlement.RELEASE:
                    arrival.session.nack(arrival.id)
                case Settlement.REJECT:
                    await self._send_anew(delivery)
                case Settlement.DEAD_LETTER:
                    await self._set_aside(delivery, dead_letters.facts(delivery, reason, error))
        except LostError as lost:
            raise DeliveryLostError(f"Pulsar has taken the event {delivery.message_id} back: {lost}") from lost
        finally:
            self.drop(arrival)

    def drop(self, arrival: PulsarMessage) -> None:
        """Hold an arrival no longer."""
        if self.holding.get(str(arrival.id)) is arrival:
            del self.holding[str(arrival.id)]
        self._refill()

    def _refill(self) -> None:
        if self._consumer:
            self._consumer.refill()

    async def _send_anew(self, delivery: Delivery) -> None:
        """Put an event that failed at the end of its queue, counted."""
        try:
            await self._copy(delivery, self.name, {FAILURES: delivery.attempt})
        except (BrokerError, TooLargeError) as error:
            LOGGER.warning("the event %s goes back without its count: %s", delivery.message_id, error)
            delivery.tag.session.nack(delivery.tag.id)
        else:
            await _ack_replaced(delivery)

    async def _set_aside(self, delivery: Delivery, facts: dead_letters.Facts) -> None:
        """Move an event to the dead letters: to their queue, else to their directory, else it stays."""
        try:
            await self._copy(delivery, dead_letter_queue(self.name), dead_letters.headers(facts))
        except (BrokerError, TooLargeError) as why:
            if not await dead_letters.write_aside(self._directory, delivery, facts, why):
                await self._send_anew(delivery)
                return
        await _ack_replaced(delivery)

    async def _copy(self, delivery: Delivery, topic: str, facts: Mapping[str, Any]) -> None:
        """Send a copy of an event to a topic, confirmed."""
        headers = {**delivery.tag.headers, **said({**facts, MESSAGE_ID: delivery.message_id})}
        await delivery.tag.session.publish(topic, delivery.body, headers)


async def _ack_replaced(delivery: Delivery) -> None:
    """Acknowledge an event that is elsewhere by now."""
    try:
        await delivery.tag.session.ack(delivery.tag.id)
    except LostError as error:
        raise DeliveryReplacedError(f"Pulsar has the event {delivery.message_id}, and a copy of it: {error}") from error


class PulsarConsumer(PrefetchConsumer):
    """Asks for messages, as many as may be held, and holds them until they are taken."""

    def __init__(self, source: PulsarSource, prefetch: int) -> None:
        super().__init__(source.has_lost)
        self._source = source
        self._prefetch = prefetch
        self._session: PulsarConnection | None = None
        self._asked = 0

    async def is_idle(self) -> bool:
        """Ask the broker; where it does not answer, the connection is lost."""
        if (session := self._session) is None:
            return False
        try:
            await session.look()
        except LostError as error:
            session.closed.tell(error=error)
            return False
        return not self._arrived

    def listen(self, session: PulsarConnection) -> None:
        """Have messages sent, as many as may be held."""
        self._session, self._asked = session, 0
        self.refill()
        self._note_listening(is_so=True)

    def refill(self) -> None:
        """Ask for more, if less is held by now."""
        while self._session and self._asked + len(self._source.holding) < self._prefetch + self._source.aside:
            self._asked += 1
            self._session.receive(partial(self._on_arrival, self._session))

    def lost(self) -> None:
        """Stop listening, and forget what has arrived: the broker has it again."""
        self._session = None
        self._arrived.clear()
        self._source.holding.clear()
        self._note_listening(is_so=False)

    def stop(self) -> None:
        """Give back what was not taken, and what still comes: what was asked for cannot be called off."""
        self._session = None
        while self._arrived:
            self._give_back(self._arrived.popleft().tag)

    def _on_arrival(self, session: PulsarConnection, message: Any, error: Exception | None) -> None:
        if error:
            session.closed.tell(error=error)
        if session.closed.is_told:
            return
        arrival = PulsarMessage(session, message.message_id(), message.properties())
        if session is not self._session:
            self._give_back(arrival)
            return
        self._asked -= 1
        if replaced := self._source.holding.get(str(arrival.id)):
            replaced.is_replaced = True
        self._source.holding[str(arrival.id)] = arrival
        self._note_arrival(self._delivery(arrival, message))

    def _give_back(self, arrival: PulsarMessage) -> None:
        arrival.settled = True
        with suppress(LostError):
            arrival.session.nack(arrival.id)
        self._source.drop(arrival)

    def _delivery(self, arrival: PulsarMessage, message: Any) -> Delivery:
        facts = read(arrival.headers)
        return Delivery(
            self._source,
            self._source.name,
            message.data(),
            message_id=str(facts.get(MESSAGE_ID) or arrival.id),  # of a message without one its place is as good
            attempt=attempt(facts),
            tag=arrival,
            redelivered=message.redelivery_count() > 0,
            headers=facts,
        )


class PulsarSink(PulsarQueue):
    """An outgoing queue. Any number of messages may be waiting for their confirms at once."""

    async def _open(self, session: PulsarConnection) -> None:
        await session.producer(self.name)

    async def send(self, body: bytes, message_id: str) -> None:
        """Send a message, on each new connection anew until it is confirmed."""
        while True:
            session = await self.connected()
            try:
                await session.publish(self.name, body, said({MESSAGE_ID: message_id}))
            except TooLargeError as error:
                raise PublishRefusedError(f"Pulsar refuses an output of {len(body)} bytes: {error}") from error
            except BrokerError as error:
                raise BrokerError(f"{self.broker} {error}") from error
            except LostError:
                await self._after(session)
            else:
                return


def parse_address(address: str) -> tuple[str, str, int]:
    """Read `[pulsar://|pulsar+ssl://]HOST[:PORT]`: scheme, host and port.

    Raises:
        SettingsError: it is not of that form.
    """
    parts, host, port = addresses.split(address, tuple(PORTS), _wrong_address)
    if parts.username is not None or parts.path.strip("/"):
        raise _wrong_address("a user or a path")
    return parts.scheme, host, port or PORTS[parts.scheme]


def _bracketed(host: str) -> str:
    return f"[{host}]" if ":" in host else host


def _wrong_address(found: str) -> SettingsError:
    """Word what is wrong; what may be a secret is not shown."""
    return SettingsError(f"a Pulsar address must be [pulsar|pulsar+ssl]://HOST[:PORT], without a user, but has {found}")
