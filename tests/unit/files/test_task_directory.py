import json
import math
import os
import shutil
import socket
import stat
import subprocess
import time
from pathlib import Path
from typing import Any

import pytest

from tests.support.disks import small_disk
from tests.support.users import AS_ROOT, as_nobody, needs_root
from trio_pilot.errors import DecodeError, NodeError, OutfileError
from trio_pilot.files import task_directory
from trio_pilot.files.filesystem import locked_directories
from trio_pilot.files.task_directory import TaskFiles

MOST = 1000  # bytes of an output file in these tests


@pytest.fixture
def files(tmp_path: Path) -> TaskFiles:
    task = TaskFiles(tmp_path / "task", infile="infile.json", outfile="outfile.json")
    task_directory.make(task)
    return task


def test_a_directory_for_any_user_is_closed_to_others_of_this_machine(tmp_path: Path) -> None:
    files = TaskFiles(tmp_path / "task", infile="infile", outfile="outfile")
    task_directory.make(files, any_user=True)
    assert [stat.S_IMODE(path.stat().st_mode) for path in (files.root, files.io, files.scratch)] == [0o700, 0o777, 0o1777]


@pytest.mark.parametrize("umask", [0o022, 0o077, 0o027])
def test_any_user_may_read_an_input_file_whatever_the_umask(tmp_path: Path, umask: int) -> None:
    before = os.umask(umask)
    try:
        files = TaskFiles(tmp_path / "task", infile="infile", outfile="outfile")
        task_directory.make(files, any_user=True, root_mode=task_directory.PASSABLE)
        task_directory.write_infile(files, "event", any_user=True)
    finally:
        os.umask(before)
    paths = files.root, files.io, files.scratch, files.infile_path
    assert [stat.S_IMODE(path.stat().st_mode) for path in paths] == [0o711, 0o777, 0o1777, 0o644]


# Input files.


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


def test_nan_and_infinity_are_written_as_json_writes_them(files: TaskFiles) -> None:
    assert staged(files, [math.nan, math.inf]) == b"[NaN, Infinity]"


def test_bytes_are_written_as_they_are(files: TaskFiles) -> None:
    assert staged(files, bytes(range(256))) == bytes(range(256))


def test_text_that_is_not_unicode_is_a_decode_error(files: TaskFiles) -> None:
    with pytest.raises(DecodeError, match="UTF-8"):
        task_directory.write_infile(files, "\ud800")


def test_lone_surrogates_inside_other_values_are_escaped(files: TaskFiles) -> None:
    assert json.loads(staged(files, ["\ud800"])) == ["\ud800"]


def test_a_directory_that_is_gone_is_a_node_error(files: TaskFiles) -> None:
    shutil.rmtree(files.root)
    with pytest.raises(NodeError, match="cannot write the input file"):
        task_directory.write_infile(files, "data")


def test_a_directory_that_cannot_be_made_is_a_node_error(tmp_path: Path) -> None:
    with pytest.raises(NodeError, match="cannot make the task directory"):
        task_directory.make(TaskFiles(tmp_path / "missing" / "task", "in", "out"))


@needs_root
def test_a_full_disk_is_a_node_error(tmp_path: Path) -> None:
    with small_disk(tmp_path / "disk", 64) as disk:
        files = TaskFiles(disk / "task", "in", "out")
        task_directory.make(files)
        with pytest.raises(NodeError, match="No space left"):
            task_directory.write_infile(files, b"x" * 100_000)


# Output files.


def outfile(files: TaskFiles) -> Path:
    return files.io / files.outfile


def test_without_an_output_file_there_is_no_output(files: TaskFiles) -> None:
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
def test_an_output_that_is_not_json_is_an_outfile_error(content: bytes) -> None:
    with pytest.raises(OutfileError, match="not JSON"):
        task_directory.parse_outfile(content, is_json=True)


@pytest.mark.parametrize("text", ["", "a\r\nb\rc\n", "é", "{", "\ufeffbom"])
def test_an_output_that_is_text_is_read_as_it_is(text: str) -> None:
    assert task_directory.parse_outfile(text.encode(), is_json=False) == text


@pytest.mark.parametrize("content", [b"\xff\xfe\0", bytes(range(256))])
def test_an_output_that_is_not_text_is_read_as_bytes(content: bytes) -> None:
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


