import subprocess
import sys
from pathlib import Path

import pytest

from trio_pilot.files.error_summary import MOST, MOST_TEXT, error_summary, without_words

TRACEBACK = """\
Traceback (most recent call last):
  File "/task.py", line 3, in <module>
    main()
{error}
"""
APPTAINER = "INFO    [U=1000,P=4711]       checkConfig()   Loading configuration\n"
APPTAINER_FATAL = "FATAL   [U=0,P=17]         Master()   no such image\n"


@pytest.fixture
def stderr(tmp_path: Path) -> Path:
    return tmp_path / "stderrfile"


def summary_of(stderr: Path, text: str | bytes) -> str:
    stderr.write_bytes(text if isinstance(text, bytes) else text.encode())
    return error_summary(stderr)


def test_the_last_of_several_tracebacks_is_returned_whole(stderr: Path) -> None:
    text = (
        TRACEBACK.format(error="KeyError: 'first'")
        + "\nDuring handling of the above exception, another exception occurred:\n\n"
        + TRACEBACK.format(error="ValueError: second")
    )
    assert summary_of(stderr, text) == TRACEBACK.format(error="ValueError: second").rstrip()


def test_a_traceback_wins_over_lines_before_it(stderr: Path) -> None:
    text = "starting\n" + TRACEBACK.format(error="ValueError: no")
    assert summary_of(stderr, text) == TRACEBACK.format(error="ValueError: no").rstrip()


def test_the_last_exception_of_an_exception_group_is_returned(stderr: Path) -> None:
    text = """\
  + Exception Group Traceback (most recent call last):
  |   File "/task.py", line 1, in <module>
  | ExceptionGroup: two (2 sub-exceptions)
  +-+---------------- 1 ----------------
    | Traceback (most recent call last):
    |   File "/task.py", line 5, in one
    | ValueError: one
    +---------------- 2 ----------------
    | Traceback (most recent call last):
    |   File "/task.py", line 9, in two
    | KeyError: 'two'
    +------------------------------------
"""
    summary = "Traceback (most recent call last):\n  File \"/task.py\", line 9, in two\nKeyError: 'two'"
    assert summary_of(stderr, text) == summary


@pytest.mark.parametrize("count", [2, 30])  # of more than 15, Python tells the number of the others
def test_a_group_without_inner_tracebacks_ends_with_its_last_exception(stderr: Path, count: int) -> None:
    program = f"raise ExceptionGroup('several', [ValueError(number) for number in range({count})])"
    summary = summary_of(stderr, said_by(program))
    assert summary.startswith("Exception Group Traceback (most recent call last):\n  File ")
    assert summary.endswith(f"\nValueError: {min(count, 15) - 1}")


DEL = "class Disk:\n    def __del__(self):\n        raise RuntimeError('in passing\\nwith more')\ndisk = Disk()\n"
AT_EXIT = "import atexit\natexit.register(lambda: 1/0)\n"
GROUP = (
    "class Sky:\n    def __del__(self):\n        raise ExceptionGroup('two', [ValueError(1), ValueError(2)])\nsky = Sky()\n"
)


def said_by(program: str) -> bytes:
    """Return what a Python program writes to stderr."""
    return subprocess.run([sys.executable, "-c", program], capture_output=True, check=False).stderr


@pytest.mark.parametrize("passing", [DEL, AT_EXIT, GROUP, DEL + AT_EXIT + GROUP])
def test_an_exception_that_python_ignores_is_not_the_reason(stderr: Path, passing: str) -> None:
    text = said_by(f"{passing}def task():\n    raise KeyError('real')\ntask()")
    assert b"Exception ignored" in text
    assert summary_of(stderr, text).splitlines()[-1] == "KeyError: 'real'"


def test_lines_count_beside_an_exception_that_python_ignores(stderr: Path) -> None:
    assert (
        summary_of(stderr, said_by(f"import sys\n{AT_EXIT}{GROUP}sys.exit('cannot open the sky')")) == "cannot open the sky"
    )


def test_lines_after_an_exception_that_python_ignores_count(stderr: Path) -> None:
    text = "Exception ignored in: <stdout>\nBrokenPipeError: [Errno 32] Broken pipe\nfatal: no more sky\n"
    assert summary_of(stderr, text) == "fatal: no more sky"


def test_an_exception_that_python_ignores_counts_if_there_is_nothing_else(stderr: Path) -> None:
    assert summary_of(stderr, said_by(AT_EXIT)).endswith("\nZeroDivisionError: division by zero")


