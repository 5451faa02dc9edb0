import os
import resource
import signal
import subprocess
import sys
from collections.abc import AsyncIterator, Iterator
from contextlib import asynccontextmanager, contextmanager, suppress
from pathlib import Path
from subprocess import DEVNULL, PIPE

import pytest
import trio

from tests.support.processes import open_files, own_children, processes_with
from tests.support.waiting import PATIENCE, until, until_sync
from trio_pilot.processes import descent
from trio_pilot.processes.children import Child, Children, Command, exit_code
from trio_pilot.processes.orphans import MARKER
from trio_pilot.processes.proc import environment_of, is_dying

TIDY_ENVIRONMENT = {"PATH": os.environ["PATH"]}


@pytest.fixture
def children() -> Children:
    return Children()


@pytest.fixture(autouse=True)
def nothing_is_left() -> Iterator[None]:
    before, files = own_children(), open_files()
    yield
    assert own_children() <= before
    assert open_files() == files


def spawn(children: Children, directory: Path, script: str, *arguments: str, marker: str = "some-marker") -> Child:
    with (directory / "stdout").open("ab") as stdout, (directory / "stderr").open("ab") as stderr:
        argv = ["sh", "-c", script, "sh", *arguments]
        return children.spawn(Command(argv, TIDY_ENVIRONMENT, directory, stdout, stderr, marker))


async def end(child: Child, grace: float = 0.0) -> None:
    with trio.fail_after(PATIENCE):
        await child.end(grace)


@asynccontextmanager
async def running(children: Children, directory: Path, script: str, *arguments: str) -> AsyncIterator[Child]:
    child = spawn(children, directory, script, *arguments)
    try:
        yield child
    finally:
        await end(child)


@pytest.mark.parametrize(("returncode", "code"), [(0, 0), (1, 1), (255, 255), (-9, 137), (-15, 143), (-64, 192)])
def test_death_by_signal_gives_the_exit_code_of_a_shell(returncode: int, code: int) -> None:
    assert exit_code(returncode) == code


async def test_a_child_that_was_started_is_no_orphan(children: Children, tmp_path: Path) -> None:
    async with running(children, tmp_path, "sleep 1000") as child:
        assert child.pid in own_children()
        assert child.pid not in children.orphans()
        assert child.pid not in Children().orphans()


async def test_a_grandchild_whose_parent_died_is_an_orphan(children: Children, tmp_path: Path) -> None:
    before = set(children.orphans())
    async with running(children, tmp_path, "setsid sleep 1000 & echo $! > pid; exit 3") as child:
        assert await child.wait() == 3
        assert set(children.orphans()) - before == {int((tmp_path / "pid").read_text())}
    assert set(children.orphans()) <= before


async def test_a_child_that_was_reaped_is_not_signalled(children: Children, tmp_path: Path) -> None:
    async with running(children, tmp_path, "exit 7") as child:
        assert await child.wait() == 7
        assert not child.running
        calls: list[object] = []
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(os, "killpg", lambda *call: calls.append(call))
            child.signal_group(signal.SIGKILL)
        assert calls == []
        assert await child.wait() == 7


async def test_a_child_that_exited_unnoticed_is_reaped_at_the_end(children: Children, tmp_path: Path) -> None:
    child = spawn(children, tmp_path, "exit 0")
    await until(lambda: is_zombie(child.pid))
    await end(child)
    assert not child.running


def is_zombie(pid: int) -> bool:
    return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] == "Z"


async def test_ending_goes_on_when_it_is_cancelled(children: Children, tmp_path: Path) -> None:
    child = spawn(children, tmp_path, "sleep 1000")
    with trio.CancelScope() as scope:
        scope.cancel()
        await end(child)
    assert not child.running


