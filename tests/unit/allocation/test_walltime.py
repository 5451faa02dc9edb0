import math
import random
import time
from collections.abc import Mapping
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import pytest
import trio

from tests.integration.test_check import jwt
from tests.support.lab import Lab
from tests.unit.pilot.test_serve import settled, sleeps_long
from trio_pilot.allocation.resources import Allocation, find_allocation, fitted
from trio_pilot.allocation.walltime import End, TimeLeft, find_end
from trio_pilot.errors import SettingsError
from trio_pilot.runtimes import Container
from trio_pilot.settings import SHUTDOWN_TIME, Settings, load
from trio_pilot.status import RunTimes
from trio_pilot.testing import FakeBroker, copy

pytestmark = pytest.mark.mock_clock

NOW = 1_800_000_000.0
QUEUES = {"queue_incoming": "in", "queue_outgoing": "out"}
LAST = 2 + SHUTDOWN_TIME  # seconds before the end of the job in which no task runs


def end_of(environ: Mapping[str, str], **texts: str) -> End | None:
    return find_end(load({**QUEUES, **texts}, {}, Path("/nonexistent")), environ, NOW)


def ad(directory: Path, kind: str, *lines: str) -> Mapping[str, str]:
    (directory / kind).write_text("\n".join(lines))
    return {f"_CONDOR_{kind}_AD": str(directory / kind)}


async def test_without_any_information_a_job_does_not_end() -> None:
    assert end_of({}) is None


async def test_an_end_beyond_the_calendar_is_ignored() -> None:
    assert end_of({}, max_runtime="1e300") is None
    assert end_of({"GLIDEIN_ToDie": "1800000600000"}) is None
    with pytest.raises(SettingsError, match=r"--until must be a time such as .* \(in seconds\), not"):
        end_of({}, until="9999999999999")


@pytest.mark.parametrize(
    ("texts", "at"),
    [
        ({"until": "1800000600"}, NOW + 600),
        ({"until": datetime.fromtimestamp(NOW + 60, UTC).isoformat()}, NOW + 60),
        ({"until": "2027-01-15T08:01:00+00:00"}, NOW + 60),
        ({"max_runtime": "90"}, NOW + 90),
        ({"max_runtime": "90", "until": "1800000600"}, NOW + 90),
        ({"until": "1"}, 1),  # set by the user, although it is past
    ],
)
async def test_the_user_may_set_the_end(texts: dict[str, str], at: float) -> None:
    end = end_of({}, **texts)
    assert end
    assert end.at == at


@pytest.mark.parametrize(
    ("job", "machine", "environ", "at", "who"),
    [
        ([f"JobCurrentStartDate = {NOW - 100:.0f}", "OriginalTime = 3600"], [], {}, 3500, "OriginalTime of the job"),
        ([f"ShadowBday = {NOW - 100:.0f}", "OriginalTime = 3600"], [], {}, 3500, "OriginalTime of the job"),
        (["OriginalTime = 3600"], [], {}, 3600, "OriginalTime of the job"),
        (["OriginalTime = 3600", "AllowedJobDuration = 60"], [], {}, 60, "AllowedJobDuration of the job"),
        ([], [f"GLIDEIN_ToDie = {NOW + 50:.0f}", f"GLIDEIN_ToRetire = {NOW + 5:.0f}"], {}, 50, "GLIDEIN_ToDie"),
        ([], [f"GLIDEIN_ToRetire = {NOW + 5:.0f}"], {}, 5, "GLIDEIN_ToRetire"),
        ([], [], {"GLIDEIN_ToDie": f"{NOW + 70:.0f}"}, 70, "GLIDEIN_ToDie"),
        (
            [f"JobCurrentStartDate = {NOW - 100:.0f}", 'JobDurationCategory = "Medium"'],
            [],
            {},
            20 * 3600 - 100,
            "JobDurationCategory = Medium of the job",
        ),
        (['JobDurationCategory = "long"'], [], {}, 40 * 3600, "JobDurationCategory = long of the job"),
        (['JobDurationCategory = "Endless"', "OriginalTime = 3600"], [], {}, 3600, "OriginalTime of the job"),
        (
            ["OriginalTime = 3600"],
            [],
            {"GLIDEIN_ToDie": f"{NOW - 1:.0f}"},
            3600,
            "OriginalTime of the job",
        ),  # past: wrong
    ],
)
async def test_the_earliest_end_that_htcondor_reports_counts(
    tmp_path: Path, job: list[str], machine: list[str], environ: Mapping[str, str], at: float, who: str
) -> None:
    assert end_of({**ad(tmp_path, "JOB", *job), **ad(tmp_path, "MACHINE", *machine), **environ}) == End(NOW + at, who)


async def test_machine_and_job_features_count(tmp_path: Path) -> None:
    (tmp_path / "shutdowntime").write_text(f"{NOW + 300:.0f}\n")
    (tmp_path / "shutdowntime_job").write_bytes(b"soon \xe9\n")
    environ = {"MACHINEFEATURES": str(tmp_path), "JOBFEATURES": str(tmp_path)}
    assert end_of(environ) == End(NOW + 300, "shutdowntime in $MACHINEFEATURES")
    (tmp_path / "shutdowntime_job").write_text(f"{NOW + 200:.0f}\n")
    assert end_of(environ) == End(NOW + 200, "shutdowntime_job in $JOBFEATURES")


