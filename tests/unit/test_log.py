import fcntl
import io
import logging
import os
import re
import select
import subprocess
import sys
import threading
import time
from datetime import UTC, datetime

import pytest

from trio_pilot import log
from trio_pilot.log import MOST_KEPT, NonBlockingHandler, UtcFormatter


def record(message: str) -> logging.LogRecord:
    return logging.LogRecord("trio_pilot", logging.INFO, __file__, 1, message, None, None)


def test_lines_that_do_not_fit_in_a_pipe_are_written_later_in_order() -> None:
    read_end, write_end = os.pipe()
    with os.fdopen(read_end) as reader, os.fdopen(write_end, "w") as writer:
        handler = NonBlockingHandler(writer)
        for number in range(10_000):  # a pipe has room for 64 KiB, and is not read
            handler.emit(record(f"{number} {100 * 'x'}"))
        found = [int(reader.readline().split()[0]) for _ in range(300)]
        handler.emit(record("10000"))
        found += [int(reader.readline().split()[0]) for _ in range(300)]
    assert found == list(range(600))


def test_a_line_that_fits_in_a_pipe_in_part_is_completed_later() -> None:
    read_end, write_end = os.pipe()
    with os.fdopen(read_end, "rb") as reader, os.fdopen(write_end, "w") as writer:
        size = fcntl.fcntl(write_end, fcntl.F_GETPIPE_SZ)
        os.write(write_end, b"x" * (size - select.PIPE_BUF - 1) + b"\n")
        handler, text = NonBlockingHandler(writer), 4000 * "é"
        emitting = threading.Thread(target=handler.emit, args=[record(text)], daemon=True)
        emitting.start()
        emitting.join(10)
        assert not emitting.is_alive()
        reader.readline()
        handler.emit(record("next"))
        assert reader.readline().decode() == f"{text}\n"
        assert reader.readline() == b"next\n"


def test_finish_does_not_wait_without_end_for_a_reader(monkeypatch: pytest.MonkeyPatch) -> None:
    read_end, write_end = os.pipe()
    with os.fdopen(read_end), os.fdopen(write_end, "w") as writer:
        monkeypatch.setattr(sys, "stderr", writer)
        finishing = threading.Thread(target=log.finish, args=[["x" * 100_000, "the last"], 0.01], daemon=True)
        finishing.start()
        finishing.join(10)
        assert not finishing.is_alive()


def test_lines_that_are_not_read_are_kept_up_to_a_limit() -> None:
    read_end, write_end = os.pipe()
    with os.fdopen(write_end, "w") as writer:
        handler = NonBlockingHandler(writer)
        for number in range(12_000):
            handler.emit(record(f"{number} {100 * 'x'}"))
        found: list[int] = []
        with os.fdopen(read_end) as reader:
            reading = threading.Thread(target=lambda: found.extend(int(line.split()[0]) for line in reader))
            reading.start()
            handler.writer.flush(10)
            writer.close()
            reading.join(10)
    assert MOST_KEPT < len(found) < 12_000
    assert found[-MOST_KEPT:] == list(range(12_000 - MOST_KEPT, 12_000))


def test_a_stream_without_a_file_is_written_to() -> None:
    stream = io.StringIO()
    NonBlockingHandler(stream).emit(record("a line"))
    assert stream.getvalue() == "a line\n"


def test_times_are_utc_with_their_zone(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("TZ", "Asia/Tokyo")
    time.tzset()
    try:
        moment = record("a line")
        moment.created, moment.msecs = 1801420205.123, 123.0
        assert UtcFormatter(log.FORMAT).format(moment) == "2027-01-31T18:30:05.123Z INFO a line"
    finally:
        monkeypatch.undo()
        time.tzset()


def test_the_programs_log_has_times_in_utc() -> None:
    program = "from trio_pilot import log; log.set_up('INFO', 'INFO'); log.LOGGER.info('a line')"
    env = {**os.environ, "TZ": "Asia/Tokyo"}
    done = subprocess.run([sys.executable, "-c", program], env=env, capture_output=True, text=True, check=True)
    assert re.fullmatch(r"\d{4}-\d\d-\d\dT\d\d:\d\d:\d\d\.\d{3}Z INFO a line\n", done.stderr)
    told = datetime.fromisoformat(done.stderr.split()[0])
    assert abs((datetime.now(UTC) - told).total_seconds()) < 60


def test_what_a_terminal_obeys_is_escaped_in_every_line() -> None:
    record = logging.LogRecord("trio_pilot", logging.WARNING, "", 0, "event %s: é", ("a\nb\x1b[2J\ud800\0",), None)
    line = UtcFormatter(log.FORMAT).format(record)
    assert line.endswith(r"WARNING event a\nb\x1b[2J\ud800\x00: é")
