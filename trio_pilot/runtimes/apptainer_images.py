"""Images for apptainer: directories as they are, files that it can mount, and all others unpacked once.

Unpacked images are in a directory of this user's own below the build directory, each under the hash of its source. They stay
there for the next pilots, until a person removes them. Several pilots may need the same one at once: the one that holds the
lock unpacks it, under another name until it is complete.
"""

import hashlib
import os
import re
import uuid
from collections.abc import AsyncIterator, Mapping, Sequence
from contextlib import ExitStack, asynccontextmanager
from dataclasses import dataclass, field, replace
from pathlib import Path

import trio

from trio_pilot.cleanup.image_builds import UNFINISHED, is_own, open_lock, remove_unfinished, try_to_lock
from trio_pilot.errors import NodeError, map_exceptions
from trio_pilot.files.data_directory import open_temporary
from trio_pilot.files.filesystem import exists, is_file, remove_tree
from trio_pilot.log import LOGGER
from trio_pilot.processes import threads
from trio_pilot.runtimes import APPTAINER_BUILD, APPTAINER_IMAGE, HOST_ROOT, Options
from trio_pilot.runtimes.apptainer_command import Apptainer, environment
from trio_pilot.runtimes.apptainer_directory import (
    Runscript,
    is_runscript,
    mended_environment,
    runscript_of,
)

# The sources of an image other than a file: apptainer-build(1).
SOURCES = ("docker", "docker-archive", "docker-daemon", "oci", "oci-archive", "oras", "library", "shub", "http", "https")

# The variables of the pilot's environment that a build may need: credentials, proxies, caches and directories.
FOR_BUILDING = re.compile(
    r"(APPTAINER|SINGULARITY|DOCKER|XDG|SSL)_.*|(http|https|no|all)_proxy|PATH|HOME|USER|LOGNAME|REGISTRY_AUTH_FILE",
    re.IGNORECASE,
)

UNKNOWN = "image format not recognized"

PROBE = "/.trio-pilot-probe"  # a command that no image has: the error that it is missing shows that the container was made
PROBE_TIMEOUT = 60.0  # seconds for a container of the probe
LOCK_INTERVAL = 0.2  # seconds between two attempts to take a lock that another pilot holds
TIDY_TIMEOUT = 60.0  # seconds to remove an unfinished image


@dataclass(frozen=True, slots=True)
class Image:
    """An image that is ready, and apptainer's action to run a command in it."""

    path: str
    # `exec` runs the command itself, `run` the image's runscript with it, which is what a Docker entrypoint becomes.
    action: str = "exec"
    runscript: Runscript = field(default_factory=Runscript)
    environment: Path | None = None  # a file to mount instead of the script of its variables


