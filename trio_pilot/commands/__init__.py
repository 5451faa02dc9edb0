"""The subcommands: each a module with a function that does it, and gives the exit code."""

import signal
from collections.abc import Iterator
from typing import Any


class SignalledError(Exception):
    """A signal has ended a command before its end."""

    def __init__(self, number: int) -> None:
        super().__init__("interrupted" if number == signal.SIGINT else f"ended by {signal.Signals(number).name}")
        self.number = number


def leaves(group: BaseExceptionGroup[Any]) -> Iterator[Any]:
    """Give the errors in a group of errors, and in the groups in it."""
    for error in group.exceptions:
        if isinstance(error, BaseExceptionGroup):
            yield from leaves(error)
        else:
            yield error
