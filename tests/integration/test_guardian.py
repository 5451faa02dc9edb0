import os
import random
import signal
import time
import uuid
from collections.abc import Iterator
from contextlib import closing, suppress
from pathlib import Path
from typing import Any

import pytest

from tests.support.containment import CONTAINMENTS, Containment
from tests.support.pilots import PilotCommand, RunningPilot
from tests.support.processes import command_line, processes_with
from tests.support.users import needs_root
from tests.support.waiting import ENGINE, until_sync
from trio_pilot.files.data_directory import owner_files_of_dead
from trio_pilot.processes.cgroup_hierarchies import hierarchies
from trio_pilot.processes.cgroups import Groups
from trio_pilot.processes.identity import PARENT, STATE, stat_of

IN_PROCESS = Containment("process")
IN_PID_NAMESPACE = "unshare", "--pid", "--fork", "--kill-child", "--mount-proc"

PROMISE = 10.0  # seconds within which everything is removed

# Ignores SIGTERM; has a child, and a daemon in a session of its own that has a child with a clean environment.
STUBBORN = r"""
trap '' TERM
(setsid sh -c 'env -i "$(command -v sh)" -c "sleep 1000; : \$0" "$0"; : "$0"' "$0" &)
sh -c 'sleep 1000; : "$0"' "$0" &
touch "$1/ready-${EWMS_TASK_INFILE##*/}"
sleep 1000; sleep 1000
"""

# An apptainer for which images are good, but that never ends unpacking one: `build ... DIRECTORY SOURCE`.
UNPACKING = r"""
case "$*" in
build*) for word; do root=$last; last=$word; done; mkdir -p "$root/usr"; sleep 1000; : ;;
*) echo 'FATAL:   stat /.trio-pilot-probe: no such file or directory' >&2; exit 255 ;;
esac
"""
BUSY = 'sleep 0.0$(($$ % 10)); (setsid sleep 1000 &); cat "$1" > "$2"; : "$0"'


@pytest.fixture
def mark() -> Iterator[str]:
    """A word by which all processes of a pilot and its tasks are found."""
    mark = f"mark-{uuid.uuid4().hex}"
    yield mark
    for pid in living(mark):
        with suppress(ProcessLookupError):
            os.kill(pid, signal.SIGKILL)


@pytest.fixture(autouse=True)
def _temporary(pilots: PilotCommand) -> None:
    """Set a directory for temporary files that only these pilots use."""
    (pilots.directory / "temporary").mkdir()
    pilots.variables["TMPDIR"] = str(pilots.directory / "temporary")


def living(mark: str) -> list[int]:
    """Return the living processes with this mark: tasks, their pilots and guardians."""
    marked = {pid for pid in processes_with(mark) if stat_of(pid)}
    return [pid for pid in marked if (facts := stat_of(pid)) and facts[STATE] != "Z"]


def sleepers(mark: str) -> list[int]:
    """Return the shells of tasks that only sleep any more, two for each task, without what they have just forked."""
    shells = [pid for pid in living(mark) if "".join(command_line(pid)[2:3]).startswith("sleep")]
    return [pid for pid in shells if ["sleep", "1000"] in map(command_line, children(pid))]


def guardians(pilot: int) -> list[int]:
    return [pid for pid in children(pilot) if any("trio_pilot.cleanup.guardian" in word for word in command_line(pid))]


def children(parent: int) -> list[int]:
    pids = [int(entry.name) for entry in Path("/proc").iterdir() if entry.name.isdigit()]
    return [pid for pid in pids if (facts := stat_of(pid)) and int(facts[PARENT]) == parent and facts[STATE] != "Z"]


def start(pilots: PilotCommand, containment: Containment, mark: str, **settings: Any) -> RunningPilot:
    args = ("sh", "-c", STUBBORN, mark, "{{DATA_HUB}}")
    return pilots.start(
        *args, **containment.settings, max_concurrent_tasks=2, timeout_queue_incoming=60, grace=0, **settings
    )


def wait_for_tasks(pilots: PilotCommand, pilot: RunningPilot, count: int) -> None:
    hub = pilots.data / "data-hub"
    until_sync(lambda: pilot.ended or len(list(hub.glob("ready-*"))) >= count, f"{count} tasks to start", ENGINE)
    assert not pilot.ended, pilot.stderr
    until_sync(lambda: guardians(pilot.pid), "the guardian to start")


def wait_until_nothing_is_left(pilots: PilotCommand, mark: str, containment: Containment = IN_PROCESS) -> None:
    deadline = time.monotonic() + PROMISE
    while (left := [*living(mark), *leftovers(pilots), *containment.containers()]) and time.monotonic() < deadline:
        time.sleep(0.02)
    assert left == []


