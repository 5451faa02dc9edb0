import io

import pytest

from trio_pilot.runtimes.engine_logs import Demultiplexer, HeadAndTail

FRAMES = [(1, b"a"), (2, b"error\n"), (1, b""), (1, b"b" * 300), (3, b"of no stream"), (2, b"more")]
STREAM = b"".join(bytes([stream, 0, 0, 0]) + len(data).to_bytes(4, "big") + data for stream, data in FRAMES)


@pytest.mark.parametrize("size", [1, 2, 7, 8, 9, 100, len(STREAM)])
def test_streams_are_split_in_any_pieces(size: int) -> None:
    sinks = {1: io.BytesIO(), 2: io.BytesIO()}
    streams = Demultiplexer(sinks)
    for start in range(0, len(STREAM), size):
        streams.feed(STREAM[start : start + size])
    assert sinks[1].getvalue() == b"a" + b"b" * 300
    assert sinks[2].getvalue() == b"error\nmore"


@pytest.mark.parametrize("size", [1, 3, 10, 1000])
@pytest.mark.parametrize("length", [0, 9, 10, 11, 14, 15, 200])
def test_the_beginning_and_the_end_of_a_stream_are_kept(length: int, size: int) -> None:
    said = bytes(number % 251 for number in range(length))
    sink = io.BytesIO()
    ends = HeadAndTail(sink, most=10, most_tail=5)
    for start in range(0, length, size):
        ends.write(said[start : start + size])
    ends.close()
    assert sink.getvalue() == (said if length <= 15 else said[:10] + said[-5:])
