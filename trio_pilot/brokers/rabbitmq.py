"""RabbitMQ: one connection a queue, made anew whenever it is lost, for as long as there is patience."""

import hashlib
import math
import re
import uuid
from collections import deque
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from urllib.parse import unquote, urlsplit

import trio

from trio_pilot.brokers import (
    Delivery,
    Patience,
    QueueAddress,
    Settlement,
    dead_letter_headers,
    dead_letter_queue,
)
from trio_pilot.brokers.amqp import (
    ACCESS_REFUSED,
    NO_ROUTE,
    NOT_FOUND,
    PRECONDITION_FAILED,
    Address,
    Arrival,
    Channel,
    ClosedError,
    Connection,
    connect,
)
from trio_pilot.brokers.link import RETRY_DELAY, Link, kept_connected
from trio_pilot.errors import BrokerError, DeliveryLostError, PublishRefusedError, SettingsError
from trio_pilot.log import LOGGER

GIVE_BACK_TIMEOUT = 5.0  # seconds to give back what was prefetched; the end of the connection gives it back as well

QUORUM = {"x-queue-type": "quorum"}  # as EWMS declares its queues; with any other argument that would fail


@asynccontextmanager
async def open_source(address: QueueAddress, patience: Patience) -> AsyncIterator["RabbitSource"]:
    """Open an incoming queue; it connects in the background."""
    source = RabbitSource(address, patience)
    async with kept_connected(source):
        yield source


@asynccontextmanager
async def open_sink(address: QueueAddress, patience: Patience) -> AsyncIterator["RabbitSink"]:
    """Open an outgoing queue; it connects in the background."""
    sink = RabbitSink(address, patience)
    async with kept_connected(sink):
        yield sink


class _Queue(Link[Channel]):
    """A queue, and the channel to it while there is one."""

    def __init__(self, address: QueueAddress, patience: Patience) -> None:
        self._address = parse_address(address)
        super().__init__(address.queue, f"RabbitMQ at {self._address.host}", patience)

    @asynccontextmanager
    async def connect(self, threads: trio.Nursery) -> AsyncIterator[Channel]:
        """Connect, and open a channel once the queue was found."""
        async with connect(self._address, threads) as connection:
            yield await self._open(connection)

    async def _open(self, connection: Connection) -> Channel:
        return await _find(connection, self.name)


async def _find(connection: Connection, queue: str) -> Channel:
    """Declare a queue; where that is not for us to do, be content that it exists."""
    channel = await connection.open_channel()
    try:
        await channel.ask("queue_declare", queue, durable=True, arguments=QUORUM)
    except ClosedError as error:
        if error.code not in (ACCESS_REFUSED, PRECONDITION_FAILED):
            raise
        channel = await _find_passively(connection, queue)
    return channel


async def _find_passively(connection: Connection, queue: str) -> Channel:
    channel = await connection.open_channel()
    try:
        await channel.ask("queue_declare", queue, passive=True)
    except ClosedError as error:
        if error.code in (ACCESS_REFUSED, NOT_FOUND):
            raise BrokerError(f"does not let us use the queue {queue}: {error}") from error
        raise
    return channel


async def _find_for_sending(connection: Connection, queue: str) -> Channel:
    channel = await _find(connection, queue)
    await channel.confirm_publishes()
    return channel


