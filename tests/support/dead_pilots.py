"""What dead pilots leave behind."""

import os
from dataclasses import replace
from pathlib import Path

from trio_pilot.processes.identity import Identity, own

NODE = os.uname().nodename
DEAD = replace(own(), started=own().started - 1)  # a pilot that is dead for certain
BEFORE_BOOT = replace(own(), boot="before")
ELSEWHERE = replace(own(), namespace=1)


def is_dead(pilot: Identity) -> bool:
    return pilot.is_dead


def leave_task_directory(parent: Path, name: str, owner: str) -> Path:
    """Leave a task directory, and the owner file of its pilot."""
    root = parent / "ewms-pilot-data"
    directory = root / f"{name}-0000-4000-8000-000000000000"
    for path in (root / "data-hub", directory / "task-io", root / f"init-{name}0000"):
        path.mkdir(parents=True, exist_ok=True)
    (root / ".lock").touch()
    (directory / "task-io" / "infile").touch()
    (root / f".pilot-{name}-{owner}").touch()
    return directory
