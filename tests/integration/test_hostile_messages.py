# Messages that nobody should send, between good ones: the good ones are done once, the others are done or a dead letter.

import os
import sqlite3
import subprocess
from collections.abc import Callable, Iterator
from contextlib import ExitStack, closing, contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

import pika
import pytest

from tests.support.brokers import Nats, Rabbit, new_name
from tests.support.hostile_messages import Encoded, Grammar, insert, nats_publisher, packed, publish_amqp
from tests.support.pilot_process import COMMAND
from trio_pilot.brokers import dead_letter_queue
from trio_pilot.brokers.nats import place_of
from trio_pilot.wire import EwmsWire

SEED = int(os.environ.get("TRIO_PILOT_TEST_SEED", "20261"))  # of the first batch
BATCH = 26  # hostile messages for one pilot
MAX_PAYLOAD = 2**24
MOST_MEMORY = 60 + 10 * MAX_PAYLOAD / 2**20  # MiB: that of an idle pilot, and a small multiple of --max-payload
PATIENCE = 200.0  # seconds for one pilot and its batch

TASK = {
    "succeeds": "cp $EWMS_TASK_INFILE $EWMS_TASK_OUTFILE",
    "fails": "grep -q '^good' $EWMS_TASK_INFILE && cp $EWMS_TASK_INFILE $EWMS_TASK_OUTFILE",
}


class Place(Protocol):
    """A broker, as one that writes anything into it sees it."""

    @property
    def address(self) -> str: ...

    def put_good(self, queue: str, text: str) -> None: ...

    def put(self, queue: str, grammar: Grammar) -> bool:
        """Send a hostile message; return whether the broker has taken it."""

    def outputs(self, queue: str) -> list[bytes]: ...

    def dead(self, queue: str) -> int: ...

    def left(self, queue: str) -> int: ...


@dataclass
class RabbitPlace:
    broker: Rabbit

    @property
    def address(self) -> str:
        return f"amqp://{self.broker.server.address}"

    def put_good(self, queue: str, text: str) -> None:
        self.broker.declare(queue)
        assert publish_amqp(self.broker.server.port, queue, packed({"data": text}), pika.BasicProperties(message_id=text))

    def put(self, queue: str, grammar: Grammar) -> bool:
        body, properties = grammar.body(), grammar.properties()
        return publish_amqp(self.broker.server.port, queue, body, Encoded(properties))

    def outputs(self, queue: str) -> list[bytes]:
        self.broker.declare(queue)
        return [body for _, body in self.broker.get_all(queue)]

    def dead(self, queue: str) -> int:
        self.broker.declare(dead_letter_queue(queue))
        return self.broker.ready(dead_letter_queue(queue))

    def left(self, queue: str) -> int:
        return sum(self.broker.counts(queue))


@dataclass
class NatsPlace:
    broker: Nats
    publish: Callable[[str, bytes, bytes], bool]

    @property
    def address(self) -> str:
        return f"nats://{self.broker.server.address}"

    def put_good(self, queue: str, text: str) -> None:
        place = place_of(queue)

        async def make(streams: Any) -> None:
            await streams.add_stream(name=place.stream, subjects=[place.subject])

        if text.endswith(" 0"):
            self.broker.ask(make)
        assert self.publish(place.subject, b"NATS/1.0\r\nx: y\r\n\r\n", packed({"data": text}))

    def put(self, queue: str, grammar: Grammar) -> bool:
        body, headers = grammar.body(), grammar.header_block()
        return self.publish(place_of(queue).subject, headers, body)

    def outputs(self, queue: str) -> list[bytes]:
        return [body for _, body in self.broker.messages(queue)]

    def dead(self, queue: str) -> int:
        return len(self.broker.messages(dead_letter_queue(queue)))

    def left(self, queue: str) -> int:
        return sum(self.broker.counts(queue))


@dataclass
class LocalPlace:
    file: Path

    @property
    def address(self) -> str:
        return str(self.file)

    def put_good(self, queue: str, text: str) -> None:
        if not self.file.exists():
            subprocess.run([COMMAND, "send", queue, f"--broker={self.file}"], input=b"", check=True)
        insert(self.file, queue, packed({"data": text}), {"message_id": text})

    def put(self, queue: str, grammar: Grammar) -> bool:
        body = grammar.one(grammar.body, grammar.body, grammar.storable, grammar.number)
        return insert(self.file, queue, body, grammar.row())

    def outputs(self, queue: str) -> list[bytes]:
        with closing(sqlite3.connect(self.file)) as connection:
            return [body for (body,) in connection.execute("SELECT body FROM message WHERE queue = ?", (queue,))]

    def dead(self, queue: str) -> int:
        return len(self.outputs(dead_letter_queue(queue)))

    def left(self, queue: str) -> int:
        return len(self.outputs(queue))


