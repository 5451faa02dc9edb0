"""Pilots as jobs of a real HTCondor pool: the single file, submitted as `trio-pilot condor-submit` describes it."""

import base64
import json
import os
import re
import shlex
import shutil
import signal
import subprocess
import time
import uuid
from collections.abc import Iterator, Sequence
from contextlib import closing
from pathlib import Path
from typing import Any

import pika
import pytest

from tests.support.brokers import new_name
from tests.support.condor.pool import USER_ID, Job, Pool
from tests.support.paths import ROOT
from tests.support.processes import command_line, processes_with
from tests.support.servers import RabbitServer
from tests.support.waiting import POOL, until_sync
from trio_pilot.cli.condor_submit import LEAST_SILENCE, RELEASE_AFTER, SILENT
from trio_pilot.errors import BrokerError, NodeError

GUIDE = ROOT / "docs/htcondor.md"
PILOTS, EVENTS = 4, 400
PREFIX = "HTChirpEWMSPilot"
IDLE, RUNNING, HELD = 1, 2, 5  # JobStatus
BY_POLICY = 3  # HoldReasonCode: the job's own expressions


class Submitter:
    """A user of a pool with two queues at a broker, who submits pilots."""

    def __init__(self, pool: Pool, onefile: Path, rabbitmq: RabbitServer) -> None:
        self.pool = pool
        self.home = pool.jobs / new_name("user")
        self.home.mkdir()
        self.program = Path(shutil.copy(onefile, self.home / "trio-pilot"))
        self.config, token = self.home / "trio-pilot.toml", self.home / "token"
        for path, text in (
            (token, "guest\n"),
            (self.config, f'broker = "amqp://guest@{rabbitmq.address}"\nbroker-token = "@{token}"\n'),
        ):
            path.touch(0o600)
            path.write_text(text)
        for path in (self.home, self.config, token):
            os.chown(path, USER_ID, USER_ID)
        self.address, self._port = rabbitmq.address, rabbitmq.port
        self.events, self.results = new_name("events"), new_name("results")
        self._jobs: list[Job] = []

    def describe(self, *flags: str) -> str:
        """Return a submit description of pilots."""
        queues = (f"--queue-incoming={self.events}", f"--queue-outgoing={self.results}")
        return self.command("condor-submit", *queues, "--memory=256m", "--disk=100m", *flags)

    def submit(self, *flags: str) -> Job:
        return self.submit_description(self.describe(*flags))

    def submit_description(self, description: str) -> Job:
        job = self.pool.submit(description, self.home)
        self._jobs.append(job)
        return job

    def remove_jobs(self) -> None:
        """Remove the jobs that are still in the queue: others would wait for their slots."""
        for job in self._jobs:
            if job.ads():
                job.remove()

    def ready(self) -> int:
        """Return the number of events that a pilot could take."""
        with closing(pika.BlockingConnection(pika.ConnectionParameters("127.0.0.1", self._port))) as connection:
            return int(connection.channel().queue_declare(self.events, passive=True).method.message_count)

    def log(self, job: Job) -> str:
        return (self.home / f"trio-pilot-{job.cluster}.log").read_text()

    def command(self, *arguments: str, given: str = "") -> str:
        command = [str(self.program), *arguments]
        # As the user: another's settings would be refused, be it by root.
        done = subprocess.run(
            command,
            cwd=self.home,
            env={},
            input=given,
            capture_output=True,
            text=True,
            check=False,
            user=USER_ID,
            group=USER_ID,
        )
        assert done.returncode == 0, done.stderr
        return done.stdout

    def send(self, events: Sequence[object]) -> None:
        self.command("send", self.events, given="\n".join(map(json.dumps, events)))

    def receive(self, queue: str) -> list[Any]:
        said = self.command("receive", queue, "--idle=0.5")
        return [json.loads(line) for line in said.splitlines()]


@pytest.fixture
def user(condor: Pool, onefile: Path, rabbitmq: RabbitServer) -> Iterator[Submitter]:
    user = Submitter(condor, onefile, rabbitmq)
    yield user
    user.remove_jobs()


