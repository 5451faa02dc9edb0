"""Containers that a daemon keeps: what docker and podman have in common.

A container is named and labelled before it is made: whatever happens to us or to the answer, it can be found.
"""

import os
import re
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from pathlib import Path

import trio

from trio_pilot.errors import ContainerLostError, NodeError, map_exceptions
from trio_pilot.files.task_logs import open_log
from trio_pilot.log import LOGGER
from trio_pilot.runtimes import Container, Exit, Options, cannot_run
from trio_pilot.runtimes.engine_api import EngineApi, EngineRefusedError
from trio_pilot.runtimes.engine_container import FETCH_TIMEOUT, EngineContainer
from trio_pilot.runtimes.engine_dialect import CreateRequest, Dialect, Spec
from trio_pilot.runtimes.engine_images import find_image, ready_image
from trio_pilot.runtimes.engine_outages import EngineOutages

END_TIMEOUT = 10.0  # seconds to end and remove a container, beside its grace; then it is tried in the background
MOST_BEHIND = 8  # containers that are removed beside the next tasks; more are waited for
LAST_TIMEOUT = 3.0  # seconds to try it for the last time, as the runtime closes; after us comes the guardian

KILLED = 137  # the exit code of what died of SIGKILL

# What the engines' init says if it cannot run the command: tini, which is docker's, and catatonit, which is podman's.
INIT_SAYS = re.compile(
    rb"(?:\[FATAL tini \(\d+\)\] exec .* failed|ERROR \(catatonit:\d+\): failed to exec pid1): (?P<reason>[^\n]*)\n",
    re.DOTALL,
)
INIT_SAYS_AT_MOST = 2**18  # bytes: it names the command
INIT_CODES = (1, 126, 127)


def socket_of(dialect: Dialect) -> Path:
    """Tell where the engine's socket is. Raises NodeError if it is no Unix socket."""
    said = os.environ.get(dialect.variable)
    if not said:
        return dialect.socket()
    scheme, _, path = said.partition("://")
    if scheme != "unix" or not path.startswith("/"):
        raise NodeError(f"{dialect.variable} must be unix:// and the path of a socket, not {said!r}")
    return Path(path)


async def fault_of(dialect: Dialect) -> str | None:
    """Say what keeps an engine from working here, if anything does."""
    try:
        async with EngineApi(dialect.name, socket_of(dialect)) as api:
            await _open(api, dialect)
    except NodeError as error:
        return str(error)
    return None


async def _open(api: EngineApi, dialect: Dialect) -> None:
    """Agree on a version of the API. Raises NodeError if there is nobody to agree with."""
    try:
        api.prefix = dialect.prefix(await api.ping())
    except NodeError as error:
        raise NodeError(f"{error}: {dialect.cure}") from error


@asynccontextmanager
async def open_engine(dialect: Dialect, options: Options) -> AsyncIterator["EngineRuntime"]:
    """Open a runtime. At the end it tries for the last time to remove what it could not.

    Raises:
        NodeError: the engine does not answer.
    """
    async with EngineApi(dialect.name, socket_of(dialect)) as api:
        await _open(api, dialect)
        async with trio.open_nursery() as nursery:
            link = EngineOutages(api, options.engine_patience)
            if dialect.ends_its_containers:
                nursery.start_soon(link.witness.watch)
            try:
                yield EngineRuntime(link, dialect, options, nursery)
            finally:
                nursery.cancel_scope.cancel()


