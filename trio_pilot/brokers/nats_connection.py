"""NATS JetStream by nats-py, awaitable from Trio. Nothing else imports nats.

A connection has a thread that runs asyncio from connect to close: it renews the leases of what was delivered whatever Trio
is at. It is never nats-py that connects again, as `Link` does that for every broker.

Nothing is bound to a connection: what one has delivered can be settled on the next, as long as its lease has not run out.
"""

import asyncio
import json
import re
import ssl
import time
import weakref
from collections.abc import Awaitable, Callable, Coroutine, Iterator, Mapping
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from datetime import datetime
from functools import partial
from typing import Any

import nats.errors
import nats.js.errors
import trio
from nats.aio.client import Client
from nats.aio.msg import Msg
from nats.aio.subscription import Subscription
from nats.js.api import ConsumerConfig

from trio_pilot.brokers.reconnecting import ConnectError, LostError
from trio_pilot.brokers.thread_bridge import Mailbox, Reply
from trio_pilot.errors import BrokerError
from trio_pilot.log import LOGGER

CONNECT_TIMEOUT = 15.0  # seconds for TCP, TLS and the greeting together
ANSWER_TIMEOUT = 15  # seconds for the server to answer; a stream elects a leader first
CLOSE_TIMEOUT = 3.0  # seconds to write what is left to write
PING_INTERVAL = 15.0  # seconds; two without an answer end the connection
RENEWALS = 3  # in the time that a lease lasts

PULL_EXPIRES = 30.0  # seconds that the server keeps a request for messages; then we ask anew
PULL_MARGIN = 10.0  # seconds after which a request is taken for lost, as no answer came at all
QUIET = 0.03  # seconds without a message after which none is on its way
PULL_PAUSE = 1.0  # seconds before the next request, where the server refuses them

MOST_WAITING = 65536  # requests for messages that a queue may have: each idle pilot has one; the server's default is 512
NANOSECONDS = 10**9
FORBIDDEN = re.compile(r'permissions violation for publish to "([^"]+)"')  # in small letters, as nats-py has it
REFUSED = "refuses our user and password, or token"

# JetStream's wire API: the subject that asks for messages, its status codes, and what is said of a delivery.
CREATE = "$JS.API.STREAM.CREATE"
NEXT = "$JS.API.CONSUMER.MSG.NEXT"
STATUS, DESCRIPTION, PENDING = "Status", "Description", "Nats-Pending-Messages"
EXPIRED = ("404", "408")
NAME_IN_USE = 10058  # by a stream that was not made as we would make it
NOT_ENABLED = 10039  # for this account
ACK, NAK, PROGRESS, TERM = b"+ACK", b"-NAK", b"+WPI", b"+TERM"


class GoneError(LostError):
    """A stream, or the consumer of a delivery, is not there (any more)."""


class RefusedError(Exception):
    """The server does not let us do this."""


class TooLargeError(Exception):
    """The server takes no message of this size."""


@dataclass(frozen=True, slots=True)
class NatsAddress:
    """Where a server is, and who we are to it: a user with a password, the bearer of a token, or nobody."""

    host: str
    port: int
    user: str
    secret: str = field(repr=False)
    tls: bool


@dataclass(frozen=True, slots=True)
class StreamPosition:
    """What a queue is in JetStream: a stream that keeps one subject, and a consumer that all who take from it share."""

    stream: str
    subject: str
    consumer: str


@dataclass(slots=True, eq=False, weakref_slot=True)
class NatsMessage:
    """A message as the server delivers it."""

    sequence: int  # in its stream
    stored: datetime  # when its stream got it
    redelivered: bool
    answer_to: str = field(repr=False)
    headers: Mapping[str, str]
    body: bytes = field(repr=False)
    held_until: float  # seconds of time.monotonic: until then nobody else is given it
    settled: bool = False
    late_answer: bytes = b""  # how it is to be settled, where nobody waits for that any more
    is_lost: bool = False  # its lease has run out, or it has come again


