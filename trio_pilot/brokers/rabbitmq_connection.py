"""AMQP by pika, awaitable from Trio. Nothing else imports pika.

A connection has a thread that runs pika's I/O loop from connect to close, so that heartbeats never wait for a task. Trio
reaches it through `add_callback_threadsafe`, it reaches Trio through `TrioToken.run_sync_soon`, and what one asks the other
is a `Reply`. Each time that the threads take turns costs as much CPU as a message: so of many small ones a few go together,
where nothing waits for them (with tasks of 2 ms, `--prefetch 32` and 8 slots that makes 1.4 times the events a second,
measured). A channel that the server closes raises nothing in pika: here it fails every reply that is outstanding.
"""

import re
import socket
import ssl
import weakref
from collections import Counter
from collections.abc import Callable, Mapping
from contextlib import suppress
from copy import copy
from dataclasses import dataclass, field
from functools import partial
from typing import Any

import pika
import pika.exceptions
import trio

from trio_pilot.brokers.reconnecting import ConnectError, LostError
from trio_pilot.brokers.thread_bridge import Mailbox, Reply
from trio_pilot.errors import BrokerError
from trio_pilot.log import LOGGER

CONNECT_TIMEOUT = 15.0  # seconds for TCP, TLS and the AMQP handshake together
ANSWER_TIMEOUT = 30.0  # seconds for the server to answer a declare or a consume: a quorum queue elects a leader first
HEARTBEAT = 20  # seconds; after two of them in silence a connection is dead. A server that wants fewer has its way
LINGER = 0.01  # seconds for which what is to be sent may wait for more of it, where that costs no slot its event
CLOSE_TIMEOUT = 3.0  # seconds for the server to confirm a close; after that the socket is just closed

# Reply codes of AMQP 0-9-1, "Constants".
NO_ROUTE = 312
ACCESS_REFUSED = 403
NOT_FOUND = 404
PRECONDITION_FAILED = 406
NOT_ALLOWED = 530

METHOD_ON_CHANNEL_0 = b"\x01\x00\x00"  # how the first frame of a server begins
CANCELLED = "the server has cancelled our consumer: its consumer_timeout is over, or the queue was deleted or moved"
PERSISTENT = 2
DELIVERY_COUNT = "x-delivery-count"
MOST_MESSAGE_ID = 255  # bytes of a short string


class ClosedError(LostError):
    """A channel is closed: by the server, for the reason that `code` says, or with its connection (`code` 0)."""

    def __init__(self, code: int, text: str) -> None:
        super().__init__(text)
        self.code = code


@dataclass(frozen=True, slots=True)
class RabbitAddress:
    """Where a broker is, and who we are to it. No user and no password means guest/guest."""

    host: str
    port: int | None
    virtual_host: str
    user: str
    password: str = field(repr=False)
    tls: bool


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
    def message_id(self) -> str | None:
        """What its sender calls it."""
        message_id: str | None = self.properties.message_id
        return message_id

    @property
    def headers(self) -> dict[str, Any]:
        """What its senders and the server say of it."""
        return self.properties.headers or {}

    @property
    def deliveries(self) -> int | None:
        """How often it was delivered before and came back, where the queue counts: quorum queues do, once it has."""
        return self.headers.get(DELIVERY_COUNT)


