"""The installed command, started as EWMS starts it: with environment variables. `pilots` starts it with flags."""

import os
import shutil
import subprocess
import sys
from collections.abc import Iterator, Mapping
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass
from pathlib import Path

from tests.support.processes import processes_of
from tests.support.waiting import PILOT_RUN

COMMAND = str(Path(sys.executable).with_name("trio-pilot"))


@dataclass(frozen=True)
class Ended:
    """How a pilot ended, and what it wrote to stderr."""

    code: int
    stderr: str

    @property
    def last_line(self) -> str:
        return self.stderr.splitlines()[-1]


def environment(settings: Mapping[str, object]) -> dict[str, str]:
    """Return the environment of a pilot: PATH, settings by their names, and as they are names that begin with `_`."""
    names = {name: name if name.startswith("_") else f"EWMS_PILOT_{name}" for name in settings}
    return {"PATH": os.environ["PATH"]} | {names[name]: str(value) for name, value in settings.items()}


@contextmanager
def pilot(
    directory: Path, settings: Mapping[str, object], *arguments: str, log: Path | None = None
) -> Iterator["subprocess.Popen[str]"]:
    """Run a pilot in a directory of its own, and kill it in the end.

    Its stderr is a pipe, or the file `log`. A pipe takes 64 KiB until the test reads it, and the pilot then waits: a pilot
    that runs for long needs the file.
    """
    with (
        log.open("w") if log else nullcontext(subprocess.PIPE) as stderr,
        subprocess.Popen([COMMAND, *arguments], cwd=directory, env=environment(settings), stderr=stderr, text=True) as child,
    ):
        try:
            yield child
        finally:
            child.kill()


def run_pilot(directory: Path, settings: Mapping[str, object], *arguments: str, timeout: float = PILOT_RUN) -> Ended:
    """Run a pilot to its end."""
    with pilot(directory, settings, *arguments) as child:
        _, stderr = child.communicate(timeout=timeout)
        return Ended(child.returncode, stderr)


def assert_nothing_left(directory: Path) -> None:
    """Check that a pilot left no file in its directory, and no process that has to do with it."""
    assert list(directory.iterdir()) == []
    assert processes_of(directory) == []


def cp() -> str:
    """Return the path of the command `cp`."""
    path = shutil.which("cp")
    assert path
    return path
