"""`trio-pilot check`: check what works with these settings and what does not, and print how to correct it."""

import os
import time
from collections.abc import Callable, Sequence
from contextlib import suppress
from functools import partial
from typing import Any

import trio

from trio_pilot.brokers import QueueAddress, open_sink, open_source, tokens
from trio_pilot.brokers.addresses import file_of
from trio_pilot.cli.check_containers import container_checks
from trio_pilot.cli.check_finding import Check, Finding
from trio_pilot.cli.check_node import allocation_check, data_checks, user_check
from trio_pilot.cli.signals import run_until_signalled
from trio_pilot.errors import BrokerError, SettingsError
from trio_pilot.files import disk_checks
from trio_pilot.files.filesystem import exists
from trio_pilot.log import LOGGER, indented
from trio_pilot.processes import threads
from trio_pilot.settings import FIELDS, Settings, flag_of

EXPIRES_SOON = 3600.0  # seconds before the expiry of a token


def check(load: Callable[[], Settings]) -> int:
    """Print a line for each thing that the pilot needs; return the exit code of the first that fails."""
    try:
        settings = load()
    except SettingsError as error:
        return _print([Finding("settings", f"{error} → correct it; the README lists all settings", error.exit_code)])
    LOGGER.setLevel("ERROR")  # the findings say what the log would
    return run_until_signalled(_check, settings)


async def _check(settings: Settings) -> int:
    """Run all checks at once, and print their findings in order."""
    checks = _checks(settings)
    findings: dict[int, Finding] = {}

    async def run(number: int, one: Check) -> None:
        if finding := await one.run():
            findings[number] = finding

    async with trio.open_nursery() as nursery:
        for number, one in enumerate(checks):
            nursery.start_soon(run, number, one)
    return _print([findings[number] for number in sorted(findings)])


def _print(findings: Sequence[Finding]) -> int:
    for finding in findings:
        print(indented(str(finding)), flush=True)
    return next((finding.exit_code for finding in findings if finding.exit_code), 0)


def _checks(settings: Settings) -> list[Check]:
    incoming, outgoing = _queues(settings.incoming), _queues(settings.outgoing)
    tokens = [queue for queue in incoming + outgoing if queue.token]
    return [
        Check("settings", partial(_settings, settings), "the README lists all settings"),
        *(
            Check("incoming", partial(_queue, open_source, queue, settings.lease), _broker_cure("INCOMING"))
            for queue in incoming
        ),
        *(Check("outgoing", partial(_queue, open_sink, queue), _broker_cure("OUTGOING")) for queue in outgoing),
        allocation_check(settings),
        user_check(),
        *container_checks(settings),
        *data_checks(settings),
        *(Check("token", partial(_token, queue), "get a new one, or set the clock") for queue in tokens),
    ]


async def _settings(settings: Settings) -> str:
    settings.check_complete()
    default = Settings()
    changed = [name for name in FIELDS if getattr(settings, name) != getattr(default, name)]
    return ", ".join(map(flag_of, changed))


def _queues(find: Callable[[], list[QueueAddress]]) -> list[QueueAddress]:
    """Return the queues, or none if they are not set, which the check of the settings reports."""
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
    if not await threads.run_sync(exists, file):  # no fault: the pilot makes it
        if not os.access(file.parent, os.W_OK | os.X_OK):
            raise BrokerError(f"{queue.queue}: the queue file {file} cannot be made")
        return f"{queue.queue}, in the queue file {file}, which will be made"
    async with open_queue(queue, lambda _seconds: False) as found:
        await found.ready()
    return f"{queue.queue}, in the queue file {file}"


async def _token(queue: QueueAddress) -> str:
    """Return how long a token is valid, if it is a JWT. Only the broker can check that it is genuine."""
    claims, now = tokens.claims(await tokens.current(queue.token)), time.time()
    begins, ends = (claims.get(name) for name in ("nbf", "exp"))
    if isinstance(begins, int | float) and begins > now + disk_checks.MOST_SKEW:
        raise BrokerError(f"the token of {queue.queue} is not valid before {_span(begins - now)} from now")
    if not isinstance(ends, int | float):
        return f"{queue.queue}: has no time of expiry that can be read"
    if ends <= now:
        raise BrokerError(f"the token of {queue.queue} has expired {_span(now - ends)} ago")
    soon = ", soon" if ends < now + EXPIRES_SOON else ""
    return f"{queue.queue}: expires in {_span(ends - now)}{soon}"


def _span(seconds: float) -> str:
    return f"{seconds / 3600:.1f} h" if seconds >= 2 * 3600 else f"{seconds / 60:.0f} min"
