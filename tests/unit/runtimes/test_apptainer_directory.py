import ast
import os
import shutil
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import pytest

from tests.support.containers import new_container
from trio_pilot.errors import NodeError
from trio_pilot.runtimes.apptainer_directory import ImageDirectory, Launch

EVERY_BYTE = os.fsdecode(bytes(range(1, 256)))
# Variables that shells read, change, or make read-only.
OF_SHELLS = {"IFS": "x", "PATH": "/usr/bin:/bin", "PS1": "", "CDPATH": "/", "trio_pilot_file": "mine"}


@pytest.fixture(params=[("dash",), ("busybox", "sh"), ("bash", "--posix")], ids=["dash", "busybox", "bash"])
def shell(request: pytest.FixtureRequest) -> list[str]:
    program, *args = request.param
    found = shutil.which(program)
    if found is None:
        pytest.skip(f"there is no {program}")
    return [found, *args]


def run(shell: list[str], launch: Launch) -> "subprocess.CompletedProcess[bytes]":
    env = {"PATH": "/usr/bin:/bin", **launch.env}
    return subprocess.run([*shell, *launch.argv[1:]], env=env, capture_output=True, check=False)


SHOW = """
import os, sys
sys.stdout.buffer.write(repr((dict(os.environb), list(map(os.fsencode, sys.argv[1:])))).encode())
"""


def test_arguments_and_variables_pass_through_any_shell(shell: list[str], tmp_path: Path) -> None:
    env = {"EVERY": EVERY_BYTE, "EMPTY": "", "NEWLINES": "a\n\n", **OF_SHELLS}
    args = [EVERY_BYTE, "", " a  b ", "-n"]
    container = new_container(tmp_path, [sys.executable, "-c", SHOW, *args], env=env)
    variables, seen = ast.literal_eval(run(shell, ImageDirectory(has_environment=True).launch(container)).stdout.decode())
    assert seen == list(map(os.fsencode, args))
    assert {name: variables.get(name.encode()) for name in env} == {name: os.fsencode(env[name]) for name in env}
    assert not [name for name in variables if name.startswith(b"TRIO_PILOT_TASK")]


def test_a_variable_that_a_shell_keeps_for_itself_does_not_stop_the_task(shell: list[str], tmp_path: Path) -> None:
    container = new_container(tmp_path, ["echo", "done"], env={"UID": "7", "PPID": "7", "SHELLOPTS": "x"})
    assert run(shell, ImageDirectory(has_environment=True).launch(container)).stdout == b"done\n"


@pytest.mark.parametrize(
    ("command", "code", "reason"),
    [
        ("no-such-command", 127, "No such file or directory"),
        ("/no/such/command", 127, "No such file or directory"),
        ("two\nlines", 127, "No such file or directory"),
        ("/etc", 126, "Permission denied"),
        ("/etc/passwd", 126, "Permission denied"),
    ],
)
def test_the_refusal_of_any_shell_is_understood(
    shell: list[str], tmp_path: Path, command: str, code: int, reason: str
) -> None:
    launch = ImageDirectory(has_environment=True).launch(new_container(tmp_path, [command, "argument"]))
    done = run(shell, launch)
    (tmp_path / "stderr").write_bytes(done.stderr)
    assert done.returncode == code
    assert launch.refusal(code, tmp_path / "stderr") == f"{command}: {reason}"


def test_what_a_task_writes_is_no_refusal(shell: list[str], tmp_path: Path) -> None:
    container = new_container(tmp_path, ["sh", "-c", "no-such-command"])
    launch = ImageDirectory(has_environment=True).launch(container)
    (tmp_path / "stderr").write_bytes(run(shell, launch).stderr)
    assert launch.refusal(127, tmp_path / "stderr") is None


def test_a_directory_that_apptainer_has_not_built_needs_no_shell(tmp_path: Path) -> None:
    container = new_container(tmp_path, ["mytool"], env={"NAME": "value"})
    directory = ImageDirectory.of(tmp_path)
    assert directory.launch(container) == Launch(container.args, container.env)
    (tmp_path / ".singularity.d").mkdir()
    (tmp_path / ".singularity.d/runscript").write_text('#!/bin/sh\necho "There is no runscript defined for this container"')
    assert ImageDirectory.of(tmp_path) == directory


def test_a_runscript_is_left_out_where_it_is_not_wanted(tmp_path: Path) -> None:
    directory = ImageDirectory(has_environment=False, has_runscript=True)
    container = replace(new_container(tmp_path, ["mytool"]), without_entrypoint=True)
    assert directory.launch(container) == Launch(container.args, container.env)


@pytest.mark.parametrize("directory", [ImageDirectory(), ImageDirectory(has_environment=True), ImageDirectory(True, True)])
def test_nothing_to_run_is_an_error_and_no_success(tmp_path: Path, directory: ImageDirectory) -> None:
    with pytest.raises(NodeError, match="the image / has no command of its own"):
        directory.launch(new_container(tmp_path, []))


def test_a_name_that_no_shell_can_set_is_an_error(tmp_path: Path) -> None:
    container = new_container(tmp_path, ["true"], env={"a; reboot": ""})
    with pytest.raises(NodeError, match="a shell cannot set a variable named 'a; reboot'"):
        ImageDirectory(has_environment=True).launch(container)
