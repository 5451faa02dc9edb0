"""Servers at Unix sockets."""

from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import asynccontextmanager
from pathlib import Path

import trio


@asynccontextmanager
async def serving(serve: Callable[[trio.SocketStream], Awaitable[object]], path: Path) -> AsyncIterator[None]:
    """Serve connections to a Unix socket until the end of the body."""
    listener = trio.socket.socket(trio.socket.AF_UNIX)
    await listener.bind(str(path))
    listener.listen(100)
    async with trio.open_nursery() as nursery:
        nursery.start_soon(trio.serve_listeners, serve, [trio.SocketListener(listener)])
        yield
        nursery.cancel_scope.cancel()
