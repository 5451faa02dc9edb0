"""One check of `trio-pilot check`, and the finding that is printed for it."""

from collections.abc import Awaitable, Callable
from dataclasses import dataclass

from trio_pilot.errors import PilotError, leaves


class SkippedError(Exception):
    """A check has nothing to report: another check reports the reason."""


@dataclass(frozen=True, slots=True)
class Finding:
    """The result of a check."""

    name: str
    facts: str
    exit_code: int = 0

    def __str__(self) -> str:
        return f"{'FAIL' if self.exit_code else 'ok  '}  {self.name:<12}  {self.facts}"


@dataclass(frozen=True, slots=True)
class Check:
    """A function that returns facts or raises an error, and advice for the case of an error."""

    name: str
    function: Callable[[], Awaitable[str]]
    advice: str

    async def run(self) -> Finding | None:
        """Run the check. Returns None if it was skipped."""
        try:
            return Finding(self.name, await self.function())
        except SkippedError:
            return None
        except PilotError as error:
            return self._failed(error)
        except ExceptionGroup as group:  # of the nursery of a connection, or of a guardian
            errors, others = group.split(PilotError)
            if errors is None or others:
                raise
            return self._failed(next(leaves(errors)))

    def _failed(self, error: PilotError) -> Finding:
        return Finding(self.name, f"{error} → {self.advice}", error.exit_code)
