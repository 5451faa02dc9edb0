"""Pilots as jobs of `universe = container`, in the images of the recipes, with tasks in images that apptainer has unpacked.

A pool of its own has apptainer, and, as a site of EWMS, a directory of images at /cvmfs, which its containers see as well.
"""

import re
import shlex
import tempfile
import uuid
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from http.server import BaseHTTPRequestHandler, HTTPServer
from pathlib import Path
from threading import Thread
from typing import Any

import pytest

from tests.integration.test_condor import HELD, PREFIX, Submitter, assert_nothing_is_left, long_tasks, wait_for_two_tasks
from tests.support.apptainer import open_apptainer
from tests.support.condor.pool import USER, Pool, open_pool
from tests.support.images import build_directory, build_file, make_docker_archive, make_image
from tests.support.pilot_images import build_image, open_project
from tests.support.servers import RabbitServer, UnavailableError
from tests.support.services import cannot
from trio_pilot.allocation.resources import THREADS
from trio_pilot.errors import TasksFailedError

CONFIG = 'SINGULARITY = {}/apptainer\nSINGULARITY_BIND_EXPR = "/cvmfs"\n'
HOST = "condorpool"  # a name that only the pool knows

GREETING = 'it\'s a "fine"  day'
SEARCH_PATH = "/app/bin:/usr/local/sbin:/usr/local/bin:/usr/sbin:/usr/bin:/sbin:/bin"
IMAGE: Mapping[str, Any] = {
    "Entrypoint": ["tool", "of the image"],
    "Cmd": ["by default", "it's"],
    "Env": [f"PATH={SEARCH_PATH}", f"GREETING={GREETING}"],
}
UNLUCKY = 13  # an event that fails
TOOL = f"""#!/bin/sh
[ "$(cat "$EWMS_TASK_INFILE")" != {UNLUCKY} ] || {{ echo "ValueError: no such event: $GREETING" >&2; exit 3; }}
{{
    printf '<%s>' "$@"
    printf '\\n%s\\n' "$PWD $(id -un) $(cat "$EWMS_TASK_DATA_HUB_DIR/fetched") $(cat "$EWMS_TASK_INFILE")"
    env | sort
}} > "$EWMS_TASK_OUTFILE"
"""
ARGUMENTS = ("a  b", "$HOME", 'it\'s "so"', "`id`", "é\\n")

# Variables that only some runtimes set, and the parts of values that differ from task to task.
OWN = re.compile(
    r"(APPTAINER|SINGULARITY|TRIO_PILOT)_.*|LD_LIBRARY_PATH|PROMPT_COMMAND|PS1|SHLVL|PWD|LANG|_|_CONDOR_ANCESTOR_.*"
)
TASK_ID = re.compile(r"[0-9a-f]{8}-[0-9a-f-]{27}")


@dataclass
class Site:
    """A pool with apptainer, and the images that its jobs see at /cvmfs."""

    pool: Pool
    images: Path
    programs: Path
    onefile: Path

    def pilot(self, platform: str) -> str:
        """Return the image of a pilot, which is built when it is first needed."""
        if not (self.images / platform).exists():
            try:
                with open_project(self.onefile) as project:
                    build_image(platform, project, self.programs, str(self.images / platform))
            except UnavailableError as error:
                cannot(str(error))
        return f"/cvmfs/{platform}"


@pytest.fixture(scope="module")
def site(onefile: Path) -> Iterator[Site]:
    try:
        with tempfile.TemporaryDirectory(prefix="trio-pilot-cvmfs-") as images, open_apptainer(own=True) as programs:
            Path(images).chmod(0o755)
            seen = {str(programs.parents[2]): programs.parents[2], "/cvmfs": Path(images)}
            with open_pool(CONFIG.format(programs), seen) as pool:
                make_task_images(Path(images), programs)
                yield Site(pool, Path(images), programs, onefile)
    except UnavailableError as error:
        cannot(str(error))


