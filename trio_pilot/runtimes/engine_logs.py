"""What a container has said, as an engine tells it: both streams in one, in frames."""

from collections.abc import Mapping
from typing import Protocol

HEADER = 8  # bytes before each frame: the stream, three that are none, and the length of the frame, big-endian

# Bytes of a stream that are kept: the first, and the last. Error texts come from the end.
MOST = 64 * 2**20
MOST_TAIL = 2**20


class LogWriter(Protocol):
    """Takes bytes."""

    def write(self, data: bytes, /) -> object:
        """Take some."""


class HeadAndTail:
    """The beginning and the end of a stream, without what is between if it is too long.

    What the sink does not take is told at the end: a stream is read to its end, whatever becomes of it.
    """

    def __init__(self, sink: LogWriter, most: int = MOST, most_tail: int = MOST_TAIL) -> None:
        self._sink = sink
        self._room = most
        self._most_tail = most_tail
        self._tail = bytearray()
        self._failure: OSError | None = None

    def write(self, data: bytes) -> None:
        """Take some of the stream."""
        head, rest = data[: self._room], data[self._room :]
        self._room -= len(head)
        if head:
            self._put(head)
        self._tail += rest
        if len(self._tail) > 2 * self._most_tail:
            self._cut()

    def close(self) -> None:
        """Take note that this is the end. Raises OSError if the sink did not take all."""
        self._cut()
        if self._tail:
            self._put(bytes(self._tail))
        if self._failure:
            raise self._failure

    def _put(self, data: bytes) -> None:
        try:
            self._sink.write(data)
        except OSError as error:
            self._failure = error

    def _cut(self) -> None:
        del self._tail[: max(0, len(self._tail) - self._most_tail)]


class Demultiplexer:
    """Takes the stream apart, in whatever pieces it comes."""

    def __init__(self, sinks: Mapping[int, LogWriter]) -> None:
        self._sinks = sinks
        self._header = b""
        self._sink: LogWriter | None = None
        self._left = 0  # bytes of the frame that are to come

    def feed(self, data: bytes) -> None:
        """Take a piece."""
        position = 0
        while position < len(data):
            if self._left:
                piece = data[position : position + self._left]
                self._left -= len(piece)
                if self._sink:
                    self._sink.write(piece)
            else:
                piece = data[position : position + HEADER - len(self._header)]
                self._read_header(piece)
            position += len(piece)

    def _read_header(self, piece: bytes) -> None:
        self._header += piece
        if len(self._header) == HEADER:
            self._sink = self._sinks.get(self._header[0])
            self._left = int.from_bytes(self._header[4:], "big")
            self._header = b""
