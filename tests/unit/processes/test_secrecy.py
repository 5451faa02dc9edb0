import os
import subprocess
import sys

from tests.support.users import UNPRIVILEGED
from tests.support.waiting import PATIENCE

# A process without secrets, whose child has the limit of core files that it was itself started with.
PROGRAM = """
import ctypes, os, resource, trio
from pathlib import Path
from trio_pilot.processes.children import Children, Command
from trio_pilot.processes.proc import environment_of
from trio_pilot.processes.secrecy import keep_secrets

async def main():
    resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
    keep_secrets()
    with open("/dev/null", "wb") as out:
        children = Children()
        argv = ["sh", "-c", "env -i setsid sleep 9 & exec sleep 9"]
        child = children.spawn(Command(argv, dict(os.environ), Path("/"), out, out, "m"))
        await trio.sleep(0.1)
        print(environment_of(child.pid) is not None, len(os.listdir("/proc/self/fd")) > 2)
        await child.end(0)
        await children.end_strays(child)
    print(children.orphans(), ctypes.CDLL(None).prctl(3, 0, 0, 0, 0))

trio.run(main)
"""

CORE = """
import resource, subprocess
from trio_pilot.processes.secrecy import keep_secrets, passing_on_core_limit
resource.setrlimit(resource.RLIMIT_CORE, (5120, 5120))
keep_secrets()
keep_secrets()
subprocess.run(["prlimit", "--core", "--output=SOFT", "--noheadings"])
with passing_on_core_limit():
    subprocess.run(["prlimit", "--core", "--output=SOFT", "--noheadings"])
subprocess.run(["prlimit", "--core", "--output=SOFT", "--noheadings"])
"""


def test_a_process_that_keeps_its_secrets_still_sees_its_children() -> None:
    command = [*UNPRIVILEGED, sys.executable, "-c", PROGRAM]
    done = subprocess.run(command, env=os.environ, capture_output=True, text=True, timeout=PATIENCE, check=False)
    assert done.stderr == ""
    assert done.stdout == "True True\n[] 0\n"


def test_core_files_are_for_children_only() -> None:
    done = subprocess.run([sys.executable, "-c", CORE], capture_output=True, text=True, timeout=PATIENCE, check=True)
    assert done.stdout.split() == ["0", "5120", "0"]
