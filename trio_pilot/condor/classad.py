"""The language of ClassAds, as far as a pilot speaks it."""

from itertools import accumulate

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
CUT = "..."  # in place of what did not fit


def quoted(text: str, most: int, *, keep_end: bool = False) -> str:
    """Write a text as a ClassAd string of at most `most` bytes, quotes included; cut at its beginning to `keep_end`.

    Anything but printable ASCII is written as `classad.quote` of HTCondor's own Python bindings does. There is no NUL in a
    ClassAd string (the reference manual, "Literals"): it is left out.
    """
    text = text.replace("\0", "")
    pieces = [_escaped(char) for char in (text[-most:] if keep_end else text[:most])]
    if len(pieces) == len(text) and sum(map(len, pieces)) <= most - 2:
        return f'"{"".join(pieces)}"'
    order = pieces[::-1] if keep_end else pieces
    fitting = sum(length <= most - 2 - len(CUT) for length in accumulate(map(len, order)))
    kept = CUT + "".join(pieces[len(pieces) - fitting :]) if keep_end else "".join(pieces[:fitting]) + CUT
    return f'"{kept}"'


def _escaped(char: str) -> str:
    return "".join(_escaped_byte(byte) for byte in char.encode(errors="replace"))


def _escaped_byte(byte: int) -> str:
    return ESCAPES.get(byte) or (chr(byte) if byte in PRINTABLE else f"\\{byte:03o}")
