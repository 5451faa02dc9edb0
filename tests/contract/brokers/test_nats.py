# NATS, beyond the contract: leases, lost connections and servers, refusals, and oms-mqclient on the other side.

import asyncio
import gc
import signal
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import pytest
import trio
from mqclient.queue import Queue

from tests.support.brokers import LONG, Nats, eventually, failure_of, new_name, nothing_comes, send, take
from tests.support.hostile_messages import nats_publisher
from tests.support.network_proxy import hang_up, proxy, server, silence, speak_http, speak_ssh
from tests.support.pilot_process import COMMAND, assert_nothing_left, cp, pilot, run_pilot
from tests.support.servers import MAX_MESSAGE_SIZE, NATS_USERS, NatsServer, running
from trio_pilot.brokers import Delivery, Settlement, Source
from trio_pilot.brokers.nats import place_of
from trio_pilot.brokers.nats_connection import NatsTimeouts
from trio_pilot.errors import BrokerError, DeliveryLostError, NotSetAsideError, PublishRefusedError, SettingsError

pytestmark = pytest.mark.usefixtures("nats")  # which installs it


@pytest.fixture
def broker(nats: NatsServer) -> Nats:
    return Nats(nats)


@pytest.fixture
def own_server(tmp_path: Path) -> Iterator[NatsServer]:
    """A server that a test may stop."""
    with running(NatsServer(tmp_path)) as server:
        yield server


@pytest.fixture
def strict(tmp_path: Path) -> Iterator[Nats]:
    """A server that requires a user and a password."""
    with running(NatsServer(tmp_path, NATS_USERS)) as server:
        yield Nats(server)


def mqclient_queue(broker: Nats, queue: str) -> Any:
    return Queue("nats", address=f"nats://{broker.server.address}", name=queue, prefetch=10, timeout=2)


def send_by_mqclient(broker: Nats, queue: str, events: Sequence[Any]) -> None:
    async def send() -> None:
        async with mqclient_queue(broker, queue).open_pub() as publisher:
            for event in events:
                await publisher.send(event)

    asyncio.run(send())


def receive_by_mqclient(broker: Nats, queue: str) -> list[Any]:
    async def receive() -> list[Any]:
        found = []
        async with mqclient_queue(broker, queue).open_sub_manual_acking() as subscriber:
            async for message in subscriber.iter_messages():
                await subscriber.ack(message)
                found.append(message.data)
        return found

    return asyncio.run(receive())


def settings(broker: Nats, incoming: str, outgoing: str, **more: object) -> dict[str, object]:
    return {
        "_EWMS_PILOT_CONTAINER_PLATFORM": "process",
        "TASK_ARGS": f"{cp()} {{{{INFILE}}}} {{{{OUTFILE}}}}",
        "BROKER": f"nats://{broker.server.address}",
        "QUEUE_INCOMING": incoming,
        "QUEUE_OUTGOING": outgoing,
        "INFILE_EXT": ".json",
        "OUTFILE_EXT": ".json",
        **more,
    }


def test_oms_mqclient_gets_each_result_of_its_200_events_once(broker: Nats, tmp_path: Path) -> None:
    incoming, outgoing = new_name("in"), new_name("out")
    events = [{"pixel": number} for number in range(200)]
    send_by_mqclient(broker, incoming, events)
    ended = run_pilot(tmp_path, settings(broker, incoming, outgoing, MAX_CONCURRENT_TASKS=4))
    assert ended.code == 0, ended.stderr
    assert sorted(receive_by_mqclient(broker, outgoing), key=lambda result: int(result["pixel"])) == events
    assert broker.counts(incoming) == (0, 0)
    assert_nothing_left(tmp_path)


