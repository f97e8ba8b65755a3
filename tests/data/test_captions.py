"""Captions are cleaned, refused or filtered, each with its reason."""

import pytest

from dalle_cli.data import captions
from dalle_cli.data.filters import Filters, is_boilerplate, latin_share
from dalle_cli.data.skips import BadSample


@pytest.mark.parametrize(
    ("data", "lines"),
    [
        (b"a cat\nanother line", ["a cat", "another line"]),
        (b"\xef\xbb\xbf  a\t cat \r\n\r\n two ", ["a cat", "two"]),
        (b"\n\n first\n", ["first"]),
        (b"nul\0s go\0", ["nuls go"]),
        ("빨간 사과 🍎".encode(), ["빨간 사과 🍎"]),
        (b" \0 \n", []),
        (b"word " * 10_000, [" ".join(["word"] * 10_000)]),
    ],
)
def test_text_files(data, lines):
    assert captions.from_text(data, all_lines=True) == tuple(lines)
    assert captions.from_text(data, all_lines=False) == tuple(lines[:1])


@pytest.mark.parametrize(
    ("data", "reason"),
    [
        ("ein grüner Käfer".encode("latin-1"), "caption is not UTF-8"),
        ("a cat".encode("utf-16"), "caption is not UTF-8"),
        (b"a" * (captions.MAX_BYTES + 1), "caption too long"),
    ],
)
def test_text_files_refused(data, reason):
    with pytest.raises(BadSample, match=reason):
        captions.from_text(data, all_lines=False)


def test_values():
    assert captions.from_value("  a  cat ") == ("a cat",)
    assert captions.from_value(["one", None, " ", "two"]) == ("one", "two")
    assert captions.from_value(None) == ()
    for value in (3, ["one", 2], {"en": "cat"}):
        with pytest.raises(BadSample, match="not text"):
            captions.from_value(value)
    with pytest.raises(BadSample, match="not UTF-8"):
        captions.from_value("half a pair \ud83d")


@pytest.mark.parametrize(
    ("caption", "expected"),
    [
        ("Photographed on 12 May 2014", True),
        ("photo taken on May 12th, 2014 at 10:30 am", True),
        ("2014-05-12", True),
        ("posted on 12/5/14", True),
        ("a painting of a lighthouse in a storm, May 2014", False),
        ("may a cat walk 12 dogs", False),
        ("a red apple on a table", False),
    ],
)
def test_boilerplate(caption, expected):
    assert is_boilerplate(caption) is expected


def test_latin_share():
    assert latin_share("a grüner Käfer 12!") == 1
    assert latin_share("красное яблоко") == 0
    assert latin_share("ab яб") == 0.5
    assert latin_share("123") == 1


@pytest.mark.parametrize(
    ("filters", "bad", "reason"),
    [
        (Filters(min_caption_chars=4), "cat", "short caption"),
        (Filters(drop_boilerplate=True), "taken on 12.5.2014", "boilerplate caption"),
        (Filters(min_latin=0.5), "красное яблоко", "caption not in Latin script"),
    ],
)
def test_each_filter_changes_the_outcome(filters, bad, reason):
    assert Filters().captions((bad,)) == (bad,)
    assert filters.captions((bad, "a red apple")) == ("a red apple",)
    with pytest.raises(BadSample, match=reason):
        filters.captions((bad,))
    with pytest.raises(BadSample, match="without caption"):
        filters.captions(())
