"""`python -m bench`: measure the cost of the pilot on this machine; `--help` lists the measurements."""

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
    "throughput": "events per second, by runtime, slots, length of a task and size of an event",
    "limit": "comparison to the same commands without a pilot",
    "peer": "comparison to ewms-pilot, which is installed in .venv-ewms-pilot/",
    "overhead": "time of an event in each stage, and CPU of the pilot itself for an event",
    "start": "time to import, to the first result and to end; CPU use of an idle pilot",
    "scale": "one pilot with many events, several pilots on a queue, many idle pilots on a broker",
    "workloads": "a sky scan and EWMS's condor benchmark, each shortened to minutes",
    "bridge": "messages per second from queue to queue, without tasks",
}


def parser() -> argparse.ArgumentParser:
    """Return the parser of the command line. Options may be before the command and after it."""
    description = f"{__doc__} Without a command, all measurements are made, one after the other."
    parser = argparse.ArgumentParser(prog="python -m bench", description=description, parents=[_options()])
    commands = parser.add_subparsers(dest="command", metavar="COMMAND")
    for name, meaning in MEASUREMENTS.items():
        commands.add_parser(name, help=meaning, description=meaning, parents=[_options(argparse.SUPPRESS)])
    comparing = commands.add_parser(
        "compare", help="list what has changed between two reports, or between two directories of reports"
    )
    comparing.add_argument("before", type=Path)
    comparing.add_argument("after", type=Path)
    commands.add_parser("readme", help="write the README's section on speed by the reports in bench/results")
    return parser


def _options(default: str | None = None) -> argparse.ArgumentParser:
    options = argparse.ArgumentParser(add_help=False, argument_default=default)
    options.add_argument("--quick", action="store_true", help="measure little: all measurements together take two minutes")
    options.add_argument("--rounds", type=int, metavar="NUMBER", help="number of samples of each figure")
    options.add_argument("--runtimes", type=_runtimes, metavar="NAME,...", help="runtimes of throughput, limit and overhead")
    options.add_argument(
        "--to",
        type=Path,
        metavar="DIRECTORY",
        help="for JSON and SVG files [bench/results, or quick/ in it]",
    )
    return options


def _runtimes(text: str) -> tuple[str, ...]:
    names = tuple(text.split(","))
    if unknown := set(names) - set(NAMES):
        raise argparse.ArgumentTypeError(f"{', '.join(unknown)}: choose from {', '.join(NAMES)}")
    return names


def main(argv: Sequence[str] | None = None) -> None:
    """Run the command of the command line."""
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
                sys.exit(f"{error}: install all that is needed by pip install -e '.[test]'")
            except UnavailableError as error:
                sys.exit(f"RabbitMQ, which is needed, is not available: {error}")


def run(names: Sequence[str], given: argparse.Namespace) -> None:
    """Make measurements; print the table of each, and write its report and its plot."""
    from bench.broker import rabbitmq
    from bench.plots import plot

    if warning := busy(LOAD, os.cpu_count() or 1):
        print(warning, file=sys.stderr)
    compileall.compile_dir(ROOT / "trio_pilot", quiet=1)  # as pip does; PYTHONDONTWRITEBYTECODE may have prevented it
    signal.signal(signal.SIGTERM, lambda number, _: sys.exit(128 + number))  # so that processes are ended
    with rabbitmq() as server:
        print(f"RabbitMQ {server.version}, the same for all sides, on the same cores: {ERLANG_FLAGS}")
        for name in names:
            module: Any = import_module(f"bench.{name}")
            report = module.measure(adapted(module.QUICK if given.quick else module.FULL, given), server)
            to = given.to or (RESULTS / "quick" if given.quick else RESULTS)
            written = [report.write(to), plot(report, to)]
            print(f"\n{name}\n\n{report.table()}\n\nwritten: {', '.join(map(str, filter(None, written)))}", flush=True)


def adapted(plan: Any, given: argparse.Namespace) -> Any:
    """Return a plan with the changes that the command line asks for."""
    names = {field.name for field in dataclasses.fields(plan)} & {"rounds", "runtimes"}
    return dataclasses.replace(plan, **{name: getattr(given, name) for name in names if getattr(given, name)})


def busy(load: float, cores: int) -> str | None:
    """Return a warning if the machine has other work to do."""
    if load <= cores / 2:
        return None
    return f"this machine is busy (load {load:.1f} on {cores} cores): the measurements will be noisy"


if __name__ == "__main__":
    main()
