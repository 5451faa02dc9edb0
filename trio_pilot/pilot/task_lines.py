"""Log lines of the starts and ends of tasks: of all where tasks take minutes, of a few where they take milliseconds."""

from collections.abc import Iterator
from contextlib import contextmanager

import trio

from trio_pilot.brokers import Delivery
from trio_pilot.log import LOGGER

INTERVAL = 1.0  # seconds from one pair of lines to the next, on average
BURST = 20  # pairs that may come at once, as where many slots start


class TaskLines:
    """Logs a pair of lines for a task, unless there have been too many: then it counts, and tells the number later."""

    def __init__(self) -> None:
        self._spare = float(BURST)  # pairs
        self._spare_at = trio.current_time()
        self._hidden = 0

    @contextmanager
    def around(self, delivery: Delivery) -> Iterator[None]:
        """Log that a task starts, and that it has ended, before and after the body."""
        if not self._has_room():
            self._hidden += 1
            yield
            return
        others = f" ({self._hidden} task(s) before it are not shown)" if self._hidden else ""
        self._hidden = 0
        LOGGER.info("event %s, attempt %d: task starts%s", delivery.message_id, delivery.attempt, others)
        started, how = trio.current_time(), "stopped"
        try:
            yield
            how = "ended"
        except Exception:
            how = "failed"
            raise
        finally:
            LOGGER.info("event %s: task %s after %.3f s", delivery.message_id, how, trio.current_time() - started)

    def _has_room(self) -> bool:
        now = trio.current_time()
        self._spare = min(BURST, self._spare + (now - self._spare_at) / INTERVAL)
        self._spare_at = now
        if self._spare < 1:
            return False
        self._spare -= 1
        return True
