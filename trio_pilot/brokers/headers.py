"""Our facts in the headers of a message. Where there is room for text only they are JSON, in one line of ASCII."""

import json
from collections.abc import Mapping
from contextlib import suppress
from typing import Any

from trio_pilot.brokers import dead_letters

MESSAGE_ID = f"{dead_letters.PREFIX}message-id"
FAILURES = f"{dead_letters.PREFIX}failures"  # how often the event has failed before this copy of it was sent


def attempt(headers: Mapping[str, Any]) -> int:
    """Tell which try of an event this is, from 1."""
    failures = headers.get(FAILURES)
    return 1 + failures if isinstance(failures, int) and failures > 0 else 1


def said(facts: Mapping[str, Any]) -> dict[str, str]:
    """Write facts as headers."""
    return {name: json.dumps(value) for name, value in facts.items()}


def read(headers: Mapping[str, str]) -> dict[str, Any]:
    """Read headers; those that `said` has not written are text."""
    return {name: _value(name, text) for name, text in headers.items()}


def _value(name: str, text: str) -> Any:
    if name.startswith(dead_letters.PREFIX):
        with suppress(ValueError):
            return json.loads(text)
    return text
