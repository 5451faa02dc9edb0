"""What users of EWMS's own pilot see of theirs: tasks in Python, kept files, error texts and exit codes, on each runtime."""

import base64
import json
import pickle
import shlex
from collections.abc import Sequence
from dataclasses import replace
from datetime import date, timedelta
from pathlib import Path
from typing import Any

import pytest

from tests.support.containment import CONTAINMENTS, Containment
from tests.support.engines import Engine
from tests.support.pilot_images import BASES, import_base
from tests.support.pilots import PilotCommand, RunningPilot
from tests.support.servers import UnavailableError, debian
from tests.support.services import cannot

IMAGE = "python:local"
EVENTS = [f"item{number}" for number in range(6)]
DOUBLED = [f"{event}{event}\n" for event in EVENTS]
DOUBLE = "output = open('{{INFILE}}').read().strip() * 2; print(output, file=open('{{OUTFILE}}', 'w'))"
FAIL = "raise ValueError('gotta fail!')"
REASON = (
    '(exit code 1): Traceback (most recent call last):\\n  File "<string>", line {line}, in <module>\\n'
    "    raise ValueError(\\'gotta fail!\\')\\nValueError: gotta fail!"
)
INIT = "import os; print('hello', file=open(os.environ['EWMS_TASK_DATA_HUB_DIR'] + '/initoutput', 'w'))"
LOGS = {"outputs", "outputs/stdoutfile", "outputs/stderrfile"}

pytestmark = pytest.mark.soak


@pytest.fixture(scope="module")
def root() -> Path:
    """The root of a Debian with Python."""
    try:
        return debian(*BASES["bubblewrap"])
    except UnavailableError as error:
        cannot(str(error))


@pytest.fixture(params=["bubblewrap", "apptainer", "docker"])
def python(request: pytest.FixtureRequest, root: Path) -> Containment:
    containment = CONTAINMENTS[request.param](request)
    if request.param != "docker":
        return replace(containment, image=str(root))
    docker: Engine = request.getfixturevalue("docker")
    if not docker.has_image(IMAGE):
        import_base("bubblewrap", docker, IMAGE)
    return replace(containment, image=IMAGE)


class OldPilotsUser:
    """A user who runs tasks in Python, and looks at the files that are kept."""

    def __init__(self, pilots: PilotCommand, containment: Containment) -> None:
        self.pilots = pilots
        self.settings = {**containment.settings, "keep_all_task_files": "true", "timeout_queue_incoming": 3}
        pilots.variables.update(containment.variables)

    def run(self, code: str, events: Sequence[Any] = EVENTS, init: str = "", **settings: Any) -> RunningPilot:
        """Run a pilot for these events; the code is that of the task."""
        self.pilots.send(*events)
        given = {**self.settings, **settings}
        if init:
            given |= {"init_image": given["task_image"], "init_args": f"python3 -c {shlex.quote(init)}"}
        return self.pilots.run(task_args=f"python3 -c {shlex.quote(code)}", **given)

    def assert_kept(self, tasks: int, *, ext: tuple[str, str | None] = ("in", "out"), hub: Sequence[str] = ()) -> None:
        """Check that these are all the files that are kept: of so many tasks, of the data hub, and of the init container."""
        entries = {entry.name: entry for entry in self.pilots.data.iterdir()}
        assert all(entry.is_dir() for entry in entries.values())
        assert files_in(entries.pop("data-hub")) == set(hub)
        for name in [name for name in entries if name.startswith("init-")]:
            assert files_in(entries.pop(name)) == LOGS
        assert len(entries) == tasks
        for name, entry in entries.items():
            files = {f"task-io/{way}file-{name}.{end}" for way, end in zip(("in", "out"), ext, strict=True) if end}
            assert files_in(entry) == {"task-io", *files} | LOGS


def files_in(directory: Path) -> set[str]:
    return {str(path.relative_to(directory)) for path in directory.rglob("*")}


@pytest.fixture
def user(pilots: PilotCommand, python: Containment) -> OldPilotsUser:
    return OldPilotsUser(pilots, python)


@pytest.mark.parametrize("ext", ["", "txt"])
def test_text_comes_back_as_text(user: OldPilotsUser, ext: str) -> None:
    given = {"infile_ext": f".{ext}", "outfile_ext": f".{ext}"} if ext else {}
    pilot = user.run(DOUBLE, **given)
    assert pilot.wait() == 0, pilot.stderr
    assert sorted(map(str, user.pilots.receive())) == DOUBLED
    user.assert_kept(6, ext=(ext, ext) if ext else ("in", "out"))