@pytest.mark.parametrize("name", ["broker_token", "queue_incoming_auth_token", "queue_outgoing_auth_token"])
async def test_a_job_ends_when_a_token_expires(name: str) -> None:
    end = end_of({}, **{name: jwt(exp=NOW + 40)})
    assert end
    assert end.at == NOW + 40
    assert end_of({}, **{name: "@/run/token.of.mine"}) is None


def time_left(seconds: float, *seen: float, task_timeout: float | None = None) -> TimeLeft:
    run_times = RunTimes()
    for one in seen:
        run_times.add(one)
    return TimeLeft(Settings(until=time.time() + seconds + LAST, task_timeout=task_timeout), run_times)


@pytest.mark.parametrize(
    ("seen", "limit", "last_start"),
    [
        ([], None, 1000),
        ([], 100.0, 900),
        ([], 900.0, 500),  # nothing else is known: at most half of the time is reserved
        ([10.0] * 99 + [500.0], None, 990),
        ([10.0] * 9 + [500.0], None, 500),
        ([10.0] * 9 + [500.0], 200.0, 800),
        ([10.0], 200.0, 990),
    ],
)
async def test_a_task_begins_only_if_it_is_likely_to_end(seen: list[float], limit: float | None, last_start: float) -> None:
    found = time_left(1000, *seen, task_timeout=limit).last_start - trio.current_time()
    assert found == pytest.approx(last_start, rel=0.03)


async def test_without_an_end_there_is_always_time() -> None:
    assert TimeLeft(Settings(), RunTimes()).last_start == TimeLeft(Settings(), RunTimes()).end == math.inf


async def test_no_event_is_taken_that_is_not_likely_to_be_done(lab: Lab) -> None:
    lab.runtime.script = takes(10)
    lab.put(*range(20))
    await lab.run(until=time.time() + 75 + LAST)
    assert len(lab.outputs()) == 7
    assert trio.current_time() == pytest.approx(70, abs=1)
    lab.assert_the_promise(range(20))


async def test_an_event_that_waits_is_returned_when_its_time_has_run_out(lab: Lab) -> None:
    lab.runtime.script = takes(50)
    lab.put(1, 2)
    async with trio.open_nursery() as nursery:
        nursery.start_soon(run_until, lab, 130)
        await trio.sleep(99)
        assert len(lab.broker.unsettled) == 1
    assert trio.current_time() == pytest.approx(100, abs=1)
    assert sorted(lab.outputs()) == ["1", "2"]


async def test_an_event_that_still_runs_at_the_end_is_returned_uncounted(lab: Lab) -> None:
    lab.runtime.script = sleeps_long
    lab.put(1, 2)
    assert await lab.run(until=time.time() + 60 + LAST, max_concurrent_tasks=2) is None
    assert trio.current_time() == pytest.approx(60 + lab.runtime.kill_seconds, abs=1)
    assert sorted(settled(lab)) == [("RELEASE", "1"), ("RELEASE", "2")]
    lab.assert_the_promise([1, 2])


async def test_a_signal_does_not_postpone_the_end(lab: Lab) -> None:
    lab.runtime.script = sleeps_long
    lab.put(1)
    await lab.run_signalled([50], until=time.time() + 60 + LAST, grace=1000.0)
    assert trio.current_time() == pytest.approx(60 + lab.runtime.kill_seconds, abs=1)


@pytest.mark.parametrize(
    ("job", "machine", "grace"),
    [
        ([], [], 10),
        (["JobMaxVacateTime = 30"], ["MachineMaxVacateTime = 600"], 30 - LAST),
        (["JobMaxVacateTime = 700"], ["MachineMaxVacateTime = 600"], 600 - LAST),
        (["KillSigTimeout = 20"], ["MachineMaxVacateTime = 600"], 20 - LAST),
        (["JobMaxVacateTime = 5"], [], 0),
    ],
)
async def test_the_grace_is_what_the_pool_leaves(tmp_path: Path, job: list[str], machine: list[str], grace: float) -> None:
    slot = find_allocation({**ad(tmp_path, "JOB", *job), **ad(tmp_path, "MACHINE", *machine)})
    assert fitted(Settings(), slot).grace == grace
    assert fitted(Settings(grace=33.0), slot).grace == 33


async def test_without_information_the_grace_is_ten_seconds() -> None:
    assert fitted(Settings(), Allocation(1, "test", 2**30, "test")).grace == 10


def takes(seconds: float, deviation: float = 0.0, seed: int = 0) -> Any:
    chance = random.Random(seed)

    async def script(container: Container) -> int:
        await trio.sleep(max(0.0, chance.gauss(seconds, deviation) - 1))
        return await copy(container)

    return script


async def run_until(lab: Lab, seconds: float, **options: Any) -> None:
    await lab.run(until=time.time() + seconds, **options)


async def test_sixty_jobs_with_random_ends_cut_less_than_one_event_in_100(tmp_path: Path) -> None:
    broker, chance, labs = FakeBroker(), random.Random(1), []
    async with trio.open_nursery() as nursery:
        for number in range(60):
            (tmp_path / str(number)).mkdir()
            labs.append(Lab(tmp_path / str(number), broker=broker))
            labs[-1].runtime.script = takes(40, 4, number)
            nursery.start_soon(run_until, labs[-1], chance.uniform(200, 800))
        labs[0].put(*range(1000))
    done, cut = (sum(getattr(lab.status, name).value for lab in labs) for name in ("succeeded", "returned"))
    assert done > 500
    assert cut < done / 100
    assert len(labs[0].outputs()) == done
    assert [what for what, _ in settled(labs[0])].count("RELEASE") == cut
    labs[0].assert_the_promise(range(1000))
