"""Containers run by a daemon: what docker and podman have in common.

A container has its name and labels from its creation on: whatever happens to the pilot or to an answer, it can be found.
"""

import os
import re
import socket
import struct
import uuid
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager, suppress
from dataclasses import replace
from pathlib import Path

import trio

from trio_pilot.errors import ContainerLostError, NodeError, map_exceptions
from trio_pilot.files.data_directory import root_in
from trio_pilot.files.task_logs import open_log
from trio_pilot.log import LOGGER
from trio_pilot.runtimes import Container, Exit, Options, cannot_run, no_command
from trio_pilot.runtimes.engine_api import EngineApi, EngineRefusedError
from trio_pilot.runtimes.engine_container import EngineContainer
from trio_pilot.runtimes.engine_dialect import CreateRequest, Dialect, Spec
from trio_pilot.runtimes.engine_files import EngineFiles
from trio_pilot.runtimes.engine_images import find_image, image_config, ready_image
from trio_pilot.runtimes.engine_mounts import EngineMounts
from trio_pilot.runtimes.engine_outages import EngineOutages
from trio_pilot.runtimes.engine_registry_login import login_files
from trio_pilot.runtimes.engine_timeouts import DEFAULT_TIMEOUTS, EngineTimeouts
from trio_pilot.runtimes.hidden_paths import HiddenPaths

MOST_REMOVALS = 8  # containers that are removed in the background, while the next tasks run; a task waits for more

KILLED = 137  # the exit code of a process that SIGKILL ended

# What the engine's init writes if it cannot execute the command: tini, which is docker's, and catatonit, which is podman's.
INIT_ERROR = re.compile(
    rb"(?:\[FATAL tini \(\d+\)\] exec .* failed|ERROR \(catatonit:\d+\): failed to exec pid1): (?P<reason>[^\n]*)\n",
    re.DOTALL,
)
LONGEST_INIT_ERROR = 2**18  # bytes: it contains the command
INIT_CODES = (1, 126, 127)


def socket_of(dialect: Dialect) -> Path:
    """Return the engine's socket. Raises NodeError if the environment names something else than a Unix socket."""
    address = os.environ.get(dialect.variable)
    if not address:
        return dialect.socket()
    scheme, _, path = address.partition("://")
    if scheme != "unix" or not path.startswith("/"):
        raise NodeError(f"{dialect.variable} must be unix:// and the path of a socket, not {address!r}")
    return Path(path)


async def fault_of(dialect: Dialect) -> str | None:
    """Return the reason why an engine does not work here; None if it works."""
    try:
        async with EngineApi(dialect.name, socket_of(dialect)) as api:
            await _choose_version(api, dialect)
    except NodeError as error:
        return str(error)
    return None


async def _choose_version(api: EngineApi, dialect: Dialect) -> Dialect:
    """Choose the version of the API; return the dialect of the engine that answers.

    Raises:
        NodeError: the engine does not answer, or is too old.
    """
    try:
        headers = await api.ping()
        found = dialect.stand_in(headers) or dialect
        api.name, api.prefix = found.name, found.prefix(headers)
    except NodeError as error:
        raise NodeError(f"{error}: {dialect.advice}") from error
    return found


@asynccontextmanager
async def open_engine(
    dialect: Dialect, options: Options, timeouts: EngineTimeouts = DEFAULT_TIMEOUTS
) -> AsyncIterator["EngineRuntime"]:
    """Open a runtime. When it is closed, it tries for the last time to remove the containers that it could not remove.

    Raises:
        NodeError: the engine does not answer.
    """
    async with EngineApi(dialect.name, socket_of(dialect), timeouts) as api:
        found = await _choose_version(api, dialect)
        if found is not dialect:
            LOGGER.info(
                "%s listens at %s, the socket of %s: containers are run as by %s",
                found.name,
                api.socket,
                dialect.name,
                found.name,
            )
        async with trio.open_nursery() as nursery:
            outages = EngineOutages(api, options.engine_patience)
            if found.ends_its_containers:
                nursery.start_soon(outages.restarts.watch)
            try:
                yield EngineRuntime(outages, found, options, nursery, _user_of(api.socket))
            finally:
                nursery.cancel_scope.cancel()