@pytest.mark.parametrize("serialized", [False, True])
def test_objects_come_back_as_objects(user: OldPilotsUser, serialized: bool) -> None:
    objects: list[Any] = [{"attr-0": event} for event in EVENTS]
    code = (
        "import json; v = json.load(open('{{INFILE}}'))['attr-0'];"
        "json.dump({'attr-a': v, 'attr-b': v + v}, open('{{OUTFILE}}', 'w'))"
    )
    events = [json.dumps(one) for one in objects] if serialized else objects
    pilot = user.run(code, events, infile_ext=".json", outfile_ext=".json")
    assert pilot.wait() == 0, pilot.stderr
    results = sorted(user.pilots.receive(), key=str)
    assert results == [{"attr-a": event, "attr-b": event * 2} for event in EVENTS]
    user.assert_kept(6, ext=("json", "json"))


def test_pickles_come_back_as_they_are(user: OldPilotsUser) -> None:
    days = [date(1995, 1, 1 + number) for number in range(6)]
    code = """
import base64, datetime, pickle
given = pickle.loads(base64.b64decode(open('{{INFILE}}').read().strip()))
result = base64.b64encode(pickle.dumps(given + datetime.timedelta(days=1))).decode()
print(result, file=open('{{OUTFILE}}', 'w'), end='')
"""
    events = [base64.b64encode(pickle.dumps(day)).decode() for day in days]
    pilot = user.run(code, events, infile_ext=".pkl.b64", outfile_ext=".pkl.b64")
    assert pilot.wait() == 0, pilot.stderr
    results = sorted(pickle.loads(base64.b64decode(str(result))) for result in user.pilots.receive())
    assert results == [day + timedelta(days=1) for day in days]
    user.assert_kept(6, ext=("pkl.b64", "pkl.b64"))


@pytest.mark.parametrize("quarantine", [0, 8])
def test_an_exception_ends_the_pilot_with_its_traceback(user: OldPilotsUser, quarantine: int) -> None:
    pilot = user.run(FAIL, quarantine_time=quarantine)
    assert pilot.wait() == 1
    assert f"1 TASK(S) FAILED: ContainerRunError('task failed {REASON.format(line=1)}')" in pilot.last_line
    assert ("holding the slot for 8 s after an error" in pilot.stderr) == bool(quarantine)
    assert user.pilots.receive() == []
    user.assert_kept(1, ext=("in", None))


def test_a_timeout_ends_the_pilot(user: OldPilotsUser) -> None:
    pilot = user.run("import time; time.sleep(300)", task_timeout=2)
    assert pilot.wait() == 1
    assert "1 TASK(S) FAILED: ContainerRunError('task failed: [Timeout-Error] timed out after 2s')" in pilot.last_line
    user.assert_kept(1, ext=("in", None))


@pytest.mark.parametrize("prefetch", [1, 2, 3, 4, 5, 77])
def test_four_at_once_do_all(user: OldPilotsUser, prefetch: int) -> None:
    pilot = user.run(f"import time; time.sleep(0.5); {DOUBLE}", prefetch=prefetch, max_concurrent_tasks=4)
    assert pilot.wait() == 0, pilot.stderr
    assert sorted(map(str, user.pilots.receive())) == DOUBLED
    user.assert_kept(6)


@pytest.mark.parametrize("prefetch", [1, 2, 3, 4, 5, 77])
def test_four_at_once_fail_with_four_texts(user: OldPilotsUser, prefetch: int) -> None:
    code = f"import time\n{DOUBLE}\ntime.sleep(5)\n{FAIL}"
    pilot = user.run(code, EVENTS * 2, prefetch=prefetch, max_concurrent_tasks=4)
    assert pilot.wait() == 1
    text = f"ContainerRunError('task failed {REASON.format(line=4)}')"
    assert f"4 TASK(S) FAILED: {', '.join([text] * 4)}" in pilot.last_line
    assert user.pilots.receive() == []
    user.assert_kept(4)


def test_the_init_container_writes_to_the_data_hub(user: OldPilotsUser) -> None:
    pilot = user.run(DOUBLE, init=INIT)
    assert pilot.wait() == 0, pilot.stderr
    assert (user.pilots.data / "data-hub/initoutput").read_text() == "hello\n"
    assert sorted(map(str, user.pilots.receive())) == DOUBLED
    user.assert_kept(6, hub=["initoutput"])


