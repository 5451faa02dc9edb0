import os
import re
import signal
import time
import uuid
from collections.abc import Iterator
from contextlib import suppress
from pathlib import Path

import pytest

from tests.support.images import bubblewrap_fault
from tests.support.pilots import PilotCommand, RunningPilot
from tests.support.processes import processes_with
from tests.support.waiting import until_sync

COPY = ("sh", "-c", 'cp "$0" "$1"', "{{INFILE}}", "{{OUTFILE}}")
RETURNED, FAILED_ONCE = (0, False), (1, False)  # (attempts, claimed) of a message in a queue

# Ignores SIGTERM; has a child and two daemons, each double-forked into a session of its own, one with a clean environment.
STUBBORN = """
trap '' TERM
(setsid sh -c 'sleep 1000; : "$0"' "$0" &)
(env -i "$(command -v setsid)" "$(command -v sh)" -c 'sleep 1000; : "$0"' "$0" &)
sh -c 'sleep 1000; : "$0"' "$0" &
touch "$1/ready-${EWMS_TASK_INFILE##*/}"
sleep 1000; sleep 1000
"""


@pytest.fixture
def mark() -> Iterator[str]:
    """A word by which all processes of a task are found; none may be left after the test."""
    mark = f"mark-{uuid.uuid4().hex}"
    yield mark
    assert containers(mark) == []


def containers(mark: str) -> list[int]:
    """Return the processes with the mark except the pilot, which has it in its flags."""
    return [pid for pid in processes_with(mark) if not is_pilot(pid)]


def is_pilot(pid: int) -> bool:
    try:
        return b"--queue-incoming=events" in Path(f"/proc/{pid}/cmdline").read_bytes()
    except OSError:
        return False


def ready(pilots: PilotCommand) -> int:
    """Return the number of tasks that have left a file in the data hub."""
    return len(list((pilots.data / "data-hub").glob("ready-*")))


def wait_for_tasks(pilots: PilotCommand, pilot: RunningPilot, count: int) -> None:
    until_sync(lambda: pilot.ended or ready(pilots) >= count, f"{count} tasks to start")
    assert not pilot.ended, pilot.stderr


def nothing_is_left(pilots: PilotCommand) -> None:
    assert not pilots.data.exists()
    assert [entry.name for entry in pilots.directory.iterdir() if entry.name.startswith(".")] == []


def stubborn(mark: str) -> tuple[str, ...]:
    return ("sh", "-c", STUBBORN, mark, "{{DATA_HUB}}")


def polite(mark: str, script: str) -> tuple[str, ...]:
    return ("sh", "-c", f'touch "$1/ready-${{EWMS_TASK_INFILE##*/}}"; {script}', mark, "{{DATA_HUB}}", "{{OUTFILE}}")


# The time limit of a task.


def test_a_task_that_times_out_leaves_no_process_and_its_event_is_back(
    pilots: PilotCommand, runtime: str, mark: str
) -> None:
    pilots.send("event")
    pilot = pilots.start(*stubborn(mark), runtime=runtime, task_timeout=1, kill_grace=0.5, max_concurrent_tasks=2)
    wait_for_tasks(pilots, pilot, 1)
    begun = time.monotonic()
    assert len(containers(mark)) >= 4
    until_sync(lambda: pilots.queue() == [FAILED_ONCE], "the event to be back")
    took = time.monotonic() - begun
    assert took < 1 + 0.5 + 1.5, "the deadline, the grace, and a second and a half for a busy machine"
    assert pilot.wait() == 1
    assert pilot.last_line == ("1 TASK(S) FAILED: ContainerRunError('task failed: [Timeout-Error] timed out after 1s')")
    assert pilots.queue() == [FAILED_ONCE]
    nothing_is_left(pilots)


@pytest.mark.alone
def test_a_pilot_that_is_suspended_with_its_task_leaves_it_its_time(pilots: PilotCommand, runtime: str, mark: str) -> None:
    pilots.send("event")
    work = 'for step in 1 2 3 4 5 6 7 8 9 10 11 12 13 14 15 16 17 18 19 20; do sleep 0.1; done; echo done > "$2"'
    pilot = pilots.start(*polite(mark, work), runtime=runtime, task_timeout=8, kill_grace=0.5)
    wait_for_tasks(pilots, pilot, 1)
    stopped = processes_with(mark)  # the pilot as well
    for number, seconds in ((signal.SIGSTOP, 10), (signal.SIGCONT, 0)):  # longer than the task may take
        for pid in stopped:
            with suppress(ProcessLookupError):
                os.kill(pid, number)
        time.sleep(seconds)
    assert pilot.wait() == 0, pilot.stderr
    assert pilots.receive() == ["done\n"]
    assert "this process was stopped for 1" in pilot.stderr
    nothing_is_left(pilots)


