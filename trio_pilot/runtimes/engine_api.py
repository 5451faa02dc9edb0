"""The seam to a container engine: its HTTP API, over the Unix socket. Nobody else knows of httpx."""

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

REQUEST_TIMEOUT = 60.0  # seconds; an engine that starts a hundred containers at once takes its time for each
PING_TIMEOUT = 3.0
SHOWN = 1000  # characters of what an engine says in an error

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
    content: bytes

    def read(self, find: Callable[[Any], T]) -> T:
        """Find something in what it says as JSON; raises NodeError if it is none, or has no such thing."""
        text = f"the engine does not speak as it should: it says {self.content[:SHOWN]!r}"
        with map_exceptions(dict.fromkeys(UNREADABLE, NodeError), text):
            return find(json.loads(self.content))


class EngineApi:
    """An engine, and how to ask it."""

    def __init__(self, name: str, socket: Path) -> None:
        self.name = name
        self.socket = socket
        self.prefix = ""  # of all paths: the version of the API that is spoken
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
        """Ask whether it is there, and takes new connections; give the headers of its answer. Raises EngineAwayError.

        It has to be a new one: an engine that is being stopped still answers on those that it has.
        """
        with self._seam("answer"), trio.fail_after(PING_TIMEOUT):
            said = await self._client.handle_async_request(_request("GET", "/_ping"))
            answer = Answer(said.status_code, await said.aread())
        self._check(answer, "answer", ())
        return said.headers

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
        target = self.prefix + path + (f"?{urlencode(params)}" if params else "")
        with self._seam(what), trio.fail_after(seconds):
            answer = Answer(*await self._connections.ask(method, target, _json(body)))
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
            said = await self._client.handle_async_request(_request(method, path, params=params, headers=headers))
            async with aclosing(said):
                if said.status_code >= 400:
                    self._check(Answer(said.status_code, await said.aread()), what, ())
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
            NoConnectionError: EngineUnreachableError,
            httpx.HTTPError: EngineAwayError,
            trio.BrokenResourceError: EngineAwayError,
        }
        with map_exceptions(theirs, text), map_exceptions({trio.TooSlowError: EngineSlowError}, f"{text} in time"):
            yield


def _client(socket: Path) -> httpx.AsyncHTTPTransport:
    """Make what is asked for long answers, each on a connection of its own. Each timeout is the caller's.

    It is httpx's client without the client: no engine has redirects, cookies and the like.
    """
    limits = httpx.Limits(max_connections=None, max_keepalive_connections=0)
    return httpx.AsyncHTTPTransport(uds=str(socket), verify=False, limits=limits)  # nothing is encrypted


def _request(method: str, path: str, **more: Any) -> httpx.Request:
    return httpx.Request(method, f"http://{HOST}{path}", **more)


def _json(body: Any) -> bytes:
    """Write as JSON what is not None. Go would read an escaped half of a surrogate pair as a question mark."""
    with map_exceptions({UnicodeEncodeError: NodeError}, "arguments and variables must be UTF-8 for an engine"):
        return b"" if body is None else json.dumps(body, ensure_ascii=False).encode()


def _message(answer: Answer) -> str:
    try:
        said = json.loads(answer.content)["message"]
    except (ValueError, KeyError, TypeError):
        said = answer.content.decode(errors="replace")
    return str(said).strip()[:SHOWN] or f"it answers {answer.status}, and nothing more"
