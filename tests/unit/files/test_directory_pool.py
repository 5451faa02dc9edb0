import os
from collections.abc import Callable
from pathlib import Path

import pytest

from trio_pilot.files import task_directory
from trio_pilot.files.directory_pool import DirectoryPool
from trio_pilot.files.task_directory import TaskFiles
from trio_pilot.files.task_logs import open_log


@pytest.fixture(params=[False, True], ids=["this user", "any user"])
def pool(request: pytest.FixtureRequest) -> DirectoryPool:
    return DirectoryPool(any_user=request.param)


def files_of(directory: Path, name: str) -> TaskFiles:
    return TaskFiles(directory / name, infile=f"infile-{name}.in", outfile=f"outfile-{name}.out")


def used(pool: DirectoryPool, files: TaskFiles) -> TaskFiles:
    pool.make(files)
    task_directory.write_infile(files, "event", any_user=files.io.stat().st_mode & 0o777 == 0o777)
    files.outfile_path.write_text("written")
    for path in (files.stdout, files.stderr):
        with open_log(path) as log:
            log.write(b"written")
    return files


def test_a_clean_directory_is_used_for_the_next_task(tmp_path: Path, pool: DirectoryPool) -> None:
    first, second = files_of(tmp_path, "a"), files_of(tmp_path, "b")
    used(pool, first)
    inode = first.root.stat().st_ino
    assert pool.take_back(first)
    pool.make(second)
    assert second.root.stat().st_ino == inode
    assert not first.root.exists()
    task_directory.write_infile(second, "it")
    assert second.infile_path.read_text() == "it"
    assert list(second.io.iterdir()) == [second.infile_path]


@pytest.mark.parametrize("umask", [0o022, 0o077])
def test_a_directory_is_used_again_whatever_the_umask(tmp_path: Path, umask: int) -> None:
    pool, before = DirectoryPool(any_user=True, root_mode=task_directory.PASSABLE), os.umask(umask)
    try:
        files = files_of(tmp_path, "a")
        pool.make(files)
        task_directory.write_infile(files, "event", any_user=True)
        for path in (files.stdout, files.stderr):
            open_log(path).close()
        assert pool.take_back(files)
    finally:
        os.umask(before)


def test_closing_removes_all_directories(tmp_path: Path, pool: DirectoryPool) -> None:
    for name in "abc":
        assert pool.take_back(used(pool, files_of(tmp_path, name)))
    pool.close()
    assert not any(tmp_path.iterdir())


def more_in_task_io(files: TaskFiles) -> None:
    (files.io / "more").touch()


def something_in_scratch(files: TaskFiles) -> None:
    (files.scratch / "cache").mkdir()


def a_locked_directory(files: TaskFiles) -> None:
    files.scratch.chmod(0o500)


def an_infile_of_another_name(files: TaskFiles) -> None:
    files.infile_path.rename(files.io / "event")


def an_infile_with_a_second_name(files: TaskFiles) -> None:
    (files.root / "event").hardlink_to(files.infile_path)


def an_infile_that_is_a_link(files: TaskFiles) -> None:
    files.infile_path.unlink()
    files.infile_path.symlink_to("/etc/passwd")


def a_locked_infile(files: TaskFiles) -> None:
    files.infile_path.chmod(0o400)


def a_locked_stdout(files: TaskFiles) -> None:
    files.stdout.chmod(0o400)


def an_outfile_that_is_a_directory(files: TaskFiles) -> None:
    (files.io / files.outfile).unlink()
    (files.io / files.outfile).mkdir()


def a_fifo_for_stderr(files: TaskFiles) -> None:
    files.stderr.unlink()
    os.mkfifo(files.stderr)


def a_link_for_a_directory(files: TaskFiles) -> None:
    files.scratch.rmdir()
    files.scratch.symlink_to("/tmp")


def no_directory_at_all(files: TaskFiles) -> None:
    task_directory.remove(files)


@pytest.mark.parametrize(
    "change",
    [
        more_in_task_io,
        something_in_scratch,
        a_locked_directory,
        an_infile_of_another_name,
        an_infile_with_a_second_name,
        an_infile_that_is_a_link,
        a_locked_infile,
        a_locked_stdout,
        an_outfile_that_is_a_directory,
        a_fifo_for_stderr,
        a_link_for_a_directory,
        no_directory_at_all,
    ],
)
def test_a_changed_directory_is_not_used_again(
    tmp_path: Path, pool: DirectoryPool, change: Callable[[TaskFiles], None]
) -> None:
    files = used(pool, files_of(tmp_path, "a"))
    change(files)
    assert not pool.take_back(files)
    next_one = files_of(tmp_path, "b")
    pool.make(next_one)
    assert next_one.scratch.is_dir()
    assert not next_one.stderr.exists()


def test_a_kept_directory_that_has_vanished_is_made_anew(tmp_path: Path, pool: DirectoryPool) -> None:
    files = used(pool, files_of(tmp_path, "a"))
    assert pool.take_back(files)
    task_directory.remove(files)
    next_one = files_of(tmp_path, "b")
    pool.make(next_one)
    assert next_one.io.is_dir()
