import json
import math
import os
import shutil
import socket
import stat
import subprocess
import sys
import threading
import time
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack, suppress
from pathlib import Path
from typing import Any

import pytest

from tests.support.disks import small_disk
from tests.support.paths import ROOT
from tests.support.users import AS_ROOT, as_nobody, needs_root
from trio_pilot.errors import DecodeError, NodeError, OutfileError, SettingsError
from trio_pilot.files import task_directory
from trio_pilot.files.data_directory import open_data_directory
from trio_pilot.files.task_directory import TaskFiles

MOST = 1000  # bytes of an output file, here


@pytest.fixture
def files(tmp_path: Path) -> TaskFiles:
    task = TaskFiles(tmp_path / "task", infile="infile.json", outfile="outfile.json")
    task_directory.make(task)
    return task


def test_where_any_user_may_write_nobody_else_of_this_machine_may_enter(tmp_path: Path) -> None:
    files = TaskFiles(tmp_path / "task", infile="infile", outfile="outfile")
    task_directory.make(files, any_user=True)
    assert [stat.S_IMODE(path.stat().st_mode) for path in (files.root, files.io, files.scratch)] == [0o700, 0o777, 0o1777]


# What goes in.


def staged(files: TaskFiles, data: Any) -> bytes:
    task_directory.write_infile(files, data)
    return (files.io / files.infile).read_bytes()


@pytest.mark.parametrize("text", ["", "plain", "a\r\nb\rc\n", "é 漢 \U0001f30c", '{"not": "parsed"}', "nul \0 too"])
def test_text_is_written_as_it_is(files: TaskFiles, text: str) -> None:
    assert staged(files, text) == text.encode()


@pytest.mark.parametrize("data", [None, True, 0, 1.5, [], [1, "é"], {}, {"a": {"b": None}}])
@pytest.mark.parametrize("extension", ["json", "in", "txt"])
def test_other_values_are_written_as_json_whatever_the_extension(tmp_path: Path, data: Any, extension: str) -> None:
    files = TaskFiles(tmp_path / "task", infile=f"infile.{extension}", outfile="outfile")
    task_directory.make(files)
    assert json.loads(staged(files, data)) == data


def test_nan_and_infinity_are_written_as_json_does(files: TaskFiles) -> None:
    assert staged(files, [math.nan, math.inf]) == b"[NaN, Infinity]"


def test_bytes_are_written_as_they_are(files: TaskFiles) -> None:
    assert staged(files, bytes(range(256))) == bytes(range(256))


def test_text_that_is_not_unicode_is_the_events_fault(files: TaskFiles) -> None:
    with pytest.raises(DecodeError, match="UTF-8"):
        task_directory.write_infile(files, "\ud800")


def test_lone_surrogates_inside_other_values_are_escaped(files: TaskFiles) -> None:
    assert json.loads(staged(files, ["\ud800"])) == ["\ud800"]


def test_a_directory_that_is_gone_is_the_nodes_fault(files: TaskFiles) -> None:
    shutil.rmtree(files.root)
    with pytest.raises(NodeError, match="cannot write the input file"):
        task_directory.write_infile(files, "data")


def test_a_directory_that_cannot_be_made_is_the_nodes_fault(tmp_path: Path) -> None:
    with pytest.raises(NodeError, match="cannot make the task directory"):
        task_directory.make(TaskFiles(tmp_path / "missing" / "task", "in", "out"))


@needs_root
def test_a_full_disk_is_the_nodes_fault(tmp_path: Path) -> None:
    with small_disk(tmp_path / "disk", 64) as disk:
        files = TaskFiles(disk / "task", "in", "out")
        task_directory.make(files)
        with pytest.raises(NodeError, match="No space left"):
            task_directory.write_infile(files, b"x" * 100_000)


# What comes out.


def outfile(files: TaskFiles) -> Path:
    return files.io / files.outfile


def test_no_output_file_is_no_output(files: TaskFiles) -> None:
    assert task_directory.read_outfile(files, MOST) is None


