# `trio-pilot dead-letters` with the installed command, on the brokers and on files.

import json
import signal
import subprocess
import time
from collections.abc import Callable
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path

import pika
import pytest

from tests.support.brokers import Nats, Rabbit, new_name
from tests.support.hostile_messages import nats_publisher, publish_amqp
from tests.support.pilot_process import COMMAND, run_pilot
from tests.support.servers import NatsServer, RabbitServer
from tests.support.waiting import PILOT_RUN
from trio_pilot.brokers import dead_letter_queue
from trio_pilot.brokers.nats import place_of

ENV = {"PATH": "/usr/bin:/bin"}


@dataclass
class Desk:
    """A queue with dead letters, and the command."""

    directory: Path
    broker: str
    queue: str

    def start(self, *arguments: str) -> "subprocess.Popen[str]":
        env = ENV | {"EWMS_PILOT_BROKER": self.broker, "EWMS_PILOT_RUNTIME": "process"}
        pipes = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE, "stderr": subprocess.PIPE}
        return subprocess.Popen(  # type: ignore[call-overload, no-any-return]
            [COMMAND, *arguments], cwd=self.directory, env=env, text=True, **pipes
        )

    def call(self, *arguments: str, stdin: str = "", code: int = 0) -> str:
        with self.start(*arguments) as child:
            out, err = child.communicate(stdin, timeout=PILOT_RUN)
        assert child.returncode == code, out + err
        return str(out + err)

    def letters(self) -> list[dict[str, object]]:
        said = self.call("dead-letters", self.queue, "--json")
        return [json.loads(line) for line in said.splitlines() if line.startswith("{")]

    def fail(self, *events: object) -> None:
        """Run a task that fails on events, whose only attempt it is."""
        self.call("send", self.queue, stdin="".join(f"{json.dumps(event)}\n" for event in events))
        settings = {"BROKER": self.broker, "QUEUE_INCOMING": self.queue, "QUEUE_OUTGOING": f"{self.queue}-out"}
        task = {"RUNTIME": "process", "TASK_ARGS": "sh -c 'echo no good >&2; exit 3'", "INFILE_EXT": ".json"}
        rest = {"MAX_ATTEMPTS": 1, "STOP_LISTENING_ON_TASK_ERROR": False}
        assert run_pilot(self.directory, {**settings, **task, **rest}).code == 1


@pytest.fixture(params=["local", "rabbitmq", "nats"])
def desk(request: pytest.FixtureRequest, tmp_path: Path) -> Desk:
    match request.param:
        case "local":
            broker = str(tmp_path / "queues.sqlite")
        case name:
            scheme = {"rabbitmq": "amqp", "nats": "nats"}[name]
            broker = f"{scheme}://{request.getfixturevalue(name).address}"
    directory = tmp_path / "slot"
    directory.mkdir()
    return Desk(directory, broker, new_name())


def test_dead_letters_are_listed_shown_run_and_replayed(desk: Desk) -> None:
    desk.fail({"x": 1}, {"x": 2}, {"x": 3})
    letters = desk.letters()
    assert [(letter["attempts"], letter["queue"]) for letter in letters] == [(1, desk.queue)] * 3
    assert {letter["reason"] for letter in letters} == {"task failed (exit code 3): no good"}
    assert desk.letters() == letters  # they are unchanged, and in order

    table = desk.call("dead-letters", desk.queue).splitlines()
    ids = [str(letter["id"]) for letter in letters]
    assert table[0].split() == ["ID", "TIME", "ATTEMPTS", "ERROR", "HOST", "REASON"]
    assert [line.split()[0] for line in table[1:]] == ids

    shown = json.loads(desk.call("dead-letters", "show", desk.queue, ids[1]))
    assert (shown["data"], shown["id"], shown["error"]) == ({"x": 2}, ids[1], "ContainerRunError")

    script = "sh -c 'cat {{INFILE}}; echo and >&2; exit 7'"
    said = desk.call("dead-letters", "run", desk.queue, ids[2], "--task-args", script, "--infile-ext", "json", code=7)
    assert '{"x": 3}' in said
    assert "and" in said
    assert desk.letters() == letters

    assert "1 dead letter(s) replayed" in desk.call("dead-letters", "replay", desk.queue, ids[0])
    assert desk.letters() == letters[1:]
    assert '{"x": 1}' in desk.call("receive", desk.queue, "--count=1")
    assert "2 dead letter(s) replayed" in desk.call("dead-letters", "replay", desk.queue, "--all")
    assert "no dead letters" in desk.call("dead-letters", desk.queue)
    received = desk.call("receive", desk.queue, "--count=2")
    assert '{"x": 2}' in received
    assert '{"x": 3}' in received


only_local = pytest.mark.parametrize("desk", ["local"], indirect=True)


@only_local
def test_a_wrong_id_or_none_is_one_clear_line(desk: Desk) -> None:
    assert "has no dead letter nonesuch" in desk.call("dead-letters", "show", desk.queue, "nonesuch", code=2)
    assert "their ids, or --all" in desk.call("dead-letters", "replay", desk.queue, code=2)
    assert "their ids, or --all" in desk.call("dead-letters", "replay", desk.queue, "x", "--all", code=2)


