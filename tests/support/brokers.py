"""Brokers by one interface, for tests that all of them pass, and clients of their servers."""

import asyncio
import json
import os
import sqlite3
import uuid
from collections.abc import Awaitable, Callable, Iterator
from contextlib import AbstractAsyncContextManager, closing, contextmanager, suppress
from pathlib import Path
from typing import Any, Protocol, TypeVar

import nats
import pika
import pulsar
import trio
from nats.js.api import ConsumerConfig
from nats.js.errors import NotFoundError

from tests.support.servers import NatsServer, RabbitServer
from tests.support.waiting import Limit, until
from trio_pilot.brokers import (
    Consumer,
    Delivery,
    Patience,
    QueueAddress,
    Sink,
    Source,
    dead_letter_queue,
    local,
    rabbitmq,
)
from trio_pilot.brokers import nats as nats_broker
from trio_pilot.brokers import pulsar as pulsar_broker
from trio_pilot.brokers.nats import place_of
from trio_pilot.brokers.nats_connection import NatsTimeouts
from trio_pilot.brokers.pulsar_connection import SUBSCRIPTION, PulsarTimeouts
from trio_pilot.brokers.rabbitmq_connection import RabbitTimeouts
from trio_pilot.errors import PilotError
from trio_pilot.testing import FakeBroker

T = TypeVar("T")

LONG = 30.0  # seconds after which a test that waits has failed


def new_name(kind: str = "queue") -> str:
    return f"{kind}-{uuid.uuid4().hex[:12]}"


def patient(seconds: float) -> bool:
    return seconds < LONG


class Broker(Protocol):
    counts_losses: bool  # a delivery that came back because its consumer was gone counts as an attempt
    keeps_unsent: bool  # it may keep a message that it was about to send, until the connection of the consumer is closed

    def source(self, queue: str) -> AbstractAsyncContextManager[Source]: ...

    def sink(self, queue: str) -> AbstractAsyncContextManager[Sink]: ...

    def dead_letters(self, queue: str) -> list[tuple[bytes, str, str]]:
        """Return body, message id and reason of each."""


class Fake:
    counts_losses = True
    keeps_unsent = False

    def __init__(self) -> None:
        self._broker = FakeBroker()

    def source(self, queue: str) -> AbstractAsyncContextManager[Source]:
        return self._broker.open_source(queue)

    def sink(self, queue: str) -> AbstractAsyncContextManager[Sink]:
        return self._broker.open_sink(queue)

    def dead_letters(self, queue: str) -> list[tuple[bytes, str, str]]:
        dead = self._broker.queues.get(dead_letter_queue(queue), ())
        return [(message.body, message.message_id, message.reason) for message in dead]


class Local:
    counts_losses = True
    keeps_unsent = False

    def __init__(self, file: Path) -> None:
        self.file = file

    def address(self, queue: str) -> QueueAddress:
        return QueueAddress(queue, "local", str(self.file))

    def source(self, queue: str) -> AbstractAsyncContextManager[Source]:
        return local.open_source(self.address(queue), patient)

    def sink(self, queue: str) -> AbstractAsyncContextManager[Sink]:
        return local.open_sink(self.address(queue), patient)

    def dead_letters(self, queue: str) -> list[tuple[bytes, str, str]]:
        return self.rows("SELECT body, message_id, reason FROM message WHERE queue = ?", dead_letter_queue(queue))

    def rows(self, query: str, *values: Any) -> list[Any]:
        with closing(sqlite3.connect(self.file)) as connection:
            return connection.execute(query, values).fetchall()


