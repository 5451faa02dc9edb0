"""The reason why a container failed: its last Python traceback, else the last line of its stderr."""

import re
from pathlib import Path

MOST = 65536  # bytes of stderr that are read, from the end
MOST_TEXT = 4000  # characters of an error text

# In an exception group, each exception has a traceback of its own, after vertical bars.
TRACEBACK = re.compile(r"^[ |+]*(Exception Group )?Traceback \(most recent call last\):")

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
    return _last_error([line.rstrip() for line in text.splitlines() if line.strip()])[-MOST_TEXT:]


def _last_error(lines: list[str]) -> str:
    payload = [line for line in lines if not APPTAINER_LINE.match(line)]
    lines = payload or [APPTAINER_LINE.sub("", line) for line in lines]
    starts = [number for number, line in enumerate(lines) if TRACEBACK.match(line)]
    return "\n".join(lines[starts[-1] :] if starts else lines[-1:])
