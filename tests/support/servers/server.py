"""What servers of all kinds have in common: ports, a namespace that ends with the tests, logs."""

import os
import random
import signal
import socket
import subprocess
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Protocol, TypeVar

from tests.support.waiting import SERVER_START, SERVER_STOP

PORTS = 10_000, 32_768  # below ip_local_port_range
MAX_MESSAGE_SIZE = 4 * 2**20
SHOWN = 4000  # characters of a log, with a test that fails

# A server ends with its tests, and with it all that it started. None of its processes becomes a child of pytest, which tests
# of children make a subreaper.
IN_NAMESPACE = (
    *("setpriv", "--pdeathsig", "KILL"),
    *("unshare", "--pid", "--fork", "--kill-child", "--mount-proc"),
)


class UnavailableError(Exception):
    """This machine cannot run the server."""


class Server(Protocol):
    """A server that can be started and stopped."""

    @property
    def logs(self) -> list[Path]:
        """The files that it writes its log to."""

    def start(self) -> None: ...

    def stop(self) -> None: ...


S = TypeVar("S", bound=Server)
RUNNING: list[Server] = []


@contextmanager
def running(server: S) -> Iterator[S]:
    """Run a server; print the end of its logs if it or the body fails."""
    RUNNING.append(server)
    try:
        server.start()
        yield server
    except BaseException:
        for title, text in last_words(server):
            print(title, text, sep="\n")
        raise
    finally:
        server.stop()
        RUNNING.remove(server)


def last_words(server: Server) -> Iterator[tuple[str, str]]:
    """Yield a title and the end of each of its logs that exists."""
    for log in server.logs:
        if log.exists():
            yield f"end of {log}", log.read_text(errors="replace")[-SHOWN:]


def free_port() -> int:
    """Return a port that is free, and that the system gives to no connection before a server binds it."""
    with socket.socket() as probe:
        while True:
            with suppress(OSError):
                probe.bind(("127.0.0.1", port := random.randrange(*PORTS)))
                return port


def wait_for_port(port: int, process: "subprocess.Popen[bytes]", log: Path) -> None:
    """Wait until a server accepts connections.

    Raises:
        UnavailableError: it ended, or took too long.
    """
    deadline = time.monotonic() + SERVER_START
    while time.monotonic() < deadline and process.poll() is None:
        with suppress(OSError), socket.create_connection(("127.0.0.1", port), timeout=1):
            return
        time.sleep(0.05)
    raise UnavailableError(f"it does not start: {log.read_text(errors='replace')[-2000:]}")


def end_namespace(process: "subprocess.Popen[bytes]") -> None:
    """Kill a process that was started IN_NAMESPACE, with all that it started."""
    with suppress(FileNotFoundError, ProcessLookupError):
        for child in Path(f"/proc/{process.pid}/task/{process.pid}/children").read_text().split():
            os.kill(int(child), signal.SIGKILL)
    process.wait(SERVER_STOP)
