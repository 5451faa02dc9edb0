"""The embedded broker: durable queues in one SQLite file, for any number of processes on one machine.

- A message is a row. A consumer claims it by writing its own number into the row; to settle is to delete the row or to clear
  the claim. A consumer holds a lock on the byte of its number in the bell file: the kernel drops the lock when the process
  dies, however it dies, and the next consumer that looks releases the claims of the dead one.
- Nothing polls: a process that makes a message available writes to the bell file after the commit, and idle consumers watch
  it with inotify(7). A process may die between the two: for that case consumers also look every few seconds.
- All requests that wait for the file at one moment share one transaction, and so one sync to disk.
"""

import fcntl
import json
import os
import random
import sqlite3
import struct
import uuid
from collections.abc import AsyncIterator, Callable, Iterator
from contextlib import AbstractContextManager, asynccontextmanager, contextmanager, nullcontext, suppress
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import inotify_simple
import trio

from trio_pilot.brokers import (
    LONGEST_LEASE,
    Delivery,
    Patience,
    QueueAddress,
    Settlement,
    dead_letter_queue,
    dead_letters,
    queue_files,
)
from trio_pilot.brokers.addresses import file_of
from trio_pilot.brokers.headers import MOST_FAILURES, bounded_id, id_of
from trio_pilot.errors import BrokerError, DeliveryLostError, map_exceptions
from trio_pilot.files.filesystem import Inode, inode
from trio_pilot.files.ownership import open_plain
from trio_pilot.processes import threads

LOOK_INTERVAL = 5.0  # seconds between looks for messages without a bell: claims of dead processes, above all
LOOK_INTERVAL_WITHOUT_INOTIFY = 0.2  # fs.inotify.max_user_instances is 128 on most machines
LOCK_INTERVAL = 0.01  # seconds between two attempts to lock the bell
BUSY_TIMEOUT = 30.0  # seconds to wait for another process's transaction; they take milliseconds

SCHEMA_VERSION = 2
SCHEMA = """
CREATE TABLE IF NOT EXISTS message (
    position INTEGER PRIMARY KEY,   -- the order in which messages are taken
    queue TEXT NOT NULL,
    body BLOB NOT NULL,
    message_id TEXT NOT NULL,
    attempts INTEGER NOT NULL DEFAULT 0,   -- deliveries that ended badly
    reason TEXT,                           -- why it is a dead letter
    consumer INTEGER,                      -- the number of the consumer that has claimed it
    headers TEXT,                          -- a JSON object: the facts of a dead letter
    deliveries INTEGER NOT NULL DEFAULT 0  -- how often it was claimed
);
CREATE INDEX IF NOT EXISTS message_by_queue ON message (queue, consumer, position);
"""
_COLUMNS_OF_2 = """
ALTER TABLE message ADD COLUMN headers TEXT;
ALTER TABLE message ADD COLUMN deliveries INTEGER NOT NULL DEFAULT 0;
"""
UPGRADES = {0: SCHEMA, 1: _COLUMNS_OF_2}  # by the version of the file


@dataclass(slots=True, eq=False)
class _Request:
    """One caller's work in a shared transaction."""

    work: Callable[[sqlite3.Connection], Any]
    durable: bool
    done: bool = False
    result: Any = None
    error: Exception | None = None


class _QueueFile:
    """The SQLite file: one connection, used by one thread at a time."""

    def __init__(self, connection: sqlite3.Connection, bell: "_Bell") -> None:
        self.bell = bell
        self._places = {path: _place(path) for path in (bell.path, queue_files.bell_path(bell.path))}
        self._connection = connection
        self._waiting: list[_Request] = []
        self._turn = trio.Lock()
        self._thread = trio.CapacityLimiter(1)

    async def run(self, work: Callable[[sqlite3.Connection], Any], *, durable: bool = False) -> Any:
        """Run `work` in a transaction; return its result once it is committed (`durable`: and on disk).

        It is not cancelled halfway, so that no claim is left without an owner: it takes BUSY_TIMEOUT at the most.
        """
        await trio.lowlevel.checkpoint_if_cancelled()
        request = _Request(work, durable)
        self._waiting.append(request)
        with trio.CancelScope(shield=True):
            async with self._turn:
                if not request.done:
                    batch, self._waiting = self._waiting, []
                    await threads.run_sync(self._commit, batch, limiter=self._thread)
        if request.error:
            raise BrokerError(f"the queue file {self.bell.path}: {request.error}") from request.error
        return request.result

    def _commit(self, batch: list[_Request]) -> None:
        durable = any(request.durable for request in batch)
        try:
            # A claim or an ack that a power failure undoes is a repeated event; a lost send would be a lost result.
            self._connection.execute(f"PRAGMA synchronous = {'FULL' if durable else 'NORMAL'}")
            with _transaction(self._connection):
                for request in batch:
                    request.result = request.work(self._connection)
            self._check_places()
        except Exception as error:  # any error: each request must have an answer
            for request in batch:
                request.error = error
        for request in batch:
            request.done = True

    def _check_places(self) -> None:
        """Raise FileNotFoundError if others find another file by the name: what was written is in none that they have."""
        for path, place in self._places.items():
            if _place(path) != place:
                raise FileNotFoundError(f"{path.name} was removed, moved or replaced while in use: start again")


