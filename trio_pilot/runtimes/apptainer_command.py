"""The apptainer command: where it is, which version, what it says of itself; runs of it that are no containers of ours."""

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

LEAST_VERSION = (1, 1)  # --no-eval is of 1.1, without which a shell sees the arguments

NOT_FOUND = "there is no apptainer on PATH: install it (its package is apptainer), or put its bin directory there"

# A shell that keeps the pilot's marker in its environment, where apptainer drops it: it waits, where `exec` would make it
# apptainer. All that apptainer starts is in its session.
LEADER = "/bin/sh", "-c", '"$@"; exit $?', "apptainer"

KILL_GRACE = 2.0  # seconds between SIGTERM and SIGKILL
MOST_SAID = 65536  # bytes of output to look at

# `FATAL:   why`, with the level in nine characters; with --debug `FATAL   [U=0,P=1]          StageTwo()           why`
LINE = re.compile(r"(?P<level>[A-Z]+)(?:: {1,5}(?<=.{9})(?=\S)|\s+\[U=\d+,P=\d+\]\s+\S*?\(\)\s*)(?P<text>.*)", re.DOTALL)

COLOUR = re.compile(r"\x1b\[[0-9;]*m")  # which it puts in what it says before it has looked at its flags


@dataclass(frozen=True, slots=True)
class Said:
    """How a run of it ended, and what it said."""

    code: int
    text: str

    @property
    def reason(self) -> str:
        """Why it failed, in its own words."""
        return fatal(self.text, among_others=True) or self.text.strip()[-1000:] or f"exit code {self.code}"


class Apptainer:
    """The program, and the children by which it is run."""

    def __init__(self, path: str, directory: Path) -> None:
        self.path = path
        # What it says is in a file there: the one place that must be writable. Not every Python has os.memfd_create.
        self._directory = directory
        self.children = Children()

    @classmethod
    def find(cls, directory: Path) -> "Apptainer":
        """Find it on PATH; singularity is another name of it. Raises NodeError if it is not there."""
        found = shutil.which("apptainer") or shutil.which("singularity")
        if found is None:
            raise NodeError(NOT_FOUND)
        return cls(str(Path(found).absolute()), directory)

    async def check_version(self) -> None:
        """Raise NodeError if it fails, is too old, or another program of that name."""
        said = await self.ask(["--version"], environment())
        if said.code:
            raise NodeError(f"{self.path} fails: {said.reason}")
        match = re.search(r"^apptainer version (\d+)\.(\d+)", said.text, re.MULTILINE)
        if match is None or (int(match[1]), int(match[2])) < LEAST_VERSION:
            least = ".".join(map(str, LEAST_VERSION))
            found = said.text.strip()[:200]
            raise NodeError(f"{self.path} must be apptainer {least} or later, but it says {found!r}: install a newer one")

    async def ask(self, args: Sequence[str], env: Mapping[str, str], pass_fds: Sequence[int] = ()) -> Said:
        """Run it to its end, and give what it says. Cancelled, it and all below it are gone.

        Raises:
            NodeError: it cannot be started.
        """
        starting = map_exceptions({OSError: NodeError}, f"cannot start {self.path}")
        with starting, tempfile.TemporaryFile(dir=self._directory) as output:
            marker = f"apptainer-{uuid.uuid4()}"
            command = Command([*LEADER, self.path, *args], env, Path.cwd(), output, output, marker, pass_fds)
            code = await self.children.spawn(command).see_to_its_end(KILL_GRACE)
            size = output.seek(0, os.SEEK_END)
            output.seek(max(0, size - MOST_SAID))
            return Said(code, COLOUR.sub("", output.read().decode(errors="replace")))


def environment() -> dict[str, str]:
    """Give the variables that the program needs to run a container: where its helpers are."""
    return {"PATH": os.environ.get("PATH", os.defpath)}


def fatal(said: str, *, among_others: bool = False) -> str | None:
    """Give why apptainer failed, if it was it that failed: what it says then comes before all that a container says.

    Args:
        said: its stderr, from the beginning.
        among_others: whether other lines may be between its own.
    """
    lines = said.split("\n")
    for number, line in enumerate(lines):
        match = LINE.fullmatch(line)
        if match and match["level"] == "FATAL":
            return "\n".join([match["text"], *lines[number + 1 :]]).strip() if not among_others else match["text"].strip()
        if not match and not among_others:
            return None
    return None
