import json
import os
import sqlite3
from contextlib import closing
from pathlib import Path

import pytest

from tests.support.containers import NO_OUTPUTS
from tests.support.containment import Containment
from tests.support.engines import IMAGE, Engine
from tests.support.pilots import PilotCommand
from tests.support.users import NOBODY, UNPRIVILEGED, needs_root
from trio_pilot.errors import NodeError

AWKWARD = "a,b=c;d:e\"f'g\\h i\nj{k}$l`m`é☃"


def reasons(pilots: PilotCommand) -> list[str]:
    with closing(sqlite3.connect(pilots.directory / "trio-pilot-queues.sqlite")) as connection:
        rows = connection.execute("SELECT reason FROM message WHERE queue = 'events.dead-letters' ORDER BY reason")
        return [reason for (reason,) in rows]


def test_an_output_that_is_no_plain_file_is_refused(pilots: PilotCommand, containment: Containment) -> None:
    pilots.send("link", "fifo", "directory", "sparse", "plain")
    pilot = pilots.run(
        *("sh", "-c", NO_OUTPUTS, "{{INFILE}}", "{{OUTFILE}}"),
        **containment.settings,
        stop_listening_on_task_error=False,
        max_attempts=1,
    )
    assert pilot.wait() == 1, pilot.stderr
    assert pilots.receive() == ["plain"]
    plain = "the output file must be a plain file"
    assert reasons(pilots) == [
        "the output file has 10737418240 bytes, more than the 134217728 of --max-payload",
        f"{plain} that can be read: it is a symbolic link",
        f"{plain}, not a directory, FIFO or device",
        f"{plain}, not a directory, FIFO or device",
    ]
    assert not pilots.data.exists()


@pytest.mark.parametrize("containment", ["docker", "podman"], indirect=True)
def test_a_task_may_write_as_any_user_of_its_container(pilots: PilotCommand, containment: Containment) -> None:
    pilots.send(1, 2)
    write = ("sh", "-c", 'id -u > "$TMPDIR/file" && rm "$TMPDIR/file" && cat "$0" > "$1"', "{{INFILE}}", "{{OUTFILE}}")
    pilot = pilots.run(*write, **containment.settings, task_user=1234, task_env_json='{"TMPDIR": "/tmp"}')
    assert pilot.wait() == 0, pilot.stderr
    assert sorted(map(int, map(str, pilots.receive()))) == [1, 2]
    assert not pilots.data.exists()


@needs_root
def test_what_a_task_leaves_as_another_user_is_removed(pilots: PilotCommand, docker: Engine) -> None:
    pilots.variables["DOCKER_HOST"] = f"unix://{docker.socket}"
    docker.socket.chmod(0o666)
    pilots.send(1, 2)
    for path in (pilots.directory, *pilots.directory.iterdir()):
        os.chown(path, NOBODY, NOBODY)
    leave = 'for one in /tmp "${1%/*}"; do mkdir -p $one/a/b; echo > $one/a/b/c; done; cat "$0" > "$1"'
    task = ("sh", "-c", leave, "{{INFILE}}", "{{OUTFILE}}")
    pilot = pilots.start(*task, runtime="docker", task_image=IMAGE, prefix=UNPRIVILEGED)
    assert pilot.wait() == 0, pilot.stderr
    assert "cannot remove" not in pilot.stderr
    assert sorted(map(int, map(str, pilots.receive()))) == [1, 2]
    assert not pilots.data.exists()


def test_names_and_values_arrive_whatever_is_in_them(pilots: PilotCommand, containment: Containment) -> None:
    parent = pilots.directory / AWKWARD
    parent.mkdir()
    pilots.send("event")
    pilot = pilots.run(
        *("sh", "-c", 'cat "$1" > "$2"; printf "%s" "$VALUE" "$3" >> "$2"', "task", "{{INFILE}}", "{{OUTFILE}}", AWKWARD),
        **containment.settings,
        task_env_json=json.dumps({"VALUE": AWKWARD}),
        data_dir_parent_path_on_host=parent,
    )
    assert pilot.wait() == 0, pilot.stderr
    assert pilots.receive() == [f"event{AWKWARD}{AWKWARD}"]
    assert list(parent.iterdir()) == []


def test_an_external_directory_is_seen_and_cannot_be_written(pilots: PilotCommand, containment: Containment) -> None:
    external = pilots.directory / "external"
    external.mkdir()
    (external / "file").write_text("external")
    pilots.send("event")
    pilot = pilots.run(
        *("sh", "-c", 'cat "$0/file" > "$1"; ! touch "$0/mine"', str(external), "{{OUTFILE}}"),
        **containment.settings,
        external_directories=external,
    )
    is_contained = containment.runtime != "process"
    assert pilot.wait() == (0 if is_contained else 1), pilot.stderr
    assert pilots.receive() == (["external"] if is_contained else [])
    assert (external / "mine").exists() != is_contained