def _place(path: Path) -> Inode | None:
    """Return device and inode of a file; None if there is none."""
    try:
        return inode(path.stat())
    except OSError:
        return None


@contextmanager
def _transaction(connection: sqlite3.Connection) -> Iterator[None]:
    connection.execute("BEGIN IMMEDIATE")
    try:
        yield
        connection.execute("COMMIT")
    except BaseException:
        if connection.in_transaction:
            connection.execute("ROLLBACK")
        raise


class _Bell:
    """The file beside the queue file that is written to wake idle consumers, and whose bytes are locked by live ones."""

    def __init__(self, path: Path, bell: int) -> None:
        self.path = path
        self._path_of_bell = queue_files.bell_path(path)
        self._bell = bell

    def ring(self) -> None:
        """Wake every idle consumer. If the disk is full, none wakes: they look by themselves, later."""
        try:
            os.pwrite(self._bell, b"!", 0)
        except OSError:
            return

    @contextmanager
    def watch(self) -> Iterator[inotify_simple.INotify | None]:
        """Yield a watch of the bell; None where the machine has no inotify instance left."""
        try:
            inotify = inotify_simple.INotify(nonblocking=True)
        except OSError:
            yield None
            return
        with inotify:
            inotify.add_watch(self._path_of_bell, inotify_simple.flags.MODIFY)
            yield inotify

    @contextmanager
    def presence(self) -> Iterator[int]:
        """Yield a number whose byte is locked as long as this context lasts and the process lives."""
        number = random.randrange(1, 2**62)  # noqa: S311 -- a name, not a secret
        with map_exceptions({OSError: BrokerError}, f"cannot open {self._path_of_bell}"):
            file = open_plain(self._path_of_bell, os.O_RDWR)
        try:
            with map_exceptions({OSError: BrokerError}, f"cannot lock {self._path_of_bell}; another process may hold it"):
                # Locks of open file descriptions, fcntl(2): two consumers of one process have locks of their own.
                fcntl.fcntl(file, fcntl.F_OFD_SETLK, _lock_of_byte(number))
            yield number
        finally:
            os.close(file)

    def is_alive(self, number: int) -> bool:
        """Return whether the process of the consumer of that number still lives."""
        answer = fcntl.fcntl(self._bell, fcntl.F_OFD_GETLK, _lock_of_byte(number))
        # A consumer's lock is for writing. One for reading is of a process that may only read the file.
        return int(struct.unpack_from("h", answer)[0]) == fcntl.F_WRLCK


def _lock_of_byte(number: int) -> bytes:
    """Build a `struct flock` for a write lock on one byte: type, whence, start, length, pid."""
    return struct.pack("hhqqixxxx", fcntl.F_WRLCK, os.SEEK_SET, number, 1, 0)


@asynccontextmanager
async def _open_file(address: QueueAddress) -> AsyncIterator[_QueueFile]:
    path = file_of(address.address)
    with map_exceptions({OSError: BrokerError}, f"cannot open the queue file {path}, or what is beside it"):
        path = queue_files.real_path(path)
        bell = queue_files.open_bell(path)
    try:
        async with _locked(path, bell):
            connection = await threads.run_sync(_connect, path)
        try:
            yield _QueueFile(connection, _Bell(path, bell))
        finally:
            with trio.CancelScope(shield=True):  # BUSY_TIMEOUT at the most, as any other use of the file
                await threads.run_sync(connection.close)
    finally:
        os.close(bell)


@asynccontextmanager
async def _locked(path: Path, bell: int) -> AsyncIterator[None]:
    """Lock the bell for the body. Raises BrokerError if another process holds the lock for BUSY_TIMEOUT."""
    with trio.move_on_after(BUSY_TIMEOUT) as scope:
        while True:
            try:
                fcntl.flock(bell, fcntl.LOCK_EX | fcntl.LOCK_NB)
                break
            except BlockingIOError:
                await trio.sleep(LOCK_INTERVAL)
            except OSError as error:
                raise BrokerError(f"cannot lock {queue_files.bell_path(path)}: {error.strerror}") from error
    if scope.cancelled_caught:
        raise BrokerError(
            f"{queue_files.bell_path(path)} was locked by another process for {BUSY_TIMEOUT:g} s: let no other user open it"
        )
    try:
        yield
    finally:
        fcntl.flock(bell, fcntl.LOCK_UN)