class HeldMessages:
    """What was delivered and is not settled; it outlives the connection that it came by."""

    def __init__(self) -> None:
        self.aside = 0  # how many of them do not count towards the prefetch
        self._arrivals: dict[int, NatsMessage] = {}
        self._known = weakref.WeakValueDictionary[int, NatsMessage]()  # those too that were settled, while others know them

    def __len__(self) -> int:
        return len(self._arrivals)

    def add(self, arrival: NatsMessage) -> None:
        """Hold an arrival; one of the same message is lost by that, even if it was settled.

        A server that was killed may have forgotten what it had delivered in its last tenth of a second, and what came of it.
        To it, the message comes for the first time.
        """
        if old := self._known.get(arrival.sequence):
            old.is_lost = True
            arrival.redelivered |= old.stored == arrival.stored  # else the stream is another
        self._arrivals[arrival.sequence] = self._known[arrival.sequence] = arrival

    def drop(self, arrival: NatsMessage) -> None:
        """Hold an arrival no longer."""
        if self._arrivals.get(arrival.sequence) is arrival:
            del self._arrivals[arrival.sequence]

    def drop_lost(self) -> None:
        """Drop what was not renewed in time."""
        for arrival in self.all():
            if time.monotonic() > arrival.held_until:
                arrival.is_lost = True
                self.drop(arrival)

    def all(self) -> list[NatsMessage]:
        """List what is held."""
        return list(self._arrivals.values())


