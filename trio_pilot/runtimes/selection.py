"""The selection of a runtime."""

from collections.abc import AsyncIterator, Callable, Sequence
from contextlib import AbstractAsyncContextManager, asynccontextmanager
from dataclasses import dataclass
from importlib import import_module
from typing import Protocol, cast

from trio_pilot.errors import NodeError
from trio_pilot.files.filesystem import exists, is_directory
from trio_pilot.log import LOGGER
from trio_pilot.runtimes import HOST_ROOT, NAMESPACES, Options, Runtime

ENGINES = ("docker", "podman")
NAMES = (*ENGINES, "apptainer", "bubblewrap", "process")

NO_FILES = "only apptainer takes it, with _EWMS_PILOT_APPTAINER_IMAGE_DIRECTORY_MUST_BE_PRESENT=false"


class Family(Protocol):
    """The module of a runtime."""

    async def fault(self, options: Options) -> str | None:
        """Return the reason why the runtime does not work here; None if it works."""

    def open_runtime(self, options: Options) -> AbstractAsyncContextManager[Runtime]:
        """Open the runtime. Raises NodeError if it does not work here."""


def import_family(name: str) -> Family:
    """Import the module of a runtime: only the dependencies of the runtime in use are loaded."""
    return cast(Family, import_module(f"trio_pilot.runtimes.{name}"))


Families = Callable[[str], Family]


@dataclass(frozen=True, slots=True)
class Choice:
    """A runtime that works, and the faults of those that were passed over for it."""

    name: str
    passed_over: Sequence[tuple[str, str]] = ()


async def choose(name: str, image: str, options: Options, families: Families = import_family) -> Choice:
    """Choose the runtime of a name; `auto` is the first that works here and can run the image.

    Raises:
        NodeError: it does not work here, or none does.
    """
    passed_over: list[tuple[str, str]] = []
    for candidate in _candidates(image, options) if name == "auto" else [name]:
        fault = await families(candidate).fault(options)
        if fault is None:
            return Choice(candidate, passed_over)
        passed_over.append((candidate, fault))
    faults = "; ".join(f"{candidate} does not work here: {fault}" for candidate, fault in passed_over)
    raise NodeError(faults if name != "auto" else f"no runtime works here for the image {image!r}: {faults or NO_FILES}")


def _candidates(image: str, options: Options) -> Sequence[str]:
    """List the runtimes that can run an image: this machine's root, a directory, a file, or a tag to pull."""
    if image in HOST_ROOT:
        return ("bubblewrap", "process")
    if is_directory(image):
        return ("bubblewrap", "apptainer")
    if image.startswith(("/", "./", "../")) and not exists(image):
        raise NodeError(f"there is no image {image}: it must be an unpacked directory, /, or a tag")
    unpacking = () if options.only_directories else ("apptainer",)
    return unpacking if "://" in image or exists(image) else (*ENGINES, *unpacking)


@asynccontextmanager
async def open_runtime(
    name: str, image: str, options: Options, families: Families = import_family
) -> AsyncIterator[Runtime]:
    """Open the runtime of a name, or with `auto` the first that works here.

    Raises:
        NodeError: it does not work here.
    """
    choice = await choose(name, image, options, families)
    if ignored := ignored_options(choice.name, options):
        LOGGER.warning("the runtime %s ignores %s: only docker and podman use it", choice.name, ignored)
    async with families(choice.name).open_runtime(options) as runtime:
        yield runtime


def ignored_options(name: str, options: Options) -> str:
    """Return the flags that are set, but are for container engines only, if the runtime is not one."""
    given = {
        "--task-network": options.has_network and options.network,
        "--task-user": options.user,
        "--docker-shm-size": options.shm_size,
        "--task-privileges": options.privileges - {NAMESPACES},
    }
    return "" if name in ENGINES else ", ".join(flag for flag, value in given.items() if value)