@pytest.mark.parametrize("max_attempts", [1, 2])
def test_after_its_last_attempt_an_event_is_a_dead_letter(pilots: PilotCommand, mark: str, max_attempts: int) -> None:
    pilots.send("event")
    for _ in range(max_attempts):
        pilot = pilots.run(*stubborn(mark), task_timeout=0.3, kill_grace=0.1, max_attempts=max_attempts)
        assert pilot.wait() == 1
    assert pilots.queue() == []
    assert len(pilots.queue("events.dead-letters")) == 1


# Without containers, what a task leaves is known only by what it has inherited.

SPOILER = """
(env -i "$(command -v setsid)" {prefix} "$(command -v sh)" -c '
    while sleep 0.02; do echo spoilt; for file in ../task-io/outfile*; do echo spoilt >> "$file"; done; done
    : "$0"' "$0" &)
sleep 0.2; echo "$0" > "$1"
"""


@pytest.mark.parametrize(("prefix", "slots"), [("", 2), ("prlimit --locks=7:7", 1)], ids=["with others", "that hides"])
def test_a_daemon_of_a_task_does_not_write_into_the_next_ones(
    pilots: PilotCommand, mark: str, prefix: str, slots: int
) -> None:
    pilots.send(*range(4))
    prefix = prefix and f'"$(command -v {prefix.partition(" ")[0]})" {prefix.partition(" ")[2]}'
    script = f'if test "$(cat "$2")" = 0; then {SPOILER.format(prefix=prefix)} else sleep 0.3; echo "$0" > "$1"; fi'
    args = "sh", "-c", script, mark, "{{OUTFILE}}", "{{INFILE}}"
    pilot = pilots.run(*args, max_concurrent_tasks=slots, dump_task_output="true")
    assert pilot.wait() == 0, pilot.stderr
    assert containers(mark) == []
    outputs = pilots.receive()
    assert len(outputs) == 4
    assert sum("spoilt" in str(output) for output in outputs) <= 1, "that of its own task is its own affair"
    nothing_is_left(pilots)


def test_zombies_of_a_task_do_not_use_up_its_processes(pilots: PilotCommand) -> None:
    pilots.send("event")
    script = 'for number in $(seq 100); do (env -i "$(command -v setsid)" "$(command -v true)" &); sleep 0.01; done'
    pilot = pilots.run("sh", "-c", script, task_pids=10)
    assert pilot.wait() == 0, pilot.stderr


# Signals.


@pytest.mark.parametrize(("number", "code"), [(signal.SIGTERM, 143), (signal.SIGINT, 130)])
def test_a_signal_ends_the_pilot_and_all_it_runs_and_returns_the_events(
    pilots: PilotCommand, runtime: str, mark: str, number: signal.Signals, code: int
) -> None:
    pilots.send(*range(5))
    pilot = pilots.start(
        *stubborn(mark), runtime=runtime, max_concurrent_tasks=2, grace=0.5, kill_grace=0.3, timeout_queue_incoming=60
    )
    wait_for_tasks(pilots, pilot, 2)
    assert [claimed for _, claimed in pilots.queue()].count(True) == 2
    begun = time.monotonic()
    pilot.signal(number)
    assert pilot.wait() == code
    assert 0.5 <= time.monotonic() - begun < 4
    assert containers(mark) == []
    assert pilots.queue() == [RETURNED] * 5
    nothing_is_left(pilots)


def test_a_second_signal_ends_it_at_once(pilots: PilotCommand, runtime: str, mark: str) -> None:
    pilots.send("event")
    pilot = pilots.start(*stubborn(mark), runtime=runtime, grace=1000, kill_grace=0.2)
    wait_for_tasks(pilots, pilot, 1)
    pilot.signal(signal.SIGTERM)
    until_sync(lambda: "signal 15" in pilot.stderr, "the signal to be noticed")
    assert not pilot.ended
    begun = time.monotonic()
    pilot.signal(signal.SIGTERM)
    assert pilot.wait() == 143
    assert time.monotonic() - begun < 3
    assert pilots.queue() == [RETURNED]
    nothing_is_left(pilots)