class NatsConnection:
    """One connection to NATS, and the thread that drives it."""

    def __init__(self, address: NatsAddress) -> None:
        self.opened = Reply()  # after CONNECT_TIMEOUT at the most
        self.closed = Reply()
        self.ended = trio.Event()  # CLOSE_TIMEOUT after `hang_up` at the most
        self.client = Client()
        self._address = address
        self._streams = self.client.jetstream(timeout=ANSWER_TIMEOUT)
        self._for_trio = Mailbox(trio.lowlevel.current_trio_token().run_sync_soon)
        self._for_asyncio = Mailbox(self._wake)
        self._replies: set[Reply] = {self.opened, self.closed}
        self._loop: asyncio.AbstractEventLoop | None = None
        self._tasks: set[asyncio.Task[None]] = set()  # asyncio itself does not hold them
        self._asking: dict[str, dict[asyncio.Task[None], Reply]] = {}  # by the subject, in small letters
        self.listeners: set[NatsListener] = set()
        self._over = asyncio.Event()
        self._was_connected = False
        self._is_closed = False
        self._last_will: Callable[[], Awaitable[None]] | None = None
        self._error: Exception = LostError("the connection is closed")

    # On Trio's side:

    async def drive(self) -> None:
        """Run asyncio in a thread, until the connection is closed."""
        try:
            await trio.to_thread.run_sync(lambda: asyncio.run(self._run()), limiter=trio.CapacityLimiter(1))
        finally:
            self.ended.set()
            for reply in list(self._replies):
                reply.tell(error=self._error)

    def hang_up(self) -> None:
        """Have the connection closed, and the thread end."""
        self.post(self._over.set)

    def post(self, work: Callable[[], object]) -> None:
        """Have `work` done in the thread, while there is one."""
        if not self.ended.is_set():
            self._for_asyncio.put(work)

    async def call(self, work: Callable[[], Awaitable[Any]], subject: str = "") -> Any:
        """Have `work` done in the thread, and give what it returns. A server that does not answer ends the connection.

        Cancelled before, it is not done; later, it may be.

        Raises:
            RefusedError: the server does not let us publish to the `subject`.
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
        """Have the stream of a queue; one that is there is used as it is."""
        await self.call(partial(self._find_stream, place), f"{CREATE}.{place.stream}")

    async def find_consumer(self, place: StreamPosition) -> float:
        """Have the consumer of a queue; one that is there is used as it is. Gives the seconds that a lease lasts."""
        lease: float = await self.call(partial(self._find_consumer, place))
        return lease

    async def publish(self, subject: str, body: bytes, headers: Mapping[str, str]) -> None:
        """Publish a message, and wait until a stream has stored it. If there is none, it is GoneError.

        Raises:
            TooLargeError: the server would not take it.
        """
        await self.call(partial(self._publish, subject, body, headers), subject)

    async def settle(self, place: StreamPosition, arrival: NatsMessage, answer: bytes) -> None:
        """Settle an arrival, and wait until the server has done so. If its consumer is no more, it is GoneError."""
        await self.call(partial(self._settle, place, arrival, answer))

    def renew(self, held: HeldMessages, lease: float) -> None:
        """Renew the leases of what is held, from now on."""
        self.post(lambda: self.start(self._renew(held, lease)))

    def leave(self, place: StreamPosition, held: HeldMessages) -> None:
        """Have what is held given back before the connection is closed."""
        self._last_will = partial(self._give_back, place, held)

    def _wake(self, do: Callable[[], None]) -> None:
        if self._loop is not None:
            with suppress(RuntimeError):  # the loop is closed
                self._loop.call_soon_threadsafe(do)

    # In the thread:

    async def _run(self) -> None:
        self._loop = asyncio.get_running_loop()
        self._for_asyncio.do()  # what was asked for before there was anybody to ask
        connecting = asyncio.create_task(self._connect())
        await self._over.wait()
        connecting.cancel()
        await asyncio.wait([connecting])
        await self._close()
        self._is_closed = True

    async def _connect(self) -> None:
        try:
            options = _options(self._address, self._secret)
            async with asyncio.timeout(CONNECT_TIMEOUT):
                await self.client.connect(**options, error_cb=self._on_error, closed_cb=self._on_close)
            self._was_connected = True
            self._check_tls()
            self.tell(self.opened.tell)
        except Exception as error:  # whatever it was, nobody may wait for ever
            self.fail(error)

    def _secret(self) -> str:
        """Give our secret to nats-py, which asks for it once it has met the server."""
        self._check_tls()
        return self._address.secret

    def _check_tls(self) -> None:
        """Refuse what nats-py would do: to send secrets in the clear to a server that offers no TLS."""
        if self._address.tls and not self.client._server_info.get("tls_required"):
            raise BrokerError("offers no TLS, which the address asks for with tls://")

    async def _on_error(self, error: Exception) -> None:
        """Take note of an error. With one that comes before it is connected, nats-py would go on for ever."""
        if not self._was_connected:
            raise error
        refused = FORBIDDEN.search(str(error))
        askers = self._asking.pop(refused[1], {}) if refused else {}
        for task, reply in askers.items():
            self.tell(partial(reply.tell, error=RefusedError(_text(error))))
            task.cancel()
        if not askers:
            self.fail(error)

    async def _on_close(self) -> None:
        self.fail(self.client.last_error or LostError("the server has closed the connection"))

    def fail(self, error: Exception) -> None:
        """End the connection for a reason; the first one counts."""
        if not self._over.is_set():
            self._error = _translated(error)
            self._over.set()

    async def _close(self) -> None:
        try:
            async with asyncio.timeout(CLOSE_TIMEOUT):
                if self._last_will and self.client.is_connected:
                    await self._last_will()
                await self.client.close()
        except Exception as error:  # the end of the thread is the end of its sockets as well
            LOGGER.debug("closing a connection to NATS: %s", error)

    def tell(self, work: Callable[[], object]) -> None:
        """Have `work` done on Trio's side."""
        self._for_trio.put(work)

    def start(self, work: Coroutine[Any, Any, None]) -> None:
        """Start a task that lasts no longer than the connection."""
        if self._is_closed:
            work.close()
            return
        task = asyncio.create_task(work)
        self._tasks.add(task)
        task.add_done_callback(self._tasks.discard)

    async def _answer(self, reply: Reply, work: Callable[[], Awaitable[Any]], subject: str) -> None:
        with self._asks(subject, reply):
            try:
                value = await work()
            except nats.errors.TimeoutError as error:
                self.fail(error)
            except Exception as error:
                self.tell(partial(reply.tell, error=_translated(error)))
            else:
                self.tell(partial(reply.tell, value))

    @contextmanager
    def _asks(self, subject: str, reply: Reply) -> Iterator[None]:
        """Say who asks for what: a server that refuses it says so to nobody in particular."""
        task = asyncio.current_task()
        assert task  # noqa: S101 -- we are in one
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
        size = len(body) + sum(len(name) + len(value) + len(": \r\n") for name, value in headers.items())
        if size + len("NATS/1.0\r\n\r\n") > self.client.max_payload:  # told by the server, it would be the connection's end
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

    async def _renew_once(self, arrivals: list[NatsMessage], held: HeldMessages, lease: float) -> None:
        began = time.monotonic()
        for arrival in arrivals:
            await self.client.publish(arrival.answer_to, arrival.late_answer or PROGRESS)
        if arrivals:
            await self.client.flush(ANSWER_TIMEOUT)  # after which the server has read them
        for arrival in arrivals:
            arrival.held_until = began + lease
            if arrival.late_answer:
                held.drop(arrival)

    async def _settle(self, place: StreamPosition, arrival: NatsMessage, answer: bytes) -> None:
        if answer == NAK:
            await self._forget_the_dead(place)
        await self.client.request(arrival.answer_to, answer, timeout=ANSWER_TIMEOUT)

    async def _forget_the_dead(self, place: StreamPosition) -> None:
        """Have the server forget who has asked for messages and is gone, which it does when asked about the consumer.

        Else nats-server 2.9 loses sight of a message that is given back, until its lease has run out, when all who wait are
        gone (and delivers the last message of the stream once more: it takes back one step too many).
        """
        await self._streams.consumer_info(place.stream, place.consumer)

    async def _give_back(self, place: StreamPosition, held: HeldMessages) -> None:
        for listener in list(self.listeners):
            await listener.end()
        for arrival in held.all():
            held.drop(arrival)
            await self._settle(place, arrival, arrival.late_answer or NAK)


