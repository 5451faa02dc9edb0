"""`python -m bench`: what the pilot costs, measured here and now; `--help` lists the measurements."""

import argparse
import dataclasses
from collections.abc import Sequence
from importlib import import_module
from pathlib import Path
from typing import Any

from bench.report import RESULTS

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
    """Describe the command line."""
    options = argparse.ArgumentParser(add_help=False)
    options.add_argument("--quick", action="store_true", help="little of it: all measurements together take two minutes")
    options.add_argument("--rounds", type=int, metavar="NUMBER", help="samples of each figure")
    options.add_argument("--to", type=Path, default=RESULTS, metavar="DIRECTORY", help="for JSON and SVG [bench/results]")
    description = f"{__doc__} Without a command: all of them, one after the other."
    told = argparse.ArgumentParser(prog="python -m bench", description=description, parents=[options])
    commands = told.add_subparsers(dest="command", metavar="COMMAND")
    for name, meaning in MEASUREMENTS.items():
        commands.add_parser(name, help=meaning, description=meaning, parents=[options])
    comparing = commands.add_parser("compare", help="tell what has changed between two reports")
    comparing.add_argument("before", type=Path)
    comparing.add_argument("after", type=Path)
    commands.add_parser("readme", help="write the README's section on speed from bench/results")
    return told


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
            run([name] if name else list(MEASUREMENTS), given.to, quick=given.quick, rounds=given.rounds)


def run(names: Sequence[str], to: Path, *, quick: bool, rounds: int | None) -> None:
    """Measure, and for each measurement print its table, and write its report and its plot."""
    from bench.broker import rabbitmq
    from bench.plots import plot
    from tests.servers import ERLANG_FLAGS

    with rabbitmq() as server:
        print(f"RabbitMQ {server.version}, for all sides alike, on the same cores: {ERLANG_FLAGS}")
        for name in names:
            module: Any = import_module(f"bench.{name}")
            plan = module.QUICK if quick else module.FULL
            report = module.measure(dataclasses.replace(plan, rounds=rounds) if rounds else plan, server)
            print(f"\n{name}\n\n{report.table()}\n\nwritten: {report.write(to)}", flush=True)
            plot(report, to)


if __name__ == "__main__":
    main()
