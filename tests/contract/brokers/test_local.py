# The local broker, beyond the contract: many processes, and faults of the disk and the kernel.

import errno
import os
import signal
import sqlite3
import subprocess
import sys
import time
from collections import Counter
from collections.abc import Iterator
from contextlib import ExitStack, closing, contextmanager
from pathlib import Path
from typing import Any

import inotify_simple
import pytest
import trio

from tests.support.brokers import LONG, Local, eventually, failure_of, nothing_comes, take
from tests.support.hostile_messages import insert
from tests.support.services import cannot
from trio_pilot.brokers import QueueAddress, Settlement, local
from trio_pilot.errors import BrokerError

PROGRAM = """
import sys, time, trio
from trio_pilot.brokers import QueueAddress, Settlement, local

file, what, arguments = sys.argv[1], sys.argv[2], sys.argv[3:]
address = QueueAddress("q", "local", file)

async def send(name, count):
    async with local.open_sink(address) as sink:
        for number in range(int(count)):
            await sink.send(f"{name}-{number}".encode(), f"{name}-{number}")
            print(time.monotonic(), flush=True)

async def work(idle):
    async with local.open_source(address) as source, source.consume(1) as consumer:
        print("listening", flush=True)
        while True:
            delivery = None
            with trio.move_on_after(float(idle)):
                while (delivery := await consumer.take()) is None:
                    await consumer.wait()
            if delivery is None:
                return
            print(delivery.body.decode(), delivery.attempt, flush=True)
            await trio.sleep(0.002)
            await source.settle(delivery, Settlement.ACK)

async def hold(count):
    async with local.open_source(address) as source, source.consume(1) as consumer:
        for _ in range(int(count)):
            print((await consumer.take()).body.decode(), flush=True)
        await trio.sleep_forever()

trio.run({"send": send, "work": work, "hold": hold}[what], *arguments)
"""


@pytest.fixture
def broker(tmp_path: Path) -> Local:
    return Local(tmp_path / "queues.sqlite")


@contextmanager
def process(broker: Local, *arguments: str) -> Iterator["subprocess.Popen[str]"]:
    command = [sys.executable, "-c", PROGRAM, str(broker.file), *arguments]
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True) as child:
        try:
            yield child
        finally:
            child.kill()


def finish(child: "subprocess.Popen[str]") -> list[str]:
    out, _ = child.communicate(timeout=60)
    assert child.returncode == 0
    return out.splitlines()


async def send(broker: Local, *bodies: bytes) -> None:
    async with broker.sink("q") as sink:
        for body in bodies:
            await sink.send(body, body.decode())


async def test_messages_outlive_the_process_that_sent_them(broker: Local) -> None:
    with process(broker, "send", "a", "3") as child:
        finish(child)
    async with broker.source("q") as source, source.consume(1) as consumer:
        for number in range(3):
            delivery = await take(consumer)
            assert delivery.message_id == f"a-{number}"
            await source.settle(delivery, Settlement.ACK)


async def test_an_idle_consumer_wakes_at_once_when_another_process_sends(broker: Local) -> None:
    async with broker.source("q") as source, source.consume(1) as consumer:
        assert await consumer.take() is None  # looks for claims of dead processes; after it, only the bell can wake
        with process(broker, "send", "a", "1") as child:
            with trio.fail_after(LONG):
                await consumer.wait()
            heard_at = time.monotonic()
            (sent_at,) = finish(child)
            assert heard_at - float(sent_at) < 1
        assert (await take(consumer)).body == b"a-0"


async def test_claims_of_a_killed_process_come_back_counted_within_ten_seconds(broker: Local) -> None:
    await send(broker, b"a", b"b", b"c")
    with process(broker, "hold", "2") as child:
        assert child.stdout
        held = {child.stdout.readline().strip(), child.stdout.readline().strip()}
        assert held == {"a", "b"}
        async with broker.source("q") as source, source.consume(1) as consumer:
            assert (await take(consumer)).body == b"c"
            await nothing_comes(consumer, 1)
            child.send_signal(signal.SIGKILL)
            with trio.fail_after(10):
                back = [await take(consumer), await take(consumer)]
    assert [(delivery.body, delivery.attempt) for delivery in back] == [(b"a", 2), (b"b", 2)]


async def test_a_new_consumer_finds_the_claims_of_the_dead_at_once(broker: Local) -> None:
    await send(broker, b"a")
    with process(broker, "hold", "1") as child:
        assert child.stdout
        child.stdout.readline()
        child.kill()
        child.wait()
    async with broker.source("q") as source, source.consume(1) as consumer:
        with trio.fail_after(1):
            delivery = await consumer.take()
        assert delivery
        assert delivery.attempt == 2


