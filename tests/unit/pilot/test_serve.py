import math
import re
import signal
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import trio

from tests.support.lab import WIRE, Lab
from trio_pilot.brokers import Settlement
from trio_pilot.errors import (
    BrokerError,
    ContainerLostError,
    ContainerRunError,
    NodeError,
    PublishRefusedError,
    TasksFailedError,
)
from trio_pilot.files import task_logs
from trio_pilot.runtimes import Container
from trio_pilot.status import State
from trio_pilot.testing import copy
from trio_pilot.wire import Message

pytestmark = pytest.mark.mock_clock


async def fails(container: Container) -> int:
    await trio.sleep(1)
    container.stderr.write_text("Oh no.\n")
    return 3


async def fails_on_7(container: Container) -> int:
    if Path(container.env["EWMS_TASK_INFILE"]).read_text() == "7":  # noqa: ASYNC240
        return await fails(container)
    return await copy(container)


async def writes_nothing(container: Container) -> int:
    del container
    await trio.sleep(1)
    return 0


async def sleeps_long(container: Container) -> int:
    await trio.sleep(100)
    return await copy(container)


def settled(lab: Lab) -> list[tuple[str, str]]:
    return [(what, message_id) for what, message_id in lab.broker.history if what in Settlement.__members__]


async def test_events_become_outputs_and_are_acked_after_the_confirm(lab: Lab) -> None:
    lab.put({"a": 1}, "text", [1, 2])
    assert await lab.run() is None
    assert lab.outputs() == ['{"a": 1}', "text", "[1, 2]"]
    assert [what for what, _ in lab.broker.history] == ["CONFIRMED", "ACK"] * 3
    lab.assert_nothing_is_left()
    assert lab.status.state.value is State.DONE


@pytest.mark.parametrize(
    ("options", "needs_logs"), [({}, False), ({"dump_task_output": True}, True), ({"keep_all_task_files": True}, True)]
)
async def test_what_a_task_says_is_wanted_where_it_is_kept(lab: Lab, options: dict[str, bool], needs_logs: bool) -> None:
    lab.put(1)
    await lab.run(**options)
    assert [container.needs_logs for container in lab.runtime.ran] == [needs_logs]


async def test_an_output_of_whatever_depth_ends_no_pilot(lab: Lab) -> None:
    """One is just not too deep to be read, and too deep to be written with the headers around it."""
    depths = range(800, 1000)

    async def deep(container: Container) -> int:
        depth = int(Path(container.env["EWMS_TASK_INFILE"]).read_text())  # noqa: ASYNC240
        Path(container.env["EWMS_TASK_OUTFILE"]).write_text(depth * "[" + depth * "]")  # noqa: ASYNC240
        return 0

    lab.runtime.script = deep
    lab.put(*depths)
    with pytest.raises(TasksFailedError):
        await lab.run(outfile_ext=".json", max_attempts=1, stop_listening_on_task_error=False)
    assert len(lab.broker.queues["out"]) + len(lab.broker.queues["in.dead-letters"]) == len(depths)
    lab.assert_the_promise(depths)


async def test_an_output_carries_the_identity_of_its_event(lab: Lab) -> None:
    lab.put("x")
    await lab.run()
    assert [message.message_id for message in lab.broker.queues["out"]] == ["x"]


async def test_a_task_that_writes_nothing_has_succeeded(lab: Lab) -> None:
    lab.runtime.script = writes_nothing
    lab.put(1)
    await lab.run()
    assert settled(lab) == [("ACK", "1")]
    assert lab.outputs() == []


@pytest.mark.parametrize("slots", [1, 3, 8])
async def test_slots_are_all_used_and_never_more(lab: Lab, slots: int) -> None:
    lab.put(*range(24))
    started = trio.current_time()
    await lab.run(max_concurrent_tasks=slots)
    assert lab.runtime.most_running == slots
    assert trio.current_time() - started == 24 / slots + 1  # and the second in which nothing came


async def test_the_pilot_waits_for_the_first_event_longer_than_for_the_next(lab: Lab) -> None:
    async with trio.open_nursery() as nursery:
        nursery.start_soon(partial(lab.run, timeout_queue_wait_for_first_message=1.0))
        await trio.sleep(0.5)
        lab.put(1)
    assert trio.current_time() >= 2.5


