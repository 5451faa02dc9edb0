"""The identity of a pilot's process. All that a pilot starts bears it, so that others can check if it is dead."""

import errno
import os
import re
from dataclasses import dataclass
from functools import cache
from pathlib import Path

# Indices of the fields of /proc/PID/stat after the name: number 0 here is the third in proc(5).
STATE, PARENT, SESSION, FLAGS, THREADS, STARTED, ENV_START, ENV_END = 0, 1, 3, 6, 17, 19, 47, 48
DEAD_STATES = ("Z", "X", "x")

# What `str` writes, and nothing that no kernel would: any user may write such a text, in any size, where pilots read it.
WRITTEN = re.compile(r"([0-9a-z]{1,32})\.([1-9][0-9]{0,9})\.([1-9][0-9]{0,6})\.(0|[1-9][0-9]{0,18})")


@dataclass(frozen=True, slots=True)
class Identity:
    """A process, distinct from all others that had, or will have, its number.

    A number belongs to a PID namespace, and is used again: so the time at which the process started is part of the identity,
    and the boot of the machine from which that time is counted.
    """

    boot: str  # /proc/sys/kernel/random/boot_id, without its dashes
    namespace: int  # inode of its PID namespace
    pid: int
    started: int  # clock ticks since the boot

    def __str__(self) -> str:
        return f"{self.boot}.{self.namespace}.{self.pid}.{self.started}"

    @classmethod
    def parse(cls, text: str) -> "Identity | None":
        """Parse what `str` returns; None if it is something else. Any text is possible: other users write some of them."""
        found = WRITTEN.fullmatch(text)
        return cls(found[1], int(found[2]), int(found[3]), int(found[4])) if found else None

    @property
    def is_dead(self) -> bool:
        """Whether it is certainly dead: of this boot and namespace, where it would be visible, and not there any more."""
        here = own()
        if (self.boot, self.namespace) != (here.boot, here.namespace):
            return False
        facts = stat_of(self.pid)
        if facts is None:
            return not _is_hidden(self.pid)
        return facts[STATE] in DEAD_STATES or int(facts[STARTED]) != self.started


def _is_hidden(pid: int) -> bool:
    """Return whether there is a process that /proc does not show: another user's, if it is mounted with `hidepid`."""
    try:
        os.kill(pid, 0)
    except OSError as error:
        return error.errno == errno.EPERM
    except OverflowError:  # no process can have such a number
        return False
    return True


@cache
def own() -> Identity:
    """Return the identity of this process."""
    boot = Path("/proc/sys/kernel/random/boot_id").read_text().strip().replace("-", "")
    facts = stat_of(os.getpid())
    assert facts  # this process is alive  # noqa: S101
    return Identity(boot, Path("/proc/self/ns/pid").stat().st_ino, os.getpid(), int(facts[STARTED]))


def stat_of(pid: int) -> list[str] | None:
    """Return the fields of /proc/PID/stat that follow the name; None if there is no such process."""
    try:
        return Path(f"/proc/{pid}/stat").read_text(errors="replace").rpartition(")")[2].split()
    except (OSError, ValueError):  # a number of more digits than Python converts is ValueError
        return None