def test_a_task_that_is_done_within_the_grace_has_its_output_sent(pilots: PilotCommand, runtime: str, mark: str) -> None:
    pilots.send("one", "two")
    script = 'until test -e "$1/enough"; do sleep 0.02; done; echo done > "$2"'
    pilot = pilots.start(*polite(mark, script), runtime=runtime, grace=1000)
    wait_for_tasks(pilots, pilot, 1)
    pilot.signal(signal.SIGTERM)
    until_sync(lambda: "signal 15" in pilot.stderr, "the signal to be noticed")
    (pilots.data / "data-hub/enough").touch()
    assert pilot.wait() == 143
    assert pilots.queue() == [RETURNED]
    assert pilots.receive() == ["done\n"]
    nothing_is_left(pilots)


def test_an_idle_pilot_ends_on_a_signal_at_once(pilots: PilotCommand) -> None:
    pilots.send()
    pilot = pilots.start("true", timeout_queue_incoming=1000)
    until_sync(lambda: "listening" in pilot.stderr, "the pilot to listen")
    begun = time.monotonic()
    pilot.signal(signal.SIGINT)
    assert pilot.wait() == 130
    assert time.monotonic() - begun < 2
    nothing_is_left(pilots)


def test_a_signal_while_the_init_container_runs_ends_that_too(pilots: PilotCommand, runtime: str, mark: str) -> None:
    pilots.send("event")
    init = " ".join(f"'{arg}'" for arg in ("sh", "-c", 'touch "$1/ready-init"; sleep 1000; :', mark, "{{DATA_HUB}}"))
    pilot = pilots.start("true", runtime=runtime, init_image="/", init_args=init)
    wait_for_tasks(pilots, pilot, 1)
    assert containers(mark)
    pilot.signal(signal.SIGTERM)
    assert pilot.wait() == 143
    assert pilots.queue() == [RETURNED]
    nothing_is_left(pilots)


def test_bubblewraps_containers_die_with_a_pilot_that_is_killed(pilots: PilotCommand, mark: str) -> None:
    if fault := bubblewrap_fault():
        pytest.skip(f"bubblewrap does not work here: {fault}")
    pilots.send("event")
    pilot = pilots.start(*stubborn(mark), runtime="bubblewrap")
    wait_for_tasks(pilots, pilot, 1)
    pilot.signal(signal.SIGKILL)
    assert pilot.wait() == -signal.SIGKILL
    until_sync(lambda: not containers(mark), "all processes to end")


# The data directory.


def test_neither_failed_nor_successful_tasks_leave_files(pilots: PilotCommand, runtime: str) -> None:
    pilots.send(*range(4))
    script = ("sh", "-c", 'mkdir -p locked/in; touch locked/in/file; chmod 0 locked; exit "$(cat "$0")"', "{{INFILE}}")
    pilot = pilots.run(*script, runtime=runtime, stop_listening_on_task_error="false", max_attempts=1)
    assert pilot.wait() == 1
    assert pilot.last_line.startswith("3 TASK(S) FAILED: ")
    nothing_is_left(pilots)


def test_two_pilots_share_a_directory(pilots: PilotCommand) -> None:
    pilots.send(*range(20))
    both = [pilots.start(*COPY) for _ in range(2)]
    assert [pilot.wait() for pilot in both] == [0, 0]
    assert sorted(map(str, pilots.receive())) == sorted(map(str, range(20)))
    nothing_is_left(pilots)


def test_the_output_of_tasks_is_copied_to_the_pilots_when_asked_for(pilots: PilotCommand, runtime: str) -> None:
    pilots.send("event")
    pilot = pilots.run("sh", "-c", "echo to-stdout; echo to-stderr >&2", runtime=runtime, dump_task_output="true")
    assert pilot.wait() == 0
    assert pilot.stdout == b"to-stdout\n"
    assert "\nto-stderr\n" in pilot.stderr
    assert pilots.run("sh", "-c", "echo to-stdout; echo to-stderr >&2", runtime=runtime).stdout == b""


def test_the_output_of_a_task_that_fails_is_copied_between_marks(pilots: PilotCommand, runtime: str) -> None:
    pilots.send("event")
    pilot = pilots.run("sh", "-c", "echo to-stdout; exit 3", runtime=runtime)
    assert pilot.wait() == 1
    marked = r"\[trio-pilot: start of stdout of (\S+)\]\nto-stdout\n\[trio-pilot: end of stdout of \1\]\n"
    assert re.fullmatch(marked, pilot.stdout.decode())
    assert re.search(
        r"\n\[trio-pilot: start of stderr of \S+\]\n<no stderr logs>\n\[trio-pilot: end of stderr of ", pilot.stderr
    )


# What a failing run reports.


