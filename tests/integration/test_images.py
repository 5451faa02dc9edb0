"""The recipes in images/: each image is built without network, and run as by EWMS, with an envfile for its entrypoint."""

import os
import shlex
import signal
import subprocess
import uuid
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path

import pytest

from tests.support.engines import Engine
from tests.support.images import build_directory, build_file, make_docker_archive, make_image
from tests.support.pilot_images import TIMEOUT, build_docker_image, build_image, call, open_project
from tests.support.processes import processes_with
from tests.support.servers import UnavailableError
from tests.support.services import cannot
from tests.support.users import NOBODY, needs_root
from tests.support.waiting import ENGINE, until_sync
from trio_pilot.cli.exit_codes import SIGNALLED
from trio_pilot.errors import NodeError

COPY = "cp {{INFILE}} {{OUTFILE}}"
ENTRYPOINT = {"Entrypoint": ["busybox"], "Env": ["PATH=/bin"]}  # of an image for tasks
FILES_AS_IMAGES = {"_EWMS_PILOT_APPTAINER_IMAGE_DIRECTORY_MUST_BE_PRESENT": "false"}
AS_NOBODY = ("setpriv", f"--reuid={NOBODY}", f"--regid={NOBODY}", "--clear-groups")

# By default, Docker prevents containers from making containers.
ALLOWING = tuple(f"--security-opt={what}=unconfined" for what in ("seccomp", "systempaths"))
# As with --privileged, which fails where root itself lacks a capability.
CAPABILITIES = "--cap-add=ALL", "--cap-drop=SYS_RESOURCE", "--security-opt=apparmor=unconfined", "--cgroupns=private"
PRIVILEGED = *ALLOWING, *CAPABILITIES, "--entrypoint=sh"
WITH_CGROUPS = 'for top in /sys/fs/cgroup /sys/fs/cgroup/*; do mount -o remount,bind,rw "$top"; done 2>&1; exec "$@"'

# Loads an image into a daemon that the image of a pilot starts.
LOAD = """
import http.client, runpy, socket, sys
if fault := runpy.run_path("/usr/local/bin/with_docker.py")["start"]():
    sys.exit(fault)
connection = http.client.HTTPConnection("docker")
connection.sock = socket.socket(socket.AF_UNIX)
connection.sock.connect("/run/docker.sock")
connection.request("POST", "/images/load", open(sys.argv[1], "rb"), {"Content-Type": "application/x-tar"})
answer = connection.getresponse()
print(answer.read().decode())
sys.exit(answer.status != 200)
"""

pytestmark = needs_root


@pytest.fixture(scope="module")
def project(onefile: Path) -> Iterator[Path]:
    with open_project(onefile) as project:
        yield project


@pytest.fixture
def job(project: Path) -> Path:
    """The directory of a job, which belongs to its user."""
    job = project / f"job-{uuid.uuid4().hex}"
    job.mkdir()
    os.chown(job, NOBODY, NOBODY)
    return job


@pytest.fixture(scope="module")
def archive(project: Path) -> Path:
    """An image for tasks, as of `docker save`."""
    archive = project / "archive.tar"
    make_docker_archive(make_image(project / "root"), archive, "task:local", ENTRYPOINT)
    return archive


@pytest.fixture(scope="module")
def task_directory(archive: Path, apptainer: Path, project: Path) -> Path:
    """The same image, unpacked."""
    return build_directory(apptainer, archive, project / "task")


def write_envfile(job: Path, platform: str, task_image: str | Path = "/", task_args: str = COPY, **more: str) -> None:
    """Write settings to the envfile of a job."""
    variables = {
        "EWMS_PILOT_TASK_IMAGE": str(task_image),
        "EWMS_PILOT_TASK_ARGS": task_args,
        "EWMS_PILOT_QUEUE_INCOMING": "events",
        "EWMS_PILOT_QUEUE_OUTGOING": "outputs",
        "EWMS_PILOT_DATA_DIR_PARENT_PATH_ON_HOST": str(job),
        "_EWMS_PILOT_CONTAINER_PLATFORM": platform,
        **more,
    }
    lines = [f"export {name}={shlex.quote(value)}\n" for name, value in variables.items()]
    (job / "ewms_htcondor_envfile.sh").write_text("".join(lines))


def copies_an_event(job: Path, *image: str | Path) -> None:
    """Run the image as a pilot with the settings in the envfile of its directory."""
    call(*image, "send", "events", cwd=job, given='"event"')
    call(*image, cwd=job)
    assert call(*image, "receive", "outputs", "--idle=0.1", cwd=job) == '"event"\n'


@contextmanager
def docker_image(platform: str, project: Path, engine: Engine) -> Iterator[str]:
    name, command = f"pilot-{platform}:local", ("docker", "--host", f"unix://{engine.socket}")
    try:
        build_docker_image(platform, project, engine, name)
        yield name
    except UnavailableError as error:
        cannot(str(error))
    finally:
        subprocess.run([*command, "rmi", "--force", name, f"{name}-base"], capture_output=True, check=False)


def in_docker(engine: Engine, job: Path, *options: str | Path) -> Sequence[str | Path]:
    """Return the command that runs an image, whose name follows."""
    run = ("docker", "--host", f"unix://{engine.socket}", "run", "--rm", "--interactive", "--network=none")
    return *run, f"--volume={job}:{job}", f"--workdir={job}", *options


