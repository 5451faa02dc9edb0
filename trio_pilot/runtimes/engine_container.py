"""One container at an engine, from before it is created until after it is removed."""

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

NOT_STARTED = ("created", "configured", "initialized")  # the last two are podman's
GOING_ON = ("running", "paused", "restarting", "stopping")
ENDED = ("exited", "stopped")

# An engine that has to poll for a container's end polls at intervals of a hundredth of the time that it has run.
SHORTEST_INTERVAL, LONGEST_INTERVAL = 0.01, 0.25  # seconds

# A create request whose answer was lost may still be under way: the container does not exist yet, and does in a moment.
LOOK_INTERVAL = 0.5  # seconds between two looks for the container
REMOVE_INTERVAL = 0.1  # seconds between two attempts to remove it


@dataclass(frozen=True, slots=True)
class ContainerState:
    """The state of a container."""

    status: str
    code: int  # the exit code, if the container has ended
    is_out_of_memory: bool
    command: tuple[str, ...]

    @classmethod
    def of(cls, answer: Any) -> Self:
        """Return the state in an engine's answer."""
        state = answer["State"]
        command = (answer["Path"], *(answer["Args"] or ()))
        return cls(str(state["Status"]), int(state["ExitCode"]), bool(state.get("OOMKilled")), command)


class EngineContainer:
    """A container, known by its name before it is created."""

    def __init__(self, outages: EngineOutages, dialect: Dialect, container: Container) -> None:
        self.name = NAME_PREFIX + container.name
        self._outages = outages
        self._api = outages.api
        self._timeouts = outages.api.timeouts
        self._dialect = dialect
        self._container = container
        self._unanswered_creates = 0  # create requests that may still have an effect
        self._may_run = False

    async def create(self, spec: Spec) -> None:
        """Create the container. If cancelled, wait for the answer to a request under way, but not for long.

        Raises:
            NodeError: the engine does not create it.
        """
        await _with_grace(lambda: self._outages.retry(lambda: self._create(spec)), self._timeouts.create_grace)

    async def _create(self, spec: Spec) -> None:
        request, what = "POST /containers/create", "make the container"
        self._unanswered_creates += 1
        try:
            answer = await self._api.call(request, what, body=spec, name=self.name)
            self._outages.log_warnings(answer.read(lambda created: list(created.get("Warnings") or [])))
        except EngineRefusedError as error:
            # It may exist already, created by a request whose answer was lost.
            if self._unanswered_creates == 1 or await self.state() is None:
                self._unanswered_creates -= 1
                await self._outages.check_for_shutdown(error)
                raise
        self._unanswered_creates -= 1

    async def run(self) -> int:
        """Start the container, wait until it ends, and return its exit code.

        Raises:
            ContainerLostError: it ended with the engine, or its exit code is unknown.
            NodeError: it cannot be started, or the engine has been away for too long.
        """
        is_started = False
        while True:
            ends = self._outages.restarts.ends
            try:
                if not is_started:
                    await self._start()
                    is_started = True
                code = await self._wait()
                if code:
                    await self._api.ping()
            except EngineAwayError as error:
                was_gone = await self._outages.wait_until_back(error)
            else:
                was_gone = self._outages.restarts.ends > ends
                if not code or not was_gone:
                    self._may_run = False
                    return code
            if was_gone and not await self._is_running():
                return 0
            is_started = is_started or was_gone or not await self._is_unstarted()

    async def _start(self) -> None:
        # Only a request that was not sent is repeated: an engine that was killed while it started the container has
        # forgotten that, and would start it a second time.
        self._may_run = True
        while True:
            try:
                await self._post("start", "make the container")
            except EngineUnreachableError as error:
                await self._outages.wait_until_back(error)
            except EngineRefusedError as error:
                await self._outages.check_for_shutdown(error)
                raise
            else:
                return

    async def _is_unstarted(self) -> bool:
        """Return whether an engine that froze has not started the container: if waited for then, docker would report 0."""
        state = await self.state()
        return state is not None and state.status in NOT_STARTED

    async def _is_running(self) -> bool:
        """Return whether the container runs after the engine was gone; False means that it has succeeded.

        Raises:
            ContainerLostError: it failed, which may be the engine's doing, or it does not exist any more.
        """
        state = await self.state()
        status, code = (state.status, state.code) if state else ("removed", None)
        if status in GOING_ON:
            return True
        self._may_run = False
        if status in ENDED and code == 0:
            return False
        how = f"exit code {code}" if status in ENDED else status
        raise ContainerLostError(f"the container {self.name} was lost with {self._dialect.name} ({how})")

    async def _wait(self) -> int:
        started_at = trio.current_time()
        while (code := await _ExitCodeRequest(self._api, self.name, self._dialect, started_at).answer()) is None:
            pass
        return code

    async def state(self) -> ContainerState | None:
        """Return the state of the container; None if it does not exist."""
        request, what = f"GET /containers/{self.name}/json", "inspect a container"
        answer = await self._outages.retry(lambda: self._api.call(request, what, accepted=[NOT_FOUND]))
        return None if answer.status == NOT_FOUND else answer.read(ContainerState.of)

    async def fetch_logs(self) -> None:
        """Copy what the container has written to stdout and stderr into their files."""
        with open_log(self._container.stdout) as stdout, open_log(self._container.stderr) as stderr:
            streams = {1: HeadAndTail(stdout), 2: HeadAndTail(stderr)}
            demultiplexer = Demultiplexer(streams)
            path = f"{self._api.prefix}/containers/{self.name}/logs"
            async with self._api.stream("GET", path, "send the logs of a container", stdout="1", stderr="1") as pieces:
                async for piece in pieces:
                    demultiplexer.feed(piece)
            for stream in streams.values():
                stream.close()

    async def remove(self, grace: float) -> None:
        """Stop the container if it runs, and remove it. Goes on until it is removed, so the caller sets a deadline."""
        if self._may_run:
            await self._stop(grace)
            with suppress(NodeError, OSError), trio.move_on_after(self._timeouts.fetch_logs_cancelled):
                await self.fetch_logs()
        # If a create request may be under way, the container has to be found missing twice, with time between.
        looks = 2 if self._unanswered_creates else 1
        while True:
            status = await self._try_to_remove()
            looks -= status == NOT_FOUND
            if not looks or (status == DONE and not self._unanswered_creates):
                return
            await trio.sleep(LOOK_INTERVAL if status == NOT_FOUND else REMOVE_INTERVAL)

    async def _stop(self, grace: float) -> None:
        """Stop the container. Errors do not matter: removing it kills it."""
        seconds = str(math.ceil(grace))
        with suppress(NodeError):
            if grace > 0:
                await self._post("stop", "stop a container", math.inf, t=seconds, timeout=seconds)
            else:
                await self._post("kill", "kill a container")
        self._may_run = False

    async def _try_to_remove(self) -> int | None:
        # Without a `timeout`, podman would first send SIGTERM and wait for 10 s.
        request = f"DELETE /containers/{self.name}"
        params: dict[str, Any] = {"force": "1", "v": "1", "timeout": "0"}
        with suppress(NodeError):
            answer = await self._api.call(request, "remove a container", accepted=[NOT_FOUND, CONFLICT], **params)
            return DONE if answer.status < 300 else answer.status
        return None

    async def _post(self, action: str, what: str, seconds: float | None = None, **params: Any) -> None:
        await self._api.call(f"POST /containers/{self.name}/{action}", what, seconds=seconds, **params)


