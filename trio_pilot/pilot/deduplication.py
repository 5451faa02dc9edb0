"""Events that are delivered again: while they are run, or after they were done, and are not to be run twice.

A broker that has lost its connection to a pilot gives the pilot's events to any consumer, the same pilot included.
"""

import hashlib
from collections import OrderedDict, deque
from collections.abc import Hashable, Iterator
from contextlib import contextmanager
from dataclasses import replace
from typing import NamedTuple

import trio

from trio_pilot.brokers import Delivery
from trio_pilot.pilot.task import Task

MOST_DONE = 10_000  # events to remember of those done, and of those acked; a broker that is back delivers them at once

# Seconds for which an ack may not have arrived. A broker has it on its disk within milliseconds; but pika looks for a
# heartbeat every 25 s, and takes two looks to know that a connection is dead.
IN_DOUBT = 60.0


class Key(NamedTuple):
    """What two deliveries of one event have in common. A message id is the sender's, who may give it to several events."""

    queue: str
    message_id: str
    origin: Hashable
    digest: bytes  # of the body; empty where the origin says enough


class Deduplicator:
    """The events at hand. Two deliveries are of one event only if they have the same queue, id, and body."""

    def __init__(self, most_done: int = MOST_DONE) -> None:
        self._running: dict[tuple[str, str], list[Task]] = {}
        self._done: OrderedDict[Key, int] = OrderedDict()  # equal events are counted, and never taken for one
        self._acked = deque[tuple[float, Key, Delivery]](maxlen=most_done)
        self._most_done = most_done

    @contextmanager
    def track(self, task: Task) -> Iterator[None]:
        """Know an event while it is run and settled."""
        name = task.delivery.queue, task.delivery.message_id
        self._running.setdefault(name, []).append(task)
        try:
            yield
        finally:
            self._running[name].remove(task)
            if not self._running[name]:
                del self._running[name]

    def done(self, delivery: Delivery) -> None:
        """Remember an event that is done, but was lost before it could be settled."""
        self._add_done(_key(delivery))

    def acked(self, delivery: Delivery) -> None:
        """Remember an event that is acked: a connection that breaks, or a broker that crashes, right after may lose the ack.

        An event without a name of its own is not remembered: another, equal to it, could be taken for it.
        """
        self._forget_acked()
        if delivery.named or delivery.is_unique:
            self._acked.append((trio.current_time(), _key(delivery), replace(delivery, body=b"")))

    def adopt(self, delivery: Delivery) -> bool:
        """Assign a new delivery to the running task that has lost its own. Return whether there is such a task."""
        name = delivery.queue, delivery.message_id
        for task in self._running.get(name, ()) if delivery.redelivered else ():
            if not task.is_settled and task.is_lost and _is_same(task.delivery, delivery):
                task.delivery = delivery
                return True
        return False

    def was_done(self, delivery: Delivery) -> bool:
        """Return whether a new delivery is of an event that is done already; once for each time that it was done."""
        if not delivery.redelivered or not (self._done or self._acked):
            return False
        key = _key(delivery)
        if key not in self._done:
            self._doubt_acked()
        if key not in self._done:
            return False
        self._done[key] -= 1
        if not self._done[key]:
            del self._done[key]
        return True

    def _add_done(self, key: Key) -> None:
        self._done[key] = self._done.pop(key, 0) + 1
        if len(self._done) > self._most_done:
            self._done.popitem(last=False)

    def _forget_acked(self) -> None:
        while self._acked and self._acked[0][0] < trio.current_time() - IN_DOUBT:
            _, key, delivery = self._acked.popleft()
            if delivery.source.has_lost(delivery):
                self._add_done(key)

    def _doubt_acked(self) -> None:
        """Count those as done and not settled that were acked just before their connection was lost."""
        self._forget_acked()
        acked = list(self._acked)
        self._acked.clear()
        for at, key, delivery in acked:
            if delivery.source.has_lost(delivery):
                self._add_done(key)
            else:
                self._acked.append((at, key, delivery))


def _is_same(one: Delivery, other: Delivery) -> bool:
    """Return whether two deliveries of one queue and message id are of one event."""
    return one.origin == other.origin and (one.is_unique or one.body == other.body)


def _key(delivery: Delivery) -> Key:
    digest = b"" if delivery.is_unique else hashlib.blake2b(delivery.body, digest_size=16).digest()
    return Key(delivery.queue, delivery.message_id, delivery.origin, digest)
