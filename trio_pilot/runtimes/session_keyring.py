"""The session keyring of this process, which its children inherit: keyrings(7)."""

import ctypes

from trio_pilot.runtimes.seccomp import number_of

JOIN_SESSION_KEYRING = 1  # of keyctl(2)


def join_new_session_keyring() -> None:
    """Replace the session keyring of this thread by a new and empty one, which the children that it starts inherit.

    Where the kernel has no keyrings, or does not let this process use them, its children cannot either.
    """
    if number := number_of("keyctl"):
        ctypes.CDLL(None).syscall(number, JOIN_SESSION_KEYRING, None)
