"""One event's life: stage, run, publish, settle."""

import math
from collections.abc import AsyncIterator, Mapping, Sequence
from contextlib import AbstractContextManager, asynccontextmanager, suppress
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

import trio

from trio_pilot import node, staging
from trio_pilot.bench import Bench
from trio_pilot.brokers import Delivery, Settlement, Sink
from trio_pilot.canary import Canary
from trio_pilot.disk import Disk
from trio_pilot.errors import (
    BrokerError,
    ContainerOutOfMemoryError,
    ContainerRunError,
    ContainerTimeoutError,
    DeliveryLostError,
    DeliveryReplacedError,
    EventError,
    NodeError,
    PilotError,
)
from trio_pilot.guard import Guard
from trio_pilot.last_words import last_words
from trio_pilot.ledger import Ledger, Life
from trio_pilot.log import LOGGER
from trio_pilot.outputs import Outputs
from trio_pilot.pins import Pins
from trio_pilot.runtimes import DATA_DIRECTORY, NOT_FOUND_REASONS, Container, Exit, Limits, Mount, Runtime
from trio_pilot.scopes import Shelter
from trio_pilot.settings import Settings
from trio_pilot.slots import Slot
from trio_pilot.spares import Spares
from trio_pilot.staging import TaskFiles
from trio_pilot.status import Status
from trio_pilot.trees import is_directory
from trio_pilot.unsent import Unsent
from trio_pilot.wire import WIRES, Message
from trio_pilot.workspace import Workspace

CANARY, CANARY_TIMEOUT = ("true",), 60.0  # seconds, on a node that is merely busy
CLEARING_TIMEOUT = 10.0  # seconds


@dataclass(frozen=True, slots=True)
class Order:
    """What to run in a container: of a task, or to initialise the node."""

    alias: str  # what error texts call it
    image: str
    args: tuple[str, ...]
    env: Mapping[str, str]
    timeout: float | None  # seconds
    limits: Limits
    dump: bool  # copy what it says to the pilot's own stdout and stderr
    keep: bool  # leave it in its files
    pinned: tuple[int, ...] = ()  # CPUs to run on; none: any

    @classmethod
    def task(cls, settings: Settings) -> "Order":
        """Order what is run for each event."""
        what = settings.task_image, settings.task_args, settings.task_env_json, settings.task_timeout
        return cls("task", *what, settings.limits, settings.dump_task_output, settings.keep_all_task_files)

    @classmethod
    def init(cls, settings: Settings) -> "Order":
        """Order what is run before the first event."""
        what = settings.init_image, settings.init_args, settings.init_env_json, settings.init_timeout
        return cls("init-container", *what, settings.limits, settings.dump_task_output, settings.keep_all_task_files)


@dataclass(frozen=True, slots=True)
class Tools:
    """What tasks work with."""

    guard: Guard
    workspace: Workspace
    runtime: Runtime
    sinks: Sequence[Sink]

    @property
    def any_user(self) -> bool:
        """Whether a container may be another user than we are."""
        return self.runtime.engine is not None

    def make(self, files: TaskFiles) -> None:
        """Make the directory of a container. Blocks; raises NodeError if the disk does not take it."""
        staging.make(files, any_user=self.any_user)


@dataclass(slots=True)
class Event:
    """An event that was taken, and its files; once they are made, what goes over to its output."""

    delivery: Delivery
    files: TaskFiles
    headers: Mapping[str, Any] | None = None

    @property
    def is_lost(self) -> bool:
        """Whether the broker has it again, as far as is known."""
        return self.delivery.source.has_lost(self.delivery)


