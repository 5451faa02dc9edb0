from collections.abc import Collection
from contextlib import AbstractAsyncContextManager
from dataclasses import dataclass
from pathlib import Path

import pytest

from tests.support.users import as_nobody
from trio_pilot.errors import NodeError
from trio_pilot.runtimes import Options, Runtime
from trio_pilot.runtimes.selection import NAMES, Families, choose, open_runtime
from trio_pilot.testing import FakeRuntime


@dataclass
class FakeFamily:
    name: str
    why_not: str | None

    async def fault(self, options: Options) -> str | None:
        assert options.debug
        return self.why_not

    def open_runtime(self, options: Options) -> AbstractAsyncContextManager[Runtime]:
        assert options.debug
        return FakeRuntime(name=self.name).open()


OPTIONS = Options(debug=True)
ANY_IMAGE = Options(debug=True, only_directories=False)


def families(broken: Collection[str] = ()) -> Families:
    """Return a family for each name; those of `broken` do not work here."""
    return lambda name: FakeFamily(name, f"no {name}" if name in broken else None)


@pytest.mark.parametrize(
    ("image", "options", "order"),
    [
        ("python:3.12", OPTIONS, ["docker", "podman"]),
        ("python:3.12", ANY_IMAGE, ["docker", "podman", "apptainer"]),
        ("docker://python:3.12", ANY_IMAGE, ["apptainer"]),
        ("docker://python:3.12", OPTIONS, []),
        ("{a file}", ANY_IMAGE, ["apptainer"]),
        ("{a directory}", OPTIONS, ["bubblewrap", "apptainer"]),
        ("/", OPTIONS, ["bubblewrap", "process"]),
        ("", OPTIONS, ["bubblewrap", "process"]),
    ],
)
async def test_auto_is_the_first_that_works_and_can_run_the_image(
    tmp_path: Path, image: str, options: Options, order: list[str]
) -> None:
    (tmp_path / "image.sif").touch()
    image = image.format(**{"a file": tmp_path / "image.sif", "a directory": tmp_path})
    broken: list[str] = []
    for name in order:
        found = await choose("auto", image, options, families(broken))
        assert found.name == name
        assert found.passed_over == [(one, f"no {one}") for one in broken]
        broken.append(name)
    with pytest.raises(NodeError, match="no runtime works here for the image") as failure:
        await choose("auto", image, options, families(broken))
    told = [f"{name} does not work here: no {name}" for name in order] or ["DIRECTORY_MUST_BE_PRESENT=false"]
    assert all(one in str(failure.value) for one in told)


@pytest.mark.parametrize("name", NAMES)
async def test_a_runtime_that_is_named_is_used(name: str) -> None:
    async with open_runtime(name, "an:image", OPTIONS, families()) as runtime:
        assert runtime.name == name


async def test_a_runtime_that_is_named_is_not_replaced_by_another() -> None:
    with pytest.raises(NodeError, match="docker does not work here: no docker"):
        await choose("docker", "an:image", OPTIONS, families(["docker"]))


async def test_a_path_that_does_not_exist_is_an_error_for_every_runtime() -> None:
    with pytest.raises(NodeError, match="there is no image /nonexistent"):
        await choose("auto", "/nonexistent", OPTIONS, families())


async def test_a_name_that_is_too_long_for_a_file_is_a_tag() -> None:
    assert (await choose("auto", "x" * 300, OPTIONS, families())).name == "docker"


async def test_an_image_in_a_locked_directory_is_not_there(locked: Path) -> None:
    with as_nobody(), pytest.raises(NodeError, match=f"there is no image {locked}/image"):
        await choose("auto", f"{locked}/image", OPTIONS, families())


@pytest.mark.parametrize(("name", "is_told"), [("docker", False), ("bubblewrap", True)])
async def test_options_that_a_runtime_ignores_are_logged(caplog: pytest.LogCaptureFixture, name: str, is_told: bool) -> None:
    async with open_runtime(name, "/", Options(debug=True, network="host", user="5"), families()):
        assert ("ignores --task-network, --task-user" in caplog.text) == is_told


@pytest.mark.parametrize("options", [Options(network="none"), Options(protects_hub=True)])
async def test_the_process_runtime_refuses_what_it_cannot_keep_to(options: Options) -> None:
    flag = "--data-hub read-only" if options.protects_hub else "--task-network none"
    with pytest.raises(NodeError, match=f"^process does not work here: it cannot .*{flag}"):
        await choose("process", "/", options)
