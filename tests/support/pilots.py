"""The installed command, started with flags, and a queue file beside it. `pilot_process` starts it as EWMS does."""

import json
import os
import shlex
import signal
import sqlite3
import subprocess
import uuid
from collections.abc import Iterable
from contextlib import closing
from pathlib import Path
from typing import Any

from tests.support.pilot_process import COMMAND
from tests.support.waiting import PATIENCE, PILOT_RUN


class PilotCommand:
    """Starts pilots in one directory, with its queue file; sends events and receives outputs."""

    def __init__(self, directory: Path) -> None:
        self.directory = directory
        self._started: list[RunningPilot] = []
        self.variables: dict[str, str] = {}

    def __enter__(self) -> "PilotCommand":
        return self

    def __exit__(self, *_: object) -> None:
        for pilot in self._started:
            pilot.kill()

    def send(self, *events: object) -> None:
        lines = "".join(f"{json.dumps(event)}\n" for event in events)
        self._run("send", "events", given=lines)

    def receive(self) -> list[object]:
        return [json.loads(line) for line in self._run("receive", "outputs", "--idle", "0.1").splitlines()]

    def start(
        self,
        *args: str,
        command: str = "run",
        runtime: str = "process",
        prefix: Iterable[str] = (),
        **settings: object,
    ) -> "RunningPilot":
        """Start a pilot that runs `args` for each event, or checks them; a prefix may change its user or namespaces."""
        settings = {
            "queue_incoming": "events",
            "queue_outgoing": "outputs",
            "timeout_queue_incoming": 0.3,
            "task_image": "/",
            "runtime": runtime,
            "task_args": shlex.join(args),
            **settings,
        }
        flags = [f"--{name.replace('_', '-')}={value}" for name, value in settings.items()]
        argv = [*prefix, COMMAND, command, *flags]
        log = self.directory / f"pilot-{uuid.uuid4().hex}.log"
        with log.open("wb") as stderr:
            # In a session of its own, so that an interrupt at the terminal reaches the tests only.
            process = subprocess.Popen(
                argv,
                cwd=self.directory,
                env=self._environment(),
                stdout=subprocess.PIPE,
                stderr=stderr,
                start_new_session=True,
            )
        pilot = RunningPilot(process, log)
        self._started.append(pilot)
        return pilot

    def run(self, *args: str, **settings: Any) -> "RunningPilot":
        """Run a pilot to its end."""
        pilot = self.start(*args, **settings)
        pilot.wait()
        return pilot

    def queue(self, name: str = "events") -> list[tuple[int, bool]]:
        """Return, for each message in a queue, its attempts and whether it is claimed."""
        with closing(sqlite3.connect(self.directory / "trio-pilot-queues.sqlite", timeout=PATIENCE)) as connection:
            rows = connection.execute("SELECT attempts, consumer FROM message WHERE queue = ? ORDER BY position", (name,))
            return [(attempts, bool(consumer)) for attempts, consumer in rows]

    @property
    def data(self) -> Path:
        return self.directory / "ewms-pilot-data"

    def _environment(self) -> dict[str, str]:
        return {**{name: value for name, value in os.environ.items() if "EWMS" not in name}, **self.variables}

    def _run(self, *arguments: str, given: str = "") -> str:
        return subprocess.run(
            [COMMAND, *arguments],
            cwd=self.directory,
            env=self._environment(),
            input=given,
            stdout=subprocess.PIPE,
            text=True,
            timeout=PATIENCE,
            check=True,
        ).stdout


class RunningPilot:
    """A pilot that was started, and its output."""

    def __init__(self, process: "subprocess.Popen[bytes]", log: Path) -> None:
        self._process = process
        self._log = log
        self.stdout = b""

    @property
    def pid(self) -> int:
        return self._process.pid

    @property
    def stderr(self) -> str:
        return self._log.read_text(errors="replace")

    @property
    def ended(self) -> bool:
        return self._process.poll() is not None

    @property
    def last_line(self) -> str:
        return self.stderr.splitlines()[-1]

    def signal(self, number: signal.Signals) -> None:
        self._process.send_signal(number)

    def kill(self) -> None:
        if not self.ended:
            self._process.kill()
        if self._process.stdout and not self._process.stdout.closed:
            self._process.communicate()

    def wait(self) -> int:
        """Wait until it ends, and return its exit code."""
        if self._process.returncode is None:
            self.stdout = self._process.communicate(timeout=PILOT_RUN)[0]
        assert "/trio_pilot/" not in self.stderr, f"a traceback: {self.stderr}"
        return self._process.returncode