def _connect(path: Path) -> sqlite3.Connection:
    with map_exceptions({sqlite3.Error: BrokerError}, f"cannot open the queue file {path}"):
        # One after the other: a first switch to WAL meets another with "database is locked", timeout or not.
        connection = sqlite3.connect(path, timeout=BUSY_TIMEOUT, isolation_level=None, check_same_thread=False)
        try:
            connection.execute("PRAGMA journal_mode = WAL")
            _check_schema(connection, path)
        except BaseException:
            connection.close()
            raise
        return connection


def _check_schema(connection: sqlite3.Connection, path: Path) -> None:
    version = connection.execute("PRAGMA user_version").fetchone()[0]
    if version == SCHEMA_VERSION:
        return
    if version not in UPGRADES:
        raise BrokerError(f"the queue file {path} is of another version of trio-pilot ({version}): name another file")
    connection.executescript(f"BEGIN IMMEDIATE; {UPGRADES[version]} PRAGMA user_version = {SCHEMA_VERSION}; COMMIT;")


@asynccontextmanager
async def open_source(address: QueueAddress, _patience: Patience | None = None) -> AsyncIterator["LocalSource"]:
    """Open an incoming queue; it need not exist."""
    async with _open_file(address) as file:
        with file.bell.presence() as number:
            yield LocalSource(address.queue, file, number)


@asynccontextmanager
async def open_sink(address: QueueAddress, _patience: Patience | None = None) -> AsyncIterator["LocalSink"]:
    """Open an outgoing queue; it need not exist."""
    async with _open_file(address) as file:
        yield LocalSink(address.queue, file)


class LocalSource:
    """An incoming queue in the file; a claimed message stays claimed until it is settled or this process ends."""

    def __init__(self, queue: str, file: _QueueFile, number: int) -> None:
        self.queue = queue
        self.file = file
        self.number = number

    async def ready(self) -> None:
        """Return at once: the file was checked when it was opened."""
        await trio.lowlevel.checkpoint()

    @asynccontextmanager
    async def consume(self, prefetch: int, lease: float = LONGEST_LEASE) -> AsyncIterator["LocalConsumer"]:  # noqa: ARG002
        """Listen to the queue. A message is claimed when it is taken, so that there is never one to give back."""
        with self.file.bell.watch() as inotify:
            yield LocalConsumer(self, inotify)

    def has_lost(self, delivery: Delivery) -> bool:  # noqa: ARG002 -- a claim lasts as long as its process
        """Return False: no delivery is lost."""
        return False

    def held(self, delivery: Delivery) -> AbstractContextManager[None]:  # noqa: ARG002
        """Do nothing: there is no prefetch towards which a delivery could count."""
        return nullcontext()

    async def settle(self, delivery: Delivery, settlement: Settlement, reason: str = "", error: str = "") -> None:
        """Settle a delivery. A dead letter is always stored: the file that has the event has room for it."""
        position, message_id = delivery.tag
        values = {"position": position, "consumer": self.number, "message_id": message_id}
        if settlement is Settlement.DEAD_LETTER:
            facts = dead_letters.facts(delivery, reason, error)
            headers = json.dumps(dead_letters.headers(facts))
            values |= {"dead": dead_letter_queue(self.queue), "reason": facts["reason"], "headers": headers}
        if not await self.file.run(partial(_change, _SETTLE[settlement], values)):
            raise DeliveryLostError(f"the queue {self.queue} has taken the event {delivery.message_id} back")
        if settlement is not Settlement.ACK:
            self.file.bell.ring()

    def claim(self, connection: sqlite3.Connection) -> tuple[Any, ...] | None:
        """Claim the next message, in a transaction; return its row, if there is one."""
        rows = connection.execute(_CLAIM, {"queue": self.queue, "consumer": self.number}).fetchall()
        return rows[0] if rows else None

    def release_orphaned_claims(self, connection: sqlite3.Connection) -> int:
        """Release the claims of dead consumers, counted, in a transaction; return the number of dead consumers."""
        claims = connection.execute(
            "SELECT DISTINCT consumer FROM message WHERE queue = ? AND consumer > 0 AND consumer <> ?",
            (self.queue, self.number),
        )
        dead = [row for row in claims if not self.file.bell.is_alive(row[0])]
        connection.executemany("UPDATE message SET consumer = NULL, attempts = attempts + 1 WHERE consumer = ?", dead)
        return len(dead)