def test_the_dockerfile_makes_an_image_that_is_a_pilot(docker: Engine, project: Path, job: Path) -> None:
    with docker_image("bubblewrap", project, docker) as image:
        write_envfile(job, "process")
        copies_an_event(job, *in_docker(docker, job, image))
        write_envfile(job, "bubblewrap")
        copies_an_event(job, *in_docker(docker, job, *ALLOWING, image))


@pytest.mark.soak
def test_the_dockerfile_makes_an_image_with_apptainer(
    docker: Engine, project: Path, job: Path, task_directory: Path
) -> None:
    with docker_image("apptainer", project, docker) as image:
        write_envfile(job, "apptainer", task_directory)
        copies_an_event(job, *in_docker(docker, job, *ALLOWING, f"--volume={task_directory}:{task_directory}:ro", image))


@pytest.fixture
def volume(docker: Engine) -> Iterator[str]:
    """A volume for the images of a daemon in a container."""
    name, command = f"volume-{uuid.uuid4().hex}", ("docker", "--host", f"unix://{docker.socket}", "volume")
    yield name
    subprocess.run([*command, "rm", name], stdout=subprocess.DEVNULL, check=True)


@pytest.mark.soak
def test_the_dockerfile_makes_an_image_with_a_docker_daemon(
    docker: Engine, project: Path, job: Path, archive: Path, volume: str
) -> None:
    with docker_image("docker", project, docker) as image:
        mounts = (f"--volume={volume}:/var/lib/docker", f"--volume={archive}:{archive}:ro")
        privileged = (*in_docker(docker, job, *PRIVILEGED, *mounts, image), "-c", WITH_CGROUPS, "-")
        call(*privileged, "python3", "-c", LOAD, archive, cwd=job)
        write_envfile(job, "docker", "task:local", EWMS_PILOT_TASK_MEMORY="100m")
        copies_an_event(job, *privileged, "start-pilot")
        returns_its_event_when_stopped(job, *privileged, "start-pilot")
        says_why_no_daemon_starts(job, *in_docker(docker, job, image))


def returns_its_event_when_stopped(job: Path, *image: str | Path) -> None:
    """Stop a pilot with a daemon of its own, and a task: its event is in the queue again, and nothing runs any more."""
    mark = f"mark-{uuid.uuid4().hex}"
    write_envfile(job, "docker", "task:local", f"sh -c 'sleep 1000 && : {mark}'", EWMS_PILOT_GRACE="1")
    call(*image, "send", "events", cwd=job, given='"event"')
    with subprocess.Popen(image, cwd=job, stdin=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True) as pilot:
        until_sync(lambda: pilot.poll() is not None or processes_with(mark), "the task to run", ENGINE)
        pilot.terminate()
        _, said = pilot.communicate(timeout=TIMEOUT)
    assert pilot.returncode == SIGNALLED + signal.SIGTERM, said
    assert processes_with(mark) == []
    assert call(*image, "receive", "events", "--idle=0.1", cwd=job) == '"event"\n'


def says_why_no_daemon_starts(job: Path, *image: str | Path) -> None:
    """Start a pilot with a daemon of its own in a container where none can start."""
    done = subprocess.run(image, cwd=job, stdin=subprocess.DEVNULL, capture_output=True, text=True, check=False)
    assert done.returncode == NodeError.exit_code
    assert "the docker daemon does not start: " in done.stderr
    assert "docker does not work here" in done.stderr


@pytest.mark.parametrize("platform", ["bubblewrap", pytest.param("docker", marks=pytest.mark.soak)])
def test_the_definition_makes_an_image_that_is_a_pilot(apptainer: Path, project: Path, job: Path, platform: str) -> None:
    image = build(platform, project, apptainer)
    for runtime in ("process", "bubblewrap"):
        write_envfile(job, runtime)
        copies_an_event(job, *in_apptainer(apptainer, job, image))


@pytest.mark.soak  # test_condor_images.py runs one in a pool
def test_the_definition_makes_an_image_with_apptainer(
    apptainer: Path, project: Path, job: Path, archive: Path, task_directory: Path
) -> None:
    image = build("apptainer", project, apptainer)
    for runtime in ("apptainer", "auto"):
        write_envfile(job, runtime, task_directory)
        call(*in_apptainer(apptainer, job, image, f"--bind={task_directory}"), "check", cwd=job)
        copies_an_event(job, *in_apptainer(apptainer, job, image, f"--bind={task_directory}"))
    file = build_file(apptainer, archive, project / "task.sif")
    write_envfile(job, "apptainer", file, **FILES_AS_IMAGES, _EWMS_PILOT_APPTAINER_BUILD_WORKDIR=str(job))
    copies_an_event(job, *in_apptainer(apptainer, job, image, f"--bind={file}"))


def build(platform: str, project: Path, programs: Path) -> Path:
    try:
        return build_image(platform, project, programs, f"image-{platform}")
    except UnavailableError as error:
        cannot(str(error))


def in_apptainer(programs: Path, job: Path, image: Path, *options: str) -> Sequence[str | Path]:
    """Return the command that runs an image, as a user who is not root."""
    run = (programs / "apptainer", "run", "--containall", "--no-home", f"--bind={job}", f"--pwd={job}")
    return *AS_NOBODY, *run, *options, image
