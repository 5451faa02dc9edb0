"""The start of a container of an unpacked image; by a shell of the image, if it has scripts that only a shell can read."""

import errno
import os
import re
import shlex
import uuid
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path

from trio_pilot.errors import NodeError
from trio_pilot.parsing import VARIABLE
from trio_pilot.runtimes import NOT_EXECUTABLE, NOT_FOUND, Container, no_command
from trio_pilot.runtimes.apptainer_directory import DOCKER_ENVIRONMENT, RUNSCRIPT, SHELL, USUAL_PATH, ImageDirectory

# Makes a runscript pass its arguments on as they are; without it, a shell would expand them.
AS_THEY_ARE = {"SINGULARITY_NO_EVAL": "1"}

# A function: so a script that changes the positional parameters does not change the arguments.
READ = "trio_pilot_read() {{ command . {script}; }}; trio_pilot_read"
# As apptainer does after the script of a Docker image.
APPEND_PATH = f"""
trio_pilot_append() {{
    case ":$PATH:" in *":$1:"*) ;; *) PATH="$PATH:$1";; esac
}}
for trio_pilot_directory in {USUAL_PATH.replace(":", " ")}; do trio_pilot_append "$trio_pilot_directory"; done
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


def launch(image: ImageDirectory, container: Container, own: Mapping[str, str]) -> Launch:
    """Return the command that runs a container of an image, by a shell only where the image has scripts.

    Its variables are those of the image, replaced by the runtime's `own`, and both replaced by those of the container.

    Raises:
        NodeError: there is nothing to run, or the name of a variable is none that a shell can export.
    """
    if not container.args and (container.without_entrypoint or not image.runscript.has_command):
        raise no_command(container.image)
    runs_script = image.runscript.is_own and not container.without_entrypoint
    argv = list(container.args) if container.without_entrypoint else image.runscript.argv(container.args)
    variables = {**image.variables, **own}
    if not (runs_script or image.scripts):
        return Launch(argv, {**variables, **container.env})
    return _by_shell(image.scripts, Launch(argv, variables), container.env, runs_script=runs_script)


def _by_shell(scripts: Sequence[str], payload: Launch, env: Mapping[str, str], *, runs_script: bool) -> Launch:
    name = f"trio-pilot-{uuid.uuid4().hex}"
    kept = {variable: KEPT.format(number=number) for number, variable in enumerate(env)}
    script = "\n".join(
        [
            *map(_read, scripts),
            *(RESTORE.format(name=_exportable(variable), kept=kept[variable]) for variable in kept),
            f'exec /{RUNSCRIPT} "$@"' if runs_script else 'exec "$@"',
        ]
    )
    variables = {**payload.env, **AS_THEY_ARE, **{kept[variable]: value for variable, value in env.items()}}
    return Launch([SHELL, "-c", script, name, *payload.argv], variables, (name, f"/{RUNSCRIPT}"))


def _read(script: str) -> str:
    return READ.format(script=shlex.quote(script)) + (APPEND_PATH if script == f"/{DOCKER_ENVIRONMENT}" else "")


def _exportable(name: str) -> str:
    if not VARIABLE.fullmatch(name):
        raise NodeError(f"a shell cannot set a variable named {name!r}: use letters, digits and underscores")
    return name
