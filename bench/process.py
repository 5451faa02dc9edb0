"""Processes that are measured: started in a directory of their own, looked at in /proc, and ended."""

import os
import subprocess
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path

TICKS = os.sysconf("SC_CLK_TCK")
END_TIMEOUT = 30.0  # seconds to end by itself when told to
LAST_WORDS = 2000  # characters of a log that are shown when something went wrong


class Measured:
    """A process, and the file that its stdout and stderr go to."""

    def __init__(self, process: "subprocess.Popen[bytes]", log: Path) -> None:
        self.process = process
        self.pid = process.pid
        self.log = log
        self.started = time.monotonic()

    def cpu(self) -> float:
        """Give the seconds of CPU that its threads have used; its children are not in it (proc(5): utime, stime)."""
        after_name = Path(f"/proc/{self.pid}/stat").read_text().rpartition(")")[2].split()
        return (int(after_name[11]) + int(after_name[12])) / TICKS

    def cpu_to_the_nanosecond(self) -> float:
        """Give the seconds of CPU that those of its threads have used which are still there."""
        return sum(int(path.read_text().split()[0]) for path in Path(f"/proc/{self.pid}/task").glob("*/schedstat")) / 1e9

    def memory(self) -> float:
        """Give its resident memory in MB."""
        (line,) = (line for line in Path(f"/proc/{self.pid}/status").read_text().splitlines() if line.startswith("VmRSS"))
        return int(line.split()[1]) * 1024 / 1e6

    def assert_alive(self) -> None:
        """Raise AssertionError with its last words if it has ended."""
        code = self.process.poll()
        assert code is None, f"it has ended with {code}: {self.said()[-LAST_WORDS:]}"

    def said(self) -> str:
        """Give all that it has said."""
        return self.log.read_text(errors="replace")

    def wait_for(self, words: str, timeout: float = 60) -> float:
        """Wait until it has said that; give the time (monotonic) by which it had."""
        deadline = time.monotonic() + timeout
        while words not in self.said():
            self.assert_alive()
            assert time.monotonic() < deadline, f"it has not said {words!r}: {self.said()[-LAST_WORDS:]}"
            time.sleep(0.002)
        return time.monotonic()

    def end(self) -> int:
        """Tell it to end, and give its exit code."""
        self.process.terminate()
        return self.process.wait(END_TIMEOUT)


@contextmanager
def running(command: Sequence[str], directory: Path, env: Mapping[str, str]) -> Iterator[Measured]:
    """Run a command in a directory; killed in the end, if it has not ended."""
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
