import base64
import json
import os
import re
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from tests.support.servers import RabbitServer

TIMEOUT = 60
SETTINGS = {"TASK_ARGS": "true", "QUEUE_INCOMING": "in", "QUEUE_OUTGOING": "out", "RUNTIME": "process"}

Check = Callable[..., tuple[int, list[list[str]]]]


@pytest.fixture
def check(tmp_path: Path) -> Check:
    def check(*, path: str = os.environ["PATH"], **settings: str) -> tuple[int, list[list[str]]]:
        variables = {f"EWMS_PILOT_{name}": text for name, text in {**SETTINGS, **settings}.items()}
        done = subprocess.run(
            [sys.executable, "-m", "trio_pilot", "check"],
            cwd=tmp_path,
            env={"PATH": path, **variables},
            capture_output=True,
            text=True,
            timeout=TIMEOUT,
            check=False,
        )
        assert done.stderr == ""
        lines = done.stdout.splitlines()
        assert all(re.match(r"(ok  |FAIL)  \S", line) for line in lines)
        assert all("→" in line for line in lines if line.startswith("FAIL"))
        return done.returncode, [[line[:4].strip(), *line[6:].split(None, 1)] for line in lines]

    return check


def facts(found: tuple[int, list[list[str]]], what: str) -> list[str]:
    return [f"{verdict} {said}" for verdict, name, said in found[1] if name == what]


def jwt(**claims: Any) -> str:
    return ".".join(base64.urlsafe_b64encode(json.dumps(part).encode()).decode().rstrip("=") for part in ({}, claims, {}))


def test_each_check_has_a_line_and_no_files_are_left(check: Check, tmp_path: Path) -> None:
    found = check()
    assert found[0] == 0
    names = [name for _, name, _ in found[1]]
    assert names == ["settings", "incoming", "outgoing", "slot", "runtime", "image", "container", "command", "data", "clock"]
    assert list(tmp_path.iterdir()) == []


def test_missing_settings_are_reported(check: Check) -> None:
    found = check(QUEUE_OUTGOING="")
    assert found[0] == 2
    assert facts(found, "settings")[0].startswith("FAIL EWMS_PILOT_QUEUE_OUTGOING must name a queue")
    assert facts(found, "incoming")[0].startswith("ok")


def test_a_wrong_setting_is_reported(check: Check) -> None:
    found = check(PREFETCH="two")
    assert found[0] == 2
    assert facts(found, "settings")[0].startswith("FAIL EWMS_PILOT_PREFETCH must be an integer ≥ 1, not 'two' →")


def test_queues_at_rabbitmq_are_found_without_taking_messages(check: Check, rabbitmq: RabbitServer) -> None:
    found = check(BROKER=f"amqp://{rabbitmq.address}", QUEUE_INCOMING="check-in;check-in-2", QUEUE_OUTGOING="check-out")
    assert found[0] == 0
    assert len(facts(found, "incoming")) == 2


def test_a_wrong_password_is_reported_and_not_shown(check: Check, rabbitmq: RabbitServer) -> None:
    found = check(QUEUE_INCOMING_BROKER_ADDRESS=f"amqp://guest:hunter2@{rabbitmq.address}")
    assert found[0] == 3
    assert "refuses the user and password, or token" in facts(found, "incoming")[0]
    assert "hunter2" not in str(found)


def test_a_broker_that_cannot_be_reached_is_reported(check: Check) -> None:
    found = check(QUEUE_OUTGOING_BROKER_ADDRESS="127.0.0.1:1")
    assert found[0] == 3
    assert facts(found, "outgoing")[0].startswith("FAIL RabbitMQ at 127.0.0.1 cannot be reached: Connection refused →")


def test_a_file_that_is_not_a_queue_file_is_reported(check: Check, tmp_path: Path) -> None:
    (tmp_path / "broken.sqlite").write_bytes(b"this is no database at all, however long one looks at it" * 100)
    assert check(BROKER="./broken.sqlite")[0] == 3
    assert facts(check(BROKER="/nonexistent/q.sqlite"), "incoming")[0].startswith("FAIL in: the queue file /nonexistent")


def test_runtimes_that_auto_passed_over_are_reported(check: Check) -> None:
    found = check(RUNTIME="auto", path="/nonexistent", TASK_ARGS="/bin/true")
    assert found[0] == 0
    assert facts(found, "runtime")[0].startswith(
        "ok process (auto: it works; bubblewrap does not: there is no bwrap on PATH"
    )


def test_a_runtime_that_does_not_work_is_reported_once(check: Check) -> None:
    found = check(RUNTIME="bubblewrap", path="/nonexistent")
    assert found[0] == 4
    assert [name for verdict, name, _ in found[1] if verdict == "FAIL"] == ["runtime"]
    assert "command" not in [name for _, name, _ in found[1]]


def test_a_missing_image_is_reported(check: Check, need: Callable[[str, str], None]) -> None:
    need("bwrap", "bubblewrap")
    found = check(RUNTIME="bubblewrap", TASK_IMAGE="/nonexistent")
    assert found[0] == 4
    assert facts(found, "image")[0].startswith("FAIL the image /nonexistent must be an unpacked directory")