def test_the_target_of_a_symbolic_link_is_not_changed(open_to_all: Path) -> None:
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
def test_a_directory_that_cannot_be_removed_is_only_logged(files: TaskFiles, caplog: pytest.LogCaptureFixture) -> None:
    with small_disk(files.scratch / "mounted", 16):
        task_directory.remove(files)
        assert files.scratch.exists()
        assert not files.io.exists()
    assert f"cannot remove all of {files.root}" in caplog.text


def test_files_of_others_that_cannot_be_removed_are_only_logged(open_to_all: Path, caplog: pytest.LogCaptureFixture) -> None:
    if not AS_ROOT:
        pytest.skip("only root can make files of others")
    files = TaskFiles(open_to_all / "task", "in", "out")
    task_directory.make(files)
    with as_nobody():
        task_directory.remove(files)
    assert files.root.exists()
    assert "cannot remove all of" in caplog.text


@pytest.mark.parametrize("mode", [0o700, 0])
def test_a_thousand_nested_directories_are_removed(
    open_to_all: Path, caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch, mode: int
) -> None:
    monkeypatch.delenv("PATH")  # the guardian has none either
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
    """Make nested directories, and change to the innermost."""
    monkeypatch.chdir(directory)
    for _ in range(1500):
        Path("d").mkdir()
        monkeypatch.chdir("d")


def test_removing_a_directory_that_is_gone_is_no_error(files: TaskFiles, caplog: pytest.LogCaptureFixture) -> None:
    shutil.rmtree(files.root)
    task_directory.remove(files)
    assert caplog.text == ""


def test_directories_that_this_user_cannot_empty_are_found(open_to_all: Path) -> None:
    for name, mode in (("a/closed/b", 0o700), ("a/open", 0o777), ("a/sticky", 0o1777), ("a/readable/c", 0o755)):
        (open_to_all / name).mkdir(parents=True)
        (open_to_all / name).chmod(mode)
    for name, mode in (("a", 0o777), ("a/closed", 0o700), ("a/readable", 0o755)):
        (open_to_all / name).chmod(mode)
    (open_to_all / "a/link").symlink_to("/root")
    with as_nobody():
        locked = {str(path.relative_to(open_to_all)) for path in locked_directories(open_to_all)}
    assert locked == ({"a/closed", "a/sticky", "a/readable", "a/readable/c"} if AS_ROOT else set())


# Keeping files.


def entries(files: TaskFiles) -> set[str]:
    return {str(path.relative_to(files.root)) for path in files.root.rglob("*")}


def use(files: TaskFiles) -> None:
    task_directory.write_infile(files, "event")
    for path in (files.outfile_path, files.stdout, files.stderr, files.scratch / "file"):
        path.touch()
    (files.scratch / "usr/share").mkdir(parents=True)  # where an external directory was mounted
    (files.scratch / "usr").chmod(0o500)


def test_of_a_kept_directory_input_output_and_logs_stay(files: TaskFiles) -> None:
    use(files)
    task_directory.keep_only_files(files)
    kept = {"task-io", "task-io/infile.json", "task-io/outfile.json", "outputs", "outputs/stdoutfile", "outputs/stderrfile"}
    assert entries(files) == kept


def test_of_the_directory_of_an_init_container_the_logs_stay(tmp_path: Path) -> None:
    files = TaskFiles(tmp_path / "init-0123", infile="", outfile="")
    task_directory.make(files)
    files.stdout.touch()
    assert task_directory.try_to_keep_only_files(files)
    assert entries(files) == {"outputs", "outputs/stdoutfile"}


def test_the_directory_of_a_task_that_was_never_started_is_not_kept(files: TaskFiles) -> None:
    task_directory.write_infile(files, "event")
    task_directory.keep_only_files(files)
    assert not files.root.exists()
    task_directory.keep_only_files(files)  # no error


@needs_root
def test_what_cannot_be_removed_from_a_kept_directory_is_logged(files: TaskFiles, caplog: pytest.LogCaptureFixture) -> None:
    use(files)
    with small_disk(files.scratch / "usr", 16):
        assert not task_directory.try_to_keep_only_files(files)
        assert caplog.text == ""
        task_directory.keep_only_files(files)
    assert f"cannot remove all of {files.scratch}" in caplog.text
    assert files.infile_path.exists()