def _user_of(engine: Path) -> tuple[int, int]:
    """Return the user id and the group id of the process that listens at a socket; root's if they cannot be found."""
    with suppress(OSError), socket.socket(socket.AF_UNIX) as connection:
        connection.connect(str(engine))
        _, user, group = struct.unpack("3i", connection.getsockopt(socket.SOL_SOCKET, socket.SO_PEERCRED, 12))
        return user, group
    return 0, 0


class EngineRuntime:
    """Runs containers at an engine."""

    has_mounts = True
    image_directory: Path | None = None

    def __init__(
        self,
        outages: EngineOutages,
        dialect: Dialect,
        options: Options,
        nursery: trio.Nursery,
        engine_user: tuple[int, int] = (0, 0),
    ) -> None:
        self.name = dialect.name
        self._user, self.group = engine_user
        self.passes_closed_directories = self._user in (0, os.geteuid())
        self._mounts = EngineMounts(dialect, self._user)
        self._hidden = HiddenPaths([*options.hidden, *login_files()], root_in(options.data_parent))
        self.engine: Path | None = outages.api.socket
        self.has_unremoved_containers = False
        self._outages = outages
        self._timeouts = outages.api.timeouts
        self._dialect = dialect
        self._options = options
        self._background = nursery  # removes the containers that their tasks do not remove
        self._removing: set[EngineContainer] = set()
        self._image_ids: dict[str, str] = {}
        self._preparing = trio.Lock()

    async def prepare(self, image: str, *, has_args: bool = True) -> None:
        """Find the image, or pull it. From then on it is this one, even if its name comes to mean another.

        If the image is removed from the engine, the one that has the name then takes its place.
        """
        await self._prepare(image, self._image_ids.get(image))
        if not has_args:
            config = await image_config(self._outages, self._image_ids[image])
            if not (config.get("Entrypoint") or config.get("Cmd")):
                raise no_command(image)

    async def has_entrypoint(self, image: str) -> bool:
        """Return whether an image has an entrypoint."""
        return bool((await image_config(self._outages, self._image_ids[image])).get("Entrypoint"))

    async def _prepare(self, image: str, last: str | None) -> None:
        """Find or pull an image, unless its id is not `last` any more: several tasks may find at once that it is gone."""
        async with self._preparing:
            if self._image_ids.get(image) == last:
                self._image_ids[image] = await ready_image(self._outages, self._dialect, image)

    async def run(self, container: Container) -> Exit:
        """Run a container to its end; on every way out it is stopped and removed.

        One that has succeeded may exist for a moment more, with no process in it. One that has failed is gone, with all the
        disk space that it may have filled, before the pilot checks the node.
        """
        await trio.lowlevel.checkpoint_if_cancelled()
        with map_exceptions({OSError: NodeError}, "cannot write what a container says"):
            for path in (container.stdout, container.stderr):
                open_log(path).close()
            if container.image not in self._image_ids:
                await self._prepare(container.image, None)
            at_engine = EngineContainer(self._outages, self._dialect, container)
            try:
                await self._outages.wait_if_away()
                ended = await self._create_and_run(at_engine, container)
            except NodeError:
                await self._remove(at_engine)
                raise
            except BaseException:  # above all Cancelled
                await self._remove_cancelled(at_engine)
                raise
            if ended == Exit(0) and len(self._removing) < MOST_REMOVALS:
                self._removing.add(at_engine)
                self._background.start_soon(self._remove, at_engine)
            else:
                await self._remove(at_engine)
            return ended

    async def _create_and_run(self, at_engine: EngineContainer, container: Container) -> Exit:
        """Create and run the container; once more, if the engine refused a mount that another kind can replace."""
        mounted = replace(container, mounts=self._mounts.of(container.mounts))
        await self._create(at_engine, mounted)
        try:
            return await self._run_created(at_engine, container)
        except EngineRefusedError as error:
            if not self._mounts.note_refusal(error.message, mounted.mounts):
                raise
        await at_engine.remove(0)
        return await self._create_and_run(at_engine, container)

    @asynccontextmanager
    async def open_foreign_files(self, image: str, root: Path) -> AsyncIterator[EngineFiles]:
        """Open a directory of this machine with the engine's rights, by a container that is never started.

        Raises:
            NodeError: the engine does not have the image, or fails.
        """
        nothing = Path(os.devnull)
        container = Container(f"files-{uuid.uuid4()}", image, ("true",), {}, (), root, nothing, nothing)
        if image not in self._image_ids:
            await self._prepare(image, None)
        at_engine = EngineContainer(self._outages, self._dialect, container)
        try:
            await self._create(at_engine, container)
            yield EngineFiles(self._outages.api, at_engine, root)
        finally:
            await self._remove(at_engine)

    async def _create(self, at_engine: EngineContainer, container: Container) -> None:
        """Create the container; if its image was removed since it was prepared, find or pull it again, once."""
        image = self._image_ids[container.image]
        try:
            await at_engine.create(self._spec(at_engine, container))
        except EngineRefusedError as error:
            if await find_image(self._outages, image):
                raise
            LOGGER.warning("%s; looking for %s again", error, container.image)
            await self._prepare(container.image, image)
            await at_engine.create(self._spec(at_engine, container))

    def _spec(self, at_engine: EngineContainer, container: Container) -> Spec:
        image = self._image_ids[container.image]
        hidden = self._hidden.seen_through(container.mounts)
        return self._dialect.spec(CreateRequest(container, at_engine.name, image, self._options, hidden))

    async def _run_created(self, at_engine: EngineContainer, container: Container) -> Exit:
        code = await at_engine.run()
        if not code and not container.needs_logs:
            return Exit(0)
        try:
            with trio.fail_after(self._timeouts.fetch_logs):
                await self._outages.retry(at_engine.fetch_logs)
            return await self._exit(at_engine, container, code) if code else Exit(0)
        except (NodeError, trio.TooSlowError) as error:
            LOGGER.warning("stdout and stderr of the container %s are lost: %s", at_engine.name, error)
            return Exit(code)

    async def _exit(self, at_engine: EngineContainer, container: Container, code: int) -> Exit:
        """Return how a container that has failed ended."""
        state = await at_engine.state()
        if state is None:
            return Exit(code)
        if code in INIT_CODES and (reason := _init_error(container)):
            # In the words of a shell. Where podman's init is the program, the command is its argument, after a --.
            words = state.command
            line = f"{words[words.index('--') + 1] if words[1:2] == ('--',) else words[0]}: {reason}"
            with open_log(container.stderr) as stderr:
                stderr.write(os.fsencode(f"{line}\n"))
            return cannot_run(line)
        is_suspect = code == KILLED and container.limits.memory is not None and not self._dialect.reports_out_of_memory
        return Exit(code, out_of_memory=state.is_out_of_memory or is_suspect)

    async def _remove_cancelled(self, at_engine: EngineContainer) -> None:
        """Remove a container whose task was cancelled, and check meanwhile whether the engine had delayed its end.

        Raises:
            ContainerLostError: the engine was or is away, and may have delayed it.
        """
        was_away, is_silent = self._outages.is_away, True

        async def check() -> None:
            nonlocal is_silent
            is_silent = await self._outages.is_silent()

        with trio.CancelScope(shield=True):  # both have deadlines
            async with trio.open_nursery() as nursery:
                nursery.start_soon(check)
                if not await self._remove(at_engine):
                    nursery.cancel_scope.cancel()
        if was_away or is_silent:
            raise ContainerLostError(
                f"{self.name} was away: the container {at_engine.name} may not have had its time"
            ) from None

    async def _remove(self, at_engine: EngineContainer) -> bool:
        """Remove a container, and return whether it is gone; if not, go on in the background."""
        grace = self._options.kill_grace
        with trio.move_on_after(grace + self._timeouts.removal, shield=True) as deadline:
            await at_engine.remove(grace)
        self._removing.discard(at_engine)
        if deadline.cancelled_caught:
            LOGGER.warning("the container %s was not removed in time; trying again in the background", at_engine.name)
            self._background.start_soon(self._remove_at_last, at_engine)
        return not deadline.cancelled_caught

    async def _remove_at_last(self, at_engine: EngineContainer) -> None:
        try:
            await at_engine.remove(0)
        except trio.Cancelled:
            with trio.move_on_after(self._timeouts.last_removal, shield=True) as deadline:
                await at_engine.remove(0)
            if deadline.cancelled_caught:
                self.has_unremoved_containers = True
                LOGGER.error("the container %s is left to the guardian: %s could not remove it", at_engine.name, self.name)
            raise


def _init_error(container: Container) -> str | None:
    """Return the reason why the engine's init could not execute the command, if nothing else was written."""
    if container.stdout.stat().st_size or container.stderr.stat().st_size > LONGEST_INIT_ERROR:
        return None
    found = INIT_ERROR.fullmatch(container.stderr.read_bytes())
    return found["reason"].decode(errors="replace") if found else None
