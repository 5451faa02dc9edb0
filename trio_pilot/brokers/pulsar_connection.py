"""A connection to Apache Pulsar by pulsar-client, awaitable from Trio. Nothing else imports pulsar.

The library has threads of its own. To connect and to close blocks, so that is done in a thread of ours; the rest is answered
by callbacks in its threads. It asks the broker for as many messages as it is asked for, one by one (a receiver queue of size
0): none is hoarded; but for that a topic may have no partitions, and its messages must not be batched.
"""

import os
import ssl
from collections.abc import Callable, Mapping
from contextlib import suppress
from functools import partial
from typing import Any

import trio

from trio_pilot.brokers.reconnecting import ConnectError, LostError
from trio_pilot.brokers.thread_bridge import Reply
from trio_pilot.errors import BrokerError, SettingsError

try:
    import pulsar
except ModuleNotFoundError:
    raise SettingsError("a Pulsar broker needs pulsar-client, which is not here: pip install 'trio-pilot[pulsar]'") from None

CONNECT_TIMEOUT = 10.0  # seconds for TCP
ANSWER_TIMEOUT = 15  # seconds for the broker to answer
CLOSE_TIMEOUT = 3.0  # seconds to write what is left to write
LOOK_INTERVAL = 1.0  # seconds between looks at the connection, of whose end the library does not tell

SUBSCRIPTION = "i3-pulsar-sub"  # oms-mqclient's, of every topic

# The library's errors, and the results it tells callbacks, have the same names. With these, another try does no better:
LASTING = {
    "AuthenticationError": "refuses our token",
    "AuthorizationError": "refuses us: we have no right to the topic",
    "InvalidTopicName": "can have no topic of this name",
    "InvalidConfiguration": "has the topic in partitions, which trio-pilot cannot read",
    "NotAllowedError": "refuses us: this is not allowed for the topic",
    "TopicNotFound": "has no such topic, and lets us make none",
}

Callback = Callable[..., None]


class TooLargeError(Exception):
    """The broker takes no message of this size."""


class PulsarConnection:
    """A client of the library, and what was opened by it."""

    def __init__(self, url: str, token: str) -> None:
        self.closed = Reply()
        self.consumer: Any = None
        self._client = _client(url, token)
        self._trio = trio.lowlevel.current_trio_token()
        self._limiter = trio.CapacityLimiter(2)  # to open, and to close meanwhile
        self._replies = {self.closed}
        self._producers: dict[str, Any] = {}
        self._opening = trio.Lock()

    async def subscribe(self, topic: str) -> Any:
        """Subscribe to a topic; nothing comes before it is asked for."""
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
        """Give the producer for a topic; where nobody has subscribed yet, nothing that is sent would be kept."""
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
        """Acknowledge a message: it is on its way to the broker, which does not answer that."""
        await self.ask(partial(_inner(self.consumer).acknowledge_async, message_id))

    def nack(self, message_id: Any) -> None:
        """Have a message delivered again, some 100 ms later."""
        if self.closed.is_told:
            raise LostError("the connection is lost")
        self.consumer.negative_acknowledge(message_id)

    def receive(self, arrived: Callback) -> None:
        """Ask for one message; `arrived` is called with it, or with None and the error, on Trio's side."""
        _inner(self.consumer).receive_async(partial(self._answer, arrived))

    async def look(self) -> None:
        """Wait for a sign of life of the broker: it is asked for the last message of the topic."""
        with suppress(BrokerError):  # which is one, too
            await self.ask(_inner(self.consumer).get_last_message_id_async)

    async def ask(self, call: Callable[[Callback], object]) -> Any:
        """Call what is answered by a callback, and give the answer."""
        reply = Reply()
        self._replies.add(reply)
        try:
            if self.closed.is_told:
                raise LostError("the connection is lost")
            call(partial(self._answer, reply.tell))
            return await reply.wait()
        finally:
            self._replies.discard(reply)

    async def watch(self) -> None:
        """See the end of the connection. The library would connect again, with an old token, and tell nobody."""
        while not self.closed.is_told:
            await trio.sleep(LOOK_INTERVAL)
            if not all(one.is_connected() for one in [self.consumer, *self._producers.values()] if one):
                self.closed.tell(error=LostError("the connection is lost"))

    async def close(self) -> None:
        """Close the client: what it has received and not acknowledged, the broker delivers again."""
        for reply in list(self._replies):
            reply.tell(error=LostError("the connection is closed"))
        with trio.move_on_after(CLOSE_TIMEOUT, shield=True), suppress(LostError, BrokerError):
            await self._block(self._client.close)
        self._client.shutdown()  # which ends what still blocks

    async def _block(self, call: Callable[[], Any]) -> Any:
        """Call what blocks; given up, it ends when the client is closed."""
        try:
            return await trio.to_thread.run_sync(call, abandon_on_cancel=True, limiter=self._limiter)
        except pulsar.PulsarException as error:
            raise _translated(type(error).__name__) from error

    def _answer(self, tell: Callback, result: Any, value: Any = None) -> None:
        """Tell an answer: in a thread of the library, which an exception would end, and the pilot with it."""
        error = None if result == pulsar.Result.Ok else _translated(result.name)
        with suppress(trio.RunFinishedError):
            self._trio.run_sync_soon(partial(tell, value, error))


def _client(url: str, token: str) -> Any:
    return pulsar.Client(
        url,
        authentication=pulsar.AuthenticationToken(token) if token else None,
        operation_timeout_seconds=ANSWER_TIMEOUT,
        connection_timeout_ms=int(1000 * CONNECT_TIMEOUT),
        tls_trust_certs_file_path=ssl.get_default_verify_paths().cafile,
        tls_validate_hostname=True,
        logger=pulsar.FileLogger(pulsar.LoggerLevel.Error, os.devnull),  # else it writes to stdout
    )


def _inner(consumer: Any) -> Any:
    """Give what has the calls with callbacks; only pulsar.asyncio has them in public."""
    return consumer._consumer


def _translated(name: str) -> Exception:
    """Tell a refusal, which lasts, from what another connection may do better."""
    if name in LASTING:
        return BrokerError(f"{LASTING[name]} ({name})")
    if name == "MessageTooBig":
        return TooLargeError("it takes no message of this size")
    return ConnectError(f"the broker has not answered for {ANSWER_TIMEOUT} s" if name == "Timeout" else name)
