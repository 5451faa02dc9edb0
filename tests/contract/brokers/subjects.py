"""The brokers that the contract is tested with. A new broker is one more entry in SUBJECTS."""

import os
from collections.abc import Callable
from pathlib import Path

import pytest

from tests.contract.brokers.toy import Toy
from tests.support.brokers import Broker, Fake, Local, Nats, Pulsar, Rabbit

PULSAR = os.environ.get("TRIO_PILOT_TEST_PULSAR", "")  # the address of a broker that the tests may fill with topics

Make = Callable[[pytest.FixtureRequest, Path], Broker]


def rabbit(server: str, spare: int = 0) -> Make:
    return lambda request, _directory: Rabbit(request.getfixturevalue(server), spare=spare)


SUBJECTS: dict[str, Make] = {
    "fake": lambda _request, _directory: Fake(),
    "toy": lambda _request, _directory: Toy(),
    "local": lambda _request, directory: Local(directory / "queues.sqlite"),
    "rabbitmq": rabbit("rabbitmq"),
    "rabbitmq_batches": rabbit("rabbitmq", spare=16),
    "nats": lambda request, _directory: Nats(request.getfixturevalue("nats")),
    "pulsar_stand_in": lambda request, directory: Pulsar(request.getfixturevalue("pulsar_stand_in").address, directory),
    **({"pulsar": lambda _request, directory: Pulsar(PULSAR, directory)} if PULSAR else {}),
    "rabbitmq_trixie": rabbit("rabbitmq_trixie"),
    "rabbitmq_sid": rabbit("rabbitmq_sid"),
}
SOAK = {"rabbitmq_trixie", "rabbitmq_sid"}
BY_TCP = ["rabbitmq", "nats"]  # those that tests can reach by a proxy

PARAMETERS = [pytest.param(name, marks=pytest.mark.soak if name in SOAK else ()) for name in SUBJECTS]
