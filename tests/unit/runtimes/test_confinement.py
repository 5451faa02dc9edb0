import itertools
import os
import resource
from collections.abc import Mapping
from pathlib import Path

import pytest

from tests.support.control_groups import NoGroups
from trio_pilot.cli.check_containers import check_limits
from trio_pilot.cli.check_finding import SkippedError
from trio_pilot.errors import NodeError
from trio_pilot.processes import cgroups
from trio_pilot.processes.cgroup_hierarchies import Hierarchy, hierarchies
from trio_pilot.processes.identity import own
from trio_pilot.processes.proc import is_relative, with_ancestors
from trio_pilot.runtimes import Limits
from trio_pilot.runtimes.confinement import Means, rlimit_commands
from trio_pilot.settings import Settings

V1 = """\
30 23 0:30 / /sys/fs/cgroup/cpu,cpuacct rw,nosuid - cgroup cgroup rw,cpu,cpuacct
31 23 0:31 / /sys/fs/cgroup/memory rw,nosuid shared:9 - cgroup cgroup rw,memory
32 23 0:32 / /sys/fs/cgroup/pids rw,nosuid - cgroup cgroup rw,pids
33 23 0:33 / /sys/fs/cgroup/systemd rw,nosuid - cgroup cgroup rw,xattr,name=systemd
"""
V2 = "31 23 0:26 {root} {mount} rw,nosuid shared:4 - cgroup2 cgroup2 rw,nsdelegate\n"
OTHERS = """\
22 1 8:1 / / rw - ext4 /dev/sda1 rw
23 22 0:22 / /sys/fs/cgroup rw - tmpfs tmpfs rw
24 22 8:2 / /media/caf\udce9\r\x0b\x85\u2028 rw - vfat /dev/sdb1 rw
25 22 0:24 / /mnt/c rw - 9p drvfs rw,aname=drvfs;path=C:\\Program Files\\Docker
"""


def found(directory: Path, mounts: str, groups: str) -> Mapping[str, tuple[str, bool]]:
    """Return the group found for each controller, and whether it is of version 2."""
    (directory / "mountinfo").write_bytes(os.fsencode(OTHERS + mounts))
    (directory / "cgroup").write_bytes(os.fsencode(groups))
    places = hierarchies(directory)
    return {name: (str(place.here), place.unified) for place in places for name in place.controllers}


def test_in_version_1_each_controller_has_its_own_group(tmp_path: Path) -> None:
    groups = "4:memory:/user/me\n3:cpu,cpuacct:/\n2:pids:/user.slice\n1:name=systemd:/x\n0::/x\n"
    assert found(tmp_path, V1, groups) == {
        "memory": ("/sys/fs/cgroup/memory/user/me", False),
        "cpu": ("/sys/fs/cgroup/cpu,cpuacct", False),
        "pids": ("/sys/fs/cgroup/pids/user.slice", False),
    }


@pytest.mark.parametrize(
    ("root", "path", "here"),
    [
        ("/", "/user.slice/me.scope", "user.slice/me.scope"),
        ("/docker/abc", "/docker/abc", ""),
        ("/docker/abc", "/docker/abc/a job", "a job"),
        ("/", "/caf\udce9", "caf\udce9"),
        ("/", "/job/trio-pilot-another/pilot", "job"),  # of a pilot that has not moved back
    ],
)
def test_in_version_2_the_controllers_are_those_that_the_group_has(tmp_path: Path, root: str, path: str, here: str) -> None:
    mount = tmp_path / "my groups"
    (mount / here).mkdir(parents=True)
    (mount / here / "cgroup.controllers").write_text("cpuset cpu io memory pids\n")
    mounts = V2.format(root=root, mount=str(mount).replace(" ", r"\040"))
    there = str(mount / here), True
    assert found(tmp_path, mounts, f"0::{path}\n") == {"memory": there, "cpu": there, "pids": there}


@pytest.mark.parametrize(("root", "path"), [("/docker/abc", "/docker/xyz"), ("/", "/../../other")])
def test_a_group_outside_of_the_mount_is_not_found(tmp_path: Path, root: str, path: str) -> None:
    (tmp_path / "cgroup.controllers").write_text("memory\n")
    assert found(tmp_path, V2.format(root=root, mount=tmp_path), f"0::{path}\n") == {}


def test_without_mounts_or_groups_no_hierarchy_is_found(tmp_path: Path) -> None:
    assert hierarchies(tmp_path) == []
    assert found(tmp_path, "", "0::/\n") == {}


