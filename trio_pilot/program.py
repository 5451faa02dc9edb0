"""The `trio-pilot` program: what it starts, and what becomes of errors.

A pilot that finds all its settings in the environment, as EWMS starts it, has nothing to parse: it starts without cyclopts,
which takes half as long to import as Trio.
"""

import os
import signal
import sys
import traceback
from collections.abc import Iterable, Sequence
from typing import NoReturn

from trio_pilot import log
from trio_pilot.commands import SIGNALLED, SignalledError
from trio_pilot.errors import ContainerRunError, PilotError, TasksFailedError, leaves

SOFTWARE_ERROR = 70  # sysexits.h, EX_SOFTWARE: a defect of ours


def main(argv: Sequence[str] | None = None) -> NoReturn:
    """Run the command and exit: with the codes that the README lists, and with a line of text rather than a traceback."""
    code = SOFTWARE_ERROR
    try:
        code = _called(sys.argv[1:] if argv is None else argv)
    except* PilotError as errors:
        found = list(leaves(errors))
        code = _tell([_line(error) for error in found], found[0].exit_code)
    except* SignalledError as signals:
        number = next(leaves(signals)).number
        code = _tell([f"trio-pilot: {error}" for error in leaves(signals)], SIGNALLED + number)
    except* KeyboardInterrupt:
        code = _tell(["trio-pilot: interrupted"], SIGNALLED + signal.SIGINT)
    except* BrokenPipeError:  # `| head` has seen enough
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        code = SIGNALLED + signal.SIGPIPE
    except* Exception:
        defect = "trio-pilot: this is a defect of trio-pilot; please report it with the lines above"
        code = _tell([traceback.format_exc(), defect], SOFTWARE_ERROR)
    sys.exit(code)


def _called(argv: Sequence[str]) -> int:
    if list(argv) in ([], ["run"]):
        from trio_pilot.commands.run import run
        from trio_pilot.commands.settings_here import settings_here

        return run(settings_here({}))
    from trio_pilot.cli import call

    return call(argv)


def _line(error: PilotError) -> str:
    """Word an error as EWMS does where EWMS reads it, and for people elsewhere."""
    if isinstance(error, TasksFailedError):
        return str(error)
    return f"{type(error).__name__}: {error}" if isinstance(error, ContainerRunError) else f"trio-pilot: {error}"


def _tell(lines: Iterable[str], code: int) -> int:
    log.finish(lines)
    return code
