"""A TCP forwarder with faults, and servers that are not brokers."""

import socket
import struct
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import asynccontextmanager

import trio


class Proxy:
    """Forwards connections to a port; they can be cut, delayed or silenced, and new ones refused."""

    def __init__(self, target: int, port: int) -> None:
        self.port = port
        self.refusing = False
        self.delay = 0.0  # seconds for which data is delayed
        self.swallowing = False  # data of all connections, open and new, is dropped
        self.accepted = 0
        self.forwarded = 0  # pieces of data, either way
        self._target = target
        self._open: set[trio.SocketStream] = set()
        self._servers: set[trio.SocketStream] = set()
        self._half_open: set[trio.SocketStream] = set()

    @property
    def address(self) -> str:
        return f"127.0.0.1:{self.port}"

    def cut(self) -> None:
        """Close every connection, to both ends."""
        for stream in list(self._open):
            stream.socket.close()

    def reset(self) -> None:
        """Reset every connection, as a machine does that was restarted."""
        for stream in self._open:
            stream.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
        self.cut()

    def half_open(self) -> None:
        """Close every connection to the server only; the clients do not notice."""
        self._half_open |= self._servers
        for stream in list(self._servers):
            stream.socket.close()

    async def forward(self, client: trio.SocketStream) -> None:
        self.accepted += 1
        if self.refusing:
            await client.aclose()
            return
        server = await trio.open_tcp_stream("127.0.0.1", self._target)
        self._open |= {client, server}
        self._servers.add(server)
        try:
            async with trio.open_nursery() as nursery:
                nursery.start_soon(self._pump, client, server, nursery.cancel_scope)
                nursery.start_soon(self._pump, server, client, nursery.cancel_scope)
        finally:
            self._open -= {client, server}
            self._servers.discard(server)
            client.socket.close()
            server.socket.close()

    async def _pump(self, source: trio.SocketStream, sink: trio.SocketStream, both: trio.CancelScope) -> None:
        try:
            async for data in source:
                self.forwarded += 1
                if not self.swallowing and sink not in self._half_open:
                    await trio.sleep(self.delay)
                    await sink.send_all(data)
        except (trio.BrokenResourceError, trio.ClosedResourceError):
            pass
        if not {source, sink} & self._half_open:
            both.cancel()


@asynccontextmanager
async def proxy(target: int) -> AsyncIterator[Proxy]:
    async with trio.open_nursery() as nursery:
        (listener,) = await trio.open_tcp_listeners(0, host="127.0.0.1")
        forwarder = Proxy(target, listener.socket.getsockname()[1])
        nursery.start_soon(trio.serve_listeners, forwarder.forward, [listener])
        yield forwarder
        nursery.cancel_scope.cancel()


@asynccontextmanager
async def server(handler: Callable[[trio.SocketStream], Awaitable[None]]) -> AsyncIterator[str]:
    """Run a server that is not a broker, and yield its address."""
    async with trio.open_nursery() as nursery:
        (listener,) = await trio.open_tcp_listeners(0, host="127.0.0.1")
        nursery.start_soon(trio.serve_listeners, handler, [listener])
        yield f"127.0.0.1:{listener.socket.getsockname()[1]}"
        nursery.cancel_scope.cancel()


async def silence(stream: trio.SocketStream) -> None:
    """Accept a connection, and never answer."""
    async with stream:
        await trio.sleep_forever()


async def hang_up(stream: trio.SocketStream) -> None:
    """Accept a connection and close it, as a load balancer does in front of a broker that is down."""
    await stream.aclose()


async def speak_http(stream: trio.SocketStream) -> None:
    """Answer as a web server does."""
    async with stream:
        await stream.receive_some()
        await stream.send_all(b"HTTP/1.1 400 Bad Request\r\nConnection: close\r\n\r\n")


async def speak_ssh(stream: trio.SocketStream) -> None:
    """Greet as an SSH server does, and wait."""
    async with stream:
        await stream.send_all(b"SSH-2.0-OpenSSH_9.2\r\n")
        await trio.sleep_forever()


async def speak_amqp_1(stream: trio.SocketStream) -> None:
    """Answer as a server of another AMQP version does: with that version, then hang up."""
    async with stream:
        await stream.receive_some()
        await stream.send_all(b"AMQP\x00\x01\x00\x00")
