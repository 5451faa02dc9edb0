"""A connection to Apache Pulsar by pulsar-client, awaitable from Trio.

The library has threads of its own. Its calls to connect and to close block, so they run in a thread of Trio's; the other
calls are answered by callbacks in its threads. It asks the broker for as many messages as it is asked for, one by one (a
receiver queue of size 0), so that it hoards none; for that, a topic may have no partitions, and its messages must not be
batched.
"""

import os
import ssl
from collections.abc import Callable, Mapping
from contextlib import suppress
from dataclasses import dataclass
from functools import partial
from typing import Any

import trio

from trio_pilot.brokers.reconnecting import ConnectError, LostError, Timeouts, TooLargeError
from trio_pilot.brokers.thread_bridge import Reply
from trio_pilot.errors import BrokerError, SettingsError
from trio_pilot.processes import threads

try:
    import pulsar
except ModuleNotFoundError:
    raise SettingsError(
        "a Pulsar broker needs pulsar-client, which is not installed: pip install 'trio-pilot[pulsar]'"
    ) from None

SUBSCRIPTION = "i3-pulsar-sub"  # the name that oms-mqclient gives to the subscription of every topic

# Errors that last: another attempt would not help. The library's exceptions, and the results that it passes to callbacks,
# have the same names.
LASTING = {
    "AuthenticationError": "refuses the token",
    "AuthorizationError": "refuses the pilot: it has no right to the topic",
    "InvalidTopicName": "can have no topic of this name",
    "InvalidConfiguration": "has the topic in partitions, which trio-pilot cannot read",
    "NotAllowedError": "refuses the pilot: this is not allowed for the topic",
    "TopicNotFound": "has no such topic, and does not let the pilot make it",
}

Callback = Callable[..., None]


@dataclass(frozen=True, slots=True, kw_only=True)
class PulsarTimeouts(Timeouts):
    """Seconds to wait for Pulsar."""

    connect: float = 10.0  # for TCP
    answer: int = 15  # for the broker to answer
    close: float = 3.0  # to write what is left to write
    look: float = 1.0  # between looks at the connection, as the library does not report its end


class PulsarConnection:
    """A client of the library, and what was opened by it."""

    def __init__(self, url: str, token: str, timeouts: PulsarTimeouts) -> None:
        self.closed = Reply()
        self.consumer: Any = None
        self._timeouts = timeouts
        self._client = _client(url, token, timeouts)
        self._trio = trio.lowlevel.current_trio_token()
        self._limiter = trio.CapacityLimiter(2)  # to open, and to close meanwhile
        self._replies = {self.closed}
        self._producers: dict[str, Any] = {}
        self._opening = trio.Lock()

    async def subscribe(self, topic: str) -> Any:
        """Subscribe to a topic; messages come only when they are asked for."""
        return await self._block(
            partial(
                self._client.subscribe,
                topic,
                SUBSCRIPTION,
                consumer_type=pulsar.ConsumerType.Shared,
                receiver_queue_size=0,
                initial_position=pulsar.InitialPosition.Earliest,
                negative_ack_redelivery_delay_ms=0,
            )
        )

    async def producer(self, topic: str) -> Any:
        """Return the producer for a topic, which gets a subscription first: without one, the broker keeps no message."""
        async with self._opening:
            if topic not in self._producers:
                await self._block((await self.subscribe(topic)).close)
                self._producers[topic] = await self._block(partial(self._client.create_producer, topic))
            return self._producers[topic]

    async def publish(self, topic: str, body: bytes, headers: Mapping[str, str]) -> None:
        """Send a message, and wait until the broker has stored it."""
        producer = await self.producer(topic)
        await self.ask(lambda callback: producer.send_async(body, callback, properties=dict(headers)))

    async def ack(self, message_id: Any) -> None:
        """Acknowledge a message, and wait until the library has sent that; the broker does not answer it."""
        await self.ask(partial(_inner(self.consumer).acknowledge_async, message_id))

    def nack(self, message_id: Any) -> None:
        """Return a message to the broker, which delivers it again, some 100 ms later."""
        if self.closed.is_set:
            raise LostError("the connection is lost")
        self.consumer.negative_acknowledge(message_id)

    def receive(self, arrived: Callback) -> None:
        """Ask for one message; `arrived` is called with it, or with None and the error, on Trio's side."""
        _inner(self.consumer).receive_async(partial(self._answer, arrived))

    async def look(self) -> None:
        """Wait for an answer of the broker: it is asked for the last message of the topic."""
        with suppress(BrokerError):  # an answer, too
            await self.ask(_inner(self.consumer).get_last_message_id_async)

    async def ask(self, call: Callable[[Callback], object]) -> Any:
        """Call a function that is answered by a callback, and return the answer."""
        reply = Reply()
        self._replies.add(reply)
        try:
            if self.closed.is_set:
                raise LostError("the connection is lost")
            call(partial(self._answer, reply.set))
            return await reply.wait()
        finally:
            self._replies.discard(reply)

    async def watch(self) -> None:
        """Notice the end of the connection. The library would connect again, with an old token, without a word."""
        while not self.closed.is_set:
            await trio.sleep(self._timeouts.look)
            if not all(one.is_connected() for one in [self.consumer, *self._producers.values()] if one):
                self.closed.set(error=LostError("the connection is lost"))

    async def close(self) -> None:
        """Close the client: the broker delivers again what it has received and not acknowledged."""
        for reply in list(self._replies):
            reply.set(error=LostError("the connection is closed"))
        with trio.move_on_after(self._timeouts.close, shield=True), suppress(LostError, BrokerError):
            await self._block(self._client.close)
        self._client.shutdown()  # which ends calls that still block

    async def _block(self, call: Callable[[], Any]) -> Any:
        """Make a call that blocks; if it is cancelled, the call ends when the client is closed."""
        try:
            return await threads.run_sync(call, abandon_on_cancel=True, limiter=self._limiter)
        except pulsar.PulsarException as error:
            raise self._translated(type(error).__name__) from error

    def _answer(self, answered: Callback, result: Any, value: Any = None) -> None:
        """Pass on an answer: in a thread of the library, which an exception would end, and the pilot with it."""
        error = None if result == pulsar.Result.Ok else self._translated(result.name)
        with suppress(trio.RunFinishedError):
            self._trio.run_sync_soon(partial(answered, value, error))

    def _translated(self, name: str) -> Exception:
        """Return a BrokerError for a refusal, which lasts, and a ConnectError for an error that may pass."""
        if name in LASTING:
            return BrokerError(f"{LASTING[name]} ({name})")
        if name == "MessageTooBig":
            return TooLargeError("it takes no message of this size")
        return ConnectError(f"the broker has not answered for {self._timeouts.answer} s" if name == "Timeout" else name)


def _client(url: str, token: str, timeouts: PulsarTimeouts) -> Any:
    return pulsar.Client(
        url,
        authentication=pulsar.AuthenticationToken(token) if token else None,
        operation_timeout_seconds=timeouts.answer,
        connection_timeout_ms=int(1000 * timeouts.connect),
        tls_trust_certs_file_path=ssl.get_default_verify_paths().cafile,
        tls_validate_hostname=True,
        logger=pulsar.FileLogger(pulsar.LoggerLevel.Error, os.devnull),  # else it writes to stdout
    )


def _inner(consumer: Any) -> Any:
    """Return the object that has the calls with callbacks; only pulsar.asyncio has them in public."""
    return consumer._consumer
