"""RabbitMQ: a source and a sink, each by a link of its own.

What counts as a failure. Quorum queues count the deliveries of an event that came back, for whatever reason; from 4.3 on
not those that were released (nack), but still those of lost connections, and what pika itself rejects because it arrives
while a consumer is being cancelled. Nobody could tell a failure from an eviction by that. So an event that failed goes back
as a copy of itself, to the end of the queue, with the number of its failures in a header; confirmed before the original is
acked.
"""

import hashlib
import random
import re
import uuid
from collections.abc import AsyncIterator, Iterator, Mapping
from contextlib import AbstractAsyncContextManager, asynccontextmanager, contextmanager, suppress
from functools import partial
from typing import Any

import trio
from trio_util import AsyncValue, wait_any

from trio_pilot.brokers import LONGEST_LEASE, Delivery, Patience, QueueAddress, Settlement, dead_letter_queue, dead_letters
from trio_pilot.brokers.headers import FAILURES, attempt
from trio_pilot.brokers.prefetch import PrefetchConsumer
from trio_pilot.brokers.rabbitmq_connection import (
    ACCESS_REFUSED,
    NO_ROUTE,
    NOT_FOUND,
    PRECONDITION_FAILED,
    ClosedError,
    RabbitChannel,
    RabbitConnection,
    RabbitMessage,
)
from trio_pilot.brokers.rabbitmq_queue import RabbitQueue, find_for_sending
from trio_pilot.brokers.reconnecting import opened
from trio_pilot.errors import BrokerError, DeliveryLostError, DeliveryReplacedError, PublishRefusedError
from trio_pilot.log import LOGGER

LOOK_INTERVAL = 30.0  # seconds at most between looks whether there are messages that do not come
ON_ITS_WAY = 1.0  # seconds for a message that there is to come, before a queue is left as empty
MOST_HELD = 100  # deliveries held back that do not count towards the prefetch; with more of them, all events must wait
GIVE_BACK_TIMEOUT = 5.0  # seconds to give back what was prefetched; the end of the connection gives it back as well

KNOWS_LEASES = (3, 12)  # the first version of the server that may be asked for one ...
GRANTS_LEASES = (4, 3)  # ... and the first seen to give it: 4.0 knows a timeout of queues, but not of consumers
CONSUMER_TIMEOUT = "x-consumer-timeout"  # milliseconds, of one consumer
USUAL_TIMEOUT = 1800.0  # seconds: the server's consumer_timeout where nobody has set it
RENEW_AT = 10  # deliveries that a server has counted; from 4.0 on it drops what was delivered more than 20 times


def open_source(address: QueueAddress, patience: Patience) -> AbstractAsyncContextManager["RabbitSource"]:
    """Open an incoming queue; it connects in the background."""
    return opened(RabbitSource, address, patience)


def open_sink(address: QueueAddress, patience: Patience) -> AbstractAsyncContextManager["RabbitSink"]:
    """Open an outgoing queue; it connects in the background."""
    return opened(RabbitSink, address, patience)


