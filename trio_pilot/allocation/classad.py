"""Reading and writing of ClassAds, as far as a pilot needs it."""

import re
from collections.abc import Iterator, Mapping
from pathlib import Path

from trio_pilot.files.shortened import shortened

ESCAPES = {
    ord("\n"): r"\n",
    ord("\r"): r"\r",
    ord("\t"): r"\t",
    ord("\a"): r"\a",
    ord("\b"): r"\b",
    ord("\v"): r"\v",
    ord("\f"): r"\f",
    ord('"'): r"\"",
    ord("\\"): r"\\",
}
PRINTABLE = range(0x20, 0x7F)


ONE_LINE = {ord("\n"): "| ", ord("\r"): ""}  # no longer than the escapes


def quoted(text: str, most: int, *, in_one_line: bool = False) -> str:
    """Return a text as a ClassAd string of at most `most` bytes, quotes included; a longer one is `shortened`.

    In one line, `|` stands for each line break.

    Anything but printable ASCII is written as `classad.quote` of HTCondor's own Python bindings does. NUL is left out: there
    is none in a ClassAd string (the reference manual, "Literals").
    """
    text = shortened(text.replace("\0", ""), most - 2, _size)
    text = text.translate(ONE_LINE) if in_one_line else text
    return f'"{"".join(map(_escaped, text))}"'


def _size(char: str) -> int:
    return len(_escaped(char))


def _escaped(char: str) -> str:
    return "".join(_escaped_byte(byte) for byte in char.encode(errors="replace"))


def _escaped_byte(byte: int) -> str:
    return ESCAPES.get(byte) or (chr(byte) if byte in PRINTABLE else f"\\{byte:03o}")


Literal = int | float | str | bool

ATTRIBUTE = re.compile(r"\s*([A-Za-z_]\w*)\s*=\s*(.*?)\s*")
STRING = re.compile(r'"((?:[^"\\]|\\.)*)"')
ESCAPED = re.compile(r"\\([0-7]{1,3}|.)")


def read(file: str | Path | None) -> Mapping[str, Literal]:
    """Read a file of `Name = value` lines, as HTCondor writes it for a job; return the values by name in lower case.

    Expressions that are no literals are left out; nothing in the file is an error. A missing file is an empty ad.
    """
    try:
        lines = Path(file).read_text(errors="replace").splitlines() if file else []
    except OSError:
        return {}
    return dict(_attributes(lines))


def _attributes(lines: list[str]) -> Iterator[tuple[str, Literal]]:
    for line in lines:
        if (found := ATTRIBUTE.fullmatch(line)) and (value := _literal(found[2])) is not None:
            yield found[1].lower(), value


def _literal(text: str) -> Literal | None:
    if string := STRING.fullmatch(text):
        return ESCAPED.sub(_unescaped, string[1])
    if text.lower() in ("true", "false"):
        return text.lower() == "true"
    for number in (int, float):
        try:
            return number(text)
        except ValueError:
            pass
    return None


def _unescaped(found: re.Match[str]) -> str:
    chars = {escape[1]: chr(byte) for byte, escape in ESCAPES.items()}
    return chr(int(found[1], 8)) if found[1][0] in "01234567" else chars.get(found[1], found[1])
