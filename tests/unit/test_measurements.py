import json
import re
import subprocess
import sys
from contextlib import nullcontext
from importlib import import_module
from pathlib import Path
from typing import Any

import pytest
import trio

from bench import custom_pilot, readme
from bench.__main__ import MEASUREMENTS, adapted, busy, parser
from bench.compare import compare, has_changed
from bench.ewms_pilot import STAND_IN_ARGS, stand_in
from bench.figures import Figure, alternate, compared
from bench.load import Load
from bench.measured_process import running
from bench.report import Report, aligned, commit, machine, rounded
from bench.throughput import Plan, events, points
from bench.timing_pilot import STAGES, CallOnFirstWait, TimedRuntime, TimedSink, TimedSource, Times, wrapped
from tests.support.lab import Lab, all_of
from trio_pilot.pilot.serve import Parts, serve
from trio_pilot.settings import Settings


def figure(*samples: float, unit: str = "1/s", **labels: Any) -> Figure:
    return Figure(labels, unit, samples)


def report(*figures: Figure, name: str = "limit", **facts: Any) -> Report:
    known = {
        "settings": {},
        "versions": {"python": "3"},
        "machine": {"cpu": "fast", "load before": 1},
        "commit": "abc",
        "made": "now",
    }
    return Report(name, figures, **{**known, **facts})


def test_a_figure_is_the_median_of_its_samples() -> None:
    found = figure(3, 1, 2)
    assert (found.median, found.low, found.high) == (2, 1, 3)


def test_sides_are_measured_in_turn_and_each_is_first_at_times() -> None:
    order: list[str] = []

    def side(name: str) -> float:
        order.append(name)
        return len(order)

    samples = alternate(3, {"one": lambda: side("one"), "other": lambda: side("other")})
    assert order == ["one", "other", "other", "one", "one", "other"]
    assert samples == {"one": [1, 4, 5], "other": [2, 3, 6]}


def test_ratios_are_taken_round_by_round() -> None:
    *sides, ratio = compared({"slots": 4}, "1/s", {"pilot": [10, 30, 20], "bare": [20, 40, 80]}, "pilot")
    assert [side.labels["what"] for side in sides] == ["pilot", "bare"]
    assert ratio == Figure({"slots": 4, "what": "pilot / bare"}, "ratio", [0.5, 0.75, 0.25])
    assert ratio.median == 0.5  # that of the medians would be 0.25


def test_a_report_is_read_as_it_was_written(tmp_path: Path) -> None:
    written = report(figure(1, 2.5, slots=4, what="x"), settings={"plan": {"rounds": 2}})
    path = written.write(tmp_path / "results")
    assert path.name == "limit.json"
    read = Report.read(path)
    assert [found.as_json() for found in read.figures] == [found.as_json() for found in written.figures]
    assert (read.commit, read.versions, read.settings) == (written.commit, written.versions, written.settings)
    assert json.loads(path.read_text())["figures"][0]["median"] == 1.75


def test_a_report_finds_a_figure_by_its_labels() -> None:
    found = report(figure(1, slots=1, what="a"), figure(2, slots=1, what="b"))
    assert found.find(what="b").median == 2
    with pytest.raises(LookupError, match="2 figures of limit have"):
        found.find(slots=1)


def test_a_report_has_the_machine_and_the_commit() -> None:
    assert machine()["cores"] >= 1
    assert re.fullmatch(r"[0-9a-f]{12}(-dirty)?|unknown", commit())


def test_a_table_has_a_line_for_each_figure_with_numbers_to_the_right() -> None:
    table = report(figure(1234.5, slots=16, what="events"), figure(0.123456, slots=1, what="ratio", unit="")).table()
    head, first, second = table.splitlines()
    assert head.split() == ["slots", "what", "median", "low", "high", "unit"]
    assert first.split() == ["16", "events", "1234", "1234", "1234", "1/s"]
    assert second.startswith("    1  ratio")
    assert rounded(99.95) == "100"
    assert aligned([["a", "b"], ["x", "1"]]) == "a  b\nx  1"


@pytest.mark.parametrize(
    ("before", "after", "changed"),
    [
        ((100, 101, 102), (103, 104, 105), False),  # apart, and not by enough
        ((100, 101, 110), (109, 115, 120), False),  # by enough, and not apart
        ((100, 101, 102), (110, 111, 112), True),
        ((110, 111, 112), (100, 101, 102), True),
        ((100,), (110,), False),  # of one sample each nothing is known
        ((100,), (130,), True),
    ],
)
def test_a_figure_has_changed_if_samples_lie_apart_by_enough(
    before: tuple[float, ...], after: tuple[float, ...], changed: bool
) -> None:
    assert has_changed(figure(*before), figure(*after)) is changed


