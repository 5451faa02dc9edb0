"""A pilot that notes where the time of its events goes: `python -m bench.timed SETTINGS.json TIMES.json`.

It is the pilot itself, with its queues and its runtime handed to it in wrappings that look at the clock; so it costs nothing
where it is not used.
"""

import dataclasses
import json
import sys
from collections import defaultdict
from collections.abc import AsyncIterator, Awaitable, Callable, Coroutine, Generator
from contextlib import AbstractAsyncContextManager, asynccontextmanager
from dataclasses import dataclass, field
from itertools import pairwise
from pathlib import Path
from time import perf_counter
from typing import Any, Generic, TypeVar, cast

import trio

from bench import inside
from trio_pilot.brokers import Delivery, Source
from trio_pilot.cleanup.client import open_guardian
from trio_pilot.runtimes import Container, Exit
from trio_pilot.runtimes.selection import open_runtime

STAGES = ("queued", "staged", "started", "ran", "read", "published", "acked")

T = TypeVar("T")


@dataclass
class Times:
    """The moments of each event in its life, and how long the stages between them were."""

    slots: int
    taken: dict[str, float] = field(default_factory=dict)
    moments: dict[Any, list[float]] = field(default_factory=lambda: defaultdict(list))  # by Trio task: an event's
    stages: dict[str, list[float]] = field(default_factory=lambda: defaultdict(list))
    begun: float = 0.0
    ended: float = 0.0

    def take(self, delivery: Delivery) -> None:
        """Note that an event was taken."""
        self.taken[delivery.message_id] = perf_counter()
        self.begun = self.begun or self.taken[delivery.message_id]

    def note(self) -> None:
        """Note the next moment of the event whose task this is."""
        self.moments[trio.lowlevel.current_task()].append(perf_counter())

    def settle(self, delivery: Delivery) -> None:
        """Note that an event was settled; its moments become lengths."""
        self.note()
        self.ended = perf_counter()
        moments = [self.taken.pop(delivery.message_id), *self.moments.pop(trio.lowlevel.current_task())]
        for stage, (start, end) in zip(STAGES[1:], pairwise(moments), strict=True):
            self.stages[stage].append(end - start)

    def means(self) -> dict[str, float]:
        """Give the mean seconds of each stage; `queued` is the rest of the slots' time: between two events."""
        count = len(self.stages["acked"])
        known = {stage: sum(lengths) / count for stage, lengths in self.stages.items()}
        return {"queued": max(0.0, self.slots * (self.ended - self.begun) / count - sum(known.values())), **known}


class Timed:
    """A part of the pilot, looked at: what is not noted here is as the part itself does it."""

    def __init__(self, part: Any, times: Times) -> None:
        self._part = part
        self._times = times

    def __getattr__(self, name: str) -> Any:
        """Give what is the part's."""
        return getattr(self._part, name)


class TimedSource(Timed):
    """A source, looked at."""

    @asynccontextmanager
    async def consume(self, *how: Any) -> AsyncIterator["TimedConsumer"]:
        """As the source does; what is taken is to be settled by way of us."""
        async with self._part.consume(*how) as consumer:
            yield TimedConsumer(consumer, self._times, self)

    async def settle(self, delivery: Delivery, *how: Any) -> None:
        """Settle, and note it."""
        await self._part.settle(delivery, *how)
        self._times.settle(delivery)


class TimedConsumer(Timed):
    """A consumer, looked at."""

    def __init__(self, consumer: Any, times: Times, source: TimedSource) -> None:
        super().__init__(consumer, times)
        self._source = source

    async def take(self) -> Delivery | None:
        """Take a delivery, and note it."""
        delivery: Delivery | None = await self._part.take()
        if delivery is None:
            return None
        self._times.take(delivery)
        return dataclasses.replace(delivery, source=cast(Source, self._source))


class TimedSink(Timed):
    """A sink, looked at."""

    async def send(self, body: bytes, message_id: str, *more: Any) -> None:
        """Send, and note when that was begun and confirmed."""
        self._times.note()
        await self._part.send(body, message_id, *more)
        self._times.note()


class TimedRuntime(Timed):
    """A runtime, looked at."""

    async def run(self, container: Container) -> Exit:
        """Run a container, and note when that was asked for, when the runtime began to wait, and when it was over."""
        if container.plain:  # a probe
            return cast(Exit, await self._part.run(container))
        self._times.note()
        ended: Exit = await Noting(self._part.run(container), self._times.note)
        self._times.note()
        return ended


class Noting(Awaitable[T], Generic[T]):
    """A coroutine, and a call when it first waits: with a runtime that starts processes, when one is started."""

    def __init__(self, coroutine: Coroutine[Any, Any, T], note: Callable[[], None]) -> None:
        self._coroutine = coroutine
        self._note: Callable[[], None] | None = note

    def __await__(self) -> Generator[Any, Any, T]:
        """Wait for the coroutine."""
        step, value = self._coroutine.send, None
        while True:
            try:
                request = step(value)
            except StopIteration as end:
                self._once()  # it has not had to wait
                return end.value  # type: ignore[no-any-return]
            self._once()
            try:
                step, value = self._coroutine.send, (yield request)
            except BaseException as error:
                step, value = self._coroutine.throw, error

    def _once(self) -> None:
        if self._note:
            self._note()
            self._note = None


@asynccontextmanager
async def wrapped(opening: AbstractAsyncContextManager[Any], wrap: Callable[[Any], Any]) -> AsyncIterator[Any]:
    """Open something, and give what is made of it."""
    async with opening as opened:
        yield wrap(opened)


def main() -> None:
    """Serve with the settings in one file, and write the mean seconds of each stage to the other."""
    settings = inside.settings(sys.argv[1])
    times = Times(settings.max_concurrent_tasks)
    inside.run(
        settings,
        open_guardian(),
        wrapped(
            open_runtime(settings.runtime, settings.task_image, settings.runtime_options),
            lambda runtime: TimedRuntime(runtime, times),
        ),
        lambda opening: wrapped(opening, lambda sources: [TimedSource(source, times) for source in sources]),
        lambda opening: wrapped(opening, lambda sinks: [TimedSink(sink, times) for sink in sinks]),
    )
    Path(sys.argv[2]).write_text(json.dumps(times.means()))


if __name__ == "__main__":
    main()
