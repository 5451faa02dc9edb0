"""The packages that pyproject.toml asks for, and those that the lock files name."""

import re
import tomllib

import pytest
from packaging.requirements import Requirement
from packaging.version import Version

from tests.support.paths import ROOT

PYPROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text())
PROJECT = PYPROJECT["project"]
BUILD = [Requirement(line) for line in PYPROJECT["build-system"]["requires"]]
RUNTIME = [Requirement(line) for line in PROJECT["dependencies"]]
OF_TESTS = [Requirement(line) for lines in PROJECT["optional-dependencies"].values() for line in lines]
LOCKS = {"packages.lock": RUNTIME, "packages-test.lock": RUNTIME + OF_TESTS, "packages-build.lock": BUILD}
PINNED = re.compile(r"^(?P<name>\S+)==(?P<version>\S+)(?P<rest>.*(?:\n .*)*)", re.MULTILINE)


def locked(name: str) -> dict[str, list[re.Match[str]]]:
    found: dict[str, list[re.Match[str]]] = {}
    for pin in PINNED.finditer((ROOT / ".ci" / name).read_text()):
        found.setdefault(pin["name"], []).append(pin)
    return found


@pytest.mark.parametrize(("lock", "asked"), LOCKS.items())
def test_a_lock_file_has_all_that_pyproject_asks_for(lock: str, asked: list[Requirement]) -> None:
    pins = locked(lock)
    for requirement in asked:
        if requirement.name != "trio-pilot":
            versions = [Version(pin["version"]) for pin in pins[requirement.name]]
            assert all(version in requirement.specifier for version in versions), requirement


@pytest.mark.parametrize("lock", LOCKS)
def test_every_locked_package_has_hashes(lock: str) -> None:
    assert [name for name, pins in locked(lock).items() if not all("--hash=sha256:" in pin["rest"] for pin in pins)] == []


def test_a_new_major_version_of_what_the_pilot_needs_is_not_taken_unseen() -> None:
    assert [one.name for one in RUNTIME if not any(limit.operator == "<" for limit in one.specifier)] == []
