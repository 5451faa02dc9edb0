"""Tokens of brokers: as they are, or as the content of a file, `@/FILE` or `@./FILE`, which is read again when it changes.

The file is read now and then rather than watched: that works on network file systems too, and takes microseconds.
"""

import base64
import json
from collections.abc import Mapping
from contextlib import suppress
from pathlib import Path
from typing import Any

import trio

from trio_pilot.errors import BrokerError, map_exceptions
from trio_pilot.processes import threads

LOOK_INTERVAL = 2.0  # seconds
TIMEOUT = 15.0  # seconds to read a file, on a file system that may hang


def is_file(token: str) -> bool:
    """Return whether a token is the name of a file that has it."""
    return token.startswith(("@/", "@./"))


async def current(token: str) -> str:
    """Return the token itself.

    Raises:
        BrokerError: its file cannot be read.
    """
    if not is_file(token):
        return token
    path = Path(token[1:])
    with map_exceptions({OSError: BrokerError, ValueError: BrokerError}, "has a token file that cannot be read"):
        with trio.move_on_after(TIMEOUT):
            return (await threads.run_sync(path.read_text, abandon_on_cancel=True)).strip()
        raise TimeoutError(f"{path} has not been read for {TIMEOUT:g} s")


async def changed(token: str, known: str) -> str:
    """Wait until the file of a token has another than the `known` one, and return it. Failures to read it are ignored."""
    while True:
        await trio.sleep(LOOK_INTERVAL)
        with suppress(BrokerError):
            if (new := await current(token)) not in ("", known):
                return new


def claims(token: str) -> Mapping[str, Any]:
    """Return the claims of a JWT (RFC 7519); any other token has none."""
    parts = token.split(".")
    with suppress(ValueError, RecursionError):
        found = json.loads(base64.urlsafe_b64decode(parts[1] + "==")) if len(parts) == 3 else {}
        return found if isinstance(found, dict) else {}
    return {}


def expiry(token: str) -> float | None:
    """Return the Unix time at which a token expires; None if it has no such claim."""
    end = claims(token).get("exp")
    return float(end) if isinstance(end, int | float) else None