def leftovers(pilots: PilotCommand) -> list[Path]:
    # Not with `rglob`, which fails when a directory is removed meanwhile.
    directories = [directory for directory, *_ in os.walk(pilots.directory)]
    found = [Path(one) for one in directories if "ewms-pilot-data" in one or ".building-" in one]
    return [*found, *(pilots.directory / "temporary").iterdir()]


def all_events_can_be_done(pilots: PilotCommand, containment: Containment, events: range) -> None:
    """Check that each event is in the queue again or has its output, twice if the pilot was killed just before the ack."""
    copy = ("sh", "-c", 'cat "$0" > "$1"', "{{INFILE}}", "{{OUTFILE}}")
    pilot = pilots.run(*copy, **containment.settings, max_concurrent_tasks=4)
    assert pilot.wait() == 0, pilot.stderr
    assert set(map(int, map(str, pilots.receive()))) == set(events)
    assert pilots.queue() == []


def test_a_pilot_that_is_killed_leaves_nothing(pilots: PilotCommand, containment: Containment, mark: str) -> None:
    pilots.send(*range(4))
    pilot = start(pilots, containment, mark)
    wait_for_tasks(pilots, pilot, 2)
    until_sync(lambda: len(living(mark)) >= 1 + 2 * 4, "all processes of two tasks to start")
    pilot.kill()
    wait_until_nothing_is_left(pilots, mark, containment)
    all_events_can_be_done(pilots, containment, range(4))


def test_a_pilot_that_is_killed_while_it_tries_a_runtime_leaves_nothing(pilots: PilotCommand, mark: str) -> None:
    image, tried = pilots.directory / "image", pilots.directory / "tried"
    image.mkdir()
    stand_in_for_apptainer(pilots, mark, f"touch {tried}; sleep 1000; :")
    pilot = pilots.start(mark, runtime="apptainer", task_image=str(image))
    until_sync(tried.exists, "the runtime to be tried")
    until_sync(lambda: guardians(pilot.pid), "the guardian to start")
    pilot.kill()
    wait_until_nothing_is_left(pilots, mark)


def stand_in_for_apptainer(pilots: PilotCommand, mark: str, script: str) -> None:
    """Put a script in the place of apptainer, with an answer to `--version`."""
    program = pilots.directory / mark / "apptainer"
    program.parent.mkdir()
    program.write_text(f'#!/bin/sh\n[ "$1" = --version ] && exec echo apptainer version 1.4.5\n{script}\n')
    program.chmod(0o755)
    pilots.variables["PATH"] = f"{program.parent}:{os.environ['PATH']}"


def start_unpacking(pilots: PilotCommand, mark: str) -> RunningPilot:
    """Start a pilot that unpacks an image, and wait until a part of it is there."""
    stand_in_for_apptainer(pilots, mark, UNPACKING)
    images = pilots.directory / "images"
    settings = {"task_image": "docker://image", "apptainer_image_directory_must_be_present": "false"}
    pilot = pilots.start(mark, runtime="apptainer", apptainer_build_workdir=images, **settings)
    until_sync(lambda: pilot.ended or list(images.glob("*/*.building-*/root/usr")), "an image to be unpacked")
    assert not pilot.ended, pilot.stderr
    until_sync(lambda: guardians(pilot.pid), "the guardian to start")
    return pilot


def test_a_pilot_killed_while_it_unpacks_an_image_leaves_no_part_of_it(pilots: PilotCommand, mark: str) -> None:
    pilot = start_unpacking(pilots, mark)
    pilot.kill()
    wait_until_nothing_is_left(pilots, mark)


@pytest.mark.alone  # any pilot that starts sweeps, and could do it first
def test_half_an_image_of_a_dead_pilot_and_guardian_is_swept_by_the_next(pilots: PilotCommand, mark: str) -> None:
    pilot = start_unpacking(pilots, mark)
    pilot.signal(signal.SIGSTOP)  # so that it does not start another guardian
    os.kill(guardians(pilot.pid)[0], signal.SIGKILL)
    pilot.kill()
    assert [half for half in leftovers(pilots) if ".building-" in half.name]
    image, images = pilots.directory / "image", pilots.directory / "images"
    image.mkdir()
    pilot = pilots.run(mark, runtime="apptainer", task_image=str(image), apptainer_build_workdir=images)
    assert "removed 1 half-unpacked image(s) of pilots that are no more" in pilot.stderr
    wait_until_nothing_is_left(pilots, mark)


