import io
import logging
import os

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


def test_what_nobody_reads_is_kept_up_to_a_limit() -> None:
    ours, theirs = os.pipe()
    with os.fdopen(ours), os.fdopen(theirs, "w") as writer:
        handler = PatientHandler(writer)
        for number in range(12_000):
            handler.emit(record(f"{number} {100 * 'x'}"))
        assert len(handler._kept) == 10_000


def test_a_stream_that_is_no_file_is_written_to() -> None:
    stream = io.StringIO()
    PatientHandler(stream).emit(record("said"))
    assert stream.getvalue() == "said\n"
