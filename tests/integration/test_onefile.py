import os
import shutil
import subprocess
import sys
import tempfile
import uuid
import zipapp
import zipfile
from collections.abc import Iterator
from importlib.machinery import EXTENSION_SUFFIXES
from pathlib import Path

import pytest

from onefile.__main__ import found_pythons, make
from tests.integration.test_guardian import guardians
from tests.support.containment import CONTAINMENTS
from tests.support.paths import ROOT
from tests.support.processes import processes_with
from tests.support.users import AS_ROOT, NOBODY
from tests.support.waiting import until_sync

TIMEOUT = 60
PYTHONS = list(found_pythons())
TAG = EXTENSION_SUFFIXES[0].split(".")[1]  # the folder of this Python


@pytest.fixture
def scratch() -> Iterator[Path]:
    """The directory of a job, which belongs to a user without a home."""
    directory = Path(tempfile.mkdtemp(prefix="trio-pilot-scratch-"))
    if AS_ROOT:
        os.chown(directory, NOBODY, NOBODY)
    yield directory
    shutil.rmtree(directory)


@pytest.fixture
def job(onefile: Path, scratch: Path) -> Path:
    """The file as the executable of a job."""
    return Path(shutil.copy(onefile, scratch / "condor_exec.exe"))


def run(*task: str, runtime: str = "process", task_image: str = "/") -> list[str]:
    queues = ["--queue-incoming=events", "--queue-outgoing=outputs", "--timeout-queue-incoming=0.3"]
    return ["run", *queues, f"--runtime={runtime}", f"--task-image={task_image}", f"--task-args={' '.join(task)}"]


def in_nothing(scratch: Path, *command: str | Path, given: str = "") -> str:
    """Run a command in an empty environment; return its output."""
    return subprocess.run(
        command, cwd=scratch, env={}, input=given, stdout=subprocess.PIPE, text=True, timeout=TIMEOUT, check=True
    ).stdout


def copies(scratch: Path, event: str, *command: str | Path) -> None:
    """Send an event, copy it to the output by a task, and receive the output."""
    in_nothing(scratch, *command, "send", "events", given=event)
    in_nothing(scratch, *command, *run("cp", "{{INFILE}}", "{{OUTFILE}}"))
    assert in_nothing(scratch, *command, "receive", "outputs", "--idle", "0.1") == f"{event}\n"


def test_it_runs_without_environment_and_home_and_unpacks_nothing(onefile: Path, scratch: Path) -> None:
    as_nobody = ["setpriv", f"--reuid={NOBODY}", f"--regid={NOBODY}", "--clear-groups"] if AS_ROOT else []
    for attempt in ('"first"', '"second"'):
        copies(scratch, attempt, *as_nobody, onefile)
        assert [path.name for path in scratch.iterdir() if not path.name.startswith("trio-pilot-queues.sqlite")] == []


@pytest.mark.parametrize("python", PYTHONS)
def test_it_runs_with_every_python_for_which_it_was_made(onefile: Path, scratch: Path, python: str) -> None:
    copies(scratch, '"event"', shutil.which(python) or python, "-I", "-S", onefile)


def test_it_has_what_its_help_and_demo_need(onefile: Path, scratch: Path) -> None:
    assert "--queue-incoming" in in_nothing(scratch, onefile, "run", "--help")
    assert "Best pixel: 65" in in_nothing(scratch, onefile, "demo", "--runtime", "process")


@pytest.mark.parametrize("python", ["", sys.executable], ids=["none", "found"])
def test_a_python_for_which_it_was_not_made_is_replaced(tmp_path: Path, python: str) -> None:
    (tmp_path / "archive").mkdir()
    (tmp_path / "archive/tags").write_text("cpython-399-x86_64-linux-gnu")
    shutil.copy(ROOT / "onefile/start.py", tmp_path / "archive/__main__.py")
    zipapp.create_archive(tmp_path / "archive", tmp_path / "file")
    if python:
        (tmp_path / "python3.99").write_text('#!/bin/sh\necho another: "$@"\n')
        (tmp_path / "python3.99").chmod(0o755)
    command: list[str | Path] = [sys.executable, tmp_path / "file", "check"]
    done = subprocess.run(command, env={"PATH": str(tmp_path)}, capture_output=True, text=True, check=False)
    if python:
        assert done.stdout == f"another: -I -S {tmp_path}/file check\n"
    else:
        assert done.returncode == 4
        assert done.stderr.startswith(f"trio-pilot: made for cpython-399-x86_64-linux-gnu; {sys.executable} is cpython-3")


