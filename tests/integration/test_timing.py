"""No polling, and no delays. A time that is compared with a bound is the best or the median of several."""

import statistics
import sys
import time
import uuid
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from functools import partial
from pathlib import Path
from subprocess import PIPE, Popen

import pytest
import trio

from tests.support.brokers import patient, take
from tests.support.pilot_process import COMMAND
from tests.support.servers import RabbitServer
from tests.support.waiting import BROKER, PILOT_RUN
from trio_pilot.brokers import QueueAddress, Settlement, Sink, Source, open_sink, open_source

pytestmark = pytest.mark.alone


class Route:
    """Two queues at a broker, and a pilot between them."""

    def __init__(self, directory: Path, kind: str, address: str) -> None:
        name = uuid.uuid4().hex
        self.incoming = QueueAddress(f"in-{name}", kind, address)
        self.outgoing = QueueAddress(f"out-{name}", kind, address)
        self._directory = directory

    @asynccontextmanager
    async def pilot(self, *, idle: float = 120, slots: int = 1) -> AsyncIterator["Popen[bytes]"]:
        arguments = {
            "--broker": self.incoming.address,
            "--queue-incoming": self.incoming.queue,
            "--queue-outgoing": self.outgoing.queue,
            "--wire": "raw",
            "--runtime": "process",
            "--task-args": "cp {{INFILE}} {{OUTFILE}}",
            "--timeout-queue-incoming": str(idle),
            "--max-concurrent-tasks": str(slots),
        }
        command = [COMMAND, "run", *(word for pair in arguments.items() for word in pair)]
        with Popen(command, cwd=self._directory, stderr=PIPE) as process:  # noqa: ASYNC220 -- it takes a moment
            try:
                yield process
            finally:
                process.terminate()
                await trio.to_thread.run_sync(process.wait)

    @asynccontextmanager
    async def ends(self) -> AsyncIterator[tuple[Sink, Source]]:
        """Open a sink for events and a source of outputs."""
        async with open_sink(self.incoming, patient) as sink, open_source(self.outgoing, patient) as source:
            await sink.ready()
            await source.ready()
            yield sink, source


@pytest.fixture(params=["local", "rabbitmq"])
def route(request: pytest.FixtureRequest, tmp_path: Path) -> Route:
    if request.param == "local":
        return Route(tmp_path, "local", str(tmp_path / "queues.sqlite"))
    server: RabbitServer = request.getfixturevalue("rabbitmq")
    return Route(tmp_path, "rabbitmq", server.address)


async def line_with(process: "Popen[bytes]", word: bytes) -> float:
    """Read the pilot's log up to a line with the word, and return the time."""
    assert process.stderr
    with trio.fail_after(BROKER.seconds):
        while word not in (line := await trio.to_thread.run_sync(process.stderr.readline)):
            assert line, f"the pilot has ended before it said {word!r}"
    return time.monotonic()


def cores_used_by(pid: int) -> dict[str, tuple[float, int]]:
    """Return for how many seconds, to the nanosecond, and how often each thread of a process had a core."""
    threads = {path.parent.name: path.read_text().split() for path in Path(f"/proc/{pid}/task").glob("*/schedstat")}
    return {thread: (int(nanoseconds) / 1e9, int(turns)) for thread, (nanoseconds, _, turns) in threads.items()}


async def idle(route: Route, seconds: float) -> tuple[float, float]:
    """Run an idle pilot; return the part of a core that it uses, and how often a second it is scheduled."""
    async with route.pilot() as process:
        await line_with(process, b"listening")
        await trio.sleep(1)
        before = cores_used_by(process.pid)
        await trio.sleep(seconds)
        after = cores_used_by(process.pid)
    used, turns = (sum(after[one][what] - before.get(one, (0, 0))[what] for one in after) for what in (0, 1))
    print(f"idle: {100 * used / seconds:.3f} % of a core, which it has {turns / seconds:.1f} times a second")
    return used / seconds, turns / seconds


async def test_an_idle_pilot_sleeps(route: Route) -> None:
    _, turns = await idle(route, 10)
    assert turns <= 5


@pytest.mark.soak
async def test_an_idle_pilot_uses_no_more_than_a_fifth_of_a_percent_of_a_core(route: Route) -> None:
    used, _ = await idle(route, 30)
    assert used <= 0.002


async def test_a_pilot_is_listening_soon_after_its_start(route: Route) -> None:
    took, python = [], []
    for _ in range(5):
        python.append(await cost_of(sys.executable, "-c", "import trio"))
        started = time.monotonic()
        async with route.pilot() as process:
            took.append(await line_with(process, b"listening") - started)
    print(f"listening after {[round(seconds, 3) for seconds in took]} s; a Python with Trio alone: {min(python):.3f} s")
    assert min(took) < 0.3 + 3 * min(python)


async def test_a_pilot_ends_soon_after_its_idle_timeout(route: Route) -> None:
    late = []
    for _ in range(3):
        async with route.pilot(idle=1.0) as process:
            listening = await line_with(process, b"listening")
            assert await trio.to_thread.run_sync(partial(process.wait, timeout=PILOT_RUN)) == 0
            late.append(time.monotonic() - listening - 1.0)
    print(f"ended {[round(seconds, 3) for seconds in late]} s after the idle timeout")
    assert min(late) < 0.5


async def test_a_lone_event_on_an_idle_pilot_is_answered_at_once(route: Route) -> None:
    took = []
    async with route.ends() as (sink, source), route.pilot() as process, source.consume(1) as consumer:
        await line_with(process, b"listening")
        for _ in range(15):
            await trio.sleep(0.1)
            started = time.monotonic()
            await sink.send(b"event", uuid.uuid4().hex)
            delivery = await take(consumer)
            took.append(time.monotonic() - started)
            assert delivery.body == b"event"
            await source.settle(delivery, Settlement.ACK)
    process_cost = statistics.median([await cost_of("true") for _ in range(5)])
    print(f"a lone event: {1000 * statistics.median(took):.1f} ms; a process alone: {1000 * process_cost:.1f} ms")
    assert statistics.median(took) < 0.05 + process_cost


async def cost_of(*command: str) -> float:
    """Measure the seconds that a process takes on this machine now, from its start to its reaping."""
    started = time.monotonic()
    await trio.run_process(command)
    return time.monotonic() - started


async def memory_after(process: "Popen[bytes]", route: Route, events: int) -> int:
    """Let the pilot do a number of events, and return its memory in kB."""
    async with route.ends() as (sink, source), trio.open_nursery() as nursery:

        async def feed() -> None:
            for _ in range(events):
                await sink.send(bytes(1000), uuid.uuid4().hex)

        nursery.start_soon(feed)
        async with source.consume(64) as consumer:
            for _ in range(events):
                await source.settle(await take(consumer), Settlement.ACK)
    (line,) = (line for line in Path(f"/proc/{process.pid}/status").read_text().splitlines() if "VmRSS" in line)  # noqa: ASYNC240
    return int(line.split()[1])


@pytest.mark.parametrize("events", [1000, pytest.param(10_000, marks=pytest.mark.soak)])
async def test_memory_does_not_grow_with_the_events(route: Route, events: int) -> None:
    async with route.pilot(slots=8) as process:
        await line_with(process, b"listening")
        first = await memory_after(process, route, events // 10)
        last = await memory_after(process, route, events - events // 10)
    print(f"memory: {first} kB after {events // 10} events, {last} kB after {events}")
    assert last < 1.1 * first
