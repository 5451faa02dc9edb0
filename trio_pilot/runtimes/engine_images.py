"""Images at an engine: found, or pulled by the engine."""

import json
import math
import random
import re
from collections.abc import AsyncIterator, Iterator, Mapping
from typing import Any
from urllib.parse import quote

import trio

from trio_pilot.errors import NodeError, map_exceptions
from trio_pilot.files.blocking_calls import BlockingCalls
from trio_pilot.log import LOGGER
from trio_pilot.runtimes.engine_api import SHOWN, EngineApi, EngineAwayError, EngineRefusedError
from trio_pilot.runtimes.engine_dialect import Dialect
from trio_pilot.runtimes.engine_outages import EngineOutages
from trio_pilot.runtimes.engine_registry_login import login_header

NOT_FOUND, TOO_MANY_REQUESTS = 404, 429

# What may be an image's id, as `docker images -q` prints it, or in full. Fewer digits are a name: any id may begin so.
MAYBE_ID = re.compile(r"[0-9a-f]{12,64}")

OF_A_REGISTRY = "docker://"  # how the name of a registry's image may begin, as for apptainer

RATE_LIMITED = "toomanyrequests"

MOST_OUTAGES = 5  # of an engine during a pull, each as long as its patience; more may be caused by the image


class RateLimitedError(NodeError):
    """The registry limits the rate of pulls."""


async def ready_image(outages: EngineOutages, dialect: Dialect, image: str) -> str:
    """Return the id of an image; pull the image if the engine does not have it.

    Raises:
        NodeError: the image cannot be pulled.
    """
    image = image.removeprefix(OF_A_REGISTRY)
    if not image or image.startswith((".", "/")):
        raise NodeError(f"the image {image} must be a name, such as debian:12: {dialect.name} runs no directories or files")
    with map_exceptions({UnicodeEncodeError: NodeError}, f"the image {image!r} must have a name in UTF-8"):
        image.encode()
    if MAYBE_ID.fullmatch(image) and (found := await find_image(outages, image)):
        return found
    name = tagged(image)
    found = await find_image(outages, name)
    if found is None:
        await _pull_patiently(outages, dialect, name)
        found = await find_image(outages, name)
    if found is None:
        raise NodeError(f"{dialect.name} has pulled the image {name}, and does not have it")
    return found


def tagged(image: str) -> str:
    """Return an image's name with its tag; without a tag, all tags of the image would be pulled."""
    has_tag = "@" in image or ":" in image.rpartition("/")[2]
    return image if has_tag else f"{image}:latest"


async def find_image(outages: EngineOutages, name: str) -> str | None:
    """Return the id of an image; None if the engine does not have it."""
    request, what = f"GET /images/{quote(name, safe='/:@')}/json", f"look for the image {name}"
    answer = await outages.retry(lambda: outages.api.call(request, what, accepted=[NOT_FOUND]))
    return None if answer.status == NOT_FOUND else answer.read(lambda image: str(image["Id"]))


async def image_config(outages: EngineOutages, name: str) -> Mapping[str, Any]:
    """Return what an image says about how it is run: `Entrypoint`, `Cmd`, `User` and so on, each of which may be missing."""
    request = f"GET /images/{quote(name, safe='/:@')}/json"
    answer = await outages.retry(lambda: outages.api.call(request, f"look for the command of the image {name}"))
    return answer.read(lambda image: dict(image["Config"] or {}))


async def _pull_patiently(outages: EngineOutages, dialect: Dialect, name: str) -> None:
    timeouts = outages.api.timeouts
    deadline, failures = trio.current_time() + timeouts.rate_limit, 0
    for pause in pauses(timeouts.first_pause, timeouts.longest_pause):
        try:
            await _pull(outages.api, dialect, name)
        except RateLimitedError as error:
            if trio.current_time() + pause > deadline:
                raise
            LOGGER.warning("%s; trying again in %.0f s", error, pause)
            await trio.sleep(pause)
        except EngineAwayError as error:
            failures += 1
            if failures > MOST_OUTAGES:
                raise
            await outages.wait_until_back(error)
        else:
            return


def pauses(first: float, longest: float) -> Iterator[float]:
    """Yield random pauses: the bound is `first` seconds, then twice as much each time, up to `longest`."""
    bound = first
    while True:
        yield bound * random.uniform(0.5, 1)  # noqa: S311
        bound = min(2 * bound, longest)


async def _pull(api: EngineApi, dialect: Dialect, name: str) -> None:
    LOGGER.info("%s pulls the image %s", dialect.name, name)
    silence = api.timeouts.pull_silence
    progress, path = PullProgress(name, api.timeouts.pull_report), f"{dialect.pull_prefix or api.prefix}/images/create"
    login = await BlockingCalls().call(math.inf, login_header, name)  # it may ask a helper program
    try:
        with trio.move_on_after(silence) as patience:
            async with api.stream("POST", path, f"pull the image {name}", headers=login, fromImage=name) as pieces:
                await _follow(pieces, progress, patience, silence)
    except EngineRefusedError as error:
        raise _error(name, error.message, error.status) from error
    if patience.cancelled_caught:
        raise _error(name, f"nothing has come for {silence:g} s")
    if progress.error:
        raise _error(name, progress.error)


async def _follow(
    pieces: AsyncIterator[bytes], progress: "PullProgress", patience: trio.CancelScope, silence: float
) -> None:
    """Read what the engine reports, line by line, to the end: an error is a line like others."""
    rest = b""
    async for piece in pieces:
        patience.deadline = trio.current_time() + silence
        *lines, rest = (rest + piece).split(b"\n")
        for line in lines:
            progress.read(line)
    progress.read(rest)


def _error(name: str, text: str, status: int = 0) -> NodeError:
    is_limit = status == TOO_MANY_REQUESTS or RATE_LIMITED in text
    return (RateLimitedError if is_limit else NodeError)(f"the image {name} could not be pulled: {text}")


class PullProgress:
    """The progress of a pull; logs it at intervals."""

    def __init__(self, name: str, interval: float) -> None:
        self.error = ""  # the engine's message
        self._name = name
        self._interval = interval
        self._layers: dict[str, tuple[int, int]] = {}
        self._reported = trio.current_time()

    def read(self, line: bytes) -> None:
        """Read a line of the engine's report; most are about a layer."""
        if not line.strip():
            return
        try:
            report = json.loads(line)
            self.error = self.error or str(report.get("error") or "")
            self._count(report)
        except (ValueError, TypeError, AttributeError):
            self.error = self.error or f"the engine says {line[:SHOWN]!r}"

    def _count(self, report: Mapping[str, Any]) -> None:
        detail = report.get("progressDetail") or {}
        if report.get("status") == "Downloading" and detail.get("total"):
            self._layers[str(report.get("id"))] = int(detail.get("current", 0)), int(detail["total"])
        if trio.current_time() >= self._reported + self._interval:
            self._reported = trio.current_time()
            current, total = (sum(layer[index] for layer in self._layers.values()) / 2**20 for index in (0, 1))
            LOGGER.info("pulling %s: %.0f of %.0f MiB, %s", self._name, current, total, report.get("status", "going on"))
