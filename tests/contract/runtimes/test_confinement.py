"""Limits of containers that are child processes: with the control groups of this machine, and without any."""

import json
import os
import subprocess
import sys
import tempfile
import textwrap
import time
from collections.abc import AsyncIterator, Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path

import pytest
import trio

from tests.contract.runtimes.subjects import BUBBLEWRAPS, Subject
from tests.contract.runtimes.test_contract import AWKWARD, Marked
from tests.support.control_groups import NOWHERE, GroupsWithoutEntrance, GroupsWithoutLimit, NoGroups, tops_of
from tests.support.paths import ROOT
from tests.support.processes import command_line, new_children, own_children
from tests.support.users import UNPRIVILEGED
from tests.support.waiting import PATIENCE, until
from trio_pilot.errors import NodeError
from trio_pilot.files.error_summary import error_summary
from trio_pilot.processes import cgroups
from trio_pilot.processes.cgroup_hierarchies import MAIN_FILES, hierarchies
from trio_pilot.processes.cgroup_hierarchies import PILOT as PILOT_GROUP
from trio_pilot.processes.identity import own
from trio_pilot.processes.orphans import MARKER
from trio_pilot.runtimes import NAMESPACES, Container, Exit, Limits, Options, Runtime, bubblewrap, confinement, process
from trio_pilot.runtimes.confinement import NOT_ENFORCED, OpenGroups

OPTIONS = Options(kill_grace=0.3)
MOMENTS = [number / 1000 for number in range(25)]  # seconds; bubblewrap is ready after 10 ms

PYTHON = str(Path(sys.executable).resolve())  # that of a virtual environment may be in /tmp, which a container does not see

SMALL = 64 * 2**20  # bytes
ALLOCATE = ("dd", "if=/dev/zero", "of=/dev/null", "bs=200M", "count=1")
MANY = ("sh", "-c", "for number in $(seq 50); do sleep 5 & done; wait")
SPIN = ("sh", "-c", "while :; do :; done")

MODULES = {"process": process, "bubblewrap": bubblewrap}

children = pytest.mark.parametrize("subject", ["process", *BUBBLEWRAPS], indirect=True)
in_groups = pytest.mark.usefixtures("groups")
without_groups = pytest.mark.parametrize("open_groups", ["none"], indirect=True)
with_either = pytest.mark.parametrize("open_groups", ["groups", "none"], indirect=True)


@pytest.fixture
def open_groups(request: pytest.FixtureRequest) -> OpenGroups:
    if getattr(request, "param", "groups") == "none":
        return NoGroups
    request.getfixturevalue("groups")
    return cgroups.Groups


@pytest.fixture
async def runtime(subject: Subject, open_groups: OpenGroups) -> AsyncIterator[Runtime]:
    async with MODULES[subject.name].open_runtime(OPTIONS, open_groups) as runtime:
        await runtime.prepare(subject.image)
        yield runtime


@pytest.fixture
async def nesting_runtime(subject: Subject) -> AsyncIterator[Runtime]:
    """A runtime whose containers may make namespaces of their own."""
    options = replace(OPTIONS, privileges=frozenset({NAMESPACES}))
    async with MODULES[subject.name].open_runtime(options, cgroups.Groups) as runtime:
        yield runtime


@pytest.fixture
def groups() -> None:
    """Skip the test where there are no control groups for all limits."""
    found = cgroups.Groups()
    found.close()
    if missing := MAIN_FILES.keys() - found.controllers:
        pytest.skip(f"no control groups here: {', '.join(map(found.fault, sorted(missing)))}")


@pytest.fixture(autouse=True)
def nothing_is_left() -> Iterator[None]:
    before = own_children()
    yield
    assert new_children(before) == []
    assert list(tops_of(own())) == []


def groups_in(controller: str) -> list[Path]:
    """List the groups of this process's containers."""
    (place,) = [one for one in hierarchies() if controller in one.controllers]
    return [group for group in place.top.glob("*") if group.is_dir() and group.name != PILOT_GROUP]


