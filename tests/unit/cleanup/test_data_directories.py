import fcntl
import os
import subprocess
import uuid
from pathlib import Path
from typing import IO, Any

import pytest

from tests.support.dead_pilots import BEFORE_BOOT, DEAD, ELSEWHERE, NODE, leave_task_directory
from trio_pilot.files import data_directory
from trio_pilot.files.data_directory import open_data_directory
from trio_pilot.files.filesystem import opened, remove_tree
from trio_pilot.processes import identity
from trio_pilot.processes.identity import Identity, own


@pytest.mark.parametrize(
    "owner",
    [f"{DEAD}@here", f"{DEAD}@{NODE}", f"{DEAD}@a-node", f"{BEFORE_BOOT}@{NODE}"],
    ids=["of this boot", "of this machine", "of a name with a dash", "of this machine before its boot"],
)
def test_the_directories_of_a_dead_pilot_are_removed(tmp_path: Path, owner: str) -> None:
    directory = leave_task_directory(tmp_path, "01234567", owner)
    with open_data_directory(tmp_path, []) as mine:
        (mine.root / mine.new_name()).mkdir()
        assert data_directory.sweep(mine.root) == 2
        assert not directory.exists()
        assert len(list(mine.root.glob(f"{mine.prefix}-*"))) == 1
        assert data_directory.sweep(mine.root) == 0


@pytest.mark.parametrize(
    "owner",
    [f"{BEFORE_BOOT}@another-machine", f"{own()}@{NODE}", "", "nonsense", "a@b"],
    ids=["of another machine", "of a pilot that lives", "of no pilot", "nonsense", "of neither"],
)
def test_directories_of_a_pilot_that_may_live_are_left_alone(tmp_path: Path, owner: str) -> None:
    directory = leave_task_directory(tmp_path, "01234567", owner)
    with open_data_directory(tmp_path, []) as mine:
        assert data_directory.sweep(mine.root) == 0
    assert (directory / "task-io" / "infile").exists()


def test_the_directories_of_a_living_pilot_are_left_alone(tmp_path: Path) -> None:
    with open_data_directory(tmp_path, []) as other, open_data_directory(tmp_path, []) as mine:
        assert other.prefix != mine.prefix
        (other.root / other.new_name()).mkdir()
        assert data_directory.sweep(mine.root) == 0
        assert len(list(other.root.glob(f"{other.prefix}-*"))) == 1


def test_the_data_directory_is_removed_with_the_last_in_it(tmp_path: Path) -> None:
    leave_task_directory(tmp_path, "01234567", f"{DEAD}@here")
    assert data_directory.sweep(tmp_path / "ewms-pilot-data") == 2
    assert list(tmp_path.iterdir()) == []


def leave_unfinished(parent: Path, owner: str) -> Path:
    """Leave an unfinished data directory, as a pilot does that dies while it makes or removes it."""
    directory = parent / f".ewms-pilot-data-{owner}-{uuid.uuid4().hex}"
    (directory / "data-hub").mkdir(parents=True)
    return directory


@pytest.mark.parametrize(
    "owner",
    [f"{DEAD}", f"{DEAD}@a-node", f"{BEFORE_BOOT}@{NODE}", f"{ELSEWHERE}@{NODE}"],
    ids=["of this boot", "of a name with a dash", "of this machine before its boot", "of another PID namespace"],
)
def test_the_unfinished_data_directory_of_a_dead_pilot_is_removed(tmp_path: Path, owner: str) -> None:
    directory = leave_unfinished(tmp_path, owner)
    with opened(directory, os.O_DIRECTORY) as held:
        fcntl.flock(held, fcntl.LOCK_EX)
        data_directory.sweep(tmp_path / "ewms-pilot-data")
        assert directory.exists()
    assert data_directory.sweep(tmp_path / "ewms-pilot-data") == 0
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize(
    "owner",
    [f"{own()}@{NODE}", f"{BEFORE_BOOT}@another-machine", f"@{NODE}", "nonsense", ""],
    ids=["of a pilot that lives", "of another machine", "of no pilot here", "nonsense", "of no pilot"],
)
def test_a_data_directory_that_a_pilot_may_be_making_is_left_alone(tmp_path: Path, owner: str) -> None:
    directory = leave_unfinished(tmp_path, owner)
    assert data_directory.sweep(tmp_path / "ewms-pilot-data") == 0
    assert list(tmp_path.iterdir()) == [directory]


