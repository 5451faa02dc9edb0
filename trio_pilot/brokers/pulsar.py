"""Apache Pulsar: a queue is a topic, and a shared subscription of all clients that take from it.

Topics and subscriptions have the names that oms-mqclient gives them, so that either takes what the other has sent. Pulsar's
own count is one of deliveries, so failures are counted by copies (`requeue`), with the number as a property.
"""

import os
from collections.abc import AsyncIterator, Mapping
from contextlib import AbstractAsyncContextManager, asynccontextmanager, suppress
from dataclasses import dataclass, field
from functools import partial
from typing import Any

import trio

from trio_pilot.brokers import Delivery, Patience, QueueAddress, addresses, dead_letters, tokens
from trio_pilot.brokers.headers import MESSAGE_ID, UNNAMED, from_text, given_id, id_headers, to_text
from trio_pilot.brokers.kinds import PULSAR
from trio_pilot.brokers.prefetch import PrefetchConsumer
from trio_pilot.brokers.pulsar_connection import PulsarConnection, PulsarTimeouts
from trio_pilot.brokers.reconnecting import ConnectError, LostError, ReconnectingQueue, TooLargeError, opened
from trio_pilot.brokers.requeue import RequeueingSource
from trio_pilot.errors import BrokerError, DeliveryLostError, PublishRefusedError, SettingsError, first

TIMEOUTS = PulsarTimeouts()


def open_source(
    address: QueueAddress, patience: Patience, timeouts: PulsarTimeouts = TIMEOUTS
) -> AbstractAsyncContextManager["PulsarSource"]:
    """Open an incoming queue; it connects in the background."""
    return opened(partial(PulsarSource, address, patience, timeouts))


def open_sink(
    address: QueueAddress, patience: Patience, timeouts: PulsarTimeouts = TIMEOUTS
) -> AbstractAsyncContextManager["PulsarSink"]:
    """Open an outgoing queue; it connects in the background."""
    return opened(partial(PulsarSink, address, patience, timeouts))


class PulsarQueue(ReconnectingQueue[PulsarConnection]):
    """A queue, and the session with its broker while there is one."""

    def __init__(self, address: QueueAddress, patience: Patience, timeouts: PulsarTimeouts) -> None:
        self._scheme, self._host, self._port = parse_address(address.address)
        self._token = address.token
        self._timeouts = timeouts
        super().__init__(address, f"Pulsar at {self._host}", patience, timeouts)

    @asynccontextmanager
    async def connect(self, threads: trio.Nursery) -> AsyncIterator[PulsarConnection]:
        """Connect, and make the topic where it does not exist."""
        token = await tokens.current(self._token)
        await self._check_that_it_listens()
        session = PulsarConnection(f"{self._scheme}://{_bracketed(self._host)}:{self._port}", token, self._timeouts)
        try:
            await self._open(session)
            threads.start_soon(session.watch)
            yield session
        finally:
            await session.close()

    async def _open(self, session: PulsarConnection) -> None:
        raise NotImplementedError

    async def _check_that_it_listens(self) -> None:
        """Connect and hang up: the library would try again and again, and then report that its time is over."""
        seconds = self._timeouts.connect
        try:
            with trio.fail_after(seconds):
                await (await trio.open_tcp_stream(self._host, self._port)).aclose()
        except trio.TooSlowError:
            raise ConnectError(f"there was no connection after {seconds:g} s") from None
        except OSError as error:
            raise ConnectError(_text(error)) from error


def _text(error: OSError) -> str:
    """Return the reason why trio could connect to none of a host's addresses; its own text is long."""
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
    body: bytes = field(repr=False)
    redelivered: bool
    settled: bool = False
    is_replaced: bool = False  # it has come again

    @property
    def is_lost(self) -> bool:
        """Whether the broker is known to have it again."""
        return self.is_replaced or self.session.closed.is_set


class PulsarSource(PulsarQueue, RequeueingSource[PulsarConnection, PulsarMessage]):
    """An incoming queue. A delivery is settled on the connection by which it came; only a copy is confirmed."""

    refusals = (BrokerError, TooLargeError)

    def __init__(self, address: QueueAddress, patience: Patience, timeouts: PulsarTimeouts) -> None:
        super().__init__(address, patience, timeouts)
        self.holding: dict[str, PulsarMessage] = {}  # messages delivered and not settled, by their place in the topic

    async def _open(self, session: PulsarConnection) -> None:
        session.consumer = await session.subscribe(self.name)

    def new_consumer(self, prefetch: int, lease: float) -> "PulsarConsumer":  # noqa: ARG002
        """Make a consumer. Pulsar takes nothing back while there is a connection, so no lease is asked for."""
        return PulsarConsumer(self, prefetch)

    def delivery(self, message: PulsarMessage) -> Delivery:
        """Make the delivery of a message. One without an id is known by its place in the topic."""
        facts = from_text(message.headers)
        given = given_id(facts, MESSAGE_ID)
        message_id = given or str(message.id)
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
        )

    def begin_settling(self, delivery: Delivery) -> None:
        """Mark a delivery as settled. Where it came again, an ack would be one of the new delivery."""
        if delivery.tag.is_lost:
            raise DeliveryLostError(f"{self.broker} has taken the event {delivery.message_id} back")
        super().begin_settling(delivery)

    async def ack(self, message: PulsarMessage) -> None:
        """Acknowledge a message."""
        await message.session.ack(message.id)

    async def nack(self, message: PulsarMessage) -> None:
        """Return a message to its queue."""
        message.session.nack(message.id)

    async def send_copy(self, delivery: Delivery, queue: str, facts: Mapping[str, Any]) -> None:
        """Send a copy of an event to a topic, confirmed."""
        headers = {**delivery.tag.headers, **to_text({**facts, **id_headers(delivery.message_id, delivery)})}
        await delivery.tag.session.publish(queue, delivery.body, headers)

    def forget(self, message: PulsarMessage) -> None:
        """Hold a message no longer."""
        if self.holding.get(str(message.id)) is message:
            del self.holding[str(message.id)]
        message.body = b""  # a settled delivery may be remembered for long
        self.refill()


