"""The pilot is ended, or something fails it, at every moment that there is; each time the promise holds."""

from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
import trio

from tests.support.lab import Lab
from trio_pilot.errors import (
    BrokerError,
    DeliveryLostError,
    NodeError,
    PilotError,
    PublishRefusedError,
)
from trio_pilot.runtimes import Container
from trio_pilot.testing import copy

pytestmark = pytest.mark.mock_clock

EVENTS = range(6)
SCRIPTED = {"max_concurrent_tasks": 2, "init_image": "init", "stop_listening_on_task_error": False, "max_attempts": 2}


async def scripted(container: Container) -> int:
    """Copy; but event 3 fails, and event 4 takes longer than it may."""
    infile = container.env.get("EWMS_TASK_INFILE")
    event = Path(infile).read_text() if infile else ""  # noqa: ASYNC240
    if event == "3":
        await trio.sleep(0.5)
        return 1
    if event == "4":
        await trio.sleep(60)
    return await copy(container)


def lab_in(directory: Path) -> Lab:
    directory.mkdir()
    lab = Lab(directory)
    lab.runtime.script = scripted
    lab.put(*EVENTS)
    return lab


class Trigger(trio.abc.Instrument):
    """Acts before the nth step that any task takes."""

    def __init__(self, at: int, act: Callable[[], None]) -> None:
        self.steps = 0
        self._at = at
        self._act = act

    def before_task_step(self, task: trio.lowlevel.Task) -> None:
        del task
        self.steps += 1
        if self.steps == self._at:
            self._act()


async def run_with(lab: Lab, round_: int, at: int, act: Callable[[], None]) -> bool:
    """Run the scripted pilot with `act` at one of its steps; tell whether it took so many.

    In every other round there is room for more events than run, and they are sent while others run.
    """
    lab.broker.delays["sink.confirm"] = 0.25
    trigger = Trigger(at, act)
    trio.lowlevel.add_instrument(trigger)
    try:
        await lab.run(**SCRIPTED, prefetch=[1, 5][round_ % 2], task_timeout=5.0, grace=2.0, settle_grace=3.0)
    except* PilotError:
        pass
    finally:
        trio.lowlevel.remove_instrument(trigger)
    return trigger.steps >= at


def moments() -> Iterator[int]:
    return iter(range(1, 100_000))


# Trio shuffles the tasks that are due at once, so that no two rounds are the same.
rounds = pytest.mark.parametrize("round_", [*range(2), *(pytest.param(n, marks=pytest.mark.soak) for n in range(2, 200))])


@rounds
async def test_cancelled_at_every_step(tmp_path: Path, round_: int) -> None:
    for at in moments():
        lab = lab_in(tmp_path / str(at))
        with trio.CancelScope() as scope:
            reached = await run_with(lab, round_, at, scope.cancel)
        lab.assert_the_promise(EVENTS)
        if not scope.cancelled_caught and not reached:
            break
    assert at > 80


@rounds
async def test_signalled_at_every_step(tmp_path: Path, round_: int) -> None:
    for at in moments():
        lab = lab_in(tmp_path / str(at))
        reached = await run_with(lab, round_, at, lab.signal)
        lab.assert_the_promise(EVENTS)
        if not reached:
            break
    assert at > 80


@rounds
async def test_signalled_twice_at_every_step(tmp_path: Path, round_: int) -> None:
    def twice() -> None:
        lab.signal()
        lab.signal()

    for at in moments():
        lab = lab_in(tmp_path / str(at))
        reached = await run_with(lab, round_, at, twice)
        lab.assert_the_promise(EVENTS)
        if not reached:
            break
    assert at > 80


@rounds
async def test_all_connections_lost_at_every_step(tmp_path: Path, round_: int) -> None:
    for at in moments():
        lab = lab_in(tmp_path / str(at))
        reached = await run_with(lab, round_, at, lab.broker.lose_connections)
        lab.assert_the_promise(EVENTS)
        outputs = [message.message_id for message in lab.broker.queues["out"]]
        # Four events succeed, whether they come once or twice; no pilot has run one of them again.
        assert sorted(set(outputs)) == ["0", "1", "2", "5"]
        assert len(outputs) == 4
        if not reached:
            break
    assert at > 80


class Fault:
    """Fails the nth calls of one part."""

    def __init__(self, part: str, error: type[Exception], which: range) -> None:
        self.calls = 0
        self._part, self._error, self._which = part, error, which

    def __call__(self, call: str) -> None:
        if call.startswith(self._part):
            self.calls += 1
            if self.calls in self._which:
                raise self._error("injected")


CALLS = {
    "source": [BrokerError, DeliveryLostError, RuntimeError],
    "consumer": [BrokerError, RuntimeError],
    "sink": [BrokerError, PublishRefusedError, RuntimeError],
    "runtime": [NodeError, RuntimeError],
}
FAULTS = [(part, error) for part, errors in CALLS.items() for error in errors]


@pytest.mark.parametrize(("part", "error"), FAULTS)
async def test_each_call_of_each_part_fails_once(tmp_path: Path, part: str, error: type[Exception]) -> None:
    for at in moments():
        lab = lab_in(tmp_path / str(at))
        fault = Fault(part, error, range(at, at + 1))
        lab.broker.fault = lab.runtime.fault = fault
        try:
            await lab.run(**SCRIPTED, task_timeout=5.0)
        except* (PilotError, RuntimeError):
            pass
        lab.assert_the_promise(EVENTS)
        if fault.calls < at:
            break
    assert at > 2


@pytest.mark.parametrize("part", ["source", "sink", "runtime"])
async def test_a_part_that_fails_for_good_from_any_call_on(tmp_path: Path, part: str) -> None:
    error = NodeError if part == "runtime" else BrokerError
    for at in moments():
        lab = lab_in(tmp_path / str(at))
        fault = Fault(part, error, range(at, 100_000))
        lab.broker.fault = lab.runtime.fault = fault
        try:
            await lab.run(**SCRIPTED, task_timeout=5.0)
        except* PilotError:
            pass
        lab.assert_the_promise(EVENTS)
        if fault.calls < at:
            break
    assert at > 2
