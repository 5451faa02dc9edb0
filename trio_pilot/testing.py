"""A broker, a runtime and a guardian in memory, for tests of code that uses them.

They keep the contracts of the real ones on Trio's clock, `autojump_clock` above all, and record what happened. Each method
is a checkpoint, and calls `fault` with its name: a fault may raise there.
"""

import itertools
import shutil
from collections import deque
from collections.abc import AsyncIterator, Awaitable, Callable, Iterable, Iterator, Mapping
from contextlib import asynccontextmanager, contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import trio

from trio_pilot.brokers import LONGEST_LEASE, Delivery, Settlement, dead_letter_queue, dead_letters
from trio_pilot.errors import DeliveryLostError, NotSetAsideError
from trio_pilot.runtimes import Container, Exit, no_command

Fault = Callable[[str], None]


def no_fault(call: str) -> None:
    """Raise nothing."""


@dataclass(slots=True, eq=False)
class FakeMessage:
    """A message in a fake queue; `attempts` counts its failures and lost deliveries."""

    body: bytes
    message_id: str
    attempts: int = 0
    reason: str = ""
    redelivered: bool = False
    headers: Mapping[str, Any] = field(default_factory=dict)


@dataclass(slots=True, eq=False)
class FakeBroker:
    """Queues in memory."""

    fault: Fault = no_fault
    takes_dead_letters: bool = True
    delays: dict[str, float] = field(default_factory=dict)  # seconds that a call takes, by its name
    queues: dict[str, deque[FakeMessage]] = field(default_factory=dict)
    history: list[tuple[str, str]] = field(default_factory=list)  # (what was done, message id), in order
    unsettled: dict[int, tuple[str, FakeMessage]] = field(default_factory=dict)
    _tags: "itertools.count[int]" = field(default_factory=itertools.count)
    _changed: trio.Event = field(default_factory=trio.Event)

    def put(self, queue: str, body: bytes, message_id: str = "") -> None:
        """Put a message into a queue."""
        message = FakeMessage(body, message_id or f"{queue}-{next(self._tags)}")
        self.queues.setdefault(queue, deque()).append(message)
        self.changed()

    def take_back(self, tags: Iterable[int]) -> None:
        """Return deliveries to their queues and count them, as brokers do when a connection ends."""
        for tag in sorted(set(tags) & self.unsettled.keys()):
            queue, message = self.unsettled.pop(tag)
            message.attempts += 1
            message.redelivered = True
            self.history.append(("TAKEN_BACK", message.message_id))
            self.queues.setdefault(queue, deque()).append(message)
        self.changed()

    def lose_connections(self) -> None:
        """Take back all deliveries that are not settled; the sources stay open, as with new connections."""
        self.take_back(list(self.unsettled))

    def bodies(self, queue: str) -> list[bytes]:
        """Return the bodies of the messages that are ready in a queue."""
        return [message.body for message in self.queues.get(queue, ())]

    def changed(self) -> None:
        """Wake all that wait for a change."""
        self._changed.set()
        self._changed = trio.Event()

    async def change(self) -> None:
        """Wait for a change."""
        await self._changed.wait()

    async def call(self, name: str) -> None:
        """Pass a checkpoint, with the delay and the fault of a call."""
        await trio.sleep(self.delays.get(name, 0))
        self.fault(name)

    @asynccontextmanager
    async def open_source(self, queue: str) -> AsyncIterator["FakeSource"]:
        """Open an incoming queue; at the end the broker takes back all deliveries that are not settled."""
        source = FakeSource(self, queue)
        try:
            yield source
        finally:
            source.take_back()

    @asynccontextmanager
    async def open_sink(self, queue: str) -> AsyncIterator["FakeSink"]:
        """Open an outgoing queue."""
        yield FakeSink(self, queue)


