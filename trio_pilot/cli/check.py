"""`trio-pilot check`: what works with these settings, what does not, and how to cure it."""

import os
import shutil
import time
from collections.abc import AsyncIterator, Awaitable, Callable, Iterator, Sequence
from contextlib import AsyncExitStack, asynccontextmanager, suppress
from dataclasses import dataclass
from datetime import UTC, datetime
from functools import partial
from pathlib import Path
from typing import Any

import trio

from trio_pilot.allocation.resources import find_allocation, fitted
from trio_pilot.allocation.walltime import End, find_end
from trio_pilot.brokers import QueueAddress, open_sink, open_source, tokens
from trio_pilot.brokers.addresses import file_of
from trio_pilot.cli.signals import run_until_signalled
from trio_pilot.errors import BrokerError, NodeError, PilotError, SettingsError, leaves
from trio_pilot.files import disk_checks
from trio_pilot.files.data_directory import open_data_directory
from trio_pilot.files.filesystem import exists, is_directory, is_link
from trio_pilot.log import LOGGER
from trio_pilot.runtimes import OWN_ROOT, Runtime, bubblewrap, confinement
from trio_pilot.runtimes.selection import ENGINES, choose, open_runtime
from trio_pilot.settings import FIELDS, Settings, flag_of

LEAST_FREE = 100 * 10**6  # bytes on the disk of the data directory
SOON = 3600.0  # seconds that a token has still to live


class UntoldError(Exception):
    """There is nothing to look at, for a reason that another check tells."""


@dataclass(frozen=True, slots=True)
class Finding:
    """What one check has found."""

    what: str
    facts: str
    exit_code: int = 0

    def __str__(self) -> str:
        return f"{'FAIL' if self.exit_code else 'ok  '}  {self.what:<12}  {self.facts}"


@dataclass(frozen=True, slots=True)
class Check:
    """Something to look at: what it is, how to look (facts, or an error), and what helps if that fails."""

    what: str
    look: Callable[[], Awaitable[str]]
    cure: str

    async def make(self) -> Finding | None:
        """Look at it."""
        try:
            return Finding(self.what, await self.look())
        except UntoldError:
            return None
        except PilotError as error:
            return Finding(self.what, f"{error} → {self.cure}", error.exit_code)
        except ExceptionGroup as group:  # of the connections' nurseries
            errors, others = group.split(PilotError)
            if errors is None or others:
                raise
            first = next(leaves(errors))
            return Finding(self.what, f"{first} → {self.cure}", first.exit_code)


def check(load: Callable[[], Settings]) -> int:
    """Print a line for each thing that the pilot needs; give the exit code of the first that fails."""
    try:
        settings = load()
    except SettingsError as error:
        return _print([Finding("settings", f"{error} → correct it; the README lists all settings", error.exit_code)])
    LOGGER.setLevel("ERROR")  # what there is to say is said here
    return run_until_signalled(_check, settings)


async def _check(settings: Settings) -> int:
    """Look at everything at once, and tell it in order."""
    checks = _checks(settings)
    findings: dict[int, Finding] = {}

    async def make(number: int, one: Check) -> None:
        if finding := await one.make():
            findings[number] = finding

    async with trio.open_nursery() as nursery:
        for number, one in enumerate(checks):
            nursery.start_soon(make, number, one)
    return _print([findings[number] for number in sorted(findings)])


def _print(findings: Sequence[Finding]) -> int:
    for finding in findings:
        print(finding, flush=True)
    return next((finding.exit_code for finding in findings if finding.exit_code), 0)


def _checks(settings: Settings) -> list[Check]:
    incoming, outgoing = _queues(settings.incoming), _queues(settings.outgoing)
    tokens = [queue for queue in incoming + outgoing if queue.token]
    data_cure = "name another directory in EWMS_PILOT_DATA_DIR_PARENT_PATH_ON_HOST, or make room there"
    runtime_cure = "install it, or choose another in EWMS_PILOT_RUNTIME"
    limits_cure = "leave it out, or run where control groups may be made, or with docker or podman"
    image_cure = "correct it; docker and podman take a tag, bubblewrap and (as set) apptainer an unpacked directory"
    found_cure = "correct it, or name its directory in EWMS_PILOT_EXTERNAL_DIRECTORIES"
    return [
        Check("settings", partial(_settings, settings), "the README lists all settings"),
        *(
            Check("incoming", partial(_queue, open_source, queue, settings.lease), _broker_cure("INCOMING"))
            for queue in incoming
        ),
        *(Check("outgoing", partial(_queue, open_sink, queue), _broker_cure("OUTGOING")) for queue in outgoing),
        Check("slot", partial(_slot, settings), "correct it"),
        Check("runtime", partial(_runtime, settings), runtime_cure),
        Check("limits", partial(_limits, settings), limits_cure),
        *(Check(what, partial(_image, settings, image), image_cure) for what, image in _images(settings)),
        *(Check(what, partial(_command, settings, image, args), found_cure) for what, image, args in _commands(settings)),
        Check("data", partial(trio.to_thread.run_sync, _data, settings), data_cure),
        Check("clock", partial(trio.to_thread.run_sync, _clock, settings), "have the clocks of these machines set"),
        *(Check("token", partial(_token, queue), "get a new one, or set the clock") for queue in tokens),
    ]