class Worker:
    """What all tasks of a pilot have in common."""

    def __init__(self, settings: Settings, tools: Tools, status: Status, shelter: Shelter) -> None:
        self._settings = settings
        self._tools = tools
        self._status = status
        self._shelter = shelter
        self._order = Order.task(settings)
        self._wire = WIRES[settings.wire]
        self._disk = Disk()
        self.outputs = Outputs(settings.max_output, self._disk)
        self.unsent = Unsent()
        self._pins = Pins(settings.max_concurrent_tasks if settings.pin_tasks else 0, settings.cpus_per_task or 1)
        self._spares = Spares(any_user=tools.any_user)
        self._ledger = Ledger()
        self.canary = Canary(partial(run_canary, tools, settings))
        self.bench = Bench(settings.retry_delay)

    def life(self, delivery: Delivery) -> AbstractContextManager[Life]:
        """Be known to be at an event, until it is settled."""
        return self._ledger.life(delivery)

    def event(self, delivery: Delivery) -> Event:
        """Give an event its files, which are still to be made."""
        return Event(delivery, _task_files(self._tools, self._settings))

    @asynccontextmanager
    async def staged_ahead(self, event: Event | None) -> AsyncIterator[None]:
        """Have an event staged, if there is one, while it waits for its slot; if that is not to come, it is returned."""
        if event is None:
            yield
            return
        try:
            if self._disk.is_quick(self._wire.size(event.delivery.body)):  # a slot that comes free is not to wait for it
                await self._stage_if_it_can_be(event)
            yield
        except BaseException:
            await self.discard(event)
            await self._release(Life(event.delivery))
            raise

    async def live(self, life: Life, event: Event, slot: Slot) -> PilotError | None:
        """Live one event's life; give the error that it, or the node, ended with.

        It is settled in the end, unless it is to be tried again: then `give_back` is for the caller to call.

        The slot is free for another as soon as the output is read; if there is none, it is for the caller to free.

        Cancelled, the container is killed and the event returned; but an output that is there is still sent.
        """
        try:
            return await self._settled(life, event, slot)
        finally:
            await self.discard(event)

    async def give_back(self, life: Life, error: PilotError) -> None:
        """Return an event that failed, after a delay; one that took too long at once, since another node may be faster."""
        with self.bench.seat(life.delivery):
            try:
                if not isinstance(error, ContainerTimeoutError):
                    await self.bench.sit_out(life.delivery.attempt)
            finally:
                await self._settle(life, Settlement.REJECT)

    async def knows(self, delivery: Delivery) -> bool:
        """Tell whether an event that comes again is run, or was done, here already: it is, or will be, settled by that."""
        if self._ledger.adopt(delivery):
            return True
        if self._ledger.was_done(delivery):
            await self._settle(Life(delivery), Settlement.ACK)
            return True
        return False

    async def discard(self, event: Event) -> None:
        """Remove its files, or keep them for another event."""
        files = event.files
        if self._settings.keep_all_task_files:
            return
        if not await self._disk.finish(staging.outfile_size(files), self._spares.take_back, files):
            await remove(self._tools, self._disk, files, self._order.image)

    def close(self) -> None:
        """Remove the directories that no task will need any more."""
        self._spares.close()

    async def _settled(self, life: Life, event: Event, slot: Slot) -> PilotError | None:
        try:
            await self._judged(event, slot)
        except (EventError, NodeError) as error:
            settlement = self._by_cause(error, life.delivery)
            if settlement is not Settlement.REJECT:
                await self._settle(life, settlement, error)
            return error
        except BaseException:
            await self._release(life)
            raise
        await self._settle(life, Settlement.ACK)
        return None

    async def _judged(self, event: Event, slot: Slot) -> None:
        """Work, and tell a failure of the node from one of the event's."""
        try:
            await self._work(event, slot)
        except (ContainerTimeoutError, ContainerOutOfMemoryError):
            raise  # limits that the user has set
        except ContainerRunError as error:
            await self.canary.judge(error, partial(self._remove, event.files))  # for it may have filled the disk
            raise

    async def _work(self, event: Event, slot: Slot) -> None:
        files, headers = event.files, await self._stage(event)
        started = trio.current_time()
        with self._pins.lent() as cpus:
            order = replace(self._order, pinned=cpus) if cpus else self._order
            await run(self._tools, self._disk, self.outputs, order, files)
        self._status.run_times.add(trio.current_time() - started)
        with self._shelter.linger() as scope:
            size = staging.outfile_size(files)
            output = await self._disk.call(size, self._read, headers, files)
            await slot.hand_over()
            if output is not None:
                body = await self._disk.call(size, self._wire.encode, output)
                del output  # a large one is not to be in memory twice while it is sent
                with self.unsent.sending(files.outfile_path):
                    for sink in self._tools.sinks:
                        await sink.send(body, event.delivery.message_id)
        if scope.cancelled_caught:
            await trio.lowlevel.checkpoint_if_cancelled()

    async def _stage_if_it_can_be(self, event: Event) -> None:
        try:
            await self._stage(event)
        except (EventError, NodeError):  # as it will once more, when its turn has come
            await self._disk.finish(math.inf, staging.remove, event.files)

    async def _stage(self, event: Event) -> Mapping[str, Any]:
        if event.headers is None:
            event.headers = await self._disk.call(self._wire.size(event.delivery.body), self._make, event)
        return event.headers

    def _make(self, event: Event) -> Mapping[str, Any]:
        message = self._wire.decode(event.delivery.body, self._settings.max_payload)
        self._spares.make(event.files)
        staging.write_infile(event.files, message.data)
        return message.headers

    def _read(self, headers: Mapping[str, Any], files: TaskFiles) -> Message | None:
        content = staging.read_outfile(files, self._settings.max_payload)
        if content is None or self._settings.wire == "raw":  # as it is
            return None if content is None else Message(content)
        is_json = self._settings.outfile_ext == ".json"
        return Message(staging.parse_outfile(content, is_json=is_json), headers)

    def _by_cause(self, error: PilotError, delivery: Delivery) -> Settlement:
        if isinstance(error, NodeError):
            return Settlement.RELEASE
        return Settlement.DEAD_LETTER if delivery.attempt >= self._settings.max_attempts else Settlement.REJECT

    async def _remove(self, files: TaskFiles) -> None:
        if not self._settings.keep_all_task_files:
            await remove(self._tools, self._disk, files, self._order.image)

    async def _settle(self, life: Life, settlement: Settlement, cause: PilotError | None = None) -> None:
        life.is_settled = True
        with trio.move_on_after(self._settings.settle_grace, shield=True) as patience:
            while not await self._try_to_settle(life, life.delivery, settlement, cause):
                pass  # it has come again meanwhile
        if patience.cancelled_caught:
            LOGGER.warning("event %s not settled (%s) in time", life.delivery.message_id, settlement.value)

    async def _try_to_settle(self, life: Life, delivery: Delivery, settlement: Settlement, cause: PilotError | None) -> bool:
        said = (str(cause), type(cause).__name__) if cause else ()
        try:
            await delivery.source.settle(delivery, settlement, *said)
        except DeliveryLostError as error:
            if life.delivery is not delivery:
                return False
            LOGGER.warning("not settled (%s): %s", settlement.value, error)
            if settlement is Settlement.ACK or isinstance(error, DeliveryReplacedError):
                self._ledger.done(delivery)
        else:
            if settlement is Settlement.ACK:
                self._ledger.acked(delivery)
        return True

    async def _release(self, life: Life) -> None:
        """Return an event on the way out. The way out has its own error; a second would hide it."""
        try:
            await self._settle(life, Settlement.RELEASE)
        except BrokerError as error:
            LOGGER.warning("event %s not returned: %s", life.delivery.message_id, error)


