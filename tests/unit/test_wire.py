import base64
import json
import math
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import zstandard
from mqclient.broker_client_interface import Message as TheirMessage

from tests.support.paths import WIRE_SAMPLES
from trio_pilot.errors import DecodeError, EncodeError
from trio_pilot.wire import MOST_DEPTH, WIRES, EwmsWire, Message, RawWire

GOOD = sorted(path.stem for path in WIRE_SAMPLES.glob("*.json"))
BAD = sorted(path.name for path in WIRE_SAMPLES.glob("bad-*.bin"))
LIMIT = 2**27
LESS = 2**25
WIRE = EwmsWire()


def sample(name: str) -> tuple[bytes, Any, Any]:
    """Return the body, the data that was passed to the real client, and the headers that it added."""
    body = (WIRE_SAMPLES / f"{name}.bin").read_bytes()
    headers = json.loads(zstandard.decompress(body))["headers"]
    return body, json.loads((WIRE_SAMPLES / f"{name}.json").read_text()), headers


def packed(document: Any, *, with_size: bool = True) -> bytes:
    text = document if isinstance(document, bytes) else json.dumps(document).encode()
    return zstandard.ZstdCompressor(level=3, write_content_size=with_size).compress(text)


def same(one: Any, other: Any) -> bool:
    """Return whether two values are equal, NaN and NaN too."""
    return json.dumps(one) == json.dumps(other)


def test_there_are_samples() -> None:
    assert len(GOOD) >= 10
    assert len(BAD) >= 4


@pytest.mark.parametrize("name", GOOD)
def test_a_sample_of_the_real_client_is_read(name: str) -> None:
    body, data, headers = sample(name)
    message = WIRE.decode(body, LIMIT)
    assert same(message.data, data)
    assert message.headers == headers


@pytest.mark.parametrize("name", GOOD)
def test_a_sample_of_the_real_client_is_written_byte_for_byte(name: str) -> None:
    body, data, headers = sample(name)
    assert WIRE.encode(Message(data, headers)) == body
    assert WIRE.encode(WIRE.decode(body, LIMIT)) == body


@pytest.mark.parametrize("name", GOOD)
def test_the_real_client_of_today_writes_and_reads_the_same(name: str) -> None:
    body, data, headers = sample(name)
    assert TheirMessage.serialize(data, headers=headers) == body
    assert same(TheirMessage("id", WIRE.encode(Message(data))).data, data)


@pytest.mark.parametrize("name", BAD)
def test_a_bad_sample_is_an_error_of_one_line(name: str) -> None:
    with pytest.raises(DecodeError) as caught:
        WIRE.decode((WIRE_SAMPLES / name).read_bytes(), LIMIT)
    assert "\n" not in str(caught.value)
    assert len(str(caught.value)) < 300


@pytest.mark.parametrize(
    "body",
    [
        b"",
        b"\0" * 100,
        b"{}",
        packed(b""),
        packed(b"\xff\xfe\x00"),
        packed(b'"only a string"'),
        packed(b"[1, 2]"),
        packed(b'{"data": 1'),
        packed(b"[" * 1_000_000),
        packed(b'{"data":' * 100_000),
        packed({"headers": [], "data": 1})[:-4],
        packed({"headers": "text", "data": 1}),
        packed({"headers": [1], "data": 1}),
        packed({"headers": {"encoding": "base64"}, "data": "not base64!"}),
        packed({"headers": {"encoding": "base64"}, "data": "YQ"}),
        packed({"headers": {"encoding": "base64"}, "data": "é"}),
        packed({"headers": {"encoding": "base64"}, "data": 5}),
        packed({"headers": {"encoding": "base64"}, "data": None}),
        packed({"headers": {"encoding": "base64"}, "data": ["YQ=="]}),
    ],
)
def test_any_other_body_is_an_error_of_one_line(body: bytes) -> None:
    with pytest.raises(DecodeError) as caught:
        WIRE.decode(body, LIMIT)
    assert "\n" not in str(caught.value)
    assert len(str(caught.value)) < 300


def test_cut_and_flipped_bodies_raise_nothing_but_decode_errors() -> None:
    body, _, _ = sample("nested-pixel")
    for place in range(len(body)):
        for broken in (body[:place], body[:place] + bytes([body[place] ^ 0x41]) + body[place + 1 :]):
            try:
                WIRE.decode(broken, 2**20)
            except DecodeError:
                continue


