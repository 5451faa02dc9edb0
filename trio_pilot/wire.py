"""The wire formats of a message body: that of EWMS, and raw bytes.

An EWMS body is `zstd(JSON {"headers": {...}, "data": any JSON value})` in UTF-8, as oms-mqclient writes it. JSON has
no bytes: they are sent as base64 text, marked by `"encoding": "base64"` in the headers.

A body may come from anyone. Its size is bounded before it is decompressed, and the number of its values and their depth
before they are made: a Python value takes some 60 bytes of memory, and `[],` three bytes of text.
"""

import base64
import json
import math
import re
import threading
from collections.abc import Mapping
from dataclasses import dataclass, field
from itertools import accumulate
from typing import Any, Protocol

import zstandard

from trio_pilot.errors import DecodeError, EncodeError, map_exceptions

ZSTD_LEVEL = 3  # that of oms-mqclient: equal messages give equal bytes

# RFC 8878, 3.1.1.1.2, recommends that decoders support a window of 8 MB; with more, a sender could exhaust the memory.
ZSTD_MAX_WINDOW = 8 * 2**20
ZSTD_MAGIC = b"\x28\xb5\x2f\xfd"  # RFC 8878, 3.1.1: how each frame begins that is not one to skip

BYTES_OF_VALUE = 16  # of --max-payload for each JSON value; all of them together take some four times --max-payload
LEAST_VALUES = 100_000  # that an event may have whatever --max-payload is
MOST_DEPTH = 400  # of arrays and objects within each other; json itself fails between 900 and 1000, reading or writing
USUAL_DEPTH = 8


@dataclass(frozen=True, slots=True)
class Message:
    """An event or an output, decoded.

    `data` is str, bytes or any other JSON value, including NaN and the infinities.
    """

    data: Any
    headers: Mapping[str, Any] = field(default_factory=dict)


class Wire(Protocol):
    """A format of message bodies. Encoding and decoding a large body may take long: do it in a thread then."""

    def size(self, body: bytes) -> float:
        """Return how many bytes a body has when it is decompressed; infinity if that is unknown."""

    def encode(self, message: Message) -> bytes:
        """Encode a body, or raise EncodeError."""

    def decode(self, body: bytes, max_size: int) -> Message:
        """Decode a body of at most `max_size` bytes when decompressed, or raise DecodeError."""


