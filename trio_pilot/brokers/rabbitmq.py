"""RabbitMQ: a source and a sink, each with a connection of its own.

Quorum queues count the deliveries of an event that came back, for whatever reason; from 4.3 on not those that were released
(nack), but still those of lost connections, and those that pika itself rejects because they arrive while a consumer is being
cancelled. So failures are counted by copies (`requeue`).
"""

import re
from collections.abc import Mapping
from contextlib import AbstractAsyncContextManager
from functools import partial
from typing import Any

import trio

from trio_pilot.brokers import Delivery, Patience, QueueAddress
from trio_pilot.brokers.headers import id_of
from trio_pilot.brokers.rabbitmq_channel import RabbitChannel, RabbitMessage
from trio_pilot.brokers.rabbitmq_connection import RabbitConnection, RabbitTimeouts
from trio_pilot.brokers.rabbitmq_consumer import RabbitConsumer
from trio_pilot.brokers.rabbitmq_errors import ACCESS_REFUSED, NO_ROUTE, NOT_FOUND, PRECONDITION_FAILED, ClosedError
from trio_pilot.brokers.rabbitmq_queue import RabbitQueue, find, find_existing, find_for_sending
from trio_pilot.brokers.reconnecting import opened
from trio_pilot.brokers.requeue import RequeueingSource
from trio_pilot.errors import BrokerError, PublishRefusedError

GRANTS_LEASES = (4, 3)  # the first version seen to grant one: 4.0 has a timeout for queues, but none for consumers
USUAL_TIMEOUT = 1800.0  # seconds: the default of the server's consumer_timeout
RENEW_AT = 10  # deliveries that a server has counted; from 4.0 on it drops a message after 20

TIMEOUTS = RabbitTimeouts()


def open_source(
    address: QueueAddress, patience: Patience, timeouts: RabbitTimeouts = TIMEOUTS
) -> AbstractAsyncContextManager["RabbitSource"]:
    """Open an incoming queue; it connects in the background."""
    return opened(partial(RabbitSource, address, patience, timeouts))


def open_sink(
    address: QueueAddress, patience: Patience, timeouts: RabbitTimeouts = TIMEOUTS
) -> AbstractAsyncContextManager["RabbitSink"]:
    """Open an outgoing queue; it connects in the background."""
    return opened(partial(RabbitSink, address, patience, timeouts))


class RabbitSource(RabbitQueue, RequeueingSource[RabbitChannel, RabbitMessage]):
    """An incoming queue.

    A delivery is settled on the channel by which it came. AMQP has no answer to that, so nothing is waited for: if the
    connection breaks just then, the broker has the event again, as it would if it had broken a moment earlier.
    """

    refusals = (BrokerError, ClosedError)

    def __init__(self, address: QueueAddress, patience: Patience, timeouts: RabbitTimeouts) -> None:
        super().__init__(address, patience, timeouts)
        self._copies = Copies()
        self._life = 0  # of the queue: how often it was found not to exist

    async def _open(self, connection: RabbitConnection) -> RabbitChannel:
        """Find the queue. Where it does not exist it begins a new life: what was done before cannot come again."""
        try:
            return await find_existing(connection, self.name)
        except ClosedError as error:
            if error.code not in (ACCESS_REFUSED, NOT_FOUND):
                raise
            self._life += error.code == NOT_FOUND
            return await find(connection, self.name)

    def new_consumer(self, prefetch: int, lease: float) -> RabbitConsumer:
        """Make a consumer. Where the server does not grant the lease, it takes back what is unsettled by its end."""
        return RabbitConsumer(self, prefetch, lease, self._timeouts.look)

    def lease_warning(self, lease: float) -> str:
        """Return a warning if the connected server does not grant such a lease."""
        channel = self._session.value
        if lease <= USUAL_TIMEOUT or channel is None or channel.connection.version >= GRANTS_LEASES:
            return ""
        version = ".".join(map(str, channel.connection.version)) or "(of another make)"
        return (
            f"; RabbitMQ {version} takes an event back after its consumer_timeout, usually {USUAL_TIMEOUT / 60:g} min:"
            " a task that takes longer goes on, but another pilot may run its event as well (not so with 4.3)"
        )

    def delivery(self, message: RabbitMessage) -> Delivery:
        """Make the delivery of a message. One without an id is known by its body."""
        message_id = message.message_id or id_of(message.body)
        return Delivery(
            self,
            self.name,
            message.body,
            message_id,
            self.attempt_of(message.headers, message_id, message.body),
            message,
            redelivered=message.redelivered,
            named=message.message_id is not None,
            headers=message.headers,
            origin=self._life,
        )

    def begin_settling(self, delivery: Delivery) -> None:
        """Mark a delivery as settled; a second ack would make RabbitMQ close the channel, and deliver all again."""
        super().begin_settling(delivery)
        delivery.tag.channel.unsettled -= 1

    def undo_settling(self, delivery: Delivery) -> None:
        """Mark a delivery as one that is still to be settled, and counts towards the prefetch."""
        super().undo_settling(delivery)
        delivery.tag.channel.unsettled += 1

    async def ack(self, message: RabbitMessage) -> None:
        """Acknowledge a message."""
        message.channel.write("basic_ack", message.tag)

    async def nack(self, message: RabbitMessage) -> None:
        """Return a message to its queue."""
        message.channel.write("basic_nack", message.tag, requeue=True)

    async def release(self, delivery: Delivery) -> None:
        """Return an event to its queue, as a copy where the server has counted many deliveries."""
        if (delivery.tag.deliveries or 0) < RENEW_AT:
            await self.nack(delivery.tag)
        else:
            await self.requeue(delivery, delivery.attempt - 1)

    async def send_copy(self, delivery: Delivery, queue: str, facts: Mapping[str, Any]) -> None:
        """Send a copy of an event, on the connection by which it came."""
        await self._copies.send(queue, delivery.tag, facts)

    def check_refusal(self, delivery: Delivery, refusal: Exception) -> None:
        """Raise ClosedError if the connection is lost: the event comes again, and needs no file."""
        if delivery.tag.is_lost:
            raise ClosedError(0, str(refusal)) from refusal

    def forget(self, message: RabbitMessage) -> None:
        """Let go of the body: a settled delivery may be remembered for long."""
        message.body = b""


