from pathlib import Path

import pytest

from trio_pilot.files.error_summary import MOST, MOST_TEXT, error_summary

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
    summary = summary_of(stderr, text)
    assert summary.splitlines()[0].endswith("Traceback (most recent call last):")
    assert "KeyError: 'two'" in summary
    assert "ValueError: one" not in summary


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


def test_a_long_line_is_cut_to_its_end(stderr: Path) -> None:
    summary = summary_of(stderr, "x" * MOST + "end")
    assert len(summary) == MOST_TEXT
    assert summary.endswith("xend")
