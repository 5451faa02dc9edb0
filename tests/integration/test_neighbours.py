"""What other processes of a machine, and those of a task, may do to a pilot: it goes on, and touches none of them."""

import os
import subprocess
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, suppress
from pathlib import Path

import pytest

from tests.support.dead_pilots import DEAD
from tests.support.pilots import PilotCommand
from tests.support.users import needs_root
from tests.support.waiting import until_sync
from trio_pilot.processes.cgroup_hierarchies import hierarchies
from trio_pilot.processes.identity import own
from trio_pilot.processes.orphans import MARKER

pytestmark = [needs_root, pytest.mark.alone]  # a sweep looks at the whole machine

USERS = 5071, 5072
COPY = ("sh", "-c", 'cat "$0" > "$1"', "{{INFILE}}", "{{OUTFILE}}")


def as_user(user: int, *more: str) -> list[str]:
    """Return a prefix that runs a command as a user that may read everything, as Python may be in a home directory."""
    capabilities = "--inh-caps=-all,+dac_read_search", "--ambient-caps=-all,+dac_read_search"
    return ["setpriv", f"--reuid={user}", f"--regid={user}", "--clear-groups", *capabilities, *more]


NINES = "9" * 20
MARKERS = {
    "dead": f"{DEAD}/a",
    "living": f"{own()}/a",
    "large number": f"{own().boot}.{own().namespace}.{NINES}.1/x",
    "5000 digits": f"{own().boot}.{own().namespace}.{'9' * 5000}.1/x",
    "time of 5000 digits": f"{own().boot}.{own().namespace}.1.{'9' * 5000}/x",
    "other digits": f"{own().boot}.{own().namespace}.\u0663.1/x",
    "negative": f"{own().boot}.{own().namespace}.-1.1/x",
    "no numbers": "a.b.c.d/e",
    "only dots": "." * 100_000,
    "only slashes": "/" * 100_000,
    "empty": "",
    "not UTF-8": f"{own().boot}.\udcff.1.1/\udcff",
    "line feed": f"{DEAD}\n/a",
    "escape": "\x1b[2J/a",
}


@pytest.fixture
def bystanders() -> Iterator["list[subprocess.Popen[bytes]]"]:
    """Processes that a test starts, each to be alive at its end."""
    started: list[subprocess.Popen[bytes]] = []
    with ExitStack() as stack:
        yield started
        for process in started:
            stack.callback(process.wait)
            stack.callback(process.kill)
        assert [process.poll() for process in started] == [None] * len(started)


def start(prefix: Sequence[str], marker: str = "", *, new_session: bool = True) -> "subprocess.Popen[bytes]":
    env = {"PATH": os.environ["PATH"], **({MARKER: marker} if marker else {})}
    process = subprocess.Popen([*prefix, "sleep", "1000"], env=env, start_new_session=new_session)
    until_sync(lambda: Path(f"/proc/{process.pid}/comm").read_text() == "sleep\n")
    return process


def a_pilot_works(pilots: PilotCommand, prefix: Sequence[str] = ()) -> str:
    """Run a pilot, and return what it logged."""
    pilots.send(1, 2)
    pilot = pilots.run(*COPY, prefix=prefix)
    assert pilot.wait() == 0, pilot.stderr
    assert len(pilots.receive()) == 2
    return pilot.stderr


def test_markers_of_other_users_end_neither_a_pilot_nor_their_processes(
    pilots: PilotCommand, bystanders: "list[subprocess.Popen[bytes]]"
) -> None:
    bystanders += [start(as_user(user), marker) for user in USERS for marker in MARKERS.values()]
    a_pilot_works(pilots)


def test_odd_markers_of_the_same_user_do_not_end_a_pilot(
    pilots: PilotCommand, bystanders: "list[subprocess.Popen[bytes]]"
) -> None:
    bystanders += [start((), marker) for name, marker in MARKERS.items() if name not in ("dead", "living")]
    a_pilot_works(pilots)


