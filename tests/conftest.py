"""Servers that tests share, each started when it is first needed.

`.ci/test` runs several tests at the same time. A test that measures time, or looks at all processes of the machine, is
marked `alone`; the fixture of a new server is added to SHARED in tests/support/worker_groups.py.
"""

import os
import shutil
import signal
import tempfile
from collections.abc import Callable, Generator, Iterator
from pathlib import Path
from typing import Any

import pytest

from onefile.__main__ import found_pythons, make
from tests.support import engines, servers, worker_groups
from tests.support.apptainer import open_apptainer
from tests.support.condor.pool import Pool, open_pool
from tests.support.images import make_image
from tests.support.processes import own_children
from tests.support.services import SERVICES, cannot, open_rabbitmq, open_service
from trio_pilot.processes.children import let_outlive


def pytest_configure(config: pytest.Config) -> None:
    config.pluginmanager.register(worker_groups)
    # On SIGTERM, as of a `timeout`, pytest would leave all that its fixtures have started; an interrupt ends them.
    signal.signal(signal.SIGTERM, signal.default_int_handler)


def pytest_terminal_summary(terminalreporter: pytest.TerminalReporter) -> None:
    terminalreporter.write_line(f"services that ran: {', '.join(SERVICES) or 'none'}")


def pytest_sessionfinish(session: pytest.Session) -> None:
    if worker_groups.is_worker(session.config):
        session.config.workeroutput["services"] = SERVICES  # type: ignore[attr-defined]


@pytest.hookimpl(optionalhook=True)
def pytest_testnodedown(node: Any) -> None:
    SERVICES.extend(getattr(node, "workeroutput", {}).get("services", ()))


@pytest.hookimpl(wrapper=True)
def pytest_runtest_makereport() -> Generator[None, pytest.TestReport, pytest.TestReport]:
    """Add the end of the servers' logs to the report of a test that fails."""
    report = yield
    if report.failed:
        for server in servers.RUNNING:
            report.sections.extend(servers.last_words(server))
    return report


@pytest.fixture(scope="session")
def rabbitmq() -> Iterator[servers.RabbitServer]:
    with open_rabbitmq() as server:
        yield server


@pytest.fixture(scope="session")
def rabbitmq_trixie() -> Iterator[servers.RabbitServer]:
    """RabbitMQ 4.0."""
    with open_rabbitmq("trixie") as server:
        yield server


@pytest.fixture(scope="session")
def rabbitmq_sid() -> Iterator[servers.RabbitServer]:
    """RabbitMQ 4.3 or later."""
    with open_rabbitmq("sid") as server:
        yield server


@pytest.fixture(scope="session")
def nats() -> Iterator[servers.NatsServer]:
    with open_service(servers.nats(), lambda server: f"NATS {server.version}") as server:
        yield server


@pytest.fixture(scope="session")
def apptainer() -> Iterator[Path]:
    """The directory of an apptainer, to be put on PATH."""
    with open_service(open_apptainer(), lambda _: "Apptainer") as programs:
        yield programs


@pytest.fixture(autouse=True)
def services_are_no_strays() -> None:
    """Let runtimes that run in this process leave alone what services of other tests have put into the background."""
    for pid in own_children():
        let_outlive(pid)


@pytest.fixture(scope="session")
def image(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_image(tmp_path_factory.mktemp("image"))


@pytest.fixture(scope="session")
def onefile() -> Iterator[Path]:
    """trio-pilot as a single file that every user may read; $TRIO_PILOT_ONEFILE may name one that exists."""
    if made := os.environ.get("TRIO_PILOT_ONEFILE"):
        yield Path(made)
        return
    directory = Path(tempfile.mkdtemp(prefix="trio-pilot-onefile-"))
    directory.chmod(0o755)
    file = directory / "trio-pilot"
    make(file, found_pythons())
    yield file
    shutil.rmtree(directory)


@pytest.fixture(scope="session")
def condor() -> Iterator[Pool]:
    with open_service(open_pool(), lambda _: "HTCondor") as pool:
        yield pool


@pytest.fixture(scope="session")
def docker(image: Path) -> Iterator[engines.Engine]:
    with open_service(engines.docker(image), lambda engine: engine.name) as engine:
        yield engine


@pytest.fixture(scope="session")
def podman(image: Path) -> Iterator[engines.Engine]:
    with open_service(engines.podman(image), lambda engine: engine.name) as engine:
        yield engine


@pytest.fixture(scope="session")
def need() -> Callable[[str, str], None]:
    """A function that installs a program from its Debian package, or skips the test."""

    def need(program: str, package: str) -> None:
        try:
            servers.need(program, package)
        except servers.UnavailableError as error:
            cannot(str(error))

    return need
