"""What this process has started, told from all else: by a resource limit that every descendant inherits.

A process can leave its session, its parent and its environment, but not its limits. RLIMIT_LOCKS limits nothing since Linux
2.4.25 (getrlimit(2)), so its value is free to say where a process comes from: the hard limit of this process and of all its
descendants is lower than that of what was there before, and the soft limit is another one for each child. A process may
lower both, and a privileged one may raise them: so they tell which processes are to be ended, not which may be trusted.
"""

import random
import resource
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from functools import cache

RLIMIT_LOCKS = 10  # asm-generic/resource.h; Python has no name for it
NAME = b"Max file locks"  # in /proc/PID/limits
UNLIMITED = 2**62  # in place of infinity: larger than any number that is in use
LEAST = 2**20  # there must be room for other numbers below


@cache
def own_mark() -> int | None:
    """Set the hard limit by which the descendants of this process are known; return it, or None if that is impossible."""
    with suppress(OSError, ValueError):
        soft = resource.getrlimit(RLIMIT_LOCKS)[0]
        mark = (UNLIMITED if soft == resource.RLIM_INFINITY else soft) - 1
        if mark > LEAST:
            resource.setrlimit(RLIMIT_LOCKS, (mark, mark))
            return mark
    return None


def new_number() -> int | None:
    """Return a soft limit for the descendants of one child; None if that is impossible."""
    mark = own_mark()
    return mark and random.randrange(mark // 2, mark)  # noqa: S311 -- no secret


@contextmanager
def passing_on(number: int | None) -> Iterator[None]:
    """Set the soft limit that a child inherits if it is started in the body."""
    mark = own_mark()
    if mark is None or number is None:
        yield
        return
    resource.setrlimit(RLIMIT_LOCKS, (number, mark))
    try:
        yield
    finally:
        resource.setrlimit(RLIMIT_LOCKS, (mark, mark))


def number_of(pid: int) -> int | None:
    """Return the soft limit of a process; None if it is unknown."""
    return _limits_of(pid)[0]


def is_descendant(pid: int) -> bool:
    """Return whether a process descends from this one, as far as its hard limit tells."""
    mark, limit = own_mark(), _limits_of(pid)[1]
    return mark is not None and limit is not None and limit <= mark


def _limits_of(pid: int) -> tuple[int | None, int | None]:
    try:
        with open(f"/proc/{pid}/limits", "rb") as file:  # noqa: PTH123 -- half the time of Path
            words = next(line for line in file if line.startswith(NAME)).removeprefix(NAME).split()
    except (OSError, StopIteration):  # it is gone
        return None, None
    soft, hard = (UNLIMITED if word == b"unlimited" else int(word) for word in words[:2])
    return soft, hard