def test_a_temporary_directory_of_another_pid_namespace_is_left_alone(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(identity, "own", lambda: ELSEWHERE)
    with data_directory.open_temporary(tmp_path) as directory:
        monkeypatch.undo()
        data_directory.sweep(tmp_path / "ewms-pilot-data")
        assert list(tmp_path.iterdir()) == [directory]
    assert list(tmp_path.iterdir()) == []


def test_children_do_not_inherit_the_lock_of_a_temporary_directory(tmp_path: Path) -> None:
    with data_directory.open_temporary(tmp_path) as directory:
        listed = subprocess.run(["ls", "-l", "/proc/self/fd"], close_fds=False, capture_output=True, text=True, check=True)
        assert directory.name not in listed.stdout


@pytest.mark.parametrize("maker", [ELSEWHERE, own()], ids=["a sweep that removes it", "a sweep that looks at it"])
def test_an_owner_file_is_made_again_if_a_sweep_locks_it_first(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, maker: Identity
) -> None:
    lock = fcntl.flock  # replaced to run a sweep between making the file and locking it

    def lock_late(file: IO[Any], how: int) -> None:
        if how == fcntl.LOCK_EX:
            monkeypatch.undo()
            data_directory.sweep(tmp_path / "ewms-pilot-data")
        lock(file, how)

    monkeypatch.setattr(identity, "own", lambda: maker)
    monkeypatch.setattr(fcntl, "flock", lock_late)
    with open_data_directory(tmp_path, []) as mine:
        (owner_file,) = mine.root.glob(f".pilot-{mine.prefix}-*")
        data_directory.sweep(mine.root)
        assert owner_file.exists()
    assert list(tmp_path.iterdir()) == []


def test_a_data_directory_that_its_pilot_is_removing_is_left_alone(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    left: list[bool] = []

    def remove(directory: Path) -> None:
        monkeypatch.undo()
        data_directory.sweep(tmp_path / "ewms-pilot-data")
        left.append(directory.exists())
        remove_tree(directory)

    monkeypatch.setattr(identity, "own", lambda: ELSEWHERE)
    monkeypatch.setattr(data_directory, "remove_tree", remove)
    with open_data_directory(tmp_path, []):
        pass
    assert left == [True]
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("maker", [ELSEWHERE, own()], ids=["a sweep that removes it", "a sweep that looks at it"])
def test_a_temporary_directory_is_made_again_if_a_sweep_locks_it_first(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, maker: Identity
) -> None:
    lock = fcntl.flock  # replaced to run a sweep between making the directory and locking it

    def lock_late(directory: int, how: int) -> None:
        monkeypatch.undo()
        if maker == own():
            (made,) = tmp_path.iterdir()
            with opened(made, os.O_DIRECTORY) as sweeping:
                lock(sweeping, fcntl.LOCK_EX)
                return lock(directory, how)
        data_directory.sweep(tmp_path / "ewms-pilot-data")
        return lock(directory, how)

    monkeypatch.setattr(identity, "own", lambda: maker)
    monkeypatch.setattr(fcntl, "flock", lock_late)
    with data_directory.open_temporary(tmp_path) as directory:
        assert list(tmp_path.iterdir()) == [directory]
    assert list(tmp_path.iterdir()) == []


def test_many_may_check_an_owner_file_at_once(tmp_path: Path) -> None:
    leave_task_directory(tmp_path, "01234567", f"{ELSEWHERE}@{NODE}")
    root = tmp_path / "ewms-pilot-data"
    (owner_file,) = root.glob(".pilot-*")
    with owner_file.open() as asking:
        fcntl.flock(asking, fcntl.LOCK_SH)
        assert data_directory.owner_files_of_dead(root) == {owner_file}
        assert data_directory.has_orphaned(root, ELSEWHERE)
