"""An apptainer for tests: the one on PATH, else that of Debian's unstable, unpacked into a directory of its own.

Debian's stable has none. That of unstable needs a newer C library, which is put beside it: the libraries of the system, and
the databases of dpkg and apt, do not change. The packages come from the mirror of the machine's own packages.
"""

import os
import shutil
import subprocess
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from tests.support.servers import UnavailableError, mirror, need

SUITE = "sid"
KEYRING = Path("/usr/share/keyrings/debian-archive-keyring.gpg")
PACKAGES = "apptainer", "libc6", "libseccomp2", "libsqlite3-0"

# (program, Debian package): to make apptainer run, to make and mount .sif files, to map users.
NEEDED = ("patchelf", "patchelf"), ("mksquashfs", "squashfs-tools"), ("squashfuse_ll", "squashfuse"), ("newuidmap", "uidmap")

TIMEOUT = 300.0  # seconds for each step; all together take a few


@contextmanager
def open_apptainer(*, own: bool = False) -> Iterator[Path]:
    """Yield the directory of an apptainer, to be put on PATH. All that was unpacked is in the third directory above."""
    if not own and (found := shutil.which("apptainer")):
        yield Path(found).parent
        return
    for program, package in NEEDED:
        need(program, package)
    if os.geteuid() != 0 or not KEYRING.exists():
        raise UnavailableError("there is no apptainer on PATH, and only root on Debian can unpack one")
    directory = Path(tempfile.mkdtemp(prefix="trio-pilot-apptainer-"))
    try:
        directory.chmod(0o755)  # for tests that are not root
        yield _make(directory)
    finally:
        shutil.rmtree(directory)


def _make(directory: Path) -> Path:
    _fetch(directory / "apt")
    prefix, libraries = directory / "prefix", directory / "libraries"
    libraries.mkdir()
    for package in (directory / "apt").glob("*.deb"):
        is_apptainer = package.name.startswith("apptainer_")
        _call("dpkg", "-x", str(package), str(prefix if is_apptainer else directory / "others"))
    for library in (directory / "others/usr/lib").glob("*/*.so*"):
        shutil.copy(library, libraries)
    _relocate(prefix, libraries)
    return prefix / "usr/bin"


def _fetch(directory: Path) -> None:
    """Download packages of another suite, with separate lists and caches."""
    for name in ("lists/partial", "cache/archives/partial"):
        (directory / name).mkdir(parents=True)
    (directory / "status").touch()
    source = f"deb [signed-by={KEYRING} check-valid-until=no] {mirror()} {SUITE} main\n"
    (directory / "sources.list").write_text(source)
    options = {
        "Dir::Etc::SourceList": directory / "sources.list",
        "Dir::Etc::SourceParts": "/dev/null",
        "Dir::State::Lists": directory / "lists",
        "Dir::State::Status": directory / "status",
        "Dir::Cache": directory / "cache",
        "Acquire::Languages": "none",
        "APT::Sandbox::User": "root",
    }
    flags = [f"-o{name}={value}" for name, value in options.items()]
    _call("apt-get", "-qq", *flags, "update")
    _call("apt-get", "-qq", *flags, "download", *PACKAGES, cwd=directory)


def _relocate(prefix: Path, libraries: Path) -> None:
    """Make the programs use those libraries, and find their own files below the prefix."""
    for top in (prefix / "usr", prefix / "usr/lib"):
        for name in ("etc", "var"):
            (top / name).symlink_to(prefix / name)
    [loader] = libraries.glob("ld-linux*.so.*")
    [starter] = prefix.glob("usr/lib/*/apptainer/bin/starter")
    for program in (prefix / "usr/bin/apptainer", starter):
        # RPATH and not RUNPATH: it also applies to the libraries that these libraries need.
        paths = ["--force-rpath", "--set-rpath", f"{libraries}:{starter.parents[2]}"]
        _call("patchelf", "--set-interpreter", str(loader), *paths, str(program))
    config = prefix / "etc/apptainer/apptainer.conf"
    config.write_text(config.read_text().replace("systemd cgroups = yes", "systemd cgroups = no"))  # there is no systemd


def _call(*command: str, cwd: Path | None = None) -> None:
    done = subprocess.run(command, cwd=cwd, capture_output=True, text=True, timeout=TIMEOUT, check=False)
    if done.returncode:
        raise UnavailableError(f"{command[0]} failed: {done.stderr[-500:]}")