class _ExitCodeRequest:
    """Waits for the answer to one request for a container's exit code, and pings the engine meanwhile."""

    def __init__(self, api: EngineApi, name: str, dialect: Dialect, started_at: float) -> None:
        self._api = api
        self._name = name
        self._dialect = dialect
        self._started_at = started_at
        self._code: int | None = None
        self._failures: list[NodeError] = []

    async def answer(self) -> int | None:
        """Return the exit code; None if it is time to repeat the request with a longer interval.

        Raises:
            NodeError: the engine does not answer, or with an error.
        """
        params = self._params()
        async with trio.open_nursery() as nursery:
            nursery.start_soon(self._run_first, self._ask, params, nursery.cancel_scope)
            nursery.start_soon(self._run_first, self._ping, params, nursery.cancel_scope)
        # A lost connection tells more than a late answer.
        for failure in sorted(self._failures, key=lambda one: isinstance(one, EngineSlowError)):
            raise failure
        return self._code

    async def _run_first(self, function: Callable[[Spec], Awaitable[None]], params: Spec, both: trio.CancelScope) -> None:
        """Call a function, and cancel the other one when it is done."""
        try:
            await function(params)
        except NodeError as error:
            self._failures.append(error)
        both.cancel()

    async def _ask(self, params: Spec) -> None:
        request, what = f"POST /containers/{self._name}/wait", "wait for a container"
        answer = await self._api.call(request, what, seconds=math.inf, **params)
        self._code = answer.read(self._dialect.exit_code)

    async def _ping(self, params: Spec) -> None:
        timeouts = self._api.timeouts
        while self._params() == params:
            await trio.sleep(min(max(self._elapsed(), timeouts.first_ping), timeouts.longest_ping))
            await self._api.ping()

    def _params(self) -> Spec:
        return self._dialect.wait_query(min(max(self._elapsed() / 100, SHORTEST_INTERVAL), LONGEST_INTERVAL))

    def _elapsed(self) -> float:
        return trio.current_time() - self._started_at


async def _with_grace(function: Callable[[], Awaitable[None]], seconds: float) -> None:
    """Call a function; if cancelled, let it go on for so many seconds."""
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
