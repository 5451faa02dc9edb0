"""Headers of NATS as others wrote them: read without an error, copied as far as they can be written."""

import re
from collections.abc import Mapping
from typing import Any

from nats.aio.client import Client

from trio_pilot.brokers import dead_letters
from trio_pilot.brokers.headers import kept, shortened, to_text

FIRST_LINE, END_OF_LINE = b"NATS/1.0", b"\r\n"
WRITABLE = re.compile(r"[!#$%&'*+\-.^_`|~0-9A-Za-z]+")  # the names that nats-py writes; it reads any of ASCII
INSTRUCTION = "nats-"  # the beginning of headers that tell the server what to do with a message
STATUS, DESCRIPTION = "Status", "Description"  # what nats-py makes of the first line of a server's own messages
MOST_HEADERS = 2**16 - 1  # bytes that a stream takes


class TolerantClient(Client):
    """A client that no header of a message ends: nats-py reads no more from its connection after an error in one."""

    async def _process_headers(self, headers: bytes | None) -> dict[str, str] | None:
        if not headers:
            return None
        first, _, rest = headers.partition(END_OF_LINE)
        found = dict(filter(None, map(_header, rest.split(END_OF_LINE))))
        status = first[len(FIRST_LINE) :].strip().decode(errors="replace")
        if first.startswith(FIRST_LINE) and status:
            code, _, description = status.partition(" ")
            found |= {STATUS: code, **({DESCRIPTION: description.strip()} if description else {})}
        return found or None


def _header(line: bytes) -> tuple[str, str] | None:
    """Read a line `NAME: VALUE`; None if it is not one. What is no UTF-8 in a value is replaced."""
    name, colon, value = line.partition(b":")
    if not colon or not name.isascii():
        return None
    return name.strip().decode(), value.strip().decode(errors="replace")


def size_of(headers: Mapping[str, str]) -> int:
    """Return the size of headers in a message."""
    return len("NATS/1.0\r\n\r\n") + sum(map(_size, headers.keys(), headers.values()))


def _size(name: str, value: str) -> int:
    return len(name.encode(errors="replace")) + len(value.encode(errors="replace")) + len(": \r\n")


def copied(theirs: Mapping[str, str], ours: Mapping[str, Any], room: int, message_id: str) -> dict[str, str]:
    """Return the headers of a copy, of `room` bytes at most: those of trio-pilot, and the sender's if they can be written.

    Instructions to the server are not repeated.
    """
    room = min(room, MOST_HEADERS) - size_of({})
    own = to_text(shortened(ours, room, lambda name, value: _size(name, *to_text({name: value}).values())))
    room -= sum(map(_size, own.keys(), own.values()))
    names = [name for name in theirs if not name.lower().startswith((INSTRUCTION, dead_letters.PREFIX))]
    return {**kept(theirs, names, room, _size_if_writable, message_id), **own}


def _size_if_writable(name: str, value: str) -> int | None:
    return _size(name, value) if WRITABLE.fullmatch(name) else None
