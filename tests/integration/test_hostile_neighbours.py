# What two other users of the machine leave where a pilot works: it hurts nothing of the pilot's user, and hangs nothing.
# Each try is met by all that a pilot does with files; a few run the installed command.

import fcntl
import os
import socket
import stat
import struct
import subprocess
import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack, suppress
from dataclasses import dataclass, replace
from pathlib import Path

import pytest
import trio

from tests.support.pilot_process import COMMAND
from tests.support.users import UNPRIVILEGED, as_user, needs_root
from trio_pilot.brokers import Delivery, QueueAddress, Settlement, dead_letters, local
from trio_pilot.cleanup import image_builds
from trio_pilot.errors import PilotError
from trio_pilot.files import data_directory as data_module
from trio_pilot.files.data_directory import open_data_directory
from trio_pilot.processes.identity import own

pytestmark = [needs_root, pytest.mark.filterwarnings("ignore::ResourceWarning")]

PLAIN, NEIGHBOURS = 30001, (30002, 30003)
SECRET = b"a file of the pilot's user"
DATA, QUEUE, LETTERS, IMAGES = "ewms-pilot-data", "queues.sqlite", "letters", "trio-pilot-images"
DEAD = replace(own(), started=own().started - 1)
AT_NODE = f"{DEAD}@{os.uname().nodename}"


@dataclass
class Place:
    """A directory that all users may write, and one that only the pilot's user may."""

    shared: Path
    home: Path
    stack: ExitStack  # what it holds is closed at the end: locks, above all

    @property
    def secret(self) -> Path:
        return self.home / "secret"


Try = Callable[[Place], object]
TRIES: dict[str, Try] = {}


def link(name: str, target: str) -> Try:
    return lambda place: (place.shared / name).symlink_to(target.replace("HOME", str(place.home)))


def directory(name: str, mode: int) -> Try:
    def leave(place: Place) -> None:
        (place.shared / name).mkdir()
        (place.shared / name).chmod(mode)
        (place.shared / name / "link").symlink_to(place.home)

    return leave


def file(name: str, content: bytes = b"", mode: int = 0o666) -> Try:
    def leave(place: Place) -> None:
        (place.shared / name).write_bytes(content)
        (place.shared / name).chmod(mode)

    return leave


def fifo(name: str) -> Try:
    return lambda place: os.mkfifo(place.shared / name, 0o666)


def listening(name: str) -> Try:
    return lambda place: place.stack.enter_context(socket.socket(socket.AF_UNIX)).bind(str(place.shared / name))


for name in (DATA, QUEUE, f"{QUEUE}-bell", f"{QUEUE}-wal", f"{QUEUE}-shm", f"{QUEUE}-journal", LETTERS):
    TRIES |= {
        f"{name} is a link to a secret": link(name, "HOME/secret"),
        f"{name} is a link to a directory": link(name, "HOME"),
        f"{name} is a link to nothing": link(name, "HOME/new"),
        f"{name} is a file": file(name),
        f"{name} is a FIFO": fifo(name),
        f"{name} is a socket": listening(name),
        f"{name} is a directory": directory(name, 0o755),
        f"{name} is a directory for all": directory(name, 0o1777),
    }
UNFINISHED = f".{DATA}-{AT_NODE}-0123"
TRIES |= {
    "a link like a directory of a dead pilot": link(UNFINISHED, "HOME"),
    "a directory like one of a dead pilot": directory(UNFINISHED, 0o777),
    "a FIFO like a directory of a dead pilot": fifo(UNFINISHED),
    "a pattern as a name": directory(f".{DATA}-*[!a]?", 0o777),
    "a name with lines": directory(f".{DATA}-a\n\x1b[2J", 0o777),
    "a name that is no text": directory(os.fsdecode(b".%s-\xff\xfe" % DATA.encode()), 0o777),
    "a long name": directory(f".{DATA}-".ljust(255, "*"), 0o777),
    "a number that no process has": directory(f".{DATA}-{DEAD.boot}.{DEAD.namespace}.{'9' * 30}.1@x-1", 0o777),
    "a number that is none": directory(f".{DATA}-{DEAD.boot}.\N{SUPERSCRIPT TWO}.1.1@x-1", 0o777),
    "images are a link": link(IMAGES, "HOME"),
    "images are a directory": directory(IMAGES, 0o777),
    "images are a FIFO": fifo(IMAGES),
}
assert len(TRIES) >= 50


