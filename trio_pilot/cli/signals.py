"""Cancel a command on Ctrl-C or SIGTERM, so that it cleans up. The pilot itself handles signals in its own way."""

import signal
import sys
from collections.abc import AsyncIterable, Awaitable, Callable, Iterator
from contextlib import contextmanager
from typing import TypeVar, TypeVarTuple

import trio

from trio_pilot.cli.exit_codes import SignalledError
from trio_pilot.log import in_one_line

T = TypeVar("T")
Ts = TypeVarTuple("Ts")


def run_until_signalled(function: Callable[[*Ts], Awaitable[T]], *arguments: *Ts) -> T:
    """Run an async function under Trio. SIGINT and SIGTERM cancel it, and SignalledError is raised."""
    return trio.run(_until_signalled, function, arguments)


@contextmanager
def print_summary(summary: Callable[[], str]) -> Iterator[None]:
    """Print a summary to stderr at the end; after a signal it is part of the SignalledError instead."""
    try:
        yield
    except SignalledError as error:
        raise SignalledError(error.number, summary()) from None
    except BaseException:
        print(in_one_line(summary()), file=sys.stderr)
        raise
    print(in_one_line(summary()), file=sys.stderr)


async def _until_signalled(function: Callable[[*Ts], Awaitable[T]], arguments: tuple[*Ts]) -> T:
    work, received = trio.CancelScope(), list[int]()
    with trio.open_signal_receiver(signal.SIGTERM, signal.SIGINT) as signals:
        async with trio.open_nursery() as nursery:
            nursery.start_soon(_cancel_on_signal, signals, received, work)
            with work:
                result = await function(*arguments)
            nursery.cancel_scope.cancel()
    if work.cancelled_caught:
        raise SignalledError(received[0])
    return result


async def _cancel_on_signal(signals: AsyncIterable[int], received: list[int], work: trio.CancelScope) -> None:
    # Every signal is read: those that are not would be delivered again when the receiver is closed.
    async for number in signals:
        received.append(number)
        work.cancel()