def test_a_directory_is_used_where_memory_cannot_be_executed(onefile: Path, scratch: Path) -> None:
    code = """
import sys, os, zipimport
def forbidden(name): raise PermissionError(name)
os.memfd_create = forbidden
file = sys.argv[1]
from importlib.machinery import EXTENSION_SUFFIXES
folder = f"{file}/{EXTENSION_SUFFIXES[0].split('.')[1]}"
sys.path.insert(0, folder)
from onefile.extensions import Extensions
sys.meta_path.append(Extensions(zipimport.zipimporter(file), folder))
import zstandard
print(zstandard.decompress(zstandard.compress(b"compressed")), zstandard.backend_c.__spec__.origin)
"""
    command = [sys.executable, "-I", "-S", "-c", code, str(onefile)]
    env = {"_CONDOR_SCRATCH_DIR": str(scratch)}
    done = subprocess.run(command, cwd="/", env=env, capture_output=True, text=True, timeout=TIMEOUT, check=False)
    assert done.stderr == ""
    assert done.stdout.startswith(f"b'compressed' {scratch}/.trio-pilot-")
    assert list(scratch.iterdir()) == []


@pytest.mark.parametrize("runtime", ["process", "docker"])
def test_its_guardian_cleans_up_when_pilot_and_file_are_gone(
    job: Path, runtime: str, request: pytest.FixtureRequest
) -> None:
    containment = CONTAINMENTS[runtime](request)
    mark = f"mark-{uuid.uuid4().hex}"
    task = ("sh", "-c", f"'touch {{{{DATA_HUB}}}}/ready; sleep 1000; : {mark}'")
    data = job.parent / "ewms-pilot-data"
    subprocess.run([job, "send", "events"], cwd=job.parent, input=b"1", check=True)
    pilot = subprocess.Popen(
        [job, *run(*task, **containment.settings)], cwd=job.parent, env=containment.variables, stderr=subprocess.DEVNULL
    )
    try:
        until_sync(lambda: (data / "data-hub/ready").exists(), "the task to start")
        until_sync(
            lambda: [Path(f"/proc/{pid}/cwd").readlink() for pid in guardians(pilot.pid)] == [Path("/")], "the guardian"
        )
        job.unlink()
    finally:
        pilot.kill()
        pilot.wait()
    until_sync(lambda: not processes_with(mark) and not containment.containers(), "the task to end")
    until_sync(lambda: not processes_with(str(job)), "the guardian to go")
    assert not data.exists()


def members(file: Path, folder: str) -> dict[str, bytes]:
    with zipfile.ZipFile(file) as archive:
        return {name: archive.read(name) for name in archive.namelist() if name.startswith(f"{folder}/")}


def test_made_again_it_is_the_same(onefile: Path, tmp_path: Path) -> None:
    before = os.umask(0o077)
    try:
        make(tmp_path / "again", [sys.executable])
    finally:
        os.umask(before)
    assert members(tmp_path / "again", TAG) == members(onefile, TAG)


@pytest.mark.soak
def test_made_twice_elsewhere_it_is_the_same_to_the_byte(onefile: Path, tmp_path: Path) -> None:
    for name in ("trio_pilot", "onefile", ".ci"):
        shutil.copytree(ROOT / name, tmp_path / name, ignore=shutil.ignore_patterns("__pycache__"))
    for name in ("pyproject.toml", "README.md", "LICENSE"):
        shutil.copy(ROOT / name, tmp_path / name)
    subprocess.run([sys.executable, "-m", "onefile", *PYTHONS], cwd=tmp_path, check=True)
    assert (tmp_path / "dist/trio-pilot").read_bytes() == onefile.read_bytes()
