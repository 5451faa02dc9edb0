"""A channel of RabbitMQ by pika, awaitable from Trio.

A channel that the server closes raises nothing in pika: here its end fails every reply that is outstanding.
"""

from collections import Counter
from collections.abc import Callable, Mapping
from contextlib import suppress
from dataclasses import dataclass
from functools import partial
from typing import Any

import pika
import pika.exceptions

from trio_pilot.brokers.rabbitmq_connection import RabbitConnection
from trio_pilot.brokers.rabbitmq_errors import NO_ROUTE, ClosedError, closed_error, text_of
from trio_pilot.brokers.rabbitmq_properties import DELIVERY_COUNT, PERSISTENT, copied
from trio_pilot.brokers.thread_bridge import Reply

CANCELLED = "the server has cancelled the consumer: its consumer_timeout is over, or the queue was deleted or moved"
MOST_MESSAGE_ID = 255  # bytes of a short string


@dataclass(slots=True)
class RabbitMessage:
    """A message as the server delivers it."""

    channel: "RabbitChannel"
    tag: int
    body: bytes
    redelivered: bool
    properties: pika.BasicProperties
    settled: bool = False

    @property
    def is_lost(self) -> bool:
        """Whether the channel by which it came is closed: then the server delivers it again."""
        return self.channel.is_closed

    @property
    def message_id(self) -> str | None:
        """The id that its sender gave it; None for an empty one. Bytes that are not UTF-8 are escaped."""
        given: str | bytes | None = self.properties.message_id
        return (given.decode(errors="backslashreplace") if isinstance(given, bytes) else given) or None

    @property
    def headers(self) -> dict[str, Any]:
        """The headers that its senders and the server have set."""
        return self.properties.headers or {}

    @property
    def deliveries(self) -> int | None:
        """How often it was delivered before and came back, where the queue counts: quorum queues do, from the first on."""
        count = self.headers.get(DELIVERY_COUNT)  # in other queues, whatever the sender has written
        return count if isinstance(count, int) else None