class NatsListener:
    """Has messages of a queue sent by one connection: no more than `prefetch` are held and asked for."""

    def __init__(
        self, connection: NatsConnection, place: StreamPosition, prefetch: int, held: HeldMessages, lease: float
    ) -> None:
        self._connection = connection
        self._next = f"{NEXT}.{place.stream}.{place.consumer}"
        self._prefetch = prefetch
        self._held = held
        self._lease = lease
        self._inbox = connection.client.new_inbox()
        self._arrived: Callable[[NatsMessage], object] = lambda _: None
        self._subscription: Subscription | None = None  # this and all below is the thread's
        self._asked = 0
        self._heard = asyncio.Event()
        self._ending = asyncio.Lock()
        self._patience: asyncio.TimerHandle | None = None

    # On Trio's side:

    async def start(self, arrived: Callable[[NatsMessage], object]) -> None:
        """Begin; `arrived` is called, on Trio's side, for each message."""
        self._arrived = arrived
        await self._connection.call(self._start)

    async def stop(self) -> None:
        """Ask for no more; once this returns, none arrives any more."""
        await self._connection.call(self.end)

    async def ask(self) -> None:
        """Wait for a sign of life of the server."""
        await self._connection.call(partial(self._connection.client.flush, ANSWER_TIMEOUT))

    def refill(self) -> None:
        """Ask for more, if less is held by now."""
        self._connection.post(self._refill)

    # In the thread:

    async def _start(self) -> None:
        client = self._connection.client
        self._subscription = await client.subscribe(self._inbox, cb=self._on_message, pending_bytes_limit=0)
        self._connection.listeners.add(self)
        self._refill()
        await client.flush(ANSWER_TIMEOUT)

    async def end(self) -> None:
        """Ask for no more: in the thread. Whoever ends it once more waits as well: what is given back must not come here.

        What is being sent is waited for. Of a message that goes to an inbox which goes away just then, nats-server 2.9 loses
        sight until its lease has run out.
        """
        async with self._ending:
            if self._subscription:
                subscription, self._subscription = self._subscription, None
                with suppress(TimeoutError):
                    while self._asked:
                        self._heard.clear()
                        await asyncio.wait_for(self._heard.wait(), QUIET)
                await subscription.drain()
            self._connection.listeners.discard(self)

    def _refill(self) -> None:
        free = self._prefetch + self._held.aside - len(self._held) - self._asked
        if free > 0 and self._subscription:
            self._asked += free
            self._connection.start(self._ask(free))

    async def _ask(self, count: int) -> None:
        request = {"batch": count, "expires": int(PULL_EXPIRES * NANOSECONDS)}
        with suppress(nats.errors.Error):  # the connection is closed
            await self._connection.client.publish(self._next, json.dumps(request).encode(), self._inbox)
        if self._patience:
            self._patience.cancel()
        self._patience = asyncio.get_running_loop().call_later(PULL_EXPIRES + PULL_MARGIN, self._give_up)

    def _give_up(self) -> None:
        if self._asked:  # to a request for messages of a consumer that is no more, there is no answer at all
            self._connection.fail(LostError("there is no answer to a request for messages"))

    async def _on_message(self, message: Msg) -> None:
        self._heard.set()
        headers = message.headers or {}
        match headers.get(STATUS):
            case None:
                self._asked -= 1
                self._on_arrival(message, headers)
            case status if status in EXPIRED:
                self._asked -= int(headers.get(PENDING, self._asked))
                self._refill()
            case status:
                self._on_refusal(f"{status} {headers.get(DESCRIPTION)}")

    def _on_arrival(self, message: Msg, headers: Mapping[str, str]) -> None:
        facts = message.metadata
        until = time.monotonic() + self._lease
        again = facts.num_delivered > 1
        arrival = NatsMessage(facts.sequence.stream, facts.timestamp, again, message.reply, headers, message.data, until)
        self._held.add(arrival)
        self._connection.tell(partial(self._arrived, arrival))

    def _on_refusal(self, said: str) -> None:
        if "Deleted" in said:
            self._connection.fail(LostError(f"the consumer of the queue is no more ({said})"))
            return
        LOGGER.info("NATS has no messages for us just now (%s); asking again", said)
        self._asked = 0
        asyncio.get_running_loop().call_later(PULL_PAUSE, self._refill)


