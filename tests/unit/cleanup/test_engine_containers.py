import errno
import fcntl
import os
import time
from dataclasses import replace
from pathlib import Path

import pytest

from tests.support.dead_pilots import BEFORE_BOOT, DEAD, ELSEWHERE, NODE, is_dead, leave_task_directory
from tests.unit.cleanup.conftest import FakeEngine
from trio_pilot.cleanup.engine_containers import remove_containers
from trio_pilot.processes.identity import Identity, own


def test_only_the_containers_of_dead_pilots_are_removed(engine: FakeEngine) -> None:
    dead, past = engine.add(DEAD), engine.add(BEFORE_BOOT, State="exited")
    others = {
        engine.add(own()),
        engine.add("nonsense"),
        engine.add(BEFORE_BOOT, State="running"),
        engine.add(BEFORE_BOOT, State="created", Created=int(time.time())),
        engine.add(replace(DEAD, namespace=1)),
    }
    assert remove_containers(engine.socket, is_dead) == 2
    assert engine.containers.keys() == others
    assert not {dead, past} & others


@pytest.mark.parametrize("pilot", [ELSEWHERE, BEFORE_BOOT], ids=["of another PID namespace", "of before this boot"])
def test_a_container_is_removed_if_its_pilots_owner_file_is_not_locked(
    engine: FakeEngine, tmp_path: Path, pilot: Identity
) -> None:
    leave_task_directory(tmp_path, "01234567", f"{pilot}@{NODE}")
    root = tmp_path / "ewms-pilot-data"
    engine.add(pilot, data=root)
    with (root / f".pilot-01234567-{pilot}@{NODE}").open() as owner_file:
        fcntl.flock(owner_file, fcntl.LOCK_EX)
        assert remove_containers(engine.socket, is_dead) == 0
    assert remove_containers(engine.socket, is_dead) == 1


def test_a_container_without_an_owner_file_in_sight_is_left_alone(
    engine: FakeEngine, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    leave_task_directory(tmp_path, "01234567", f"{ELSEWHERE}@{NODE}")
    monkeypatch.chdir(tmp_path)
    for data in (None, "", ".", "ewms-pilot-data", tmp_path, tmp_path / "none", "/a\0b"):
        engine.add(ELSEWHERE, data=data)
    engine.add(replace(ELSEWHERE, pid=1), data=tmp_path / "ewms-pilot-data")
    assert remove_containers(engine.socket, is_dead) == 0


def test_a_container_is_left_alone_if_the_file_system_has_no_locks(
    engine: FakeEngine, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def fail(*_: object) -> None:
        raise OSError(errno.ENOTSUP, os.strerror(errno.ENOTSUP))

    leave_task_directory(tmp_path, "01234567", f"{ELSEWHERE}@{NODE}")
    engine.add(ELSEWHERE, data=tmp_path / "ewms-pilot-data")
    monkeypatch.setattr(fcntl, "flock", fail)
    assert remove_containers(engine.socket, is_dead) == 0


@pytest.mark.parametrize("data", ["/a\0b", "/\ud800", "/" + "a" * 5000, "/proc/self/mem/x", "/" + "a/" * 3000])
def test_a_label_that_is_no_path_does_not_keep_other_containers(engine: FakeEngine, data: str) -> None:
    odd = {engine.add(ELSEWHERE, data=data), engine.add(str(DEAD).replace(f".{DEAD.pid}.", f".{'9' * 5000}."))}
    engine.add(DEAD)
    assert remove_containers(engine.socket, is_dead) == 1
    assert engine.containers.keys() == odd


def test_an_engine_that_is_not_there_is_an_error(tmp_path: Path) -> None:
    with pytest.raises(OSError, match="No such file"):
        remove_containers(tmp_path / "none", is_dead)
