"""A shell in a container, for what its engine cannot do: words that it would change on their way, and a limit of memory.

Apptainer carries arguments and variables as JSON, which has no bytes that are not UTF-8; a shell of its own reads the
variables, and takes CR LF for LF; and HOME is its own. Such words travel in the escapes of `printf %b`, which every
POSIX shell has. And an engine may need more memory for itself than a task may have.

Where there is nothing of this, no shell is needed in the image.
"""

import os
from collections.abc import Mapping, Sequence

PREFIX = "TRIO_PILOT_RAW_"  # of the names under which such variables travel

NEVER_KEPT = ("HOME",)  # variables that the engine sets itself

UNESCAPED = frozenset(range(0x20, 0x7F)) - {ord("\\")}  # bytes that stay as they are

LIMIT = "ulimit -v {} 2> /dev/null || :"  # it cannot be set where there is a lower one already
READ_WORDS = 'for word; do shift; word=$(printf %b. "$word"); set -- "$@" "${word%.}"; done; unset word'
READ_VARIABLE = 'export {name}="$(printf %b. "${raw}")"; {name}="${{{name}%.}}"; unset {raw}'


def needs_help(args: Sequence[str], env: Mapping[str, str]) -> bool:
    """Tell whether there are words that would not arrive as they are."""
    return not all(map(is_text, args)) or any(_is_changed(name, value) for name, value in env.items())


def travelling(env: Mapping[str, str]) -> dict[str, str]:
    """Give variables as they can travel."""
    return {
        **{name: value for name, value in env.items() if not _is_changed(name, value)},
        **{PREFIX + name: _escaped(value) for name, value in env.items() if _is_changed(name, value)},
    }


def shell(
    command: Sequence[str], args: Sequence[str], env: Mapping[str, str], address_space: int | None = None
) -> list[str]:
    """Give the command that puts arguments and variables right, and then becomes `command` with those arguments.

    Args:
        command: what is to run; nothing: the first of the arguments.
        args: its arguments.
        env: the variables, as the task is to have them.
        address_space: the bytes that each process may have.
    """
    changed = [name for name, value in env.items() if _is_changed(name, value)]
    variables = [READ_VARIABLE.format(name=name, raw=PREFIX + name) for name in changed]
    limits = [] if address_space is None else [LIMIT.format(address_space // 1024)]
    script = "; ".join([*limits, READ_WORDS, *variables, " ".join(["exec", *command, '"$@"'])])
    return ["/bin/sh", "-c", script, "sh", *map(_escaped, args)]


def _is_changed(name: str, value: str) -> bool:
    return name in NEVER_KEPT or "\r" in value or not is_text(value)


def is_text(word: str) -> bool:
    """Tell whether a word is UTF-8; other bytes are surrogates in it."""
    return not any("\ud800" <= character <= "\udfff" for character in word)


def _escaped(word: str) -> str:
    return "".join(chr(byte) if byte in UNESCAPED else f"\\0{byte:03o}" for byte in os.fsencode(word))
