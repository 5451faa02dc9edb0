import itertools
import os
import re
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
import uuid
from collections.abc import AsyncIterator, Callable, Iterable, Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path

import pytest
import trio

from tests.contract.runtimes.subjects import Subject, all_of_them, isolating_ones, pretend, real_ones, those_without_root
from tests.support.containers import new_container
from tests.support.images import bubblewrap_fault
from tests.support.processes import command_line, new_children, open_files, own_children, processes_with
from tests.support.waiting import PATIENCE, until
from trio_pilot.errors import NodeError
from trio_pilot.files.error_summary import error_summary
from trio_pilot.processes.orphans import MARKER
from trio_pilot.runtimes import Container, Mount, Options, Runtime, bubblewrap, process
from trio_pilot.runtimes.bubblewrap_root import root_of
from trio_pilot.settings import Settings
from trio_pilot.testing import FakeRuntime

KILL_GRACE = 0.3  # seconds
OPTIONS = Options(KILL_GRACE)


@pytest.fixture
async def runtime(subject: Subject) -> AsyncIterator[Runtime]:
    async with subject.open(OPTIONS) as runtime:
        await runtime.prepare(subject.image)
        yield runtime


@pytest.fixture(autouse=True)
def nothing_is_left(request: pytest.FixtureRequest) -> Iterator[None]:
    if "subject" in request.fixturenames:
        request.getfixturevalue("subject")  # an engine is started once, and runs to the end of all tests
    before, files = own_children(), open_files()
    yield
    assert new_children(before) == []
    assert open_files() <= files, "file descriptors are left open"


async def run(runtime: Runtime, container: Container) -> int:
    with trio.fail_after(PATIENCE):
        return (await runtime.run(container)).code


async def output(runtime: Runtime, container: Container) -> bytes:
    code = await run(runtime, container)
    assert code == 0, (code, container.stderr.read_text(errors="replace"))
    return container.stdout.read_bytes()


# Exit codes.


@all_of_them
@pytest.mark.parametrize("code", [0, 1, 2, 42, 125, 126, 127, 128, 137, 254, 255])
async def test_the_exit_code_is_that_of_the_payload(subject: Subject, runtime: Runtime, code: int) -> None:
    assert await run(runtime, subject.container("sh", "-c", f"exit {code}")) == code


@real_ones
@pytest.mark.parametrize("number", [signal.SIGKILL, signal.SIGTERM, signal.SIGUSR1, signal.SIGPIPE, signal.SIGABRT])
async def test_death_by_a_signal_is_128_and_its_number(subject: Subject, runtime: Runtime, number: int) -> None:
    container = subject.container("sh", "-c", f"ulimit -c 0; kill -{int(number)} $$; sleep 1000")
    assert await run(runtime, container) == 128 + number


@real_ones
@pytest.mark.parametrize("command", ["no-such-command", "/no/such/command", "two\nlines", "{a plain file}/x"])
async def test_a_missing_command_ends_with_127_and_a_reason(subject: Subject, runtime: Runtime, command: str) -> None:
    command = command.replace("{a plain file}", subject.a_plain_file)
    container = subject.container(command, "argument")
    assert await run(runtime, container) == 127
    assert command in container.stderr.read_text()
    assert error_summary(container.stderr).endswith((": No such file or directory", ": Not a directory"))


@real_ones
@pytest.mark.parametrize("command", ["{a plain file}", "/etc"])
async def test_a_command_not_executable_ends_with_126_and_a_reason(subject: Subject, runtime: Runtime, command: str) -> None:
    command = command.replace("{a plain file}", subject.a_plain_file)
    container = subject.container(command)
    assert await run(runtime, container) == 126
    assert error_summary(container.stderr).endswith(f"{command}: Permission denied")