async def test_send_receive_and_check_work_with_nats(broker: Nats, tmp_path: Path) -> None:
    queue = new_name()
    (tmp_path / "event.json").write_text('{"x": 3}')
    env = {"EWMS_PILOT_BROKER": f"nats://{broker.server.address}", "PATH": str(Path(COMMAND).parent)}

    async def command(*arguments: str) -> str:
        done = await trio.run_process([COMMAND, *arguments], cwd=tmp_path, env=env, capture_stdout=True, capture_stderr=True)
        return (done.stdout + done.stderr).decode()

    with trio.fail_after(LONG):
        assert "1 event(s) sent" in await command("send", queue, "event.json")
        run = ("--queue-incoming", queue, "--queue-outgoing", queue, "--runtime", "process", "--task-args", "/bin/true")
        assert queue in await command("check", *run)
        assert '{"x": 3}' in await command("receive", queue, "--count", "1")


async def test_a_lease_is_renewed_while_trio_is_busy(broker: Nats, queue: str) -> None:
    broker.lease(queue, 0.6)
    await send(broker, queue, b"long", b"ahead")
    async with broker.source(queue) as source, source.consume(2) as consumer, broker.source(queue) as other:
        delivery = await take(consumer)
        async with other.consume(1) as others:
            block_trio(2)
            await nothing_comes(others, 1)
        assert not source.has_lost(delivery)
        await source.settle(delivery, Settlement.ACK)
        ahead = await take(consumer)
        assert (ahead.body, ahead.redelivered) == (b"ahead", False)
        await source.settle(ahead, Settlement.ACK)
    assert broker.counts(queue) == (0, 0)


def block_trio(seconds: float) -> None:
    import threading

    threading.Event().wait(seconds)


async def test_an_event_whose_lease_ran_out_comes_again_redelivered(broker: Nats, queue: str) -> None:
    broker.lease(queue, 1)
    await send(broker, queue, b"a")
    async with (
        proxy(broker.server.port) as way,
        broker.source(queue, server=way.address) as source,
        source.consume(1) as consumer,
    ):
        first = await take(consumer)
        way.refusing = True
        way.cut()
        await trio.sleep(1.5)
        way.refusing = False
        second = await take(consumer)
        assert (second.message_id, second.attempt, second.redelivered) == (first.message_id, 1, True)
        assert source.has_lost(first)
        assert not source.has_lost(second)
        with pytest.raises(DeliveryLostError):
            await source.settle(first, Settlement.RELEASE)
        await source.settle(second, Settlement.ACK)
        await nothing_comes(consumer)
    assert broker.counts(queue) == (0, 0)


async def test_a_connection_cut_costs_nothing_while_leases_last(broker: Nats, queue: str) -> None:
    bodies = [b"%d" % number for number in range(40)]
    arrived: list[bytes] = []
    async with (
        proxy(broker.server.port) as way,
        broker.sink(queue, server=way.address) as sink,
        broker.source(queue, server=way.address) as source,
        source.consume(3) as consumer,
        trio.open_nursery() as nursery,
    ):

        async def cut_now_and_then() -> None:
            for _ in range(4):
                await trio.sleep(0.15)
                way.cut()

        nursery.start_soon(cut_now_and_then)
        with trio.fail_after(LONG):
            for number, body in enumerate(bodies):
                await sink.send(body, f"id-{number}")
                delivery = await take(consumer)
                assert not delivery.redelivered
                await trio.sleep(0.02)
                await source.settle(delivery, Settlement.ACK)
                arrived.append(delivery.body)
    assert arrived == bodies
    assert broker.counts(queue) == (0, 0)
    assert len(broker.messages(queue)) == len(bodies)  # and none was stored twice


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGKILL])
async def test_a_restart_of_the_server_loses_no_message_and_no_queue(
    own_server: NatsServer, queue: str, number: signal.Signals, caplog: pytest.LogCaptureFixture
) -> None:
    broker = Nats(own_server)
    await send(broker, queue, b"taken", b"ahead", b"rest")
    async with broker.source(queue) as source, broker.sink(queue) as sink, source.consume(2) as consumer:
        await sink.ready()
        taken = await take(consumer)
        await eventually(lambda: own_server.deliveries(place_of(queue)) == 2, "the server has written it down")
        own_server.stop(number)
        async with trio.open_nursery() as nursery:
            nursery.start_soon(sink.send, b"sent meanwhile", "id-m")
            nursery.start_soon(source.settle, taken, Settlement.ACK)
            await trio.sleep(1)
            own_server.start()
        bodies = []
        for _ in range(3):
            delivery = await take(consumer)
            bodies.append(delivery.body)
            await source.settle(delivery, Settlement.ACK)
    assert bodies == [b"ahead", b"rest", b"sent meanwhile"]
    assert broker.counts(queue) == (0, 0)
    assert len([record for record in caplog.records if record.name == "trio_pilot"]) == 2  # one line for each connection


