"""`python -m bench`: events per second of the pilot, against `xargs -P` starting the same commands without one.

The two sides take turns, so that whatever else the machine does is done to both. An event is 1 kB; its task copies the input
file to the output file; it counts once its result is confirmed by the broker.
"""

import argparse
import json
import os
import statistics
import subprocess
import sys
import tempfile
import time
import uuid
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

COMMAND = Path(sys.executable).with_name("trio-pilot")
IDLE = 0.2  # seconds the pilot waits in vain in the end; taken off


def main() -> None:
    """Measure, and print a line a round."""
    parser = argparse.ArgumentParser(prog="python -m bench", description=__doc__)
    parser.add_argument("--broker", choices=["local", "rabbitmq"], default="local")
    parser.add_argument("--runtime", choices=["process", "bubblewrap"], default="process")
    parser.add_argument("--slots", type=int, default=8)
    parser.add_argument("--events", type=int, default=1000)
    parser.add_argument("--rounds", type=int, default=5)
    given = parser.parse_args()
    ratios = []
    with tempfile.TemporaryDirectory(prog := "trio-pilot-bench") as directory, broker(given.broker) as address:
        os.chdir(directory)
        Path("event").write_text(json.dumps({"pad": "x" * 1000}) + "\n")
        Path("events").write_text(Path("event").read_text() * given.events)
        for _ in range(given.rounds):
            alone = xargs(given.events, given.slots)
            piloted, kilobytes = pilot(address, given.events, given.slots, given.runtime)
            ratios.append(piloted / alone)
            print(f"xargs {alone:6.0f}/s   pilot {piloted:6.0f}/s   ratio {ratios[-1]:.2f}   {kilobytes} kB", flush=True)
    print(f"{prog}: {given}: median ratio {statistics.median(ratios):.2f}, {min(ratios):.2f} to {max(ratios):.2f}")


@contextmanager
def broker(kind: str) -> Iterator[str]:
    """Give the address of a broker of our own."""
    if kind == "local":
        yield "./queues.sqlite"
        return
    from tests.servers import rabbitmq

    with rabbitmq() as server:
        yield server.address


def xargs(events: int, slots: int) -> float:
    """Give the commands per second of xargs."""
    names = "".join(f"{number}\n" for number in range(events))
    started = time.monotonic()
    subprocess.run(["xargs", f"-P{slots}", "-I{}", "cp", "event", "copy-{}"], input=names, text=True, check=True)
    return events / (time.monotonic() - started)


def pilot(address: str, events: int, slots: int, runtime: str) -> tuple[float, int]:
    """Give the events per second of a pilot, from its first look at the queue on, and its memory in the end."""
    queue = f"in-{uuid.uuid4().hex}"
    send = [str(COMMAND), "send", queue, "events", "--lines", "--broker", address]
    subprocess.run(send, check=True, stderr=subprocess.DEVNULL)
    options = {
        "--broker": address,
        "--queue-incoming": queue,
        "--queue-outgoing": f"out-{queue}",
        "--runtime": runtime,
        "--task-args": "cp {{INFILE}} {{OUTFILE}}",
        "--max-concurrent-tasks": str(slots),
        "--timeout-queue-incoming": str(IDLE),
    }
    command = [str(COMMAND), "run", *(word for option in options.items() for word in option)]
    with subprocess.Popen(command, stderr=subprocess.PIPE, text=True) as process:
        assert process.stderr
        started, kilobytes = 0.0, 0
        for line in process.stderr:
            if "listening" in line:
                started = time.monotonic()
            if "task(s)" in line:
                took = time.monotonic() - started - IDLE
                kilobytes = memory(process.pid)
                assert f"{events} succeeded" in line, line
    assert process.returncode == 0
    return events / took, kilobytes


def memory(pid: int) -> int:
    """Give the resident memory of a process in kB."""
    text = Path(f"/proc/{pid}/status").read_text()
    return int(text.partition("VmRSS:")[2].split()[0])


if __name__ == "__main__":
    main()
