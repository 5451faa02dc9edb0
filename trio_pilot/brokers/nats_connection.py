"""A connection to NATS JetStream by nats-py, awaitable from Trio.

A connection has a thread that runs asyncio from connect to close: it renews the leases of deliveries even while Trio is
busy. nats-py never connects again by itself, as `ReconnectingQueue` does that for every broker.

Nothing is bound to a connection: a delivery of one can be settled on the next, as long as its lease has not run out.
"""

import asyncio
import re
import ssl
import time
from collections.abc import Awaitable, Callable, Coroutine, Iterator, Mapping
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from functools import partial
from typing import Any

import nats.errors
import nats.js.errors
import trio
from nats.js.api import ConsumerConfig

from trio_pilot.brokers.nats_errors import RefusedError, text_of, translated
from trio_pilot.brokers.nats_headers import TolerantClient, size_of
from trio_pilot.brokers.nats_messages import NAK, PROGRESS, HeldMessages, NatsMessage, StreamPosition
from trio_pilot.brokers.reconnecting import LostError, Timeouts, TooLargeError
from trio_pilot.brokers.thread_bridge import Mailbox, Reply
from trio_pilot.errors import BrokerError
from trio_pilot.log import LOGGER
from trio_pilot.processes import threads

RENEWALS = 3  # in the time that a lease lasts
MOST_WAITING = 65536  # requests for messages that a queue may have: each idle pilot has one; the server's default is 512
FORBIDDEN = re.compile(r'permissions violation for publish to "([^"]+)"')  # in lower case, as nats-py has it
CREATE = "$JS.API.STREAM.CREATE"  # JetStream's wire API: the subject of a request for a new stream
NAME_IN_USE = 10058  # JetStream's error code: by a stream of another configuration


@dataclass(frozen=True, slots=True, kw_only=True)
class NatsTimeouts(Timeouts):
    """Seconds to wait for NATS."""

    connect: float = 15.0  # for TCP, TLS and the greeting together
    answer: int = 15  # for the server to answer; a stream elects a leader first
    close: float = 3.0  # to write what is left to write
    ping: float = 15.0  # between pings; two without an answer end the connection
    pull: float = 30.0  # for which the server keeps a request for messages; then the next request is sent


@dataclass(frozen=True, slots=True)
class NatsAddress:
    """Where a server is, and how to log in: with a user and a password, with a token, or not at all."""

    host: str
    port: int
    user: str
    secret: str = field(repr=False)
    tls: bool