@pytest.mark.parametrize("content", [b"", b"text", b"a\r\nb", bytes(range(256)), b"x" * MOST])
def test_an_output_file_is_read_as_it_is(files: TaskFiles, content: bytes) -> None:
    outfile(files).write_bytes(content)
    assert task_directory.read_outfile(files, MOST) == content


def test_an_output_file_that_is_too_large_is_refused(files: TaskFiles) -> None:
    outfile(files).write_bytes(b"x" * (MOST + 1))
    with pytest.raises(OutfileError, match="1001 bytes, more than the 1000"):
        task_directory.read_outfile(files, MOST)


def test_an_endless_output_file_is_refused_at_once(files: TaskFiles) -> None:
    with outfile(files).open("wb") as file:
        file.truncate(1 << 40)
    refused(files)


@pytest.mark.parametrize("inside", [True, False])
def test_a_symbolic_link_is_refused(files: TaskFiles, tmp_path: Path, inside: bool) -> None:
    target = (files.io if inside else tmp_path) / "elsewhere"
    target.write_text("secret")
    outfile(files).symlink_to(target)
    refused(files, "symbolic link")


def test_a_dangling_symbolic_link_is_refused(files: TaskFiles) -> None:
    outfile(files).symlink_to("nowhere")
    refused(files, "symbolic link")


def test_a_fifo_is_refused_at_once(files: TaskFiles) -> None:
    os.mkfifo(outfile(files))
    refused(files)


def test_a_directory_is_refused(files: TaskFiles) -> None:
    outfile(files).mkdir()
    refused(files)


