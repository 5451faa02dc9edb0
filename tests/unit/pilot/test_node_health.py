import itertools
import random
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import trio

from tests.support.lab import Lab
from tests.unit.pilot.test_serve import fails, fails_on_7, settled
from trio_pilot.errors import ContainerLostError, NodeError, TasksFailedError
from trio_pilot.files import disk_checks
from trio_pilot.runtimes import Container
from trio_pilot.testing import Script, copy

pytestmark = pytest.mark.mock_clock

GO_ON = {"stop_listening_on_task_error": False, "retry_delay": 0.0}
QUARANTINED = {"stop_listening_on_task_error": True, "quarantine_time": 600.0}


async def finds_a_fault(container: Container) -> int:
    container.stderr.write_text("true: Input/output error\n")
    return 126


async def hangs(container: Container) -> int:
    del container
    await trio.sleep_forever()


def well_at_first(probe: Script) -> Script:
    """Be well before any event is taken."""
    looks = itertools.count()

    async def script(container: Container) -> int:
        return await probe(container) if next(looks) else 0

    return script


def event_of(container: Container) -> str:
    return Path(container.env["EWMS_TASK_INFILE"]).read_text()


async def run_on_a_bad_node(lab: Lab, **options: Any) -> str:
    with pytest.raises(BaseExceptionGroup) as failure:
        await lab.run(**{**GO_ON, **options})
    errors = failure.value
    while isinstance(errors, BaseExceptionGroup):
        (errors,) = errors.exceptions
    assert isinstance(errors, NodeError)
    return str(errors)


def breaks(lab: Lab, monkeypatch: pytest.MonkeyPatch) -> None:
    del monkeypatch
    lab.runtime.probe = finds_a_fault


def is_not_there(lab: Lab, monkeypatch: pytest.MonkeyPatch) -> None:
    del monkeypatch

    def fault(call: str) -> None:
        if call == "runtime.run":
            raise NodeError("no containers here")

    lab.runtime.fault = fault


