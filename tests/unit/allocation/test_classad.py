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


@pytest.mark.parametrize("text", ["x" * 2000, "é" * 300, "\n" * 900, '"' * 700, "a" + "🙂" * 100, "\x01" * 400])
@pytest.mark.parametrize("keep_end", [False, True])
@pytest.mark.parametrize("most", [17, 100, 101, 102, 103, 999])
def test_a_long_text_is_cut_between_characters(text: str, keep_end: bool, most: int) -> None:
    quote = quoted(text, most, keep_end=keep_end)
    assert most - 16 <= len(quote) <= most
    body = quote[1:-1].removeprefix("...") if keep_end else quote[1:-1].removesuffix("...")
    assert len(body) == len(quote) - 5
    raw = re.sub(rb"\\([0-7]{3})", lambda octal: bytes([int(octal[1], 8)]), body.encode())
    plain = raw.replace(rb"\n", b"\n").replace(rb"\"", b'"').decode()  # raises an error if a character is cut in two
    assert text.endswith(plain) if keep_end else text.startswith(plain)


@pytest.mark.parametrize("length", range(90, 110))
def test_nothing_is_cut_that_fits(length: int) -> None:
    assert ("..." in quoted("x" * length, 102)) == (length > 100)