async def test_a_daemon_with_a_new_session_is_found_by_its_marker(children: Children, tmp_path: Path) -> None:
    async with running(children, tmp_path, "setsid sleep 1000 & echo $! > pid") as child:
        await child.wait()
        daemon = int((tmp_path / "pid").read_text())
        await until(lambda: os.getsid(daemon) == daemon)
    assert daemon not in own_children()


async def test_a_daemon_without_the_marker_is_found_by_its_session(children: Children, tmp_path: Path) -> None:
    async with running(children, tmp_path, f"env -u {MARKER} sleep 1000 & echo $! > pid") as child:
        await child.wait()
        daemon = int((tmp_path / "pid").read_text())
        await until(lambda: b"TRIO_PILOT" not in Path(f"/proc/{daemon}/environ").read_bytes())
    assert daemon not in own_children()


async def test_what_another_child_left_is_left_alone(children: Children, tmp_path: Path) -> None:
    other = spawn(children, tmp_path, "setsid sleep 1000 & echo $! > pid; exit 0", marker="another")
    await other.wait()
    daemon = int((tmp_path / "pid").read_text())
    async with running(children, tmp_path, "true") as child:
        await child.wait()
    assert daemon in children.orphans()
    await end(other)
    assert daemon not in own_children()


async def test_daemons_that_ended_by_themselves_leave_no_zombies(children: Children, tmp_path: Path) -> None:
    script = "setsid sh -c 'until test -e go; do sleep 0.01; done' & echo $! > pid"  # else the shell might reap it
    async with running(children, tmp_path, script) as child:
        await child.wait()
        (tmp_path / "go").touch()
        daemon = int((tmp_path / "pid").read_text())
        await until(lambda: is_zombie(daemon))
    assert daemon not in own_children()


async def test_large_daemons_with_children_are_gone_with_them(tmp_path: Path) -> None:
    children = Children(death_interval=10 * PATIENCE)  # a death is reported by a pidfd: there is no need to poll
    # A dying process has no environment, and takes a while if it is large; only then are its children the pilot's.
    code = (
        "import os, subprocess, sys; ballast = bytearray(b'x' * 2**28);"
        "child = subprocess.Popen(['setsid', 'sleep', '1000']);"
        "open('ready.part', 'w').write(str(child.pid)); os.rename('ready.part', 'ready'); child.wait()"
    )
    script = f'setsid {sys.executable} -c "$1" & until test -e ready; do sleep 0.01; done'
    async with running(children, tmp_path, script, code) as child:
        assert await child.wait() == 0
        grandchild = int((tmp_path / "ready").read_text())
    with pytest.raises(ProcessLookupError):
        os.kill(grandchild, 0)


async def test_a_chain_of_forking_processes_is_ended(children: Children, tmp_path: Path) -> None:
    code = (
        "import os, time\n"
        "open('ready', 'w').close()\n"
        "while True:\n"
        "    time.sleep(0.003)\n"
        "    if os.fork(): os._exit(0)\n"
        "    os.setsid()\n"
    )
    script = f'{sys.executable} -c "$1" & until test -e ready; do sleep 0.01; done'
    async with running(children, tmp_path, script, code) as child:
        await child.wait()
    await trio.sleep(0.02)  # a process that escaped would have forked again by now
    assert processes_with(str(tmp_path)) == []


# A daemon of which neither session nor environment tell where it comes from; `prlimit` changes the number it has inherited.
UNKNOWN = 'env -i "$(command -v setsid)" {prefix} "$(command -v sleep)" 1000 & echo $! > pid; until test -s pid; do :; done'


async def leave_daemon(children: Children, directory: Path, prefix: str = "") -> tuple[Child, int]:
    child = spawn(children, directory, UNKNOWN.format(prefix=prefix))
    await child.wait()
    daemon = int((directory / "pid").read_text())
    await until(lambda: Path(f"/proc/{daemon}/cmdline").read_bytes().startswith(b"/") and os.getsid(daemon) == daemon)
    await until(lambda: b"sleep" in Path(f"/proc/{daemon}/comm").read_bytes())
    await end(child)
    return child, daemon