class EngineRuntime:
    """Runs containers at an engine."""

    mounts = True
    images: Path | None = None

    def __init__(self, link: EngineOutages, dialect: Dialect, options: Options, nursery: trio.Nursery) -> None:
        self.name = dialect.name
        self.engine: Path | None = link.api.socket
        self.leaves_some = False
        self._link = link
        self._dialect = dialect
        self._options = options
        self._nursery = nursery  # removes what is not removed by the tasks
        self._behind: set[EngineContainer] = set()
        self._images: dict[str, str] = {}
        self._preparing = trio.Lock()

    async def prepare(self, image: str) -> None:
        """Have the image, which is pulled if it is not there. From then on it is this one, whatever becomes of its name.

        If somebody removes it, what has the name then takes its place.
        """
        await self._prepare(image, self._images.get(image))

    async def _prepare(self, image: str, last: str | None) -> None:
        """Have the image, unless another than the last one is here by now: many tasks may find at once that it is gone."""
        async with self._preparing:
            if self._images.get(image) == last:
                self._images[image] = await ready_image(self._link, self._dialect, image)

    async def run(self, container: Container) -> Exit:
        """Run a container to its end; on every way out it is stopped and removed.

        One that has succeeded may be there for a moment more, with nothing running in it. One that has failed is gone when
        the node is looked at, with all that it may have filled the disk with.
        """
        await trio.lowlevel.checkpoint_if_cancelled()
        with map_exceptions({OSError: NodeError}, "cannot write what a container says"):
            for path in (container.stdout, container.stderr):
                open_log(path).close()
            if container.image not in self._images:
                await self._prepare(container.image, None)
            ours = EngineContainer(self._link, self._dialect, container)
            ended = await self._run(ours, container)
            if ended == Exit(0) and len(self._behind) < MOST_BEHIND:
                self._behind.add(ours)
                self._nursery.start_soon(self._end, ours)
            else:
                await self._end(ours)
            return ended

    async def _run(self, ours: EngineContainer, container: Container) -> Exit:
        try:
            await self._link.ready()
            await self._create(ours, container)
            return await self._live(ours, container)
        except NodeError:
            await self._end(ours)
            raise
        except BaseException:  # above all to be cancelled
            await self._end_early(ours)
            raise

    async def _create(self, ours: EngineContainer, container: Container) -> None:
        """Have the container made; if its image has been removed since it was prepared, it is got again, once."""
        image = self._images[container.image]
        try:
            await ours.create(self._spec(ours, container))
        except EngineRefusedError as error:
            if await find_image(self._link, image):
                raise
            LOGGER.warning("%s; looking for %s again", error, container.image)
            await self._prepare(container.image, image)
            await ours.create(self._spec(ours, container))

    def _spec(self, ours: EngineContainer, container: Container) -> Spec:
        return self._dialect.spec(CreateRequest(container, ours.name, self._images[container.image], self._options))

    async def _live(self, ours: EngineContainer, container: Container) -> Exit:
        code = await ours.live()
        if not code and not container.heard:
            return Exit(0)
        try:
            with trio.fail_after(FETCH_TIMEOUT):
                await self._link.persist(ours.fetch)
            return await self._exit(ours, container, code) if code else Exit(0)
        except (NodeError, trio.TooSlowError) as error:
            LOGGER.warning("what the container %s has said is lost: %s", ours.name, error)
            return Exit(code)

    async def _exit(self, ours: EngineContainer, container: Container, code: int) -> Exit:
        """Find out why a container has failed."""
        facts = await ours.facts()
        if facts is None:
            return Exit(code)
        if code in INIT_CODES and (reason := _refusal(container)):
            # As any shell would say it. Where podman's init is the program, the command is its argument, behind a --.
            words = facts.words
            line = f"{words[words.index('--') + 1] if words[1:2] == ('--',) else words[0]}: {reason}"
            with open_log(container.stderr) as stderr:
                stderr.write(os.fsencode(f"{line}\n"))
            return cannot_run(line)
        is_suspect = code == KILLED and container.limits.memory is not None and not self._dialect.tells_of_memory
        return Exit(code, out_of_memory=facts.is_out_of_memory or is_suspect)

    async def _end_early(self, ours: EngineContainer) -> None:
        """End it, and look meanwhile whether it was the engine that has kept it from its end.

        Raises:
            ContainerLostError: so it may be.
        """
        was_lost, is_silent = self._link.is_lost, True

        async def look() -> None:
            nonlocal is_silent
            is_silent = await self._link.is_silent()

        with trio.CancelScope(shield=True):  # both have deadlines
            async with trio.open_nursery() as nursery:
                nursery.start_soon(look)
                if not await self._end(ours):
                    nursery.cancel_scope.cancel()
        if was_lost or is_silent:
            raise ContainerLostError(f"{self.name} was away: the container {ours.name} may not have had its time") from None

    async def _end(self, ours: EngineContainer) -> bool:
        """End it, and tell whether it is gone; if not, that is tried in the background."""
        with trio.move_on_after(self._options.kill_grace + END_TIMEOUT, shield=True) as patience:
            await ours.end(self._options.kill_grace)
        self._behind.discard(ours)
        if patience.cancelled_caught:
            LOGGER.warning("the container %s is not gone in time; it is tried again", ours.name)
            self._nursery.start_soon(self._end_at_last, ours)
        return not patience.cancelled_caught

    async def _end_at_last(self, ours: EngineContainer) -> None:
        try:
            await ours.end(0)
        except trio.Cancelled:
            with trio.move_on_after(LAST_TIMEOUT, shield=True) as last:
                await ours.end(0)
            if last.cancelled_caught:
                self.leaves_some = True
                LOGGER.error("the container %s is left to the guardian: %s could not remove it", ours.name, self.name)
            raise


def _refusal(container: Container) -> str | None:
    """Give the reason for which the engine's init could not run the command, if that is all that was ever said."""
    if container.stdout.stat().st_size or container.stderr.stat().st_size > INIT_SAYS_AT_MOST:
        return None
    found = INIT_SAYS.fullmatch(container.stderr.read_bytes())
    return found["reason"].decode(errors="replace") if found else None
