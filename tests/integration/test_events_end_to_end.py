# The main job of the installed command, with EWMS's own client on both sides.

import asyncio
import base64
import json
import random
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import pytest
from mqclient.queue import Queue

from tests.support.brokers import Local, Rabbit, new_name
from tests.support.pilot_process import assert_nothing_left, run_pilot
from tests.support.servers import RabbitServer

EVENTS = 300


@pytest.fixture
def broker(rabbitmq: RabbitServer) -> Rabbit:
    return Rabbit(rabbitmq)


@pytest.fixture
def directory(tmp_path: Path) -> Path:
    path = tmp_path / "slot"
    path.mkdir()
    return path


def client(broker: Rabbit, queue: str, prefetch: int = 50) -> Any:
    return Queue("rabbitmq", address=broker.server.address, name=queue, prefetch=prefetch, timeout=20)


def send(broker: Rabbit, queue: str, events: Sequence[Any]) -> None:
    async def send() -> None:
        async with client(broker, queue).open_pub() as publisher:
            for event in events:
                await publisher.send(event)

    asyncio.run(send())


def receive(broker: Rabbit, queue: str, count: int) -> list[Any]:
    """Receive a number of messages, and check that there are no more."""

    async def receive() -> list[Any]:
        found: list[Any] = []
        async with client(broker, queue).open_sub_manual_acking() as subscriber:
            async for message in subscriber.iter_messages():
                await subscriber.ack(message)
                found.append(message.data)
                if len(found) == count:
                    break
        return found

    found = asyncio.run(receive())
    assert broker.server.counts(queue) == (0, 0)
    return found


def settings(broker: Rabbit, incoming: str, outgoing: str, **more: object) -> dict[str, object]:
    """Return the settings that EWMS gives."""
    return {
        "TASK_IMAGE": "/",
        "TASK_ARGS": "cp {{INFILE}} {{OUTFILE}}",
        "QUEUE_INCOMING": incoming,
        "QUEUE_INCOMING_BROKER_TYPE": "rabbitmq",
        "QUEUE_INCOMING_BROKER_ADDRESS": broker.server.address,
        "QUEUE_OUTGOING": outgoing,
        "QUEUE_OUTGOING_BROKER_TYPE": "rabbitmq",
        "QUEUE_OUTGOING_BROKER_ADDRESS": broker.server.address,
        "INFILE_EXT": ".json",
        "OUTFILE_EXT": ".json",
        "_EWMS_PILOT_CONTAINER_PLATFORM": "process",
        **more,
    }


def kilobytes(count: int) -> list[dict[str, Any]]:
    dice = random.Random(count)
    events = [{"pixel": number, "llh": dice.random(), "ra": [dice.random()] * 3, "é": None} for number in range(count)]
    return [{**event, "padding": "x" * (1000 - len(json.dumps(event)))} for event in events]


@pytest.mark.parametrize("runtime", ["process", "bubblewrap"])
@pytest.mark.parametrize("slots", [1, 4, 8])
@pytest.mark.parametrize("prefetch", [1, 8])
def test_each_of_three_hundred_events_has_one_result_and_nothing_is_left(
    broker: Rabbit, need: Callable[[str, str], None], directory: Path, runtime: str, slots: int, prefetch: int
) -> None:
    if runtime == "bubblewrap":
        need("bwrap", "bubblewrap")
    incoming, outgoing = new_name("in"), new_name("out")
    events = kilobytes(EVENTS)
    send(broker, incoming, events)
    more = {"_EWMS_PILOT_CONTAINER_PLATFORM": runtime, "MAX_CONCURRENT_TASKS": slots, "PREFETCH": prefetch}
    ended = run_pilot(directory, settings(broker, incoming, outgoing, **more))
    assert ended.code == 0, ended.stderr
    results = receive(broker, outgoing, EVENTS)
    assert sorted(results, key=lambda result: result["pixel"]) == events
    assert broker.server.counts(incoming) == (0, 0)
    assert_nothing_left(directory)


def test_a_result_that_is_wrong_or_doubled_or_missing_would_be_seen(broker: Rabbit) -> None:
    events, queue = kilobytes(3), new_name()
    send(broker, queue, [*events, events[0]])
    with pytest.raises(AssertionError):
        receive(broker, queue, 3)


JSON_VALUES = [None, 0, -1.5, True, [1, [2]], {"a": {"b": None}}, 2**70]
TEXTS = ["text", "", "é\r\n", "\n\n", "[1, 2]", "\x00\x7f"]


@pytest.mark.parametrize(("ext", "values"), [(".txt", TEXTS), (".json", JSON_VALUES)])
def test_any_value_arrives_as_it_was_sent(broker: Rabbit, directory: Path, ext: str, values: list[Any]) -> None:
    incoming, outgoing = new_name("in"), new_name("out")
    send(broker, incoming, values)
    ended = run_pilot(directory, settings(broker, incoming, outgoing, INFILE_EXT=ext, OUTFILE_EXT=ext))
    assert ended.code == 0, ended.stderr
    assert receive(broker, outgoing, len(values)) == values


