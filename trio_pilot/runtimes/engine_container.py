"""One container at an engine, from before it is made until it is no more."""

import math
from collections.abc import Awaitable, Callable
from contextlib import suppress
from dataclasses import dataclass
from typing import Any, Self

import trio

from trio_pilot.errors import ContainerLostError, NodeError
from trio_pilot.files.task_logs import open_log
from trio_pilot.grace_period import GracePeriod
from trio_pilot.runtimes import Container
from trio_pilot.runtimes.engine_api import (
    REQUEST_TIMEOUT,
    EngineApi,
    EngineAwayError,
    EngineRefusedError,
    EngineSlowError,
    EngineUnreachableError,
)
from trio_pilot.runtimes.engine_dialect import Dialect, Spec
from trio_pilot.runtimes.engine_logs import Demultiplexer, HeadAndTail
from trio_pilot.runtimes.engine_outages import EngineOutages

NAME_PREFIX = "trio-pilot-"

DONE, NOT_FOUND, CONFLICT = 200, 404, 409

NOT_STARTED = ("created", "configured", "initialized")  # podman has three words for it
GOING_ON = ("running", "paused", "restarting", "stopping")
ENDED = ("exited", "stopped")

CREATE_GRACE = 5.0  # seconds more that a create in flight has when it is cancelled

# While a container runs, the engine is asked whether it is there: one that stands still would let us wait for ever. For the
# first time after so many seconds, then when it has lasted twice as long, and so on, but at least as often as the last says.
FIRST_PING, LONGEST_PING = 2.0, 60.0
# An engine that has to look for the end itself looks in intervals of a hundredth of what it has lasted.
SHORTEST_INTERVAL, LONGEST_INTERVAL = 0.01, 0.25

FETCH_TIMEOUT = 60.0  # seconds for the output of a container
LAST_FETCH_TIMEOUT = 2.0  # the same, of one that was cancelled

# A create whose answer was lost may still be under way: it is not there yet, and in a moment it is.
LOOK_INTERVAL = 0.5  # seconds between two looks at the name
REMOVE_INTERVAL = 0.1  # seconds to the next try, after the engine could not


@dataclass(frozen=True, slots=True)
class Facts:
    """How a container is."""

    status: str
    code: int  # with which it has ended, if it has
    is_out_of_memory: bool
    words: tuple[str, ...]  # what it runs

    @classmethod
    def of(cls, said: Any) -> Self:
        """Find them in what an engine says."""
        state = said["State"]
        words = (said["Path"], *(said["Args"] or ()))
        return cls(str(state["Status"]), int(state["ExitCode"]), bool(state.get("OOMKilled")), words)


