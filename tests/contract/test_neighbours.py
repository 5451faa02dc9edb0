# What other users of the machine do with files, links, locks and names, each tried by two of them.

import fcntl
import os
import shutil
import stat
import struct
import tempfile
import uuid
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
import trio

from tests.support.users import as_user, needs_root
from trio_pilot.brokers import Delivery, QueueAddress, dead_letters, local
from trio_pilot.cleanup import image_builds
from trio_pilot.errors import BrokerError, NodeError, NotSetAsideError, PilotError, SettingsError
from trio_pilot.files import data_directory, filesystem
from trio_pilot.files.data_directory import open_data_directory
from trio_pilot.processes import identity
from trio_pilot.settings import environment, load

pytestmark = needs_root

DEAD = "00000000-0000-0000-0000-000000000000.1.1.1"
Attack = Callable[[Path], object]


@pytest.fixture(params=[3001, 3002])
def neighbour(request: pytest.FixtureRequest) -> int:
    return int(request.param)


@pytest.fixture
def shared() -> Iterator[Path]:
    """Make a directory like /tmp."""
    directory = Path(tempfile.mkdtemp(dir="/tmp"))
    directory.chmod(0o1777)
    (directory / "victim").write_text("kept")
    (directory / "victim").chmod(0o600)
    yield directory
    assert (directory / "victim").read_text() == "kept"
    assert stat.S_IMODE((directory / "victim").stat().st_mode) == 0o600
    shutil.rmtree(directory)


def attacked(shared: Path, neighbour: int, attack: Attack) -> None:
    with as_user(neighbour):
        attack(shared)


def directory_of(mode: int, *inside: str) -> Attack:
    def make(shared: Path) -> None:
        root = shared / "ewms-pilot-data"
        root.mkdir()
        for name in inside:
            (root / name).mkdir() if name == "data-hub" else (root / name).touch()
        root.chmod(mode)

    return make


def link_to_own(shared: Path) -> None:
    (shared / "elsewhere").mkdir(mode=0o777)
    (shared / "ewms-pilot-data").symlink_to(shared / "elsewhere")


DIRECTORIES: dict[str, Attack] = {
    "closed": directory_of(0o700),
    "open to all": directory_of(0o777),
    "sticky": directory_of(0o1777),
    "readable": directory_of(0o755),
    "with a lock": directory_of(0o777, ".lock"),
    "with a hub": directory_of(0o777, ".lock", "data-hub"),
    "set-gid": directory_of(0o2777),
    "a link": link_to_own,
    "a link to root's": lambda shared: (shared / "ewms-pilot-data").symlink_to("/"),
    "a link to a directory of tasks": lambda shared: (shared / "ewms-pilot-data").symlink_to(shared),
}


@pytest.mark.parametrize("attack", DIRECTORIES.values(), ids=DIRECTORIES)
def test_a_data_directory_of_a_neighbour_is_refused(shared: Path, neighbour: int, attack: Attack) -> None:
    attacked(shared, neighbour, attack)
    with pytest.raises(SettingsError, match=r"ewms-pilot-data (belongs|may be)") as refusal, open_data_directory(shared, []):
        pass
    assert "\n" not in str(refusal.value)
    data_directory.sweep(shared / "ewms-pilot-data")


@pytest.mark.parametrize("mode", [0o777, 0o757, 0o775])
def test_a_data_directory_that_others_may_write_is_refused(shared: Path, mode: int) -> None:
    root = shared / "ewms-pilot-data"
    root.mkdir()
    os.chown(root, 0, 3001)
    root.chmod(mode)
    with pytest.raises(SettingsError, match="may be written by"), open_data_directory(shared, []):
        pass


def test_a_neighbour_sees_nothing_of_a_data_directory(shared: Path, neighbour: int) -> None:
    umask = os.umask(0)
    try:
        with open_data_directory(shared, []) as data:
            found = {path: stat.S_IMODE(path.stat().st_mode) for path in [data.root, *data.root.rglob("*")]}
            assert all(not mode & 0o077 for mode in found.values()), found
            with as_user(neighbour), pytest.raises(PermissionError):
                (data.root / ".lock").open()
    finally:
        os.umask(umask)


