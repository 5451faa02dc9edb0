"""Sets of CPUs, one for each task that runs."""

import os
import random
from collections import deque
from collections.abc import Iterator
from contextlib import contextmanager


class CpuSets:
    """As many sets of CPUs as tasks run at once. If there are not enough CPUs for all, some are in several sets."""

    def __init__(self, tasks: int, cpus_per_task: float) -> None:
        usable, size = sorted(os.sched_getaffinity(0)), max(1, int(cpus_per_task))
        # Other pilots of this machine may be allowed to use the same CPUs: each begins elsewhere.
        begin = random.randrange(len(usable))  # noqa: S311
        sets = ({usable[(begin + task * size + one) % len(usable)] for one in range(size)} for task in range(tasks))
        self._free = deque(tuple(sorted(cpus)) for cpus in sets)

    @contextmanager
    def lend(self) -> Iterator[tuple[int, ...]]:
        """Lend a set of CPUs to the body; an empty one, which is no restriction, if there are no sets."""
        cpus = self._free.popleft() if self._free else ()
        try:
            yield cpus
        finally:
            if cpus:
                self._free.append(cpus)
