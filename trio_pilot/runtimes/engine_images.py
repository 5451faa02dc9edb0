"""Images: found at an engine, or pulled by it."""

import json
import random
import re
from collections.abc import AsyncIterator, Iterator, Mapping
from typing import Any
from urllib.parse import quote

import trio

from trio_pilot.errors import NodeError, map_exceptions
from trio_pilot.log import LOGGER
from trio_pilot.runtimes.engine_api import SHOWN, EngineApi, EngineAwayError, EngineRefusedError
from trio_pilot.runtimes.engine_dialect import Dialect
from trio_pilot.runtimes.engine_outages import EngineOutages
from trio_pilot.runtimes.engine_registry_login import login_header

NOT_FOUND, TOO_MANY_REQUESTS = 404, 429

# What may be an image's id, as `docker images -q` gives it, or whole. Fewer digits are a name: any image may begin so.
MAYBE_ID = re.compile(r"[0-9a-f]{12,64}")

SILENCE_TIMEOUT = 300.0  # seconds that a pull may make no progress; a large layer is unpacked without a word
REPORT_INTERVAL = 10.0  # seconds between two lines of the log

# A registry that has enough of us: thousands of pilots may have come at once, so they come again at different times.
RATE_LIMIT_PATIENCE = 900.0  # seconds, in all
FIRST_PAUSE, LONGEST_PAUSE = 5.0, 120.0
RATE_LIMITED = "toomanyrequests"

MOST_ABSENCES = 5  # of an engine in a pull, each for as long as it may be away; more may be the image's doing


class RateLimitedError(NodeError):
    """The registry asks for patience."""


async def ready_image(link: EngineOutages, dialect: Dialect, image: str) -> str:
    """Give the id of an image, which is pulled if it is not there.

    Raises:
        NodeError: it cannot be had.
    """
    if not image or image.startswith((".", "/")):
        raise NodeError(f"the image {image} must be a name, such as debian:12: {dialect.name} runs no directories or files")
    with map_exceptions({UnicodeEncodeError: NodeError}, f"the image {image!r} must have a name in UTF-8"):
        image.encode()
    if MAYBE_ID.fullmatch(image) and (found := await find_image(link, image)):
        return found
    name = tagged(image)
    found = await find_image(link, name)
    if found is None:
        await _pull_patiently(link, dialect, name)
        found = await find_image(link, name)
    if found is None:
        raise NodeError(f"{dialect.name} has pulled the image {name}, and does not have it")
    return found


def tagged(image: str) -> str:
    """Name an image with its tag; without one it would be pulled with all that it has."""
    has_tag = "@" in image or ":" in image.rpartition("/")[2]
    return image if has_tag else f"{image}:latest"


async def find_image(link: EngineOutages, name: str) -> str | None:
    """Give the id of an image; None if it is not there."""
    path, what = f"/images/{quote(name, safe='/:@')}/json", f"look for the image {name}"
    answer = await link.persist(lambda: link.api.call("GET", path, what, accepted=[NOT_FOUND]))
    return None if answer.status == NOT_FOUND else answer.read(lambda said: str(said["Id"]))


async def _pull_patiently(link: EngineOutages, dialect: Dialect, name: str) -> None:
    deadline, absences = trio.current_time() + RATE_LIMIT_PATIENCE, 0
    for pause in _pauses():
        try:
            await _pull(link.api, dialect, name)
        except RateLimitedError as error:
            if trio.current_time() + pause > deadline:
                raise
            LOGGER.warning("%s; trying again in %.0f s", error, pause)
            await trio.sleep(pause)
        except EngineAwayError as error:
            absences += 1
            if absences > MOST_ABSENCES:
                raise
            await link.back(error)
        else:
            return


def _pauses() -> Iterator[float]:
    longest = FIRST_PAUSE
    while True:
        yield longest * random.uniform(0.5, 1)  # noqa: S311
        longest = min(2 * longest, LONGEST_PAUSE)


async def _pull(api: EngineApi, dialect: Dialect, name: str) -> None:
    LOGGER.info("%s pulls the image %s", dialect.name, name)
    progress, path, login = Progress(name), f"{dialect.pull_prefix or api.prefix}/images/create", login_header(name)
    try:
        with trio.move_on_after(SILENCE_TIMEOUT) as patience:
            async with api.stream("POST", path, f"pull the image {name}", headers=login, fromImage=name) as pieces:
                await _follow(pieces, progress, patience)
    except EngineRefusedError as error:
        raise _error(name, error.said, error.status) from error
    if patience.cancelled_caught:
        raise _error(name, f"nothing has come for {SILENCE_TIMEOUT:g} s")
    if progress.error:
        raise _error(name, progress.error)


async def _follow(pieces: AsyncIterator[bytes], progress: "Progress", patience: trio.CancelScope) -> None:
    """See a line at a time of what the engine says, to the end: an error, too, is but a line."""
    rest = b""
    async for piece in pieces:
        patience.deadline = trio.current_time() + SILENCE_TIMEOUT
        *lines, rest = (rest + piece).split(b"\n")
        for line in lines:
            progress.see(line)
    progress.see(rest)


def _error(name: str, text: str, status: int = 0) -> NodeError:
    is_limit = status == TOO_MANY_REQUESTS or RATE_LIMITED in text
    return (RateLimitedError if is_limit else NodeError)(f"the image {name} could not be pulled: {text}")


class Progress:
    """How far a pull is; says so now and then."""

    def __init__(self, name: str) -> None:
        self.error = ""  # the engine's words
        self._name = name
        self._layers: dict[str, tuple[int, int]] = {}
        self._reported = trio.current_time()

    def see(self, line: bytes) -> None:
        """See what the engine says, mostly of a layer."""
        if not line.strip():
            return
        try:
            said = json.loads(line)
            self.error = self.error or str(said.get("error") or "")
            self._count(said)
        except (ValueError, TypeError, AttributeError):
            self.error = self.error or f"the engine says {line[:SHOWN]!r}"

    def _count(self, said: Mapping[str, Any]) -> None:
        detail = said.get("progressDetail") or {}
        if said.get("status") == "Downloading" and detail.get("total"):
            self._layers[str(said.get("id"))] = int(detail.get("current", 0)), int(detail["total"])
        if trio.current_time() >= self._reported + REPORT_INTERVAL:
            self._reported = trio.current_time()
            current, total = (sum(layer[index] for layer in self._layers.values()) / 2**20 for index in (0, 1))
            LOGGER.info("pulling %s: %.0f of %.0f MiB, %s", self._name, current, total, said.get("status", "going on"))