async def test_a_daemon_without_marks_is_ended_with_its_task(children: Children, tmp_path: Path) -> None:
    async with running(children, tmp_path, "sleep 1000"):
        child, daemon = await leave_daemon(children, tmp_path)
        assert children.strays() == [daemon]
        await children.end_strays(child)
        assert daemon not in own_children()


async def test_a_stray_lives_until_no_child_runs(children: Children, tmp_path: Path) -> None:
    async with running(children, tmp_path, "sleep 1000"):
        child, daemon = await leave_daemon(children, tmp_path, "$(command -v prlimit) --locks=7:7")
        await children.end_strays(child)
        assert children.strays() == [daemon]
    await children.end_strays(child)
    assert daemon not in own_children()


async def test_daemons_of_a_running_child_are_no_strays(children: Children, tmp_path: Path) -> None:
    script = UNKNOWN.format(prefix="") + "; sleep 1000"
    async with running(children, tmp_path, f"({script}) & sleep 0.1; kill $!; sleep 1000") as child:
        await until(lambda: len(children.orphans()) == 1)
        assert children.strays() == []
    await children.end_strays(child)


async def test_orphans_are_reaped_as_soon_as_they_have_ended(children: Children, tmp_path: Path) -> None:
    script = 'for number in 1 2 3 4 5; do (env -i "$(command -v setsid)" "$(command -v true)" &); done; sleep 1000'
    before = own_children()
    with children.reaping():
        async with running(children, tmp_path, script) as child:
            await until(lambda: own_children() - before == {child.pid})
        signal.raise_signal(signal.SIGCHLD)
    assert signal.getsignal(signal.SIGCHLD) is signal.SIG_DFL


async def test_what_a_child_inherits_is_not_left_with_this_process(children: Children, tmp_path: Path) -> None:
    before = resource.getrlimit(descent.RLIMIT_LOCKS)
    async with running(children, tmp_path, "sleep 1000") as child:
        assert descent.number_of(child.pid) not in (None, before[0])
        assert descent.is_descendant(child.pid)
    assert resource.getrlimit(descent.RLIMIT_LOCKS) == before
    assert not descent.is_descendant(1)


def test_the_environment_of_a_process_that_has_just_died_is_unknown() -> None:
    with subprocess.Popen(["true"]) as process:
        until_sync(lambda: is_dying(process.pid))
        assert environment_of(process.pid) is None


async def test_no_pidfd_is_leaked(children: Children, tmp_path: Path) -> None:
    before = open_files()
    for _ in range(20):
        async with running(children, tmp_path, "true") as child:
            await child.wait()
    assert open_files() == before


async def test_a_command_that_cannot_be_started_leaves_nothing(children: Children, tmp_path: Path) -> None:
    with (tmp_path / "out").open("wb") as out, pytest.raises(FileNotFoundError):
        children.spawn(Command(["/does/not/exist"], {}, tmp_path, out, out, "marker"))


async def test_a_child_without_a_file_descriptor_for_it_is_killed(children: Children, tmp_path: Path) -> None:
    before = own_children()
    with (tmp_path / "out").open("wb") as out:
        command = Command(["sleep", "1000"], TIDY_ENVIRONMENT, tmp_path, out, out, "marker")
        with few_file_descriptors(left=0), pytest.raises(OSError, match="Too many open files"):
            children.spawn(command)
        # Popen itself needs more of them for a moment than a pidfd does; so pidfd_open is replaced.
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(os, "pidfd_open", too_many_open_files)
            with pytest.raises(OSError, match="Too many open files"):
                children.spawn(command)
    assert own_children() == before


def too_many_open_files(_pid: int) -> int:
    raise OSError(24, "Too many open files")