class RabbitSource(RabbitQueue):
    """An incoming queue."""

    def __init__(self, address: QueueAddress, patience: Patience) -> None:
        super().__init__(address, patience)
        self._directory = address.dead_letters
        self._copies = Copies()
        self.holding = AsyncValue(0)  # deliveries that are not to count towards the prefetch

    @asynccontextmanager
    async def consume(self, prefetch: int, lease: float = LONGEST_LEASE) -> AsyncIterator["RabbitConsumer"]:
        """Listen to the queue, on each new connection anew.

        Where the server does not grant the lease it closes the channel, or cancels the consumer, and delivers once more what
        was unsettled: to us, as far as it can be, who know it then.
        """
        consumer = RabbitConsumer(self, lease)
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
                await wait_any(
                    partial(self.gone, channel),
                    partial(consumer.make_up, channel),
                    partial(consumer.keep_looking, channel),
                )
            except ClosedError as error:
                if error.code in (ACCESS_REFUSED, NOT_FOUND, PRECONDITION_FAILED) and not consumer.can_do_without(error):
                    raise BrokerError(f"cannot listen to the queue {self.name}: {error}") from error
            await self.gone(channel)
            consumer.lost()

    @contextmanager
    def held(self, delivery: Delivery) -> Iterator[None]:  # noqa: ARG002 -- one is like another
        """Have one more delivery sent for one that is held back."""
        self.holding.value += 1
        try:
            yield
        finally:
            self.holding.value -= 1

    def warning(self, lease: float) -> str:
        """Say what this server will not do for us, once it is connected; nothing if it does all."""
        channel = self._session.value
        if lease <= USUAL_TIMEOUT or channel is None or channel.connection.version >= GRANTS_LEASES:
            return ""
        version = ".".join(map(str, channel.connection.version)) or "(of another make)"
        return (
            f"; RabbitMQ {version} takes an event back after its consumer_timeout, usually {USUAL_TIMEOUT / 60:g} min:"
            " a task that takes longer goes on, but another pilot may run its event as well (not so with 4.3)"
        )

    def has_lost(self, delivery: Delivery) -> bool:
        """Tell whether the channel that it came by is closed."""
        return bool(delivery.tag.channel.is_closed)

    async def settle(self, delivery: Delivery, settlement: Settlement, reason: str = "", error: str = "") -> None:
        """Settle a delivery, on the channel that it came by.

        AMQP has no answer to that, so nothing is waited for: if the connection breaks just now, the broker has the event
        again, as it would if it had broken a moment earlier. Only a copy, where there is to be one, is confirmed before.
        """
        await trio.lowlevel.checkpoint_if_cancelled()
        arrival: RabbitMessage = delivery.tag
        if arrival.settled:  # RabbitMQ would close the channel, and deliver all that came by it again
            raise DeliveryLostError(f"the event {delivery.message_id} was settled before")
        arrival.settled = True
        arrival.channel.unsettled -= 1
        with _lost(delivery):
            match settlement:
                case Settlement.ACK:
                    arrival.channel.write("basic_ack", arrival.tag)
                    arrival.body = b""  # who remembers the delivery need not keep that
                case Settlement.DEAD_LETTER:
                    await self._set_aside(delivery, dead_letters.facts(delivery, reason, error))
                case _:
                    await self._give_back(delivery, settlement)

    async def _give_back(self, delivery: Delivery, settlement: Settlement) -> None:
        """Return an event to the queue, in a way that counts what is to be counted, and nothing else."""
        arrival: RabbitMessage = delivery.tag
        if settlement is Settlement.RELEASE and (arrival.deliveries or 0) < RENEW_AT:
            arrival.channel.write("basic_nack", arrival.tag, requeue=True)
            return
        failures = delivery.attempt if settlement is Settlement.REJECT else delivery.attempt - 1
        try:
            await self._copies.send(self.name, arrival, {FAILURES: failures})
        except (BrokerError, ClosedError) as error:
            LOGGER.warning("the event %s goes back without its count: no copies for us (%s)", delivery.message_id, error)
            arrival.channel.write("basic_nack", arrival.tag, requeue=True)
        else:
            _drop(delivery)

    async def _set_aside(self, delivery: Delivery, facts: dead_letters.Facts) -> None:
        """Move an event to the dead letters: to their queue, else to their directory, else it stays."""
        arrival: RabbitMessage = delivery.tag
        try:
            await self._copies.send(dead_letter_queue(self.name), arrival, dead_letters.headers(facts))
        except (BrokerError, ClosedError) as error:
            if arrival.channel.is_closed:  # that is why, and it comes again
                raise ClosedError(0, str(error)) from error
            if not await dead_letters.write_aside(self._directory, delivery, facts, error):
                await self._give_back(delivery, Settlement.REJECT)
                return
        _drop(delivery)


@contextmanager
def _lost(delivery: Delivery) -> Iterator[None]:
    try:
        yield
    except ClosedError as error:
        raise DeliveryLostError(f"RabbitMQ has taken the event {delivery.message_id} back: {error}") from error


def _drop(delivery: Delivery) -> None:
    """Acknowledge an event that is elsewhere by now."""
    arrival: RabbitMessage = delivery.tag
    try:
        arrival.channel.write("basic_ack", arrival.tag)
    except ClosedError as error:
        raise DeliveryReplacedError(f"RabbitMQ has the event {delivery.message_id}, and a copy of it: {error}") from error


class Copies:
    """Sends copies of events, confirmed, on the connections by which they came."""

    def __init__(self) -> None:
        self._channels: dict[str, RabbitChannel] = {}
        self._opening = trio.Lock()

    async def send(self, queue: str, arrival: RabbitMessage, headers: Mapping[str, Any]) -> None:
        """Send a copy to a queue. One that was deleted is declared anew.

        Raises:
            BrokerError: the queue is not there, or not for us.
            ClosedError: the connection is lost, or the broker does not take it.
        """
        for again in (True, False):
            channel = await self._channel(queue, arrival.channel.connection)
            try:
                await channel.publish_copy(queue, arrival, headers)
            except ClosedError as error:
                self._channels.pop(queue, None)
                if error.code != NO_ROUTE or not again:
                    raise
            else:
                return

    async def _channel(self, queue: str, connection: RabbitConnection) -> RabbitChannel:
        """Give the channel by which this connection sends to a queue; the first that needs it opens it."""
        async with self._opening:
            channel = self._channels.get(queue)
            if channel is None or channel.is_closed or channel.connection is not connection:
                channel = self._channels[queue] = await find_for_sending(connection, queue)
            return channel


