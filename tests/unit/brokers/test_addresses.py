from typing import Any

import pytest

from trio_pilot.brokers import QueueAddress, nats, rabbitmq_queue
from trio_pilot.errors import SettingsError


@pytest.mark.parametrize("module", [rabbitmq_queue, nats])
@pytest.mark.parametrize(
    "address",
    ["{}icecube:s3cret/Pass@host:5672", "{}icecube:s3cret#Pass@host", "{}icecube:12?s3cret@host", "{}s3cret/Pass@host"],
)
def test_a_password_that_breaks_its_address_is_not_shown(module: Any, address: str) -> None:
    scheme = "nats://" if module is nats else "amqp://"
    with pytest.raises(SettingsError, match="%2F") as told:
        module.parse_address(QueueAddress("queue", "", address.format(scheme)))
    assert not any(piece in str(told.value) for piece in ("s3cret", "Pass", "12"))