def test_what_shares_a_session_with_another_users_marked_process_lives(pilots: PilotCommand, tmp_path: Path) -> None:
    one, other = (" ".join(as_user(user)) for user in USERS)
    script = f"{MARKER}={DEAD}/a {one} sleep 1000 & {other} sleep 1000 & sleep 1000 & jobs -p > {tmp_path}/pids; wait"
    with subprocess.Popen(["sh", "-c", script], start_new_session=True) as session:
        try:
            until_sync(lambda: (tmp_path / "pids").exists() and len((tmp_path / "pids").read_text().split()) == 3)
            pids = (tmp_path / "pids").read_text().split()
            until_sync(lambda: {Path(f"/proc/{pid}/comm").read_text() for pid in pids} == {"sleep\n"})
            logged = a_pilot_works(pilots)
            assert "removed" not in logged
            assert [pid for pid in pids if not Path(f"/proc/{pid}/exe").exists()] == []
        finally:
            with suppress(ProcessLookupError):
                os.killpg(session.pid, 9)


NAMES = {
    "a large number": f"{own().boot}.{own().namespace}.{NINES}.1",
    "no identity": "nonsense",
    "odd": "a b\x1b[2J",
    "dead": str(DEAD),
}


def test_control_groups_of_other_users_are_left_alone(
    pilots: PilotCommand, bystanders: "list[subprocess.Popen[bytes]]"
) -> None:
    places = [place for place in hierarchies() if os.access(place.here, os.W_OK)]
    if not places:
        pytest.skip("no control group can be made here")
    groups = [places[0].here / f"trio-pilot-{name}" for name in NAMES.values()]
    made: list[Path] = []
    try:
        for group in groups:
            group.mkdir()
            made.append(group)
            os.chown(group, USERS[0], USERS[0])
            bystanders.append(start(as_user(USERS[0])))
            (group / "cgroup.procs").write_text(str(bystanders[-1].pid))
        a_pilot_works(pilots)
        assert all(group.exists() for group in groups)
    finally:
        for group, bystander in zip(made, bystanders, strict=False):
            with suppress(OSError):
                (places[0].here / "cgroup.procs").write_text(str(bystander.pid))
            group.rmdir()


def test_names_beside_the_data_directory_do_not_end_a_pilot(pilots: PilotCommand) -> None:
    pilots.data.mkdir()
    for name in NAMES.values():
        (pilots.directory / f".ewms-pilot-data-{name}@node-0123").mkdir()
        (pilots.data / f".pilot-01234567-{name}@node").touch()
    a_pilot_works(pilots)


def test_a_pilot_survives_a_task_that_takes_all_processes(pilots: PilotCommand) -> None:
    pilots.directory.chmod(0o777)
    pilots.send(*range(4))
    for file in pilots.directory.iterdir():
        file.chmod(0o666)
    # Without a process of its own, a good task runs all the same.
    bomb = 'read -r event < "$0"; if test "$event" = 0; then while :; do sleep 1000 & done; fi; printf %s "$event" > "$1"'
    pilot = pilots.run(
        *("sh", "-c", bomb, "{{INFILE}}", "{{OUTFILE}}"),
        prefix=[*as_user(USERS[0]), "prlimit", "--nproc=60"],
        max_concurrent_tasks=2,
        task_timeout=4,
        max_attempts=1,
        stop_listening_on_task_error="false",
        timeout_queue_incoming=3,
    )
    assert pilot.wait() == 1, pilot.stderr
    assert pilot.last_line.startswith("1 TASK(S) FAILED"), pilot.stderr
    assert sorted(map(str, pilots.receive())) == ["1", "2", "3"]


ODD_NAMES = ["a b", "a`touch spoilt`"]


def test_paths_that_a_shell_would_not_take_as_they_are_are_refused(pilots: PilotCommand) -> None:
    pilots.send("event")
    for parent in (pilots.directory / name for name in ODD_NAMES):
        parent.mkdir()
        pilot = pilots.run("sh", "-c", "cat {{INFILE}} > {{OUTFILE}}", data_dir_parent_path_on_host=parent)
        assert pilot.wait() == 4, pilot.stderr
        assert "a shell would not take as it is" in pilot.last_line
    assert pilots.queue() == [(0, False)]
    assert not list(pilots.directory.rglob("spoilt"))


def test_a_path_that_is_an_argument_of_its_own_may_be_any(pilots: PilotCommand) -> None:
    pilots.send("event")
    parent = pilots.directory / "a`touch spoilt` $b"
    parent.mkdir()
    assert pilots.run(*COPY, data_dir_parent_path_on_host=parent).wait() == 0
    assert pilots.receive() == ["event"]
