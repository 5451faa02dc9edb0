"""The wire formats of a message body: that of EWMS, and raw bytes.

An EWMS body is `zstd(JSON {"headers": {...}, "data": any JSON value})` in UTF-8, as oms-mqclient writes it. JSON has
no bytes: they are sent as base64 text, marked by `"encoding": "base64"` in the headers.
"""

import base64
import json
import math
import threading
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, Protocol

import zstandard

from trio_pilot.errors import DecodeError, EncodeError, map_exceptions

ZSTD_LEVEL = 3  # that of oms-mqclient: equal messages give equal bytes

# RFC 8878, 3.1.1.1.2, recommends that decoders support a window of 8 MB; with more, a sender could exhaust the memory.
ZSTD_MAX_WINDOW = 8 * 2**20


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
        """Return the content size in the zstd frame."""
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
        document = _parse(_decompress(body, max_size))
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
        size = zstandard.frame_content_size(body)
        decompressor = _ZSTD.decompressor
        if size < 0:  # the frame has no size: count first
            size = _count(decompressor, body, max_size)
        if size > max_size:
            raise DecodeError(f"the message body unpacks to more than the {max_size} bytes of --max-payload")
        return decompressor.decompress(body, max_output_size=max(size, 1))
    except zstandard.ZstdError as error:
        raise DecodeError(f"the message body is not zstd: {error}") from error


def _count(decompressor: zstandard.ZstdDecompressor, body: bytes, limit: int) -> int:
    total = 0
    for chunk in decompressor.read_to_iter(body):
        total += len(chunk)
        if total > limit:
            break
    return total


def _parse(text: bytes) -> Any:
    try:
        return json.loads(text)
    except (ValueError, RecursionError) as error:
        raise DecodeError(f"the message body is not JSON: {error}") from error


def _from_base64(data: Any) -> bytes:
    try:
        return base64.b64decode(data, validate=True)
    except (TypeError, ValueError) as error:
        raise DecodeError(f"the message body says base64, but its data is not: {error}") from error