@pytest.mark.parametrize("command", ["nonexistent-command", "/nonexistent", "./relative"])
def test_a_missing_command_is_reported(check: Check, command: str) -> None:
    found = check(TASK_ARGS=command)
    assert found[0] == 4
    assert facts(found, "command")[0].startswith(f"FAIL {command} is not there, as the container will see it →")


def test_a_container_is_started_as_for_a_task(check: Check, tmp_path: Path) -> None:
    found = check(RUNTIME="process", TASK_ENV_JSON='{"PATH": "/nowhere"}', EXTERNAL_DIRECTORIES=str(tmp_path))
    assert re.match(r"ok started and ended in \d+\.\d s; its files can be read and written", facts(found, "container")[0])


def test_what_would_fail_in_a_task_fails_in_the_check(
    check: Check, tmp_path: Path, image: Path, need: Callable[[str, str], None]
) -> None:
    need("bwrap", "bubblewrap")
    closed = tmp_path / "closed"
    closed.mkdir(mode=0o000)
    found = check(RUNTIME="bubblewrap", TASK_IMAGE=str(image), EXTERNAL_DIRECTORIES=str(closed))
    assert found[0] == 4
    start = f"FAIL a container like that of a task cannot enter the external directory {closed}: "
    assert facts(found, "container")[0].startswith(start)
    assert "EWMS_PILOT_EXTERNAL_DIRECTORIES" in facts(found, "container")[0].partition("→")[2]


def test_the_init_container_is_tried_too(check: Check, image: Path, need: Callable[[str, str], None]) -> None:
    need("bwrap", "bubblewrap")
    found = check(RUNTIME="bubblewrap", TASK_IMAGE=str(image), INIT_IMAGE=str(image), INIT_ARGS="no-such-tool")
    assert found[0] == 4
    verdicts = [(verdict, line) for verdict, name, line in found[1] if name == "init"]
    assert [(verdict, line.split()[0]) for verdict, line in verdicts] == [
        ("ok", "image"),
        ("ok", "container"),
        ("FAIL", "command"),
    ]


def test_a_command_is_looked_for_as_the_container_sees_it(
    check: Check, tmp_path: Path, need: Callable[[str, str], None]
) -> None:
    need("bwrap", "bubblewrap")
    (tmp_path / "image/usr/bin").mkdir(parents=True)
    (tmp_path / "image/bin").symlink_to("usr/bin")
    (tmp_path / "image/usr/bin/tool").write_text("#!/bin/sh\n")
    (tmp_path / "image/usr/bin/tool").chmod(0o755)
    image = str(tmp_path / "image")
    assert facts(check(RUNTIME="bubblewrap", TASK_IMAGE=image, TASK_ARGS="tool"), "command") == ["ok /usr/bin/tool"]
    assert check(RUNTIME="bubblewrap", TASK_IMAGE=image, TASK_ARGS="true")[0] == 4
    assert check(RUNTIME="bubblewrap", TASK_ARGS=f"/{'x' * 300}")[0] == 4  # too long a name for a file
    hidden = f"{image}/usr/bin/tool"  # below /tmp, of which a container has its own
    assert check(RUNTIME="bubblewrap", TASK_ARGS=hidden)[0] == 4
    assert check(RUNTIME="bubblewrap", TASK_ARGS=hidden, EXTERNAL_DIRECTORIES=image)[0] == 0


def test_a_data_directory_that_cannot_be_written_is_reported(check: Check) -> None:
    found = check(DATA_DIR_PARENT_PATH_ON_HOST="/proc")
    assert found[0] in (2, 4)
    assert facts(found, "data")[0].startswith("FAIL")


@pytest.mark.parametrize(
    ("exp", "verdict"),
    [
        (3600 * 24, "ok in: expires in 24.0 h"),
        (600, "ok in: expires in 10 min, soon"),
        (-7200, "FAIL the token of in has expired"),
    ],
)
def test_the_expiry_of_a_token_is_reported(check: Check, exp: int, verdict: str) -> None:
    token = jwt(exp=time.time() + exp + 1)
    found = check(QUEUE_INCOMING_AUTH_TOKEN=token)
    assert facts(found, "token")[0].startswith(verdict)
    assert found[0] == (3 if exp < 0 else 0)
    assert token not in str(found)


def test_a_token_that_is_not_yet_valid_is_reported(check: Check) -> None:
    found = check(QUEUE_INCOMING_AUTH_TOKEN=jwt(nbf=time.time() + 7350))
    assert facts(found, "token")[0].startswith("FAIL the token of in is not valid before 2.0 h from now")


@pytest.mark.parametrize("token", ["a.b.c", "plain", jwt(exp="never"), "e30.W10.e30"])
def test_a_token_that_is_not_a_jwt_is_not_a_failure(check: Check, token: str) -> None:
    assert check(QUEUE_INCOMING_AUTH_TOKEN=token)[0] == 0


@pytest.mark.parametrize("seconds", ["", "3600", "60"])
def test_a_consumer_timeout_that_is_too_short_is_warned_of(check: Check, rabbitmq: RabbitServer, seconds: str) -> None:
    found = check(BROKER=f"amqp://{rabbitmq.address}", QUEUE_INCOMING="check-in", TASK_TIMEOUT=seconds)
    (incoming,) = facts(found, "incoming")
    assert incoming.startswith("ok")
    assert ("consumer_timeout" in incoming) == (not rabbitmq.version.startswith("4.3") and seconds != "60")