class Copies:
    """Sends copies of events, confirmed, on the connections by which they came."""

    def __init__(self) -> None:
        self._channels: dict[str, RabbitChannel] = {}
        self._opening = trio.Lock()

    async def send(self, queue: str, message: RabbitMessage, headers: Mapping[str, Any]) -> None:
        """Send a copy to a queue. A queue that was deleted is declared again.

        Raises:
            BrokerError: the queue does not exist, or the user may not use it.
            ClosedError: the connection is lost, or the broker does not take the copy.
        """
        for again in (True, False):
            channel = await self._channel(queue, message.channel.connection)
            try:
                await channel.publish_copy(queue, message, headers)
            except ClosedError as error:
                self._channels.pop(queue, None)
                if error.code != NO_ROUTE or not again:
                    raise
            else:
                return

    async def _channel(self, queue: str, connection: RabbitConnection) -> RabbitChannel:
        """Return the channel by which a connection sends to a queue; it is opened when it is first needed."""
        async with self._opening:
            channel = self._channels.get(queue)
            if channel is None or channel.is_closed or channel.connection is not connection:
                channel = self._channels[queue] = await find_for_sending(connection, queue)
            return channel


class RabbitSink(RabbitQueue):
    """An outgoing queue. Any number of messages may wait for their confirms at once."""

    async def send(self, body: bytes, message_id: str, original: Delivery | None = None) -> None:
        """Send a message, on each new connection again until it is confirmed."""
        await self.until_done(partial(self._publish, body, message_id, original))

    async def _publish(self, body: bytes, message_id: str, original: Delivery | None, channel: RabbitChannel) -> None:
        try:
            if original:
                await channel.publish_copy(self.name, original.tag, {})
            else:
                await channel.publish(self.name, body, message_id)
        except ClosedError as error:
            # The other messages that were waiting on the channel are sent again.
            if error.code == PRECONDITION_FAILED and _refused_size(error) == len(body):
                raise PublishRefusedError(f"RabbitMQ refuses an output of {len(body)} bytes: {error}") from error
            if error.code == NO_ROUTE:
                await self._declare_again(channel)
            raise

    async def _open(self, connection: RabbitConnection) -> RabbitChannel:
        return await find_for_sending(connection, self.name)

    async def _declare_again(self, channel: RabbitChannel) -> None:
        """Close the channel: to open the next one, the queue is declared."""
        try:
            await channel.call("close")
        except ClosedError:
            return


def _refused_size(error: ClosedError) -> int | None:
    """Return the size of the message that is "larger than configured max size"."""
    found = re.search(r"message size (\d+)", str(error))
    return int(found[1]) if found else None