def make_task_images(images: Path, programs: Path) -> None:
    """Make a plain directory, and the image of a tool as apptainer unpacks it."""
    root = make_image(images / "plain")
    (root / "etc/passwd").write_text("root:x:0:0:root:/root:/bin/sh\n")
    (root / "etc/group").write_text("root:x:0:\n")
    (root / "app/bin").mkdir(parents=True)
    (root / "app/bin/tool").write_text(TOOL)
    (root / "app/bin/tool").chmod(0o755)
    make_docker_archive(root, images / "tool.tar", "tool:local", IMAGE)
    build_directory(programs, images / "tool.tar", images / "tool")
    build_file(programs, images / "tool.tar", images / "tool.sif")


@pytest.fixture
def user(site: Site, rabbitmq: RabbitServer) -> Iterator[Submitter]:
    user = Submitter(site.pool, site.onefile, rabbitmq)
    yield user
    user.remove_jobs()


@pytest.fixture
def mark() -> str:
    return f"mark-{uuid.uuid4().hex}"


class Handler(BaseHTTPRequestHandler):
    def do_GET(self) -> None:
        self.send_response(200)
        self.end_headers()
        self.wfile.write(b"of a host")

    def log_message(self, *_: object) -> None:
        pass


@pytest.fixture(scope="module")
def url() -> Iterator[str]:
    """The address of a file at a host with a name."""
    with HTTPServer(("127.0.0.1", 0), Handler) as server:
        Thread(target=server.serve_forever).start()
        yield f"http://{HOST}:{server.server_port}/"
        server.shutdown()


@dataclass
class Ran:
    """What a pilot did: its outputs, by their events, and its job's last ClassAd."""

    outputs: Sequence[str]
    ad: Mapping[str, Any]
    log: str


@dataclass
class Work:
    """An init container that fetches a file, and tasks in the image of the tool."""

    user: Submitter
    url: str

    def run(
        self, platform: str, events: Sequence[int], args: Sequence[str] = (), *, image: str, task_image: str = "/cvmfs/tool"
    ) -> Ran:
        """Run it in a job, in an image or else in none, with the settings in an envfile, as of EWMS's task manager."""
        variables = {
            "EWMS_PILOT_TASK_ARGS": shlex.join(args),
            "EWMS_PILOT_INIT_ARGS": f"wget -q -O {{{{DATA_HUB}}}}/fetched {self.url}",
            "_EWMS_PILOT_CONTAINER_PLATFORM": platform,
            "_EWMS_PILOT_APPTAINER_IMAGE_DIRECTORY_MUST_BE_PRESENT": str(not task_image.endswith(".sif")),
        }
        envfile = self.user.home / "sent/ewms_htcondor_envfile.sh"  # elsewhere than where condor-submit would read it
        envfile.parent.mkdir(exist_ok=True)
        envfile.write_text("".join(f"export {name}={shlex.quote(value)}\n" for name, value in variables.items()))
        self.user.send(events)
        flags = [f"--container-image={image}"] if image else []
        images = (f"--task-image={task_image}", "--init-image=/cvmfs/plain")
        job = self.user.submit(*flags, *images, f"--transfer={envfile}")
        [ad] = job.wait()
        return Ran(sorted(self.user.receive(self.user.results), key=event_of), ad, self.user.log(job))


@pytest.fixture
def work(user: Submitter, url: str) -> Work:
    return Work(user, url)


def event_of(output: str) -> int:
    return int(output.split("\n")[1].rpartition(" ")[2])


def environment(output: str) -> Mapping[str, str]:
    pairs = (TASK_ID.sub("ID", line).partition("=")[::2] for line in output.splitlines()[2:])
    return {name: value for name, value in pairs if not OWN.fullmatch(name) and name not in THREADS}


ENVIRONMENT = {
    "EWMS_TASK_DATA_HUB_DIR": "/ewms-pilot-data/data-hub",
    "EWMS_TASK_INFILE": "/ewms-pilot-data/task-io/infile-ID.in",
    "EWMS_TASK_OUTFILE": "/ewms-pilot-data/task-io/outfile-ID.out",
    "GREETING": GREETING,
    "HOME": "/tmp",
    "PATH": SEARCH_PATH,
    "TMPDIR": "/tmp",
}