def test_another_file_system_is_not_taken_for_control_groups(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    place = Hierarchy(tmp_path, tmp_path, frozenset({"memory"}), unified=False)
    monkeypatch.setattr(cgroups, "hierarchies", lambda: [place])
    groups = cgroups.Groups()
    assert groups.controllers == frozenset()
    assert groups.fault("memory") == f"no control group can be made in {tmp_path}: it has no memory.limit_in_bytes"
    assert groups.fault("pids") == "there is no control group hierarchy for pids"
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize(
    ("setting", "v1", "v2"),
    [
        (
            cgroups.memory(2**30),
            {"memory.limit_in_bytes": "1073741824", "memory.memsw.limit_in_bytes": "1073741824"},
            {"memory.max": "1073741824", "memory.swap.max": "0"},
        ),
        (cgroups.cpus(1.5), {"cpu.cfs_period_us": "100000", "cpu.cfs_quota_us": "150000"}, {"cpu.max": "150000 100000"}),
        (cgroups.cpus(0.0001), {"cpu.cfs_period_us": "100000", "cpu.cfs_quota_us": "1000"}, {"cpu.max": "1000 100000"}),
        (cgroups.pids(10), {"pids.max": "10"}, {"pids.max": "10"}),
    ],
)
def test_a_limit_is_written_in_the_format_of_its_controller(
    tmp_path: Path, setting: cgroups.Setting, v1: Mapping[str, str], v2: Mapping[str, str]
) -> None:
    for unified, expected in ((False, v1), (True, v2)):
        (group := tmp_path / str(unified)).mkdir()
        for name in expected:
            (group / name).touch()
        setting.write(group, unified=unified)
        assert {file.name: file.read_text() for file in group.iterdir()} == expected


def test_memory_is_limited_on_a_machine_that_does_not_count_swap(tmp_path: Path) -> None:
    cgroups.memory(2**30).write(tmp_path, unified=True)
    assert [file.name for file in tmp_path.iterdir()] == ["memory.max"]


@pytest.fixture
def no_groups(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(cgroups, "hierarchies", list)


def test_a_limit_of_the_pilot_itself_is_not_raised(monkeypatch: pytest.MonkeyPatch) -> None:
    hard = {resource.RLIMIT_AS: 2**30, resource.RLIMIT_NPROC: 7}
    monkeypatch.setattr(resource, "getrlimit", lambda which: (hard[which], hard[which]))
    monkeypatch.setattr(os, "geteuid", lambda: 1000)
    steps = list(rlimit_commands(Limits(memory=2**40, pids=5), 2, Means(NoGroups())))
    assert steps == ["ulimit -v 1048576", "{ ulimit -u 7 2> /dev/null || ulimit -p 7; }"]


def test_cpus_are_assigned_in_turns(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(os, "sched_getaffinity", lambda _pid: {0, 2, 4, 6})
    means = Means(NoGroups())
    assert [means.some_cpus(0.5) for _ in range(3)] == [[0], [2], [4]]
    assert [len(means.some_cpus(number)) for number in (1, 2, 3.9, 4, 64)] == [1, 2, 3, 4, 4]


@pytest.mark.parametrize(("user", "by"), [(0, "not enforced: "), (1000, "rlimit, all processes of this user together")])
def test_what_enforces_a_limit_is_named_for_those_that_are_set(monkeypatch: pytest.MonkeyPatch, user: int, by: str) -> None:
    monkeypatch.setattr(os, "geteuid", lambda: user)
    means = Means(NoGroups())
    assert means.enforcement(Limits()) == {}
    assert means.enforcement(Limits(pids=5)).keys() == {"pids"}
    assert means.enforcement(Limits(pids=5))["pids"].startswith(by)
    means.taskset = None
    assert means.enforcement(Limits(cpus=1))["cpus"].endswith("and there is no taskset")


@pytest.mark.usefixtures("no_groups")
async def test_check_tells_of_a_limit_that_nobody_enforces(monkeypatch: pytest.MonkeyPatch) -> None:
    settings = Settings(runtime="process", task_pids=5, task_memory=2**30)
    monkeypatch.setattr(os, "geteuid", lambda: 0)
    with pytest.raises(NodeError, match=r"^--task-pids: not enforced: there is no control group"):
        await check_limits(settings)
    monkeypatch.setattr(os, "geteuid", lambda: 1000)
    assert (await check_limits(settings)).startswith("memory: rlimit, the address space of each process for itself (")


async def test_check_has_nothing_to_tell_without_limits() -> None:
    with pytest.raises(SkippedError):
        await check_limits(Settings(runtime="process"))


def test_relatives_are_found_by_descent() -> None:
    assert is_relative(os.getpid())
    assert is_relative(os.getppid())
    stranger = next(pid for pid in itertools.count(2) if not Path(f"/proc/{pid}").exists())
    assert not is_relative(stranger)
    assert own().pid in with_ancestors(os.getpid())
