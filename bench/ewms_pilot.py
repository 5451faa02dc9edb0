"""ewms-pilot as a side of a measurement: from PyPI, in a virtual environment of its own."""

import subprocess
import sys
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from functools import cache
from pathlib import Path
from typing import Any

from bench.broker import Queues
from bench.load import Start
from bench.measured_process import Measured, running
from bench.pilot import IDLE_TIMEOUT, environment
from bench.report import ROOT

VERSION = "0.27.0"
# ewms-pilot accepts any htcondor; from 25 on that no longer has a module `htcondor`.
PACKAGES = (f"ewms-pilot[rabbitmq]=={VERSION}", "htcondor<25")
ENVIRONMENT = ROOT / ".venv-ewms-pilot"

# A stand-in for apptainer that starts the command as a plain process: ewms-pilot can run nothing that costs less.
STAND_IN = """#!/bin/sh
while [ "$1" != / ]; do
    case "$1" in
    type=bind,source=*,target=/ewms-pilot-data/task-io) io=${1#type=bind,source=} io=${io%,target=*} ;;
    esac
    shift
done
shift
for word do
    shift
    case "$word" in
    /ewms-pilot-data/task-io/*) word=$io${word#/ewms-pilot-data/task-io} ;;
    esac
    set -- "$@" "$word"
done
exec "$@"
"""
MOUNTS = " ".join(f"--mount type=bind,source=/a,target=/ewms-pilot-data/{name}" for name in ("data-hub", "task-io"))
# Arguments like those of ewms-pilot, of the same length; trio-pilot runs the stand-in with these.
STAND_IN_ARGS = f"run --containall --no-eval {MOUNTS} --env A=a --env B=b --env C=c /"


@cache
def program() -> Path:
    """Install ewms-pilot, if it is not installed; return its Python."""
    python = ENVIRONMENT / "bin/python"
    if not python.exists():
        subprocess.run([sys.executable, "-m", "venv", str(ENVIRONMENT)], check=True)
    subprocess.run([str(python), "-m", "pip", "install", "--quiet", *PACKAGES], stdout=sys.stderr, check=True)
    return python


def stand_in(directory: Path) -> Path:
    """Write the stand-in for apptainer into a directory, for PATH; return the path of the stand-in."""
    path = directory / "apptainer"
    path.write_text(STAND_IN)
    path.chmod(0o755)
    return path


def ewms_pilot(settings: Mapping[str, Any], env: Mapping[str, str]) -> Start:
    """Return a function that starts an ewms-pilot with these settings, which have the names of trio-pilot's."""

    @contextmanager
    def start(queues: Queues, directory: Path) -> Iterator[Measured]:
        env_of_pilot = {**environment(), **_variables(queues, directory, settings), **env}
        with running([str(program()), "-m", "ewms_pilot"], directory, env_of_pilot) as process:
            yield process

    return start


def _variables(queues: Queues, directory: Path, settings: Mapping[str, Any]) -> dict[str, str]:
    given = {
        "QUEUE_INCOMING": queues.incoming,
        "QUEUE_OUTGOING": queues.outgoing,
        **{f"QUEUE_{way}_BROKER_TYPE": "rabbitmq" for way in ("INCOMING", "OUTGOING")},
        **{f"QUEUE_{way}_BROKER_ADDRESS": queues.address for way in ("INCOMING", "OUTGOING")},
        "TIMEOUT_QUEUE_INCOMING": IDLE_TIMEOUT,
        "DATA_DIR_PARENT_PATH_ON_HOST": directory,
        "CL_LOG": "WARNING",
        **{name.upper(): value for name, value in settings.items()},
    }
    return {f"EWMS_PILOT_{name}": str(value) for name, value in given.items()}


def platform(name: str) -> dict[str, str]:
    """Return the variables that make ewms-pilot use a container platform.

    With docker it would fetch an image, unless CI is set. As root with apptainer it requests all capabilities, which a
    machine may not have.
    """
    return {"_EWMS_PILOT_CONTAINER_PLATFORM": name, "CI": "true", "APPTAINER_NO_PRIVS": "true"}
