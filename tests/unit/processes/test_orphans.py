import os
import signal
import subprocess
import uuid
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

import pytest

from tests.support.dead_pilots import DEAD, is_dead
from tests.support.waiting import until_sync
from trio_pilot.processes.identity import own
from trio_pilot.processes.orphans import MARKER, end_processes


@contextmanager
def start(pilot: object, script: str) -> Iterator["subprocess.Popen[bytes]"]:
    env = {**os.environ, MARKER: f"{pilot}/{uuid.uuid4()}"}
    with subprocess.Popen(["sh", "-c", f"{script}; :"], env=env, start_new_session=True) as process:
        below = Path(f"/proc/{process.pid}/task/{process.pid}/children")
        try:
            until_sync(lambda: len(below.read_text().split()) == script.count("sleep"))
            yield process
        finally:
            with suppress(ProcessLookupError):
                os.killpg(process.pid, signal.SIGKILL)


@pytest.mark.alone  # any pilot that starts ends the processes of dead ones
def test_only_the_processes_of_dead_pilots_are_ended() -> None:
    with start(own(), "sleep 1000") as living, start("nonsense", "sleep 1000") as foreign:
        with start(DEAD, "env -i setsid sleep 1000 & sleep 1000") as dead:
            assert end_processes(is_dead) >= 2
            dead.wait(5)
        assert living.poll() is foreign.poll() is None
        assert end_processes(is_dead) == 0
        assert end_processes(lambda pilot: pilot == own()) == 2
        living.wait(5)
