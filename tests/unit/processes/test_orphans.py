import os
import signal
import subprocess
import uuid
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, suppress
from pathlib import Path

import pytest

from tests.support.dead_pilots import DEAD, is_dead
from tests.support.users import needs_root
from tests.support.waiting import until_sync
from trio_pilot.processes import orphans
from trio_pilot.processes.identity import own
from trio_pilot.processes.orphans import MARKER, end_processes


@contextmanager
def start(pilot: object, script: str, prefix: Sequence[str] = ()) -> Iterator["subprocess.Popen[bytes]"]:
    env = {**os.environ, MARKER: f"{pilot}/{uuid.uuid4()}"}
    with subprocess.Popen([*prefix, "sh", "-c", f"{script}; :"], env=env, start_new_session=True) as process:
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


AS_ANOTHER = "setpriv", "--reuid=5001", "--regid=5001", "--clear-groups"


@needs_root
@pytest.mark.alone
def test_the_marker_of_another_users_process_does_not_count() -> None:
    with start(DEAD, "sleep 1000 & sleep 1000", AS_ANOTHER) as foreign, start(DEAD, "sleep 1000") as own_process:
        assert end_processes(is_dead) >= 2
        own_process.wait(5)
        assert foreign.poll() is None
        assert end_processes(is_dead) == 0


@needs_root
@pytest.mark.alone
def test_a_process_that_became_another_user_is_ended_with_its_parent() -> None:
    with start(DEAD, f"env -i {' '.join(AS_ANOTHER)} setsid sleep 1000") as dead:
        (child,) = map(int, Path(f"/proc/{dead.pid}/task/{dead.pid}/children").read_text().split())
        until_sync(lambda: Path(f"/proc/{child}").stat().st_uid == 5001)
        end_processes(is_dead)
        dead.wait(5)
    until_sync(lambda: not Path(f"/proc/{child}/exe").exists())


def test_the_next_process_with_a_number_that_was_found_is_left_alone(monkeypatch: pytest.MonkeyPatch) -> None:
    with start(DEAD, "sleep 1000") as process:
        (found,) = [one for one in orphans._find(lambda pilot: pilot == DEAD, set()) if one.pid == process.pid]
        another = orphans._Process(found.pid, found.started - 1, found.session, found.pilot, found.parent)
        with monkeypatch.context() as patch:
            patch.setattr(orphans, "_find", lambda *_: [another])
            patch.setattr(orphans, "KILL_TIMEOUT", 0.1)
            end_processes(is_dead)
        assert process.poll() is None
