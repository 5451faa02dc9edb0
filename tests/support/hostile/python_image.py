"""An image with a Python that can run the hostile tries: no more of it than they load."""

import json
import shutil
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

from tests.support.images import make_image

# Debian's, which every user can execute; that of a virtual environment may be in /tmp, which a container does not see.
PYTHON = next(str(path.resolve()) for path in (Path("/usr/bin/python3"), Path(sys.executable)) if path.exists())

MODULES = "ctypes, errno, fcntl, glob, json, os, resource, signal, socket, stat, struct, sys, encodings.idna, re"
LIST = f"""
import {MODULES}
print(json.dumps([module.__file__ for module in list(sys.modules.values()) if getattr(module, "__file__", None)]))
"""


def make_python_image(directory: Path) -> Path:
    """Make an image of a busybox and a Python, at the path that it has on this machine."""
    make_image(directory)
    for name in ("sys", "run", "opt", "root"):
        (directory / name).mkdir(exist_ok=True)
    for path in _files():
        inside = directory / path.relative_to("/")
        inside.parent.mkdir(parents=True, exist_ok=True)
        if not inside.exists():
            shutil.copy(path, inside)
    return directory


def _files() -> Iterator[Path]:
    said = subprocess.run([PYTHON, "-I", "-S", "-c", LIST], capture_output=True, check=True).stdout
    loaded = [Path(PYTHON), *map(Path, json.loads(said))]
    yield from loaded
    for path in loaded:
        if path.suffix == ".so" or path == Path(PYTHON):
            listed = subprocess.run(["ldd", path], capture_output=True, text=True, check=False).stdout
            yield from (Path(word) for word in listed.split() if word.startswith("/"))
