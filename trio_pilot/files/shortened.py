"""Shortening of error texts: frames are dropped from the middle of a traceback, and its last exception is kept."""

import re
from collections.abc import Callable, Sequence
from itertools import accumulate

CUT = "..."  # in place of what was dropped from a line
DROPPED = "  ..."  # in place of lines that were dropped

Size = Callable[[str], int]  # of a character, at least 1

FRAME = re.compile(r'[ |+]*File "')
MARGIN = re.compile(r"[ |+]*")
REPEATED = re.compile(r"[ |+]*\[Previous line repeated ")


def shortened(text: str, most: int, size: Size = len) -> str:
    """Return a text, without lines of its middle if its size, the sum of the sizes of its characters, is above `most`.

    The first line and the line of the last exception are kept before any other, then lines from the end backwards; a frame
    of a traceback is kept whole or not at all. A line that is too large by itself loses its middle.
    """
    if _fits(text, most, size):
        return text
    pieces = _pieces(text.rstrip("\n").split("\n"))
    last = len(pieces) - 1
    frames = [number for number, piece in enumerate(pieces) if FRAME.match(piece)]
    error = min(frames[-1] + 1, last) if frames else last  # the line of the last exception
    room = most - 2 * _size(f"{DROPPED}\n", size)
    kept = {error: _cut(pieces[error], room - room // 4 if error else most, size)}
    if error:
        room -= _size(f"{kept[error]}\n", size)
        kept[0] = _cut(pieces[0], room, size)
    room -= _size(f"{kept[0]}\n", size)
    for number in [*range(last, error, -1), *range(error - 1, 0, -1)]:
        room -= _size(f"{pieces[number]}\n", size)
        if room < 0:
            break
        kept[number] = pieces[number]
    return _joined(kept)


def _fits(text: str, most: int, size: Size) -> bool:
    return len(text) <= most and _size(text, size) <= most


def _size(text: str, size: Size) -> int:
    return sum(map(size, text))


def _pieces(lines: Sequence[str]) -> list[str]:
    """Return the lines, those of a frame as one."""
    pieces: list[str] = []
    margin = None  # of the frame that the line may belong to
    for line in lines:
        found = MARGIN.match(line)
        indentation = found.end() if found else 0
        if margin is not None and (indentation > margin or REPEATED.match(line)):
            pieces[-1] += f"\n{line}"
            continue
        pieces.append(line)
        margin = indentation if FRAME.match(line) else None
    return pieces


def _joined(kept: dict[int, str]) -> str:
    """Join numbered pieces, with a mark where some are missing."""
    lines: list[str] = []
    for last, number in zip([-1, *sorted(kept)], sorted(kept), strict=False):
        lines += [DROPPED] * (number - last > 1) + [kept[number]]
    return "\n".join(lines)


def _cut(line: str, most: int, size: Size) -> str:
    """Return a line, without its middle if it is larger than `most`."""
    if _fits(line, most, size):
        return line
    room = max(0, most - _size(CUT, size))
    beginning = _fitting(line[:most], room // 2, size)
    end = _fitting(line[::-1][:most], room - room // 2, size)
    return line[:beginning] + CUT + line[len(line) - end :]


def _fitting(chars: str, room: int, size: Size) -> int:
    """Return how many characters have room."""
    return sum(total <= room for total in accumulate(map(size, chars)))
