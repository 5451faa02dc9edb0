"""A server between a pilot and an engine that delays or loses requests and answers."""

import re
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from dataclasses import dataclass, field
from pathlib import Path

import trio

from tests.support.sockets import serving

NOTHING = b"HTTP/1.1 200 OK\r\nContent-Length: 2\r\n\r\n[]"
FAILURE = b'HTTP/1.1 500 Internal Server Error\r\nContent-Length: 22\r\n\r\n{"message": "no more"}'
REQUEST_LINE = re.compile(rb"^(GET|POST|DELETE) (\S+) HTTP/1.1\r\n")


@dataclass(eq=False)
class Fault:
    """A fault of the next request that matches a pattern, `METHOD PATH?QUERY`, or of its answer."""

    pattern: str
    # fail: when released, the answer is an error; lose: the answer is lost; hold: the answer waits until released;
    # late: the request waits until released; nothing: the answer is an empty list
    how: str
    begun: trio.Event = field(default_factory=trio.Event)
    release: trio.Event = field(default_factory=trio.Event)


class EngineProxy:
    """Forwards connections to the socket of an engine."""

    def __init__(self, target: Path, socket: Path) -> None:
        self.socket = socket
        self.is_patient = False  # keeps connections until an engine accepts them
        self.refused = 0  # connections, because there was no engine
        self.requests: list[str] = []
        self._target = target
        self._faults: list[Fault] = []

    def next(self, pattern: str, how: str) -> Fault:
        """Cause a fault of the next request that matches a pattern."""
        self._faults.append(fault := Fault(pattern, how))
        return fault

    def count(self, start: str) -> int:
        """Return the number of requests that begin like this."""
        return sum(request.startswith(start) for request in self.requests)

    def has_had(self, pattern: str) -> bool:
        """Return whether there was a request that matches a pattern."""
        return any(re.search(pattern, request) for request in self.requests)

    async def forward(self, client: trio.SocketStream) -> None:
        try:
            server = await self._connect()
        except OSError:
            self.refused += 1
            client.socket.close()
            return
        connection = _Connection(self, client, server)
        try:
            async with trio.open_nursery() as nursery:
                nursery.start_soon(connection.up, nursery.cancel_scope)
                nursery.start_soon(connection.down, nursery.cancel_scope)
        finally:
            client.socket.close()
            server.socket.close()

    async def _connect(self) -> trio.SocketStream:
        while True:
            try:
                return await trio.open_unix_socket(self._target)
            except OSError:
                if not self.is_patient:
                    raise
                await trio.sleep(0.05)

    def fault_of(self, data: bytes | bytearray) -> Fault | None:
        found = REQUEST_LINE.match(data)
        if not found:
            return None
        request = f"{found[1].decode()} {found[2].decode()}"
        self.requests.append(request)
        for fault in self._faults:
            if re.search(fault.pattern, request):
                self._faults.remove(fault)
                return fault
        return None


class _Connection:
    def __init__(self, proxy: EngineProxy, client: trio.SocketStream, server: trio.SocketStream) -> None:
        self._proxy = proxy
        self._client = client
        self._server = server
        self._fault: Fault | None = None

    async def up(self, both: trio.CancelScope) -> None:
        try:
            async for data in self._client:
                self._fault = self._proxy.fault_of(data) or self._fault
                if self._fault and self._fault.how in ("late", "fail"):
                    await self._be_late(self._fault)
                if self._fault and self._fault.how == "fail":
                    await self._client.send_all(FAILURE)
                    break
                await self._server.send_all(data)
        except (trio.BrokenResourceError, trio.ClosedResourceError):
            pass
        if not (self._fault and self._fault.how == "late"):
            both.cancel()

    async def down(self, both: trio.CancelScope) -> None:
        try:
            async for data in self._server:
                fault, self._fault = self._fault, None
                if fault and fault.how in ("lose", "hold"):
                    fault.begun.set()
                    if fault.how == "lose":
                        break
                    await fault.release.wait()
                if fault and fault.how == "nothing":
                    await self._client.send_all(NOTHING)
                    break
                await self._client.send_all(data)
        except (trio.BrokenResourceError, trio.ClosedResourceError):
            pass
        both.cancel()

    async def _be_late(self, fault: Fault) -> None:
        fault.begun.set()
        await fault.release.wait()


@asynccontextmanager
async def engine_proxy(target: Path, directory: Path) -> AsyncIterator[EngineProxy]:
    proxy = EngineProxy(target, directory / "proxy.sock")
    async with serving(proxy.forward, proxy.socket):
        yield proxy