@needs_root
def test_what_a_pilot_killed_with_its_pid_namespace_leaves_is_swept(pilots: PilotCommand, mark: str) -> None:
    image, tried = pilots.directory / "image", pilots.directory / "tried"
    image.mkdir()
    stand_in_for_apptainer(pilots, mark, f"touch {tried}; sleep 1000; :")
    pilot = pilots.start(mark, prefix=IN_PID_NAMESPACE, runtime="apptainer", task_image=str(image))
    until_sync(tried.exists, "the runtime to be tried")
    pilot.kill()
    until_sync(lambda: not living(mark), "all processes to end")
    assert leftovers(pilots)
    all_events_can_be_done(pilots, IN_PROCESS, range(0))
    assert leftovers(pilots) == []


@needs_root
@pytest.mark.parametrize("engine", ["docker", "podman"])
def test_containers_left_with_a_pid_namespace_are_swept_and_no_others(
    pilots: PilotCommand, request: pytest.FixtureRequest, engine: str
) -> None:
    containment = CONTAINMENTS[engine](request)
    pilots.variables.update(containment.variables)
    with elsewhere(pilots, "dying") as dying, elsewhere(pilots, "living") as living:
        killed, left = start_in_pid_namespace(dying, containment), start_in_pid_namespace(living, containment)
        killed.kill()
        until_sync(lambda: owner_files_of_dead(dying.data), "the end of the first pilot")
        assert len(containment.containers()) == 2
        assert pilots.run("true", **containment.settings).wait() == 0
        (container,) = containment.containers()
        assert (living.data / container.removeprefix("trio-pilot-")).exists()
        left.signal(signal.SIGKILL)
        until_sync(lambda: owner_files_of_dead(living.data), "the end of the second pilot")
        pilots.run("true", **containment.settings)
        assert containment.containers() == []


def elsewhere(pilots: PilotCommand, name: str) -> PilotCommand:
    """Return the command in another directory."""
    directory = pilots.directory / name
    directory.mkdir()
    other = PilotCommand(directory)
    other.variables.update(pilots.variables)
    return other


def start_in_pid_namespace(pilots: PilotCommand, containment: Containment) -> RunningPilot:
    """Start a pilot in a PID namespace of its own, and wait until its task runs."""
    pilots.send("event")
    script = "sh", "-c", "touch /tmp/ready; sleep 1000"
    pilot = pilots.start(*script, prefix=IN_PID_NAMESPACE, timeout_queue_incoming=60, **containment.settings)
    until_sync(lambda: pilot.ended or list(pilots.data.glob("*/scratch/ready")), "a task to start", ENGINE)
    assert not pilot.ended, pilot.stderr
    return pilot


def test_the_control_groups_of_a_pilot_that_is_killed_are_gone(pilots: PilotCommand, mark: str) -> None:
    with closing(Groups()) as groups:
        if "memory" not in groups.controllers:
            pytest.skip(groups.fault("memory"))
    pilots.send("event")
    pilot = start(pilots, IN_PROCESS, mark, task_memory="1g")
    wait_for_tasks(pilots, pilot, 1)
    assert control_groups(pilot)
    pilot.kill()
    wait_until_nothing_is_left(pilots, mark)
    assert control_groups(pilot) == []


def control_groups(pilot: RunningPilot) -> list[Path]:
    places = [hierarchy.here for hierarchy in hierarchies()]
    return [group for place in places for group in place.glob(f"trio-pilot-*.{pilot.pid}.*")]


def test_a_guardian_that_is_killed_is_followed_by_another(pilots: PilotCommand, containment: Containment, mark: str) -> None:
    pilots.send(*range(2))
    pilot = start(pilots, containment, mark)
    wait_for_tasks(pilots, pilot, 2)
    first = guardians(pilot.pid)
    os.kill(first[0], signal.SIGKILL)
    until_sync(lambda: guardians(pilot.pid) not in ([], first), "another guardian")
    assert not pilot.ended
    pilot.kill()
    wait_until_nothing_is_left(pilots, mark, containment)
    all_events_can_be_done(pilots, containment, range(2))


@pytest.mark.alone  # any pilot that starts sweeps, and could do it first
def test_what_a_pilot_and_its_guardian_leave_is_swept_by_the_next(pilots: PilotCommand, mark: str) -> None:
    pilots.send(*range(2))
    pilot = start(pilots, IN_PROCESS, mark)
    wait_for_tasks(pilots, pilot, 2)
    until_sync(lambda: len(living(mark)) >= 1 + 2 * 4, "all processes of two tasks to start")
    pilot.signal(signal.SIGSTOP)  # so that it does not start another guardian
    os.kill(guardians(pilot.pid)[0], signal.SIGKILL)
    pilot.kill()
    assert len(living(mark)) >= 2 * 4
    all_events_can_be_done(pilots, IN_PROCESS, range(2))
    assert living(mark) == []
    assert leftovers(pilots) == []


