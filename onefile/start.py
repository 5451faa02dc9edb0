"""The `__main__` of the file. It is source in simple syntax, so that an old Python can run it, and report an error."""

import os
import shutil
import sys
from importlib.machinery import EXTENSION_SUFFIXES
from pathlib import Path
from zipimport import zipimporter

THIS = EXTENSION_SUFFIXES[0].split(".")[1]  # tag of compiled modules, such as cpython-311-x86_64-linux-gnu
NODE_ERROR = 4  # exit code: this machine cannot run tasks


def main() -> None:
    """Run trio-pilot from the file's folder for this Python, or with another Python."""
    file = Path(sys.path[0]).absolute()
    archive = zipimporter(str(file))
    tags = archive.get_data(str(file / "tags")).decode().split()
    if THIS not in tags:
        start_another(file, tags)
    folder = str(file / THIS)
    sys.path.insert(0, folder)
    from onefile.extensions import Extensions

    sys.meta_path.append(Extensions(archive, folder))
    from trio_pilot.cli.main import main

    main()


def start_another(file: Path, tags: "list[str]") -> None:
    """Restart with a Python for which the file was made. Exits if there is none."""
    for tag in tags:
        python = shutil.which(f"python3.{tag.split('-')[1][1:]}")
        if python:
            os.execv(python, [python, "-I", "-S", str(file), *sys.argv[1:]])
    sys.stderr.write(f"trio-pilot: made for {', '.join(tags)}; {sys.executable} is {THIS}\n")
    sys.exit(NODE_ERROR)


main()