class RabbitConnection:
    """One AMQP connection, and the thread that drives it.

    Messages and settlements may wait for LINGER, until there are `batch` of them; what is answered is asked at once.
    """

    def __init__(self, address: RabbitAddress, batch: int = 1) -> None:
        self.opened = Reply()  # pika gives up after CONNECT_TIMEOUT
        self.ended = trio.Event()  # CLOSE_TIMEOUT after `hang_up` at the most
        self._parameters = _parameters(address)
        self._for_trio = Mailbox(trio.lowlevel.current_trio_token().run_sync_soon)
        self._for_pika = Mailbox(self._wake, batch, self._later)
        self._pika: pika.SelectConnection | None = None
        self._hang_up = False
        self._is_blocked = False  # the server reads nothing more from us, for want of memory or disk
        self._posted: weakref.WeakSet[Reply] = weakref.WeakSet()
        self._channels: set[RabbitChannel] = set()

    async def drive(self) -> None:
        """Run pika's I/O loop in a thread, until the connection is closed."""
        try:
            await trio.to_thread.run_sync(self._drive, limiter=trio.CapacityLimiter(1))
        finally:
            self.ended.set()
            for reply in list(self._posted):  # the loop may have stopped before it came to them
                reply.tell(error=ClosedError(0, "the connection is closed"))

    @property
    def version(self) -> tuple[int, ...]:
        """The server's, as far as it is RabbitMQ's and of numbers: (4, 3); empty for a server of another make."""
        said = (self._pika.server_properties if self._pika else None) or {}
        found = re.match(r"(\d+)\.(\d+)", str(said.get("version"))) if said.get("product") == "RabbitMQ" else None
        return tuple(map(int, found.groups())) if found else ()

    async def open_channel(self) -> "RabbitChannel":
        """Open a channel."""
        reply = Reply()
        self.post(lambda: self._open_channel(reply), reply)
        channel: RabbitChannel = await self.answer(reply)
        return channel

    async def update_secret(self, secret: str) -> None:
        """Go on with another password or token, without a new connection (an extension of RabbitMQ's, from 3.8 on).

        Raises:
            ClosedError: the server has closed the connection instead.
        """
        reply = Reply()
        self.post(partial(self._update_secret, secret, reply), reply)
        await self.answer(reply)

    def _update_secret(self, secret: str, reply: Reply) -> None:
        with suppress(pika.exceptions.AMQPError):  # closed in the meantime
            if self._pika:
                self._pika.update_secret(secret, "renewed", lambda _: self.tell(reply.tell))

    async def answer(self, reply: Reply) -> Any:
        """Wait for an answer of the server; hang up on one that gives none, unless it blocks us, and so reads nothing."""
        self._for_pika.hurry()
        waiting = True
        while waiting:
            with trio.move_on_after(ANSWER_TIMEOUT):
                return await reply.wait()
            waiting = self._is_blocked
        self.hang_up()
        raise ClosedError(0, f"the broker has not answered for {ANSWER_TIMEOUT:g} s")

    def hang_up(self) -> None:
        """Have the thread close the connection and end."""
        self._hang_up = True
        self.run(self._close)
        self._for_pika.hurry()

    def post(self, work: Callable[[], object], reply: Reply) -> None:
        """Have `work` done in the thread; with no thread any more, fail the reply."""
        if self._pika is None or self.ended.is_set():
            reply.tell(error=ClosedError(0, "the connection is closed"))
        else:
            self._posted.add(reply)
            self.run(work)

    def run(self, work: Callable[[], object]) -> None:
        """Have `work` done in the thread, while there is one."""
        if self._pika is not None:
            self._for_pika.put(work)

    def _wake(self, do: Callable[[], None]) -> None:
        if self._pika is not None:
            self._pika.ioloop.add_callback_threadsafe(do)

    def _later(self, do: Callable[[], None]) -> None:
        if self._pika is not None:
            self._pika.ioloop.call_later(LINGER, do)

    def tell(self, work: Callable[..., object], *arguments: Any) -> None:
        """From the thread: have `work` done on Trio's side."""
        self._for_trio.put(partial(work, *arguments))

    def forget(self, channel: "RabbitChannel") -> None:
        """From the thread: a channel has ended."""
        self._channels.discard(channel)

    def _drive(self) -> None:
        try:
            self._pika = pika.SelectConnection(
                self._parameters,
                on_open_callback=lambda _: self.tell(self.opened.tell),
                on_open_error_callback=lambda _, error: self._end(error),
                on_close_callback=lambda _, error: self._end(error),
            )
            self._pika.add_on_connection_blocked_callback(self._blocked)
            self._pika.add_on_connection_unblocked_callback(self._unblocked)
            if self._hang_up:  # asked before there was anything to ask
                self._close()
            self._pika.ioloop.start()
        except Exception as error:  # pika's own state gone wrong must not end the pilot
            self._end(error)
        finally:
            if self._pika is not None:
                self._pika.ioloop.close()

    def _blocked(self, _connection: object, frame: Any) -> None:
        self._is_blocked, why = True, frame.method.reason
        LOGGER.warning("RabbitMQ at %s takes no more from us for now, and outputs wait: %s", self._parameters.host, why)

    def _unblocked(self, _connection: object, _frame: object) -> None:
        self._is_blocked = False
        LOGGER.warning("RabbitMQ at %s takes messages again", self._parameters.host)

    def _end(self, error: BaseException) -> None:
        """Take note that the connection is closed, or could not be opened: fail who waits for it, end the thread."""
        foreign = False
        if self._pika is not None:
            foreign = _is_foreign(self._pika, error)
            self._pika.ioloop.stop()
        refusal = BrokerError("does not speak AMQP 0-9-1") if foreign else _translate(error)
        self.tell(partial(self.opened.tell, error=refusal))
        for channel in list(self._channels):
            channel.end(ClosedError(0, _text(error)))

    def _close(self) -> None:
        connection = self._pika
        if connection is None or connection.is_closed or connection.is_closing:
            return
        if connection._transport and not connection.is_open:
            # During the handshake pika 1.4's close() trips over itself; the end of the stream it can take.
            connection._transport._sock.shutdown(socket.SHUT_RDWR)
            return
        # pika has no deadline for a close, and no public way to hang up on a server that does not answer.
        connection.ioloop.call_later(CLOSE_TIMEOUT, lambda: connection._adapter_disconnect_stream())
        connection.close()

    def _open_channel(self, reply: Reply) -> None:
        connection = self._pika
        if connection is None or not connection.is_open:
            self.tell(partial(reply.tell, error=ClosedError(0, "the connection is closed")))
            return
        channel = RabbitChannel(self, reply)
        self._channels.add(channel)
        channel.attach(connection.channel(on_open_callback=channel.opened))


