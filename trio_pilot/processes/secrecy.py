"""Keeping what is in the memory of this process, such as tokens, from other processes of its user, and from core files.

Standard library only: the guardian loads nothing else.
"""

import ctypes
import resource
from collections.abc import Iterator
from contextlib import contextmanager, suppress

PR_SET_DUMPABLE = 4  # linux/prctl.h

_core_of_tasks: list[tuple[int, int]] = []  # the limit that this process was started with, once it has another


def keep_secrets() -> None:
    """Let no other process of this user read the memory or the environment of this one, and no core file be written.

    A child gets all of this back: execve(2) makes it dumpable, and `passing_on_core_limit` its limit of core files.
    """
    with suppress(OSError, AttributeError):
        ctypes.CDLL(None).prctl(PR_SET_DUMPABLE, 0, 0, 0, 0)
    with suppress(OSError, ValueError):
        soft, hard = resource.getrlimit(resource.RLIMIT_CORE)
        resource.setrlimit(resource.RLIMIT_CORE, (0, hard))
        if not _core_of_tasks:
            _core_of_tasks.append((soft, hard))


@contextmanager
def passing_on_core_limit() -> Iterator[None]:
    """Set the limit of core files that this process was started with, in the body: a child that starts there inherits it."""
    if not _core_of_tasks or not _core_of_tasks[0][0]:
        yield
        return
    resource.setrlimit(resource.RLIMIT_CORE, _core_of_tasks[0])
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_CORE, (0, _core_of_tasks[0][1]))
