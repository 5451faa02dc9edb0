import pytest

from trio_pilot.files.shortened import shortened

FRAMES = [f'  File "/task.py", line {number}, in f{number}\n    call_{number}()\n    ^^^^^^^' for number in range(50)]
TEXT = "\n".join(["Traceback (most recent call last):", *FRAMES, "ValueError: no sky"])


def test_a_text_that_fits_is_not_changed() -> None:
    assert shortened(f"{TEXT}\n", len(TEXT) + 1) == f"{TEXT}\n"


@pytest.mark.parametrize("most", range(300, 400))
def test_whole_frames_are_dropped_from_the_middle(most: int) -> None:
    short = shortened(TEXT, most)
    count = short.count("  File ")
    assert short == "\n".join(["Traceback (most recent call last):", "  ...", *FRAMES[-count:], "ValueError: no sky"])
    assert most - 70 < len(short) <= most


@pytest.mark.parametrize("most", range(60, 130))
def test_without_room_for_a_frame_the_exception_is_kept(most: int) -> None:
    short = shortened(TEXT, most)
    assert short.endswith("\nValueError: no sky")
    assert len(short) <= most


def test_the_line_of_an_exception_is_kept_before_its_last_lines() -> None:
    lines = [f"line {number}" for number in range(100)]
    short = shortened("\n".join([TEXT, *lines]), 200)
    assert short.startswith("Traceback (most recent call last):\n  ...\nValueError: no sky\n  ...\nline ")
    assert short.endswith("\nline 98\nline 99")
    assert len(short) <= 200


def test_an_exception_that_is_too_long_loses_its_middle() -> None:
    short = shortened("\n".join([TEXT, ""]).replace("no sky", f"no {1000 * 'x'} sky"), 200)
    assert short.startswith("Traceback (most recent call last):\n  ...\nValueError: no xxx")
    assert short.endswith("xxx sky")
    assert len(short) <= 200


def test_the_mark_of_repeated_frames_stays_with_its_frame() -> None:
    repeated = "  [Previous line repeated 990 more times]"
    short = shortened(TEXT.replace("\nValueError", f"\n{repeated}\nRecursionError"), 200)
    assert short.endswith(f"{FRAMES[-1]}\n{repeated}\nRecursionError: no sky")


def test_many_short_lines_take_no_time_to_speak_of() -> None:
    assert len(shortened("x\n" * 32768, 4000)) > 3900