class FakeSource:
    """An incoming queue."""

    def __init__(self, broker: FakeBroker, queue: str) -> None:
        self.broker = broker
        self.queue = queue
        self.lease = 0.0  # of the last `consume`
        self._held = 0
        self._tags: set[int] = set()

    async def ready(self) -> None:
        """Return at once, or raise a fault."""
        await self.broker.call("source.ready")

    @asynccontextmanager
    async def consume(self, prefetch: int, lease: float = LONGEST_LEASE) -> AsyncIterator["FakeConsumer"]:
        """Listen to the queue."""
        self.lease = lease
        await self.broker.call("source.consume")
        yield FakeConsumer(self, prefetch)

    def has_lost(self, delivery: Delivery) -> bool:
        """Return whether the broker has taken the delivery back."""
        return delivery.tag not in self.broker.unsettled

    @contextmanager
    def held(self, delivery: Delivery) -> Iterator[None]:  # noqa: ARG002 -- all deliveries count alike
        """Allow one more delivery while one is held back."""
        self._held += 1
        self.broker.changed()
        try:
            yield
        finally:
            self._held -= 1

    async def settle(self, delivery: Delivery, settlement: Settlement, reason: str = "", error: str = "") -> None:
        """Settle a delivery.

        Raises:
            DeliveryLostError: it is settled or taken back already.
            NotSetAsideError: it would be a dead letter, and the broker is told to take none.
        """
        await self.broker.call(f"source.{settlement.name.lower()}")
        if delivery.tag not in self.broker.unsettled:
            raise DeliveryLostError(f"the delivery of {delivery.message_id} is settled or taken back already")
        if settlement is Settlement.DEAD_LETTER and not self.broker.takes_dead_letters:
            raise NotSetAsideError("nothing takes it as a dead letter")
        queue, message = self.broker.unsettled.pop(delivery.tag)
        self._tags.discard(delivery.tag)
        self.broker.history.append((settlement.name, message.message_id))
        if settlement is Settlement.ACK:
            self.broker.changed()
            return
        message.attempts += settlement is Settlement.REJECT
        message.redelivered = True
        if settlement is Settlement.DEAD_LETTER:
            queue, message.reason = dead_letter_queue(queue), reason
            message.headers = dead_letters.headers(dead_letters.facts(delivery, reason, error))
        self.broker.queues.setdefault(queue, deque()).append(message)
        self.broker.changed()

    def has_one(self, prefetch: int) -> bool:
        """Return whether there is a message that may be delivered."""
        unsettled = len(self._tags & self.broker.unsettled.keys())
        return bool(self.broker.queues.get(self.queue)) and unsettled < prefetch + self._held

    def claim(self) -> Delivery:
        """Take the next message."""
        ready = self.broker.queues[self.queue]
        message, tag = ready.popleft(), next(self.broker._tags)
        self.broker.unsettled[tag] = self.queue, message
        self._tags.add(tag)
        facts = self, self.queue, message.body, message.message_id, message.attempts + 1, tag
        return Delivery(*facts, redelivered=message.redelivered, headers=message.headers)

    def take_back(self) -> None:
        """Return to the queue what was delivered and not settled."""
        self.broker.take_back(self._tags)
        self._tags.clear()


class FakeConsumer:
    """Takes messages when asked."""

    def __init__(self, source: FakeSource, prefetch: int) -> None:
        self.listening_since = trio.current_time()
        self.prefetch = prefetch
        self._source = source

    async def take(self) -> Delivery | None:
        """Take the next message, if there is one."""
        await self._source.broker.call("consumer.take")
        return self._source.claim() if self._source.has_one(self.prefetch) else None

    async def wait(self) -> None:
        """Wait for a change at the broker."""
        await trio.lowlevel.checkpoint()
        if not self._source.has_one(self.prefetch):
            await self._source.broker.change()

    async def is_idle(self) -> bool:
        """Ask the broker."""
        await self._source.broker.call("consumer.is_idle")
        return not self._source.has_one(self.prefetch)


