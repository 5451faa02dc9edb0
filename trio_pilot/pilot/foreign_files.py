"""Files of other users, which containers have made: made accessible by the engine that ran the containers."""

from pathlib import Path

import trio

from trio_pilot.errors import NodeError, map_exceptions
from trio_pilot.files import task_directory
from trio_pilot.files.filesystem import is_locked, locked_directories
from trio_pilot.files.task_directory import TaskFiles
from trio_pilot.processes import threads
from trio_pilot.runtimes import Engine

FETCHING_TIMEOUT = 60.0  # seconds to copy an output file of another user


async def open_directories(engine: Engine, image: str, root: Path) -> None:
    """Let this user empty all directories below `root`, one level of closed directories after the other.

    Raises:
        NodeError: the engine cannot do that.
    """
    opened: set[Path] = set()
    async with engine.open_foreign_files(image, root) as foreign:
        while locked := await threads.run_sync(locked_directories, root) - opened:
            await foreign.open_directories(sorted(locked))
            opened |= locked


async def fetch_outfile(engine: Engine, image: str, files: TaskFiles, max_size: int) -> None:
    """Replace an output file that this user may not read by a copy of this user's own.

    Raises:
        OutfileError: It is not a plain file, or has more than `max_size` bytes.
        NodeError: The engine does not send it in time, or it cannot be written.
    """
    copy = files.root / "outfile"
    text = f"the engine did not send the output file in {FETCHING_TIMEOUT:g} s"
    with map_exceptions({trio.TooSlowError: NodeError}, text), trio.fail_after(FETCHING_TIMEOUT):
        async with engine.open_foreign_files(image, files.root) as foreign:
            if is_locked(files.io):
                await foreign.open_directories([files.io])
            if task_directory.is_plain_outfile(files, max_size):
                await foreign.copy(files.outfile_path, copy)
                task_directory.replace_outfile(files, copy)
