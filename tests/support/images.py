"""Programs and images that runtimes need."""

import functools
import hashlib
import io
import json
import os
import shutil
import subprocess
import sys
import tarfile
from collections.abc import Mapping
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

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


def make_docker_archive(root: Path, file: Path, name: str, config: Mapping[str, Any]) -> None:
    """Make an archive, as of `docker save`, of an image: one layer, with a configuration of ENTRYPOINT and so on."""
    layer = io.BytesIO()
    with tarfile.open(fileobj=layer, mode="w") as tar:
        tar.add(root, ".")
    digest = hashlib.sha256(layer.getvalue()).hexdigest()
    facts = {
        "architecture": "amd64",
        "os": "linux",
        "config": config,
        "rootfs": {"type": "layers", "diff_ids": [f"sha256:{digest}"]},
        "history": [{"created_by": "a test"}],
    }
    described = json.dumps(facts).encode()
    config_name = f"{hashlib.sha256(described).hexdigest()}.json"
    manifest = [{"Config": config_name, "RepoTags": [name], "Layers": [f"{digest}/layer.tar"]}]
    contents = {
        config_name: described,
        f"{digest}/layer.tar": layer.getvalue(),
        "manifest.json": json.dumps(manifest).encode(),
    }
    with tarfile.open(file, "w") as tar:
        for member, content in contents.items():
            info = tarfile.TarInfo(member)
            info.size = len(content)
            tar.addfile(info, io.BytesIO(content))


def build_directory(apptainer: Path, archive: Path, directory: Path) -> Path:
    """Unpack an archive, as of `docker save`, with apptainer, as the images that EWMS's users name are made."""
    return _build(apptainer, archive, directory, "--sandbox")


def build_file(apptainer: Path, archive: Path, file: Path) -> Path:
    """Make a .sif file of an archive."""
    return _build(apptainer, archive, file)


def _build(apptainer: Path, archive: Path, image: Path, *flags: str) -> Path:
    command = [str(apptainer / "apptainer"), "--silent", "build", "--disable-cache", *flags]
    subprocess.run([*command, str(image), f"docker-archive:{archive}"], check=True, timeout=60, stdin=subprocess.DEVNULL)
    return image
