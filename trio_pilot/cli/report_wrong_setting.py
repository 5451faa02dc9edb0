"""Report a wrong setting to HTCondor: it ends a pilot that has no reporter yet, which EWMS would count as done."""

import os
import shlex
from collections.abc import Mapping
from contextlib import suppress
from pathlib import Path

from trio_pilot.errors import PilotError, SettingsError
from trio_pilot.files.trusted_text import read_trusted
from trio_pilot.parsing import boolean
from trio_pilot.runtimes import ENVFILE
from trio_pilot.settings import FIELDS, PREFIX, environment
from trio_pilot.status import State

TIMEOUT = 3.0  # seconds


def report_wrong_setting(error: PilotError) -> None:
    """Report the state FatalError and the error, if the environment asks for reports. Never raises an Exception.

    The environment alone counts, and as much of it as can be read: any other setting may be the one that is wrong.
    """
    with suppress(Exception):  # the error is on stderr, whatever becomes of the report
        environ = _readable_environment(Path.cwd())
        if _is_wanted(environ):
            _report(_destination(environ), error)


def _is_wanted(environ: Mapping[str, str]) -> bool:
    word = environ.get(f"{PREFIX}HTCHIRP", "").strip()
    try:
        return bool(word) and boolean(word)
    except ValueError:
        return True  # something was to be set


def _destination(environ: Mapping[str, str]) -> str:
    facts = FIELDS["htchirp_dest"].metadata
    with suppress(ValueError):
        return str(facts["parse"](environ.get(f"{PREFIX}HTCHIRP_DEST", "")))
    return str(facts["default"])


def _report(destination: str, error: PilotError) -> None:
    from trio_pilot.condor import reporter  # imported late, as few pilots end here
    from trio_pilot.condor.chirp import Value, report

    told: dict[str, Value] = {reporter.STATUS: State.FATAL.value, reporter.ERROR: reporter.error_text(error)}
    report(destination, told.items(), {}, TIMEOUT)


def _readable_environment(directory: Path) -> Mapping[str, str]:
    """Return the environment, updated from those lines of the envfile that can be read."""
    with suppress(SettingsError):
        return environment(os.environ, directory)
    environ = dict(os.environ)
    with suppress(OSError, SettingsError):
        for line in read_trusted(directory / ENVFILE, errors="replace").splitlines():
            with suppress(ValueError):
                environ |= dict(word.split("=", 1) for word in shlex.split(line, comments=True) if "=" in word)
    return environ
