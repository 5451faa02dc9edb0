"""Measure messages per second from one quorum queue to another, confirmed and then acknowledged, without tasks.

`source and sink`: by the brokers' modules alone. `pilot`: by a pilot whose tasks are stubs, and so with their files.
"""

import time
from collections import deque
from collections.abc import Iterator
from dataclasses import dataclass

import trio

from bench.broker import Queues, RabbitServer, open_queues
from bench.figures import Figure
from bench.load import Load
from bench.measurement import print_progress, report
from bench.pilot import stub_pilot
from bench.report import Report
from trio_pilot.brokers import Delivery, QueueAddress, Settlement, Sink, open_sink, open_source
from trio_pilot.brokers.listening import next_delivery


@dataclass(frozen=True, slots=True)
class Plan:
    """The conditions to measure."""

    at_once: tuple[int, ...] = (1, 16, 64)  # messages between source and acknowledgement
    events: int = 3000
    rounds: int = 5


FULL = Plan()
QUICK = Plan(at_once=(16,), events=1500, rounds=1)

PATIENCE = 60.0  # seconds for the next message


def measure(plan: Plan, server: RabbitServer) -> Report:
    """Measure all of the plan."""
    return report("bridge", [figure for number in plan.at_once for figure in _figures(plan, server, number)], plan, server)


def _figures(plan: Plan, server: RabbitServer, at_once: int) -> Iterator[Figure]:
    load, start = Load(plan.events), stub_pilot({"max_concurrent_tasks": at_once})
    bridged, piloted = [], []
    for _ in range(plan.rounds):
        bridged.append(_bridged(load, server, at_once))
        piloted.append(load.done_by(start, server).rate)
    for what, samples in (("source and sink", bridged), ("pilot", piloted)):
        figure = Figure({"at once": at_once, "what": what}, "1/s", samples)
        print_progress(f"{dict(figure.labels)}: {figure.median:.0f}/s")
        yield figure


def _bridged(load: Load, server: RabbitServer, at_once: int) -> float:
    """Return the messages per second of a source and a sink."""
    with open_queues(server) as queues:
        queues.fill(load.bodies())
        seconds = trio.run(_pass_on, queues, load.events, at_once)
        load.check(queues)
    return load.events / seconds


async def _pass_on(queues: Queues, events: int, at_once: int) -> float:
    """Pass on so many messages; return the seconds from the first delivery to the last settlement."""
    incoming, outgoing = (QueueAddress(name, "rabbitmq", queues.address) for name in (queues.incoming, queues.outgoing))
    unsettled = trio.CapacityLimiter(at_once)
    async with open_sink(outgoing, lambda _: False) as sink, open_source(incoming, lambda _: False) as source:
        await sink.ready()
        async with source.consume(at_once) as consumer, trio.open_nursery() as nursery:
            consumers, started = deque([consumer]), 0.0
            for _ in range(events):
                delivery = await next_delivery(consumers, PATIENCE)
                assert delivery, f"no message for {PATIENCE:g} s"
                started = started or time.monotonic()
                await unsettled.acquire_on_behalf_of(delivery)
                nursery.start_soon(_pass_on_one, delivery, sink, unsettled)
        return time.monotonic() - started


async def _pass_on_one(delivery: Delivery, sink: Sink, unsettled: trio.CapacityLimiter) -> None:
    await sink.send(delivery.body, delivery.message_id)
    await delivery.source.settle(delivery, Settlement.ACK)
    unsettled.release_on_behalf_of(delivery)
