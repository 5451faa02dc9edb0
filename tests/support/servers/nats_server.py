"""A private NATS server with JetStream."""

import os
import shutil
import signal
import subprocess
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Protocol

from tests.support.servers.debian_packages import need
from tests.support.servers.server import MAX_MESSAGE_SIZE, free_port, running, wait_for_port
from tests.support.waiting import SERVER_STOP

NATS_USERS = """
authorization {
  users = [
    { user: "pilot", password: "secret" }
    { user: "poor", password: "secret", permissions: { publish: { deny: ["$JS.API.STREAM.CREATE.>"] } } }
  ]
}
"""


@contextmanager
def nats() -> Iterator["NatsServer"]:
    """Run a NATS server with JetStream."""
    need("nats-server", "nats-server")
    with (
        tempfile.TemporaryDirectory(prefix="trio-pilot-nats-") as directory,
        running(NatsServer(Path(directory))) as server,
    ):
        yield server


class ConsumerNames(Protocol):
    """The names of a stream and of a consumer of it."""

    @property
    def stream(self) -> str: ...

    @property
    def consumer(self) -> str: ...


class NatsServer:
    """A NATS server. It starts within milliseconds: a test may have one of its own."""

    def __init__(self, directory: Path, more: str = "") -> None:
        self.directory = directory
        self.port = free_port()
        self._log = directory / "output.log"
        self._process: subprocess.Popen[bytes] | None = None
        store = f"jetstream {{ store_dir: {directory} }}"
        listening = f"listen: 127.0.0.1:{self.port}\nmax_payload: {MAX_MESSAGE_SIZE}"
        (directory / "nats.conf").write_text(f"{listening}\n{store}\n{more}\n")

    @property
    def address(self) -> str:
        return f"127.0.0.1:{self.port}"

    @property
    def version(self) -> str:
        done = subprocess.run([self._program(), "--version"], capture_output=True, text=True, check=True)
        return done.stdout.split()[-1].removeprefix("v")

    @property
    def logs(self) -> list[Path]:
        return [self._log]

    def start(self) -> None:
        command = ["setpriv", "--pdeathsig", "KILL", self._program(), "-c", str(self.directory / "nats.conf")]
        with self._log.open("ab") as log:
            self._process = subprocess.Popen(command, stdin=subprocess.DEVNULL, stdout=log, stderr=log)
        wait_for_port(self.port, self._process, self._log)

    def stop(self, number: int = 9) -> None:
        if self._process is not None:
            self._process.send_signal(number)
            self._process.wait(SERVER_STOP)
            self._process = None

    def kill(self, place: ConsumerNames) -> None:
        """Kill the server, but not while it writes the state of a consumer to the disk.

        Version 2.9 empties the file first. Killed at that moment (once in some 200 times), it
        starts again with all messages.
        """
        assert self._process
        while True:
            self._process.send_signal(signal.SIGSTOP)
            os.waitpid(self._process.pid, os.WUNTRACED)
            if self._deliveries_of(place).stat().st_size:
                break
            self._process.send_signal(signal.SIGCONT)
        self.stop()

    def deliveries(self, place: ConsumerNames) -> int:
        """Return the number of deliveries of a queue that are on the disk (nats-server's store.go, encodeConsumerState)."""
        file = self._deliveries_of(place)
        stored = file.read_bytes() if file.exists() else b""
        return stored[4] if stored else 0  # magic, version, two acknowledged; and what is below 128 is one byte

    def forget_deliveries(self, place: ConsumerNames) -> None:
        """Remove the state of a consumer, as if the server had been killed before it wrote it, a tenth of a second later."""
        self._deliveries_of(place).unlink()

    def _deliveries_of(self, place: ConsumerNames) -> Path:
        return self.directory / "jetstream/$G/streams" / place.stream / "obs" / place.consumer / "o.dat"

    def _program(self) -> str:
        return shutil.which("nats-server", path=f"{os.environ['PATH']}:/usr/sbin") or "nats-server"