def _task_files(tools: Tools, settings: Settings) -> TaskFiles:
    name = tools.workspace.new_name()
    return TaskFiles(
        tools.workspace.root / name,
        infile=f"infile-{name}{settings.infile_ext}",
        outfile=f"outfile-{name}{settings.outfile_ext}",
    )


async def run(tools: Tools, disk: Disk, outputs: Outputs, order: Order, files: TaskFiles) -> None:
    """Run a container as ordered, to its end.

    Raises:
        ContainerRunError: it ended with an error, or (ContainerTimeoutError) not in time, or (ContainerOutOfMemoryError) it
            was killed for want of memory.
        NodeError: it could not be started.
    """
    timeout, ended, reason = order.timeout or math.inf, None, None
    with outputs.growing(files.stdout, files.stderr):
        try:
            with trio.move_on_after(timeout):
                ended = await tools.runtime.run(_container(tools, order, files))
        finally:
            reason = await disk.finish(0, _conclude, outputs, files, ended)
    if order.dump:
        await outputs.show(files)
    if ended is None:
        raise ContainerTimeoutError(f"{order.alias} failed: [Timeout-Error] timed out after {timeout:g}s")
    if ended.out_of_memory:
        limit = f"more than {order.limits.memory} bytes" if order.limits.memory else "more than there was"
        raise ContainerOutOfMemoryError(f"{order.alias} failed (exit code {ended.code}): out of memory: it used {limit}")
    if ended.code:
        raise ContainerRunError(f"{order.alias} failed (exit code {ended.code}): {reason or ''}")


