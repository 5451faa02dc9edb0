"""Unpacked images that apptainer has built: what they say about how they are run, read without apptainer.

Apptainer turns the ENV of a Docker image into a shell script in `/.singularity.d/env`, and its ENTRYPOINT and CMD into the
shell script `/.singularity.d/runscript`, each in a form of its own, from which they are read here. So the containers of such
an image need no shell. Scripts that a person has written for an image are left to a shell of the image: `image_shell`.
"""

import re
import shlex
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path

from trio_pilot.errors import NodeError
from trio_pilot.files.filesystem import exists, is_directory, is_link

ENVIRONMENT = ".singularity.d/env"
DOCKER_ENVIRONMENT = f"{ENVIRONMENT}/10-docker2singularity.sh"
RUNSCRIPT = ".singularity.d/runscript"
SHELL = "/bin/sh"

NO_RUNSCRIPT = "There is no runscript defined for this container"  # the only text of the runscript that apptainer makes up

# Apptainer's own scripts: they do nothing but set its prompt, and a path for libraries that only apptainer puts there.
OF_APPTAINER = ("01-base.sh", "94-appsbase.sh", "95-apps.sh", "99-base.sh", "99-runtimevars.sh")

# Of the ENV of a Docker image: `export PATH="..."`, `export NAME="${NAME:-"..."}"`, or, if it has no value,
# `export NAME="${NAME:-}"`. The value is escaped for a shell, and then as by Go's %q, which a shell does not understand.
QUOTED = r'"(?:[^"\\]|\\.)*"'
EXPORT = re.compile(rf'export (?P<name>[^\s="]+)=(?:"\$\{{(?P=name):-(?P<default>{QUOTED})?\}}"|(?P<value>{QUOTED}))')
OF_GO = re.compile(r"\\(x[0-9a-f]{2}|u[0-9a-f]{4}|U[0-9a-f]{8}|.)", re.DOTALL)
CHARACTERS = {"a": "\a", "b": "\b", "f": "\f", "n": "\n", "r": "\r", "t": "\t", "v": "\v"}
OF_SHELL = re.compile(r'\\(["\\$`])')
ESCAPED_FOR_SHELL = re.compile(r'(?:[^"\\$`]|\\["\\$`])*')

MENDED = '[ -n "${{{name}:-}}" ] || {name}={value}\nexport {name}\n'
MENDED_PATH = "export {name}={value}\n"

# Of its ENTRYPOINT and CMD: `OCI_CMD='"..." "..."'`, where a single quote is written as '"'"'.
WORDS = re.compile(r"""^OCI_(ENTRYPOINT|CMD)='((?:[^']|'"'"')*)'$""", re.MULTILINE)
WORD = re.compile(r'"((?:[^"\\]|\\.)*)"', re.DOTALL)

# The PATH that a Docker image without one has, and what apptainer appends to one that lacks some of it.
USUAL_PATH = "/usr/local/sbin:/usr/local/bin:/usr/sbin:/usr/bin:/sbin:/bin"


@dataclass(frozen=True, slots=True)
class Runscript:
    """What an image runs: a script of its own, or the ENTRYPOINT and CMD of a Docker image."""

    is_own: bool = False  # a shell has to execute it
    entrypoint: Sequence[str] = ()
    command: Sequence[str] = ()

    @classmethod
    def parse(cls, text: str) -> "Runscript":
        """Read a runscript; empty: the image has none."""
        found = {name: words.replace("""'"'"'""", "'") for name, words in WORDS.findall(text)}
        if set(found) != {"ENTRYPOINT", "CMD"}:
            return cls(is_own=is_runscript(text))
        words = {name: [OF_SHELL.sub(r"\1", word) for word in WORD.findall(line)] for name, line in found.items()}
        return cls(entrypoint=words["ENTRYPOINT"], command=words["CMD"])

    @property
    def has_entrypoint(self) -> bool:
        """Whether arguments are passed to a program of the image."""
        return self.is_own or bool(self.entrypoint)

    @property
    def has_command(self) -> bool:
        """Whether it runs something without arguments."""
        return self.has_entrypoint or bool(self.command)

    def argv(self, args: Sequence[str]) -> Sequence[str]:
        """Return the command that arguments make with the ENTRYPOINT; without any, the CMD with it."""
        return [*self.entrypoint, *(args or self.command)]


