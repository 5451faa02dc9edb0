"""Each measurement ends with a report, on a load too small to say anything about speed."""

from collections.abc import Callable
from pathlib import Path

import pytest

from bench import bridge, limit, overhead, peer, scale, start, throughput, without_pilot, workloads
from bench.measurement import runtime_or_none
from bench.pilot import task_args
from bench.plots import plot
from bench.report import Report
from bench.timing_pilot import STAGES
from tests.support import servers
from tests.support.servers import RabbitServer


def drawn(report: Report, directory: Path) -> str:
    """Write and draw a report, twice with the same result; return the drawing."""
    report.write(directory)
    first = plot(report, directory)
    assert first
    text = first.read_text()
    assert plot(Report.read(directory / f"{report.name}.json"), directory) == first
    assert first.read_text() == text
    return text


def test_throughput(rabbitmq: RabbitServer, tmp_path: Path) -> None:
    plan = throughput.Plan(("process",), slots=(2,), seconds=(0, 0.01), sizes=(20,), rounds=2, length=0.01)
    found = throughput.measure(plan, rabbitmq)
    assert len(found.find(bytes=20).samples) == 2
    assert found.find(**{"task s": 0, "bytes": 1000}).median > 0
    assert 0 < found.find(what="utilisation").median <= 100
    assert found.settings["rabbitmq"]["erlang"] == "+sbwt none +sbwtdcpu none +sbwtdio none"
    assert found.versions["rabbitmq"] == rabbitmq.version
    assert "tasks of 0.01 s" in drawn(found, tmp_path)


def test_the_limit(rabbitmq: RabbitServer, tmp_path: Path, need: Callable[[str, str], None]) -> None:
    need("bwrap", "bubblewrap")
    found = limit.measure(limit.Plan(("process", "bubblewrap"), slots=(2,), rounds=1, length=0.01, pause=0), rabbitmq)
    for runtime, way in (("process", "xargs"), ("bubblewrap", "bwrap")):
        with_pilot, without = (found.find(runtime=runtime, what=what).median for what in ("trio-pilot", way))
        assert found.find(runtime=runtime, what=f"trio-pilot / {way}").median == with_pilot / without
    assert "bubblewrap" in drawn(found, tmp_path)


def test_tasks_without_a_pilot_are_started_as_by_a_pilot(rabbitmq: RabbitServer, need: Callable[[str, str], None]) -> None:
    need("bwrap", "bubblewrap")
    settings = {"runtime": "bubblewrap", "task_image": "/", "task_args": task_args(0), "kill_grace": 0.5}
    recording = without_pilot.record_pilot(settings, {}, rabbitmq)
    program, *options = recording["argv"]
    assert Path(program).name == "bwrap"
    status = str(recording["fds"][0])
    assert options[options.index("--json-status-fd") + 1] == status
    assert {"--cap-drop", "--die-with-parent", "--remount-ro", f"{recording['root']}/{recording['name']}/scratch"} <= set(
        options
    )
    assert options[-3:] == [
        "cp",
        *(f"/ewms-pilot-data/task-io/{way}file-{recording['name']}.{way}" for way in ("in", "out")),
    ]
    variables = recording["contents"][options[options.index("--args") + 1]].split("\0")
    assert variables[variables.index("OMP_NUM_THREADS") + 1].isdecimal()


@pytest.mark.soak
@pytest.mark.parametrize("runtime", ["apptainer", "docker", "podman"])
def test_the_limit_of_engines(rabbitmq: RabbitServer, runtime: str) -> None:
    found = limit.measure(limit.Plan((runtime,), slots=(2,), rounds=1, length=0.01), rabbitmq)
    assert {figure.unit for figure in found.figures} == {"1/s", "ratio"}


def test_the_peer_and_its_results(rabbitmq: RabbitServer, tmp_path: Path) -> None:
    found = peer.measure(peer.Plan((("stand-in", 4, (1,)),), rounds=1), rabbitmq)
    assert found.find(what="trio-pilot / ewms-pilot").median > 0
    assert found.versions["ewms-pilot"] == "0.27.0"
    assert "ewms-pilot" in drawn(found, tmp_path)


@pytest.mark.soak
def test_the_peer_on_engines(rabbitmq: RabbitServer) -> None:
    found = peer.measure(peer.Plan((("apptainer", 4, (2,)), ("docker", 4, (2,))), rounds=1), rabbitmq)
    assert found.find(engine="docker", what="trio-pilot / ewms-pilot").median > 0


def test_overhead(rabbitmq: RabbitServer, tmp_path: Path) -> None:
    plan = overhead.Plan(("process",), slots=(2,), rounds=1, length=0.05, counted=(0, 0))
    found = overhead.measure(plan, rabbitmq)
    assert all(found.find(what=stage).median > 0 for stage in ("staged", "started", "ran", "published"))
    assert "CPU of the pilot" in found.table()
    text = drawn(found, tmp_path)
    assert all(stage in text for stage in STAGES)


@pytest.mark.soak
def test_instructions(rabbitmq: RabbitServer, need: Callable[[str, str], None]) -> None:
    need("valgrind", "valgrind")
    found = overhead.measure(overhead.Plan(runtimes=(), counted=(5, 25)), rabbitmq)
    assert 1 < found.find(what="instructions of the pilot").median < 20


def test_start_and_end(rabbitmq: RabbitServer) -> None:
    found = start.measure(start.Plan(rounds=1, idle=0.5), rabbitmq)
    assert found.find(what="start to listening").median < found.find(what="start to first result").median + 2000
    assert found.find(what="CPU of an idle pilot").median >= 0  # in half a second it may not run at all
    assert len(found.figures) == 7


def test_scale(rabbitmq: RabbitServer, tmp_path: Path) -> None:
    found = scale.measure(scale.Plan((5, 10), pilots=(2,), shared=20, idle=0, rounds=1), rabbitmq)
    assert found.find(what="memory of the pilot", events=10).median > 1
    assert found.find(pilots=2, what="events").median > 0
    drawn(found, tmp_path)


@pytest.mark.soak
def test_idle_pilots_and_a_restarted_broker() -> None:
    with servers.rabbitmq() as server:
        found = scale.measure(scale.Plan((5,), pilots=(), idle=2), server)
    assert found.find(what="connections of an idle pilot").median == 2
    assert found.find(what="connections, on paper").median == 20_000
    assert found.find(what="restarted broker: until all are back").median > 0


def test_workloads(rabbitmq: RabbitServer) -> None:
    plan = workloads.Plan(pilots=2, slots=2, pixels=8, pixel=0.1, tasks=8, task=0.1)
    found = workloads.measure(plan, rabbitmq)
    assert all(figure.median <= 100 for figure in found.figures if figure.unit == "%")


def test_bridge(rabbitmq: RabbitServer) -> None:
    found = bridge.measure(bridge.Plan(at_once=(4,), events=50, rounds=1), rabbitmq)
    assert found.find(what="source and sink").median > 0
    assert found.find(what="pilot").median > 0


def test_a_runtime_that_is_not_available_is_left_out(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("PATH", "/nonexistent")
    with runtime_or_none("bubblewrap") as runtime:
        assert runtime is None
    assert "left out: bubblewrap: bwrap is not installed" in capsys.readouterr().err
