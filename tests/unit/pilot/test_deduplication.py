from dataclasses import replace

import pytest
import trio

from tests.support.lab import WIRE, Lab
from trio_pilot.brokers import Delivery, Settlement
from trio_pilot.brokers.rabbitmq_connection import RabbitTimeouts
from trio_pilot.errors import TasksFailedError
from trio_pilot.pilot import deduplication
from trio_pilot.pilot.deduplication import Deduplicator
from trio_pilot.pilot.task import Task
from trio_pilot.pilot.task_runner import TaskRunner
from trio_pilot.runtimes import Container
from trio_pilot.testing import FakeBroker, FakeSource, copy
from trio_pilot.wire import Message

pytestmark = pytest.mark.mock_clock


async def slow(container: Container) -> int:
    await trio.sleep(30)
    return await copy(container)


async def lose_connections_at(lab: Lab, *times: float) -> None:
    for time in times:
        await trio.sleep_until(time)
        lab.broker.lose_connections()


async def test_an_event_that_comes_again_while_it_is_run_is_adopted(lab: Lab) -> None:
    lab.runtime.script = slow
    lab.put(1, 2)
    async with trio.open_nursery() as nursery:
        nursery.start_soon(lose_connections_at, lab, 10, 20)
        await lab.run(max_concurrent_tasks=4, timeout_queue_incoming=100.0)
    assert len(lab.runtime.ran) == 2
    assert sorted(lab.outputs()) == ["1", "2"]
    lab.assert_the_promise([1, 2])


async def test_an_event_redelivered_once_its_slot_is_free_is_not_run_again(lab: Lab) -> None:
    lab.runtime.script = slow
    lab.put(1)
    async with trio.open_nursery() as nursery:
        nursery.start_soon(lose_connections_at, lab, 10)
        await lab.run()
    assert len(lab.runtime.ran) == 1
    assert lab.outputs() == ["1"]
    lab.assert_the_promise([1])


async def test_an_event_that_was_lost_while_it_failed_is_tried_again(lab: Lab) -> None:
    async def fails_once(container: Container) -> int:
        await trio.sleep(30)
        return 1 if len(lab.runtime.ran) == 1 else await copy(container)

    lab.runtime.script = fails_once
    lab.put(1)
    async with trio.open_nursery() as nursery:
        nursery.start_soon(lose_connections_at, lab, 10)
        with pytest.raises(TasksFailedError):
            await lab.run(stop_listening_on_task_error=False)
    assert lab.outputs() == ["1"]


async def test_equal_events_are_not_taken_for_one(lab: Lab) -> None:
    lab.runtime.script = slow
    for _ in range(3):
        lab.broker.put("in", WIRE.encode(Message("same")), message_id="same")
    async with trio.open_nursery() as nursery:
        nursery.start_soon(lose_connections_at, lab, 10)
        await lab.run(max_concurrent_tasks=2, timeout_queue_incoming=100.0)
    assert len(lab.runtime.ran) == 3
    assert lab.outputs() == ["same"] * 3
    lab.assert_nothing_is_left()


async def test_different_events_with_one_id_are_not_taken_for_one(lab: Lab) -> None:
    async def lose_and_reorder() -> None:
        await trio.sleep(10)
        lab.broker.lose_connections()
        lab.broker.queues["in"].rotate(1)

    lab.runtime.script = slow
    for text in ("one", "two"):
        lab.broker.put("in", WIRE.encode(Message(text)), message_id="same")
    async with trio.open_nursery() as nursery:
        nursery.start_soon(lose_and_reorder)
        await lab.run(timeout_queue_incoming=100.0, prefetch=2)
    assert sorted(lab.outputs()) == ["one", "two"]
    lab.assert_nothing_is_left()


async def test_only_the_same_body_in_one_life_of_a_queue_is_the_same_event() -> None:
    source = FakeSource(FakeBroker(), "in")
    first = replace(delivery(source, "a"), body=b"a", origin=1)
    for other, is_same in (
        (replace(first, body=b"b"), False),
        (replace(first, origin=2), False),
        (replace(first, message_id="b"), False),
        (replace(first, queue="other"), False),
        (replace(first, attempt=2), True),
    ):
        deduplicator = Deduplicator()
        deduplicator.done(first)
        assert deduplicator.was_done(other) is is_same


