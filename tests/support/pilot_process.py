"""The installed command, as EWMS starts it: by environment variables alone."""

import os
import shutil
import subprocess
import sys
from collections.abc import Iterator, Mapping
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass
from pathlib import Path

COMMAND = str(Path(sys.executable).parent / "trio-pilot")


@dataclass(frozen=True)
class Ended:
    code: int
    stderr: str

    @property
    def last_line(self) -> str:
        return self.stderr.splitlines()[-1]


def environment(settings: Mapping[str, object]) -> dict[str, str]:
    names = {name: name if name.startswith("_") else f"EWMS_PILOT_{name}" for name in settings}
    return {"PATH": os.environ["PATH"]} | {names[name]: str(value) for name, value in settings.items()}


@contextmanager
def pilot(
    directory: Path, settings: Mapping[str, object], *arguments: str, log: Path | None = None
) -> Iterator["subprocess.Popen[str]"]:
    """Run the pilot in a directory of its own; killed with what it has started when this ends.

    What it says goes into a pipe, and it waits once that is full (64 KiB) and nobody reads: who has it run for long names a
    file instead.
    """
    with (
        log.open("w") if log else nullcontext(subprocess.PIPE) as stderr,
        subprocess.Popen([COMMAND, *arguments], cwd=directory, env=environment(settings), stderr=stderr, text=True) as child,
    ):
        try:
            yield child
        finally:
            child.kill()


def run_pilot(directory: Path, settings: Mapping[str, object], *arguments: str, timeout: float = 120) -> Ended:
    with pilot(directory, settings, *arguments) as child:
        _, stderr = child.communicate(timeout=timeout)
        return Ended(child.returncode, stderr)


def assert_nothing_left(directory: Path) -> None:
    """Say that a pilot has left no file in its directory, and no process that knows of it."""
    assert list(directory.iterdir()) == []
    assert processes_of(directory) == []


def processes_of(directory: Path) -> list[str]:
    """List the processes that work in a directory, or have it in their environment or on their command line."""
    found = []
    for process in Path("/proc").iterdir():
        if not process.name.isdigit() or int(process.name) == os.getpid():
            continue
        try:
            facts = (process / "cmdline").read_bytes() + (process / "environ").read_bytes()
            place = str((process / "cwd").readlink())
        except OSError:
            continue
        if str(directory).encode() in facts or place.startswith(str(directory)):
            found.append(f"{process.name}: {facts[:200]!r}")
    return found


def cp() -> str:
    path = shutil.which("cp")
    assert path
    return path
