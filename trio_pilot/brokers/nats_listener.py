"""Pulling messages of a queue of NATS over one connection."""

import asyncio
import json
import time
from collections.abc import Callable, Mapping
from contextlib import suppress
from functools import partial

import nats.errors
from nats.aio.msg import Msg
from nats.aio.subscription import Subscription

from trio_pilot.brokers.nats_connection import NatsConnection
from trio_pilot.brokers.nats_headers import DESCRIPTION, STATUS
from trio_pilot.brokers.nats_messages import HeldMessages, NatsMessage, StreamPosition
from trio_pilot.brokers.reconnecting import LostError
from trio_pilot.log import LOGGER

PULL_MARGIN = 10.0  # seconds after which a request that has no answer at all is taken for lost
QUIET = 0.03  # seconds without a message after which none is on its way
PULL_PAUSE = 1.0  # seconds before the next request, where the server refuses them
NANOSECONDS = 10**9

# JetStream's wire API: the subject of a request for messages, the headers of its status, and the codes of its end.
NEXT = "$JS.API.CONSUMER.MSG.NEXT"
PENDING = "Nats-Pending-Messages"
TO_SETTLE = "$JS.ACK."  # the beginning of the subject by which a message is settled; the server's own messages have none
EXPIRED = ("404", "408")


class NatsListener:
    """Pulls messages of a queue over one connection: no more than `most()` are held and asked for."""

    def __init__(
        self, connection: NatsConnection, place: StreamPosition, most: Callable[[], int], held: HeldMessages, lease: float
    ) -> None:
        self._connection = connection
        self._next = f"{NEXT}.{place.stream}.{place.consumer}"
        self._most = most
        self._held = held
        self._lease = lease
        self._expires = connection.timeouts.pull
        self._inbox = connection.client.new_inbox()
        self._arrived: Callable[[NatsMessage], object] = lambda _: None
        self._subscription: Subscription | None = None  # this and all below is used in the thread only
        self._asked = 0
        self._heard = asyncio.Event()
        self._ending = asyncio.Lock()
        self._give_up_timer: asyncio.TimerHandle | None = None

    # On Trio's side:

    async def start(self, arrived: Callable[[NatsMessage], object]) -> None:
        """Start; `arrived` is called, on Trio's side, with each message."""
        self._arrived = arrived
        await self._connection.call(self._start)

    async def stop(self) -> None:
        """Ask for no more messages; once this returns, none arrives any more."""
        await self._connection.call(self._end)

    async def ask(self) -> None:
        """Wait for an answer of the server."""
        await self._connection.call(partial(self._connection.client.flush, self._connection.timeouts.answer))

    def refill(self) -> None:
        """Ask for more messages, if fewer are held now."""
        self._connection.post(self._refill)

    # In the thread:

    async def _start(self) -> None:
        client = self._connection.client
        self._subscription = await client.subscribe(self._inbox, cb=self._on_message, pending_bytes_limit=0)
        self._connection.listeners.add(self._end)
        self._refill()
        await client.flush(self._connection.timeouts.answer)

    async def _end(self) -> None:
        """Ask for no more messages. A second call waits for the first: a message that is given back must not come here.

        Messages that are on their way are waited for. Of a message that goes to an inbox which goes away just then,
        nats-server 2.9 loses sight until its lease has run out.
        """
        async with self._ending:
            if self._subscription:
                subscription, self._subscription = self._subscription, None
                with suppress(TimeoutError):
                    while self._asked:
                        self._heard.clear()
                        await asyncio.wait_for(self._heard.wait(), QUIET)
                await subscription.drain()
            self._connection.listeners.discard(self._end)

    def _refill(self) -> None:
        free = self._most() - len(self._held) - self._asked
        if free > 0 and self._subscription:
            self._asked += free
            self._connection.start(self._ask(free))

    async def _ask(self, count: int) -> None:
        request = {"batch": count, "expires": int(self._expires * NANOSECONDS)}
        with suppress(nats.errors.Error):  # the connection is closed
            await self._connection.client.publish(self._next, json.dumps(request).encode(), self._inbox)
        if self._give_up_timer:
            self._give_up_timer.cancel()
        self._give_up_timer = asyncio.get_running_loop().call_later(self._expires + PULL_MARGIN, self._give_up)

    def _give_up(self) -> None:
        if self._asked:  # to a request for messages of a consumer that does not exist, there is no answer at all
            self._connection.fail(LostError("there is no answer to a request for messages"))

    async def _on_message(self, message: Msg) -> None:
        self._heard.set()
        headers = message.headers or {}
        if message.reply.startswith(TO_SETTLE):  # whatever its sender has written into its headers, a status as well
            self._asked -= 1
            self._on_arrival(message, headers)
            return
        match headers.get(STATUS):
            case None:
                LOGGER.debug("a message came to the inbox of a queue, and is not of its stream")
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
        self._connection.run_in_trio(partial(self._arrived, arrival))

    def _on_refusal(self, text: str) -> None:
        if "Deleted" in text:
            self._connection.fail(LostError(f"the consumer of the queue does not exist any more ({text})"))
            return
        LOGGER.info("NATS refuses a request for messages (%s); asking again", text)
        self._asked = 0
        asyncio.get_running_loop().call_later(PULL_PAUSE, self._refill)