class Rabbit:
    counts_losses = False
    keeps_unsent = True
    scheme = "amqp"

    def __init__(self, server: RabbitServer, directory: Path | None = None, spare: int = 0) -> None:
        self.server = server
        self.spare = spare
        self.directory = directory or server.directory / "dead-letters"
        self.timeouts = RabbitTimeouts()

    def address(self, queue: str, server: str = "", user: str = "", token: str = "") -> QueueAddress:
        where = f"{user and user + '@'}{server or self.server.address}"
        return QueueAddress(queue, "rabbitmq", where, token, self.directory, self.spare)

    def source(self, queue: str, patience: Patience = patient, **address: str) -> AbstractAsyncContextManager[Source]:
        return rabbitmq.open_source(self.address(queue, **address), patience, self.timeouts)

    def sink(self, queue: str, patience: Patience = patient, **address: str) -> AbstractAsyncContextManager[Sink]:
        return rabbitmq.open_sink(self.address(queue, **address), patience, self.timeouts)

    def dead_letters(self, queue: str) -> list[tuple[bytes, str, str]]:
        self.declare(dead_letter_queue(queue))
        found = self.get_all(dead_letter_queue(queue))
        return [(body, facts.message_id, facts.headers["x-trio-pilot-reason"]) for facts, body in found]

    def get_all(self, queue: str) -> list[tuple[Any, bytes]]:
        """Take all messages that are ready in a queue; return properties and body of each."""
        with self.channel() as channel:
            found = []
            while (message := channel.basic_get(queue, auto_ack=True))[0] is not None:
                found.append((message[1], message[2]))
            return found

    def ready(self, queue: str) -> int:
        """Return the number of messages that are ready in a queue."""
        with self.channel() as channel:
            return int(channel.queue_declare(queue, passive=True).method.message_count)

    def counts(self, queue: str) -> tuple[int, int]:
        """Return how many messages are ready, and how many are delivered and unsettled."""
        return self.server.counts(queue)

    def consumers(self, queue: str) -> int:
        """Return the number of consumers of a queue."""
        with self.channel() as channel:
            return int(channel.queue_declare(queue, passive=True).method.consumer_count)

    def declare(self, queue: str, kind: str = "quorum") -> None:
        with self.channel() as channel:
            channel.queue_declare(queue, durable=True, arguments={"x-queue-type": kind})

    @contextmanager
    def channel(self) -> Iterator[Any]:
        """Open a channel of pika's blocking connection, independent of the code under test."""
        with closing(pika.BlockingConnection(pika.ConnectionParameters("127.0.0.1", self.server.port))) as connection:
            yield connection.channel()


class Nats:
    counts_losses = False
    keeps_unsent = False
    scheme = "nats"

    def __init__(self, server: NatsServer) -> None:
        self.server = server
        self.directory = server.directory / "dead-letters"
        self.timeouts = NatsTimeouts()

    def address(self, queue: str, server: str = "", user: str = "", token: str = "") -> QueueAddress:
        where = f"{user and user + '@'}{server or self.server.address}"
        return QueueAddress(queue, "nats", where, token, self.directory)

    def source(self, queue: str, patience: Patience = patient, **address: str) -> AbstractAsyncContextManager[Source]:
        return nats_broker.open_source(self.address(queue, **address), patience, self.timeouts)

    def sink(self, queue: str, patience: Patience = patient, **address: str) -> AbstractAsyncContextManager[Sink]:
        return nats_broker.open_sink(self.address(queue, **address), patience, self.timeouts)

    def dead_letters(self, queue: str) -> list[tuple[bytes, str, str]]:
        found = self.messages(dead_letter_queue(queue))
        return [
            (body, json.loads(headers["x-trio-pilot-message-id"]), json.loads(headers["x-trio-pilot-reason"]))
            for headers, body in found
        ]

    def lease(self, queue: str, seconds: float) -> None:
        """Make a queue with leases of some seconds."""

        async def make(streams: Any) -> None:
            place = place_of(queue)
            await streams.add_stream(name=place.stream, subjects=[place.subject])
            wanted = ConsumerConfig(durable_name=place.consumer, filter_subject=place.subject, ack_wait=seconds)
            await streams.add_consumer(place.stream, wanted)

        self.ask(make)

    def messages(self, queue: str) -> list[tuple[dict[str, str], bytes]]:
        """Return headers and body of all messages in the stream of a queue, acknowledged or not."""

        async def read(streams: Any) -> list[tuple[dict[str, str], bytes]]:
            place = place_of(queue)
            try:
                state = (await streams.stream_info(place.stream)).state
            except NotFoundError:
                return []
            numbers = range(state.first_seq or 1, state.last_seq + 1)  # 0 of a stream that never had any
            found = [await streams.get_msg(place.stream, number) for number in numbers]
            return [(message.headers or {}, message.data or b"") for message in found]

        return self.ask(read)

    def ready(self, queue: str) -> int:
        """Return the number of unsettled messages of a queue; where it has no consumer, of all messages."""
        try:
            return sum(self.counts(queue))
        except NotFoundError:
            return len(self.messages(queue))

    def counts(self, queue: str) -> tuple[int, int]:
        """Return how many messages are ready, and how many are delivered and unsettled."""

        async def count(streams: Any) -> tuple[int, int]:
            place = place_of(queue)
            info = await streams.consumer_info(place.stream, place.consumer)
            return info.num_pending, info.num_ack_pending

        return self.ask(count)

    def ask(self, work: Callable[[Any], Awaitable[T]]) -> T:
        """Use nats-py's JetStream, independent of the code under test."""

        async def ask() -> T:
            client = await nats.connect(f"nats://{self.server.address}")
            try:
                return await work(client.jetstream())
            finally:
                await client.close()

        return asyncio.run(ask())


