"""A pilot on the fakes."""

import math
from collections import Counter
from collections.abc import AsyncIterator, Iterable
from contextlib import AbstractAsyncContextManager, AsyncExitStack, asynccontextmanager, nullcontext
from dataclasses import dataclass, field
from pathlib import Path
from signal import SIGTERM
from typing import Any, ClassVar

import trio

from trio_pilot.pilot.serve import Parts, serve
from trio_pilot.settings import Settings
from trio_pilot.status import Status
from trio_pilot.testing import FakeBroker, FakeGuardian, FakeRuntime
from trio_pilot.wire import EwmsWire, Message

WIRE = EwmsWire()


@asynccontextmanager
async def all_of(openings: Iterable[AbstractAsyncContextManager[Any]]) -> AsyncIterator[list[Any]]:
    async with AsyncExitStack() as stack:
        yield [await stack.enter_async_context(opening) for opening in openings]


@dataclass
class Lab:
    """A pilot with a fake broker and a fake runtime, and the means to look at what it did."""

    directory: Path
    broker: FakeBroker = field(default_factory=FakeBroker)
    guardian: FakeGuardian = field(default_factory=FakeGuardian)
    runtime: FakeRuntime = field(default_factory=FakeRuntime)
    status: Status = field(default_factory=Status)
    reporter: AbstractAsyncContextManager[None] = field(default_factory=nullcontext)

    DEFAULTS: ClassVar[dict[str, Any]] = {
        "task_args": ("run", "{{INFILE}}", "{{OUTFILE}}"),
        "queue_incoming": ("in",),
        "queue_outgoing": ("out",),
        "grace": 10.0,
    }

    def __post_init__(self) -> None:
        self._send_signal, self._signals = trio.open_memory_channel[int](math.inf)

    def put(self, *events: Any) -> None:
        for event in events:
            self.broker.put("in", WIRE.encode(Message(event)), message_id=str(event))

    def outputs(self) -> list[Any]:
        return [WIRE.decode(body, 10**6).data for body in self.broker.bodies("out")]

    def signal(self, number: int = SIGTERM) -> None:
        self._send_signal.send_nowait(number)

    async def run(self, **options: Any) -> int | None:
        settings = Settings(**{**self.DEFAULTS, "data_dir_parent_path_on_host": self.directory, **options})
        return await serve(
            settings,
            Parts(
                self.guardian.open(),
                self.reporter,
                self.runtime.open(),
                all_of(map(self.broker.open_source, settings.queue_incoming)),
                all_of(map(self.broker.open_sink, settings.queue_outgoing)),
            ),
            self._signals,
            self.status,
        )

    async def run_signalled(self, times: Iterable[float], number: int = SIGTERM, **options: Any) -> int | None:
        """Run a pilot that gets a signal at each of some times."""

        async def send() -> None:
            for time in times:
                await trio.sleep_until(time)
                self.signal(number)

        async with trio.open_nursery() as nursery:
            nursery.start_soon(send)
            return await self.run(**options)

    def assert_nothing_is_left(self) -> None:
        assert not self.runtime.running
        assert not self.broker.unsettled
        assert not (self.directory / "ewms-pilot-data").exists()

    def assert_the_promise(self, events: Iterable[Any]) -> None:
        """Nothing is left; each event is where it belongs; none is acked without its output confirmed before."""
        self.assert_nothing_is_left()
        confirmed: set[str] = set()
        acked: Counter[str] = Counter()
        for what, message_id in self.broker.history:
            if what == "CONFIRMED":
                confirmed.add(message_id)
            elif what == "ACK":
                assert message_id in confirmed, f"{message_id} acked, but not confirmed"
                acked[message_id] += 1
        assert all(count == 1 for count in acked.values())
        waiting = [
            message.message_id for queue in ("in", "in.dead-letters") for message in self.broker.queues.get(queue, ())
        ]
        assert sorted([*acked, *waiting]) == sorted(map(str, events))
