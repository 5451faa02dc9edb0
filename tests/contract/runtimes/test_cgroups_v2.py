"""Control groups of version 2, in User Mode Linux: a kernel that is a process, with the root of this machine."""

import json
import os
import shlex
import subprocess
import sys
import textwrap
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytest

from tests.support.images import bubblewrap_fault
from tests.support.paths import ROOT
from tests.support.servers import UnavailableError, debian
from tests.support.services import cannot
from tests.support.users import AS_ROOT, UNPRIVILEGED

BOOT_TIMEOUT = 120.0  # seconds; it takes 5
SUITE = "sid"  # kernels before 6.13 panic on a CPU with AMX: they cannot set the registers of their processes
HERE = "/mnt"  # where that kernel sees this machine's root

# It writes to directories of its own only: the root of this machine is read-only to it.
INIT = textwrap.dedent("""\
    #!/bin/sh
    export HOME=/root PATH=/usr/local/sbin:/usr/local/bin:/usr/sbin:/usr/bin:/sbin:/bin PYTHONDONTWRITEBYTECODE=1
    mount -t proc proc /proc; mount -t sysfs sysfs /sys; mount -t tmpfs -o mode=1777 tmpfs /run
    mkdir /run/groups /run/code /run/test; mount -t cgroup2 none /run/groups
    mount --bind {repository} /run/code; mount --bind {directory} /run/test; cd /run/code
    echo '+memory +cpu +pids' > /run/groups/cgroup.subtree_control
    run() {{  # NAME SCRIPT [COMMAND...]
        name=$1 script=$2; shift 2
        echo 0 > /run/groups/$name/cgroup.procs
        PYTHONPATH=/run/code TMPDIR=/run timeout 60 "$@" {python} /run/test/$script 2> /run/errors || cat /run/errors
        echo 0 > /run/groups/cgroup.procs
    }}
    for name in alone together delegated killed; do mkdir /run/groups/$name; done
    run alone inside.py
    sh -c 'echo 0 > /run/groups/together/cgroup.procs; exec sleep 1000' &
    until grep -q . /run/groups/together/cgroup.procs; do sleep 0.01; done
    run together inside.py
    chown -R 65534 /run/groups/delegated
    run delegated inside.py {unprivileged}
    run killed killed.py
    for _ in $(seq 200); do test -e /run/swept && break; sleep 0.05; done
    echo o > /proc/sysrq-trigger; sleep 60
""")

INSIDE = textwrap.dedent("""\
    import json, os, subprocess, sys, tempfile, trio
    from dataclasses import asdict, replace
    from pathlib import Path
    from tests.support.containers import new_container
    from trio_pilot.processes import cgroups
    from trio_pilot.runtimes import confinement
    from trio_pilot.runtimes import Limits, Options, bubblewrap, process

    ALL = Limits(64 << 20, 0.5, 10)
    COMMANDS = {
        "memory": (["dd", "if=/dev/zero", "of=/dev/null", "bs=200M", "count=1"], Limits(64 << 20)),
        "pids": (["sh", "-c", "for number in $(seq 50); do sleep 1 & done; wait"], Limits(pids=10)),
        "all": (["sh", "-c", "exit 42"], ALL),
        "where": (["cat", "/proc/self/cgroup"], ALL),
    }
    HERE = Path("/run/groups", Path("/proc/self/cgroup").read_text().strip().removeprefix("0::/"))

    async def run_all(family):
        directory = Path(tempfile.mkdtemp())
        async with family.open_runtime(Options(0.3)) as runtime:
            for name, (command, limit) in COMMANDS.items():
                container = replace(new_container(directory, command), limits=limit)
                ended = asdict(await runtime.run(container))
                yield name, {**ended, "stdout": container.stdout.read_text(), "stderr": container.stderr.read_text()}

    async def main():
        found = {"how": dict(await confinement.enforcement(ALL))}
        for family in (process, bubblewrap) if not os.geteuid() else (process,):
            found[family.__name__.rpartition(".")[2]] = {name: ended async for name, ended in run_all(family)}
        found["left"] = [str(path) for path in HERE.rglob("trio-pilot-*")]
        found["back"] = str(os.getpid()) in (HERE / "cgroup.procs").read_text().split()
        found["controllers"] = (HERE / "cgroup.subtree_control").read_text()
        print("FOUND", HERE.name, json.dumps(found), flush=True)

    trio.run(main)
""")