class RabbitConsumer(PrefetchConsumer):
    """Holds what RabbitMQ has sent ahead."""

    def __init__(self, source: RabbitSource, lease: float) -> None:
        super().__init__(source.has_lost)
        self._source = source
        self._lease = lease  # seconds; none once the queue has refused it
        self._prefetch = 0
        self._channel: RabbitChannel | None = None
        self._tags: list[str] = []  # ours, so that there is no moment at which one could not be cancelled
        self._arrivals = 0

    async def is_idle(self) -> bool:
        """Ask the server: what it has sent before it answers has arrived before the answer.

        One that has messages, and sends none, has forgotten us: we listen anew.
        """
        channel, seen = self._channel, self._arrivals
        if channel is None:
            return False
        with suppress(ClosedError):
            if await self._passed_over(channel):
                await trio.sleep(ON_ITS_WAY)
                if self._arrivals == seen and (ready := await self._passed_over(channel)):
                    await self._listen_anew(channel, ready)
            return not self._arrived
        return False

    async def listen(self, channel: RabbitChannel, prefetch: int) -> None:
        """Have messages sent, `prefetch` of them ahead of their settlement."""
        self._channel, self._prefetch = channel, prefetch
        await self._consume(channel, prefetch)
        self._note_listening(is_so=True)

    async def make_up(self, channel: RabbitChannel) -> None:
        """Have one more message sent ahead for each that is held back, as their number changes: by a consumer for each."""
        holding = self._source.holding
        with suppress(ClosedError):
            while True:
                held, made_up_for = min(holding.value, MOST_HELD), len(self._tags) - 1
                if made_up_for < held:
                    await self._consume(channel, 1)
                elif made_up_for > held:
                    await channel.ask("basic_cancel", self._tags.pop())
                else:
                    await holding.wait_transition()

    async def keep_looking(self, channel: RabbitChannel) -> None:
        """Listen anew if twice, at one look after the other, there were messages, room for them, and none came."""
        suspicious, seen = False, -1
        with suppress(ClosedError):
            while True:
                await trio.sleep(random.uniform(LOOK_INTERVAL / 2, LOOK_INTERVAL))  # noqa: S311 -- jitter, not a secret
                ready = await self._passed_over(channel)
                if suspicious and ready and self._arrivals == seen:
                    await self._listen_anew(channel, ready)
                suspicious, seen = bool(ready), self._arrivals

    async def _passed_over(self, channel: RabbitChannel) -> int:
        """Count the messages that are in the queue although there is room for them here."""
        found = await channel.ask("queue_declare", self._source.name, passive=True)
        return int(found.method.message_count) if channel.unsettled < self._prefetch else 0

    async def _listen_anew(self, channel: RabbitChannel, ready: int) -> None:
        """Close the channel, and wait for its end: ClosedError."""
        LOGGER.warning("the queue %s has %d message(s), and none comes", self._source.name, ready)
        await channel.call("close", reply_text="listening anew")
        await channel.closed.wait()

    async def _consume(self, channel: RabbitChannel, prefetch: int) -> None:
        await channel.ask("basic_qos", prefetch_count=prefetch)
        self._tags.append(uuid.uuid4().hex)
        asks = self._lease and channel.connection.version >= KNOWS_LEASES
        arguments = {CONSUMER_TIMEOUT: int(1000 * self._lease)} if asks else {}
        await channel.consume(self._source.name, self._tags[-1], self._on_arrival, arguments)

    def can_do_without(self, error: ClosedError) -> bool:
        """Tell whether what the server has refused was a lease; then it is asked for none any more."""
        refused = error.code == PRECONDITION_FAILED and CONSUMER_TIMEOUT in str(error) and self._lease > 0
        if refused:  # from 4.3 on by classic queues, which take nothing back after a time
            self._lease = 0.0
        return refused

    def lost(self) -> None:
        """Forget what has arrived: the broker has it again."""
        self._channel = None
        self._tags.clear()
        self._arrived.clear()
        self._note_listening(is_so=False)

    async def stop(self) -> None:
        """Have no more sent, and give back what was not taken.

        A quorum queue that is about to send a message as its consumer is cancelled may keep it, unsent, for this channel
        (seen with 3.10): nobody can give that one back but by closing the channel.
        """
        try:
            while self._channel and self._tags:
                await self._channel.ask("basic_cancel", self._tags.pop())
            while self._arrived:
                await self._source.settle(self._arrived[0], Settlement.RELEASE)
                self._arrived.popleft()
        except (ClosedError, DeliveryLostError):
            return  # a broker that has closed the channel has taken everything back

    def _on_arrival(self, arrival: RabbitMessage) -> None:
        if arrival.channel is self._channel:
            arrival.channel.unsettled += 1
            self._arrivals += 1
            self._note_arrival(self._delivery(arrival))

    def _delivery(self, arrival: RabbitMessage) -> Delivery:
        source, message_id = self._source, arrival.message_id
        return Delivery(
            source,
            source.name,
            arrival.body,
            message_id or hashlib.sha256(arrival.body).hexdigest()[:32],
            attempt(arrival.headers),
            arrival,
            redelivered=arrival.redelivered,
            named=message_id is not None,
            headers=arrival.headers,
        )


class RabbitSink(RabbitQueue):
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

    async def _open(self, connection: RabbitConnection) -> RabbitChannel:
        return await find_for_sending(connection, self.name)

    async def _declare_anew(self, channel: RabbitChannel) -> None:
        """Close the channel: finding the queue again is part of opening the next."""
        try:
            await channel.call("close")
        except ClosedError:
            return


def _refused_size(error: ClosedError) -> int | None:
    """Tell how large the message was that is "larger than configured max size"."""
    found = re.search(r"message size (\d+)", str(error))
    return int(found[1]) if found else None