_CLAIM = """
UPDATE message SET consumer = :consumer, deliveries = deliveries + 1 WHERE position = (
    SELECT position FROM message WHERE queue = :queue AND consumer IS NULL ORDER BY position LIMIT 1
) RETURNING
    position, CAST(body AS BLOB), CAST(message_id AS BLOB), CAST(attempts AS INTEGER), CAST(headers AS BLOB), deliveries
"""

# The id as well: a message that is settled leaves its position to a later one.
_CLAIMED = "WHERE position = :position AND consumer = :consumer AND CAST(message_id AS BLOB) = :message_id"
# To the end of the queue, so that an event that fails again and again does not stand in the way of the others.
_LAST = "position = (SELECT max(position) + 1 FROM message)"
_DEAD = "queue = :dead, reason = :reason, headers = :headers"

_SETTLE = {
    Settlement.ACK: f"DELETE FROM message {_CLAIMED}",
    Settlement.RELEASE: f"UPDATE message SET consumer = NULL {_CLAIMED}",
    Settlement.REJECT: f"UPDATE message SET consumer = NULL, attempts = attempts + 1, {_LAST} {_CLAIMED}",
    Settlement.DEAD_LETTER: f"UPDATE message SET consumer = NULL, {_DEAD}, {_LAST} {_CLAIMED}",
}


def _change(statement: str, values: dict[str, Any], connection: sqlite3.Connection) -> int:
    return connection.execute(statement, values).rowcount


class LocalConsumer:
    """Claims messages one at a time."""

    def __init__(self, source: LocalSource, inotify: inotify_simple.INotify | None) -> None:
        self.listening_since = trio.current_time()
        self._source = source
        self._inotify = inotify
        self._look_at = trio.current_time()

    async def take(self) -> Delivery | None:
        """Claim the next message, if there is one."""
        source = self._source
        if self._inotify:
            self._inotify.read(timeout=0)  # a bell that rings after this wakes `wait`
        row = await source.file.run(source.claim)
        if row is None and trio.current_time() >= self._look_at:
            self._look_at = trio.current_time() + LOOK_INTERVAL
            if await source.file.run(source.release_orphaned_claims):
                row = await source.file.run(source.claim)
        if row is None:
            return None
        return _delivery(source, row)

    async def wait(self) -> None:
        """Wait for the bell, or for the next look."""
        if self._inotify is None:
            await trio.sleep(LOOK_INTERVAL_WITHOUT_INOTIFY)
            return
        with trio.move_on_at(self._look_at):
            await trio.lowlevel.wait_readable(self._inotify.fileno())

    async def is_idle(self) -> bool:
        """Return True: `take` has looked into the file."""
        await trio.lowlevel.checkpoint()
        return True


def _delivery(source: LocalSource, row: tuple[Any, ...]) -> Delivery:
    """Make the delivery of a row, in which others may have written anything. One without an id is known by its body."""
    position, body, message_id, attempts, headers, deliveries = row
    given = bounded_id(message_id.decode(errors="backslashreplace"))
    return Delivery(
        source,
        source.queue,
        body,
        given or id_of(body),
        min(max(attempts, 0), MOST_FAILURES) + 1,
        (position, message_id),
        redelivered=deliveries != 1,
        named=bool(given),
        headers=_facts(headers),
    )


def _facts(headers: bytes) -> dict[str, Any]:
    with suppress(ValueError, RecursionError):
        facts = json.loads(headers or b"{}")
        return facts if isinstance(facts, dict) else {}
    return {}


class LocalSink:
    """An outgoing queue in the file."""

    def __init__(self, queue: str, file: _QueueFile) -> None:
        self._queue = queue
        self._file = file

    async def ready(self) -> None:
        """Return at once: the file was checked when it was opened."""
        await trio.lowlevel.checkpoint()

    async def send(self, body: bytes, message_id: str = "", original: Delivery | None = None) -> None:  # noqa: ARG002
        """Add a message to the queue, synced to disk. It has no other metadata."""
        storable = message_id.encode(errors="backslashreplace").decode()
        values = {"queue": self._queue, "body": body, "message_id": storable or uuid.uuid4().hex}
        await self._file.run(partial(_change, _SEND, values), durable=True)
        self._file.bell.ring()


_SEND = "INSERT INTO message (queue, body, message_id) VALUES (:queue, :body, :message_id)"
