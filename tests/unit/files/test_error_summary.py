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


def after(stderr: Path, said: str | bytes) -> str:
    stderr.write_bytes(said if isinstance(said, bytes) else said.encode())
    return error_summary(stderr)


def test_of_several_tracebacks_the_last_is_given_whole(stderr: Path) -> None:
    said = (
        TRACEBACK.format(error="KeyError: 'first'")
        + "\nDuring handling of the above exception, another exception occurred:\n\n"
        + TRACEBACK.format(error="ValueError: second")
    )
    assert after(stderr, said) == TRACEBACK.format(error="ValueError: second").rstrip()


def test_a_traceback_wins_over_lines_before_it(stderr: Path) -> None:
    said = "starting\n" + TRACEBACK.format(error="ValueError: no")
    assert after(stderr, said) == TRACEBACK.format(error="ValueError: no").rstrip()


def test_of_an_exception_group_the_last_exception_in_it_is_given(stderr: Path) -> None:
    said = """\
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
    words = after(stderr, said)
    assert words.splitlines()[0].endswith("Traceback (most recent call last):")
    assert "KeyError: 'two'" in words
    assert "ValueError: one" not in words


@pytest.mark.parametrize("end", ["", "\n", "\n\n  \n\t\n", "\r\n"])
def test_without_a_traceback_the_last_line_that_is_not_blank_is_given(stderr: Path, end: str) -> None:
    assert after(stderr, "one\n\ncannot open the sky" + end) == "cannot open the sky"


def test_lines_of_apptainer_are_passed_over(stderr: Path) -> None:
    assert after(stderr, "the payload's own\n" + APPTAINER + APPTAINER_FATAL) == "the payload's own"


def test_lines_of_apptainer_inside_a_traceback_are_passed_over(stderr: Path) -> None:
    lines = TRACEBACK.format(error="ValueError: no").splitlines(keepends=True)
    assert after(stderr, APPTAINER.join(lines)) == "".join(lines).rstrip()


def test_lines_of_apptainer_count_when_there_is_nothing_else(stderr: Path) -> None:
    assert after(stderr, APPTAINER + APPTAINER_FATAL + "\n") == "Master()   no such image"


def test_a_line_that_only_resembles_apptainers_is_the_payloads(stderr: Path) -> None:
    assert after(stderr, "one\nINFO [U=x,P=1] hello\n") == "INFO [U=x,P=1] hello"


def test_what_is_not_utf8_is_replaced(stderr: Path) -> None:
    assert after(stderr, b"fine\nbad \xff\xfe bytes\n") == "bad \ufffd\ufffd bytes"


@pytest.mark.parametrize("said", ["", "\n \n"])
def test_silence_gives_nothing(stderr: Path, said: str) -> None:
    assert after(stderr, said) == ""


def test_a_missing_file_is_said_to_be_missing(stderr: Path) -> None:
    assert error_summary(stderr) == "(its stderr cannot be read: No such file or directory)"


def test_of_a_huge_file_only_the_end_is_read(stderr: Path) -> None:
    with stderr.open("wb") as file:
        file.truncate(1 << 40)  # a hole: reading it all would fill the memory
        file.seek(0, 2)
        file.write(b"\nthe end\n")
    assert error_summary(stderr) == "the end"


def test_a_character_cut_in_two_at_the_edge_does_no_harm(stderr: Path) -> None:
    assert after(stderr, "é" * MOST + "x").endswith("éx")


def test_a_long_line_is_cut_to_its_end(stderr: Path) -> None:
    words = after(stderr, "x" * MOST + "end")
    assert len(words) == MOST_TEXT
    assert words.endswith("xend")
