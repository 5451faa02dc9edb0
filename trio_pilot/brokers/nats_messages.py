"""Messages of JetStream as a server delivers them, and those that a pilot holds under a lease."""

import time
import weakref
from collections.abc import Mapping
from dataclasses import dataclass, field
from datetime import datetime

# What a client may answer to a delivery.
ACK, NAK, PROGRESS, TERM = b"+ACK", b"-NAK", b"+WPI", b"+TERM"


@dataclass(frozen=True, slots=True)
class StreamPosition:
    """A queue in JetStream: a stream that keeps one subject, and a consumer shared by all clients that take from it."""

    stream: str
    subject: str
    consumer: str


@dataclass(slots=True, eq=False, weakref_slot=True)
class NatsMessage:
    """A message as the server delivers it."""

    sequence: int  # in its stream
    stored: datetime  # when its stream got it
    redelivered: bool
    answer_to: str = field(repr=False)
    headers: Mapping[str, str]
    body: bytes = field(repr=False)
    held_until: float  # seconds of time.monotonic: until then it is delivered to no other client
    settled: bool = False
    late_answer: bytes = b""  # the answer to send when nothing waits for it any more
    is_lost: bool = False  # its lease has run out, or it has come again


class HeldMessages:
    """Messages that were delivered and are not settled; they outlive the connection by which they came."""

    def __init__(self) -> None:
        self._messages: dict[int, NatsMessage] = {}
        self._known = weakref.WeakValueDictionary[int, NatsMessage]()  # settled ones too, while others refer to them

    def __len__(self) -> int:
        return len(self._messages)

    def add(self, message: NatsMessage) -> None:
        """Hold a message; an earlier delivery of it is lost by that, even if it was settled.

        A server that was killed may have forgotten what it delivered in its last tenth of a second, and how that was
        settled. It then delivers the message as if for the first time.
        """
        if old := self._known.get(message.sequence):
            old.is_lost = True
            message.redelivered |= old.stored == message.stored  # else the stream is another
        self._messages[message.sequence] = self._known[message.sequence] = message

    def drop(self, message: NatsMessage) -> None:
        """Hold a message no longer."""
        if self._messages.get(message.sequence) is message:
            del self._messages[message.sequence]

    def drop_lost(self) -> None:
        """Drop messages whose leases were not renewed in time."""
        for message in self.all():
            if time.monotonic() > message.held_until:
                message.is_lost = True
                self.drop(message)

    def all(self) -> list[NatsMessage]:
        """Return all messages that are held."""
        return list(self._messages.values())
