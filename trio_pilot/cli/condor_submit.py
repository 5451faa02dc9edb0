"""`trio-pilot condor-submit`: the description of an HTCondor job that runs pilots."""

import math
import os
import re
import sys
import zipfile
from collections.abc import Collection, Iterable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

from trio_pilot.brokers.kinds import WITH_SCHEMES
from trio_pilot.brokers.tokens import is_file
from trio_pilot.errors import SettingsError
from trio_pilot.files import filesystem
from trio_pilot.parsing import AUTO, size
from trio_pilot.settings import CONFIG_FILE, FIELDS, PREFIX, Settings, environment, flag_of, variables_of

# How a hold is told from others: by the pilot's exit code, or this.
SILENT = 100
LEAST_SILENCE = 900  # seconds without a report from a pilot whose tasks run: it tells how long they have

# A pilot that was killed is tried again, one that has ended by itself not.
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

RELEASE_AFTER, MOST_STARTS = 600, 10  # seconds that what may pass is waited for, and how many starts there are in all
VACATE_TIME = 60  # seconds that are asked for between SIGTERM and SIGKILL; the pilot finds out what it gets

CRON_FIELD = re.compile(r"[0-9*/,-]+")  # HTCondor's manual, "CronTab Scheduling": numbers only, no names
CRON_FIELDS = "minute", "hour", "day_of_month", "month", "day_of_week"

ADDRESSES = "broker", "queue_incoming_broker_address", "queue_outgoing_broker_address"  # secret if with a password
TOKENS = "broker_token", "queue_incoming_auth_token", "queue_outgoing_auth_token"

HEADER = """\
# Pilots for HTCondor, described by `trio-pilot condor-submit`; to be given to condor_submit.
batch_name = trio-pilot
log = trio-pilot-$(Cluster).log
output = trio-pilot-$(Cluster).$(Process).out
error = trio-pilot-$(Cluster).$(Process).err
should_transfer_files = YES
when_to_transfer_output = ON_EXIT
transfer_output_files = ""
"""

# Attributes are what the pilot reports by chirp, those of its latest start.
ENDS = """\
# SIGTERM gives back what is not done.
+WantIOProxy = true
kill_sig = SIGTERM
want_graceful_removal = true
job_max_vacate_time = {grace}

# 2, settings, and 70, a defect, are for you to look at; 3, no broker, and 4, a bad machine, may pass.
on_exit_hold = ExitBySignal =?= false && member(ExitCode, {{2, 3, 4, 70}})
on_exit_hold_subcode = ExitCode
on_exit_hold_reason = HTChirpEWMSPilotError ?: strcat("trio-pilot ended with exit code ", ExitCode)
periodic_hold = JobStatus == 2 && HTChirpEWMSPilotStatus =?= "Tasking" \\
    && HTChirpEWMSPilotStartedTimestamp > JobCurrentStartDate - 60 \\
    && time() - HTChirpEWMSPilotLastUpdatedTimestamp > {silence}
periodic_hold_subcode = {silent}
periodic_hold_reason = "no report from the pilot for {silence} s, though its tasks run"
periodic_release = HoldReasonCode == 3 && member(HoldReasonSubCode, {{3, 4, {silent}}}) \\
    && NumJobStarts < {most_starts} && time() - EnteredCurrentStatus > {release_after}
# Not on the same bad machine again.
job_machine_attrs = Machine
requirements = MY.LastHoldReasonSubCode =!= 4 || TARGET.Machine =!= MY.MachineAttrMachine0
"""


@dataclass(frozen=True)
class Request:
    """What is asked of HTCondor."""

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
    """Print it.

    Raises:
        SettingsError: something is missing or wrong, or would be shown to everybody who can look at the job.
    """
    settings.check_complete()
    for queue in settings.incoming() + settings.outgoing():
        if queue.kind.is_file:
            example = WITH_SCHEMES[0].example
            raise SettingsError(f"queue {queue.queue} is in a file of this machine: name a broker, as in --broker {example}")
    variables = dict(_variables(settings, flags, environment(os.environ, Path.cwd())))
    lines = list(_description(settings, variables, request))
    print("\n".join(lines))
    return 0


def _description(settings: Settings, variables: Mapping[str, str], request: Request) -> Iterator[str]:
    yield HEADER
    yield from _what(request)
    yield f'environment = "{" ".join(_assigned(name, value) for name, value in variables.items())}"'
    if files := _files([*_config(settings), *_token_files(settings), *request.transfer]):
        yield f"transfer_input_files = {', '.join(files)}"
    yield f"request_cpus = {request.cpus}"
    yield f"request_memory = {_bytes('--memory', request.memory, 2**20)}"
    yield f"request_disk = {_bytes('--disk', request.disk, 2**10)}"
    if request.time:
        yield f"+OriginalTime = {math.ceil(request.time)}"
    yield ""
    yield ENDS.format(
        grace=VACATE_TIME if settings.grace == AUTO else math.ceil(settings.grace + settings.last_steps),
        silence=math.ceil(max(LEAST_SILENCE, 10 * settings.htchirp_ratelimit_interval)),
        silent=SILENT,
        most_starts=MOST_STARTS,
        release_after=RELEASE_AFTER,
    )
    yield _again(request.cron)
    yield f"queue {request.pilots}"


