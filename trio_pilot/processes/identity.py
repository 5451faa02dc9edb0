"""Who a pilot is, in words that it leaves on all it starts, so that another can tell whether it is still there."""

import errno
import os
from dataclasses import dataclass
from functools import cache
from pathlib import Path

# Fields of /proc/PID/stat after the name, proc(5): its third is the first of these.
STATE, PARENT, SESSION, FLAGS, THREADS, STARTED, ENV_START, ENV_END = 0, 1, 3, 6, 17, 19, 47, 48
DEAD_STATES = ("Z", "X", "x")


@dataclass(frozen=True, slots=True)
class Identity:
    """A process, told apart from all others that ever had, or will have, its number.

    A number is of a PID namespace, and used again: so the moment at which the process started is part of it, and the boot
    of the machine that this is counted from.
    """

    boot: str  # /proc/sys/kernel/random/boot_id, without its dashes
    namespace: int  # inode of its PID namespace
    pid: int
    started: int  # clock ticks since the boot

    def __str__(self) -> str:
        return f"{self.boot}.{self.namespace}.{self.pid}.{self.started}"

    @classmethod
    def parse(cls, text: str) -> "Identity | None":
        """Read what `str` has written; None if it is nothing of ours."""
        parts = text.split(".")
        if len(parts) != 4 or not all(part.isascii() and part.isdigit() for part in parts[1:]):
            return None
        return cls(parts[0], *map(int, parts[1:]))

    @property
    def is_dead(self) -> bool:
        """Whether it is sure to be dead: of this boot and namespace, where we can look, and not there any more."""
        here = own()
        if (self.boot, self.namespace) != (here.boot, here.namespace):
            return False
        facts = stat_of(self.pid)
        if facts is None:
            return not _is_hidden(self.pid)
        return facts[STATE] in DEAD_STATES or int(facts[STARTED]) != self.started


def _is_hidden(pid: int) -> bool:
    """Tell whether there is a process that /proc does not show: another user's, where it is mounted with `hidepid`."""
    try:
        os.kill(pid, 0)
    except OSError as error:
        return error.errno == errno.EPERM
    return True


@cache
def own() -> Identity:
    """Tell who this process is."""
    boot = Path("/proc/sys/kernel/random/boot_id").read_text().strip().replace("-", "")
    facts = stat_of(os.getpid())
    assert facts  # we are alive  # noqa: S101
    return Identity(boot, Path("/proc/self/ns/pid").stat().st_ino, os.getpid(), int(facts[STARTED]))


def stat_of(pid: int) -> list[str] | None:
    """Give the fields of /proc/PID/stat that follow the name; None if there is no such process."""
    try:
        return Path(f"/proc/{pid}/stat").read_text(errors="replace").rpartition(")")[2].split()
    except OSError:
        return None
