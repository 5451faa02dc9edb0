"""Waiting for an engine that goes away: it may be restarted, or freeze for a while."""

import math
import random
from collections.abc import Awaitable, Callable, Iterable
from typing import TypeVar

import trio

from trio_pilot.errors import ContainerLostError, NodeError
from trio_pilot.log import LOGGER
from trio_pilot.runtimes.engine_api import EngineApi, EngineAwayError, EngineRefusedError, EngineSlowError
from trio_pilot.runtimes.engine_restarts import RestartWatch

FIRST_PAUSE, LONGEST_PAUSE = 0.1, 2.0  # seconds between two checks whether the engine is back

SERVER_ERROR = 500  # the first HTTP status of a server's error

T = TypeVar("T")


class EngineOutages:
    """The outages of an engine, and how long one may last."""

    def __init__(self, api: EngineApi, patience: float) -> None:
        self.api = api
        self.restarts = RestartWatch(api.socket)
        self._patience = patience
        self._outage: EngineAwayError | None = None  # the error that showed that the engine is away
        self._outage_began = 0.0
        self._warnings: set[str] = set()

    def log_warnings(self, warnings: Iterable[str]) -> None:
        """Log each of the engine's warnings once; it repeats them for each container, such as a limit it cannot enforce."""
        for warning in warnings:
            if warning not in self._warnings:
                self._warnings.add(warning)
                LOGGER.warning("%s warns: %s", self.api.name, warning)

    async def retry(self, attempt: Callable[[], Awaitable[T]]) -> T:
        """Repeat an attempt, which must be safe to repeat, until the engine has answered.

        Raises:
            NodeError: the engine answers with an error, or has been away for too long.
        """
        deadline = None
        while True:
            try:
                answer = await attempt()
            except EngineAwayError as error:
                deadline = deadline or trio.current_time() + self._patience
                await self.wait_until_back(error, deadline)
            else:
                self._outage = None
                return answer

    async def wait_until_back(self, error: EngineAwayError, deadline: float | None = None) -> bool:
        """Wait until the engine is back; return whether it was gone, and may have been restarted, rather than slow.

        Raises:
            NodeError: it is not back in time.
        """
        self.note_outage(error)
        with trio.move_on_at(min(deadline or math.inf, self._outage_began + self._patience)):
            was_gone = await self._until_it_answers()
            self._outage = None
            return was_gone or not isinstance(error, EngineSlowError)
        raise NodeError(
            f"{self.api.name} has not been back for {self._patience:g} s (EWMS_PILOT_ENGINE_PATIENCE),"
            f" is its daemon running? {error}"
        ) from error

    def note_outage(self, error: EngineAwayError) -> None:
        """Note that the engine is away: the first note is the beginning of the outage."""
        if self._outage is None:
            LOGGER.warning("%s; waiting for it", error)
            self._outage, self._outage_began = error, trio.current_time()

    @property
    def is_away(self) -> bool:
        """Whether the engine was away when it was last asked."""
        return self._outage is not None

    async def wait_if_away(self) -> None:
        """Wait for an engine that is away. Raises NodeError if it is not back in time."""
        if self._outage and await self.is_silent():
            await self.wait_until_back(self._outage)

    async def is_silent(self) -> bool:
        """Return whether the engine does not answer; if so, note an outage."""
        try:
            await self.api.ping()
        except EngineAwayError as error:
            self.note_outage(error)
            return True
        except EngineRefusedError:
            return True  # it is starting up or shutting down
        self._outage = None
        return False

    async def check_for_shutdown(self, refusal: EngineRefusedError) -> None:
        """Check whether an engine refused something because it is shutting down: then it takes no new connections.

        Raises:
            ContainerLostError: it was shutting down, and is back by now.
            NodeError: it was shutting down, and is not back in time.
        """
        if refusal.status < SERVER_ERROR:
            return
        try:
            await self.api.ping()
        except EngineAwayError as error:
            await self.wait_until_back(error)
            raise ContainerLostError(f"{self.api.name} was stopped: {refusal}") from refusal

    async def _until_it_answers(self) -> bool:
        was_gone, pause = False, FIRST_PAUSE
        while True:
            try:
                await self.api.ping()
            except EngineAwayError as error:
                was_gone = was_gone or not isinstance(error, EngineSlowError)
            except EngineRefusedError:
                pass  # it is starting up or shutting down
            else:
                return was_gone
            await trio.sleep(pause * random.uniform(0.5, 1))  # noqa: S311
            pause = min(2 * pause, LONGEST_PAUSE)