def test_pilots_drain_a_queue_and_report_it(user: Submitter) -> None:
    user.send(range(EVENTS))
    job = user.submit(
        f"--pilots={PILOTS}",
        "--runtime=bubblewrap",
        "--task-image=/",
        "--task-args=sh -c 'sleep 0.02; cp $EWMS_TASK_INFILE $EWMS_TASK_OUTFILE'",
        "--outfile-ext=.json",
        "--timeout-queue-incoming=2",
        "--htchirp-ratelimit-interval=1",
    )
    until_sync(lambda: any(ad.get(f"{PREFIX}Status") == "Tasking" for ad in job.ads()), "a pilot to report its work", POOL)
    ads = job.wait()
    assert sorted(user.receive(user.results)) == list(range(EVENTS))
    assert [ad["ExitCode"] for ad in ads] == [0] * PILOTS
    assert {ad[f"{PREFIX}Status"] for ad in ads} == {"Done"}
    assert sum(ad.get(f"{PREFIX}TasksSuccess", 0) for ad in ads) == EVENTS
    assert all(ad[f"{PREFIX}StartedTimestamp"] <= ad[f"{PREFIX}LastUpdatedTimestamp"] for ad in ads)


CHAIN = b"""
def fail(depth):
    try:
        fail(depth - 1) if depth else 1 / 0
    except Exception as error:
        raise ValueError(f'{chr(233)} "{depth}" {"x" * 60}') from error
fail(25)
"""


def test_the_event_log_has_the_lines_that_ewms_reads(user: Submitter) -> None:
    user.send(["event"])
    # In one line, as the environment of a job cannot have line breaks. Its stderr has more than 5 kB.
    task = ["python3", "-c", f"import base64; exec(base64.b64decode({base64.b64encode(CHAIN)!r}))"]
    job = user.submit("--runtime=process", f"--task-args={shlex.join(task)}", "--htchirp-dest=JOB_EVENT_LOG")
    (ad,) = job.wait()
    told = re.findall(rf"^008 .* ({PREFIX}.*)\n\.\.\.$", user.log(job), re.MULTILINE)
    assert all(re.fullmatch(rf"""{PREFIX}[A-Za-z]+: "([^"\\]|\\.)*\"""", line) for line in told)
    assert {f'{PREFIX}Status: "Tasking"', f'{PREFIX}TasksFailed: "1"'} <= set(told)
    [error] = [line.partition(" ")[2] for line in told if line.startswith(f"{PREFIX}Error:")]
    assert error.startswith('"ContainerRunError: task failed (exit code 1): Traceback (most recent call last):\\n')
    assert error.endswith(rf'''\nValueError: \303\251 \"25\" {"x" * 60}"''')
    assert len(error) <= 940
    assert f"{PREFIX}Status" not in ad
    assert ad["ExitCode"] == 1


def test_delayed_reports_need_no_proxy_and_are_in_the_history(user: Submitter) -> None:
    user.send(range(3))
    task = ["sh", "-c", """cat $EWMS_TASK_INFILE; yes 'x "y" \\ é' | head -2000 >&2; exit 3"""]
    description = user.describe(
        "--runtime=process",
        f"--task-args={shlex.join(task)}",
        "--no-stop-listening-on-task-error",
        "--max-attempts=1",
        "--timeout-queue-incoming=5",
        "--htchirp-dest=JOB_ATTR_DELAYED",
        "--htchirp-ratelimit-interval=1",
    )
    assert "WantIOProxy" not in description
    job = user.submit_description(description)
    job.until(lambda ad: ad.get("ChirpEWMSPilotTasksFailed"), "the failed tasks to be reported while the pilot runs")
    [ad] = job.wait()
    assert (ad["ExitCode"], ad["ChirpEWMSPilotStatus"], ad["ChirpEWMSPilotTasksFailed"]) == (1, "FatalError", 3)
    assert "task failed (exit code 3)" in ad["ChirpEWMSPilotError"]
    assert ad["ChirpEWMSPilotErrorTraceback"].endswith("é")
    assert [name for name in ad if name.startswith("HTChirp")] == []


SUSPENDED = 7  # JobStatus