@real_ones
async def test_a_pinned_container_runs_on_its_cpus_and_this_process_on_all(subject: Subject, runtime: Runtime) -> None:
    allowed = os.sched_getaffinity(0)
    container = subject.container("sh", "-c", "sed -n 's/Cpus_allowed_list:.//p' /proc/self/status")
    assert await output(runtime, replace(container, cpu_set=(max(allowed),))) == f"{max(allowed)}\n".encode()
    assert os.sched_getaffinity(0) == allowed


@real_ones
async def test_a_plain_container_can_check_whether_a_command_is_there(subject: Subject, runtime: Runtime) -> None:
    assert await run(runtime, replace(subject.container("true"), without_entrypoint=True)) == 0
    missing = replace(subject.container("no-such-command"), without_entrypoint=True)
    assert await run(runtime, missing) == 127
    assert error_summary(missing.stderr).endswith(": No such file or directory")


# Input and output.


@real_ones
async def test_stdout_and_stderr_are_not_swapped(subject: Subject, runtime: Runtime) -> None:
    container = subject.container("sh", "-c", "echo to-stdout; echo to-stderr >&2")
    assert await output(runtime, container) == b"to-stdout\n"
    assert container.stderr.read_bytes() == b"to-stderr\n"


AWKWARD = [
    *("", " ", "a b", " both ends ", "it's", '"quoted"', "line\nbreak\n", "\t", "\r\n", "a,b=c", "x=1", "=", ","),
    *("-", "--", "--help", "-n", "$HOME", "`id`", "$(id)", "; exit 3", "| > < & && * ? ~ !", "\\", "\\n", "%s"),
    *("é漢\U0001f30c", os.fsdecode(b"\xff\xfe"), "x" * 10_000),
]


@real_ones
async def test_arguments_arrive_exactly(subject: Subject, runtime: Runtime) -> None:
    words = list(filter(subject.carries, AWKWARD))
    container = subject.container("sh", "-c", 'printf "<%s>\\0" "$@"', "sh", *words)
    assert await output(runtime, container) == b"".join(b"<%s>\0" % os.fsencode(one) for one in words)


@real_ones
async def test_no_shell_sees_the_arguments(subject: Subject, runtime: Runtime) -> None:
    container = subject.container("echo", "$HOME", "*", ";", "exit", "3")
    assert await output(runtime, container) == b"$HOME * ; exit 3\n"


@real_ones
async def test_stdin_is_empty(subject: Subject, runtime: Runtime) -> None:
    assert await output(runtime, subject.container("cat")) == b""


@real_ones
async def test_a_large_stdout_is_complete(subject: Subject, runtime: Runtime) -> None:
    container = subject.container("dd", "if=/dev/zero", "bs=1048576", "count=64")
    assert await run(runtime, container) == 0
    assert container.stdout.stat().st_size == 64 * 2**20


# The environment.


