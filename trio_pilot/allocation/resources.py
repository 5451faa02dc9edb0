"""The slot: what this pilot may use of its machine, and the share of each task in it."""

import math
import os
from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path

from trio_pilot.allocation import cgroup_limits, classad
from trio_pilot.parsing import AUTO
from trio_pilot.settings import Settings

MACHINE_AD, JOB_AD, SCRATCH = "_CONDOR_MACHINE_AD", "_CONDOR_JOB_AD", "_CONDOR_SCRATCH_DIR"

# What HTCondor sets for a job (its STARTER_NUM_THREADS_ENV_VARS): libraries that would use the whole machine heed them.
THREADS = (
    "CUBACORES",
    "GOMAXPROCS",
    "JULIA_NUM_THREADS",
    "MKL_NUM_THREADS",
    "NUMEXPR_NUM_THREADS",
    "OMP_NUM_THREADS",
    "OMP_THREAD_LIMIT",
    "OPENBLAS_NUM_THREADS",
    "PYTHON_CPU_COUNT",
    "ROOT_MAX_THREADS",
    "TF_LOOP_PARALLEL_ITERATIONS",
    "TF_NUM_THREADS",
)

DEFAULT_GRACE = 10.0  # seconds that tasks have where nobody says how many
PILOTS_OWN = 128 * 2**20  # bytes of a slot's memory that the pilot keeps for itself and its guardian

Ad = Mapping[str, classad.Literal]

KB, MB = 2**10, 2**20  # what DiskProvisioned and MemoryProvisioned count, as Disk and Memory do


@dataclass(frozen=True, slots=True)
class Allocation:
    """What there is, and who says so."""

    cpus: float
    cpus_by: str
    memory: int  # bytes
    memory_by: str
    disk: int | None = None  # bytes; None: as much as the disk has
    scratch: Path | None = None  # the directory that goes with the slot, in an HTCondor job
    vacate: float | None = None  # seconds from SIGTERM to SIGKILL, where that is known

    def __str__(self) -> str:
        disk = f", {self.disk / 1e9:.1f} GB disk" if self.disk else ""
        scratch = f", scratch {self.scratch}" if self.scratch else ""
        memory = f"{self.memory / 1e9:.1f} GB memory by {self.memory_by}"
        return f"{self.cpus:g} CPU(s) by {self.cpus_by}, {memory}{disk}{scratch}"

    @property
    def memory_of_tasks(self) -> int:
        """Bytes that are for the tasks, all together: the pilot and its guardian need some too."""
        return self.memory - min(PILOTS_OWN, self.memory // 4)


def find_allocation(environ: Mapping[str, str]) -> Allocation:
    """Find the slot: in the ads of an HTCondor job, else by control group and affinity. Blocks, a millisecond or so."""
    job, machine = (classad.read(environ.get(name)) for name in (JOB_AD, MACHINE_AD))
    cpus, cpus_by = _said(job, "CpusProvisioned", machine, "Cpus") or _own_cpus()
    memory, memory_by = _said(job, "MemoryProvisioned", machine, "Memory", MB) or _own_memory()
    disk = _said(job, "DiskProvisioned", machine, "Disk", KB)
    scratch = environ.get(SCRATCH)
    return Allocation(
        cpus,
        cpus_by,
        int(memory),
        memory_by,
        int(disk[0]) if disk else None,
        Path(scratch) if scratch else None,
        _vacate(job, machine),
    )


def _vacate(job: Ad, machine: Ad) -> float | None:
    """Of what the job wants and what the machine grants, the least counts."""
    said = [job.get("jobmaxvacatetime"), job.get("killsigtimeout"), machine.get("machinemaxvacatetime")]
    return min((seconds for seconds in said if isinstance(seconds, int | float) and seconds >= 0), default=None)


def _said(job: Ad, in_job: str, machine: Ad, in_machine: str, unit: int = 1) -> tuple[float, str] | None:
    for ad, name, who in ((machine, in_machine, "machine ad"), (job, in_job, "job ad")):
        number = ad.get(name.lower())
        if isinstance(number, int | float) and 0 < number < math.inf:
            return number * unit, who
    return None


def _own_cpus() -> tuple[float, str]:
    usable, quota = len(os.sched_getaffinity(0)), cgroup_limits.most_cpus()
    return (quota, "control group") if quota and quota < usable else (usable, "affinity")


def _own_memory() -> tuple[int, str]:
    there_is, limit = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES"), cgroup_limits.most_memory()
    return (limit, "control group") if limit and limit < there_is else (there_is, "machine")


def fitted(settings: Settings, slot: Allocation) -> Settings:
    """Give each task its share of a slot: put numbers in the place of `auto`, and tell tasks how many threads to use.

    With `auto` there are as many tasks at once as the CPUs, and the memory if a task's is known, are enough for.
    """
    tasks = settings.max_concurrent_tasks
    if tasks == AUTO:
        tasks = max(1, _most_at_once(settings, slot))
    memory = settings.task_memory
    if memory == AUTO:
        memory = slot.memory_of_tasks // tasks
    cpus: float = settings.task_cpus or settings.cpus_per_task or slot.cpus / tasks
    return replace(
        settings,
        max_concurrent_tasks=tasks,
        cpus_per_task=cpus,
        grace=_grace(settings, slot),
        task_memory=memory,
        task_env_json={**_threads(cpus), **settings.task_env_json},
        init_env_json={**_threads(slot.cpus), **settings.init_env_json},
    )


def _most_at_once(settings: Settings, slot: Allocation) -> int:
    by_cpus, memory = int(slot.cpus / (settings.cpus_per_task or 1)), settings.task_memory
    return by_cpus if memory in (None, AUTO) else min(by_cpus, slot.memory_of_tasks // memory)


def _grace(settings: Settings, slot: Allocation) -> float:
    if settings.grace != AUTO:
        return settings.grace
    return DEFAULT_GRACE if slot.vacate is None else max(0.0, slot.vacate - settings.last_steps)


def _threads(cpus: float) -> dict[str, str]:
    return dict.fromkeys(THREADS, str(max(1, int(cpus))))
