"""The HTTP API of a container engine, over its Unix socket. No other module uses httpx."""

import json
from collections.abc import AsyncGenerator, AsyncIterator, Callable, Collection, Iterator, Mapping
from contextlib import aclosing, asynccontextmanager, contextmanager
from dataclasses import dataclass
from pathlib import Path
from types import TracebackType
from typing import Any, Self, TypeVar, cast
from urllib.parse import urlencode

import httpx
import trio

from trio_pilot.errors import NodeError, map_exceptions
from trio_pilot.runtimes.engine_http import HOST, EngineConnections, NoConnectionError
from trio_pilot.runtimes.engine_timeouts import DEFAULT_TIMEOUTS, EngineTimeouts

SHOWN = 1000  # characters of an engine's answer in an error

# Errors while an answer is read that is not JSON, or not of the expected form.
UNREADABLE = (ValueError, TypeError, AttributeError, LookupError)

T = TypeVar("T")


class EngineAwayError(NodeError):
    """The engine cannot be reached, or closed the connection: whether it executed the request is unknown."""


class EngineUnreachableError(EngineAwayError):
    """No connection to the engine could be made: the request was not sent."""


class EngineSlowError(EngineAwayError):
    """The engine did not answer in time; it may still execute the request."""


class EngineRefusedError(NodeError):
    """The engine answered with an error."""

    def __init__(self, text: str, status: int, message: str) -> None:
        super().__init__(f"{text}: {message}")
        self.status = status
        self.message = message


@dataclass(frozen=True, slots=True)
class Answer:
    """An engine's answer to a request."""

    status: int
    content: bytes

    def read(self, find: Callable[[Any], T]) -> T:
        """Return what `find` finds in the answer's JSON; raise NodeError if it is not JSON, or lacks that."""
        text = f"the engine's answer is not as expected: {self.content[:SHOWN]!r}"
        with map_exceptions(dict.fromkeys(UNREADABLE, NodeError), text):
            return find(json.loads(self.content))


class EngineApi:
    """A client of one engine."""

    def __init__(self, name: str, socket: Path, timeouts: EngineTimeouts = DEFAULT_TIMEOUTS) -> None:
        self.name = name
        self.socket = socket
        self.timeouts = timeouts
        self.prefix = ""  # of all paths: the version of the API in use
        self._connections = EngineConnections(socket)
        self._client = _client(socket)

    async def __aenter__(self) -> Self:
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        self._connections.close()
        await self._client.aclose()

    async def ping(self) -> Mapping[str, str]:
        """Check that the engine answers on a new connection; return the headers of its answer.

        The connection has to be new: an engine that is shutting down still answers on the old ones.

        Raises:
            EngineAwayError: it does not answer.
            EngineRefusedError: it answers with an error.
        """
        with self._mapped_errors("answer"), trio.fail_after(self.timeouts.ping):
            response = await self._client.handle_async_request(_request("GET", "/_ping"))
            answer = Answer(response.status_code, await response.aread())
        self._check(answer, "answer", ())
        return response.headers

    async def call(
        self,
        request: str,
        what: str,
        *,
        body: Any = None,
        seconds: float | None = None,
        accepted: Collection[int] = (),
        **params: Any,
    ) -> Answer:
        """Send a request and return the answer.

        Args:
            request: the HTTP method and, after a space, the path below the version of the API.
            what: what the engine is asked to do, for error messages.
            body: the body; all but bytes is sent as JSON.
            seconds: the time limit; None for that of all requests.
            accepted: status codes that are no error, besides 2xx and 3xx.
            params: the query.

        Raises:
            EngineRefusedError: the engine answers with an error.
            EngineSlowError: the engine does not answer in time.
            EngineAwayError: the engine is not there, or the connection was lost.
        """
        method, _, path = request.partition(" ")
        target = self.prefix + path + (f"?{urlencode(params)}" if params else "")
        with self._mapped_errors(what), trio.fail_after(self.timeouts.request if seconds is None else seconds):
            answer = Answer(*await self._connections.ask(method, target, body if isinstance(body, bytes) else _json(body)))
        self._check(answer, what, accepted)
        return answer

    @asynccontextmanager
    async def stream(
        self, method: str, path: str, what: str, /, *, headers: Mapping[str, str] | None = None, **params: Any
    ) -> AsyncIterator[AsyncIterator[bytes]]:
        """Send a request with a long answer, and yield the answer in pieces. The caller sets a deadline.

        Raises:
            EngineRefusedError: the engine answers with an error.
            EngineAwayError: the engine is not there, or the connection was lost.
        """
        with self._mapped_errors(what):
            response = await self._client.handle_async_request(_request(method, path, params=params, headers=headers))
            async with aclosing(response):
                if response.status_code >= 400:
                    self._check(Answer(response.status_code, await response.aread()), what, ())
                async with aclosing(cast(AsyncGenerator[bytes], response.aiter_raw())) as pieces:
                    yield pieces

    def _check(self, answer: Answer, what: str, accepted: Collection[int]) -> None:
        if answer.status >= 400 and answer.status not in accepted:
            raise EngineRefusedError(f"{self.name} could not {what}", answer.status, _message(answer))

    @contextmanager
    def _mapped_errors(self, what: str) -> Iterator[None]:
        text = f"{self.name} at {self.socket} did not {what}"
        mapping: dict[type[Exception], type[NodeError]] = {
            httpx.ConnectError: EngineUnreachableError,
            NoConnectionError: EngineUnreachableError,
            httpx.HTTPError: EngineAwayError,
            trio.BrokenResourceError: EngineAwayError,
        }
        with map_exceptions(mapping, text), map_exceptions({trio.TooSlowError: EngineSlowError}, f"{text} in time"):
            yield


def _client(socket: Path) -> httpx.AsyncHTTPTransport:
    """Return the transport for long answers, each on a connection of its own. Callers set the timeouts.

    It is the transport of httpx without its client: no engine uses redirects, cookies and the like.
    """
    limits = httpx.Limits(max_connections=None, max_keepalive_connections=0)
    return httpx.AsyncHTTPTransport(uds=str(socket), verify=False, limits=limits)  # nothing is encrypted


def _request(method: str, path: str, **more: Any) -> httpx.Request:
    return httpx.Request(method, f"http://{HOST}{path}", **more)


def _json(body: Any) -> bytes:
    """Return a body as JSON, or nothing for None. Go would read an escaped half of a surrogate pair as a question mark."""
    with map_exceptions({UnicodeEncodeError: NodeError}, "arguments and variables must be UTF-8 for an engine"):
        return b"" if body is None else json.dumps(body, ensure_ascii=False).encode()


def _message(answer: Answer) -> str:
    try:
        message = json.loads(answer.content)["message"]
    except (ValueError, KeyError, TypeError):
        message = answer.content.decode(errors="replace")
    return str(message).strip()[:SHOWN] or f"status {answer.status} without a message"