class Images:
    """Prepares images, each once."""

    def __init__(self, apptainer: Apptainer, options: Options, stack: ExitStack) -> None:
        self._apptainer = apptainer
        self._stack = stack
        self._options = options
        self.directory = options.build_directory.absolute() / f"trio-pilot-images-{os.geteuid()}"
        self._ready: dict[str, Image] = {}
        self._lock = trio.Lock()

    async def ready(self, name: str) -> Image:
        """Prepare an image. Raises NodeError if it is not there, or is not an image."""
        if name not in self._ready:
            async with self._lock:
                if name not in self._ready:
                    self._ready[name] = await self._prepare(name)
        return self._ready[name]

    async def _prepare(self, name: str) -> Image:
        if name in HOST_ROOT:
            raise NodeError(f"apptainer takes no {name or 'empty name'!r} as an image: name one, or choose another runtime")
        fault = await threads.run_sync(_directory_fault, name)
        if fault is None:
            return await self._directory(name)
        if self._options.only_directories:
            raise NodeError(
                f"the image {name} must be an unpacked directory: {fault}"
                f" (or allow other images: {APPTAINER_IMAGE[0]}=false, --no-apptainer-image-directory-must-be-present)"
            )
        if name.partition(":")[0] in SOURCES:
            return await self._unpacked(name)
        return await self._file(name)

    async def _directory(self, name: str) -> Image:
        image = await threads.run_sync(_directory, name)
        reason = await self._cannot_run(Path(image.path))
        if reason:
            raise NodeError(f"apptainer can make no container of the image {name}: {reason}")
        environment = await threads.run_sync(mended_environment, Path(image.path))
        return replace(image, environment=self._written(environment)) if environment else image

    def _written(self, environment: str) -> Path:
        file = self._stack.enter_context(open_temporary(self._options.data_parent)) / "environment.sh"
        with map_exceptions({OSError: NodeError}, f"cannot write {file}"):
            file.write_text(environment, "utf-8", "surrogateescape")
        return file

    async def _file(self, name: str) -> Image:
        path = Path(await trio.Path(name).absolute())
        if not await threads.run_sync(is_file, path):
            raise NodeError(f"the image {name} is neither a directory nor a file; of a registry it would be docker://{name}")
        reason = await self._cannot_run(path)
        if reason is None:
            result = await self._apptainer.run(["--silent", "inspect", "--runscript", str(path)], environment())
            return _image(path, result.text if result.code == 0 else "")
        if UNKNOWN in reason:  # a build would take it for a definition file, and execute it
            raise NodeError(f"the image {name} is of no format that apptainer knows: {reason}")
        LOGGER.info("image %s: being unpacked, because it cannot be mounted here: %s", name, reason)
        return await self._unpacked(str(path))

    async def _cannot_run(self, path: Path) -> str | None:
        with trio.move_on_after(PROBE_TIMEOUT):
            return await probe(self._apptainer, path)
        return f"it has not started in {PROBE_TIMEOUT:g} s"

    async def _unpacked(self, source: str) -> Image:
        parent = self.directory
        with map_exceptions({OSError: NodeError}, f"cannot unpack images below {parent} (see {APPTAINER_BUILD[0]})"):
            await threads.run_sync(_make_own, parent)
            key = await threads.run_sync(_key, source)
            finished = parent / key
            async with _locked(parent, key, source) as lock:
                if await trio.Path(finished).exists():
                    LOGGER.info("image %s: using %s, where it was unpacked before", source, finished)
                else:
                    await self._build(source, finished, lock)
            return await self._directory(str(finished))

    async def _build(self, source: str, finished: Path, lock: int) -> None:
        unfinished = finished.with_name(f"{finished.name}{UNFINISHED}{uuid.uuid4().hex}")
        LOGGER.info("image %s: being unpacked to %s", source, finished)
        begun = trio.current_time()
        try:
            await threads.run_sync(remove_unfinished, finished.parent, finished.name)
            (unfinished / "tmp").mkdir(parents=True)
            root = unfinished / "root"
            env = {**_environment(os.environ), "APPTAINER_TMPDIR": str(unfinished / "tmp")}
            # Apptainer inherits the lock: it may outlive the pilot.
            result = await self._apptainer.run([*_build(env), "--sandbox", str(root), source], env, [lock])
            if result.code:
                raise NodeError(f"cannot unpack the image {source}: {result.reason}")
            root.rename(finished)
        finally:
            with trio.move_on_after(TIDY_TIMEOUT, shield=True):
                await threads.run_sync(remove_tree, unfinished)
        LOGGER.info("image %s: unpacked in %.1f s", source, trio.current_time() - begun)


async def probe(apptainer: Apptainer, image: Path, flags: Sequence[str] = ()) -> str | None:
    """Return the reason why no container can be made of an image, with some flags; None if one can."""
    args = ["--silent", "exec", "--containall", "--no-eval", "--no-privs", "--no-home", "--pwd", "/"]
    result = await apptainer.run([*args, *flags, str(image), PROBE], environment())
    return None if PROBE in result.reason else result.reason


def _directory_fault(name: str) -> str | None:
    try:
        os.scandir(name or "").close()
    except OSError as error:
        return str(error.strerror)
    return None


def _directory(name: str) -> Image:
    path = Path(name).absolute()
    return _image(path, runscript_of(path))


def _image(path: Path, runscript: str) -> Image:
    return Image(str(path), "run" if is_runscript(runscript) else "exec", Runscript.parse(runscript))


def _make_own(directory: Path) -> None:
    """Make the directory of images, or check that no other user can have put images into it."""
    directory.mkdir(mode=0o700, parents=True, exist_ok=True)
    if not is_own(directory):
        raise NodeError(f"{directory} must be a directory of this user, which no other can write to: remove it")


def _key(source: str) -> str:
    """Return the hash of a source; of a file also its path, size and time of change."""
    facts = [source]
    file = Path(source.partition(":")[2] if source.partition(":")[0] in SOURCES else source)
    if exists(file):
        status = file.stat()
        facts += [str(file.absolute()), str(status.st_size), str(status.st_mtime_ns)]
    return hashlib.sha256(os.fsencode("\0".join(facts))).hexdigest()[:32]


@asynccontextmanager
async def _locked(images: Path, key: str, source: str) -> AsyncIterator[int]:
    """Hold the lock of an image; if another pilot holds it, wait without a time limit."""
    lock = open_lock(images, key)
    try:
        if not try_to_lock(lock):
            LOGGER.info("image %s: another pilot is unpacking it", source)
            while not try_to_lock(lock):  # noqa: ASYNC110 -- another process sends no event
                await trio.sleep(LOCK_INTERVAL)
        yield lock
    finally:
        os.close(lock)


def _build(env: Mapping[str, str]) -> list[str]:
    """Return the build command: it keeps nothing but the image, unless the user has named a cache directory."""
    return ["build", "--fix-perms", *([] if "APPTAINER_CACHEDIR" in env else ["--disable-cache"])]


def _environment(environ: Mapping[str, str]) -> dict[str, str]:
    return {name: value for name, value in environ.items() if FOR_BUILDING.fullmatch(name)}