class NatsConnection:
    """One connection to NATS, and the thread that drives it."""

    def __init__(self, address: NatsAddress, timeouts: NatsTimeouts) -> None:
        self.opened = Reply()  # after `timeouts.connect` at the most
        self.closed = Reply()
        self.ended = trio.Event()  # `timeouts.close` after `hang_up` at the most
        self.client = TolerantClient()
        self.timeouts = timeouts
        self.listeners: set[Callable[[], Awaitable[None]]] = set()  # how each listener is ended, in the thread
        self._address = address
        self._streams = self.client.jetstream(timeout=timeouts.answer)
        self._for_trio = Mailbox(trio.lowlevel.current_trio_token().run_sync_soon)
        self._for_asyncio = Mailbox(self._wake)
        self._replies: set[Reply] = {self.opened, self.closed}
        self._loop: asyncio.AbstractEventLoop | None = None
        self._tasks: set[asyncio.Task[None]] = set()  # asyncio itself keeps no reference to them
        self._asking: dict[str, dict[asyncio.Task[None], Reply]] = {}  # by the subject, in lower case
        self._over = asyncio.Event()
        self._was_connected = False
        self._is_closed = False
        self._before_close: Callable[[], Awaitable[None]] | None = None
        self._error: Exception = LostError("the connection is closed")

    # On Trio's side:

    async def drive(self) -> None:
        """Run asyncio in a thread, until the connection is closed."""
        try:
            await threads.run_sync(lambda: asyncio.run(self._run()), limiter=trio.CapacityLimiter(1))
        finally:
            self.ended.set()
            for reply in list(self._replies):
                reply.set(error=self._error)

    def hang_up(self) -> None:
        """Make the thread close the connection and end."""
        self.post(self._over.set)

    def post(self, work: Callable[[], object]) -> None:
        """Run `work` in the thread, while there is one."""
        if not self.ended.is_set():
            self._for_asyncio.put(work)

    async def call(self, work: Callable[[], Awaitable[Any]], subject: str = "") -> Any:
        """Run `work` in the thread, and return its result. A server that does not answer ends the connection.

        If this is cancelled before `work` starts, it does not run; later, it may run to its end.

        Raises:
            RefusedError: the server does not permit to publish to the `subject`.
        """
        await trio.lowlevel.checkpoint_if_cancelled()
        reply = Reply()
        if self.ended.is_set():
            raise LostError("the connection is closed")
        self._replies.add(reply)
        try:
            self.post(lambda: self.start(self._answer(reply, work, subject.lower())))
            return await reply.wait()
        finally:
            self._replies.discard(reply)

    async def find_stream(self, place: StreamPosition) -> None:
        """Make the stream of a queue, or use it as it is where it exists."""
        await self.call(partial(self._find_stream, place), f"{CREATE}.{place.stream}")

    async def find_consumer(self, place: StreamPosition) -> float:
        """Make the consumer of a queue, or use it as it is where it exists; return the seconds that a lease lasts."""
        lease: float = await self.call(partial(self._find_consumer, place))
        return lease

    async def publish(self, subject: str, body: bytes, headers: Mapping[str, str]) -> None:
        """Publish a message, and wait until a stream has stored it.

        Raises:
            GoneError: no stream keeps the subject.
            TooLargeError: the server would not take the message.
        """
        await self.call(partial(self._publish, subject, body, headers), subject)

    async def settle(self, place: StreamPosition, message: NatsMessage, answer: bytes) -> None:
        """Settle a message, and wait until the server has done so.

        Raises:
            GoneError: the consumer that delivered it does not exist any more.
        """
        await self.call(partial(self._settle, place, message, answer))

    def renew(self, held: HeldMessages, lease: float) -> None:
        """Start to renew the leases of the messages that are held."""
        self.post(lambda: self.start(self._renew(held, lease)))

    def give_back_at_close(self, place: StreamPosition, held: HeldMessages) -> None:
        """Release the messages that are held before the connection is closed."""
        self._before_close = partial(self._give_back, place, held)

    def _wake(self, do: Callable[[], None]) -> None:
        if self._loop is not None:
            with suppress(RuntimeError):  # the loop is closed
                self._loop.call_soon_threadsafe(do)

    # In the thread:

    def run_in_trio(self, work: Callable[[], object]) -> None:
        """Run `work` on Trio's side."""
        self._for_trio.put(work)

    def start(self, work: Coroutine[Any, Any, None]) -> None:
        """Start a task that lasts no longer than the connection."""
        if self._is_closed:
            work.close()
            return
        task = asyncio.create_task(work)
        self._tasks.add(task)
        task.add_done_callback(self._tasks.discard)

    def fail(self, error: Exception) -> None:
        """End the connection for a reason; the first reason counts."""
        if not self._over.is_set():
            self._error = translated(error, self.timeouts.answer)
            self._over.set()

    async def _run(self) -> None:
        self._loop = asyncio.get_running_loop()
        self._for_asyncio.do()  # what was posted before the loop ran
        connecting = asyncio.create_task(self._connect())
        await self._over.wait()
        connecting.cancel()
        await asyncio.wait([connecting])
        await self._close()
        self._is_closed = True

    async def _connect(self) -> None:
        try:
            async with asyncio.timeout(self.timeouts.connect):
                await self.client.connect(**self._options(), error_cb=self._on_error, closed_cb=self._on_close)
            self._was_connected = True
            self._check_tls()
            self.run_in_trio(self.opened.set)
        except Exception as error:  # any error: without an answer, `opened` would be waited for without end
            self.fail(error)

    def _options(self) -> dict[str, Any]:
        address = self._address
        options: dict[str, Any] = {
            "servers": f"nats://{address.host}:{address.port}",
            "name": "trio-pilot",
            "connect_timeout": self.timeouts.connect,
            "ping_interval": self.timeouts.ping,
            "allow_reconnect": False,
        }
        if address.tls:
            options["tls"] = ssl.create_default_context()
        if address.user:
            return options | {"user": address.user, "password": self._secret}
        return options | ({"token": self._secret} if address.secret else {})

    def _secret(self) -> str:
        """Return the secret to nats-py, which asks for it once it has met the server."""
        self._check_tls()
        return self._address.secret

    def _check_tls(self) -> None:
        """Raise an error where nats-py would go on: it sends secrets in the clear to a server that offers no TLS."""
        if self._address.tls and not self.client._server_info.get("tls_required"):
            raise BrokerError("offers no TLS, which the address asks for with tls://")

    async def _on_error(self, error: Exception) -> None:
        """Handle an error. After an error that comes before it is connected, nats-py would try without end."""
        if not self._was_connected:
            raise error
        refused = FORBIDDEN.search(str(error))
        askers = self._asking.pop(refused[1], {}) if refused else {}
        for task, reply in askers.items():
            self.run_in_trio(partial(reply.set, error=RefusedError(text_of(error))))
            task.cancel()
        if not askers:
            self.fail(error)

    async def _on_close(self) -> None:
        self.fail(self.client.last_error or LostError("the server has closed the connection"))

    async def _close(self) -> None:
        try:
            async with asyncio.timeout(self.timeouts.close):
                if self._before_close and self.client.is_connected:
                    await self._before_close()
                await self.client.close()
        except Exception as error:  # the end of the thread is the end of its sockets as well
            LOGGER.debug("closing a connection to NATS: %s", error)

    async def _answer(self, reply: Reply, work: Callable[[], Awaitable[Any]], subject: str) -> None:
        with self._asks(subject, reply):
            try:
                value = await work()
            except nats.errors.TimeoutError as error:
                self.fail(error)
            except Exception as error:
                self.run_in_trio(partial(reply.set, error=translated(error, self.timeouts.answer)))
            else:
                self.run_in_trio(partial(reply.set, value))

    @contextmanager
    def _asks(self, subject: str, reply: Reply) -> Iterator[None]:
        """Note a request, by its subject: a server's refusal names the subject, but not the request."""
        task = asyncio.current_task()
        assert task  # noqa: S101 -- this runs in one
        self._asking.setdefault(subject, {})[task] = reply
        try:
            yield
        finally:
            askers = self._asking.get(subject, {})
            askers.pop(task, None)
            if not askers:
                self._asking.pop(subject, None)

    async def _find_stream(self, place: StreamPosition) -> None:
        try:
            await self._streams.add_stream(name=place.stream, subjects=[place.subject])
        except nats.js.errors.APIError as error:
            if error.err_code != NAME_IN_USE:
                raise
            info = await self._streams.stream_info(place.stream)
            if place.subject not in (info.config.subjects or ()):
                raise BrokerError(f"has a stream {place.stream} without the subject {place.subject}") from error

    async def _find_consumer(self, place: StreamPosition) -> float:
        try:
            info = await self._streams.consumer_info(place.stream, place.consumer)
        except nats.js.errors.NotFoundError:
            wanted = ConsumerConfig(
                durable_name=place.consumer,
                filter_subject=place.subject,
                max_ack_pending=-1,
                max_waiting=MOST_WAITING,
            )
            info = await self._streams.add_consumer(place.stream, wanted)
        lease: float | None = info.config.ack_wait
        if info.config.deliver_subject or not lease:
            raise BrokerError(f"has a consumer {place.consumer} of {place.stream} without pulls, or without acks")
        return lease

    async def _publish(self, subject: str, body: bytes, headers: Mapping[str, str]) -> None:
        if len(body) + size_of(headers) > self.client.max_payload:  # a refusal of the server's ends the connection
            raise TooLargeError(f"its max_payload is {self.client.max_payload}")
        await self._streams.publish(subject, body, headers=dict(headers))

    async def _renew(self, held: HeldMessages, lease: float) -> None:
        try:
            while True:
                held.drop_lost()
                await self._renew_once(held.all(), held, lease)
                await asyncio.sleep(lease / RENEWALS)
        except nats.errors.Error as error:
            self.fail(error)

    async def _renew_once(self, messages: list[NatsMessage], held: HeldMessages, lease: float) -> None:
        began = time.monotonic()
        for message in messages:
            await self.client.publish(message.answer_to, message.late_answer or PROGRESS)
        if messages:
            await self.client.flush(self.timeouts.answer)  # after which the server has read them
        for message in messages:
            message.held_until = began + lease
            if message.late_answer:
                held.drop(message)

    async def _settle(self, place: StreamPosition, message: NatsMessage, answer: bytes) -> None:
        if answer == NAK:
            await self._forget_dead_clients(place)
        await self.client.request(message.answer_to, answer, timeout=self.timeouts.answer)

    async def _forget_dead_clients(self, place: StreamPosition) -> None:
        """Make the server forget requests of clients that are gone, which it does when asked about the consumer.

        Else nats-server 2.9 loses sight of a message that is given back, until its lease has run out, when all clients that
        wait are gone (and delivers the last message of the stream once more: it takes back one step too many).
        """
        await self._streams.consumer_info(place.stream, place.consumer)

    async def _give_back(self, place: StreamPosition, held: HeldMessages) -> None:
        for end in list(self.listeners):
            await end()
        for message in held.all():
            held.drop(message)
            await self._settle(place, message, message.late_answer or NAK)
