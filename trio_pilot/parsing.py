"""Parsers of the values of settings, given as text or TOML; they raise ValueError("must be ...")."""

import json
import math
import re
import shlex
from collections.abc import Callable, Mapping
from contextlib import suppress
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

Parse = Callable[[Any], Any]

VARIABLE = re.compile(r"[A-Za-z_][A-Za-z0-9_]*")  # a name that a variable can have in any shell


def text(raw: Any) -> str:
    """Parse a string; a number is accepted too."""
    if isinstance(raw, (dict, list, bool)):
        raise ValueError("must be a string")
    return str(raw)


def boolean(raw: Any) -> bool:
    """Parse y/yes/t/true/on/1 or n/no/f/false/off/0, in upper or lower case."""
    word = str(raw).strip().lower()
    if word in ("y", "yes", "t", "true", "on", "1"):
        return True
    if word in ("n", "no", "f", "false", "off", "0"):
        return False
    raise ValueError("must be a boolean (true or false)")


def path(raw: Any) -> Path:
    """Parse the name of a file or directory; `~` is the home directory."""
    name = Path(text(raw))
    with suppress(RuntimeError):  # there is no home directory
        name = name.expanduser()
    return name


def integer(least: int, most: float = math.inf) -> Parse:
    """Return a parser of whole numbers from `least` to `most`."""

    def parse(raw: Any) -> int:
        try:
            number = int(str(raw).strip())
        except ValueError:
            number = least - 1
        if number < least or isinstance(raw, bool):
            raise ValueError(f"must be an integer ≥ {least}")
        if number > most:
            raise ValueError(f"must be an integer ≤ {most}")
        return number

    return parse


AUTO = -1  # the value of `auto`: a number that the pilot determines itself


def or_auto(parse: Parse) -> Parse:
    """Return a parser that accepts the word `auto` too."""

    def parse_or_auto(raw: Any) -> Any:
        if str(raw).strip().lower() == "auto":
            return AUTO
        try:
            return parse(raw)
        except ValueError as error:
            raise ValueError(f"{error}, or auto") from error

    return parse_or_auto


def seconds(raw: Any, *, zero: bool = False) -> float:
    """Parse a positive number of seconds; `inf` is accepted."""
    try:
        number = float(str(raw).strip())
    except ValueError:
        number = math.nan
    if not (number > 0 or (zero and number == 0)) or isinstance(raw, bool):
        raise ValueError(f"must be a number of seconds {'≥' if zero else '>'} 0")
    return number


def seconds_or_none_at_all(raw: Any) -> float:
    """Parse a number of seconds that may be 0."""
    return seconds(raw, zero=True)


LATEST = datetime(9999, 12, 31, tzinfo=UTC).timestamp()  # the last day that datetime can represent


def moment(raw: Any) -> float:
    """Parse a date and time of ISO 8601 (without a time zone, in that of this machine), or Unix time."""
    try:
        at = raw if isinstance(raw, datetime) else datetime.fromisoformat(str(raw).strip())
        return at.timestamp()
    except ValueError:
        pass
    wrong = ValueError("must be a time such as 2027-01-31T18:30, or Unix time (in seconds)")
    try:
        unix_time = seconds(raw)
    except ValueError:
        raise wrong from None
    if unix_time > LATEST:
        raise wrong
    return unix_time


LEAST_MEMORY = 6 * 2**20  # bytes
UNITS = {"": 1, "b": 1, "k": 2**10, "m": 2**20, "g": 2**30, "t": 2**40}


def size(raw: Any) -> int:
    """Parse a number of bytes, as docker does: `512m`, `2g`; `2GB` and `2GiB` are the same."""
    found = re.fullmatch(r"([0-9]+(?:\.[0-9]+)?)\s*([bkmgt]?)(?:i?b)?", str(raw).strip().lower())
    number = int(float(found[1]) * UNITS[found[2]]) if found else 0
    if number < 1 or isinstance(raw, bool):
        raise ValueError("must be a number of bytes such as 512m or 2g")
    return number


def memory(raw: Any) -> int:
    """Parse a number of bytes that a container can start in: docker refuses less (docker-run(1), --memory)."""
    if (number := size(raw)) < LEAST_MEMORY:
        raise ValueError("must be a number of bytes ≥ 6m, such as 512m or 2g")
    return number


