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
from trio_pilot.runtimes.apptainer_directory import ImageDirectory, Runscript
from trio_pilot.runtimes.image_shell import Launch, launch

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


@pytest.fixture
def image(tmp_path: Path) -> ImageDirectory:
    (tmp_path / "script.sh").write_text("export OF_THE_IMAGE='it''s'; set -- changed; false")
    return ImageDirectory(scripts=[str(tmp_path / "script.sh")])


SHOW = """
import os, sys
sys.stdout.buffer.write(repr((dict(os.environb), list(map(os.fsencode, sys.argv[1:])))).encode())
"""


def test_arguments_and_variables_pass_through_any_shell(shell: list[str], image: ImageDirectory, tmp_path: Path) -> None:
    env = {"EVERY": EVERY_BYTE, "EMPTY": "", "NEWLINES": "a\n\n", **OF_SHELLS}
    args = [EVERY_BYTE, "", " a  b ", "-n"]
    container = new_container(tmp_path, [sys.executable, "-c", SHOW, *args], env=env)
    variables, seen = ast.literal_eval(run(shell, launch(image, container, {})).stdout.decode())
    assert seen == list(map(os.fsencode, args))
    assert {name: variables.get(name.encode()) for name in env} == {name: os.fsencode(env[name]) for name in env}
    assert not [name for name in variables if name.startswith(b"TRIO_PILOT_TASK")]
    assert variables[b"OF_THE_IMAGE"] == b"its"


def test_a_variable_that_a_shell_keeps_for_itself_does_not_stop_the_task(
    shell: list[str], image: ImageDirectory, tmp_path: Path
) -> None:
    container = new_container(tmp_path, ["echo", "done"], env={"UID": "7", "PPID": "7", "SHELLOPTS": "x"})
    assert run(shell, launch(image, container, {})).stdout == b"done\n"


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
    shell: list[str], image: ImageDirectory, tmp_path: Path, command: str, code: int, reason: str
) -> None:
    payload = launch(image, new_container(tmp_path, [command, "argument"]), {})
    done = run(shell, payload)
    (tmp_path / "stderr").write_bytes(done.stderr)
    assert done.returncode == code
    assert payload.refusal(code, tmp_path / "stderr") == f"{command}: {reason}"


def test_what_a_task_writes_is_no_refusal(shell: list[str], image: ImageDirectory, tmp_path: Path) -> None:
    container = new_container(tmp_path, ["sh", "-c", "no-such-command"])
    payload = launch(image, container, {})
    (tmp_path / "stderr").write_bytes(run(shell, payload).stderr)
    assert payload.refusal(127, tmp_path / "stderr") is None


def test_the_entrypoint_is_left_out_where_it_is_not_wanted(tmp_path: Path) -> None:
    container = replace(new_container(tmp_path, ["mytool"]), without_entrypoint=True)
    for image in (
        ImageDirectory(runscript=Runscript(is_own=True)),
        ImageDirectory(runscript=Runscript(entrypoint=["x"], command=["y"])),
    ):
        assert launch(image, container, {}) == Launch(["mytool"], {})
        with pytest.raises(NodeError, match="has no command of its own"):
            launch(image, replace(container, args=()), {})


def test_variables_are_those_of_the_image_the_runtime_and_the_task_in_turn(tmp_path: Path) -> None:
    image = ImageDirectory(variables={"A": "image", "B": "image", "C": "image"})
    container = new_container(tmp_path, ["mytool"], env={"C": "task"})
    assert launch(image, container, {"B": "runtime", "C": "runtime"}).env == {"A": "image", "B": "runtime", "C": "task"}


@pytest.mark.parametrize("image", [ImageDirectory(), ImageDirectory(scripts=["x"]), ImageDirectory(runscript=Runscript())])
def test_nothing_to_run_is_an_error_and_no_success(tmp_path: Path, image: ImageDirectory) -> None:
    with pytest.raises(NodeError, match="the image / has no command of its own"):
        launch(image, new_container(tmp_path, []), {})


def test_a_name_that_no_shell_can_set_is_an_error(image: ImageDirectory, tmp_path: Path) -> None:
    container = new_container(tmp_path, ["true"], env={"a; reboot": ""})
    with pytest.raises(NodeError, match="a shell cannot set a variable named 'a; reboot'"):
        launch(image, container, {})
