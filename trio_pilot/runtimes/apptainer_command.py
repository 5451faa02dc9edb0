"""The apptainer command: its path, its version, its errors, and runs of it that are not tasks."""

import os
import re
import shutil
import tempfile
import uuid
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from trio_pilot.errors import NodeError, map_exceptions
from trio_pilot.processes.children import Children, Command

LEAST_VERSION = (1, 1)  # the first with --no-eval, without which a shell expands the arguments

NOT_FOUND = "there is no apptainer on PATH: install it (its package is apptainer), or put its bin directory there"

# A shell that keeps the pilot's marker in its environment, where apptainer drops it: it does not `exec` apptainer, but waits
# for it. All that apptainer starts is in its session.
LEADER = "/bin/sh", "-c", '"$@"; exit $?', "apptainer"

KILL_GRACE = 2.0  # seconds between SIGTERM and SIGKILL
MOST_TEXT = 65536  # bytes of stdout and stderr that are read

# `FATAL:   why`, the level padded to nine characters; with --debug `FATAL   [U=0,P=1]          StageTwo()           why`
LINE = re.compile(r"(?P<level>[A-Z]+)(?:: {1,5}(?<=.{9})(?=\S)|\s+\[U=\d+,P=\d+\]\s+\S*?\(\)\s*)(?P<text>.*)", re.DOTALL)

COLOUR = re.compile(r"\x1b\[[0-9;]*m")  # in errors that apptainer writes before it has read its flags


@dataclass(frozen=True, slots=True)
class CommandResult:
    """The exit code of a run, and what it wrote to stdout and stderr."""

    code: int
    text: str

    @property
    def reason(self) -> str:
        """The reason why it failed, in apptainer's words."""
        return fatal(self.text, among_others=True) or self.text.strip()[-1000:] or f"exit code {self.code}"


class Apptainer:
    """The program, and the processes that run it."""

    def __init__(self, path: str, directory: Path) -> None:
        self.path = path
        # For the stdout and stderr of runs: the one place that must be writable. Not every Python has os.memfd_create.
        self._directory = directory
        self.children = Children()

    @classmethod
    def find(cls, directory: Path) -> "Apptainer":
        """Find apptainer on PATH, where it may be named singularity. Raises NodeError if it is not there."""
        found = shutil.which("apptainer") or shutil.which("singularity")
        if found is None:
            raise NodeError(NOT_FOUND)
        return cls(str(Path(found).absolute()), directory)

    async def check_version(self) -> None:
        """Check the version. Raises NodeError if it fails, is too old, or is another program of that name."""
        result = await self.run(["--version"], environment())
        if result.code:
            raise NodeError(f"{self.path} fails: {result.reason}")
        match = re.search(r"^apptainer version (\d+)\.(\d+)", result.text, re.MULTILINE)
        if match is None or (int(match[1]), int(match[2])) < LEAST_VERSION:
            least = ".".join(map(str, LEAST_VERSION))
            found = result.text.strip()[:200]
            raise NodeError(f"{self.path} must be apptainer {least} or later, but it says {found!r}: install a newer one")

    async def run(self, args: Sequence[str], env: Mapping[str, str], pass_fds: Sequence[int] = ()) -> CommandResult:
        """Run apptainer to its end, and return how it ended. If cancelled, it and all processes below it have ended.

        Raises:
            NodeError: it cannot be started.
        """
        starting = map_exceptions({OSError: NodeError}, f"cannot start {self.path}")
        with starting, tempfile.TemporaryFile(dir=self._directory) as output:
            marker = f"apptainer-{uuid.uuid4()}"
            command = Command([*LEADER, self.path, *args], env, Path.cwd(), output, output, marker, pass_fds)
            code = await self.children.spawn(command).wait_and_end(KILL_GRACE)
            size = output.seek(0, os.SEEK_END)
            output.seek(max(0, size - MOST_TEXT))
            return CommandResult(code, COLOUR.sub("", output.read().decode(errors="replace")))


def environment() -> dict[str, str]:
    """Return the variables that apptainer needs to run a container: where its helper programs are."""
    return {"PATH": os.environ.get("PATH", os.defpath)}


def fatal(stderr: str, *, among_others: bool = False) -> str | None:
    """Return the reason why apptainer failed; None if not apptainer failed, but the command in the container.

    Apptainer's errors come before all that a container writes.

    Args:
        stderr: the stderr of a run, from the beginning.
        among_others: whether there may be other lines between apptainer's own.
    """
    lines = stderr.split("\n")
    for number, line in enumerate(lines):
        match = LINE.fullmatch(line)
        if match and match["level"] == "FATAL":
            return "\n".join([match["text"], *lines[number + 1 :]]).strip() if not among_others else match["text"].strip()
        if not match and not among_others:
            return None
    return None
