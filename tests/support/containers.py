"""Containers with directories of their own."""

import uuid
from collections.abc import Iterable, Mapping
from pathlib import Path

from trio_pilot.runtimes import Container, Mount

# A script that makes, of an input file ($0), an output ($1) that is none, or a copy of any other input.
NO_OUTPUTS = """
case "$(cat "$0")" in
    link) ln -s /etc/passwd "$1" ;;
    fifo) mkfifo "$1" ;;
    directory) mkdir "$1" ;;
    sparse) truncate -s 10G "$1" ;;
    *) cat "$0" > "$1" ;;
esac
"""


def new_container(
    directory: Path,
    args: Iterable[str],
    *,
    image: str = "/",
    env: Mapping[str, str] | None = None,
    mounts: Iterable[Mount] = (),
) -> Container:
    """Return a container to run, with directories of its own below `directory`."""
    name = str(uuid.uuid4())
    root = directory / name
    (root / "scratch").mkdir(parents=True)
    return Container(
        name=name,
        image=image,
        args=tuple(args),
        env=env or {},
        mounts=tuple(mounts),
        scratch=root / "scratch",
        stdout=root / "stdoutfile",
        stderr=root / "stderrfile",
    )