def _conclude(outputs: Outputs, files: TaskFiles, ended: Exit | None) -> str:
    """Give the reason of a failure: it is at the end of what was said, which is not kept if that is too long."""
    reason = ""
    if ended and ended.code:
        reason = last_words(files.stderr) or node.shortage(files.root)  # which may be why it could not say more
    outputs.finish(files.stdout, files.stderr)
    return reason


async def run_init(tools: Tools, settings: Settings, outputs: Outputs) -> None:
    """Run the init container; raises what `run` raises."""
    async with _aside(tools, "init", settings.init_image, keep=settings.keep_all_task_files) as files:
        await tools.runtime.prepare(settings.init_image)
        await run(tools, Disk(), outputs, Order.init(settings), files)


async def run_once(tools: Tools, settings: Settings, data: Any) -> int:
    """Run the task for an event, show what it said, and give its exit code; its output goes nowhere.

    Raises:
        ContainerTimeoutError: it took too long.
        NodeError: it could not be run.
    """
    files, disk, timeout = _task_files(tools, settings), Disk(), settings.task_timeout or math.inf
    try:
        await disk.call(0, tools.make, files)
        await disk.call(math.inf, staging.write_infile, files, data)
        ended = None
        with trio.move_on_after(timeout):
            ended = await tools.runtime.run(_container(tools, replace(Order.task(settings), dump=True), files))
        await trio.to_thread.run_sync(staging.dump, files, abandon_on_cancel=True)
    finally:
        if not settings.keep_all_task_files:
            await remove(tools, disk, files, settings.task_image)
    if ended is None:
        raise ContainerTimeoutError(f"task failed: [Timeout-Error] timed out after {timeout:g}s")
    return ended.code


async def run_canary(tools: Tools, settings: Settings, error: PilotError | None = None) -> None:
    """Run next to nothing, on this disk, by this clock, in a container like that of a task: of one that failed, if so.

    Raises:
        NodeError: it does not work here. An image need not have such a command; but it must have this, or the task's own.
    """
    await Disk().call(math.inf, _look_at_node, tools.workspace.root)
    async with _aside(tools, "canary", settings.task_image, keep=False) as files:
        order = replace(Order.task(settings), args=CANARY, env={})
        with trio.move_on_after(CANARY_TIMEOUT):
            ended = await tools.runtime.run(replace(_container(tools, order, files), plain=True))
            reason = last_words(files.stderr) if ended.code else ""
            is_missing = reason.endswith(NOT_FOUND_REASONS)
            if is_missing and str(error).endswith(tuple(f" {settings.task_args[0]}: {why}" for why in NOT_FOUND_REASONS)):
                raise NodeError(f"the image has neither `{settings.task_args[0]}` nor `{CANARY[0]}`")
            if ended.code and not is_missing:
                raise NodeError(f"`{CANARY[0]}` in a container fails (exit code {ended.code}): {reason}")
            return
        raise NodeError(f"`{CANARY[0]}` in a container takes more than {CANARY_TIMEOUT:g} s")


