import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytest

from trio_pilot.allocation import cgroup_limits, classad
from trio_pilot.allocation.cpu_sets import CpuSets
from trio_pilot.allocation.resources import PILOTS_OWN, THREADS, Allocation, find_allocation, fitted
from trio_pilot.parsing import AUTO
from trio_pilot.processes.cgroup_hierarchies import Hierarchy
from trio_pilot.settings import Settings, load

GB = 2**30
SLOT = Allocation(8, "test", 16 * GB, "test")

# Lines of a real job's ads (HTCondor 23.9.6).
JOB = """\
Args = ""
AutoClusterAttrs = "KFlops,MachineLastMatchTime"
CpusProvisioned = 2
DiskProvisioned = 2048
Err = "/home/a \\"b\\"\\\\c"
ExitBySignal = false
JobCurrentStartDate = 1795376125
MemoryProvisioned = 1024
OriginalTime = 3600
PERIODIC_CHECKPOINT = ((time() - LastPeriodicCheckpoint) / 60.0) > (180.0 + -5)
RemoteWallClockTime = 0.0
RequestDisk = DiskUsage
"""
MACHINE = "Cpus = 3\nDisk = 4096\nMemory = 2048\nMachineMaxVacateTime = 20\n"


def ads(directory: Path, **texts: str) -> Mapping[str, str]:
    for name, text in texts.items():
        (directory / name).write_text(text)
    return {f"_CONDOR_{name}_AD": str(directory / name) for name in texts}


def test_an_ad_is_read_as_data(tmp_path: Path) -> None:
    assert classad.read(ads(tmp_path, JOB=JOB)["_CONDOR_JOB_AD"]) == {
        "args": "",
        "autoclusterattrs": "KFlops,MachineLastMatchTime",
        "cpusprovisioned": 2,
        "diskprovisioned": 2048,
        "err": '/home/a "b"\\c',
        "exitbysignal": False,
        "jobcurrentstartdate": 1795376125,
        "memoryprovisioned": 1024,
        "originaltime": 3600,
        "remotewallclocktime": 0.0,
    }


@pytest.mark.parametrize(
    "text", ["", "\n\n", "= 3", "Cpus", "Cpus = ", "Cpus = many", 'Cpus = "3', "\xff\0 = 3", "Cpus = inf"]
)
def test_nonsense_in_an_ad_is_no_error(tmp_path: Path, text: str) -> None:
    found = find_allocation(ads(tmp_path, MACHINE=text, JOB=text))
    assert found.cpus_by in ("affinity", "control group")


@pytest.mark.parametrize("text", ['a "b"\\c', "\n\r\t\a\b\v\f", "plain", "\x01\x7f"])
def test_a_quoted_text_is_read_as_it_was(tmp_path: Path, text: str) -> None:
    assert classad.read(ads(tmp_path, JOB=f"X = {classad.quoted(text, 100)}")["_CONDOR_JOB_AD"]) == {"x": text}


def test_the_machine_ad_comes_before_the_job_ad(tmp_path: Path) -> None:
    environ = {**ads(tmp_path, JOB=JOB, MACHINE=MACHINE), "_CONDOR_SCRATCH_DIR": "/scratch"}
    assert find_allocation(environ) == Allocation(3, "machine ad", 2 * GB, "machine ad", 4 * 2**20, Path("/scratch"), 20)


def test_without_a_machine_ad_the_job_ad_counts(tmp_path: Path) -> None:
    environ = {**ads(tmp_path, JOB=JOB), "_CONDOR_MACHINE_AD": "/nonexistent"}
    assert find_allocation(environ) == Allocation(2, "job ad", GB, "job ad", 2 * 2**20)


