import fcntl
import uuid
from pathlib import Path

from trio_pilot.cleanup.image_builds import remove_unfinished


def leave_unfinished(images: Path, key: str) -> Path:
    """Leave an unfinished image, as a pilot does that dies while it unpacks it."""
    images.mkdir(mode=0o700, exist_ok=True)
    unfinished = images / f"{key}.building-{uuid.uuid4().hex}"
    (unfinished / "root/usr").mkdir(parents=True)
    (images / f"{key}.lock").touch()
    return unfinished


def test_an_unfinished_image_is_removed_unless_its_lock_is_held(tmp_path: Path) -> None:
    dead, living, whole = leave_unfinished(tmp_path, "dead"), leave_unfinished(tmp_path, "living"), tmp_path / "dead"
    whole.mkdir()
    with (tmp_path / "living.lock").open("r+b") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        assert remove_unfinished(tmp_path) == 1
        assert (dead.exists(), living.exists(), whole.exists()) == (False, True, True)
    assert remove_unfinished(tmp_path) == 1
    assert not living.exists()


def test_a_missing_directory_of_images_has_no_unfinished_one(tmp_path: Path) -> None:
    assert remove_unfinished(tmp_path / "none") == 0
    assert list(tmp_path.iterdir()) == []


def test_nothing_is_removed_from_a_directory_that_others_can_write_to(tmp_path: Path) -> None:
    unfinished = leave_unfinished(tmp_path / "images", "key")
    link = tmp_path / "link"
    link.symlink_to("images")
    assert remove_unfinished(link) == 0
    unfinished.parent.chmod(0o777)
    assert remove_unfinished(unfinished.parent) == 0
    assert unfinished.exists()
