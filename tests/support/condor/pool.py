"""A private HTCondor pool of one machine, in namespaces of its own: Debian's packages in a root directory of their own."""

import json
import os
import shutil
import signal
import subprocess
import tempfile
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from tests.support.processes import processes_with
from tests.support.servers import UnavailableError, debian, free_port

HERE = Path(__file__).parent
SUITE = "trixie"  # HTCondor 23.9, Python 3.13
PACKAGES = "minicondor", "python3", "bubblewrap", "procps"
USER, USER_ID = "pilotuser", 5001

START_TIMEOUT = 90.0  # seconds; it takes 2 to 7 on an idle machine
COMMAND_TIMEOUT = 60.0


class CommandError(Exception):
    """A command has failed."""


@contextmanager
def open_pool(config: str = "", *seen: Path) -> Iterator["Pool"]:
    """Run a pool; its jobs see this machine's network, and of its files only the pool's `jobs`, and what is to be seen."""
    if os.geteuid() != 0:
        raise UnavailableError("a private HTCondor pool takes root")
    root = debian(SUITE, *PACKAGES)
    directory = Path(tempfile.mkdtemp(prefix="trio-pilot-condor-"))
    pool = Pool(directory)
    try:
        pool.start(root, config, seen)
        yield pool
    finally:
        pool.stop()
        shutil.rmtree(directory)


@dataclass
class Job:
    """What was submitted: a cluster of jobs."""

    pool: "Pool"
    cluster: str

    def ads(self, *, past: bool = False) -> list[dict[str, Any]]:
        """Give the ClassAds of its jobs: those in the queue, or those in the history."""
        return self.pool.ads("condor_history" if past else "condor_q", self.cluster)

    def wait(self, seconds: float = COMMAND_TIMEOUT) -> list[dict[str, Any]]:
        """Wait until no job of it is in the queue; give their last ads."""
        deadline = time.monotonic() + seconds
        while self.ads():
            assert time.monotonic() < deadline, self.ads()
            time.sleep(0.2)
        return self.ads(past=True)


class Pool:
    """A pool that runs."""

    def __init__(self, directory: Path) -> None:
        self._directory = directory
        self.jobs = directory / "jobs"  # for what is submitted, and what comes back
        self._namespaces: subprocess.Popen[bytes] | None = None

    def start(self, root: Path, config: str, seen: Sequence[Path]) -> None:
        """Start it; it is ready when a slot and the queue are known to all."""
        self.jobs.mkdir()
        os.chown(self.jobs, USER_ID, USER_ID)
        self._directory.chmod(0o755)
        port = free_port()
        ports = f"COLLECTOR_HOST = 127.0.0.1:{port}\nSHARED_PORT_PORT = {port}\n"
        (self._directory / "condor.conf").write_text((HERE / "pool.conf").read_text() + ports + config)
        entering: list[str | Path] = ["sh", HERE / "enter.sh", root, self._directory, self.jobs, str(USER_ID), *seen]
        log = self._directory / "output.log"
        with log.open("wb") as output:
            # From the main thread: its life is tied to the thread that starts it.
            self._namespaces = subprocess.Popen(
                ["unshare", "--mount", "--pid", "--ipc", "--uts", "--fork", *entering],
                stdin=subprocess.DEVNULL,
                stdout=output,
                stderr=output,
                start_new_session=True,
            )
        self._wait_until_ready(log)

    def _wait_until_ready(self, log: Path) -> None:
        assert self._namespaces
        deadline = time.monotonic() + START_TIMEOUT
        while time.monotonic() < deadline and self._namespaces.poll() is None:
            with suppress(OSError, CommandError):
                if self.run("condor_status", "-af", "Name") and self.run("condor_status", "-schedd", "-af", "Name"):
                    return
            time.sleep(0.1)
        raise UnavailableError(f"HTCondor does not start: {log.read_text()[-2000:]}")

    @property
    def _inside(self) -> str:
        """The process that all others die with: the first of its PID namespace."""
        assert self._namespaces
        return Path(f"/proc/{self._namespaces.pid}/task/{self._namespaces.pid}/children").read_text().strip()

    def stop(self) -> None:
        """Kill all that runs in it."""
        if self._namespaces:
            if inside := self._inside:
                os.kill(int(inside), signal.SIGKILL)
            self._namespaces.wait()

    def run(self, *command: str, given: str = "", directory: Path | None = None) -> str:
        """Run a command in it; give what it prints."""
        namespaces = ["nsenter", f"--target={self._inside}", "--mount", "--pid", "--ipc", "--uts"]
        user = ["setpriv", f"--reuid={USER}", f"--regid={USER}", "--init-groups"]
        environment = ["env", "-i", f"--chdir={directory or self.jobs}", f"HOME=/home/{USER}", "LANG=C.UTF-8"]
        done = subprocess.run(
            [*namespaces, *user, *environment, "PATH=/usr/bin:/bin:/usr/sbin:/sbin", *command],
            input=given,
            capture_output=True,
            text=True,
            timeout=COMMAND_TIMEOUT,
            check=False,
        )
        if done.returncode:
            raise CommandError(f"{' '.join(command)}: {done.stderr}{done.stdout}")
        return done.stdout

    def processes_with(self, word: str) -> list[int]:
        """List its processes that have a word in their command line or environment, but those in namespaces of their own."""
        return [pid for pid in processes_with(word) if _namespace(str(pid)) == _namespace(self._inside)]

    def submit(self, description: str, directory: Path) -> Job:
        """Submit jobs from a directory below `jobs`."""
        said = self.run("condor_submit", "-terse", "-", given=description, directory=directory)
        return Job(self, said.split(".")[0])

    def ads(self, command: str, cluster: str) -> list[dict[str, Any]]:
        said = self.run(command, cluster, "-json")
        found: list[dict[str, Any]] = json.loads(said) if said.strip() else []
        return found


def _namespace(pid: str) -> str:
    with suppress(OSError):
        return str(Path(f"/proc/{pid}/ns/pid").readlink())
    return ""