def cpus(raw: Any) -> float:
    """Parse a positive number of CPUs; it may be a fraction."""
    try:
        number = float(str(raw).strip())
    except ValueError:
        number = math.nan
    if not 0 < number < math.inf or isinstance(raw, bool):
        raise ValueError("must be a number of CPUs > 0")
    return number


def one_of(*choices: str) -> Parse:
    """Return a parser of one of some words, in upper or lower case."""
    words = {choice.lower(): choice for choice in choices}

    def parse(raw: Any) -> str:
        word = str(raw).strip().lower()
        if word not in words:
            raise ValueError(f"must be one of {', '.join(choices)}")
        return words[word]

    return parse


def log_level(raw: Any) -> str:
    """Parse the name of a log level, in upper or lower case."""
    return str(one_of("DEBUG", "INFO", "WARNING", "ERROR", "CRITICAL")(raw))


def extension(raw: Any) -> str:
    """Parse a file name extension, with or without its dot."""
    word = text(raw).strip().strip(".").lower()
    if not re.fullmatch(r"[a-z0-9][a-z0-9._+-]*", word):
        raise ValueError("must be a file name extension such as .json")
    return f".{word}"


def arguments(raw: Any) -> tuple[str, ...]:
    """Parse arguments: a list (TOML), or a text that is split as a shell would, but not passed to one."""
    try:
        given = [text(one) for one in raw] if isinstance(raw, list) else shlex.split(text(raw))
    except ValueError as error:
        raise ValueError(f"must be arguments that can be split as a shell would ({error})") from error
    if any("\0" in one for one in given):
        raise ValueError("must be arguments without NUL characters")
    return tuple(given)


def variables(raw: Any) -> Mapping[str, str]:
    """Parse a JSON object (or TOML table) of environment variables."""
    try:
        value = json.loads(raw) if isinstance(raw, str) else raw
    except ValueError as error:
        raise ValueError(f"must be a JSON object ({error})") from error
    if not isinstance(value, dict):
        raise ValueError("must be a JSON object")
    for name, one in value.items():
        if not VARIABLE.fullmatch(name):
            raise ValueError(f"must have names of letters, digits and _ only, not {name!r}")
        if not isinstance(one, str | int | float) or "\0" in str(one):
            raise ValueError(f"must have strings, numbers or booleans as values, unlike {name}")
    return {name: str(one) for name, one in value.items()}


def directories(raw: Any) -> tuple[Path, ...]:
    """Parse a comma-separated list (or TOML array) of directories."""
    names = raw if isinstance(raw, list) else text(raw).split(",")
    return tuple(Path(str(name).strip()) for name in names if str(name).strip())


def words(raw: Any) -> frozenset[str]:
    """Parse words separated by white space; `['A', 'B']`, a Python or TOML list, is accepted too."""
    joined = " ".join(map(str, raw)) if isinstance(raw, list) else text(raw)
    return frozenset(re.sub(r"[\[\]'\",]", " ", joined).split())


def several_of(*choices: str) -> Parse:
    """Return a parser of some of some words, in upper or lower case, separated by commas or white space (or a TOML list)."""

    def parse(raw: Any) -> frozenset[str]:
        given = [text(one) for one in raw] if isinstance(raw, list) else re.split(r"[,\s]+", text(raw))
        found = {word.lower(): word for word in choices}
        names = [one.strip().lower().removeprefix("cap_") for one in given if one.strip()]
        if unknown := [name for name in names if name not in found]:
            raise ValueError(f"must be some of {', '.join(choices)}, without {unknown[0]!r}")
        return frozenset(found[name] for name in names)

    return parse


def queues(raw: Any) -> tuple[str, ...]:
    """Parse one name (or address, or token), or several joined by `;` (or a TOML array). Their order counts."""
    return tuple(str(one).strip() for one in (raw if isinstance(raw, list) else text(raw).split(";")))


def each(kind: Parse) -> Parse:
    """Return a parser of several words of one kind, separated as in `queues`; those that are left out are empty."""
    return lambda raw: tuple(kind(one) if one else "" for one in queues(raw))
