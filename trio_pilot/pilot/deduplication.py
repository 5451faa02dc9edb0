"""Events that are delivered again: while they are run, or after they were done, and are not to be run twice.

A broker that has lost its connection to a pilot gives the pilot's events to any consumer, the same pilot included.
"""

from collections import OrderedDict, deque
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace

import trio

from trio_pilot.brokers import Delivery
from trio_pilot.pilot.task import Task

MOST_DONE = 10_000  # events to remember of those done, and of those acked; a broker that is back delivers them at once

# Seconds for which an ack may not have arrived. A broker has it on its disk within milliseconds; but pika looks for a
# heartbeat every 25 s, and takes two looks to know that a connection is dead.
IN_DOUBT = 60.0


class Deduplicator:
    """The events at hand, by queue and message id; equal ones are counted, and never taken for one."""

    def __init__(self, most_done: int = MOST_DONE) -> None:
        self._running: dict[tuple[str, str], list[Task]] = {}
        self._done: OrderedDict[tuple[str, str], int] = OrderedDict()
        self._acked = deque[tuple[float, Delivery]](maxlen=most_done)
        self._most_done = most_done

    @contextmanager
    def track(self, task: Task) -> Iterator[None]:
        """Know an event while it is run and settled."""
        key = _key(task.delivery)
        self._running.setdefault(key, []).append(task)
        try:
            yield
        finally:
            self._running[key].remove(task)
            if not self._running[key]:
                del self._running[key]

    def done(self, delivery: Delivery) -> None:
        """Remember an event that is done, but was lost before it could be settled."""
        key = _key(delivery)
        self._done[key] = self._done.pop(key, 0) + 1
        if len(self._done) > self._most_done:
            self._done.popitem(last=False)

    def acked(self, delivery: Delivery) -> None:
        """Remember an event that is acked: a connection that breaks, or a broker that crashes, right after may lose the ack.

        An event whose sender gave it no name is not remembered: another, equal to it, could be taken for it.
        """
        self._forget_acked()
        if delivery.named:
            self._acked.append((trio.current_time(), replace(delivery, body=b"")))

    def adopt(self, delivery: Delivery) -> bool:
        """Assign a new delivery to the running task that has lost its own. Return whether there is such a task."""
        for task in self._running.get(_key(delivery), ()) if delivery.redelivered else ():
            if not task.is_settled and task.is_lost:
                task.delivery = delivery
                return True
        return False

    def was_done(self, delivery: Delivery) -> bool:
        """Return whether a new delivery is of an event that is done already; once for each time that it was done."""
        if not delivery.redelivered:
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

    def _forget_acked(self) -> None:
        while self._acked and self._acked[0][0] < trio.current_time() - IN_DOUBT:
            _, delivery = self._acked.popleft()
            if delivery.source.has_lost(delivery):
                self.done(delivery)

    def _doubt_acked(self) -> None:
        """Count those as done and not settled that were acked just before their connection was lost."""
        self._forget_acked()
        acked = list(self._acked)
        self._acked.clear()
        for at, delivery in acked:
            if delivery.source.has_lost(delivery):
                self.done(delivery)
            else:
                self._acked.append((at, delivery))


def _key(delivery: Delivery) -> tuple[str, str]:
    return delivery.queue, delivery.message_id
