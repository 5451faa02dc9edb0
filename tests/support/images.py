"""Programs and images that runtimes need."""

import functools
import os
import shutil
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
import trio

from tests.support.users import AS_ROOT
from trio_pilot.runtimes import Options


@functools.cache
def bubblewrap_fault() -> str | None:
    """Return the reason why bubblewrap does not work; install it first where that is possible."""
    from trio_pilot.runtimes import bubblewrap

    if shutil.which("bwrap") is None:
        _apt_install("bubblewrap")
    with ThreadPoolExecutor(1) as pool:  # a Trio run may be active already
        return pool.submit(trio.run, bubblewrap.fault, Options()).result()


@functools.cache
def busybox() -> str | None:
    """Return the path of a busybox that needs no libraries, if any; install it first where that is possible."""
    if not Path("/bin/busybox").exists():
        _apt_install("busybox-static")
    found = shutil.which("busybox")
    if found is None:
        return None
    libraries = subprocess.run(["ldd", found], capture_output=True, check=False)
    return found if libraries.returncode else None


def _apt_install(package: str) -> None:
    if AS_ROOT and shutil.which("apt-get"):
        env = {**os.environ, "DEBIAN_FRONTEND": "noninteractive"}
        subprocess.run(["apt-get", "install", "-qq", "-y", package], env=env, stdout=sys.stderr, timeout=120, check=False)


def make_image(directory: Path) -> Path:
    """Make a small image: a directory with a busybox, and the usual directories."""
    program = busybox()
    if program is None:
        pytest.skip("there is no static busybox, and it cannot be installed")
    for name in ("bin", "etc", "home", "tmp", "usr/share", "proc", "dev", "var"):
        (directory / name).mkdir(parents=True)
    shutil.copy(program, directory / "bin/busybox")
    applets = subprocess.run([program, "--list"], capture_output=True, text=True, check=True).stdout.split()
    for applet in applets:
        if not (directory / "bin" / applet).exists():
            (directory / "bin" / applet).symlink_to("busybox")
    (directory / "etc/this-is-the-image").touch()
    (directory / "sbin").symlink_to("bin")
    return directory