def limited(
    subject: Subject, *args: str, memory: int | None = None, cpus: float | None = None, pids: int | None = None
) -> Container:
    return replace(subject.container(*args), limits=Limits(memory, cpus, pids))


async def end_of(runtime: Runtime, container: Container) -> Exit:
    with trio.fail_after(PATIENCE):
        return await runtime.run(container)


async def output(runtime: Runtime, container: Container) -> bytes:
    assert await end_of(runtime, container) == Exit(0), container.stderr.read_text(errors="replace")
    return container.stdout.read_bytes()


# With control groups.


@children
@in_groups
async def test_a_task_that_exceeds_its_memory_ends_out_of_memory(subject: Subject, runtime: Runtime) -> None:
    assert await end_of(runtime, limited(subject, *ALLOCATE, memory=SMALL)) == Exit(137, out_of_memory=True)
    assert await end_of(runtime, limited(subject, *ALLOCATE, memory=8 * SMALL)) == Exit(0)


@children
@in_groups
async def test_a_task_that_survives_the_kill_of_a_child_can_succeed(subject: Subject, runtime: Runtime) -> None:
    script = f"{' '.join(ALLOCATE)}; exit "
    assert await end_of(runtime, limited(subject, "sh", "-c", script + "0", memory=SMALL)) == Exit(0)
    assert await end_of(runtime, limited(subject, "sh", "-c", script + "3", memory=SMALL)) == Exit(3, out_of_memory=True)


@children
@in_groups
async def test_a_task_cannot_exceed_its_number_of_processes(subject: Subject, runtime: Runtime) -> None:
    container = limited(subject, *MANY, pids=10)
    assert (await end_of(runtime, container)).code != 0
    assert b"fork" in container.stderr.read_bytes()


@children
@in_groups
async def test_processes_of_the_runtime_do_not_count(subject: Subject, runtime: Runtime) -> None:
    script = "for number in $(seq 9); do sleep 0.2 & done; wait"
    assert await end_of(runtime, limited(subject, "sh", "-c", script, pids=10)) == Exit(0)


@children
@in_groups
async def test_a_task_cannot_exceed_its_cpu_time(subject: Subject, runtime: Runtime) -> None:
    def is_throttled() -> bool:
        return any(
            "nr_throttled" in line and int(line.split()[1]) >= 5 for group in groups_in("cpu") for line in told(group)
        )

    def told(group: Path) -> list[str]:
        return (group / "cpu.stat").read_text().splitlines()

    async with trio.open_nursery() as nursery:
        nursery.start_soon(runtime.run, limited(subject, *SPIN, cpus=0.05))  # less than any machine has
        await until(is_throttled, "the task is not throttled")
        nursery.cancel_scope.cancel()


@children
@in_groups
async def test_cancelled_at_any_moment_no_group_is_left(subject: Subject, runtime: Runtime) -> None:
    for moment in MOMENTS:
        marked = Marked(subject, "sleep", "1000")
        marked.container = replace(marked.container, limits=Limits(SMALL, 1, 20))
        with trio.fail_after(PATIENCE), trio.move_on_after(moment):
            await runtime.run(marked.container)
        assert marked.processes() == []
        assert groups_in("memory") == groups_in("cpu") == groups_in("pids") == []


@in_groups
@pytest.mark.parametrize("subject", ["process"], indirect=True)
async def test_a_process_without_marker_and_session_is_found_by_its_group(subject: Subject, runtime: Runtime) -> None:
    naptime = f"1000.{time.time_ns()}"
    script = f"setsid env -i sleep {naptime} & until pgrep -f 'sleep {naptime}' > /dev/null; do sleep 0.01; done"
    assert await end_of(runtime, limited(subject, "sh", "-c", script, pids=20)) == Exit(0)
    assert not [pid for pid in own_children() if command_line(pid) == ["sleep", naptime]]


