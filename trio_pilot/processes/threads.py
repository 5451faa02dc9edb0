"""Calls in threads, where a job may have no thread left: a task may have taken all that the job may have."""

from collections.abc import Callable
from typing import TypeVar

import trio

from trio_pilot.errors import NoProcessError

T = TypeVar("T")

REFUSED = "can't start new thread"  # the text of Python's RuntimeError
PATIENCE = 10.0  # seconds to wait for a thread
INTERVAL = 0.1  # seconds between two attempts


async def run_sync(
    function: Callable[..., T],
    *arguments: object,
    abandon_on_cancel: bool = False,
    limiter: trio.CapacityLimiter | None = None,
) -> T:
    """Call a function in a thread, as `trio.to_thread.run_sync` does. While there is no thread to be had, wait for one.

    Raises:
        NoProcessError: There was none for PATIENCE seconds, or for the function itself.
    """
    has_begun, give_up_at = False, trio.current_time() + PATIENCE

    def call() -> T:
        nonlocal has_begun
        has_begun = True
        return function(*arguments)

    while True:
        try:
            return await trio.to_thread.run_sync(call, abandon_on_cancel=abandon_on_cancel, limiter=limiter)
        except RuntimeError as error:
            if not is_refusal(error):
                raise
            if has_begun or trio.current_time() >= give_up_at:
                raise NoProcessError(f"no thread can be started for the moment: {error}") from error
        await trio.sleep(INTERVAL)


def is_refusal(error: BaseException) -> bool:
    """Return whether an error says that there is no thread or process left to start: a fork fails with EAGAIN."""
    return isinstance(error, BlockingIOError) or (isinstance(error, RuntimeError) and str(error) == REFUSED)