@pytest.mark.parametrize(
    ("script", "reason"),
    [
        ("echo one >&2; echo the reason >&2; exit 1", "(exit code 1): the reason"),
        ("kill -9 $$", "(exit code 137): killed by SIGKILL"),
        ("printf 'bad \\377 byte\\n' >&2; exit 2", "(exit code 2): bad \ufffd byte"),
        ("echo one; exit 3", "(exit code 3): <no stderr logs>"),
    ],
)
def test_the_last_line_says_which_tasks_failed_and_why(pilots: PilotCommand, runtime: str, script: str, reason: str) -> None:
    pilots.send("event")
    pilot = pilots.run("sh", "-c", script, runtime=runtime)
    assert pilot.wait() == 1
    assert pilot.last_line == f"1 TASK(S) FAILED: ContainerRunError('task failed {reason}')"
    assert pilots.queue() == [FAILED_ONCE]


@pytest.mark.parametrize(("command", "code"), [("no-such-command", 127), ("/etc/passwd", 126)])
def test_a_command_that_cannot_be_run_is_the_tasks_fault(
    pilots: PilotCommand, runtime: str, command: str, code: int
) -> None:
    pilots.send("event")
    pilot = pilots.run(command, runtime=runtime)
    assert pilot.wait() == 1
    assert pilot.last_line.startswith(f"1 TASK(S) FAILED: ContainerRunError('task failed (exit code {code}): ")
    assert command in pilot.last_line


def test_a_python_traceback_is_reported_whole(pilots: PilotCommand, runtime: str) -> None:
    pilots.send("event")
    pilot = pilots.run("python3", "-c", "1/0", runtime=runtime)
    assert pilot.wait() == 1
    assert "task failed (exit code 1): Traceback (most recent call last):" in pilot.last_line
    assert "ZeroDivisionError: division by zero" in pilot.last_line


def test_an_init_container_that_fails_takes_nothing_from_the_queue(pilots: PilotCommand, runtime: str) -> None:
    pilots.send("event")
    pilot = pilots.run(*COPY, runtime=runtime, init_image="/", init_args="sh -c 'echo no calibration >&2; exit 3'")
    assert pilot.wait() == 1
    assert pilot.last_line == "ContainerRunError: init-container failed (exit code 3): no calibration"
    assert pilots.queue() == [RETURNED]
    assert "listening" not in pilot.stderr
    nothing_is_left(pilots)


def test_an_init_container_that_is_not_done_in_time_is_ended(pilots: PilotCommand, runtime: str, mark: str) -> None:
    pilots.send("event")
    init = f"sh -c 'trap \"\" TERM; (setsid sleep 1000 {mark} &); sleep 1000' {mark}"
    pilot = pilots.run(*COPY, runtime=runtime, init_image="/", init_args=init, init_timeout=0.5, kill_grace=0.2)
    assert pilot.wait() == 1
    assert pilot.last_line == ("ContainerRunError: init-container failed: [Timeout-Error] timed out after 0.5s")
    assert pilots.queue() == [RETURNED]
    nothing_is_left(pilots)


def test_what_the_init_container_writes_the_tasks_read(pilots: PilotCommand, runtime: str) -> None:
    pilots.send("event")
    init = """sh -c 'test -z "$EWMS_TASK_INFILE" && echo calibration > "$EWMS_TASK_DATA_HUB_DIR/file"'"""
    task = ("sh", "-c", 'cat "$0/file" > "$1"', "{{DATA_HUB}}", "{{OUTFILE}}")
    pilot = pilots.run(*task, runtime=runtime, init_image="/", init_args=init)
    assert (pilot.wait(), pilots.receive()) == (0, ["calibration\n"])
    nothing_is_left(pilots)


def environment_of_a_task(pilots: PilotCommand, runtime: str, name: str, value: str) -> str:
    """Return the environment of a task, while that of the pilot has a variable."""
    pilots.send("event")
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv(name, value)
        pilot = pilots.run("sh", "-c", 'env > "$0"', "{{OUTFILE}}", runtime=runtime)
    assert pilot.wait() == 0
    return str(pilots.receive()[0])


def test_the_pilots_own_secrets_are_not_in_a_tasks_environment(pilots: PilotCommand, runtime: str) -> None:
    said = environment_of_a_task(pilots, runtime, "SECRET_OF_THE_PILOT", "a-secret")
    assert "a-secret" not in said
    assert "EWMS_TASK_INFILE=" in said


def test_htcondor_tracks_the_processes_of_tasks_like_the_pilots(pilots: PilotCommand, runtime: str) -> None:
    said = environment_of_a_task(pilots, runtime, "_CONDOR_ANCESTOR_47", "47:1795890748:1")
    assert "_CONDOR_ANCESTOR_47=47:1795890748:1\n" in said