def test_a_comparison_lists_changes_new_figures_and_other_conditions(tmp_path: Path) -> None:
    one = report(figure(10, 11, what="a"), figure(1, 1, what="b"), figure(5, what="gone")).write(tmp_path / "1")
    figures = figure(20, 21, what="a"), figure(1, 1, what="b"), figure(7, what="new")
    other = report(*figures, versions={"python": "4"}, machine={"cpu": "fast", "load before": 9}).write(tmp_path / "2")
    _, condition, _, *rows = compare(one, other).splitlines()
    assert condition == "not the same versions: python: 3 before, 4 after"
    assert [row.split() for row in rows] == [
        ["what", "a", "[1/s]", "10.5", "20.5", "+95", "%"],
        ["what", "gone", "[1/s]", "5", "gone"],
        ["what", "new", "[1/s]", "7", "new"],
    ]
    assert compare(one, one).endswith("nothing has changed beyond the noise")


def test_reports_that_are_in_both_directories_are_compared(tmp_path: Path) -> None:
    for directory, names in (("1", ("limit", "peer", "start")), ("2", ("peer", "limit", "scale"))):
        for name in names:
            report(figure(1, 2), name=name).write(tmp_path / directory)
    found = compare(tmp_path / "1", tmp_path / "2").split("\n\n")
    assert [text.partition(":")[0] for text in found] == ["limit", "peer"]
    assert compare(tmp_path, tmp_path) == "no report is in both directories"


@pytest.mark.parametrize("content", [None, "{}", "[]", "no JSON", '{"figures": [{}]}'])
def test_a_file_that_is_not_a_report_is_an_error(tmp_path: Path, content: str | None) -> None:
    path = tmp_path / "limit.json"
    if content is not None:
        path.write_text(content)
    with pytest.raises(SystemExit, match=r"limit\.json is not a report"):
        compare(path, path)


