"""A slot is a task's until its output is read, or its failure counted; an event is at hand until it is settled."""

from collections.abc import Callable
from pathlib import Path

import pytest
import trio

from tests.support.lab import WIRE, Lab
from tests.unit.pilot.test_serve import fails, sleeps_long
from trio_pilot.cli.run import patience_of
from trio_pilot.errors import NodeError, PilotError, PublishRefusedError, TasksFailedError
from trio_pilot.files import blocking_calls
from trio_pilot.runtimes import Container
from trio_pilot.settings import Settings
from trio_pilot.testing import Script, copy
from trio_pilot.wire import Message

pytestmark = pytest.mark.mock_clock

AT_HAND = [(1, 1), (1, 4), (3, 1), (2, 5)]


def starts_of(lab: Lab) -> list[float]:
    """Note when each task begins."""
    script, starts = lab.runtime.script, list[float]()

    async def noted(container: Container) -> int:
        starts.append(trio.current_time())
        return await script(container)

    lab.runtime.script = noted
    return starts


class Watched(trio.abc.Instrument):
    """Looks after each step at how much a pilot has at hand."""

    def __init__(self, lab: Lab) -> None:
        self.most = 0
        self._lab = lab

    def after_task_step(self, task: trio.lowlevel.Task) -> None:
        del task
        status = self._lab.status
        assert status.slots.running.value <= status.slots.at_hand.value
        self.most = max(self.most, len(self._lab.broker.unsettled), status.slots.at_hand.value)


async def test_the_next_task_runs_while_an_output_waits_for_its_confirm(lab: Lab) -> None:
    lab.broker.delays["sink.confirm"] = 10
    starts = starts_of(lab)
    lab.put(*range(4))
    await lab.run(prefetch=4)
    assert starts == [0, 1, 2, 3]
    assert trio.current_time() == 4 + 10
    assert lab.runtime.most_running == 1
    lab.assert_the_promise(range(4))


async def test_the_next_task_runs_while_an_event_waits_for_its_ack(lab: Lab) -> None:
    lab.broker.delays["source.ack"] = 5
    starts = starts_of(lab)
    lab.put(*range(3))
    await lab.run(prefetch=2)
    assert starts == [0, 1, 6]


@pytest.mark.parametrize(("slots", "prefetch"), AT_HAND)
async def test_unconfirmed_outputs_count_towards_the_events_at_hand(lab: Lab, slots: int, prefetch: int) -> None:
    lab.broker.delays["sink.confirm"] = 1000
    watched = Watched(lab)
    trio.lowlevel.add_instrument(watched)
    lab.put(*range(20))
    await lab.run(max_concurrent_tasks=slots, prefetch=prefetch)
    assert watched.most == max(slots, prefetch)
    assert lab.runtime.most_running == slots
    lab.assert_the_promise(range(20))


async def test_a_slot_that_waits_for_confirms_does_not_take_the_queue_for_empty(lab: Lab) -> None:
    lab.broker.delays["sink.confirm"] = 1000
    lab.put(1, 2, 3)
    await lab.run(prefetch=2, timeout_queue_incoming=1.0)
    assert sorted(lab.outputs()) == ["1", "2", "3"]


async def test_a_pilot_ends_only_when_its_last_output_is_confirmed(lab: Lab) -> None:
    lab.broker.delays["sink.confirm"] = 30
    lab.put(1)

    async with trio.open_nursery() as nursery:
        nursery.start_soon(lambda: lab.run(prefetch=2, timeout_queue_incoming=3.0))
        await trio.sleep(1 + 3 + 0.5)
        assert lab.status.state.value.value == "PendingRemainingTasks"
        assert (lab.status.slots.running.value, lab.status.slots.at_hand.value) == (0, 1)
        assert lab.status.slots.seconds_busy() == 1
    assert trio.current_time() == 1 + 30
    assert lab.status.slots.at_hand.value == 0
    lab.assert_the_promise([1])


async def test_a_broker_is_waited_for_without_limit_while_an_output_is_unsent(lab: Lab) -> None:
    lab.broker.delays["sink.confirm"] = 30
    lab.put(1)
    patience = patience_of(Settings(broker_patience=5.0), lab.status)
    async with trio.open_nursery() as nursery:
        nursery.start_soon(lambda: lab.run(prefetch=2))
        await trio.sleep(20)
        assert lab.status.slots.running.value == 0
        assert patience(1000)
    assert not patience(6)


async def no_node(container: Container) -> int:
    await trio.sleep(1)
    raise NodeError(f"no such machine as that of {container.name}")


async def writes_a_link(container: Container) -> int:
    await trio.sleep(1)
    Path(container.env["EWMS_TASK_OUTFILE"]).symlink_to("/etc/passwd")  # noqa: ASYNC240
    return 0