def _what(request: Request) -> Iterator[str]:
    executable = request.executable
    if request.container_image:
        yield f"universe = container\ncontainer_image = {request.container_image}"
        if "://" not in request.container_image and not request.container_image.endswith(".sif"):
            yield "transfer_container = false"  # a directory: HTCondor could not transfer the links in it
    elif not executable:
        if not zipfile.is_zipfile(sys.argv[0]):
            raise SettingsError("--executable must name trio-pilot as one file (`python -m onefile` makes it)")
        executable = Path(sys.argv[0])
    if executable:
        yield f"executable = {_existing(executable)}"


def _bytes(flag: str, raw: str, unit: int) -> int:
    try:
        return math.ceil(size(raw) / unit)
    except ValueError as error:
        raise SettingsError(f"{flag} {error}, not {raw!r}") from None


def _again(cron: str) -> str:
    """Tell when a pilot that has ended is started again."""
    if not cron:
        return RETRIES
    fields = cron.split()
    if len(fields) != len(CRON_FIELDS) or not all(map(CRON_FIELD.fullmatch, fields)):
        raise SettingsError(f"--cron must be five fields as in a crontab, such as '*/30 * * * *', not {cron!r}")
    times = "".join(f"cron_{name} = {field}\n" for name, field in zip(CRON_FIELDS, fields, strict=True))
    return times + CRON


def _config(settings: Settings) -> list[Path]:
    """Find the file of settings, if there is one; it keeps its mode where it goes."""
    if settings.config:
        return [settings.config]
    return [Path(CONFIG_FILE)] if Path(CONFIG_FILE).exists() else []


def _tokens(settings: Settings) -> Iterator[tuple[str, tuple[str, ...]]]:
    """Name the settings whose tokens are in files."""
    for name in TOKENS:
        value = getattr(settings, name)
        tokens = (value,) if isinstance(value, str) else value
        if any(map(is_file, tokens)):
            if any(map(_is_token, tokens)):
                raise SettingsError(f"{flag_of(name)} must have all tokens in files (@/FILE), or none")
            yield name, tokens


def _token_files(settings: Settings) -> list[Path]:
    return [Path(token[1:]) for _, tokens in _tokens(settings) for token in tokens if is_file(token)]


def _files(files: Iterable[Path]) -> Collection[str]:
    """Give the paths of files whose names will tell them apart in the job."""
    paths = dict.fromkeys(map(_existing, files))
    if len({Path(path).name for path in paths}) < len(paths):
        raise SettingsError(f"two files that are to go with the job have the same name: {', '.join(paths)}")
    return paths


def _variables(settings: Settings, flags: Mapping[str, Any], environ: Mapping[str, str]) -> Iterator[tuple[str, str]]:
    """Give what flags and variables say; what the file of settings says goes with it."""
    yield f"{PREFIX}HTCHIRP", "true"
    yield f"{PREFIX}MAX_CONCURRENT_TASKS", "auto"
    for name in [name for name in FIELDS if name != "config"]:
        said = {flag_of(name): flags.get(name)} | {variable: environ.get(variable) for variable in variables_of(name)}
        for label, raw in [(label, raw) for label, raw in said.items() if raw not in (None, "")][:1]:
            _refuse_secret(name, label, str(raw))
            yield variables_of(name)[0], str(raw)
    for name, tokens in _tokens(settings):
        yield variables_of(name)[0], ";".join(f"@./{Path(token).name}" if is_file(token) else "" for token in tokens)
    if settings.config:
        yield f"{PREFIX}CONFIG", settings.config.name


def _refuse_secret(name: str, label: str, raw: str) -> None:
    tells = {**dict.fromkeys(ADDRESSES, _has_password), **dict.fromkeys(TOKENS, _is_token)}.get(name, bool)
    if not FIELDS[name].metadata["secret"] or not any(map(tells, raw.split(";"))):
        return
    raise SettingsError(
        f"{label} may be secret, and the environment of a job is not: say it in {CONFIG_FILE}, which goes with the job"
    )


def _is_token(word: str) -> bool:
    return bool(word) and not is_file(word)


def _has_password(address: str) -> bool:
    try:
        return bool(urlsplit(address if "://" in address else f"//{address}").password)
    except ValueError:  # who knows
        return True


def _assigned(name: str, value: str) -> str:
    """Write a variable as condor_submit's manual says, and no macro in it."""
    if "\n" in value:
        raise SettingsError(f"{name} has a line break, which no job takes: say it in {CONFIG_FILE}")
    quoted = value.replace("'", "''").replace('"', '""').replace("$", "$(DOLLAR)")
    return f"{name}='{quoted}'"


def _existing(file: Path) -> str:
    if not filesystem.is_file(file):
        raise SettingsError(f"there is no file {file} to go with the job")
    return str(file.absolute())