class RabbitChannel:
    """One AMQP channel. Every wait on it ends with ClosedError when the channel does."""

    def __init__(self, connection: RabbitConnection, opening: Reply) -> None:
        self.connection = connection
        self.closed = Reply()
        self.unsettled = 0  # deliveries that came by it and are not settled: who settles them counts
        self._pika: Any = None
        self._opening = opening
        self._waiting: set[Reply] = {opening, self.closed}  # this and all below is the thread's
        self._error: ClosedError | None = None
        self._published = 0
        self._unconfirmed: dict[int, tuple[str | None, Reply]] = {}
        self._returned: Counter[str | None] = Counter()

    # On Trio's side:

    @property
    def is_closed(self) -> bool:
        """Whether its end has been heard of."""
        return self.closed.is_told

    async def ask(self, method: str, *arguments: Any, **options: Any) -> Any:
        """Call a method of the channel that the server answers, and wait for the answer."""

        def start(reply: Reply) -> None:
            getattr(self._pika, method)(*arguments, callback=partial(self._answer, reply), **options)

        return await self.connection.answer(self._post(start))

    async def call(self, method: str, *arguments: Any, **options: Any) -> None:
        """Call a method of the channel that has no answer, and wait until it is written."""

        def start(reply: Reply) -> None:
            getattr(self._pika, method)(*arguments, **options)
            self._answer(reply)

        await self.connection.answer(self._post(start))

    def write(self, method: str, *arguments: Any, **options: Any) -> None:
        """Have a method of the channel called that has no answer, without waiting for it; before we close, it is written.

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
        """Ask the server to confirm what is published from now on."""
        await self.ask("confirm_delivery", self._confirmed)
        await self.call("add_on_return_callback", self._came_back)

    async def publish(self, queue: str, body: bytes, message_id: str) -> None:
        """Publish a lasting message to a queue, and wait for the confirm. A missing queue is ClosedError(NO_ROUTE)."""
        message_id = message_id.encode(errors="replace")[:MOST_MESSAGE_ID].decode(errors="ignore")
        await self._publish(queue, body, pika.BasicProperties(delivery_mode=PERSISTENT, message_id=message_id))

    async def publish_copy(self, queue: str, arrival: RabbitMessage, headers: Mapping[str, Any]) -> None:
        """Publish what has arrived once more, with some headers added, as `publish` does."""
        await self._publish(queue, arrival.body, _copied(arrival.properties, headers))

    async def _publish(self, queue: str, body: bytes, properties: pika.BasicProperties) -> None:
        def start(reply: Reply) -> None:
            self._pika.basic_publish("", queue, body, properties, mandatory=True)
            self._published += 1  # the server numbers the messages of a channel in confirm mode from 1
            self._unconfirmed[self._published] = properties.message_id, reply

        await self._post(start).wait()

    async def consume(
        self, queue: str, consumer_tag: str, arrived: Callable[[RabbitMessage], object], arguments: Mapping[str, Any]
    ) -> None:
        """Have `arrived` called, on Trio's side, for each message of a queue."""

        def deliver(_channel: object, method: Any, properties: Any, body: bytes) -> None:
            self.connection.tell(arrived, RabbitMessage(self, method.delivery_tag, body, method.redelivered, properties))

        await self.ask("basic_consume", queue, deliver, consumer_tag=consumer_tag, arguments=dict(arguments))

    def _post(self, start: Callable[[Reply], object]) -> Reply:
        reply = Reply()
        self.connection.post(partial(self._start, start, reply), reply)
        return reply

    # In the thread:

    def attach(self, channel: Any) -> None:
        """Follow pika's channel."""
        self._pika = channel
        channel.add_on_close_callback(lambda _, error: self.end(_closed(error)))
        channel.add_on_cancel_callback(lambda _: channel.close(reply_text=CANCELLED))

    def opened(self, _channel: object) -> None:
        """Hand the channel over to who asked for it."""
        self._answer(self._opening, self)

    def end(self, error: ClosedError) -> None:
        """Fail everybody who waits: the channel is closed."""
        if self._error is None:
            self._error = error
            self.connection.forget(self)
            for reply in self._waiting:
                self.connection.tell(partial(reply.tell, error=error))

    def _start(self, start: Callable[[Reply], object], reply: Reply) -> None:
        self._waiting.add(reply)
        try:
            if self._error is not None:
                raise self._error
            start(reply)
        except pika.exceptions.AMQPError as error:
            self._answer(reply, error=ClosedError(0, _text(error)))
        except Exception as error:  # the caller's; the connection is the others' as well
            self._answer(reply, error=error)

    def _answer(self, reply: Reply, value: Any = None, error: Exception | None = None) -> None:
        self._waiting.discard(reply)
        self.connection.tell(reply.tell, value, error)

    def _came_back(self, _channel: object, _method: object, properties: Any, _body: bytes) -> None:
        """Note a message for which there was no queue. The server returns it first, and confirms it all the same."""
        self._returned[properties.message_id] += 1

    def _confirmed(self, frame: Any) -> None:
        """Take a confirm, of one message or of all up to one."""
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