async def test_deliveries_that_a_killed_server_forgot_come_again_redelivered(own_server: NatsServer, queue: str) -> None:
    broker = Nats(own_server)
    await send(broker, queue, b"acked", b"taken")
    async with broker.source(queue) as source, source.consume(2) as consumer:
        before = await take(consumer), await take(consumer)
        await source.settle(before[0], Settlement.ACK)
        own_server.stop()
        own_server.forget_deliveries(place_of(queue))
        own_server.start()
        for first in before:
            again = await take(consumer)
            assert (again.body, again.redelivered) == (first.body, True)
            assert source.has_lost(first)
            await source.settle(again, Settlement.ACK)
    assert broker.counts(queue) == (0, 0)


async def test_a_pilot_runs_no_event_again_that_a_killed_server_forgot(own_server: NatsServer, tmp_path: Path) -> None:
    broker, directory = Nats(own_server), tmp_path / "pilot"
    directory.mkdir()
    incoming, outgoing = new_name("in"), new_name("out")
    send_by_mqclient(broker, incoming, range(12))
    task = "/bin/sh -c 'sleep 0.5; cp {{INFILE}} {{OUTFILE}}'"
    given = settings(broker, incoming, outgoing, MAX_CONCURRENT_TASKS=4, TASK_ARGS=task)
    with pilot(directory, given) as child:
        await eventually(lambda: 4 <= len(broker.messages(outgoing)) < 12, "some are done, and some are run")
        own_server.stop()
        own_server.forget_deliveries(place_of(incoming))
        own_server.start()
        _, said = await trio.to_thread.run_sync(child.communicate)
    assert child.returncode == 0, said
    assert len(broker.messages(outgoing)) == 12
    assert sorted(receive_by_mqclient(broker, outgoing)) == list(range(12))
    assert broker.counts(incoming) == (0, 0)


async def test_a_connection_that_is_reset_is_made_again_at_once_and_in_one_line(
    broker: Nats, queue: str, caplog: pytest.LogCaptureFixture
) -> None:
    async with (
        proxy(broker.server.port) as way,
        broker.source(queue, server=way.address) as source,
        source.consume(1) as consumer,
    ):
        await nothing_comes(consumer)
        way.reset()
        await send(broker, queue, b"a")
        await source.settle(await take(consumer), Settlement.ACK)
    gc.collect()  # asyncio logs an error that was not retrieved when its task is deleted
    assert [record.name for record in caplog.records] == ["trio_pilot"]


async def test_events_of_a_killed_pilot_come_back_after_their_lease(broker: Nats, tmp_path: Path) -> None:
    incoming, outgoing = new_name("in"), new_name("out")
    broker.lease(incoming, 2)
    send_by_mqclient(broker, incoming, ["a"])
    given = settings(broker, incoming, outgoing, TASK_ARGS="/bin/sleep 30")
    env = {"PATH": str(Path(COMMAND).parent)} | {
        name if name.startswith("_") else f"EWMS_PILOT_{name}": str(value) for name, value in given.items()
    }
    async with trio.open_nursery() as nursery:
        pilot = await nursery.start(run_until_killed, tmp_path, env)
        await eventually(lambda: broker.counts(incoming) == (0, 1), "it is taken")
        pilot.kill()
    async with broker.source(incoming) as source, source.consume(1) as consumer:
        delivery = await take(consumer)
        assert (delivery.attempt, delivery.redelivered) == (1, True)
        await source.settle(delivery, Settlement.ACK)


