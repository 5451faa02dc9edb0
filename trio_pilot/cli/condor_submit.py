"""`trio-pilot condor-submit`: print a submit file of HTCondor jobs that run pilots."""

import math
import os
import re
import sys
import zipfile
from collections.abc import Collection, Iterable, Iterator, Mapping
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

from trio_pilot.brokers.addresses import may_have_secret
from trio_pilot.brokers.kinds import WITH_SCHEMES
from trio_pilot.brokers.tokens import is_file
from trio_pilot.condor import destinations, reporter
from trio_pilot.errors import SettingsError
from trio_pilot.files import filesystem
from trio_pilot.parsing import AUTO, size
from trio_pilot.settings import CONFIG_FILE, FIELDS, PREFIX, TOKENS, Settings, environment, flag_of, variables_of

# The subcode of a hold is the pilot's exit code, or this if the pilot has stopped reporting.
SILENT = 100
LEAST_SILENCE = 900  # seconds without a report, after which a pilot whose tasks run is held

# A pilot that was killed is started again; one that has ended by itself is not.
RETRIES = """\
success_exit_code = 0
max_retries = 3
retry_until = ExitBySignal =?= false && ExitCode < 128
"""
CRON = """\
cron_window = 300
cron_prep_time = 60
on_exit_remove = false
"""

RELEASE_AFTER, MAX_STARTS = 600, 10  # seconds on hold for a reason that may pass, and starts of a job in all
VACATE_TIME = 60  # seconds between SIGTERM and SIGKILL that are requested; the pilot finds out how many it gets

CRON_FIELD = re.compile(r"[0-9*/,-]+")  # HTCondor's manual, "CronTab Scheduling": numbers only, no names
CRON_FIELDS = "minute", "hour", "day_of_month", "month", "day_of_week"

ADDRESSES = "broker", "queue_incoming_broker_address", "queue_outgoing_broker_address"
WITH_PASSWORD = re.compile(r"://[^/@\s]*:[^/@\s]+@")  # a URL
EVALUATED = re.compile(r"[$`\\]")  # by a shell, in double quotes

HEADER = """\
# Pilots for HTCondor, made by `trio-pilot condor-submit`, for condor_submit.
batch_name = trio-pilot
log = trio-pilot-$(Cluster).log
output = trio-pilot-$(Cluster).$(Process).out
error = trio-pilot-$(Cluster).$(Process).err
should_transfer_files = YES
when_to_transfer_output = ON_EXIT
transfer_output_files = ""
"""

PROXY = "+WantIOProxy = true"

# The attributes are those that the pilot reports by chirp, from its latest start. One that was suspended could not report.
ENDS = """\
# After SIGTERM the pilot gives unfinished events back.
kill_sig = SIGTERM
want_graceful_removal = true
job_max_vacate_time = {grace}

# 2 (settings) and 70 (a defect) need a correction; 3 (no broker) and 4 (a bad machine) may pass.
on_exit_hold = ExitBySignal =?= false && member(ExitCode, {{2, 3, 4, 70}})
on_exit_hold_subcode = ExitCode
on_exit_hold_reason = {error} ?: strcat("trio-pilot ended with exit code ", ExitCode)
periodic_hold = JobStatus == 2 && {status} =?= "Tasking" \\
    && {started} > JobCurrentStartDate - 60 \\
    && time() - {updated} > {silence} + (CumulativeSuspensionTime ?: 0)
periodic_hold_subcode = {silent}
periodic_hold_reason = "no report from the pilot for {silence} s, though its tasks run"
periodic_release = HoldReasonCode == 3 && member(HoldReasonSubCode, {{3, 4, {silent}}}) \\
    && NumJobStarts < {max_starts} && time() - EnteredCurrentStatus > {release_after}
# The next start is not on the same bad machine.
job_machine_attrs = Machine
requirements = MY.LastHoldReasonSubCode =!= 4 || TARGET.Machine =!= MY.MachineAttrMachine0
"""