@pytest.mark.soak
def test_a_job_that_was_suspended_goes_on_and_its_task_has_its_time(user: Submitter) -> None:
    user.send(["event"])
    description = user.describe(
        "--runtime=bubblewrap",
        "--task-image=/",
        "--task-args=sh -c 'for step in $(seq 100); do sleep 0.1; done; cp $EWMS_TASK_INFILE $EWMS_TASK_OUTFILE'",
        "--task-timeout=30",
        "--htchirp-ratelimit-interval=1",
    )
    job = user.submit_description(description.replace(str(LEAST_SILENCE), "15"))
    job.until(lambda ad: ad.get(f"{PREFIX}Status") == "Tasking", "the task to run")
    user.pool.run("condor_suspend", job.cluster)
    job.until(lambda ad: ad["JobStatus"] == SUSPENDED, "the job to be suspended")
    time.sleep(35)  # longer than the task may take, and than the silence after which its pilot is held
    user.pool.run("condor_continue", job.cluster)
    [ad] = job.wait()
    assert (ad["ExitCode"], ad["TotalSuspensions"], ad.get("NumHolds", 0)) == (0, 1, 0), user.log(job)
    assert user.receive(user.results) == ["event"]
    said = (user.home / f"trio-pilot-{job.cluster}.0.err").read_text()
    assert "this process was stopped for" in said


GRACEFUL = {"evicted": "condor_vacate_job", "held": "condor_hold", "removed": "condor_rm"}
HARD = {"killed": "condor_vacate_job -fast", "orphaned": ""}


@pytest.fixture
def mark() -> str:
    return f"mark-{uuid.uuid4().hex}"


def long_tasks(mark: str) -> Sequence[str]:
    # If only the `sleep` is killed, as the first process of a job that is killed, the task has failed: it must not succeed.
    task = ("--runtime=bubblewrap", "--task-image=/", f"--task-args=sh -c 'sleep 1000 && : {mark}'")
    return *task, "--max-concurrent-tasks=2", "--prefetch=4", "--grace=1", "--kill-grace=0.5", "--timeout-queue-incoming=100"


def wait_for_two_tasks(job: Job) -> None:
    job.until(lambda ad: ad.get(f"{PREFIX}TasksRunning") == 2, "two tasks to run")


@pytest.fixture
def job(user: Submitter, mark: str) -> Iterator[Job]:
    """A job whose tasks take long; once it has ended, it is not started again."""
    user.send(range(4))
    # A count is reported within a second: the report of the first task may be too early to have the second.
    job = user.submit(*long_tasks(mark), "--htchirp-ratelimit-interval=1")
    try:
        wait_for_two_tasks(job)
        user.pool.run("condor_qedit", job.cluster, "Requirements", "NumJobStarts == 0")
        yield job
    finally:
        if job.ads():
            job.remove()
            job.wait()


def assert_nothing_is_left(user: Submitter, mark: str) -> None:
    """Check that all events come back to the queue, and that no process and no scratch directory stays."""
    pool = user.pool
    until_sync(lambda: user.ready() == 4, "all events to be back", POOL)
    until_sync(lambda: not processes_with(mark) and not pool.processes_with("condor_exec.exe"), "all processes to end", POOL)
    until_sync(lambda: not pool.run("ls", "-A", "/var/lib/condor/execute"), "the scratch directory to be removed", POOL)


@pytest.mark.parametrize("how", GRACEFUL)
def test_a_job_that_has_to_go_returns_its_events_and_ends_by_itself(user: Submitter, job: Job, mark: str, how: str) -> None:
    user.pool.run(GRACEFUL[how], job.cluster)
    assert_nothing_is_left(user, mark)
    # A job that is held or removed is no longer RUNNING at once: its shadow reports the end of the pilot later.
    ad = job.until(lambda ad: ad["JobStatus"] != RUNNING and "ExitCode" in ad, "the end of the job to be reported")
    assert ad["ExitCode"] == 128 + signal.SIGTERM
    assert (ad[f"{PREFIX}Status"], ad[f"{PREFIX}EventsReturned"]) == ("Done", 2)
    assert f"{PREFIX}TasksFailed" not in ad


@pytest.mark.parametrize("how", HARD)
def test_a_job_that_is_killed_leaves_nothing(user: Submitter, job: Job, mark: str, how: str) -> None:
    if HARD[how]:
        user.pool.run(*HARD[how].split(), job.cluster)
    else:
        [starter] = [pid for pid in user.pool.processes_with("condor_starter") if command_line(pid)[0] == "condor_starter"]
        os.kill(starter, signal.SIGKILL)
    assert_nothing_is_left(user, mark)


def edit(job: Job, attribute: str, change: int) -> None:
    """Add to an attribute of a job, as if time had passed."""
    job.pool.run("condor_qedit", job.cluster, attribute, str(job.ad()[attribute] + change))


