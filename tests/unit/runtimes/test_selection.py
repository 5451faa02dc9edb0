from contextlib import AbstractAsyncContextManager
from dataclasses import dataclass
from pathlib import Path

import pytest

from tests.support.users import as_nobody
from trio_pilot.errors import NodeError
from trio_pilot.runtimes import Options, Runtime, selection
from trio_pilot.runtimes.selection import NAMES, choose, open_runtime
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


@pytest.fixture
def broken(monkeypatch: pytest.MonkeyPatch) -> set[str]:
    """Name the runtimes that do not work here."""
    broken: set[str] = set()
    monkeypatch.setattr(selection, "_family", lambda name: FakeFamily(name, f"no {name}" if name in broken else None))
    return broken


@pytest.mark.parametrize(
    ("image", "options", "order"),
    [
        ("python:3.12", OPTIONS, ["docker", "podman"]),
        ("python:3.12", ANY_IMAGE, ["docker", "podman", "apptainer"]),
        ("docker://python:3.12", ANY_IMAGE, ["apptainer"]),
        ("docker://python:3.12", OPTIONS, []),
        ("{a file}", ANY_IMAGE, ["apptainer"]),
        ("{a directory}", OPTIONS, ["apptainer", "bubblewrap"]),
        ("/", OPTIONS, ["bubblewrap", "process"]),
        ("", OPTIONS, ["bubblewrap", "process"]),
    ],
)
async def test_auto_is_the_first_that_works_and_can_have_the_image(
    broken: set[str], tmp_path: Path, image: str, options: Options, order: list[str]
) -> None:
    (tmp_path / "image.sif").touch()
    image = image.format(**{"a file": tmp_path / "image.sif", "a directory": tmp_path})
    passed_over: list[tuple[str, str]] = []
    for name in order:
        found = await choose("auto", image, options)
        assert found.name == name
        assert found.passed_over == passed_over
        broken.add(name)
        passed_over.append((name, f"no {name}"))
    with pytest.raises(NodeError, match="no runtime works here for the image") as failure:
        await choose("auto", image, options)
    told = [f"{name} does not work here: no {name}" for name in order] or ["DIRECTORY_MUST_BE_PRESENT=false"]
    assert all(one in str(failure.value) for one in told)


@pytest.mark.usefixtures("broken")
@pytest.mark.parametrize("name", NAMES)
async def test_a_runtime_that_is_named_is_taken(name: str) -> None:
    async with open_runtime(name, "an:image", OPTIONS) as runtime:
        assert runtime.name == name


async def test_a_runtime_that_is_named_is_not_replaced_by_another(broken: set[str]) -> None:
    broken.add("docker")
    with pytest.raises(NodeError, match="docker does not work here: no docker"):
        await choose("docker", "an:image", OPTIONS)


async def test_an_image_that_is_no_directory_and_no_tag_is_asked_of_nobody() -> None:
    with pytest.raises(NodeError, match="there is no image /nonexistent"):
        await choose("auto", "/nonexistent", OPTIONS)


@pytest.mark.usefixtures("broken")
async def test_a_name_that_is_too_long_for_a_file_is_a_tag() -> None:
    assert (await choose("auto", "x" * 300, OPTIONS)).name == "docker"


async def test_an_image_where_we_may_not_look_is_not_there(locked: Path) -> None:
    with as_nobody(), pytest.raises(NodeError, match=f"there is no image {locked}/image"):
        await choose("auto", f"{locked}/image", OPTIONS)


@pytest.mark.usefixtures("broken")
@pytest.mark.parametrize(("name", "is_told"), [("docker", False), ("bubblewrap", True)])
async def test_what_a_runtime_does_not_heed_is_told(caplog: pytest.LogCaptureFixture, name: str, is_told: bool) -> None:
    async with open_runtime(name, "/", Options(debug=True, network="none", user="5")):
        assert ("does not heed --task-network, --task-user" in caplog.text) == is_told
