import random
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import trio

from tests.unit.pilots import Lab
from tests.unit.test_pilot import fails, fails_on_7, settled
from trio_pilot import node
from trio_pilot.errors import NodeError, TasksFailedError
from trio_pilot.runtimes import Container
from trio_pilot.testing import copy

pytestmark = pytest.mark.mock_clock

GO_ON = {"stop_listening_on_task_error": False, "retry_delay": 0.0}


async def does_not_sing(container: Container) -> int:
    container.stderr.write_text("true: Input/output error\n")
    return 126


async def run_on_a_bad_node(lab: Lab, **options: Any) -> str:
    with pytest.raises(BaseExceptionGroup) as failure:
        await lab.run(**{**GO_ON, **options})
    errors = failure.value
    while isinstance(errors, BaseExceptionGroup):
        (errors,) = errors.exceptions
    assert isinstance(errors, NodeError)
    return str(errors)


async def test_a_node_that_breaks_every_task_touches_one_event_and_charges_none(lab: Lab) -> None:
    lab.runtime.script, lab.runtime.canary = fails, does_not_sing
    lab.put(*range(50))
    assert await run_on_a_bad_node(lab) == (
        "this node breaks tasks: `true` in a container fails (exit code 126): true: Input/output error;"
        " so this may be none of the event's: task failed (exit code 3): Oh no."
    )
    assert settled(lab) == [("RELEASE", "0")]
    lab.assert_the_promise(range(50))


@pytest.mark.parametrize("slots", [1, 2, 8])
async def test_a_node_that_breaks_later_touches_one_event_a_slot_and_one_more(lab: Lab, slots: int) -> None:
    broken = False

    async def script(container: Container) -> int:
        return await (fails if broken else copy)(container)

    async def canary(container: Container) -> int:
        return await does_not_sing(container) if broken else 0

    lab.runtime.script, lab.runtime.canary = script, canary
    lab.put(*range(50))
    async with trio.open_nursery() as nursery:
        nursery.start_soon(lambda: run_on_a_bad_node(lab, max_concurrent_tasks=slots))
        await trio.sleep(5.5)
        broken = True
    touched = [what for what, _ in settled(lab) if what != "ACK"]
    assert len(touched) <= slots + 1
    assert touched.count("REJECT") <= 1
    lab.assert_the_promise(range(50))


async def test_a_third_of_poison_never_stops_a_good_node(lab: Lab) -> None:
    chance = random.Random(3)
    poison = {str(number) for number in range(300) if chance.random() < 0.3}

    async def script(container: Container) -> int:
        event = Path(container.env["EWMS_TASK_INFILE"]).read_text()  # noqa: ASYNC240
        return await (fails if event in poison else copy)(container)

    lab.runtime.script = script
    lab.put(*range(300))
    with pytest.raises(TasksFailedError):
        await lab.run(**GO_ON, max_attempts=2)
    assert len(lab.outputs()) == 300 - len(poison)
    assert {message.message_id for message in lab.broker.queues["in.dead-letters"]} == poison
    assert all(what != "RELEASE" for what, _ in settled(lab))


async def test_nothing_but_poison_never_stops_a_good_node(lab: Lab) -> None:
    lab.runtime.script = fails
    lab.put(*range(20))
    with pytest.raises(TasksFailedError, match=r"^20 TASK"):
        await lab.run(**GO_ON, max_attempts=1)


async def test_a_node_that_works_is_not_looked_at_for_a_single_failure(lab: Lab) -> None:
    looked: list[str] = []

    async def canary(container: Container) -> int:
        looked.append(container.name)
        return 0

    lab.runtime.script, lab.runtime.canary = fails_on_7, canary
    lab.put(1, 7, 2, 3)
    with pytest.raises(TasksFailedError):
        await lab.run(**GO_ON, max_attempts=1)
    assert looked == []


async def test_an_image_without_the_canarys_command_is_no_fault_of_the_node(lab: Lab) -> None:
    async def canary(container: Container) -> int:
        container.stderr.write_text("true: No such file or directory\n")
        return 127

    lab.runtime.script, lab.runtime.canary = fails, canary
    lab.put(1)
    with pytest.raises(TasksFailedError):
        await lab.run(**GO_ON, max_attempts=1)


async def test_an_image_that_has_neither_is_one(lab: Lab) -> None:
    async def has_nothing(container: Container) -> int:
        container.stderr.write_text(f"{container.args[0]}: No such file or directory\n")
        return 127

    lab.runtime.script = lab.runtime.canary = has_nothing
    lab.put(1)
    assert "this node breaks tasks: the image has neither `run` nor `true`" in await run_on_a_bad_node(lab)
    assert settled(lab) == [("RELEASE", "1")]


async def test_a_canary_that_hangs_is_a_fault_of_the_node(lab: Lab) -> None:
    async def canary(container: Container) -> int:
        del container
        await trio.sleep_forever()

    lab.runtime.script, lab.runtime.canary = fails, canary
    lab.put(1)
    assert "`true` in a container takes more than 60 s" in await run_on_a_bad_node(lab)
    lab.assert_the_promise([1])


async def test_a_pilot_told_to_end_does_not_wait_for_a_canary(lab: Lab) -> None:
    async def canary(container: Container) -> int:
        del container
        await trio.sleep_forever()

    lab.runtime.script, lab.runtime.canary = fails, canary
    lab.put(1)
    await lab.run_signalled([2, 3], stop_listening_on_task_error=False)
    assert trio.current_time() < 5
    assert settled(lab) == [("RELEASE", "1")]
    lab.assert_the_promise([1])


@pytest.mark.parametrize("what", ["write_to", "skew_of"])
async def test_a_bad_disk_or_clock_is_a_fault_of_the_node(lab: Lab, monkeypatch: pytest.MonkeyPatch, what: str) -> None:
    def fault(directory: Path) -> None:
        raise NodeError(f"{directory.name} is bad")

    monkeypatch.setattr(node, what, fault)
    lab.runtime.script = fails
    lab.put(1)
    assert "this node breaks tasks: ewms-pilot-data is bad" in await run_on_a_bad_node(lab)
    assert settled(lab) == [("RELEASE", "1")]


def breaks(lab: Lab) -> None:
    lab.runtime.script, lab.runtime.canary = fails, does_not_sing


def is_not_there(lab: Lab) -> None:
    def fault(call: str) -> None:
        if call == "runtime.run":
            raise NodeError("no containers here")

    lab.runtime.fault = fault


@pytest.mark.parametrize("make_bad", [breaks, is_not_there])
async def test_a_bad_node_holds_its_slot(lab: Lab, make_bad: Callable[[Lab], None]) -> None:
    make_bad(lab)
    lab.put(1, 2)
    await run_on_a_bad_node(lab, stop_listening_on_task_error=True, quarantine_time=600.0)
    assert 600 <= trio.current_time() < 605
    assert [what for what, _ in settled(lab)] == ["RELEASE"]
