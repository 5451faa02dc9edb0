import ast
import json
import math
import os
import re
import signal
import sqlite3
import subprocess
import sys
import time
from collections.abc import Callable, Sequence
from contextlib import closing
from pathlib import Path
from typing import Any

import pytest
import trio

from tests.support.brokers import Rabbit, new_name
from tests.support.servers import RabbitServer
from tests.unit.test_readme import shell_blocks
from trio_pilot.brokers import QueueAddress, local
from trio_pilot.brokers.addresses import DEFAULT_FILE
from trio_pilot.wire import EwmsWire, Message

TRIO_PILOT = (sys.executable, "-m", "trio_pilot")
TIMEOUT = 60
BINARY = bytes(range(256))

Done = subprocess.CompletedProcess[bytes]
Run = Callable[..., Done]


@pytest.fixture
def command(tmp_path: Path) -> Run:
    def run(*arguments: str, stdin: bytes = b"", environ: Sequence[tuple[str, str]] = ()) -> Done:
        env = {**clean_environment(), **dict(environ)}
        return subprocess.run(
            [*TRIO_PILOT, *arguments], input=stdin, capture_output=True, cwd=tmp_path, env=env, timeout=TIMEOUT, check=False
        )

    return run


def clean_environment() -> dict[str, str]:
    return {name: value for name, value in os.environ.items() if "EWMS" not in name}


def start(directory: Path, *arguments: str, **options: Any) -> "subprocess.Popen[bytes]":
    return subprocess.Popen([*TRIO_PILOT, *arguments], cwd=directory, env=clean_environment(), **options)


def lines(done: Done) -> list[Any]:
    return [json.loads(line) for line in done.stdout.splitlines()]


def wait_until(condition: Callable[[], Any]) -> None:
    deadline = time.monotonic() + TIMEOUT
    while not condition():
        assert time.monotonic() < deadline
        time.sleep(0.01)


@pytest.mark.parametrize("name", ["", "run", "send", "receive", "check", "demo"])
def test_every_command_has_help(command: Run, name: str) -> None:
    done = command(*name.split(), "--help")
    assert (done.returncode, done.stderr) == (0, b"")
    assert b"Usage: trio-pilot" in done.stdout
    assert max(map(len, done.stdout.decode().splitlines())) <= 80


def test_the_help_of_run_has_every_setting(command: Run) -> None:
    from trio_pilot.settings import FIELDS, flag_of

    said = b"".join(command("run", "--help").stdout.replace("│".encode(), b"").split()).decode()
    assert [name for name in FIELDS if flag_of(name)[:26] not in said] == []


def test_version_prints_the_version(command: Run) -> None:
    from trio_pilot import __version__

    assert command("--version").stdout.decode().strip() == __version__


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ("--nope", "Unknown option: --nope."),
        (
            "bogus",
            'Unknown command "bogus". Available commands: run, send, receive, dead-letters, check, condor-submit, demo.',
        ),
        ("run extra", "Unused Tokens: ['extra']."),
        ("send", 'Command "send" parameter QUEUE requires an argument.'),
        ("--prefetch two", "--prefetch must be an integer ≥ 1, not 'two'"),
        ("run --prefetch 0", "--prefetch must be an integer ≥ 1, not '0'"),
        (
            "--runtime lxc",
            "--runtime must be one of auto, docker, podman, apptainer, bubblewrap, process, not 'lxc'",
        ),
        ("--config missing.toml", "there is no settings file missing.toml"),
        ("", "EWMS_PILOT_TASK_ARGS must say what to run for each event: set it, or give --task-args"),
        ("--task-args true", "EWMS_PILOT_QUEUE_INCOMING must name a queue: set it, or give --queue-incoming"),
        (
            "--task-args true --queue-incoming q",
            "EWMS_PILOT_QUEUE_OUTGOING must name a queue: set it, or give --queue-outgoing",
        ),
        ("receive q --idle 0", "--idle must be a number of seconds > 0, not 0.0"),
        ("receive q --count 0", "--count must be an integer ≥ 1, not 0"),
        ("receive q --count x", 'Invalid value for --count: unable to convert "x" into int.'),
        ("demo --max-concurrent-tasks 0", "--max-concurrent-tasks must be an integer ≥ 1, or auto, not '0'"),
        ("send --nope q", "Unknown option: --nope. Did you mean --lines?"),
        ("send q --nope", "Unknown option: --nope."),
        ("send q missing", "missing cannot be sent: No such file or directory"),
        ("send q missing.jsonl", "missing.jsonl cannot be read: No such file or directory"),
    ],
)
def test_a_usage_error_is_one_line(command: Run, arguments: str, message: str) -> None:
    done = command(*arguments.split())
    assert done.stderr.decode().splitlines()[-1] == f"trio-pilot: {message}"
    assert len(done.stderr.splitlines()) == 1 + arguments.startswith("send q m")
    assert (done.returncode, done.stdout) == (2, b"")


