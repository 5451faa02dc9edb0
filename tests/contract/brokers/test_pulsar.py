# Pulsar, beyond the contract: with the library itself where no broker is needed, else with the stand-in for both.

import sys
import threading
from pathlib import Path
from subprocess import run

import pulsar
import pytest
import trio

from tests.support import network_proxy as proxies
from tests.support.brokers import LONG, Pulsar, eventually, failure_of, nothing_comes, send, take
from tests.support.pilot_process import COMMAND
from tests.support.pulsar_stand_in import MOST_BYTES, StandIn
from tests.support.servers import free_port
from trio_pilot.brokers import Consumer, Settlement, dead_letter_queue, dead_letters, open_source
from trio_pilot.brokers.pulsar import parse_address
from trio_pilot.brokers.pulsar_connection import PulsarTimeouts
from trio_pilot.errors import BrokerError, DeliveryLostError, NotSetAsideError, PublishRefusedError, SettingsError


@pytest.fixture
def broker(pulsar_stand_in: StandIn, tmp_path: Path) -> Pulsar:
    return Pulsar(pulsar_stand_in.address, tmp_path)


def little_patience(seconds: float) -> bool:
    return seconds < 1


async def until_listening(consumer: Consumer, *, is_so: bool = True) -> None:
    with trio.fail_after(LONG):
        while (consumer.listening_since <= trio.current_time()) is not is_so:
            assert await consumer.take() is None
            await consumer.wait()


@pytest.mark.parametrize(
    ("address", "parts"),
    [
        ("host", ("pulsar", "host", 6650)),
        ("pulsar://host", ("pulsar", "host", 6650)),
        ("pulsar://host:1234", ("pulsar", "host", 1234)),
        ("PULSAR+SSL://host/", ("pulsar+ssl", "host", 6651)),
        ("pulsar://[::1]:1234", ("pulsar", "::1", 1234)),
    ],
)
def test_an_address_has_a_scheme_a_host_and_a_port(address: str, parts: tuple[str, str, int]) -> None:
    assert parse_address(address) == parts


@pytest.mark.parametrize("address", ["http://host", "pulsar://", "pulsar://host:x", "pulsar://host/topic", "token-x@host"])
def test_the_error_of_a_wrong_address_shows_no_secret(address: str) -> None:
    with pytest.raises(SettingsError, match=r"^a Pulsar address must be \[pulsar\|pulsar\+ssl\]://HOST\[:PORT\]") as told:
        parse_address(address)
    assert "token-x" not in str(told.value)


def test_without_pulsar_client_the_extra_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "pulsar", None)
    for name in ("pulsar", "pulsar_connection"):
        monkeypatch.delitem(sys.modules, f"trio_pilot.brokers.{name}")
    with pytest.raises(SettingsError, match=r"pip install 'trio-pilot\[pulsar\]'"):
        open_source(Pulsar("host", Path()).address("q"), little_patience)


async def test_a_refused_connection_is_tried_again_while_there_is_patience(tmp_path: Path) -> None:
    broker = Pulsar(f"pulsar://127.0.0.1:{free_port()}", tmp_path)
    for opened in (broker.source("q", little_patience), broker.sink("q", little_patience)):
        begun = trio.current_time()
        error = await failure_of(opened)
        assert str(error) == "Pulsar at 127.0.0.1 cannot be reached: Connection refused"
        assert isinstance(error, BrokerError)
        assert 1 <= trio.current_time() - begun < 4


async def test_a_host_that_has_no_address_is_one_clear_line(tmp_path: Path) -> None:
    error = await failure_of(Pulsar("pulsar+ssl://no-such-host.invalid", tmp_path).sink("q", lambda _: False))
    assert "Pulsar at no-such-host.invalid cannot be reached" in str(error)


