"""Which events this pilot runs, or has done and could not settle: should the broker deliver one again, it is not run again.

A broker that has lost the connection to us gives our events to whoever listens; that may be us.
"""

from collections import OrderedDict, deque
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace

import trio

from trio_pilot.brokers import Delivery

MOST_DONE = 10_000  # events to remember, of those done and of those acked; a broker that is back delivers them at once

# Seconds for which an ack may not have arrived. A broker has it on its disk within milliseconds; but pika looks for a
# heartbeat every 25 s, and takes two looks to know that a connection is dead.
IN_DOUBT = 60.0


class Life:
    """An event that is being run, and the delivery by which it is to be settled."""

    def __init__(self, delivery: Delivery) -> None:
        self.delivery = delivery
        self.is_settled = False  # or it was tried for long enough: nobody settles another delivery for it any more


class Deduplicator:
    """The events at hand, by queue and message id; equal ones are counted, and never taken for one."""

    def __init__(self) -> None:
        self._running: dict[tuple[str, str], list[Life]] = {}
        self._done: OrderedDict[tuple[str, str], int] = OrderedDict()
        self._acked = deque[tuple[float, Delivery]](maxlen=MOST_DONE)

    @contextmanager
    def life(self, delivery: Delivery) -> Iterator[Life]:
        """Enter an event for as long as it is run."""
        key, life = _key(delivery), Life(delivery)
        self._running.setdefault(key, []).append(life)
        try:
            yield life
        finally:
            self._running[key].remove(life)
            if not self._running[key]:
                del self._running[key]

    def done(self, delivery: Delivery) -> None:
        """Enter an event that is done, but was lost before it could be settled."""
        key = _key(delivery)
        self._done[key] = self._done.pop(key, 0) + 1
        if len(self._done) > MOST_DONE:
            self._done.popitem(last=False)

    def acked(self, delivery: Delivery) -> None:
        """Enter an event that is acked: a connection that breaks, or a broker that crashes, right after may not have it.

        Not one that its sender gave no name: another, equal to it, could be taken for it.
        """
        self._forget_acked()
        if delivery.named:
            self._acked.append((trio.current_time(), replace(delivery, body=b"")))

    def adopt(self, delivery: Delivery) -> bool:
        """Give a new delivery to the event that is run already, if its own is lost; tell whether there was one."""
        for life in self._running.get(_key(delivery), ()) if delivery.redelivered else ():
            if not life.is_settled and life.delivery.source.has_lost(life.delivery):
                life.delivery = delivery
                return True
        return False

    def was_done(self, delivery: Delivery) -> bool:
        """Tell whether a new delivery is of an event that is done already; once for each that was."""
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
        """Take those for done and not settled that were acked just before their connection was lost."""
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