class RabbitChannel:
    """One AMQP channel. Every wait on it ends with ClosedError when the channel does."""

    def __init__(self, connection: RabbitConnection, opening: Reply) -> None:
        self.connection = connection
        self.closed = Reply()
        self.unsettled = 0  # deliveries that came by it and are not settled, counted by the code that settles them
        self._opening = opening
        self._pika: Any = None  # this and all below is used in the thread only
        self._waiting: set[Reply] = {opening, self.closed}
        self._error: ClosedError | None = None
        self._published = 0
        self._unconfirmed: dict[int, tuple[str | None, Reply]] = {}
        self._returned: Counter[str | None] = Counter()

    # On Trio's side:

    @property
    def is_closed(self) -> bool:
        """Whether Trio's side knows that it is closed."""
        return self.closed.is_set

    async def ask(self, method: str, *arguments: Any, **options: Any) -> Any:
        """Call a method of pika's channel that the server answers, and wait for the answer."""

        def start(reply: Reply) -> None:
            getattr(self._pika, method)(*arguments, callback=partial(self._answer, reply), **options)

        return await self.connection.answer(self._post(start))

    async def call(self, method: str, *arguments: Any, **options: Any) -> None:
        """Call a method of pika's channel that has no answer, and wait until it is written."""

        def start(reply: Reply) -> None:
            getattr(self._pika, method)(*arguments, **options)
            self._answer(reply)

        await self.connection.answer(self._post(start))

    def write(self, method: str, *arguments: Any, **options: Any) -> None:
        """Call a method of pika's channel that has no answer, without waiting; it is written before the connection closes.

        Raises:
            ClosedError: the channel is known to be closed.
        """
        if self.is_closed:
            raise ClosedError(0, "the channel is closed")

        def work() -> None:
            with suppress(pika.exceptions.AMQPError):  # closed in the meantime
                getattr(self._pika, method)(*arguments, **options)

        self.connection.run(work)

    async def confirm_publishes(self) -> None:
        """Ask the server to confirm each message that is published from now on."""
        await self.ask("confirm_delivery", self._confirmed)
        await self.call("add_on_return_callback", self._came_back)

    async def publish(self, queue: str, body: bytes, message_id: str) -> None:
        """Publish a persistent message to a queue, and wait for the confirm. A missing queue is ClosedError(NO_ROUTE)."""
        message_id = message_id.encode(errors="replace")[:MOST_MESSAGE_ID].decode(errors="ignore")
        await self._publish(queue, body, pika.BasicProperties(delivery_mode=PERSISTENT, message_id=message_id))

    async def publish_copy(self, queue: str, message: RabbitMessage, headers: Mapping[str, Any]) -> None:
        """Publish a received message again, with some headers added, as `publish` does."""
        message_id = message.message_id or "without an id"
        properties = copied(message.properties, headers, self.connection.frame_max, message_id)
        await self._publish(queue, message.body, properties)

    async def _publish(self, queue: str, body: bytes, properties: pika.BasicProperties) -> None:
        def start(reply: Reply) -> None:
            self._pika.basic_publish("", queue, body, properties, mandatory=True)
            self._published += 1  # the server numbers the messages of a channel in confirm mode from 1
            self._unconfirmed[self._published] = properties.message_id, reply

        await self._post(start).wait()

    async def consume(
        self, queue: str, consumer_tag: str, arrived: Callable[[RabbitMessage], object], arguments: Mapping[str, Any]
    ) -> None:
        """Start to consume a queue: `arrived` is called, on Trio's side, with each message."""

        def deliver(_channel: object, method: Any, properties: Any, body: bytes) -> None:
            message = RabbitMessage(self, method.delivery_tag, body, method.redelivered, properties)
            self.connection.run_in_trio(arrived, message)

        await self.ask("basic_consume", queue, deliver, consumer_tag=consumer_tag, arguments=dict(arguments))

    def _post(self, start: Callable[[Reply], object]) -> Reply:
        reply = Reply()
        self.connection.post(partial(self._start, start, reply), reply)
        return reply

    # In the thread:

    def open(self) -> None:
        """Open pika's channel."""
        try:
            self._pika = self.connection.open_channel(self._opened, self._end)
        except ClosedError as error:
            self._answer(self._opening, error=error)
            return
        self._pika.add_on_close_callback(lambda _, error: self._end(closed_error(error)))
        self._pika.add_on_cancel_callback(lambda _: self._pika.close(reply_text=CANCELLED))

    def _opened(self, _channel: object) -> None:
        self._answer(self._opening, self)

    def _end(self, error: ClosedError) -> None:
        """Note that the channel is closed, and fail every wait on it."""
        if self._error is None:
            self._error = error
            self.connection.forget(self._end)
            for reply in self._waiting:
                self.connection.run_in_trio(partial(reply.set, error=error))

    def _start(self, start: Callable[[Reply], object], reply: Reply) -> None:
        self._waiting.add(reply)
        try:
            if self._error is not None:
                raise self._error
            start(reply)
        except pika.exceptions.AMQPError as error:
            self._answer(reply, error=ClosedError(0, text_of(error)))
        except Exception as error:  # of this request; other requests use the connection as well
            self._answer(reply, error=error)

    def _answer(self, reply: Reply, value: Any = None, error: Exception | None = None) -> None:
        self._waiting.discard(reply)
        self.connection.run_in_trio(reply.set, value, error)

    def _came_back(self, _channel: object, _method: object, properties: Any, _body: bytes) -> None:
        """Note a message for which there was no queue. The server returns it first, and confirms it all the same."""
        self._returned[properties.message_id] += 1

    def _confirmed(self, frame: Any) -> None:
        """Handle a confirm, of one message or of all up to one."""
        tag = frame.method.delivery_tag
        tags = [one for one in self._unconfirmed if one <= tag] if frame.method.multiple else [tag]
        for one in tags:
            message_id, reply = self._unconfirmed.pop(one)
            self._answer(reply, error=self._refusal(frame.method, message_id))

    def _refusal(self, method: Any, message_id: str | None) -> ClosedError | None:
        if self._returned[message_id]:
            self._returned -= Counter([message_id])
            return ClosedError(NO_ROUTE, "there is no such queue any more")
        return ClosedError(0, "the broker could not store the message") if method.NAME == "Basic.Nack" else None


async def open_channel(connection: RabbitConnection) -> RabbitChannel:
    """Open a channel."""
    reply = Reply()
    channel = RabbitChannel(connection, reply)
    connection.post(channel.open, reply)
    await connection.answer(reply)
    return channel