class RabbitSource(_Queue):
    """An incoming queue."""

    def __init__(self, address: QueueAddress, patience: Patience) -> None:
        super().__init__(address, patience)
        self._dead_letters: Channel | None = None
        self._finding_dead_letters = trio.Lock()

    @asynccontextmanager
    async def consume(self, prefetch: int) -> AsyncIterator["RabbitConsumer"]:
        """Listen to the queue, on each new connection anew."""
        consumer = RabbitConsumer(self)
        async with trio.open_nursery() as nursery:
            nursery.start_soon(self._keep_listening, consumer, prefetch)
            try:
                yield consumer
            finally:
                nursery.cancel_scope.cancel()
                with trio.move_on_after(GIVE_BACK_TIMEOUT, shield=True):
                    await consumer.stop()

    async def _keep_listening(self, consumer: "RabbitConsumer", prefetch: int) -> None:
        while True:
            channel = await self.connected()
            try:
                await consumer.listen(channel, prefetch)
            except ClosedError as error:
                if error.code in (ACCESS_REFUSED, NOT_FOUND):
                    raise BrokerError(f"cannot listen to the queue {self.name}: {error}") from error
            await self.gone(channel)
            consumer.lost()

    def has_lost(self, delivery: Delivery) -> bool:
        """Tell whether the channel that it came by is closed."""
        return bool(delivery.tag.channel.is_closed)

    async def settle(self, delivery: Delivery, settlement: Settlement, reason: str = "") -> None:
        """Settle a delivery, on the channel that it came by.

        AMQP has no answer to that, so nothing is waited for: if the connection breaks just now, the broker has the event
        again, as it would if it had broken a moment earlier.
        """
        await trio.lowlevel.checkpoint_if_cancelled()
        arrival: Arrival = delivery.tag
        if arrival.settled:  # RabbitMQ would close the channel, and deliver all that came by it again
            raise DeliveryLostError(f"the event {delivery.message_id} was settled before")
        arrival.settled = True
        try:
            if settlement is Settlement.DEAD_LETTER:
                settlement = await self._set_aside(delivery, reason)
            match settlement:
                case Settlement.ACK:
                    arrival.channel.write("basic_ack", arrival.tag)
                case Settlement.RELEASE:  # uncounted from RabbitMQ 4.3 on
                    arrival.channel.write("basic_nack", arrival.tag, requeue=True)
                case _:
                    arrival.channel.write("basic_reject", arrival.tag, requeue=True)
        except ClosedError as error:
            raise DeliveryLostError(f"RabbitMQ has taken the event {delivery.message_id} back: {error}") from error

    async def _set_aside(self, delivery: Delivery, reason: str) -> Settlement:
        """Copy an event to the dead letters, confirmed; tell how the event itself is to be settled then."""
        queue, headers = dead_letter_queue(self.name), dead_letter_headers(delivery, reason)
        try:
            channel = await self._dead_letter_channel(delivery.tag.channel.connection)
            await channel.publish(queue, delivery.body, delivery.message_id, headers)
        except (BrokerError, ClosedError) as error:
            self._dead_letters = None
            LOGGER.warning("the event %s stays in the queue: no dead letters for us (%s)", delivery.message_id, error)
            return Settlement.REJECT
        return Settlement.ACK

    async def _dead_letter_channel(self, connection: Connection) -> Channel:
        """Give the channel by which this connection sends dead letters; the first that needs it opens it."""
        async with self._finding_dead_letters:
            channel = self._dead_letters
            if channel is None or channel.is_closed or channel.connection is not connection:
                channel = await _find_for_sending(connection, dead_letter_queue(self.name))
                self._dead_letters = channel
            return channel