@pytest.mark.parametrize("by_flags", [True, False])
def test_the_pilot_imports_nothing_that_it_does_not_need(tmp_path: Path, by_flags: bool) -> None:
    program = "import sys; from trio_pilot.cli.main import main\ntry: main()\nfinally: print(sorted(sys.modules))"
    settings = {"task-args": "true", "queue-incoming": "a", "queue-outgoing": "b", "timeout-queue-incoming": "0.01"}
    flags = [word for name, value in settings.items() for word in (f"--{name}", value)] if by_flags else []
    variables = {f"EWMS_PILOT_{name.replace('-', '_').upper()}": value for name, value in settings.items()}
    env = {**clean_environment(), **({} if by_flags else variables)}
    command = [sys.executable, "-c", program, *flags]
    done = subprocess.run(command, capture_output=True, cwd=tmp_path, env=env, check=True, timeout=TIMEOUT)
    loaded = set(ast.literal_eval(done.stdout.decode()))
    others = {"rich", "cyclopts", "difflib", "pika", "nats", "asyncio", "httpx", "http", "email", "htchirp", "tomllib"}
    assert loaded & others == ({"cyclopts"} if by_flags else set())
    assert {"trio", "sqlite3"} <= loaded


def test_a_job_tells_its_site_on_stdout(command: Run) -> None:
    flags = {"task-args": "true", "queue-incoming": "a", "queue-outgoing": "b", "timeout-queue-incoming": "0.01"}
    arguments = [word for name, value in flags.items() for word in (f"--{name}", value)]
    done = command(*arguments, environ=[("GLIDEIN_Site", "Pole"), ("GLIDEIN_Proxy", "hunter2")])
    assert (done.returncode, done.stdout) == (0, f"GLIDEIN_Site=Pole\nHOST={os.uname().nodename}\n".encode())
    assert command(*arguments).stdout == b""


def test_everything_may_be_in_the_environment(command: Run) -> None:
    command("send", "in", stdin=b'"one"\n"two"\n')
    settings = {
        "TASK_IMAGE": "/",
        "TASK_ARGS": 'sh -c "tr a-z A-Z < {{INFILE}} > {{OUTFILE}}"',
        "QUEUE_INCOMING": "in",
        "QUEUE_OUTGOING": "out",
        "TIMEOUT_QUEUE_INCOMING": "0.1",
    }
    done = command(environ=[(f"EWMS_PILOT_{name}", text) for name, text in settings.items()])
    assert done.returncode == 0
    assert sorted(lines(command("receive", "out", "--idle", "0.1"))) == ["ONE", "TWO"]


def test_the_envfile_is_read_and_its_unknown_variables_warned_of(command: Run, tmp_path: Path) -> None:
    settings = {"TASK_ARGS": "true", "QUEUE_INCOMING": "in", "QUEUE_OUTGOING": "out", "TIMEOUT_QUEUE_INCOMING": "0.1"}
    lines = [f"export EWMS_PILOT_{name}='{text}'\n" for name, text in [*settings.items(), ("PREFETSCH", "1")]]
    (tmp_path / "ewms_htcondor_envfile.sh").write_text("".join(lines))
    done = command()
    assert done.returncode == 0
    assert b"EWMS_PILOT_PREFETSCH is no setting; did you mean EWMS_PILOT_PREFETCH?" in done.stderr


def test_json_lines_are_sent_and_received(command: Run) -> None:
    events = [{"a": [1, None]}, "text\r\n", 1.5, None, True, "", "é\ud800"]
    sent = command("send", "q", stdin="\n\n".join(map(json.dumps, events)).encode())
    assert (sent.returncode, sent.stderr) == (0, b"7 event(s) sent to q\n")
    received = command("receive", "q", "--idle", "0.1")
    assert received.stderr == b"7 message(s) received from q\n"
    assert lines(received) == events
    assert lines(command("receive", "q", "--idle", "0.1")) == []


