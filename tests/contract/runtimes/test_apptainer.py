"""What apptainer does beyond the contract of all runtimes."""

import fcntl
import hashlib
import io
import json
import logging
import os
import shutil
import stat
import subprocess
import sys
import tarfile
import tempfile
from collections.abc import Iterable, Iterator, Sequence
from contextlib import suppress
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import trio

from tests.contract.runtimes.subjects import Subject, make_apptainer
from tests.contract.runtimes.test_contract import AWKWARD, READY, Marked
from tests.support.containers import new_container
from tests.support.control_groups import NoGroups
from tests.support.paths import ROOT
from tests.support.processes import new_children, own_children
from tests.support.users import UNPRIVILEGED, needs_root
from tests.support.waiting import PATIENCE, until
from trio_pilot.errors import NodeError
from trio_pilot.files.error_summary import error_summary
from trio_pilot.processes import cgroups, orphans
from trio_pilot.processes.identity import STATE, own, stat_of
from trio_pilot.runtimes import Container, Exit, Limits, Mount, Options, apptainer, apptainer_quoting
from trio_pilot.runtimes.apptainer_command import fatal
from trio_pilot.runtimes.confinement import OpenGroups

OPTIONS = Options(kill_grace=0.3)


@pytest.fixture
def subject(request: pytest.FixtureRequest, tmp_path: Path) -> Subject:
    return make_apptainer(request, tmp_path)


@pytest.fixture
def options(tmp_path: Path) -> Options:
    return replace(OPTIONS, only_directories=False, build_directory=tmp_path / "built")


@pytest.fixture(autouse=True)
def nothing_is_left() -> Iterator[None]:
    before = own_children()
    yield
    assert new_children(before) == []


async def end_of(options: Options, container: Container, open_groups: OpenGroups = cgroups.Groups) -> Exit:
    async with apptainer.open_runtime(options, open_groups) as runtime:
        with trio.fail_after(PATIENCE):
            return await runtime.run(container)


async def output(options: Options, container: Container) -> str:
    assert await end_of(options, container) == Exit(0), container.stderr.read_text(errors="replace")
    return container.stdout.read_text()


# Images.


def docker_archive(file: Path, root: Path, **config: Any) -> str:
    """Make an archive as `docker save` does; return its name as an image."""
    layer = io.BytesIO()
    with tarfile.open(fileobj=layer, mode="w") as tar:
        tar.add(root, arcname=".")
    difference = f"sha256:{hashlib.sha256(layer.getvalue()).hexdigest()}"
    facts = {
        "architecture": os.uname().machine,
        "os": "linux",
        "config": config,
        "rootfs": {"type": "layers", "diff_ids": [difference]},
    }
    manifest = [{"Config": "config.json", "RepoTags": ["test:latest"], "Layers": ["layer.tar"]}]
    with tarfile.open(file, "w") as tar:
        for name, content in (
            ("manifest.json", json.dumps(manifest).encode()),
            ("config.json", json.dumps(facts).encode()),
            ("layer.tar", layer.getvalue()),
        ):
            member = tarfile.TarInfo(name)
            member.size = len(content)
            tar.addfile(member, io.BytesIO(content))
    return f"docker-archive:{file}"


ENTRYPOINT = ["/bin/sh", "-c", 'printf "<%s>" entry "$@"; exec "$@"', "entry"]
VARIABLES = ["PATH=/bin:/of-the-image", "FROM_IMAGE=a b"]
SAY = ("sh", "-c", 'printf "<%s>" "$FROM_IMAGE" "$PATH" "$@"', "sh", "a  b", "it's", '"', "$HOME", "new\nline")
SAID = "<a b></bin:/of-the-image:/usr/local/sbin:/usr/local/bin:/usr/sbin:/usr/bin:/sbin>" + "".join(
    f"<{word}>" for word in SAY[4:]
)
ENTERED = "<entry>" + "".join(f"<{word}>" for word in SAY) + SAID


@pytest.fixture
def archive(subject: Subject, tmp_path: Path) -> str:
    return docker_archive(tmp_path / "an image.tar", Path(subject.image), Entrypoint=ENTRYPOINT, Env=VARIABLES)


