from pathlib import Path

import pytest

from trio_pilot.runtimes import Mount, mount_table
from trio_pilot.runtimes.mount_table import to_the_bottom

TOP = "1 0 254:0 / / rw,relatime shared:1 - ext4 /dev/vda rw\n"
DATA = "2 1 0:5 / /data rw,relatime shared:2 - tmpfs t rw\n"


def mounted(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, *lines: str, user: int = 0, at: str = "/data") -> list[str]:
    """Return the places where a directory is mounted read-only; those that are private in brackets."""
    table = tmp_path / "mountinfo"
    table.write_text("".join(f"{line.rstrip()}\n" for line in lines))
    monkeypatch.setattr(mount_table, "TABLE", table)
    made = to_the_bottom([Mount(Path(at), at)], user)
    return [str(one.target) if one.propagates else f"[{one.target}]" for one in made]


@pytest.mark.parametrize(
    ("line", "place"),
    [
        ("3 2 0:6 / /data/a rw shared:3 - ext4 d rw", ["/data/a"]),
        ("3 2 0:6 / /data/a rw master:3 - ext4 d rw", ["/data/a"]),
        ("3 2 0:6 / /data/a rw - ext4 d rw", ["[/data/a]"]),
        ("3 2 0:6 / /data/a rw unbindable - ext4 d rw", []),  # left out with that of /data
        (r"3 2 0:6 / /data/a\040b\134c rw shared:3 - ext4 d rw", [r"/data/a b\c"]),
        ("3 2 0:6 / /data/a ro,nosuid shared:3 - ext4 d rw", []),  # read-only already
        ("3 2 0:6 / /data/a rw shared:3 - fuse.sshfs d rw,user_id=7,group_id=7", []),  # for one user, who is another
        ("3 2 0:6 / /data/a rw shared:3 - fuse.sshfs d rw,user_id=0,group_id=7", ["/data/a"]),
        ("3 2 0:6 / /data/a rw shared:3 - fuse d rw,user_id=7,group_id=7,allow_other", ["/data/a"]),
        ("3 1 0:6 / /database rw shared:3 - ext4 d rw", []),
        ("3 1 0:6 / /dat rw shared:3 - ext4 d rw", []),
    ],
)
def test_what_is_mounted_below_is_mounted_once_more(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, line: str, place: list[str]
) -> None:
    assert mounted(tmp_path, monkeypatch, TOP, DATA, line) == ["/data", *place]


COVERED = {
    "another is mounted there": ["3 2 0:6 / /data/a rw shared:3 - t t rw", "4 3 0:7 / /data/a rw shared:4 - t t rw"],
    "another is mounted above": [
        "3 2 0:6 / /data/a/b rw shared:3 - t t rw",
        "4 2 0:7 / /data/a rw shared:4 - t t rw",
    ],
    "another is mounted above what it is in": [
        "3 2 0:6 / /data/a/b rw shared:3 - t t rw",
        "4 3 0:6 / /data/a/b/c rw shared:3 - t t rw",
        "5 2 0:7 / /data/a rw shared:4 - t t rw",
    ],
}


@pytest.mark.parametrize("lines", COVERED.values(), ids=COVERED)
def test_a_mount_that_is_covered_is_not_mounted(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, lines: list[str]) -> None:
    assert mounted(tmp_path, monkeypatch, TOP, DATA, *lines) == ["/data", "/data/a"]


def test_a_covered_directory_has_only_what_covers_it(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    lines = "3 2 0:6 / /data/a rw shared:3 - t t rw", "4 2 0:7 / /data rw shared:4 - t t rw"
    assert mounted(tmp_path, monkeypatch, TOP, DATA, *lines) == ["/data"]


def test_a_private_directory_does_not_propagate(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    assert mounted(tmp_path, monkeypatch, TOP, at="/data") == ["/data"]
    assert mounted(tmp_path, monkeypatch, TOP.replace(" shared:1", ""), at="/data") == ["[/data]"]
    assert mounted(tmp_path, monkeypatch, TOP, DATA.replace(" shared:2", ""), at="/data") == ["[/data]"]


def test_the_target_of_a_link_keeps_its_name(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "link").symlink_to("/data")
    line = "3 2 0:6 / /data/a/b rw shared:3 - ext4 d rw"
    link = f"{tmp_path}/link"
    assert mounted(tmp_path, monkeypatch, TOP, DATA, line, at=link) == [link, f"{link}/a/b"]


def test_writable_mounts_are_as_they_were(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(mount_table, "TABLE", Path("/nonexistent"))
    mounts = (Mount(Path("/data"), "/data", writable=True),)
    assert to_the_bottom(mounts, 0) == mounts