NAMES = [
    f".pilot-????????-{DEAD}@{os.uname().nodename}",
    f".pilot-*-{DEAD}@{os.uname().nodename}",
    f".pilot-[0-9]-{DEAD}@{os.uname().nodename}",
    f".pilot--{DEAD}@{os.uname().nodename}",
    f".pilot-../../..-{DEAD}".replace("/", "_"),
    ".pilot-01234567",
    ".pilot-\udcff\udcfe",
    ".pilot-\n-\n@\n",
    ".pilot-" + "x" * 248,
    f".pilot-01234567-{DEAD[:-1]}{'9' * 100}@x",
]


@pytest.mark.parametrize("make", [Path.touch, os.mkfifo, Path.mkdir], ids=["file", "FIFO", "directory"])
@pytest.mark.parametrize("name", NAMES, ids=range(len(NAMES)))
def test_a_name_does_not_end_or_hang_a_sweep(shared: Path, name: str, make: Attack) -> None:
    with open_data_directory(shared, []) as data:
        task = data.root / data.new_name()
        task.mkdir()
        make(data.root / name)
        data_directory.sweep(data.root)
        data_directory.owner_files_of_dead(data.root)
        assert task.is_dir()
        task.rmdir()


def test_a_fifo_with_the_name_of_an_owner_file_does_not_hang_a_sweep(shared: Path) -> None:
    with open_data_directory(shared, []) as data:
        os.mkfifo(data.root / f".pilot-01234567-{identity.own()}@{os.uname().nodename}")
        data_directory.sweep(data.root)
        assert data_directory.owner_files_of_dead(data.root) == set()


def test_what_a_neighbour_leaves_beside_a_data_directory_is_left_alone(shared: Path, neighbour: int) -> None:
    name = f".ewms-pilot-data-{DEAD}@{os.uname().nodename}-{uuid.uuid4().hex}"
    attacked(shared, neighbour, lambda shared: (shared / name).mkdir())
    data_directory.sweep(shared / "ewms-pilot-data")
    assert (shared / name).is_dir()


def test_another_kind_of_lock_file_is_not_waited_for(shared: Path) -> None:
    with open_data_directory(shared, []) as data:
        (data.root / ".lock").unlink()
        os.mkfifo(data.root / ".lock")
        data_directory.sweep(data.root)