class EngineContainer:
    """A container, known by its name before it is made."""

    def __init__(self, link: EngineOutages, dialect: Dialect, container: Container) -> None:
        self.name = NAME_PREFIX + container.name
        self._link = link
        self._api = link.api
        self._dialect = dialect
        self._container = container
        self._in_flight = 0  # creates that were not answered: they may yet have an effect
        self._may_run = False

    async def create(self, spec: Spec) -> None:
        """Make it. Cancelled, a request that is under way has CREATE_GRACE seconds to its end.

        Raises:
            NodeError: the engine does not make it.
        """
        await _finish(lambda: self._link.persist(lambda: self._create(spec)), CREATE_GRACE)

    async def _create(self, spec: Spec) -> None:
        path, what = "/containers/create", "make the container"
        self._in_flight += 1
        try:
            answer = await self._api.call("POST", path, what, body=spec, name=self.name)
            self._link.pass_on(answer.read(lambda said: list(said.get("Warnings") or [])))
        except EngineRefusedError as error:
            # It was made before, by a create whose answer was lost.
            if self._in_flight == 1 or await self.facts() is None:
                self._in_flight -= 1
                await self._link.excuse(error)
                raise
        self._in_flight -= 1

    async def live(self) -> int:
        """Start it, and wait until it ends; give its exit code.

        Raises:
            ContainerLostError: it has ended with the engine, or without anybody to tell how.
            NodeError: it cannot be started, or the engine is gone for too long.
        """
        is_started = False
        while True:
            ends = self._link.witness.ends
            try:
                if not is_started:
                    await self._start()
                    is_started = True
                code = await self._wait()
                if code:
                    await self._api.ping()
            except EngineAwayError as error:
                was_gone = await self._link.back(error)
            else:
                was_gone = self._link.witness.ends > ends
                if not code or not was_gone:
                    self._may_run = False
                    return code
            if was_gone and not await self._is_running():
                return 0
            is_started = is_started or was_gone or not await self._waits_for_its_start()

    async def _start(self) -> None:
        # An engine that was killed in the middle of it does not know of it: so it is not asked a second time.
        self._may_run = True
        while True:
            try:
                await self._call("POST", "/start", "make the container")
            except EngineUnreachableError as error:
                await self._link.back(error)
            except EngineRefusedError as error:
                await self._link.excuse(error)
                raise
            else:
                return

    async def _waits_for_its_start(self) -> bool:
        """Look, after the engine stood still as it was to be started. It is not to be waited for: docker would say 0."""
        facts = await self.facts()
        return facts is not None and facts.status in NOT_STARTED

    async def _is_running(self) -> bool:
        """Look, after the engine was gone; if it has ended, judge what nobody saw: a success is one.

        Raises:
            ContainerLostError: a failure may be the engine's; and one that is not there was not seen to end.
        """
        facts = await self.facts()
        status, code = (facts.status, facts.code) if facts else ("removed", None)
        if status in GOING_ON:
            return True
        self._may_run = False
        if status in ENDED and code == 0:
            return False
        how = f"exit code {code}" if status in ENDED else status
        raise ContainerLostError(f"the container {self.name} was lost with {self._dialect.name} ({how})")

    async def _wait(self) -> int:
        begun = trio.current_time()
        while (code := await _Waiting(self._api, self.name, self._dialect, begun).end()) is None:
            pass
        return code

    async def facts(self) -> Facts | None:
        """Ask what there is to know of it; None if it is not there."""
        path, what = f"/containers/{self.name}/json", "tell how a container is"
        answer = await self._link.persist(lambda: self._api.call("GET", path, what, accepted=[NOT_FOUND]))
        return None if answer.status == NOT_FOUND else answer.read(Facts.of)

    async def fetch(self) -> None:
        """Get what it has said into its files."""
        with open_log(self._container.stdout) as stdout, open_log(self._container.stderr) as stderr:
            ends = {1: HeadAndTail(stdout), 2: HeadAndTail(stderr)}
            streams = Demultiplexer(ends)
            path = f"{self._api.prefix}/containers/{self.name}/logs"
            async with self._api.stream("GET", path, "tell what a container has said", stdout="1", stderr="1") as pieces:
                async for piece in pieces:
                    streams.feed(piece)
            for end in ends.values():
                end.close()

    async def end(self, grace: float) -> None:
        """End it if it runs, and remove it; the caller has a deadline for that, for it goes on until it is done."""
        if self._may_run:
            await self._stop(grace)
            with suppress(NodeError, OSError), trio.move_on_after(LAST_FETCH_TIMEOUT):
                await self.fetch()
        await self._remove()

    async def _stop(self, grace: float) -> None:
        """Stop it. What the engine says does not matter: it is killed, if need be, as it is removed."""
        whole = str(math.ceil(grace))
        with suppress(NodeError):
            if grace > 0:
                await self._call("POST", "/stop", "stop a container", math.inf, t=whole, timeout=whole)
            else:
                await self._call("POST", "/kill", "kill a container")
        self._may_run = False

    async def _remove(self) -> None:
        """Remove it, until it is not there. If a create may be under way, that has to be seen twice, and not at once."""
        looks = 2 if self._in_flight else 1
        while True:
            status = await self._try_to_remove()
            looks -= status == NOT_FOUND
            if not looks or (status == DONE and not self._in_flight):
                return
            await trio.sleep(LOOK_INTERVAL if status == NOT_FOUND else REMOVE_INTERVAL)

    async def _try_to_remove(self) -> int | None:
        # Without a `timeout` podman would first ask it to go, and wait for 10 s.
        path = f"/containers/{self.name}"
        params: dict[str, Any] = {"force": "1", "v": "1", "timeout": "0"}
        with suppress(NodeError):
            answer = await self._api.call("DELETE", path, "remove a container", accepted=[NOT_FOUND, CONFLICT], **params)
            return DONE if answer.status < 300 else answer.status
        return None

    async def _call(self, method: str, path: str, what: str, seconds: float = REQUEST_TIMEOUT, **params: Any) -> None:
        await self._api.call(method, f"/containers/{self.name}{path}", what, seconds=seconds, **params)


class _Waiting:
    """Waits for the end of a container, and sees to it that the engine is there to tell it."""

    def __init__(self, api: EngineApi, name: str, dialect: Dialect, begun: float) -> None:
        self._api = api
        self._name = name
        self._dialect = dialect
        self._begun = begun
        self._code: int | None = None
        self._failures: list[NodeError] = []

    async def end(self) -> int | None:
        """Give the exit code; None if it is to be asked for in another way from now on. Raises what the engine does."""
        params = self._params()
        async with trio.open_nursery() as nursery:
            nursery.start_soon(self._first, self._ask, params, nursery.cancel_scope)
            nursery.start_soon(self._first, self._see_to_the_engine, params, nursery.cancel_scope)
        # A connection that was lost says more than an answer that does not come.
        for failure in sorted(self._failures, key=lambda one: isinstance(one, EngineSlowError)):
            raise failure
        return self._code

    async def _first(self, function: Callable[[Spec], Awaitable[None]], params: Spec, both: trio.CancelScope) -> None:
        try:
            await function(params)
        except NodeError as error:
            self._failures.append(error)
        both.cancel()

    async def _ask(self, params: Spec) -> None:
        path, what = f"/containers/{self._name}/wait", "wait for a container"
        answer = await self._api.call("POST", path, what, seconds=math.inf, **params)
        self._code = answer.read(self._dialect.exit_code)

    async def _see_to_the_engine(self, params: Spec) -> None:
        while self._params() == params:
            await trio.sleep(min(max(self._lasted(), FIRST_PING), LONGEST_PING))
            await self._api.ping()

    def _params(self) -> Spec:
        return self._dialect.wait(min(max(self._lasted() / 100, SHORTEST_INTERVAL), LONGEST_INTERVAL))

    def _lasted(self) -> float:
        return trio.current_time() - self._begun


async def _finish(function: Callable[[], Awaitable[None]], seconds: float) -> None:
    """Call a function; cancelled, it has so many seconds more."""
    grace_period = GracePeriod(seconds)
    failure: NodeError | None = None
    async with grace_period.open():
        with grace_period.shield():
            try:
                await function()
            except NodeError as error:
                failure = error
    if failure:
        raise failure
