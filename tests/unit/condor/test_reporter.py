import logging
from collections.abc import Mapping
from dataclasses import dataclass, field

import pytest
import trio

from tests.support.lab import Lab
from tests.unit.pilot.test_node_health import finds_a_fault
from tests.unit.pilot.test_serve import fails
from trio_pilot.condor.reporter import LAST_TIMEOUT, MOST_ERRORS, Reporter, Value
from trio_pilot.errors import ContainerRunError, NodeError, ReportError, TasksFailedError
from trio_pilot.runtimes import Container
from trio_pilot.status import State, Status
from trio_pilot.testing import copy

pytestmark = pytest.mark.mock_clock


@dataclass
class FakeChirp:
    """A proxy in memory: the reports and their times, how long each takes, and the error it raises."""

    seconds: float = 0.0
    fault: Exception | None = None
    reports: list[tuple[float, dict[str, Value]]] = field(default_factory=list)
    attempts: int = 0

    async def send(self, changes: Mapping[str, Value], reported: dict[str, Value]) -> None:
        self.attempts += 1
        await trio.sleep(self.seconds)
        if self.fault:
            raise self.fault
        reported |= changes
        self.reports.append(
            (trio.current_time(), {name.removeprefix("HTChirpEWMSPilot"): changes[name] for name in changes})
        )

    def values(self, name: str) -> list[Value]:
        return [changes[name] for _, changes in self.reports if name in changes]


@pytest.fixture
def chirp() -> FakeChirp:
    return FakeChirp()


@pytest.fixture
def reported(lab: Lab, chirp: FakeChirp) -> Lab:
    lab.reporter = Reporter(lab.status, chirp.send, 60).open()
    return lab


async def test_states_are_reported_at_once_and_the_last_before_the_end(reported: Lab, chirp: FakeChirp) -> None:
    reported.put(*range(3))
    await reported.run(max_concurrent_tasks=2, timeout_queue_incoming=0.5)
    at = [(time, changes["Status"]) for time, changes in chirp.reports if "Status" in changes]
    assert at[-3:] == [(0, "Tasking"), (1.5, "PendingRemainingTasks"), (2, "Done")]
    assert chirp.reports[-1][1]["TasksSuccess"] == 3
    assert chirp.reports[-1][1]["TasksRunning"] == 0
    assert chirp.values("Runtime") == ["fake"]
    assert chirp.values("TasksFailed") == chirp.values("Error") == []


async def test_counts_are_reported_once_an_interval(reported: Lab, chirp: FakeChirp) -> None:
    reported.put(*range(330))
    await reported.run()
    begun, *_, ended = (time for time, changes in chirp.reports if "TasksTotal" in changes)
    assert (begun, ended) == (0, 331)
    assert [time for time, _ in chirp.reports if 1 < time < 329] == [60, 120, 180, 240, 300]
    assert chirp.values("TasksSuccess") == [59, 119, 179, 239, 299, 330]
    assert chirp.values("SecondsBusy")[-1] == 330


async def test_an_idle_pilot_has_nothing_to_report(reported: Lab, chirp: FakeChirp) -> None:
    await reported.run(timeout_queue_incoming=3600.0)
    assert chirp.attempts <= 4


async def test_an_error_is_reported_at_once_and_once(reported: Lab, chirp: FakeChirp) -> None:
    reported.runtime.script = fails
    reported.put(*range(10))
    with pytest.raises(TasksFailedError):
        await reported.run(stop_listening_on_task_error=False, max_attempts=1)
    assert chirp.values("Error") == ["ContainerRunError: task failed (exit code 3): Oh no."]
    assert next(time for time, changes in chirp.reports if "Error" in changes) == 1
    assert chirp.values("Status")[-1] == "FatalError"
    (error,) = chirp.values("ErrorTraceback")
    assert isinstance(error, ContainerRunError)


async def test_a_limited_number_of_different_errors_is_reported_at_once(chirp: FakeChirp) -> None:
    status = Status()
    async with Reporter(status, chirp.send, 60).open():
        for number in range(1000):
            await trio.sleep(0.1)
            status.fail(ContainerRunError(f"number {number}"))
    assert len(chirp.values("Error")) == MOST_ERRORS + 1 + 1  # one at the next interval, and one in the last report