@real_ones
async def test_the_environment_is_built_from_nothing(
    subject: Subject, runtime: Runtime, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("EWMS_PILOT_QUEUE_INCOMING_AUTH_TOKEN", "a-secret")
    monkeypatch.setenv("SOMETHING", "a-secret")
    said = await output(runtime, subject.container("env", env={"MINE": "yes"}))
    names = {line.partition(b"=")[0].decode() for line in said.splitlines()}
    names = {name for name in names if not re.fullmatch(subject.adds, name)}
    assert b"a-secret" not in said
    assert {"PATH", "HOME", "TMPDIR", "MINE"} <= names <= {"PATH", "HOME", "TMPDIR", "MINE", "PWD", MARKER}


@real_ones
async def test_values_of_variables_arrive_exactly(subject: Subject, runtime: Runtime) -> None:
    values = list(filter(subject.carries, AWKWARD))
    env = {f"VALUE{number}": value for number, value in enumerate(values)}
    container = subject.container("sh", "-c", "printf '<%s>' " + " ".join(f'"${name}"' for name in env), env=env)
    assert await output(runtime, container) == b"".join(b"<%s>" % os.fsencode(value) for value in values)


@real_ones
async def test_values_that_are_not_utf_8_are_refused_or_arrive(subject: Subject, runtime: Runtime) -> None:
    for value in (value for value in AWKWARD if not subject.carries(value)):
        with pytest.raises(NodeError, match="must be UTF-8"):
            await run(runtime, subject.container("true", env={"VALUE": value}))


@real_ones
async def test_a_task_may_replace_variables_of_the_runtime(subject: Subject, runtime: Runtime) -> None:
    env = {"HOME": "/etc", "PATH": "/bin:/usr/bin"}
    assert await output(runtime, subject.container("sh", "-c", 'echo "$HOME $PATH"', env=env)) == b"/etc /bin:/usr/bin\n"


@real_ones
async def test_the_scratch_directory_is_home_tmpdir_and_working_directory(subject: Subject, runtime: Runtime) -> None:
    container = subject.container("sh", "-c", 'pwd; echo "$HOME"; echo "$TMPDIR"; echo data > file; echo more > $HOME/other')
    assert (await output(runtime, container)).decode().split() == [subject.seen(container)] * 3
    assert (container.scratch / "file").read_text() == "data\n"
    assert (container.scratch / "other").read_text() == "more\n"


# Isolation.


@contextmanager
def other_process(secret: str) -> Iterator[None]:
    """Run another process with a secret in its environment and its command line."""
    command = [sys.executable, "-c", "import time; time.sleep(1000)", secret]
    other = subprocess.Popen(command, env={"SECRET": secret})
    try:
        yield
    finally:
        other.kill()
        other.wait()


@isolating_ones
async def test_a_task_sees_no_processes_but_its_own(subject: Subject, runtime: Runtime) -> None:
    with other_process("a-secret-of-others"):
        script = "cat /proc/[0-9]*/environ /proc/[0-9]*/cmdline | tr '\\0' '\\n'; echo /proc/[0-9]*"
        said = (await output(runtime, subject.container("sh", "-c", script))).decode()
    assert "a-secret" not in said
    assert len(said.splitlines()[-1].split()) <= 5
    assert f"/proc/{os.getpid()} " not in said


@those_without_root
async def test_a_task_has_no_capabilities_and_cannot_undo_its_isolation(subject: Subject, runtime: Runtime) -> None:
    script = (
        "grep -E '^Cap(Inh|Prm|Eff|Amb)' /proc/self/status; mount -o remount,rw /bin && echo remounted;"
        "umount -l /proc && echo unmounted; touch /etc/written && echo written; touch /written && echo written;"
        "echo 0 > /proc/sys/kernel/sysrq && echo written; exit 0"
    )
    said = await output(runtime, subject.container("sh", "-c", script))
    assert said.split() == b"CapInh: 0000000000000000 CapPrm: 0000000000000000".split() + (
        b"CapEff: 0000000000000000 CapAmb: 0000000000000000".split()
    )


@isolating_ones
@pytest.mark.parametrize("name", ["vm/swappiness", "kernel/core_pattern", "kernel/panic"])
async def test_a_task_cannot_write_what_the_kernel_is_set_to(subject: Subject, runtime: Runtime, name: str) -> None:
    script = f"cat /proc/sys/{name}; cat /proc/sys/{name} > /proc/sys/{name} && echo written; exit 0"
    said = await output(runtime, subject.container("sh", "-c", script))
    assert said == await trio.Path("/proc/sys", name).read_bytes()


@isolating_ones
async def test_without_a_network_no_socket_of_this_machine_is_reached(subject: Subject) -> None:
    with socket.socket(socket.AF_UNIX) as abstract, socket.socket() as server:
        abstract.bind(f"\0{(name := uuid.uuid4().hex)}")
        abstract.listen()
        server.bind(("127.0.0.1", 0))
        server.listen()
        script = (
            'grep -c : /proc/net/dev; nc -w 1 127.0.0.1 "$1" < /dev/null && echo reached; grep "$2" /proc/net/unix; exit 0'
        )
        container = subject.container("sh", "-c", script, "sh", str(server.getsockname()[1]), name)
        async with subject.open(replace(OPTIONS, network="none")) as runtime:
            await runtime.prepare(subject.image)
            assert await output(runtime, container) == b"1\n"  # the loopback


@isolating_ones
async def test_secrets_are_hidden_where_a_mount_contains_them(subject: Subject, external: Path) -> None:
    (external / "token").write_text("a-secret")
    (external / "data").mkdir()
    (external / "data/file").write_text("a-secret")
    (external.parent / "link").symlink_to(external)
    hidden = (external.parent / "link/token", external / "data", external / "missing")
    container = subject.container(
        *(
            "sh",
            "-c",
            'cat "$1/plain" "$1/token" "$1/data/file" "$2/token"; ls "$1/data"; exit 0',
            "sh",
            str(external),
            "/seen",
        ),
        mounts=[Mount(external, str(external)), Mount(external.parent / "link", "/seen")],
    )
    async with subject.open(replace(OPTIONS, hidden=hidden)) as runtime:
        await runtime.prepare(subject.image)
        assert await output(runtime, container) == b"plain"


@pytest.fixture
def external() -> Iterator[Path]:
    if not os.access("/opt", os.W_OK):
        pytest.skip("this user cannot write below /opt, which no container has of its own")
    with tempfile.TemporaryDirectory(dir="/opt", prefix="trio-pilot-test-") as directory:
        Path(directory).chmod(0o755)
        (Path(directory) / "external").mkdir()
        (Path(directory) / "external/plain").write_text("plain")
        yield Path(directory) / "external"


@isolating_ones
async def test_threads_start_in_spite_of_the_filter_of_system_calls(subject: Subject, runtime: Runtime) -> None:
    if subject.image != "/":
        return  # the image has no program with threads
    program = "import threading; one = threading.Thread(target=print, args=['ran']); one.start(); one.join()"
    assert await output(runtime, subject.container("python3", "-c", program)) == b"ran\n"


@isolating_ones
async def test_a_task_inherits_no_file_descriptors(subject: Subject, runtime: Runtime) -> None:
    # It could write to the pipe for bubblewrap's status, for example.
    said = await output(runtime, subject.container("ls", "-l", "/proc/self/fd"))
    links = dict(line.split()[-3::2] for line in said.decode().splitlines() if " -> " in line)
    assert links.pop("0") == "/dev/null"
    del links["1"], links["2"]  # stdout and stderr, which may be pipes
    assert all(re.fullmatch(r"/proc/\d+/fd", link) for link in links.values()), links  # what `ls` itself has open


@isolating_ones
async def test_a_task_has_a_run_and_dev_of_its_own(subject: Subject, runtime: Runtime) -> None:
    said = await output(
        runtime,
        subject.container(
            "sh", "-c", "ls /run | grep -vx podman-init; echo x > /dev/null; touch /dev/shm/x; test -e /dev/zero"
        ),
    )
    assert said == b""


async def test_the_envfile_with_the_pilots_tokens_is_hidden(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    if fault := bubblewrap_fault():
        pytest.skip(f"bubblewrap does not work here: {fault}")
    with tempfile.TemporaryDirectory(dir="/var/cache") as cwd:
        monkeypatch.chdir(cwd)
        envfile = Path(cwd, "ewms_htcondor_envfile.sh")
        await trio.Path(envfile).write_text("export EWMS_PILOT_QUEUE_INCOMING_AUTH_TOKEN='a-secret'\n")
        async with bubblewrap.open_runtime(Settings().runtime_options) as runtime:
            container = new_container(tmp_path, ["sh", "-c", f"ls {cwd}; cat {envfile} || true"])
            assert await output(runtime, container) == b"ewms_htcondor_envfile.sh\n"


async def test_empty_directories_of_an_image_are_made_and_not_mounted(tmp_path: Path, image: Path) -> None:
    if fault := bubblewrap_fault():
        pytest.skip(f"bubblewrap does not work here: {fault}")
    options = list(root_of(image, ()).options)
    assert options[options.index("/home") - 1] == "--dir"
    assert str(image / "home") not in options
    assert "--dir" not in root_of(Path("/"), ()).options  # something may yet be mounted there
    async with bubblewrap.open_runtime(OPTIONS) as runtime:
        script = "ls -d /home /home/* /etc/this*; touch /home/new || echo no"
        container = new_container(tmp_path, ["sh", "-c", script], image=str(image))
        assert await output(runtime, container) == b"/etc/this-is-the-image\n/home\nno\n"


# Mounts.


def a_directory(parent: Path, name: str = "source") -> Path:
    (directory := parent / name).mkdir()
    (directory / "file").write_text("content")
    return directory


TARGETS = ["/ewms-pilot-data/task-io", "/data", "/home/someone/da ta", "/usr/share/new/deep", "/tmp/new/deep", "/a,b=c/d"]


@isolating_ones
@pytest.mark.parametrize("target", TARGETS)
async def test_a_writable_mount_is_at_its_target_and_can_be_written(
    subject: Subject, runtime: Runtime, tmp_path: Path, target: str
) -> None:
    source = a_directory(tmp_path, "so,ur=ce é")
    script = 'cat "$1/file"; echo new > "$1/made"; rm "$1/file"'
    container = subject.container("sh", "-c", script, "sh", target, mounts=[Mount(source, target, writable=True)])
    assert await output(runtime, container) == b"content"
    assert [entry.name for entry in source.iterdir()] == ["made"]


@isolating_ones
@pytest.mark.parametrize("target", TARGETS)
async def test_a_read_only_mount_is_at_its_target_and_cannot_be_written(
    subject: Subject, runtime: Runtime, tmp_path: Path, target: str
) -> None:
    source = a_directory(tmp_path)
    script = 'cat "$1/file"; touch "$1/made" || rm -f "$1/file" || mount -o remount,rw "$1" || echo " and no more"'
    container = subject.container("sh", "-c", script, "sh", target, mounts=[Mount(source, target)])
    assert await output(runtime, container) == b"content and no more\n"
    assert [entry.name for entry in source.iterdir()] == ["file"]
    assert b"Read-only file system" in container.stderr.read_bytes()


@isolating_ones
async def test_many_mounts_go_together_and_the_rest_of_the_image_stays(
    subject: Subject, runtime: Runtime, tmp_path: Path
) -> None:
    mounts = [Mount(a_directory(tmp_path, str(number)), target) for number, target in enumerate(TARGETS)]
    script = 'for target; do cat "$target/file"; done; test -e "$0" && test -d /etc && ls /bin/sh > /dev/null'
    container = subject.container("sh", "-c", script, subject.a_plain_file, *TARGETS, mounts=mounts)
    assert await output(runtime, container) == b"content" * len(TARGETS)


@isolating_ones
@pytest.mark.parametrize("parent", ["/tmp", "/home", "/var/tmp"])
async def test_external_directories_are_at_the_same_path_and_read_only(
    subject: Subject, runtime: Runtime, parent: str
) -> None:
    if not os.access(parent, os.W_OK):
        pytest.skip(f"{parent} cannot be written by this user")
    with tempfile.TemporaryDirectory(dir=parent) as directory:
        source = a_directory(Path(directory))
        script = 'cat "$1/file"; touch "$1/made"; echo own > "$HOME/file"'
        container = subject.container("sh", "-c", script, "sh", str(source), mounts=[Mount(source, str(source))])
        assert await output(runtime, container) == b"content"
        assert [entry.name for entry in source.iterdir()] == ["file"]


@isolating_ones
async def test_a_mount_whose_directory_is_gone_is_the_nodes_fault(
    subject: Subject, runtime: Runtime, tmp_path: Path
) -> None:
    container = subject.container("true", mounts=[Mount(tmp_path / "gone", "/data")])
    line = rf"^{runtime.name} could not make the container: .*/gone(: [Nn]o such file or directory| doesn't exist|)$"
    with pytest.raises(NodeError, match=line):
        await run(runtime, container)


@isolating_ones
async def test_an_image_that_is_not_there_is_the_nodes_fault(subject: Subject, runtime: Runtime, tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    for missing, why in zip(("missing", "file"), subject.refusals, strict=True):
        image = str(tmp_path / missing)
        line = f"{image}.*{why}|{why}.*{image}"
        with pytest.raises(NodeError, match=line):
            await runtime.prepare(image)
        with pytest.raises(NodeError, match=line):
            await run(runtime, new_container(tmp_path, ["true"], image=image))


@real_ones
@pytest.mark.parametrize("gone", ["scratch", "stdout"])
async def test_a_task_directory_that_is_gone_is_the_nodes_fault(subject: Subject, runtime: Runtime, gone: str) -> None:
    container = subject.container("true")
    shutil.rmtree(container.scratch if gone == "scratch" else container.stdout.parent)
    with pytest.raises(NodeError):
        await run(runtime, container)


def test_the_status_of_bubblewrap_is_read_in_any_pieces() -> None:
    said = b'{ "child-pid": 42, "pid-namespace": 4026531836 }\n{ "exit-code": 3 }\n'
    for cut in range(len(said)):
        with bubblewrap.StatusPipe() as status:
            os.write(status.writing, said[:cut])
            early = dict(status.read())
            assert early in ({}, {"child-pid": 42, "pid-namespace": 4026531836})
            os.write(status.writing, said[cut:])
            assert status.read()["exit-code"] == 3
            assert status.read()["child-pid"] == 42


# The end.


class Marked:
    """A container whose processes can be found wherever they went."""

    def __init__(self, subject: Subject, *args: str) -> None:
        self._mark = uuid.uuid4().hex
        self.container = subject.container(*args, env={"MARK": self._mark})

    def file(self, name: str) -> Path:
        return self.container.scratch / name

    def processes(self) -> list[int]:
        """List the processes of the container that exist, apart from podman's monitor, which ends soon."""
        found = {*processes_with(self._mark), *processes_with(self.container.name)}
        return sorted(pid for pid in found if command_line(pid)[:1] not in ([], ["/usr/bin/conmon"]))

    def sleepers(self) -> list[int]:
        """List those that sleep without an end: not the children of shells that come and go."""
        return [pid for pid in self.processes() if command_line(pid) == ["sleep", "1000"]]

    async def run_and_cancel(self, runtime: Runtime, when: Callable[[], bool]) -> float:
        """Run the container, cancel it when a condition holds, and return how many seconds that takes."""
        with trio.fail_after(PATIENCE):
            async with trio.open_nursery() as nursery:
                nursery.start_soon(runtime.run, self.container)
                await until(when)
                begun = trio.current_time()
                nursery.cancel_scope.cancel()
        return trio.current_time() - begun


READY = "touch ready"
FOR_EVER = "while :; do sleep 0.05; done"


@all_of_them
async def test_a_container_that_is_cancelled_before_it_runs_is_not_started(subject: Subject, runtime: Runtime) -> None:
    container = subject.container("sleep", "1000")
    with trio.CancelScope() as scope:
        scope.cancel()
        await runtime.run(container)
    assert scope.cancelled_caught
    assert not container.stdout.exists()


@all_of_them
@pytest.mark.parametrize("script", [("sleep", "1000"), ("sh", "-c", "exit 0")], ids=["long", "short"])
async def test_cancelled_at_any_moment_nothing_is_left(subject: Subject, runtime: Runtime, script: tuple[str, ...]) -> None:
    before = own_children()
    for moment in subject.moments():
        marked = Marked(subject, *script)
        with trio.fail_after(PATIENCE), trio.move_on_after(moment):
            assert (await runtime.run(marked.container)).code == 0
        assert marked.processes() == []
        assert new_children(before) == []


@real_ones
async def test_a_task_may_handle_sigterm(subject: Subject, runtime: Runtime) -> None:
    marked = Marked(subject, "sh", "-c", f"trap 'echo bye > bye; exit 0' TERM; {READY}; {FOR_EVER}")
    await marked.run_and_cancel(runtime, marked.file("ready").exists)
    assert marked.file("bye").read_text() == "bye\n"
    assert marked.processes() == []


@real_ones
async def test_a_task_that_dies_of_sigterm_is_gone_without_a_wait(subject: Subject) -> None:
    async with subject.open(Options(1000.0)) as runtime:
        marked = Marked(subject, "sh", "-c", f"{READY}; exec sleep 1000")
        took = await marked.run_and_cancel(runtime, marked.file("ready").exists)
    assert took < PATIENCE / 2
    assert marked.processes() == []


@real_ones
async def test_a_task_that_ignores_sigterm_is_killed_after_the_grace(subject: Subject, runtime: Runtime) -> None:
    marked = Marked(subject, "sh", "-c", f"trap '' TERM; {READY}; {FOR_EVER}")
    took = await marked.run_and_cancel(runtime, marked.file("ready").exists)
    assert KILL_GRACE <= took < KILL_GRACE + 2
    assert marked.processes() == []


@real_ones
async def test_a_task_that_is_stopped_by_sigstop_is_killed(subject: Subject, runtime: Runtime) -> None:
    marked = Marked(subject, "sh", "-c", f"{READY}; kill -STOP $$; sleep 1000")
    await marked.run_and_cancel(runtime, marked.file("ready").exists)
    assert marked.processes() == []


@real_ones
async def test_without_a_kill_grace_a_task_is_killed_at_once(subject: Subject) -> None:
    async with subject.open(Options(0.0)) as runtime:
        marked = Marked(subject, "sh", "-c", f"trap 'echo bye > bye; exit 0' TERM; {READY}; {FOR_EVER}")
        await marked.run_and_cancel(runtime, marked.file("ready").exists)
    assert not marked.file("bye").exists()
    assert marked.processes() == []


# Two daemons, double-forked, each in a session of its own, one with a child, both ignoring SIGTERM; and a child of the task.
DAEMONS = """
trap '' TERM
(setsid sh -c 'touch one; sleep 1000; :' &)
(setsid sh -c '(setsid sh -c "touch two; sleep 1000; :" &); touch three; sleep 1000; :' &)
sh -c 'touch four; sleep 1000; :' &
until test -e one -a -e two -a -e three -a -e four; do sleep 0.01; done
touch ready
"""


@real_ones
@pytest.mark.parametrize(("end", "code"), [("exit 0", 0), ("exit 3", 3), ("kill -9 $$", 137)])
async def test_daemons_are_gone_when_a_task_ends(subject: Subject, runtime: Runtime, end: str, code: int) -> None:
    marked = Marked(subject, "sh", "-c", DAEMONS + end)
    assert await run(runtime, marked.container) == code
    assert marked.file("ready").exists()
    assert marked.processes() == []


@real_ones
async def test_daemons_are_gone_when_a_task_is_cancelled(subject: Subject, runtime: Runtime) -> None:
    marked = Marked(subject, "sh", "-c", DAEMONS + FOR_EVER)
    await marked.run_and_cancel(runtime, lambda: len(marked.sleepers()) == 4)
    assert marked.processes() == []


@real_ones
async def test_daemons_are_gone_when_a_task_times_out(subject: Subject, runtime: Runtime) -> None:
    marked = Marked(subject, "sh", "-c", DAEMONS + FOR_EVER)
    with trio.move_on_after(1.0) as scope:
        await runtime.run(marked.container)
    assert scope.cancelled_caught
    assert marked.file("ready").exists()
    assert marked.processes() == []


@real_ones
async def test_ending_one_container_leaves_the_others_alone(subject: Subject, runtime: Runtime) -> None:
    lasting = Marked(subject, "sh", "-c", DAEMONS + "until test -e enough; do sleep 0.01; done; exit 5")
    codes: list[int] = []

    async def last() -> None:
        codes.append((await runtime.run(lasting.container)).code)

    with trio.fail_after(PATIENCE):
        async with trio.open_nursery() as nursery:
            nursery.start_soon(last)
            await until(lambda: len(lasting.sleepers()) == 4)
            sleepers = lasting.sleepers()
            for end in ("exit 0", "kill -9 $$"):
                await runtime.run(subject.container("sh", "-c", DAEMONS + end))
            other = Marked(subject, "sh", "-c", f"{READY}; {FOR_EVER}")
            await other.run_and_cancel(runtime, other.file("ready").exists)
            assert lasting.sleepers() == sleepers
            lasting.file("enough").touch()
    assert codes == [5]
    assert lasting.processes() == []


# Many at once, and one after the other.


@all_of_them
async def test_twenty_containers_run_at_once(subject: Subject, runtime: Runtime) -> None:
    codes: dict[int, int] = {}

    async def one(number: int) -> None:
        codes[number] = (await runtime.run(subject.container("sh", "-c", f"exit {number}"))).code

    with trio.fail_after(PATIENCE):
        async with trio.open_nursery() as nursery:
            for number in range(20):
                nursery.start_soon(one, number)
    assert codes == {number: number for number in range(20)}


@real_ones
async def test_neither_file_descriptors_nor_zombies_grow(subject: Subject, runtime: Runtime) -> None:
    scripts: Iterable[str] = itertools.cycle(
        ["exit 0", "exit 1", "(setsid sleep 1000 &); exit 0", "(setsid true &); exit 0"]
    )
    async with trio.open_nursery() as nursery:  # an engine removes one while it creates the next
        for _ in range(2):
            nursery.start_soon(run, runtime, subject.container("true"))
    await run(runtime, subject.container("true"))  # while those two may still be removed, on a connection each
    files, children = open_files(), own_children()
    for script in itertools.islice(scripts, subject.repetitions()):
        await run(runtime, subject.container("sh", "-c", script))
    assert open_files() <= files
    assert new_children(children) == []


async def test_tasks_outlive_the_threads_of_trio(tmp_path: Path, image: Path) -> None:
    # PR_SET_PDEATHSIG is bound to the thread that has spawned, and Trio's worker threads end after 10 idle seconds.
    if fault := bubblewrap_fault():
        pytest.skip(f"bubblewrap does not work here: {fault}")
    codes: list[int] = []

    async def live(runtime: Runtime, image: str, seconds: int) -> None:
        codes.append((await runtime.run(new_container(tmp_path, ["sleep", str(seconds)], image=image))).code)

    begun = trio.current_time()
    with trio.fail_after(40 + PATIENCE):
        async with (
            process.open_runtime(OPTIONS) as bare,
            bubblewrap.open_runtime(OPTIONS) as contained,
            trio.open_nursery() as nursery,
        ):
            for seconds in (15, 40):
                nursery.start_soon(live, bare, "", seconds)
                nursery.start_soon(live, contained, "/", seconds)
                nursery.start_soon(live, contained, str(image), seconds)
    assert codes == [0] * 6
    assert trio.current_time() - begun >= 40


# The fake alone.


async def test_the_fake_takes_time_to_kill(autojump_clock: trio.testing.MockClock, tmp_path: Path) -> None:
    runtime = FakeRuntime(pretend, kill_seconds=0.5)
    with trio.move_on_after(10):
        await runtime.run(new_container(tmp_path, ["sleep", "1000"]))
    assert autojump_clock.current_time() == 10.5
    assert not runtime.running
    assert len(runtime.ran) == runtime.most_running == 1