@pytest.mark.parametrize(("first", "later", "end"), [(None, 2.0, 2.0), (7.0, 2.0, 7.0), (0.25, 9.0, 0.25)])
async def test_idle_timeouts_mean_what_they_say(lab: Lab, first: float | None, later: float, end: float) -> None:
    started = trio.current_time()
    await lab.run(timeout_queue_wait_for_first_message=first, timeout_queue_incoming=later)
    assert trio.current_time() - started == end


async def test_the_later_timeout_counts_from_the_moment_the_slot_is_free(lab: Lab) -> None:
    lab.put(1)
    started = trio.current_time()
    await lab.run(timeout_queue_wait_for_first_message=50.0, timeout_queue_incoming=3.0)
    assert trio.current_time() - started == 1 + 3


async def test_an_event_just_before_the_timeout_is_still_run(lab: Lab) -> None:
    async def late() -> None:
        await trio.sleep(0.999)
        lab.put(1)

    async with trio.open_nursery() as nursery:
        nursery.start_soon(late)
        await lab.run()
    assert lab.outputs() == ["1"]


async def test_an_event_that_comes_while_the_broker_is_asked_is_run(lab: Lab) -> None:
    lab.broker.delays["consumer.is_idle"] = 20.0

    async def late() -> None:
        await trio.sleep(15)
        lab.put(1)

    async with trio.open_nursery() as nursery:
        nursery.start_soon(late)
        await lab.run()
    assert lab.outputs() == ["1"]


async def test_running_tasks_finish_after_the_pilot_has_stopped_listening(lab: Lab) -> None:
    lab.runtime.script = sleeps_long
    lab.put(1)
    await lab.run(max_concurrent_tasks=2)
    assert lab.outputs() == ["1"]


async def test_a_failing_task_is_rejected_and_ends_the_listening(lab: Lab) -> None:
    lab.runtime.script = fails
    lab.put(1, 2, 3)
    with pytest.raises(TasksFailedError) as failure:
        await lab.run()
    assert str(failure.value) == "1 TASK(S) FAILED: ContainerRunError('task failed (exit code 3): Oh no.')"
    assert settled(lab) == [("REJECT", "1")]
    lab.assert_the_promise([1, 2, 3])


async def test_tasks_that_run_beside_a_failing_one_finish(lab: Lab) -> None:
    lab.runtime.script = fails_on_7
    lab.put(6, 7, 8, 9)
    with pytest.raises(TasksFailedError):
        await lab.run(max_concurrent_tasks=3)
    assert sorted(lab.outputs()) == ["6", "8"]


async def test_a_pilot_may_go_on_after_failures_and_fails_in_the_end(lab: Lab) -> None:
    lab.runtime.script = fails_on_7
    lab.put(*range(10))
    with pytest.raises(TasksFailedError, match=r"^2 TASK\(S\) FAILED: ") as failure:
        await lab.run(stop_listening_on_task_error=False, max_attempts=2)
    assert str(failure.value).count("ContainerRunError('task failed (exit code 3): Oh no.')") == 2
    assert len(lab.outputs()) == 9
    assert [(m.message_id, m.reason) for m in lab.broker.queues["in.dead-letters"]] == [
        ("7", "task failed (exit code 3): Oh no.")
    ]


async def test_a_failing_event_does_not_stand_in_the_way_of_the_others(lab: Lab) -> None:
    lab.runtime.script = fails_on_7
    lab.put(7, *range(3))
    with pytest.raises(TasksFailedError):
        await lab.run(stop_listening_on_task_error=False, max_attempts=3)
    assert lab.outputs() == ["0", "1", "2"]
    assert [message_id for what, message_id in settled(lab) if what != "ACK"] == ["7", "7", "7"]


@pytest.mark.parametrize("name", ["ContainerRunError", "EventError", "PilotError"])
async def test_an_okay_error_is_no_reason_to_stop_listening(lab: Lab, name: str) -> None:
    lab.runtime.script = fails_on_7
    lab.put(7, 8)
    with pytest.raises(TasksFailedError):
        await lab.run(okay_errors=frozenset({name}), max_attempts=1)
    assert lab.outputs() == ["8"]


async def test_a_timeout_is_known_as_timeout_error(lab: Lab) -> None:
    lab.runtime.script = sleeps_long
    lab.put(1, 2)
    with pytest.raises(TasksFailedError) as failure:
        await lab.run(okay_errors=frozenset({"TimeoutError"}), task_timeout=10.0, max_attempts=1)
    assert str(failure.value).count("task failed: [Timeout-Error] timed out after 10s") == 2