@pytest.fixture(params=[PLAIN, 0], ids=["plain", "root"])
def user(request: pytest.FixtureRequest) -> int:
    return int(request.param)


@pytest.fixture(params=[pytest.param(0o1777, id="sticky", marks=pytest.mark.soak), pytest.param(0o777, id="open")])
def shared_mode(request: pytest.FixtureRequest) -> int:
    return int(request.param)  # with the sticky bit, the kernel keeps some of the rules by itself


@pytest.fixture
def place(user: int, open_place: Path, shared_mode: int) -> Iterator[Place]:
    (open_place / "shared").mkdir()
    (open_place / "shared").chmod(shared_mode)
    (open_place / "home").mkdir(0o700)
    (open_place / "home/secret").write_bytes(SECRET)
    for path in (open_place / "home", open_place / "home/secret"):
        path.chmod(0o700 if path.is_dir() else 0o600)
        os.chown(path, user, user)
    with ExitStack() as stack:
        yield Place(open_place / "shared", open_place / "home", stack)


@pytest.fixture
def open_place() -> Iterator[Path]:
    # pytest's own directories are closed to others.
    where = Path("/tmp") / f"trio-pilot-neighbours-{os.getpid()}-{time.monotonic_ns()}"
    where.mkdir()
    where.chmod(0o755)
    yield where
    subprocess.run(["rm", "-rf", where], check=True)