def test_an_unknown_runtime_is_an_error(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        parser().parse_args(["limit", "--runtimes", "docker,dcoker"])
    assert "dcoker: choose from docker, podman, apptainer, bubblewrap, process" in capsys.readouterr().err


def test_reports_of_different_measurements_are_not_compared(tmp_path: Path) -> None:
    paths = [report(name=name).write(tmp_path) for name in ("limit", "peer")]
    with pytest.raises(SystemExit, match="compare two of the same"):
        compare(*paths)


def test_events_of_a_load_are_all_different_and_of_its_size() -> None:
    bodies = list(Load(100, 20).bodies())
    assert len(set(bodies)) == 100
    assert {len(body) for body in bodies} == {20}
    assert bodies == list(Load(100, 20).bodies())


def test_a_point_has_enough_events_to_keep_its_slots_busy() -> None:
    plan = Plan(length=3, waves=3)
    assert events(plan, 0.004, slots=1, seconds=0) == 750
    assert events(plan, 0.004, slots=4, seconds=0) == 1500  # two cores
    assert events(plan, 0.004, slots=4, seconds=10) == 12  # three waves
    assert len(list(points(Plan()))) == 5 * (5 + 2)


def test_each_measurement_is_a_command_with_a_plan_to_change() -> None:
    assert parser().parse_args(["--quick"]).command is None
    assert parser().parse_args(["--quick", "limit"]).quick
    assert parser().parse_args(["limit", "--to", "x"]).to == Path("x")
    for name in MEASUREMENTS:
        given = parser().parse_args([name, "--rounds", "2", "--runtimes", "docker,podman"])
        plan = adapted(import_module(f"bench.{name}").QUICK, given)
        assert plan.rounds == 2
        assert getattr(plan, "runtimes", None) in (None, ("docker", "podman"))


def test_a_pilot_of_a_measurement_has_its_share_of_the_machine(tmp_path: Path) -> None:
    (tmp_path / "settings.json").write_text('{"max_concurrent_tasks": "auto"}')
    found = custom_pilot.read_settings(str(tmp_path / "settings.json"))
    assert found.max_concurrent_tasks >= 1
    assert found.grace >= 0
    assert found.task_env_json["OMP_NUM_THREADS"].isdecimal()


THREAD_THAT_ENDS = """
import threading, time
from pathlib import Path

def work():
    while not Path("stop").exists():
        pass

thread = threading.Thread(target=work)
thread.start()
while time.process_time() < 0.1:
    time.sleep(0.01)
print("working", flush=True)
thread.join()
print("ended", flush=True)
time.sleep(60)
"""


def test_cpu_of_threads_that_have_ended_is_still_counted(tmp_path: Path) -> None:
    with running([sys.executable, "-c", THREAD_THAT_ENDS], tmp_path, {}) as process:
        process.wait_for("working")
        before = process.cpu()
        (tmp_path / "stop").touch()
        process.wait_for("ended")
        assert process.cpu() >= before >= 0.1


def test_a_busy_machine_is_warned_of() -> None:
    assert busy(1.1, 2) == "this machine is busy (load 1.1 on 2 cores): the measurements will be noisy"
    assert busy(0.9, 2) is None


@pytest.mark.mock_clock
async def test_the_stages_of_events_are_timed_by_wrappers(lab: Lab) -> None:
    lab.broker.delays = {"sink.send": 0.25, "source.ack": 0.125}
    lab.put("a", "b")
    settings = Settings(**{**lab.DEFAULTS, "data_dir_parent_path_on_host": lab.directory})
    times = Times(settings.max_concurrent_tasks, clock=trio.current_time)
    _, signals = trio.open_memory_channel[int](0)
    await serve(
        settings,
        Parts(
            lab.guardian.open(),
            nullcontext(),
            wrapped(lab.runtime.open(), lambda runtime: TimedRuntime(runtime, times)),
            all_of([wrapped(lab.broker.open_source("in"), lambda source: TimedSource(source, times))]),
            all_of([wrapped(lab.broker.open_sink("out"), lambda sink: TimedSink(sink, times))]),
        ),
        signals,
        lab.status,
    )
    means = times.means()
    assert list(means) == list(STAGES)
    expected = {"queued": 0, "staged": 0, "started": 0, "ran": 1, "read": 0, "published": 0.25, "acked": 0.125}
    assert means == pytest.approx(expected)
    assert not times.taken
    assert not times.moments


async def test_a_call_comes_at_the_first_wait_of_a_coroutine() -> None:
    notes: list[str] = []

    async def at_once() -> str:
        return "done"

    async def wait_twice() -> None:
        notes.append("begun")
        await trio.lowlevel.checkpoint()
        notes.append("gone on")
        try:
            await trio.sleep_forever()
        except trio.Cancelled:
            notes.append("cancelled")
            raise

    assert await CallOnFirstWait(at_once(), lambda: notes.append("called")) == "done"
    with trio.move_on_after(0.01) as scope:
        await CallOnFirstWait(wait_twice(), lambda: notes.append("called"))
    assert scope.cancelled_caught
    assert notes == ["called", "begun", "called", "gone on", "cancelled"]


def test_the_stand_in_for_apptainer_runs_the_command_where_its_files_are(tmp_path: Path) -> None:
    (tmp_path / "in").write_text("event")
    mount = f"--mount type=bind,source={tmp_path},target=/ewms-pilot-data/task-io"
    command = f"{stand_in(tmp_path)} run --containall {mount} --env A=b / cp /ewms-pilot-data/task-io/in"
    subprocess.run([*command.split(), "/ewms-pilot-data/task-io/out here"], check=True)
    assert (tmp_path / "out here").read_text() == "event"
    assert len(STAND_IN_ARGS.split()) == 14


def test_the_section_on_speed_agrees_with_the_results() -> None:
    found = readme.SECTION.search(readme.README.read_text())
    assert found, "the README has no section on speed"
    assert found[2] == readme.markdown(), "run python -m bench readme"


def test_the_section_on_speed_has_a_plot_a_table_and_its_conditions(tmp_path: Path) -> None:
    assert readme.markdown(tmp_path) == readme.NOTHING_YET
    conditions = {"machine": {"cores": 2, "cpu": "fast"}, "versions": {"python": "3", "rabbitmq": "4", "ewms-pilot": "0.27"}}
    for name, kind, other in (("peer", "engine", "ewms-pilot"), ("limit", "runtime", "xargs")):
        samples = {"trio-pilot": [20.0, 30.0], other: [10.0, 10.0]}
        figures = compared({kind: "process", "slots": 4}, "1/s", samples, "trio-pilot")
        report(*figures, name=name, **conditions).write(tmp_path)
    lines = readme.markdown(tmp_path).splitlines()
    assert lines[0] == "![Events a second](bench/results/peer.svg)"
    assert lines[4:6] == [
        "| process | 4 | 25 | ewms-pilot | 10 | 2.5 (2 to 3) |",
        "| process | 4 | 25 | xargs | 10 | 2.5 (2 to 3) |",
    ]
    assert "2 cores (fast), shared with RabbitMQ; python 3, rabbitmq 4, ewms-pilot 0.27" in lines[-1]