def test_a_lock_of_another_process_is_not_waited_for_for_ever(shared: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(data_directory, "LOCK_TIMEOUT", 0.1)
    with open_data_directory(shared, []) as data, (data.root / ".lock").open() as other:
        fcntl.flock(data.lock or other, fcntl.LOCK_UN)
        fcntl.flock(other, fcntl.LOCK_EX)
        with pytest.raises(NodeError, match="locked by another process"), open_data_directory(shared, []):
            pass


SETTINGS = {"trio-pilot.toml": 'task_image = "evil"\n', "ewms_htcondor_envfile.sh": "export EWMS_PILOT_TASK_IMAGE=evil\n"}


def settings_of(directory: Path) -> str:
    return load({}, environment({}, directory), directory).task_image


@pytest.mark.parametrize("mode", [0o600, 0o644, 0o666])
@pytest.mark.parametrize("name", SETTINGS)
def test_settings_of_a_neighbour_are_refused(shared: Path, neighbour: int, name: str, mode: int) -> None:
    attacked(shared, neighbour, lambda shared: (shared / name).write_text(SETTINGS[name]))
    (shared / name).chmod(mode)
    with pytest.raises(SettingsError, match=f"belongs to user {neighbour}"):
        settings_of(shared)


@pytest.mark.parametrize("name", SETTINGS)
def test_settings_by_a_link_of_a_neighbour_are_refused(shared: Path, neighbour: int, name: str) -> None:
    (shared / "own").write_text(SETTINGS[name])
    attacked(shared, neighbour, lambda shared: (shared / name).symlink_to("own"))
    with pytest.raises(SettingsError, match=f"belongs to user {neighbour}"):
        settings_of(shared)


@pytest.mark.parametrize(("mode", "group"), [(0o666, 0), (0o646, 0), (0o664, 3001)])
@pytest.mark.parametrize("name", SETTINGS)
def test_settings_that_others_may_write_are_refused(shared: Path, name: str, mode: int, group: int) -> None:
    (shared / name).write_text(SETTINGS[name])
    os.chown(shared / name, 0, group)
    (shared / name).chmod(mode)
    with pytest.raises(SettingsError, match="not obeyed, for it may be written by"):
        settings_of(shared)


@pytest.mark.parametrize("name", SETTINGS)
def test_settings_that_others_may_replace_are_refused(shared: Path, name: str) -> None:
    (shared / name).write_text(SETTINGS[name])
    shared.chmod(0o777)
    with pytest.raises(SettingsError, match="for its directory may be written by all"):
        settings_of(shared)


@pytest.mark.parametrize("name", SETTINGS)
@pytest.mark.parametrize("mode", [0o600, 0o644, 0o755, 0o664])
def test_own_settings_are_obeyed_by_a_link_too(shared: Path, name: str, mode: int) -> None:
    (shared / "own").write_text(SETTINGS[name])
    (shared / "own").chmod(mode)
    (shared / name).symlink_to("own")
    assert settings_of(shared) == "evil"


@pytest.mark.parametrize("name", SETTINGS)
def test_a_fifo_of_settings_is_not_waited_for(shared: Path, name: str) -> None:
    os.mkfifo(shared / name)
    with pytest.raises(SettingsError):
        settings_of(shared)


async def use_queue(file: Path) -> None:
    address = QueueAddress("events", "local", f"{file}")
    with trio.fail_after(5):
        async with local.open_sink(address) as sink:
            await sink.send(b"event")


QUEUES: dict[str, Attack] = {
    "a file": lambda shared: (shared / "queue").touch(),
    "a link": lambda shared: (shared / "queue").symlink_to(shared / "victim"),
    "a link to nothing": lambda shared: (shared / "queue").symlink_to(shared / "made"),
    "a FIFO": lambda shared: os.mkfifo(shared / "queue"),
    "a bell": lambda shared: (shared / "queue-bell").touch(0o666),
    "a link as a bell": lambda shared: (shared / "queue-bell").symlink_to(shared / "victim"),
    "a FIFO as a bell": lambda shared: os.mkfifo(shared / "queue-bell"),
    "a link to nothing as a bell": lambda shared: (shared / "queue-bell").symlink_to(shared / "made"),
}


@pytest.mark.parametrize("attack", QUEUES.values(), ids=QUEUES)
async def test_the_file_of_a_neighbour_is_no_queue(shared: Path, neighbour: int, attack: Attack) -> None:
    attacked(shared, neighbour, attack)
    with pytest.raises(BrokerError, match="cannot open the queue file"):
        await use_queue(shared / "queue")
    assert not (shared / "made").exists()


def modes_of_queue(shared: Path) -> set[int]:
    return {stat.S_IMODE(path.stat().st_mode) for path in shared.glob("queue*")}


def set_modes_of_queue(shared: Path, mode: int) -> None:
    for path in shared.glob("queue*"):
        path.chmod(mode)


async def test_queue_files_are_closed_to_neighbours(shared: Path) -> None:
    umask = os.umask(0)
    try:
        async with local.open_source(QueueAddress("events", "local", f"{shared / 'queue'}")):
            assert modes_of_queue(shared) == {0o600}
    finally:
        os.umask(umask)


async def test_queue_files_of_older_versions_are_closed(shared: Path) -> None:
    await use_queue(shared / "queue")
    set_modes_of_queue(shared, 0o644)
    await use_queue(shared / "queue")
    assert modes_of_queue(shared) == {0o600}


async def test_a_shared_queue_file_keeps_its_mode(shared: Path) -> None:
    await use_queue(shared / "queue")
    set_modes_of_queue(shared, 0o660)
    await use_queue(shared / "queue")
    assert modes_of_queue(shared) == {0o660}


async def test_a_locked_bell_ends_in_one_line(shared: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(local, "BUSY_TIMEOUT", 0.1)
    await use_queue(shared / "queue")
    with (shared / "queue-bell").open() as other:
        fcntl.flock(other, fcntl.LOCK_EX)
        with pytest.raises(BrokerError, match="was locked by another process"):
            await use_queue(shared / "queue")


async def test_a_reader_that_locks_bytes_neither_claims_nor_crashes(shared: Path) -> None:
    await use_queue(shared / "queue")
    with (shared / "queue-bell").open() as other:
        lock = struct.pack("hhqqixxxx", fcntl.F_RDLCK, os.SEEK_SET, 0, 0, 0)  # all bytes
        fcntl.fcntl(other, fcntl.F_OFD_SETLK, lock)
        with pytest.raises(BrokerError, match="cannot lock"):
            async with local.open_source(QueueAddress("events", "local", f"{shared / 'queue'}")):
                pass


async def dead_letter(directory: Path) -> Path:
    delivery = Delivery(None, "events", b"body", "id", 1, 1)  # type: ignore[arg-type]
    return await dead_letters.write(directory, delivery, dead_letters.facts(delivery, "reason", "error"))


LETTERS: dict[str, Attack] = {
    "a directory": lambda shared: (shared / "letters").mkdir(mode=0o777),
    "a link": lambda shared: (shared / "letters").symlink_to(shared),
    "a file": lambda shared: (shared / "letters").touch(),
}


@pytest.mark.parametrize("attack", LETTERS.values(), ids=LETTERS)
async def test_no_dead_letter_is_written_for_a_neighbour(shared: Path, neighbour: int, attack: Attack) -> None:
    attacked(shared, neighbour, attack)
    with pytest.raises((NodeError, NotSetAsideError)):
        await dead_letter(shared / "letters")


async def test_a_queue_of_dead_letters_is_not_a_neighbours(shared: Path, neighbour: int) -> None:
    attacked(shared, neighbour, lambda shared: (shared / "events").mkdir())
    with pytest.raises(PilotError, match=f"belongs to user {neighbour}"):
        await dead_letter(shared)


async def test_dead_letters_are_for_this_user_only(shared: Path) -> None:
    path = await dead_letter(shared / "letters")
    assert {stat.S_IMODE(file.stat().st_mode) for file in path.parent.iterdir()} == {0o600}
    assert stat.S_IMODE(path.parent.stat().st_mode) == 0o700


@pytest.mark.parametrize("what", ["link", "part"])
def test_a_durable_file_is_not_written_through_a_link(shared: Path, neighbour: int, what: str) -> None:
    name = "file" if what == "link" else ".file.part"
    shared.chmod(0o777)
    attacked(shared, neighbour, lambda shared: (shared / name).symlink_to(shared / "victim"))
    filesystem.write_durably(shared / "file", b"content")
    assert (shared / "file").read_text() == "content"
    assert not (shared / "file").is_symlink()


def test_removing_a_tree_changes_nothing_behind_a_link(shared: Path, neighbour: int) -> None:
    (shared / "tree").mkdir(mode=0o777)
    (shared / "tree").chmod(0o777)
    (shared / "other").mkdir(mode=0o500)
    attacked(shared, neighbour, lambda shared: (shared / "tree/link").symlink_to(shared / "other"))
    filesystem._unlock(shared / "tree")
    assert filesystem.try_to_remove(shared / "tree")
    assert stat.S_IMODE((shared / "other").stat().st_mode) == 0o500


def test_a_link_is_not_unlocked_in_place_of_a_directory(shared: Path, neighbour: int) -> None:
    (shared / "other").mkdir(mode=0o500)
    attacked(shared, neighbour, lambda shared: (shared / "tree").symlink_to(shared / "other"))
    filesystem._unlock(shared / "tree")
    assert stat.S_IMODE((shared / "other").stat().st_mode) == 0o500


@pytest.mark.parametrize("name", ["*", "[a-z]", "\udcff", "\n", "x" * 240])
def test_names_of_images_are_no_patterns(shared: Path, name: str) -> None:
    images = shared / "images"
    images.mkdir(mode=0o700)
    (images / f"{name}.building-"[:255]).mkdir()
    (images / "image").mkdir()
    image_builds.remove_unfinished(images)
    assert (images / "image").is_dir()
