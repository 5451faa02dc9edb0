import fcntl
import io
import logging
import os
import select
import sys
import threading

import pytest

from trio_pilot import log
from trio_pilot.log import PatientHandler


def record(message: str) -> logging.LogRecord:
    return logging.LogRecord("trio_pilot", logging.INFO, __file__, 1, message, None, None)


def test_what_finds_no_room_in_a_pipe_is_written_in_order_with_what_comes_later() -> None:
    ours, theirs = os.pipe()
    with os.fdopen(ours) as reader, os.fdopen(theirs, "w") as writer:
        handler = PatientHandler(writer)
        for number in range(10_000):  # a pipe has room for 64 KiB, and nobody reads
            handler.emit(record(f"{number} {100 * 'x'}"))
        found = [int(reader.readline().split()[0]) for _ in range(300)]
        handler.emit(record("10000"))
        found += [int(reader.readline().split()[0]) for _ in range(300)]
    assert found == list(range(600))


def test_a_line_longer_than_the_room_in_a_pipe_is_written_as_far_as_that_goes_and_then_to_its_end() -> None:
    ours, theirs = os.pipe()
    with os.fdopen(ours, "rb") as reader, os.fdopen(theirs, "w") as writer:
        size = fcntl.fcntl(theirs, fcntl.F_GETPIPE_SZ)
        os.write(theirs, b"x" * (size - select.PIPE_BUF - 1) + b"\n")
        handler, text = PatientHandler(writer), 4000 * "é"
        emitting = threading.Thread(target=handler.emit, args=[record(text)], daemon=True)
        emitting.start()
        emitting.join(10)
        assert not emitting.is_alive()
        reader.readline()
        handler.emit(record("next"))
        assert reader.readline().decode() == f"{text}\n"
        assert reader.readline() == b"next\n"


def test_the_last_lines_are_not_waited_for_without_end(monkeypatch: pytest.MonkeyPatch) -> None:
    ours, theirs = os.pipe()
    monkeypatch.setattr(log, "LAST_WAIT", 0.01)
    with os.fdopen(ours), os.fdopen(theirs, "w") as writer:
        monkeypatch.setattr(sys, "stderr", writer)
        finishing = threading.Thread(target=log.finish, args=[["x" * 100_000, "the last"]], daemon=True)
        finishing.start()
        finishing.join(10)
        assert not finishing.is_alive()


def test_what_nobody_reads_is_kept_up_to_a_limit() -> None:
    ours, theirs = os.pipe()
    with os.fdopen(ours), os.fdopen(theirs, "w") as writer:
        handler = PatientHandler(writer)
        for number in range(12_000):
            handler.emit(record(f"{number} {100 * 'x'}"))
        assert len(handler.writer._lines) == 10_000


def test_a_stream_that_is_no_file_is_written_to() -> None:
    stream = io.StringIO()
    PatientHandler(stream).emit(record("said"))
    assert stream.getvalue() == "said\n"
