"""A private HTCondor pool of one machine: Debian's packages in a root directory and namespaces of their own."""

import json
import os
import shutil
import signal
import subprocess
import tempfile
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from tests.support.processes import processes_with
from tests.support.servers import UnavailableError, debian, free_port
from tests.support.waiting import POOL, POOL_COMMAND, SERVER_START, until_sync

HERE = Path(__file__).parent
SUITE = "trixie"  # HTCondor 23.9, Python 3.13
PACKAGES = "minicondor", "python3", "bubblewrap", "procps"
USER, USER_ID = "pilotuser", 5001


class CommandError(Exception):
    """A command of HTCondor failed."""


@contextmanager
def open_pool(config: str = "", seen: Mapping[str, Path] | None = None) -> Iterator["Pool"]:
    """Run a pool. Its jobs see this machine's network, the pool's `jobs`, and at the paths in `seen` other directories."""
    if os.geteuid() != 0:
        raise UnavailableError("a private HTCondor pool takes root")
    root = debian(SUITE, *PACKAGES)
    directory = Path(tempfile.mkdtemp(prefix="trio-pilot-condor-"))
    pool = Pool(directory)
    try:
        pool.start(root, config, seen or {})
        yield pool
    finally:
        pool.stop()
        shutil.rmtree(directory)


@dataclass
class Job:
    """A cluster of jobs that was submitted."""

    pool: "Pool"
    cluster: str

    def ads(self, *, past: bool = False) -> list[dict[str, Any]]:
        """Return the ClassAds of its jobs that are in the queue, or of those that are in the history."""
        return self.pool.ads("condor_history" if past else "condor_q", self.cluster)

    def ad(self) -> dict[str, Any]:
        """Return the ClassAd of its only job, from the queue or else from the history."""
        [ad] = self.ads() or self.ads(past=True)
        return ad

    def until(self, holds: Callable[[dict[str, Any]], object], what: str) -> dict[str, Any]:
        """Wait until something holds of the ClassAd of its only job, and return that ad."""
        deadline = time.monotonic() + POOL.seconds
        while not holds(ad := self.ad()):
            assert time.monotonic() < deadline, f"in vain: {what}: {ad}"
            time.sleep(POOL.interval)
        return ad

    def wait(self) -> list[dict[str, Any]]:
        """Wait until none of its jobs is in the queue, and return their last ClassAds."""
        until_sync(lambda: not self.ads(), f"the jobs of cluster {self.cluster} to end", POOL)
        return self.ads(past=True)

    def remove(self) -> None:
        """Remove its jobs from the queue."""
        self.pool.run("condor_rm", self.cluster)


class Pool:
    """The daemons of a pool, and the commands that its user runs."""

    def __init__(self, directory: Path) -> None:
        self._directory = directory
        self.jobs = directory / "jobs"  # for what is submitted, and what comes back
        self._namespaces: subprocess.Popen[bytes] | None = None

    def start(self, root: Path, config: str, seen: Mapping[str, Path]) -> None:
        """Start the daemons, and wait until the collector knows a slot and the schedd."""
        self.jobs.mkdir()
        os.chown(self.jobs, USER_ID, USER_ID)
        self._directory.chmod(0o755)
        port = free_port()
        ports = f"COLLECTOR_HOST = 127.0.0.1:{port}\nSHARED_PORT_PORT = {port}\n"
        (self._directory / "condor.conf").write_text((HERE / "pool.conf").read_text() + ports + config)
        entering: list[str | Path] = ["sh", HERE / "enter.sh", root, self._directory, self.jobs, str(USER_ID)]
        entering += [f"{source}:{place}" for place, source in seen.items()]
        log = self._directory / "output.log"
        with log.open("wb") as output:
            # From the main thread: it ends with the thread that starts it.
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
        deadline = time.monotonic() + SERVER_START
        while time.monotonic() < deadline and self._namespaces.poll() is None:
            with suppress(OSError, CommandError):
                if self.run("condor_status", "-af", "Name") and self.run("condor_status", "-schedd", "-af", "Name"):
                    return
            time.sleep(POOL.interval)
        raise UnavailableError(f"HTCondor does not start: {log.read_text()[-2000:]}")

    @property
    def _inside(self) -> str:
        """The pid of the first process of its PID namespace, which all others die with."""
        assert self._namespaces
        return Path(f"/proc/{self._namespaces.pid}/task/{self._namespaces.pid}/children").read_text().strip()

    def stop(self) -> None:
        """Kill all its processes."""
        if self._namespaces:
            if inside := self._inside:
                os.kill(int(inside), signal.SIGKILL)
            self._namespaces.wait()

    def run(self, *command: str, given: str = "", directory: Path | None = None, seconds: float = POOL_COMMAND) -> str:
        """Run a command as the pool's user, and return what it prints."""
        namespaces = ["nsenter", f"--target={self._inside}", "--mount", "--pid", "--ipc", "--uts"]
        user = ["setpriv", f"--reuid={USER}", f"--regid={USER}", "--init-groups"]
        environment = ["env", "-i", f"--chdir={directory or self.jobs}", f"HOME=/home/{USER}", "LANG=C.UTF-8"]
        done = subprocess.run(
            [*namespaces, *user, *environment, "PATH=/usr/bin:/bin:/usr/sbin:/sbin", *command],
            input=given,
            capture_output=True,
            text=True,
            timeout=seconds,
            check=False,
        )
        if done.returncode:
            raise CommandError(f"{' '.join(command)}: {done.stderr}{done.stdout}")
        return done.stdout

    def processes_with(self, word: str) -> list[int]:
        """Return its processes with a word in their command line or environment, except those in PID namespaces below."""
        return [pid for pid in processes_with(word) if _namespace(str(pid)) == _namespace(self._inside)]

    def submit(self, description: str, directory: Path) -> Job:
        """Submit jobs from a directory below `jobs`."""
        said = self.run("condor_submit", "-terse", "-", given=description, directory=directory)
        return Job(self, said.split(".")[0])

    def ads(self, command: str, cluster: str) -> list[dict[str, Any]]:
        """Return what a command lists of a cluster. It is asked again if it fails: a schedd that is busy may not answer."""
        deadline = time.monotonic() + POOL.seconds
        while True:
            try:
                said = self.run(command, cluster, "-json")
            except (CommandError, subprocess.TimeoutExpired):
                if time.monotonic() > deadline:
                    raise
                time.sleep(POOL.interval)
                continue
            found: list[dict[str, Any]] = json.loads(said) if said.strip() else []
            return found


def _namespace(pid: str) -> str:
    with suppress(OSError):
        return str(Path(f"/proc/{pid}/ns/pid").readlink())
    return ""
