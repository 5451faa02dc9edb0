"""Patience with an engine that goes away: it may be restarted, or stand still for a while."""

import math
import random
from collections.abc import Awaitable, Callable, Iterable
from typing import TypeVar

import trio

from trio_pilot.errors import ContainerLostError, NodeError
from trio_pilot.log import LOGGER
from trio_pilot.runtimes.engine_api import EngineApi, EngineAwayError, EngineRefusedError, EngineSlowError
from trio_pilot.runtimes.engine_restarts import RestartWatch

FIRST_PAUSE, LONGEST_PAUSE = 0.1, 2.0  # seconds between two looks whether it is back

SERVER_ERROR = 500  # of HTTP, and above

T = TypeVar("T")


class EngineOutages:
    """An engine, and how long it may be away."""

    def __init__(self, api: EngineApi, patience: float) -> None:
        self.api = api
        self.witness = RestartWatch(api.socket)
        self._patience = patience
        self._lost: EngineAwayError | None = None  # how it was noticed that the engine is away
        self._lost_at = 0.0
        self._warnings: set[str] = set()

    def pass_on(self, warnings: Iterable[str]) -> None:
        """Say once what the engine says of each container: that it cannot keep to a limit, say."""
        for warning in warnings:
            if warning not in self._warnings:
                self._warnings.add(warning)
                LOGGER.warning("%s warns: %s", self.api.name, warning)

    async def persist(self, attempt: Callable[[], Awaitable[T]]) -> T:
        """Try until the engine has answered: so what is tried must do no harm the second time.

        Raises:
            NodeError: the engine says no, or has been away for too long.
        """
        deadline = None
        while True:
            try:
                answer = await attempt()
            except EngineAwayError as error:
                deadline = deadline or trio.current_time() + self._patience
                await self.back(error, deadline)
            else:
                self._lost = None
                return answer

    async def back(self, error: EngineAwayError, deadline: float | None = None) -> bool:
        """Wait until the engine is back; tell whether it was really gone, and may be another now, or but slow.

        Raises:
            NodeError: it is not back in time.
        """
        self.lose(error)
        with trio.move_on_at(min(deadline or math.inf, self._lost_at + self._patience)):
            gone = await self._until_it_answers()
            self._lost = None
            return gone or not isinstance(error, EngineSlowError)
        raise NodeError(
            f"{self.api.name} has not been back for {self._patience:g} s (EWMS_PILOT_ENGINE_PATIENCE),"
            f" is its daemon running? {error}"
        ) from error

    def lose(self, error: EngineAwayError) -> None:
        """Take note that the engine is away: its time is counted from the first note on."""
        if self._lost is None:
            LOGGER.warning("%s; waiting for it", error)
            self._lost, self._lost_at = error, trio.current_time()

    @property
    def is_lost(self) -> bool:
        """Whether the engine was away, as far as is known."""
        return self._lost is not None

    async def ready(self) -> None:
        """Wait for an engine that is lost. Raises NodeError if it is not back in time."""
        if self._lost and await self.is_silent():
            await self.back(self._lost)

    async def is_silent(self) -> bool:
        """Tell whether the engine does not answer; if so, it is lost."""
        try:
            await self.api.ping()
        except EngineAwayError as error:
            self.lose(error)
            return True
        except EngineRefusedError:
            return True  # it is starting, or stopping
        self._lost = None
        return False

    async def excuse(self, refusal: EngineRefusedError) -> None:
        """Find out whether an engine has failed because it is being stopped; it is, if it takes no new connections.

        Raises:
            ContainerLostError: so it is; but it is back by now.
            NodeError: it is not back in time.
        """
        if refusal.status < SERVER_ERROR:
            return
        try:
            await self.api.ping()
        except EngineAwayError as error:
            await self.back(error)
            raise ContainerLostError(f"{self.api.name} was stopped: {refusal}") from refusal

    async def _until_it_answers(self) -> bool:
        gone, pause = False, FIRST_PAUSE
        while True:
            try:
                await self.api.ping()
            except EngineAwayError as error:
                gone = gone or not isinstance(error, EngineSlowError)
            except EngineRefusedError:
                pass  # it is starting, or stopping
            else:
                return gone
            await trio.sleep(pause * random.uniform(0.5, 1))  # noqa: S311
            pause = min(2 * pause, LONGEST_PAUSE)
