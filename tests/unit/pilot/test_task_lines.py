import logging
import re

import pytest
import trio

from tests.support.lab import Lab
from tests.unit.pilot.test_serve import fails, sleeps_long
from trio_pilot.errors import TasksFailedError
from trio_pilot.pilot.task_lines import BURST
from trio_pilot.runtimes import Container

pytestmark = pytest.mark.mock_clock


@pytest.fixture(autouse=True)
def all_lines_are_caught(caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level(logging.INFO, "trio_pilot")


async def lasts_ten_milliseconds(container: Container) -> int:
    del container
    await trio.sleep(0.01)
    return 0


def task_lines(caplog: pytest.LogCaptureFixture) -> list[str]:
    return [line for line in caplog.messages if re.match(r"event \S+: task|event \S+, attempt \d+: task starts", line)]


async def test_a_line_tells_that_a_task_starts_and_one_that_it_ended(lab: Lab, caplog: pytest.LogCaptureFixture) -> None:
    lab.put(7)
    await lab.run()
    assert task_lines(caplog) == ["event 7, attempt 1: task starts", "event 7: task ended after 1.000 s"]


async def test_the_end_of_a_task_that_fails_is_told(lab: Lab, caplog: pytest.LogCaptureFixture) -> None:
    lab.runtime.script = fails
    lab.put(7)
    with pytest.raises(TasksFailedError):
        await lab.run()
    assert task_lines(caplog)[-1] == "event 7: task failed after 1.000 s"


async def test_the_end_of_a_task_that_is_stopped_is_told(lab: Lab, caplog: pytest.LogCaptureFixture) -> None:
    lab.runtime.script = sleeps_long
    lab.put(7)
    await lab.run_signalled([3], grace=0.0)
    assert task_lines(caplog)[-1] == "event 7: task stopped after 3.500 s"


async def test_all_tasks_that_start_at_once_in_a_few_slots_are_told(lab: Lab, caplog: pytest.LogCaptureFixture) -> None:
    lab.put(*range(BURST))
    await lab.run(max_concurrent_tasks=BURST)
    assert len([line for line in task_lines(caplog) if "starts" in line]) == BURST
    assert len([line for line in task_lines(caplog) if "ended" in line]) == BURST


@pytest.mark.parametrize("slots", [1, 4])
async def test_of_short_tasks_one_a_second_is_told(lab: Lab, caplog: pytest.LogCaptureFixture, slots: int) -> None:
    lab.runtime.script = lasts_ten_milliseconds
    lab.put(*range(1000))
    started = trio.current_time()
    await lab.run(max_concurrent_tasks=slots)
    seconds = trio.current_time() - started
    starts = [line for line in task_lines(caplog) if "starts" in line]
    assert BURST + seconds - 3 < len(starts) <= BURST + seconds
    assert len(task_lines(caplog)) == 2 * len(starts)
    hidden = [
        int(found[1]) for line in starts if (found := re.search(r" \((\d+) task\(s\) before it are not shown\)$", line))
    ]
    assert len(hidden) == len(starts) - BURST
    assert all(80 * slots < count < 120 * slots for count in hidden[1:])
    assert 1000 - len(starts) - 120 * slots < sum(hidden) <= 1000 - len(starts)