def test_an_init_container_that_takes_too_long_ends_the_pilot(user: OldPilotsUser) -> None:
    pilot = user.run(DOUBLE, init=f"{INIT}\nwhile True: pass", init_timeout=5)
    assert pilot.wait() == 1
    assert "init-container failed: [Timeout-Error] timed out after 5s" in pilot.last_line
    assert len(user.pilots.queue()) == len(EVENTS)


def test_an_init_container_that_fails_ends_the_pilot(user: OldPilotsUser) -> None:
    pilot = user.run(DOUBLE, init=f"{INIT}\n{FAIL}")
    assert pilot.wait() == 1
    assert "init-container failed (exit code 1): Traceback (most recent call last):" in pilot.stderr
    assert pilot.last_line == "ValueError: gotta fail!"
    assert (user.pilots.data / "data-hub/initoutput").read_text() == "hello\n"
    assert len(user.pilots.queue()) == len(EVENTS)


@pytest.mark.parametrize("hub", ["os.environ['EWMS_TASK_DATA_HUB_DIR']", "'{{DATA_HUB}}'"])
def test_tasks_read_the_data_hub(user: OldPilotsUser, hub: str) -> None:
    init = f"import os; print('blue', file=open({hub} + '/initoutput', 'w'))"
    code = (
        f"import os; text = open('{{{{INFILE}}}}').read() + open({hub} + '/initoutput').read();"
        "print(text, file=open('{{OUTFILE}}', 'w'), end='')"
    )
    pilot = user.run(code, init=init)
    assert pilot.wait() == 0, pilot.stderr
    assert sorted(map(str, user.pilots.receive())) == [f"{event}blue\n" for event in EVENTS]
    user.assert_kept(6, hub=["initoutput"])


def test_external_directories_are_seen(user: OldPilotsUser) -> None:
    directories = [user.pilots.directory / name for name in ("dummy-1", "dummy-2")]
    for directory, text in zip(directories, ("alpha", "beta"), strict=True):
        (directory / "below").mkdir(parents=True)
        (directory / "below/file.txt").write_text(text)
    read = " + ".join(f"open('{directory}/below/file.txt').read()" for directory in directories)
    code = f"text = open('{{{{INFILE}}}}').read() + {read}; print(text, file=open('{{{{OUTFILE}}}}', 'w'))"
    external = ",".join(map(str, directories))
    pilot = user.run(code, init=f"assert {read} == 'alphabeta'", external_directories=external)
    assert pilot.wait() == 0, pilot.stderr
    assert sorted(map(str, user.pilots.receive())) == [f"{event}alphabeta\n" for event in EVENTS]
    user.assert_kept(6)


def test_a_task_without_an_output_is_done(user: OldPilotsUser) -> None:
    pilot = user.run("import time; time.sleep(0.1)")
    assert pilot.wait() == 0, pilot.stderr
    assert user.pilots.receive() == []
    assert user.pilots.queue() == []
    user.assert_kept(6, ext=("in", None))


def test_paths_are_in_variables_too(user: OldPilotsUser) -> None:
    code = DOUBLE.replace("'{{INFILE}}'", "os.environ['EWMS_TASK_INFILE']")
    code = "import os; " + code.replace("'{{OUTFILE}}'", "os.environ['EWMS_TASK_OUTFILE']")
    pilot = user.run(code)
    assert pilot.wait() == 0, pilot.stderr
    assert sorted(map(str, user.pilots.receive())) == DOUBLED
    user.assert_kept(6)


def test_variables_are_those_of_each_container(user: OldPilotsUser) -> None:
    env = {
        "init_env_json": json.dumps({"INIT_FOO": "BOT", "INIT_BAZ": 99}),
        "task_env_json": json.dumps({"FOO": "BAR", "BAZ": 100}),
    }
    init = f"{INIT}; assert (os.environ['INIT_FOO'], os.environ['INIT_BAZ'], os.getenv('FOO')) == ('BOT', '99', None)"
    check = "import os; assert (os.environ['FOO'], os.environ['BAZ'], os.getenv('INIT_FOO')) == ('BAR', '100', None)"
    pilot = user.run(f"{check}; {DOUBLE}", init=init, **env)
    assert pilot.wait() == 0, pilot.stderr
    assert sorted(map(str, user.pilots.receive())) == DOUBLED
    user.assert_kept(6, hub=["initoutput"])
