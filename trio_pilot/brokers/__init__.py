"""The interface of a message broker to a pilot; each broker has a module that implements it.

A `Source` hands out deliveries and settles them; a `Sink` sends, and returns once the broker has confirmed. Both connect in
the background from the moment they are opened, and outlive every task, so that a task being killed can still settle.
"""

from collections.abc import AsyncIterator, Hashable, Mapping, Sequence
from contextlib import AbstractAsyncContextManager, AbstractContextManager, AsyncExitStack, asynccontextmanager
from dataclasses import dataclass, field
from enum import Enum
from pathlib import Path
from typing import Any, Protocol, cast

from trio_pilot.brokers.kinds import KINDS, BrokerKind

DEAD_LETTERS = Path("ewms-pilot-dead-letters")  # the default directory for dead letters that a broker does not take

LONGEST_LEASE = 30 * 86400.0  # seconds


class Settlement(Enum):
    """The ways to settle an event, by cause."""

    ACK = "ack"  # done: its output is confirmed, or there was none
    RELEASE = "release"  # the pilot or its node could not do it: back to the queue, uncounted where the broker can
    REJECT = "reject"  # the event failed: back to the queue, counted
    DEAD_LETTER = "dead letter"  # the event failed for the last time: set aside with its reason


@dataclass(frozen=True, slots=True, eq=False)
class Delivery:
    """One delivery of an event, to be settled once, at its source."""

    source: "Source"
    queue: str
    body: bytes = field(repr=False)
    message_id: str
    attempt: int  # number of this attempt, from 1: one more than the known failures of the event
    tag: Any = field(repr=False)  # identifies the delivery to its source
    redelivered: bool = False  # delivered before, to this consumer or another, and not acked
    named: bool = True  # its sender set the id; else the id is a hash of the body, and equal events share it
    headers: Mapping[str, Any] = field(default_factory=dict, repr=False)  # of the message, not those in the body
    # The broker's own mark of the message, or at least of the life of its queue: deliveries of one event have it in common.
    origin: Hashable = None
    is_unique: bool = False  # no other message has this origin


class Consumer(Protocol):
    """Takes deliveries from one queue, one at a time, when asked."""

    @property
    def listening_since(self) -> float:
        """When it began to listen without a break (trio time); infinite while it cannot listen."""

    async def take(self) -> Delivery | None:
        """Take a delivery if there is one. A cancelled `take` has taken nothing."""

    async def wait(self) -> None:
        """Wait until `take` may return a delivery, or `listening_since` has changed. It may return early, never late."""

    async def is_idle(self) -> bool:
        """Ask the broker for an answer; return whether it came and there was no delivery until then.

        A dead connection is as silent as an empty queue: only an answer tells them apart.
        """


class Source(Protocol):
    """An incoming queue."""

    async def ready(self) -> None:
        """Wait until the queue was found, or raise BrokerError."""

    def consume(self, prefetch: int, lease: float = LONGEST_LEASE) -> AbstractAsyncContextManager[Consumer]:
        """Listen to the queue, with up to `prefetch` deliveries unsettled; at the end, release those not taken.

        A delivery may stay unsettled for `lease` seconds: the broker is asked not to take it back before.
        """

    def has_lost(self, delivery: Delivery) -> bool:
        """Return whether the broker is known to have taken a delivery back; then it delivers the event again."""

    def held(self, delivery: Delivery) -> AbstractContextManager[None]:
        """Exempt a delivery from the prefetch in this context, so that others arrive while it is held back."""

    async def settle(self, delivery: Delivery, settlement: Settlement, reason: str = "", error: str = "") -> None:
        """Settle a delivery; for a dead letter, with the reason and the name of the error.

        A dead letter that the broker does not take is written to the directory of dead letters, if that outlasts the job.

        Raises:
            NotSetAsideError: nothing takes the dead letter; the delivery is not settled.
            DeliveryLostError: the broker has taken the delivery back.
            DeliveryReplacedError: likewise, but the copy that settles the event is stored.
        """


class Sink(Protocol):
    """An outgoing queue."""

    async def ready(self) -> None:
        """Wait until the queue was found, or raise BrokerError."""

    async def send(self, body: bytes, message_id: str, original: Delivery | None = None) -> None:
        """Send a message, and return once the broker has stored it.

        With the metadata of its original, a delivery at the same broker, but not what trio-pilot has added to that: headers,
        priority, correlation id, address for replies, where the broker has them.

        A lost connection is waited out. If this is cancelled, the message may have been sent or not.

        Raises:
            PublishRefusedError: the broker refuses this message.
        """


@dataclass(frozen=True, slots=True)
class QueueAddress:
    """Where a queue is: its name, the kind of its broker, the broker's address, and the token for it.

    Outputs and settlements may wait for a moment, to be sent several together, but those of no more than `spare` events.
    """

    queue: str
    broker: str  # the name of its kind
    address: str
    token: str = field(default="", repr=False)
    dead_letters: Path = DEAD_LETTERS  # directory for those that the broker does not take
    spare: int = 0  # events that the pilot may have at hand beyond those in its slots

    @property
    def kind(self) -> BrokerKind:
        """The kind of its broker."""
        return KINDS[self.broker]


class Patience(Protocol):
    """Decides how long a broker that cannot be reached is waited for."""

    def __call__(self, seconds: float) -> bool:
        """Return whether to wait on for a broker that has been away for `seconds`."""


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


class BrokerModule(Protocol):
    """The functions of a broker's module."""

    def open_source(self, address: QueueAddress, patience: Patience) -> AbstractAsyncContextManager[Source]:
        """Open an incoming queue."""

    def open_sink(self, address: QueueAddress, patience: Patience) -> AbstractAsyncContextManager[Sink]:
        """Open an outgoing queue."""


def open_source(address: QueueAddress, patience: Patience) -> AbstractAsyncContextManager[Source]:
    """Open one incoming queue at its broker."""
    return cast(BrokerModule, address.kind.load()).open_source(address, patience)


def open_sink(address: QueueAddress, patience: Patience) -> AbstractAsyncContextManager[Sink]:
    """Open one outgoing queue at its broker."""
    return cast(BrokerModule, address.kind.load()).open_sink(address, patience)


def dead_letter_queue(queue: str) -> str:
    """Return the name of the queue for the dead letters of `queue`."""
    return f"{queue}.dead-letters"
