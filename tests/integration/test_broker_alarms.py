# A RabbitMQ with a memory or disk alarm accepts no messages until the alarm ends.

import json
import subprocess
from collections.abc import AsyncIterator, Iterator
from contextlib import asynccontextmanager
from dataclasses import dataclass
from pathlib import Path

import pytest
import trio

from tests.integration.test_broker_faults import receive_all, send_all, settings
from tests.support.brokers import Rabbit, new_name, nothing_comes, take
from tests.support.gate import Gate
from tests.support.pilot_process import assert_nothing_left, pilot
from tests.support.servers import RabbitServer
from tests.support.services import open_rabbitmq
from tests.support.waiting import BROKER, until
from trio_pilot.brokers import Settlement
from trio_pilot.brokers.rabbitmq_connection import RabbitTimeouts
from trio_pilot.wire import EwmsWire, Message


@dataclass(frozen=True)
class Alarm:
    """Erlang that raises and ends an alarm; `rabbitmqctl set_vm_memory_high_watermark` and `set_disk_free_limit` call it."""

    begin: str
    end: str


ALARMS = {
    "memory": Alarm(*(f"vm_memory_monitor:set_vm_memory_high_watermark({limit})." for limit in ("0.00001", "0.4"))),
    "disk": Alarm(*(f'rabbit_disk_monitor:set_disk_free_limit("{limit}").' for limit in ("1000000GB", "20MB"))),
}
SUITES = ["", *(pytest.param(suite, marks=pytest.mark.soak) for suite in ("trixie", "sid"))]


@pytest.fixture(scope="module", params=SUITES)
def server(request: pytest.FixtureRequest) -> Iterator[RabbitServer]:
    """A server for this module alone: an alarm holds for all its clients."""
    with open_rabbitmq(request.param) as server:
        yield server


@pytest.fixture
def broker(server: RabbitServer) -> Rabbit:
    return Rabbit(server)


@pytest.fixture(params=["memory", "disk"])
def alarm(request: pytest.FixtureRequest, server: RabbitServer) -> Iterator[Alarm]:
    """An alarm, which is ended after the test."""
    alarm = ALARMS[request.param]
    yield alarm
    server.evaluate(alarm.end)


def is_blocked(server: RabbitServer) -> bool:
    return "blocked" in server.evaluate("[S || [{state, S}] <- rabbit_networking:connection_info_all([state])].")


class Stuck:
    """A pilot with four tasks that end while the broker accepts none of their outputs."""

    def __init__(self, broker: Rabbit, directory: Path) -> None:
        self.broker, self.queue, self.gate = broker, new_name(), Gate(directory)
        self._directory, self._log = directory / "slot", directory / "said"
        self._directory.mkdir()

    @property
    def said(self) -> str:
        return self._log.read_text()

    @asynccontextmanager
    async def pilot(self, alarm: str, **more: object) -> AsyncIterator["subprocess.Popen[str]"]:
        """Run the pilot; the body begins once it has logged that outputs wait."""
        await send_all(self.broker, self.queue, *[EwmsWire().encode(Message(number)) for number in range(4)])
        usual = {"MAX_CONCURRENT_TASKS": 4, "TASK_ARGS": self.gate.task, "TIMEOUT_QUEUE_INCOMING": 1}
        with pilot(self._directory, settings(self.broker, self.queue, **usual, **more), log=self._log) as child:
            await until(lambda: self.gate.begun() == 4, "four tasks to begin", BROKER)
            self.broker.server.evaluate(alarm)
            self.gate.open()
            await until(lambda: self.gate.done() == 4, "four tasks to end", BROKER)
            await until(lambda: "outputs wait: low on" in self.said, "outputs to wait", BROKER)
            yield child
            await until(lambda: child.poll() is not None, "the pilot to end", BROKER)
        assert_nothing_left(self._directory)


async def test_outputs_wait_for_the_end_of_an_alarm_and_tasks_go_on(broker: Rabbit, tmp_path: Path, alarm: Alarm) -> None:
    stuck = Stuck(broker, tmp_path)
    async with stuck.pilot(alarm.begin) as child:
        await trio.sleep(3)  # three times what the pilot waits for events
        assert child.poll() is None
        assert broker.ready(f"{stuck.queue}-out") == 0
        broker.server.evaluate(alarm.end)
    assert child.returncode == 0, stuck.said
    assert "takes messages again" in stuck.said
    assert "connecting again" not in stuck.said
    assert sorted(map(json.dumps, await receive_all(broker, f"{stuck.queue}-out", 4))) == list("0123")
    assert broker.ready(stuck.queue) == 0
    assert stuck.gate.begun() == 4


async def test_a_pilot_that_is_ended_while_outputs_wait_returns_their_events(
    broker: Rabbit, tmp_path: Path, alarm: Alarm
) -> None:
    stuck = Stuck(broker, tmp_path)
    async with stuck.pilot(alarm.begin, GRACE=1, SETTLE_GRACE=1) as child:
        child.terminate()
    broker.server.evaluate(alarm.end)
    assert child.returncode == 128 + 15, stuck.said
    assert broker.ready(stuck.queue) == 4


async def test_a_broker_with_an_alarm_is_not_disconnected_for_not_answering(
    broker: Rabbit, caplog: pytest.LogCaptureFixture, alarm: Alarm
) -> None:
    broker.timeouts = RabbitTimeouts(answer=0.5)
    queue = new_name()
    await send_all(broker, queue, b"a", b"b")
    async with broker.source(queue) as source, source.consume(2) as consumer, trio.open_nursery() as nursery:
        first, second = await take(consumer), await take(consumer)
        broker.server.evaluate(alarm.begin)
        for delivery in (first, second):  # by a copy
            nursery.start_soon(source.settle, delivery, Settlement.REJECT)
        await until(lambda: is_blocked(broker.server), "a blocked connection", BROKER)
        with trio.move_on_after(2) as asking:
            await consumer.is_idle()
        assert asking.cancelled_caught
        broker.server.evaluate(alarm.end)
        again = [await take(consumer), await take(consumer)]
        assert {(delivery.body, delivery.attempt) for delivery in again} == {(b"a", 2), (b"b", 2)}
        for delivery in again:
            await source.settle(delivery, Settlement.ACK)
        await nothing_comes(consumer)
    assert "connecting again" not in caplog.text
    assert broker.ready(queue) == 0
