"""The pilot's end of the pipe to its guardian."""

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
from trio_pilot.processes import identity
from trio_pilot.processes.children import Children, spare

DISMISSAL_TIMEOUT = 2.0  # seconds for a guardian to go when it is told to
RESTART_INTERVAL = 0.5  # seconds between two starts of a guardian that somebody ends again and again

NOT_FOR_IT = (signal.SIGTERM, signal.SIGINT, signal.SIGHUP)  # but for the pilot

# Without the user's site and paths, and with nothing but the standard library and us: it starts in some 30 ms.
PROGRAM = "import sys; sys.path.insert(0, sys.argv.pop(1)); from trio_pilot.cleanup.guardian import main; main()"


class Guardian(Protocol):
    """Sees to it that nothing is left, of this pilot and of those before it."""

    def watch(self, what: str, path: Path) -> None:
        """Have the socket of an `engine`, a `data` directory, or one of `images`, seen to when this pilot is dead."""

    def outlive_us(self) -> None:
        """Have what this pilot could not remove removed after its end."""

    async def sweep(self) -> None:
        """Remove what dead pilots have left. Failing is no reason to stop."""


@asynccontextmanager
async def open_guardian() -> AsyncIterator["GuardianClient"]:
    """Start a guardian, and another whenever it is ended; dismiss it in the end.

    Raises:
        NodeError: it cannot be started.
    """
    client = GuardianClient()
    client.start()
    async with trio.open_nursery() as nursery:
        nursery.start_soon(client.keep)
        try:
            yield client
        finally:
            nursery.cancel_scope.cancel()
            await client.dismiss()


class GuardianClient:
    """A guardian, and what it was told."""

    def __init__(self) -> None:
        self._watched: list[str] = []
        self._outlives_us = False
        self._process: subprocess.Popen[bytes] | None = None

    def start(self) -> None:
        """Start a guardian, in a session of its own and with an empty environment: the tokens are not for it."""
        package = str(Path(trio_pilot.__file__).parent.parent)
        command = [sys.executable, "-I", "-S", "-c", PROGRAM, package, str(identity.own()), *self._watched]
        with map_exceptions({OSError: NodeError}, "cannot start the guardian"), _blocked(NOT_FOR_IT):
            self._process = subprocess.Popen(
                command,
                bufsize=0,
                stdin=subprocess.PIPE,
                stdout=subprocess.DEVNULL,
                stderr=subprocess.DEVNULL,
                env={},
                start_new_session=True,
            )
        Children.know(self._process.pid)

    def watch(self, what: str, path: Path) -> None:
        """Have the socket of an `engine`, a `data` directory, or one of `images`, seen to when this pilot is dead."""
        line = f"{what} {os.fsencode(path).hex()}"
        self._watched.append(line)
        self._tell(line)

    def outlive_us(self) -> None:
        """Have the guardian stay after our end, for what we could not remove."""
        self._outlives_us = True

    async def keep(self) -> None:
        """Start another guardian whenever it has ended, until cancelled."""
        while True:
            await self._ended()
            LOGGER.warning("the guardian was ended by somebody; starting another")
            self._forget()
            try:
                self.start()
            except NodeError as error:
                LOGGER.warning("%s", error)
            await trio.sleep(RESTART_INTERVAL)

    async def dismiss(self) -> None:
        """Tell the guardian to go, and wait until it is gone; or let it be, if it is to find us dead."""
        if self._outlives_us and self._process and self._process.stdin:
            spare(self._process.pid)
            self._process.stdin.close()
            return
        self._tell("done")
        with trio.move_on_after(DISMISSAL_TIMEOUT, shield=True):
            await self._ended()
        if self._process:
            self._process.kill()
            self._process.wait()
        self._forget()

    async def sweep(self) -> None:
        """Remove what dead pilots have left. Cancelled, it is waited for: each of its steps has a deadline."""
        await trio.to_thread.run_sync(sweep, [parsed(line) for line in self._watched])

    def _tell(self, line: str) -> None:
        with suppress(BrokenPipeError):  # it was ended; the next one is told
            if self._process and self._process.stdin:
                self._process.stdin.write(f"{line}\n".encode())

    async def _ended(self) -> None:
        process = self._process
        if process is None:
            return
        pidfd = os.pidfd_open(process.pid)
        try:
            while process.poll() is None:
                await trio.lowlevel.wait_readable(pidfd)
        finally:
            os.close(pidfd)

    def _forget(self) -> None:
        if self._process and self._process.stdin:
            self._process.stdin.close()
            Children.forget(self._process.pid)
        self._process = None


@contextmanager
def _blocked(signals: Iterable[signal.Signals]) -> Iterator[None]:
    """Have a child start with some signals blocked: a mask is inherited, and it could not ignore them soon enough."""
    before = signal.pthread_sigmask(signal.SIG_BLOCK, signals)
    try:
        yield
    finally:
        signal.pthread_sigmask(signal.SIG_SETMASK, before)
