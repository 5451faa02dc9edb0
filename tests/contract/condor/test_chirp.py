import logging
import re
import subprocess
import sys
import threading
import time
from collections.abc import Mapping
from pathlib import Path

import pytest

from tests.support import chirp_proxy
from tests.support.chirp_proxy import ChirpProxy, Fault
from trio_pilot.condor.chirp import CONFIG, Value, report
from trio_pilot.condor.reporter import error_text
from trio_pilot.errors import ContainerRunError, ReportError
from trio_pilot.files.error_summary import error_summary

NAME = "HTChirpEWMSPilotError"


def send(destination: str, changes: Mapping[str, Value], reported: dict[str, Value], seconds: float) -> None:
    report(destination, changes.items(), reported, seconds)


@pytest.fixture
def proxy(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> ChirpProxy:  # type: ignore[misc]
    with chirp_proxy.chirp_proxy(tmp_path) as proxy:
        monkeypatch.setenv(CONFIG, str(proxy.config))
        yield proxy


def test_a_job_attribute_is_a_classad_expression(proxy: ChirpProxy) -> None:
    reported: dict[str, Value] = {}
    changes: dict[str, Value] = {"HTChirpEWMSPilotStatus": "Tasking", "HTChirpEWMSPilotTasksTotal": 3, NAME: 'é "\\ \n'}
    send("JOB_ATTR", changes, reported, 5)
    assert proxy.lines == [
        'set_job_attr HTChirpEWMSPilotStatus "Tasking"',
        "set_job_attr HTChirpEWMSPilotTasksTotal 3",
        r'set_job_attr HTChirpEWMSPilotError "\303\251 \"\\ \n"',
    ]
    assert reported == changes


def test_a_line_of_the_event_log_is_the_name_and_a_quoted_value(proxy: ChirpProxy) -> None:
    send("JOB_EVENT_LOG", {"HTChirpEWMSPilotTasksTotal": 3, NAME: "é \t"}, {}, 5)
    assert proxy.lines == ['ulog HTChirpEWMSPilotTasksTotal: "3"', r'ulog HTChirpEWMSPilotError: "\303\251 \t"']


def test_a_delayed_attribute_has_a_name_that_begins_with_chirp(proxy: ChirpProxy) -> None:
    reported: dict[str, Value] = {}
    changes: dict[str, Value] = {"HTChirpEWMSPilotTasksTotal": 3, NAME: "é\r\n\tx\n"}
    send("JOB_ATTR_DELAYED", changes, reported, 5)
    assert proxy.lines == [
        "set_job_attr_delayed ChirpEWMSPilotTasksTotal 3",
        r'set_job_attr_delayed ChirpEWMSPilotError "\303\251| \tx| "',  # HTCondor drops one with a line break
    ]
    assert reported == changes


@pytest.mark.parametrize(("destination", "most"), [("JOB_ATTR", 2400), ("JOB_EVENT_LOG", 940), ("JOB_ATTR_DELAYED", 993)])
@pytest.mark.parametrize("char", ["x", " ", "\\", "é", "\x01", "\nx", "🙂"])
def test_a_text_of_any_kind_and_length_fits_into_a_line(proxy: ChirpProxy, destination: str, most: int, char: str) -> None:
    send(destination, {"HTChirpEWMSPilotErrorTraceback": char * 100_000, "HTChirpEWMSPilotTasksTotal": 1}, {}, 5)
    assert len(proxy.values("ErrorTraceback")[0]) <= most
    assert "..." in proxy.values("ErrorTraceback")[0]
    assert proxy.values("ErrorTraceback")[0].endswith('"')
    assert proxy.longest <= chirp_proxy.LONGEST_LINE
    assert len(proxy.lines) == 2


def test_the_end_of_a_traceback_is_reported(proxy: ChirpProxy) -> None:
    try:
        raise ReportError("x" * 500)
    except ReportError as error:
        send("JOB_EVENT_LOG", {NAME: error}, {}, 5)
    assert proxy.values("Error")[0].endswith(r"trio_pilot.errors.ReportError: " + "x" * 500 + '"')


def deep_traceback(tmp_path: Path) -> str:
    """Return the traceback of a Python program: a chain of exceptions, each raised below twenty functions."""
    program = tmp_path / "task_with_a_long_name.py"
    program.write_text(
        """
def calibrate_the_detector(depth):
    if depth:
        calibrate_the_detector_again(depth - 1)
    raise ValueError(f'no "calibration" of string {depth}, \u00e9')

def calibrate_the_detector_again(depth):
    calibrate_the_detector(depth)

try:
    calibrate_the_detector(10)
except ValueError as error:
    try:
        calibrate_the_detector(10)
    except ValueError as second:
        raise KeyError("the last") from second
""".replace("raise KeyError", "calibrate_the_detector(12); raise KeyError")
    )
    done = subprocess.run([sys.executable, program], capture_output=True, text=True, check=False)
    assert done.returncode == 1
    assert len(done.stderr) > 5000
    return done.stderr


@pytest.mark.parametrize("destination", ["JOB_ATTR", "JOB_EVENT_LOG"])
def test_a_long_traceback_arrives_with_its_exception_in_a_whole_quote(
    proxy: ChirpProxy, destination: str, tmp_path: Path
) -> None:
    stderr = tmp_path / "stderrfile"
    stderr.write_text(deep_traceback(tmp_path))
    with pytest.raises(ContainerRunError) as raised:
        raise ContainerRunError(f"task failed (exit code 1): {error_summary(stderr)}")
    error = raised.value
    changes: dict[str, Value] = {NAME: error_text(error), "HTChirpEWMSPilotErrorTraceback": error}
    send(destination, changes, {}, 5)
    for name in ("Error", "ErrorTraceback"):
        (quote,) = proxy.values(name)
        assert len(quote) <= (940 if destination == "JOB_EVENT_LOG" else 2400)
        assert re.fullmatch(r'"(?:[ !#-\[\]-~]|\\(?:[ntrabvf"\\]|[0-7]{3}))*"', quote)
        assert quote.endswith(r'\nValueError: no \"calibration\" of string 0, \303\251"')
        assert r"\n  ...\n  File \"" in quote
    assert proxy.values("Error")[0].startswith(
        '"ContainerRunError: task failed (exit code 1): Traceback (most recent call last):'
    )
    assert proxy.values("ErrorTraceback")[0].startswith('"Traceback (most recent call last):')


def test_a_delayed_attribute_that_is_refused_needs_no_io_proxy(proxy: ChirpProxy) -> None:
    proxy.refused = {"ChirpEWMSPilotError"}
    with pytest.raises(ReportError, match=r"refuses 1 attribute\(s\) \(is ENABLE_CHIRP_DELAYED true"):
        send("JOB_ATTR_DELAYED", {NAME: "x"}, {}, 5)


def test_an_attribute_that_is_refused_does_not_hold_back_others(proxy: ChirpProxy) -> None:
    proxy.refused = {NAME}
    reported: dict[str, Value] = {}
    with pytest.raises(ReportError, match=r"refuses 1 attribute\(s\) .*WantIO.*, such as HTChirpEWMSPilotError: "):
        send("JOB_ATTR", {NAME: "x", "HTChirpEWMSPilotTasksTotal": 1}, reported, 5)
    assert reported == {"HTChirpEWMSPilotTasksTotal": 1}


@pytest.mark.parametrize("fault", chirp_proxy.FAULTS)
def test_a_fault_of_the_proxy_is_an_error_in_time_that_costs_no_cpu(
    proxy: ChirpProxy, fault: Fault, caplog: pytest.LogCaptureFixture, capfd: pytest.CaptureFixture[str]
) -> None:
    proxy.fault = fault
    begun, cpu = time.monotonic(), time.thread_time()
    with caplog.at_level(logging.DEBUG), pytest.raises(ReportError, match="cannot report to HTCondor"):
        send("JOB_ATTR", {NAME: "x"}, {}, 0.5)
    assert time.monotonic() - begun < 5
    assert time.thread_time() - cpu < 0.3
    assert capfd.readouterr().out == ""


@pytest.mark.parametrize("config", ["", "127.0.0.1", "127.0.0.1 1 cookie", "127.0.0.1 many cookie", "\xff\xfe"])
def test_a_missing_proxy_is_an_error(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, config: str) -> None:
    (tmp_path / "config").write_text(config, encoding="latin-1")
    monkeypatch.setenv(CONFIG, str(tmp_path / "config"))
    with pytest.raises(ReportError):
        send("JOB_ATTR", {NAME: "x"}, {}, 5)


def test_a_missing_file_with_the_proxys_address_is_an_error(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.delenv(CONFIG, raising=False)
    with pytest.raises(ReportError, match=r"No such file or directory: '\.chirp\.config'"):
        send("JOB_ATTR", {NAME: "x"}, {}, 5)


@pytest.mark.usefixtures("proxy")
def test_no_connection_is_left_open() -> None:
    before = threading.active_count()
    for _ in range(10):
        send("JOB_ATTR", {NAME: "x"}, {}, 5)
    deadline = time.monotonic() + 5
    while threading.active_count() > before:  # those of the proxy end with their connections
        assert time.monotonic() < deadline
        time.sleep(0.01)