# A pilot that is killed, and its guardian.
KILLED = textwrap.dedent("""\
    import json, os, signal, subprocess, sys, time
    from pathlib import Path
    from trio_pilot.processes import cgroups
    from trio_pilot.processes.identity import Identity, own

    HERE = Path("/run/groups/killed")

    def wait(condition):
        deadline = time.monotonic() + 20
        while not condition() and time.monotonic() < deadline:
            time.sleep(0.01)

    def live():
        (entrance,) = cgroups.Groups().make("container", [cgroups.pids(10)]).entrances
        subprocess.Popen(["sh", "-c", f"echo 0 > {entrance}; exec sleep 1000"])
        wait(entrance.read_text)
        subprocess.Popen([sys.executable, __file__, str(own())])
        os.kill(os.getpid(), signal.SIGKILL)

    def clean_up(pilot):
        wait(lambda: pilot.is_dead)
        before = [str(path) for path in HERE.rglob("trio-pilot-*")]
        found = {"before": before, "swept": cgroups.sweep(lambda one: one == pilot)}
        found["left"] = [str(path) for path in HERE.rglob("trio-pilot-*")]
        found["back"] = str(os.getpid()) in (HERE / "cgroup.procs").read_text().split()
        found["controllers"] = (HERE / "cgroup.subtree_control").read_text()
        print("FOUND", HERE.name, json.dumps(found), flush=True)
        Path("/run/swept").touch()

    clean_up(Identity.parse(sys.argv[1])) if sys.argv[1:] else live()
""")


@pytest.fixture(scope="session")
def linux(tmp_path_factory: pytest.TempPathFactory) -> Mapping[str, Any]:
    """Boot it, and return what was found in each of its groups."""
    if not AS_ROOT:
        pytest.skip("it needs root: root inside can do no more than this user outside")
    assert bubblewrap_fault() is None
    try:
        kernel = debian(SUITE, "user-mode-linux")
    except UnavailableError as error:
        cannot(str(error))
    directory = tmp_path_factory.mktemp("uml")
    (directory / "inside.py").write_text(INSIDE)
    (directory / "killed.py").write_text(KILLED)
    init = directory / "init"
    names = {"repository": ROOT, "directory": directory, "python": sys.executable}
    init.write_text(INIT.format(**names, unprivileged=shlex.join(UNPRIVILEGED)))
    init.chmod(0o755)
    said = boot(kernel, init)
    results = {line.split()[1]: json.loads(line.split(" ", 2)[2]) for line in said.splitlines() if line.startswith("FOUND")}
    assert results.keys() == {"alone", "together", "delegated", "killed"}, said
    return results


def boot(kernel: Path, init: Path) -> str:
    """Boot a kernel of another Debian, with its own libraries, on this machine's root; return what it prints."""
    outside = ["--ro-bind", str(kernel), "/", "--bind", "/", HERE, "--dev-bind", "/dev", "/dev", "--proc", "/proc"]
    root = ["root=/dev/root", "rootfstype=hostfs", f"rootflags={HERE}", "ro", f"init={init}"]
    done = subprocess.run(
        [
            "bwrap",
            *outside,
            "linux.uml",
            "mem=512M",
            *root,
            "quiet",
            f"uml_dir={HERE}{init.parent}",
            "con=null",
            "con0=fd:0,fd:1",
        ],
        stdin=subprocess.DEVNULL,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        env={**os.environ, "TMPDIR": f"{HERE}{init.parent}"},
        timeout=BOOT_TIMEOUT,
        check=False,
    )
    return done.stdout.decode(errors="replace")


@pytest.mark.parametrize(("where", "runtime"), [("alone", "process"), ("alone", "bubblewrap"), ("delegated", "process")])
def test_limits_are_enforced_by_groups_of_version_2(linux: Mapping[str, Any], where: str, runtime: str) -> None:
    assert linux[where]["how"] == dict.fromkeys(("memory", "cpus", "pids"), "control group")
    ended = linux[where][runtime]
    assert ended["memory"] == {"code": 137, "out_of_memory": True, "stdout": "", "stderr": ""}
    assert ended["pids"]["code"] != 0
    assert "fork" in ended["pids"]["stderr"]
    assert ended["all"] == {"code": 42, "out_of_memory": False, "stdout": "", "stderr": ""}


def test_a_container_cannot_see_the_group_of_its_payload(linux: Mapping[str, Any]) -> None:
    place = linux["alone"]["process"]["where"]["stdout"].strip()
    assert place.startswith("0::/alone/trio-pilot-")
    assert place.endswith("/payload")
    assert linux["alone"]["bubblewrap"]["where"]["stdout"] == "0::/\n"


@pytest.mark.parametrize("where", ["alone", "together", "delegated", "killed"])
def test_a_pilot_leaves_its_group_as_it_was(linux: Mapping[str, Any], where: str) -> None:
    assert linux[where]["left"] == []
    assert linux[where]["back"]
    assert linux[where]["controllers"].strip() == ""


def test_rlimits_are_used_if_other_processes_are_in_the_group(linux: Mapping[str, Any]) -> None:
    how = linux["together"]["how"]
    assert how["memory"].startswith("rlimit, the address space of each process for itself (no control group can be made in")
    assert "others are in it too, such as process" in how["memory"]
    assert how["cpus"].startswith("affinity")
    assert how["pids"].startswith("not enforced")
    assert linux["together"]["process"]["memory"]["code"] == 1
    assert linux["together"]["process"]["all"]["code"] == 42


def test_the_guardian_of_a_killed_pilot_finds_its_containers(linux: Mapping[str, Any]) -> None:
    assert len(linux["killed"]["before"]) == 1
    assert linux["killed"]["swept"] == 1
