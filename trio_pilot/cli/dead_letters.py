"""`trio-pilot dead-letters`: what failed for the last time is listed, shown, replayed, or run here and now.

Dead letters are looked at as any consumer would, and given back in the order in which they came; those that a pilot has
left in the directory for them are read there.
"""

import json
import os
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
from trio_pilot.cleanup.client import open_guardian
from trio_pilot.cli.signals import report, run_until_signalled
from trio_pilot.errors import DecodeError, DeliveryLostError, NodeError, UsageError, map_exceptions
from trio_pilot.files.blocking_calls import BlockingCalls
from trio_pilot.files.data_directory import open_data_directory, root_in
from trio_pilot.files.task_logs import TaskLogs
from trio_pilot.pilot import container_runs
from trio_pilot.pilot.serve import guarded
from trio_pilot.processes.children import end_strays
from trio_pilot.runtimes.selection import open_runtime
from trio_pilot.settings import Settings
from trio_pilot.wire import WIRES, Message

MOST = 1000  # letters that are looked at at once
IDLE = 0.5  # seconds without another letter after which there is none
RETURN_TIMEOUT = 30.0  # seconds to give back what was looked at; a broker that is gone has it back by itself
MOST_SHOWN = 60  # characters of a reason in a list
ABOUT_THE_MESSAGE = ("message_id", "message-id", "failures")  # what brokers need, and nobody else
FACTS = ("time", "attempts", "error", "host", "reason")  # the columns of a list, after the id


@dataclass(frozen=True, slots=True)
class ListedLetter:
    """A dead letter, at a broker or in a directory."""

    message_id: str
    facts: Mapping[str, Any]
    body: bytes = field(repr=False)
    place: Delivery | Path  # the path is that of its .json


def show_list(settings: Settings, queue: str, *, as_json: bool) -> int:
    """List the dead letters of a queue."""
    lines = run_until_signalled(_listed, settings, queue, as_json)
    print("\n".join(lines)) if lines else print(f"no dead letters of {queue}", file=sys.stderr)
    return 0


def show(settings: Settings, queue: str, message_id: str) -> int:
    """Show what is known of a dead letter, and the event, as JSON."""
    letter = run_until_signalled(_find, settings, queue, message_id)
    print(json.dumps({**_said(letter), **_event(settings, letter)}, indent=2, default=repr))
    return 0


def replay(settings: Settings, queue: str, message_ids: Sequence[str], *, every: bool) -> int:
    """Send dead letters to the queue that they come from, and remove each once the broker has it there."""
    if bool(message_ids) == every:
        raise UsageError("say which dead letters to replay: their ids, or --all")
    replayed: list[str] = []
    with report(lambda: f"{len(replayed)} dead letter(s) replayed to {queue}"):
        run_until_signalled(_replay, settings, queue, frozenset(message_ids), replayed)
    return 0


def run(settings: Settings, queue: str, message_id: str) -> int:
    """Run the task for a dead letter, here and now; gives the task's exit code. The letter stays where it is."""
    if not settings.task_args:
        settings.check_complete()
    letter = run_until_signalled(_find, settings, queue, message_id)
    event = WIRES[settings.wire].decode(letter.body, settings.max_payload)
    try:
        return run_until_signalled(_run, fitted(settings, find_allocation(os.environ)), event)
    finally:
        end_strays()


async def _listed(settings: Settings, queue: str, as_json: bool) -> list[str]:
    async with _letters(settings, queue) as letters:
        return [json.dumps(_said(letter)) for letter in letters] if as_json else list(_table(letters))


async def _find(settings: Settings, queue: str, message_id: str) -> ListedLetter:
    async with _letters(settings, queue) as letters:
        return _chosen(letters, queue, frozenset([message_id]))[0]


async def _replay(settings: Settings, queue: str, message_ids: frozenset[str], replayed: list[str]) -> None:
    patience = settings.broker_patience
    async with (
        _letters(settings, queue) as letters,
        open_sink(settings.at_broker(queue), lambda seconds: seconds < patience) as sink,
    ):
        for letter in _chosen(letters, queue, message_ids) if message_ids else list(letters):
            await sink.send(letter.body, letter.message_id)
            with trio.CancelScope(shield=True):  # it is in the queue: it must not be a dead letter as well
                await _remove(letter)
            letters.remove(letter)
            replayed.append(letter.message_id)


