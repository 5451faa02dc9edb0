"""Users that tests run as."""

import os
from collections.abc import Iterator
from contextlib import contextmanager

import pytest

NOBODY = 65534

AS_ROOT = os.geteuid() == 0


# A user that may read everything (Python may be installed in a home directory) and write nothing.
UNPRIVILEGED = (
    [
        *("setpriv", f"--reuid={NOBODY}", f"--regid={NOBODY}", "--clear-groups"),
        *("--inh-caps=-all,+dac_read_search", "--ambient-caps=-all,+dac_read_search"),
    ]
    if AS_ROOT
    else []
)

needs_root = pytest.mark.skipif(not AS_ROOT, reason="mounting file systems and changing users takes root")


@contextmanager
def as_nobody() -> Iterator[None]:
    """Run the body as a user that file permissions apply to, which every user except root is already."""
    with as_user(NOBODY):
        yield


@contextmanager
def as_user(user: int) -> Iterator[None]:
    """Run the body as another user, if this one is root."""
    if not AS_ROOT:
        yield
        return
    os.setegid(user)
    os.seteuid(user)
    try:
        yield
    finally:
        os.seteuid(0)
        os.setegid(0)