async def test_a_docker_image_is_unpacked_once_and_has_its_entrypoint(
    subject: Subject, options: Options, archive: str, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level(logging.INFO)
    for _ in range(2):
        assert await output(options, new_container(subject.directory, SAY, image=archive)) == ENTERED
    said = [record.getMessage() for record in caplog.records]
    assert [": being unpacked to " in line for line in said] == [True, False, False]
    assert ": unpacked in " in said[1]
    assert said[2].endswith(", where it was unpacked before")
    (parent,) = options.build_directory.iterdir()
    assert stat.S_IMODE(parent.stat().st_mode) == 0o700
    assert sorted(entry.suffix for entry in parent.iterdir()) == ["", ".lock"]


async def test_a_plain_container_runs_its_arguments_without_the_entrypoint(
    subject: Subject, options: Options, archive: str
) -> None:
    container = new_container(subject.directory, ("printf", "<%s>", "alone"), image=archive)
    assert await output(options, replace(container, without_entrypoint=True)) == "<alone>"


async def test_an_unpacked_docker_image_has_its_entrypoint_for_any_arguments(
    subject: Subject, options: Options, archive: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    home = subject.directory / "home"
    home.mkdir()
    monkeypatch.setenv("HOME", str(home))
    async with apptainer.open_runtime(options) as runtime:
        await runtime.prepare(archive)
    assert not [path for path in home.rglob("*") if path.is_file()]  # no layers are kept there
    (root,) = (entry for parent in options.build_directory.iterdir() for entry in parent.iterdir() if entry.is_dir())
    args = ["printf", "<%s>", *AWKWARD]
    container = new_container(subject.directory, args, image=str(root), env={"HOME": "/etc"})
    assert await end_of(OPTIONS, container) == Exit(0)
    assert container.stdout.read_bytes() == b"".join(b"<%s>" % os.fsencode(word) for word in ("entry", *args, *AWKWARD))


async def test_a_task_may_set_what_a_docker_image_sets(subject: Subject, options: Options, archive: str) -> None:
    env = {"PATH": "/bin", "FROM_IMAGE": "mine"}
    script = "echo $PATH $FROM_IMAGE"
    said = await output(options, new_container(subject.directory, ["sh", "-c", script], image=archive, env=env))
    assert said.endswith(">/bin mine\n")


async def test_a_file_made_of_a_docker_image_has_its_entrypoint(subject: Subject, options: Options, archive: str) -> None:
    file = subject.directory / "image.sif"
    await trio.run_process([*("apptainer", "--silent", "build"), str(file), archive])
    assert await output(options, new_container(subject.directory, SAY, image=str(file))) == ENTERED
    assert not options.build_directory.exists()


async def test_an_archive_that_has_changed_is_unpacked_again(subject: Subject, options: Options, archive: str) -> None:
    assert await output(options, new_container(subject.directory, SAY, image=archive)) == ENTERED
    docker_archive(Path(archive.partition(":")[2]), Path(subject.image), Env=VARIABLES)
    assert await output(options, new_container(subject.directory, SAY, image=archive)) == SAID


async def test_several_pilots_unpack_an_image_once(
    subject: Subject, options: Options, archive: str, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level(logging.INFO)
    containers = [new_container(subject.directory, SAY, image=archive) for _ in range(3)]
    async with trio.open_nursery() as nursery:
        for container in containers:
            nursery.start_soon(end_of, options, container)
    assert [container.stdout.read_text() for container in containers] == [ENTERED] * 3
    said = [record.getMessage().split(": ", 1)[1] for record in caplog.records]
    assert sum(line.startswith("being unpacked") for line in said) == 1
    assert said.count("another pilot is unpacking it") == 2


@pytest.mark.parametrize("moment", [0.0, 0.02, 0.05, 0.1, 0.15, 0.2, 0.25, 0.3])
async def test_unpacking_that_is_cancelled_leaves_nothing(
    subject: Subject, options: Options, archive: str, moment: float
) -> None:
    async with apptainer.open_runtime(options) as runtime:
        with trio.fail_after(PATIENCE), trio.move_on_after(moment):
            await runtime.prepare(archive)
    assert {entry.suffix for entry in options.build_directory.glob("*/*")} <= {".lock", ""}  # a lock, and a complete image
    assert await output(options, new_container(subject.directory, SAY, image=archive)) == ENTERED


async def test_an_unfinished_image_of_a_killed_pilot_is_removed(subject: Subject, options: Options, archive: str) -> None:
    assert await output(options, new_container(subject.directory, SAY, image=archive)) == ENTERED
    (finished,) = (entry for entry in options.build_directory.glob("*/*") if entry.is_dir())
    half = finished.rename(finished.with_name(f"{finished.name}.building-0"))
    assert await output(options, new_container(subject.directory, SAY, image=archive)) == ENTERED
    assert finished.exists()
    assert not half.exists()


async def test_other_unfinished_images_are_removed_unless_their_lock_is_held(
    subject: Subject, options: Options, archive: str
) -> None:
    assert await output(options, new_container(subject.directory, SAY, image=archive)) == ENTERED
    (finished,) = (entry for entry in options.build_directory.glob("*/*") if entry.is_dir())
    dead, living = finished.with_name("dead.building-0"), finished.with_name("living.building-0")
    (dead / "root").mkdir(parents=True)
    (living / "root").mkdir(parents=True)
    shutil.rmtree(finished)
    with finished.with_name("living.lock").open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        assert await output(options, new_container(subject.directory, SAY, image=archive)) == ENTERED
    assert (dead.exists(), living.exists()) == (False, True)


@pytest.mark.parametrize(
    ("image", "line"),
    [
        ("docker-archive:/no/such.tar", "^cannot unpack the image {}: .*open /no/such.tar: no such file or directory$"),
        pytest.param("x" * 300, "^the image {} is neither a directory nor a file", id="of a name too long"),
        ("busybox:latest", "^the image {} is neither a directory nor a file; of a registry it would be docker://{}$"),
        ("{directory}/text", "^the image {} is of no format that apptainer knows: .*image format not recognized$"),
    ],
)
async def test_what_is_not_an_image_is_the_nodes_fault(subject: Subject, options: Options, image: str, line: str) -> None:
    image = image.replace("{directory}", str(subject.directory))
    (subject.directory / "text").write_text("Bootstrap: localimage\nFrom: /\n%setup\n touch /never\n")
    with pytest.raises(NodeError, match=line.replace("{}", image)):
        await end_of(options, new_container(subject.directory, ["true"], image=image))
    assert not [entry for entry in options.build_directory.glob("*/*") if entry.suffix != ".lock"]


@pytest.mark.usefixtures("subject")
@pytest.mark.parametrize("image", ["", "/"])
async def test_the_root_of_the_machine_is_not_an_image_for_apptainer(image: str, tmp_path: Path) -> None:
    with pytest.raises(NodeError, match=r"^apptainer takes no .* as an image: name one, or choose another runtime$"):
        await end_of(OPTIONS, new_container(tmp_path, ["true"], image=image))


async def test_a_directory_in_which_nothing_can_run_is_not_an_image(subject: Subject) -> None:
    image = subject.directory / "empty"
    image.mkdir()
    with pytest.raises(NodeError, match=f"^apptainer can make no container of the image {image}: .*/dev doesn't exist"):
        await end_of(OPTIONS, new_container(subject.directory, ["true"], image=str(image)))


@pytest.mark.parametrize("image", ["docker-archive:/no/such.tar", "busybox:latest", "/etc/passwd"])
async def test_an_image_other_than_a_directory_must_be_allowed(subject: Subject, image: str) -> None:
    with pytest.raises(NodeError, match=f"^the image {image} must be an unpacked directory.*_MUST_BE_PRESENT=false"):
        await end_of(OPTIONS, new_container(subject.directory, ["true"], image=image))


@needs_root
@pytest.mark.usefixtures("subject")
@pytest.mark.parametrize("spoil", [lambda path: os.chown(path, 65534, 0), lambda path: path.chmod(0o777)])
async def test_images_in_a_directory_of_another_user_are_not_used(options: Options, archive: str, spoil: Any) -> None:
    async with apptainer.open_runtime(options) as runtime:
        await runtime.prepare(archive)
        (parent,) = options.build_directory.iterdir()
    spoil(parent)
    async with apptainer.open_runtime(options) as runtime:
        with pytest.raises(NodeError, match=f"^{parent} must be a directory of this user, which no other can write to"):
            await runtime.prepare(archive)


# Arguments, variables and mounts.


@pytest.mark.parametrize(
    "name", ["so,ur=ce", "a:b", "a:b:ro", 'q"uo"te', "it's", "new\nline", "back\\slash", " ends ", "$HOME"]
)
async def test_directories_of_any_name_are_mounted(subject: Subject, name: str) -> None:
    source = subject.directory / name
    source.mkdir()
    (source / "file").write_text("content")
    for target in ("/data", f"/data/{name}"):
        container = subject.container("sh", "-c", 'cat "$1/file"', "sh", target, mounts=[Mount(source, target)])
        assert await output(OPTIONS, container) == "content"


@pytest.mark.parametrize("name", ["cr\r\nlf", os.fsdecode(b"\xff")])
async def test_a_directory_name_that_apptainer_cannot_take_is_the_nodes_fault(subject: Subject, name: str) -> None:
    (source := subject.directory / name).mkdir()
    with pytest.raises(NodeError, match=r"^apptainer cannot mount .*: name them in UTF-8, without CR$"):
        await end_of(OPTIONS, subject.container("true", mounts=[Mount(source, "/data")]))


async def test_a_variable_name_that_no_shell_allows_is_the_nodes_fault(subject: Subject) -> None:
    with pytest.raises(NodeError, match=r"^apptainer cannot set a variable named 'a-b': use"):
        await end_of(OPTIONS, subject.container("true", env={"a-b": "1"}))


@pytest.mark.parametrize("shell", ["/bin/sh", "bash", "busybox sh"])
def test_any_shell_restores_arguments_and_variables(shell: str) -> None:
    if not shutil.which(shell.split()[0]):
        pytest.skip(f"there is no {shell.split()[0]}")
    words = [*AWKWARD, "\n\n", ".", "\x7f\x01"]
    env = {f"NAME_{number}": word for number, word in enumerate(words)} | {"HOME": "/etc"}
    print_all = "import os, sys, json; print(json.dumps([sys.argv[1:], dict(os.environ)]))"
    argv = apptainer_quoting.shell([], [sys.executable, "-c", print_all, *words], env)
    done = subprocess.run([*shell.split(), *argv[1:]], env=apptainer_quoting.encoded(env), capture_output=True, check=True)
    said, variables = json.loads(done.stdout)
    assert said == words
    assert {name: value for name, value in variables.items() if name in env} == env
    assert not [name for name in variables if name.startswith(apptainer_quoting.PREFIX) or name == "word"]


async def test_secrets_that_a_shell_restores_are_on_no_command_line(subject: Subject) -> None:
    container = subject.container("sh", "-c", "cat /proc/1/cmdline /proc/$$/cmdline", env={"TOKEN": "a-secret\r\n"})
    assert "a-secret" not in await output(OPTIONS, container)


# Isolation.


async def test_a_task_cannot_change_settings_of_the_kernel(subject: Subject) -> None:
    script = (
        "for file in /proc/sys/vm/swappiness /sys/module/printk/parameters/time;"
        " do value=$(cat $file) && echo $value > $file && echo written; done; exit 0"
    )
    container = subject.container("sh", "-c", script)
    assert await output(OPTIONS, container) == ""


async def test_the_run_directory_of_an_image_is_hidden(subject: Subject) -> None:
    image = subject.directory / "other"
    shutil.copytree(subject.image, image, symlinks=True)
    (image / "run").mkdir(exist_ok=True)
    (image / "run/left.pid").touch()
    container = new_container(subject.directory, ["sh", "-c", "ls /run && echo > /run/mine.pid"], image=str(image))
    assert await output(OPTIONS, container) == ""
    assert not (image / "run/mine.pid").exists()


# Errors.


@pytest.mark.parametrize(
    "line",
    [
        "FATAL:   the disk is on fire",
        "FATAL: no",
        "FATAL:   container creation failed: of another in it",
        "some of its own\nFATAL:   container creation failed: of its own",
    ],
)
async def test_a_payload_that_prints_errors_like_apptainer_is_a_payload(subject: Subject, line: str) -> None:
    container = subject.container("sh", "-c", f"echo '{line}' >&2; exit 255")
    assert await end_of(OPTIONS, container) == Exit(255)


async def test_an_apptainer_that_no_longer_works_is_the_nodes_fault(
    subject: Subject, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    broken = tmp_path / "broken"
    script = (
        f'[ ! -e {broken} ] || {{ echo "FATAL:   no space left" >&2; exit 255; }}; exec {shutil.which("apptainer")} "$@"'
    )
    make_program(tmp_path, monkeypatch, "apptainer", script)
    async with apptainer.open_runtime(OPTIONS) as runtime:
        await runtime.prepare(subject.image)
        broken.touch()
        with pytest.raises(NodeError, match=r"^apptainer could not make the container: no space left$"):
            await runtime.run(subject.container("true"))


async def test_debugging_does_not_change_exits_and_reasons(subject: Subject) -> None:
    options = replace(OPTIONS, debug=True)
    assert await end_of(options, container := subject.container("no-such-command")) == Exit(127)
    assert error_summary(container.stderr) == "no-such-command: No such file or directory"
    assert await end_of(options, container := subject.container("sh", "-c", "echo why >&2; exit 255")) == Exit(255)
    assert "DEBUG" in container.stderr.read_text()
    assert error_summary(container.stderr) == "why"
    gone = Mount(subject.directory / "gone", "/data")
    with pytest.raises(NodeError, match=r"^apptainer could not make the container: .*gone doesn't exist$"):
        await end_of(options, subject.container("true", mounts=[gone]))


@pytest.mark.parametrize(
    ("said", "reason"),
    [
        ("FATAL:   why\n", "why"),
        ("WARNING: passwd file doesn't exist\nFATAL:   why\nand more\n", "why\nand more"),
        ("DEBUG   [U=0,P=4711]       startup()    starting\nFATAL   [U=0,P=1]          StageTwo()  why\n", "why"),
        ("VERBOSE [U=0,P=4711]       setKeyIfNotAlreadyOverridden()Forwarding X\nFATAL:   why", "why"),
        ("the payload's own\nFATAL:   why\n", None),
        ("FATAL: why\n", None),
        ("FATAL\n", None),
        ("", None),
    ],
)
def test_errors_of_apptainer_are_distinguished_from_those_of_a_payload(said: str, reason: str | None) -> None:
    assert fatal(said) == reason


async def test_a_program_without_its_interpreter_is_not_found(subject: Subject) -> None:
    program = subject.directory / "bin/program"
    program.parent.mkdir()
    program.write_text("#!/no/such/interpreter\n")
    program.chmod(0o755)
    container = subject.container("/mine/program", mounts=[Mount(program.parent, "/mine")])
    assert await end_of(OPTIONS, container) == Exit(127)


# The check whether it works.


def make_program(directory: Path, monkeypatch: pytest.MonkeyPatch, name: str, script: str) -> None:
    (directory / "programs").mkdir()
    program = directory / "programs" / name
    program.write_text(f"#!/bin/sh\n{script}\n")
    program.chmod(0o755)
    monkeypatch.setenv("PATH", f"{program.parent}:/usr/sbin:/usr/bin:/sbin:/bin")


@pytest.mark.usefixtures("subject")
async def test_apptainer_has_no_fault_where_it_works() -> None:
    assert await apptainer.fault(OPTIONS) is None


@pytest.mark.usefixtures("subject")
async def test_apptainer_may_be_named_singularity(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    real = shutil.which("apptainer")
    make_program(tmp_path, monkeypatch, "singularity", f'exec {real} "$@"')
    assert await apptainer.fault(OPTIONS) is None


@pytest.mark.parametrize(
    ("name", "script", "fault"),
    [
        ("apptainer", "echo apptainer version 1.0.3", "1.1 or later, but it says 'apptainer version 1.0.3': install"),
        ("singularity", "echo singularity-ce version 4.1.2", "1.1 or later, but it says 'singularity-ce version 4.1.2'"),
        ("apptainer", "echo broken >&2; exit 1", "/apptainer fails: broken"),
        ("apptainer", "exit 1", "/apptainer fails: exit code 1"),
        (
            "apptainer",
            r"printf '\033[31mFATAL:  \033[0m unknown userid 5\n' >&2; exit 255",
            "/apptainer fails: unknown userid 5",
        ),
        (
            "apptainer",
            '[ "$1" = --version ] && echo apptainer version 1.4.5 || { echo "FATAL:   no user namespaces"; exit 255; }',
            "cannot make a container: no user namespaces",
        ),
    ],
)
async def test_the_fault_of_apptainer_is_its_own_error(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, name: str, script: str, fault: str
) -> None:
    make_program(tmp_path, monkeypatch, name, script)
    assert fault in str(await apptainer.fault(OPTIONS))


async def test_a_missing_apptainer_is_an_error_that_says_what_to_do(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PATH", str(tmp_path))
    line = "there is no apptainer on PATH: install it"
    assert line in str(await apptainer.fault(OPTIONS))
    with pytest.raises(NodeError, match=line):
        await end_of(OPTIONS, new_container(tmp_path, ["true"]))


@pytest.mark.usefixtures("subject")
async def test_apptainer_needs_no_directory_for_temporary_files(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(tempfile, "tempdir", "/nonexistent")
    assert await apptainer.fault(replace(OPTIONS, data_parent=tmp_path)) is None


async def test_an_apptainer_that_hangs_is_a_fault(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    make_program(tmp_path, monkeypatch, "apptainer", "sleep 1000")
    assert await apptainer.fault(OPTIONS, 0.2) == "apptainer has not made a container in 0.2 s"


# How its processes are found and ended.


def names_below(pids: Iterable[int]) -> set[str]:
    """Return the names of running processes, and of those below them."""
    found: set[str] = set()
    for pid in pids:
        facts = stat_of(pid)
        if facts and facts[STATE] != "Z":
            with suppress(OSError):
                found.add(Path(f"/proc/{pid}/comm").read_text().strip())
                children = [task.read_text().split() for task in Path(f"/proc/{pid}/task").glob("*/children")]
                found |= names_below(int(child) for some in children for child in some)
    return found


@pytest.mark.parametrize("payload", ["sleep 1000", "exec env -i sh -c 'sleep 1000; true'"])
async def test_all_processes_of_a_container_are_found_from_outside(subject: Subject, payload: str) -> None:
    marked, before = Marked(subject, "sh", "-c", f"{READY}; {payload}"), own_children()

    def names() -> set[str]:
        return names_below(own_children() - before)

    async with apptainer.open_runtime(OPTIONS) as runtime, trio.open_nursery() as nursery:
        nursery.start_soon(runtime.run, marked.container)
        await until(marked.file("ready").exists)
        await until(lambda: "sleep" in names())
        assert {"starter", "appinit", "sleep"} <= names()
        assert orphans.end_processes(lambda pilot: pilot == own()) >= 4
        assert names() & {"starter", "appinit", "sleep"} == set()


async def test_a_task_outlives_the_threads_of_trio(subject: Subject) -> None:
    assert await end_of(OPTIONS, subject.container("sleep", "12")) == Exit(0)


# Limits.


async def test_a_limit_of_memory_without_control_groups_is_the_payloads_alone(subject: Subject) -> None:
    limits = Limits(memory=64 * 2**20)
    container = replace(subject.container("sh", "-c", 'ulimit -v; printf "<%s>" "$@"', "sh", *AWKWARD), limits=limits)
    assert await end_of(OPTIONS, container, NoGroups) == Exit(0)
    assert container.stdout.read_bytes() == b"65536\n" + b"".join(b"<%s>" % os.fsencode(word) for word in AWKWARD)
    container = replace(subject.container("dd", "if=/dev/zero", "of=/dev/null", "bs=200M", "count=1"), limits=limits)
    assert await end_of(OPTIONS, container, NoGroups) == Exit(1)
    assert "memory" in error_summary(container.stderr)


async def test_limits_are_for_the_payload_and_not_for_apptainer(subject: Subject) -> None:
    limits = Limits(memory=128 * 2**20, cpus=1, pids=10)
    script = "for number in $(seq 9); do sleep 0.2 & done; wait"
    assert await end_of(OPTIONS, replace(subject.container("sh", "-c", script), limits=limits)) == Exit(0)


# Users other than root.

# Parts of the contract that are different for them; and for files, which they mount by FUSE or unpack.
DIFFERENT = "exit_code or mount or capabilities or environment or daemons or scratch or image or sees or cancelled_at"
FILES_DIFFER = "0-apptainer or daemons_are_gone_when_a_task_is_cancelled or cancelled_at or image_that_is_not_there"

WITH_FUSE = ["unshare", "--mount", "sh", "-c", 'mount --bind "$0" /dev/fuse && exec "$@"']


def contract(directory: Path, chosen: str, prefix: Sequence[object] = ()) -> str:
    """Run a part of the contract suite with the apptainer of an unprivileged user."""
    command = [
        *(*prefix, *UNPRIVILEGED, sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider"),
        *(f"--basetemp={directory}/nested", "tests/contract/runtimes/test_contract.py", "-k", chosen),
    ]
    environment = {
        name: value for name, value in os.environ.items() if name != "PYTEST_ADDOPTS"
    }  # whose report belongs to root
    env = {**environment, "PYTHONDONTWRITEBYTECODE": "1", "HOME": "/nonexistent", "TRIO_PILOT_NO_SKIP": "1"}
    done = subprocess.run(
        list(map(str, command)),
        cwd=ROOT,
        env=env,
        capture_output=True,
        text=True,
        timeout=180,
        check=False,
    )
    assert done.returncode == 0, done.stdout[-3000:] + done.stderr[-1000:]
    return done.stdout


@pytest.fixture
def open_directory(request: pytest.FixtureRequest) -> Iterator[Path]:
    request.getfixturevalue("subject")  # which puts apptainer on PATH
    with tempfile.TemporaryDirectory() as name:
        Path(name).chmod(0o777)
        yield Path(name)


@needs_root
def test_the_contract_holds_for_an_unprivileged_user(open_directory: Path) -> None:
    assert " passed" in contract(open_directory, f"apptainer-directory and ({DIFFERENT})")


@needs_root
def test_an_unprivileged_user_without_fuse_unpacks_files(open_directory: Path) -> None:
    if Path("/dev/fuse").exists() and Path("/dev/fuse").stat().st_mode & stat.S_IWOTH:
        pytest.skip("any user may use FUSE here")
    assert " passed" in contract(open_directory, f"apptainer-sif and ({FILES_DIFFER})")
    assert list(open_directory.glob("nested/*/images/*/*/bin"))


def helpers() -> set[str]:
    """List the processes that keep a .sif file mounted."""
    return {comm.parent.name for comm in Path("/proc").glob("[0-9]*/comm") if comm.read_text().startswith("squashfuse")}


@needs_root
def test_an_unprivileged_user_mounts_files_by_fuse_and_leaves_no_helper(open_directory: Path) -> None:
    fuse, before = open_directory / "fuse", helpers()
    os.mknod(fuse, stat.S_IFCHR | 0o666, os.makedev(10, 229))
    fuse.chmod(0o666)
    assert " passed" in contract(open_directory, f"apptainer-sif and ({FILES_DIFFER})", [*WITH_FUSE, fuse])
    assert not list(open_directory.glob("nested/*/images"))
    assert helpers() <= before