async def _settings(settings: Settings) -> str:
    settings.check_complete()
    default = Settings()
    given = [name for name in FIELDS if getattr(settings, name) != getattr(default, name)]
    return ", ".join(map(flag_of, given))


async def _slot(settings: Settings) -> str:
    slot = find_allocation(os.environ)
    fit = fitted(settings, slot)
    memory = f", {fit.task_memory / 1e6:.0f} MB" if fit.task_memory else ""
    end = _end(settings)
    if end and end.is_too_soon(settings):
        raise SettingsError(f"it ends too soon for any task: {end}")
    until = f"; until {end}" if end else ""
    return f"{slot}: {fit.max_concurrent_tasks} task(s) at once, {fit.cpus_per_task:g} CPU(s){memory} each{until}"


def _end(settings: Settings) -> End | None:
    with suppress(SettingsError):  # which the check of the settings tells
        return find_end(settings, os.environ, time.time())
    return None


def _queues(find: Callable[[], list[QueueAddress]]) -> list[QueueAddress]:
    """Find the queues; where they are not told, the check of the settings says so."""
    with suppress(SettingsError):
        return find()
    return []


def _broker_cure(direction: str) -> str:
    return (
        f"see that the broker runs; correct EWMS_PILOT_QUEUE_{direction}[_BROKER_ADDRESS, _AUTH_TOKEN] or EWMS_PILOT_BROKER"
    )


async def _queue(open_queue: Callable[..., Any], queue: QueueAddress, lease: float = 0) -> str:
    if queue.kind.is_file:
        return await _queue_in_file(open_queue, queue)
    async with open_queue(queue, lambda _seconds: False) as found:
        await found.ready()
        warning = queue.kind.lease_warning(found, lease) if lease else ""
        return f"{queue.queue}, {queue.broker}{warning}"


async def _queue_in_file(open_queue: Callable[..., Any], queue: QueueAddress) -> str:
    file = file_of(queue.address)
    if not await trio.to_thread.run_sync(exists, file):  # which is no fault, and not ours to make
        if not os.access(file.parent, os.W_OK | os.X_OK):
            raise BrokerError(f"{queue.queue}: the queue file {file} cannot be made")
        return f"{queue.queue}, in the queue file {file}, which will be made"
    async with open_queue(queue, lambda _seconds: False) as found:
        await found.ready()
    return f"{queue.queue}, in the queue file {file}"


async def _runtime(settings: Settings) -> str:
    choice = await choose(settings.runtime, settings.task_image, settings.runtime_options)
    why = "as set" if settings.runtime != "auto" else "auto: it works"
    passed_over = "".join(f"; {name} does not: {fault}" for name, fault in choice.passed_over)
    return f"{choice.name} ({why}{passed_over})"


async def _limits(settings: Settings) -> str:
    """Tell what enforces each limit. Without limits there is nothing to tell."""
    settings = fitted(settings, find_allocation(os.environ))
    if settings.limits == confinement.NO_LIMITS:
        raise UntoldError
    try:
        choice = await choose(settings.runtime, settings.task_image, settings.runtime_options)
    except PilotError as error:
        raise UntoldError from error
    if choice.name in ENGINES:
        return f"by {choice.name}"
    by = await confinement.how(settings.limits)
    if missing := [f"--task-{kind}: {how}" for kind, how in by.items() if how.startswith(confinement.NOT_ENFORCED)]:
        raise NodeError("; ".join(missing))
    return ", ".join(f"{kind}: {how}" for kind, how in by.items())