def delivery(source: FakeSource, message_id: str, *, redelivered: bool = True) -> Delivery:
    return Delivery(source, "in", b"", message_id, 1, tag=-1, redelivered=redelivered)


async def test_a_first_delivery_is_never_one_that_was_done(lab: Lab) -> None:
    async with lab.broker.open_source("in") as source:
        known = Deduplicator()
        known.done(delivery(source, "a", redelivered=False))
        assert not known.was_done(delivery(source, "a", redelivered=False))
        assert known.was_done(delivery(source, "a"))
        assert not known.was_done(delivery(source, "a"))


async def test_the_memory_of_what_was_done_is_bounded() -> None:
    async with FakeBroker().open_source("in") as source:
        known = Deduplicator(most_done=3)
        for message_id in "abcd":
            known.done(delivery(source, message_id))
        assert [known.was_done(delivery(source, message_id)) for message_id in "abcd"] == [False, True, True, True]


async def test_an_ack_that_a_lost_connection_may_have_lost_is_made_up_for(lab: Lab) -> None:
    source = Losing(lab.broker, "in")
    known = Deduplicator()
    known.acked(delivery(source, "a"))
    assert not known.was_done(delivery(source, "a"))
    source.has_lost_all = True
    assert not known.was_done(delivery(source, "a", redelivered=False))
    assert known.was_done(delivery(source, "a"))
    assert not known.was_done(delivery(source, "a"))


async def test_an_event_redelivered_while_its_files_go_is_not_run_again(lab: Lab, monkeypatch: pytest.MonkeyPatch) -> None:
    settle, discard = FakeSource.settle, TaskRunner.discard

    async def lose_the_first_ack(source: FakeSource, delivery: Delivery, settlement: Settlement, *said: str) -> None:
        if delivery.redelivered:
            await settle(source, delivery, settlement, *said)

    async def discard_slowly(runner: TaskRunner, task: Task) -> None:
        lab.broker.lose_connections()
        await trio.sleep(5)
        await discard(runner, task)

    monkeypatch.setattr(FakeSource, "settle", lose_the_first_ack)
    monkeypatch.setattr(TaskRunner, "discard", discard_slowly)
    lab.put(1)
    await lab.run(max_concurrent_tasks=2, timeout_queue_incoming=100.0)
    assert len(lab.runtime.ran) == 1
    assert lab.outputs() == ["1"]
    assert lab.broker.bodies("in") == []
    lab.assert_the_promise([1])


async def test_an_ack_of_long_ago_has_arrived(lab: Lab) -> None:
    source = Losing(lab.broker, "in")
    known = Deduplicator()
    known.acked(delivery(source, "a"))
    await trio.sleep(deduplication.IN_DOUBT + 1)
    known.acked(delivery(source, "b"))
    source.has_lost_all = True
    assert [known.was_done(delivery(source, message_id)) for message_id in "ab"] == [False, True]


async def test_an_ack_is_in_doubt_until_a_dead_connection_must_be_known(lab: Lab) -> None:
    source = Losing(lab.broker, "in")
    known = Deduplicator()
    known.acked(delivery(source, "a"))
    await trio.sleep(
        2 * (RabbitTimeouts().heartbeat + 5)
    )  # pika looks twice, each time for 5 s longer than a heartbeat may take
    known.acked(delivery(source, "b"))
    source.has_lost_all = True
    assert [known.was_done(delivery(source, message_id)) for message_id in "ab"] == [True, True]


async def test_the_memory_of_what_was_acked_is_bounded(lab: Lab) -> None:
    source = Losing(lab.broker, "in")
    known = Deduplicator(most_done=3)
    for message_id in "abcd":
        known.acked(delivery(source, message_id))
    source.has_lost_all = True
    assert [known.was_done(delivery(source, message_id)) for message_id in "abcd"] == [False, True, True, True]


async def test_an_ack_of_an_event_without_a_name_of_its_own_is_never_in_doubt(lab: Lab) -> None:
    source = Losing(lab.broker, "in")
    known = Deduplicator()
    known.acked(replace(delivery(source, "a"), named=False))
    source.has_lost_all = True
    assert not known.was_done(delivery(source, "a"))


class Losing(FakeSource):
    has_lost_all = False

    def has_lost(self, delivery: Delivery) -> bool:
        del delivery
        return self.has_lost_all