class PulsarConsumer(PrefetchConsumer):
    """Asks for messages, as many as may be held, and holds them until they are taken."""

    def __init__(self, source: PulsarSource, prefetch: int) -> None:
        super().__init__(source.has_lost)
        self._source = source
        self._prefetch = prefetch
        self._session: PulsarConnection | None = None
        self._asked = 0

    async def is_idle(self) -> bool:
        """Ask the broker for an answer; without one, the connection is lost."""
        if (session := self._session) is None:
            return False
        try:
            await session.look()
        except LostError as error:
            session.closed.set(error=error)
            return False
        return not self._arrived

    async def listen(self, session: PulsarConnection) -> None:
        """Start to receive messages, as many as may be held."""
        self._session, self._asked = session, 0
        self.refill()
        self._note_listening(is_so=True)

    def refill(self) -> None:
        """Ask for more messages, if fewer are held now."""
        while self._session and self._asked + len(self._source.holding) < self._prefetch + self._source.held_back.value:
            self._asked += 1
            self._session.receive(partial(self._on_arrival, self._session))

    def lost(self) -> None:
        """Stop listening, and forget what has arrived: the broker has it again."""
        self._session = None
        self._arrived.clear()
        self._source.holding.clear()
        self._note_listening(is_so=False)

    async def stop(self) -> None:
        """Release messages that were not taken, and those that still come: a request for one cannot be called off."""
        self._session = None
        while self._arrived:
            self._give_back(self._arrived.popleft().tag)

    def _on_arrival(self, session: PulsarConnection, received: Any, error: Exception | None) -> None:
        if error:
            session.closed.set(error=error)
        if session.closed.is_set:
            return
        redelivered = received.redelivery_count() > 0
        message = PulsarMessage(session, received.message_id(), received.properties(), received.data(), redelivered)
        if session is not self._session:
            self._give_back(message)
            return
        self._asked -= 1
        if replaced := self._source.holding.get(str(message.id)):
            replaced.is_replaced = True
        self._source.holding[str(message.id)] = message
        self._note_arrival(self._source.delivery(message))

    def _give_back(self, message: PulsarMessage) -> None:
        message.settled = True
        with suppress(LostError):
            message.session.nack(message.id)
        self._source.forget(message)


class PulsarSink(PulsarQueue):
    """An outgoing queue. Any number of messages may wait for their confirms at once."""

    async def _open(self, session: PulsarConnection) -> None:
        await session.producer(self.name)

    async def send(self, body: bytes, message_id: str, original: Delivery | None = None) -> None:
        """Send a message, on each new connection again until it is confirmed."""
        theirs = original.tag.headers if original else {}
        kept = {name: value for name, value in theirs.items() if not name.startswith(dead_letters.PREFIX)}
        headers = {**kept, **to_text(id_headers(message_id, original))}
        try:
            await self.until_done(lambda session: session.publish(self.name, body, headers))
        except TooLargeError as error:
            raise PublishRefusedError(f"Pulsar refuses an output of {len(body)} bytes: {error}") from error
        except BrokerError as error:
            raise BrokerError(f"{self.broker} {error}") from error


def parse_address(address: str) -> tuple[str, str, int]:
    """Read `[pulsar://|pulsar+ssl://]HOST[:PORT]`: scheme, host and port.

    Raises:
        SettingsError: the address is not of that form.
    """
    parts, host, port = addresses.split(address, PULSAR, _wrong_address)
    if parts.username is not None or parts.path.strip("/"):
        raise _wrong_address("a user or a path")
    return parts.scheme, host, port


def _bracketed(host: str) -> str:
    return f"[{host}]" if ":" in host else host


def _wrong_address(found: str) -> SettingsError:
    """Make the error; what may be a secret is not shown."""
    return SettingsError(f"a Pulsar address must be [pulsar|pulsar+ssl]://HOST[:PORT], without a user, but has {found}")
