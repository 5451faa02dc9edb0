"""`python -m bench`: what the pilot costs, measured here and now; `--help` lists the measurements."""

import argparse
import compileall
import dataclasses
import os
import signal
import sys
from collections.abc import Sequence
from importlib import import_module
from pathlib import Path
from typing import Any

from bench.report import LOAD, RESULTS, ROOT
from tests.support.servers import ERLANG_FLAGS, UnavailableError
from trio_pilot.runtimes.selection import NAMES

MEASUREMENTS = {
    "throughput": "events a second, over runtimes, slots, task times and event sizes",
    "limit": "against the same commands without a pilot",
    "peer": "against ewms-pilot, which is installed in .venv-ewms-pilot/",
    "overhead": "where an event's time goes, and the pilot's own CPU for it",
    "start": "import, first task, idling, ending",
    "scale": "many events, several pilots on a queue, many idle pilots on a broker",
    "workloads": "a sky scan and EWMS's condor benchmark, in minutes",
    "bridge": "messages a second from queue to queue, with nothing done for them",
}


def parser() -> argparse.ArgumentParser:
    """Describe the command line. Options may be before the command and after it."""
    description = f"{__doc__} Without a command: all of them, one after the other."
    told = argparse.ArgumentParser(prog="python -m bench", description=description, parents=[_options()])
    commands = told.add_subparsers(dest="command", metavar="COMMAND")
    for name, meaning in MEASUREMENTS.items():
        commands.add_parser(name, help=meaning, description=meaning, parents=[_options(argparse.SUPPRESS)])
    comparing = commands.add_parser("compare", help="tell what has changed between two reports, or two directories of them")
    comparing.add_argument("before", type=Path)
    comparing.add_argument("after", type=Path)
    commands.add_parser("readme", help="write the README's section on speed from bench/results")
    return told


def _options(default: str | None = None) -> argparse.ArgumentParser:
    options = argparse.ArgumentParser(add_help=False, argument_default=default)
    options.add_argument("--quick", action="store_true", help="little of it: all measurements together take two minutes")
    options.add_argument("--rounds", type=int, metavar="NUMBER", help="samples of each figure")
    options.add_argument("--runtimes", type=_runtimes, metavar="NAME,...", help="of throughput, limit and overhead")
    options.add_argument("--to", type=Path, metavar="DIRECTORY", help="for JSON and SVG [bench/results, or quick/ in it]")
    return options


def _runtimes(text: str) -> tuple[str, ...]:
    names = tuple(text.split(","))
    if unknown := set(names) - set(NAMES):
        raise argparse.ArgumentTypeError(f"{', '.join(unknown)}: choose from {', '.join(NAMES)}")
    return names


def main(argv: Sequence[str] | None = None) -> None:
    """Do what the command line says."""
    given = parser().parse_args(argv)
    match given.command:
        case "compare":
            from bench.compare import compare

            print(compare(given.before, given.after))
        case "readme":
            from bench.readme import write

            write()
        case name:
            try:
                run([name] if name else list(MEASUREMENTS), given)
            except ModuleNotFoundError as error:
                sys.exit(f"{error}: pip install -e '.[test]' has all that is needed")
            except UnavailableError as error:
                sys.exit(f"there is no RabbitMQ for it: {error}")


def run(names: Sequence[str], given: argparse.Namespace) -> None:
    """Measure, and for each measurement print its table, and write its report and its plot."""
    from bench.broker import rabbitmq
    from bench.plots import plot

    if warning := busy(LOAD, os.cpu_count() or 1):
        print(warning, file=sys.stderr)
    compileall.compile_dir(ROOT / "trio_pilot", quiet=1)  # as pip has it; PYTHONDONTWRITEBYTECODE may have kept it from us
    signal.signal(signal.SIGTERM, lambda number, _: sys.exit(128 + number))  # so that what was started is ended
    with rabbitmq() as server:
        print(f"RabbitMQ {server.version}, for all sides alike, on the same cores: {ERLANG_FLAGS}")
        for name in names:
            module: Any = import_module(f"bench.{name}")
            report = module.measure(adapted(module.QUICK if given.quick else module.FULL, given), server)
            to = given.to or (RESULTS / "quick" if given.quick else RESULTS)
            written = [report.write(to), plot(report, to)]
            print(f"\n{name}\n\n{report.table()}\n\nwritten: {', '.join(map(str, filter(None, written)))}", flush=True)


def adapted(plan: Any, given: argparse.Namespace) -> Any:
    """Change of a plan what the command line says."""
    names = {field.name for field in dataclasses.fields(plan)} & {"rounds", "runtimes"}
    return dataclasses.replace(plan, **{name: getattr(given, name) for name in names if getattr(given, name)})


def busy(load: float, cores: int) -> str | None:
    """Say that the machine has something else to do, if it has."""
    if load <= cores / 2:
        return None
    return f"this machine is busy (load {load:.1f} on {cores} cores): much of what is measured now is noise"


if __name__ == "__main__":
    main()