def test_a_socket_is_refused(files: TaskFiles, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(files.io)  # the address of a socket must be short
    with socket.socket(socket.AF_UNIX) as listening:
        listening.bind(files.outfile)
        refused(files)


@needs_root
def test_a_device_is_refused(files: TaskFiles) -> None:
    os.mknod(outfile(files), 0o600 | stat.S_IFCHR, os.makedev(1, 5))  # /dev/zero
    refused(files)


def test_an_output_file_that_cannot_be_read_is_refused(open_to_all: Path) -> None:
    files = TaskFiles(open_to_all / "task", "in", "out")
    with as_nobody():
        task_directory.make(files)
        outfile(files).touch(mode=0)
        refused(files, "Permission denied")


def refused(files: TaskFiles, why: str = "plain file|bytes, more than") -> None:
    begun = time.monotonic()
    with pytest.raises(OutfileError, match=why):
        task_directory.read_outfile(files, MOST)
    assert time.monotonic() - begun < 1


@pytest.mark.parametrize(
    ("content", "value"),
    [(b"1", 1), (b' {"a": [1.5, null]}\r\n', {"a": [1.5, None]}), (b'"\\ud800"', "\ud800"), ('"é"'.encode(), "é")],
)
def test_json_is_parsed(content: bytes, value: Any) -> None:
    assert task_directory.parse_outfile(content, is_json=True) == value


def test_nan_is_parsed() -> None:
    assert math.isnan(task_directory.parse_outfile(b"NaN", is_json=True))


@pytest.mark.parametrize("content", [b"", b"{", b"nope", b"\xff", b"1 2", b"[" * 100_000, b"1" * 10_000])
def test_what_is_not_json_is_said_to_be_the_outputs_fault(content: bytes) -> None:
    with pytest.raises(OutfileError, match="not JSON"):
        task_directory.parse_outfile(content, is_json=True)


@pytest.mark.parametrize("text", ["", "a\r\nb\rc\n", "é", "{", "\ufeffbom"])
def test_text_comes_out_as_it_is(text: str) -> None:
    assert task_directory.parse_outfile(text.encode(), is_json=False) == text


@pytest.mark.parametrize("content", [b"\xff\xfe\0", bytes(range(256))])
def test_what_is_no_text_comes_out_as_bytes(content: bytes) -> None:
    assert task_directory.parse_outfile(content, is_json=False) == content


# Cleaning up.


def test_locked_directories_are_removed(open_to_all: Path) -> None:
    files = TaskFiles(open_to_all / "task", "in", "out")
    with as_nobody():
        task_directory.make(files)
        deepest = files.scratch / "a/b/c"
        deepest.mkdir(parents=True)
        (deepest / "file").touch(mode=0)
        for directory in (deepest, deepest.parent, deepest.parent.parent, files.io, files.root):
            directory.chmod(0)
        task_directory.remove(files)
        assert not files.root.exists()


def test_what_a_symbolic_link_leads_to_is_left_as_it_is(open_to_all: Path) -> None:
    files = TaskFiles(open_to_all / "task", "in", "out")
    with as_nobody():
        (elsewhere := open_to_all / "elsewhere").mkdir(mode=0o755)
        (elsewhere / "precious").touch(mode=0o644)
        task_directory.make(files)
        (files.scratch / "to-directory").symlink_to(elsewhere)
        (files.scratch / "to-file").symlink_to(elsewhere / "precious")
        files.scratch.chmod(0o500)
        task_directory.remove(files)
        assert not files.root.exists()
        assert stat.S_IMODE(elsewhere.stat().st_mode) == 0o755
        assert stat.S_IMODE((elsewhere / "precious").stat().st_mode) == 0o644


@needs_root
def test_what_cannot_be_removed_is_only_logged(files: TaskFiles, caplog: pytest.LogCaptureFixture) -> None:
    with small_disk(files.scratch / "mounted", 16):
        task_directory.remove(files)
        assert files.scratch.exists()
        assert not files.io.exists()
    assert f"cannot remove all of {files.root}" in caplog.text


def test_others_files_that_cannot_be_removed_are_only_logged(open_to_all: Path, caplog: pytest.LogCaptureFixture) -> None:
    if not AS_ROOT:
        pytest.skip("only root can make files of others")
    files = TaskFiles(open_to_all / "task", "in", "out")
    task_directory.make(files)
    with as_nobody():
        task_directory.remove(files)
    assert files.root.exists()
    assert "cannot remove all of" in caplog.text


@pytest.mark.parametrize("mode", [0o700, 0])
def test_a_thousand_directories_in_each_other_are_removed(
    open_to_all: Path, caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch, mode: int
) -> None:
    monkeypatch.delenv("PATH")  # which the guardian does not have either
    files = TaskFiles(open_to_all / "task", "in", "out")
    try:
        with as_nobody():
            task_directory.make(files)
            nest(files.scratch, monkeypatch)
            Path("file").touch()
            Path().chmod(mode)
            task_directory.remove(files)
        assert not files.root.exists()
        assert caplog.text == ""
    finally:
        subprocess.run(["rm", "-rf", files.root], check=True)


def nest(directory: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Make directories in each other, and go into the last."""
    monkeypatch.chdir(directory)
    for _ in range(1500):
        Path("d").mkdir()
        monkeypatch.chdir("d")


def test_removing_what_is_gone_is_no_error(files: TaskFiles, caplog: pytest.LogCaptureFixture) -> None:
    shutil.rmtree(files.root)
    task_directory.remove(files)
    assert caplog.text == ""


# The data directory.


def test_the_data_directory_is_there_while_it_is_used_and_gone_after(tmp_path: Path) -> None:
    with open_data_directory(tmp_path, []) as data_directory:
        assert data_directory.root == tmp_path / "ewms-pilot-data"
        assert data_directory.data_hub.is_dir()
        (data_directory.data_hub / "calibration").write_text("from the init container")
    assert list(tmp_path.iterdir()) == []


def test_it_is_removed_when_its_user_fails(tmp_path: Path) -> None:
    with pytest.raises(ZeroDivisionError), open_data_directory(tmp_path, []):
        _ = 1 / 0
    assert list(tmp_path.iterdir()) == []


def test_of_two_pilots_the_last_one_out_removes_it(tmp_path: Path) -> None:
    with open_data_directory(tmp_path, []) as first:
        (first.data_hub / "file").touch()
        with open_data_directory(tmp_path, []) as second:
            assert second.root == first.root
        assert (first.data_hub / "file").exists()
    assert list(tmp_path.iterdir()) == []


def test_the_first_may_leave_first(tmp_path: Path) -> None:
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
    with open_data_directory(tmp_path, []) as data_directory:  # and is still known to be one
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


def test_many_pilots_come_and_go_at_once_in_threads(tmp_path: Path) -> None:
    with ThreadPoolExecutor(4) as pool:
        for done in [pool.submit(come_and_go, tmp_path, 150) for _ in range(4)]:
            done.result()
    assert list(tmp_path.iterdir()) == []


def test_many_pilots_come_and_go_at_once_in_processes(tmp_path: Path) -> None:
    code = "import sys, pathlib, tests.unit.files.test_task_directory as t; t.come_and_go(pathlib.Path(sys.argv[1]), 150)"
    pilots = [subprocess.Popen([sys.executable, "-c", code, tmp_path], cwd=ROOT) for _ in range(4)]
    assert [pilot.wait(60) for pilot in pilots] == [0] * 4
    assert list(tmp_path.iterdir()) == []


def test_a_missing_parent_is_said_and_not_made(tmp_path: Path) -> None:
    with pytest.raises(NodeError, match=r"^cannot write the data directory .*/missing/ewms-pilot-data: No such file"):
        open_data_directory(tmp_path / "missing", []).__enter__()
    assert list(tmp_path.iterdir()) == []


def test_a_parent_that_is_a_file_is_said(tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    with pytest.raises(NodeError, match="Not a directory"):
        open_data_directory(tmp_path / "file", []).__enter__()


@pytest.mark.parametrize("name", ["parent", "parent/ewms-pilot-data"])
def test_a_circle_of_links_is_said(tmp_path: Path, name: str) -> None:
    (tmp_path / name).parent.mkdir(exist_ok=True)
    (tmp_path / name).symlink_to((tmp_path / name).name)
    with pytest.raises(NodeError, match=r"cannot write the data directory .*/parent/ewms-pilot-data: "):
        open_data_directory(tmp_path / "parent", []).__enter__()


@pytest.mark.parametrize("exists", [True, False])
def test_a_directory_that_cannot_be_written_is_said(open_to_all: Path, exists: bool) -> None:
    where = open_to_all / "ewms-pilot-data" if exists else open_to_all
    where.mkdir(exist_ok=True)
    where.chmod(0o555)
    with as_nobody(), pytest.raises(NodeError, match=r"cannot write the data directory .*: Permission denied"):
        open_data_directory(open_to_all, []).__enter__()
    where.chmod(0o777)


@needs_root
def test_a_disk_that_is_full_is_said(tmp_path: Path) -> None:
    with small_disk(tmp_path / "disk", 64) as disk:
        with suppress(OSError):
            (disk / "filling").write_bytes(b"x" * 100_000)
        with pytest.raises(NodeError, match=r"cannot write the data directory .*: No space left"):
            open_data_directory(disk, []).__enter__()


@pytest.mark.parametrize("place", ["/etc", "/usr/share", "/bin", "/proc", "/dev", "/var/log"])
def test_there_are_places_where_no_data_directory_is_made(place: str) -> None:
    with pytest.raises(SettingsError, match="cannot be made below"):
        open_data_directory(Path(place), []).__enter__()


def test_a_link_to_such_a_place_is_seen_through(tmp_path: Path) -> None:
    (tmp_path / "link").symlink_to("/etc")
    with pytest.raises(SettingsError, match="cannot be made below /etc"):
        open_data_directory(tmp_path / "link", []).__enter__()
    (tmp_path / "ewms-pilot-data").symlink_to("/etc")
    with pytest.raises(SettingsError, match="cannot be made below /etc"):
        open_data_directory(tmp_path, []).__enter__()


def test_a_data_hub_is_no_link(tmp_path: Path) -> None:
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


# External directories.


def test_external_directories_are_taken_as_they_are_named(tmp_path: Path) -> None:
    (data := tmp_path / "da ta,=").mkdir()
    with open_data_directory(tmp_path, [data, Path("/usr/share")]) as data_directory:
        assert data_directory.external == (data, Path("/usr/share"))


@pytest.mark.parametrize("path", ["relative", "/does/not/exist", "/etc/passwd", "/usr/../usr"])
def test_external_directories_must_be_absolute_and_exist(tmp_path: Path, path: str) -> None:
    with pytest.raises(SettingsError, match="EWMS_PILOT_EXTERNAL_DIRECTORIES must name absolute, existing directories"):
        open_data_directory(tmp_path, [Path(path)]).__enter__()
    assert list(tmp_path.iterdir()) == []


def test_external_directories_must_be_where_we_may_look(tmp_path: Path, locked: Path) -> None:
    with as_nobody(), pytest.raises(SettingsError, match=f"absolute, existing directories, not '{locked}/data'"):
        open_data_directory(tmp_path, [locked / "data"]).__enter__()


@pytest.mark.parametrize("path", ["/proc", "/proc/self/cwd", "/dev", "/sys", "/run"])
def test_some_directories_are_never_mounted(tmp_path: Path, path: str) -> None:
    with pytest.raises(SettingsError, match="must not name directories below"):
        open_data_directory(tmp_path, [Path(path)]).__enter__()


def test_links_to_them_are_seen_through(tmp_path: Path) -> None:
    (tmp_path / "link").symlink_to("/proc")
    with pytest.raises(SettingsError, match="must not name directories below /proc"):
        open_data_directory(tmp_path, [tmp_path / "link"]).__enter__()


def test_the_whole_machine_is_never_mounted(tmp_path: Path) -> None:
    with pytest.raises(SettingsError, match="must not name all of this machine"):
        open_data_directory(tmp_path, [Path("/")]).__enter__()


@pytest.mark.parametrize("path", ["/tmp", "/tmp/", "//tmp"])
def test_what_is_a_containers_own_is_not_mounted_over(tmp_path: Path, path: str) -> None:
    with pytest.raises(SettingsError, match=r"must not name /+tmp: that is each container's own$"):
        open_data_directory(tmp_path, [Path(path)]).__enter__()


@pytest.mark.parametrize("name", ["", "/data-hub", "/task-io"])
def test_nor_are_its_data_directories(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, name: str) -> None:
    monkeypatch.setattr("trio_pilot.files.data_directory.is_directory", lambda _: True)
    with pytest.raises(SettingsError, match=f"must not name /ewms-pilot-data{name}: that is each container's own$"):
        open_data_directory(tmp_path, [Path(f"/ewms-pilot-data{name}")]).__enter__()


def test_what_is_below_is_mounted(tmp_path: Path) -> None:
    (below := tmp_path / "tmp").mkdir()
    assert tmp_path.is_relative_to("/tmp")
    with open_data_directory(tmp_path, [below]) as data_directory:
        assert list(data_directory.external) == [below]


def test_no_directory_is_mounted_twice(tmp_path: Path) -> None:
    with pytest.raises(SettingsError, match="twice"):
        open_data_directory(tmp_path, [Path("/usr/share"), Path("/usr/share/")]).__enter__()


def test_a_tasks_output_is_copied_to_ours(files: TaskFiles, capfdbinary: pytest.CaptureFixture[bytes]) -> None:
    files.stdout.write_bytes(b"out \xff\n")
    files.stderr.write_bytes(b"err \xff\n")
    task_directory.dump(files)
    assert capfdbinary.readouterr() == (b"out \xff\n", b"err \xff\n")


def test_output_that_is_not_there_is_not_copied(tmp_path: Path, capfdbinary: pytest.CaptureFixture[bytes]) -> None:
    task_directory.dump(TaskFiles(tmp_path / "none", "in", "out"))
    assert capfdbinary.readouterr() == (b"", b"")