# A container can mount a hierarchy of control groups in a user namespace of its own, and owns what it sees there.
RAISE = textwrap.dedent("""
    import ctypes, os
    libc = ctypes.CDLL(None)
    libc.unshare(0x10000000 | 0x00020000 | 0x02000000)  # the user, mount and cgroup namespaces
    os.mkdir("groups")
    for kind, options in ((b"cgroup", b"memory"), (b"cgroup2", None)):
        if libc.mount(b"none", b"groups", kind, 0, options) == 0:
            print("mounted", flush=True)
        for name, value in (("memory.memsw.limit_in_bytes", "-1"), ("memory.limit_in_bytes", "-1"), ("memory.max", "max")):
            if os.path.exists(f"groups/{name}"):
                open(f"groups/{name}", "w").write(value)
    b"x" * 200_000_000
""")


@in_groups
@pytest.mark.parametrize("subject", ["bubblewrap-own-root"], indirect=True)
async def test_a_container_cannot_raise_its_limits(subject: Subject, nesting_runtime: Runtime) -> None:
    container = limited(subject, PYTHON, "-c", RAISE, memory=SMALL)
    assert await end_of(nesting_runtime, container) == Exit(137, out_of_memory=True), container.stderr.read_text()
    assert "mounted" in container.stdout.read_text()


@pytest.mark.parametrize("subject", ["bubblewrap-own-root"], indirect=True)
async def test_namespaces_of_its_own_are_refused_a_container(subject: Subject, nesting_runtime: Runtime) -> None:
    script = "unshare --user true && echo made; exit 0"
    assert await output(nesting_runtime, subject.container("sh", "-c", script)) == b"made\n"
    async with MODULES[subject.name].open_runtime(OPTIONS) as runtime:
        assert await output(runtime, subject.container("sh", "-c", script)) == b""


# Without control groups.


@children
@without_groups
async def test_without_control_groups_an_allocation_over_the_limit_fails(subject: Subject, runtime: Runtime) -> None:
    container = limited(subject, *ALLOCATE, memory=SMALL)
    assert await end_of(runtime, container) == Exit(1)
    assert b"memory" in container.stderr.read_bytes()
    assert await end_of(runtime, limited(subject, *ALLOCATE, memory=8 * SMALL)) == Exit(0)


@children
@without_groups
async def test_without_control_groups_limits_cannot_be_raised(subject: Subject, runtime: Runtime) -> None:
    script = "ulimit -v; (ulimit -v unlimited) 2> /dev/null; (ulimit -Hv 1000000) 2> /dev/null; ulimit -Hv"
    said = await output(runtime, limited(subject, "sh", "-c", script, memory=SMALL))
    assert said.split() == [b"65536"] * 2


@children
@without_groups
async def test_without_control_groups_a_task_has_whole_cpus(subject: Subject, runtime: Runtime) -> None:
    if len(os.sched_getaffinity(0)) < 2:
        pytest.skip("there is but one CPU")
    taken = [await cpus_of(subject, runtime, cpus) for cpus in (0.5, 1.9, 2, 1000)]
    assert [len(one) for one in taken] == [1, 1, 2, len(os.sched_getaffinity(0))]
    assert taken[0] != taken[1]


async def cpus_of(subject: Subject, runtime: Runtime, cpus: float) -> set[int]:
    said = await output(runtime, limited(subject, "grep", "Cpus_allowed_list", "/proc/self/status", cpus=cpus))
    ranges = [one.split("-") for one in said.decode().split()[1].split(",")]
    return {cpu for one in ranges for cpu in range(int(one[0]), int(one[-1]) + 1)}


UNPRIVILEGED_RUN = """
import ctypes, json, sys, trio
from dataclasses import replace
from pathlib import Path
from tests.support.containers import new_container
from trio_pilot.runtimes import confinement
from trio_pilot.runtimes import Limits, Options
from trio_pilot.runtimes import bubblewrap, process

async def main(directory, runtime, args, **limit):
    limit = Limits(**limit)
    container = replace(new_container(Path(directory), args), limits=limit)
    async with {"process": process, "bubblewrap": bubblewrap}[runtime].open_runtime(Options(0.3)) as opened:
        ended = await opened.run(container)
    said = container.stderr.read_text()
    print(json.dumps([ended.code, ended.out_of_memory, said, dict(await confinement.enforcement(limit))]))

given = json.loads(sys.argv[1])
ctypes.CDLL(None).prctl(47, 4, 0, 0, 0)  # what it takes to read Python is not for children: no ambient capabilities
trio.run(lambda: main(**given))
"""


