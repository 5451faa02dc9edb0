import itertools
import json
import re
from base64 import b64encode, urlsafe_b64decode
from collections.abc import AsyncIterator, Awaitable, Callable, Iterable
from contextlib import asynccontextmanager
from pathlib import Path

import pytest
import trio

from tests.support.sockets import serving
from tests.support.waiting import until
from trio_pilot.errors import NodeError
from trio_pilot.runtimes.docker import DOCKER
from trio_pilot.runtimes.engine_api import EngineApi
from trio_pilot.runtimes.engine_images import MOST_OUTAGES, pauses, ready_image, tagged
from trio_pilot.runtimes.engine_outages import EngineOutages
from trio_pilot.runtimes.engine_timeouts import DEFAULT_TIMEOUTS, EngineTimeouts

Reply = Callable[[trio.SocketStream], Awaitable[None]]

ID = "sha256:" + "0" * 64


async def send(stream: trio.SocketStream, status: str, body: bytes) -> None:
    await stream.send_all(b"HTTP/1.1 %s\r\nContent-Length: %d\r\n\r\n%s" % (status.encode(), len(body), body))


def lines(*said: object, end: bytes = b"0\r\n\r\n") -> Reply:
    """Reply with a stream of JSON, in pieces other than lines."""
    text = b"".join(json.dumps(one).encode() + b"\r\n" for one in said)

    async def reply(stream: trio.SocketStream) -> None:
        await stream.send_all(b"HTTP/1.1 200 OK\r\nTransfer-Encoding: chunked\r\n\r\n")
        for start in range(0, len(text), 7):
            piece = text[start : start + 7]
            await stream.send_all(b"%x\r\n%s\r\n" % (len(piece), piece))
        await stream.send_all(end)

    return reply


def refusal(status: str, message: str) -> Reply:
    async def reply(stream: trio.SocketStream) -> None:
        await send(stream, status, json.dumps({"message": message}).encode())

    return reply


async def silence(_stream: trio.SocketStream) -> None:
    await trio.sleep_forever()


class FakeEngine:
    """An engine that has no image until a pull is complete."""

    def __init__(self, replies: Iterable[Reply]) -> None:
        self.heads: list[bytes] = []
        self._replies = iter(replies)
        self._has_it = False

    @property
    def asked(self) -> list[str]:
        """List the requests other than pings, which depend on when a connection is closed."""
        lines = [head.split(b" HTTP/1.1")[0].decode() for head in self.heads]
        return [line for line in lines if line != "GET /_ping"]

    async def serve(self, stream: trio.SocketStream) -> None:
        async with stream:
            while head := bytes(await stream.receive_some()):
                self.heads.append(head)
                if head.startswith(b"POST"):
                    await next(self._replies)(stream)
                    self._has_it = True
                    return
                if self._has_it:
                    await send(stream, "200 OK", json.dumps({"Id": ID}).encode())
                else:
                    await send(stream, "404 Not Found", b'{"message": "no such image"}')


@asynccontextmanager
async def fake(
    directory: Path, *replies: Reply, timeouts: EngineTimeouts = DEFAULT_TIMEOUTS
) -> AsyncIterator[tuple[FakeEngine, EngineOutages]]:
    engine = FakeEngine(replies)
    async with serving(engine.serve, directory / "sock"), EngineApi("docker", directory / "sock", timeouts) as api:
        yield engine, EngineOutages(api, patience=5)


async def prepare(outages: EngineOutages, image: str = "debian:12") -> str:
    with trio.fail_after(10):
        return await ready_image(outages, DOCKER, image)


async def failure(outages: EngineOutages) -> str:
    with pytest.raises(NodeError) as caught:
        await prepare(outages)
    return str(caught.value)


LAYER = {"status": "Downloading", "id": "a", "progressDetail": {"current": 2**20, "total": 2**21}}
DONE = {"status": "Status: Downloaded newer image"}
LIMIT = "toomanyrequests: You have reached your pull rate limit"


async def test_an_image_that_is_not_there_is_pulled(tmp_path: Path) -> None:
    async with fake(tmp_path, lines(LAYER, DONE)) as (engine, outages):
        assert await prepare(outages) == ID
        assert await prepare(outages) == ID
    look = "GET /images/debian:12/json"
    assert engine.asked == [look, "POST /images/create?fromImage=debian%3A12", look, look]


