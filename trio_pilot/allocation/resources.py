"""The resources that this pilot may use on its machine, and the share of each task."""

import math
import os
import resource
from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path

from trio_pilot.allocation import cgroup_limits, classad
from trio_pilot.parsing import AUTO
from trio_pilot.settings import Settings

MACHINE_AD, JOB_AD, SCRATCH = "_CONDOR_MACHINE_AD", "_CONDOR_JOB_AD", "_CONDOR_SCRATCH_DIR"

# The variables that HTCondor sets for a job (its STARTER_NUM_THREADS_ENV_VARS): without them, libraries use all CPUs.
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

DEFAULT_GRACE = 10.0  # seconds that tasks have to end, if neither the user nor HTCondor sets a number
PILOTS_OWN = 128 * 2**20  # bytes of the memory that the pilot keeps for itself and its guardian

PIDS_OWN = 64  # processes and threads that the pilot keeps for itself and its guardian
OF_MACHINE = "/proc/sys/kernel/pid_max", "/proc/sys/kernel/threads-max"

Ad = Mapping[str, classad.Literal]

KB, MB = 2**10, 2**20  # the units of DiskProvisioned and Disk, and of MemoryProvisioned and Memory


@dataclass(frozen=True, slots=True)
class Allocation:
    """The resources that this pilot was given, and where each number comes from."""

    cpus: float
    cpus_by: str
    memory: int  # bytes
    memory_by: str
    disk: int | None = None  # bytes; None: no limit
    scratch: Path | None = None  # the scratch directory of an HTCondor job
    vacate: float | None = None  # seconds from SIGTERM to SIGKILL, if known

    def __str__(self) -> str:
        disk = f", {self.disk / 1e9:.1f} GB disk" if self.disk else ""
        scratch = f", scratch {self.scratch}" if self.scratch else ""
        memory = f"{self.memory / 1e9:.1f} GB memory by {self.memory_by}"
        return f"{self.cpus:g} CPU(s) by {self.cpus_by}, {memory}{disk}{scratch}"

    @property
    def memory_of_tasks(self) -> int:
        """The bytes for all tasks together: the pilot and its guardian need some too."""
        return self.memory - min(PILOTS_OWN, self.memory // 4)


def find_allocation(environ: Mapping[str, str]) -> Allocation:
    """Find the resources in the ads of an HTCondor job, else by control group and affinity. Blocks for about 1 ms."""
    job, machine = (classad.read(environ.get(name)) for name in (JOB_AD, MACHINE_AD))
    cpus, cpus_by = _from_ads(job, "CpusProvisioned", machine, "Cpus") or _own_cpus()
    memory, memory_by = _from_ads(job, "MemoryProvisioned", machine, "Memory", MB) or _own_memory()
    disk = _from_ads(job, "DiskProvisioned", machine, "Disk", KB)
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
    """Return the smallest of the numbers that the job asks for and the machine grants."""
    seconds = [job.get("jobmaxvacatetime"), job.get("killsigtimeout"), machine.get("machinemaxvacatetime")]
    return min((number for number in seconds if isinstance(number, int | float) and number >= 0), default=None)


def _from_ads(job: Ad, in_job: str, machine: Ad, in_machine: str, unit: int = 1) -> tuple[float, str] | None:
    for ad, name, who in ((machine, in_machine, "machine ad"), (job, in_job, "job ad")):
        number = ad.get(name.lower())
        if isinstance(number, int | float) and 0 < number < math.inf:
            return number * unit, who
    return None


def _own_cpus() -> tuple[float, str]:
    usable, quota = len(os.sched_getaffinity(0)), cgroup_limits.most_cpus()
    return (quota, "control group") if quota and quota < usable else (usable, "affinity")


def _own_memory() -> tuple[int, str]:
    installed, limit = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES"), cgroup_limits.most_memory()
    return (limit, "control group") if limit and limit < installed else (installed, "machine")


def pids_of_tasks() -> int:
    """Return the processes and threads for all tasks together.

    That is what control groups, the limit of this user or else the machine allow, less what the pilot needs. The limit of a
    user and those of the machine are shared with others: half of them is left to these.
    """
    shared = [int(Path(file).read_text()) for file in OF_MACHINE if Path(file).exists()]
    if os.geteuid() and (of_user := resource.getrlimit(resource.RLIMIT_NPROC)[0]) != resource.RLIM_INFINITY:
        shared.append(of_user)
    limits = [number // 2 for number in shared]
    if of_group := cgroup_limits.most_pids():
        limits.append(of_group)
    most = min(limits, default=2 * PIDS_OWN)
    return most - min(PIDS_OWN, most // 4)


def fitted(settings: Settings, allocation: Allocation) -> Settings:
    """Return settings that give each task its share: numbers in place of `auto`, and variables for the number of threads.

    With `auto` there are as many tasks at once as the CPUs are enough for, and the memory if that of a task is known.
    """
    tasks = settings.max_concurrent_tasks
    if tasks == AUTO:
        tasks = max(1, _most_at_once(settings, allocation))
    memory = settings.task_memory
    if memory == AUTO:
        memory = allocation.memory_of_tasks // tasks
    pids = settings.task_pids
    if pids == AUTO:
        pids = max(1, pids_of_tasks() // tasks)
    cpus: float = settings.task_cpus or settings.cpus_per_task or allocation.cpus / tasks
    return replace(
        settings,
        max_concurrent_tasks=tasks,
        cpus_per_task=cpus,
        grace=_grace(settings, allocation),
        task_memory=memory,
        task_pids=pids,
        task_env_json={**_threads(cpus), **settings.task_env_json},
        init_env_json={**_threads(allocation.cpus), **settings.init_env_json},
    )


def _most_at_once(settings: Settings, allocation: Allocation) -> int:
    by_cpus, memory = int(allocation.cpus / (settings.cpus_per_task or 1)), settings.task_memory
    return by_cpus if memory in (None, AUTO) else min(by_cpus, allocation.memory_of_tasks // memory)


def _grace(settings: Settings, allocation: Allocation) -> float:
    if settings.grace != AUTO:
        return settings.grace
    return DEFAULT_GRACE if allocation.vacate is None else max(0.0, allocation.vacate - settings.shutdown_time)


def _threads(cpus: float) -> dict[str, str]:
    return dict.fromkeys(THREADS, str(max(1, int(cpus))))