async def run_until_killed(directory: Path, env: dict[str, str], task_status: trio.TaskStatus[trio.Process]) -> None:
    await trio.run_process([COMMAND], cwd=directory, env=env, check=False, capture_stderr=True, task_status=task_status)


async def test_a_deleted_consumer_is_made_again(broker: Nats, queue: str) -> None:
    await send(broker, queue, b"a")
    async with broker.source(queue) as source, source.consume(2) as consumer:
        delivery = await take(consumer)

        async def delete(streams: Any) -> None:
            await streams.delete_consumer(place_of(queue).stream, place_of(queue).consumer)

        broker.ask(delete)
        again = await take(consumer)  # a new consumer of the stream has no record of deliveries
        assert again.message_id == delivery.message_id
        with pytest.raises(DeliveryLostError):
            await source.settle(delivery, Settlement.ACK)
        await source.settle(again, Settlement.ACK)


async def test_an_output_for_a_stream_deleted_meanwhile_is_not_lost(broker: Nats, queue: str) -> None:
    async with broker.sink(queue) as sink:
        await sink.send(b"a", "a")

        async def delete(streams: Any) -> None:
            await streams.delete_stream(place_of(queue).stream)

        broker.ask(delete)
        with trio.fail_after(LONG):
            await sink.send(b"b", "b")
    assert [body for _, body in broker.messages(queue)] == [b"b"]


@pytest.mark.parametrize(
    ("user", "token", "says"),
    [
        ("", "", "refuses the user and password, or token"),
        ("pilot", "wrong", "refuses the user and password, or token"),
        ("", "a.jwt.token", "refuses the user and password, or token"),
    ],
)
async def test_a_refusal_is_one_clear_line_at_once_and_names_no_secret(
    strict: Nats, queue: str, user: str, token: str, says: str
) -> None:
    for opened in (strict.source(queue, user=user, token=token), strict.sink(queue, user=user, token=token)):
        with trio.fail_after(5):
            error = await failure_of(opened)
        assert isinstance(error, BrokerError)
        assert says in str(error)
        assert not token or token not in str(error)


async def test_no_secret_is_sent_without_tls_where_the_address_asks_for_it(strict: Nats, queue: str) -> None:
    with trio.fail_after(5):
        error = await failure_of(strict.sink(queue, server=f"tls://pilot:secret@{strict.server.address}"))
    assert "offers no TLS" in str(error)


@pytest.mark.parametrize("handler", [silence, hang_up, speak_http, speak_ssh])
async def test_a_server_of_another_kind_is_an_error_when_patience_is_over(handler: Any, queue: str, broker: Nats) -> None:
    broker.timeouts = NatsTimeouts(connect=0.5)
    async with server(handler) as address:
        error = await failure_of(broker.sink(queue, patience=lambda seconds: seconds < 1, server=address))
    assert isinstance(error, BrokerError)
    assert "NATS at 127.0.0.1 cannot be reached" in str(error)


async def test_a_server_without_jetstream_is_a_clear_error(tmp_path: Path, queue: str) -> None:
    plain = NatsServer(tmp_path)
    configuration = tmp_path / "nats.conf"
    configuration.write_text(configuration.read_text().split("jetstream")[0])
    with running(plain):
        error = await failure_of(Nats(plain).sink(queue, patience=lambda seconds: seconds < 1))
    assert "there is no JetStream (nats-server needs -js)" in str(error)


async def test_a_dead_letter_without_the_right_to_a_queue_is_two_files(strict: Nats, queue: str) -> None:
    async with strict.sink(queue, user="pilot", token="secret") as sink:
        await sink.send(b"bad", "id-0")
    async with strict.source(queue, user="poor", token="secret") as source, source.consume(1) as consumer:
        await source.settle(await take(consumer), Settlement.DEAD_LETTER, "no good")
        await nothing_comes(consumer)
    (letter,) = (strict.directory / queue).glob("*.body")
    assert letter.read_bytes() == b"bad"


