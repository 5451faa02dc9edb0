"""Faults of engines, and of the connection between a pilot and an engine."""

import base64
import json
import os
import signal
import stat
import tempfile
from collections.abc import AsyncIterator, Iterator
from contextlib import AbstractContextManager, asynccontextmanager, contextmanager, suppress
from dataclasses import replace
from pathlib import Path

import pytest
import trio

from tests.contract.runtimes.subjects import ENGINES, Subject
from tests.support import engines
from tests.support.containers import new_container
from tests.support.engine_proxy import EngineProxy, engine_proxy
from tests.support.engines import IMAGE, Engine
from tests.support.pilots import PilotCommand
from tests.support.processes import command_line, new_children, open_files, own_children, processes_with
from tests.support.registry import PASSWORD, USER, Registry, registry
from tests.support.servers import UnavailableError
from tests.support.services import cannot
from tests.support.waiting import PATIENCE, until
from trio_pilot.cleanup.engine_containers import remove_containers
from trio_pilot.errors import ContainerLostError, NodeError
from trio_pilot.files.error_summary import error_summary
from trio_pilot.processes.identity import own
from trio_pilot.runtimes import (
    Container,
    Exit,
    Limits,
    Options,
    Runtime,
    docker,
    podman,
)
from trio_pilot.runtimes.engine import MOST_REMOVALS, EngineRuntime
from trio_pilot.runtimes.engine_logs import MOST, MOST_TAIL
from trio_pilot.runtimes.engine_registry_login import registry_of
from trio_pilot.runtimes.engine_timeouts import DEFAULT_TIMEOUTS, EngineTimeouts

OPTIONS = Options(kill_grace=0.3, engine_patience=20)

VARIABLES = {"docker": "DOCKER_HOST", "podman": "CONTAINER_HOST"}
MODULES = {"docker": docker, "podman": podman}

at_both = pytest.mark.parametrize("subject", ENGINES, indirect=True)


@pytest.fixture(autouse=True)
def nothing_is_left(request: pytest.FixtureRequest) -> Iterator[None]:
    for name in {"subject", "own_docker", "lasting_docker"} & set(request.fixturenames):
        request.getfixturevalue(name)
    before, files = own_children(), open_files()
    yield
    # The engine may have been restarted.
    assert [one for one in new_children(before) if "unshare --pid" not in one and "nsenter --target" not in one] == []
    assert open_files() <= files, "file descriptors are left open"


@pytest.fixture
def here(request: pytest.FixtureRequest, subject: Subject) -> Iterator[Engine]:
    found: Engine = request.getfixturevalue(subject.name)
    yield found
    assert found.containers() == []


