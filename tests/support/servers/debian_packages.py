"""Programs from Debian's packages: installed here, or in a directory tree of another suite."""

import os
import re
import shutil
import subprocess
import tempfile
from pathlib import Path

from tests.support.servers.server import UnavailableError

SOURCES = Path("/etc/apt/sources.list.d/debian.sources"), Path("/etc/apt/sources.list")
INSTALLING = 600.0  # seconds, most of them for the download


def need(program: str, package: str) -> None:
    """Install a program from its Debian package, if it is not there and this is root on Debian.

    Raises:
        UnavailableError: it cannot be installed.
    """
    if shutil.which(program, path=f"{os.environ['PATH']}:/usr/sbin"):
        return
    if os.geteuid() != 0 or not shutil.which("apt-get"):
        raise UnavailableError(f"{program} is not installed, and only root on Debian can install it here")
    # A runlevel of 1 keeps the package from starting a service.
    env = {**os.environ, "DEBIAN_FRONTEND": "noninteractive", "RUNLEVEL": "1"}
    for command in (["apt-get", "update"], ["apt-get", "install", "-y", "--no-install-recommends", package]):
        done = subprocess.run(command, env=env, capture_output=True, text=True)
        if done.returncode:
            raise UnavailableError(f"{' '.join(command)} failed: {done.stderr[-500:]}")


def debian(suite: str, package: str, *more: str) -> Path:
    """Return the root directory of a Debian suite with packages; it is made once, and kept in the cache directory."""
    cache = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "trio-pilot-tests"
    tree = cache / f"{package}-{suite}"
    if not tree.exists():
        need("mmdebstrap", "mmdebstrap")
        cache.mkdir(parents=True, exist_ok=True)
        new = Path(tempfile.mkdtemp(prefix=f"{package}-{suite}-", dir=cache))
        options = [
            "--variant=minbase",
            f"--include={','.join([package, *more])}",
            '--aptopt=Acquire::Check-Valid-Until "false"',
        ]
        options += ["--aptopt=APT::Install-Recommends false", "--dpkgopt=force-unsafe-io"]
        done = subprocess.run(
            ["mmdebstrap", *options, suite, new, mirror()], capture_output=True, text=True, timeout=INSTALLING
        )
        if done.returncode:
            shutil.rmtree(new, ignore_errors=True)
            raise UnavailableError(f"mmdebstrap failed: {done.stderr[-500:]}")
        new.rename(tree)
    return tree


def mirror() -> str:
    """Return the URL of the mirror that this machine has its packages from."""
    for file in SOURCES:
        said = file.read_text() if file.exists() else ""
        if found := re.search(r"^(?:URIs:|deb (?:\[.*\] )?)\s*(\S+)", said, re.MULTILINE):
            return found[1]
    raise UnavailableError("apt's sources name no mirror of Debian's packages")
