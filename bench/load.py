"""A load: so many events of a size, which a pilot has to do, and the time, CPU and memory that it takes."""

import random
import tempfile
import time
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager
from dataclasses import dataclass
from pathlib import Path

from bench.broker import Queues, RabbitServer, open_queues
from bench.measured_process import MAX_SHOWN, Measured

LEAST_PAUSE, MOST_PAUSE = 0.005, 0.25  # seconds between two counts of the results
PAUSE_WITH_SLEEPERS = 0.01  # if tasks sleep: they end in waves, whose times no rate predicts, and leave cores for counting
PATIENCE = 120.0  # seconds without progress, after which the measurement fails

Start = Callable[[Queues, Path], AbstractContextManager[Measured]]


@dataclass(frozen=True, slots=True)
class Run:
    """The cost of doing a load."""

    seconds: float  # from the first event that was taken to the last result that was confirmed
    cpu: float  # seconds of the pilot's own CPU in that time
    memory: float  # MB at the end
    rate: float  # events a second


@dataclass(frozen=True, slots=True)
class Load:
    """Events that are all different, of which each is to be copied to a result."""

    events: int
    size: int = 1000  # bytes of each; hexadecimal digits of random bytes, which zstd compresses to half
    sleeps: bool = False  # whether its tasks sleep for most of their time

    def bodies(self) -> Iterator[str]:
        """Yield the events."""
        chance = random.Random(1)
        for number in range(self.events):
            start = f"{number} "
            yield start + chance.randbytes(max(0, self.size - len(start) + 1) // 2).hex()[: self.size - len(start)]

    def done_by(self, start: Start, server: RabbitServer) -> Run:
        """Start a pilot, wait until the load is done, and check every result. The queue is full before the pilot starts."""
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
        started, cpu = time.monotonic(), pilot.cpu()
        self.wait(queues, pilot, started)
        seconds = time.monotonic() - started
        return Run(seconds, pilot.cpu() - cpu, pilot.memory(), self.events / seconds)

    def wait(self, queues: Queues, pilot: Measured, started: float) -> None:
        """Wait for the last result. The nearer it is, the shorter the pauses between counts: so they cost little."""
        last, since = 0, started
        longest = PAUSE_WITH_SLEEPERS if self.sleeps else MOST_PAUSE
        while (done := queues.ready(queues.outgoing)) < self.events:
            now = time.monotonic()
            if done != last:
                last, since = done, now
            elif now > since + PATIENCE:
                raise AssertionError(
                    f"{done} of {self.events} results after {now - started:.0f} s: {pilot.output()[-MAX_SHOWN:]}"
                )
            pilot.assert_alive()
            left = (self.events - done) * (now - started) / max(done, 1)
            time.sleep(min(max(left / 4, LEAST_PAUSE), longest))

    def check(self, queues: Queues) -> None:
        """Take the results. Raises AssertionError if there is not exactly one for each event."""
        found = sorted(queues.results())
        wanted = sorted(self.bodies())
        assert found == wanted, f"{len(found)} results for {self.events} events, and not one for each"