def test_nan_is_sent_and_received(command: Run) -> None:
    command("send", "q", "-", stdin=b"[NaN, -Infinity]")
    (found,) = lines(command("receive", "q", "--count", "1"))
    assert math.isnan(found[0])
    assert found[1] == -math.inf


def test_files_are_received_as_they_were_sent(command: Run, tmp_path: Path) -> None:
    (tmp_path / "a.txt").write_bytes(b"one\r\ntwo\n")
    (tmp_path / "b.bin").write_bytes(BINARY)
    (tmp_path / "c.json").write_bytes(b'{"x":\n 1}')
    (tmp_path / "d.jsonl").write_bytes(b"1\n2\n")
    (tmp_path / "e").write_bytes(b"3\n\n4\n")
    assert command("send", "q", "a.txt", "b.bin", "c.json", "d.jsonl").returncode == 0
    assert command("send", "q", "--lines", "e").returncode == 0
    assert command("receive", "q", "--to", "out/there", "--idle", "0.1").returncode == 0
    files = list((tmp_path / "out/there").iterdir())
    found = [(file.suffix, file.read_bytes()) for file in files]
    assert sorted(found) == sorted(
        [(".txt", b"one\r\ntwo\n"), (".bin", BINARY), (".json", b'{"x": 1}')] + [(".json", b"%d" % n) for n in (1, 2, 3, 4)]
    )


def test_binary_data_is_received_in_a_line_as_base64(command: Run, tmp_path: Path) -> None:
    (tmp_path / "b.bin").write_bytes(b"\xff\x00")
    command("send", "q", "b.bin")
    assert lines(command("receive", "q", "--count", "1")) == [{"encoding": "base64", "data": "/wA="}]


def test_events_before_a_bad_line_are_sent_and_counted(command: Run) -> None:
    done = command("send", "q", stdin=b"1\n2\n{oops\n4\n")
    assert done.returncode == 2
    told = done.stderr.decode().splitlines()
    assert told[0] == "2 event(s) sent to q"
    assert told[1].startswith("trio-pilot: stdin, line 3, must be JSON, not b'{oops\\n'")
    assert lines(command("receive", "q", "--idle", "0.1")) == [1, 2]


def test_receive_unique_drops_messages_with_an_earlier_id(command: Run, tmp_path: Path) -> None:
    def put(*names: str) -> None:
        async def send() -> None:
            async with local.open_sink(QueueAddress("q", "local", str(tmp_path / DEFAULT_FILE))) as sink:
                for name in names:
                    await sink.send(EwmsWire().encode(Message(name)), name)

        trio.run(send)

    put("a", "b", "a", "a", "c")
    received = command("receive", "q", "--unique", "--idle", "0.1")
    assert lines(received) == ["a", "b", "c"]
    assert received.stderr == b"3 message(s) received from q, 2 duplicate(s) dropped\n"
    put("a", "b", "a")
    to_files = "receive", "q", "--to", "out", "--unique", "--idle", "0.1"
    assert command(*to_files).stderr == b"2 message(s) received from q, 1 duplicate(s) dropped\n"
    put("b", "c")
    assert command(*to_files).stderr == b"1 message(s) received from q, 1 duplicate(s) dropped\n"
    assert sorted(path.name for path in (tmp_path / "out").iterdir()) == ["a.txt", "b.txt", "c.txt"]


def test_equal_messages_are_received_in_files_of_their_own(command: Run, tmp_path: Path) -> None:
    async def send() -> None:
        async with local.open_sink(QueueAddress("q", "local", str(tmp_path / DEFAULT_FILE))) as sink:
            for _ in range(3):
                await sink.send(EwmsWire().encode(Message("same")), "a")

    trio.run(send)
    for count in (1, 3):  # the second time the others may be marked as delivered before
        command("receive", "q", "--to", "out", "--idle", "0.1", "--count", f"{count}")
    files = list((tmp_path / "out").iterdir())
    assert [path.read_text() for path in files] == ["same"] * 3
    assert all(path.name.startswith("a") for path in files)