class EwmsWire:
    """The body format of EWMS."""

    def size(self, body: bytes) -> float:
        """Return the content size in the zstd frame; infinity if there may be more frames than one."""
        if body.find(ZSTD_MAGIC, 1) > 0:
            return math.inf
        try:
            size = zstandard.frame_content_size(body)
        except zstandard.ZstdError:
            return 0
        return size if size >= 0 else math.inf

    def encode(self, message: Message) -> bytes:
        """Encode a body, with the zstd content size, byte for byte as oms-mqclient does."""
        data, headers = message.data, dict(message.headers)
        headers.pop("encoding", None)
        if isinstance(data, bytes):
            data, headers["encoding"] = base64.b64encode(data).decode(), "base64"
        text = _json({"headers": headers, "data": data})
        return _ZSTD.compressor.compress(text.encode())

    def decode(self, body: bytes, max_size: int) -> Message:
        """Decode a body; keys other than `data` and `headers` are ignored, headers may be missing."""
        document = _parse(_decompress(body, max_size), max(LEAST_VALUES, max_size // BYTES_OF_VALUE))
        if not isinstance(document, dict) or "data" not in document:
            raise DecodeError("the message body is JSON, but not an object with a 'data' key")
        headers = document.get("headers") or {}
        if not isinstance(headers, dict):
            raise DecodeError(f"the headers of the message body are not an object, but {type(headers).__name__}")
        data = document["data"]
        return Message(_from_base64(data) if headers.get("encoding") == "base64" else data, headers)


class RawWire:
    """Bodies without a format, for producers and consumers that do not use the one of EWMS."""

    def size(self, body: bytes) -> float:
        """Return the size of the body itself."""
        return len(body)

    def encode(self, message: Message) -> bytes:
        """Encode bytes as they are, text as UTF-8, anything else as JSON."""
        match message.data:
            case bytes() as data:
                return data
            case str() as text:
                with map_exceptions({UnicodeEncodeError: EncodeError}, "a raw message must be UTF-8"):
                    return text.encode()
            case other:
                return _json(other).encode()

    def decode(self, body: bytes, max_size: int) -> Message:
        """Decode a body as bytes."""
        if len(body) > max_size:
            raise DecodeError(f"the message body has {len(body)} bytes, more than the {max_size} of --max-payload")
        return Message(body)


WIRES: Mapping[str, Wire] = {"ewms": EwmsWire(), "raw": RawWire()}


def _json(value: Any) -> str:
    with map_exceptions({RecursionError: EncodeError, ValueError: EncodeError}, "it cannot be written as JSON"):
        return json.dumps(value)


class _Zstd(threading.local):
    """The contexts of zstd: one of each for each thread, as zstd demands. They cost more to make than to use."""

    def __init__(self) -> None:
        self.compressor = zstandard.ZstdCompressor(level=ZSTD_LEVEL)
        self.decompressor = zstandard.ZstdDecompressor(max_window_size=ZSTD_MAX_WINDOW)


_ZSTD = _Zstd()


def _decompress(body: bytes, max_size: int) -> bytes:
    try:
        has_frames = body.find(ZSTD_MAGIC, 1) > 0
        text = (_decompress_frames if has_frames else _decompress_frame)(body, max_size)
    except zstandard.ZstdError as error:
        raise DecodeError(f"the message body is not zstd: {error}") from error
    if text is None:
        raise DecodeError(f"the message body unpacks to more than the {max_size} bytes of --max-payload")
    return text


def _decompress_frame(body: bytes, max_size: int) -> bytes | None:
    """Decompress a body of one frame; return None if there is more than `max_size`."""
    size = zstandard.frame_content_size(body)
    decompressor = _ZSTD.decompressor
    if size < 0:  # the frame has no size: count first
        size = _count(decompressor, body, max_size)
    return decompressor.decompress(body, max_output_size=max(size, 1)) if size <= max_size else None


def _decompress_frames(body: bytes, max_size: int) -> bytes | None:
    """Decompress a body of several frames, or of one by which it looks so; return None if there is more than `max_size`."""
    with _ZSTD.decompressor.stream_reader(body, read_across_frames=True) as reader:
        text: bytes = reader.read(max_size + 1)
    return text if len(text) <= max_size else None


def _count(decompressor: zstandard.ZstdDecompressor, body: bytes, limit: int) -> int:
    total = 0
    for chunk in decompressor.read_to_iter(body):
        total += len(chunk)
        if total > limit:
            break
    return total


def _parse(text: bytes, most_values: int) -> Any:
    try:
        encoding = json.detect_encoding(text)
        if not encoding.startswith("utf-8"):  # json reads UTF-16 and UTF-32 as well
            text = text.decode(encoding, "surrogatepass").encode(errors="surrogatepass")
        _check_values(text, most_values)
        return json.loads(text)
    except (ValueError, RecursionError) as error:
        raise DecodeError(f"the message body is not JSON: {error}") from error


_STRINGS = re.compile(rb'"(?:[^"\\]++|\\.)*+"', re.DOTALL)
_BRACES_AS_BRACKETS = bytes.maketrans(b"{}", b"[]")
_ALL_BUT_BRACKETS = bytes(set(range(256)) - set(b"[]{}"))


def _check_values(text: bytes, most: int) -> None:
    """Raise DecodeError if a JSON text has too many values, or too deep ones. What is in strings counts only if in doubt."""
    if (excess := _excess(text, most)) and _count_strings(text) <= most:
        excess = _excess(_without_strings(text), most)
    if excess:
        raise DecodeError(f"the message body is JSON with {excess}")


def _count_strings(text: bytes) -> int:
    """Return how many strings a JSON text has at the least: each backslash before a quote may be one that is escaped."""
    return (text.count(b'"') - text.count(b'\\"')) // 2


def _without_strings(text: bytes) -> bytes:
    """Remove all strings; `sub` would make a list of what is between them."""
    rest, end = bytearray(), 0
    for found in _STRINGS.finditer(text):
        rest += text[end : found.start()]
        end = found.end()
    return bytes(rest + text[end:])


def _excess(text: bytes, most: int) -> str:
    """Return what is too much in a text without strings: more than `most` values, or too deep ones; at best nothing."""
    if len(text) > most and sum(map(text.count, (b"[", b"{", b",", b":"))) > most:
        return f"more than {most} values, one for each {BYTES_OF_VALUE} bytes of --max-payload"
    if len(text) > MOST_DEPTH and text.count(b"[") + text.count(b"{") > MOST_DEPTH and _is_deep(text):
        return f"arrays or objects within each other more than {MOST_DEPTH} deep"
    return ""


def _is_deep(text: bytes) -> bool:
    """Return whether brackets are nested too deep. Most texts are flat: removing their innermost pairs is quickest."""
    brackets = text.translate(_BRACES_AS_BRACKETS, _ALL_BUT_BRACKETS)
    for _ in range(USUAL_DEPTH):
        brackets = brackets.replace(b"[]", b"")
    steps = map((ord("[") + 1).__sub__, brackets)  # 1 for [, -1 for ]
    return USUAL_DEPTH + max(accumulate(steps), default=0) > MOST_DEPTH


def _from_base64(data: Any) -> bytes:
    try:
        return base64.b64decode(data, validate=True)
    except (TypeError, ValueError) as error:
        raise DecodeError(f"the message body says base64, but its data is not: {error}") from error
