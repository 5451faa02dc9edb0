"""The reason why a container failed: its last Python traceback, else the last line of its stderr."""

import re
import signal
from pathlib import Path

from trio_pilot.files.shortened import shortened

MOST = 65536  # bytes of stderr that are read, from the end
MOST_TEXT = 4000  # characters of an error text

NO_REASON = "<no stderr logs>"  # upstream's words
SIGNALLED = 128  # exit code of a process that signal N ended: 128 + N

# Escape sequences of a terminal (ECMA-48): control sequences, control strings (titles, links), and those of a few bytes.
ESCAPE = re.compile(r"\x1b(?:\[[0-?]*[ -/]*[@-~]|[]PX^_].*?(?:\x07|\x1b\\)|[ -/]+[0-~]|[0-Z\\^_`a-~])")
WORDS = re.compile(r"[^\s\x00-\x1f\x7f]")

# In an exception group, each exception has a traceback of its own, after vertical bars.
TRACEBACK = re.compile(r"^[ |+]*(Exception Group )?Traceback \(most recent call last\):")
BAR = re.compile(r"^ *[|+]( |$)")
RULE = re.compile(r"^ *\+[-+]*-{4,}( (\d+|\.\.\.) -+)?$")
AND_MORE = re.compile(r"^and \d+ more exceptions?$")

# What Python writes about errors that do not end a program, mostly while it shuts down: a line, and what was raised.
IGNORED = re.compile(
    r"""^(?:Exception[ ]ignored[ ](?:in|on|while|during)\b|Error[ ]in[ ]atexit\._run_exitfuncs:).*\n
    (?:
        (?:
            (?:
                Traceback[ ]\(most[ ]recent[ ]call[ ]last\):\n(?:[ \t].*\n)*\S.*\n
                | [ ]+\+[ ]Exception[ ]Group[ ].*\n(?:[ \t].*\n)*
            )
            (?:(?:During[ ]handling[ ]of|The[ ]above[ ]exception[ ]was).*:\n)?
        )+
        | \w[\w.]*(?:Error|Exception|Exit|Interrupt|Warning)(?::[ ].*)?\n
    )?""",
    re.MULTILINE | re.VERBOSE,
)

# Apptainer's own log lines are skipped, unless there is nothing else.
APPTAINER_LINE = re.compile(r"^[A-Z]+\s+\[U=\d+,P=\d+\]\s+")


def error_summary(stderr: Path) -> str:
    """Return the last traceback, else the last line that is not blank, else an empty text. Never raises an OSError."""
    try:
        with stderr.open("rb") as file:
            file.seek(max(0, stderr.stat().st_size - MOST))
            text = file.read(MOST).decode(errors="replace")
    except OSError as error:
        return f"(its stderr cannot be read: {error.strerror})"
    lines = [ESCAPE.sub("", line).rstrip() for line in text.splitlines()]
    return shortened(_last_error([line for line in lines if WORDS.search(line)]), MOST_TEXT)


def without_words(code: int) -> str:
    """Return the reason for an exit code other than 0 whose container wrote nothing: the signal that ended it, if any."""
    try:
        return f"killed by {signal.Signals(code - SIGNALLED).name}"
    except ValueError:
        return NO_REASON


def _last_error(lines: list[str]) -> str:
    payload = [line for line in lines if not APPTAINER_LINE.match(line)]
    lines = payload or [APPTAINER_LINE.sub("", line) for line in lines]
    lines = _without_ignored(lines) or lines
    starts = [number for number, line in enumerate(lines) if TRACEBACK.match(line)]
    return "\n".join(_without_bars(lines[starts[-1] :]) if starts else lines[-1:])


def _without_ignored(lines: list[str]) -> list[str]:
    """Return the lines without errors that Python has ignored. What follows them belongs to them, if there was another."""
    kept, *parts = (part.splitlines() for part in IGNORED.split("".join(f"{line}\n" for line in lines)))
    for part in parts:
        starts = [number for number, line in enumerate(part) if TRACEBACK.match(line)]
        has_error = any(map(TRACEBACK.match, kept))
        kept += part[starts[0] if starts else len(part) :] if has_error else part
    return kept


def _without_bars(lines: list[str]) -> list[str]:
    """Return the lines of a traceback without the bars and rules of an exception group around them."""
    if not BAR.match(lines[0]):
        return lines
    plain = [BAR.sub("", line) for line in lines if not RULE.match(line)]
    return plain[:-1] if AND_MORE.match(plain[-1]) else plain
