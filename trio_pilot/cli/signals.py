"""Ctrl-C and SIGTERM, for the commands that are not the pilot itself: what they do is cancelled, and tidied up."""

import signal
import sys
from collections.abc import AsyncIterable, Awaitable, Callable, Iterator
from contextlib import contextmanager
from typing import TypeVar, TypeVarTuple

import trio

from trio_pilot.cli.exit_codes import SignalledError

T = TypeVar("T")
Ts = TypeVarTuple("Ts")


def run_until_signalled(function: Callable[[*Ts], Awaitable[T]], *arguments: *Ts) -> T:
    """Run an async function under Trio; SIGINT and SIGTERM cancel it, and are raised as SignalledError."""
    return trio.run(_until_signalled, function, arguments)


@contextmanager
def report(done: Callable[[], str]) -> Iterator[None]:
    """Say in the end what was done, in the line of the signal if it was one that ended it."""
    try:
        yield
    except SignalledError as error:
        raise SignalledError(error.number, done()) from None
    except BaseException:
        print(done(), file=sys.stderr)
        raise
    print(done(), file=sys.stderr)


async def _until_signalled(function: Callable[[*Ts], Awaitable[T]], arguments: tuple[*Ts]) -> T:
    work, heard = trio.CancelScope(), list[int]()
    with trio.open_signal_receiver(signal.SIGTERM, signal.SIGINT) as signals:
        async with trio.open_nursery() as nursery:
            nursery.start_soon(_heed, signals, heard, work)
            with work:
                result = await function(*arguments)
            nursery.cancel_scope.cancel()
    if work.cancelled_caught:
        raise SignalledError(heard[0])
    return result


async def _heed(signals: AsyncIterable[int], heard: list[int], work: trio.CancelScope) -> None:
    # All of them are read: those that are not would be delivered again at the end.
    async for number in signals:
        heard.append(number)
        work.cancel()
