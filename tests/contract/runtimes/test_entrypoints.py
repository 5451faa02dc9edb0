"""Images with an entrypoint, arguments and variables of their own: every runtime runs them in the same way."""

import os
import re
import shutil
import string
from collections.abc import AsyncIterator, Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import trio

from tests.contract.runtimes.subjects import BUBBLEWRAPS, ENGINES, Subject
from tests.contract.runtimes.test_contract import AWKWARD
from tests.support.images import build_directory, make_docker_archive, make_image
from tests.support.processes import command_line
from tests.support.waiting import PATIENCE, until
from trio_pilot.errors import NodeError
from trio_pilot.files.error_summary import error_summary
from trio_pilot.processes.orphans import MARKER
from trio_pilot.runtimes import Container, Limits, Options, Runtime, bubblewrap

SEARCH_PATH = "/app/bin:/usr/local/sbin:/usr/local/bin:/usr/sbin:/usr/bin:/sbin:/bin"  # apptainer would add what it lacks
GREETING = 'it\'s a "fine"  day; * ~ & é \\ \\n $HOME `id`'  # apptainer's build escapes some of it once too often
VARIABLES = {"PATH": SEARCH_PATH, "GREETING": GREETING, "HOME": "/tmp", "TMPDIR": "/tmp"}

SPECIAL = [*string.punctuation, *map(chr, range(1, 33)), "\x7f", "\x85", "\u2028", "\ufeff"]
ODD = [*AWKWARD, *(shape.format(one) for one in SPECIAL for shape in ("{0}", "a{0}b", "{0}{0} x"))]

TOOL = """#!/bin/sh
case "$2" in
    --environment) exec env;;
    --directory) exec pwd;;
    --shell) exec sh -c "$3";;
    --fail) echo 'ValueError: no such event' >&2; exit 3;;
esac
printf '<%s>\\0' "$@"
"""

COMMON: Mapping[str, Any] = {"Env": [f"{name}={value}" for name, value in VARIABLES.items()], "WorkingDir": "/tmp"}
IMAGES: Mapping[str, Mapping[str, Any]] = {
    "entrypoint": {**COMMON, "Entrypoint": ["mytool", "of the image"], "Cmd": ["by default", "it's"]},
    "no-entrypoint": {**COMMON, "Cmd": ["mytool", "by default"]},
    "missing-entrypoint": {**COMMON, "Entrypoint": ["no-such-tool"]},
    "no-command": COMMON,
    "no-shell": {**COMMON, "Env": ["PATH=/app"], "Entrypoint": ["echo", "of the image"], "Cmd": ["by default", "$HOME"]},
}

entrypoint = pytest.mark.parametrize("image_name", ["entrypoint"], indirect=True)
no_entrypoint = pytest.mark.parametrize("image_name", ["no-entrypoint"], indirect=True)
every_runtime = pytest.mark.parametrize("subject", ["bubblewrap-image", "apptainer-directory", *ENGINES], indirect=True)


@pytest.fixture(scope="module")
def archives(tmp_path_factory: pytest.TempPathFactory) -> Mapping[str, Path]:
    directory = tmp_path_factory.mktemp("archives")
    root = make_image(tmp_path_factory.mktemp("tool"))
    (root / "app/bin").mkdir(parents=True)
    (root / "app/bin/mytool").write_text(TOOL)
    (root / "app/bin/mytool").chmod(0o755)
    without_shell = tmp_path_factory.mktemp("no-shell")
    for applet in ("echo", "env"):
        (without_shell / "app").mkdir(exist_ok=True)
        shutil.copy(root / "bin/busybox", without_shell / "app" / applet)
    files = {name: directory / f"{name}.tar" for name in IMAGES}
    for name, file in files.items():
        make_docker_archive(without_shell if name == "no-shell" else root, file, f"{name}:local", IMAGES[name])
    return files


@pytest.fixture(scope="module")
def directories(
    archives: Mapping[str, Path], apptainer: Path, tmp_path_factory: pytest.TempPathFactory
) -> Mapping[str, Path]:
    parent = tmp_path_factory.mktemp("directories")
    for name, archive in archives.items():
        build_directory(apptainer, archive, parent / name)
    return {name: parent / name for name in archives}