# What the server makes of a message, and what would have it make more of one, or refuse it.
_NOT_COPIED = DELIVERY_COUNT, "x-acquired-count", "CC", "BCC"


def _copied(properties: pika.BasicProperties, headers: Mapping[str, Any]) -> pika.BasicProperties:
    """Give the properties for a copy of a message. They say as before who sent it, but not as whom we are logged in."""
    copied = copy(properties)
    kept = {name: value for name, value in (properties.headers or {}).items() if name not in _NOT_COPIED}
    copied.headers, copied.delivery_mode, copied.user_id = {**kept, **headers}, PERSISTENT, None
    return copied


def _parameters(address: RabbitAddress) -> pika.ConnectionParameters:
    given: dict[str, Any] = {"host": address.host, "virtual_host": address.virtual_host}
    if address.port:
        given["port"] = address.port
    if address.user or address.password:
        given["credentials"] = pika.PlainCredentials(address.user, address.password)
    if address.tls:
        given["ssl_options"] = pika.SSLOptions(ssl.create_default_context(), address.host)
    return pika.ConnectionParameters(
        **given,
        stack_timeout=CONNECT_TIMEOUT,
        heartbeat=lambda _, servers: int(min(servers or HEARTBEAT, HEARTBEAT)),
        client_properties={"product": "trio-pilot"},
    )


# pika tells why a broker closed a connection that was not open yet in the text of another error only.
_CLOSED_BY_BROKER = re.compile(r"ConnectionClosedByBroker: \((\d+)\) (.*)")


def _is_foreign(connection: pika.SelectConnection, error: BaseException) -> bool:
    """Tell whether a server's first words were not those of AMQP 0-9-1. One that says nothing may only not be up yet."""
    if unread := connection._frame_buffer:
        return not connection.bytes_received and not METHOD_ON_CHANNEL_0.startswith(unread[:3])
    incompatible = any(isinstance(cause, pika.exceptions.IncompatibleProtocolError) for cause in _causes(error))
    return incompatible and connection.bytes_received > 0


def _translate(error: BaseException) -> Exception:
    """Tell a refusal, which lasts, from a connection that could not be made, or was lost on the way."""
    for cause in _causes(error):
        if isinstance(cause, pika.exceptions.AuthenticationError):
            return BrokerError("refuses our user and password, or token")
        if closed := _CLOSED_BY_BROKER.search(str(cause)):
            code, text = int(closed[1]), closed[2]
            if code == ACCESS_REFUSED and isinstance(cause, pika.exceptions.ProbableAuthenticationError):
                return BrokerError("refuses our user and password, or token")
            if code in (ACCESS_REFUSED, NOT_ALLOWED):
                return BrokerError(f"refuses us: {text}")
    return ConnectError(_text(error))


def _causes(error: BaseException) -> list[BaseException]:
    """Give an error and all that pika has wrapped in it."""
    inner = [one for one in (*error.args, *getattr(error, "exceptions", ())) if isinstance(one, BaseException)]
    if isinstance(exception := getattr(error, "exception", None), BaseException):
        inner.append(exception)
    return [error, *(deeper for one in inner for deeper in _causes(one))]


def _text(error: BaseException) -> str:
    """Say an error of pika's in the words of its innermost cause."""
    cause = _causes(error)[-1]
    text = getattr(cause, "reply_text", None) or getattr(cause, "strerror", None) or str(cause)
    return str(text) or type(cause).__name__


def _closed(error: Exception) -> ClosedError:
    return ClosedError(getattr(error, "reply_code", 0), _text(error))