@pytest.fixture
def open_directory() -> Iterator[Path]:
    with tempfile.TemporaryDirectory() as directory:
        Path(directory).chmod(0o777)
        yield Path(directory)


def run_unprivileged(directory: Path, runtime: str, *args: str, **limit: object) -> tuple[int, bool, str, dict[str, str]]:
    given = json.dumps({"directory": str(directory), "runtime": runtime, "args": args, **limit})
    done = subprocess.run(
        [*UNPRIVILEGED, sys.executable, "-c", UNPRIVILEGED_RUN, given],
        stdout=subprocess.PIPE,
        cwd=ROOT,
        timeout=PATIENCE,
        check=True,
    )
    code, out_of_memory, said, by = json.loads(done.stdout)
    return code, out_of_memory, said, by


@pytest.mark.parametrize("runtime_name", ["process", "bubblewrap"])
def test_rlimits_are_used_for_a_user_who_cannot_make_control_groups(
    request: pytest.FixtureRequest, open_directory: Path, runtime_name: str
) -> None:
    if runtime_name == "bubblewrap":
        request.getfixturevalue("bubblewrap_works")
    code, out_of_memory, said, by = run_unprivileged(open_directory, runtime_name, *MANY, pids=10)
    assert by["pids"].startswith("rlimit")
    assert (code != 0, out_of_memory) == (True, False)
    assert "fork" in said
    code, _, said, by = run_unprivileged(open_directory, runtime_name, *ALLOCATE, memory=SMALL)
    assert by["memory"].startswith("rlimit")
    assert code == 1
    assert "memory" in said


@pytest.fixture
def bubblewrap_works() -> None:
    from tests.support.images import bubblewrap_fault

    if fault := bubblewrap_fault():
        pytest.skip(f"bubblewrap does not work here: {fault}")


# With and without control groups.


@children
@with_either
async def test_limits_change_nothing_else(subject: Subject, runtime: Runtime) -> None:
    most = Limits(8 * SMALL, 1, 50)
    container = subject.container(
        "sh", "-c", 'printf "<%s>\\0" "$VALUE" "$@"; exit 42', "sh", *AWKWARD, env={"VALUE": AWKWARD[-2]}
    )
    assert await end_of(runtime, replace(container, limits=most)) == Exit(42)
    assert container.stdout.read_bytes() == b"".join(b"<%s>\0" % os.fsencode(one) for one in (AWKWARD[-2], *AWKWARD))
    said = await output(runtime, replace(subject.container("env", env={"VALUE": "1"}), limits=most))
    names = {line.partition("=")[0] for line in said.decode().splitlines()}
    added = {"PWD"} if subject.seen_scratch else set()  # bubblewrap's
    assert names - {"_"} == {"PATH", "HOME", "TMPDIR", "VALUE", MARKER} | added


@children
@with_either
@pytest.mark.parametrize("command", ["no-such-command", "/no/such/command", "-n", "two\nlines"])
async def test_with_limits_a_missing_command_is_the_tasks_fault(subject: Subject, runtime: Runtime, command: str) -> None:
    container = limited(subject, command, "argument", memory=8 * SMALL)
    assert await end_of(runtime, container) == Exit(127)
    assert error_summary(container.stderr).endswith(": No such file or directory")
    assert command in container.stderr.read_text()


@children
@with_either
async def test_with_limits_a_command_not_executable_is_the_tasks_fault(subject: Subject, runtime: Runtime) -> None:
    container = limited(subject, subject.a_plain_file, memory=8 * SMALL)
    assert await end_of(runtime, container) == Exit(126)
    assert error_summary(container.stderr).endswith(f"{subject.a_plain_file}: Permission denied")