class RabbitConsumer:
    """Holds what RabbitMQ has sent ahead."""

    def __init__(self, source: RabbitSource) -> None:
        self.listening_since = math.inf
        self._source = source
        self._channel: Channel | None = None
        self._tag = uuid.uuid4().hex  # ours, so that there is no moment at which it could not be cancelled
        self._arrived: deque[Delivery] = deque()
        self._changed = trio.Event()  # since the last `take`, so that no change falls between that and `wait`

    async def take(self) -> Delivery | None:
        """Take the first of what has arrived."""
        await trio.lowlevel.checkpoint_if_cancelled()
        if self._changed.is_set():
            self._changed = trio.Event()
        return self._arrived.popleft() if self._arrived else None

    async def wait(self) -> None:
        """Wait for an arrival, or for a connection made or lost."""
        if self._arrived:
            await trio.lowlevel.checkpoint()
        else:
            await self._changed.wait()

    async def listen(self, channel: Channel, prefetch: int) -> None:
        """Have messages sent, `prefetch` of them ahead of their settlement."""
        await channel.ask("basic_qos", prefetch_count=prefetch)
        self._channel = channel
        await channel.consume(self._source.name, self._tag, self._on_arrival)
        self.listening_since = trio.current_time()
        self._changed.set()

    def lost(self) -> None:
        """Forget what has arrived: the broker has it again."""
        self._channel, self.listening_since = None, math.inf
        self._arrived.clear()
        self._changed.set()

    async def stop(self) -> None:
        """Have no more sent, and give back what was not taken."""
        try:
            if self._channel:
                await self._channel.ask("basic_cancel", self._tag)
            while self._arrived:
                await self._source.settle(self._arrived[0], Settlement.RELEASE)
                self._arrived.popleft()
        except (ClosedError, DeliveryLostError):
            return  # a broker that has closed the channel has taken everything back

    def _on_arrival(self, arrival: Arrival) -> None:
        if arrival.channel is self._channel:
            self._arrived.append(self._delivery(arrival))
            self._changed.set()

    def _delivery(self, arrival: Arrival) -> Delivery:
        message_id = arrival.message_id or hashlib.sha256(arrival.body).hexdigest()[:32]
        deliveries = int(arrival.redelivered) if arrival.deliveries is None else arrival.deliveries
        return Delivery(self._source, self._source.name, arrival.body, message_id, deliveries + 1, arrival)


class RabbitSink(_Queue):
    """An outgoing queue. Any number of messages may be waiting for their confirms at once."""

    async def send(self, body: bytes, message_id: str) -> None:
        """Send a message, on each new connection anew until it is confirmed."""
        while True:
            channel = await self.connected()
            try:
                await channel.publish(self.name, body, message_id)
            except ClosedError as error:
                if error.code == PRECONDITION_FAILED and _refused_size(error) == len(body):
                    # Who else was waiting on the channel only has to try again.
                    raise PublishRefusedError(f"RabbitMQ refuses an output of {len(body)} bytes: {error}") from error
                if error.code == NO_ROUTE:
                    await self._declare_anew(channel)
                await self._after(channel)
            else:
                return

    async def _open(self, connection: Connection) -> Channel:
        return await _find_for_sending(connection, self.name)

    async def _declare_anew(self, channel: Channel) -> None:
        """Close the channel: finding the queue again is part of opening the next."""
        try:
            await channel.call("close")
        except ClosedError:
            return

    async def _after(self, channel: Channel) -> None:
        """Wait for the end of a channel, or a moment: a nack leaves it open."""
        with trio.move_on_after(RETRY_DELAY):
            await self.gone(channel)


def _refused_size(error: ClosedError) -> int | None:
    """Tell how large the message was that is "larger than configured max size"."""
    found = re.search(r"message size (\d+)", str(error))
    return int(found[1]) if found else None


def parse_address(address: QueueAddress) -> Address:
    """Read `[amqp[s]://][USER[:PASS]@]HOST[:PORT][/VHOST]`; the token replaces the password.

    Raises:
        SettingsError: it is not of that form, or names a user and no password.
    """
    text = address.address if "://" in address.address else f"amqp://{address.address}"
    try:
        parts = urlsplit(text)
        port = parts.port
    except ValueError as error:
        raise _wrong_address(str(error)) from error
    if parts.scheme not in ("amqp", "amqps") or not parts.hostname:
        raise _wrong_address(f"scheme {parts.scheme!r}, host {parts.hostname!r}")
    user, password = unquote(parts.username or ""), address.token or unquote(parts.password or "")
    if user and not password:
        raise SettingsError(f"the broker address names the user {user!r}, but there is no password and no token")
    virtual_host = unquote(parts.path.lstrip("/")) or "/"
    return Address(parts.hostname, port, virtual_host, user, password, parts.scheme == "amqps")


def _wrong_address(found: str) -> SettingsError:
    return SettingsError(f"a RabbitMQ address must be [amqp[s]://][USER[:PASS]@]HOST[:PORT][/VHOST], but has {found}")
