"""Headers of messages: those that trio-pilot adds, and those of others, of which a copy keeps what can be written.

Where a broker has headers of text only, those of trio-pilot are JSON, in one line of ASCII.
"""

import hashlib
import json
from collections.abc import Callable, Iterable, Mapping
from contextlib import suppress
from typing import Any

from trio_pilot.brokers import Delivery, dead_letters
from trio_pilot.log import LOGGER

MESSAGE_ID = f"{dead_letters.PREFIX}message-id"
UNNAMED = f"{dead_letters.PREFIX}unnamed"  # that id is none that a sender has given
FAILURES = f"{dead_letters.PREFIX}failures"  # how often the event had failed when this copy of it was sent

MOST_FAILURES = 10**9  # a sender may have written any number; this one fits wherever an integer does
MOST_ID = 1024  # characters of a message id; a longer one is cut, and has a hash of the whole at its end
MOST_SHOWN = 200  # characters of the names of headers in a log line

SizeOf = Callable[[Any, Any], int | None]  # of a header, in bytes, given its name and value; None if it cannot be written


def attempt_of(headers: Mapping[str, Any]) -> int:
    """Return the number of this attempt at an event, from 1."""
    failures = headers.get(FAILURES)
    return 1 + min(failures, MOST_FAILURES) if isinstance(failures, int) and failures > 0 else 1


def given_id(headers: Mapping[str, Any], *names: str) -> str | None:
    """Return the message id that a sender has given in the first of some headers; None if it is in none."""
    given = next((one for name in names if (one := headers.get(name))), None)
    return bounded_id(given) if isinstance(given, str) else None


def bounded_id(message_id: str) -> str:
    """Return a message id, cut where it is too long to be kept, logged and sent."""
    if len(message_id) <= MOST_ID:
        return message_id
    digest = hashlib.sha256(message_id.encode(errors="surrogatepass")).hexdigest()
    return f"{message_id[: MOST_ID - len(digest) - 1]}-{digest}"


def id_of(body: bytes) -> str:
    """Return the message id of an event to which its sender has given none: equal events share it."""
    return hashlib.sha256(body).hexdigest()[:32]


def id_headers(message_id: str, original: Delivery | None) -> dict[str, Any]:
    """Return the headers that tell the id of a message, and of a copy whether the sender of the original has given it."""
    return {MESSAGE_ID: message_id, **({UNNAMED: True} if original and not original.named else {})}


def to_text(headers: Mapping[str, Any]) -> dict[str, str]:
    """Encode headers as text."""
    return {name: json.dumps(value) for name, value in headers.items()}


def from_text(headers: Mapping[str, str]) -> dict[str, Any]:
    """Decode headers; those that `to_text` has not encoded stay text."""
    return {name: _value(name, text) for name, text in headers.items()}


def _value(name: str, text: str) -> Any:
    if name.startswith(dead_letters.PREFIX):
        with suppress(ValueError, RecursionError):
            return json.loads(text)
    return text


def shortened(ours: Mapping[str, Any], room: int, size_of: SizeOf) -> dict[str, Any]:
    """Return headers of trio-pilot that fit in `room` bytes, by halving the longest text, the reason, if need be."""
    ours = dict(ours)
    while sum(size_of(*one) or 0 for one in ours.items()) > room:
        longest = max(ours, key=lambda name: len(ours[name]) if isinstance(ours[name], str) else 0)
        if not isinstance(ours[longest], str) or not ours[longest]:
            break
        ours[longest] = ours[longest][: len(ours[longest]) // 2]
    return ours


def kept(headers: Mapping[Any, Any], names: Iterable[Any], room: int, size_of: SizeOf, message_id: str) -> dict[Any, Any]:
    """Return those headers of others, of some names, that can be written and fit in `room` bytes; log the others."""
    kept, dropped = {}, []
    for name in names:
        size = size_of(name, headers[name])
        if size is not None and size <= room:
            kept[name] = headers[name]
            room -= size
        else:
            dropped.append(name)
    if dropped:
        LOGGER.warning("event %s: headers that a copy cannot have are left out: %s", message_id, repr(dropped)[:MOST_SHOWN])
    return kept