async def test_a_server_that_is_no_broker_is_one_clear_line_and_no_output(
    tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    async with proxies.server(proxies.hang_up) as address:
        broker = Pulsar(f"pulsar://{address}", tmp_path)
        broker.timeouts = PulsarTimeouts(answer=1)
        error = await failure_of(broker.source("q", lambda _: False))
    assert str(error) == "Pulsar at 127.0.0.1 cannot be reached: the broker has not answered for 1 s"
    assert capfd.readouterr() == ("", "")


def threads_at_work() -> int:
    """Return the number of threads of this process, the library's too, without idle threads of trio's."""
    idle = sum(thread.name.startswith("Trio thread") for thread in threading.enumerate())
    return len(list(Path("/proc/self/task").iterdir())) - idle


async def test_a_silent_broker_delays_no_cancellation_and_leaves_no_thread(tmp_path: Path) -> None:
    async with proxies.server(proxies.silence) as address:
        broker, before = Pulsar(f"pulsar://{address}", tmp_path), threads_at_work()
        for opened in (broker.source("q"), broker.sink("q")):
            begun = trio.current_time()
            with trio.move_on_after(0.5):
                async with opened as queue:
                    await queue.ready()
            assert trio.current_time() - begun < 1.5
            await eventually(lambda: threads_at_work() <= before)


def test_a_command_reports_a_missing_broker_in_one_line(tmp_path: Path) -> None:
    (tmp_path / "event.json").write_text("{}")
    env = {"EWMS_PILOT_BROKER": f"pulsar://127.0.0.1:{free_port()}", "EWMS_PILOT_BROKER_PATIENCE": "1"}
    for command in (
        ["send", "q", "event.json"],
        ["run", "--queue-incoming=q", "--queue-outgoing=r", "--runtime=process", "--task-args=/bin/true"],
    ):
        done = run([COMMAND, *command], cwd=tmp_path, env=env, capture_output=True, text=True, timeout=LONG, check=False)
        assert (done.returncode, done.stdout) == (3, "")
        assert done.stderr.splitlines()[-1] == "trio-pilot: Pulsar at 127.0.0.1 cannot be reached: Connection refused"
        assert "Traceback" not in done.stderr


async def test_the_library_gets_the_token_and_checks_the_name_of_the_broker(
    broker: Pulsar, pulsar_stand_in: StandIn, tmp_path: Path
) -> None:
    (tmp_path / "token").write_text("one\n")
    async with broker.sink("q", token=f"@{tmp_path}/token") as sink:
        await sink.ready()
    (client,) = pulsar_stand_in.clients
    assert isinstance(client.options["authentication"], pulsar.AuthenticationToken)
    assert client.options["tls_validate_hostname"]
    assert not client.is_open


async def test_unsettled_events_come_again_after_a_lost_connection(
    broker: Pulsar, pulsar_stand_in: StandIn, queue: str
) -> None:
    await send(broker, queue, b"a", b"b")
    async with broker.source(queue) as source, source.consume(2) as consumer:
        delivery, _ = await take(consumer), await take(consumer)
        pulsar_stand_in.cut()
        await until_listening(consumer, is_so=False)
        assert source.has_lost(delivery)
        with pytest.raises(DeliveryLostError):
            await source.settle(delivery, Settlement.ACK)
        again = [await take(consumer), await take(consumer)]
        assert [(one.body, one.redelivered) for one in again] == [(b"a", True), (b"b", True)]
        for one in again:
            await source.settle(one, Settlement.ACK)
        await nothing_comes(consumer)


async def test_a_broker_that_stops_answering_is_not_taken_for_an_empty_queue(
    broker: Pulsar, pulsar_stand_in: StandIn, queue: str
) -> None:
    async with broker.source(queue) as source, source.consume(1) as consumer:
        await source.ready()
        pulsar_stand_in.is_dead = True
        await until_listening(consumer)
        assert not await consumer.is_idle()
        await until_listening(consumer, is_so=False)
        pulsar_stand_in.is_dead = False
        await until_listening(consumer)
        assert await consumer.is_idle()


async def test_a_send_waits_for_the_connection_to_be_back(broker: Pulsar, pulsar_stand_in: StandIn, queue: str) -> None:
    async with broker.sink(queue) as sink:
        await sink.ready()
        pulsar_stand_in.cut()
        with trio.fail_after(LONG):
            await sink.send(b"a", "id")
    assert [message.body for message in pulsar_stand_in.topic(queue).ready] == [b"a"]


async def test_a_delivery_that_comes_again_replaces_the_one_before(
    broker: Pulsar, pulsar_stand_in: StandIn, queue: str
) -> None:
    await send(broker, queue, b"a")
    async with broker.source(queue) as source, source.consume(2) as consumer:
        first = await take(consumer)
        await trio.to_thread.run_sync(
            pulsar_stand_in.redeliver, queue
        )  # as if the library had connected again between two looks
        second = await take(consumer)
        assert (source.has_lost(first), source.has_lost(second)) == (True, False)
        with pytest.raises(DeliveryLostError):
            await source.settle(first, Settlement.ACK)
        await source.settle(second, Settlement.ACK)
        await send(broker, queue, b"b", b"c")
        assert [(await take(consumer)).body for _ in range(2)] == [b"b", b"c"]


async def test_a_message_of_another_sender_is_known_by_its_place(
    broker: Pulsar, pulsar_stand_in: StandIn, queue: str
) -> None:
    async with broker.source(queue) as source, source.consume(1) as consumer:
        await source.ready()
        pulsar_stand_in.store(queue, b"theirs", {"colour": "blue"})
        delivery = await take(consumer)
        assert (delivery.message_id, delivery.attempt, delivery.headers) == ("(0,0,-1,-1)", 1, {"colour": "blue"})
        await source.settle(delivery, Settlement.REJECT)
        again = await take(consumer)
        assert (again.message_id, again.attempt, again.headers["colour"]) == ("(0,0,-1,-1)", 2, "blue")
        await source.settle(again, Settlement.ACK)


async def test_an_output_too_large_is_refused_and_the_next_one_is_sent(broker: Pulsar, queue: str) -> None:
    async with broker.sink(queue) as sink:
        with pytest.raises(PublishRefusedError, match=f"^Pulsar refuses an output of {MOST_BYTES + 1} bytes"):
            await sink.send(bytes(MOST_BYTES + 1), "large")
        await sink.send(b"small", "small")


async def test_a_dead_letter_whose_topic_is_refused_goes_to_the_directory(
    broker: Pulsar, pulsar_stand_in: StandIn, queue: str
) -> None:
    pulsar_stand_in.refused[dead_letter_queue(queue)] = "AuthorizationError"
    await send(broker, queue, b"bad")
    async with broker.source(queue) as source, source.consume(1) as consumer:
        await source.settle(await take(consumer), Settlement.DEAD_LETTER, "why", "SomeError")
        await nothing_comes(consumer)
    (letter,) = dead_letters.read(broker.directory, queue)
    assert (letter.body, letter.facts["reason"]) == (b"bad", "why")


async def test_a_dead_letter_without_a_lasting_place_goes_back_to_its_topic(
    broker: Pulsar, pulsar_stand_in: StandIn, queue: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("_CONDOR_SCRATCH_DIR", str(broker.directory.parent))
    pulsar_stand_in.refused[dead_letter_queue(queue)] = "AuthorizationError"
    await send(broker, queue, b"bad")
    async with broker.source(queue) as source, source.consume(1) as consumer:
        delivery = await take(consumer)
        with pytest.raises(NotSetAsideError, match="is removed with this job"):
            await source.settle(delivery, Settlement.DEAD_LETTER, "why", "SomeError")
        await nothing_comes(consumer)
        await source.settle(delivery, Settlement.REJECT)
        again = await take(consumer)
        assert (again.body, again.attempt) == (b"bad", 2)
    assert list(dead_letters.read(broker.directory, queue)) == []


async def test_a_failed_event_whose_copy_is_refused_goes_back_uncounted(
    broker: Pulsar, pulsar_stand_in: StandIn, queue: str
) -> None:
    await send(broker, queue, b"bad")
    pulsar_stand_in.refused[queue] = "AuthorizationError"
    async with broker.source(queue) as source, source.consume(1) as consumer:
        await source.settle(await take(consumer), Settlement.REJECT)
        assert (await take(consumer)).attempt == 1


async def test_a_refusal_ends_the_waiting_at_once(broker: Pulsar, pulsar_stand_in: StandIn, queue: str) -> None:
    pulsar_stand_in.refused[queue] = "AuthenticationError"
    error = await failure_of(broker.sink(queue))
    assert str(error) == "Pulsar at 127.0.0.1 refuses the token (AuthenticationError)"
