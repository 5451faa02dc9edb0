"""What the tests of runtimes, children and files share."""

import functools
import os
import shutil
import subprocess
import sys
import time
import uuid
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path

import pytest
import trio

from trio_pilot.runtimes import Container, Mount

PATIENCE = 20.0  # seconds for what should take milliseconds, on a machine that may be busy
NOBODY = 65534

AS_ROOT = os.geteuid() == 0
# One who may read everything (Python may be installed in a home directory), and write nothing.
UNPRIVILEGED = (
    [
        *("setpriv", f"--reuid={NOBODY}", f"--regid={NOBODY}", "--clear-groups"),
        *("--inh-caps=-all,+dac_read_search", "--ambient-caps=-all,+dac_read_search"),
    ]
    if AS_ROOT
    else []
)

needs_root = pytest.mark.skipif(not AS_ROOT, reason="mounting file systems and changing users takes root")


@contextmanager
def as_nobody() -> Iterator[None]:
    """Be one to whom file permissions mean something; which those who are not root are already."""
    if not AS_ROOT:
        yield
        return
    os.setegid(NOBODY)
    os.seteuid(NOBODY)
    try:
        yield
    finally:
        os.seteuid(0)
        os.setegid(0)


@contextmanager
def small_disk(directory: Path, kib: int, *, inodes: int = 0) -> Iterator[Path]:
    """Mount a file system of that size there; as root."""
    directory.mkdir(parents=True, exist_ok=True)
    subprocess.run(["mount", "-t", "tmpfs", "-o", f"size={kib}k,nr_inodes={inodes}", "tmpfs", directory], check=True)
    try:
        yield directory
    finally:
        subprocess.run(["umount", "-l", directory], check=True)


def new_container(
    directory: Path,
    args: Iterable[str],
    *,
    image: str = "/",
    env: Mapping[str, str] | None = None,
    mounts: Iterable[Mount] = (),
) -> Container:
    """Order a container with directories of its own below `directory`."""
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


def processes_with(mark: str) -> list[int]:
    """List the processes, zombies too, that have the mark in their command line or environment."""
    return [pid for pid in _all_processes() if mark.encode() in _told(pid)]


def _all_processes() -> Iterator[int]:
    return (int(entry.name) for entry in Path("/proc").iterdir() if entry.name.isdigit() and int(entry.name) != os.getpid())


def _told(pid: int) -> bytes:
    told = b""
    for name in ("cmdline", "environ"):
        try:
            told += Path(f"/proc/{pid}/{name}").read_bytes()
        except OSError:
            continue
    return told


def own_children() -> set[int]:
    """List the children of this process, zombies too."""
    return set(map(int, Path(f"/proc/self/task/{os.getpid()}/children").read_text().split()))


def open_files() -> int:
    return len(list(Path("/proc/self/fd").iterdir()))


async def until(condition: Callable[[], object], what: str = "") -> None:
    """Wait for what another process does."""
    with trio.move_on_after(PATIENCE) as scope:
        while not condition():  # noqa: ASYNC110 -- another process tells nobody
            await trio.sleep(0.005)
    assert not scope.cancelled_caught, f"in vain: {what or condition}"


def until_sync(condition: Callable[[], object], what: str = "") -> None:
    deadline = time.monotonic() + PATIENCE
    while not condition():
        assert time.monotonic() < deadline, f"in vain: {what or condition}"
        time.sleep(0.005)


@functools.cache
def bubblewrap_fault() -> str | None:
    """Install bubblewrap where that is possible; say why it does not work."""
    from trio_pilot.runtimes import bubblewrap

    if shutil.which("bwrap") is None:
        _apt_install("bubblewrap")
    return bubblewrap.fault()


@functools.cache
def busybox() -> str | None:
    """Find a busybox that needs no libraries; install it where that is possible."""
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
    """Make a small image: a directory with a busybox, and the rest of what images have."""
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
