"""Arguments and variables that apptainer would change, and a limit of memory that it could not run with.

Apptainer passes arguments and variables on as JSON, which cannot contain bytes that are not UTF-8. A shell of its own reads
the variables, and replaces CR LF by LF; and it sets HOME itself. So such words are passed on in the escapes of `printf %b`,
which every POSIX shell has, and a shell in the container restores them. That shell also sets a limit of memory for the task
alone, as apptainer may need more memory for itself than the task may have.

A container without any of this needs no shell in its image.
"""

import os
from collections.abc import Mapping, Sequence

PREFIX = "TRIO_PILOT_RAW_"  # of the names under which such variables are passed on

NEVER_KEPT = ("HOME",)  # variables that apptainer sets itself

UNESCAPED = frozenset(range(0x20, 0x7F)) - {ord("\\")}  # bytes that stay as they are

LIMIT = "ulimit -v {} 2> /dev/null || :"  # fails where there is a lower limit already
READ_WORDS = 'for word; do shift; word=$(printf %b. "$word"); set -- "$@" "${word%.}"; done; unset word'
READ_VARIABLE = 'export {name}="$(printf %b. "${raw}")"; {name}="${{{name}%.}}"; unset {raw}'


def needs_help(args: Sequence[str], env: Mapping[str, str]) -> bool:
    """Return whether there are arguments or variables that apptainer would change."""
    return not all(map(is_text, args)) or any(_is_changed(name, value) for name, value in env.items())


def encoded(env: Mapping[str, str]) -> dict[str, str]:
    """Return variables in the form in which they are passed on."""
    return {
        **{name: value for name, value in env.items() if not _is_changed(name, value)},
        **{PREFIX + name: _escaped(value) for name, value in env.items() if _is_changed(name, value)},
    }


def shell(
    command: Sequence[str], args: Sequence[str], env: Mapping[str, str], address_space: int | None = None
) -> list[str]:
    """Return a command that restores arguments and variables, and then executes `command` with those arguments.

    Args:
        command: the program to execute; empty: the first of the arguments.
        args: its arguments.
        env: the variables of the task.
        address_space: the limit of each process, in bytes.
    """
    changed = [name for name, value in env.items() if _is_changed(name, value)]
    variables = [READ_VARIABLE.format(name=name, raw=PREFIX + name) for name in changed]
    limits = [] if address_space is None else [LIMIT.format(address_space // 1024)]
    script = "; ".join([*limits, READ_WORDS, *variables, " ".join(["exec", *command, '"$@"'])])
    return ["/bin/sh", "-c", script, "sh", *map(_escaped, args)]


def _is_changed(name: str, value: str) -> bool:
    return name in NEVER_KEPT or "\r" in value or not is_text(value)


def is_text(word: str) -> bool:
    """Return whether a word is UTF-8; other bytes are surrogates in it."""
    return not any("\ud800" <= character <= "\udfff" for character in word)


def _escaped(word: str) -> str:
    return "".join(chr(byte) if byte in UNESCAPED else f"\\0{byte:03o}" for byte in os.fsencode(word))