@dataclass(frozen=True)
class Request:
    """What to request from HTCondor."""

    pilots: int
    cpus: int
    memory: str
    disk: str
    time: float | None  # seconds
    executable: Path | None
    container_image: str
    cron: str
    transfer: tuple[Path, ...]


def condor_submit(settings: Settings, flags: Mapping[str, Any], request: Request) -> int:
    """Print the submit file.

    Raises:
        SettingsError: a setting is missing or wrong, or is secret and would be visible to all who can see the job.
    """
    settings.check_complete()
    for queue in settings.incoming() + settings.outgoing():
        if queue.kind.is_file:
            example = WITH_SCHEMES[0].example
            raise SettingsError(f"queue {queue.queue} is in a file of this machine: name a broker, as in --broker {example}")
    variables = dict(_variables(settings, flags, environment(os.environ, Path.cwd())))
    if request.container_image:
        _refuse_evaluated(variables)
        if WITH_PASSWORD.search(request.container_image):
            raise SettingsError("--container-image has a password in it, and a job can be seen by all: name it without")
    lines = list(_submit_file(settings, variables, request))
    print("\n".join(lines))
    return 0


def _submit_file(settings: Settings, variables: Mapping[str, str], request: Request) -> Iterator[str]:
    yield HEADER
    yield from _program(request)
    yield f'environment = "{" ".join(_assigned(name, value) for name, value in variables.items())}"'
    if files := _files([*_config(settings), *settings.token_files, *request.transfer]):
        yield f"transfer_input_files = {', '.join(files)}"
    yield f"request_cpus = {request.cpus}"
    yield f"request_memory = {_bytes('--memory', request.memory, 2**20)}"
    yield f"request_disk = {_bytes('--disk', request.disk, 2**10)}"
    if request.time:
        yield f"+OriginalTime = {math.ceil(request.time)}"
    yield ""
    if settings.htchirp_dest != destinations.DELAYED:
        yield PROXY
    yield _ends(settings)
    yield _restarts(request.cron)
    yield f"queue {request.pilots}"


def _ends(settings: Settings) -> str:
    """Return the lines that say how a pilot is ended, and what becomes of one that has ended or reports nothing."""
    name_of = partial(destinations.name_at, settings.htchirp_dest)
    return ENDS.format(
        error=name_of(reporter.ERROR),
        status=name_of(reporter.STATUS),
        started=name_of(reporter.STARTED),
        updated=name_of(reporter.LAST_UPDATED),
        grace=VACATE_TIME if settings.grace == AUTO else math.ceil(settings.grace + settings.shutdown_time),
        silence=_silence(settings),
        silent=SILENT,
        max_starts=MAX_STARTS,
        release_after=RELEASE_AFTER,
    )


def _silence(settings: Settings) -> int:
    """Return the seconds without a report in the queue, after which a pilot whose tasks run is held."""
    delay = destinations.LONGEST_DELAY if settings.htchirp_dest == destinations.DELAYED else 0
    return math.ceil(max(LEAST_SILENCE, 10 * settings.htchirp_ratelimit_interval) + delay)


def _program(request: Request) -> Iterator[str]:
    executable = request.executable
    if request.container_image:
        yield f"universe = container\ncontainer_image = {request.container_image}"
        if "://" not in request.container_image and not request.container_image.endswith(".sif"):
            yield "transfer_container = false"  # a directory: HTCondor cannot transfer the links in it
    elif not executable:
        if not zipfile.is_zipfile(sys.argv[0]):
            raise SettingsError("--executable must name trio-pilot as one file (`python -m onefile` makes it)")
        executable = Path(sys.argv[0])
    if executable:
        yield f"executable = {_absolute(executable)}"


def _bytes(flag: str, raw: str, unit: int) -> int:
    try:
        return math.ceil(size(raw) / unit)
    except ValueError as error:
        raise SettingsError(f"{flag} {error}, not {raw!r}") from None


def _restarts(cron: str) -> str:
    """Return the lines that say when a pilot that has ended is started again."""
    if not cron:
        return RETRIES
    fields = cron.split()
    if len(fields) != len(CRON_FIELDS) or not all(map(CRON_FIELD.fullmatch, fields)):
        raise SettingsError(f"--cron must be five fields as in a crontab, such as '*/30 * * * *', not {cron!r}")
    times = "".join(f"cron_{name} = {field}\n" for name, field in zip(CRON_FIELDS, fields, strict=True))
    return times + CRON


