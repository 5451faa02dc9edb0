import errno
import fcntl
import os
import stat
import subprocess
import sys
import threading
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack, suppress
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from tests.support.disks import small_disk
from tests.support.paths import ROOT
from tests.support.users import NOBODY, as_nobody, needs_root
from trio_pilot.errors import NodeError, SettingsError
from trio_pilot.files import data_directory as module
from trio_pilot.files.data_directory import DataDirectory, open_data_directory
from trio_pilot.processes.identity import own


def test_the_data_directory_exists_while_it_is_used(tmp_path: Path) -> None:
    with open_data_directory(tmp_path, []) as data_directory:
        assert data_directory.root == tmp_path / "ewms-pilot-data"
        assert data_directory.data_hub.is_dir()
        (data_directory.data_hub / "calibration").write_text("from the init container")
    assert list(tmp_path.iterdir()) == []


def test_the_data_directory_is_removed_after_an_error(tmp_path: Path) -> None:
    with pytest.raises(ZeroDivisionError), open_data_directory(tmp_path, []):
        _ = 1 / 0
    assert list(tmp_path.iterdir()) == []


def test_the_last_of_two_pilots_removes_the_data_directory(tmp_path: Path) -> None:
    with open_data_directory(tmp_path, []) as first:
        (first.data_hub / "file").touch()
        with open_data_directory(tmp_path, []) as second:
            assert second.root == first.root
        assert (first.data_hub / "file").exists()
    assert list(tmp_path.iterdir()) == []


def test_the_first_pilot_may_end_first(tmp_path: Path) -> None:
    with ExitStack() as first, open_data_directory(tmp_path, []) as second:
        first.enter_context(open_data_directory(tmp_path, []))
        first.close()
        assert second.data_hub.is_dir()
    assert list(tmp_path.iterdir()) == []


def test_a_directory_made_by_hand_stays(tmp_path: Path) -> None:
    (tmp_path / "ewms-pilot-data").mkdir()
    with open_data_directory(tmp_path, []), open_data_directory(tmp_path, []):
        pass
    assert (tmp_path / "ewms-pilot-data").is_dir()
    with open_data_directory(tmp_path, []) as data_directory:  # and still counts as one
        assert data_directory.data_hub.is_dir()
    assert (tmp_path / "ewms-pilot-data").is_dir()


def test_kept_task_directories_stay_and_do_not_harm_the_next_pilot(tmp_path: Path) -> None:
    kept = tmp_path / "ewms-pilot-data" / "a-task"
    with open_data_directory(tmp_path, []):
        kept.mkdir()
    with open_data_directory(tmp_path, []):
        assert kept.is_dir()
    assert kept.is_dir()
    kept.rmdir()
    with open_data_directory(tmp_path, []):
        pass
    assert list(tmp_path.iterdir()) == []


def test_a_data_hub_that_a_task_has_locked_is_removed(open_to_all: Path) -> None:
    with as_nobody():
        with open_data_directory(open_to_all, []) as data_directory:
            (data_directory.data_hub / "locked").mkdir()
            (data_directory.data_hub / "locked/file").touch()
            (data_directory.data_hub / "locked").chmod(0)
        assert list(open_to_all.iterdir()) == []


def come_and_go(parent: Path, times: int) -> None:
    for number in range(times):
        with open_data_directory(parent, []) as data_directory:
            task = data_directory.root / f"{os.getpid()}-{threading.get_ident()}-{number}"
            task.mkdir()
            (task / "file").write_text("data")
            assert data_directory.data_hub.is_dir()
            (task / "file").unlink()
            task.rmdir()


def test_many_pilots_start_and_end_at_once_in_threads(tmp_path: Path) -> None:
    with ThreadPoolExecutor(4) as pool:
        for done in [pool.submit(come_and_go, tmp_path, 150) for _ in range(4)]:
            done.result()
    assert list(tmp_path.iterdir()) == []