@pytest.fixture(params=["local", "rabbitmq", "nats"])
def place(request: pytest.FixtureRequest, tmp_path: Path) -> Iterator[Place]:
    with ExitStack() as stack:
        match request.param:
            case "local":
                yield LocalPlace(tmp_path / "queues.sqlite")
            case "rabbitmq":
                yield RabbitPlace(Rabbit(request.getfixturevalue("rabbitmq")))
            case _:
                broker = Nats(request.getfixturevalue("nats"))
                yield NatsPlace(broker, stack.enter_context(nats_publisher(broker.server.port)))


@contextmanager
def named(text: str) -> Iterator[None]:
    """Add a note to an error: how it is had again."""
    try:
        yield
    except BaseException as error:
        error.add_note(text)
        raise


def run_batch(place: Place, directory: Path, seed: int, task: str) -> None:
    """Send a batch of hostile messages, each between good ones, and run a pilot until the queue is empty."""
    queue, outgoing, grammar = new_name("in"), new_name("out"), Grammar(seed)
    place.put_good(queue, "good 0")
    for number in range(1, BATCH + 1):
        while not place.put(queue, grammar):
            pass
        place.put_good(queue, f"good {number}")
    pilot = run_pilot(place, directory, queue, outgoing, TASK[task])
    with named(f"{place}, TRIO_PILOT_TEST_SEED={seed}, task {task}\n{pilot.said[-6000:]!r}"):
        assert pilot.code in (0, 1)  # 1: tasks have failed
        assert "Traceback" not in pilot.said
        assert place.left(queue) == 0
        outputs, dead = place.outputs(outgoing), place.dead(queue)
        done = [EwmsWire().decode(body, MAX_PAYLOAD).data for body in outputs]
        good = [data for data in done if isinstance(data, str) and data.startswith("good ")]
        assert sorted(good) == sorted(f"good {number}" for number in range(BATCH + 1))
        assert len(done) - len(good) + dead == BATCH
        assert dead == BATCH or task == "succeeds"
        assert pilot.peak < MOST_MEMORY


@dataclass
class Ended:
    code: int
    said: str
    peak: float  # MiB of memory


def run_pilot(place: Place, directory: Path, queue: str, outgoing: str, command: str) -> Ended:
    settings = {
        "broker": place.address,
        "queue-incoming": queue,
        "queue-outgoing": outgoing,
        "task-image": "/",
        "runtime": "process",
        "task-args": f"sh -c '{command.replace(chr(39), chr(34))}'",
        "timeout-queue-incoming": 2,
        "max-attempts": 2,
        "retry-delay": 0.1,
        "max-payload": MAX_PAYLOAD,
        "stop-listening-on-task-error": "false",
    }
    log = directory / f"{queue}.log"
    with log.open("wb") as stderr:
        flags = [f"--{name}={value}" for name, value in settings.items()]
        child = subprocess.Popen([COMMAND, "run", *flags], cwd=directory, stderr=stderr)
        try:
            peak = peak_memory(child)
        finally:
            child.kill()
            child.wait()
    return Ended(child.returncode, log.read_text(errors="replace"), peak)


def peak_memory(child: "subprocess.Popen[bytes]") -> float:
    """Wait for the end of a process; return its largest resident set, in MiB, as seen until shortly before."""
    peak, waited = 0.0, 0.0
    while waited < PATIENCE:
        try:
            child.wait(0.05)
        except subprocess.TimeoutExpired:
            waited += 0.05
            peak = max(peak, high_water_mark(child.pid))
        else:
            return peak
    raise TimeoutError("the pilot has not ended")


def high_water_mark(pid: int) -> float:
    for line in Path(f"/proc/{pid}/status").read_text().splitlines():
        if line.startswith("VmHWM:"):
            return int(line.split()[1]) / 1024
    return 0.0


@pytest.mark.parametrize("task", TASK)
def test_good_events_are_done_and_others_done_or_dead_letters(place: Place, tmp_path: Path, task: str) -> None:
    run_batch(place, tmp_path, SEED + (task == "fails"), task)


@pytest.mark.soak
@pytest.mark.parametrize("task", TASK)
def test_a_thousand_more_hostile_messages_end_no_pilot(place: Place, tmp_path: Path, task: str) -> None:
    for seed in range(SEED + 100, SEED + 100 + 7):
        run_batch(place, tmp_path, seed * 2 + (task == "fails"), task)
