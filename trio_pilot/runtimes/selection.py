"""Which runtime it is to be."""

from collections.abc import AsyncIterator, Sequence
from contextlib import AbstractAsyncContextManager, asynccontextmanager
from dataclasses import dataclass
from importlib import import_module
from typing import Protocol, cast

from trio_pilot.errors import NodeError
from trio_pilot.files.filesystem import exists, is_directory
from trio_pilot.log import LOGGER
from trio_pilot.runtimes import OWN_ROOT, Options, Runtime

ENGINES = ("docker", "podman")
NAMES = (*ENGINES, "apptainer", "bubblewrap", "process")

NO_FILES = "only apptainer takes it, with _EWMS_PILOT_APPTAINER_IMAGE_DIRECTORY_MUST_BE_PRESENT=false"


class Family(Protocol):
    """A runtime's module."""

    async def fault(self, options: Options) -> str | None:
        """Say what keeps the runtime from working here, if anything does."""

    def open_runtime(self, options: Options) -> AbstractAsyncContextManager[Runtime]:
        """Open the runtime. Raises NodeError if it does not work here."""


@dataclass(frozen=True, slots=True)
class Choice:
    """A runtime that works, and what was wrong with those that were passed over for it."""

    name: str
    passed_over: Sequence[tuple[str, str]] = ()


async def choose(name: str, image: str, options: Options) -> Choice:
    """Choose the runtime of that name; `auto` is the first that works here and can have the image.

    Raises:
        NodeError: it does not work here, or none does.
    """
    passed_over: list[tuple[str, str]] = []
    for candidate in _candidates(image, options) if name == "auto" else [name]:
        fault = await _family(candidate).fault(options)
        if fault is None:
            return Choice(candidate, passed_over)
        passed_over.append((candidate, fault))
    faults = "; ".join(f"{candidate} does not work here: {fault}" for candidate, fault in passed_over)
    raise NodeError(faults if name != "auto" else f"no runtime works here for the image {image!r}: {faults or NO_FILES}")


def _candidates(image: str, options: Options) -> Sequence[str]:
    """List who may have the image: a tag for who can fetch it, a directory for who can run it; this machine is its own."""
    if image in OWN_ROOT:
        return ("bubblewrap", "process")
    if is_directory(image):
        return ("apptainer", "bubblewrap")
    if image.startswith(("/", "./", "../")) and not exists(image):
        raise NodeError(f"there is no image {image}: it must be an unpacked directory, /, or a tag")
    fetching = () if options.only_directories else ("apptainer",)
    return fetching if "://" in image or exists(image) else (*ENGINES, *fetching)


@asynccontextmanager
async def open_runtime(name: str, image: str, options: Options) -> AsyncIterator[Runtime]:
    """Open the runtime of that name, or with `auto` the first that works here.

    Raises:
        NodeError: it does not work here.
    """
    choice = await choose(name, image, options)
    if unheeded := unheeded_by(choice.name, options):
        LOGGER.warning("the runtime %s does not heed %s, which is for docker and podman", choice.name, unheeded)
    async with _family(choice.name).open_runtime(options) as runtime:
        yield runtime


def unheeded_by(name: str, options: Options) -> str:
    """Name the settings of containers' engines that are given to a runtime which is none."""
    given = {"--task-network": options.network, "--task-user": options.user, "--docker-shm-size": options.shm_size}
    return "" if name in ENGINES else ", ".join(flag for flag, value in given.items() if value)


def _family(name: str) -> Family:
    """Import a runtime's module: what it needs is not loaded for those who do not use it."""
    return cast(Family, import_module(f"trio_pilot.runtimes.{name}"))