@pytest.mark.parametrize(
    "sequence", ["\x1b[0m", "\x1b[?25h", "\x1b[1;31m\x1b[K", "\x1b]0;title\x07", "\x1b(B", "\x1bM", "\0\b"]
)
def test_a_line_that_is_only_an_escape_sequence_is_no_reason(stderr: Path, sequence: str) -> None:
    assert summary_of(stderr, f"{sequence}cannot open the sky\n{sequence}\n").removeprefix("\0\b") == "cannot open the sky"


def test_a_coloured_traceback_is_a_traceback(stderr: Path) -> None:
    text = (
        '\x1b[1mTraceback (most recent call last):\x1b[0m\n  File \x1b[35m"/task.py"\x1b[0m\n\x1b[1;35mKeyError\x1b[0m: 1\n'
    )
    assert summary_of(stderr, text) == 'Traceback (most recent call last):\n  File "/task.py"\nKeyError: 1'


@pytest.mark.parametrize(
    ("code", "words"),
    [
        (139, "killed by SIGSEGV"),
        (137, "killed by SIGKILL"),
        (134, "killed by SIGABRT"),
        (1, "<no stderr logs>"),
        (128, "<no stderr logs>"),
        (255, "<no stderr logs>"),
    ],
)
def test_without_words_the_signal_is_the_reason(code: int, words: str) -> None:
    assert without_words(code) == words


@pytest.mark.parametrize("end", ["", "\n", "\n\n  \n\t\n", "\r\n"])
def test_without_a_traceback_the_last_line_that_is_not_blank_is_returned(stderr: Path, end: str) -> None:
    assert summary_of(stderr, "one\n\ncannot open the sky" + end) == "cannot open the sky"


def test_lines_of_apptainer_are_skipped(stderr: Path) -> None:
    assert summary_of(stderr, "the payload's own\n" + APPTAINER + APPTAINER_FATAL) == "the payload's own"


def test_lines_of_apptainer_inside_a_traceback_are_skipped(stderr: Path) -> None:
    lines = TRACEBACK.format(error="ValueError: no").splitlines(keepends=True)
    assert summary_of(stderr, APPTAINER.join(lines)) == "".join(lines).rstrip()


def test_without_other_lines_those_of_apptainer_count(stderr: Path) -> None:
    assert summary_of(stderr, APPTAINER + APPTAINER_FATAL + "\n") == "Master()   no such image"


def test_a_line_that_only_resembles_apptainers_is_the_payloads(stderr: Path) -> None:
    assert summary_of(stderr, "one\nINFO [U=x,P=1] hello\n") == "INFO [U=x,P=1] hello"


def test_bytes_that_are_not_utf8_are_replaced(stderr: Path) -> None:
    assert summary_of(stderr, b"fine\nbad \xff\xfe bytes\n") == "bad \ufffd\ufffd bytes"


@pytest.mark.parametrize("text", ["", "\n \n"])
def test_an_empty_stderr_gives_an_empty_summary(stderr: Path, text: str) -> None:
    assert summary_of(stderr, text) == ""


def test_a_missing_file_is_reported(stderr: Path) -> None:
    assert error_summary(stderr) == "(its stderr cannot be read: No such file or directory)"


def test_only_the_end_of_a_huge_file_is_read(stderr: Path) -> None:
    with stderr.open("wb") as file:
        file.truncate(1 << 40)  # a hole: reading it all would fill the memory
        file.seek(0, 2)
        file.write(b"\nthe end\n")
    assert error_summary(stderr) == "the end"


def test_a_character_cut_in_two_at_the_edge_does_no_harm(stderr: Path) -> None:
    assert summary_of(stderr, "é" * MOST + "x").endswith("éx")


def test_a_long_line_loses_its_middle(stderr: Path) -> None:
    summary = summary_of(stderr, "x" * MOST + "end")
    assert len(summary) == MOST_TEXT
    assert summary.endswith("xend")


def test_the_exception_of_a_traceback_with_very_many_frames_is_kept(stderr: Path) -> None:
    frames = "".join(f'  File "/task.py", line {number}, in f{number}\n    code()\n' for number in range(1000))
    text = f"Traceback (most recent call last):\n{frames}ValueError: first line\n" + "more\n" * 2000
    summary = summary_of(stderr, text)
    assert summary.startswith("Traceback (most recent call last):\n  ...\nValueError: first line\n  ...\nmore\n")
    assert MOST_TEXT - 100 < len(summary) <= MOST_TEXT