def _options(address: NatsAddress, secret: Callable[[], str]) -> dict[str, Any]:
    options: dict[str, Any] = {
        "servers": f"nats://{address.host}:{address.port}",
        "name": "trio-pilot",
        "connect_timeout": CONNECT_TIMEOUT,
        "ping_interval": PING_INTERVAL,
        "allow_reconnect": False,
    }
    if address.tls:
        options["tls"] = ssl.create_default_context()
    if address.user:
        return options | {"user": address.user, "password": secret}
    return options | ({"token": secret} if address.secret else {})


def _translated(error: Exception) -> Exception:
    """Tell a refusal, which lasts, from what another connection may do better."""
    text = _text(error)
    match error:
        case BrokerError() | LostError() | TooLargeError():
            return error
        case nats.js.errors.NoStreamResponseError() | nats.js.errors.NotFoundError() | nats.errors.NoRespondersError():
            return GoneError("there is no such stream, or consumer, any more")
        case nats.js.errors.APIError() if error.err_code == NOT_ENABLED:
            return BrokerError("lets us have no JetStream")
        case nats.js.errors.ServiceUnavailableError() if error.err_code is None:
            return LostError("there is no JetStream (nats-server needs -js), or not yet")
        case nats.js.errors.APIError():
            return LostError(f"{error.description} ({error.err_code})")
        case nats.errors.AuthorizationError():
            return BrokerError(REFUSED)
        case TimeoutError():
            return LostError(f"the server has not answered for {ANSWER_TIMEOUT:g} s")
    if "authorization" in text.lower() or "authentication" in text.lower():
        return BrokerError(REFUSED)
    if "permissions violation" in text.lower():
        return BrokerError(f"refuses us: {text}")
    return ConnectError(text)


def _text(error: Exception) -> str:
    return getattr(error, "strerror", None) or str(error).removeprefix("nats: ") or type(error).__name__