def test_extra_keys_and_missing_headers_are_tolerated() -> None:
    assert WIRE.decode(packed({"data": 1, "more": 2}), LIMIT) == Message(1, {})
    assert WIRE.decode(packed({"data": 1, "headers": None}), LIMIT) == Message(1, {})


def test_headers_are_kept_except_for_the_encoding() -> None:
    headers = {"traceparent": "00-1-2-01", "encoding": "base64"}
    event = WIRE.decode(packed({"headers": headers, "data": "YQ=="}), LIMIT)
    assert event.data == b"a"
    answer = json.loads(zstandard.decompress(WIRE.encode(Message("text", event.headers))))
    assert answer == {"headers": {"traceparent": "00-1-2-01"}, "data": "text"}


def test_bytes_are_sent_as_base64_that_any_client_can_read() -> None:
    data = bytes(range(256))
    body = WIRE.encode(Message(data, {"trace": "x"}))
    assert TheirMessage("id", body).data == base64.b64encode(data).decode()
    assert WIRE.decode(body, LIMIT) == Message(data, {"trace": "x", "encoding": "base64"})


@pytest.mark.parametrize("value", [math.nan, math.inf, -math.inf])
def test_nan_and_the_infinities_are_read_and_written(value: float) -> None:
    body = WIRE.encode(Message({"llh": value}))
    assert same(WIRE.decode(body, LIMIT).data, {"llh": value})
    assert same(TheirMessage("id", body).data, {"llh": value})


def test_a_lone_surrogate_is_read_and_written() -> None:
    body = packed(b'{"headers": {}, "data": "\\udcff"}')
    message = WIRE.decode(body, LIMIT)
    assert message.data == "\udcff"
    assert WIRE.encode(message) == body


@pytest.mark.parametrize("with_size", [True, False])
def test_the_limit_holds_for_the_decompressed_size(with_size: bool) -> None:
    body = packed({"headers": {}, "data": "x" * 1000}, with_size=with_size)
    size = len(zstandard.ZstdDecompressor().decompressobj().decompress(body))
    assert WIRE.decode(body, size).data == "x" * 1000
    with pytest.raises(DecodeError, match="max-payload"):
        WIRE.decode(body, size - 1)


def test_several_frames_in_one_body_do_not_evade_the_limit() -> None:
    body = packed({"data": 1}) + packed(b" " * 100_000)
    try:
        assert WIRE.decode(body, 1000) == Message(1)
    except DecodeError:
        return


def test_the_size_of_a_body_is_known_before_it_is_decompressed() -> None:
    assert WIRE.size(packed(b"x" * 1000)) == 1000
    assert WIRE.size(packed(b"x" * 1000, with_size=False)) == math.inf
    assert WIRE.size(b"no zstd") >= 0
    assert RawWire().size(b"12345") == 5


MEASURE = """
import re, sys
from pathlib import Path
from trio_pilot.errors import DecodeError
from trio_pilot.wire import EwmsWire

def peak():
    # Not ru_maxrss: a child inherits the value of its parent.
    return int(re.search(r"VmHWM:\\s*(\\d+) kB", Path("/proc/self/status").read_text())[1]) / 1024

with open(sys.argv[1], "rb") as file:
    body = file.read()
before = peak()
try:
    EwmsWire().decode(body, int(sys.argv[2]))
    print("decoded", peak() - before)
except DecodeError as error:
    print("refused", peak() - before)
"""


def measured(path: Path, limit: int) -> tuple[str, float]:
    command = [sys.executable, "-c", MEASURE, str(path), str(limit)]
    verdict, megabytes = subprocess.run(command, capture_output=True, text=True, check=True).stdout.split()
    return verdict, float(megabytes)


