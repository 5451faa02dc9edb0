# The installed command beside a chirp proxy, a good one and bad ones.

import os
import re
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from tests.chirp_proxy import FAULTS, Fault, chirp_proxy, hangs
from tests.pilot_process import Ended, assert_nothing_left, pilot, run_pilot
from trio_pilot.condor.reporter import LAST_TIMEOUT

EVENTS = 20


@pytest.fixture
def slot(tmp_path: Path) -> Path:
    path = tmp_path / "slot"
    path.mkdir()
    events = "".join(f"{number}\n" for number in range(EVENTS))
    command = [sys.executable, "-m", "trio_pilot", "send", "in", "--broker", "./queues.sqlite"]
    subprocess.run(command, input=events, cwd=tmp_path, text=True, check=True, capture_output=True, timeout=60)
    return path


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
