"""What sources and sinks of RabbitMQ share: the address of a queue, its connection, how it is found."""

from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from dataclasses import replace
from datetime import UTC, datetime
from time import time
from urllib.parse import unquote

import trio
from trio_util import move_on_when

from trio_pilot.brokers import Patience, QueueAddress, addresses, tokens
from trio_pilot.brokers.kinds import RABBITMQ
from trio_pilot.brokers.rabbitmq_channel import RabbitChannel, open_channel
from trio_pilot.brokers.rabbitmq_connection import RabbitAddress, RabbitConnection, RabbitTimeouts
from trio_pilot.brokers.rabbitmq_errors import ACCESS_REFUSED, NOT_FOUND, PRECONDITION_FAILED, ClosedError
from trio_pilot.brokers.reconnecting import ConnectError, ReconnectingQueue
from trio_pilot.brokers.thread_bridge import driven
from trio_pilot.errors import BrokerError, SettingsError

QUORUM = {"x-queue-type": "quorum"}  # as EWMS declares its queues; with any other argument that would fail


class RabbitQueue(ReconnectingQueue[RabbitChannel]):
    """A queue, and the channel to it while there is one."""

    def __init__(self, address: QueueAddress, patience: Patience, timeouts: RabbitTimeouts) -> None:
        self._address = parse_address(address)
        self._token = address.token
        self._batch = max(1, address.spare // 2)  # half of them may wait to be sent as outputs, and half to be settled
        self._timeouts = timeouts
        super().__init__(address, f"RabbitMQ at {self._address.host}", patience, timeouts)

    @asynccontextmanager
    async def connect(self, threads: trio.Nursery) -> AsyncIterator[RabbitChannel]:
        """Connect, find the queue, and open a channel. Each new token is sent to the server."""
        token = self._token
        try:
            token = await tokens.current(self._token)
            address = replace(self._address, password=token) if token else self._address
            async with driven(RabbitConnection(address, self._timeouts, self._batch), threads) as connection:
                if tokens.is_file(self._token):
                    threads.start_soon(self._keep_token, connection, token)
                yield await self._open(connection)
        except BrokerError as error:
            text = f"{error}{_expired(token)}"
            raise ConnectError(text) if tokens.is_file(self._token) else BrokerError(text) from error

    async def _keep_token(self, connection: RabbitConnection, token: str) -> None:
        """Send each new token to the server; if the server does not take it on this connection, connect anew with it."""
        async with move_on_when(connection.ended.wait):
            while True:
                token = await tokens.changed(self._token, token)
                try:
                    await connection.update_secret(token)
                except ClosedError:
                    connection.hang_up()

    async def _open(self, connection: RabbitConnection) -> RabbitChannel:
        return await find(connection, self.name)


def _expired(token: str) -> str:
    end = tokens.expiry(token)
    return f"; the token expired at {datetime.fromtimestamp(end, UTC):%Y-%m-%d %H:%M:%S} UTC" if end and end < time() else ""


async def find(connection: RabbitConnection, queue: str) -> RabbitChannel:
    """Declare a queue, or use it as it is where it exists and may not be declared; return the channel.

    Raises:
        BrokerError: the queue does not exist, or the user may not use it.
    """
    channel = await open_channel(connection)
    try:
        await channel.ask("queue_declare", queue, durable=True, arguments=QUORUM)
    except ClosedError as error:
        if error.code not in (ACCESS_REFUSED, PRECONDITION_FAILED):
            raise
        channel = await _find_passively(connection, queue)
    return channel


async def find_existing(connection: RabbitConnection, queue: str) -> RabbitChannel:
    """Find a queue that exists, and declare none; return the channel. Raises ClosedError."""
    channel = await open_channel(connection)
    await channel.ask("queue_declare", queue, passive=True)
    return channel


async def _find_passively(connection: RabbitConnection, queue: str) -> RabbitChannel:
    try:
        return await find_existing(connection, queue)
    except ClosedError as error:
        if error.code in (ACCESS_REFUSED, NOT_FOUND):
            raise BrokerError(f"does not let the pilot use the queue {queue}: {error}") from error
        raise


async def find_for_sending(connection: RabbitConnection, queue: str) -> RabbitChannel:
    """Find a queue as `find` does; return a channel on which messages are confirmed."""
    channel = await find(connection, queue)
    await channel.confirm_publishes()
    return channel


def parse_address(address: QueueAddress) -> RabbitAddress:
    """Read `[amqp[s]://][USER[:PASS]@]HOST[:PORT][/VHOST]`; the token replaces the password.

    Raises:
        SettingsError: the address is not of that form, or has a user and no password.
    """
    parts, host, port = addresses.split(address.address, RABBITMQ, _wrong_address)
    user, password = unquote(parts.username or ""), address.token or unquote(parts.password or "")
    if user and not password:
        raise SettingsError(f"the broker address names the user {user!r}, but there is no password and no token")
    virtual_host = unquote(parts.path.lstrip("/")) or "/"
    return RabbitAddress(host, port, virtual_host, user, password, parts.scheme == "amqps")


def _wrong_address(found: str) -> SettingsError:
    return SettingsError(f"a RabbitMQ address must be [amqp[s]://][USER[:PASS]@]HOST[:PORT][/VHOST], but has {found}")
