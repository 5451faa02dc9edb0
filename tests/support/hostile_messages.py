"""Messages that nobody should send, made from a grammar with a seed, and written to brokers as no client library would.

Each broker has its own metadata: properties of AMQP, in bytes; a block of headers of NATS, in bytes; a row of a queue file.
"""

import json
import random
import socket
import sqlite3
import struct
from collections.abc import Callable, Iterator
from contextlib import closing, contextmanager
from pathlib import Path
from typing import Any

import pika
import pika.exceptions
import zstandard

INTEGERS = (0, 1, -1, 2**31 - 1, 2**31, 2**63 - 1, -(2**63), 10**6)
OURS = ("failures", "message-id", "reason", "attempts", "unnamed", "nonsense")  # headers of trio-pilot, after their prefix


class Grammar:
    """Makes messages. Equal seeds make equal messages."""

    def __init__(self, seed: int) -> None:
        self.dice = random.Random(seed)

    def one(self, *choices: Callable[[], Any]) -> Any:
        return self.dice.choice(choices)()

    def number(self) -> int:
        return self.dice.choice((*INTEGERS, self.dice.getrandbits(63)))

    def size(self) -> int:
        return self.dice.choice((0, 1, 2, 31, 255, 256, 4000, 65_000))

    def text(self) -> str:
        """Text of any characters: control characters, line breaks, a right-to-left mark, surrogates, NUL, or very long."""
        alphabet = self.dice.choice(("abc", "\r\n\x1b[31m", "\0", "é☃😀", "\ud800\udfff", "\u202e", ' :"\\', "%s{}"))
        return "".join(self.dice.choices(alphabet, k=min(self.size(), 4000)))

    def octets(self) -> bytes:
        return bytes(
            self.one(lambda: self.dice.randbytes(self.size() // 10), lambda: self.text().encode(errors="surrogatepass"))
        )

    # Bodies

    def body(self) -> bytes:
        """A body of EWMS or what is not quite one; of 1 MB at the most."""
        return bytes(
            self.one(
                lambda: packed({"data": self.json(4)}),
                lambda: packed({"data": self.json(2), "headers": self.json(3)}),
                lambda: packed({"data": self.text(), "headers": {"encoding": self.dice.choice(("base64", [], 1, "x"))}}),
                lambda: packed(self.json(2)),
                lambda: packed(self.nested()),
                lambda: packed(b'{"data": [' + self.dice.choice((b"[],", b"{},", b"1,", b'"",')) * 6_000_000 + b"1]}"),
                lambda: packed(b'{"data": "' + b"x" * self.dice.choice((10**6, 10**7, 2 * 10**7)) + b'"}'),
                lambda: packed(b'{"data": ' + b"1" * self.dice.choice((4300, 4301, 10**6)) + b"}"),
                lambda: packed(b'{"data": 1' + self.dice.choice((b"", b"}}", b", ", b"e999}", b"\0}"))),
                lambda: packed(
                    json.dumps({"data": self.json(2)}).encode(self.dice.choice(("utf-16", "utf-32", "utf-8-sig")))
                ),
                lambda: packed({"data": self.json(3)})[: self.dice.randrange(1, 30)],
                lambda: packed({"data": self.json(3)}) + self.octets(),
                lambda: packed(b'{"data": ') + packed(b"1}"),
                lambda: b"\x50\x2a\x4d\x18\xff\xff\xff\xff" + self.octets(),
                lambda: flipped(packed({"data": self.json(3)}), self.dice),
                self.octets,
            )
        )

    def json(self, depth: int) -> Any:
        if not depth:
            return self.one(self.text, self.number, lambda: None, lambda: float("nan"), lambda: 1e308, lambda: True)
        several = range(self.dice.randrange(4))
        return self.one(
            self.text,
            lambda: [self.json(depth - 1) for _ in several],
            lambda: {self.text(): self.json(depth - 1) for _ in several},
        )

    def nested(self) -> bytes:
        depth = self.dice.choice((300, 399, 400, 900, 950, 1000, 100_000))
        opening, closing = self.dice.choice(((b"[", b"]"), (b'{"a":', b"}")))
        return b'{"data": ' + opening * depth + b"1" + closing * depth + b"}"

    # AMQP

    def properties(self) -> bytes:
        """The encoded properties of a message of RabbitMQ, of up to 128 kB: some of those that AMQP has, in its order."""
        flags, pieces = 0, []
        parts: tuple[tuple[int, Callable[[], bytes]], ...] = (
            (15, lambda: short(self.octets())),  # content type
            (14, lambda: short(self.octets())),  # content encoding
            (13, lambda: with_length(self.table())),
            (12, lambda: bytes([self.dice.randrange(1, 3)])),  # delivery mode
            (11, lambda: bytes([self.dice.randrange(256)])),  # priority
            (10, lambda: short(self.octets())),  # correlation id
            (9, lambda: short(self.octets())),  # reply to
            (8, lambda: short(self.dice.choice((b"3600000", b"99999999")))),  # expiration
            (7, lambda: short(self.amqp_id())),
            (6, lambda: struct.pack(">Q", self.dice.getrandbits(64))),  # timestamp
            (5, lambda: short(self.octets())),  # type
            (4, lambda: short(b"guest")),  # user id
            (3, lambda: short(self.octets())),  # app id
            (2, lambda: short(self.octets())),  # cluster id
        )
        for bit, make in parts:
            if self.dice.random() < (0.8 if bit in (13, 7) else 0.15):
                flags |= 1 << bit
                pieces.append(make())
        return struct.pack(">H", flags) + b"".join(pieces)

    def amqp_id(self) -> bytes:
        return self.dice.choice((b"", b"\xff\xfe", b"same", b"same", b"a\nb\x1b[2J", b"\0", b"x" * 255, self.octets()[:255]))

    def table(self) -> bytes:
        """A table of headers. At times one is so large that hardly anything fits into the frame beside it."""
        if self.dice.random() < 0.1:
            return short(b"large") + b"S" + with_length(b"x" * self.dice.choice((100_000, 126_000, 130_000)))
        entries = [short(self.header_name()) + self.value() for _ in range(self.dice.randrange(6))]
        return (
            b"".join(entries)[:60_000]
            if sum(map(len, entries)) <= 60_000
            else entries[0]
            if len(entries[0]) < 120_000
            else b""
        )

    def header_name(self) -> bytes:
        ours = f"x-trio-pilot-{self.dice.choice(OURS)}".encode()
        others = b"x-delivery-count", b"x-death", b"x-acquired-count", b"Status", b"x-match", b"", b"\xff"
        return self.dice.choice((ours, ours, *others, self.octets()[:255]))

    def value(self, depth: int = 3) -> bytes:
        """A value of any type of AMQP's and RabbitMQ's."""
        octets, choice = self.dice.randbytes, self.dice.choice
        floats = 1.5, float("nan"), float("-inf"), 1e38
        times = 0, 1_700_000_000, 1_700_000_000_000, 2**63, 2**64 - 1
        several = range(self.dice.randrange(3))
        makers: dict[str, Callable[[], bytes]] = {
            **dict.fromkeys("tbB", lambda: octets(1)),
            **dict.fromkeys("su", lambda: octets(2)),
            **dict.fromkeys("Ii", lambda: octets(4)),
            **dict.fromkeys("lL", lambda: struct.pack(">q", self.number())),
            **dict.fromkeys("Sx", lambda: with_length(self.octets())),
            "f": lambda: struct.pack(">f", choice(floats)),
            "d": lambda: struct.pack(">d", choice(floats)),
            "T": lambda: struct.pack(">Q", choice(times)),
            "D": lambda: octets(5),
            "V": lambda: b"",
        }
        if depth:
            makers["A"] = lambda: with_length(b"".join(self.value(depth - 1) for _ in several))
            makers["F"] = lambda: with_length(self.nested_table(depth))
        kind = choice(list(makers))
        return kind.encode() + makers[kind]()

    def nested_table(self, depth: int) -> bytes:
        if self.dice.random() < 0.5:
            return b"".join(short(self.octets()[:255]) + self.value(depth - 1) for _ in range(self.dice.randrange(3)))
        return nested_table(self.dice.choice((30, 70, 300, 480, 3000)))

    # NATS

    def header_block(self) -> bytes:
        """A block of headers of NATS, of up to 64 kB, as a client that does not care would send it."""
        first = self.dice.choice(
            (b"NATS/1.0",) * 6 + (b"NATS/1.0 503", b"NATS/1.0 408 x", b"NATS/1.0 100 \xff", b"HTTP/1.1", b"", b"N")
        )
        lines = [self.header_line() for _ in range(self.dice.randrange(6))]
        block = b"\r\n".join([first, *lines, b"", b""])
        return block if len(block) < 65_000 else b"NATS/1.0\r\nx: y\r\n\r\n"

    def header_line(self) -> bytes:
        ours = f"X-trio-pilot-{self.dice.choice(OURS)}"
        ours = self.dice.choice((ours, ours.lower()))
        names = (b"Status", b"Description", b"Nats-Pending-Messages", b"bad name", b"n(a)me", b"\xff", b"", b"a", b"A")
        name = self.dice.choice((ours.encode(), ours.encode(), *names))
        return name + self.dice.choice((b": ", b":", b"", b" : ")) + self.header_value()

    def header_value(self) -> bytes:
        depth = self.dice.choice((10, 900, 5000))
        return bytes(
            self.one(
                lambda: self.octets().replace(b"\r", b" ").replace(b"\n", b" "),
                lambda: str(self.number()).encode(),
                lambda: b"[" * depth + b"1" + b"]" * depth,
                lambda: json.dumps(self.json(2)).encode(),
                lambda: self.dice.choice(
                    (b"100", b"404", b"408", b"409 Consumer Deleted", b"503", b"1e999", b"true", b"9" * 5000)
                ),
                lambda: b"x" * self.dice.choice((1000, 30_000, 60_000)),
            )
        )

    # A queue file

    def row(self) -> dict[str, Any]:
        """Columns of a message in a queue file, of whatever type."""
        columns: dict[str, Any] = {
            "message_id": self.one(self.storable, self.octets, self.number, lambda: "", lambda: "x" * 10**6)
        }
        if self.dice.random() < 0.5:
            columns["attempts"] = self.one(lambda: 0, lambda: -5, lambda: 2**63 - 2, lambda: "many", lambda: 1e300)
        if self.dice.random() < 0.5:
            columns["headers"] = self.one(self.storable, lambda: "[" * 5000, lambda: "[1]", lambda: b"\xff", lambda: "{}")
        if self.dice.random() < 0.5:
            columns["deliveries"] = self.one(lambda: 5, lambda: -1, lambda: "many", lambda: 1.5)
        return columns

    def storable(self) -> str:
        return self.text().encode(errors="replace").decode()


def packed(document: Any) -> bytes:
    text = document if isinstance(document, bytes) else json.dumps(document).encode()
    return zstandard.ZstdCompressor(level=3).compress(text)


def flipped(body: bytes, dice: random.Random) -> bytes:
    place = dice.randrange(len(body))
    return body[:place] + bytes([body[place] ^ 1 << dice.randrange(8)]) + body[place + 1 :]


def nested_table(depth: int) -> bytes:
    table = b""
    for _ in range(depth):
        table = short(b"a") + b"F" + with_length(table)
    return table


def short(octets: bytes) -> bytes:
    return bytes([len(octets[:255])]) + octets[:255]


def with_length(octets: bytes) -> bytes:
    return struct.pack(">I", len(octets)) + octets


class Encoded(pika.BasicProperties):
    """Properties that are encoded already."""

    def __init__(self, encoded: bytes) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.encoded = encoded

    def encode(self) -> list[bytes]:
        return [self.encoded]


def publish_amqp(port: int, queue: str, body: bytes, properties: pika.BasicProperties) -> bool:
    """Publish a message; return whether the server has taken it. It closes the connection on properties that are none."""
    try:
        with closing(pika.BlockingConnection(pika.ConnectionParameters("127.0.0.1", port))) as connection:
            channel = connection.channel()
            channel.confirm_delivery()
            channel.basic_publish("", queue, body, properties)
    except (pika.exceptions.AMQPError, ValueError, AssertionError):
        return False
    return True


@contextmanager
def nats_publisher(port: int) -> Iterator[Callable[[str, bytes, bytes], bool]]:
    """Yield a function that publishes a body with a block of headers; it returns whether the stream has taken it."""
    with socket.create_connection(("127.0.0.1", port), timeout=20) as connection, connection.makefile("rb") as answers:
        answers.readline()  # INFO
        connection.sendall(b'CONNECT {"verbose":false,"headers":true,"no_responders":true}\r\nSUB _INBOX.hostile 1\r\n')

        def publish(subject: str, headers: bytes, body: bytes) -> bool:
            sizes = f"{len(headers)} {len(headers) + len(body)}"
            connection.sendall(f"HPUB {subject} _INBOX.hostile {sizes}\r\n".encode() + headers + body + b"\r\n")
            while not (line := answers.readline()).startswith((b"MSG", b"HMSG")):
                if line.startswith(b"PING"):
                    connection.sendall(b"PONG\r\n")
                assert line, "the server has hung up"
                assert not line.startswith(b"-ERR"), line
            answer = answers.read(int(line.split()[-1]) + len("\r\n"))
            return b'"seq"' in answer and b'"error"' not in answer

        yield publish


def insert(file: Path, queue: str, body: Any, columns: dict[str, Any]) -> bool:
    """Insert a row into a queue file; return whether it could be."""
    names = ", ".join(["queue", "body", *columns])
    marks = ", ".join("?" * (2 + len(columns)))
    with closing(sqlite3.connect(file, timeout=20)) as connection, connection:
        connection.execute(f"INSERT INTO message ({names}) VALUES ({marks})", (queue, body, *columns.values()))
    return True