def test_a_message_that_was_written_and_comes_again_has_its_file(command: Run, tmp_path: Path) -> None:
    command("send", "q", stdin=b'"x"\n"x"\n')
    file = tmp_path / DEFAULT_FILE
    with closing(sqlite3.connect(file)) as connection, connection:
        connection.execute("UPDATE message SET message_id = 'a', deliveries = 1")
    out = tmp_path / "out"
    out.mkdir()
    (out / "a.txt").write_text("x")
    (out / ".a.txt.unacked").touch()  # as a `receive` leaves it that is killed between its file and the ack
    command("receive", "q", "--to", "out", "--idle", "0.1")
    assert sorted(path.read_text() for path in out.iterdir()) == ["x", "x"]


def test_a_file_too_large_to_be_received_is_not_sent(command: Run, tmp_path: Path) -> None:
    (tmp_path / "big").write_bytes(b"x" * 101)
    done = command("send", "q", "big", "--max-payload", "100")
    assert (done.returncode, done.stderr.splitlines()[1:]) == (
        2,
        [b"trio-pilot: big cannot be sent: it has 101 bytes, more than the 100 of --max-payload"],
    )


def test_receive_ends_after_count_and_leaves_the_rest(command: Run) -> None:
    command("send", "q", stdin=b"1\n2\n3\n")
    assert lines(command("receive", "q", "--count", "2", "--idle", "inf")) == [1, 2]
    assert lines(command("receive", "q", "--idle", "0.1")) == [3]


def test_a_message_that_cannot_be_decoded_is_set_aside(command: Run, tmp_path: Path) -> None:
    (tmp_path / "junk").write_bytes(b"\xffjunk")
    command("send", "q", "junk", "--wire", "raw")
    command("send", "q", stdin=b"1")
    done = command("receive", "q", "--idle", "0.1")
    assert lines(done) == [1]
    assert b"is set aside as a dead letter: the message body is not zstd" in done.stderr
    assert command("receive", "q.dead-letters", "--wire", "raw", "--to", "dead", "--idle", "0.1").returncode == 0
    (dead,) = (tmp_path / "dead").iterdir()
    assert dead.read_bytes() == b"\xffjunk"


def test_a_message_that_is_set_aside_nowhere_goes_back_at_the_end(
    command: Run, tmp_path: Path, rabbitmq: RabbitServer
) -> None:
    queue, user = new_name(), new_name("user")
    Rabbit(rabbitmq).declare(queue)
    rabbitmq.add_user(user, "secret", configure="^$", write="^(amq.default)$", read=f"^{queue}$")
    (tmp_path / "junk").write_bytes(b"\xffjunk")
    where = ("--broker", f"{user}:secret@{rabbitmq.address}")
    command("send", queue, "junk", "--wire", "raw", *where)
    command("send", queue, *where, stdin=b"1")
    done = command("receive", queue, "--idle", "0.5", *where, environ=[("_CONDOR_SCRATCH_DIR", str(tmp_path))])
    assert (done.returncode, lines(done)) == (0, [1])
    assert done.stderr.count(b"goes back to its queue at the end: nothing lasting takes it") == 1
    assert rabbitmq.counts(queue) == (1, 0)


def test_a_full_disk_is_reported_and_no_message_is_lost(command: Run, tmp_path: Path) -> None:
    command("send", "q", stdin=b"1\n2\n")
    with Path("/dev/full").open("wb") as full:
        process = start(tmp_path, "receive", "q", stdout=full, stderr=subprocess.PIPE)
        _, told = process.communicate(timeout=TIMEOUT)
    assert process.returncode == 4
    assert told.splitlines()[-1] == b"trio-pilot: cannot write to stdout: No space left on device"
    assert lines(command("receive", "q", "--idle", "0.1")) == [1, 2]


@pytest.mark.parametrize("name", ["file/x", "x" * 300], ids=["below a file", "of a name too long"])
def test_a_directory_that_cannot_be_made_is_an_error_of_one_line(command: Run, tmp_path: Path, name: str) -> None:
    (tmp_path / "file").touch()
    done = command("receive", "q", "--to", name)
    assert (done.returncode, len(done.stderr.splitlines())) == (4, 1)