async def test_the_error_of_the_init_container_is_reported(reported: Lab, chirp: FakeChirp) -> None:
    reported.runtime.script = fails
    with pytest.raises(BaseExceptionGroup):
        await reported.run(init_image="init")
    assert chirp.values("Error") == ["ContainerRunError: init-container failed (exit code 3): Oh no."]
    assert chirp.values("Status")[-1] == "FatalError"


async def test_a_missing_runtime_is_reported(reported: Lab, chirp: FakeChirp) -> None:
    def broken(call: str) -> None:
        if call == "runtime.open":
            raise NodeError("no containers here")

    reported.runtime.fault = broken
    with pytest.raises(BaseExceptionGroup):
        await reported.run()
    assert chirp.values("Error") == ["NodeError: no containers here"]
    assert chirp.values("Status")[-1] == "FatalError"


async def test_a_quarantine_is_reported_before_it_is_over(reported: Lab, chirp: FakeChirp) -> None:
    reported.runtime.script = fails
    reported.put(1)
    with pytest.raises(TasksFailedError):
        await reported.run(quarantine_time=600.0)
    assert [time for time, changes in chirp.reports if changes.get("Status") == "FatalError"] == [1]


async def test_why_a_node_is_bad_is_reported_before_its_slot_is_held(reported: Lab, chirp: FakeChirp) -> None:
    reported.runtime.probe = finds_a_fault
    with pytest.raises(BaseExceptionGroup):
        await reported.run(quarantine_time=600.0)
    assert chirp.values("Error") == ["NodeError: `true` in a container fails (exit code 126): true: Input/output error"]
    assert [time for time, changes in chirp.reports if "Error" in changes] == [0]


async def test_a_failed_report_is_made_later_and_the_fault_is_logged_once(
    chirp: FakeChirp, caplog: pytest.LogCaptureFixture
) -> None:
    status = Status()
    chirp.fault = ReportError("no proxy")
    with caplog.at_level(logging.WARNING):
        async with Reporter(status, chirp.send, 10).open():
            await trio.sleep(95)
            assert chirp.attempts == 10
            chirp.fault = None
            await trio.sleep(10)
            assert chirp.values("Status") == ["Started"]
    assert caplog.messages == ["no proxy; tasks go on, and further failures to report are not logged"]


async def test_a_proxy_that_hangs_delays_neither_tasks_nor_the_end(reported: Lab, chirp: FakeChirp) -> None:
    chirp.seconds = 1000
    reported.put(*range(5))
    await reported.run()
    assert trio.current_time() == 5 + 1 + LAST_TIMEOUT
    reported.assert_the_promise(range(5))


@pytest.mark.parametrize(
    ("seconds", "fault"), [(0, None), (1000, None), (0, ReportError("refused")), (0.3, ReportError("closed"))]
)
async def test_no_task_waits_for_the_proxy(reported: Lab, chirp: FakeChirp, seconds: float, fault: Exception | None) -> None:
    chirp.seconds, chirp.fault = seconds, fault
    starts: list[float] = []

    async def script(container: Container) -> int:
        starts.append(trio.current_time())
        return await copy(container)

    reported.runtime.script = script
    reported.put(*range(20))
    await reported.run(max_concurrent_tasks=2)
    assert starts == [number // 2 for number in range(20)]


async def test_a_slow_proxy_gets_what_has_changed_in_the_meantime(reported: Lab, chirp: FakeChirp) -> None:
    chirp.seconds = 1.25
    reported.put(*range(10))
    await reported.run()
    assert chirp.attempts <= 5
    assert chirp.values("Status")[-1] == "Done"
    assert chirp.values("TasksSuccess")[-1] == 10


async def test_an_interval_of_zero_does_not_report_without_end(chirp: FakeChirp) -> None:
    status = Status()
    async with Reporter(status, chirp.send, 0).open():
        status.slots.start_task()
        await trio.sleep(100)
    assert chirp.attempts <= 101


async def test_a_pilot_that_is_signalled_ends_as_done(reported: Lab, chirp: FakeChirp) -> None:
    reported.put(*range(5))
    await reported.run_signalled([2.5])
    assert chirp.values("Status")[-1] == State.DONE.value
    assert chirp.values("TasksTotal")[-1] == 3


async def test_errors_that_alternate_are_each_reported_once(chirp: FakeChirp) -> None:
    status = Status()
    async with Reporter(status, chirp.send, 60).open():
        for number in range(100):
            await trio.sleep(1)
            status.fail(ContainerRunError(f"number {number % 2}"))
    assert chirp.values("Error") == ["ContainerRunError: number 0", "ContainerRunError: number 1"]