def _config(settings: Settings) -> list[Path]:
    """Return the file of settings, if there is one. HTCondor transfers its mode as well."""
    if settings.config:
        return [settings.config]
    return [Path(CONFIG_FILE)] if Path(CONFIG_FILE).exists() else []


def _tokens_in_files(settings: Settings) -> Iterator[tuple[str, tuple[str, ...]]]:
    """Yield each setting whose tokens are in files, with the tokens."""
    for name in TOKENS:
        tokens = settings.tokens_of(name)
        if any(map(is_file, tokens)):
            if any(map(_is_token, tokens)):
                raise SettingsError(f"{flag_of(name)} must have all tokens in files (@/FILE), or none")
            yield name, tokens


def _files(files: Iterable[Path]) -> Collection[str]:
    """Return the absolute paths of files. Raises SettingsError if two of them would have the same name in the job."""
    paths = dict.fromkeys(map(_absolute, files))
    if len({Path(path).name for path in paths}) < len(paths):
        raise SettingsError(f"two files to transfer with the job have the same name: {', '.join(paths)}")
    return paths


def _variables(settings: Settings, flags: Mapping[str, Any], environ: Mapping[str, str]) -> Iterator[tuple[str, str]]:
    """Yield the variables of settings given by flags and variables; those of the file of settings are transferred in it."""
    yield f"{PREFIX}HTCHIRP", "true"
    yield f"{PREFIX}MAX_CONCURRENT_TASKS", "auto"
    for name in [name for name in FIELDS if name != "config"]:
        given = {flag_of(name): flags.get(name)} | {variable: environ.get(variable) for variable in variables_of(name)}
        for label, raw in [(label, raw) for label, raw in given.items() if raw not in (None, "")][:1]:
            _refuse_secret(name, label, str(raw))
            yield variables_of(name)[0], str(raw)
    for name, tokens in _tokens_in_files(settings):
        yield variables_of(name)[0], ";".join(f"@./{Path(token).name}" if is_file(token) else "" for token in tokens)
    if settings.config:
        yield f"{PREFIX}CONFIG", settings.config.name


def _refuse_evaluated(variables: Mapping[str, str]) -> None:
    """Refuse values that apptainer would change before a pilot in an image sees them: it evaluates each as a shell does."""
    for name, value in variables.items():
        if found := EVALUATED.search(value):
            raise SettingsError(
                f"{name} has {found[0]!r}, which apptainer would evaluate in a variable: put the setting into {CONFIG_FILE}"
            )


def _refuse_secret(name: str, label: str, raw: str) -> None:
    """Refuse a value that may be secret: of a setting that is, or a URL with a password in any other."""
    is_secret = {**dict.fromkeys(ADDRESSES, may_have_secret), **dict.fromkeys(TOKENS, _is_token)}.get(name, bool)
    may_be_secret = FIELDS[name].metadata["secret"] and any(is_secret(word) for word in raw.split(";") if word)
    if may_be_secret or WITH_PASSWORD.search(raw):
        raise SettingsError(
            f"{label} may be secret, and the environment of a job is not:"
            f" set it in {CONFIG_FILE}, which is transferred with the job"
        )


def _is_token(word: str) -> bool:
    return bool(word) and not is_file(word)


def _assigned(name: str, value: str) -> str:
    """Return a variable quoted as the manual of condor_submit says, with no macro in it."""
    if "\n" in value:
        raise SettingsError(f"{name} has a line break, which the environment of a job cannot have: set it in {CONFIG_FILE}")
    quoted = value.replace("'", "''").replace('"', '""').replace("$", "$(DOLLAR)")
    return f"{name}='{quoted}'"


def _absolute(file: Path) -> str:
    if not filesystem.is_file(file):
        raise SettingsError(f"there is no file {file} to transfer with the job")
    return str(file.absolute())
