import fcntl
import threading
from collections.abc import Callable
from pathlib import Path

import pytest

from tests.support.dead_pilots import DEAD, ELSEWHERE, NODE, is_dead, leave_task_directory
from tests.support.waiting import until_sync
from tests.unit.cleanup.conftest import FakeEngine
from trio_pilot.cleanup import engine_containers
from trio_pilot.cleanup.engine_containers import remove_containers
from trio_pilot.cleanup.guardian import clean_up
from trio_pilot.cleanup.sweep import sweep
from trio_pilot.processes import cgroups, orphans


def by_sweep(engine: FakeEngine, root: Path) -> None:
    """Clean up as a pilot that starts."""
    sweep([("data", root), ("engine", engine.socket)])


def by_guardian(engine: FakeEngine, root: Path) -> None:
    """Clean up as the guardian of a dead pilot."""
    clean_up(DEAD, [engine.socket], [root], timeouts=[1.0])


by_both = pytest.mark.parametrize("clean_up_by", [by_sweep, by_guardian])


@pytest.fixture
def only_engines(monkeypatch: pytest.MonkeyPatch) -> None:
    """Do not sweep the processes and control groups of other tests."""
    monkeypatch.setattr(orphans, "end_processes", lambda _theirs: 0)
    monkeypatch.setattr(cgroups, "sweep", lambda _theirs: 0)


@pytest.mark.usefixtures("only_engines")
@by_both
def test_an_owner_file_is_removed_with_the_last_container(
    engine: FakeEngine, tmp_path: Path, clean_up_by: Callable[[FakeEngine, Path], None]
) -> None:
    directory = leave_task_directory(tmp_path / "parent", "01234567", f"{ELSEWHERE}@{NODE}")
    engine.add(ELSEWHERE, data=directory.parent)
    engine.trouble = (500, b"stopping")
    clean_up_by(engine, directory.parent)
    assert engine.containers
    assert not directory.exists()
    engine.trouble = None
    clean_up_by(engine, directory.parent)
    assert not engine.containers
    assert list((tmp_path / "parent").iterdir()) == []


@pytest.mark.usefixtures("only_engines")
@by_both
def test_the_owner_file_of_a_pilot_that_dies_meanwhile_is_kept(
    engine: FakeEngine, tmp_path: Path, clean_up_by: Callable[[FakeEngine, Path], None], monkeypatch: pytest.MonkeyPatch
) -> None:
    def find_nothing(_engine: Path, _theirs: orphans.PilotFilter) -> int:
        held.close()
        return 0

    directory = leave_task_directory(tmp_path, "01234567", f"{ELSEWHERE}@{NODE}")
    (owner_file,) = directory.parent.glob(".pilot-*")
    monkeypatch.setattr(engine_containers, "remove_containers", find_nothing)
    with owner_file.open() as held:
        fcntl.flock(held, fcntl.LOCK_EX)
        clean_up_by(engine, directory.parent)
    assert not directory.exists()
    assert owner_file.exists()


@pytest.mark.usefixtures("only_engines")
def test_a_guardian_removes_an_owner_file_that_is_locked_a_moment_longer(
    engine: FakeEngine, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def unlock(_theirs: orphans.PilotFilter) -> int:
        held.close()
        return 0

    directory = leave_task_directory(tmp_path / "parent", "01234567", f"{DEAD}@{NODE}")
    (owner_file,) = directory.parent.glob(".pilot-*")
    with owner_file.open() as held:
        fcntl.flock(held, fcntl.LOCK_EX)
        monkeypatch.setattr(cgroups, "sweep", unlock)
        by_guardian(engine, directory.parent)
    assert list((tmp_path / "parent").iterdir()) == []


@pytest.mark.parametrize(
    "trouble",
    [
        (500, b'{"message": "stopping"}'),
        (500, b"stopping"),
        (200, b"no JSON"),
        *((200, body) for body in (b"null", b"1", b"[null]", b"[{}]", b'[{"Id": "an-id", "Labels": ["label"]}]')),
    ],
)
def test_an_engine_in_trouble_is_an_error_and_is_asked_again(
    engine: FakeEngine, tmp_path: Path, trouble: tuple[int, bytes]
) -> None:
    engine.add(DEAD)
    engine.trouble = trouble
    with pytest.raises(OSError, match=str(engine.socket)):
        remove_containers(engine.socket, is_dead)
    recovering = threading.Timer(0.1, setattr, [engine, "trouble", None])
    recovering.start()
    clean_up(DEAD, [engine.socket], [tmp_path])
    recovering.join()
    assert not engine.containers


def test_an_error_of_one_kind_does_not_keep_the_others(
    engine: FakeEngine, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def fail(_theirs: object) -> int:
        raise ValueError("not as expected")

    monkeypatch.setattr(cgroups, "sweep", fail)
    engine.add(DEAD)
    directory = leave_task_directory(tmp_path, "01234567", f"{DEAD}@{NODE}")
    clean_up(DEAD, [engine.socket], [tmp_path / "ewms-pilot-data"], timeouts=[0.1, 0.2])
    assert not engine.containers
    assert not directory.exists()


@pytest.mark.parametrize("module", ["orphans.end_processes", "cgroups.sweep"])
def test_an_error_of_any_kind_in_a_look_is_logged_by_a_sweep(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture, module: str
) -> None:
    def fail(*_: object) -> int:
        raise OverflowError("not as expected")

    monkeypatch.setattr(f"trio_pilot.processes.{module}", fail)
    monkeypatch.setattr("trio_pilot.files.data_directory._is_of", fail)
    directory = leave_task_directory(tmp_path, "01234567", f"{DEAD}@{NODE}")
    sweep([("data", tmp_path / "ewms-pilot-data")])
    assert not directory.exists()
    assert "not as expected" in caplog.text


def test_directories_do_not_wait_for_an_engine_that_is_away(engine: FakeEngine, tmp_path: Path) -> None:
    engine.add(DEAD)
    engine.trouble = (500, b"stopping")
    directory = leave_task_directory(tmp_path, "01234567", f"{DEAD}@{NODE}")
    root = tmp_path / "ewms-pilot-data"
    cleaning = threading.Thread(target=clean_up, args=(DEAD, [engine.socket], [root]), kwargs={"timeouts": [0.1, 60.0]})
    cleaning.start()
    until_sync(lambda: not directory.exists())
    engine.trouble = None
    cleaning.join()
    assert not engine.containers
