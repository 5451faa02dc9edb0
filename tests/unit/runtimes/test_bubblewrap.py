import os
from pathlib import Path

import pytest

from trio_pilot.processes.identity import own
from trio_pilot.processes.orphans import MARKER
from trio_pilot.runtimes import Options, bubblewrap


async def test_the_processes_of_bubblewraps_probe_have_the_pilots_marker(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    bwrap, said = tmp_path / "bwrap", tmp_path / "environment"
    bwrap.write_text(f"#!/bin/sh\nenv > {said}\n")
    bwrap.chmod(0o755)
    monkeypatch.setenv("PATH", str(tmp_path), prepend=os.pathsep)
    assert await bubblewrap.fault(Options()) is None
    assert f"{MARKER}={own()}/" in said.read_text()
