"""What a pilot asks of a message broker; one module per broker does it.

A `Source` hands out deliveries and settles them; a `Sink` sends, and returns once the broker has confirmed. Both connect in
the background from the moment they are opened, and outlive every task, so that a task being killed can still settle.
"""

from collections.abc import AsyncIterator, Mapping, Sequence
from contextlib import AbstractAsyncContextManager, AbstractContextManager, AsyncExitStack, asynccontextmanager
from dataclasses import dataclass, field
from enum import Enum
from importlib import import_module
from pathlib import Path
from typing import Any, Protocol, cast

DEAD_LETTERS = Path("ewms-pilot-dead-letters")  # the usual directory for those that a broker does not take

LONGEST_LEASE = 30 * 86400.0  # seconds


KINDS = ("local", "rabbitmq", "nats", "pulsar")


class Settlement(Enum):
    """What becomes of an event, by cause."""

    ACK = "ack"  # done: its output is confirmed, or there was none
    RELEASE = "release"  # the pilot or its node could not do it: back to the queue, uncounted where the broker can
    REJECT = "reject"  # the event failed: back to the queue, counted
    DEAD_LETTER = "dead letter"  # the event failed for the last time: set aside with its reason


@dataclass(frozen=True, slots=True, eq=False)
class Delivery:
    """An event, as one delivery of it: to be settled once, at its source."""

    source: "Source"
    queue: str
    body: bytes = field(repr=False)
    message_id: str
    attempt: int  # which try this is, from 1: one more than it is known to have failed
    tag: Any = field(repr=False)  # the broker's own name for this delivery
    redelivered: bool = False  # it was delivered before, to us or another, and not acked
    named: bool = True  # its sender gave it its id; else that is of its body, and equal events share it
    headers: Mapping[str, Any] = field(default_factory=dict, repr=False)  # the message's, those of the body apart


class Consumer(Protocol):
    """Takes deliveries from one queue, one at a time, when asked."""

    @property
    def listening_since(self) -> float:
        """When it began to listen without a break (trio time); infinite while it cannot listen."""

    async def take(self) -> Delivery | None:
        """Take a delivery if there is one. A cancelled `take` has taken nothing."""

    async def wait(self) -> None:
        """Wait until `take` may give a delivery, or `listening_since` has changed. Ends early rather than late."""

    async def is_idle(self) -> bool:
        """Ask the broker whether it is there, and tell whether it was and nothing has come until then.

        A connection that is dead is as silent as a queue that is empty.
        """


class Source(Protocol):
    """An incoming queue."""

    async def ready(self) -> None:
        """Wait until the queue was found, or raise BrokerError."""

    def consume(self, prefetch: int, lease: float = LONGEST_LEASE) -> AbstractAsyncContextManager[Consumer]:
        """Listen to the queue, with up to `prefetch` deliveries unsettled; at the end give back what was not taken.

        A delivery may stay unsettled for `lease` seconds: the broker is asked not to take it back before.
        """

    def has_lost(self, delivery: Delivery) -> bool:
        """Tell whether the broker has taken a delivery back, as far as is known: then it comes again, to us or another."""

    def held(self, delivery: Delivery) -> AbstractContextManager[None]:
        """Have a delivery not count towards the prefetch for a while: it is held back, and others are to flow on."""

    async def settle(self, delivery: Delivery, settlement: Settlement, reason: str = "", error: str = "") -> None:
        """Settle a delivery; of a dead letter, say the reason and the name of the error.

        A dead letter that the broker does not take is written to the directory for them.

        Raises:
            DeliveryLostError: the broker has taken it back. (DeliveryReplacedError: and it is settled all the same.)
        """


class Sink(Protocol):
    """An outgoing queue."""

    async def ready(self) -> None:
        """Wait until the queue was found, or raise BrokerError."""

    async def send(self, body: bytes, message_id: str) -> None:
        """Send a message, and return once the broker has it for good.

        A lost connection is waited out. Cancelled, the message may have been sent or not.

        Raises:
            PublishRefusedError: the broker will not have this message.
        """


@dataclass(frozen=True, slots=True)
class QueueAddress:
    """Where a queue is: its name, the kind of its broker, the broker's address, and the token that opens it.

    Outputs and settlements may wait for a moment, to be sent several together, but those of no more than `spare` events.
    """

    queue: str
    broker: str
    address: str
    token: str = field(default="", repr=False)
    dead_letters: Path = DEAD_LETTERS  # directory for those that the broker does not take
    spare: int = 0  # events that the pilot may have at hand beyond those in its slots


class Patience(Protocol):
    """Says whether a broker that has been away for `seconds` is to be waited for any longer."""

    def __call__(self, seconds: float) -> bool:
        """Tell whether to go on waiting."""


@asynccontextmanager
async def open_sources(addresses: Sequence[QueueAddress], patience: Patience) -> AsyncIterator[list[Source]]:
    """Open the incoming queues; they connect in the background."""
    async with AsyncExitStack() as stack:
        yield [await stack.enter_async_context(open_source(address, patience)) for address in addresses]


@asynccontextmanager
async def open_sinks(addresses: Sequence[QueueAddress], patience: Patience) -> AsyncIterator[list[Sink]]:
    """Open the outgoing queues; they connect in the background."""
    async with AsyncExitStack() as stack:
        yield [await stack.enter_async_context(open_sink(address, patience)) for address in addresses]


class Kind(Protocol):
    """A broker's module."""

    def open_source(self, address: QueueAddress, patience: Patience) -> AbstractAsyncContextManager[Source]:
        """Open an incoming queue."""

    def open_sink(self, address: QueueAddress, patience: Patience) -> AbstractAsyncContextManager[Sink]:
        """Open an outgoing queue."""


def open_source(address: QueueAddress, patience: Patience) -> AbstractAsyncContextManager[Source]:
    """Open one incoming queue at the broker it names."""
    return _kind(address).open_source(address, patience)


def open_sink(address: QueueAddress, patience: Patience) -> AbstractAsyncContextManager[Sink]:
    """Open one outgoing queue at the broker it names."""
    return _kind(address).open_sink(address, patience)


def _kind(address: QueueAddress) -> Kind:
    """Import the module of a broker: they take their time, and but one or two are needed."""
    return cast(Kind, import_module(f"{__name__}.{address.broker}"))


def dead_letter_queue(queue: str) -> str:
    """Name the queue in which the dead letters of `queue` are set aside."""
    return f"{queue}.dead-letters"
