"""Settling events: the one place that decides what becomes of an event, and the one that tells its broker."""

import trio

from trio_pilot.brokers import Settlement
from trio_pilot.errors import BrokerError, DeliveryLostError, DeliveryReplacedError, NotSetAsideError
from trio_pilot.log import LOGGER
from trio_pilot.pilot.deduplication import Deduplicator
from trio_pilot.pilot.task import EventFailed, NodeFailed, Outcome, Success, Task


def settlement_for(outcome: Outcome, task: Task, max_attempts: int) -> Settlement:
    """Decide what becomes of an event whose task has ended."""
    match outcome:
        case Success():
            return Settlement.ACK
        case NodeFailed():
            return Settlement.RELEASE
        case EventFailed():
            return Settlement.DEAD_LETTER if task.delivery.attempt >= max_attempts else Settlement.REJECT


class Settler:
    """Settles events at their brokers, each within `grace` seconds, cancelled or not."""

    def __init__(self, deduplicator: Deduplicator, grace: float, max_attempts: int) -> None:
        self._deduplicator = deduplicator
        self._grace = grace
        self._max_attempts = max_attempts

    async def settle_unless_tried_again(self, task: Task, outcome: Outcome) -> Settlement:
        """Settle the event of a task that has ended, unless it is to be rejected after a delay; return what becomes of it.

        A dead letter that nothing lasting takes is tried again: an event is never lost.

        Raises:
            BrokerError: the broker cannot be used.
        """
        settlement = settlement_for(outcome, task, self._max_attempts)
        if settlement is not Settlement.REJECT:
            try:
                await self.settle(task, settlement, outcome)
            except NotSetAsideError as error:
                LOGGER.warning("event %s goes back to its queue: %s", task.delivery.message_id, error)
                return Settlement.REJECT
        return settlement

    async def settle(self, task: Task, settlement: Settlement, outcome: Outcome | None = None) -> None:
        """Settle an event; a dead letter gets the reason and the name of the error from the outcome.

        Raises:
            NotSetAsideError: nothing takes the dead letter; the event is not settled.
            BrokerError: the broker cannot be used.
        """
        with trio.move_on_after(self._grace, shield=True) as patience:
            while not await self._try_to_settle(task, settlement, outcome):
                pass  # settle it by its new delivery
        task.is_settled = True
        if patience.cancelled_caught:
            LOGGER.warning("event %s not settled (%s) in time", task.delivery.message_id, settlement.value)

    async def release(self, task: Task) -> None:
        """Return an event to its queue, unless it is settled. A broker error is logged: another error is being raised."""
        if task.is_settled:
            return
        try:
            await self.settle(task, Settlement.RELEASE)
        except BrokerError as error:
            LOGGER.warning("event %s not returned: %s", task.delivery.message_id, error)

    async def _try_to_settle(self, task: Task, settlement: Settlement, outcome: Outcome | None) -> bool:
        """Settle by one delivery. Return False if the event has been delivered again meanwhile."""
        delivery = task.delivery
        error = outcome.error if isinstance(outcome, EventFailed | NodeFailed) else None
        reason = (str(error), type(error).__name__) if error else ()
        try:
            await delivery.source.settle(delivery, settlement, *reason)
        except DeliveryLostError as lost:
            if task.delivery is not delivery:
                return False
            LOGGER.warning("not settled (%s): %s", settlement.value, lost)
            if settlement is Settlement.ACK or isinstance(lost, DeliveryReplacedError):
                self._deduplicator.done(delivery)
        else:
            if settlement is Settlement.ACK:
                self._deduplicator.acked(delivery)
        return True