async def test_an_event_of_a_timed_out_task_goes_back_at_once(lab: Lab) -> None:
    lab.runtime.script = sleeps_long
    lab.put(1)
    started = trio.current_time()
    with pytest.raises(TasksFailedError):
        await lab.run(task_timeout=2.5)
    assert trio.current_time() - started == 2.5 + lab.runtime.kill_seconds
    assert settled(lab) == [("REJECT", "1")]


async def test_the_memory_of_errors_is_bounded(lab: Lab) -> None:
    lab.runtime.script = fails
    lab.put(*range(50))
    with pytest.raises(TasksFailedError, match=r"^50 TASK\(S\) FAILED: ") as failure:
        await lab.run(stop_listening_on_task_error=False, max_attempts=1)
    assert str(failure.value).count("ContainerRunError") == 20
    assert str(failure.value).endswith(", ...")


async def test_a_slot_is_held_in_quarantine_after_an_error(lab: Lab) -> None:
    lab.runtime.script = fails
    lab.put(1)
    started = trio.current_time()
    with pytest.raises(TasksFailedError):
        await lab.run(quarantine_time=600.0)
    assert trio.current_time() - started == 601


@pytest.mark.parametrize("call", ["source.ready", "sink.ready", "sink.send"])
async def test_a_slot_is_held_in_quarantine_after_an_error_of_a_broker(lab: Lab, call: str) -> None:
    def unreachable(now: str) -> None:
        if now == call:
            raise BrokerError("unreachable")

    lab.broker.fault = unreachable
    lab.put(1)
    with pytest.raises(BaseExceptionGroup) as failure:
        await lab.run(quarantine_time=600.0)
    assert failure.group_contains(BrokerError, match="unreachable")
    assert 600 <= trio.current_time() < 610
    lab.assert_the_promise([1])


async def test_a_signal_ends_the_quarantine(lab: Lab) -> None:
    lab.runtime.script = fails
    lab.put(1)
    with pytest.raises(BaseExceptionGroup) as failure:
        await lab.run_signalled([30], quarantine_time=600.0)
    assert failure.group_contains(TasksFailedError)
    assert trio.current_time() == 30


async def test_no_quarantine_without_an_error(lab: Lab) -> None:
    lab.put(1)
    await lab.run(quarantine_time=600.0)
    assert trio.current_time() < 10


async def test_a_node_failure_returns_the_event_uncounted_and_ends_the_pilot(lab: Lab) -> None:
    calls = iter(range(100))

    def broken(call: str) -> None:
        if call == "runtime.run" and next(calls):  # not of the probe
            raise NodeError("no containers here")

    lab.runtime.fault = broken
    lab.put(1, 2)
    with pytest.raises(BaseExceptionGroup) as failure:
        await lab.run()
    assert failure.group_contains(NodeError, match="no containers here")
    assert settled(lab) == [("RELEASE", "1")]
    lab.assert_the_promise([1, 2])


async def test_other_tasks_finish_when_the_node_fails_one(lab: Lab) -> None:
    calls = iter(range(100))

    def broken(call: str) -> None:
        if call == "runtime.run" and next(calls) == 2:
            raise NodeError("no containers here")

    lab.runtime.fault = broken
    lab.put(1, 2, 3)
    with pytest.raises(BaseExceptionGroup):
        await lab.run(max_concurrent_tasks=3)
    assert sorted(lab.outputs()) == ["1", "3"]


async def test_a_container_lost_with_its_engine_returns_its_event_uncounted(lab: Lab) -> None:
    calls = iter(range(100))

    def restarted(call: str) -> None:
        if call == "runtime.exit" and next(calls) == 0:
            raise ContainerLostError("the engine was started anew")

    lab.runtime.fault = restarted
    lab.put(1, 2)
    assert await lab.run() is None
    assert settled(lab) == [("RELEASE", "1"), ("ACK", "2"), ("ACK", "1")]
    assert [delivery.attempts for delivery in lab.broker.queues["in"]] == []
    assert sorted(lab.outputs()) == ["1", "2"]


@pytest.mark.parametrize(("limit", "used"), [({"task_memory": 2**20}, "more than 1048576 b"), ({}, "more than there was")])
async def test_a_task_that_is_killed_for_want_of_memory_fails_saying_so(lab: Lab, limit: Any, used: str) -> None:
    lab.runtime.out_of_memory = True
    lab.put(1)
    error = "ContainerRunError('task failed (exit code 137): out of memory: it used "
    with pytest.raises(TasksFailedError, match=re.escape(error + used)):
        await lab.run(**limit)
    assert settled(lab) == [("REJECT", "1")]


