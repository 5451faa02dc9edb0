import pytest
import trio
from trio.testing import wait_all_tasks_blocked

from trio_pilot.brokers import Delivery
from trio_pilot.brokers.prefetch import PrefetchConsumer
from trio_pilot.testing import FakeBroker, FakeSource

pytestmark = pytest.mark.mock_clock


class Controlled(PrefetchConsumer):
    """A consumer whose deliveries a test makes, and loses."""

    def __init__(self) -> None:
        self.lost: list[Delivery] = []
        super().__init__(self.lost.__contains__)

    def arrive(self, name: str) -> Delivery:
        delivery = Delivery(FakeSource(FakeBroker(), "q"), "q", b"", name, 1, None)
        self._note_arrival(delivery)
        return delivery

    def listen(self, *, is_so: bool) -> None:
        self._note_listening(is_so=is_so)


async def test_deliveries_are_taken_in_order_without_those_that_were_lost() -> None:
    consumer = Controlled()
    first, lost, last = map(consumer.arrive, ("first", "lost", "last"))
    consumer.lost.append(lost)
    assert [await consumer.take() for _ in range(3)] == [first, last, None]


async def test_wait_returns_for_each_change_since_the_last_take() -> None:
    consumer = Controlled()
    for change in (consumer.arrive, lambda _: consumer.listen(is_so=True), lambda _: consumer.listen(is_so=False)):
        while await consumer.take():
            pass
        change("x")
        with trio.fail_after(1):
            await consumer.wait()
    while await consumer.take():
        pass
    with trio.move_on_after(1) as waiting:
        await consumer.wait()
    assert waiting.cancelled_caught


async def test_an_arrival_wakes_a_waiting_task() -> None:
    consumer = Controlled()
    async with trio.open_nursery() as nursery:
        nursery.start_soon(consumer.wait)
        await wait_all_tasks_blocked()
        consumer.arrive("x")