async def test_a_dead_letter_without_a_lasting_place_goes_back_to_its_queue(
    strict: Nats, queue: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("_CONDOR_SCRATCH_DIR", str(strict.directory.parent))
    async with strict.sink(queue, user="pilot", token="secret") as sink:
        await sink.send(b"bad", "id-0")
    async with strict.source(queue, user="poor", token="secret") as source, source.consume(1) as consumer:
        delivery = await take(consumer)
        with pytest.raises(NotSetAsideError, match="is removed with this job"):
            await source.settle(delivery, Settlement.DEAD_LETTER, "no good")
        await source.settle(delivery, Settlement.REJECT)
        again = await take(consumer)
        assert again.body == b"bad"
        await source.settle(again, Settlement.ACK)
    assert not strict.directory.exists()


@pytest.mark.parametrize("size", [MAX_MESSAGE_SIZE - 10, MAX_MESSAGE_SIZE + 1, MAX_MESSAGE_SIZE + 1_000_000])
async def test_a_message_too_large_is_refused_and_others_in_flight_arrive(broker: Nats, queue: str, size: int) -> None:
    async with broker.sink(queue) as sink, trio.open_nursery() as nursery:
        await sink.ready()
        for number in range(10):
            nursery.start_soon(sink.send, b"%d" % number, "id")
        with pytest.raises(PublishRefusedError, match="max_payload"):
            await sink.send(b"x" * size, "too-large")
    assert len(broker.messages(queue)) == 10


async def test_any_message_id_can_be_sent(broker: Nats, queue: str) -> None:
    ids = ("x" * 1000, "é" * 200, "a\r\nb", "\udcff", '"')
    async with broker.sink(queue) as sink, broker.source(queue) as source, source.consume(1) as consumer:
        for message_id in ids:
            await sink.send(b"a", message_id)
            delivery = await take(consumer)
            assert delivery.message_id == message_id
            await source.settle(delivery, Settlement.ACK)


async def test_a_message_of_oms_mqclient_keeps_its_id_when_it_failed(broker: Nats, queue: str) -> None:
    send_by_mqclient(broker, queue, ["a"])
    async with broker.source(queue) as source, source.consume(1) as consumer:
        ids = []
        for attempt in range(1, 4):
            delivery = await take(consumer)
            assert delivery.attempt == attempt
            ids.append(delivery.message_id)
            await source.settle(delivery, Settlement.REJECT)
    assert len(set(ids)) == 1


@pytest.mark.parametrize("name", ["", "a b", "a*", ">", "a..b", "a/b"])
def test_an_impossible_queue_name_is_refused(name: str) -> None:
    with pytest.raises(SettingsError, match="NATS can have no queue"):
        place_of(name)


async def test_an_idle_consumer_asks_twice_a_minute_and_no_more(broker: Nats, queue: str) -> None:
    broker.timeouts = NatsTimeouts(pull=1.0)
    async with (
        proxy(broker.server.port) as way,
        broker.source(queue, server=way.address) as source,
        source.consume(4) as consumer,
    ):
        await nothing_comes(consumer, 0.5)
        before = way.forwarded
        await nothing_comes(consumer, 3)
        assert 2 <= way.forwarded - before <= 8  # a request and its expiry, both ways
        await send(broker, queue, b"x")
        await source.settle(await take(consumer), Settlement.ACK)


async def give_up_settling(source: Source, delivery: Delivery) -> None:
    with trio.move_on_after(0.2) as patience:
        await source.settle(delivery, Settlement.ACK)
    assert patience.cancelled_caught


async def test_a_cancelled_settlement_is_made_once_the_connection_is_back(broker: Nats, queue: str) -> None:
    await send(broker, queue, b"a")
    async with (
        proxy(broker.server.port) as way,
        broker.source(queue, server=way.address) as source,
        source.consume(1) as consumer,
    ):
        delivery = await take(consumer)
        way.refusing = True
        way.cut()
        await give_up_settling(source, delivery)
        way.refusing = False
        await eventually(lambda: broker.counts(queue) == (0, 0), "it is settled")


ODD_HEADERS = {
    "status": b"NATS/1.0\r\nStatus: 503\r\n\r\n",
    "status in the first line": b"NATS/1.0 408 \xff\r\n\r\n",
    "no version": b"N\r\n\r\n",
    "names that cannot be written": b"NATS/1.0\r\n(a): b\r\n@: c\r\n\r\n",
    "nested count": b"NATS/1.0\r\nx-trio-pilot-failures: " + b"[" * 5000 + b"\r\n\r\n",
    "nested id": b"NATS/1.0\r\nx-trio-pilot-message-id: " + b"[" * 900 + b"]" * 900 + b"\r\n\r\n",
    "64 kB": b"NATS/1.0\r\nlarge: " + b"\xff" * 65_400 + b"\r\n\r\n",
    "an id of 60 kB": b"NATS/1.0\r\nNats-Msg-Id: " + b"x" * 60_000 + b"\r\n\r\n",
}


@pytest.mark.parametrize("kind", ODD_HEADERS)
async def test_odd_headers_end_no_connection_and_lose_no_event(
    broker: Nats, queue: str, caplog: pytest.LogCaptureFixture, kind: str
) -> None:
    async with broker.source(queue) as source, source.consume(1) as consumer:
        await nothing_comes(consumer)
        with nats_publisher(broker.server.port) as publish:
            assert publish(place_of(queue).subject, ODD_HEADERS[kind], b"a")
        for settlement in (Settlement.REJECT, Settlement.REJECT, Settlement.DEAD_LETTER):
            delivery = await take(consumer)
            await source.settle(delivery, settlement, "bad", "Error")
        assert delivery.attempt == 3
    ((body, _, reason),) = broker.dead_letters(queue)
    assert (body, reason) == (b"a", "bad")
    assert not [record for record in caplog.records if "connecting again" in record.message]


async def test_the_name_of_a_copy_cannot_be_foreseen(broker: Nats, queue: str) -> None:
    async with broker.source(queue) as source, source.consume(1) as consumer:
        await send(broker, queue, b"a")
        first = await take(consumer)
        await source.settle(first, Settlement.REJECT)
        second = await take(consumer)
        await source.settle(second, Settlement.ACK)
    names = [headers["Nats-Msg-Id"] for headers, _ in broker.messages(queue)]
    assert len(names[1]) == 32
    assert place_of(queue).stream not in names[1]


async def test_a_place_in_a_stream_is_no_senders_id_even_in_a_copy(broker: Nats, queue: str) -> None:
    async with broker.source(queue) as source, source.consume(1) as consumer:
        await nothing_comes(consumer)
        with nats_publisher(broker.server.port) as publish:
            publish(place_of(queue).subject, b"NATS/1.0\r\nx: y\r\n\r\n", b"a")
        first = await take(consumer)
        await source.settle(first, Settlement.REJECT)
        second = await take(consumer)
        await source.settle(second, Settlement.ACK)
    assert (first.named, second.named) == (False, False)
    assert first.message_id == second.message_id


async def test_an_event_with_no_room_for_a_count_is_not_tried_without_end(broker: Nats, queue: str) -> None:
    body = b"x" * (MAX_MESSAGE_SIZE - 50)
    async with broker.source(queue) as source, source.consume(1) as consumer:
        await nothing_comes(consumer)
        with nats_publisher(broker.server.port) as publish:
            assert publish(place_of(queue).subject, b"NATS/1.0\r\nx: y\r\n\r\n", body)
        for attempt in (1, 2, 3):
            delivery = await take(consumer)
            assert delivery.attempt == attempt
            await source.settle(delivery, Settlement.REJECT if attempt < 3 else Settlement.ACK)
