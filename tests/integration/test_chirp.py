# The installed command beside a chirp proxy, a good one and bad ones.

import os
import re
import signal
import sqlite3
import statistics
import subprocess
import sys
import time
from contextlib import closing
from pathlib import Path

import pytest

from tests.chirp_proxy import FAULTS, Fault, chirp_proxy, hangs
from tests.pilot_process import Ended, assert_nothing_left, pilot, run_pilot
from tests.runtimes_support import until_sync
from trio_pilot.condor.reporter import LAST_TIMEOUT

EVENTS = 20


@pytest.fixture
def slot(tmp_path: Path) -> Path:
    path = tmp_path / "slot"
    path.mkdir()
    send(tmp_path, EVENTS)
    return path


def send(directory: Path, number: int) -> None:
    events = "".join(f"{one}\n" for one in range(number))
    command = [sys.executable, "-m", "trio_pilot", "send", "in", "--broker", "./queues.sqlite"]
    subprocess.run(command, input=events, cwd=directory, text=True, check=True, capture_output=True, timeout=60)


def settings(slot: Path, **more: object) -> dict[str, object]:
    return {
        "TASK_ARGS": "cp {{INFILE}} {{OUTFILE}}",
        "QUEUE_INCOMING": "in",
        "QUEUE_OUTGOING": "out",
        "BROKER": slot.parent / "queues.sqlite",
        "RUNTIME": "process",
        "HTCHIRP": "true",
        "TIMEOUT_QUEUE_INCOMING": "0.5",
        "_CONDOR_CHIRP_CONFIG": slot.parent / "chirp.config",
        **more,
    }


def complaints(ended: Ended) -> list[str]:
    return [line for line in ended.stderr.splitlines() if "report to HTCondor" in line]


def test_a_run_is_told_from_the_beginning_to_the_end(slot: Path) -> None:
    with chirp_proxy(slot.parent) as proxy:
        ended = run_pilot(slot, settings(slot))
    assert (ended.code, complaints(ended)) == (0, [])
    assert proxy.values("Status")[-1] == '"Done"'
    assert proxy.values("TasksSuccess")[-1] == proxy.values("TasksTotal")[-1] == str(EVENTS)
    assert proxy.values("Runtime") == ['"process"']
    assert proxy.values("Error") == []
    assert all(re.fullmatch(r'set_job_attr HTChirpEWMSPilot\w+ (\d+|"[^"]*")', line) for line in proxy.lines)
    assert_nothing_left(slot)


def test_a_failed_task_is_told_to_the_event_log(slot: Path) -> None:
    with chirp_proxy(slot.parent) as proxy:
        ended = run_pilot(slot, settings(slot, HTCHIRP_DEST="JOB_EVENT_LOG", TASK_ARGS="sh -c 'echo Öh! >&2; exit 3'"))
    assert ended.code == 1
    assert r'ulog HTChirpEWMSPilotError: "ContainerRunError: task failed (exit code 3): \303\226h!"' in proxy.lines
    assert proxy.values("TasksFailed") == ['"1"']
    assert proxy.values("Status")[-1] == '"FatalError"'


@pytest.mark.parametrize("fault", [None, *FAULTS])
def test_a_fault_of_the_proxy_costs_no_task_and_little_time_at_the_end(slot: Path, fault: Fault | None) -> None:
    with chirp_proxy(slot.parent, fault) as proxy:
        if fault is None:
            proxy.config.unlink()
        ended = run_pilot(slot, settings(slot))
    assert ended.code == 0
    assert f"{EVENTS} task(s): {EVENTS} succeeded, 0 failed; 0 event(s) returned" in ended.stderr
    assert len(complaints(ended)) <= 1  # none if the only attempt was under way in the end
    assert_nothing_left(slot)


def test_a_proxy_that_hangs_costs_no_cpu_and_does_not_keep_a_pilot_that_is_told_to_end(slot: Path) -> None:
    with chirp_proxy(slot.parent, hangs), pilot(slot, settings(slot, TIMEOUT_QUEUE_INCOMING="60")) as child:
        time.sleep(3)
        child.send_signal(signal.SIGTERM)
        begun = time.monotonic()
        _, status, used = os.wait4(child.pid, 0)
        child.returncode = os.waitstatus_to_exitcode(status)
    assert child.returncode == 128 + signal.SIGTERM
    assert time.monotonic() - begun < LAST_TIMEOUT + 5
    assert used.ru_utime < 3  # which a thread that spins would have used, waiting alone


