# The installed command beside a chirp proxy, a good one and faulty ones.

import math
import os
import re
import shutil
import signal
import sqlite3
import statistics
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, closing, contextmanager
from pathlib import Path

import pytest

from bench.measured_process import running
from tests.support.chirp_proxy import FAULTS, Fault, chirp_proxy, hangs
from tests.support.pilot_process import COMMAND, Ended, assert_nothing_left, environment, pilot, run_pilot
from tests.support.waiting import until_sync
from trio_pilot.allocation.classad import quoted
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


def test_a_run_is_reported_from_the_beginning_to_the_end(slot: Path) -> None:
    with chirp_proxy(slot.parent) as proxy:
        ended = run_pilot(slot, settings(slot))
    assert (ended.code, complaints(ended)) == (0, [])
    assert proxy.values("Status")[-1] == '"Done"'
    assert proxy.values("TasksSuccess")[-1] == proxy.values("TasksTotal")[-1] == str(EVENTS)
    assert proxy.values("Runtime") == ['"process"']
    assert proxy.values("Error") == []
    assert all(re.fullmatch(r'set_job_attr HTChirpEWMSPilot\w+ (\d+|"[^"]*")', line) for line in proxy.lines)
    assert_nothing_left(slot)


def test_a_failed_task_is_reported_in_the_event_log(slot: Path) -> None:
    with chirp_proxy(slot.parent) as proxy:
        ended = run_pilot(slot, settings(slot, HTCHIRP_DEST="JOB_EVENT_LOG", TASK_ARGS="sh -c 'echo Öh! >&2; exit 3'"))
    assert ended.code == 1
    assert r'ulog HTChirpEWMSPilotError: "ContainerRunError: task failed (exit code 3): \303\226h!"' in proxy.lines
    assert proxy.values("TasksFailed") == ['"1"']
    assert proxy.values("Status")[-1] == '"FatalError"'


ENVFILE = "ewms_htcondor_envfile.sh"
WRONG = {"TASK_IMAGE": "/", "PREFETCH": "many"}
WRONG_LINE = "EWMS_PILOT_PREFETCH must be an integer ≥ 1, not 'many'"


@pytest.mark.parametrize(
    ("more", "arguments", "line"),
    [
        (WRONG, [], WRONG_LINE),
        (WRONG, ["run", "--task-args", "true"], WRONG_LINE),
        ({"QUEUE_INCOMING": ""}, [], "EWMS_PILOT_QUEUE_INCOMING must name a queue: set it, or give --queue-incoming"),
        ({"BROKER": "amqp://"}, ["--no-such-flag"], "Unknown option: --no-such-flag."),
        ({"HTCHIRP": "maybe"}, [], "EWMS_PILOT_HTCHIRP must be a boolean (true or false), not 'maybe'"),
    ],
)
def test_a_wrong_setting_is_reported(slot: Path, more: dict[str, object], arguments: list[str], line: str) -> None:
    with chirp_proxy(slot.parent) as proxy:
        ended = run_pilot(slot, settings(slot, HTCHIRP_DEST="JOB_EVENT_LOG", **more), *arguments)
    assert (ended.code, ended.stderr) == (2, f"trio-pilot: {line}\n")
    assert proxy.values("Status") == ['"FatalError"']
    kind = "UsageError" if "option" in line else "SettingsError"
    assert proxy.values("Error") == [quoted(f"{kind}: {line}", 940)]
    assert all(line.startswith("ulog ") for line in proxy.lines)


@pytest.mark.parametrize("last_line", ["", "export EWMS_PILOT_TASK_ARGS='echo \n"])  # the second cannot be read
def test_a_wrong_setting_is_reported_as_the_envfile_says(slot: Path, last_line: str) -> None:
    asked = {"HTCHIRP": "True", "HTCHIRP_DEST": "JOB_EVENT_LOG", "PREFETCH": "many"}
    lines = "".join(f"export EWMS_PILOT_{name}='{value}'\n" for name, value in asked.items())
    (slot / ENVFILE).write_text(lines + last_line)
    given = {"_CONDOR_CHIRP_CONFIG": slot.parent / "chirp.config"}
    with chirp_proxy(slot.parent) as proxy:
        ended = run_pilot(slot, given)
    assert ended.code == 2
    assert len(ended.stderr.splitlines()) == 1
    assert proxy.lines[0] == 'ulog HTChirpEWMSPilotStatus: "FatalError"'
    assert len(proxy.values("Error")) == 1


@pytest.mark.parametrize(("more", "arguments"), [({"HTCHIRP": "no"}, []), ({}, ["send"]), ({}, ["check"])])
def test_a_wrong_setting_is_not_reported_unasked(slot: Path, more: dict[str, object], arguments: list[str]) -> None:
    with chirp_proxy(slot.parent) as proxy:
        assert run_pilot(slot, settings(slot, **WRONG, **more), *arguments).code == 2
    assert proxy.lines == []


@pytest.mark.parametrize("fault", [None, *FAULTS])
def test_a_fault_of_the_proxy_does_not_hide_a_wrong_setting(slot: Path, fault: Fault | None) -> None:
    with chirp_proxy(slot.parent, fault) as proxy:
        if fault is None:
            proxy.config.unlink()
        begun = time.monotonic()
        ended = run_pilot(slot, settings(slot, **WRONG))
    assert (ended.code, ended.stderr) == (2, f"trio-pilot: {WRONG_LINE}\n")
    assert time.monotonic() - begun < 15