def bomb(path: Path, *, with_size: bool, window_log: int = 0) -> Path:
    parameters = zstandard.ZstdCompressionParameters(
        compression_level=3, write_content_size=with_size, **({"window_log": window_log} if window_log else {})
    )
    compressor = zstandard.ZstdCompressor(compression_params=parameters)
    size = 512 * 2**20
    stream = compressor.compressobj(size=size) if with_size else compressor.compressobj()
    with path.open("wb") as file:
        for _ in range(size // 2**20):
            file.write(stream.compress(bytes(2**20)))
        file.write(stream.flush())
    return path


@pytest.mark.parametrize("kind", ["sample", "with size", "without size", "wide window"])
def test_a_decompression_bomb_is_refused_and_costs_little_memory(tmp_path: Path, kind: str) -> None:
    match kind:
        case "sample":
            path = WIRE_SAMPLES / "bomb.bin"
        case "wide window":
            path = bomb(tmp_path / "bomb", with_size=False, window_log=27)
        case _:
            path = bomb(tmp_path / "bomb", with_size=kind == "with size")
    verdict, megabytes = measured(path, LIMIT)
    assert verdict == "refused"
    assert megabytes < 100


# What each pattern of a few bytes would take: 3.3 GB of empty arrays, by 12 kB of zstd.
MANY = {
    "empty arrays": b"[],",
    "objects": b'{"a":1},',
    "numbers": b"1,",
    "UTF-16": '[],"∢尢",'.encode("utf-16-le"),
}


@pytest.mark.parametrize("kind", MANY)
def test_a_body_of_too_many_values_costs_little_memory(tmp_path: Path, kind: str) -> None:
    head, tail = (
        ('{"data": ["",'.encode("utf-16"), "1]}".encode("utf-16-le")) if kind == "UTF-16" else (b'{"data": [', b"1]}")
    )
    path = tmp_path / "many"
    path.write_bytes(packed(head + MANY[kind] * ((LESS - 100) // len(MANY[kind])) + tail))
    assert path.stat().st_size < 10_000
    verdict, megabytes = measured(path, LESS)
    assert verdict == "refused"
    assert megabytes < 4 * LESS / 1e6


def test_the_most_values_take_a_small_multiple_of_the_limit(tmp_path: Path) -> None:
    path = tmp_path / "many"
    path.write_bytes(packed(b'{"data": [' + b'{"a":1},' * (LESS // 16 // 3 - 10) + b"1]}"))
    verdict, megabytes = measured(path, LESS)
    assert verdict == "decoded"
    assert megabytes < 6 * LESS / 1e6


def test_brackets_and_commas_within_strings_are_not_values() -> None:
    text = '[,{:\\\\"' * 100_000
    assert WIRE.decode(packed({"data": text}), 10**7).data == text
    assert WIRE.decode(packed({"data": "[" * 10_000}), 10**7).data == "[" * 10_000


def test_nested_values_are_read_and_written_or_refused_at_every_depth() -> None:
    for depth in [*range(380, 420), 900, 980, 990, 1000, 10**5]:
        for opening, closing in (("[", "]"), ('{"a":', "}"), ('[{"a":', "}]")):
            body = packed(f'{{"data":{opening * depth}1{closing * depth}}}'.encode())
            levels = depth * len(closing)
            if levels < MOST_DEPTH:
                WIRE.encode(WIRE.decode(body, LIMIT))
            else:
                with pytest.raises(DecodeError, match="deep"):
                    WIRE.decode(body, LIMIT)


def test_a_body_of_several_frames_is_read_within_its_limit() -> None:
    body = packed(b'{"data": "') + packed(b"x" * 1000, with_size=False) + packed(b"") + packed(b'"}')
    assert WIRE.decode(body, 2000).data == "x" * 1000
    assert WIRE.decode(b"\x50\x2a\x4d\x18\x03\0\0\0abc" + body, 2000).data == "x" * 1000
    assert WIRE.size(body) == math.inf
    assert WIRE.size(packed(b'{"data": 1}')) == 11
    with pytest.raises(DecodeError, match="max-payload"):
        WIRE.decode(body, 1000)
    with pytest.raises(DecodeError):
        WIRE.decode(body[:-5], 2000)


def test_the_measurement_shows_the_memory_of_a_decompressed_body(tmp_path: Path) -> None:
    path = tmp_path / "large"
    path.write_bytes(packed(b'{"data": 1}' + b" " * 120_000_000))
    verdict, megabytes = measured(path, LIMIT)
    assert verdict == "decoded"
    assert megabytes > 100


def test_raw_bodies_are_not_changed() -> None:
    wire = RawWire()
    for body in (b"", b"\xff\0", packed({"data": 1})):
        assert wire.decode(body, 100) == Message(body)
        assert wire.encode(Message(body)) == body
    assert wire.encode(Message("é\r\n")) == "é\r\n".encode()
    assert wire.encode(Message({"a": 1})) == b'{"a": 1}'
    with pytest.raises(DecodeError, match="max-payload"):
        wire.decode(b"12345", 4)


def test_a_message_that_cannot_be_encoded_is_an_encode_error() -> None:
    with pytest.raises(EncodeError, match="UTF-8"):
        RawWire().encode(Message("\ud800"))
    deep: list[Any] = []
    for _ in range(100_000):
        deep = [deep]
    for wire in WIRES.values():
        with pytest.raises(EncodeError, match="JSON"):
            wire.encode(Message(deep))
