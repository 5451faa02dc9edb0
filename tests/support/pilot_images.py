"""Images of pilots, made by the recipes in images/ without network: their bases have all that they would install."""

import os
import shutil
import subprocess
import tempfile
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path

from tests.support.condor.pool import PACKAGES, SUITE
from tests.support.engines import Engine
from tests.support.paths import ROOT
from tests.support.servers import debian

TIMEOUT = 240

# The bases: a suite of Debian and packages. That of sid has a Python for which the file was made beside its own.
BASES: Mapping[str, tuple[str, ...]] = {
    "bubblewrap": (SUITE, *PACKAGES),
    "apptainer": ("sid", "apptainer", "squashfuse", "python3", "python3.13", "bubblewrap"),
    "docker": (SUITE, "docker.io", "python3", "bubblewrap"),
}
LEFT_OUT = [f"--exclude=./{name}" for name in ("dev", "usr/share", "var/cache")]


@contextmanager
def open_project(onefile: Path) -> Iterator[Path]:
    """Yield a directory with the files of the project that a recipe needs."""
    project = Path(tempfile.mkdtemp(prefix="trio-pilot-images-"))
    try:
        project.chmod(0o755)
        (project / "dist").mkdir()
        shutil.copy(onefile, project / "dist/trio-pilot")
        shutil.copytree(ROOT / "images", project / "images")
        yield project
    finally:
        shutil.rmtree(project)


def call(*command: str | Path, cwd: Path, given: str = "", **env: str) -> str:
    done = subprocess.run(
        command, cwd=cwd, env=os.environ | env, input=given, capture_output=True, text=True, timeout=TIMEOUT, check=False
    )
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout


def build_docker_image(platform: str, project: Path, engine: Engine, name: str) -> None:
    """Build an image by the Dockerfile, from a base that is removed with it."""
    base = f"{name}-base"
    command = import_base(platform, engine, base)
    given = [f"--build-arg={word}" for word in (f"BASE={base}", f"CONTAINER_PLATFORM={platform}")]
    build = ("build", "--network=none", *given, "--file=images/Dockerfile", f"--tag={name}", ".")
    call(*command, *build, cwd=project, DOCKER_BUILDKIT="0")


def import_base(platform: str, engine: Engine, name: str) -> tuple[str, ...]:
    """Import the base of a platform as an image into an engine; return docker's command for that engine."""
    command = ("docker", "--host", f"unix://{engine.socket}")
    with _packed(platform) as tar:
        subprocess.run([*command, "import", "-", name], stdin=tar.stdout, stdout=subprocess.DEVNULL, check=True)
    return command


def build_image(platform: str, project: Path, programs: Path, name: str = "image") -> Path:
    """Build a directory PROJECT/NAME by the definition, with the programs of apptainer."""
    base = project / "base"
    base.mkdir()
    with _packed(platform) as tar:
        subprocess.run(["tar", "-C", base, "-x"], stdin=tar.stdout, check=True)
    words = ("BOOTSTRAP=localimage", f"BASE={base}", f"CONTAINER_PLATFORM={platform}")
    build = ("apptainer", "build", "--sandbox", *(f"--build-arg={word}" for word in words), name, "images/trio-pilot.def")
    _as_mapped_root(*build, cwd=project, path=f"{programs}:{os.environ['PATH']}")
    shutil.rmtree(base)
    return project / name


def _packed(platform: str) -> "subprocess.Popen[bytes]":
    """Start to pack the base of a platform into an archive."""
    root = debian(*BASES[platform])
    return subprocess.Popen(["tar", "-C", root, *LEFT_OUT, "-c", "."], stdout=subprocess.PIPE)


def _as_mapped_root(*command: str | Path, cwd: Path, path: str) -> None:
    """Run a command as the root of a user namespace, which has a capability that root of this machine may lack."""
    waiting = ["unshare", "--user", "sh", "-c", 'echo; read _; exec "$@"', "-", *command]
    env, pipe = {**os.environ, "PATH": path}, subprocess.PIPE
    with subprocess.Popen(waiting, cwd=cwd, env=env, stdin=pipe, stdout=pipe, stderr=pipe) as child:
        assert child.stdout
        child.stdout.read(1)
        for name in ("uid_map", "gid_map"):
            Path(f"/proc/{child.pid}/{name}").write_text("0 0 65536")
        _, said = child.communicate(b"\n", timeout=TIMEOUT)
    assert child.returncode == 0, said.decode()
