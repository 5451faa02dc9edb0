from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from pathlib import Path

import pytest
import trio
import trio.testing

from tests.support.sockets import serving
from trio_pilot.runtimes.engine_http import EngineConnections, NoConnectionError

ANSWER = b'HTTP/1.1 201 Created\r\nContent-Length: 9\r\n\r\n{"Id": 1}'
CHUNKED = b'HTTP/1.1 200 OK\r\nTransfer-Encoding: chunked\r\n\r\n3\r\n{"I\r\n6\r\nd": 1}\r\n0\r\n\r\n'
NONE = b"HTTP/1.1 204 No Content\r\n\r\n"
LAST = b"HTTP/1.1 200 OK\r\nConnection: close\r\nContent-Length: 0\r\n\r\n"
EARLY = b"HTTP/1.1 103 Early Hints\r\n\r\n"


class Server:
    """Answers each request with the next of its answers, and hangs up after so many."""

    def __init__(self, *answers: bytes, hangs_up_after: int | None = None) -> None:
        self.asked: list[tuple[int, bytes]] = []  # by which connection, and what
        self.ended = trio.Event()  # the first connection has
        self._answers = iter(answers)
        self._hangs_up_after = hangs_up_after
        self._opened = 0

    async def serve(self, stream: trio.SocketStream) -> None:
        self._opened += 1
        number = self._opened
        async with stream:
            while request := await stream.receive_some():
                self.asked.append((number, bytes(request)))
                await stream.send_all(next(self._answers))
                if len(self.asked) == self._hangs_up_after:
                    break
        self.ended.set()


@asynccontextmanager
async def talking_to(server: Server, directory: Path) -> AsyncIterator[EngineConnections]:
    connections = EngineConnections(directory / "socket")
    async with serving(server.serve, directory / "socket"):
        with trio.fail_after(10):
            yield connections
        connections.close()


async def test_one_connection_serves_one_request_after_the_other(tmp_path: Path) -> None:
    server = Server(ANSWER, CHUNKED, NONE, EARLY + ANSWER)
    async with talking_to(server, tmp_path) as connections:
        assert [await connections.ask("POST", f"/{each}", b"{}") for each in range(4)] == [
            (201, b'{"Id": 1}'),
            (200, b'{"Id": 1}'),
            (204, b""),
            (201, b'{"Id": 1}'),
        ]
    assert [number for number, _ in server.asked] == [1] * 4


async def test_a_request_comes_in_one_piece(tmp_path: Path) -> None:
    server = Server(ANSWER)
    async with talking_to(server, tmp_path) as connections:
        await connections.ask("POST", "/containers/create?name=a%2Cb", b'{"Image": "one"}')
    head, _, body = server.asked[0][1].partition(b"\r\n\r\n")
    assert head.splitlines()[0] == b"POST /containers/create?name=a%2Cb HTTP/1.1"
    assert {b"Content-Type: application/json", b"Content-Length: 16"} <= set(head.splitlines())
    assert body == b'{"Image": "one"}'


async def test_concurrent_requests_have_a_connection_each(tmp_path: Path) -> None:
    server = Server(*[ANSWER] * 6)
    async with talking_to(server, tmp_path) as connections:
        for _ in range(2):
            async with trio.open_nursery() as nursery:
                for _ in range(3):
                    nursery.start_soon(connections.ask, "GET", "/", b"")
    assert sorted(number for number, _ in server.asked) == [1, 1, 2, 2, 3, 3]


async def test_a_connection_that_was_closed_meanwhile_is_replaced(tmp_path: Path) -> None:
    server = Server(ANSWER, ANSWER, hangs_up_after=1)
    async with talking_to(server, tmp_path) as connections:
        await connections.ask("GET", "/", b"")
        await server.ended.wait()
        assert await connections.ask("GET", "/", b"") == (201, b'{"Id": 1}')
    assert [number for number, _ in server.asked] == [1, 2]


async def test_a_connection_that_the_engine_wants_to_close_is_closed(tmp_path: Path) -> None:
    server = Server(LAST, ANSWER)
    async with talking_to(server, tmp_path) as connections:
        assert await connections.ask("GET", "/", b"") == (200, b"")
        await server.ended.wait()
        assert await connections.ask("GET", "/", b"") == (201, b'{"Id": 1}')


@pytest.mark.parametrize(
    ("answer", "error"),
    [
        (b"", "the engine closed the connection without an answer"),
        (ANSWER[:20], "the engine closed the connection without an answer"),
        (ANSWER[:-1], "peer closed connection without sending complete message body"),
        (CHUNKED[:-4], "peer unexpectedly closed connection"),
        (b"SSH-2.0-OpenSSH_9.2\r\n\r\n", "illegal status line"),
    ],
)
async def test_an_answer_that_is_cut_off_or_not_http_is_a_lost_connection(tmp_path: Path, answer: bytes, error: str) -> None:
    async with talking_to(Server(answer, ANSWER, hangs_up_after=1), tmp_path) as connections:
        with pytest.raises(trio.BrokenResourceError, match=error):
            await connections.ask("GET", "/", b"")
        assert (await connections.ask("GET", "/", b""))[0] == 201


@pytest.mark.parametrize("answer", [b"", ANSWER[:-1]])
async def test_a_cancelled_request_closes_its_connection(tmp_path: Path, answer: bytes) -> None:
    server = Server(answer)
    async with talking_to(server, tmp_path) as connections:
        async with trio.open_nursery() as nursery:
            nursery.start_soon(connections.ask, "POST", "/", b"")
            await trio.testing.wait_all_tasks_blocked(0.01)
            assert server.asked
            nursery.cancel_scope.cancel()
        await server.ended.wait()


async def test_a_socket_without_a_server_is_an_error(tmp_path: Path) -> None:
    with pytest.raises(NoConnectionError, match="No such file"):
        await EngineConnections(tmp_path / "socket").ask("GET", "/", b"")
