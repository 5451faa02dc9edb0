"""`trio-pilot dead-letters`: list, show, replay or run dead letters, that is, events that have failed too often.

Dead letters of a queue are received as by any consumer, and released in the order in which they came. Those that a pilot has
written to the directory for dead letters are read from there.
"""

import json
import os
import reprlib
import sys
from collections import deque
from collections.abc import AsyncIterator, Iterable, Mapping, Sequence
from contextlib import asynccontextmanager, suppress
from dataclasses import dataclass, field, replace
from functools import partial
from pathlib import Path
from typing import Any

import trio

from trio_pilot.allocation.resources import find_allocation, fitted
from trio_pilot.brokers import Delivery, Settlement, dead_letter_queue, dead_letters, open_sink, open_source
from trio_pilot.brokers.listening import next_delivery
from trio_pilot.cli.signals import print_summary, run_until_signalled
from trio_pilot.errors import DecodeError, DeliveryLostError, NodeError, UsageError, map_exceptions
from trio_pilot.files.blocking_calls import BlockingCalls
from trio_pilot.files.task_logs import TaskLogs
from trio_pilot.log import in_one_line
from trio_pilot.pilot import container_runs
from trio_pilot.pilot.tools import open_tools
from trio_pilot.processes import threads
from trio_pilot.processes.children import end_all_children
from trio_pilot.settings import Settings
from trio_pilot.wire import WIRES, Message

MAX_LISTED = 1000  # dead letters that are received at once
IDLE_TIMEOUT = 0.5  # seconds without another dead letter, after which there are no more
RELEASE_TIMEOUT = 30.0  # seconds to release what was received; a broker that cannot be reached takes it back by itself
MAX_SHOWN = 60  # characters of a reason in a table
BROKER_FACTS = ("message_id", "message-id", "unnamed", "failures")  # for brokers only: neither listed nor shown
COLUMNS = ("time", "attempts", "error", "host", "reason")  # of the table, after the id


@dataclass(frozen=True, slots=True)
class DeadLetter:
    """A dead letter in a queue or in a directory."""

    message_id: str
    facts: Mapping[str, Any]
    body: bytes = field(repr=False)
    place: Delivery | Path  # the path is that of its .json file


def show_list(settings: Settings, queue: str, *, as_json: bool) -> int:
    """Print the dead letters of a queue, one on each line."""
    lines = run_until_signalled(_list, settings, queue, as_json)
    print("\n".join(lines)) if lines else print(in_one_line(f"no dead letters of {queue}"), file=sys.stderr)
    return 0


def show(settings: Settings, queue: str, message_id: str) -> int:
    """Print the facts about a dead letter, and the event, as JSON."""
    letter = run_until_signalled(_find, settings, queue, message_id)
    print(json.dumps({**_facts(letter), **_event(settings, letter)}, indent=2, default=repr))
    return 0


def replay(settings: Settings, queue: str, message_ids: Sequence[str], *, every: bool) -> int:
    """Send dead letters to the queue that they come from, and remove each once the broker has confirmed it."""
    if bool(message_ids) == every:
        raise UsageError("name the dead letters to replay: their ids, or --all")
    replayed: list[str] = []
    with print_summary(lambda: f"{len(replayed)} dead letter(s) replayed to {queue}"):
        run_until_signalled(_replay, settings, queue, frozenset(message_ids), replayed)
    return 0


def run(settings: Settings, queue: str, message_id: str) -> int:
    """Run the task for a dead letter on this machine, and return its exit code. The dead letter stays where it is."""
    settings.check_commands()
    letter = run_until_signalled(_find, settings, queue, message_id)
    event = WIRES[settings.wire].decode(letter.body, settings.max_payload)
    try:
        return run_until_signalled(_run, fitted(settings, find_allocation(os.environ)), event)
    finally:
        end_all_children()


async def _list(settings: Settings, queue: str, as_json: bool) -> list[str]:
    async with _open_dead_letters(settings, queue) as letters:
        return [json.dumps(_facts(letter)) for letter in letters] if as_json else list(_table(letters))


async def _find(settings: Settings, queue: str, message_id: str) -> DeadLetter:
    async with _open_dead_letters(settings, queue) as letters:
        return _select(letters, queue, frozenset([message_id]))[0]


async def _replay(settings: Settings, queue: str, message_ids: frozenset[str], replayed: list[str]) -> None:
    patience = settings.broker_patience
    async with (
        _open_dead_letters(settings, queue) as letters,
        open_sink(settings.at_broker(queue), lambda seconds: seconds < patience) as sink,
    ):
        for letter in _select(letters, queue, message_ids) if message_ids else list(letters):
            await sink.send(letter.body, letter.message_id, letter.place if isinstance(letter.place, Delivery) else None)
            with trio.CancelScope(shield=True):  # it is in the queue now, and must not be a dead letter as well
                await _remove(letter)
            letters.remove(letter)
            replayed.append(letter.message_id)


