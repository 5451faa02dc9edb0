"""The properties of RabbitMQ's messages as others wrote them: read as far as pika can, copied as far as they can be written.

pika decodes a message's properties in its own thread, all or nothing: a timestamp in milliseconds, a NaN or tables nested
3,000 deep end the connection, and the message comes again by the next one. Here such headers are left out, one by one.
"""

import struct
from collections.abc import Mapping
from copy import copy
from typing import Any

import pika
import pika.data
import pika.frame

from trio_pilot.brokers import dead_letters
from trio_pilot.brokers.headers import MOST_SHOWN, kept, shortened
from trio_pilot.log import LOGGER

PERSISTENT = 2
DELIVERY_COUNT = "x-delivery-count"
LARGEST_FRAME = 2**17  # bytes: the default of the server, also where there is no limit
MOST_DEPTH = 64  # of a header's value that is copied; what pika's thread has read, another may fail to write

# Headers that the server adds, and headers that would make it send a copy elsewhere, or refuse it.
NOT_COPIED = DELIVERY_COUNT, "x-acquired-count", "CC", "BCC"
DIRECT_REPLY = "amq.rabbitmq.reply-to"  # refused of anyone but the client that waits for the reply

# The wire format, of AMQP 0-9-1 (4.2.3, 4.2.5, 4.2.6.1) and RabbitMQ's errata to it.
FRAME = struct.Struct(">BHL")  # type, channel, size of the payload
CONTENT_HEADER = struct.Struct(">HHQ")  # class, weight, size of the body; then the properties
FLAGS, LENGTH = struct.Struct(">H"), struct.Struct(">I")
HEADER_FRAME = 2
SIZES = {b"T": 8, b"f": 4, b"d": 8, b"D": 5}  # bytes of field values that pika may fail to decode
WITH_LENGTH = b"F", b"A", b"S", b"x"


class TolerantConnection(pika.SelectConnection):
    """A connection on which no message's properties are an error."""

    def _read_frame(self) -> tuple[int, Any]:
        try:
            return super()._read_frame()
        except Exception:  # anything: struct.error, OverflowError, RecursionError, ...
            if self._frame_buffer[0] != HEADER_FRAME:
                raise
            return _header_frame(self._frame_buffer)


def _header_frame(buffer: bytes) -> tuple[int, Any]:
    """Read a whole frame whose properties pika cannot decode: its size, and pika's object."""
    _, channel, size = FRAME.unpack_from(buffer)
    payload = buffer[FRAME.size : FRAME.size + size]
    _, _, body_size = CONTENT_HEADER.unpack_from(payload)
    properties = _readable(payload[CONTENT_HEADER.size :])
    return FRAME.size + size + 1, pika.frame.Header(channel, body_size, properties)


def _readable(encoded: bytes) -> pika.BasicProperties:
    """Decode properties, without those headers that cannot be decoded; at worst without any."""
    try:
        start = _start_of_headers(encoded)
        end = start + LENGTH.size + LENGTH.unpack_from(encoded, start)[0]
        without = encoded[:start] + LENGTH.pack(0) + encoded[end:]
        properties = pika.BasicProperties()
        properties.decode(without)
        properties.headers, unreadable = _decodable(encoded[start + LENGTH.size : end])
    except Exception as error:  # of any kind, as above
        properties, unreadable = pika.BasicProperties(), f"all, and other properties ({type(error).__name__})"
    LOGGER.warning("message %r: headers that cannot be read are left out: %s", properties.message_id, unreadable)
    return properties


def _start_of_headers(encoded: bytes) -> int:
    """Return where the table of headers begins: behind the flags and up to two short strings."""
    (flags,) = FLAGS.unpack_from(encoded)
    offset = FLAGS.size
    for flag in (pika.BasicProperties.FLAG_CONTENT_TYPE, pika.BasicProperties.FLAG_CONTENT_ENCODING):
        offset += 1 + encoded[offset] if flags & flag else 0
    return offset


def _decodable(table: bytes) -> tuple[dict[Any, Any], str]:
    """Decode the headers of a table, those that can be; also return the names of the others, as text."""
    found, unreadable, offset = {}, [], 0
    while offset < len(table):
        name, offset = pika.data.decode_short_string(table, offset)
        try:
            found[name], offset = pika.data.decode_value(table, offset)
        except Exception:  # of any kind, as above
            unreadable.append(name)
            offset = _behind(table, offset)
    return found, repr(unreadable)[:MOST_SHOWN]


def _behind(table: bytes, offset: int) -> int:
    """Return where a value ends. Behind one of an unknown type nothing can be read."""
    kind = table[offset : offset + 1]
    if kind in WITH_LENGTH:
        return offset + 1 + LENGTH.size + int(LENGTH.unpack_from(table, offset + 1)[0])
    return offset + 1 + SIZES[kind] if kind in SIZES else len(table)


def copied(
    properties: pika.BasicProperties, ours: Mapping[str, Any], frame_max: int, message_id: str
) -> pika.BasicProperties:
    """Return the properties of a copy: its own headers, and of the sender's what can be written into one frame.

    The user id must be that of the connection. An event that was taken expires no more: it is done, or a dead letter.
    """
    copied = copy(properties)
    copied.delivery_mode, copied.user_id, copied.expiration, copied.headers = PERSISTENT, None, None, {}
    if copied.reply_to == DIRECT_REPLY:
        copied.reply_to = None
    room = (frame_max or LARGEST_FRAME) - len(pika.frame.Header(1, 0, copied).marshal())
    own = shortened(ours, room, _size_of)
    room -= sum(_size_of(*header) or 0 for header in own.items())
    theirs = properties.headers or {}
    names = [name for name in theirs if name not in NOT_COPIED and not str(name).startswith(dead_letters.PREFIX)]
    copied.headers = {**kept(theirs, names, room, _size_of, message_id), **own}
    return copied


def _size_of(name: Any, value: Any) -> int | None:
    """Return the size of a header; None if it cannot be written."""
    pieces: list[bytes] = []
    try:
        if not _is_flat(value):
            return None
        return int(pika.data.encode_short_string(pieces, name) + pika.data.encode_value(pieces, value))
    except Exception:  # of any kind: struct.error, ShortStringTooLong, RecursionError, ...
        return None


def _is_flat(value: Any, depth: int = 0) -> bool:
    inner = value.values() if isinstance(value, dict) else value if isinstance(value, list) else ()
    return depth <= MOST_DEPTH and all(_is_flat(one, depth + 1) for one in inner)