@pytest.mark.parametrize("fault", [None, *FAULTS])
def test_a_fault_of_the_proxy_costs_no_task_and_little_time_at_the_end(slot: Path, fault: Fault | None) -> None:
    with chirp_proxy(slot.parent, fault) as proxy:
        if fault is None:
            proxy.config.unlink()
        ended = run_pilot(slot, settings(slot))
    assert ended.code == 0
    assert f"{EVENTS} task(s): {EVENTS} succeeded, 0 failed; 0 event(s) returned" in ended.stderr
    assert len(complaints(ended)) <= 1  # none if the only report was still being sent at the end
    assert_nothing_left(slot)


def test_a_proxy_that_hangs_costs_no_cpu_and_does_not_delay_the_end(slot: Path) -> None:
    with chirp_proxy(slot.parent, hangs), pilot(slot, settings(slot, TIMEOUT_QUEUE_INCOMING="60")) as child:
        time.sleep(3)
        child.send_signal(signal.SIGTERM)
        begun = time.monotonic()
        _, status, used = os.wait4(child.pid, 0)
        child.returncode = os.waitstatus_to_exitcode(status)
    assert child.returncode == 128 + signal.SIGTERM
    assert time.monotonic() - begun < LAST_TIMEOUT + 5
    assert used.ru_utime < 3  # a thread that spins would have used 3 s while it waited


def job(slot: Path, **facts: object) -> dict[str, object]:
    """Return the settings of a pilot in a job with this ad."""
    (slot.parent / "job.ad").write_text("".join(f"{name} = {value}\n" for name, value in facts.items()))
    return {"_CONDOR_JOB_AD": slot.parent / "job.ad"}


def waiting(slot: Path) -> list[int]:
    """Return the attempts of each event in the queue."""
    with closing(sqlite3.connect(slot.parent / "queues.sqlite", timeout=60)) as connection:
        return [tried for (tried,) in connection.execute("SELECT attempts FROM message WHERE queue = 'in'")]


def test_an_evicted_pilot_ends_in_time_and_reports_it(slot: Path) -> None:
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


# Soak: `pytest -m soak tests/integration/test_chirp.py -s`. The speed of a machine may change by half within a minute: so a
# pilot with the fault and one without run at the same time, for a few seconds, and change places from pair to pair.

MANY, SECONDS = 3000, 4.0  # events for each pilot, more than it can do in these seconds
LEAST_PAIRS, MOST_PAIRS, WANTED_ERROR = 10, 100, 0.01

Look = Callable[[], tuple[int, float]]


@contextmanager
def beside(fault: Fault | None, directory: Path, events: Path) -> Iterator[Look]:
    """Run a pilot beside a proxy; yield a function that returns the number of outputs, and the CPU seconds of the pilot."""
    slot = directory / "slot"
    slot.mkdir(parents=True)
    shutil.copy(events, directory / "queues.sqlite")
    given = environment(settings(slot, HTCHIRP_RATELIMIT_INTERVAL=1, MAX_CONCURRENT_TASKS=2))
    with (
        chirp_proxy(directory, fault),
        running([COMMAND], slot, given) as child,
        closing(sqlite3.connect(directory / "queues.sqlite", timeout=60)) as queues,
    ):
        yield lambda: (_outputs(queues), child.cpu())
    shutil.rmtree(directory, ignore_errors=True)


def _outputs(queues: sqlite3.Connection) -> int:
    return int(queues.execute("SELECT COUNT(*) FROM message WHERE queue = 'out'").fetchone()[0])


def compared(fault: Fault | None, directory: Path, events: Path, *, first: bool) -> tuple[float, float]:
    """Run a pilot with the fault and one without, and return the ratios of their rates and of their CPU for an event."""
    with ExitStack() as stack:
        looks = {
            name: stack.enter_context(beside(fault if name == "with" else None, directory / name, events))
            for name in (("with", "without") if first else ("without", "with"))
        }
        while not all(look()[0] for look in looks.values()):
            time.sleep(0.02)
        before = {name: look() for name, look in looks.items()}
        time.sleep(SECONDS)
        after = {name: look() for name, look in looks.items()}
    done = {name: after[name][0] - before[name][0] for name in looks}
    assert max(count for count, _ in after.values()) < MANY
    cpu = {name: (after[name][1] - before[name][1]) / done[name] for name in looks}
    return done["with"] / done["without"], cpu["with"] / cpu["without"]


def standard_error(ratios: Sequence[float]) -> float:
    """Return the standard error of the median, if all but the outliers are normally distributed."""
    low, _, high = statistics.quantiles(ratios, n=4)
    return 1.2533 * (high - low) / 1.349 / math.sqrt(len(ratios))


def say(what: str, ratios: Sequence[float]) -> float:
    """Print ratios, and return their median."""
    median = statistics.median(ratios)
    spread = f"{min(ratios):.2f} to {max(ratios):.2f} in {len(ratios)} pairs"
    print(f"{what:>25} {median:.3f} ± {standard_error(ratios):.3f}, {spread}")
    return median


@pytest.mark.soak
@pytest.mark.parametrize("fault", [None, *FAULTS])
def test_a_fault_of_the_proxy_costs_no_throughput(tmp_path: Path, fault: Fault | None) -> None:
    send(tmp_path, MANY)
    events = (tmp_path / "queues.sqlite").rename(tmp_path / "events.sqlite")
    rates: list[float] = []
    cpu: list[float] = []
    while len(rates) < LEAST_PAIRS or (standard_error(rates) > WANTED_ERROR and len(rates) < MOST_PAIRS):
        for first in (True, False, False, True):
            rate, for_an_event = compared(fault, tmp_path, events, first=first)
            rates.append(rate)
            cpu.append(for_an_event)
    print(f"\n{fault.__name__ if fault else 'no fault'}")
    assert say("rate", rates) >= 0.95
    assert say("CPU for an event", cpu) <= 1.05