async def test_what_dead_pilots_have_left_is_swept_before_an_event_is_taken(lab: Lab) -> None:
    def looking(call: str) -> None:
        assert call != "consumer.take" or lab.guardian.swept

    lab.broker.fault = looking
    lab.put(1)
    await lab.run()
    assert lab.guardian.watched == [("data", lab.directory / "ewms-pilot-data")]


async def test_the_guardian_knows_the_engine(lab: Lab) -> None:
    lab.runtime.engine = Path("/engine.sock")
    await lab.run()
    assert ("engine", Path("/engine.sock")) in lab.guardian.watched


@pytest.mark.parametrize("has_unremoved_containers", [False, True])
async def test_the_guard_stays_if_the_runtime_leaves_something(lab: Lab, has_unremoved_containers: bool) -> None:
    lab.runtime.has_unremoved_containers = has_unremoved_containers
    await lab.run()
    assert lab.guardian.outlives_pilot == has_unremoved_containers


async def test_the_guardian_knows_the_image_directory_before_one_is_unpacked(lab: Lab) -> None:
    def looking(call: str) -> None:
        assert call != "runtime.prepare" or ("images", Path("/images")) in lab.guardian.watched

    lab.runtime.image_directory = Path("/images")
    lab.runtime.fault = looking
    await lab.run()


async def test_a_refused_output_is_the_events_failure(lab: Lab) -> None:
    def refusing(call: str) -> None:
        if call == "sink.send":
            raise PublishRefusedError("too large")

    lab.broker.fault = refusing
    lab.put(1)
    with pytest.raises(TasksFailedError, match=r"PublishRefusedError\('too large'\)"):
        await lab.run()
    assert settled(lab) == [("REJECT", "1")]


async def test_an_undecodable_event_is_rejected_and_kills_nobody(lab: Lab) -> None:
    lab.broker.put("in", b"\0garbage", message_id="bad")
    lab.put(1)
    with pytest.raises(TasksFailedError, match=r"1 TASK.*DecodeError"):
        await lab.run(stop_listening_on_task_error=False, max_attempts=1)
    assert lab.outputs() == ["1"]
    assert [message.message_id for message in lab.broker.queues["in.dead-letters"]] == ["bad"]


async def test_nothing_is_taken_before_the_init_container_succeeded(lab: Lab) -> None:
    async def slow_init(container: Container) -> int:
        if container.name.startswith("init-"):
            assert "EWMS_TASK_INFILE" not in container.env
            assert Path(container.env["EWMS_TASK_DATA_HUB_DIR"]).is_dir()  # noqa: ASYNC240
            await trio.sleep(100)
            assert not lab.broker.unsettled
            return 0
        return await copy(container)

    lab.runtime.script = slow_init
    lab.put(1)
    await lab.run(init_image="init")
    assert lab.outputs() == ["1"]
    assert [container.image for container in lab.runtime.ran] == ["init", ""]


async def test_a_failing_init_container_ends_the_pilot_before_it_takes_anything(lab: Lab) -> None:
    lab.runtime.script = fails
    lab.put(1)
    with pytest.raises(BaseExceptionGroup) as failure:
        await lab.run(init_image="init")
    assert failure.group_contains(ContainerRunError, match=r"^init-container failed \(exit code 3\): Oh no\.$")
    assert lab.broker.history == []
    lab.assert_nothing_is_left()


async def test_a_broker_that_refuses_ends_a_running_init_container(lab: Lab) -> None:
    def refuse(call: str) -> None:
        if call == "sink.ready":
            raise BrokerError("no such queue")

    lab.broker.fault = refuse
    lab.broker.delays["sink.ready"] = 3
    lab.runtime.script = sleeps_long
    started = trio.current_time()
    with pytest.raises(BaseExceptionGroup) as failure:
        await lab.run(init_image="init")
    assert failure.group_contains(BrokerError)
    assert trio.current_time() - started == 3 + lab.runtime.kill_seconds
    lab.assert_nothing_is_left()


async def test_the_init_container_has_a_deadline(lab: Lab) -> None:
    lab.runtime.script = sleeps_long
    with pytest.raises(BaseExceptionGroup) as failure:
        await lab.run(init_image="init", init_timeout=5.0)
    assert failure.group_contains(ContainerRunError, match=r"^init-container failed: \[Timeout-Error\] timed out after 5s$")
    assert trio.current_time() == 5 + lab.runtime.kill_seconds


