"""The `trio-pilot` program: what it starts, and what becomes of errors.

A pilot that finds all its settings in the environment, as EWMS starts it, has nothing to parse: it starts without cyclopts,
which takes half as long to import as Trio.
"""

import errno
import os
import signal
import sys
import traceback
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import NoReturn

from trio_pilot import log
from trio_pilot.cli.exit_codes import SIGNALLED, SOFTWARE_ERROR, SignalledError
from trio_pilot.errors import (
    ContainerRunError,
    NodeError,
    PilotError,
    TasksFailedError,
    leaves,
    map_exceptions,
    reported_name,
)

NO_ROOM = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG, errno.EIO)  # what a disk says that takes no more


def main(argv: Sequence[str] | None = None) -> NoReturn:
    """Run the command and exit: with the codes that the README lists, and with a line of text rather than a traceback."""
    code = SOFTWARE_ERROR
    try:
        code = _called(sys.argv[1:] if argv is None else argv)
        sys.stdout.flush()
    except* PilotError as errors:
        found = list(leaves(errors))
        code = _tell([_line(error) for error in found], found[0].exit_code)
    except* SignalledError as signals:
        number = next(leaves(signals)).number
        code = _tell([f"trio-pilot: {error}" for error in leaves(signals)], SIGNALLED + number)
    except* KeyboardInterrupt:
        code = _tell(["trio-pilot: interrupted"], SIGNALLED + signal.SIGINT)
    except* BrokenPipeError:  # `| head` has seen enough
        _leave_stdout()
        code = SIGNALLED + signal.SIGPIPE
    except* Exception as errors:
        code = _tell_of_others(next(leaves(errors)))
    sys.exit(code)


def _called(argv: Sequence[str]) -> int:
    with map_exceptions({FileNotFoundError: NodeError}, "the working directory is gone; go to another"):
        Path.cwd()
    if list(argv) in ([], ["run"]):
        from trio_pilot.cli.load_settings import load_settings
        from trio_pilot.cli.run import run

        return run(load_settings({}))
    from trio_pilot.cli.app import call

    return call(argv)


def _tell_of_others(error: Exception) -> int:
    """Tell of an error that nobody has translated: one of stdout, which any command writes to, or a defect."""
    if isinstance(error, OSError) and error.errno in NO_ROOM and error.filename is None:
        _leave_stdout()
        return _tell([f"trio-pilot: cannot write to stdout: {error.strerror}"], NodeError.exit_code)
    defect = "trio-pilot: this is a defect of trio-pilot; please report it with the lines above"
    return _tell([traceback.format_exc(), defect], SOFTWARE_ERROR)


def _leave_stdout() -> None:
    """Have what is still to be written to stdout go nowhere: Python would try it once more at the exit, and complain."""
    os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())


def _line(error: PilotError) -> str:
    """Word an error as EWMS does where EWMS reads it, and for people elsewhere."""
    if isinstance(error, TasksFailedError):
        return str(error)
    return f"{reported_name(error)}: {error}" if isinstance(error, ContainerRunError) else f"trio-pilot: {error}"


def _tell(lines: Iterable[str], code: int) -> int:
    log.finish(lines)
    return code
