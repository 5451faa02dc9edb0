"""Servers that tests need: each on free ports, with a directory of its own, and killed when it is left."""

from tests.support.servers.debian_packages import debian, mirror, need
from tests.support.servers.nats_server import NATS_USERS, NatsServer, nats
from tests.support.servers.rabbitmq_server import ERLANG_FLAGS, RabbitServer, rabbitmq
from tests.support.servers.server import (
    IN_NAMESPACE,
    MAX_MESSAGE_SIZE,
    RUNNING,
    UnavailableError,
    end_namespace,
    free_port,
    last_words,
    running,
)

__all__ = [
    "ERLANG_FLAGS",
    "IN_NAMESPACE",
    "MAX_MESSAGE_SIZE",
    "NATS_USERS",
    "RUNNING",
    "NatsServer",
    "RabbitServer",
    "UnavailableError",
    "debian",
    "end_namespace",
    "free_port",
    "last_words",
    "mirror",
    "nats",
    "need",
    "rabbitmq",
    "running",
]