@pytest.fixture
def image_name(request: pytest.FixtureRequest, subject: Subject) -> str:
    name: str = request.param
    if subject.name in ENGINES:
        request.getfixturevalue(subject.name).load_archive(request.getfixturevalue("archives")[name])
        subject.image = f"{name}:local"
    else:
        subject.image = str(request.getfixturevalue("directories")[name])
    return name


@pytest.fixture
async def runtime(subject: Subject, image_name: str) -> AsyncIterator[Runtime]:
    del image_name
    async with subject.open(Options(kill_grace=0.3)) as runtime:
        await runtime.prepare(subject.image)
        yield runtime


async def output(runtime: Runtime, container: Container) -> bytes:
    with trio.fail_after(PATIENCE):
        ended = await runtime.run(container)
    assert ended.code == 0, (ended, container.stderr.read_text(errors="replace"))
    return container.stdout.read_bytes()


def words(*expected: str) -> bytes:
    return b"".join(b"<%s>\0" % os.fsencode(word) for word in expected)


@every_runtime
@entrypoint
async def test_the_entrypoint_gets_the_arguments_of_the_task_exactly(subject: Subject, runtime: Runtime) -> None:
    awkward = list(filter(subject.carries, ODD))
    assert await output(runtime, subject.container("first", *awkward)) == words("of the image", "first", *awkward)


@every_runtime
@no_entrypoint
async def test_without_an_entrypoint_the_arguments_are_the_command(subject: Subject, runtime: Runtime) -> None:
    assert await output(runtime, subject.container("mytool", "a  b", "$HOME")) == words("a  b", "$HOME")


@every_runtime
@pytest.mark.parametrize(
    ("image_name", "expected"),
    [("entrypoint", ["of the image", "by default", "it's"]), ("no-entrypoint", ["by default"])],
    indirect=["image_name"],
)
async def test_without_arguments_the_image_runs_its_own(subject: Subject, runtime: Runtime, expected: list[str]) -> None:
    await runtime.prepare(subject.image, has_args=False)
    assert await output(runtime, subject.container()) == words(*expected)
    limited = replace(subject.container(env={"HOME": "/etc"}), limits=Limits(memory=2**29))
    assert await output(runtime, limited) == words(*expected)


@every_runtime
@pytest.mark.parametrize("image_name", ["no-shell"], indirect=True)
async def test_an_image_needs_no_shell(subject: Subject, runtime: Runtime) -> None:
    assert await output(runtime, subject.container("a  b", "$HOME")) == b"of the image a  b $HOME\n"
    assert await output(runtime, subject.container()) == b"of the image by default $HOME\n"
    container = replace(subject.container("env", env={"MINE": "yes"}), without_entrypoint=True)
    assert variables(await output(runtime, container))["MINE"] == "yes"


@every_runtime
@pytest.mark.parametrize("image_name", ["no-command"], indirect=True)
async def test_an_image_without_a_command_needs_arguments(subject: Subject, runtime: Runtime) -> None:
    with pytest.raises(NodeError, match=f"^the image {subject.image} has no command of its own: say what to run in it"):
        await runtime.prepare(subject.image, has_args=False)
    assert await output(runtime, subject.container("mytool", "first")) == words("first")


@pytest.mark.parametrize("subject", ["process", *BUBBLEWRAPS, "apptainer-directory"], indirect=True)
async def test_what_apptainer_has_not_built_needs_arguments(subject: Subject) -> None:
    async with subject.open(Options()) as runtime:
        with pytest.raises(NodeError, match=r"^the (runtime|image) \S+ has no command of .*: say what to run"):
            await runtime.prepare(subject.image, has_args=False)


OWN = "(APPTAINER|SINGULARITY)_.*|LD_LIBRARY_PATH|PROMPT_COMMAND|PS1|SHLVL|PWD|LANG|HOSTNAME|TERM|container|" + MARKER


def variables(said: bytes) -> Mapping[str, str]:
    pairs = (line.partition("=")[::2] for line in said.decode().splitlines())
    return {name: value for name, value in pairs if not re.fullmatch(OWN, name)}


