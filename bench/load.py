"""A load: so many events of a size, and what it takes somebody to do them all."""

import random
import tempfile
import time
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager
from dataclasses import dataclass
from pathlib import Path

from bench.broker import Queues, RabbitServer, open_queues
from bench.process import Measured

LEAST_PAUSE, MOST_PAUSE = 0.005, 0.25  # seconds between two looks at the queue of results
PAUSE_WITH_SLEEPERS = 0.01  # where tasks sleep: they end in waves, of which no rate tells, and leave cores for looking
PATIENCE = 120.0  # seconds without any progress, after which nothing will come any more

Start = Callable[[Queues, Path], AbstractContextManager[Measured]]


@dataclass(frozen=True, slots=True)
class Run:
    """How a load was done."""

    seconds: float  # from the first event that was taken to the last result that was confirmed
    cpu: float  # seconds of the pilot's own CPU meanwhile
    memory: float  # MB in the end
    rate: float  # events a second


@dataclass(frozen=True, slots=True)
class Load:
    """Events that are all different, each to come back as it is."""

    events: int
    size: int = 1000  # bytes of each; half of what zstd could take out of text is not there to be taken out
    sleeps: bool = False  # whether its tasks sleep for most of their time

    def bodies(self) -> Iterator[str]:
        """Give the events."""
        chance = random.Random(1)
        for number in range(self.events):
            start = f"{number} "
            yield start + chance.randbytes(max(0, self.size - len(start) + 1) // 2).hex()[: self.size - len(start)]

    def done_by(self, start: Start, server: RabbitServer) -> Run:
        """Have the load done, and check every result. The queue is full before anybody starts to take from it."""
        with open_queues(server) as queues, tempfile.TemporaryDirectory(prefix="trio-pilot-bench-") as directory:
            queues.fill(self.bodies())
            with start(queues, Path(directory)) as pilot:
                run = self._timed(queues, pilot)
            self.check(queues)
        return run

    def _timed(self, queues: Queues, pilot: Measured) -> Run:
        while queues.ready(queues.incoming) == self.events:
            pilot.assert_alive()
            time.sleep(LEAST_PAUSE)
        begun, cpu = time.monotonic(), pilot.cpu()
        self.wait(queues, pilot, begun)
        seconds = time.monotonic() - begun
        return Run(seconds, pilot.cpu() - cpu, pilot.memory(), self.events / seconds)

    def wait(self, queues: Queues, pilot: Measured, begun: float) -> None:
        """Wait for the last result. The nearer it is, the more often the queue is looked at: so looking costs little."""
        last, since = 0, begun
        most = PAUSE_WITH_SLEEPERS if self.sleeps else MOST_PAUSE
        while (done := queues.ready(queues.outgoing)) < self.events:
            now = time.monotonic()
            if done != last:
                last, since = done, now
            elif now > since + PATIENCE:
                raise AssertionError(f"{done} of {self.events} results after {now - begun:.0f} s: {pilot.said()[-2000:]}")
            pilot.assert_alive()
            left = (self.events - done) * (now - begun) / max(done, 1)
            time.sleep(min(max(left / 4, LEAST_PAUSE), most))

    def check(self, queues: Queues) -> None:
        """Take the results, and raise AssertionError if there is not one for each event."""
        found = sorted(queues.results())
        wanted = sorted(self.bodies())
        assert found == wanted, f"{len(found)} results for {self.events} events, and not one for each"
