"""Checks of `trio-pilot check`: this job's resources and time, the data directory, and the clock."""

import os
import shutil
import time
from contextlib import suppress
from datetime import UTC, datetime
from functools import partial

from trio_pilot.allocation.resources import find_allocation, fitted
from trio_pilot.allocation.walltime import End, find_end
from trio_pilot.cli.check_finding import Check, SkippedError
from trio_pilot.cli.root_warning import root_warning
from trio_pilot.errors import NodeError, SettingsError
from trio_pilot.files import disk_checks
from trio_pilot.files.data_directory import open_data_directory
from trio_pilot.processes import threads
from trio_pilot.settings import Settings

LEAST_FREE = 100 * 10**6  # bytes on the disk of the data directory


def allocation_check(settings: Settings) -> Check:
    """Return the check of the resources and the time that this job was given."""
    return Check("slot", partial(_allocation, settings), "correct it")


def user_check() -> Check:
    """Return the check of the user that the pilot runs as."""
    return Check("user", _user, "")


async def _user() -> str:
    warning = root_warning()
    if warning is None:
        raise SkippedError
    return f"root; {warning}"


def data_checks(settings: Settings) -> list[Check]:
    """Return the checks of the data directory and of the clock."""
    directory_advice = "name another directory in EWMS_PILOT_DATA_DIR_PARENT_PATH_ON_HOST, or make room there"
    clock_advice = "set the clocks of this machine and of the server of the data directory"
    return [
        Check("data", partial(threads.run_sync, _data_directory, settings), directory_advice),
        Check("clock", partial(threads.run_sync, _clock, settings), clock_advice),
    ]


async def _allocation(settings: Settings) -> str:
    allocation = find_allocation(os.environ)
    fit = fitted(settings, allocation)
    memory = f", {fit.task_memory / 1e6:.0f} MB" if fit.task_memory else ""
    pids = f", {fit.task_pids} process(es)" if fit.task_pids else ""
    end = _find_end(settings)
    if end and end.is_too_soon(settings):
        raise SettingsError(f"the slot ends too soon for any task: {end}")
    until = f"; until {end}" if end else ""
    return (
        f"{allocation}: {fit.max_concurrent_tasks} task(s) at once, {fit.cpus_per_task:g} CPU(s){memory}{pids} each{until}"
    )


def _find_end(settings: Settings) -> End | None:
    with suppress(SettingsError):  # the check of the settings reports it
        return find_end(settings, os.environ, time.time())
    return None


def _data_directory(settings: Settings) -> str:
    with open_data_directory(settings.data_dir_parent_path_on_host, settings.external_directories) as data_directory:
        root = data_directory.root
        disk_checks.check_writable(root)
        free = shutil.disk_usage(root).free
    if free < LEAST_FREE:
        raise NodeError(f"{root} has {free / 1e6:.0f} MB free, fewer than {LEAST_FREE / 1e6:.0f} MB")
    return f"{root}, {free / 1e9:.1f} GB free"


def _clock(settings: Settings) -> str:
    skew = disk_checks.clock_skew(settings.data_dir_parent_path_on_host)
    return f"{datetime.now(UTC):%Y-%m-%d %H:%M:%S} UTC, the data directory's within {abs(skew):.0f} s"
