"""Files of other users that containers have left, by an engine's archives: no program of an image is needed.

An engine packs and unpacks archives of a container's files with its own rights, directories of this machine included, also
of a container that is never started. Unpacking a directory that exists changes its mode, and nothing in it.
"""

import io
import shutil
import tarfile
from collections.abc import Collection
from contextlib import suppress
from pathlib import Path

import trio

from trio_pilot.errors import NodeError, map_exceptions
from trio_pilot.processes import threads
from trio_pilot.runtimes.engine_api import EngineApi
from trio_pilot.runtimes.engine_container import EngineContainer
from trio_pilot.runtimes.engine_dialect import SCRATCH

OPEN = 0o777


class EngineFiles:
    """The directory that is the scratch directory of a container."""

    def __init__(self, api: EngineApi, container: EngineContainer, root: Path) -> None:
        self._api = api
        self._path = f"/containers/{container.name}/archive"
        self._root = root

    async def open_directories(self, directories: Collection[Path]) -> None:
        """Let every user list and change some of the directories below the root.

        Raises:
            NodeError: the engine cannot do that.
        """
        names = [str(directory.relative_to(self._root)) for directory in directories]
        await self._api.call(f"PUT {self._path}", "open a directory", body=_archive(names), path=SCRATCH)

    async def copy(self, file: Path, destination: Path) -> None:
        """Copy a plain file below the root to a new file of this user.

        Raises:
            NodeError: the engine does not send it, or it cannot be written.
        """
        name, what = str(file.relative_to(self._root)), f"send the file {file.name}"
        archive = destination.with_name(f"{destination.name}.tar")
        path = f"{self._api.prefix}{self._path}"
        with map_exceptions({OSError: NodeError, tarfile.TarError: NodeError}, f"cannot copy {file}"):
            try:
                streaming = self._api.stream("GET", path, what, path=f"{SCRATCH}/{name}")
                async with streaming as pieces, await trio.open_file(archive, "xb") as written:
                    async for piece in pieces:
                        await written.write(piece)
                await threads.run_sync(_unpack, archive, destination)
            finally:
                with suppress(OSError):
                    archive.unlink(missing_ok=True)


def _archive(directories: Collection[str]) -> bytes:
    content = io.BytesIO()
    # Names may be any bytes, which this format keeps as they are.
    with tarfile.open(fileobj=content, mode="w", format=tarfile.GNU_FORMAT) as archive:
        for directory in directories:
            entry = tarfile.TarInfo(directory)
            entry.type, entry.mode = tarfile.DIRTYPE, OPEN
            archive.addfile(entry)
    return content.getvalue()


def _unpack(archive: Path, destination: Path) -> None:
    """Copy the only file of an archive."""
    with tarfile.open(archive) as opened:
        entry = opened.next()
        content = opened.extractfile(entry) if entry and entry.isreg() else None
        if content is None:
            raise NodeError(f"the engine sent no plain file for {destination.name}")
        with destination.open("xb") as file:
            shutil.copyfileobj(content, file)