def test_many_pilots_start_and_end_at_once_in_processes(tmp_path: Path) -> None:
    code = "import sys, pathlib, tests.unit.files.test_data_directory as t; t.come_and_go(pathlib.Path(sys.argv[1]), 150)"
    pilots = [subprocess.Popen([sys.executable, "-c", code, tmp_path], cwd=ROOT) for _ in range(4)]
    assert [pilot.wait(60) for pilot in pilots] == [0] * 4
    assert list(tmp_path.iterdir()) == []


def test_a_missing_parent_is_an_error(tmp_path: Path) -> None:
    with pytest.raises(NodeError, match=r"^cannot write the data directory .*/missing/ewms-pilot-data: No such file"):
        open_data_directory(tmp_path / "missing", []).__enter__()
    assert list(tmp_path.iterdir()) == []


def test_a_parent_that_is_a_file_is_an_error(tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    with pytest.raises(NodeError, match="Not a directory"):
        open_data_directory(tmp_path / "file", []).__enter__()


@pytest.mark.parametrize("name", ["parent", "parent/ewms-pilot-data"])
def test_a_circle_of_links_is_an_error(tmp_path: Path, name: str) -> None:
    (tmp_path / name).parent.mkdir(exist_ok=True)
    (tmp_path / name).symlink_to((tmp_path / name).name)
    with pytest.raises(NodeError, match=r"cannot write the data directory .*/parent/ewms-pilot-data: "):
        open_data_directory(tmp_path / "parent", []).__enter__()


@pytest.mark.parametrize("exists", [True, False])
def test_a_directory_that_cannot_be_written_is_an_error(open_to_all: Path, exists: bool) -> None:
    where = open_to_all / "ewms-pilot-data" if exists else open_to_all
    where.mkdir(exist_ok=True)
    where.chmod(0o555)
    with as_nobody(), pytest.raises(NodeError, match=r"cannot write the data directory .*: Permission denied"):
        open_data_directory(open_to_all, []).__enter__()
    where.chmod(0o777)


@needs_root
def test_a_full_disk_is_an_error(tmp_path: Path) -> None:
    with small_disk(tmp_path / "disk", 64) as disk:
        with suppress(OSError):
            (disk / "filling").write_bytes(b"x" * 100_000)
        with pytest.raises(NodeError, match=r"cannot write the data directory .*: No space left"):
            open_data_directory(disk, []).__enter__()


@pytest.mark.parametrize("place", ["/etc", "/usr/share", "/bin", "/proc", "/dev", "/var/log"])
def test_a_data_directory_is_not_made_in_system_directories(place: str) -> None:
    with pytest.raises(SettingsError, match="cannot be made below"):
        open_data_directory(Path(place), []).__enter__()


def test_a_data_directory_is_not_made_through_a_link_to_one(tmp_path: Path) -> None:
    (tmp_path / "link").symlink_to("/etc")
    with pytest.raises(SettingsError, match="cannot be made below /etc"):
        open_data_directory(tmp_path / "link", []).__enter__()
    (tmp_path / "ewms-pilot-data").symlink_to("/etc")
    with pytest.raises(SettingsError, match="cannot be made below /etc"):
        open_data_directory(tmp_path, []).__enter__()


def test_a_data_hub_that_is_a_link_is_refused(tmp_path: Path) -> None:
    (tmp_path / "ewms-pilot-data").mkdir()
    (tmp_path / "elsewhere").mkdir()
    hub = tmp_path / "ewms-pilot-data/data-hub"
    for target in ("elsewhere", "nonexistent"):
        hub.symlink_to(tmp_path / target)
        with pytest.raises(SettingsError, match=f"^{hub} must be a directory, not a link: remove it$"):
            open_data_directory(tmp_path, []).__enter__()
        hub.unlink()
    with open_data_directory(tmp_path, []) as data_directory:
        assert data_directory.data_hub == hub


# Task directories that are kept.


def keep_one(parent: Path, name: str = "a-task") -> None:
    with open_data_directory(parent, [], keep=True) as data_directory:
        (data_directory.root / name).mkdir()


def names_in(parent: Path) -> set[str]:
    return {entry.name for entry in (parent / "ewms-pilot-data").iterdir()}


def test_beside_kept_task_directories_there_is_the_data_hub_alone(tmp_path: Path) -> None:
    keep_one(tmp_path)
    assert names_in(tmp_path) == {"data-hub", "a-task"}
    keep_one(tmp_path, "another")
    assert names_in(tmp_path) == {"data-hub", "a-task", "another"}
    assert [entry.name for entry in tmp_path.iterdir()] == ["ewms-pilot-data"]


def test_a_later_pilot_leaves_kept_directories_as_it_found_them(tmp_path: Path) -> None:
    keep_one(tmp_path)
    with open_data_directory(tmp_path, []) as later, open_data_directory(tmp_path, []) as another:
        assert later.root == another.root
        (later.root / later.new_name()).mkdir()
        assert module.sweep(later.root) == 0
        (later.root / "b-task").mkdir()
    assert {"data-hub", "a-task", "b-task"} < names_in(tmp_path)
    assert not {name for name in names_in(tmp_path) if name.startswith(".")}
    assert module.sweep(tmp_path / "ewms-pilot-data") == 0
    assert "a-task" in names_in(tmp_path)


def test_if_nothing_is_kept_the_data_directory_is_removed(tmp_path: Path) -> None:
    with open_data_directory(tmp_path, [], keep=True):
        pass
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("keeper_is_last", [True, False])
def test_the_last_of_several_pilots_removes_the_lock_file(tmp_path: Path, keeper_is_last: bool) -> None:
    with open_data_directory(tmp_path, [], keep=keeper_is_last) as last:
        with open_data_directory(tmp_path, [], keep=not keeper_is_last):
            (last.root / "a-task").mkdir()
        assert ".lock" in names_in(tmp_path)
    assert names_in(tmp_path) == {"data-hub", "a-task"}


def test_a_sweep_removes_the_lock_file_of_a_pilot_that_died(tmp_path: Path) -> None:
    code = (
        "import os, pathlib, trio_pilot.files.data_directory as d\n"
        "with d.open_data_directory(pathlib.Path(), [], keep=True) as mine: (mine.root / 'a-task').mkdir(); os._exit(1)"
    )
    assert subprocess.run([sys.executable, "-c", code], cwd=tmp_path, check=False).returncode == 1
    assert names_in(tmp_path) == {".lock", "data-hub", "a-task"}
    assert module.sweep(tmp_path / "ewms-pilot-data") == 0
    assert names_in(tmp_path) == {"data-hub", "a-task"}


def test_the_lock_file_stays_until_dead_pilots_are_swept(tmp_path: Path) -> None:
    dead = replace(own(), started=own().started - 1)
    with open_data_directory(tmp_path, [], keep=True) as mine:
        (mine.root / "01234567-0000-4000-8000-000000000000").mkdir()
        (mine.root / f".pilot-01234567-{dead}@{os.uname().nodename}").touch()
    assert ".lock" in names_in(tmp_path)
    assert module.sweep(tmp_path / "ewms-pilot-data") == 1
    assert list(tmp_path.iterdir()) == []


def test_a_pilot_may_start_while_the_lock_file_is_removed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    flock = fcntl.flock

    def be_late(file: Any, how: int) -> None:
        if how & fcntl.LOCK_SH:
            monkeypatch.undo()
            keeper.close()
        flock(file, how)

    kept = tmp_path / "ewms-pilot-data/a-task"
    keeper, early = ExitStack(), ExitStack()
    keeper.enter_context(open_data_directory(tmp_path, [], keep=True))
    kept.mkdir()
    monkeypatch.setattr(fcntl, "flock", be_late)
    early.enter_context(open_data_directory(tmp_path, []))
    with open_data_directory(tmp_path, []) as later:
        kept.rmdir()
        early.close()
        assert later.data_hub.is_dir()
    assert names_in(tmp_path) == {"data-hub"}


def test_a_new_data_directory_is_not_taken_for_one_that_is_gone(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    flock = fcntl.flock

    def be_late(file: Any, how: int) -> None:
        monkeypatch.undo()
        before.close()
        after.enter_context(open_data_directory(tmp_path, [], keep=True))
        flock(file, how)

    before, after = ExitStack(), ExitStack()
    before.enter_context(open_data_directory(tmp_path, [], keep=True))
    monkeypatch.setattr(fcntl, "flock", be_late)
    module.sweep(tmp_path / "ewms-pilot-data")
    assert names_in(tmp_path) == {".lock", "data-hub"}
    after.close()
    assert list(tmp_path.iterdir()) == []


def test_without_locks_the_lock_file_is_removed_too(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(*_: object) -> None:
        raise OSError(errno.ENOTSUP, os.strerror(errno.ENOTSUP))

    monkeypatch.setattr(fcntl, "flock", fail)
    with open_data_directory(tmp_path, []) as other:
        keep_one(tmp_path)
        assert ".lock" in names_in(tmp_path)  # an owner file shows that another pilot is there
        assert other.data_hub.is_dir()
    assert names_in(tmp_path) == {"data-hub", "a-task"}


def keep_and_remove(parent: Path, times: int, *, keep: bool) -> None:
    for number in range(times):
        with open_data_directory(parent, [], keep=keep) as data_directory:
            task = data_directory.root / f"{threading.get_ident()}-{number}"
            task.mkdir()
            assert data_directory.data_hub.is_dir()
            if not keep or number % 2:
                task.rmdir()


def test_pilots_that_keep_and_pilots_that_remove_run_at_once(tmp_path: Path) -> None:
    with ThreadPoolExecutor(4) as pool:
        for done in [pool.submit(keep_and_remove, tmp_path, 50, keep=number < 2) for number in range(4)]:
            done.result()
    assert len(names_in(tmp_path)) == 1 + 2 * 25
    assert "data-hub" in names_in(tmp_path)


# External directories.


def test_external_directories_keep_their_names(tmp_path: Path) -> None:
    (data := tmp_path / "da ta,=").mkdir()
    with open_data_directory(tmp_path, [data, Path("/usr/share")]) as data_directory:
        assert data_directory.external == (data, Path("/usr/share"))


@pytest.mark.parametrize("path", ["relative", "/does/not/exist", "/etc/passwd", "/usr/../usr"])
def test_external_directories_must_be_absolute_and_exist(tmp_path: Path, path: str) -> None:
    with pytest.raises(SettingsError, match="EWMS_PILOT_EXTERNAL_DIRECTORIES must name absolute, existing directories"):
        open_data_directory(tmp_path, [Path(path)]).__enter__()
    assert list(tmp_path.iterdir()) == []


def test_external_directories_must_be_readable(tmp_path: Path, locked: Path) -> None:
    with as_nobody(), pytest.raises(SettingsError, match=f"absolute, existing directories, not '{locked}/data'"):
        open_data_directory(tmp_path, [locked / "data"]).__enter__()


@pytest.mark.parametrize("path", ["/proc", "/proc/self/cwd", "/dev", "/sys", "/run"])
def test_some_directories_are_never_mounted(tmp_path: Path, path: str) -> None:
    with pytest.raises(SettingsError, match="must not name directories below"):
        open_data_directory(tmp_path, [Path(path)]).__enter__()


def test_links_to_such_directories_are_never_mounted(tmp_path: Path) -> None:
    (tmp_path / "link").symlink_to("/proc")
    with pytest.raises(SettingsError, match="must not name directories below /proc"):
        open_data_directory(tmp_path, [tmp_path / "link"]).__enter__()


def test_the_whole_machine_is_never_mounted(tmp_path: Path) -> None:
    with pytest.raises(SettingsError, match="must not name all of this machine"):
        open_data_directory(tmp_path, [Path("/")]).__enter__()


@pytest.mark.parametrize("path", ["/tmp", "/tmp/", "//tmp"])
def test_a_directory_of_each_container_is_not_mounted_over(tmp_path: Path, path: str) -> None:
    with pytest.raises(SettingsError, match=r"must not name /+tmp: that is each container's own$"):
        open_data_directory(tmp_path, [Path(path)]).__enter__()


@pytest.mark.parametrize("name", ["", "/data-hub", "/task-io"])
def test_a_data_directory_of_a_container_is_not_mounted_over(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, name: str
) -> None:
    monkeypatch.setattr("trio_pilot.files.data_directory.is_directory", lambda _: True)
    with pytest.raises(SettingsError, match=f"must not name /ewms-pilot-data{name}: that is each container's own$"):
        open_data_directory(tmp_path, [Path(f"/ewms-pilot-data{name}")]).__enter__()


def test_a_directory_below_tmp_is_mounted(tmp_path: Path) -> None:
    (below := tmp_path / "tmp").mkdir()
    assert tmp_path.is_relative_to("/tmp")
    with open_data_directory(tmp_path, [below]) as data_directory:
        assert list(data_directory.external) == [below]


def test_no_directory_is_mounted_twice(tmp_path: Path) -> None:
    with pytest.raises(SettingsError, match="twice"):
        open_data_directory(tmp_path, [Path("/usr/share"), Path("/usr/share/")]).__enter__()


# Containers of other users.


def modes(data_directory: DataDirectory) -> list[int]:
    return [stat.S_IMODE(path.stat().st_mode) for path in (data_directory.root, data_directory.data_hub)]


@pytest.mark.parametrize("umask", [0o022, 0o077])
def test_a_data_hub_for_any_user_is_closed_to_others_of_this_machine(tmp_path: Path, umask: int) -> None:
    before = os.umask(umask)
    try:
        with open_data_directory(tmp_path, []) as data_directory:
            data_directory.open_hub()
            assert modes(data_directory) == [0o700, 0o1777]
    finally:
        os.umask(before)


@needs_root
def test_only_the_group_of_an_engine_of_another_user_passes(tmp_path: Path) -> None:
    with open_data_directory(tmp_path, []) as data_directory:
        data_directory.open_hub(NOBODY)
        assert modes(data_directory) == [0o710, 0o1777]
        assert data_directory.root.stat().st_gid == NOBODY


def test_an_engine_of_another_user_passes_the_directory_of_a_plain_user(open_to_all: Path) -> None:
    with as_nobody(), open_data_directory(open_to_all, []) as data_directory:
        data_directory.open_hub(1234)
        assert modes(data_directory) == [0o711, 0o1777]


def test_a_data_directory_made_by_hand_keeps_its_mode(tmp_path: Path) -> None:
    (tmp_path / "ewms-pilot-data").mkdir()
    (tmp_path / "ewms-pilot-data").chmod(0o750)
    with open_data_directory(tmp_path, []) as data_directory:
        data_directory.open_hub()
        assert modes(data_directory) == [0o750, 0o1777]
        assert not data_directory.take_hub(tmp_path / "taken")


def test_the_last_pilot_takes_the_data_hub(tmp_path: Path) -> None:
    with open_data_directory(tmp_path, []) as last:
        with open_data_directory(tmp_path, []) as other:
            (other.data_hub / "file").touch()
            assert not last.take_hub(tmp_path / "taken")
        assert last.take_hub(tmp_path / "taken")
        assert (tmp_path / "taken/file").exists()
        with open_data_directory(tmp_path, []) as another:
            assert list(another.data_hub.iterdir()) == []


@pytest.mark.parametrize("kept", ["a task", "a file"])
def test_a_data_hub_that_stays_is_not_taken(tmp_path: Path, kept: str) -> None:
    with open_data_directory(tmp_path, [], keep=kept == "a task") as data_directory:
        if kept == "a file":
            (data_directory.root / "file").touch()
        assert not data_directory.take_hub(tmp_path / "taken")
        assert data_directory.data_hub.is_dir()
