# Brokers that crash and networks that fail repeatedly during one run: no result is lost, no event is run twice.

import json
import random
import re
import statistics
import subprocess
from collections import Counter
from collections.abc import AsyncIterator, Awaitable, Callable, Iterator
from pathlib import Path

import pytest
import trio

from tests.integration.test_broker_faults import send_all, settings
from tests.support import network_proxy as proxies
from tests.support import servers
from tests.support.brokers import Nats, Rabbit, new_name
from tests.support.pilot_process import COMMAND, assert_nothing_left, environment, pilot
from tests.support.services import open_rabbitmq
from trio_pilot.brokers.nats import place_of
from trio_pilot.brokers.reconnecting import Timeouts
from trio_pilot.wire import EwmsWire, Message

RESUME = 15.0  # seconds from the return of a broker to the next event that is started
SLOTS = 4
BRIEFLY = "0.$(($$ % 9))"  # what tasks sleep, in seconds
LONGER = "$((1 + $$ % 5))"

# Writes a line at the start and at the end of each run of an event.
TASK = (
    "n=$(cat $EWMS_TASK_INFILE); echo start >> {log}/$n; sleep {seconds}; "
    "cp $EWMS_TASK_INFILE $EWMS_TASK_OUTFILE; echo end >> {log}/$n"
)

Fault = Callable[[], Awaitable[None]]


@pytest.fixture(params=["", *(pytest.param(suite, marks=pytest.mark.soak) for suite in ("trixie", "sid"))])
def suite(request: pytest.FixtureRequest) -> str:
    """The suite of Debian that RabbitMQ is taken from: 4.0, 4.3, or, with no name, the one that is installed."""
    return str(request.param)


@pytest.fixture(scope="module")
def server() -> Iterator[servers.RabbitServer]:
    """A server for this module alone, which disconnects clients that are silent for two heartbeats."""
    with open_rabbitmq(config="heartbeat = 2\n") as server:
        yield server


@pytest.fixture
def broker(server: servers.RabbitServer) -> Rabbit:
    return Rabbit(server)


@pytest.fixture
async def proxy(server: servers.RabbitServer) -> AsyncIterator[proxies.Proxy]:
    async with proxies.proxy(server.port) as forwarder:
        yield forwarder


class Campaign:
    """One pilot and its events, and faults one after the other."""

    def __init__(self, broker: Rabbit | Nats, directory: Path, count: int, seconds: str) -> None:
        self.broker, self.count, self.seconds = broker, count, seconds
        self.queue = new_name()
        self.directory, self.log = directory / "slot", directory / "log"
        self.pauses: list[float] = []  # seconds from each return of the broker to the next event that was started
        for made in (self.directory, self.log):
            made.mkdir()

    async def run(self, address: str, faults: list[Fault], **more: object) -> str:
        """Run the pilot on a broker at an address, with faults at random moments, and return its log."""
        await send_all(self.broker, self.queue, *[EwmsWire().encode(Message(number)) for number in range(self.count)])
        task = f"sh -c '{TASK.format(log=self.log, seconds=self.seconds)}'"
        usual = {"TASK_ARGS": task, "MAX_CONCURRENT_TASKS": SLOTS, "PREFETCH": 2 * SLOTS}
        usual |= {"TIMEOUT_QUEUE_INCOMING": 2, "BROKER_PATIENCE": 120}
        given = settings(self.broker, self.queue, **{**usual, **more})
        for direction in ("INCOMING", "OUTGOING"):
            given[f"QUEUE_{direction}_BROKER_ADDRESS"] = address
        said = self.directory.with_name("said")  # a pipe would be full after eighty faults
        with pilot(self.directory, given, log=said) as child:
            for fault in faults:
                await trio.sleep(random.uniform(0, 1.5))
                await fault()
                await self._resumes(child)
            with trio.fail_after(60 + self.count):
                await trio.to_thread.run_sync(child.wait, abandon_on_cancel=True)
        stderr = said.read_text()
        assert child.returncode == 0, stderr[-4000:]
        assert "Traceback" not in stderr
        return stderr

    async def _resumes(self, child: "subprocess.Popen[str]") -> None:
        """Check that another event is started. All events that are left are in the queue, and there is no other pilot."""
        begun, before = trio.current_time(), self.started()
        if before == self.count:
            return
        with trio.move_on_after(RESUME):
            while self.started() == before and child.poll() is None:  # noqa: ASYNC110 -- there is no event
                await trio.sleep(0.05)
        self.pauses.append(trio.current_time() - begun)
        assert self.started() > before, self._state(child)

    def _state(self, child: "subprocess.Popen[str]") -> str:
        """Describe a pilot that has not started an event for long."""
        ready, delivered = self.broker.counts(self.queue)
        said = self.directory.with_name("said").read_text().splitlines()[-20:]
        return f"exit code {child.poll()}; {self.started()} started, {ready} ready, {delivered} delivered; {said}"

    def started(self) -> int:
        return sum(1 for _ in self.log.iterdir())

    def check(self, stderr: str) -> None:
        """Check that each event was run once and has its result, apart from copies, which `receive --unique` drops."""
        assert_nothing_left(self.directory)
        runs = Counter(tuple(path.read_text().split()) for path in self.log.iterdir())
        arrived = self.broker.ready(f"{self.queue}-out")
        found = self._receive()
        lost = len(re.findall("connecting again", stderr))
        print(f"{self.count} events, {lost} connections lost, {dict(runs)}; {arrived} outputs, {len(found)} unique")
        if self.pauses:
            usual, longest = statistics.median(self.pauses), max(self.pauses)
            print(f"{len(self.pauses)} faults with events left; the next began {usual:.1f} s later, {longest:.1f} s at most")
        assert runs == {("start", "end"): self.count}
        assert Counter(found) == Counter(range(self.count))
        assert self.broker.ready(self.queue) == 0

    def _receive(self) -> list[int]:
        command = [COMMAND, "receive", f"{self.queue}-out", "--unique"]
        env = environment({"BROKER": f"{self.broker.scheme}://{self.broker.server.address}"})
        done = subprocess.run(command, env=env, capture_output=True, text=True)
        assert done.returncode == 0, done.stderr
        return [
            json.loads(json.loads(line)) if line.startswith('"') else json.loads(line) for line in done.stdout.splitlines()
        ]