def wait_until_held(job: Job) -> dict[str, Any]:
    """Wait until its own expressions hold a job, and return its ad."""
    ad = job.until(lambda ad: ad["JobStatus"] == HELD, "the job to be held")
    assert ad["HoldReasonCode"] == BY_POLICY
    return ad


def test_a_pilot_without_a_broker_is_held_and_tried_again_later(user: Submitter) -> None:
    user.config.write_text('broker = "amqp://guest:guest@127.0.0.1:1"\nbroker-patience = 0.1\n')
    job = user.submit("--runtime=process", "--task-args=true")
    ad = wait_until_held(job)
    assert ad["HoldReasonSubCode"] == BrokerError.exit_code
    assert ad["HoldReason"].startswith("BrokerError: ")
    edit(job, "EnteredCurrentStatus", -RELEASE_AFTER)
    job.until(lambda ad: ad["NumJobStarts"] == 2, "another start")


def test_a_pilot_does_not_go_back_to_a_bad_machine(user: Submitter) -> None:
    job = user.submit("--runtime=docker", "--task-image=image", "--task-args=true")
    assert wait_until_held(job)["HoldReasonSubCode"] == NodeError.exit_code
    edit(job, "EnteredCurrentStatus", -RELEASE_AFTER)
    job.until(lambda ad: ad["JobStatus"] == IDLE, "the job to be released")
    released = time.time()
    ad = job.until(lambda ad: ad.get("LastRejMatchTime", 0) > released, "the only machine to be passed over")
    assert ad["NumJobStarts"] == 1


def test_a_pilot_that_reports_nothing_any_more_is_held(user: Submitter, mark: str) -> None:
    user.send(range(4))
    description = user.describe(*long_tasks(mark))  # the pilot has nothing new to report for a minute
    job = user.submit_description(description.replace(str(LEAST_SILENCE), "1"))
    assert wait_until_held(job)["HoldReasonSubCode"] == SILENT
    assert_nothing_is_left(user, mark)


def test_files_with_secrets_keep_their_mode_in_the_job(user: Submitter) -> None:
    look = user.home / "look"
    look.write_text("#!/bin/sh\nexec stat --format=%a trio-pilot.toml token\n")
    description = re.sub("executable = .*", f"executable = {look}", user.describe("--task-args=true"))
    job = user.submit_description(description)
    job.wait()
    assert (user.home / f"trio-pilot-{job.cluster}.0.out").read_text() == "600\n600\n"


@pytest.mark.parametrize("more", [[], ["--cron=*/10 * * * *"], ["--container-image=docker://image", "--time=60"]])
def test_condor_submit_takes_every_description(user: Submitter, more: list[str]) -> None:
    (user.home / "description").write_text(user.describe("--task-args=true", *more))
    said = user.pool.run("condor_submit", "-dry-run", "-", "description", directory=user.home)
    assert "1 job(s) dry-run" in said
    assert "WARNING" not in said


# Soak: a crontab counts in minutes.


@pytest.mark.soak
def test_a_cron_starts_pilots_again_and_again(user: Submitter) -> None:
    copies = ("--runtime=process", "--task-args=cp {{INFILE}} {{OUTFILE}}", "--timeout-queue-incoming=0.3")
    job = user.submit("--cron=* * * * *", *copies)
    for event in ("first", "second"):
        user.send([event])
        deadline = time.monotonic() + 60 + POOL.seconds  # if a pilot has just ended, the one of the next minute takes it
        while not (found := user.receive(user.results)):
            assert time.monotonic() < deadline, user.log(job)
            time.sleep(1)
        assert found == [event]
    assert job.ad()["NumJobStarts"] > 1


def test_the_guide_leads_from_nothing_to_results(user: Submitter) -> None:
    blocks = re.findall(r"^```sh\n(.*?)^```$", GUIDE.read_text(), re.MULTILINE | re.DOTALL)
    user.config.unlink()
    names = {"@localhost": f"@{user.address}", "numbers": user.events, "products": user.results}
    for block in blocks:
        script = re.sub("|".join(names), lambda found: names[found[0]], block)
        said = user.pool.run("sh", "-ec", script, directory=user.home, seconds=POOL.seconds)  # it waits for jobs
        assert "FAIL" not in said
    results = [int(file.read_text()) for file in (user.home / "results").iterdir()]
    assert sorted(results) == [7 * number for number in range(1, 21)]
