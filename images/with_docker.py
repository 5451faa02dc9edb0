#!/usr/bin/env python3
"""Become the pilot, with a docker daemon of the container's own; the container must be privileged.

If the daemon does not start, its last words are printed, and the pilot starts all the same: it reports that docker does not
work here, or runs its tasks by another runtime.
"""

import os
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Sequence
from contextlib import suppress
from pathlib import Path
from subprocess import DEVNULL

PILOT = "/usr/local/bin/trio-pilot"
WITHOUT_TASKS = ("send", "receive", "condor-submit", "--help", "--version")  # commands that need no daemon
DAEMON = "dockerd", "--host=unix:///run/docker.sock"
SOCKET, LOG = "/run/docker.sock", "/var/log/dockerd.log"
# Those of a daemon that was killed with the container, before the container was started again.
PID_FILES = "/run/docker.pid", "/run/docker/containerd/containerd.pid"
# The parent of what the daemon leaves behind. It ends the daemon when the pilot ends.
INIT = "docker-init", "-s", "-p", "SIGTERM", "--"
PATIENCE = 60.0  # seconds for the daemon to start; it takes one
LAST_WORDS = 2000  # bytes


def main(arguments: Sequence[str]) -> None:
    """Start the daemon, wait until it answers, and become the pilot."""
    signal.signal(signal.SIGTERM, lambda number, _: sys.exit(128 + number))  # the first process of a container has to say so
    if not {*arguments[:1]} & {*WITHOUT_TASKS} and "DOCKER_HOST" not in os.environ:
        divide(Path("/sys/fs/cgroup"))
        if fault := start():
            print(f"trio-pilot: the docker daemon does not start: {fault}", file=sys.stderr, flush=True)
    os.execv(PILOT, [PILOT, *arguments])


def start() -> str:
    """Start the daemon, and wait until it answers; return the reason if it does not."""
    deadline = time.monotonic() + PATIENCE
    try:
        for file in PID_FILES:
            Path(file).unlink(missing_ok=True)
        with Path(LOG).open("wb") as log:
            # In a session of its own: Ctrl-C is for the pilot.
            daemon = subprocess.Popen([*INIT, *DAEMON], stdin=DEVNULL, stdout=log, stderr=log, start_new_session=True)
    except OSError as error:
        return str(error)
    while daemon.poll() is None and time.monotonic() < deadline:
        if answers():
            return ""
        time.sleep(0.05)
    return Path(LOG).read_bytes()[-LAST_WORDS:].decode(errors="replace").strip() or "it says nothing"


def answers() -> bool:
    """Return whether the daemon answers a request."""
    with suppress(OSError), socket.socket(socket.AF_UNIX) as connection:
        connection.settimeout(PATIENCE)
        connection.connect(SOCKET)
        connection.sendall(b"GET /_ping HTTP/1.0\r\n\r\n")
        return b" 200 " in connection.recv(100)
    return False


def divide(top: Path) -> None:
    """Move all processes of the container to a group below its own control group, which then can have groups with limits."""
    if not (top / "cgroup.type").exists():  # no control groups of version 2, or not those of a container
        return
    with suppress(OSError):
        below = top / "init"
        below.mkdir(exist_ok=True)
        for process in (top / "cgroup.procs").read_text().split():
            with suppress(ProcessLookupError):
                (below / "cgroup.procs").write_text(process)
        controllers = (top / "cgroup.controllers").read_text().split()
        (top / "cgroup.subtree_control").write_text(" ".join(f"+{name}" for name in controllers))


if __name__ == "__main__":
    main(sys.argv[1:])
