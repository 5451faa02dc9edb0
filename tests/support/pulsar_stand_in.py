"""A stand-in for pulsar-client and its broker: the calls that trio-pilot uses, answered by a thread of its own."""

import itertools
import socket
from collections import deque
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from threading import RLock
from typing import Any

import pulsar

MOST_BYTES = 5 * 2**20  # of a message: Pulsar's maxMessageSize


@dataclass(eq=False)
class Message:
    place: str
    body: bytes
    headers: dict[str, str]
    deliveries: int = 0

    def message_id(self) -> str:
        return self.place

    def data(self) -> bytes:
        return self.body

    def properties(self) -> dict[str, str]:
        return self.headers

    def redelivery_count(self) -> int:
        return self.deliveries - 1


@dataclass(eq=False)
class Topic:
    has_subscription: bool = False
    ready: deque[Message] = field(default_factory=deque)
    asking: deque[tuple["Consumer", Callable[..., None]]] = field(default_factory=deque)


class StandIn:
    """A broker. Its address accepts connections, on which nothing is sent."""

    def __init__(self) -> None:
        self.lock = RLock()
        self.topics: dict[str, Topic] = {}
        self.clients: list[Client] = []
        self.refused: dict[str, str] = {}  # the error for each topic that may have no producer
        self.is_dead = False  # it answers no requests, and its connections stay open
        self._listening = socket.create_server(("127.0.0.1", 0), backlog=1000)
        self._callbacks = ThreadPoolExecutor(1)
        self._numbers = itertools.count()
        self.address = f"pulsar://127.0.0.1:{self._listening.getsockname()[1]}"

    def __enter__(self) -> "StandIn":
        return self

    def __exit__(self, *_: object) -> None:
        self._callbacks.shutdown()
        self._listening.close()

    def client(self, url: str, **options: Any) -> "Client":
        self.clients.append(Client(self, url, options))
        return self.clients[-1]

    def topic(self, name: str) -> Topic:
        return self.topics.setdefault(name, Topic())

    def answer(self, callback: Callable[..., None], *told: Any) -> None:
        self._callbacks.submit(callback, *told)

    def store(self, name: str, body: bytes, headers: dict[str, str]) -> None:
        with self.lock:
            topic = self.topic(name)
            if topic.has_subscription:  # else no message is kept
                topic.ready.append(Message(f"({next(self._numbers)},0,-1,-1)", body, headers))
                self.deliver(topic)

    def deliver(self, topic: Topic) -> None:
        while topic.ready and topic.asking:
            consumer, callback = topic.asking.popleft()
            message = topic.ready.popleft()
            message.deliveries += 1
            consumer.unsettled[message.place] = message
            self.answer(callback, pulsar.Result.Ok, message)

    def redeliver(self, name: str) -> None:
        """Deliver unsettled messages again, as to a consumer that has connected again."""
        with self.lock:
            consumers = [one for client in self.clients for one in client.opened if isinstance(one, Consumer)]
            for consumer in consumers:
                self.topic(name).ready.extendleft(reversed(consumer.unsettled.values()))
                consumer.unsettled.clear()
            self.deliver(self.topic(name))

    def cut(self) -> None:
        """Lose all connections."""
        for client in self.clients:
            client.close()


class Client:
    def __init__(self, server: StandIn, url: str, options: dict[str, Any]) -> None:
        self.server, self.url, self.options = server, url, options
        self.opened: list[Consumer | Producer] = []
        self.is_open = True

    def subscribe(self, topic: str, subscription: str, *_: Any, receiver_queue_size: int = 1000, **more: Any) -> Any:
        assert (subscription, more["initial_position"]) == ("i3-pulsar-sub", pulsar.InitialPosition.Earliest)
        assert receiver_queue_size == 0 or "consumer_type" not in more
        self.server.topic(topic).has_subscription = True
        self.opened.append(consumer := Consumer(self, topic))
        return consumer

    def create_producer(self, topic: str) -> "Producer":
        if name := self.server.refused.get(topic):
            raise getattr(pulsar, name)(name)
        self.opened.append(producer := Producer(self, topic))
        return producer

    def close(self) -> None:
        self.is_open = False
        for one in self.opened:
            one.close()

    shutdown = close


class Producer:
    def __init__(self, client: Client, topic: str) -> None:
        self._client, self._topic = client, topic

    def send_async(self, body: bytes, callback: Callable[..., None], properties: dict[str, str]) -> None:
        server = self._client.server
        if not self._client.is_open:
            server.answer(callback, pulsar.Result.AlreadyClosed, None)
        elif len(body) > MOST_BYTES:
            server.answer(callback, pulsar.Result.MessageTooBig, None)
        else:
            server.store(self._topic, body, properties)
            server.answer(callback, pulsar.Result.Ok, "its place")

    def is_connected(self) -> bool:
        return self._client.is_open

    def close(self) -> None: ...


class Consumer:
    def __init__(self, client: Client, topic: str) -> None:
        self._client, self._server, self._topic = client, client.server, client.server.topic(topic)
        self.unsettled: dict[str, Message] = {}
        self._consumer = self

    def is_connected(self) -> bool:
        return self._client.is_open

    def receive_async(self, callback: Callable[..., None]) -> None:
        with self._server.lock:
            self._topic.asking.append((self, callback))
            self._server.deliver(self._topic)

    def receive(self, timeout_millis: int) -> Message:
        assert timeout_millis
        with self._server.lock:
            if not self._topic.ready:
                raise pulsar.Timeout("TimeOut")
            return self._topic.ready.popleft()

    def get_last_message_id_async(self, callback: Callable[..., None]) -> None:
        self._server.answer(callback, pulsar.Result.Timeout if self._server.is_dead else pulsar.Result.Ok, "its place")

    def acknowledge(self, message: Message) -> None: ...

    def acknowledge_async(self, place: str, callback: Callable[..., None]) -> None:
        with self._server.lock:
            known = self.unsettled.pop(place, None) if self._client.is_open else None
        self._server.answer(callback, pulsar.Result.Ok if known else pulsar.Result.AlreadyClosed)

    def negative_acknowledge(self, place: str) -> None:
        with self._server.lock:
            self._topic.ready.appendleft(self.unsettled.pop(place))
            self._server.deliver(self._topic)

    def close(self) -> None:
        with self._server.lock:
            mine = [callback for consumer, callback in self._topic.asking if consumer is self]
            self._topic.asking = deque(asked for asked in self._topic.asking if asked[0] is not self)
            self._topic.ready.extendleft(reversed(self.unsettled.values()))
            self.unsettled.clear()
            self._server.deliver(self._topic)
        for callback in mine:
            self._server.answer(callback, pulsar.Result.AlreadyClosed, None)
