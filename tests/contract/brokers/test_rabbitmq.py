# RabbitMQ, beyond the contract: kinds of queues, rights, refusals.

import struct
import threading
from pathlib import Path

import pika
import pytest
import trio

from tests.support.brokers import LONG, Rabbit, eventually, failure_of, leaves, new_name, nothing_comes, send, take
from tests.support.hostile_messages import Encoded, nested_table, publish_amqp, short, with_length
from tests.support.servers import MAX_MESSAGE_SIZE, RabbitServer
from trio_pilot.brokers import Settlement, dead_letter_queue, dead_letters
from trio_pilot.brokers.rabbitmq_connection import RabbitTimeouts
from trio_pilot.errors import BrokerError, DeliveryLostError, NotSetAsideError, PublishRefusedError


@pytest.fixture
def broker(rabbitmq: RabbitServer) -> Rabbit:
    return Rabbit(rabbitmq)


@pytest.fixture
def pilot_user(broker: Rabbit) -> str:
    """Add a user with the rights of a token of EWMS's queue service: none to configure."""
    name = new_name("user")
    broker.server.add_user(name, "secret", configure="^$", write=".*", read=".*")
    return name


async def test_a_missing_queue_is_declared_as_a_durable_quorum_queue(broker: Rabbit, queue: str) -> None:
    await send(broker, queue, b"a")
    with broker.channel() as channel:
        channel.queue_declare(queue, durable=True, arguments={"x-queue-type": "quorum"})  # error 406 for another kind
    ((properties, _),) = broker.get_all(queue)
    assert properties.delivery_mode == 2


async def test_an_existing_classic_queue_is_used_as_it_is(broker: Rabbit, queue: str) -> None:
    broker.declare(queue, "classic")
    async with broker.sink(queue) as sink, broker.source(queue) as source, source.consume(1) as consumer:
        await sink.send(b"a", "a")
        delivery = await take(consumer)
        assert delivery.attempt == 1
        await source.settle(delivery, Settlement.REJECT)
        delivery = await take(consumer)
        assert delivery.attempt == 2
        await source.settle(delivery, Settlement.ACK)


async def test_a_user_who_may_not_declare_can_use_an_existing_queue(broker: Rabbit, queue: str, pilot_user: str) -> None:
    broker.declare(queue)
    async with (
        broker.sink(queue, user=pilot_user, token="secret") as sink,
        broker.source(queue, user=pilot_user, token="secret") as source,
        source.consume(1) as consumer,
    ):
        await sink.send(b"a", "a")
        await source.settle(await take(consumer), Settlement.ACK)
    assert broker.server.counts(queue) == (0, 0)


async def test_a_missing_queue_that_may_not_be_declared_is_named(broker: Rabbit, queue: str, pilot_user: str) -> None:
    error = await failure_of(broker.source(queue, user=pilot_user, token="secret"))
    assert isinstance(error, BrokerError)
    assert queue in str(error)


async def test_a_queue_that_may_not_be_read_is_named(broker: Rabbit, queue: str) -> None:
    broker.declare(queue)
    user = new_name("user")
    broker.server.add_user(user, "secret", configure="^$", write=".*", read="^$")
    with pytest.raises(ExceptionGroup) as caught:
        async with broker.source(queue, user=user, token="secret") as source, source.consume(1) as consumer:
            await take(consumer)
    (error,) = leaves(caught.value)
    assert isinstance(error, BrokerError)
    assert queue in str(error)


async def test_a_dead_letter_without_a_queue_is_a_file_that_a_warning_names(
    broker: Rabbit, queue: str, pilot_user: str, caplog: pytest.LogCaptureFixture
) -> None:
    await send(broker, queue, b"bad")
    async with broker.source(queue, user=pilot_user, token="secret") as source, source.consume(1) as consumer:
        await source.settle(await take(consumer), Settlement.DEAD_LETTER, "no good", "DecodeError")
    (letter,) = dead_letters.read(broker.directory, queue)
    assert letter.body == b"bad"
    expected = {"message_id": "id-0", "reason": "no good", "error": "DecodeError", "attempts": 1, "queue": queue}
    assert letter.facts.items() >= expected.items()
    (warning,) = (record.message for record in caplog.records if record.name == "trio_pilot")
    assert str(letter.path) in warning
    assert broker.server.counts(queue) == (0, 0)