@children
@with_either
@pytest.mark.parametrize("code", [125, 126, 127])
@pytest.mark.parametrize("line", ["no", "trio-pilot: no"])
async def test_exit_codes_of_a_shell_may_be_the_tasks_own(subject: Subject, runtime: Runtime, code: int, line: str) -> None:
    container = limited(subject, "sh", "-c", f"echo '{line}' >&2; exit {code}", pids=50)
    assert await end_of(runtime, container) == Exit(code)
    assert error_summary(container.stderr) == line


@children
@in_groups
@pytest.mark.parametrize(
    ("broken", "reason"),
    [(GroupsWithoutLimit, ".*No such file or directory"), (GroupsWithoutEntrance, f"trio-pilot: .*{NOWHERE}")],
)
async def test_limits_that_cannot_be_set_are_the_nodes_fault(subject: Subject, broken: OpenGroups, reason: str) -> None:
    async with MODULES[subject.name].open_runtime(OPTIONS, broken) as runtime:
        with pytest.raises(NodeError, match=rf"^cannot limit what a container uses: {reason}"):
            await end_of(runtime, limited(subject, "true", memory=SMALL))


@children
@without_groups
async def test_a_limit_that_is_not_enforced_is_logged_once(
    subject: Subject, runtime: Runtime, caplog: pytest.LogCaptureFixture
) -> None:
    if os.geteuid():
        pytest.skip("rlimits bind all but root")
    for _ in range(2):
        assert await end_of(runtime, limited(subject, "true", memory=8 * SMALL, pids=50)) == Exit(0)
    warnings = [record.getMessage() for record in caplog.records if NOT_ENFORCED in record.getMessage()]
    assert warnings == [
        "--task-pids is not enforced: there is no control group hierarchy for pids, and rlimits do not bind root"
    ]


async def test_without_limits_there_is_neither_a_shell_nor_a_group(tmp_path: Path) -> None:
    subject = Subject("process", lambda options: process.open_runtime(options), tmp_path)
    async with subject.open(OPTIONS) as runtime:
        assert confinement.Limiter(0).confine(subject.container("true")) is confinement.UNCONFINED
        await output(runtime, subject.container("true"))
        assert list(tops_of(own())) == []


# What dead pilots left.

PILOT = """
import subprocess, sys
from trio_pilot.processes import cgroups
group = cgroups.Groups().make("container", [cgroups.pids(10)])
(entrance,) = group.entrances
script = f"echo 0 > {entrance}; echo; exec sleep 1000 > /dev/null"
with subprocess.Popen(["sh", "-c", script]):
    sys.stdin.read()
"""


@contextmanager
def pilot_with_a_container() -> Iterator[tuple[int, Path]]:
    """Yield the pid of a process that has groups, and its own group. It lives, so other tests do not sweep them."""
    pilot = subprocess.Popen([sys.executable, "-c", PILOT], stdin=subprocess.PIPE, stdout=subprocess.PIPE, bufsize=0)
    try:
        assert pilot.stdout
        pilot.stdout.read(1)
        (place,) = [one for one in hierarchies() if "pids" in one.controllers]
        (top,) = [top for top in place.pilot_groups() if f".{pilot.pid}." in top.name]
        yield pilot.pid, top
    finally:
        cgroups.sweep(lambda one: one.pid == pilot.pid)
        pilot.communicate(timeout=PATIENCE)


@in_groups
def test_only_the_groups_of_the_given_pilots_are_swept() -> None:
    with pilot_with_a_container() as (number, top), pilot_with_a_container() as (other, others):
        (pid,) = map(int, (top / "container/payload/cgroup.procs").read_text().split())
        assert cgroups.sweep(lambda pilot: pilot.is_dead and pilot.pid in (number, other)) == 0
        assert command_line(pid) == ["sleep", "1000"]
        assert cgroups.sweep(lambda pilot: pilot.pid == number) == 1
        assert not top.exists()
        assert command_line(pid) == []
        assert (others / "container").exists()
    assert not others.exists()