def _look_at_node(root: Path) -> None:
    node.write_to(root)
    node.skew_of(root)


@asynccontextmanager
async def _aside(tools: Tools, what: str, image: str, *, keep: bool) -> AsyncIterator[TaskFiles]:
    """Make the directory of a container that is no task's, and remove it."""
    name = f"{what}-{tools.workspace.new_name().replace('-', '')}"
    files, disk = TaskFiles(tools.workspace.root / name, infile="", outfile=""), Disk()
    try:
        await disk.call(0, tools.make, files)
        yield files
    finally:
        if not keep:
            await remove(tools, disk, files, image)


async def remove(tools: Tools, disk: Disk, files: TaskFiles, image: str) -> None:
    """Remove the directory of a container, cancelled or not. What is another user's in it, another container removes."""
    if await disk.finish(math.inf, staging.try_to_remove, files) is False:
        if image and tools.any_user:
            with trio.move_on_after(CLEARING_TIMEOUT, shield=True):
                await _clear(tools, files, image)
        await disk.finish(math.inf, staging.remove, files)


async def _clear(tools: Tools, files: TaskFiles, image: str) -> None:
    """Empty the directories that a container could write to, as whoever it was."""
    mounts = [Mount(path, f"/{DATA_DIRECTORY}/{path.name}", writable=True) for path in (files.scratch, files.io)]
    there = tuple(mount for mount in mounts if is_directory(mount.source))
    async with _aside(tools, "clearing", "", keep=False) as own:
        args = "rm", "-rf", *(mount.target for mount in there)
        container = Container(own.root.name, image, args, {}, there, own.scratch, own.stdout, own.stderr, plain=True)
        with suppress(NodeError):
            await tools.runtime.run(container)


INSIDE = (f"/{DATA_DIRECTORY}/task-io", f"/{DATA_DIRECTORY}/data-hub")  # where a container has its files mounted


def _container(tools: Tools, order: Order, files: TaskFiles) -> Container:
    io, hub = INSIDE if tools.runtime.mounts else (files.io, tools.workspace.data_hub)
    names = {"EWMS_TASK_DATA_HUB_DIR": f"{hub}"}
    if files.infile:
        names |= {"EWMS_TASK_INFILE": f"{io}/{files.infile}", "EWMS_TASK_OUTFILE": f"{io}/{files.outfile}"}
    return Container(
        name=files.root.name,
        image=order.image,
        args=tuple(_filled_in(arg, names) for arg in order.args),
        env={**order.env, **names},
        mounts=tools.workspace.mounts(files.io if files.infile else None),
        scratch=files.scratch,
        stdout=files.stdout,
        stderr=files.stderr,
        limits=order.limits,
        pinned=order.pinned,
        heard=order.dump or order.keep,
    )


PLACEHOLDERS = {
    "{{INFILE}}": "EWMS_TASK_INFILE",
    "{{IN_FILE}}": "EWMS_TASK_INFILE",
    "{{OUTFILE}}": "EWMS_TASK_OUTFILE",
    "{{OUT_FILE}}": "EWMS_TASK_OUTFILE",
    "{{DATA_HUB}}": "EWMS_TASK_DATA_HUB_DIR",
    "{{DATAHUB}}": "EWMS_TASK_DATA_HUB_DIR",
}


def _filled_in(arg: str, names: Mapping[str, str]) -> str:
    for placeholder, name in PLACEHOLDERS.items():
        if name in names:
            arg = arg.replace(placeholder, names[name])
    return arg
