"""A pilot that records where the time of its events goes: `python -m bench.timing_pilot SETTINGS.json TIMES.json`.

It is the pilot itself, whose queues and runtime are in wrappers that read the clock; so other pilots pay nothing for it.
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

from bench import custom_pilot
from trio_pilot.brokers import Delivery, Source
from trio_pilot.cleanup.client import open_guardian
from trio_pilot.runtimes import Container, Exit
from trio_pilot.runtimes.selection import open_runtime

STAGES = ("queued", "staged", "started", "ran", "read", "published", "acked")

T = TypeVar("T")


@dataclass
class Times:
    """The times at which each event reached the end of a stage, and the lengths of the stages."""

    slots: int
    clock: Callable[[], float] = perf_counter
    taken: dict[str, float] = field(default_factory=dict)
    moments: dict[Any, list[float]] = field(default_factory=lambda: defaultdict(list))  # by Trio task: one for each event
    stages: dict[str, list[float]] = field(default_factory=lambda: defaultdict(list))
    first_taken: float = 0.0
    last_settled: float = 0.0

    def event_taken(self, delivery: Delivery) -> None:
        """Record that an event was taken."""
        self.taken[delivery.message_id] = self.clock()
        self.first_taken = self.first_taken or self.taken[delivery.message_id]

    def stage_ended(self) -> None:
        """Record the end of a stage of the event whose Trio task this is."""
        self.moments[trio.lowlevel.current_task()].append(self.clock())

    def event_settled(self, delivery: Delivery) -> None:
        """Record that an event was settled, and add the lengths of its stages."""
        self.stage_ended()
        self.last_settled = self.clock()
        moments = [self.taken.pop(delivery.message_id), *self.moments.pop(trio.lowlevel.current_task())]
        for stage, (start, end) in zip(STAGES[1:], pairwise(moments), strict=True):
            self.stages[stage].append(end - start)

    def means(self) -> dict[str, float]:
        """Return the mean seconds of each stage; `queued` is the rest of the slots' time, that is, between two events."""
        count = len(self.stages["acked"])
        known = {stage: sum(lengths) / count for stage, lengths in self.stages.items()}
        slot_time = self.slots * (self.last_settled - self.first_taken) / count
        return {"queued": max(0.0, slot_time - sum(known.values())), **known}


class TimedPart:
    """A wrapper of a part of the pilot, which records times; all else is left to the part."""

    def __init__(self, part: Any, times: Times) -> None:
        self._part = part
        self._times = times

    def __getattr__(self, name: str) -> Any:
        """Return an attribute of the part itself."""
        return getattr(self._part, name)


class TimedSource(TimedPart):
    """A source whose deliveries and settlements are timed."""

    @asynccontextmanager
    async def consume(self, *how: Any) -> AsyncIterator["TimedConsumer"]:
        """Consume as the source does; its deliveries are settled by this wrapper."""
        async with self._part.consume(*how) as consumer:
            yield TimedConsumer(consumer, self._times, self)

    async def settle(self, delivery: Delivery, *how: Any) -> None:
        """Settle a delivery, and record it."""
        await self._part.settle(delivery, *how)
        self._times.event_settled(delivery)


class TimedConsumer(TimedPart):
    """A consumer whose deliveries are timed."""

    def __init__(self, consumer: Any, times: Times, source: TimedSource) -> None:
        super().__init__(consumer, times)
        self._source = source

    async def take(self) -> Delivery | None:
        """Take a delivery, and record it."""
        delivery: Delivery | None = await self._part.take()
        if delivery is None:
            return None
        self._times.event_taken(delivery)
        return dataclasses.replace(delivery, source=cast(Source, self._source))


class TimedSink(TimedPart):
    """A sink that records when sending begins and is confirmed."""

    async def send(self, body: bytes, message_id: str, *more: Any) -> None:
        """Send, and record when that began and when it was confirmed."""
        self._times.stage_ended()
        await self._part.send(body, message_id, *more)
        self._times.stage_ended()


class TimedRuntime(TimedPart):
    """A runtime whose containers are timed."""

    async def run(self, container: Container) -> Exit:
        """Run a container, and record when that was requested, when the runtime first waited, and when it ended."""
        if container.without_entrypoint:  # a probe of the node
            return cast(Exit, await self._part.run(container))
        self._times.stage_ended()
        ended: Exit = await CallOnFirstWait(self._part.run(container), self._times.stage_ended)
        self._times.stage_ended()
        return ended


class CallOnFirstWait(Awaitable[T], Generic[T]):
    """Awaits a coroutine, and calls a function when that first waits: in a runtime of processes, once one is started."""

    def __init__(self, coroutine: Coroutine[Any, Any, T], function: Callable[[], None]) -> None:
        self._coroutine = coroutine
        self._function: Callable[[], None] | None = function

    def __await__(self) -> Generator[Any, Any, T]:
        """Wait for the coroutine."""
        step, value = self._coroutine.send, None
        while True:
            try:
                request = step(value)
            except StopIteration as end:
                self._call_once()  # the coroutine never waited
                return end.value  # type: ignore[no-any-return]
            self._call_once()
            try:
                step, value = self._coroutine.send, (yield request)
            except BaseException as error:
                step, value = self._coroutine.throw, error

    def _call_once(self) -> None:
        if self._function:
            self._function()
            self._function = None


@asynccontextmanager
async def wrapped(opening: AbstractAsyncContextManager[Any], wrap: Callable[[Any], Any]) -> AsyncIterator[Any]:
    """Open something, and yield what `wrap` returns for it."""
    async with opening as opened:
        yield wrap(opened)


def main() -> None:
    """Run a pilot with the settings in one file until SIGTERM, and write the mean seconds of each stage to the other."""
    settings = custom_pilot.read_settings(sys.argv[1])
    times = Times(settings.max_concurrent_tasks)
    custom_pilot.run_pilot(
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