class FakeSink:
    """An outgoing queue."""

    def __init__(self, broker: FakeBroker, queue: str) -> None:
        self.broker = broker
        self.queue = queue

    async def ready(self) -> None:
        """Return at once, or raise a fault."""
        await self.broker.call("sink.ready")

    async def send(self, body: bytes, message_id: str, original: Delivery | None = None) -> None:  # noqa: ARG002
        """Put a message into the queue, and confirm it one checkpoint later."""
        await self.broker.call("sink.send")
        self.broker.put(self.queue, body, message_id)
        await self.broker.call("sink.confirm")
        self.broker.history.append(("CONFIRMED", message_id))


@dataclass(slots=True)
class FakeGuardian:
    """Records what it is to watch."""

    watched: list[tuple[str, Path]] = field(default_factory=list)
    swept: int = 0
    outlives_pilot: bool = False
    fault: Fault = no_fault

    @asynccontextmanager
    async def open(self) -> AsyncIterator["FakeGuardian"]:
        """Open the guardian."""
        self.fault("guardian.open")
        yield self

    def watch(self, what: str, path: Path) -> None:
        """Record a path to watch."""
        self.watched.append((what, path))

    def outlive_pilot(self) -> None:
        """Record that the guardian is to outlive the pilot."""
        self.outlives_pilot = True

    async def sweep(self) -> None:
        """Count a sweep: there is nothing to remove."""
        await trio.lowlevel.checkpoint()
        self.fault("guardian.sweep")
        self.swept += 1


Script = Callable[[Container], Awaitable[int]]


async def succeed(container: Container) -> int:  # noqa: ARG001 -- the arguments of a script
    """Succeed, as a probe on a healthy node does."""
    return 0


async def copy(container: Container) -> int:
    """Copy the input file to the output file, in one second."""
    await trio.sleep(1)
    if infile := container.env.get("EWMS_TASK_INFILE"):
        # Not in a thread: `autojump_clock` would not wait for it.
        shutil.copyfile(infile, container.env["EWMS_TASK_OUTFILE"])
    return 0


@dataclass(slots=True, eq=False)
class FakeRuntime:
    """Runs containers that are coroutines."""

    script: Script = copy
    probe: Script = succeed
    fault: Fault = no_fault
    kill_seconds: float = 0.5  # that killing a container takes
    has_command: bool = True  # the images have commands of their own
    out_of_memory: bool = False  # all containers are killed for it
    running: set[str] = field(default_factory=set)
    most_running: int = 0
    ran: list[Container] = field(default_factory=list)
    name: str = "fake"
    has_mounts: bool = False
    engine: Path | None = None
    has_unremoved_containers: bool = False
    image_directory: Path | None = None

    @asynccontextmanager
    async def open(self) -> AsyncIterator["FakeRuntime"]:
        """Open the runtime."""
        self.fault("runtime.open")
        yield self

    async def prepare(self, image: str, *, has_args: bool = True) -> None:
        """Return at once: there are no images. Raises NodeError if they are to have commands, and have none."""
        await trio.lowlevel.checkpoint()
        if not has_args and not self.has_command:
            raise no_command(image)
        self.fault("runtime.prepare")

    async def has_entrypoint(self, image: str) -> bool:  # noqa: ARG002
        """Return False: there are no images."""
        await trio.lowlevel.checkpoint()
        return False

    async def run(self, container: Container) -> Exit:
        """Run the script of a container; cancelled, take `kill_seconds` to kill it."""
        await trio.lowlevel.checkpoint()
        self.fault("runtime.run")
        if container.without_entrypoint:
            return Exit(await self.probe(container))
        container.stdout.write_bytes(b"")
        container.stderr.write_bytes(b"")
        self.ran.append(container)
        self.running.add(container.name)
        self.most_running = max(self.most_running, len(self.running))
        try:
            code = await self.script(container)
            self.fault("runtime.exit")
        except BaseException:
            with trio.move_on_after(2 * self.kill_seconds, shield=True):
                await trio.sleep(self.kill_seconds)
            raise
        finally:
            self.running.discard(container.name)
        return Exit(137, out_of_memory=True) if self.out_of_memory else Exit(code)
