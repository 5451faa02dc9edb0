"""The command line: subcommands and flags. Nothing else imports cyclopts, which takes half as long as Trio."""

import dataclasses
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, TypeAlias, get_type_hints

from cyclopts import App, CycloptsError, Group, Parameter
from cyclopts.validators import Number

from trio_pilot import __version__
from trio_pilot.cli.load_settings import load_settings
from trio_pilot.errors import SettingsError, UsageError
from trio_pilot.settings import FIELDS, Settings, flag_of, sections

# What sending and receiving need of the settings, and the demo.
BROKER_FLAGS = ("broker", "broker_token", "broker_patience", "wire", "max_payload", "config", "cl_log")
LETTER_FLAGS = (*BROKER_FLAGS, "dead_letter_directory", "data_dir_parent_path_on_host")
DEMO_FLAGS = ("runtime", "max_concurrent_tasks", "cl_log")

HELP = """Take events from a queue, run one container per event, send its output, and only then acknowledge.

Without a command it is `run`, whose settings may all be in the environment: `trio-pilot run --help` lists them."""

app = App(name="trio-pilot", help=HELP, version=__version__, help_format="plaintext", suppress_keyboard_interrupt=False)


def _flags_class(names: Iterable[str]) -> Any:
    """Make flags of settings; they are parsed where all other sources of settings are."""
    hints = get_type_hints(Settings)
    groups = {section: Group.create_ordered(section) for section, _ in sections()}
    fields = [
        (name, Annotated[(bool if hints[name] is bool else str) | None, _flag(name, groups[section])], None)
        for section, name in sections()
        if name in names
    ]
    # cyclopts takes the fields of a class apart only if it is not of the standard library's `types`.
    flags = dataclasses.make_dataclass("Flags", fields, frozen=True, namespace={"__module__": __name__})
    return Annotated[flags | None, Parameter(name="*")]


def _flag(name: str, group: Group) -> Parameter:
    facts = FIELDS[name].metadata
    default = f" [{facts['default']}]" if facts["default"] else ""
    return Parameter(
        name=flag_of(name),
        help=f"{facts['meaning']}{default}",
        group=group,
        metavar="VALUE",
        allow_leading_hyphen=True,
        show_default=False,
        show_env_var=False,
    )


if TYPE_CHECKING:
    AllFlags: TypeAlias = Any
    BrokerFlags: TypeAlias = Any
    LetterFlags: TypeAlias = Any
    DemoFlags: TypeAlias = Any
else:
    AllFlags = _flags_class(FIELDS)
    BrokerFlags = _flags_class(BROKER_FLAGS)
    LetterFlags = _flags_class(LETTER_FLAGS)
    DemoFlags = _flags_class(DEMO_FLAGS)


@app.command
def run(*, flags: AllFlags = None) -> int:
    """Run the pilot: take events until the queue stays empty.

    A setting comes from its flag, its variable (`--task-args` is EWMS_PILOT_TASK_ARGS), a TOML file (task_args), or its
    default in brackets. The README has the whole table.
    """
    from trio_pilot.cli.run import run

    return run(_settings(flags))


@app.command
def send(
    queue: str,
    files: Annotated[tuple[str, ...], Parameter(allow_leading_hyphen=True, show_default=False)] = (),
    /,
    *,
    lines: Annotated[bool, Parameter(negative="", show_default=False)] = False,
    flags: BrokerFlags = None,
) -> int:
    """Send events to a queue.

    Parameters
    ----------
    queue
        Name of the queue.
    files
        Each file is one event: .json as its value, text as text, anything else as bytes.
        `-` (the default) is stdin: an event, as JSON, on each line; a .jsonl file is read so too.
    lines
        Read every file as JSON lines.
    """
    from trio_pilot.cli.send import send

    for name in files:
        if name.startswith("-") and name != "-":
            raise SettingsError(f"Unknown option: {name}.")
    return send(_settings(flags), queue, files or ("-",), lines=lines)


@app.command
def receive(
    queue: str,
    /,
    *,
    to: Annotated[Path | None, Parameter(metavar="DIRECTORY")] = None,
    count: Annotated[int | None, Parameter(metavar="NUMBER")] = None,
    idle: Annotated[float, Parameter(metavar="SECONDS")] = 1.0,
    unique: Annotated[bool, Parameter(negative="", show_default=False)] = False,
    flags: BrokerFlags = None,
) -> int:
    """Receive messages from a queue, as JSON lines on stdout; each is acknowledged once it is written.

    Parameters
    ----------
    queue
        Name of the queue.
    to
        Write each message to a file of this directory instead.
    count
        Stop after so many messages.
    idle
        Stop once none has come for so many seconds; `inf` is never.
    unique
        Drop messages whose id was there before: of the last 100 000, or among the files of the directory.
    """
    from trio_pilot.cli.receive import receive

    return receive(_settings(flags), queue, to, count, idle, unique=unique)


letters = App(name="dead-letters", help="List, show, replay or run events that failed for the last time.")
app.command(letters)