def has_a_bad_disk(lab: Lab, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(disk_checks, "check_writable", is_bad)
    del lab


def has_a_bad_clock(lab: Lab, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(disk_checks, "clock_skew", is_bad)
    del lab


def is_bad(directory: Path) -> None:
    raise NodeError(f"{directory.name} is bad")


@pytest.mark.parametrize(
    ("how", "why"),
    [
        (breaks, "`true` in a container fails (exit code 126): true: Input/output error"),
        (is_not_there, "no containers here"),
        (has_a_bad_disk, "ewms-pilot-data is bad"),
        (has_a_bad_clock, "ewms-pilot-data is bad"),
    ],
)
async def test_a_node_bad_from_the_start_takes_no_event_and_holds_its_slot(
    lab: Lab, monkeypatch: pytest.MonkeyPatch, how: Callable[..., None], why: str
) -> None:
    how(lab, monkeypatch)
    lab.put(*range(50))
    assert await run_on_a_bad_node(lab, **QUARANTINED) == why
    assert trio.current_time() == 600
    assert lab.broker.history == []
    lab.assert_the_promise(range(50))


@pytest.mark.parametrize("slots", [1, 2, 3, 8])
@pytest.mark.parametrize("breaks_at", [0.5, 5.5])
@pytest.mark.parametrize(("options", "ends_after"), [(GO_ON, 0), (QUARANTINED, 600)])
async def test_a_node_that_breaks_charges_no_event_and_holds_its_slot(
    lab: Lab, slots: int, breaks_at: float, options: dict[str, Any], ends_after: float
) -> None:

    async def script(container: Container) -> int:
        return await (fails if trio.current_time() > breaks_at else copy)(container)

    async def probe(container: Container) -> int:
        return await finds_a_fault(container) if trio.current_time() > breaks_at else 0

    async def ends_at_another_time_than_others(container: Container) -> int:
        await trio.sleep(0.1 * int(event_of(container)) / slots)
        return await script(container)

    lab.runtime.script, lab.runtime.probe = ends_at_another_time_than_others, probe
    lab.broker.delays = {"source.release": 1}  # in which nothing else is to be taken
    lab.put(*range(50))
    why = await run_on_a_bad_node(lab, max_concurrent_tasks=slots, **options)
    assert why.startswith(
        "this node breaks tasks: `true` in a container fails (exit code 126): true: Input/output error;"
        " so the event may not be at fault: "
    )
    assert trio.current_time() > ends_after + breaks_at
    touched = [what for what, _ in settled(lab) if what != "ACK"]
    assert set(touched) == {"RELEASE"}
    assert len(touched) <= slots
    lab.assert_the_promise(range(50))


@pytest.mark.parametrize(("code", "starts"), [(0, [0, 0, 11]), (126, [0, 0])])
async def test_no_event_is_taken_while_the_node_is_in_doubt(lab: Lab, code: int, starts: list[float]) -> None:
    started: list[float] = []

    async def script(container: Container) -> int:
        started.append(trio.current_time())
        return await (copy if event_of(container) == "good" else fails)(container)

    async def probe(container: Container) -> int:
        del container
        await trio.sleep(10)
        return code

    lab.runtime.script, lab.runtime.probe = script, well_at_first(probe)
    lab.broker.delays = {"source.release": 1}
    lab.put("bad", "good", *["another"] * (len(starts) - 2 or 10))
    with pytest.raises(BaseException):  # noqa: B017, PT011 -- which, is another matter
        await lab.run(**GO_ON, max_concurrent_tasks=2, max_attempts=1)
    assert started == starts


async def test_those_that_fail_while_the_node_is_looked_at_share_the_next_look(lab: Lab) -> None:
    looks: list[float] = []

    async def probe(container: Container) -> int:
        del container
        looks.append(trio.current_time())
        await trio.sleep(10)
        return 0

    async def script(container: Container) -> int:
        await trio.sleep(1 + int(event_of(container)))
        return 3

    lab.runtime.script, lab.runtime.probe = script, probe
    lab.put(*range(8))
    with pytest.raises(TasksFailedError):
        await lab.run(**GO_ON, max_concurrent_tasks=8, max_attempts=1)
    assert looks == [0, 11, 21]


async def test_an_event_that_fills_the_disk_again_is_charged_with_it(lab: Lab, monkeypatch: pytest.MonkeyPatch) -> None:
    async def script(container: Container) -> int:
        (container.scratch / "filling").touch()
        await trio.sleep(int(event_of(container)))
        return 3

    def write_to(root: Path) -> None:
        if any(root.glob("*/scratch/filling")):
            raise NodeError("no space left on device")

    monkeypatch.setattr(disk_checks, "check_writable", write_to)
    lab.runtime.script = script
    lab.put(1, 2)
    assert "no space left" in await run_on_a_bad_node(lab, max_concurrent_tasks=2)
    assert settled(lab) == [("RELEASE", "1"), ("REJECT", "2")]


async def test_a_third_of_poison_never_stops_a_good_node(lab: Lab) -> None:
    chance = random.Random(3)
    poison = {str(number) for number in range(300) if chance.random() < 0.3}

    async def script(container: Container) -> int:
        return await (fails if event_of(container) in poison else copy)(container)

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


async def test_a_limit_that_the_user_has_set_is_no_reason_to_look_at_the_node(lab: Lab) -> None:
    looked: list[str] = []

    async def probe(container: Container) -> int:
        looked.append(container.name)
        return 0

    lab.runtime.probe = probe
    lab.put(1, 2)
    with pytest.raises(TasksFailedError):
        await lab.run(**GO_ON, max_attempts=1, task_timeout=0.5)
    assert len(looked) == 1  # in the beginning


async def test_an_image_without_the_probes_command_is_no_fault_of_the_node(lab: Lab) -> None:
    async def probe(container: Container) -> int:
        container.stderr.write_text("true: No such file or directory\n")
        return 127

    lab.runtime.script, lab.runtime.probe = fails_on_7, probe
    lab.put(1, 7)
    with pytest.raises(TasksFailedError):
        await lab.run(**GO_ON, max_attempts=1)
    assert lab.outputs() == ["1"]


async def test_an_image_that_has_neither_is_one(lab: Lab) -> None:
    async def has_nothing(container: Container) -> int:
        container.stderr.write_text(f"{container.args[0]}: No such file or directory\n")
        return 127

    lab.runtime.script = lab.runtime.probe = has_nothing
    lab.put(1)
    assert "this node breaks tasks: the image has neither `run` nor `true`" in await run_on_a_bad_node(lab)
    assert settled(lab) == [("RELEASE", "1")]


@pytest.mark.parametrize(("probe", "touched"), [(hangs, []), (well_at_first(hangs), [("RELEASE", "1")])])
async def test_a_probe_that_hangs_is_a_fault_of_the_node(lab: Lab, probe: Script, touched: list[tuple[str, str]]) -> None:
    lab.runtime.script, lab.runtime.probe = fails, probe
    lab.put(1)
    assert "`true` in a container takes more than 60 s" in await run_on_a_bad_node(lab)
    assert settled(lab) == touched
    lab.assert_the_promise([1])


@pytest.mark.parametrize(("probe", "touched"), [(hangs, []), (well_at_first(hangs), [("RELEASE", "1")])])
async def test_a_pilot_told_to_end_does_not_wait_for_a_probe(
    lab: Lab, probe: Script, touched: list[tuple[str, str]]
) -> None:
    lab.runtime.script, lab.runtime.probe = fails, probe
    lab.put(1)
    await lab.run_signalled([2, 3], stop_listening_on_task_error=False)
    assert trio.current_time() < 5
    assert settled(lab) == touched
    lab.assert_the_promise([1])


async def test_an_engine_lost_during_the_probe_leaves_the_fault_open(lab: Lab) -> None:
    calls = itertools.count()

    async def is_lost(container: Container) -> int:
        del container
        raise ContainerLostError("lost with the engine")

    async def script(container: Container) -> int:
        return await (copy if next(calls) else fails)(container)

    lab.runtime.script, lab.runtime.probe = script, well_at_first(is_lost)
    lab.put(1)
    assert await lab.run(**GO_ON) is None
    assert settled(lab) == [("RELEASE", "1"), ("ACK", "1")]
    lab.assert_the_promise([1])
