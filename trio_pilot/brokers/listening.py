"""Taking the next delivery from several queues."""

from collections import deque
from collections.abc import Iterable

import trio
from trio_util import wait_any

from trio_pilot.brokers import Consumer, Delivery


async def first_delivery(consumers: deque[Consumer]) -> Delivery | None:
    """Take a delivery that has arrived, from each consumer in turn; None if there is none."""
    for _ in range(len(consumers)):
        consumers.rotate(-1)
        if delivery := await consumers[0].take():
            return delivery
    return None


async def next_delivery(consumers: deque[Consumer], idle_limit: float) -> Delivery | None:
    """Take the next delivery, from each consumer in turn; None once all have listened for `idle_limit` seconds in vain."""
    begun = trio.current_time()
    while True:
        if delivery := await first_delivery(consumers):
            return delivery
        deadline = max(begun, *(consumer.listening_since for consumer in consumers)) + idle_limit
        if trio.current_time() >= deadline and await _are_idle(consumers):
            return None
        with trio.move_on_at(deadline):
            await wait_any(*(consumer.wait for consumer in consumers))


async def _are_idle(consumers: Iterable[Consumer]) -> bool:
    """Ask all brokers whether their queues are idle; return False as soon as a delivery arrives."""
    answers: list[bool] = []

    async def ask() -> None:
        answers.extend([await consumer.is_idle() for consumer in consumers])

    await wait_any(ask, *(consumer.wait for consumer in consumers))
    return bool(answers) and all(answers)