def test_a_check_starts_a_container_and_looks_for_the_command(pilots: PilotCommand, containment: Containment) -> None:
    good = pilots.run(
        "sh", "-c", "exit 3", command="check", **containment.settings, init_image=containment.image, init_args="true"
    )
    assert good.wait() == 0, good.stdout
    assert good.stdout.count(b"; its files can be read and written") == 2
    bad = pilots.run("no-such-tool", command="check", **containment.settings, task_env_json='{"PATH": "/usr/bin:/bin"}')
    assert bad.wait() == 4
    assert b"FAIL  command       no-such-tool is not there, as the container will see it" in bad.stdout
    assert not pilots.data.exists()
    assert containment.containers() == []


@pytest.mark.parametrize("containment", ["docker", "podman"], indirect=True)
def test_a_check_tries_the_user_of_the_task(pilots: PilotCommand, containment: Containment) -> None:
    external = pilots.directory / "external"
    external.mkdir(mode=0o700)
    settings = {**containment.settings, "external_directories": external, "task_user": 1234}
    pilot = pilots.run("true", command="check", **settings)
    assert pilot.wait() == 4
    assert f"cannot enter the external directory {external}: ".encode() in pilot.stdout


def test_arguments_of_the_old_pilot_work(pilots: PilotCommand, containment: Containment) -> None:
    pilots.send({"x": 'it\'s "quoted"'})
    pilot = pilots.run(
        **containment.settings,
        task_args="""sh -c "dd if={{INFILE}} of={{OUTFILE}} 2> /dev/null
            echo 'it''s \\"done\\"' >> \\"$1\\"" task {{OUTFILE}}""",
    )
    assert pilot.wait() == 0, pilot.stderr
    assert pilots.receive() == ['{"x": "it\'s \\"quoted\\""}its "done"\n']


def test_just_what_ewms_keeps_is_kept_when_asked_for(pilots: PilotCommand, containment: Containment, tmp_path: Path) -> None:
    (tmp_path / "external").mkdir()
    settings = containment.settings
    pilots.send("one", "two")
    script = (
        "sh",
        "-c",
        'echo to-stdout; echo to-stderr >&2; touch "$HOME/scratch"; cp "$0" "$1"',
        "{{INFILE}}",
        "{{OUTFILE}}",
    )
    init = {"init_image": containment.image, "init_args": "echo init", "external_directories": tmp_path / "external"}
    pilot = pilots.run(*script, **settings, **init, keep_all_task_files="true", infile_ext=".JSON")
    assert pilot.wait() == 0
    assert all(entry.is_dir() for entry in pilots.data.iterdir())
    (init_directory,) = pilots.data.glob("init-*")
    logs = {"outputs", "outputs/stdoutfile", "outputs/stderrfile"}
    assert {str(path.relative_to(init_directory)) for path in init_directory.rglob("*")} == logs
    tasks = [entry for entry in pilots.data.iterdir() if entry.name != "data-hub" and entry != init_directory]
    assert len(tasks) == 2
    for task in tasks:
        files = {"task-io", f"task-io/infile-{task.name}.json", f"task-io/outfile-{task.name}.out"}
        assert {str(path.relative_to(task)) for path in task.rglob("*")} == files | logs
        assert (task / "outputs/stdoutfile").read_text() == "to-stdout\n"
        assert (task / "outputs/stderrfile").read_text() == "to-stderr\n"
    assert (
        pilots.run(*("sh", "-c", "true"), **settings).wait() == 0
    )  # the next pilot is not disturbed by them, and leaves them
    assert all(task.is_dir() for task in tasks)


def test_a_data_hub_may_be_read_only_for_tasks(pilots: PilotCommand, containment: Containment) -> None:
    pilots.send("event")
    write = 'cat "$0/file" > "$1"; echo more >> "$0/file" || echo refused >> "$1"'
    pilot = pilots.run(
        *("sh", "-c", write, "{{DATA_HUB}}", "{{OUTFILE}}"),
        **containment.settings,
        init_image=containment.image,
        init_args="sh -c 'echo from-init > {{DATA_HUB}}/file'",
        data_hub="read-only",
    )
    if containment.runtime == "process":
        assert pilot.wait() == NodeError.exit_code, pilot.stderr
        assert "it cannot protect the data hub from tasks (--data-hub read-only)" in pilot.stderr
    else:
        assert pilot.wait() == 0, pilot.stderr
        assert pilots.receive() == ["from-init\nrefused\n"]