async def test_four_processes_share_four_hundred_messages_and_each_is_done_once(broker: Local) -> None:
    with ExitStack() as stack:
        children = [stack.enter_context(process(broker, "work", "1.5")) for _ in range(4)]
        for child in children:
            assert child.stdout
            assert child.stdout.readline() == "listening\n"
        await send(broker, *[b"m-%d" % number for number in range(400)])
        shares = [await trio.to_thread.run_sync(finish, child) for child in children]
    counts = Counter(line for share in shares for line in share)
    assert counts == Counter(f"m-{number} 1" for number in range(400))
    assert all(shares)
    assert broker.rows("SELECT count(*) FROM message") == [(0,)]


@pytest.mark.parametrize("attempt", range(3))
def test_many_processes_may_be_the_first_to_use_a_queue_file(broker: Local, attempt: int) -> None:
    with ExitStack() as stack:
        children = [stack.enter_context(process(broker, "send", f"p{number}", "10")) for number in range(8)]
        for child in children:
            finish(child)
    assert broker.rows("SELECT count(DISTINCT message_id) FROM message") == [(80,)], attempt


async def test_many_connections_may_be_the_first_to_use_a_queue_file(tmp_path: Path) -> None:
    for number in range(20):
        broker = Local(tmp_path / f"{number}.sqlite")
        with trio.fail_after(LONG):
            async with trio.open_nursery() as nursery:
                for _ in range(8):
                    nursery.start_soon(send, broker, b"x")
        assert broker.rows("SELECT count(*) FROM message") == [(8,)]


async def test_no_inotify_instance_left_is_no_reason_not_to_work(broker: Local, monkeypatch: pytest.MonkeyPatch) -> None:
    def none_left(**_options: Any) -> None:
        raise OSError(errno.EMFILE, "Too many open files")

    monkeypatch.setattr(inotify_simple, "INotify", none_left)
    async with broker.sink("q") as sink, broker.source("q") as source, source.consume(1) as consumer:
        assert await consumer.take() is None
        await sink.send(b"a", "a")
        with trio.fail_after(1):
            assert (await take(consumer)).body == b"a"


async def test_a_file_that_is_no_database_is_one_clear_line_and_stays_as_it_is(tmp_path: Path) -> None:
    broker = Local(tmp_path / "notes.txt")
    broker.file.write_bytes(b"dear diary, " * 1000)
    error = await failure_of(broker.source("q"))
    assert isinstance(error, BrokerError)
    assert str(broker.file) in str(error)
    assert "not a database" in str(error)
    assert broker.file.read_bytes() == b"dear diary, " * 1000


@pytest.mark.parametrize("place", ["/proc/queues.sqlite", "{tmp}/missing/queues.sqlite", "{tmp}", "{tmp}/file/q.sqlite"])
async def test_a_place_that_cannot_be_written_is_one_clear_line(tmp_path: Path, place: str) -> None:
    (tmp_path / "file").touch()
    file = place.format(tmp=tmp_path)
    for queue in (
        local.open_source(QueueAddress("q", "local", file)),
        local.open_sink(QueueAddress("q", "local", file)),
    ):
        error = await failure_of(queue)
        assert isinstance(error, BrokerError)
        assert file in str(error)


async def test_a_queue_file_of_an_earlier_version_is_brought_up_to_date(broker: Local) -> None:
    with closing(sqlite3.connect(broker.file)) as connection:
        connection.executescript("""
            CREATE TABLE message (position INTEGER PRIMARY KEY, queue TEXT NOT NULL, body BLOB NOT NULL,
                message_id TEXT NOT NULL, attempts INTEGER NOT NULL DEFAULT 0, reason TEXT, consumer INTEGER);
            INSERT INTO message (queue, body, message_id) VALUES ('q', x'61', 'a');
            PRAGMA user_version = 1;
        """)
    async with broker.source("q") as source, source.consume(1) as consumer:
        delivery = await take(consumer)
        assert (delivery.body, delivery.redelivered) == (b"a", False)
        await source.settle(delivery, Settlement.DEAD_LETTER, "why")
    assert broker.dead_letters("q") == [(b"a", "a", "why")]


async def test_a_queue_file_of_a_later_version_is_one_clear_line(broker: Local) -> None:
    await send(broker, b"a")
    with closing(sqlite3.connect(broker.file)) as connection:
        connection.execute("PRAGMA user_version = 99")
    error = await failure_of(broker.sink("q"))
    assert "another version" in str(error)
    assert broker.rows("SELECT body FROM message") == [(b"a",)]


@contextmanager
def tiny_disk(directory: Path, size: str) -> Iterator[None]:
    if os.geteuid() != 0:
        cannot("only root can mount a small disk")
    directory.mkdir()
    done = subprocess.run(["mount", "-t", "tmpfs", "-o", f"size={size}", "tmpfs", directory], capture_output=True, text=True)
    if done.returncode:
        cannot(f"mount: {done.stderr}")
    try:
        yield
    finally:
        subprocess.run(["umount", directory], check=True)