async def test_a_signal_returns_what_cannot_finish_in_the_grace(lab: Lab) -> None:
    lab.runtime.script = sleeps_long
    lab.put(*range(4))
    assert await lab.run_signalled([30], max_concurrent_tasks=2, grace=20.0) == signal.SIGTERM
    assert trio.current_time() == 30 + 20 + lab.runtime.kill_seconds
    assert sorted(settled(lab)) == [("RELEASE", "0"), ("RELEASE", "1")]
    lab.assert_the_promise(range(4))


async def test_tasks_that_can_finish_in_the_grace_do(lab: Lab) -> None:
    lab.put(*range(4))
    assert await lab.run_signalled([0.5], signal.SIGINT, max_concurrent_tasks=2) == signal.SIGINT
    assert trio.current_time() == 1
    assert sorted(lab.outputs()) == ["0", "1"]
    lab.assert_the_promise(range(4))


async def test_a_second_signal_is_now(lab: Lab) -> None:
    lab.runtime.script = sleeps_long
    lab.put(1)
    await lab.run_signalled([10, 15, 15], grace=3600.0)
    assert trio.current_time() == 15 + lab.runtime.kill_seconds
    lab.assert_the_promise([1])


async def test_a_signal_during_init_kills_it_and_ends(lab: Lab) -> None:
    lab.runtime.script = sleeps_long
    assert await lab.run_signalled([10], init_image="init") == signal.SIGTERM
    assert trio.current_time() == 10 + lab.runtime.kill_seconds
    lab.assert_nothing_is_left()


async def test_an_output_that_is_there_is_sent_although_the_pilot_is_being_ended(lab: Lab) -> None:
    lab.broker.delays["sink.send"] = 5
    lab.put(1)
    await lab.run_signalled([2, 2], settle_grace=6.0)
    assert lab.outputs() == ["1"]
    assert settled(lab) == [("ACK", "1")]
    assert trio.current_time() == 6
    lab.assert_the_promise([1])


async def test_an_output_not_sent_within_the_settle_grace_is_given_up(lab: Lab) -> None:
    lab.broker.delays["sink.send"] = 1000
    lab.put(1)
    await lab.run_signalled([10, 10], settle_grace=6.0)
    assert trio.current_time() == 16
    assert settled(lab) == [("RELEASE", "1")]
    lab.assert_the_promise([1])


async def test_a_broker_that_does_not_answer_does_not_keep_the_pilot(lab: Lab) -> None:
    lab.broker.delays["source.release"] = 1000
    lab.runtime.script = sleeps_long
    lab.put(1)
    await lab.run_signalled([10, 10], settle_grace=6.0)
    assert trio.current_time() == 10 + lab.runtime.kill_seconds + 6
    lab.assert_the_promise([1])


async def test_kept_task_files_are_where_the_contract_says(lab: Lab) -> None:
    lab.put("hello")
    await lab.run(keep_all_task_files=True, infile_ext=".txt", outfile_ext=".dat")
    (task,) = (path for path in (lab.directory / "ewms-pilot-data").iterdir() if (path / "task-io").exists())
    files = {str(path.relative_to(task)) for path in task.rglob("*") if path.is_file()}
    name = task.name
    assert files == {
        f"task-io/infile-{name}.txt",
        f"task-io/outfile-{name}.dat",
        "outputs/stdoutfile",
        "outputs/stderrfile",
    }


async def test_placeholders_are_filled_in_wherever_they_stand(lab: Lab) -> None:
    args = ("--in={{INFILE}}", "{{IN_FILE}}:{{OUT_FILE}}", "{{DATA_HUB}}/x", "{{DATAHUB}}", "{{OUTFILE}}", "{{OTHER}}")
    lab.put(1)
    await lab.run(task_args=args)
    (container,) = lab.runtime.ran
    infile, outfile, hub = (container.env[f"EWMS_TASK_{name}"] for name in ("INFILE", "OUTFILE", "DATA_HUB_DIR"))
    assert container.args == (f"--in={infile}", f"{infile}:{outfile}", f"{hub}/x", hub, outfile, "{{OTHER}}")


async def test_without_arguments_an_image_runs_its_own_command(lab: Lab) -> None:
    lab.put(1)
    lab.runtime.has_command = False
    with pytest.RaisesGroup(NodeError, allow_unwrapped=True, flatten_subgroups=True):
        await lab.run(task_args=(), task_image="/an/image")
    assert not lab.runtime.ran
    lab.runtime.has_command = True
    await lab.run(task_args=(), task_image="/an/image", init_image="/another")
    assert [(container.image, container.args) for container in lab.runtime.ran] == [("/another", ()), ("/an/image", ())]