@pytest.mark.parametrize(
    ("script", "call", "attempts"),
    [
        (fails, "source.reject", 2),
        (fails, "source.dead_letter", 1),
        (writes_a_link, "source.reject", 2),
        (writes_a_link, "source.dead_letter", 1),
        (no_node, "source.release", 2),
    ],
)
async def test_no_event_is_taken_after_a_failure_however_slow_the_broker_is(
    lab: Lab, script: Script, call: str, attempts: int
) -> None:
    lab.broker.delays[call] = 5
    lab.runtime.script = script
    lab.put(*range(8))
    try:
        await lab.run(prefetch=8, max_attempts=attempts)
    except* PilotError:
        pass
    assert len(lab.runtime.ran) == 1
    lab.assert_nothing_is_left()


async def test_a_failed_task_keeps_its_slot_until_it_is_settled_for_good(lab: Lab) -> None:
    lab.broker.delays["source.dead_letter"] = 5
    lab.runtime.script = fails
    starts = starts_of(lab)
    lab.put(*range(3))
    with pytest.raises(TasksFailedError):
        await lab.run(prefetch=8, max_attempts=1, stop_listening_on_task_error=False)
    assert starts == [0, 6, 12]


async def test_after_a_refused_output_running_tasks_are_finished(lab: Lab) -> None:
    lab.broker.delays["sink.send"] = 0.5

    def refuse(call: str) -> None:
        if call == "sink.send" and not lab.status.failed.value:
            raise PublishRefusedError("too large")

    lab.broker.fault = refuse
    lab.put(*range(8))
    with pytest.raises(TasksFailedError, match=r"^1 TASK\(S\) FAILED"):
        await lab.run(prefetch=8)
    assert lab.outputs() == ["1"]
    assert lab.status.slots.taken == 2


async def test_what_is_sent_and_what_runs_is_each_ended_in_its_way(lab: Lab) -> None:
    lab.broker.delays["sink.send"] = 5
    lab.runtime.script = first_quick
    lab.put(0, 1)
    await lab.run_signalled([2, 2], prefetch=4, settle_grace=6.0)
    assert lab.outputs() == ["0"]
    assert [what for what, _ in lab.broker.history] == ["RELEASE", "CONFIRMED", "ACK"]
    lab.assert_the_promise([0, 1])


async def first_quick(container: Container) -> int:
    if Path(container.env["EWMS_TASK_INFILE"]).read_text() == "0":  # noqa: ASYNC240
        return await copy(container)
    return await sleeps_long(container)


def infiles(lab: Lab) -> list[str]:
    return sorted(path.read_text() for path in lab.directory.glob("ewms-pilot-data/*/task-io/infile-*"))


async def at(time: float, look: Callable[[], object]) -> None:
    await trio.sleep_until(time)
    look()


@pytest.mark.parametrize(("prefetch", "staged"), [(1, ["0"]), (4, ["0", "1"])])
async def test_one_event_is_staged_while_it_waits_for_its_slot_if_there_is_room(
    lab: Lab, prefetch: int, staged: list[str]
) -> None:
    lab.put(*range(4))
    seen: list[list[str]] = []
    async with trio.open_nursery() as nursery:
        nursery.start_soon(at, 0.5, lambda: seen.append(infiles(lab)))
        await lab.run(prefetch=prefetch)
    assert seen == [staged]
    lab.assert_the_promise(range(4))


async def test_an_event_that_takes_long_to_stage_is_not_staged_ahead(lab: Lab) -> None:
    lab.put("0", "1" * (blocking_calls.SMALL + 1))
    seen: list[list[str]] = []
    async with trio.open_nursery() as nursery:
        nursery.start_soon(at, 0.5, lambda: seen.append(infiles(lab)))
        await lab.run(prefetch=4)
    assert seen == [["0"]]


async def test_what_is_staged_goes_back_when_the_pilot_takes_no_more(lab: Lab) -> None:
    lab.runtime.script = sleeps_long
    lab.put(*range(4))
    await lab.run_signalled([1], prefetch=4, grace=200.0)
    assert lab.outputs() == ["0"]
    assert lab.broker.history[0] == ("RELEASE", "1")
    assert (lab.status.slots.taken, lab.status.returned.value) == (1, 0)
    lab.assert_the_promise(range(4))


async def test_what_is_staged_is_not_run_if_the_broker_has_it_again_by_then(lab: Lab) -> None:
    lab.put(*range(3))
    async with trio.open_nursery() as nursery:
        nursery.start_soon(at, 0.5, lab.broker.lose_connections)
        await lab.run(prefetch=3)
    assert sorted(lab.outputs()) == ["0", "1", "2"]
    lab.assert_the_promise(range(3))


@pytest.mark.parametrize("body", [b"no EWMS body", WIRE.encode(Message("\ud800, which is no UTF-8"))])
async def test_what_cannot_be_staged_fails_in_its_turn(lab: Lab, body: bytes) -> None:
    starts = starts_of(lab)
    lab.put(0)
    lab.broker.put("in", body, message_id="bad")
    lab.put(2)
    with pytest.raises(TasksFailedError, match="DecodeError"):
        await lab.run(prefetch=3, stop_listening_on_task_error=False, max_attempts=1)
    assert starts == [0, 1]
    assert lab.status.slots.taken == 3
    assert [message.message_id for message in lab.broker.queues["in.dead-letters"]] == ["bad"]
    lab.assert_the_promise([0, 2, "bad"])