def job(slot: Path, **facts: object) -> dict[str, object]:
    """Be in a job with this ad."""
    (slot.parent / "job.ad").write_text("".join(f"{name} = {value}\n" for name, value in facts.items()))
    return {"_CONDOR_JOB_AD": slot.parent / "job.ad"}


def waiting(slot: Path) -> list[int]:
    """List the events in the queue: of each how often it was tried in vain."""
    with closing(sqlite3.connect(slot.parent / "queues.sqlite", timeout=60)) as connection:
        return [tried for (tried,) in connection.execute("SELECT attempts FROM message WHERE queue = 'in'")]


def test_an_evicted_pilot_is_gone_with_seconds_to_spare_and_has_said_so(slot: Path) -> None:
    given = settings(slot, TASK_ARGS="sleep 1000", **job(slot, JobMaxVacateTime=8, KillSig='"SIGTERM"'))
    with chirp_proxy(slot.parent) as proxy, pilot(slot, given) as child:
        until_sync(lambda: proxy.values("TasksRunning") == ["1"] or proxy.values("Status")[-1:] == ['"Tasking"'])
        child.send_signal(signal.SIGTERM)
        begun = time.monotonic()
        assert child.wait(30) == 128 + signal.SIGTERM
    assert time.monotonic() - begun < 8
    assert waiting(slot) == [0] * EVENTS
    assert proxy.values("Status")[-1] == '"Done"'
    assert proxy.values("EventsReturned")[-1] == "1"
    assert_nothing_left(slot)


def test_a_pilot_ends_before_its_job_has_to(slot: Path) -> None:
    started = time.time()
    ad = job(slot, JobCurrentStartDate=int(started), OriginalTime=12)
    with chirp_proxy(slot.parent):
        ended = run_pilot(slot, settings(slot, TASK_ARGS="sleep 1000", **ad))
    assert ended.code == 0
    assert time.time() < started + 12
    assert "by OriginalTime of the job" in ended.stderr
    assert waiting(slot) == [0] * EVENTS


# Soak: `pytest -m soak tests/integration/test_chirp.py -s`, on a machine that does nothing else.

MANY, ROUNDS = 1500, 7


def rate(slot: Path, fault: Fault | None) -> float:
    """Give the events a second, from the first output to the last."""
    with chirp_proxy(slot.parent, fault), closing(sqlite3.connect(slot.parent / "queues.sqlite")) as queues:
        queues.execute("DELETE FROM message")
        queues.commit()
        send(slot.parent, MANY)
        with pilot(slot, settings(slot, HTCHIRP_RATELIMIT_INTERVAL=1, MAX_CONCURRENT_TASKS=4)) as child:
            begun, first = 0.0, 0
            while (done := _outputs(queues)) < MANY:
                if done and not begun:
                    begun, first = time.monotonic(), done
                time.sleep(0.02)
            seconds = time.monotonic() - begun
            child.communicate(timeout=60)
    return (MANY - first) / seconds


def _outputs(queues: sqlite3.Connection) -> int:
    return int(queues.execute("SELECT COUNT(*) FROM message WHERE queue = 'out'").fetchone()[0])


@pytest.mark.soak
def test_no_fault_of_the_proxy_costs_throughput(slot: Path) -> None:
    rates: dict[Fault | None, list[float]] = {fault: [] for fault in (None, *FAULTS)}
    for _ in range(ROUNDS):
        for fault, found in rates.items():
            found.append(rate(slot, fault))
    medians = {fault: statistics.median(found) for fault, found in rates.items()}
    for fault, median in medians.items():
        print(f"{fault.__name__ if fault else 'no fault':>20} {median:6.0f}/s  {median / medians[None]:.3f}")
    assert min(medians.values()) >= 0.95 * medians[None]
