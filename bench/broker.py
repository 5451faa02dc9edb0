"""The broker of a measurement, and its queues: fill, count and empty them. Only this module imports pika."""

import time
import uuid
from collections.abc import Iterable, Iterator
from contextlib import contextmanager, suppress
from itertools import islice
from typing import Any

import pika
from pika.exceptions import AMQPError

from tests.support.servers import RabbitServer, rabbitmq
from trio_pilot.wire import EwmsWire, Message

QUORUM = {"x-queue-type": "quorum"}
PERSISTENT = pika.BasicProperties(delivery_mode=2)
WIRE = EwmsWire()
LARGEST = 2**26  # bytes of a result
PATIENCE = 60.0  # seconds for messages to arrive

__all__ = ["Queues", "RabbitServer", "open_queues", "open_serial_worker", "rabbitmq"]


class Queues:
    """Two quorum queues of one measurement, one for events and one for results."""

    def __init__(self, channel: Any, address: str) -> None:
        name = uuid.uuid4().hex[:12]
        self.address = address
        self.incoming, self.outgoing = f"in-{name}", f"out-{name}"
        self._channel = channel
        for queue in (self.incoming, self.outgoing):
            channel.queue_declare(queue, durable=True, arguments=QUORUM)

    def fill(self, events: Iterable[Any]) -> None:
        """Put events into the incoming queue. Returns once the broker has all of them."""
        count = -1
        for count, event in enumerate(events):  # noqa: B007 -- the last number is needed
            self.put(event)
        # Publisher confirms would slow this down; a count of all messages proves the same.
        self.wait_for(self.incoming, count + 1)

    def put(self, event: Any) -> None:
        """Put one event into the incoming queue."""
        self._channel.basic_publish("", self.incoming, WIRE.encode(Message(event)), PERSISTENT)

    def wait_for(self, queue: str, count: int, interval: float = 0.01) -> None:
        """Wait until so many messages of a queue are ready. Raises AssertionError if they are not in time."""
        deadline = time.monotonic() + PATIENCE
        while (ready := self.ready(queue)) < count:
            assert time.monotonic() < deadline, f"{ready} messages in {queue} instead of {count}"
            time.sleep(interval)

    def ready(self, queue: str) -> int:
        """Return the number of messages in a queue that no consumer has taken. The query takes the broker 0.5 ms."""
        return int(self._channel.queue_declare(queue, passive=True).method.message_count)

    def results(self) -> Iterator[Any]:
        """Yield all results, and remove them. They are streamed: to request each of them takes ten times as long."""
        streamed = self._channel.consume(self.outgoing, auto_ack=True)
        for _, _, body in islice(streamed, self.ready(self.outgoing)):
            yield WIRE.decode(body, LARGEST).data
        self._channel.cancel()


@contextmanager
def open_queues(server: RabbitServer) -> Iterator[Queues]:
    """Make queues at a server, and delete them at the end, so that they cost the next measurement nothing."""
    with _channel(server) as channel:
        queues = Queues(channel, server.address)
        try:
            yield queues
        finally:
            with _channel(server) as channel:  # the server may have been restarted
                for queue in (queues.incoming, queues.outgoing):
                    channel.queue_delete(queue)


class SerialWorker:
    """Receives one event after the other, and sends a result for each."""

    def __init__(self, channel: Any, queues: Queues) -> None:
        self._channel = channel
        self._outgoing = queues.outgoing
        self._events = channel.consume(queues.incoming)
        self._tag = 0

    def receive(self) -> Any:
        """Wait for an event."""
        method, _, body = next(self._events)
        self._tag = method.delivery_tag
        return WIRE.decode(body, LARGEST).data

    def send_result(self, result: Any) -> None:
        """Publish the result, and acknowledge the event once the broker has confirmed it."""
        self._channel.basic_publish("", self._outgoing, WIRE.encode(Message(result)), PERSISTENT)
        self._channel.basic_ack(self._tag)


@contextmanager
def open_serial_worker(server: RabbitServer, queues: Queues) -> Iterator[SerialWorker]:
    """Connect with one event at a time, and with publisher confirms."""
    with _channel(server) as channel:
        channel.confirm_delivery()
        channel.basic_qos(prefetch_count=1)
        yield SerialWorker(channel, queues)


@contextmanager
def _channel(server: RabbitServer) -> Iterator[Any]:
    connection = pika.BlockingConnection(pika.ConnectionParameters("127.0.0.1", server.port, heartbeat=0))
    try:
        yield connection.channel()
    finally:
        with suppress(AMQPError):
            connection.close()