@contextmanager
def few_file_descriptors(left: int) -> Iterator[None]:
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    highest = max(int(entry.name) for entry in Path("/proc/self/fd").iterdir())
    resource.setrlimit(resource.RLIMIT_NOFILE, (highest + 1 + left, hard))
    filling = []
    try:
        while True:
            filling.append(os.dup(0))
    except OSError:
        yield
    finally:
        for descriptor in filling:
            os.close(descriptor)
        resource.setrlimit(resource.RLIMIT_NOFILE, (soft, hard))


# Tests of what changes a whole process, each in a process of its own.

STRAY = """
import os, subprocess, sys, trio
from pathlib import Path
from trio_pilot.processes import descent
from trio_pilot.processes.children import Children, Command, end_all_children

async def main():
    script = "env -i setsid sleep 1000 & echo $! > pid"
    with open("out", "wb") as out:
        child = Children().spawn(Command(["sh", "-c", script], dict(os.environ), Path("."), out, out, "marker"))
        await child.wait()
        while int(Path("pid").read_text()) != os.getsid(int(Path("pid").read_text())):
            await trio.sleep(0.01)
        await child.end(0)

try:
    trio.run(main)
    print(Path("pid").read_text(), Path(f"/proc/{Path('pid').read_text().strip()}").exists(), flush=True)
finally:
    end_all_children()
print(Path(f"/proc/self/task/{os.getpid()}/children").read_text().split(), flush=True)
"""


def test_a_stray_without_session_and_environment_is_ended_at_the_exit(tmp_path: Path) -> None:
    done = subprocess.run([sys.executable, "-c", STRAY], cwd=tmp_path, capture_output=True, text=True, timeout=PATIENCE)
    assert done.stderr == ""
    pid, lived, left = done.stdout.split(maxsplit=2)
    assert lived == "True", "the test shows nothing: the stray was gone before"
    assert left.strip() == "[]"
    assert not Path(f"/proc/{pid}").exists()


FROM_BEFORE = """
import os, subprocess, trio
from pathlib import Path
from trio_pilot.processes import descent
from trio_pilot.processes.children import Children, Command

async def main():
    children, helper = Children(), int(Path("pid").read_text())
    own = subprocess.Popen(["sleep", "1000"])
    print(helper in children.orphans(), own.pid in children.orphans())
    own.kill()
    own.wait()
    with open("out", "wb") as out:
        await children.spawn(Command(["true"], dict(os.environ), Path("."), out, out, "marker")).end(0)

trio.run(main)
"""


def test_children_from_before_an_exec_are_no_orphans(tmp_path: Path) -> None:
    script = 'sleep 1000 > /dev/null 2>&1 & echo $! > pid; exec "$0" -c "$1"'
    command = ["sh", "-c", script, sys.executable, FROM_BEFORE]
    done = subprocess.run(command, cwd=tmp_path, check=True, timeout=PATIENCE, capture_output=True, text=True)
    assert done.stdout == "False True\n"
    helper = int((tmp_path / "pid").read_text())
    assert not is_zombie(helper)
    kill_and_reap(helper)


def test_what_was_started_before_this_program_is_not_ended_with_it(tmp_path: Path) -> None:
    program = "from trio_pilot.processes import children; children.end_all_children()"
    script = f'sleep 1000 & echo $! > pid; exec "$0" -c "{program}"'
    subprocess.run(["sh", "-c", script, sys.executable], cwd=tmp_path, check=True, timeout=PATIENCE, stdout=DEVNULL)
    helper = int((tmp_path / "pid").read_text())
    assert not is_zombie(helper)
    kill_and_reap(helper)


HELPERS = {
    "a child": "sleep 1000 & echo $! > pid",
    "an orphan": "(sh -c 'sleep 1000 & echo $! > pid' &); until test -s pid; do :; done",
    "what a helper starts later": "(sleep 0.7; sleep 1000 & echo $! > pid) &",
    "what it starts in a new session": "(sleep 0.7; setsid sleep 1000 & echo $! > pid) &",
    "what it starts without a trace": "(sleep 0.7; env -i $(command -v setsid) $(command -v sleep) 1000 & echo $! > pid) &",
}