@pytest.mark.parametrize(
    ("kills", "count", "seconds"), [(5, 100, BRIEFLY), pytest.param(200, 1000, LONGER, marks=pytest.mark.soak)]
)
async def test_a_broker_killed_repeatedly_costs_no_result_and_no_second_run(
    broker: Rabbit, tmp_path: Path, kills: int, count: int, seconds: str
) -> None:
    async def crash() -> None:
        await trio.to_thread.run_sync(broker.server.kill)
        await trio.sleep(random.uniform(0, 1))
        broker.server.launch()
        await trio.to_thread.run_sync(broker.server.wait_until_ready)

    campaign = Campaign(broker, tmp_path, count, seconds)
    campaign.check(await campaign.run(broker.server.address, [crash] * kills))


@pytest.mark.usefixtures("nats")  # which installs the server
@pytest.mark.parametrize(
    ("kills", "count", "seconds"), [(5, 100, BRIEFLY), pytest.param(200, 1000, LONGER, marks=pytest.mark.soak)]
)
async def test_nats_killed_repeatedly_costs_no_result_and_no_second_run(
    tmp_path: Path, kills: int, count: int, seconds: str
) -> None:
    with servers.running(servers.NatsServer(tmp_path)) as one:

        async def crash() -> None:
            one.kill(place_of(campaign.queue))
            await trio.sleep(random.uniform(0, 1))
            one.start()

        broker = Nats(one)
        campaign = Campaign(broker, tmp_path, count, seconds)
        broker.lease(campaign.queue, 2)  # after these seconds, what it has forgotten the settlement of is delivered again
        campaign.check(await campaign.run(one.address, [crash] * kills, TIMEOUT_QUEUE_INCOMING=4))


@pytest.mark.parametrize(
    ("rounds", "count", "seconds"), [(1, 60, BRIEFLY), pytest.param(25, 1000, LONGER, marks=pytest.mark.soak)]
)
async def test_network_faults_cost_no_result_and_no_second_run(
    broker: Rabbit, proxy: proxies.Proxy, tmp_path: Path, rounds: int, count: int, seconds: str
) -> None:
    async def cut() -> None:
        proxy.cut()

    async def refuse_for_a_while() -> None:
        proxy.refusing = True
        proxy.cut()
        await trio.sleep(random.uniform(0, 3))
        proxy.refusing = False

    async def slow_down() -> None:
        proxy.delay = 0.2
        await trio.sleep(3)
        proxy.delay = 0

    async def half_open() -> None:
        proxy.half_open()
        await trio.sleep(6)  # three heartbeats, after which both ends know

    async def swallow() -> None:
        proxy.swallowing = True
        await trio.sleep(8)
        proxy.swallowing = False
        proxy.cut()  # bytes of the conversation are lost: the connection cannot be used any more

    campaign = Campaign(broker, tmp_path, count, seconds)
    faults: list[Fault] = [cut, refuse_for_a_while, slow_down, half_open, swallow]
    # The pilot notices after two heartbeats that are missed; until then it must not take the silence for an empty queue.
    campaign.check(await campaign.run(proxy.address, faults * rounds, TIMEOUT_QUEUE_INCOMING=10))


@pytest.mark.parametrize("seconds", ["20", pytest.param("60", marks=pytest.mark.soak)])
async def test_a_task_longer_than_the_consumer_timeout_is_run_and_sent_once(
    tmp_path: Path, suite: str, seconds: str
) -> None:
    with open_rabbitmq(suite, config="heartbeat = 2\nconsumer_timeout = 10000\n") as server:
        server.evaluate("application:set_env(rabbit, channel_tick_interval, 1000).")  # milliseconds between two checks
        campaign = Campaign(Rabbit(server), tmp_path, 10, seconds)
        stderr = await campaign.run(server.address, [], MAX_CONCURRENT_TASKS=10)
        arrived = campaign.broker.ready(f"{campaign.queue}-out")
        campaign.check(stderr)
        assert arrived == 10
        # Before RabbitMQ 4.3 a consumer cannot ask for more time: the server closes the channel, and the log has its reason.
        assert ("delivery acknowledgement on channel" in stderr) == server.version.startswith(("3.", "4.0"))


def test_a_thousand_pilots_spread_their_retries_over_time() -> None:
    timeouts = Timeouts()
    for failures in range(1, 12):
        delays = sorted(timeouts.retry_delay(failures) for _ in range(1000))
        most = min(0.5 * 2 ** (failures - 1), timeouts.most_retry)
        assert most / 2 <= delays[0] <= delays[-1] <= most
        # No tenth of the time has more than a third of them.
        tenths = Counter(int(delay / (most / 20)) for delay in delays)
        assert max(tenths.values()) < 1000 / 3
