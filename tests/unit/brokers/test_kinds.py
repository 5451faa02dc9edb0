from collections import Counter

import pytest

from trio_pilot.brokers.kinds import KINDS, SCHEMES, BrokerKind, kind_of
from trio_pilot.errors import SettingsError


@pytest.mark.parametrize("kind", KINDS.values(), ids=lambda kind: kind.name)
def test_a_kind_has_a_module_that_opens_queues(kind: BrokerKind) -> None:
    module = kind.load()
    assert callable(module.open_source)
    assert callable(module.open_sink)


def test_each_scheme_is_of_one_kind() -> None:
    schemes = Counter(scheme for kind in KINDS.values() for scheme in kind.schemes)
    assert set(schemes.values()) == {1}
    assert {scheme: kind_of(f"{scheme.upper()}://host") for scheme in schemes} == SCHEMES


@pytest.mark.parametrize(
    ("address", "name"),
    [("", "local"), ("~/queues", "local"), ("queues.db", "local"), ("host", "rabbitmq"), ("nats://host", "nats")],
)
def test_an_address_tells_the_kind_of_its_broker(address: str, name: str) -> None:
    assert kind_of(address).name == name


def test_an_unknown_scheme_is_refused_with_those_that_are_known() -> None:
    with pytest.raises(SettingsError, match=r"must begin with amqp://, nats:// or pulsar://, .*, not begin with kafka://"):
        kind_of("Kafka://host")
