"""`trio-pilot demo`: run a small sky scan on this machine alone, from sending its events to receiving their results."""

import math
import os
import sys
import sysconfig
import tempfile
import time
from collections.abc import Iterable, Mapping
from importlib import resources
from pathlib import Path
from typing import Any

import trio

from trio_pilot import log
from trio_pilot.cli import demo_sky
from trio_pilot.cli.exit_codes import SignalledError
from trio_pilot.cli.receive import Receiver
from trio_pilot.cli.run import run_pilot
from trio_pilot.cli.send import Sender
from trio_pilot.cli.signals import run_until_signalled
from trio_pilot.errors import PilotError
from trio_pilot.files.data_directory import FORBIDDEN
from trio_pilot.processes.children import end_all_children
from trio_pilot.runtimes import Options
from trio_pilot.runtimes.bubblewrap_root import is_own
from trio_pilot.runtimes.selection import choose
from trio_pilot.settings import Settings, load

EVENTS, RESULTS = "sky-scan-pixels", "sky-scan-results"
MAX_SHOWN = 8  # pixels, the best first


class DemoError(PilotError):
    """The demo has ended without all results."""


def demo(given: Mapping[str, Any]) -> int:
    """Run the demo in a temporary directory, and remove it on every way out."""
    try:
        with tempfile.TemporaryDirectory(prefix="trio-pilot-demo-", ignore_cleanup_errors=True) as directory:
            settings = _settings(given, Path(directory))
            log.set_up(settings.cl_log, settings.cl_log_third_party)
            started = time.perf_counter()
            results = run_until_signalled(_scan, settings)
            _show(results, time.perf_counter() - started)
    finally:
        end_all_children()
    return 0


def _settings(given: Mapping[str, Any], directory: Path) -> Settings:
    runtime = given.get("runtime", "auto")
    task = _write_task(directory)
    hidden = list(_hidden_paths([Path(sys.prefix), Path(sys.base_prefix), Path(sysconfig.get_path("stdlib")), task.parent]))
    return load(
        {
            "max_concurrent_tasks": os.cpu_count(),
            "cl_log": "ERROR",
            **given,
            "runtime": _choose_runtime(hidden) if runtime == "auto" else runtime,
            "task_image": "/",
            "task_args": [sys.executable, "-I", "-S", str(task)],
            "external_directories": hidden,
            "queue_incoming": EVENTS,
            "queue_outgoing": RESULTS,
            "broker": str(directory / "queues.sqlite"),
            "data_dir_parent_path_on_host": str(directory),
            "outfile_ext": ".json",
            "timeout_queue_incoming": 0.1,
            "grace": 0,
            "kill_grace": 0.2,
        },
        {},
        directory,
    )


def _write_task(directory: Path) -> Path:
    """Write the program of the task to a file, and return its path: the installed one may be in an archive."""
    task = directory / "task" / "demo_task.py"
    task.parent.mkdir()
    task.write_bytes(resources.files(demo_sky.__package__).joinpath(task.name).read_bytes())
    return task


def _hidden_paths(paths: Iterable[Path]) -> Iterable[Path]:
    """Return the paths that a container with this machine's root does not see: it has a directory of its own there."""
    found: list[Path] = []
    for path in [name for one in paths for name in (one.absolute(), one.resolve())]:
        if is_own(path) and not any(path.is_relative_to(one) for one in found):
            found.append(path)
    return found


def _choose_runtime(hidden: Iterable[Path]) -> str:
    """Return bubblewrap if it works, and can be given the paths of this Python; else process."""
    if any(path.resolve().is_relative_to(one) for path in hidden for one in FORBIDDEN):
        return "process"
    return trio.run(choose, "auto", "/", Options()).name


async def _scan(settings: Settings) -> list[dict[str, Any]]:
    """Send the events, run a pilot for them, and return the results."""
    contained = "not contained at all" if settings.runtime == "process" else f"each in a container ({settings.runtime})"
    print(
        f"A simulated event, and {demo_sky.PIXELS} pixels of the sky that it may have come from: a task for each, "
        f"{settings.max_concurrent_tasks} at once, {contained}.",
        flush=True,
    )
    await Sender(settings, EVENTS).send(demo_sky.events())
    signalled = await run_pilot(settings)
    if signalled:
        raise SignalledError(signalled)
    results: list[dict[str, Any]] = []
    receiver = Receiver(settings, RESULTS, lambda _delivery, result: results.append(result))
    with trio.move_on_after(settings.broker_patience):
        await receiver.receive(demo_sky.PIXELS, idle=1)
    if sorted(result["pixel"] for result in results) != list(range(demo_sky.PIXELS)):
        raise DemoError(f"{len(results)} results for {demo_sky.PIXELS} pixels: please report this")
    return results


def _show(results: list[dict[str, Any]], seconds: float) -> None:
    results.sort(key=lambda result: float(result["chi2"]))
    best = results[0]
    print(f"\n{'pixel':>5}  {'zenith':>7}  {'azimuth':>7}  {'chi²':>9}  {'above the best':>14}")
    for result in results[:MAX_SHOWN]:
        zenith, azimuth = map(_degrees, demo_sky.pix2ang(demo_sky.NSIDE, result["pixel"]))
        print(f"{result['pixel']:>5}  {zenith}  {azimuth}  {result['chi2']:>9.1f}  {result['chi2'] - best['chi2']:>14.1f}")
    off = demo_sky.distance(demo_sky.pix2ang(demo_sky.NSIDE, best["pixel"]), demo_sky.TRUTH)
    print(
        f"\nBest pixel: {best['pixel']}, {off:.1f}° from the true direction (the pixels are {demo_sky.WIDTH:.0f}° wide)."
        f"\n{len(results)} tasks in {seconds:.1f} s, {len(results) / seconds:.0f} a second."
    )


def _degrees(radians: float) -> str:
    return f"{math.degrees(radians):>6.1f}°"