def test_without_ads_affinity_and_memory_of_the_machine_count(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(cgroup_limits, "most_cpus", lambda: None)
    monkeypatch.setattr(cgroup_limits, "most_memory", lambda: None)
    found = find_allocation({})
    assert (found.cpus, found.cpus_by, found.memory_by) == (len(os.sched_getaffinity(0)), "affinity", "machine")
    assert found.memory > GB / 4


def test_a_lower_limit_of_the_control_group_counts(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(cgroup_limits, "most_cpus", lambda: 0.5)
    monkeypatch.setattr(cgroup_limits, "most_memory", lambda: 10**8)
    found = find_allocation({})
    assert (found.cpus, found.cpus_by, found.memory, found.memory_by) == (0.5, "control group", 10**8, "control group")


@pytest.mark.parametrize(
    ("unified", "files", "cpus", "memory"),
    [
        (True, {"a/b/cpu.max": "max 100000", "a/cpu.max": "150000 100000", "a/b/memory.max": "max"}, 1.5, None),
        (True, {"a/b/cpu.max": "50000 100000", "a/memory.max": "4096", "a/b/memory.max": "8192"}, 0.5, 4096),
        (False, {"a/b/cpu.cfs_quota_us": "-1", "a/b/cpu.cfs_period_us": "100000"}, None, None),
        (False, {"a/cpu.cfs_quota_us": "20", "a/cpu.cfs_period_us": "10"}, 2.0, None),
        (False, {"a/memory.limit_in_bytes": "4096", "a/b/memory.limit_in_bytes": "9223372036854771712"}, None, 4096),
    ],
)
def test_the_tightest_group_counts(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, unified: bool, files: Any, cpus: float | None, memory: int | None
) -> None:
    (tmp_path / "a/b").mkdir(parents=True)
    for name, text in files.items():
        (tmp_path / name).write_text(f"{text}\n")
    (tmp_path.parent / "memory.max").write_text("1")  # of a group outside the mount
    found = Hierarchy(tmp_path, tmp_path / "a/b", frozenset({"memory", "cpu"}), unified)
    monkeypatch.setattr(cgroup_limits, "hierarchies", lambda: [found])
    assert (cgroup_limits.most_cpus(), cgroup_limits.most_memory()) == (cpus, memory)


def settled(**texts: str) -> Settings:
    return fitted(load(texts, {}, Path("/nonexistent")), SLOT)


@pytest.mark.parametrize(
    ("texts", "tasks", "cpus", "memory"),
    [
        ({}, 1, 8, None),
        ({"max_concurrent_tasks": "4"}, 4, 2, None),
        ({"max_concurrent_tasks": "auto"}, 8, 1, None),
        ({"max_concurrent_tasks": "Auto", "cpus_per_task": "3"}, 2, 3, None),
        ({"max_concurrent_tasks": "auto", "cpus_per_task": "0.5"}, 16, 0.5, None),
        ({"max_concurrent_tasks": "auto", "cpus_per_task": "100"}, 1, 100, None),
        ({"max_concurrent_tasks": "auto", "task_memory": "5g"}, 3, 8 / 3, 5 * GB),
        ({"max_concurrent_tasks": "auto", "task_memory": "auto"}, 8, 1, (16 * GB - PILOTS_OWN) // 8),
        ({"max_concurrent_tasks": "2", "task_memory": "auto", "task_cpus": "1.5"}, 2, 1.5, (16 * GB - PILOTS_OWN) // 2),
    ],
)
def test_tasks_have_their_shares(texts: dict[str, str], tasks: int, cpus: float, memory: int | None) -> None:
    fit = settled(**texts)
    assert (fit.max_concurrent_tasks, fit.cpus_per_task, fit.task_memory) == (tasks, cpus, memory)
    assert {fit.task_env_json[name] for name in THREADS} == {str(max(1, int(cpus)))}
    assert fit.init_env_json["OMP_NUM_THREADS"] == "8"


def test_a_number_of_threads_that_the_user_sets_stays() -> None:
    fit = settled(task_env_json='{"OMP_NUM_THREADS": 5}', max_concurrent_tasks="8")
    assert (fit.task_env_json["OMP_NUM_THREADS"], fit.task_env_json["MKL_NUM_THREADS"]) == ("5", "1")


def test_each_running_task_has_cpus_of_its_own(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(os, "sched_getaffinity", lambda _: {1, 3, 5, 7, 9})
    pins = CpuSets(2, 2.5)
    with pins.lend() as one, pins.lend() as other:
        assert len({*one, *other}) == 4
        assert {*one, *other} <= {1, 3, 5, 7, 9}
    with pins.lend() as again:
        assert again in (one, other)


def test_few_cpus_are_shared(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(os, "sched_getaffinity", lambda _: {0, 1})
    pins = CpuSets(3, 1)
    with pins.lend() as one, pins.lend() as two, pins.lend() as three:
        assert {*one, *two, *three} == {0, 1}


def test_without_cpu_sets_there_is_no_restriction() -> None:
    with CpuSets(0, 1).lend() as cpus:
        assert cpus == ()


@pytest.mark.parametrize(("limit", "slots", "pids"), [(1064, 1, 1000), (1064, 4, 250), (40, 1, 30), (2, 2, 1), (3, 100, 1)])
def test_each_task_has_its_share_of_the_processes_of_the_group(
    monkeypatch: pytest.MonkeyPatch, limit: int, slots: int, pids: int
) -> None:
    monkeypatch.setattr(cgroup_limits, "most_pids", lambda: limit)
    settings = fitted(Settings(task_pids=AUTO, max_concurrent_tasks=slots), find_allocation({}))
    assert settings.task_pids == pids


def test_without_a_limit_half_of_the_machines_processes_are_for_tasks(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(cgroup_limits, "most_pids", lambda: None)
    most = fitted(Settings(task_pids=AUTO), find_allocation({})).task_pids
    assert most is not None
    assert 0 < most < int(Path("/proc/sys/kernel/pid_max").read_text()) / 2


def test_without_auto_there_is_no_limit_of_processes() -> None:
    assert fitted(Settings(), find_allocation({})).task_pids is None