class Pulsar:
    counts_losses = False
    keeps_unsent = False

    def __init__(self, server: str, directory: Path) -> None:
        self.server = server
        self.directory = directory
        self.timeouts = PulsarTimeouts()

    def address(self, queue: str, server: str = "", token: str = "") -> QueueAddress:
        return QueueAddress(queue, "pulsar", server or self.server, token, self.directory)

    def source(self, queue: str, patience: Patience = patient, **address: str) -> AbstractAsyncContextManager[Source]:
        return pulsar_broker.open_source(self.address(queue, **address), patience, self.timeouts)

    def sink(self, queue: str, patience: Patience = patient, **address: str) -> AbstractAsyncContextManager[Sink]:
        return pulsar_broker.open_sink(self.address(queue, **address), patience, self.timeouts)

    def dead_letters(self, queue: str) -> list[tuple[bytes, str, str]]:
        return [
            (
                message.data(),
                *(json.loads(message.properties()[f"x-trio-pilot-{name}"]) for name in ("message-id", "reason")),
            )
            for message in self._messages(dead_letter_queue(queue))
        ]

    def _messages(self, queue: str) -> Iterator[Any]:
        """Take all messages of a topic."""
        with closing(pulsar.Client(self.server, logger=pulsar.FileLogger(pulsar.LoggerLevel.Error, os.devnull))) as client:
            consumer = client.subscribe(
                queue, SUBSCRIPTION, pulsar.ConsumerType.Shared, initial_position=pulsar.InitialPosition.Earliest
            )
            with suppress(pulsar.Timeout):
                while True:
                    message = consumer.receive(timeout_millis=1000)
                    consumer.acknowledge(message)
                    yield message


async def send(broker: Broker, queue: str, *bodies: bytes) -> None:
    async with broker.sink(queue) as sink:
        for number, body in enumerate(bodies):
            await sink.send(body, f"id-{number}")


async def take(consumer: Consumer) -> Delivery:
    """Take the next delivery; wait for it for LONG at most."""
    with trio.fail_after(LONG):
        while (delivery := await consumer.take()) is None:
            await consumer.wait()
        return delivery


async def nothing_comes(consumer: Consumer, seconds: float = 0.3) -> None:
    with trio.move_on_after(seconds):
        delivery = await take(consumer)
        raise AssertionError(f"{delivery} came")


async def eventually(check: Callable[[], bool], what: str = "") -> None:
    """Wait like `until`, for as long as a test of brokers waits for anything."""
    await until(check, what, Limit(LONG, 0.02))


def leaves(error: BaseException) -> list[BaseException]:
    if isinstance(error, BaseExceptionGroup):
        return [leaf for inner in error.exceptions for leaf in leaves(inner)]
    return [error]


async def failure_of(queue: AbstractAsyncContextManager[Source] | AbstractAsyncContextManager[Sink]) -> PilotError:
    """Open a queue that cannot be used; return the one error that it ends with, which must be a PilotError of one line."""
    try:
        with trio.fail_after(LONG):
            async with queue as opened:
                await opened.ready()
                await trio.sleep_forever()
    except Exception as group:
        errors = leaves(group)
        assert len(errors) == 1, errors
        (error,) = errors
        assert isinstance(error, PilotError), repr(error)
        assert "\n" not in str(error)
        assert str(error)
        return error
