"""CPUs that are lent to tasks, each some of its own."""

import os
import random
from collections import deque
from collections.abc import Iterator
from contextlib import contextmanager


class CpuSets:
    """As many sets of CPUs as tasks run at once. Where there are not CPUs enough for all, some are in several."""

    def __init__(self, tasks: int, cpus_per_task: float) -> None:
        ours, size = sorted(os.sched_getaffinity(0)), max(1, int(cpus_per_task))
        # Other pilots of this machine, should it let all of them have all CPUs, are to begin elsewhere.
        begin = random.randrange(len(ours))  # noqa: S311
        sets = ({ours[(begin + task * size + one) % len(ours)] for one in range(size)} for task in range(tasks))
        self._free = deque(tuple(sorted(cpus)) for cpus in sets)

    @contextmanager
    def lent(self) -> Iterator[tuple[int, ...]]:
        """Lend a set of CPUs; none at all (which is no restriction) where there are no sets."""
        cpus = self._free.popleft() if self._free else ()
        try:
            yield cpus
        finally:
            if cpus:
                self._free.append(cpus)