def test_a_living_pilot_loses_nothing_to_another_ones_guardian_or_sweep(pilots: PilotCommand, mark: str) -> None:
    other = f"other-{uuid.uuid4().hex}"
    pilots.send(*range(4))
    lasting = start(pilots, IN_PROCESS, mark)
    wait_for_tasks(pilots, lasting, 2)
    until_sync(lambda: len(sleepers(mark)) == 4, "two tasks to sleep")
    alive, directories = sleepers(mark), sorted(pilots.data.iterdir())
    dying = start(pilots, IN_PROCESS, other)
    wait_for_tasks(pilots, dying, 4)
    dying.kill()
    until_sync(lambda: not living(other), "all processes of the killed pilot to end")
    until_sync(lambda: sorted(pilots.data.iterdir()) == directories, "the directories of the killed pilot to be removed")
    all_events_can_be_done_but(pilots, 2)
    assert sleepers(mark) == alive
    assert sorted(pilots.data.iterdir()) == directories
    lasting.signal(signal.SIGTERM)
    lasting.signal(signal.SIGTERM)
    assert lasting.wait() == 143
    wait_until_nothing_is_left(pilots, mark)


def all_events_can_be_done_but(pilots: PilotCommand, count: int) -> None:
    pilot = pilots.run("sh", "-c", 'cat "$0" > "$1"', "{{INFILE}}", "{{OUTFILE}}")
    assert pilot.wait() == 0, pilot.stderr
    assert len(pilots.queue()) == count


def test_files_that_a_killed_pilot_was_told_to_keep_are_kept(pilots: PilotCommand, mark: str) -> None:
    pilots.send("event")
    pilot = start(pilots, IN_PROCESS, mark, keep_all_task_files=True)
    wait_for_tasks(pilots, pilot, 1)
    pilot.kill()
    until_sync(lambda: not living(mark), "all processes to end")
    all_events_can_be_done_but(pilots, 0)
    assert len(list(pilots.data.glob("*/task-io/infile-*"))) == 1


def test_the_guardian_has_no_secrets_and_ends_with_the_pilot(pilots: PilotCommand, mark: str) -> None:
    pilot = start(pilots, IN_PROCESS, mark, broker_token="a-token")
    until_sync(lambda: guardians(pilot.pid), "the guardian to start")
    (guardian,) = guardians(pilot.pid)
    until_sync(lambda: "trio_pilot.cleanup.guardian" in "".join(command_line(guardian)))
    assert Path(f"/proc/{guardian}/environ").read_bytes() == b""
    assert "a-token" not in " ".join(command_line(guardian))
    for number in (signal.SIGTERM, signal.SIGINT, signal.SIGHUP):
        os.kill(guardian, number)
    pilot.signal(signal.SIGTERM)
    assert pilot.wait() == 143
    assert stat_of(guardian) is None
    assert "has ended before the pilot" not in pilot.stderr


def kill_at_some_moment(pilots: PilotCommand, containment: Containment, mark: str, whom: str) -> None:
    events = range(30)
    pilots.send(*events)
    args = ("sh", "-c", BUSY, mark, "{{INFILE}}", "{{OUTFILE}}")
    pilot = pilots.start(*args, **containment.settings, max_concurrent_tasks=4, timeout_queue_incoming=60)
    time.sleep(random.uniform(0, 0.8))
    if whom != "pilot" and (found := guardians(pilot.pid)):
        if whom == "both":
            pilot.signal(signal.SIGSTOP)  # so that it does not start another guardian
        os.kill(found[0], signal.SIGKILL)
        if whom == "guardian":
            until_sync(lambda: pilot.ended or guardians(pilot.pid) not in ([], found), "another guardian")
    assert not pilot.ended, pilot.stderr
    pilot.kill()
    if whom != "both":
        wait_until_nothing_is_left(pilots, mark, containment)
    all_events_can_be_done(pilots, containment, events)
    wait_until_nothing_is_left(pilots, mark, containment)


@pytest.mark.parametrize("whom", ["pilot", "guardian", "both"])
def test_a_pilot_killed_at_any_moment_leaves_and_loses_nothing(
    pilots: PilotCommand, containment: Containment, mark: str, whom: str
) -> None:
    kill_at_some_moment(pilots, containment, mark, whom)


@pytest.mark.soak
@pytest.mark.parametrize("whom", ["pilot", "guardian", "both"])
@pytest.mark.parametrize("_number", range(50))
def test_a_pilot_killed_at_many_moments_leaves_and_loses_nothing(
    pilots: PilotCommand, containment: Containment, mark: str, whom: str, _number: int
) -> None:
    kill_at_some_moment(pilots, containment, mark, whom)
