"""Unpacked images that apptainer has built: their environment and their entrypoint, run without apptainer.

Apptainer turns the ENV of a Docker image into shell scripts in `/.singularity.d/env`, and its ENTRYPOINT and CMD into the
shell script `/.singularity.d/runscript`. A shell in the container reads the former and executes the latter.
"""

import errno
import os
import re
import uuid
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path

from trio_pilot.errors import NodeError
from trio_pilot.runtimes import NOT_EXECUTABLE, NOT_FOUND, Container, no_command

ENVIRONMENT = ".singularity.d/env"
RUNSCRIPT = ".singularity.d/runscript"
NO_RUNSCRIPT = "There is no runscript defined for this container"  # the only text of the runscript that apptainer makes up

# Makes a runscript pass its arguments on as they are; without it, a shell would expand them.
AS_THEY_ARE = {"SINGULARITY_NO_EVAL": "1"}

SHELL = "/bin/sh"
VARIABLE = re.compile(r"[A-Za-z_][A-Za-z0-9_]*")

# A function: so a script that changes the positional parameters does not change the arguments. As apptainer does, it appends
# the usual directories that the PATH of a Docker image lacks.
READ_ENVIRONMENT = f"""
trio_pilot_read() {{
    for trio_pilot_file in /{ENVIRONMENT}/*.sh; do
        if [ -f "$trio_pilot_file" ]; then
            command . "$trio_pilot_file"
            case "$trio_pilot_file" in
                */10-docker*) for trio_pilot_file in /usr/local/sbin /usr/local/bin /usr/sbin /usr/bin /sbin /bin; do
                    case ":$PATH:" in *":$trio_pilot_file:"*) ;; *) PATH="$PATH:$trio_pilot_file";; esac
                done;;
            esac
        fi
    done
}}
trio_pilot_read
"""
# The variables of the task win over those of the image. They come under other names: a shell reads and changes some of its
# own at its start. `command`: without it, a variable that the shell has made read-only, such as UID, would end the shell.
KEPT = "TRIO_PILOT_TASK_{number}"
RESTORE = 'command export {name}="${kept}" 2> /dev/null; unset {kept}'

MOST_TEXT = 65536  # bytes of the error of a shell
# Of busybox, dash and bash, in this order: `exec: line 3: x: not found`, `3: exec: x: not found`,
# `line 3: exec: x: cannot execute: Is a directory`; of bash also `line 3: /x: No such file or directory`.
REFUSAL = re.compile(
    r"(?:(?:line )?\d+: )?(?:exec: (?:line \d+: )?)?(?P<command>.*?)(?:: cannot execute)?: (?P<reason>[^:]*)\n", re.DOTALL
)


@dataclass(frozen=True, slots=True)
class ImageDirectory:
    """What an unpacked image says about how it is run."""

    has_environment: bool = False
    has_runscript: bool = False
    has_command: bool = False  # that can be run without arguments

    @classmethod
    def of(cls, image: Path) -> "ImageDirectory":
        """Read an unpacked image. Blocks."""
        runscript = runscript_of(image)
        return cls((image / ENVIRONMENT).is_dir(), is_runscript(runscript), has_command(runscript))

    def launch(self, container: Container) -> "Launch":
        """Return the command that runs a container of this image.

        Raises:
            NodeError: there is nothing to run, or the name of a variable is none that a shell can export.
        """
        runs_script = self.has_runscript and not container.without_entrypoint
        if not container.args and not (runs_script and self.has_command):
            raise no_command(container.image)
        if not (runs_script or self.has_environment):
            return Launch(container.args, container.env)
        name = f"trio-pilot-{uuid.uuid4().hex}"
        kept = {variable: KEPT.format(number=number) for number, variable in enumerate(container.env)}
        script = "\n".join(
            [
                READ_ENVIRONMENT if self.has_environment else "",
                *(RESTORE.format(name=_exportable(variable), kept=kept[variable]) for variable in kept),
                f'exec /{RUNSCRIPT} "$@"' if runs_script else 'exec "$@"',
            ]
        )
        env = {**AS_THEY_ARE, **{kept[variable]: value for variable, value in container.env.items()}}
        return Launch([SHELL, "-c", script, name, *container.args], env, (name, f"/{RUNSCRIPT}"))


@dataclass(frozen=True, slots=True)
class Launch:
    """A command that runs a container, and its variables."""

    argv: Sequence[str]
    env: Mapping[str, str]
    shells: Sequence[str] = field(default=())  # the names that the errors of its shells begin with

    def refusal(self, code: int, stderr: Path) -> str | None:
        """Return the command that a shell could not execute and the reason; None if not a shell ended, but the payload."""
        if not self.shells or code not in (NOT_FOUND, NOT_EXECUTABLE):
            return None
        with stderr.open("rb") as file:
            file.seek(max(0, file.seek(0, os.SEEK_END) - MOST_TEXT))
            text = os.fsdecode(file.read())
        for shell in self.shells:
            found = REFUSAL.fullmatch(text.rpartition(f"{shell}: ")[2])
            if f"{shell}: " in text and found:
                number = errno.EACCES if code == NOT_EXECUTABLE else errno.ENOENT
                reason = found["reason"] if found["reason"] == os.strerror(errno.ENOTDIR) else os.strerror(number)
                return f"{found['command']}: {reason}"
        return None


def runscript_of(image: Path) -> str:
    """Return the text of the runscript of an unpacked image; empty: it has none. Blocks."""
    try:
        return (image / RUNSCRIPT).read_text(errors="replace")
    except OSError:
        return ""


def is_runscript(text: str) -> bool:
    """Return whether a runscript is one of the image's own."""
    return bool(text.strip()) and NO_RUNSCRIPT not in text


def has_command(runscript: str) -> bool:
    """Return whether a runscript executes something without arguments: that of a Docker image without a command does not."""
    return is_runscript(runscript) and not all(
        line in runscript.splitlines() for line in ("OCI_ENTRYPOINT=''", "OCI_CMD=''")
    )


def _exportable(name: str) -> str:
    if not VARIABLE.fullmatch(name):
        raise NodeError(f"a shell cannot set a variable named {name!r}: use letters, digits and underscores")
    return name
