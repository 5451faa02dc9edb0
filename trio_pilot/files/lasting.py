"""Directories that are removed with a batch job, and those that outlast it."""

import os
from collections.abc import Iterator, Mapping
from pathlib import Path

from trio_pilot.files.filesystem import exists

# Variables that a batch system sets in its jobs (or pods); one that sets its own scratch directory needs no other.
JOBS = ("_CONDOR_SCRATCH_DIR", "SLURM_JOB_ID", "PBS_JOBID", "LSB_JOBID", "SGE_TASK_ID", "KUBERNETES_SERVICE_HOST")
SCRATCH = ("_CONDOR_SCRATCH_DIR", "OSG_WN_TMP", "SLURM_TMPDIR", "PBS_JOBDIR", "TMPDIR")
SHARED_TEMPORARY = ("/tmp", "/var/tmp", "/dev/shm")  # noqa: S108 -- batch systems give each job its own, or clear them
OF_CONTAINERS = ("overlay", "tmpfs", "ramfs")  # file systems that end with a container or a machine


def is_lasting(directory: Path, environ: Mapping[str, str]) -> bool:
    """Return whether a directory outlasts the batch job that this process is in; outside of a job, each does. Blocks."""
    if not any(environ.get(name) for name in JOBS):
        return True
    path = directory.resolve()
    return not any(path.is_relative_to(scratch) for scratch in _scratch(environ)) and _file_system(path) not in OF_CONTAINERS


def _scratch(environ: Mapping[str, str]) -> Iterator[Path]:
    names = [*(environ[name] for name in SCRATCH if environ.get(name)), *SHARED_TEMPORARY]
    return (Path(name).resolve() for name in names)


def _file_system(path: Path) -> str:
    """Return the type of the file system that a path is on, or would be made on; empty if it cannot be found out."""
    there = next(parent for parent in (path, *path.parents) if exists(parent))
    device = there.stat().st_dev
    number = f"{os.major(device)}:{os.minor(device)}"
    for line in Path("/proc/self/mountinfo").read_text(errors="replace").splitlines():
        fields = line.split()
        if fields[2] == number:
            return fields[fields.index("-") + 1]
    return ""
