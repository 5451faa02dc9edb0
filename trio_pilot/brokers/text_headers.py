"""Facts in the headers of a message that have room for text only: ours are JSON, in one line of ASCII."""

import json
from collections.abc import Mapping
from contextlib import suppress
from typing import Any

from trio_pilot.brokers import dead_letters

MESSAGE_ID = "x-trio-pilot-message-id"
FAILURES = "x-trio-pilot-failures"  # how often the event has failed before this copy of it was sent


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