@letters.default
def list_dead_letters(
    queue: str,
    /,
    *,
    json: Annotated[bool, Parameter(negative="", show_default=False)] = False,
    flags: LetterFlags = None,
) -> int:
    """List the dead letters of a queue. They stay as they are.

    Parameters
    ----------
    queue
        Name of the queue in which the events were.
    json
        Write a JSON object a line.
    """
    from trio_pilot.cli.dead_letters import show_list

    return show_list(_settings(flags), queue, as_json=json)


@letters.command(name="show")
def show_dead_letter(queue: str, message_id: str, /, *, flags: LetterFlags = None) -> int:
    """Show what is known of a dead letter, and its event, as JSON.

    Parameters
    ----------
    queue
        Name of the queue in which the event was.
    message_id
        Its id, as listed.
    """
    from trio_pilot.cli.dead_letters import show

    return show(_settings(flags), queue, message_id)


@letters.command(name="replay")
def replay_dead_letters(
    queue: str,
    message_ids: Annotated[tuple[str, ...], Parameter(show_default=False)] = (),
    /,
    *,
    every: Annotated[bool, Parameter(name="--all", negative="", show_default=False)] = False,
    flags: LetterFlags = None,
) -> int:
    """Send dead letters back to their queue; their attempts start anew.

    Parameters
    ----------
    queue
        Name of the queue in which the events were, and will be.
    message_ids
        Their ids, as listed.
    every
        Replay all that are listed.
    """
    from trio_pilot.cli.dead_letters import replay

    return replay(_settings(flags), queue, message_ids, every=every)


@letters.command(name="run")
def run_dead_letter(queue: str, message_id: str, /, *, flags: AllFlags = None) -> int:
    """Run the task for a dead letter here and now, with the settings of a run; the letter stays where it is.

    What the task says is shown, and its exit code is ours; what it writes to its output file is not sent.

    Parameters
    ----------
    queue
        Name of the queue in which the event was.
    message_id
        Its id, as listed.
    """
    from trio_pilot.cli.dead_letters import run

    return run(_settings(flags), queue, message_id)


@app.command
def check(*, flags: AllFlags = None) -> int:
    """Say what works with these settings, what does not, and how to cure it."""
    from trio_pilot.cli.check import check

    return check(lambda: _settings(flags))


@app.command
def condor_submit(
    *,
    pilots: Annotated[int, Parameter(metavar="NUMBER", validator=Number(gte=1))] = 1,
    cpus: Annotated[int, Parameter(metavar="NUMBER", validator=Number(gte=1), help="CPUs of each.")] = 1,
    memory: Annotated[str, Parameter(metavar="BYTES")] = "2g",
    disk: Annotated[str, Parameter(metavar="BYTES")] = "4g",
    time: Annotated[float | None, Parameter(metavar="SECONDS", validator=Number(gt=0))] = None,
    executable: Annotated[Path | None, Parameter(metavar="FILE")] = None,
    container_image: Annotated[str, Parameter(metavar="IMAGE", show_default=False)] = "",
    cron: Annotated[str, Parameter(metavar="FIELDS", show_default=False)] = "",
    transfer: Annotated[tuple[Path, ...], Parameter(metavar="FILE", negative="", show_default=False)] = (),
    flags: AllFlags = None,
) -> int:
    """Print the description of HTCondor jobs that run pilots with these settings, for condor_submit.

    Parameters
    ----------
    pilots
        Pilots to start.
    memory
        Memory of each, as in 2g.
    disk
        Scratch disk of each.
    time
        Seconds a pilot may take.
    executable
        trio-pilot as one file [this one, if it is one].
    container_image
        An image that starts trio-pilot, or has what the executable needs.
    cron
        Five fields as in a crontab: when to start pilots again and again.
    transfer
        A file that is to go with the job; may be repeated.
    """
    from trio_pilot.cli.condor_submit import Request, condor_submit

    request = Request(pilots, cpus, memory, disk, time, executable, container_image, cron, transfer)
    return condor_submit(_settings(flags), _given(flags), request)


@app.command
def demo(*, flags: DemoFlags = None) -> int:
    """Run the main job on a small sky scan: send events, run a task for each, and show the best pixel.

    It needs no settings, no server and no network, and leaves nothing behind.
    """
    from trio_pilot.cli.demo import demo

    return demo(_given(flags))


def call(argv: Sequence[str]) -> int:
    """Do what a command line says, and give the exit code. Raises UsageError if it is wrong."""
    try:
        return app(_with_command(argv), exit_on_error=False, print_error=False, result_action="return_value") or 0
    except CycloptsError as error:
        raise UsageError(" ".join(str(error).split())) from error


def _with_command(argv: Sequence[str]) -> Sequence[str]:
    """Put `run` where there is no command."""
    first = argv[0] if argv else "--"
    return ["run", *argv] if first.startswith("-") and first not in ("--help", "-h", "--version") else argv


def _given(flags: Any) -> Mapping[str, Any]:
    return {name: value for name, value in dataclasses.asdict(flags).items() if value is not None} if flags else {}


def _settings(flags: Any) -> Settings:
    return load_settings(_given(flags))