async def test_a_container_with_mounts_sees_the_paths_of_the_contract(lab: Lab) -> None:
    lab.runtime.has_mounts = True
    lab.runtime.script = writes_nothing
    lab.put(1)
    await lab.run(task_env_json={"A": "b"})
    (container,) = lab.runtime.ran
    assert container.env == {
        "A": "b",
        "EWMS_TASK_INFILE": f"/ewms-pilot-data/task-io/infile-{container.name}.in",
        "EWMS_TASK_OUTFILE": f"/ewms-pilot-data/task-io/outfile-{container.name}.out",
        "EWMS_TASK_DATA_HUB_DIR": "/ewms-pilot-data/data-hub",
    }
    assert {mount.target for mount in container.mounts} == {"/ewms-pilot-data/task-io", "/ewms-pilot-data/data-hub"}


async def test_events_of_several_queues_are_taken_in_turn(lab: Lab) -> None:
    for number in range(3):
        lab.put(f"a{number}")
        lab.broker.put("in2", WIRE.encode(Message(f"b{number}")))
    await lab.run(queue_incoming=("in", "in2"), queue_outgoing=("out", "out2"))
    assert [output[0] for output in lab.outputs()] in (["a", "b"] * 3, ["b", "a"] * 3)
    assert lab.broker.bodies("out2") == lab.broker.bodies("out")


async def test_the_summary_counts_and_times(lab: Lab) -> None:
    lab.put(*range(3))
    await lab.run()
    summary = "\n".join(lab.status.summary())
    assert "3 task(s): 3 succeeded, 0 failed; 0 event(s) returned" in summary
    assert "mean 1 s, median 1 s" in summary


async def test_what_a_task_says_is_copied_however_it_ends(
    lab: Lab, capfdbinary: pytest.CaptureFixture[bytes], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(task_logs, "SHOW_TIMEOUT", math.inf)  # trio's mock clock does not wait for a thread
    lab.runtime.script = fails
    lab.put(1)
    with pytest.raises(TasksFailedError):
        await lab.run(dump_task_output=True)
    assert b"Oh no.\n" in capfdbinary.readouterr().err


async def runs_in_a_nursery(container: Container) -> int:
    """Wait as the engines' runtimes do: cancelled, their nurseries raise a group."""
    del container
    async with trio.open_nursery() as nursery:
        nursery.start_soon(trio.sleep_forever)
    return 0


async def test_an_event_cancelled_inside_a_nursery_counts_as_returned(lab: Lab) -> None:
    lab.runtime.script = runs_in_a_nursery
    lab.put(1)
    await lab.run_signalled([1, 2])
    assert settled(lab) == [("RELEASE", "1")]
    assert lab.status.returned.value == 1


async def test_a_task_that_takes_too_long_ends_the_pilot_in_words_of_ewms(lab: Lab) -> None:
    lab.runtime.script = sleeps_long
    lab.put(1)
    expected = "1 TASK(S) FAILED: ContainerRunError('task failed: [Timeout-Error] timed out after 2s')"
    with pytest.raises(TasksFailedError) as caught:
        await lab.run(task_timeout=2.0, max_attempts=1)
    assert str(caught.value) == expected


async def test_the_files_of_an_event_that_never_ran_are_not_kept(lab: Lab) -> None:
    lab.runtime.script = fails
    lab.put(*range(4))
    with pytest.raises(TasksFailedError):
        await lab.run(keep_all_task_files=True, prefetch=4)
    assert len(lab.runtime.ran) == 1
    kept = [path.name for path in (lab.directory / "ewms-pilot-data").iterdir() if path.is_dir()]
    assert sorted(kept) == sorted(["data-hub", lab.runtime.ran[0].name])


async def test_external_directories_are_mounted_read_only_at_the_same_path(lab: Lab, tmp_path: Path) -> None:
    (data := tmp_path / "da ta,=").mkdir()
    lab.put(1)
    await lab.run(external_directories=(data,))
    mounts = {mount.target: mount for mount in lab.runtime.ran[0].mounts}
    assert sorted(mounts) == sorted(["/ewms-pilot-data/data-hub", "/ewms-pilot-data/task-io", str(data)])
    assert (mounts[str(data)].source, mounts[str(data)].writable) == (data, False)
    assert mounts["/ewms-pilot-data/data-hub"].writable
