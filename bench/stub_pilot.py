"""A pilot whose tasks are stubs: `python -m bench.stub_pilot SETTINGS.json`.

What it costs is the cost of the brokers, the files and the pilot itself.
"""

import sys
from pathlib import Path

from bench import custom_pilot
from trio_pilot.runtimes import Container
from trio_pilot.testing import FakeGuardian, FakeRuntime


async def copy(container: Container) -> int:
    """Copy the input to the output, as a task that takes no time."""
    infile, outfile = (Path(container.env[f"EWMS_TASK_{name}FILE"]) for name in ("IN", "OUT"))
    outfile.write_bytes(infile.read_bytes())
    return 0


def main() -> None:
    """Run the pilot until SIGTERM."""
    custom_pilot.run_pilot(custom_pilot.read_settings(sys.argv[1]), FakeGuardian().open(), FakeRuntime(copy).open())


if __name__ == "__main__":
    main()