def test_a_closed_pipe_loses_no_message(command: Run, tmp_path: Path) -> None:
    events = [str(number) * 200_000 for number in range(4)]  # more than a pipe holds
    command("send", "q", stdin="\n".join(map(json.dumps, events)).encode())
    process = start(tmp_path, "receive", "q", stdout=subprocess.PIPE, stderr=subprocess.PIPE)
    assert process.stdout
    assert process.stderr
    assert json.loads(process.stdout.readline()) == events[0]
    process.stdout.close()
    told = process.stderr.read()
    process.stderr.close()
    assert process.wait(TIMEOUT) == 128 + signal.SIGPIPE
    assert b"Traceback" not in told
    assert sorted(lines(command("receive", "q", "--idle", "0.1"))) == events[1:]


def test_a_killed_receive_neither_loses_nor_doubles_messages(command: Run, tmp_path: Path) -> None:
    events = list(range(300))
    command("send", "q", stdin="\n".join(map(json.dumps, events)).encode())
    out = tmp_path / "out"
    process = start(tmp_path, "receive", "q", "--to", "out", stderr=subprocess.DEVNULL)
    wait_until(lambda: out.exists() and len(list(out.glob("*.json"))) > 20)
    process.kill()
    process.wait(TIMEOUT)
    assert len(list(out.glob("*.json"))) < len(events)
    command("receive", "q", "--to", "out", "--idle", "0.5")
    assert sorted(json.loads(file.read_text()) for file in out.glob("*.json")) == events


@pytest.mark.parametrize(("number", "word"), [(signal.SIGINT, b"interrupted"), (signal.SIGTERM, b"ended by SIGTERM")])
def test_a_signal_ends_receive_with_a_line(command: Run, tmp_path: Path, number: signal.Signals, word: bytes) -> None:
    command("send", "q", stdin=b"1\n")
    pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE}
    process = start(tmp_path, "receive", "q", "--idle", "inf", **pipes)
    assert process.stdout
    assert process.stdout.readline() == b"1\n"
    process.send_signal(number)
    _, told = process.communicate(timeout=TIMEOUT)
    assert re.fullmatch(rb"trio-pilot: %b: [01] message\(s\) received from q\n" % word, told)
    assert process.returncode == 128 + number


def test_a_signal_ends_receive_whose_reader_has_stopped_reading(command: Run, tmp_path: Path) -> None:
    command("send", "q", stdin=json.dumps("x" * 200_000).encode())
    process = start(tmp_path, "receive", "q", stdout=subprocess.PIPE, stderr=subprocess.PIPE)
    assert process.stdout
    assert process.stdout.read(10)
    process.send_signal(signal.SIGINT)
    assert process.wait(TIMEOUT) == 130
    process.communicate()
    assert lines(command("receive", "q", "--idle", "0.1")) == ["x" * 200_000]


def test_a_signal_ends_send_that_waits_for_its_input(command: Run, tmp_path: Path) -> None:
    process = start(tmp_path, "send", "q", stdin=subprocess.PIPE, stderr=subprocess.PIPE)
    assert process.stdin
    process.stdin.write(b"1\n")
    process.stdin.flush()
    assert lines(command("receive", "q", "--count", "1", "--idle", "30")) == [1]
    process.send_signal(signal.SIGINT)
    assert process.wait(TIMEOUT) == 130
    assert process.stderr
    assert process.stderr.read().splitlines() == [b"trio-pilot: interrupted: 1 event(s) sent to q"]
    process.stdin.close()
    process.stderr.close()


@pytest.fixture
def readme(tmp_path: Path) -> Run:
    def run(script: str) -> Done:
        env = {**clean_environment(), "PATH": f"{Path(sys.executable).parent}:{os.environ['PATH']}"}
        return subprocess.run(["sh", "-ec", script], capture_output=True, cwd=tmp_path, env=env, timeout=TIMEOUT, check=True)

    return run


def test_the_readme_s_laptop_and_check_work(readme: Run, tmp_path: Path) -> None:
    _, _, laptop, check, *_ = shell_blocks()
    readme(laptop)
    found = sorted(file.read_text() for file in (tmp_path / "results").iterdir())
    assert found == ["apple\npear\n", "date\nfig\n"]
    assert b"FAIL" not in readme(check).stdout


def test_the_readme_s_rabbitmq_works(readme: Run, rabbitmq: RabbitServer) -> None:
    block = shell_blocks()[4]
    assert "@localhost" in block
    done = readme(block.replace("@localhost", f"@{rabbitmq.address}"))
    assert lines(done) == [{"x": 3}]


