import re

import pytest

from trio_pilot.allocation.classad import quoted


@pytest.mark.parametrize(
    ("text", "quote"),
    [
        ("", '""'),
        ("plain text", '"plain text"'),
        ('a "b" \\c', r'"a \"b\" \\c"'),
        ("\n\r\t\a\b\v\f", r'"\n\r\t\a\b\v\f"'),
        ("é", r'"\303\251"'),
        ("\x01\x1b\x7f", r'"\001\033\177"'),
        ("a\0b", '"ab"'),  # a NUL would end the string
        ("\ud800", '"?"'),
        ("🙂", r'"\360\237\231\202"'),
    ],
)
def test_a_text_is_quoted_as_classads_quote_it(text: str, quote: str) -> None:
    assert quoted(text, 1000) == quote


def plain(quote: str) -> str:
    """Return the text of a quoted one that has no escapes but these; raises an error if a character is cut in two."""
    raw = re.sub(rb"\\([0-7]{3})", lambda octal: bytes([int(octal[1], 8)]), quote[1:-1].encode())
    return raw.replace(rb"\n", b"\n").replace(rb"\"", b'"').decode()


@pytest.mark.parametrize("text", ["x" * 2000, "é" * 300, '"' * 700, "a" + "🙂" * 100, "\x01" * 400])
@pytest.mark.parametrize("most", [69, 100, 101, 102, 103, 940])
def test_a_long_line_is_cut_between_characters(text: str, most: int) -> None:
    quote = quoted(text, most)
    assert most - 32 <= len(quote) <= most
    beginning, _, end = plain(quote).partition("...")
    assert beginning
    assert end
    assert text.startswith(beginning)
    assert text.endswith(end)


@pytest.mark.parametrize("most", [100, 101, 102, 940])
def test_of_many_short_lines_the_last_are_kept(most: int) -> None:
    text = "\n".join(map(str, range(1000)))
    quote = quoted(text, most)
    assert most - 32 <= len(quote) <= most
    beginning, _, end = plain(quote).partition("\n  ...\n")
    assert beginning == "0"
    assert text.endswith(f"\n{end}")


@pytest.mark.parametrize("length", range(90, 110))
def test_nothing_is_cut_that_fits(length: int) -> None:
    assert ("..." in quoted("x" * length, 102)) == (length > 100)
