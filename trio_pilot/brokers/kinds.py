"""The kinds of brokers: all that the rest of the program has to know of them.

A new broker is a module of this package with the functions `open_source` and `open_sink`, and an entry in KINDS. The module
is imported when a queue of that kind is opened: some client libraries take tenths of a second to import.
"""

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from importlib import import_module
from typing import Any

from trio_pilot.errors import SettingsError

FILE_BEGINNINGS, FILE_ENDINGS = ("/", ".", "~"), (".sqlite", ".db")  # of addresses that are paths


def no_warning(_source: Any, _lease: float) -> str:
    """Return no warning."""
    return ""


@dataclass(frozen=True, slots=True, eq=False)
class BrokerKind:
    """A kind of broker."""

    name: str  # in settings; also the name of its module
    ports: Mapping[str, int] = field(default_factory=dict)  # the default port, by the URL scheme of an address
    # Returns what `check` adds about a connected source that may not grant a lease of so many seconds.
    lease_warning: Callable[[Any, float], str] = no_warning
    user_may_be_token: bool = False  # whether what stands for a user in its addresses is a token if no password follows

    @property
    def is_file(self) -> bool:
        """Whether its address is the path of a file, which only processes of this machine can use."""
        return not self.ports

    @property
    def schemes(self) -> tuple[str, ...]:
        """The URL schemes of its addresses; the first is the usual one."""
        return tuple(self.ports)

    @property
    def example(self) -> str:
        """An address, for messages and help texts."""
        return "a queue file" if self.is_file else f"{self.schemes[0]}://HOST"

    @property
    def default_address(self) -> str:
        """The address of queues for which no address is set."""
        return "" if self.is_file else "localhost"

    def load(self) -> Any:
        """Import the module of the broker.

        Raises:
            SettingsError: its client library is not installed.
        """
        return import_module(f"{__package__}.{self.name}")


LOCAL = BrokerKind("local")
RABBITMQ = BrokerKind(
    "rabbitmq", {"amqp": 5672, "amqps": 5671}, lease_warning=lambda source, lease: str(source.lease_warning(lease))
)
NATS = BrokerKind("nats", {"nats": 4222, "tls": 4222}, user_may_be_token=True)
PULSAR = BrokerKind("pulsar", {"pulsar": 6650, "pulsar+ssl": 6651})

KINDS = {kind.name: kind for kind in (LOCAL, RABBITMQ, NATS, PULSAR)}
WITH_SCHEMES = [kind for kind in KINDS.values() if kind.schemes]  # an address without a scheme is of the first of these
SCHEMES = {scheme: kind for kind in WITH_SCHEMES for scheme in kind.schemes}
EXAMPLES = ", ".join(kind.example for kind in WITH_SCHEMES)


def kind_of(address: str) -> BrokerKind:
    """Return the kind of the broker at an address.

    Raises:
        SettingsError: no broker has addresses of its scheme.
    """
    scheme, separator, _ = address.partition("://")
    if separator:
        if (kind := SCHEMES.get(scheme.lower())) is None:
            *first, last = (f"{kind.schemes[0]}://" for kind in WITH_SCHEMES)
            known = f"{', '.join(first)} or {last}"
            raise SettingsError(
                f"a broker's address must begin with {known}, or be a queue file, not begin with {scheme.lower()}://"
            )
        return kind
    is_file = not address or address.startswith(FILE_BEGINNINGS) or address.endswith(FILE_ENDINGS)
    return LOCAL if is_file else WITH_SCHEMES[0]
