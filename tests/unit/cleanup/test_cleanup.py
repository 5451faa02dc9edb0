import errno
import fcntl
import json
import os
import signal
import subprocess
import threading
import time
import uuid
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field, replace
from http.server import BaseHTTPRequestHandler
from pathlib import Path
from socketserver import UnixStreamServer
from typing import IO, Any

import pytest

from tests.support.waiting import until_sync
from trio_pilot.cleanup import engine_containers, guardian
from trio_pilot.cleanup.engine_containers import DATA_LABEL, LABEL, remove_containers
from trio_pilot.cleanup.image_builds import remove_unfinished
from trio_pilot.cleanup.sweep import sweep
from trio_pilot.files import data_directory
from trio_pilot.files.data_directory import open_data_directory
from trio_pilot.files.filesystem import opened, remove_tree
from trio_pilot.processes import cgroups, identity, orphans
from trio_pilot.processes.identity import Identity, own
from trio_pilot.processes.orphans import MARKER, end_processes
from trio_pilot.runtimes import Options, bubblewrap

NOBODY = replace(own(), started=own().started - 1)  # dead for sure
NODE = os.uname().nodename
BEFORE = replace(own(), boot="before")
ELSEWHERE = replace(own(), namespace=1)


def is_dead(pilot: Identity) -> bool:
    return pilot.is_dead


# Processes.


@contextmanager
def start(pilot: object, script: str) -> Iterator["subprocess.Popen[bytes]"]:
    env = {**os.environ, MARKER: f"{pilot}/{uuid.uuid4()}"}
    with subprocess.Popen(["sh", "-c", f"{script}; :"], env=env, start_new_session=True) as process:
        below = Path(f"/proc/{process.pid}/task/{process.pid}/children")
        try:
            until_sync(lambda: len(below.read_text().split()) == script.count("sleep"))
            yield process
        finally:
            with suppress(ProcessLookupError):
                os.killpg(process.pid, signal.SIGKILL)