async def test_a_dead_letter_that_cannot_be_stored_is_still_to_be_settled(
    broker: Rabbit, queue: str, pilot_user: str
) -> None:
    broker.directory = Path("/proc/none")
    await send(broker, queue, b"bad")
    async with broker.source(queue, user=pilot_user, token="secret") as source, source.consume(1) as consumer:
        for attempt in range(1, 4):
            delivery = await take(consumer)
            assert delivery.attempt == attempt
            with pytest.raises(NotSetAsideError, match=r"nothing lasting takes it .*queue: .*; directory: .*/proc/none"):
                await source.settle(delivery, Settlement.DEAD_LETTER, "no good")
            await nothing_comes(consumer)
            await source.settle(delivery, Settlement.REJECT)
        await source.settle(await take(consumer), Settlement.ACK)
    assert broker.server.counts(queue) == (0, 0)


async def test_no_dead_letter_goes_to_a_directory_that_ends_with_the_job(
    broker: Rabbit, queue: str, pilot_user: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("_CONDOR_SCRATCH_DIR", str(tmp_path))
    broker.directory = tmp_path / "letters"
    await send(broker, queue, b"bad")
    async with broker.source(queue, user=pilot_user, token="secret") as source, source.consume(1) as consumer:
        delivery = await take(consumer)
        with pytest.raises(NotSetAsideError, match="letters is removed with this job"):
            await source.settle(delivery, Settlement.DEAD_LETTER, "no good")
        await source.settle(delivery, Settlement.REJECT)
        assert (await take(consumer)).attempt == 2
    assert not broker.directory.exists()


async def test_a_user_who_may_only_read_returns_a_failed_event_uncounted(
    broker: Rabbit, queue: str, caplog: pytest.LogCaptureFixture
) -> None:
    user = new_name("user")
    broker.server.add_user(user, "secret", configure="^$", write="^$", read=".*")
    await send(broker, queue, b"bad")
    async with broker.source(queue, user=user, token="secret") as source, source.consume(1) as consumer:
        for _ in range(3):
            delivery = await take(consumer)
            assert delivery.attempt == 1
            await source.settle(delivery, Settlement.REJECT)
        await source.settle(await take(consumer), Settlement.ACK)
    assert "goes back without its count" in caplog.text


async def test_a_copy_of_a_failed_event_keeps_the_properties_of_its_sender(broker: Rabbit, queue: str) -> None:
    broker.declare(queue)
    sent = pika.BasicProperties(
        message_id="a", headers={"mine": "kept", "CC": [f"{queue}-other"]}, content_type="text/plain", user_id="guest"
    )
    with broker.channel() as channel:
        channel.basic_publish("", queue, b"body", sent)
    async with broker.source(queue) as source, source.consume(1) as consumer:
        await source.settle(await take(consumer), Settlement.REJECT)
    ((properties, body),) = broker.get_all(queue)
    assert (body, properties.message_id, properties.content_type) == (b"body", "a", "text/plain")
    assert (properties.delivery_mode, properties.user_id) == (2, None)
    properties.headers.pop("x-delivery-count", None)  # it may have been prefetched once more
    assert properties.headers == {"mine": "kept", "x-trio-pilot-failures": 1}


VERSIONS = ["rabbitmq", *(pytest.param(name, marks=pytest.mark.soak) for name in ("rabbitmq_trixie", "rabbitmq_sid"))]


@pytest.mark.parametrize("version", VERSIONS)
async def test_a_hundred_evictions_cost_no_attempt_even_with_a_delivery_limit(
    request: pytest.FixtureRequest, queue: str, version: str
) -> None:
    broker = Rabbit(request.getfixturevalue(version))
    with broker.channel() as channel:
        arguments = {"x-queue-type": "quorum", "x-delivery-limit": 20}  # the default from RabbitMQ 4.0 on
        channel.queue_declare(queue, durable=True, arguments=arguments)
    await send(broker, queue, b"a")
    for _ in range(100):
        async with broker.source(queue) as source, source.consume(1) as consumer:
            delivery = await take(consumer)
            assert delivery.attempt == 1
            await source.settle(delivery, Settlement.RELEASE)
    assert broker.ready(queue) == 1


@pytest.mark.parametrize("kind", ["classic", "quorum"])
async def test_an_existing_dead_letter_queue_is_used_without_declaring_it(
    broker: Rabbit, queue: str, pilot_user: str, kind: str
) -> None:
    broker.declare(dead_letter_queue(queue), kind)
    await send(broker, queue, b"bad")
    async with broker.source(queue, user=pilot_user, token="secret") as source, source.consume(1) as consumer:
        await source.settle(await take(consumer), Settlement.DEAD_LETTER, "no good")
    ((properties, body),) = broker.get_all(dead_letter_queue(queue))
    assert body == b"bad"
    assert properties.headers.items() >= {"x-trio-pilot-reason": "no good", "x-trio-pilot-attempts": 1}.items()
    assert broker.server.counts(queue) == (0, 0)


async def test_a_deleted_dead_letter_queue_is_declared_again(broker: Rabbit, queue: str) -> None:
    await send(broker, queue, b"a", b"b")
    async with broker.source(queue) as source, source.consume(1) as consumer:
        await source.settle(await take(consumer), Settlement.DEAD_LETTER, "one")
        with broker.channel() as channel:
            channel.queue_delete(dead_letter_queue(queue))
        await source.settle(await take(consumer), Settlement.DEAD_LETTER, "two")
        await nothing_comes(consumer)
    assert [(body, reason) for body, _, reason in broker.dead_letters(queue)] == [(b"b", "two")]


async def test_dead_letters_need_one_channel_however_many_there_are(broker: Rabbit, queue: str) -> None:
    await send(broker, queue, *[b"bad"] * 20)
    async with broker.source(queue) as source, source.consume(20) as consumer:
        for _ in range(20):
            await source.settle(await take(consumer), Settlement.DEAD_LETTER, "why")
        channels = broker.server.evaluate("length(rabbit_channel:list()).")
    assert int(channels) <= 2


@pytest.mark.parametrize(
    ("user", "token", "vhost", "says"),
    [
        ("guest", "wrong", "", "refuses the user and password"),
        ("nobody", "wrong", "", "refuses the user and password"),
        ("", "a.jwt.token", "", "refuses the user and password"),
        ("", "", "/no-such-vhost", "no-such-vhost"),
    ],
)
async def test_a_refusal_is_one_clear_line_at_once_and_names_no_secret(
    broker: Rabbit, user: str, token: str, vhost: str, says: str
) -> None:
    for queue in (
        broker.source("q", user=user, token=token, server=broker.server.address + vhost),
        broker.sink("q", user=user, token=token, server=broker.server.address + vhost),
    ):
        with trio.fail_after(5):
            error = await failure_of(queue)
        assert isinstance(error, BrokerError)
        assert says in str(error)
        assert not token or token not in str(error)
        assert "ConnectionClosedByBroker" not in str(error)


@pytest.mark.parametrize("size", [MAX_MESSAGE_SIZE + 1, MAX_MESSAGE_SIZE + 1_000_000])
async def test_a_message_too_large_is_refused_and_others_in_flight_arrive(broker: Rabbit, queue: str, size: int) -> None:
    outcomes: dict[int, str] = {}

    async with broker.sink(queue) as sink:
        await sink.ready()

        async def send(number: int, body: bytes) -> None:
            try:
                await sink.send(body, f"id-{number}")
                outcomes[number] = "sent"
            except PublishRefusedError:
                outcomes[number] = "refused"

        with trio.fail_after(LONG):
            async with trio.open_nursery() as nursery:
                for number in range(40):
                    nursery.start_soon(send, number, b"x" * (size if number == 20 else number))
    assert outcomes == {number: "refused" if number == 20 else "sent" for number in range(40)}
    # Those in flight may have been sent again: each arrives at least once.
    assert {len(body) for _, body in broker.get_all(queue)} == set(range(40)) - {20}


async def test_an_output_for_a_queue_deleted_meanwhile_is_not_lost(broker: Rabbit, queue: str) -> None:
    async with broker.sink(queue) as sink:
        await sink.send(b"a", "a")
        with broker.channel() as channel:
            channel.queue_delete(queue)
        with trio.fail_after(LONG):
            async with trio.open_nursery() as nursery:
                for number in range(10):
                    nursery.start_soon(sink.send, b"%d" % number, "the same id")
    assert {int(body) for _, body in broker.get_all(queue)} == set(range(10))


async def test_a_source_declares_its_deleted_queue_and_listens_again(broker: Rabbit, queue: str) -> None:
    await send(broker, queue, b"a")
    async with broker.source(queue) as source, source.consume(1) as consumer:
        stale = await take(consumer)
        with broker.channel() as channel:
            channel.queue_delete(queue)
        await eventually(lambda: source.has_lost(stale))
        with pytest.raises(DeliveryLostError):
            await source.settle(stale, Settlement.ACK)
        await send(broker, queue, b"b")
        delivery = await take(consumer)
        assert delivery.body == b"b"
        await source.settle(delivery, Settlement.ACK)


async def test_a_consumer_that_gets_none_of_the_messages_listens_anew(
    broker: Rabbit, queue: str, caplog: pytest.LogCaptureFixture
) -> None:
    broker.timeouts = RabbitTimeouts(look=0.2)
    await send(broker, queue, b"a")
    async with broker.source(queue) as source, source.consume(2) as consumer:
        delivery = await take(consumer)
        await delivery.tag.channel.call("basic_cancel", consumer.tags[0])  # type: ignore[attr-defined]
        await send(broker, queue, b"b")
        assert {(await take(consumer)).body, (await take(consumer)).body} == {b"a", b"b"}
    assert "has 1 message(s), and none comes" in caplog.text


async def test_a_queue_whose_messages_do_not_come_is_not_taken_for_idle(
    broker: Rabbit, queue: str, caplog: pytest.LogCaptureFixture
) -> None:
    await send(broker, queue, b"a")
    async with broker.source(queue) as source, source.consume(2) as consumer:
        delivery = await take(consumer)
        await delivery.tag.channel.call("basic_cancel", consumer.tags[0])  # type: ignore[attr-defined]
        assert await consumer.is_idle()
        await send(broker, queue, b"b")
        assert not await consumer.is_idle()
        assert {(await take(consumer)).body, (await take(consumer)).body} == {b"a", b"b"}
        assert await consumer.is_idle()  # with no room for more
    assert "has 1 message(s), and none comes" in caplog.text


@pytest.mark.parametrize("version", VERSIONS)
async def test_a_classic_queue_that_grants_no_lease_is_consumed_without(
    request: pytest.FixtureRequest, queue: str, version: str
) -> None:
    broker = Rabbit(request.getfixturevalue(version))
    broker.declare(queue, "classic")
    await send(broker, queue, b"a")
    async with broker.source(queue) as source, source.consume(1, 60) as consumer:
        await source.settle(await take(consumer), Settlement.ACK)


async def test_a_full_consumer_and_one_of_an_empty_queue_do_not_listen_anew(broker: Rabbit, queue: str) -> None:
    broker.timeouts = RabbitTimeouts(look=0.05)
    await send(broker, queue, b"a", b"b")
    async with broker.source(queue) as source, source.consume(1) as consumer:
        for _ in range(2):
            delivery = await take(consumer)
            await trio.sleep(0.5)
            await source.settle(delivery, Settlement.ACK)  # raises an error if its channel is closed
        await nothing_comes(consumer, 0.5)
        assert not source.has_lost(delivery)


async def test_after_the_server_closes_a_channel_its_events_come_again(broker: Rabbit, queue: str) -> None:
    await send(broker, queue, b"a", b"b")
    async with broker.source(queue) as source, source.consume(2) as consumer:
        first, second = await take(consumer), await take(consumer)
        # As after consumer_timeout: the connection stays up, the channel is gone, and pika raises nothing.
        await first.tag.channel.call("basic_ack", 4711)
        deliveries = [await take(consumer), await take(consumer)]
        assert {delivery.body for delivery in deliveries} == {b"a", b"b"}
        assert {(delivery.attempt, delivery.redelivered) for delivery in deliveries} == {(1, True)}
        for stale in (first, second):
            with pytest.raises(DeliveryLostError):
                await source.settle(stale, Settlement.ACK)
        for delivery in deliveries:
            await source.settle(delivery, Settlement.ACK)
    assert broker.server.counts(queue) == (0, 0)


async def test_a_message_without_an_id_is_known_by_its_body(broker: Rabbit, queue: str) -> None:
    broker.declare(queue)
    with broker.channel() as channel:
        for body in (b"a", b"a", b"b"):
            channel.basic_publish("", queue, body)
    async with broker.source(queue) as source, source.consume(3) as consumer:
        one, same, other = [await take(consumer) for _ in range(3)]
        assert one.message_id == same.message_id != other.message_id


async def test_any_message_id_can_be_sent(broker: Rabbit, queue: str) -> None:
    async with broker.sink(queue) as sink:
        with trio.fail_after(LONG):
            for message_id in ("x" * 1000, "é" * 200, "\udcff", ""):
                await sink.send(b"a", message_id)
    assert len(broker.get_all(queue)) == 4


async def test_a_heartbeat_is_kept_while_trio_is_busy(broker: Rabbit, queue: str) -> None:
    broker.timeouts = RabbitTimeouts(heartbeat=1)  # the server hangs up after two of silence
    await send(broker, queue, b"a")
    async with broker.source(queue) as source, source.consume(1) as consumer:
        delivery = await take(consumer)
        threading.Event().wait(4)  # blocks the Trio thread
        await source.settle(delivery, Settlement.ACK)
    assert broker.server.counts(queue) == (0, 0)


async def test_a_connection_is_closed_politely(broker: Rabbit, queue: str, pilot_user: str) -> None:
    await send(broker, queue, b"a")
    async with broker.source(queue, user=pilot_user, token="secret") as source, source.consume(1) as consumer:
        await take(consumer)

    def log_lines() -> list[str]:
        """Return the lines of the server's log about the connection of `pilot_user`."""
        lines = [line for log in (broker.server.directory / "log").iterdir() for line in log.read_text().splitlines()]
        connections = {line.split()[3] for line in lines if f"user '{pilot_user}' authenticated" in line}
        return [line for line in lines if connections & set(line.split()[3:4])]

    await eventually(lambda: any("closing AMQP connection" in line for line in log_lines()))
    assert not [line for line in log_lines() if "closed TCP connection" in line]


# Headers as their senders may have written them: each with the rest of a table that is fine.
HEADERS = {
    "timestamp in ms": b"T" + struct.pack(">Q", 1_700_000_000_000),
    "not a number": b"d" + struct.pack(">d", float("nan")),
    "nested": b"F" + with_length(nested_table(3000)),
    "unknown type": b"Z" + b"\0" * 8,
    "not UTF-8": b"S" + with_length(b"\xff\xfe"),
}


@pytest.mark.parametrize("kind", HEADERS)
async def test_a_header_that_cannot_be_read_is_left_out_alone(
    broker: Rabbit, queue: str, caplog: pytest.LogCaptureFixture, kind: str
) -> None:
    broker.declare(queue)
    table = short(b"before") + b"I\0\0\0\1" + short(b"odd") + HEADERS[kind]
    if kind != "unknown type":
        table += short(b"after") + b"S" + with_length(b"kept")
    properties = struct.pack(">H", 1 << 13 | 1 << 7) + with_length(table) + short(b"an id")
    if not publish_amqp(broker.server.port, queue, b"a", Encoded(properties)):
        assert kind in ("unknown type", "not a number")  # the server takes neither: nor can it deliver them
        return
    async with broker.source(queue) as source, source.consume(1) as consumer:
        for settlement in (Settlement.REJECT, Settlement.DEAD_LETTER):
            delivery = await take(consumer)
            assert (delivery.message_id, delivery.headers["before"], delivery.headers["after"]) == ("an id", 1, "kept")
            await source.settle(delivery, settlement, "bad", "Error")
    assert broker.dead_letters(queue) == [(b"a", "an id", "bad")]
    assert not [record for record in caplog.records if "connecting again" in record.message]


async def test_headers_that_do_not_fit_into_a_frame_are_not_copied(broker: Rabbit, queue: str) -> None:
    broker.declare(queue)
    large = {"a": "kept", "large": "x" * 130_500}
    with broker.channel() as channel:
        channel.basic_publish("", queue, b"a", pika.BasicProperties(message_id="a", headers=large, expiration="3600000"))
    async with broker.source(queue) as source, source.consume(1) as consumer:
        await source.settle(await take(consumer), Settlement.DEAD_LETTER, "é" * 4000, "Error")
    ((properties, _),) = broker.get_all(dead_letter_queue(queue))
    assert properties.headers["a"] == "kept"
    assert "large" not in properties.headers
    assert properties.headers["x-trio-pilot-reason"] == "é" * 4000
    assert properties.expiration is None


@pytest.mark.parametrize("failures", [2**63 - 1, -(2**63), "many", [1], True, None])
async def test_a_count_of_failures_that_a_sender_made_up_is_harmless(broker: Rabbit, queue: str, failures: object) -> None:
    broker.declare(queue)
    with broker.channel() as channel:
        channel.basic_publish("", queue, b"a", pika.BasicProperties(headers={"x-trio-pilot-failures": failures}))
    async with broker.source(queue) as source, source.consume(1) as consumer:
        for settlement in (Settlement.REJECT, Settlement.DEAD_LETTER):
            delivery = await take(consumer)
            assert delivery.attempt >= 1
            await source.settle(delivery, settlement, "bad", "Error")
    assert len(broker.get_all(dead_letter_queue(queue))) == 1


async def test_an_empty_id_is_none_and_bytes_are_escaped(broker: Rabbit, queue: str) -> None:
    broker.declare(queue)
    with broker.channel() as channel:
        for message_id in ("", b"\xff\xfe"):
            channel.basic_publish("", queue, b"a", pika.BasicProperties(message_id=message_id))
    async with broker.source(queue) as source, source.consume(2) as consumer:
        empty, odd = await take(consumer), await take(consumer)
        assert not empty.named
        assert odd.message_id == r"\xff\xfe"
        for delivery in (empty, odd):
            await source.settle(delivery, Settlement.DEAD_LETTER, "bad", "Error")


async def test_a_queue_that_was_deleted_begins_a_new_life(broker: Rabbit, queue: str) -> None:
    async with broker.sink(queue) as sink, broker.source(queue) as source, source.consume(1) as consumer:
        await sink.send(b"a", "a")
        first = await take(consumer)
        await source.settle(first, Settlement.ACK)
        with broker.channel() as channel:
            channel.queue_delete(queue)
        await eventually(lambda: source.has_lost(first))
        await sink.send(b"a", "a")
        second = await take(consumer)
        assert second.origin != first.origin
        await source.settle(second, Settlement.ACK)
