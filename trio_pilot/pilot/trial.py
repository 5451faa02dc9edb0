"""Trial containers: like those of tasks, with a shell that tries what a task will need instead of the task's command."""

from collections.abc import Sequence
from contextlib import suppress
from dataclasses import replace
from functools import partial
from pathlib import Path

import trio

from trio_pilot.errors import NodeError
from trio_pilot.files import task_directory
from trio_pilot.files.blocking_calls import BlockingCalls
from trio_pilot.files.error_summary import error_summary, without_words
from trio_pilot.pilot.container_runs import PROBE_TIMEOUT, RunSpec, Tools, container_for, remove, task_files
from trio_pilot.processes import threads
from trio_pilot.runtimes import NOT_FOUND_REASONS, Container
from trio_pilot.settings import Settings

SHELL = "/bin/sh"

# Each line that it writes is a fault. What a shell cannot open may end it, hence the parentheses.
FILES = """
attempt() { reason=$( ("$2" "$3") 2>&1 ) || printf '%s: %s\\n' "$1" "$reason"; }
read_file() { : < "$1"; }
write_file() { : > "$1"; }
read_directory() { cd "$1" && for file in *; do return 0; done; }
if [ -n "${EWMS_TASK_INFILE-}" ]; then
    attempt "cannot read its input file" read_file "$EWMS_TASK_INFILE"
    attempt "cannot write its output file" write_file "$EWMS_TASK_OUTFILE"
fi
[ -z "$1" ] || attempt "cannot write to its data hub" write_file "$EWMS_TASK_DATA_HUB_DIR/$1"
shift
for directory; do attempt "cannot enter the external directory $directory" read_directory "$directory"; done
"""
COMMAND = 'command -v -- "$1" || :'

NO_SHELL = f"it has no {SHELL} to try more with"


async def try_files(tools: Tools, settings: Settings, spec: RunSpec) -> str:
    """Let a container read and write the files and directories that are mounted in it; return what worked.

    Raises:
        NodeError: it could not be started, or could not read or write something.
    """
    mark = f".trial-{tools.data_directory.new_name()}"
    external = map(str, tools.data_directory.external)
    try:
        faults = await _lines(tools, settings, spec, [FILES, "trial", "" if spec.reads_hub else mark, *external])
    finally:
        await threads.run_sync(_remove_mark, tools.data_directory.data_hub / mark)
    if faults:
        raise NodeError(f"a container like that of a task {'; '.join(faults)}")
    return NO_SHELL if faults is None else "its files can be read and written"


async def find_command(tools: Tools, settings: Settings, spec: RunSpec) -> str | None:
    """Return where a container finds the command of a spec, as a shell reports it; empty: nowhere; None: it has no shell.

    Raises:
        NodeError: it could not be started.
    """
    lines = await _lines(tools, settings, spec, [COMMAND, "trial", spec.args[0]])
    return None if lines is None else "\n".join(lines)


async def _lines(tools: Tools, settings: Settings, spec: RunSpec, script: Sequence[str]) -> list[str] | None:
    """Run a script in a container like that of a task; return the lines that it writes, or None if there is no shell."""
    files, disk = task_files(tools, settings), BlockingCalls()
    try:
        await disk.call(0, tools.make, files)
        await disk.call(0, partial(task_directory.write_infile, any_user=tools.any_user), files, "")
        container = container_for(tools, replace(spec, args=()), files)
        return await _run(tools, replace(container, args=(SHELL, "-c", *script), without_entrypoint=True, needs_logs=True))
    finally:
        await remove(tools, disk, files, spec.image)


async def _run(tools: Tools, container: Container) -> list[str] | None:
    with trio.move_on_after(PROBE_TIMEOUT):
        ended = await tools.runtime.run(container)
        if ended.out_of_memory:
            raise NodeError(f"a container is out of memory with no more than {SHELL} in it")
        if ended.code:
            reason = error_summary(container.stderr) or without_words(ended.code)
            if reason.endswith(NOT_FOUND_REASONS):
                return None
            raise NodeError(f"`{SHELL}` in a container fails (exit code {ended.code}): {reason}")
        return container.stdout.read_text(errors="replace").splitlines()
    raise NodeError(f"`{SHELL}` in a container takes more than {PROBE_TIMEOUT:g} s")


def _remove_mark(file: Path) -> None:
    with suppress(OSError):  # it goes with the data directory
        file.unlink()
