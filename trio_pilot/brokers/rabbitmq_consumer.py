"""A consumer of RabbitMQ: receives what the server sends ahead, and notices when the server sends nothing."""

import random
import uuid
from contextlib import suppress
from functools import partial

import trio
from trio_util import wait_any

from trio_pilot.brokers import Settlement
from trio_pilot.brokers.prefetch import PrefetchConsumer
from trio_pilot.brokers.rabbitmq_channel import RabbitChannel, RabbitMessage
from trio_pilot.brokers.rabbitmq_errors import ACCESS_REFUSED, NOT_FOUND, PRECONDITION_FAILED, ClosedError
from trio_pilot.brokers.requeue import RequeueingSource
from trio_pilot.errors import BrokerError, DeliveryLostError
from trio_pilot.log import LOGGER

ON_ITS_WAY = 1.0  # seconds for a message of the queue to arrive, before the queue is left as empty
MOST_HELD = 100  # deliveries held back that do not count towards the prefetch; with more of them, all events must wait

KNOWS_LEASES = (3, 12)  # the first version of the server that may be asked for a lease
CONSUMER_TIMEOUT = "x-consumer-timeout"  # milliseconds, of one consumer


class RabbitConsumer(PrefetchConsumer):
    """Holds what RabbitMQ has sent ahead."""

    def __init__(
        self, source: RequeueingSource[RabbitChannel, RabbitMessage], prefetch: int, lease: float, look_interval: float
    ) -> None:
        super().__init__(source.has_lost)
        self.tags: list[str] = []  # made here, so that there is no moment at which a consumer could not be cancelled
        self._source = source
        self._prefetch = prefetch
        self._lease = lease  # seconds; 0 once the queue has refused a lease
        self._look_interval = look_interval
        self._channel: RabbitChannel | None = None
        self._arrivals = 0

    async def is_idle(self) -> bool:
        """Ask the server for an answer: what it has sent before the answer has arrived before it.

        A server that has messages, and sends none, has lost sight of this consumer, which then listens anew.
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

    async def listen(self, channel: RabbitChannel) -> None:
        """Receive messages by a channel, until it is closed.

        Raises:
            BrokerError: the queue does not exist, or the user may not read it.
        """
        self._channel = channel
        try:
            await self._consume(channel, self._prefetch)
            self._note_listening(is_so=True)
            await wait_any(
                partial(self._source.gone, channel),
                partial(self._make_up, channel),
                partial(self._keep_looking, channel),
            )
        except ClosedError as error:
            if error.code in (ACCESS_REFUSED, NOT_FOUND, PRECONDITION_FAILED) and not self._can_do_without(error):
                raise BrokerError(f"cannot listen to the queue {self._source.name}: {error}") from error

    def refill(self) -> None:
        """Do nothing: `_make_up` waits for changes of the number of messages held back."""

    def lost(self) -> None:
        """Forget what has arrived: the broker has it again."""
        self._channel = None
        self.tags.clear()
        self._arrived.clear()
        self._note_listening(is_so=False)

    async def stop(self) -> None:
        """Receive no more messages, and release those that were not taken.

        A quorum queue that is about to send a message as its consumer is cancelled may keep it, unsent, for this channel
        (seen with 3.10): only the end of the channel gives that message back.
        """
        try:
            while self._channel and self.tags:
                await self._channel.ask("basic_cancel", self.tags.pop())
            while self._arrived:
                await self._source.settle(self._arrived[0], Settlement.RELEASE)
                self._arrived.popleft()
        except (ClosedError, DeliveryLostError):
            return  # a broker that has closed the channel has taken everything back

    async def _make_up(self, channel: RabbitChannel) -> None:
        """Receive one more message for each that is held back, as their number changes: by a consumer for each."""
        held_back = self._source.held_back
        with suppress(ClosedError):
            while True:
                held, made_up_for = min(held_back.value, MOST_HELD), len(self.tags) - 1
                if made_up_for < held:
                    await self._consume(channel, 1)
                elif made_up_for > held:
                    await channel.ask("basic_cancel", self.tags.pop())
                else:
                    await held_back.wait_transition()

    async def _keep_looking(self, channel: RabbitChannel) -> None:
        """Listen anew if at two looks in a row there were messages, and room for them, and none came."""
        suspicious, seen = False, -1
        with suppress(ClosedError):
            while True:
                jitter = random.uniform(0.5, 1)  # noqa: S311 -- not a secret
                await trio.sleep(jitter * self._look_interval)
                ready = await self._passed_over(channel)
                if suspicious and ready and self._arrivals == seen:
                    await self._listen_anew(channel, ready)
                suspicious, seen = bool(ready), self._arrivals

    async def _passed_over(self, channel: RabbitChannel) -> int:
        """Return the number of messages that are in the queue although there is room for them here."""
        found = await channel.ask("queue_declare", self._source.name, passive=True)
        return int(found.method.message_count) if channel.unsettled < self._prefetch else 0

    async def _listen_anew(self, channel: RabbitChannel, ready: int) -> None:
        """Close the channel, so that a new one is opened, and wait for its end: ClosedError."""
        LOGGER.warning("the queue %s has %d message(s), and none comes; listening anew", self._source.name, ready)
        await channel.call("close", reply_text="listening anew")
        await channel.closed.wait()

    async def _consume(self, channel: RabbitChannel, prefetch: int) -> None:
        await channel.ask("basic_qos", prefetch_count=prefetch)
        self.tags.append(uuid.uuid4().hex)
        asks = self._lease and channel.connection.version >= KNOWS_LEASES
        arguments = {CONSUMER_TIMEOUT: int(1000 * self._lease)} if asks else {}
        await channel.consume(self._source.name, self.tags[-1], self._on_arrival, arguments)

    def _can_do_without(self, error: ClosedError) -> bool:
        """Return whether the server has refused only the lease; then none is asked for any more."""
        refused = error.code == PRECONDITION_FAILED and CONSUMER_TIMEOUT in str(error) and self._lease > 0
        if refused:  # from 4.3 on by classic queues, which take nothing back after a time
            self._lease = 0.0
        return refused

    def _on_arrival(self, message: RabbitMessage) -> None:
        if message.channel is self._channel:
            message.channel.unsettled += 1
            self._arrivals += 1
            self._note_arrival(self._source.delivery(message))