def test_nan_arrives_as_it_was_sent(broker: Rabbit, directory: Path) -> None:
    incoming, outgoing = new_name("in"), new_name("out")
    send(broker, incoming, [{"llh": float("nan"), "max": float("inf")}])
    assert run_pilot(directory, settings(broker, incoming, outgoing)).code == 0
    assert json.dumps(receive(broker, outgoing, 1)) == '[{"llh": NaN, "max": Infinity}]'


def test_a_binary_output_is_base64_and_as_an_input_it_is_bytes_again(broker: Rabbit, directory: Path) -> None:
    first, second, third = new_name("1"), new_name("2"), new_name("3")
    content = bytes(range(256)) * 10
    (directory.parent / "content").write_bytes(content)
    send(broker, first, ["go"])
    binary = {"INFILE_EXT": ".bin", "OUTFILE_EXT": ".bin"}
    produce = f"cp {directory.parent}/content {{{{OUTFILE}}}}"
    ended = run_pilot(directory, settings(broker, first, second, TASK_ARGS=produce, **binary))
    assert ended.code == 0, ended.stderr
    ended = run_pilot(directory, settings(broker, second, third, **binary))
    assert ended.code == 0, ended.stderr
    assert base64.b64decode(receive(broker, third, 1)[0]) == content


def test_the_headers_of_an_event_are_those_of_its_result(broker: Rabbit, directory: Path) -> None:
    import zstandard

    incoming, outgoing = new_name("in"), new_name("out")
    broker.declare(incoming)
    document = {"headers": {"traceparent": "00-0af7-b7ad-01"}, "data": {"a": 1}}
    with broker.channel() as channel:
        channel.basic_publish("", incoming, zstandard.ZstdCompressor().compress(json.dumps(document).encode()))
    assert run_pilot(directory, settings(broker, incoming, outgoing)).code == 0
    ((_, body),) = broker.get_all(outgoing)
    assert json.loads(zstandard.decompress(body)) == document


def test_a_task_that_writes_nothing_is_a_success_without_a_result(broker: Rabbit, directory: Path) -> None:
    incoming, outgoing = new_name("in"), new_name("out")
    send(broker, incoming, [1, 2, 3])
    ended = run_pilot(directory, settings(broker, incoming, outgoing, TASK_ARGS="true"))
    assert ended.code == 0, ended.stderr
    assert broker.server.counts(incoming) == broker.server.counts(outgoing) == (0, 0)
    assert_nothing_left(directory)


def test_queues_are_drained_fairly_and_outputs_go_to_each_outgoing_queue(broker: Rabbit, directory: Path) -> None:
    incoming, outgoing = [new_name("in") for _ in range(3)], [new_name("out") for _ in range(2)]
    for number, queue in enumerate(incoming):
        send(broker, queue, [{"queue": number, "event": event} for event in range(20)])
    given = settings(broker, ";".join(incoming), ";".join(outgoing))
    given["QUEUE_INCOMING_BROKER_TYPE"] = "rabbitmq;rabbitmq;rabbitmq"
    given["QUEUE_INCOMING_BROKER_ADDRESS"] = ";".join([broker.server.address] * 3)
    ended = run_pilot(directory, given)
    assert ended.code == 0, ended.stderr
    results = [receive(broker, queue, 60) for queue in outgoing]
    assert results[0] == results[1]
    assert {(result["queue"], result["event"]) for result in results[0]} == {(q, e) for q in range(3) for e in range(20)}
    half = [result["queue"] for result in results[0][:30]]
    assert all(half.count(queue) >= 6 for queue in range(3))
    assert all(broker.server.counts(queue) == (0, 0) for queue in incoming)


def test_events_go_from_one_kind_of_broker_to_the_other(broker: Rabbit, tmp_path: Path, directory: Path) -> None:
    incoming, outgoing, middle = new_name("in"), new_name("out"), Local(tmp_path / "queues.sqlite")
    local = {"BROKER_TYPE": "local", "BROKER_ADDRESS": middle.file}
    send(broker, incoming, [{"a": 1}, {"a": 2}])
    out = {f"QUEUE_OUTGOING_{name}": value for name, value in local.items()}
    assert run_pilot(directory, settings(broker, incoming, "middle") | out).code == 0
    assert middle.rows("SELECT count(*) FROM message WHERE queue = 'middle'") == [(2,)]
    given = settings(broker, "middle", outgoing) | {f"QUEUE_INCOMING_{name}": value for name, value in local.items()}
    assert run_pilot(directory, given).code == 0
    assert receive(broker, outgoing, 2) == [{"a": 1}, {"a": 2}]
    assert_nothing_left(directory)
