"""The `trio-pilot` program: run a command, print its errors, and exit with the code that the README lists.

A pilot whose settings are all in the environment, as EWMS starts it, has no arguments to parse: it starts without cyclopts,
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
    SettingsError,
    TasksFailedError,
    UsageError,
    leaves,
    map_exceptions,
    reported_name,
)
from trio_pilot.processes.secrecy import keep_secrets
from trio_pilot.processes.threads import is_refusal

WRITE_ERRORS = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG, errno.EIO)  # of a disk that is full or broken


def main(argv: Sequence[str] | None = None) -> NoReturn:
    """Run the command and exit; an expected error is printed as a line of text, without a traceback."""
    code = SOFTWARE_ERROR
    keep_secrets()
    try:
        code = _run_command_or_report(sys.argv[1:] if argv is None else argv)
        sys.stdout.flush()
    except* PilotError as errors:
        found = list(leaves(errors))
        code = _print_lines([_line(error) for error in found], found[0].exit_code)
    except* SignalledError as signals:
        number = next(leaves(signals)).number
        code = _print_lines([log.indented(f"trio-pilot: {error}") for error in leaves(signals)], SIGNALLED + number)
    except* KeyboardInterrupt:
        code = _print_lines(["trio-pilot: interrupted"], SIGNALLED + signal.SIGINT)
    except* BrokenPipeError:  # the reader has gone, as in `| head`
        _discard_stdout()
        code = SIGNALLED + signal.SIGPIPE
    except* Exception as errors:
        code = _print_unexpected(next(leaves(errors)))
    sys.exit(code)


def _run_command_or_report(argv: Sequence[str]) -> int:
    """Run the command. If a setting is wrong so that no pilot can begin, print that, and tell HTCondor of it."""
    try:
        return _run_command(argv)
    except (SettingsError, UsageError) as error:  # an error of a pilot that has begun is in a group, and was reported
        code = _print_lines([_line(error)], error.exit_code)
        if not argv or argv[0] == "run" or argv[0].startswith("-"):
            from trio_pilot.cli.report_wrong_setting import report_wrong_setting

            report_wrong_setting(error)
        return code


def _run_command(argv: Sequence[str]) -> int:
    with map_exceptions({FileNotFoundError: NodeError}, "the working directory is gone; go to another"):
        Path.cwd()
    if list(argv) in ([], ["run"]):
        from trio_pilot.cli.load_settings import load_settings
        from trio_pilot.cli.run import run

        return run(load_settings({}))
    from trio_pilot.cli.app import call

    return call(argv)


def _print_unexpected(error: Exception) -> int:
    """Print an error that is not a PilotError: stdout cannot be written to, or no thread started, or a defect."""
    if isinstance(error, OSError) and error.errno in WRITE_ERRORS and error.filename is None:
        _discard_stdout()
        return _print_lines([f"trio-pilot: cannot write to stdout: {error.strerror}"], NodeError.exit_code)
    if is_refusal(error):
        return _print_lines([f"trio-pilot: no process or thread can be started: {error}"], NodeError.exit_code)
    defect = "trio-pilot: this is a defect of trio-pilot; please report it with the lines above"
    return _print_lines([log.shown(traceback.format_exc()), defect], SOFTWARE_ERROR)


def _discard_stdout() -> None:
    """Discard what stdout still buffers: at exit Python would try to write it once more, and print a traceback."""
    os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())


def _line(error: PilotError) -> str:
    """Return the line for an error: in the words of ewms-pilot, to the byte, for errors that EWMS reads from a file."""
    if not isinstance(error, TasksFailedError | ContainerRunError):
        return log.indented(f"trio-pilot: {error}")
    line = str(error) if isinstance(error, TasksFailedError) else f"{reported_name(error)}: {error}"
    return log.indented(line) if sys.stderr and sys.stderr.isatty() else line


def _print_lines(lines: Iterable[str], code: int) -> int:
    log.finish(lines)
    return code
