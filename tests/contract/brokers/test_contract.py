# The contract of every broker, also of those in memory. Tests of one broker only are in modules of their own.

import gc
import os
import sys
import traceback
import warnings
from contextlib import AsyncExitStack, suppress
from datetime import UTC, datetime, timedelta
from pathlib import Path

import pytest
import trio

from tests.contract.brokers.subjects import BY_TCP, PARAMETERS, SUBJECTS
from tests.support.brokers import LONG, Broker, Nats, Rabbit, new_name, nothing_comes, send, take
from tests.support.network_proxy import proxy
from trio_pilot.brokers import Consumer, Delivery, Settlement, Source, dead_letter_queue
from trio_pilot.errors import DeliveryLostError
from trio_pilot.processes import identity


@pytest.fixture(params=PARAMETERS)
def broker(request: pytest.FixtureRequest, tmp_path: Path) -> Broker:
    return SUBJECTS[request.param](request, tmp_path)


async def settle_all(source: Source, consumer: Consumer, count: int) -> list[bytes]:
    bodies = []
    for _ in range(count):
        delivery = await take(consumer)
        bodies.append(delivery.body)
        await source.settle(delivery, Settlement.ACK)
    return bodies


async def ready_again(broker: Broker, queue: str, count: int) -> list[Delivery]:
    """Take and return all deliveries of a queue, with a source of its own, and check that no more come."""
    async with broker.source(queue) as source, source.consume(2 * count + 1) as consumer:
        deliveries = [await take(consumer) for _ in range(count)]
        await nothing_comes(consumer)
        for delivery in deliveries:
            await source.settle(delivery, Settlement.ACK)
    return deliveries


async def test_a_sent_message_arrives_as_the_first_attempt_with_its_body_and_id(broker: Broker, queue: str) -> None:
    await send(broker, queue, b"hello")
    async with broker.source(queue) as source, source.consume(1) as consumer:
        delivery = await take(consumer)
        assert (delivery.body, delivery.message_id) == (b"hello", "id-0")
        assert (delivery.queue, delivery.source, delivery.attempt) == (queue, source, 1)
        await source.settle(delivery, Settlement.ACK)


async def test_a_consumer_knows_since_when_it_has_been_listening(broker: Broker, queue: str) -> None:
    before = trio.current_time()
    async with broker.sink(queue) as sink, broker.source(queue) as source:
        with trio.fail_after(LONG):
            await sink.ready()
            await source.ready()
            async with source.consume(1) as consumer:
                while consumer.listening_since > trio.current_time():
                    await consumer.wait()
                assert consumer.listening_since >= before
                assert await consumer.is_idle()


async def test_messages_arrive_in_the_order_in_which_they_were_sent(broker: Broker, queue: str) -> None:
    bodies = [b"%d" % number for number in range(30)]
    await send(broker, queue, *bodies)
    async with broker.source(queue) as source, source.consume(4) as consumer:
        assert await settle_all(source, consumer, 30) == bodies