def test_the_readme_s_variables_of_ewms_work(readme: Run, command: Run) -> None:
    command("send", "to-do", stdin=b'"event"')
    readme(shell_blocks()[5])
    assert lines(command("receive", "done", "--idle", "0.1")) == ["event"]


def test_no_token_is_ever_shown(command: Run) -> None:
    secrets = [("EWMS_PILOT_BROKER_TOKEN", "hunter2"), ("EWMS_PILOT_BROKER", "amqp://user:hunter2@127.0.0.1:1")]
    for arguments in (["send", "q"], ["receive", "q"], ["check"]):
        done = command(*arguments, "--broker-patience", "0", environ=secrets)
        assert b"hunter2" not in done.stdout + done.stderr
        assert b"Traceback" not in done.stderr
        assert done.returncode in (2, 3)


RUN = ("run", "--queue-incoming=q", "--queue-outgoing=r", "--runtime=process", "--task-args=true")


@pytest.mark.parametrize(
    "arguments", [("--help",), ("--version",), ("check", *RUN[1:]), ("condor-submit", "--broker=amqp://h", *RUN[1:])]
)
def test_a_stdout_that_cannot_be_written_is_an_error_of_one_line(tmp_path: Path, arguments: Sequence[str]) -> None:
    if arguments[0] == "condor-submit":
        (tmp_path / "file").touch()
        arguments = (*arguments, "--executable=file")
    with Path("/dev/full").open("wb") as full:
        process = start(tmp_path, *arguments, stdout=full, stderr=subprocess.PIPE)
        _, said = process.communicate(timeout=TIMEOUT)
    assert said == b"trio-pilot: cannot write to stdout: No space left on device\n"
    assert process.returncode == 4


@pytest.mark.parametrize("queue", ["", " events", "a;b"])
@pytest.mark.parametrize("which", ["send", "receive", "dead-letters"])
def test_a_name_that_cannot_be_of_a_queue_is_refused(command: Run, which: str, queue: str) -> None:
    done = command(which, queue)
    said = f"trio-pilot: QUEUE must name one queue, with no ; in it and no space around it, not {queue!r}\n"
    assert (done.returncode, done.stderr.decode()) == (2, said)


@pytest.mark.parametrize("arguments", [RUN, ("send", "q"), ("check",), ("demo",)])
def test_a_removed_working_directory_is_an_error_of_one_line(tmp_path: Path, arguments: Sequence[str]) -> None:
    (tmp_path / "gone").mkdir()
    script = 'cd gone && rmdir ../gone && exec "$@"'
    done = subprocess.run(
        ["sh", "-c", script, "sh", *TRIO_PILOT, *arguments], cwd=tmp_path, capture_output=True, check=False
    )
    assert done.returncode == 4
    assert done.stderr.startswith(b"trio-pilot: the working directory is gone; go to another: ")
    assert done.stderr.count(b"\n") == 1


def test_a_slot_that_is_too_short_for_any_task_is_warned_of(command: Run) -> None:
    command("send", "q", stdin=b"1")
    done = command(*RUN, "--max-runtime=5")
    assert done.returncode == 0
    assert b"no task can run: the slot ends within 7 s, which the pilot needs for its own end" in done.stderr
    assert b"FAIL  slot          the slot ends too soon for any task" in command("check", *RUN[1:], "--max-runtime=5").stdout


def test_a_broker_of_no_known_kind_is_refused(command: Run) -> None:
    done = command(*RUN, "--broker=ampq://host")
    assert done.returncode == 2
    assert done.stderr.endswith(b"amqp://, nats:// or pulsar://, or be a queue file, not begin with ampq://\n")


@pytest.mark.parametrize(
    "arguments", [RUN, ("check", *RUN[1:]), ("send", "q"), ("receive", "q")], ids=["run", "check", "send", "receive"]
)
def test_a_queue_file_in_an_unknown_home_is_refused(command: Run, arguments: Sequence[str]) -> None:
    done = command(*arguments, "--broker=~nobody-of-that-name/q.sqlite", stdin=b"1")
    assert done.returncode == 2
    assert b"a home directory that is not known: ~nobody-of-that-name/q.sqlite" in done.stdout + done.stderr
    assert b"Traceback" not in done.stderr
