"""Addresses of brokers, as far as they are all alike."""

from collections.abc import Callable, Sequence
from urllib.parse import SplitResult, urlsplit

from trio_pilot.errors import SettingsError

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
    except ValueError as error:
        raise wrong(str(error)) from error
    if parts.scheme not in schemes or not parts.hostname:
        raise wrong(f"scheme {parts.scheme!r}, host {parts.hostname!r}")
    return parts, parts.hostname, port