def assert_exact(ran: Ran, events: Sequence[int], words: Sequence[str]) -> None:
    """Check that tasks had the arguments, directory, user, event, variables, and file of the init container as expected."""
    assert ran.ad["ExitCode"] == 0, ran.log
    assert len(ran.outputs) == len(events)
    said = "".join(f"<{word}>" for word in ("of the image", *words))
    for event, output in zip(events, ran.outputs, strict=True):
        assert output.startswith(f"{said}\n/tmp {USER} of a host {event}\n")
        assert environment(output) == ENVIRONMENT


@pytest.mark.parametrize("platform", ["bubblewrap", pytest.param("apptainer", marks=pytest.mark.soak)])
def test_tasks_in_a_pilots_image_run_as_their_image_says(site: Site, work: Work, platform: str) -> None:
    ran = work.run(platform, range(8), ARGUMENTS, image=site.pilot(platform))
    assert_exact(ran, range(8), ARGUMENTS)
    assert (ran.ad[f"{PREFIX}Status"], ran.ad[f"{PREFIX}Runtime"]) == ("Done", platform)


# The images of pilots, and what runs the tasks in them; with no image, a pilot runs as it is.
PLACES = [("bubblewrap", "bubblewrap"), ("apptainer", "bubblewrap"), ("apptainer", "apptainer"), ("", "bubblewrap")]


@pytest.mark.soak
@pytest.mark.parametrize(("pilot", "platform"), PLACES)
def test_a_task_is_the_same_wherever_its_pilot_runs(site: Site, work: Work, pilot: str, platform: str) -> None:
    image = site.pilot(pilot) if pilot else ""
    assert_exact(work.run(platform, range(8), ARGUMENTS, image=image), range(8), ARGUMENTS)
    assert_exact(work.run(platform, [1, 2], image=image), [1, 2], ("by default", "it's"))
    failed = work.run(platform, [UNLUCKY], image=image)
    assert failed.ad["ExitCode"] == TasksFailedError.exit_code
    error = f"task failed (exit code 3): ValueError: no such event: {GREETING}"
    assert failed.ad[f"{PREFIX}Error"] == f"ContainerRunError: {error}"
    missing = work.run(platform, [1], ["no-such-tool"], image=image, task_image="/cvmfs/plain")
    assert missing.ad[f"{PREFIX}Error"].endswith("task failed (exit code 127): no-such-tool: No such file or directory")


@pytest.mark.soak
def test_apptainer_in_an_image_runs_tasks_in_a_file(site: Site, work: Work) -> None:
    ran = work.run("auto", [1, 2], ARGUMENTS, image=site.pilot("apptainer"), task_image="/cvmfs/tool.sif")
    assert_exact(ran, [1, 2], ARGUMENTS)
    assert ran.ad[f"{PREFIX}Runtime"] == "apptainer"


@pytest.mark.soak
def test_an_image_runs_plain_processes(site: Site, user: Submitter) -> None:
    user.send(range(3))
    task = ("--runtime=process", """--task-args=sh -c "cp {{INFILE}} '{{OUTFILE}}'" """, "--outfile-ext=.json")
    job = user.submit(f"--container-image={site.pilot('bubblewrap')}", *task)
    [ad] = job.wait()
    assert ad["ExitCode"] == 0, user.log(job)
    assert sorted(user.receive(user.results)) == [0, 1, 2]
    assert (ad[f"{PREFIX}Status"], ad[f"{PREFIX}TasksSuccess"]) == ("Done", 3)


@pytest.mark.soak
def test_an_image_that_has_to_go_returns_its_events_and_ends_by_itself(site: Site, user: Submitter, mark: str) -> None:
    user.send(range(4))
    image = f"--container-image={site.pilot('bubblewrap')}"
    job = user.submit(image, *long_tasks(mark), "--htchirp-ratelimit-interval=1")
    wait_for_two_tasks(job)
    user.pool.run("condor_hold", job.cluster)
    assert_nothing_is_left(user, mark)
    ad = job.until(lambda ad: ad["JobStatus"] == HELD, "the job to be held")
    assert (ad[f"{PREFIX}Status"], ad[f"{PREFIX}EventsReturned"]) == ("Done", 2)