@asynccontextmanager
async def _opened(settings: Settings) -> AsyncIterator[Runtime]:
    async with AsyncExitStack() as stack:
        opening = open_runtime(settings.runtime, settings.task_image, settings.runtime_options)
        try:
            runtime = await stack.enter_async_context(opening)
        except PilotError as error:
            raise UntoldError from error
        yield runtime


def _images(settings: Settings) -> list[tuple[str, str]]:
    has_init = settings.init_image or settings.init_args
    return [("image", settings.task_image), *([("init image", settings.init_image)] if has_init else [])]


async def _image(settings: Settings, image: str) -> str:
    async with _opened(settings) as runtime:
        await runtime.prepare(image)
        if runtime.name == "process":
            return f"{image or 'none'}: not used, the process runtime has no images"
        return "/, this machine's own root" if image in OWN_ROOT else image


def _commands(settings: Settings) -> list[tuple[str, str, tuple[str, ...]]]:
    task = ("command", settings.task_image, settings.task_args)
    init = ("init command", settings.init_image, settings.init_args)
    return [one for one in (task, init) if one[2]]


async def _command(settings: Settings, image: str, args: Sequence[str]) -> str:
    name = args[0]
    if "{{" in name:
        return f"{name}: only a task can tell"
    async with _opened(settings) as runtime:
        contained = runtime.mounts
        try:
            await runtime.prepare(image)
        except PilotError as error:
            raise UntoldError from error
    root = Path("/") if image in OWN_ROOT or not contained else Path(image)
    if runtime.engine or not await trio.to_thread.run_sync(is_directory, root):
        return f"{name}: only the image knows"
    found = next((place for place in _places(name, root) if _is_there(place, root, settings, contained=contained)), None)
    if not found:
        raise NodeError(f"{name} is not there, as the container will see it")
    return f"{found}"


def _places(name: str, root: Path) -> Iterator[Path]:
    """List where a command may be, as the container sees it. Its working directory is new and empty."""
    if name.startswith("/"):
        yield Path(name)
    elif "/" not in name:
        path = os.environ.get("PATH", os.defpath) if root == Path("/") else bubblewrap.PATH
        yield from (Path(directory, name) for directory in path.split(":") if directory.startswith("/"))


def _is_there(place: Path, root: Path, settings: Settings, *, contained: bool) -> bool:
    if not contained or any(place.is_relative_to(one) for one in settings.external_directories):
        return os.access(place, os.X_OK) and place.is_file()
    if place.parts[1] in bubblewrap.ITS_OWN:
        return False
    there = root / place.relative_to("/")
    # A link in an image may be meant for its own root: that cannot be followed from here.
    return is_link(there) or (os.access(there, os.X_OK) and there.is_file())


def _data(settings: Settings) -> str:
    with open_data_directory(settings.data_dir_parent_path_on_host, settings.external_directories) as data_directory:
        root = data_directory.root
        disk_checks.check_writable(root)
        free = shutil.disk_usage(root).free
    if free < LEAST_FREE:
        raise NodeError(f"{root} has {free / 1e6:.0f} MB free, fewer than {LEAST_FREE / 1e6:.0f} MB")
    return f"{root}, {free / 1e9:.1f} GB free"


def _clock(settings: Settings) -> str:
    skew = disk_checks.clock_skew(settings.data_dir_parent_path_on_host)
    return f"{datetime.now(UTC):%Y-%m-%d %H:%M:%S} UTC, the data directory's within {abs(skew):.0f} s"


async def _token(queue: QueueAddress) -> str:
    """Tell how long a token is good, where it is a JWT. It is the broker who checks whether it is genuine."""
    claims, now = tokens.claims(await tokens.current(queue.token)), time.time()
    begins, ends = (claims.get(name) for name in ("nbf", "exp"))
    if isinstance(begins, int | float) and begins > now + disk_checks.MOST_SKEW:
        raise BrokerError(f"the token of {queue.queue} is good in {_span(begins - now)} only")
    if not isinstance(ends, int | float):
        return f"{queue.queue}: it does not say how long it is good"
    if ends <= now:
        raise BrokerError(f"the token of {queue.queue} has expired {_span(now - ends)} ago")
    soon = ": soon" if ends < now + SOON else ""
    return f"{queue.queue}: good for {_span(ends - now)}{soon}"


def _span(seconds: float) -> str:
    return f"{seconds / 3600:.1f} h" if seconds >= 2 * 3600 else f"{seconds / 60:.0f} min"