@pytest.mark.parametrize("size", [0, 1, 3 * 2**20])
async def test_bodies_of_any_size_arrive_as_they_are(broker: Broker, queue: str, size: int) -> None:
    body = bytes(range(256)) * (size // 256) if size > 1 else b"\xff" * size
    await send(broker, queue, body)
    async with broker.source(queue) as source, source.consume(1) as consumer:
        assert await settle_all(source, consumer, 1) == [body]


async def test_an_acked_message_is_gone(broker: Broker, queue: str) -> None:
    await send(broker, queue, b"a", b"b")
    async with broker.source(queue) as source, source.consume(1) as consumer:
        assert await settle_all(source, consumer, 1) == [b"a"]
    assert [delivery.body for delivery in await ready_again(broker, queue, 1)] == [b"b"]


async def test_a_released_message_comes_back(broker: Broker, queue: str) -> None:
    await send(broker, queue, b"a")
    async with broker.source(queue) as source, source.consume(1) as consumer:
        for attempt in range(1, 26):
            delivery = await take(consumer)
            assert delivery.attempt == 1
            assert delivery.redelivered or attempt != 2
            await source.settle(delivery, Settlement.RELEASE)
        assert await settle_all(source, consumer, 1) == [b"a"]


async def test_a_rejected_message_comes_back_counted(broker: Broker, queue: str) -> None:
    await send(broker, queue, b"a")
    async with broker.source(queue) as source, source.consume(1) as consumer:
        for attempt in range(1, 26):
            delivery = await take(consumer)
            assert (delivery.attempt, delivery.message_id) == (attempt, "id-0")
            await source.settle(delivery, Settlement.REJECT)
            released = await take(consumer)
            assert released.attempt == attempt + 1
            await source.settle(released, Settlement.RELEASE)
        assert await settle_all(source, consumer, 1) == [b"a"]


async def test_a_rejected_message_does_not_stand_in_the_way_of_the_others(broker: Broker, queue: str) -> None:
    await send(broker, queue, b"bad", b"good")
    async with broker.source(queue) as source, source.consume(1) as consumer:
        seen = set()
        for _ in range(4):
            delivery = await take(consumer)
            seen.add(delivery.body)
            await source.settle(delivery, Settlement.ACK if delivery.body == b"good" else Settlement.REJECT)
        assert seen == {b"good", b"bad"}


@pytest.mark.parametrize("reason", ["DecodeError: no JSON", "two\nlines, é", "a lone surrogate \udcff", "long " * 5000])
async def test_a_dead_letter_is_set_aside_with_its_reason(broker: Broker, queue: str, reason: str) -> None:
    await send(broker, queue, b"bad", b"good")
    async with broker.source(queue) as source, source.consume(1) as consumer:
        await source.settle(await take(consumer), Settlement.DEAD_LETTER, reason)
        assert await settle_all(source, consumer, 1) == [b"good"]
        await nothing_comes(consumer)
    ((body, message_id, said),) = broker.dead_letters(queue)
    assert (body, message_id) == (b"bad", "id-0")
    assert said[:1000].replace("\udcff", "?") == reason[:1000].replace("\udcff", "?")


async def test_a_dead_letter_says_what_failed_how_often_where_and_when(broker: Broker, queue: str) -> None:
    await send(broker, queue, b"bad")
    async with broker.source(queue) as source, source.consume(1) as consumer:
        await source.settle(await take(consumer), Settlement.REJECT)
        await source.settle(await take(consumer), Settlement.DEAD_LETTER, "no JSON", "DecodeError")
    async with broker.source(dead_letter_queue(queue)) as source, source.consume(1) as consumer:
        delivery = await take(consumer)
        await source.settle(delivery, Settlement.ACK)
    facts = {name.removeprefix("x-trio-pilot-"): value for name, value in delivery.headers.items()}
    assert facts.items() >= {"reason": "no JSON", "error": "DecodeError", "attempts": 2, "queue": queue}.items()
    assert (facts["pilot"], facts["host"]) == (str(identity.own()), os.uname().nodename)
    assert abs(datetime.fromisoformat(str(facts["time"])) - datetime.now(UTC)) < timedelta(minutes=1)


async def test_a_hundred_dead_letters_are_set_aside_at_once(broker: Broker, queue: str) -> None:
    await send(broker, queue, *[b"%d" % number for number in range(100)])
    async with broker.source(queue) as source, source.consume(100) as consumer, trio.open_nursery() as nursery:
        with trio.fail_after(LONG):
            for _ in range(100):
                nursery.start_soon(source.settle, await take(consumer), Settlement.DEAD_LETTER, "why")
    assert sorted(int(body) for body, _, _ in broker.dead_letters(queue)) == list(range(100))


async def test_a_consumer_that_takes_nothing_keeps_no_more_than_its_prefetch(broker: Broker, queue: str) -> None:
    await send(broker, queue, *[b"%d" % number for number in range(10)])
    async with broker.source(queue) as idle, idle.consume(3) as idle_consumer:
        first = await take(idle_consumer)
        async with broker.source(queue) as source, source.consume(1) as consumer:
            assert len(await settle_all(source, consumer, 7)) == 7
        await idle.settle(first, Settlement.ACK)


async def test_a_delivery_held_back_does_not_count_towards_the_prefetch(broker: Broker, queue: str) -> None:
    await send(broker, queue, *[b"%d" % number for number in range(10)])
    async with broker.source(queue) as source, source.consume(1) as consumer:
        held = [await take(consumer)]
        with source.held(held[0]):
            held.append(await take(consumer))
            with source.held(held[1]):
                assert len(await settle_all(source, consumer, 5)) == 5
                await source.settle(held[1], Settlement.ACK)
            await source.settle(held[0], Settlement.ACK)
        assert len(await settle_all(source, consumer, 3)) == 3
        await nothing_comes(consumer)
    assert await ready_again(broker, queue, 0) == []


async def test_the_end_of_consume_releases_only_what_was_not_taken(broker: Broker, queue: str) -> None:
    await send(broker, queue, b"a", b"b", b"c", b"d")
    async with broker.source(queue) as source:
        async with source.consume(4) as consumer:
            taken = await take(consumer)
        assert sorted(delivery.body for delivery in await ready_again(broker, queue, 3)) == [b"b", b"c", b"d"]
        await source.settle(taken, Settlement.ACK)
    assert await ready_again(broker, queue, 0) == []


async def test_no_moment_to_end_consuming_keeps_a_message(broker: Broker, queue: str) -> None:
    await send(broker, queue, b"a", b"b")
    async with AsyncExitStack() as stack:
        source = await stack.enter_async_context(broker.source(queue))
        await source.ready()
        for step in [0] * 10 + list(range(25)):  # ten times before it has begun
            with trio.move_on_after(step * 0.0002):
                async with source.consume(2):
                    await trio.sleep_forever()
        if broker.keeps_unsent:
            await stack.aclose()
        assert sorted(delivery.body for delivery in await ready_again(broker, queue, 2)) == [b"a", b"b"]


@pytest.mark.parametrize("first", [0, 1])  # in two halves: RabbitMQ 4.0 drops a message that has come back 20 times
async def test_no_moment_to_cancel_a_source_keeps_a_message(broker: Broker, queue: str, first: int) -> None:
    await send(broker, queue, b"a", b"b")
    for step in range(first, 30, 2):
        with trio.move_on_after(step * 0.003):
            await hold_two(broker, queue)
    with trio.fail_after(LONG / 2):  # no lease has run out by then
        again = await ready_again(broker, queue, 2)
    assert sorted((delivery.body, delivery.attempt) for delivery in again) == [(b"a", 1), (b"b", 1)]


async def hold_two(broker: Broker, queue: str) -> None:
    """Take two deliveries, and release them when cancelled."""
    deliveries: list[Delivery] = []
    async with broker.source(queue) as source, source.consume(5) as consumer:
        try:
            deliveries += [await take(consumer)]
            deliveries += [await take(consumer)]
            await trio.sleep_forever()
        finally:
            with trio.move_on_after(LONG, shield=True), suppress(DeliveryLostError):
                for delivery in deliveries:
                    await source.settle(delivery, Settlement.RELEASE)


async def test_unsettled_messages_come_back_when_their_source_closes(broker: Broker, queue: str) -> None:
    await send(broker, queue, b"a", b"b")
    async with broker.source(queue) as source, source.consume(2) as consumer:
        await take(consumer)
        await take(consumer)
    again = await ready_again(broker, queue, 2)
    assert sorted(delivery.body for delivery in again) == [b"a", b"b"]
    assert {delivery.attempt for delivery in again} == {2 if broker.counts_losses else 1}
    assert all(delivery.redelivered for delivery in again)


async def test_a_cancelled_take_has_taken_nothing(broker: Broker, queue: str) -> None:
    count = 60
    await send(broker, queue, *[b"%d" % number for number in range(count)])
    taken: list[Delivery] = []
    async with broker.source(queue) as source, source.consume(count) as consumer:
        await source.settle(await take(consumer), Settlement.RELEASE)
        for step in range(count):
            delivery = None
            with trio.move_on_after(step * 0.00005):
                delivery = await consumer.take()
            if delivery is not None:
                taken.append(delivery)
                await source.settle(delivery, Settlement.ACK)
    left = await ready_again(broker, queue, count - len(taken))
    assert sorted(int(delivery.body) for delivery in taken + left) == list(range(count))


async def test_consumers_share_a_queue_and_each_message_is_delivered_once(broker: Broker, queue: str) -> None:
    count = 100
    await send(broker, queue, *[b"%d" % number for number in range(count)])
    taken: list[list[bytes]] = [[], []]
    done = trio.Event()

    async def work(source: Source, consumer: Consumer, mine: list[bytes]) -> None:
        while True:
            delivery = await take(consumer)
            mine.append(delivery.body)
            await trio.sleep(0.005)
            await source.settle(delivery, Settlement.ACK)
            if sum(map(len, taken)) == count:
                done.set()

    async with AsyncExitStack() as stack:
        sources = [await stack.enter_async_context(broker.source(queue)) for _ in taken]
        consumers = [await stack.enter_async_context(source.consume(1)) for source in sources]
        nursery = await stack.enter_async_context(trio.open_nursery())
        for source, consumer, mine in zip(sources, consumers, taken, strict=True):
            nursery.start_soon(work, source, consumer, mine)
        with trio.fail_after(LONG):
            await done.wait()
        nursery.cancel_scope.cancel()
    assert sorted(int(body) for mine in taken for body in mine) == list(range(count))
    assert min(map(len, taken)) >= count / 4


async def test_an_idle_consumer_wakes_at_once_when_a_message_is_sent(broker: Broker, queue: str) -> None:
    async with broker.sink(queue) as sink, broker.source(queue) as source, source.consume(1) as consumer:
        await nothing_comes(consumer)
        for _ in range(5):
            sent_at = trio.current_time()
            await sink.send(b"x", "id")
            delivery = await take(consumer)
            assert trio.current_time() - sent_at < 1
            await source.settle(delivery, Settlement.ACK)


async def test_an_idle_consumer_wakes_at_once_when_a_message_comes_back(broker: Broker, queue: str) -> None:
    await send(broker, queue, b"x")
    async with broker.source(queue) as one, broker.source(queue) as other:
        async with one.consume(1) as mine:
            delivery = await take(mine)
        async with other.consume(1) as theirs:
            await nothing_comes(theirs)
            await one.settle(delivery, Settlement.RELEASE)
            with trio.fail_after(1):
                await other.settle(await take(theirs), Settlement.ACK)


async def test_settling_twice_is_an_error_without_consequences(broker: Broker, queue: str) -> None:
    await send(broker, queue, b"a", b"b")
    async with broker.sink(queue) as sink, broker.source(queue) as source, source.consume(3) as consumer:
        other, delivery = await take(consumer), await take(consumer)
        await source.settle(delivery, Settlement.ACK)
        await sink.send(b"c", "id-c")
        last = await take(consumer)
        for settlement in Settlement:
            with pytest.raises(DeliveryLostError):
                await source.settle(delivery, settlement)
        await source.settle(other, Settlement.ACK)
        await source.settle(last, Settlement.ACK)
        await nothing_comes(consumer)
    assert await ready_again(broker, queue, 0) == []
    assert [body for body, _, _ in broker.dead_letters(queue)] == []


async def test_two_hundred_sends_at_once_all_arrive(broker: Broker, queue: str) -> None:
    with trio.fail_after(LONG):
        async with broker.sink(queue) as sink, trio.open_nursery() as nursery:
            for number in range(200):
                nursery.start_soon(sink.send, b"%d" % number, f"id-{number}")
    again = await ready_again(broker, queue, 200)
    assert sorted(int(delivery.body) for delivery in again) == list(range(200))
    assert {delivery.message_id for delivery in again} == {f"id-{number}" for number in range(200)}


@pytest.mark.parametrize("broker", BY_TCP, indirect=True)
async def test_a_connection_that_is_silent_is_not_taken_for_an_empty_queue(broker: Rabbit | Nats, queue: str) -> None:
    async with (
        proxy(broker.server.port) as way,
        broker.sink(queue) as sink,
        broker.source(queue, server=way.address) as source,
        source.consume(1) as consumer,
    ):
        while consumer.listening_since > trio.current_time():
            await consumer.wait()
        way.swallowing = True
        await sink.send(b"a", "a")
        with trio.move_on_after(0.3) as waiting:
            await consumer.is_idle()
        assert waiting.cancelled_caught
        way.swallowing = False
        way.cut()
        await source.settle(await take(consumer), Settlement.ACK)


async def test_close_leaves_no_thread_no_file_and_no_warning(broker: Broker, queue: str) -> None:
    await send(broker, queue, b"warm-up")
    files = open_files()
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        for delay in (0, 0.0005, 0.001, 0.002, 0.004, 0.008, 0.016, 0.1):
            with trio.move_on_after(delay):
                async with broker.sink(queue) as sink, broker.source(queue) as source, source.consume(1):
                    await sink.ready()
                    await trio.sleep_forever()
        gc.collect()
    assert threads_that_run("/pika/", "/asyncio/") == 0  # Trio keeps idle threads of its own for a while
    assert open_files() <= files


def open_files() -> int:
    return len(list(Path("/proc/self/fd").iterdir()))


def threads_that_run(*places: str) -> int:
    stacks = [traceback.extract_stack(frame) for frame in sys._current_frames().values()]
    return sum(any(place in line.filename for line in stack for place in places) for stack in stacks)


async def test_queues_of_one_broker_are_independent(broker: Broker, queue: str) -> None:
    other = new_name()
    await send(broker, queue, b"a")
    await send(broker, other, b"b")
    assert [delivery.body for delivery in await ready_again(broker, other, 1)] == [b"b"]
    assert [delivery.body for delivery in await ready_again(broker, queue, 1)] == [b"a"]


async def test_no_cancelled_send_breaks_those_after_it(broker: Broker, queue: str) -> None:
    sent = set()
    async with broker.sink(queue) as sink:
        await sink.ready()
        for number in range(40):
            with trio.move_on_after(number * 0.0001):
                await sink.send(b"%d" % number, f"id-{number}")
                sent.add(number)
        await sink.send(b"40", "id-40")
        sent.add(40)
    arrived: list[int] = []
    async with broker.source(queue) as source, source.consume(100) as consumer:
        while 40 not in arrived:
            arrived += map(int, await settle_all(source, consumer, 1))
    assert sent <= set(arrived)
    assert len(arrived) == len(set(arrived))