async def test_a_private_image_is_pulled_with_the_login(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("REGISTRY_AUTH_FILE", str(tmp_path / "auth.json"))
    (tmp_path / "auth.json").write_text(json.dumps({"auths": {"here:5000": {"auth": b64encode(b"me:a:b").decode()}}}))
    async with fake(tmp_path, lines(DONE)) as (engine, outages):
        await prepare(outages, "here:5000/private")
    (said,) = [head for head in engine.heads if head.startswith(b"POST")]
    sent = re.search(rb"x-registry-auth: (\S+)", said, re.IGNORECASE)
    assert sent
    assert json.loads(urlsafe_b64decode(sent[1])) == {"username": "me", "password": "a:b", "serveraddress": "here:5000"}


@pytest.mark.parametrize(
    ("image", "name"),
    [
        ("debian", "debian:latest"),
        ("debian:12", "debian:12"),
        ("localhost:5000/a/b", "localhost:5000/a/b:latest"),
        ("localhost:5000/a/b:c", "localhost:5000/a/b:c"),
        ("a/b@sha256:0", "a/b@sha256:0"),
    ],
)
def test_a_name_without_a_tag_means_the_latest(image: str, name: str) -> None:
    assert tagged(image) == name


async def test_an_image_name_that_is_not_utf_8_is_an_error(tmp_path: Path) -> None:
    async with fake(tmp_path) as (engine, outages):
        with pytest.raises(NodeError, match=r"^the image 'a\\udcff' must have a name in UTF-8: "):
            await prepare(outages, "a\udcff")
    assert engine.asked == []


async def test_a_name_that_looks_like_an_id_may_be_a_name(tmp_path: Path) -> None:
    async with fake(tmp_path, lines(DONE)) as (engine, outages):
        assert await prepare(outages, "deadbeefcafe") == ID
    given, look = "GET /images/deadbeefcafe/json", "GET /images/deadbeefcafe:latest/json"
    assert engine.asked == [given, look, "POST /images/create?fromImage=deadbeefcafe%3Alatest", look]


async def test_a_short_name_is_not_taken_for_the_beginning_of_an_id(tmp_path: Path) -> None:
    async with fake(tmp_path, lines(DONE)) as (engine, outages):
        assert await prepare(outages, "cafe") == ID
    assert "GET /images/cafe/json" not in engine.asked


async def test_progress_is_logged_at_intervals(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level("INFO", "trio_pilot")
    reply = lines(LAYER, {"status": "Extracting", "id": "a"}, DONE)
    async with fake(tmp_path, reply, timeouts=EngineTimeouts(pull_report=0)) as (_, outages):
        await prepare(outages)
    assert "pulling debian:12: 1 of 2 MiB, Downloading" in caplog.messages
    assert "pulling debian:12: 1 of 2 MiB, Extracting" in caplog.messages


@pytest.mark.parametrize(
    ("reply", "words"),
    [
        (lines(LAYER, {"error": "unauthorized: ask", "errorDetail": {"message": "unauthorized: ask"}}), "unauthorized: ask"),
        (refusal("404 Not Found", "pull access denied for debian"), "pull access denied for debian"),
        (refusal("500 Internal Server Error", "no such host"), "no such host"),
        (lines({"error": 5}), "5"),
        (lines(["not", "an", "object"]), 'the engine says b\'["not", "an", "object"]'),
    ],
)
async def test_an_error_of_a_pull_is_the_engines_and_is_not_retried(tmp_path: Path, reply: Reply, words: str) -> None:
    async with fake(tmp_path, reply) as (engine, outages):
        assert (await failure(outages)).startswith(f"the image debian:12 could not be pulled: {words}")
    assert len(engine.asked) == 2


DROPPED = lines(LAYER, end=b"")


async def test_a_pull_is_repeated_after_a_restart_of_the_engine(tmp_path: Path) -> None:
    async with fake(tmp_path, DROPPED, DROPPED, lines(DONE)) as (engine, outages):
        assert await prepare(outages) == ID
    assert len(engine.asked) == 1 + 3 + 1


async def test_a_pull_that_always_loses_the_engine_fails(tmp_path: Path) -> None:
    async with fake(tmp_path, *[DROPPED] * 100) as (engine, outages):
        assert "did not pull the image debian:12" in await failure(outages)
    assert len(engine.asked) == 1 + MOST_OUTAGES + 1


async def test_a_pull_without_progress_fails(tmp_path: Path) -> None:
    async with fake(tmp_path, silence, timeouts=EngineTimeouts(pull_silence=0.05)) as (_, outages):
        assert await failure(outages) == "the image debian:12 could not be pulled: nothing has come for 0.05 s"


async def test_a_pull_is_repeated_if_the_registry_limits_the_rate(tmp_path: Path) -> None:
    limits = [refusal("429 Too Many Requests", "slow down"), refusal("500 Server Error", LIMIT), lines({"error": LIMIT})]
    async with fake(tmp_path, *limits, lines(DONE), timeouts=EngineTimeouts(first_pause=0.01)) as (engine, outages):
        assert await prepare(outages) == ID
    assert len(engine.asked) == 1 + 4 + 1


def test_pauses_grow_and_are_random() -> None:
    first, again = (
        list(itertools.islice(pauses(DEFAULT_TIMEOUTS.first_pause, DEFAULT_TIMEOUTS.longest_pause), 7)) for _ in range(2)
    )
    for pause, longest in zip(first, (5, 10, 20, 40, 80, 120, 120), strict=True):
        assert longest / 2 <= pause <= longest
    assert first != again


async def test_a_pull_fails_if_the_registry_limits_the_rate_for_too_long(tmp_path: Path) -> None:
    async with fake(tmp_path, lines({"error": LIMIT}), timeouts=EngineTimeouts(rate_limit=0.0)) as (_, outages):
        assert await failure(outages) == f"the image debian:12 could not be pulled: {LIMIT}"


async def test_a_pull_can_be_cancelled(tmp_path: Path) -> None:
    async with fake(tmp_path, silence) as (engine, outages), trio.open_nursery() as nursery:
        nursery.start_soon(prepare, outages)
        await until(lambda: len(engine.asked) == 2)
        nursery.cancel_scope.cancel()