async def test_a_full_disk_is_one_clear_line_and_loses_no_confirmed_message(tmp_path: Path) -> None:
    disk = tmp_path / "disk"
    broker = Local(disk / "queues.sqlite")
    with tiny_disk(disk, "1m"):
        confirmed = []
        with pytest.raises(BrokerError, match="full") as caught:  # noqa: PT012
            async with broker.sink("q") as sink:
                for number in range(100):
                    await sink.send(b"x" * 50_000, f"id-{number}")
                    confirmed.append(f"id-{number}")
        assert "\n" not in str(caught.value)
        assert 1 < len(confirmed) < 50
        await trio.run_process(["mount", "-o", "remount,size=16m", str(disk)])
        async with broker.source("q") as source, source.consume(1) as consumer:
            for message_id in confirmed:
                delivery = await take(consumer)
                assert (delivery.message_id, len(delivery.body)) == (message_id, 50_000)
                await source.settle(delivery, Settlement.ACK)


async def test_nothing_stays_open_after_close(broker: Local) -> None:
    def open_files() -> int:
        return len(list(Path("/proc/self/fd").iterdir()))

    await send(broker, b"warm-up")
    before = open_files()
    for _ in range(5):
        async with broker.sink("q") as sink, broker.source("q") as source, source.consume(1):
            await sink.send(b"a", "a")
    await eventually(lambda: open_files() <= before)


async def test_a_pilot_by_way_of_a_link_leaves_the_claims_of_others_alone(broker: Local, tmp_path: Path) -> None:
    link = tmp_path / "link"
    link.mkdir()
    (link / "queues.sqlite").symlink_to(broker.file)
    other = Local(link / "queues.sqlite")
    async with broker.sink("q") as sink, broker.source("q") as source, source.consume(1) as consumer:
        await sink.send(b"a", "a")
        delivery = await take(consumer)
        async with other.source("q") as thief, thief.consume(1) as by_link:
            await nothing_comes(by_link)
        await source.settle(delivery, Settlement.ACK)
    assert list(link.iterdir()) == [link / "queues.sqlite"]


@pytest.mark.parametrize("what", ["removed", "replaced", "restored", "bell removed"])
async def test_a_queue_file_that_others_took_away_is_no_success(broker: Local, tmp_path: Path, what: str) -> None:
    bell, moved = broker.file.with_name(f"{broker.file.name}-bell"), tmp_path / "moved"
    async with broker.sink("q") as sink:
        await sink.send(b"a", "a")
        match what:
            case "removed":
                broker.file.unlink()
            case "replaced":
                moved.write_bytes(broker.file.read_bytes())
                moved.replace(broker.file)
            case "restored":
                broker.file.rename(moved)
                broker.file.write_bytes(moved.read_bytes())
            case _:
                bell.unlink()
        with pytest.raises(BrokerError, match="removed, moved or replaced while in use"):
            await sink.send(b"b", "b")


ODD_ROWS: dict[str, dict[str, Any]] = {
    "no id": {"message_id": ""},
    "an id with a NUL": {"message_id": "a\0b"},
    "an id that is not UTF-8": {"message_id": b"\xff"},
    "an id of 1 MB": {"message_id": "x" * 10**6},
    "a number as id": {"message_id": 7},
    "most attempts": {"attempts": 2**63 - 1},
    "words for numbers": {"attempts": "many", "deliveries": "many"},
    "headers that are no JSON": {"headers": "[" * 5000},
    "headers that are no object": {"headers": "[1]"},
    "text as body": {"body": "é"},
    "a number as body": {"body": 12},
}


@pytest.mark.parametrize("kind", ODD_ROWS)
async def test_rows_that_others_wrote_are_settled_as_any_other(broker: Local, kind: str) -> None:
    columns = {"body": b"a", "message_id": "a"} | ODD_ROWS[kind]
    async with broker.source("q") as source, source.consume(1) as consumer:
        insert(broker.file, "q", columns.pop("body"), columns)
        for settlement in (Settlement.RELEASE, Settlement.REJECT, Settlement.DEAD_LETTER):
            delivery = await take(consumer)
            assert isinstance(delivery.body, bytes)
            assert delivery.named == (kind != "no id")
            await source.settle(delivery, settlement, "bad", "Error")
    assert broker.rows("SELECT count(*) FROM message WHERE queue = 'q'") == [(0,)]
    assert broker.rows("SELECT count(*) FROM message WHERE reason = 'bad'") == [(1,)]


async def test_an_id_that_no_file_can_hold_fails_no_other_request(broker: Local) -> None:
    async with broker.sink("q") as sink, broker.source("q") as source, source.consume(1) as consumer:
        async with trio.open_nursery() as nursery:
            for message_id in ("a", "\ud800", "b"):
                nursery.start_soon(sink.send, b"body", message_id)
        ids = {(await take(consumer)).message_id for _ in range(3)}
        assert ids == {"a", r"\ud800", "b"}
