"""The recipes in images/: each image is built without network, and run as by EWMS, with an envfile for its entrypoint."""

import os
import shutil
import subprocess
import tempfile
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.support.condor.pool import PACKAGES, SUITE
from tests.support.engines import Engine
from tests.support.paths import ROOT
from tests.support.servers import UnavailableError, debian
from tests.support.users import NOBODY, needs_root

TIMEOUT = 120
BASE, IMAGE = "base:local", "trio-pilot:local"
LEFT_OUT = [f"--exclude=./{name}" for name in ("dev", "usr/share", "var/cache")]

pytestmark = needs_root


@pytest.fixture(scope="module")
def base() -> Path:
    """The root of a Debian with Python and bubblewrap, as there is no registry: that of the pool."""
    try:
        return debian(SUITE, *PACKAGES)
    except UnavailableError as error:
        pytest.skip(str(error))


@pytest.fixture
def project(onefile: Path) -> Iterator[Path]:
    """The files of the project that a recipe needs."""
    project = Path(tempfile.mkdtemp(prefix="trio-pilot-images-"))
    project.chmod(0o755)
    (project / "dist").mkdir()
    shutil.copy(onefile, project / "dist/trio-pilot")
    shutil.copytree(ROOT / "images", project / "images")
    yield project
    shutil.rmtree(project)


@pytest.fixture
def job(project: Path) -> Path:
    """The directory of a job, which belongs to its user."""
    job = project / "job"
    job.mkdir()
    os.chown(job, NOBODY, NOBODY)
    return job


def call(*command: str | Path, cwd: Path, given: str = "", **env: str) -> str:
    done = subprocess.run(
        command, cwd=cwd, env=os.environ | env, input=given, capture_output=True, text=True, timeout=TIMEOUT, check=False
    )
    assert done.returncode == 0, done.stderr
    return done.stdout


def copies_an_event(job: Path, runtime: str, *image: str | Path) -> None:
    """Run the image as a pilot with settings in the envfile of its directory."""
    settings = {"TASK_IMAGE": "/", "TASK_ARGS": "cp {{INFILE}} {{OUTFILE}}", "RUNTIME": runtime}
    settings |= {"QUEUE_INCOMING": "events", "QUEUE_OUTGOING": "outputs", "DATA_DIR_PARENT_PATH_ON_HOST": str(job)}
    lines = [f"export EWMS_PILOT_{name}='{value}'\n" for name, value in settings.items()]
    (job / "ewms_htcondor_envfile.sh").write_text("".join(lines))
    call(*image, "send", "events", cwd=job, given='"event"')
    call(*image, cwd=job)
    assert call(*image, "receive", "outputs", "--idle=0.1", cwd=job) == '"event"\n'


def test_the_dockerfile_makes_an_image_that_is_a_pilot(docker: Engine, base: Path, project: Path, job: Path) -> None:
    command = ("docker", "--host", f"unix://{docker.socket}")
    with subprocess.Popen(["tar", "-C", base, *LEFT_OUT, "-c", "."], stdout=subprocess.PIPE) as tar:
        subprocess.run([*command, "import", "-", BASE], stdin=tar.stdout, stdout=subprocess.DEVNULL, check=True)
    build = ("build", "--network=none", f"--build-arg=BASE={BASE}", "--file=images/Dockerfile", f"--tag={IMAGE}", ".")
    call(*command, *build, cwd=project, DOCKER_BUILDKIT="0")
    try:
        run = (*command, "run", "--rm", "--interactive", "--network=none", f"--volume={job}:{job}", f"--workdir={job}")
        copies_an_event(job, "process", *run, IMAGE)
        # By default, Docker prevents containers from making containers.
        allowing = [f"--security-opt={what}=unconfined" for what in ("seccomp", "systempaths")]
        copies_an_event(job, "bubblewrap", *run, *allowing, IMAGE)
    finally:
        call(*command, "rmi", IMAGE, BASE, cwd=project)


def as_mapped_root(*command: str | Path, cwd: Path, path: str) -> None:
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


def build_image(base: Path, project: Path, programs: Path) -> None:
    """Build PROJECT/image by the definition, with the programs of apptainer."""
    (project / "base").mkdir()
    with subprocess.Popen(["tar", "-C", base, *LEFT_OUT, "-c", "."], stdout=subprocess.PIPE) as tar:
        subprocess.run(["tar", "-C", project / "base", "-x"], stdin=tar.stdout, check=True)
    given = [f"--build-arg={word}" for word in ("BOOTSTRAP=localimage", f"BASE={project}/base")]
    build = ("apptainer", "build", "--sandbox", *given, "image", "images/trio-pilot.def")
    as_mapped_root(*build, cwd=project, path=f"{programs}:{os.environ['PATH']}")


def test_the_definition_makes_an_image_that_is_a_pilot(apptainer: Path, base: Path, project: Path, job: Path) -> None:
    build_image(base, project, apptainer)
    user = ("setpriv", f"--reuid={NOBODY}", f"--regid={NOBODY}", "--clear-groups")
    run = (apptainer / "apptainer", "run", "--containall", "--no-home", f"--bind={job}", f"--pwd={job}", project / "image")
    for runtime in ("process", "bubblewrap"):
        copies_an_event(job, runtime, *user, *run)
