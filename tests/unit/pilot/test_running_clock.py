# Time for which the process was stopped: the clock of the tests jumps, as the system's does meanwhile.

import pytest
import trio
from trio.testing import MockClock

from tests.support.lab import Lab
from trio_pilot.errors import TasksFailedError
from trio_pilot.pilot.running_clock import RunningClock
from trio_pilot.runtimes import Container
from trio_pilot.testing import copy


async def works(container: Container) -> int:
    """Work for five seconds, in steps: a step that was begun before a suspension ends at once after it."""
    for _ in range(50):
        await trio.sleep(0.1)
    return await copy(container)


async def suspend(clock: MockClock, at: float, seconds: float) -> None:
    await trio.sleep(at)
    clock.jump(seconds)


async def test_a_suspension_does_not_count_towards_the_time_limit_of_a_task(lab: Lab, autojump_clock: MockClock) -> None:
    lab.runtime.script = works
    lab.put(7)
    async with trio.open_nursery() as nursery:
        nursery.start_soon(suspend, autojump_clock, 2.05, 10_000.0)
        await lab.run(task_timeout=7.0)
    assert lab.outputs() == ["7"]
    assert lab.status.run_times.percentile(100) < 10
    lab.assert_the_promise([7])


@pytest.mark.parametrize("at", [0.05, 0.95, 3.3, 5.95])
async def test_a_task_that_was_suspended_still_has_its_time_limit(lab: Lab, autojump_clock: MockClock, at: float) -> None:
    async def hangs(_: Container) -> int:
        await trio.sleep_forever()
        raise AssertionError

    lab.runtime.script = hangs
    lab.put(7)
    begun = trio.current_time()
    async with trio.open_nursery() as nursery:
        nursery.start_soon(suspend, autojump_clock, at, 10_000.0)
        with pytest.raises(TasksFailedError, match="timed out after 6s"):
            await lab.run(task_timeout=6.0)
    assert 10_006 <= trio.current_time() - begun <= 10_008
    lab.assert_nothing_is_left()


async def test_the_init_container_has_its_time_as_well(lab: Lab, autojump_clock: MockClock) -> None:
    async def five_seconds(container: Container) -> int:
        for _ in range(50):
            await trio.sleep(0.1)
        return 0 if "EWMS_TASK_INFILE" not in container.env else await copy(container)

    lab.runtime.script = five_seconds
    lab.put(7)
    async with trio.open_nursery() as nursery:
        nursery.start_soon(suspend, autojump_clock, 2.05, 10_000.0)
        await lab.run(init_image="init", init_timeout=7.0)
    assert lab.outputs() == ["7"]


@pytest.mark.mock_clock
async def test_a_limit_is_exact_while_the_process_runs() -> None:
    clock = RunningClock()
    async with trio.open_nursery() as nursery:
        nursery.start_soon(clock.keep)
        for seconds in (0.25, 1.0, 3.5, 0.0):
            begun = trio.current_time()
            with clock.move_on_after(seconds) as scope:
                await trio.sleep_forever()
            assert scope.cancelled_caught
            assert trio.current_time() - begun == pytest.approx(seconds)
        with clock.move_on_after(5) as scope:
            await trio.sleep(4.9)
        assert not scope.cancelled_caught
        await trio.sleep(10)
        nursery.cancel_scope.cancel()


async def test_a_busy_machine_is_no_suspension(autojump_clock: MockClock, caplog: pytest.LogCaptureFixture) -> None:
    clock = RunningClock()
    async with trio.open_nursery() as nursery:
        nursery.start_soon(clock.keep)
        await trio.sleep(0.5)
        autojump_clock.jump(2.0)
        await trio.sleep(0.5)
        assert clock.time() == pytest.approx(trio.current_time())
        nursery.cancel_scope.cancel()
    assert not caplog.records


@pytest.mark.mock_clock
async def test_an_idle_clock_wakes_nothing_up(caplog: pytest.LogCaptureFixture) -> None:
    clock, wakes = RunningClock(), 0

    class Wakes(trio.abc.Instrument):
        def before_task_step(self, task: trio.lowlevel.Task) -> None:
            nonlocal wakes
            wakes += "keep" in task.name

    async with trio.open_nursery() as nursery:
        nursery.start_soon(clock.keep)
        trio.lowlevel.add_instrument(Wakes())
        for _ in range(3):
            await trio.sleep(1000)
            with clock.move_on_after(1):
                await trio.sleep(0.5)
        nursery.cancel_scope.cancel()
    assert wakes <= 10
    assert not caplog.records
