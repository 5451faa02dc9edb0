"""A connection to RabbitMQ by pika, awaitable from Trio.

A connection has a thread that runs pika's I/O loop from connect to close, so that heartbeats never wait for a task. Trio
reaches it through `add_callback_threadsafe`, it reaches Trio through `TrioToken.run_sync_soon`, and the answer to a request
is a `Reply`. Each time that the threads take turns costs as much CPU as a message: so a few small messages go together where
nothing waits for them (with tasks of 2 ms, `--prefetch 32` and 8 slots that makes 1.4 times the events a second, measured).
"""

import re
import socket
import ssl
import weakref
from collections.abc import Callable
from contextlib import suppress
from dataclasses import dataclass, field
from functools import partial
from typing import Any

import pika
import pika.exceptions
import trio

from trio_pilot.brokers.rabbitmq_errors import ACCESS_REFUSED, NOT_ALLOWED, ClosedError, causes, text_of
from trio_pilot.brokers.rabbitmq_properties import TolerantConnection
from trio_pilot.brokers.reconnecting import ConnectError, Timeouts
from trio_pilot.brokers.thread_bridge import Mailbox, Reply
from trio_pilot.errors import BrokerError
from trio_pilot.log import LOGGER
from trio_pilot.processes import threads

LINGER = 0.01  # seconds for which a message may wait for more to be sent with it, where that costs no slot its event
METHOD_ON_CHANNEL_0 = b"\x01\x00\x00"  # how the first frame of a server begins


@dataclass(frozen=True, slots=True, kw_only=True)
class RabbitTimeouts(Timeouts):
    """Seconds to wait for RabbitMQ."""

    connect: float = 15.0  # for TCP, TLS and the AMQP handshake together
    answer: float = 30.0  # for the server to answer a declare or a consume: a quorum queue elects a leader first
    heartbeat: int = 20  # after two of them in silence a connection is dead; a server may ask for a shorter one
    close: float = 3.0  # for the server to confirm a close; then the socket is closed
    look: float = 30.0  # at most between looks for messages that are in the queue and are not delivered


@dataclass(frozen=True, slots=True)
class RabbitAddress:
    """Where a broker is, and the pilot's user there. No user and no password means guest/guest."""

    host: str
    port: int
    virtual_host: str
    user: str
    password: str = field(repr=False)
    tls: bool


