"""Make the file: a ZIP archive of trio-pilot and all it needs, as bytecode, with a folder for each Python.

Nothing is unpacked, so that the first run is as fast as any other, and a job has only one: the pilot listens after 0.25 s.
Files made by pex and shiv unpack themselves to a disk first, and took 2.3 and 1.9 s; shiv needs a home, pex makes a `~`.

Made twice of the same sources, with the same Pythons, it is the same to the byte: packages come from the lock file, by their
hashes, and nothing in the file depends on the directory, the clock or the umask.
"""

import argparse
import os
import shutil
import subprocess
import sys
from collections.abc import Iterable, Iterator, Mapping
from contextlib import suppress
from functools import partial
from multiprocessing.pool import ThreadPool
from pathlib import Path
from tempfile import TemporaryDirectory
from zipfile import ZIP_DEFLATED, ZipFile, ZipInfo

ROOT = Path(__file__).parents[1]
LOCK, BUILD_LOCK = ROOT / ".ci" / "packages.lock", ROOT / ".ci" / "packages-build.lock"
MINORS = range(11, 15)  # minor versions of Python 3 that are looked for

# Packages that the pilot never imports: tests of libraries, and parts of cyclopts and rich for coloured help.
LEFT_OUT = {"tests", "_tests", "bin", "pygments", "rich_rst", "markdown_it", "mdurl", "_cffi", "backend_cffi"}

# What pip writes about the installation itself: the path of the wheel, and hashes of files that are not kept.
OF_PIP = {"direct_url.json", "RECORD", "INSTALLER", "REQUESTED"}

# A job may have no PATH; sh has a default for it.
HEADER = """#!/bin/sh
if [ -n "$TRIO_PILOT_PYTHON" ]; then
    found=$(command -v "$TRIO_PILOT_PYTHON") && exec "$found" -I -S "$0" "$@"
    echo "trio-pilot: TRIO_PILOT_PYTHON must name a Python, not '$TRIO_PILOT_PYTHON'" >&2
    exit 4
fi
for python in python3 %s; do
    found=$(command -v "$python") && exec "$found" -I -S "$0" "$@"
done
echo "trio-pilot: there is no python3 on the PATH; name one in TRIO_PILOT_PYTHON" >&2
exit 4
"""

# The path of a Python, and the tag of its compiled modules, such as cpython-311-x86_64-linux-gnu.
FACTS = "import sys, importlib.machinery as i; print(sys.executable, i.EXTENSION_SUFFIXES[0].split('.')[1], sep='\\n')"


def main() -> None:
    """Make the file."""
    parser = argparse.ArgumentParser(prog="python -m onefile", description=__doc__)
    parser.add_argument(
        "pythons", nargs="*", metavar="PYTHON", help="Python for which to make the file [all that are found]"
    )
    parser.add_argument(
        "--output", type=Path, default=ROOT / "dist" / "trio-pilot", metavar="FILE", help="[dist/trio-pilot]"
    )
    given = parser.parse_args()
    print(make(given.output, given.pythons or found_pythons()))


def found_pythons() -> Iterator[str]:
    """Yield a Python of each minor version, from PATH or from pyenv."""
    for minor in MINORS:
        pyenv = Path("~/.pyenv/versions").expanduser().glob(f"3.{minor}.*/bin/python3")
        for python in [f"python3.{minor}", *map(str, pyenv)]:
            with suppress(OSError, subprocess.CalledProcessError):  # not there, or a shim of pyenv without a Python
                _facts(python)
                yield python
                break


def make(output: Path, pythons: Iterable[str]) -> str:
    """Make the file, and return a line with its path, its size and its Pythons."""
    with TemporaryDirectory() as directory:
        wheels, archive = Path(directory, "wheels"), Path(directory, "archive")
        _build(wheels, Path(directory, "build"))
        with ThreadPool(os.cpu_count()) as threads:
            tags = threads.map(partial(_fill, archive, next(wheels.iterdir())), pythons)
        (archive / "tags").write_text("\n".join(tags))
        shutil.copy(ROOT / "onefile" / "start.py", archive / "__main__.py")
        output.parent.mkdir(parents=True, exist_ok=True)
        _write(output, archive)
    return f"{output}: {output.stat().st_size / 1e6:.1f} MB, for {', '.join(tags)}"


def _build(wheels: Path, packages: Path) -> None:
    """Build the wheel of trio-pilot by packages of the lock file, and by no others."""
    _pip(sys.executable, "install", "--require-hashes", "-r", str(BUILD_LOCK), "--target", str(packages))
    options = "--no-deps", "--no-build-isolation", "--wheel-dir", str(wheels)
    _pip(sys.executable, "wheel", *options, str(ROOT), env={**os.environ, "PYTHONPATH": str(packages)})


def _fill(archive: Path, wheel: Path, python: str) -> str:
    """Fill the folder for a Python, whose name is the tag of its compiled modules; return the tag."""
    executable, tag = _facts(python)
    folder = archive / tag
    for what in (["--require-hashes", "-r", str(LOCK)], ["--no-deps", str(wheel)]):
        _pip(executable, "install", "--no-compile", "--upgrade", "--target", str(folder), *what)
    _remove(path for path in folder.rglob("*") if path.name.split(".")[0] in LEFT_OUT or path.name in OF_PIP)
    shutil.copytree(ROOT / "onefile", folder / "onefile")
    if strip := shutil.which("strip"):  # which removes 11 MB of symbols for debuggers
        subprocess.run([strip, "--strip-unneeded", *folder.rglob("*.so")], check=True)
    compiling = ["-m", "compileall", "-q", "-b", "--invalidation-mode", "unchecked-hash", "-s", str(archive), str(folder)]
    subprocess.run([executable, "-I", *compiling], check=True)
    # Only the sources of trio-pilot are kept, for the lines in tracebacks.
    _remove(path for path in folder.rglob("*.py*") if path.suffix != ".pyc" and folder / "trio_pilot" not in path.parents)
    return tag


def _remove(paths: Iterable[Path]) -> None:
    for path in list(paths):
        shutil.rmtree(path) if path.is_dir() else path.unlink(missing_ok=True)


def _facts(python: str) -> list[str]:
    return subprocess.run([python, "-I", "-S", "-c", FACTS], check=True, capture_output=True, text=True).stdout.split("\n")[
        :2
    ]


def _pip(python: str, *arguments: str, env: Mapping[str, str] | None = None) -> None:
    command = [sys.executable, "-m", "pip", "--python", python, *arguments, "--quiet", "--disable-pip-version-check"]
    subprocess.run(command, check=True, env=env)


def _write(output: Path, archive: Path) -> None:
    """Write the file, and replace an old one in one step: pilots may be running from it."""
    pythons = " ".join(f"python3.{minor}" for minor in reversed(MINORS))
    new = output.with_name(f".{output.name}.new")
    with new.open("wb") as file:
        file.write((HEADER % pythons).encode())
        with ZipFile(file, "w", ZIP_DEFLATED) as zipped:
            for path in sorted(path for path in archive.rglob("*") if path.is_file()):
                # With the date and the mode that this has by itself, those of the files do not matter.
                zipped.writestr(ZipInfo(str(path.relative_to(archive))), path.read_bytes(), ZIP_DEFLATED)
    new.chmod(0o755)
    new.rename(output)


if __name__ == "__main__":
    main()