@pytest.fixture(autouse=True)
def short_waits(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(data_module, "LOCK_TIMEOUT", 0.2)
    monkeypatch.setattr(local, "BUSY_TIMEOUT", 0.2)


def run_tasks(place: Place) -> None:
    data_module.sweep(place.shared / DATA)
    with open_data_directory(place.shared, []) as data:
        (task := data.root / data.new_name()).mkdir()
        assert data_module.sweep(data.root) == 0
        assert task.is_dir()
        assert not data.root.stat().st_mode & 0o066  # an engine may have to pass it
        task.rmdir()


def use_queue(place: Place) -> None:
    address = QueueAddress("local", "events", str(place.shared / QUEUE))

    async def send_and_take() -> None:
        with trio.fail_after(10):
            async with local.open_sink(address) as sink:
                await sink.send(b"event", "1")
            async with local.open_source(address) as source, source.consume(1) as consumer:
                delivery = await consumer.take()
                assert delivery
                assert delivery.body == b"event"
                await source.settle(delivery, Settlement.ACK)
                files = [place.shared / f"{QUEUE}{ending}" for ending in ("", "-bell", "-wal", "-shm")]
                assert not any(others_reach(path) for path in files)

    trio.run(send_and_take)


def set_aside(place: Place) -> None:
    delivery = Delivery(None, "events", b"event", "1", 1, None)  # type: ignore[arg-type]
    facts = dead_letters.facts(delivery, "reason", "Error")
    path = trio.run(dead_letters.write, place.shared / LETTERS, delivery, facts)
    assert {letter.body for letter in dead_letters.read(place.shared / LETTERS, "events")} == {b"event"}
    assert not others_reach(path)
    assert not others_reach(path.parent)


def sweep_images(place: Place) -> None:
    image_builds.remove_unfinished(place.shared / IMAGES)


USES = run_tasks, use_queue, set_aside, sweep_images


def others_reach(path: Path) -> bool:
    facts = path.lstat()
    return bool(facts.st_mode & 0o077) or facts.st_uid != os.geteuid() or not stat.S_IFMT(facts.st_mode)


def use_all(place: Place) -> list[str]:
    """Do all that a pilot does, and return what it refused, a line each."""
    refused = []
    for use in USES:
        begun = time.monotonic()
        try:
            use(place)
        except PilotError as error:
            refused.append(str(error))
        assert time.monotonic() - begun < 8
    return refused


def everything(place: Place) -> dict[str, tuple[int, int, int]]:
    """Describe what the pilot's user has in its home, and what a neighbour has left."""
    facts = {str(path): path.lstat() for path in [place.home, *place.home.rglob("*"), *place.shared.iterdir()]}
    return {path: (one.st_ino, one.st_mode, one.st_uid) for path, one in facts.items()}


@pytest.mark.parametrize("what", TRIES)
def test_what_a_neighbour_leaves_hurts_nothing(place: Place, user: int, what: str) -> None:
    with as_user(NEIGHBOURS[list(TRIES).index(what) % 2]):
        TRIES[what](place)
    before = everything(place)
    with as_user(user):
        refused = use_all(place)
    assert all("\n" not in line for line in refused), refused
    assert place.secret.read_bytes() == SECRET
    assert before.items() <= everything(place).items()
    assert not (place.home / "new").exists()
    assert len(refused) <= 1, refused  # what has other names is not concerned
    if what.startswith((DATA, QUEUE, LETTERS)) and "-journal" not in what:
        assert refused


# Locks, of those that can read what an earlier version made.


def opened_to_read(place: Place, path: Path) -> int:
    descriptor = os.open(path, os.O_RDONLY)
    place.stack.callback(os.close, descriptor)
    return descriptor


def hold_alone(place: Place, path: Path) -> None:
    fcntl.flock(opened_to_read(place, path), fcntl.LOCK_EX)


def share(place: Place, path: Path) -> None:
    fcntl.flock(opened_to_read(place, path), fcntl.LOCK_SH)


def lock_all_bytes(place: Place, path: Path) -> None:
    lock = struct.pack("hhqqixxxx", fcntl.F_RDLCK, os.SEEK_SET, 0, 0, 0)
    fcntl.fcntl(opened_to_read(place, path), fcntl.F_OFD_SETLK, lock)


LOCKS = [
    (name, how)
    for name in (f"{DATA}/.lock", DATA, f"{QUEUE}-bell", QUEUE)
    for how in (hold_alone, share, lock_all_bytes)
    if not (name == DATA and how is lock_all_bytes)
]


@pytest.mark.parametrize(("name", "how"), LOCKS, ids=lambda value: getattr(value, "__name__", value))
def test_a_neighbours_lock_holds_no_pilot_for_long(
    place: Place, user: int, name: str, how: Callable[[Place, Path], None]
) -> None:
    with as_user(user):
        (place.shared / DATA).mkdir(0o755)
        for one in (f"{DATA}/.lock", QUEUE, f"{QUEUE}-bell"):
            (place.shared / one).touch(0o644)
            (place.shared / one).chmod(0o644)
    with as_user(NEIGHBOURS[0]):
        how(place, place.shared / name)
    with as_user(user):
        refused = use_all(place)
    assert len(refused) <= 1
    assert all("\n" not in line for line in refused)
    place.stack.close()
    with as_user(user):
        assert use_all(place) == []
    for path in place.shared.iterdir():
        if path.name.startswith(QUEUE):
            assert stat.S_IMODE(path.stat().st_mode) == 0o600, path
        with as_user(NEIGHBOURS[1]), suppress(PermissionError), path.open("rb"):
            raise AssertionError(f"{path} can be read by others")


def test_a_claim_of_a_dead_consumer_is_not_kept_by_a_lock_of_a_reader(place: Place) -> None:
    address = QueueAddress("local", "events", str(place.shared / QUEUE))

    async def claim_and_claim_again() -> None:
        async with local.open_sink(address) as sink:
            await sink.send(b"event", "1")
        async with local.open_source(address) as source, source.consume(1) as consumer:
            assert await consumer.take()
        with (place.shared / f"{QUEUE}-bell").open("rb") as reader, trio.fail_after(5):
            async with local.open_source(address) as source, source.consume(1) as consumer:
                below = struct.pack("hhqqixxxx", fcntl.F_RDLCK, os.SEEK_SET, 0, source.number, 0)
                above = struct.pack("hhqqixxxx", fcntl.F_RDLCK, os.SEEK_SET, source.number + 1, 0, 0)
                for lock in (below, above):
                    fcntl.fcntl(reader, fcntl.F_OFD_SETLK, lock)
                assert await consumer.take()

    trio.run(claim_and_claim_again)


# Names in a data directory that was made by hand, where a task of the same user can write.


def link_to_fifo(root: Path) -> None:
    os.mkfifo(root / "fifo")
    (root / f".pilot-01234567-{AT_NODE}").symlink_to("fifo")


DECEITS: dict[str, Callable[[Path], object]] = {
    "a pattern as the prefix": lambda root: (root / f".pilot-????????-{AT_NODE}").touch(),
    "a star as the prefix": lambda root: (root / f".pilot-*-{AT_NODE}").touch(),
    "two stars as the prefix": lambda root: (root / f".pilot-**-{AT_NODE}").touch(),
    "no prefix": lambda root: (root / f".pilot--{AT_NODE}").touch(),
    "a set as the prefix": lambda root: (root / f".pilot-[0-9a-f][-{AT_NODE}").touch(),
    "a FIFO as an owner file": lambda root: os.mkfifo(root / f".pilot-01234567-{AT_NODE}"),
    "a link as an owner file": lambda root: (root / f".pilot-01234567-{AT_NODE}").symlink_to(root / "kept"),
    "a link to a FIFO": link_to_fifo,
    "a directory as an owner file": lambda root: (root / f".pilot-01234567-{AT_NODE}").mkdir(),
    "a FIFO as the lock": lambda root: os.mkfifo(root / ".lock"),
    "a link as the lock": lambda root: (root / ".lock").symlink_to("kept"),
    "no text": lambda root: (root / os.fsdecode(b".pilot-\xff\xfe\n")).touch(),
    "a long name": lambda root: (root / ".pilot-".ljust(255, "[")).touch(),
}


@pytest.mark.parametrize("what", DECEITS)
def test_a_name_in_the_data_directory_removes_nothing_and_hangs_nothing(place: Place, user: int, what: str) -> None:
    root = place.shared / DATA
    with as_user(user):
        root.mkdir(0o755)
        tasks = [root / "kept", root / "01234567-0000-4000-8000-000000000000"]
        for task in tasks:
            task.mkdir()
        DECEITS[what](root)
        begun = time.monotonic()
        assert data_module.sweep(root) == 0
        data_module.owner_files_of_dead(root)
        assert not data_module.has_orphaned(root, DEAD)
        with suppress(PilotError), open_data_directory(place.shared, []):
            assert data_module.sweep(root) == 0
        assert time.monotonic() - begun < 5
    assert all(task.is_dir() for task in tasks)


# The installed command.


def as_plain(umask: int, *arguments: str) -> list[str]:
    user = [f"--reuid={PLAIN}" if one.startswith("--reuid") else one for one in UNPRIVILEGED]
    return [*user, "sh", "-c", f'umask {umask:03o}; exec "$@"', "sh", COMMAND, *arguments]


def command(place: Place, *arguments: str, given: str = "", umask: int = 0) -> "subprocess.CompletedProcess[str]":
    env = {"PATH": os.environ["PATH"], "EWMS_PILOT_BROKER": str(place.home / QUEUE), "HOME": str(place.home)}
    settings = {"QUEUE_INCOMING": "in", "QUEUE_OUTGOING": "out", "RUNTIME": "process", "TIMEOUT_QUEUE_INCOMING": "0.3"}
    env |= {f"EWMS_PILOT_{name}": value for name, value in settings.items()}
    env["EWMS_PILOT_TASK_ARGS"] = (
        "sh -c 'touch new; find .. ../../data-hub -printf \"%m %p\\n\"; cat {{INFILE}} > {{OUTFILE}}'"
    )
    env |= {"EWMS_PILOT_DUMP_TASK_OUTPUT": "true", "EWMS_PILOT_KEEP_ALL_TASK_FILES": "true"}
    argv = as_plain(umask, *arguments)
    return subprocess.run(
        argv, cwd=place.shared, env=env, input=given, capture_output=True, text=True, check=False, timeout=120
    )


@pytest.mark.parametrize("user", [PLAIN], ids=["plain"], indirect=True)
def test_all_that_a_pilot_makes_is_its_users_alone_whatever_the_umask(place: Place) -> None:
    assert command(place, "send", "in", given='"event"\n').returncode == 0
    done = command(place)
    assert done.returncode == 0, done.stderr
    made = [path for path in [*place.home.rglob("*"), *place.shared.rglob("*")] if path != place.secret]
    assert {QUEUE, f"{QUEUE}-bell", DATA, "data-hub", "stdoutfile"} < {path.name for path in made}
    of_tasks = [path for path in made if path.name.startswith("outfile")]
    assert [stat.S_IMODE(path.stat().st_mode) for path in of_tasks] == [0o666]  # as the user wants it
    open_to_others = [path for path in made if path.lstat().st_mode & 0o077 and path not in of_tasks]
    assert open_to_others == []


@pytest.mark.parametrize("user", [PLAIN], ids=["plain"], indirect=True)
def test_a_data_directory_of_a_neighbour_is_one_line(place: Place) -> None:
    with as_user(NEIGHBOURS[0]):
        directory(DATA, 0o777)(place)
    done = command(place)
    assert done.returncode == 2
    assert f"{place.shared / DATA} belongs to user {NEIGHBOURS[0]}: remove it, or name another place" in done.stderr
    assert "Traceback" not in done.stderr
