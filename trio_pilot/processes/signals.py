"""Signals to processes that are not children of this one. Standard library only: the guardian loads nothing else.

The number of a process may be another's by the time a signal is sent. A pidfd stays that of the process it was opened for:
so the facts for which a process is to be signalled are read again once its pidfd is open.
"""

import os
import signal
from collections.abc import Callable, Collection, Sequence
from contextlib import ExitStack, suppress

AT_ONCE = 64  # pidfds that are open at once


def signal_if(pid: int, number: signal.Signals, is_meant: Callable[[], bool]) -> bool:
    """Send a signal to a process if, with its pidfd open, it is still the one that is meant; return whether it was sent."""
    with suppress(OSError):  # it is gone, or another user's, or no file descriptor is left
        pidfd = os.pidfd_open(pid)
        try:
            if is_meant():
                signal.pidfd_send_signal(pidfd, number)
                return True
        finally:
            os.close(pidfd)
    return False


def signal_listed(number: signal.Signals, listed: Callable[[], Sequence[int]]) -> set[int]:
    """Send a signal to all processes of a list, each if it is in the list still once its pidfd is open.

    Args:
        number: The signal.
        listed: Reads the list.

    Returns:
        The processes to which it was sent.
    """
    pids, sent = listed(), set[int]()
    for begin in range(0, len(pids), AT_ONCE):
        with ExitStack() as stack:
            pidfds: dict[int, int] = {}
            for pid in pids[begin : begin + AT_ONCE]:
                with suppress(OSError):  # it is gone, or no file descriptor is left
                    pidfds[pid] = os.pidfd_open(pid)
                    stack.callback(os.close, pidfds[pid])
            sent |= _sent(number, pidfds, frozenset(listed()))
    return sent


def _sent(number: signal.Signals, pidfds: dict[int, int], meant: Collection[int]) -> set[int]:
    sent = set[int]()
    for pid in pidfds.keys() & meant:
        with suppress(OSError):  # it is gone, or another user's
            signal.pidfd_send_signal(pidfds[pid], number)
            sent.add(pid)
    return sent
