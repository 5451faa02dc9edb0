"""The seam to a container engine: its HTTP API, over the Unix socket. Nobody else knows of httpx."""

import json
from collections.abc import AsyncGenerator, AsyncIterator, Callable, Collection, Iterator, Mapping
from contextlib import aclosing, asynccontextmanager, contextmanager
from dataclasses import dataclass
from pathlib import Path
from types import TracebackType
from typing import Any, Self, TypeVar, cast

import httpx
import trio

from trio_pilot.errors import NodeError, map_exceptions

REQUEST_TIMEOUT = 60.0  # seconds; an engine that starts a hundred containers at once takes its time for each
PING_TIMEOUT = 3.0
SHOWN = 1000  # characters of what an engine says in an error

HOST = "http://engine"  # which any name will do for
JSON = {"Content-Type": "application/json"}

# What goes wrong as an answer is read, if it is no JSON, or other than it should be.
UNREADABLE = (ValueError, TypeError, AttributeError, LookupError)

T = TypeVar("T")


class EngineAwayError(NodeError):
    """The engine cannot be reached, or hung up: nobody knows what became of the request."""


class EngineUnreachableError(EngineAwayError):
    """There is no connection: nothing has become of the request."""


class EngineSlowError(EngineAwayError):
    """The engine has not answered in time; it may yet."""


class EngineRefusedError(NodeError):
    """The engine has answered, and not as we would like."""

    def __init__(self, text: str, status: int, said: str) -> None:
        super().__init__(f"{text}: {said}")
        self.status = status
        self.said = said


@dataclass(frozen=True, slots=True)
class Answer:
    """What an engine says."""

    status: int
    headers: Mapping[str, str]
    content: bytes

    def read(self, find: Callable[[Any], T]) -> T:
        """Find something in what it says as JSON; raises NodeError if it is none, or has no such thing."""
        text = f"the engine does not speak as it should: it says {self.content[:SHOWN]!r}"
        with map_exceptions(dict.fromkeys(UNREADABLE, NodeError), text):
            return find(json.loads(self.content))


class EngineApi:
    """A connection to an engine."""

    def __init__(self, name: str, socket: Path) -> None:
        self.name = name
        self.socket = socket
        self.prefix = ""  # of all paths: the version of the API that is spoken
        self._connections = _connections(socket, kept=None)
        # An engine that is being stopped still answers on the connections that it has.
        self._pinger = _connections(socket, kept=0)

    async def __aenter__(self) -> Self:
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        await self._connections.aclose()
        await self._pinger.aclose()

    async def ping(self) -> Answer:
        """Ask whether it is there, and takes new connections. Raises EngineAwayError."""
        return await self._request(self._pinger, "GET", "/_ping", "answer", seconds=PING_TIMEOUT)

    async def call(
        self,
        method: str,
        path: str,
        what: str,
        *,
        body: Any = None,
        seconds: float = REQUEST_TIMEOUT,
        accepted: Collection[int] = (),
        **params: Any,
    ) -> Answer:
        """Ask the engine to do `what`.

        Args:
            method: of HTTP.
            path: below the version of the API.
            what: in words, for people.
            body: is sent as JSON.
            seconds: it may take.
            accepted: status codes that are no error, beside 2xx and 3xx.
            params: of the query.

        Raises:
            EngineRefusedError: it says no.
            EngineSlowError: it says nothing in time.
            EngineAwayError: it is not there, or the connection was lost.
        """
        return await self._request(
            self._connections, method, self.prefix + path, what, body=body, seconds=seconds, accepted=accepted, params=params
        )

    async def _request(
        self,
        connections: httpx.AsyncHTTPTransport,
        method: str,
        path: str,
        what: str,
        *,
        body: Any = None,
        seconds: float,
        accepted: Collection[int] = (),
        params: Mapping[str, Any] | None = None,
    ) -> Answer:
        with self._seam(what), trio.fail_after(seconds):
            request = httpx.Request(method, HOST + path, params=params, content=_json(body), headers=JSON)
            said = await connections.handle_async_request(request)
            answer = Answer(said.status_code, said.headers, await said.aread())
        self._check(answer, what, accepted)
        return answer

    @asynccontextmanager
    async def stream(
        self, method: str, path: str, what: str, *, headers: Mapping[str, str] | None = None, **params: Any
    ) -> AsyncIterator[AsyncIterator[bytes]]:
        """Ask the engine for a long answer, which comes in pieces. The caller has a deadline for it.

        Raises:
            EngineRefusedError: it says no.
            EngineAwayError: it is not there, or the connection was lost.
        """
        with self._seam(what):
            said = await self._connections.handle_async_request(
                httpx.Request(method, HOST + path, params=params, headers=headers)
            )
            async with aclosing(said):
                if said.status_code >= 400:
                    self._check(Answer(said.status_code, said.headers, await said.aread()), what, ())
                async with aclosing(cast(AsyncGenerator[bytes], said.aiter_raw())) as pieces:
                    yield pieces

    def _check(self, answer: Answer, what: str, accepted: Collection[int]) -> None:
        if answer.status >= 400 and answer.status not in accepted:
            raise EngineRefusedError(f"{self.name} could not {what}", answer.status, _message(answer))

    @contextmanager
    def _seam(self, what: str) -> Iterator[None]:
        text = f"{self.name} at {self.socket} did not {what}"
        theirs: dict[type[Exception], type[NodeError]] = {
            httpx.ConnectError: EngineUnreachableError,
            httpx.HTTPError: EngineAwayError,
            OSError: EngineAwayError,
        }
        with map_exceptions(theirs, text), map_exceptions({trio.TooSlowError: EngineSlowError}, f"{text} in time"):
            yield


def _connections(socket: Path, kept: int | None) -> httpx.AsyncHTTPTransport:
    """Make the connections to a socket, of which so many are kept, or all.

    It is httpx's client without the client: redirects, cookies and the like, which no engine has, cost a third of a request.
    Each timeout is the caller's.
    """
    limits = httpx.Limits(max_connections=None, max_keepalive_connections=kept)
    return httpx.AsyncHTTPTransport(uds=str(socket), verify=False, limits=limits)  # nothing is encrypted


def _json(body: Any) -> bytes | None:
    """Write as JSON what is not None. Go would read an escaped half of a surrogate pair as a question mark."""
    with map_exceptions({UnicodeEncodeError: NodeError}, "arguments and variables must be UTF-8 for an engine"):
        return None if body is None else json.dumps(body, ensure_ascii=False).encode()


def _message(answer: Answer) -> str:
    try:
        said = json.loads(answer.content)["message"]
    except (ValueError, KeyError, TypeError):
        said = answer.content.decode(errors="replace")
    return str(said).strip()[:SHOWN] or f"it answers {answer.status}, and nothing more"
