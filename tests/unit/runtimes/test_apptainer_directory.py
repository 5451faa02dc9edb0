import os
import subprocess
from pathlib import Path

import pytest

from trio_pilot.errors import NodeError
from trio_pilot.runtimes.apptainer_directory import (
    ImageDirectory,
    Runscript,
    docker_variables,
    mended_environment,
    with_usual_path,
)

# Written by apptainer 1.1 to 1.3 for these values.
ENVIRONMENT = r"""#!/bin/sh
export PATH="/app/bin"
export A="${A:-"b c"}"
export Q="${Q:-"it's \\\"x\\\" \\$y \\`z\\` b\\\\c"}"
export E="${E:-""}"
export M="${M:-"l1\nl2\té \x1b\u200b"}"
export BYTE="${BYTE:-"\xff"}"
export NOVAL="${NOVAL:-}"
"""
VALUES = {
    "PATH": "/app/bin",
    "A": "b c",
    "Q": 'it\'s "x" $y `z` b\\c',
    "E": "",
    "M": "l1\nl2\té \x1b\u200b",
    "BYTE": os.fsdecode(b"\xff"),
}
RUNSCRIPT = r"""#!/bin/sh
OCI_ENTRYPOINT='"echo" "ep"'
OCI_CMD='"c m" "it'"'"'s \$x" "l1
l2" "" "\"q\" \\ \`"'

if [ -n "$SINGULARITY_NO_EVAL" ]; then
    exec "$@"
fi
"""
ALSO_OF_APPTAINER = """#!/bin/sh
if [ -z "${LD_LIBRARY_PATH:-}" ]; then
    LD_LIBRARY_PATH="/.singularity.d/libs"
fi
"""


@pytest.fixture
def image(tmp_path: Path) -> Path:
    (tmp_path / ".singularity.d/env").mkdir(parents=True)
    (tmp_path / ".singularity.d/env/10-docker2singularity.sh").write_text(ENVIRONMENT)
    (tmp_path / ".singularity.d/env/90-environment.sh").write_text("#!/bin/sh\n# Custom environment\n\n")
    (tmp_path / ".singularity.d/env/99-base.sh").write_text(ALSO_OF_APPTAINER)
    (tmp_path / ".singularity.d/runscript").write_text(RUNSCRIPT)
    return tmp_path


def test_a_docker_image_is_read_without_a_shell(image: Path) -> None:
    directory = ImageDirectory.of(image)
    assert directory.variables == with_usual_path(VALUES)
    runscript = directory.runscript
    assert runscript.entrypoint == ["echo", "ep"]
    assert runscript.command == ["c m", "it's $x", "l1\nl2", "", '"q" \\ `']
    assert (runscript.is_own, directory.scripts, runscript.has_command) == (False, [], True)
    assert runscript.argv(["mine"]) == ["echo", "ep", "mine"]
    assert runscript.argv([])[2:4] == ["c m", "it's $x"]


def test_the_usual_directories_follow_in_a_path() -> None:
    assert (
        with_usual_path({"PATH": "/app:/bin"})["PATH"] == "/app:/bin:/usr/local/sbin:/usr/local/bin:/usr/sbin:/usr/bin:/sbin"
    )
    assert with_usual_path({}) == {}


def test_the_mended_script_has_the_values_that_the_image_had(image: Path, tmp_path: Path) -> None:
    mended = mended_environment(image)
    assert mended
    script = tmp_path / "mended.sh"
    script.write_text(mended, "utf-8", "surrogateescape")
    given = {"A": "of the task"}
    shown = subprocess.run(["sh", "-c", f". {script}; exec /usr/bin/env -0"], env=given, capture_output=True, check=True)
    variables = dict(entry.partition("=")[::2] for entry in os.fsdecode(shown.stdout).split("\0"))
    assert {name: variables[name] for name in VALUES} == {**VALUES, "A": "of the task"}


def test_a_script_that_needs_no_mending_is_left_alone(image: Path) -> None:
    (image / ".singularity.d/env/10-docker2singularity.sh").write_text('#!/bin/sh\nexport A="${A:-"it\'s"}"\n')
    assert mended_environment(image) is None


@pytest.mark.parametrize("line", ['export A="$(id)"', 'A="b"', 'export A="${B:-"c"}"', "id", 'export A="b"; id', ". /x"])
def test_any_other_script_is_left_to_a_shell(image: Path, line: str) -> None:
    script = image / ".singularity.d/env/10-docker2singularity.sh"
    script.write_text(f"#!/bin/sh\n{line}\n")
    assert docker_variables(script.read_text()) is None
    (image / "bin").mkdir()
    (image / "bin/sh").symlink_to("busybox")
    assert ImageDirectory.of(image).scripts == ["/.singularity.d/env/10-docker2singularity.sh"]


def test_a_script_of_a_persons_own_is_left_to_a_shell(image: Path) -> None:
    (image / ".singularity.d/env/90-environment.sh").write_text("#!/bin/sh\nexport MODEL=spline\n")
    with pytest.raises(NodeError, match=f"^the image {image} has scripts for its start, but no /bin/sh to run them"):
        ImageDirectory.of(image)
    (image / "bin").mkdir()
    (image / "bin/sh").symlink_to("busybox")
    directory = ImageDirectory.of(image)
    assert directory.scripts == ["/.singularity.d/env/90-environment.sh"]
    assert directory.variables["A"] == "b c"


@pytest.mark.parametrize("text", ["", 'exec python3 "$@"', "OCI_CMD='\"x\"'", 'OCI_ENTRYPOINT="x"\nOCI_CMD=\'"x"\''])
def test_any_other_runscript_is_left_to_a_shell(text: str) -> None:
    assert Runscript.parse(text) == Runscript(is_own=bool(text))


def test_a_docker_image_without_a_command_has_none(image: Path) -> None:
    (image / ".singularity.d/runscript").write_text("#!/bin/sh\nOCI_ENTRYPOINT=''\nOCI_CMD=''\n")
    runscript = ImageDirectory.of(image).runscript
    assert (runscript.has_command, runscript.is_own) == (False, False)
    assert runscript.argv(["mytool", "x"]) == ["mytool", "x"]


def test_a_directory_that_apptainer_has_not_built_says_nothing(tmp_path: Path) -> None:
    assert ImageDirectory.of(tmp_path) == ImageDirectory()
    (tmp_path / ".singularity.d").mkdir()
    (tmp_path / ".singularity.d/runscript").write_text('#!/bin/sh\necho "There is no runscript defined for this container"')
    assert ImageDirectory.of(tmp_path) == ImageDirectory()
