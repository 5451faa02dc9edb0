# A RabbitMQ that cancels a consumer (basic.cancel) and leaves channel and connection open.

import json
from collections.abc import Callable
from pathlib import Path
from time import sleep

import pytest

from tests.integration.test_broker_faults import receive_all, send_all, settings
from tests.support.brokers import Rabbit, eventually, new_name
from tests.support.gate import Gate
from tests.support.pilot_process import assert_nothing_left, pilot
from tests.support.servers import RabbitServer
from tests.support.waiting import BROKER, until
from trio_pilot.wire import EwmsWire, Message

NEWER = [pytest.param(name, marks=pytest.mark.soak) for name in ("rabbitmq_trixie", "rabbitmq_sid")]


@pytest.fixture
def directory(tmp_path: Path) -> Path:
    path = tmp_path / "slot"
    path.mkdir()
    return path


def delete(broker: Rabbit, queue: str, kind: str) -> None:
    """Delete a queue, with the event in it that is being run, and declare it again.

    Not at once: RabbitMQ 3.10 would not tell the consumer of a quorum queue, and would deliver nothing to it.
    """
    with broker.channel() as channel:
        channel.queue_delete(queue)
        sleep(0.1)
        channel.queue_declare(queue, durable=True, arguments={"x-queue-type": kind})


def crash(server: RabbitServer, queue: str) -> None:
    """Kill the process of a classic queue; the server starts another, which has what was confirmed."""
    server.evaluate(f"""
        {{ok, Queue}} = rabbit_amqqueue:lookup(rabbit_misc:r(<<"/">>, queue, <<"{queue}">>)),
        exit(amqqueue:get_pid(Queue), kill).
    """)


async def check_that_it_consumes_anew(broker: Rabbit, directory: Path, kind: str, fault: Callable[[str], None]) -> None:
    """Run the pilot on an event; meanwhile make the server cancel its consumer, and send another event."""
    said, gate, queue = directory.with_name("said"), Gate(directory.parent), new_name()
    broker.declare(queue, kind)
    await send_all(broker, queue, EwmsWire().encode(Message({"event": "held"})))
    with pilot(directory, settings(broker, queue, TASK_ARGS=gate.task, TIMEOUT_QUEUE_INCOMING=3), log=said) as child:
        await until(lambda: gate.begun() == 1, "the task to begin", BROKER)
        fault(queue)
        await send_all(broker, queue, EwmsWire().encode(Message({"event": "new"})))
        await eventually(lambda: "the server has cancelled the consumer" in said.read_text())
        gate.open()
        await until(lambda: child.poll() is not None, "the pilot to end", BROKER)
    assert child.returncode == 0, said.read_text()
    results = await receive_all(broker, f"{queue}-out", 2)
    assert sorted(map(json.dumps, results)) == ['{"event": "held"}', '{"event": "new"}']
    assert broker.ready(queue) == 0
    assert gate.begun() == 2
    assert_nothing_left(directory)


@pytest.mark.parametrize("kind", ["quorum", "classic"])
@pytest.mark.parametrize("version", ["rabbitmq", *NEWER])
async def test_a_pilot_consumes_again_after_its_queue_is_deleted_and_declared(
    request: pytest.FixtureRequest, directory: Path, version: str, kind: str
) -> None:
    broker = Rabbit(request.getfixturevalue(version))
    await check_that_it_consumes_anew(broker, directory, kind, lambda queue: delete(broker, queue, kind))


@pytest.mark.parametrize("version", NEWER)  # RabbitMQ 3.10 does not tell the consumer
async def test_an_event_redelivered_by_a_queue_that_crashed_is_not_run_again(
    request: pytest.FixtureRequest, directory: Path, version: str
) -> None:
    broker = Rabbit(request.getfixturevalue(version))
    await check_that_it_consumes_anew(broker, directory, "classic", lambda queue: crash(broker.server, queue))