async def _run(settings: Settings, event: Message) -> int:
    parent, external = settings.data_dir_parent_path_on_host, settings.external_directories
    async with open_guardian() as guardian:
        guardian.watch("data", root_in(parent))
        with open_data_directory(parent, external, keep=settings.keep_all_task_files) as data_directory:
            opening = open_runtime(settings.runtime, settings.task_image, settings.runtime_options)
            async with guarded(opening, guardian) as runtime:
                await runtime.prepare(settings.task_image)
                tools = container_runs.Tools(guardian, data_directory, runtime, ())
                if settings.init_image or settings.init_args:
                    await container_runs.run_init(tools, settings, TaskLogs(settings.max_output, BlockingCalls()))
                return await container_runs.run_once(tools, settings, event.data)


@asynccontextmanager
async def _letters(settings: Settings, queue: str) -> AsyncIterator[list[ListedLetter]]:
    """Give the dead letters of a queue; those that are in the list in the end are given back."""
    address = replace(settings.at_broker(queue), queue=dead_letter_queue(queue))
    patience = settings.broker_patience
    async with open_source(address, lambda seconds: seconds < patience) as source:
        letters: list[ListedLetter] = []
        try:
            async with source.consume(MOST) as consumer:
                consumers = deque([consumer])
                while len(letters) < MOST and (delivery := await next_delivery(consumers, IDLE)):
                    letters.append(_at_broker(delivery))
            # By now nobody listens here: what is given back does not come again, out of order.
            written = partial(_in_directory, settings.dead_letters, queue)
            letters += await trio.to_thread.run_sync(written, abandon_on_cancel=True)
            yield letters
        finally:
            with trio.move_on_after(RETURN_TIMEOUT, shield=True):
                await _give_back(letters)


async def _give_back(letters: Iterable[ListedLetter]) -> None:
    for letter in letters:
        if isinstance(letter.place, Delivery):
            with suppress(DeliveryLostError):  # then it is back already
                await letter.place.source.settle(letter.place, Settlement.RELEASE)


async def _remove(letter: ListedLetter) -> None:
    if isinstance(letter.place, Delivery):
        await letter.place.source.settle(letter.place, Settlement.ACK)
    else:
        await trio.to_thread.run_sync(_unlink, letter.place)


def _unlink(path: Path) -> None:
    with map_exceptions({OSError: NodeError}, f"cannot remove the dead letter {path}"):
        path.unlink()
        path.with_suffix(".body").unlink()


def _at_broker(delivery: Delivery) -> ListedLetter:
    said = delivery.headers.items()
    facts = {name.removeprefix(dead_letters.PREFIX): value for name, value in said if name.startswith(dead_letters.PREFIX)}
    return ListedLetter(delivery.message_id, facts, delivery.body, delivery)


def _in_directory(directory: Path, queue: str) -> list[ListedLetter]:
    return [
        ListedLetter(str(letter.facts.get("message_id", letter.path.stem)), letter.facts, letter.body, letter.path)
        for letter in dead_letters.read(directory, queue)
    ]


def _chosen(letters: Iterable[ListedLetter], queue: str, message_ids: frozenset[str]) -> list[ListedLetter]:
    chosen = [letter for letter in letters if letter.message_id in message_ids]
    if missing := sorted(message_ids - {letter.message_id for letter in chosen}):
        raise UsageError(f"{queue} has no dead letter {', '.join(missing)}: `trio-pilot dead-letters {queue}` lists them")
    return chosen


def _said(letter: ListedLetter) -> dict[str, Any]:
    facts = {name: value for name, value in letter.facts.items() if name not in ABOUT_THE_MESSAGE}
    return {"id": letter.message_id, **facts, **({"file": str(letter.place)} if isinstance(letter.place, Path) else {})}


def _event(settings: Settings, letter: ListedLetter) -> dict[str, Any]:
    try:
        message = WIRES[settings.wire].decode(letter.body, settings.max_payload)
    except DecodeError as error:
        return {"cannot be decoded": str(error), "body": letter.body}
    return {"headers": message.headers, "data": message.data}


def _table(letters: Iterable[ListedLetter]) -> Iterable[str]:
    """Write a line a letter, in columns."""
    rows = [[letter.message_id, *(_short(letter.facts.get(name, "")) for name in FACTS)] for letter in letters]
    if not rows:
        return
    rows.insert(0, ["ID", *map(str.upper, FACTS)])
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    for row in rows:
        yield "  ".join(word.ljust(width) for word, width in zip(row, widths, strict=True)).rstrip()


def _short(value: object) -> str:
    text = " ".join(str(value).split())
    return text if len(text) <= MOST_SHOWN else f"{text[: MOST_SHOWN - 1]}…"
