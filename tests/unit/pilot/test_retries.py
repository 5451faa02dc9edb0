# Events that failed, on their way back: no slot, no hurry, nobody delayed.

from itertools import pairwise
from pathlib import Path

import pytest
import trio
from trio.testing import wait_all_tasks_blocked

from tests.support.lab import Lab
from trio_pilot.brokers import Delivery
from trio_pilot.errors import ContainerRunError, TasksFailedError
from trio_pilot.pilot import retries
from trio_pilot.pilot.retries import LONGEST_DELAY, DelayedRetries
from trio_pilot.pilot.task import EventFailed
from trio_pilot.runtimes import Container
from trio_pilot.testing import FakeBroker, FakeSource, copy

pytestmark = pytest.mark.mock_clock

FAILED = EventFailed(ContainerRunError("task failed (exit code 1): "))
POISON = {"7", "17", "27"}


class Starts:
    """A script that fails on some events, and notes when it was started on which."""

    def __init__(self) -> None:
        self.times: dict[str, list[float]] = {}

    async def __call__(self, container: Container) -> int:
        event = Path(container.env["EWMS_TASK_INFILE"]).read_text()  # noqa: ASYNC240
        self.times.setdefault(event, []).append(trio.current_time())
        return 1 if event in POISON else await copy(container)


def delivery(attempt: int, body: bytes = b"") -> Delivery:
    return Delivery(FakeSource(FakeBroker(), "in"), "in", body, "a", attempt, 0)


async def test_events_that_wait_have_a_bound_in_memory(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(retries, "MOST_BYTES", 100)
    waiting, ended = DelayedRetries(1), list[int]()

    async def wait(number: int) -> None:
        event = delivery(10, b"x" * 40)
        with waiting.hold(event):
            await waiting.delay(event, FAILED)
            ended.append(number)

    async with trio.open_nursery() as nursery:
        for number in range(4):
            nursery.start_soon(wait, number)
            await wait_all_tasks_blocked()
            assert ended == list(range(number - 1))  # no more than two of 40 bytes wait, and the oldest go first
        assert not await waiting.is_idle()
        waiting.clear()
    assert await waiting.is_idle()


async def test_the_delay_doubles_up_to_a_limit_and_is_never_the_same() -> None:
    async def delay(attempt: int) -> float:
        begun, waiting, event = trio.current_time(), DelayedRetries(1), delivery(attempt)
        with waiting.hold(event):
            await waiting.delay(event, FAILED)
        return trio.current_time() - begun

    for attempt in range(1, 40):
        most = min(2 ** (attempt - 1), LONGEST_DELAY)
        delays = {await delay(attempt) for _ in range(10)}
        assert len(delays) > 1
        assert all(most / 2 <= one <= most for one in delays)


async def test_a_failing_event_is_tried_again_after_longer_and_longer(lab: Lab) -> None:
    lab.runtime.script = starts = Starts()
    lab.put(7)
    with pytest.raises(TasksFailedError):
        await lab.run(stop_listening_on_task_error=False, max_attempts=5)
    gaps = [later - earlier for earlier, later in pairwise(starts.times["7"])]
    assert len(gaps) == 4
    assert all(2**number / 2 <= gap <= 2**number for number, gap in enumerate(gaps))
    lab.assert_the_promise([7])


async def test_three_failing_events_among_a_thousand_delay_no_other(lab: Lab) -> None:
    lab.runtime.script = starts = Starts()
    lab.put(*range(1000))
    begun = trio.current_time()
    with pytest.raises(TasksFailedError, match=r"^60 TASK\(S\) FAILED"):
        await lab.run(stop_listening_on_task_error=False, max_attempts=20)
    good = {event: times for event, times in starts.times.items() if event not in POISON}
    assert len(good) == 997
    assert {len(times) for times in good.values()} == {1}
    assert max(times[0] for times in good.values()) - begun <= 997 * 1.05
    assert {event: len(starts.times[event]) for event in POISON} == dict.fromkeys(POISON, 20)
    assert {message.message_id for message in lab.broker.queues["in.dead-letters"]} == POISON


async def test_a_pilot_told_to_stop_returns_events_that_wait_for_a_retry_at_once(lab: Lab) -> None:
    lab.runtime.script = Starts()
    lab.put(7)
    with pytest.raises(ExceptionGroup):
        await lab.run_signalled([5.0], stop_listening_on_task_error=False, retry_delay=1000.0)
    assert trio.current_time() == 5
    lab.assert_the_promise([7])


async def test_a_pilot_with_nothing_else_to_do_waits_for_delayed_retries(lab: Lab) -> None:
    lab.runtime.script = starts = Starts()
    lab.put(7)
    begun = trio.current_time()
    with pytest.raises(TasksFailedError):
        await lab.run(stop_listening_on_task_error=False, max_attempts=6, timeout_queue_incoming=0.1)
    assert len(starts.times["7"]) == 6
    assert trio.current_time() - starts.times["7"][-1] == pytest.approx(0.1)
    assert trio.current_time() - begun < 1 + 2 + 4 + 8 + 16 + 1


async def test_an_event_on_the_bench_that_comes_again_is_adopted(lab: Lab) -> None:
    lab.runtime.script = starts = Starts()
    lab.put(7)

    async def lose() -> None:
        await trio.sleep(2)
        lab.broker.lose_connections()

    async with trio.open_nursery() as nursery:
        nursery.start_soon(lose)
        with pytest.raises(TasksFailedError):
            await lab.run(stop_listening_on_task_error=False, max_attempts=3, retry_delay=20.0)
    first, second = starts.times["7"][:2]
    assert second - first >= 10
    lab.assert_the_promise([7])


async def test_an_event_that_is_set_aside_nowhere_is_tried_on_with_its_delay(
    lab: Lab, caplog: pytest.LogCaptureFixture
) -> None:
    lab.broker.takes_dead_letters = False
    lab.runtime.script = starts = Starts()
    lab.put(7)
    options = {"stop_listening_on_task_error": False, "max_attempts": 20}
    with pytest.raises(ExceptionGroup):
        await lab.run_signalled([500.0], **options)
    gaps = [later - earlier for earlier, later in pairwise(starts.times["7"])]
    assert len(gaps) >= 20
    assert all(LONGEST_DELAY / 2 <= gap <= LONGEST_DELAY for gap in gaps[6:])
    ((message,),) = [lab.broker.queues["in"]]
    assert (message.message_id, message.attempts) == ("7", len(starts.times["7"]))
    assert "event 7 goes back to its queue: nothing takes it as a dead letter" in caplog.text
    lab.assert_nothing_is_left()