@pytest.fixture
async def proxy(here: Engine, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> AsyncIterator[EngineProxy]:
    async with engine_proxy(here.socket, tmp_path) as proxy:
        monkeypatch.setenv(VARIABLES[here.name], f"unix://{proxy.socket}")
        yield proxy


@pytest.fixture
def timeouts() -> EngineTimeouts:
    return DEFAULT_TIMEOUTS


def with_timeouts(**seconds: float) -> pytest.MarkDecorator:
    """Run a test with other time-outs."""
    return pytest.mark.parametrize("timeouts", [EngineTimeouts(**seconds)], ids=["short-timeouts"])


@pytest.fixture
async def runtime(proxy: EngineProxy, subject: Subject, timeouts: EngineTimeouts) -> AsyncIterator[Runtime]:
    async with MODULES[subject.name].open_runtime(OPTIONS, timeouts) as runtime:
        assert runtime.engine == proxy.socket
        await runtime.prepare(subject.image)
        yield runtime


async def end_of(runtime: Runtime, container: Container) -> Exit:
    with trio.fail_after(2 * PATIENCE):
        return await runtime.run(container)


# Answers that are lost, or do not come.

REQUESTS = {
    "image": r"^GET .*/images/",
    "create": r"^POST .*/containers/create",
    "start": r"^POST .*/start",
    "wait": r"^POST .*/wait",
    "logs": r"^GET .*/logs",
    "inspect": r"^GET .*/containers/.*/json",
    "stop": r"^POST .*/stop",
    "remove": r"^DELETE ",
}

SHORT = ("sh", "-c", "echo once >> times; sleep 0.5; echo said; echo more >&2")


@at_both
@pytest.mark.parametrize("request_", ["create", "start", "wait", "logs", "remove"])
async def test_a_lost_answer_costs_neither_the_result_nor_a_second_run(
    subject: Subject, runtime: Runtime, proxy: EngineProxy, request_: str
) -> None:
    container = subject.container(*SHORT)
    lost = proxy.next(REQUESTS[request_], "lose")
    assert await end_of(runtime, container) == Exit(0)
    await until(lost.begun.is_set)  # it is removed in the background
    assert container.stdout.read_text() == "said\n"
    assert container.stderr.read_text() == "more\n"
    assert (container.scratch / "times").read_text() == "once\n"


@at_both
@pytest.mark.parametrize("request_", ["image", "create", "wait"])
async def test_an_answer_of_another_form_is_the_nodes_fault(subject: Subject, proxy: EngineProxy, request_: str) -> None:
    async with subject.open(OPTIONS) as runtime:
        proxy.next(REQUESTS[request_], "nothing")
        with pytest.raises(NodeError, match=r"the engine's answer is not as expected: b'\[\]'"):
            await end_of(runtime, subject.container("sh", "-c", "exit 3"))


@at_both
async def test_a_failure_is_reported_even_without_the_containers_state(
    subject: Subject, runtime: Runtime, proxy: EngineProxy
) -> None:
    proxy.next(REQUESTS["inspect"], "nothing")
    assert await end_of(runtime, subject.container("sh", "-c", "exit 3")) == Exit(3)


@at_both
async def test_logs_are_requested_once_if_the_disk_is_full(subject: Subject, proxy: EngineProxy, runtime: Runtime) -> None:
    container = subject.container("sh", "-c", "echo said; exit 3")
    os.mknod(container.stdout, stat.S_IFCHR | 0o600, os.makedev(1, 7))  # as /dev/full
    with pytest.raises(NodeError, match=r"^cannot write what a container says: .*No space left on device"):
        await end_of(runtime, container)
    assert count(proxy, "/logs") == 1


@at_both
@pytest.mark.parametrize("code", [0, 3])
async def test_logs_that_are_not_needed_are_requested_for_failures_only(
    subject: Subject, runtime: Runtime, proxy: EngineProxy, code: int
) -> None:
    container = replace(subject.container("sh", "-c", f"echo said; exit {code}"), needs_logs=False)
    assert await end_of(runtime, container) == Exit(code)
    assert proxy.has_had(REQUESTS["logs"]) == bool(code)
    assert container.stdout.read_text() == ("said\n" if code else "")


@with_timeouts(create_grace=0.2, removal=2.0)
@at_both
@pytest.mark.parametrize("request_", ["create", "start", "wait", "logs", "inspect", "stop", "remove"])
async def test_cancelled_at_any_stage_nothing_is_left(
    subject: Subject, here: Engine, runtime: Runtime, proxy: EngineProxy, request_: str
) -> None:
    # The answer to one request never comes.
    held = proxy.next(REQUESTS[request_], "hold")
    is_long = request_ in ("create", "start", "wait", "stop")
    container = subject.container("sh", "-c", f"touch ready; {'exec sleep 1000' if is_long else 'exit 3'}")
    with trio.fail_after(PATIENCE):
        async with trio.open_nursery() as nursery:
            nursery.start_soon(runtime.run, container)
            if request_ in ("wait", "stop"):  # podman sends no part of an answer before the container has ended
                await until(lambda: proxy.count("POST") >= 3 and (container.scratch / "ready").exists())
            else:
                await held.begun.wait()
            nursery.cancel_scope.cancel()
    assert proxy.has_had(REQUESTS[request_])
    await until(lambda: not here.containers())
    await until(lambda: not processes_with(container.name))  # podman's monitor ends last


@with_timeouts(create_grace=0.1)
@at_both
async def test_a_create_request_that_is_executed_late_leaves_nothing(
    subject: Subject, here: Engine, runtime: Runtime, proxy: EngineProxy
) -> None:
    late = proxy.next(REQUESTS["create"], "late")
    async with trio.open_nursery() as nursery:
        nursery.start_soon(runtime.run, subject.container("true"))
        await late.begun.wait()
        nursery.cancel_scope.cancel()
        with trio.CancelScope(shield=True):
            await until(lambda: proxy.count("DELETE"))
        late.release.set()  # it was looked for once, and not found
    assert here.containers() == []
    assert proxy.count("DELETE") >= 3


@with_timeouts(removal=0.2)
@at_both
@pytest.mark.parametrize("code", [0, 3])
async def test_a_container_that_cannot_be_removed_is_removed_later(
    subject: Subject, here: Engine, runtime: Runtime, proxy: EngineProxy, code: int
) -> None:
    lost = proxy.next(REQUESTS["remove"], "late")  # and never released
    assert await end_of(runtime, subject.container("sh", "-c", f"exit {code}")) == Exit(code)
    await until(lost.begun.is_set)
    assert len(here.containers()) == 1
    await until(lambda: not here.containers())


@at_both
async def test_background_removals_are_done_when_the_runtime_is_closed(
    subject: Subject, here: Engine, proxy: EngineProxy
) -> None:
    late = proxy.next(REQUESTS["remove"], "late")

    async def release() -> None:
        await trio.sleep(0.5)
        late.release.set()

    async with trio.open_nursery() as nursery:
        async with subject.open(OPTIONS) as runtime:
            await runtime.prepare(subject.image)
            assert await end_of(runtime, subject.container("true")) == Exit(0)
            await until(late.begun.is_set)
            assert len(here.containers()) == 1
            nursery.start_soon(release)
        assert here.containers() == []
    assert proxy.count("DELETE") == 1


@at_both
async def test_a_container_that_has_failed_is_removed_at_once(subject: Subject, here: Engine, runtime: Runtime) -> None:
    assert await end_of(runtime, subject.container("sh", "-c", "exit 3")) == Exit(3)
    assert here.containers() == []


@at_both
async def test_the_number_of_background_removals_is_limited(
    subject: Subject, here: Engine, runtime: Runtime, proxy: EngineProxy
) -> None:
    late = [proxy.next(REQUESTS["remove"], "late") for _ in range(MOST_REMOVALS)]
    for _ in range(MOST_REMOVALS + 1):
        assert await end_of(runtime, subject.container("true")) == Exit(0)
    assert len(here.containers()) == MOST_REMOVALS
    for one in late:
        one.release.set()


# The containers.


@at_both
@pytest.mark.parametrize("form", ["{:.12}", "{}", "sha256:{}"])
async def test_an_image_may_be_given_by_its_id(
    subject: Subject, here: Engine, runtime: Runtime, proxy: EngineProxy, form: str
) -> None:
    found = here.has_image(IMAGE) or here.has_image(f"localhost/{IMAGE}")
    given = form.format(str(found).removeprefix("sha256:"))
    assert await end_of(runtime, replace(subject.container("sh", "-c", "exit 3"), image=given)) == Exit(3)
    assert count(proxy, "/images/create") == 0


@at_both
async def test_a_container_has_the_label_of_its_pilot(subject: Subject, here: Engine, runtime: Runtime) -> None:
    container = subject.container("sh", "-c", "touch ready; until test -e enough; do sleep 0.01; done")
    async with trio.open_nursery() as nursery:
        nursery.start_soon(runtime.run, container)
        await until((container.scratch / "ready").exists)
        assert here.containers() == [f"trio-pilot-{container.name}"]
        (container.scratch / "enough").touch()


@at_both
async def test_limits_are_set_by_the_engine(subject: Subject, runtime: Runtime) -> None:
    groups = "/sys/fs/cgroup"
    script = f"cat {groups}/memory/memory.limit_in_bytes {groups}/pids/pids.max {groups}/cpu/cpu.cfs_quota_us"
    script_v2 = f"cat {groups}/memory.max {groups}/pids.max; cut -d' ' -f1 {groups}/cpu.max"
    container = subject.container("sh", "-c", f"if test -e {groups}/pids.max; then {script_v2}; else {script}; fi")
    limited = replace(container, limits=Limits(memory=64 * 2**20, cpus=0.5, pids=20))
    assert await end_of(runtime, limited) == Exit(0)
    assert container.stdout.read_text().split() == [str(64 * 2**20), "21", "50000"]


@at_both
async def test_a_container_that_exceeds_its_memory_ends_out_of_memory(subject: Subject, runtime: Runtime) -> None:
    container = replace(subject.container("tail", "/dev/zero"), limits=Limits(memory=64 * 2**20))
    assert await end_of(runtime, container) == Exit(137, out_of_memory=True)


@at_both
async def test_death_by_sigkill_alone_is_not_out_of_memory(subject: Subject, runtime: Runtime) -> None:
    assert await end_of(runtime, subject.container("sh", "-c", "kill -9 $$")) == Exit(137)


@at_both
async def test_options_reach_the_container(subject: Subject, proxy: EngineProxy) -> None:
    options = replace(OPTIONS, network="none", user="1234:77", shm_size=3 * 2**20)
    script = "id -u; id -g; df -k /dev/shm | tail -n 1 | awk '{print $2}'; ls /sys/class/net; grep -om1 127.0.0.1 /etc/hosts"
    async with subject.open(options) as runtime:
        assert runtime.engine == proxy.socket
        container = subject.container("sh", "-c", script)
        container.scratch.chmod(0o777)
        assert await end_of(runtime, container) == Exit(0)
    assert container.stdout.read_text().split() == ["1234", "77", "3072", "lo", "127.0.0.1"]


@at_both
async def test_a_task_cannot_undo_its_isolation(subject: Subject, runtime: Runtime) -> None:
    script = "mount -o remount,rw /sys || umount -l /proc || echo 0 > /proc/sys/kernel/sysrq || echo no"
    container = subject.container("sh", "-c", script)
    assert await end_of(runtime, container) == Exit(0)
    assert container.stdout.read_text() == "no\n"


@at_both
async def test_the_end_of_a_very_large_log_is_kept(subject: Subject, runtime: Runtime) -> None:
    container = subject.container("sh", "-c", "dd if=/dev/zero bs=1M count=250 >&2; echo the end >&2; exit 3")
    assert await end_of(runtime, container) == Exit(3)
    assert error_summary(container.stderr).endswith("the end")
    assert container.stderr.stat().st_size <= MOST + MOST_TAIL


@at_both
async def test_an_engine_that_is_not_there_is_a_fault(
    subject: Subject, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    family = MODULES[subject.name]
    assert await family.fault(OPTIONS) is None
    monkeypatch.setenv(VARIABLES[subject.name], f"unix://{tmp_path}/none.sock")
    assert "none.sock did not answer" in str(await family.fault(OPTIONS))
    monkeypatch.setenv(VARIABLES[subject.name], "tcp://localhost:2375")
    assert "must be unix:// and the path of a socket, not 'tcp://localhost:2375'" in str(await family.fault(OPTIONS))
    with pytest.raises(NodeError, match="must be unix://"):
        async with subject.open(OPTIONS):
            pass


async def test_podman_behind_dockers_socket_is_driven_as_podman(
    podman: Engine, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    container = new_container(tmp_path, ["sh", "-c", "echo said; kill -9 $$"], image=IMAGE)
    async with engine_proxy(podman.socket, tmp_path) as proxy:
        monkeypatch.setenv("DOCKER_HOST", f"unix://{proxy.socket}")
        assert await docker.fault(OPTIONS) is None
        async with docker.open_runtime(OPTIONS) as runtime:
            assert runtime.name == "podman"
            await runtime.prepare(IMAGE)
            assert await end_of(runtime, container) == Exit(137)
    assert container.stdout.read_text() == "said\n"
    assert all("/libpod/" in request or "/_ping" in request for request in proxy.requests)
    assert podman.containers() == []


# An engine that is restarted, away, or frozen.


@pytest.fixture
def own_docker(image: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Engine]:
    """Run a dockerd for one test alone; if it is killed, its successor kills its containers."""
    with of_one_test(engines.docker(image), monkeypatch) as own:
        yield own


@pytest.fixture
def lasting_docker(image: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Engine]:
    """Run a dockerd for one test alone, whose containers survive it."""
    with of_one_test(engines.docker(image, "--live-restore"), monkeypatch) as own:
        yield own


@contextmanager
def of_one_test(opening: AbstractContextManager[Engine], monkeypatch: pytest.MonkeyPatch) -> Iterator[Engine]:
    try:
        with opening as own:
            monkeypatch.setenv("DOCKER_HOST", f"unix://{own.socket}")
            yield own
            assert own.containers() == []
    except UnavailableError as error:
        cannot(str(error))


class Task:
    """A container with a script, and its end."""

    def __init__(self, directory: Path, script: str) -> None:
        self.container = new_container(directory, ["sh", "-c", f"touch ready; {script}"], image=IMAGE)
        self.end: Exit | NodeError | None = None

    def file(self, name: str) -> Path:
        return self.container.scratch / name

    async def run(self, runtime: Runtime) -> None:
        try:
            self.end = await end_of(runtime, self.container)
        except NodeError as error:
            self.end = error


UNTIL_ENOUGH = "until test -e enough; do sleep 0.02; done"


@asynccontextmanager
async def running(
    task: Task, at: Engine, options: Options = OPTIONS, timeouts: EngineTimeouts = DEFAULT_TIMEOUTS
) -> AsyncIterator[EngineRuntime]:
    """Run a task at docker; wait for its end."""
    async with docker.open_runtime(options, timeouts) as runtime:
        await runtime.prepare(IMAGE)
        async with trio.open_nursery() as nursery:
            nursery.start_soon(task.run, runtime)
            await until(lambda: task.file("ready").exists() and at.containers("running"))  # and the engine has noticed
            yield runtime


async def test_a_container_that_outlives_its_engine_is_waited_for_again(
    lasting_docker: Engine, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    task = Task(tmp_path, f"{UNTIL_ENOUGH}; echo said; exit 3")
    async with engine_proxy(lasting_docker.socket, tmp_path) as proxy:
        monkeypatch.setenv("DOCKER_HOST", f"unix://{proxy.socket}")
        async with running(task, lasting_docker):
            lasting_docker.kill()
            lasting_docker.start()
            proxy.requests.clear()
            await until(lambda: proxy.has_had(REQUESTS["wait"]))
            task.file("enough").touch()
    assert task.end == Exit(3)
    assert task.container.stdout.read_text() == "said\n"


async def test_a_success_counts_although_the_engine_was_away(lasting_docker: Engine, tmp_path: Path) -> None:
    task = Task(tmp_path, f"{UNTIL_ENOUGH}; touch done")
    async with running(task, lasting_docker):
        lasting_docker.kill()
        task.file("enough").touch()
        await until(task.file("done").exists)
        await until(lambda: not processes_with(task.container.name))
        lasting_docker.start()
    assert task.end == Exit(0)


async def test_a_failure_while_the_engine_was_away_is_a_lost_container(lasting_docker: Engine, tmp_path: Path) -> None:
    task = Task(tmp_path, f"{UNTIL_ENOUGH}; touch done; exit 3")
    async with running(task, lasting_docker):
        lasting_docker.kill()
        task.file("enough").touch()
        await until(task.file("done").exists)
        lasting_docker.start()
    assert isinstance(task.end, ContainerLostError)


@pytest.mark.parametrize("how", ["kill", "terminate"])
async def test_a_container_that_is_gone_with_its_engine_is_lost(own_docker: Engine, tmp_path: Path, how: str) -> None:
    task, after = Task(tmp_path, "sleep 1000"), Task(tmp_path, "exit 4")
    async with running(task, own_docker) as runtime:
        await trio.to_thread.run_sync(getattr(own_docker, how))
        own_docker.start()
        await until(lambda: task.end)
        await after.run(runtime)
    assert isinstance(task.end, ContainerLostError)
    assert after.end == Exit(4)


async def test_a_restart_behind_a_waiting_socket_is_noticed(
    own_docker: Engine, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    # As with systemd, which keeps connections for the next engine: it answers as if nothing had happened.
    task = Task(tmp_path, "sleep 1000")
    async with engine_proxy(own_docker.socket, tmp_path) as proxy:
        monkeypatch.setenv("DOCKER_HOST", f"unix://{proxy.socket}")
        async with running(task, own_docker):
            proxy.is_patient = True
            await trio.to_thread.run_sync(own_docker.terminate)
            own_docker.start()
            await until(lambda: task.end)
    assert isinstance(task.end, ContainerLostError)


async def test_a_refusal_by_an_engine_that_shuts_down_is_a_lost_container(
    own_docker: Engine, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    refused = Task(tmp_path, "exit 4")
    async with engine_proxy(own_docker.socket, tmp_path) as proxy:
        monkeypatch.setenv("DOCKER_HOST", f"unix://{proxy.socket}")
        async with docker.open_runtime(OPTIONS) as runtime:
            await runtime.prepare(IMAGE)
            fault = proxy.next(REQUESTS["start"], "fail")
            async with trio.open_nursery() as nursery:
                nursery.start_soon(refused.run, runtime)
                await fault.begun.wait()
                own_docker.terminate()  # as it was about to
                fault.release.set()
                await until(lambda: proxy.refused)
                own_docker.start()
    assert isinstance(refused.end, ContainerLostError)


async def test_a_new_container_waits_for_an_engine_that_is_away(own_docker: Engine, tmp_path: Path) -> None:
    waiting = Task(tmp_path, "exit 4")
    async with docker.open_runtime(OPTIONS) as runtime, trio.open_nursery() as nursery:
        await runtime.prepare(IMAGE)
        own_docker.terminate()
        nursery.start_soon(waiting.run, runtime)
        await trio.sleep(3.0)
        assert waiting.end is None
        own_docker.start()
    assert waiting.end == Exit(4)


async def test_an_engine_that_is_away_for_too_long_is_the_nodes_fault(own_docker: Engine, tmp_path: Path) -> None:
    task = Task(tmp_path, UNTIL_ENOUGH)
    async with running(task, own_docker, replace(OPTIONS, engine_patience=0.5), EngineTimeouts(removal=0.5)):
        own_docker.terminate()
        await until(lambda: task.end)
        own_docker.start()
        task.file("enough").touch()
    assert isinstance(task.end, NodeError)
    assert not isinstance(task.end, ContainerLostError)
    assert "docker has not been back for 0.5 s (EWMS_PILOT_ENGINE_PATIENCE), is its daemon running?" in str(task.end)


async def test_the_exit_code_survives_a_frozen_engine(own_docker: Engine, tmp_path: Path) -> None:
    task = Task(tmp_path, f"{UNTIL_ENOUGH}; exit 3")
    async with running(task, own_docker):
        own_docker.freeze()
        task.file("enough").touch()
        await trio.sleep(DEFAULT_TIMEOUTS.first_ping + DEFAULT_TIMEOUTS.ping + 1)
        assert task.end is None
        own_docker.thaw()
    assert task.end == Exit(3)


async def test_an_engine_that_is_frozen_for_too_long_is_the_nodes_fault(own_docker: Engine, tmp_path: Path) -> None:
    timeouts = EngineTimeouts(first_ping=0.1, ping=0.2, removal=0.5)
    task = Task(tmp_path, UNTIL_ENOUGH)
    async with running(task, own_docker, replace(OPTIONS, engine_patience=0.5), timeouts):
        own_docker.freeze()
        await until(lambda: task.end)
        own_docker.thaw()
        await until(lambda: not own_docker.containers())
    assert isinstance(task.end, NodeError)
    assert "has not been back for 0.5 s" in str(task.end)


async def test_a_timeout_while_the_engine_is_frozen_is_a_lost_container(own_docker: Engine, tmp_path: Path) -> None:
    timeouts = EngineTimeouts(ping=0.2, removal=0.5)
    first, second = (Task(tmp_path / name, "true") for name in ("first", "second"))
    async with docker.open_runtime(replace(OPTIONS, engine_patience=2), timeouts) as runtime:
        await runtime.prepare(IMAGE)
        own_docker.freeze()
        with trio.move_on_after(0.3):
            await first.run(runtime)
        with trio.move_on_after(PATIENCE):
            await second.run(runtime)
        own_docker.thaw()
        await until(lambda: not own_docker.containers())
    assert isinstance(first.end, ContainerLostError)
    assert not isinstance(second.end, ContainerLostError)
    assert "has not been back for 2 s" in str(second.end)


async def test_a_timeout_while_the_engine_is_gone_is_a_lost_container(lasting_docker: Engine, tmp_path: Path) -> None:
    task, next_one = Task(tmp_path / "one", UNTIL_ENOUGH), Task(tmp_path / "next", "true")
    async with docker.open_runtime(OPTIONS, EngineTimeouts(removal=0.5)) as runtime:
        await runtime.prepare(IMAGE)
        async with trio.open_nursery() as nursery:
            nursery.start_soon(task.run, runtime)
            await until(task.file("ready").exists)
            lasting_docker.kill()
            await trio.sleep(0.2)  # the outage is noticed
            nursery.cancel_scope.cancel()
        lasting_docker.start()
        await next_one.run(runtime)
        await until(lambda: not lasting_docker.containers())
    assert isinstance(task.end, ContainerLostError)
    assert next_one.end == Exit(0)


async def test_a_frozen_engine_does_not_delay_the_end_of_a_pilot(own_docker: Engine, tmp_path: Path) -> None:
    timeouts = EngineTimeouts(removal=0.5, last_removal=0.5)
    task = Task(tmp_path, UNTIL_ENOUGH)
    with trio.fail_after(PATIENCE), trio.CancelScope() as scope:
        async with running(task, own_docker, timeouts=timeouts) as runtime:
            own_docker.freeze()
            begun = trio.current_time()
            scope.cancel()
    assert runtime.has_unremoved_containers
    assert trio.current_time() - begun < OPTIONS.kill_grace + timeouts.removal + timeouts.last_removal + 2
    own_docker.thaw()
    remove_containers(own_docker.socket, lambda pilot: pilot == own())  # as the guardian does
    await until(lambda: not own_docker.containers())


async def test_what_a_pilot_could_not_remove_is_removed_after_its_end(own_docker: Engine, tmp_path: Path) -> None:
    with PilotCommand(tmp_path) as pilots:
        pilots.send("event")
        script = ("sh", "-c", "touch /tmp/ready; sleep 1000")
        pilot = pilots.start(*script, runtime="docker", task_image=IMAGE, timeout_queue_incoming=60, grace=0, kill_grace=0)
        await until(lambda: list(pilots.data.glob("*/scratch/ready")))
        [guardian] = processes_with(f".{pilot.pid}.")
        own_docker.freeze()
        pilot.signal(signal.SIGTERM)
        assert await trio.to_thread.run_sync(pilot.wait) == 143
        own_docker.thaw()
        await until(lambda: not own_docker.containers())
        await until(lambda: not pilots.data.exists())
        await until(lambda: not command_line(guardian))
        with suppress(ChildProcessError):  # it may have become a child of this process
            await trio.to_thread.run_sync(os.waitpid, guardian, 0)


async def test_a_container_is_removed_as_soon_as_the_engine_is_back(own_docker: Engine, tmp_path: Path) -> None:
    task = Task(tmp_path, "sleep 1000")
    async with docker.open_runtime(OPTIONS, EngineTimeouts(removal=0.5)) as runtime:
        async with trio.open_nursery() as nursery:
            nursery.start_soon(task.run, runtime)
            await until(task.file("ready").exists)
            own_docker.freeze()
            nursery.cancel_scope.cancel()
        own_docker.thaw()
        await until(lambda: not own_docker.containers())


async def test_twenty_events_go_through_docker(own_docker: Engine, tmp_path: Path) -> None:
    with PilotCommand(tmp_path) as pilot:
        pilot.send(*range(20))
        script = 'cp "$EWMS_TASK_INFILE" "$EWMS_TASK_OUTFILE"'
        running = pilot.run("sh", "-c", script, runtime="docker", task_image=IMAGE, max_concurrent_tasks=4)
        assert running.wait() == 0, running.stderr
        assert sorted(map(str, pilot.receive())) == sorted(map(str, range(20)))
        assert not pilot.data.exists()
    assert own_docker.containers() == []


@pytest.fixture
def open_directory() -> Iterator[Path]:
    """Make a directory that any user can reach; pytest's are for one user."""
    with tempfile.TemporaryDirectory(dir="/var/tmp") as directory:
        Path(directory).chmod(0o755)
        yield Path(directory)


async def test_a_rootless_podman_runs_containers(image: Path, open_directory: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    scripts = (f"id -u; touch ready; {end}" for end in ("exit 3", "sleep 1000"))
    ended, endless = (new_container(open_directory, ["sh", "-c", script], image=IMAGE) for script in scripts)
    for container in (ended, endless):
        container.scratch.chmod(0o777)
    with of_one_test(engines.rootless_podman(image), monkeypatch) as own:
        monkeypatch.setenv("CONTAINER_HOST", f"unix://{own.socket}")
        async with podman.open_runtime(OPTIONS) as runtime, trio.open_nursery() as nursery:
            await runtime.prepare(IMAGE)
            assert await end_of(runtime, ended) == Exit(3)
            nursery.start_soon(runtime.run, endless)
            await until((endless.scratch / "ready").exists)
            nursery.cancel_scope.cancel()
    assert ended.stdout.read_text() == "0\n"
    assert (ended.scratch / "ready").stat().st_uid == engines.SOMEBODY


@pytest.fixture
def private(here: Engine, image: Path) -> Iterator[Registry]:
    with registry(image, here.registry_port) as server:
        yield server
        if here.has_image(server.image):
            remove_image(here, server.image)


def remove_image(here: Engine, name: str) -> None:
    here.api("DELETE", f"/v1.40/images/{here.has_image(name)}?force=1")


@pytest.fixture
def login(tmp_path: Path, private: Registry, monkeypatch: pytest.MonkeyPatch) -> None:
    log_in(private, tmp_path, monkeypatch)


def log_in(server: Registry, directory: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    auth = base64.b64encode(f"{USER}:{PASSWORD}".encode()).decode()
    (directory / "auth.json").write_text(json.dumps({"auths": {registry_of(server.image): {"auth": auth}}}))
    monkeypatch.setenv("REGISTRY_AUTH_FILE", str(directory / "auth.json"))


@at_both
async def test_an_image_of_a_private_registry_needs_a_login(runtime: Runtime, private: Registry) -> None:
    with trio.fail_after(PATIENCE), pytest.raises(NodeError, match=f"the image {private.image} could not be pulled"):
        await runtime.prepare(private.image)


@at_both
@pytest.mark.usefixtures("login")
async def test_an_image_may_be_named_as_for_apptainer(subject: Subject, runtime: Runtime, private: Registry) -> None:
    container = replace(subject.container("sh", "-c", "echo pulled"), image=f"docker://{private.image}")
    with trio.fail_after(PATIENCE):
        await runtime.prepare(container.image, has_args=False)
    assert await end_of(runtime, container) == Exit(0)
    assert container.stdout.read_text() == "pulled\n"


@at_both
async def test_a_helper_program_has_the_login_for_a_registry(
    runtime: Runtime, private: Registry, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    answer = json.dumps({"ServerURL": "any", "Username": USER, "Secret": PASSWORD})
    (tmp_path / "docker-credential-tests").write_text(f"#!/bin/sh\ncat >&2\necho '{answer}'\n")
    (tmp_path / "docker-credential-tests").chmod(0o755)
    monkeypatch.setenv("PATH", f"{tmp_path}:{os.environ['PATH']}")
    (tmp_path / "config.json").write_text(json.dumps({"auths": None, "credsStore": "tests"}))
    monkeypatch.setenv("DOCKER_CONFIG", str(tmp_path))
    with trio.fail_after(PATIENCE):
        await runtime.prepare(private.image)


@with_timeouts(first_pause=0.01)
@at_both
@pytest.mark.usefixtures("login")
async def test_an_image_is_pulled_with_a_login_and_despite_a_rate_limit(
    subject: Subject, runtime: Runtime, private: Registry
) -> None:
    private.refusals = 1
    with trio.fail_after(PATIENCE):
        await runtime.prepare(private.image)
    container = replace(subject.container("sh", "-c", "echo pulled"), image=private.image)
    assert await end_of(runtime, container) == Exit(0)
    assert container.stdout.read_text() == "pulled\n"


@at_both
@pytest.mark.usefixtures("login")
async def test_a_cancelled_pull_ends_at_once_and_can_be_repeated(here: Engine, runtime: Runtime, private: Registry) -> None:
    private.stalling.set()
    with trio.fail_after(PATIENCE):
        async with trio.open_nursery() as nursery:
            nursery.start_soon(runtime.prepare, private.image)
            await until(private.stalled.is_set)
            nursery.cancel_scope.cancel()
    assert not here.has_image(private.image)
    private.stalling.clear()
    with trio.fail_after(PATIENCE):
        await runtime.prepare(private.image)
    assert here.has_image(private.image)


@pytest.mark.parametrize("how", ["kill", "terminate"])
async def test_a_pull_is_repeated_after_a_restart_of_the_engine(
    own_docker: Engine, image: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, how: str
) -> None:
    with registry(image, own_docker.registry_port) as server, trio.fail_after(PATIENCE):
        log_in(server, tmp_path, monkeypatch)
        server.stalling.set()
        async with docker.open_runtime(OPTIONS) as runtime, trio.open_nursery() as nursery:
            nursery.start_soon(runtime.prepare, server.image)
            await until(server.stalled.is_set)
            await trio.to_thread.run_sync(getattr(own_docker, how))
            server.stalling.clear()
            own_docker.start()
    assert own_docker.has_image(server.image)


# An image that is removed or replaced while a pilot is idle.


def count(proxy: EngineProxy, what: str) -> int:
    return sum(what in request for request in proxy.requests)


@at_both
@pytest.mark.parametrize("is_replaced", [False, True])
@pytest.mark.usefixtures("login")
async def test_a_removed_image_is_pulled_again_once_for_all_tasks(
    subject: Subject,
    here: Engine,
    runtime: Runtime,
    proxy: EngineProxy,
    private: Registry,
    image: Path,
    is_replaced: bool,
) -> None:
    ends = []

    async def run() -> None:
        ends.append(await end_of(runtime, replace(subject.container("true"), image=private.image)))

    await runtime.prepare(private.image)
    remove_image(here, private.image)
    if is_replaced:
        private.replace(image)
    async with trio.open_nursery() as nursery:
        for _ in range(3):
            nursery.start_soon(run)
    assert ends == [Exit(0)] * 3
    assert count(proxy, "/images/create") == 2


@at_both
@pytest.mark.usefixtures("login")
async def test_a_removed_image_that_cannot_be_pulled_is_the_nodes_fault(
    subject: Subject, here: Engine, runtime: Runtime, private: Registry, monkeypatch: pytest.MonkeyPatch
) -> None:
    await runtime.prepare(private.image)
    remove_image(here, private.image)
    monkeypatch.delenv("REGISTRY_AUTH_FILE")
    with pytest.raises(NodeError, match=f"the image {private.image} could not be pulled"):
        await end_of(runtime, replace(subject.container("true"), image=private.image))


@at_both
async def test_a_create_request_refused_for_another_reason_is_not_repeated(
    subject: Subject, runtime: Runtime, proxy: EngineProxy
) -> None:
    proxy.next(REQUESTS["create"], "fail").release.set()
    with pytest.raises(NodeError, match="could not make the container: no more"):
        await end_of(runtime, subject.container("true"))
    assert count(proxy, "/containers/create") == 1
