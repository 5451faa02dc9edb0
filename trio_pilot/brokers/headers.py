"""Headers that trio-pilot adds to messages. Where a broker has headers of text only, they are JSON, in one line of ASCII."""

import json
from collections.abc import Mapping
from contextlib import suppress
from typing import Any

from trio_pilot.brokers import dead_letters

MESSAGE_ID = f"{dead_letters.PREFIX}message-id"
FAILURES = f"{dead_letters.PREFIX}failures"  # how often the event had failed when this copy of it was sent


def attempt_of(headers: Mapping[str, Any]) -> int:
    """Return the number of this attempt at an event, from 1."""
    failures = headers.get(FAILURES)
    return 1 + failures if isinstance(failures, int) and failures > 0 else 1


def to_text(headers: Mapping[str, Any]) -> dict[str, str]:
    """Encode headers as text."""
    return {name: json.dumps(value) for name, value in headers.items()}


def from_text(headers: Mapping[str, str]) -> dict[str, Any]:
    """Decode headers; those that `to_text` has not encoded stay text."""
    return {name: _value(name, text) for name, text in headers.items()}


def _value(name: str, text: str) -> Any:
    if name.startswith(dead_letters.PREFIX):
        with suppress(ValueError):
            return json.loads(text)
    return text
