"""What a token says of itself. Whether it is genuine is for the broker to say."""

import base64
import json
from collections.abc import Mapping
from contextlib import suppress
from typing import Any


def claims(token: str) -> Mapping[str, Any]:
    """Read the claims of a JWT (RFC 7519); of any other token there are none."""
    parts = token.split(".")
    with suppress(ValueError, RecursionError):
        found = json.loads(base64.urlsafe_b64decode(parts[1] + "==")) if len(parts) == 3 else {}
        return found if isinstance(found, dict) else {}
    return {}


def expiry(token: str) -> float | None:
    """Give the Unix time from which on a token is no longer good, if it says so."""
    end = claims(token).get("exp")
    return float(end) if isinstance(end, int | float) else None