@dataclass(frozen=True, slots=True)
class ImageDirectory:
    """What an unpacked image says about how it is run."""

    variables: Mapping[str, str] = field(default_factory=dict)
    runscript: Runscript = field(default_factory=Runscript)
    scripts: Sequence[str] = ()  # that a shell has to read for more variables: names of files in the image

    @classmethod
    def of(cls, image: Path) -> "ImageDirectory":
        """Read an unpacked image. Blocks. Raises NodeError if it needs a shell that is not in it."""
        variables = docker_variables(_text(image / DOCKER_ENVIRONMENT))
        directory = cls(
            variables=with_usual_path(variables or {}),
            runscript=Runscript.parse(runscript_of(image)),
            scripts=_scripts(image, known=variables is not None),
        )
        shell = image / SHELL.lstrip("/")
        if (directory.runscript.is_own or directory.scripts) and not (exists(shell) or is_link(shell)):
            raise NodeError(f"the image {image} has scripts for its start, but no {SHELL} to run them: let apptainer run it")
        return directory


def runscript_of(image: Path) -> str:
    """Return the text of the runscript of an unpacked image; empty: it has none. Blocks."""
    return _text(image / RUNSCRIPT)


def is_runscript(text: str) -> bool:
    """Return whether a runscript is one of the image's own."""
    return bool(text.strip()) and NO_RUNSCRIPT not in text


def docker_variables(script: str) -> Mapping[str, str] | None:
    """Return the ENV that apptainer has made a script of; None if the script is another."""
    variables = {}
    for line in script.splitlines():
        match = EXPORT.fullmatch(line)
        if match is None:
            if line and not line.startswith("#"):
                return None
            continue
        quoted = match["default"] or match["value"]
        if quoted is not None:
            for_shell = OF_GO.sub(_go_character, quoted[1:-1])
            if not ESCAPED_FOR_SHELL.fullmatch(for_shell):
                return None
            variables[match["name"]] = OF_SHELL.sub(r"\1", for_shell)
    return variables


def mended_environment(image: Path) -> str | None:
    """Return the script of a Docker image's ENV with the values that the image had; None if it has them. Blocks.

    Apptainer escapes what a value has of quotes, dollars, backslashes and line ends once too often, and then fails to read
    the script if there is a backquote in it.
    """
    script = _text(image / DOCKER_ENVIRONMENT)
    variables = docker_variables(script)
    if not variables or "\\" not in script:
        return None
    exports = ((MENDED_PATH if name == "PATH" else MENDED, name, shlex.quote(value)) for name, value in variables.items())
    return "".join(["#!/bin/sh\n", *(form.format(name=name, value=value) for form, name, value in exports)])


def with_usual_path(variables: Mapping[str, str]) -> Mapping[str, str]:
    """Return variables with the usual directories appended to their PATH, where it lacks them, as apptainer does."""
    if "PATH" not in variables:
        return variables
    path = variables["PATH"].split(":")
    return {**variables, "PATH": ":".join([*path, *(usual for usual in USUAL_PATH.split(":") if usual not in path)])}


def _scripts(image: Path, *, known: bool) -> Sequence[str]:
    """Return the scripts that a shell has to read: with any command in them, and none of apptainer's own."""
    directory = image / ENVIRONMENT
    if not is_directory(directory):
        return ()
    not_needed = (*OF_APPTAINER, *([Path(DOCKER_ENVIRONMENT).name] if known else []))
    scripts = (script for script in sorted(directory.glob("*.sh")) if script.name not in not_needed)
    return [
        f"/{script.relative_to(image)}"
        for script in scripts
        if any(line.strip() and not line.lstrip().startswith("#") for line in _text(script).splitlines())
    ]


def _go_character(match: "re.Match[str]") -> str:
    code = match[1]
    if code[0] == "x":  # a byte that is not UTF-8, or no printable character
        return bytes([int(code[1:], 16)]).decode("utf-8", "surrogateescape")
    return chr(int(code[1:], 16)) if code[0] in "uU" and code[1:] else CHARACTERS.get(code, code)


def _text(file: Path) -> str:
    try:
        return file.read_text("utf-8", "surrogateescape")
    except OSError:
        return ""