class RabbitConnection:
    """One AMQP connection, and the thread that drives it.

    Messages and settlements may wait for LINGER, until there are `batch` of them; a request for an answer does not wait.
    """

    def __init__(self, address: RabbitAddress, timeouts: RabbitTimeouts, batch: int = 1) -> None:
        self.opened = Reply()  # pika gives up after `timeouts.connect`
        self.ended = trio.Event()  # at most `timeouts.close` after `hang_up`
        self._timeouts = timeouts
        self._parameters = _parameters(address, timeouts)
        self._for_trio = Mailbox(trio.lowlevel.current_trio_token().run_sync_soon)
        self._for_pika = Mailbox(self._wake, batch, self._later)
        self._pika: pika.SelectConnection | None = None
        self._hang_up = False
        self._is_blocked = False  # the server reads nothing from this connection, as it lacks memory or disk
        self._posted: weakref.WeakSet[Reply] = weakref.WeakSet()
        self._at_end: set[Callable[[ClosedError], None]] = set()  # called in the thread when the connection ends

    # On Trio's side:

    async def drive(self) -> None:
        """Run pika's I/O loop in a thread, until the connection is closed."""
        try:
            await threads.run_sync(self._drive, limiter=trio.CapacityLimiter(1))
        finally:
            self.ended.set()
            for reply in list(self._posted):  # the loop may have stopped before it came to them
                reply.set(error=ClosedError(0, "the connection is closed"))

    @property
    def version(self) -> tuple[int, ...]:
        """The version of the server, such as (4, 3); empty if it is not RabbitMQ or its version has no numbers."""
        properties = (self._pika.server_properties if self._pika else None) or {}
        is_rabbitmq = properties.get("product") == "RabbitMQ"
        found = re.match(r"(\d+)\.(\d+)", str(properties.get("version"))) if is_rabbitmq else None
        return tuple(map(int, found.groups())) if found else ()

    @property
    def frame_max(self) -> int:
        """The largest frame that the server takes, in bytes; 0 if there is no limit."""
        return self._pika.params.frame_max if self._pika else 0

    async def update_secret(self, secret: str) -> None:
        """Replace the password or token of the connection (an extension of RabbitMQ's, from 3.8 on).

        Raises:
            ClosedError: the server has closed the connection instead.
        """
        reply = Reply()
        self.post(partial(self._update_secret, secret, reply), reply)
        await self.answer(reply)

    async def answer(self, reply: Reply) -> Any:
        """Wait for an answer of the server. If none comes, hang up, unless the server reads nothing from this connection."""
        self._for_pika.hurry()
        waiting = True
        while waiting:
            with trio.move_on_after(self._timeouts.answer):
                return await reply.wait()
            waiting = self._is_blocked
        self.hang_up()
        raise ClosedError(0, f"the broker has not answered for {self._timeouts.answer:g} s")

    def hang_up(self) -> None:
        """Make the thread close the connection and end."""
        self._hang_up = True
        self.run(self._close)
        self._for_pika.hurry()

    def post(self, work: Callable[[], object], reply: Reply) -> None:
        """Run `work` in the thread; fail the reply if the thread has ended."""
        if self._pika is None or self.ended.is_set():
            reply.set(error=ClosedError(0, "the connection is closed"))
        else:
            self._posted.add(reply)
            self.run(work)

    def run(self, work: Callable[[], object]) -> None:
        """Run `work` in the thread, while there is one."""
        if self._pika is not None:
            self._for_pika.put(work)

    def _wake(self, do: Callable[[], None]) -> None:
        if self._pika is not None:
            self._pika.ioloop.add_callback_threadsafe(do)

    # In the thread:

    def run_in_trio(self, work: Callable[..., object], *arguments: Any) -> None:
        """Run `work` on Trio's side."""
        self._for_trio.put(partial(work, *arguments))

    def open_channel(self, opened: Callable[[Any], object], at_end: Callable[[ClosedError], None]) -> Any:
        """Open one of pika's channels; call `opened` when it is open, and `at_end` when the connection ends.

        Raises:
            ClosedError: the connection is closed.
        """
        if self._pika is None or not self._pika.is_open:
            raise ClosedError(0, "the connection is closed")
        self._at_end.add(at_end)
        return self._pika.channel(on_open_callback=opened)

    def forget(self, at_end: Callable[[ClosedError], None]) -> None:
        """Do not call `at_end` when the connection ends."""
        self._at_end.discard(at_end)

    def _later(self, do: Callable[[], None]) -> None:
        if self._pika is not None:
            self._pika.ioloop.call_later(LINGER, do)

    def _drive(self) -> None:
        try:
            self._pika = TolerantConnection(
                self._parameters,
                on_open_callback=lambda _: self.run_in_trio(self.opened.set),
                on_open_error_callback=lambda _, error: self._end(error),
                on_close_callback=lambda _, error: self._end(error),
            )
            self._pika.add_on_connection_blocked_callback(self._blocked)
            self._pika.add_on_connection_unblocked_callback(self._unblocked)
            if self._hang_up:  # called before pika's connection was there
                self._close()
            self._pika.ioloop.start()
        except Exception as error:  # a wrong state of pika's must not end the pilot
            self._end(error)
        finally:
            if self._pika is not None:
                self._pika.ioloop.close()

    def _update_secret(self, secret: str, reply: Reply) -> None:
        with suppress(pika.exceptions.AMQPError):  # closed in the meantime
            if self._pika:
                self._pika.update_secret(secret, "renewed", lambda _: self.run_in_trio(reply.set))

    def _blocked(self, _connection: object, frame: Any) -> None:
        self._is_blocked, reason = True, frame.method.reason
        LOGGER.warning("RabbitMQ at %s takes no messages, and outputs wait: %s", self._parameters.host, reason)

    def _unblocked(self, _connection: object, _frame: object) -> None:
        self._is_blocked = False
        LOGGER.warning("RabbitMQ at %s takes messages again", self._parameters.host)

    def _end(self, error: BaseException) -> None:
        """Note that the connection is closed, or could not be opened: fail every wait for it, and end the thread."""
        foreign = False
        if self._pika is not None:
            foreign = _is_foreign(self._pika, error)
            self._pika.ioloop.stop()
        refusal = BrokerError("does not speak AMQP 0-9-1") if foreign else _translated(error)
        self.run_in_trio(partial(self.opened.set, error=refusal))
        for at_end in list(self._at_end):
            at_end(ClosedError(0, text_of(error)))

    def _close(self) -> None:
        connection = self._pika
        if connection is None or connection.is_closed or connection.is_closing:
            return
        if connection._transport and not connection.is_open:
            # During the handshake, close() of pika 1.4 fails; the end of the stream is handled.
            connection._transport._sock.shutdown(socket.SHUT_RDWR)
            return
        # pika has no deadline for a close, and no public way to hang up on a server that does not answer.
        connection.ioloop.call_later(self._timeouts.close, lambda: connection._adapter_disconnect_stream())
        connection.close()


def _parameters(address: RabbitAddress, timeouts: RabbitTimeouts) -> pika.ConnectionParameters:
    given: dict[str, Any] = {"host": address.host, "port": address.port, "virtual_host": address.virtual_host}
    if address.user or address.password:
        given["credentials"] = pika.PlainCredentials(address.user, address.password)
    if address.tls:
        given["ssl_options"] = pika.SSLOptions(ssl.create_default_context(), address.host)
    return pika.ConnectionParameters(
        **given,
        stack_timeout=timeouts.connect,
        heartbeat=lambda _, servers: int(min(servers or timeouts.heartbeat, timeouts.heartbeat)),
        client_properties={"product": "trio-pilot"},
    )


# Where a broker closes a connection that was not open yet, pika gives the reason only in the text of another error.
_CLOSED_BY_BROKER = re.compile(r"ConnectionClosedByBroker: \((\d+)\) (.*)")


def _is_foreign(connection: pika.SelectConnection, error: BaseException) -> bool:
    """Return whether the first bytes of a server were not those of AMQP 0-9-1. A silent server may still be starting."""
    if unread := connection._frame_buffer:
        return not connection.bytes_received and not METHOD_ON_CHANNEL_0.startswith(unread[:3])
    incompatible = any(isinstance(cause, pika.exceptions.IncompatibleProtocolError) for cause in causes(error))
    return incompatible and connection.bytes_received > 0


def _translated(error: BaseException) -> Exception:
    """Return a BrokerError for a refusal, which lasts, and a ConnectError for any other error."""
    for cause in causes(error):
        if isinstance(cause, pika.exceptions.AuthenticationError):
            return BrokerError("refuses the user and password, or token")
        if closed := _CLOSED_BY_BROKER.search(str(cause)):
            code, text = int(closed[1]), closed[2]
            if code == ACCESS_REFUSED and isinstance(cause, pika.exceptions.ProbableAuthenticationError):
                return BrokerError("refuses the user and password, or token")
            if code in (ACCESS_REFUSED, NOT_ALLOWED):
                return BrokerError(f"refuses the pilot: {text}")
    return ConnectError(text_of(error))