def test_a_command_that_is_interrupted_has_lost_and_charged_nothing(desk: Desk) -> None:
    desk.fail({"x": 1}, {"x": 2})
    letters = desk.letters()
    for delay in (0.5, 1.0):
        with desk.start("dead-letters", desk.queue) as child:
            time.sleep(delay)
            child.send_signal(signal.SIGTERM)
            child.communicate(timeout=PILOT_RUN)
    assert desk.letters() == letters


@only_local
def test_dead_letters_in_a_directory_are_listed_and_replayed_too(
    desk: Desk, write_letter: Callable[[Path, str], Path]
) -> None:
    path = write_letter(desk.directory / "ewms-pilot-dead-letters", desk.queue)
    (letter,) = desk.letters()
    assert (letter["id"], letter["reason"], letter["file"]) == (
        "the-id",
        "why",
        f"ewms-pilot-dead-letters/{desk.queue}/{path.name}",
    )
    assert "1 dead letter(s) replayed" in desk.call("dead-letters", "replay", desk.queue, "the-id")
    assert not list(path.parent.iterdir())
    assert '{"x": 1}' in desk.call("receive", desk.queue)


@pytest.fixture
def write_letter() -> Callable[[Path, str], Path]:
    import trio

    from trio_pilot.brokers import Delivery, dead_letters
    from trio_pilot.testing import FakeBroker, FakeSource
    from trio_pilot.wire import WIRES, Message

    def write(directory: Path, queue: str) -> Path:
        async def write() -> Path:
            body = WIRES["ewms"].encode(Message({"x": 1}))
            delivery = Delivery(FakeSource(FakeBroker(), queue), queue, body, "the-id", 1, None)
            return await dead_letters.write(directory, delivery, dead_letters.facts(delivery, "why", "SomeError"))

        return trio.run(write)

    return write


def test_facts_that_others_wrote_are_shown_and_not_obeyed(rabbitmq: RabbitServer, tmp_path: Path) -> None:
    desk = Desk(tmp_path, f"amqp://{rabbitmq.address}", new_name())
    letters = dead_letter_queue(desk.queue)
    Rabbit(rabbitmq).declare(letters)
    odd: dict[object, object] = {
        "x-trio-pilot-reason": "a\x1b[2Jb\nc",
        "x-trio-pilot-id": "other",
        "x-trio-pilot-host": b"\xff",
        "x-trio-pilot-a": [[]],
    }
    headers: dict[object, object] = {**odd, "x-trio-pilot-time": datetime(2027, 1, 1, tzinfo=UTC), b"\xff": 1}
    properties = pika.BasicProperties(message_id=b"\xff\x1b[2J", headers=headers)
    assert publish_amqp(rabbitmq.port, letters, b"no event", properties)
    table = desk.call("dead-letters", desk.queue)
    assert "\x1b" not in table
    assert len(table.splitlines()) == 2
    (facts,) = desk.letters()
    assert facts["id"] == "\\xff\x1b[2J"
    assert json.loads(desk.call("dead-letters", "show", desk.queue, str(facts["id"])))["cannot be decoded"]


def test_replay_keeps_what_the_sender_gave_to_the_event(rabbitmq: RabbitServer, tmp_path: Path) -> None:
    broker, queue = Rabbit(rabbitmq), new_name()
    broker.declare(queue)
    broker.declare(dead_letter_queue(queue))
    given = {"priority": 7, "correlation_id": "c", "reply_to": "r", "type": "t", "message_id": "a"}
    headers = {"mine": 1, "x-trio-pilot-reason": "bad", "x-trio-pilot-failures": 2}
    properties = pika.BasicProperties(headers=headers, expiration="3600000", **given)
    publish_amqp(rabbitmq.port, dead_letter_queue(queue), b"body", properties)
    Desk(tmp_path, f"amqp://{rabbitmq.address}", queue).call("dead-letters", "replay", queue, "--all")
    ((replayed, body),) = broker.get_all(queue)
    assert body == b"body"
    assert {name: getattr(replayed, name) for name in given} == given
    replayed.headers.pop("x-delivery-count", None)  # it came once and went back
    assert (replayed.expiration, replayed.headers) == (None, {"mine": 1})


def test_replay_keeps_headers_of_nats(nats: NatsServer, tmp_path: Path) -> None:
    broker, queue = Nats(nats), new_name()
    desk = Desk(tmp_path, f"nats://{nats.address}", queue)
    desk.letters()  # which makes the stream
    block = b"NATS/1.0\r\nmine: 1\r\nNats-Msg-Id: a\r\nx-trio-pilot-failures: 2\r\n\r\n"
    with nats_publisher(nats.port) as publish:
        assert publish(place_of(dead_letter_queue(queue)).subject, block, b"body")
    desk.call("dead-letters", "replay", queue, "--all")
    ((headers, body),) = broker.messages(queue)
    assert (body, headers["mine"], json.loads(headers["x-trio-pilot-message-id"])) == (b"body", "1", "a")
    assert "x-trio-pilot-failures" not in headers