async def test_the_processes_by_which_bubblewrap_is_tried_are_known_too(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    bwrap, said = tmp_path / "bwrap", tmp_path / "environment"
    bwrap.write_text(f"#!/bin/sh\nenv > {said}\n")
    bwrap.chmod(0o755)
    monkeypatch.setenv("PATH", str(tmp_path), prepend=os.pathsep)
    assert await bubblewrap.fault(Options()) is None
    assert f"{MARKER}={own()}/" in said.read_text()


@pytest.mark.alone  # any pilot that starts sweeps after the dead
def test_the_processes_of_a_dead_pilot_are_ended_and_those_of_a_living_one_are_not() -> None:
    with start(own(), "sleep 1000") as living, start("nonsense", "sleep 1000") as foreign:
        with start(NOBODY, "env -i setsid sleep 1000 & sleep 1000") as dead:
            assert end_processes(is_dead) >= 2
            dead.wait(5)
        assert living.poll() is foreign.poll() is None
        assert end_processes(is_dead) == 0
        assert end_processes(lambda pilot: pilot == own()) == 2
        living.wait(5)


# Task directories.


def leave(parent: Path, name: str, said: str) -> Path:
    """Be a pilot that dies: leave a task directory, and word of whose it is."""
    root = parent / "ewms-pilot-data"
    directory = root / f"{name}-0000-4000-8000-000000000000"
    for path in (root / "data-hub", directory / "task-io", root / f"init-{name}0000"):
        path.mkdir(parents=True, exist_ok=True)
    (root / ".lock").touch()
    (directory / "task-io" / "infile").touch()
    (root / f".pilot-{name}-{said}").touch()
    return directory


@pytest.mark.parametrize(
    "said",
    [f"{NOBODY}@here", f"{NOBODY}@{NODE}", f"{NOBODY}@a-node", f"{BEFORE}@{NODE}"],
    ids=["of this boot", "of this machine", "of a name with a dash", "of this machine before it was started anew"],
)
def test_the_directories_of_a_dead_pilot_are_removed(tmp_path: Path, said: str) -> None:
    directory = leave(tmp_path, "01234567", said)
    with open_data_directory(tmp_path, []) as mine:
        (mine.root / mine.new_name()).mkdir()
        assert data_directory.sweep(mine.root) == 2
        assert not directory.exists()
        assert len(list(mine.root.glob(f"{mine.prefix}-*"))) == 1
        assert data_directory.sweep(mine.root) == 0


@pytest.mark.parametrize(
    "said",
    [f"{BEFORE}@another-machine", f"{own()}@{NODE}", "", "nonsense", "a@b"],
    ids=["of another machine", "of one that lives", "of nobody", "nonsense", "of neither"],
)
def test_directories_of_which_it_is_not_sure_are_left_alone(tmp_path: Path, said: str) -> None:
    directory = leave(tmp_path, "01234567", said)
    with open_data_directory(tmp_path, []) as mine:
        assert data_directory.sweep(mine.root) == 0
    assert (directory / "task-io" / "infile").exists()


def test_the_directories_of_a_living_pilot_are_left_alone(tmp_path: Path) -> None:
    with open_data_directory(tmp_path, []) as other, open_data_directory(tmp_path, []) as mine:
        assert other.prefix != mine.prefix
        (other.root / other.new_name()).mkdir()
        assert data_directory.sweep(mine.root) == 0
        assert len(list(other.root.glob(f"{other.prefix}-*"))) == 1


def test_the_last_that_is_swept_takes_the_data_directory_with_it(tmp_path: Path) -> None:
    leave(tmp_path, "01234567", f"{NOBODY}@here")
    assert data_directory.sweep(tmp_path / "ewms-pilot-data") == 2
    assert list(tmp_path.iterdir()) == []


def leave_beside(parent: Path, said: str) -> Path:
    """Be a pilot that dies making, or removing, its data directory."""
    directory = parent / f".ewms-pilot-data-{said}-{uuid.uuid4().hex}"
    (directory / "data-hub").mkdir(parents=True)
    return directory


@pytest.mark.parametrize(
    "said",
    [f"{NOBODY}", f"{NOBODY}@a-node", f"{BEFORE}@{NODE}", f"{ELSEWHERE}@{NODE}"],
    ids=["of this boot", "of a name with a dash", "of this machine before it was started anew", "of another PID namespace"],
)
def test_a_data_directory_that_somebody_died_making_is_removed(tmp_path: Path, said: str) -> None:
    directory = leave_beside(tmp_path, said)
    with opened(directory, os.O_DIRECTORY) as held:
        fcntl.flock(held, fcntl.LOCK_EX)
        data_directory.sweep(tmp_path / "ewms-pilot-data")
        assert directory.exists()
    assert data_directory.sweep(tmp_path / "ewms-pilot-data") == 0
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize(
    "said",
    [f"{own()}@{NODE}", f"{BEFORE}@another-machine", f"@{NODE}", "nonsense", ""],
    ids=["of one that lives", "of another machine", "of nobody here", "nonsense", "of nobody"],
)
def test_a_data_directory_that_somebody_may_be_making_is_left_alone(tmp_path: Path, said: str) -> None:
    directory = leave_beside(tmp_path, said)
    assert data_directory.sweep(tmp_path / "ewms-pilot-data") == 0
    assert list(tmp_path.iterdir()) == [directory]


def test_a_directory_that_is_used_for_a_moment_is_left_alone_by_pilots_that_cannot_see_whose_it_is(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(identity, "own", lambda: ELSEWHERE)
    with data_directory.open_temporary(tmp_path) as directory:
        monkeypatch.undo()
        data_directory.sweep(tmp_path / "ewms-pilot-data")
        assert list(tmp_path.iterdir()) == [directory]
    assert list(tmp_path.iterdir()) == []


def test_what_a_pilot_starts_does_not_hold_a_directory_that_this_uses_for_a_moment(tmp_path: Path) -> None:
    with data_directory.open_temporary(tmp_path) as directory:
        listed = subprocess.run(["ls", "-l", "/proc/self/fd"], close_fds=False, capture_output=True, text=True, check=True)
        assert directory.name not in listed.stdout


@pytest.mark.parametrize("maker", [ELSEWHERE, own()], ids=["which removes it", "which looks at it"])
def test_a_pilot_leaves_its_word_again_when_a_sweep_was_quicker_to_lock_it(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, maker: Identity
) -> None:
    lock = fcntl.flock

    def be_late(file: IO[Any], how: int) -> None:
        if how == fcntl.LOCK_EX:
            monkeypatch.undo()
            data_directory.sweep(tmp_path / "ewms-pilot-data")
        lock(file, how)

    monkeypatch.setattr(identity, "own", lambda: maker)
    monkeypatch.setattr(fcntl, "flock", be_late)
    with open_data_directory(tmp_path, []) as mine:
        (word,) = mine.root.glob(f".pilot-{mine.prefix}-*")
        data_directory.sweep(mine.root)
        assert word.exists()
    assert list(tmp_path.iterdir()) == []


def test_a_data_directory_that_is_being_removed_is_left_to_who_does_that(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
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


@pytest.mark.parametrize("maker", [ELSEWHERE, own()], ids=["which removes it", "which looks at it"])
def test_a_directory_is_made_again_when_a_sweep_was_quicker_to_lock_it(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, maker: Identity
) -> None:
    lock = fcntl.flock

    def be_late(directory: int, how: int) -> None:
        monkeypatch.undo()
        if maker == own():
            (made,) = tmp_path.iterdir()
            with opened(made, os.O_DIRECTORY) as sweeping:
                lock(sweeping, fcntl.LOCK_EX)
                return lock(directory, how)
        data_directory.sweep(tmp_path / "ewms-pilot-data")
        return lock(directory, how)

    monkeypatch.setattr(identity, "own", lambda: maker)
    monkeypatch.setattr(fcntl, "flock", be_late)
    with data_directory.open_temporary(tmp_path) as directory:
        assert list(tmp_path.iterdir()) == [directory]
    assert list(tmp_path.iterdir()) == []


# Half-unpacked images.


def half_unpacked(images: Path, key: str) -> Path:
    """Be a pilot that dies while it unpacks an image."""
    images.mkdir(mode=0o700, exist_ok=True)
    half = images / f"{key}.building-{uuid.uuid4().hex}"
    (half / "root/usr").mkdir(parents=True)
    (images / f"{key}.lock").touch()
    return half


def test_a_half_unpacked_image_is_removed_unless_somebody_has_its_lock(tmp_path: Path) -> None:
    dead, living, whole = half_unpacked(tmp_path, "dead"), half_unpacked(tmp_path, "living"), tmp_path / "dead"
    whole.mkdir()
    with (tmp_path / "living.lock").open("r+b") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        assert remove_unfinished(tmp_path) == 1
        assert (dead.exists(), living.exists(), whole.exists()) == (False, True, True)
    assert remove_unfinished(tmp_path) == 1
    assert not living.exists()


def test_a_directory_of_images_that_is_not_there_has_no_half_in_it(tmp_path: Path) -> None:
    assert remove_unfinished(tmp_path / "none") == 0
    assert list(tmp_path.iterdir()) == []


def test_nothing_is_removed_from_a_directory_that_others_may_have_put_images_into(tmp_path: Path) -> None:
    half = half_unpacked(tmp_path / "images", "key")
    link = tmp_path / "link"
    link.symlink_to("images")
    assert remove_unfinished(link) == 0
    half.parent.chmod(0o777)
    assert remove_unfinished(half.parent) == 0
    assert half.exists()


# Containers.


@dataclass
class Engine:
    """As much of an engine as the sweep asks for."""

    socket: Path
    containers: dict[str, dict[str, Any]] = field(default_factory=dict)
    trouble: tuple[int, bytes] | None = None  # what it answers instead of a list

    def add(self, pilot: object, data: object = None, **facts: Any) -> str:
        name = uuid.uuid4().hex
        labels = {LABEL: str(pilot), **({} if data is None else {DATA_LABEL: str(data)})}
        self.containers[name] = {"Id": name, "Labels": labels, "State": "running", "Created": 0, **facts}
        return name


@pytest.fixture
def engine(tmp_path: Path) -> Iterator[Engine]:
    engine = Engine(tmp_path / "engine.sock")

    class Handler(BaseHTTPRequestHandler):
        def do_GET(self) -> None:
            assert self.path.startswith("/containers/json?all=1&filters=%7B%22label%22%3A%20%5B%22trio-pilot.pilot%22%5D%7D")
            self.answer(*engine.trouble or (200, json.dumps(list(engine.containers.values())).encode()))

        def do_POST(self) -> None:
            name, _, what = self.path.removeprefix("/containers/").partition("/")
            assert what == "kill"
            self.answer(204 if engine.containers[name]["State"] == "running" else 409)

        def do_DELETE(self) -> None:
            name, _, options = self.path.removeprefix("/containers/").partition("?")
            assert options == "force=1&v=1"
            del engine.containers[name]
            self.answer(204)

        def answer(self, code: int, body: bytes = b"") -> None:
            self.send_response(code)
            self.send_header("Content-Length", str(len(body)))
            self.end_headers()
            self.wfile.write(body)

        def log_message(self, *_: object) -> None:
            """Keep quiet."""

        def address_string(self) -> str:
            return "us"

    with UnixStreamServer(str(engine.socket), Handler) as server:
        thread = threading.Thread(target=server.serve_forever, args=(0.01,))
        thread.start()
        yield engine
        server.shutdown()
        thread.join()


def test_the_containers_of_a_dead_pilot_are_removed_and_no_others(engine: Engine) -> None:
    dead, past = engine.add(NOBODY), engine.add(BEFORE, State="exited")
    others = {
        engine.add(own()),
        engine.add("nonsense"),
        engine.add(BEFORE, State="running"),
        engine.add(BEFORE, State="created", Created=int(time.time())),
        engine.add(replace(NOBODY, namespace=1)),
    }
    assert remove_containers(engine.socket, is_dead) == 2
    assert engine.containers.keys() == others
    assert not {dead, past} & others


@pytest.mark.parametrize("pilot", [ELSEWHERE, BEFORE], ids=["of another PID namespace", "of the time before a start anew"])
def test_a_container_is_removed_if_its_pilot_has_left_word_and_does_not_hold_it_any_more(
    engine: Engine, tmp_path: Path, pilot: Identity
) -> None:
    leave(tmp_path, "01234567", f"{pilot}@{NODE}")
    root = tmp_path / "ewms-pilot-data"
    engine.add(pilot, data=root)
    with (root / f".pilot-01234567-{pilot}@{NODE}").open() as word:
        fcntl.flock(word, fcntl.LOCK_EX)
        assert remove_containers(engine.socket, is_dead) == 0
    assert remove_containers(engine.socket, is_dead) == 1


def test_a_container_is_left_alone_if_its_pilot_has_left_no_word_that_can_be_seen_from_here(
    engine: Engine, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    leave(tmp_path, "01234567", f"{ELSEWHERE}@{NODE}")
    monkeypatch.chdir(tmp_path)
    for data in (None, "", ".", "ewms-pilot-data", tmp_path, tmp_path / "none", "/a\0b"):
        engine.add(ELSEWHERE, data=data)
    engine.add(replace(ELSEWHERE, pid=1), data=tmp_path / "ewms-pilot-data")
    assert remove_containers(engine.socket, is_dead) == 0


def test_a_container_is_left_alone_if_its_pilot_s_file_system_has_no_locks(
    engine: Engine, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def fail(*_: object) -> None:
        raise OSError(errno.ENOTSUP, os.strerror(errno.ENOTSUP))

    leave(tmp_path, "01234567", f"{ELSEWHERE}@{NODE}")
    engine.add(ELSEWHERE, data=tmp_path / "ewms-pilot-data")
    monkeypatch.setattr(fcntl, "flock", fail)
    assert remove_containers(engine.socket, is_dead) == 0


def sweep_as_a_pilot_that_starts(engine: Engine, root: Path) -> None:
    sweep([("data", root), ("engine", engine.socket)])


def guard_another(engine: Engine, root: Path) -> None:
    """Be the guardian of a pilot that has died."""
    guardian.clean_up(NOBODY, [engine.socket], [root])


@pytest.fixture
def _engines_alone(monkeypatch: pytest.MonkeyPatch) -> None:
    """Have no other test's processes swept, and no engine waited for."""
    monkeypatch.setattr(orphans, "end_processes", lambda _theirs: 0)
    monkeypatch.setattr(cgroups, "sweep", lambda _theirs: 0)
    monkeypatch.setattr(guardian, "CLEAN_TIMEOUTS", (1.0,))


@pytest.mark.usefixtures("_engines_alone")
@pytest.mark.parametrize("clean_up", [sweep_as_a_pilot_that_starts, guard_another])
def test_the_word_that_a_pilot_has_left_goes_with_the_last_of_its_containers(
    engine: Engine, tmp_path: Path, clean_up: Callable[[Engine, Path], None]
) -> None:
    directory = leave(tmp_path / "parent", "01234567", f"{ELSEWHERE}@{NODE}")
    engine.add(ELSEWHERE, data=directory.parent)
    engine.trouble = (500, b"stopping")
    clean_up(engine, directory.parent)
    assert engine.containers
    assert not directory.exists()
    engine.trouble = None
    clean_up(engine, directory.parent)
    assert not engine.containers
    assert list((tmp_path / "parent").iterdir()) == []


@pytest.mark.usefixtures("_engines_alone")
@pytest.mark.parametrize("clean_up", [sweep_as_a_pilot_that_starts, guard_another])
def test_the_word_of_a_pilot_that_dies_while_an_engine_is_swept_is_kept_for_the_next_sweep(
    engine: Engine, tmp_path: Path, clean_up: Callable[[Engine, Path], None], monkeypatch: pytest.MonkeyPatch
) -> None:
    def come_too_early(_engine: Path, _theirs: orphans.Theirs) -> int:
        held.close()
        return 0

    directory = leave(tmp_path, "01234567", f"{ELSEWHERE}@{NODE}")
    (word,) = directory.parent.glob(".pilot-*")
    monkeypatch.setattr(engine_containers, "remove_containers", come_too_early)
    with word.open() as held:
        fcntl.flock(held, fcntl.LOCK_EX)
        clean_up(engine, directory.parent)
    assert not directory.exists()
    assert word.exists()


@pytest.mark.usefixtures("_engines_alone")
def test_the_word_of_a_pilot_is_removed_by_its_guardian_though_a_thread_of_it_has_held_it_for_a_moment_more(
    engine: Engine, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def let_go(_theirs: orphans.Theirs) -> int:
        held.close()
        return 0

    directory = leave(tmp_path / "parent", "01234567", f"{NOBODY}@{NODE}")
    (word,) = directory.parent.glob(".pilot-*")
    with word.open() as held:
        fcntl.flock(held, fcntl.LOCK_EX)
        monkeypatch.setattr(cgroups, "sweep", let_go)
        guard_another(engine, directory.parent)
    assert list((tmp_path / "parent").iterdir()) == []


def test_many_may_ask_at_once_whether_a_pilot_is_dead_by_its_word(tmp_path: Path) -> None:
    leave(tmp_path, "01234567", f"{ELSEWHERE}@{NODE}")
    root = tmp_path / "ewms-pilot-data"
    (word,) = root.glob(".pilot-*")
    with word.open() as asking:
        fcntl.flock(asking, fcntl.LOCK_SH)
        assert data_directory.owner_files_of_dead(root) == {word}
        assert data_directory.has_orphaned(root, ELSEWHERE)


@pytest.mark.parametrize(
    "trouble",
    [
        (500, b'{"message": "stopping"}'),
        (500, b"stopping"),
        (200, b"no JSON"),
        *((200, body) for body in (b"null", b"1", b"[null]", b"[{}]", b'[{"Id": "an-id", "Labels": ["label"]}]')),
    ],
)
def test_an_engine_in_trouble_is_an_error_and_its_containers_are_looked_for_again(
    engine: Engine, tmp_path: Path, trouble: tuple[int, bytes]
) -> None:
    engine.add(NOBODY)
    engine.trouble = trouble
    with pytest.raises(OSError, match=str(engine.socket)):
        remove_containers(engine.socket, is_dead)
    recovering = threading.Timer(0.1, setattr, [engine, "trouble", None])
    recovering.start()
    guardian.clean_up(NOBODY, [engine.socket], [tmp_path])
    recovering.join()
    assert not engine.containers


def test_what_cannot_be_looked_for_keeps_nothing_else_from_being_removed(
    engine: Engine, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def fail(_theirs: object) -> int:
        raise ValueError("not as expected")

    monkeypatch.setattr(cgroups, "sweep", fail)
    monkeypatch.setattr(guardian, "CLEAN_TIMEOUTS", (0.1, 0.2))
    engine.add(NOBODY)
    directory = leave(tmp_path, "01234567", f"{NOBODY}@{NODE}")
    guardian.clean_up(NOBODY, [engine.socket], [tmp_path / "ewms-pilot-data"])
    assert not engine.containers
    assert not directory.exists()


def test_directories_do_not_wait_for_an_engine_that_is_away(
    engine: Engine, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(guardian, "CLEAN_TIMEOUTS", (0.1, 60))
    engine.add(NOBODY)
    engine.trouble = (500, b"stopping")
    directory = leave(tmp_path, "01234567", f"{NOBODY}@{NODE}")
    cleaning = threading.Thread(target=guardian.clean_up, args=(NOBODY, [engine.socket], [tmp_path / "ewms-pilot-data"]))
    cleaning.start()
    until_sync(lambda: not directory.exists())
    engine.trouble = None
    cleaning.join()
    assert not engine.containers


def test_an_engine_that_is_not_there_is_an_error(tmp_path: Path) -> None:
    with pytest.raises(OSError, match="No such file"):
        remove_containers(tmp_path / "none", is_dead)
