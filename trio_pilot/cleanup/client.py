"""The pilot's end of the pipe to its guardian."""

import logging
import os
import signal
import subprocess
import sys
from collections.abc import AsyncIterator, Iterable, Iterator
from contextlib import asynccontextmanager, contextmanager, suppress
from pathlib import Path
from typing import Protocol

import trio

import trio_pilot
from trio_pilot.cleanup.guardian import parsed
from trio_pilot.cleanup.sweep import sweep
from trio_pilot.errors import NodeError, map_exceptions
from trio_pilot.log import LOGGER
from trio_pilot.processes import identity, threads
from trio_pilot.processes.children import Children, let_outlive

DISMISSAL_TIMEOUT = 2.0  # seconds for a guardian to end when it is dismissed
RESTART_INTERVAL = 0.5  # seconds between two starts of a guardian that is killed again and again

BLOCKED = (signal.SIGTERM, signal.SIGINT, signal.SIGHUP)  # signals that are meant for the pilot

# Without the user's site and paths, with only the standard library and this package: it starts in some 30 ms.
PROGRAM = "import sys; sys.path.insert(0, sys.argv.pop(1)); from trio_pilot.cleanup.guardian import main; main()"


class Guardian(Protocol):
    """Removes what this pilot leaves when it dies, and what earlier pilots left."""

    def watch(self, what: str, path: Path) -> None:
        """Clean up at a path when this pilot is dead: the socket of an `engine`, a `data` directory, or one of `images`."""

    def outlive_pilot(self) -> None:
        """Stay after the end of this pilot, and remove what it could not remove."""

    async def sweep(self) -> None:
        """Remove what dead pilots left. Errors are logged only."""


@asynccontextmanager
async def open_guardian() -> AsyncIterator["GuardianClient"]:
    """Start a guardian, and another one whenever it ends; dismiss it at the end.

    Raises:
        NodeError: it cannot be started.
    """
    client = GuardianClient()
    client.start()
    async with trio.open_nursery() as nursery:
        nursery.start_soon(client.keep_running)
        try:
            yield client
        finally:
            nursery.cancel_scope.cancel()
            await client.dismiss()


class GuardianClient:
    """A guardian process, and what it watches."""

    def __init__(self) -> None:
        self._watched: list[str] = []
        self._outlives_pilot = False
        self._process: subprocess.Popen[bytes] | None = None

    def start(self) -> None:
        """Start a guardian, in a session of its own and with an empty environment: it must not have the tokens."""
        package = str(Path(trio_pilot.__file__).parent.parent)
        command = [sys.executable, "-I", "-S", "-c", PROGRAM, package, str(identity.own()), *self._watched]
        with map_exceptions({OSError: NodeError}, "cannot start the guardian"), _blocked(BLOCKED):
            self._process = subprocess.Popen(
                command,
                bufsize=0,
                stdin=subprocess.PIPE,
                stdout=subprocess.DEVNULL,
                stderr=subprocess.DEVNULL,
                env={},
                start_new_session=True,
            )
        Children.register(self._process.pid)

    def watch(self, what: str, path: Path) -> None:
        """Clean up at a path when this pilot is dead: the socket of an `engine`, a `data` directory, or one of `images`."""
        line = f"{what} {os.fsencode(path).hex()}"
        self._watched.append(line)
        self._send(line)

    def outlive_pilot(self) -> None:
        """Let the guardian stay after the end of this pilot, to remove what it could not remove."""
        self._outlives_pilot = True

    async def keep_running(self) -> None:
        """Start another guardian whenever one has ended, until cancelled."""
        was_refused = False
        while True:
            if self._process:
                await self._ended()
                LOGGER.warning("the guardian has ended before the pilot; starting another")
            self._forget()
            try:
                self.start()
            except NodeError as error:  # logged once: it is tried again until there is a process to be had
                LOGGER.log(logging.DEBUG if was_refused else logging.WARNING, "%s", error)
            was_refused = self._process is None
            await trio.sleep(RESTART_INTERVAL)

    async def dismiss(self) -> None:
        """End the guardian, and wait until it has ended; if it is to outlive the pilot, only close its pipe."""
        if self._outlives_pilot and self._process and self._process.stdin:
            let_outlive(self._process.pid)
            self._process.stdin.close()
            return
        self._send("done")
        with trio.move_on_after(DISMISSAL_TIMEOUT, shield=True):
            await self._ended()
        if self._process:
            self._process.kill()
            self._process.wait()
        self._forget()

    async def sweep(self) -> None:
        """Remove what dead pilots left. If cancelled, wait for it nevertheless: each of its steps has a deadline."""
        await threads.run_sync(sweep, [parsed(line) for line in self._watched])

    def _send(self, line: str) -> None:
        with suppress(BrokenPipeError):  # it has ended; the next one is sent all lines
            if self._process and self._process.stdin:
                self._process.stdin.write(f"{line}\n".encode())

    async def _ended(self) -> None:
        process = self._process
        while process and process.poll() is None:
            try:
                pidfd = os.pidfd_open(process.pid)
            except OSError:  # no file descriptor is left
                await trio.sleep(RESTART_INTERVAL)
                continue
            try:
                await trio.lowlevel.wait_readable(pidfd)
            finally:
                os.close(pidfd)

    def _forget(self) -> None:
        if self._process and self._process.stdin:
            self._process.stdin.close()
            Children.unregister(self._process.pid)
        self._process = None


@contextmanager
def _blocked(signals: Iterable[signal.Signals]) -> Iterator[None]:
    """Block some signals. A child inherits the mask; the guardian could not ignore the signals soon enough by itself."""
    before = signal.pthread_sigmask(signal.SIG_BLOCK, signals)
    try:
        yield
    finally:
        signal.pthread_sigmask(signal.SIG_SETMASK, before)
