"""The wire formats of a message body: EWMS's, and raw bytes.

An EWMS body is `zstd(JSON {"headers": {...}, "data": any JSON value})` in UTF-8, as oms-mqclient writes it. JSON has
no bytes: bytes travel as base64 text, announced by `"encoding": "base64"` in the headers.
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

ZSTD_LEVEL = 3  # oms-mqclient's; equal bodies make equal bytes

# RFC 8878, 3.1.1.1.2, asks every decoder for 8 MB of window; more would let a sender choose our memory.
ZSTD_MAX_WINDOW = 8 * 2**20


@dataclass(frozen=True, slots=True)
class Message:
    """An event or an output, off the wire.

    `data` is str, bytes or any other JSON value (NaN and the infinities included).
    """

    data: Any
    headers: Mapping[str, Any] = field(default_factory=dict)


class Wire(Protocol):
    """A body format. Both ways may take long for a large body: call them in a thread then."""

    def size(self, body: bytes) -> float:
        """Tell how many bytes a body unpacks to; infinite if it does not say."""

    def encode(self, message: Message) -> bytes:
        """Write a body, or raise EncodeError."""

    def decode(self, body: bytes, max_size: int) -> Message:
        """Read a body that unpacks to `max_size` bytes at the most, or raise DecodeError."""


class EwmsWire:
    """The body format of EWMS."""

    def size(self, body: bytes) -> float:
        """Read the content size of the zstd frame."""
        try:
            size = zstandard.frame_content_size(body)
        except zstandard.ZstdError:
            return 0
        return size if size >= 0 else math.inf

    def encode(self, message: Message) -> bytes:
        """Write a body, zstd content size included, byte for byte as oms-mqclient does."""
        data, headers = message.data, dict(message.headers)
        headers.pop("encoding", None)
        if isinstance(data, bytes):
            data, headers["encoding"] = base64.b64encode(data).decode(), "base64"
        text = _json({"headers": headers, "data": data})
        return _ZSTD.compressor.compress(text.encode())

    def decode(self, body: bytes, max_size: int) -> Message:
        """Read a body; other keys than `data` and `headers` are passed over, headers may be missing."""
        document = _parse(_decompress(body, max_size))
        if not isinstance(document, dict) or "data" not in document:
            raise DecodeError("the message body is JSON, but not an object with a 'data' key")
        headers = document.get("headers") or {}
        if not isinstance(headers, dict):
            raise DecodeError(f"the headers of the message body are not an object, but {type(headers).__name__}")
        data = document["data"]
        return Message(_from_base64(data) if headers.get("encoding") == "base64" else data, headers)


class RawWire:
    """Bodies as they are, for producers and consumers that have never heard of EWMS."""

    def size(self, body: bytes) -> float:
        """Give the size of the body itself."""
        return len(body)

    def encode(self, message: Message) -> bytes:
        """Give bytes as they are, text as UTF-8, anything else as JSON."""
        match message.data:
            case bytes() as data:
                return data
            case str() as text:
                with map_exceptions({UnicodeEncodeError: EncodeError}, "a raw message must be UTF-8"):
                    return text.encode()
            case other:
                return _json(other).encode()

    def decode(self, body: bytes, max_size: int) -> Message:
        """Give the body as bytes."""
        if len(body) > max_size:
            raise DecodeError(f"the message body has {len(body)} bytes, more than the {max_size} of --max-payload")
        return Message(body)


WIRES: Mapping[str, Wire] = {"ewms": EwmsWire(), "raw": RawWire()}


def _json(value: Any) -> str:
    with map_exceptions({RecursionError: EncodeError, ValueError: EncodeError}, "it cannot be written as JSON"):
        return json.dumps(value)


class _Zstd(threading.local):
    """The contexts of zstd, which cost more to make than to use; one of each for each thread, as it demands."""

    def __init__(self) -> None:
        self.compressor = zstandard.ZstdCompressor(level=ZSTD_LEVEL)
        self.decompressor = zstandard.ZstdDecompressor(max_window_size=ZSTD_MAX_WINDOW)


_ZSTD = _Zstd()


def _decompress(body: bytes, max_size: int) -> bytes:
    try:
        size = zstandard.frame_content_size(body)
        decompressor = _ZSTD.decompressor
        if size < 0:  # the frame does not say: count first, so that no sender's word is needed
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