A_TASK_AND_AN_END = """
import os, subprocess, sys, time, trio
from pathlib import Path
from trio_pilot.processes.children import Children, Command, end_all_children

async def main():
    children = Children()
    with open("out", "wb") as out:
        script = "env -i setsid sleep 1000 & echo $! > stray"
        child = children.spawn(Command(["sh", "-c", script], dict(os.environ), Path("."), out, out, "marker"))
        await child.wait()
        while not Path("pid").exists() or not Path("pid").read_text():
            await trio.sleep(0.01)
        await trio.sleep(0.1)
        await child.end(0)
        await children.end_strays(child)

try:
    trio.run(main)
finally:
    end_all_children()
"""


@pytest.mark.parametrize("helper", HELPERS.values(), ids=HELPERS.keys())
def test_what_was_there_before_and_all_that_it_starts_is_left_alone(tmp_path: Path, helper: str) -> None:
    command = ["sh", "-c", f'{helper}\nexec "$0" -c "$1"', sys.executable, A_TASK_AND_AN_END]
    done = subprocess.run(command, cwd=tmp_path, check=True, timeout=PATIENCE, stdout=DEVNULL, stderr=subprocess.DEVNULL)
    assert done.returncode == 0
    pid, stray = (int((tmp_path / name).read_text()) for name in ("pid", "stray"))
    assert not Path(f"/proc/{stray}").exists()
    assert not is_zombie(pid)
    kill_and_reap(pid)
    Children.reap()


SIGCHLD_IGNORED = """
import os, sys, trio
from pathlib import Path
from trio_pilot.processes import descent
from trio_pilot.processes.children import Children, Command

async def main():
    with open(os.devnull, "wb") as null:
        child = Children().spawn(Command(["sh", "-c", "exit 7"], dict(os.environ), Path("."), null, null, "marker"))
    try:
        return await child.wait()
    finally:
        await child.end(0)

sys.exit(trio.run(main))
"""


def test_exit_codes_are_right_though_sigchld_was_ignored_at_the_start(tmp_path: Path) -> None:
    starter = "import os, signal, sys; signal.signal(signal.SIGCHLD, signal.SIG_IGN); os.execv(sys.argv[1], sys.argv[1:])"
    done = subprocess.run(
        [sys.executable, "-c", starter, sys.executable, "-c", SIGCHLD_IGNORED],
        cwd=tmp_path,
        stdout=PIPE,
        timeout=PATIENCE,
        check=False,
    )
    assert done.returncode == 7


SIGKILLED = """
import os, sys, trio
from pathlib import Path
from trio_pilot.processes import descent
from trio_pilot.processes.children import Children, Command

async def main():
    with open(os.devnull, "wb") as null:
        Children().spawn(Command(["sh", "-c", "echo $$ > pid.part; mv pid.part pid; exec sleep 1000"],
                                 dict(os.environ), Path("."), null, null, "marker"))
    await trio.sleep_forever()

trio.run(main)
"""


def test_a_child_has_a_session_of_its_own_and_nothing_to_read(tmp_path: Path) -> None:
    pilot = subprocess.Popen([sys.executable, "-c", SIGKILLED], cwd=tmp_path)
    until_sync((tmp_path / "pid").exists)
    pid = int((tmp_path / "pid").read_text())
    assert os.getsid(pid) == pid != os.getsid(pilot.pid)
    assert os.readlink(f"/proc/{pid}/fd/0") == "/dev/null"  # noqa: PTH115
    pilot.kill()
    pilot.wait()
    kill_and_reap(pid)


def kill_and_reap(pid: int) -> None:
    os.kill(pid, signal.SIGKILL)
    with suppress(ChildProcessError):  # it is the child of another subreaper
        os.waitpid(pid, 0)
