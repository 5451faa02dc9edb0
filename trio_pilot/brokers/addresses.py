"""Addresses of brokers: the form that all have in common, and paths of queue files."""

from collections.abc import Callable
from pathlib import Path
from urllib.parse import SplitResult, urlsplit

from trio_pilot.brokers.kinds import BrokerKind, kind_of
from trio_pilot.errors import SettingsError

DEFAULT_FILE = "trio-pilot-queues.sqlite"

NO_PORT = "no port that is a number (a / or # or ? in a user's name or password is written %2F, %23, %3F)"

MakeError = Callable[[str], SettingsError]


def split(address: str, kind: BrokerKind, wrong: MakeError) -> tuple[SplitResult, str, int]:
    """Split `[SCHEME://][USER[:PASS]@]HOST[:PORT][/PATH]` into its parts; also return the host and the port.

    An address without a scheme has the usual one of its kind, an address without a port the default port of its scheme.
    `wrong` makes the error from a text that says what was found.

    Raises:
        SettingsError: the address is not of that form.
    """
    try:
        parts = urlsplit(address if "://" in address else f"{kind.schemes[0]}://{address}")
        port = parts.port
    except ValueError:  # its text, and what looks like a path, may be a piece of the password
        raise wrong(NO_PORT) from None
    if "@" in f"{parts.path}{parts.query}{parts.fragment}":
        raise wrong(NO_PORT)
    if parts.scheme not in kind.ports or not parts.hostname:
        raise wrong(f"scheme {parts.scheme!r}, host {parts.hostname!r}")
    return parts, parts.hostname, port or kind.ports[parts.scheme]


def may_have_secret(address: str) -> bool:
    """Return whether an address may have a secret in it: a password, a token, or options, which can be anything."""
    try:
        kind = kind_of(address)
        parts = urlsplit(address if "://" in address else f"//{address}")
    except (SettingsError, ValueError):  # not an address: it may have one
        return True
    is_name_alone = "://" in address and not parts.password and not kind.user_may_be_token
    return not kind.is_file and bool(("@" in address and not is_name_alone) or parts.query or parts.fragment)


def file_of(address: str) -> Path:
    """Return the absolute path of a queue file.

    Raises:
        SettingsError: the path begins with the home directory of a user who is not known.
    """
    try:
        return Path(address or DEFAULT_FILE).expanduser().absolute()
    except RuntimeError:
        raise SettingsError(f"a queue file must not be below a home directory that is not known: {address}") from None
