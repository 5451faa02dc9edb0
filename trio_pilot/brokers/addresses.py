"""Addresses of brokers, as far as they are all alike."""

from collections.abc import Callable, Sequence
from urllib.parse import SplitResult, urlsplit

from trio_pilot.errors import SettingsError

UNREADABLE = "no port that is a number (a / or # or ? in a user's name or password is written %2F, %23, %3F)"

Wrong = Callable[[str], SettingsError]


def split(address: str, schemes: Sequence[str], wrong: Wrong) -> tuple[SplitResult, str, int | None]:
    """Split `[SCHEME://][USER[:PASS]@]HOST[:PORT][/PATH]` into its parts; give the host and the port besides.

    Without a scheme the first of them is meant. `wrong` makes the error of what was found.

    Raises:
        SettingsError: it is not of that form.
    """
    try:
        parts = urlsplit(address if "://" in address else f"{schemes[0]}://{address}")
        port = parts.port
    except ValueError:  # its text, and what looks like a path, may be a piece of the password
        raise wrong(UNREADABLE) from None
    if "@" in f"{parts.path}{parts.query}{parts.fragment}":
        raise wrong(UNREADABLE)
    if parts.scheme not in schemes or not parts.hostname:
        raise wrong(f"scheme {parts.scheme!r}, host {parts.hostname!r}")
    return parts, parts.hostname, port
