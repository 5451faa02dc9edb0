# `trio-pilot dead-letters` with the installed command, on the brokers and on files.

import json
import signal
import subprocess
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import pytest

from tests.support.brokers import new_name
from tests.support.pilot_process import COMMAND, run_pilot
from tests.support.waiting import PILOT_RUN

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
