import math
import os
import re
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from trio_pilot.cli import demo_sky

TIMEOUT = 120
NAMES = ("bubblewrap", "process")


@pytest.fixture
def temporary() -> Iterator[Path]:
    # A short path: the directories of pytest have long and numbered ones.
    directory = Path("/tmp", f"demo-test-{os.getpid()}")
    directory.mkdir()
    yield directory
    shutil.rmtree(directory)


def start(directory: Path, *arguments: str) -> "subprocess.Popen[str]":
    return subprocess.Popen(
        [sys.executable, "-m", "trio_pilot", "demo", *arguments],
        cwd="/",
        env={**os.environ, "TMPDIR": str(directory), "EWMS_PILOT_MAX_CONCURRENT_TASKS": "none of its business"},
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )


def tasks_of(directory: Path) -> list[str]:
    found = []
    for process in Path("/proc").glob("[0-9]*"):
        try:
            environment = (process / "environ").read_bytes() + (process / "cmdline").read_bytes()
        except OSError:
            continue
        if b"demo_task.py" in environment and str(directory).encode() in environment:
            found.append(process.name)
    return found


@pytest.mark.parametrize("runtime", NAMES)
def test_the_demo_finds_the_best_pixel_and_leaves_no_files(
    temporary: Path, runtime: str, need: Callable[[str, str], None]
) -> None:
    if runtime == "bubblewrap":
        need("bwrap", "bubblewrap")
    process = start(temporary, "--runtime", runtime)
    said, told = process.communicate(timeout=TIMEOUT)
    assert told == ""
    assert process.returncode == 0
    assert "Best pixel: 65, 6.0° from the true direction" in said
    assert re.search(r"192 tasks in \d+\.\d s, \d+ a second", said)
    assert list(temporary.iterdir()) == []
    assert tasks_of(temporary) == []


@pytest.mark.parametrize(("number", "word"), [(signal.SIGINT, "interrupted"), (signal.SIGTERM, "ended by SIGTERM")])
@pytest.mark.parametrize("moment", [0.0, 0.1, 1.0])
def test_a_demo_ended_by_a_signal_prints_a_line_and_leaves_no_files(
    temporary: Path, number: signal.Signals, word: str, moment: float
) -> None:
    process = start(temporary, "--max-concurrent-tasks", "2")
    assert process.stdout
    assert process.stdout.readline().startswith("A simulated event")
    time.sleep(moment)
    process.send_signal(number)
    said, told = process.communicate(timeout=TIMEOUT)
    assert (process.returncode, said, told) == (128 + number, "", f"trio-pilot: {word}\n")
    assert list(temporary.iterdir()) == []
    assert tasks_of(temporary) == []


def test_without_bubblewrap_the_demo_runs_plain_processes(temporary: Path) -> None:
    environ = {**os.environ, "TMPDIR": str(temporary), "PATH": "/nonexistent"}
    command = [sys.executable, "-m", "trio_pilot", "demo"]
    done = subprocess.run(command, cwd="/", env=environ, capture_output=True, text=True, timeout=TIMEOUT, check=True)
    assert "not contained at all" in done.stdout
    assert "Best pixel: 65" in done.stdout


def test_pixels_are_where_healpix_has_them() -> None:
    # Made with healpy.pix2ang(nside, pixel), ring scheme, in degrees.
    known = {
        (1, 0): (48.189685, 45.0),
        (1, 4): (90.0, 0.0),
        (1, 11): (131.810315, 315.0),
        (4, 0): (11.715852, 45.0),
        (4, 24): (48.189685, 11.25),
        (4, 40): (60.0, 0.0),
        (4, 88): (90.0, 11.25),
        (4, 168): (144.340912, 15.0),
        (4, 191): (168.284148, 315.0),
    }
    for (nside, pixel), direction in known.items():
        assert [math.degrees(angle) for angle in demo_sky.pix2ang(nside, pixel)] == pytest.approx(direction, abs=1e-6)


def test_pixels_cover_the_sky_evenly() -> None:
    directions = [demo_sky.pix2ang(demo_sky.NSIDE, pixel) for pixel in range(demo_sky.PIXELS)]
    assert len(set(directions)) == demo_sky.PIXELS
    assert sum(math.cos(zenith) for zenith, _ in directions) == pytest.approx(0, abs=1e-9)
    nearest = min(range(demo_sky.PIXELS), key=lambda pixel: demo_sky.distance(directions[pixel], demo_sky.TRUTH))
    assert nearest == 65


def test_the_simulated_event_is_the_same_each_time() -> None:
    assert list(demo_sky.events()) == list(demo_sky.events())
