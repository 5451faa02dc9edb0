"""Processes to measure: each is started in a directory of its own, its CPU and memory are read, and it is ended."""

import subprocess
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path

CPUCLOCK_SCHED = 2  # the CPU clock of process P is (~P << 3 | 2), as clock_getcpuclockid(3) makes it: in nanoseconds
END_TIMEOUT = 30.0  # seconds to end after SIGTERM
MAX_SHOWN = 2000  # characters from the end of the output in an error


class Measured:
    """A process, and the file to which its stdout and stderr are written."""

    def __init__(self, process: "subprocess.Popen[bytes]", log: Path) -> None:
        self.process = process
        self.pid = process.pid
        self.log = log
        self.started = time.monotonic()

    def cpu(self) -> float:
        """Return the seconds of CPU that the process has used, with threads that have ended and without its children.

        The sum over /proc/PID/task falls when a thread ends, and /proc/PID/stat counts in hundredths of a second.
        """
        return time.clock_gettime(~self.pid << 3 | CPUCLOCK_SCHED)

    def memory(self) -> float:
        """Return the resident memory in MB."""
        (line,) = (line for line in Path(f"/proc/{self.pid}/status").read_text().splitlines() if line.startswith("VmRSS"))
        return int(line.split()[1]) * 1024 / 1e6

    def assert_alive(self) -> None:
        """Raise AssertionError with the end of the output if the process has ended."""
        code = self.process.poll()
        assert code is None, f"the process has ended with {code}: {self.output()[-MAX_SHOWN:]}"

    def output(self) -> str:
        """Return the output so far."""
        return self.log.read_text(errors="replace")

    def wait_for(self, words: str, timeout: float = 60) -> float:
        """Wait until the output contains these words; return the time (monotonic)."""
        deadline = time.monotonic() + timeout
        while words not in self.output():
            self.assert_alive()
            assert time.monotonic() < deadline, f"no {words!r} in the output: {self.output()[-MAX_SHOWN:]}"
            time.sleep(0.002)
        return time.monotonic()

    def end(self) -> int:
        """End the process by SIGTERM, and return its exit code."""
        self.process.terminate()
        return self.process.wait(END_TIMEOUT)


@contextmanager
def running(command: Sequence[str], directory: Path, env: Mapping[str, str]) -> Iterator[Measured]:
    """Run a command in a directory; kill it at the end, if it has not ended."""
    log = directory / "output.log"
    with log.open("wb") as output:
        process = subprocess.Popen(
            command, cwd=directory, env=env, stdin=subprocess.DEVNULL, stdout=output, stderr=output, start_new_session=True
        )
    try:
        yield Measured(process, log)
    finally:
        process.kill()
        process.wait(END_TIMEOUT)