async def _run(settings: Settings, event: Message) -> int:
    has_args, keep = bool(settings.task_args), settings.keep_all_task_files
    async with open_tools(settings, settings.task_image, has_args=has_args, keep=keep) as tools:
        async with trio.open_nursery() as nursery:
            nursery.start_soon(tools.clock.keep)
            if settings.init_image or settings.init_args:
                await container_runs.run_init(tools, settings, TaskLogs(settings.max_output, BlockingCalls()))
            code = await container_runs.run_once(tools, settings, event.data)
            nursery.cancel_scope.cancel()
        return code


@asynccontextmanager
async def _open_dead_letters(settings: Settings, queue: str) -> AsyncIterator[list[DeadLetter]]:
    """Yield a list of the dead letters of a queue; those that are in it at the end are released."""
    address = replace(settings.at_broker(queue), queue=dead_letter_queue(queue))
    patience = settings.broker_patience
    async with open_source(address, lambda seconds: seconds < patience) as source:
        letters: list[DeadLetter] = []
        try:
            async with source.consume(MAX_LISTED) as consumer:
                consumers = deque([consumer])
                while len(letters) < MAX_LISTED and (delivery := await next_delivery(consumers, IDLE_TIMEOUT)):
                    letters.append(_from_delivery(delivery))
            # The consumer is closed by now: what is released is not delivered here again, out of order.
            read = partial(_from_directory, settings.dead_letters, queue)
            letters += await threads.run_sync(read, abandon_on_cancel=True)
            yield letters
        finally:
            with trio.move_on_after(RELEASE_TIMEOUT, shield=True):
                await _release(letters)


async def _release(letters: Iterable[DeadLetter]) -> None:
    for letter in letters:
        if isinstance(letter.place, Delivery):
            with suppress(DeliveryLostError):  # then the broker has it back already
                await letter.place.source.settle(letter.place, Settlement.RELEASE)


async def _remove(letter: DeadLetter) -> None:
    if isinstance(letter.place, Delivery):
        await letter.place.source.settle(letter.place, Settlement.ACK)
    else:
        await threads.run_sync(_unlink, letter.place)


def _unlink(path: Path) -> None:
    with map_exceptions({OSError: NodeError}, f"cannot remove the dead letter {path}"):
        path.unlink()
        path.with_suffix(".body").unlink()


def _from_delivery(delivery: Delivery) -> DeadLetter:
    prefix = dead_letters.PREFIX
    theirs = {str(name): value for name, value in delivery.headers.items()}
    facts = {name.removeprefix(prefix): _fact(value) for name, value in theirs.items() if name.startswith(prefix)}
    return DeadLetter(delivery.message_id, facts, delivery.body, delivery)


def _fact(value: Any) -> str | int | float:
    """Return the value of a header, which anyone may have written, as one that can be shown."""
    return value if isinstance(value, str | int | float) else reprlib.repr(value)


def _from_directory(directory: Path, queue: str) -> list[DeadLetter]:
    return [
        DeadLetter(str(letter.facts.get("message_id", letter.path.stem)), letter.facts, letter.body, letter.path)
        for letter in dead_letters.read(directory, queue)
    ]


def _select(letters: Iterable[DeadLetter], queue: str, message_ids: frozenset[str]) -> list[DeadLetter]:
    selected = [letter for letter in letters if letter.message_id in message_ids]
    if missing := sorted(message_ids - {letter.message_id for letter in selected}):
        raise UsageError(f"{queue} has no dead letter {', '.join(missing)}: `trio-pilot dead-letters {queue}` lists them")
    return selected


def _facts(letter: DeadLetter) -> dict[str, Any]:
    facts = {name: value for name, value in letter.facts.items() if name not in (*BROKER_FACTS, "id", "file")}
    return {"id": letter.message_id, **facts, **({"file": str(letter.place)} if isinstance(letter.place, Path) else {})}


def _event(settings: Settings, letter: DeadLetter) -> dict[str, Any]:
    try:
        message = WIRES[settings.wire].decode(letter.body, settings.max_payload)
    except DecodeError as error:
        return {"cannot be decoded": str(error), "body": letter.body}
    return {"headers": message.headers, "data": message.data}


def _table(letters: Iterable[DeadLetter]) -> Iterable[str]:
    """Yield the lines of a table: a head, and a line for each dead letter."""
    rows = [
        [in_one_line(letter.message_id), *(_short(letter.facts.get(name, "")) for name in COLUMNS)] for letter in letters
    ]
    if not rows:
        return
    rows.insert(0, ["ID", *map(str.upper, COLUMNS)])
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    for row in rows:
        yield "  ".join(word.ljust(width) for word, width in zip(row, widths, strict=True)).rstrip()


def _short(value: object) -> str:
    text = in_one_line(" ".join(str(value).split()))
    return text if len(text) <= MAX_SHOWN else f"{text[: MAX_SHOWN - 1]}…"
