"""A pilot whose tasks are stubs: `python -m bench.stubbed SETTINGS.json`.

What is left is the brokers, the files and the pilot itself.
"""

import sys
from pathlib import Path

from bench import inside
from trio_pilot.runtimes import Container
from trio_pilot.testing import FakeGuardian, FakeRuntime


async def copy(container: Container) -> int:
    """Be a task that takes no time."""
    infile, outfile = (Path(container.env[f"EWMS_TASK_{name}FILE"]) for name in ("IN", "OUT"))
    outfile.write_bytes(infile.read_bytes())
    return 0


def main() -> None:
    """Serve until SIGTERM."""
    inside.run(inside.settings(sys.argv[1]), FakeGuardian().open(), FakeRuntime(copy).open())


if __name__ == "__main__":
    main()