@every_runtime
@entrypoint
async def test_the_environment_is_the_images_and_that_of_the_task_wins(subject: Subject, runtime: Runtime) -> None:
    said = await output(runtime, subject.container("--environment", env={"MINE": "yes"}))
    assert variables(said) == {**VARIABLES, "MINE": "yes"}
    assert variables(await output(runtime, subject.container("--environment", env={"GREETING": ""})))["GREETING"] == ""
    own = {"GREETING": 'mine:  it\'s "$HOME" \\ `id`', "PATH": "/app/bin:/bin", "HOME": "/etc"}
    assert variables(await output(runtime, subject.container("--environment", env=own))) == {**VARIABLES, **own}


@every_runtime
@entrypoint
async def test_values_of_a_task_reach_its_entrypoint_exactly(subject: Subject, runtime: Runtime) -> None:
    values = list(filter(subject.carries, ODD))
    env = {f"VALUE{number}": value for number, value in enumerate(values)}
    shown = " ".join(f'"$VALUE{number}"' for number in range(len(values)))
    container = subject.container("--shell", f"printf '<%s>\\0' {shown}", env=env)
    assert await output(runtime, container) == words(*values)


@every_runtime
@entrypoint
async def test_the_working_directory_is_that_of_the_image(subject: Subject, runtime: Runtime) -> None:
    assert await output(runtime, subject.container("--directory")) == b"/tmp\n"


@every_runtime
@entrypoint
async def test_without_its_entrypoint_an_image_has_its_environment(subject: Subject, runtime: Runtime) -> None:
    container = replace(subject.container("sh", "-c", 'echo "$PATH" "$GREETING"'), without_entrypoint=True)
    assert await output(runtime, container) == f"{SEARCH_PATH} {GREETING}\n".encode()


@every_runtime
@entrypoint
async def test_the_error_of_an_entrypoint_is_its_own(subject: Subject, runtime: Runtime) -> None:
    container = subject.container("--fail")
    assert (await runtime.run(container)).code == 3
    assert error_summary(container.stderr) == "ValueError: no such event"


@every_runtime
@no_entrypoint
@pytest.mark.parametrize("without_entrypoint", [False, True])
@pytest.mark.parametrize(
    ("command", "code", "why"),
    [
        ("no-such-tool", 127, "No such file or directory"),
        ("/no/such/tool", 127, "No such file or directory"),
        ("/etc/this-is-the-image", 126, "Permission denied"),
    ],
)
async def test_a_command_that_cannot_run_ends_in_the_same_way(
    subject: Subject, runtime: Runtime, command: str, code: int, why: str, without_entrypoint: bool
) -> None:
    container = replace(subject.container(command, "argument"), without_entrypoint=without_entrypoint)
    assert (await runtime.run(container)).code == code
    assert error_summary(container.stderr) == f"{command}: {why}"


@every_runtime
@pytest.mark.parametrize("image_name", ["missing-entrypoint"], indirect=True)
async def test_an_entrypoint_that_is_missing_is_named(subject: Subject, runtime: Runtime) -> None:
    container = subject.container("argument")
    assert (await runtime.run(container)).code == 127
    assert error_summary(container.stderr) == "no-such-tool: No such file or directory"


@pytest.mark.parametrize("subject", ["bubblewrap-own-root", "bubblewrap-image"], indirect=True)
async def test_variables_of_a_task_reach_neither_bubblewrap_nor_a_command_line(subject: Subject) -> None:
    secret = f"secret-{os.getpid()}"
    container = subject.container("sleep", "1000", env={"LD_LIBRARY_PATH": "/nowhere", "SECRET": secret})

    def processes() -> list[Path]:
        marker = f"{container.name}".encode()
        found = [path.parent for path in Path("/proc").glob("[0-9]*/environ") if marker in read(path)]
        return found if any(command_line(int(path.name))[:1] == ["sleep"] for path in found) else []

    async with bubblewrap.open_runtime(Options(kill_grace=0.3)) as runtime, trio.open_nursery() as nursery:
        nursery.start_soon(runtime.run, container)
        await until(lambda: bool(processes()))
        lines = {path: command_line(int(path.name)) for path in processes()}
        knowing = [line[0] for path, line in lines.items() if b"LD_LIBRARY_PATH" in read(path / "environ")]
        assert knowing == ["sleep"]
        assert not [line for line in lines.values() if secret in " ".join(line)]
        nursery.cancel_scope.cancel()


def read(path: Path) -> bytes:
    try:
        return path.read_bytes()
    except OSError:
        return b""
