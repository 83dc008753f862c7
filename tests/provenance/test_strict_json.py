"""Strict JSON: what `json.loads` lets through and a manifest, receipt or record must not hold."""

import json

import pytest

from lopd.provenance.io import MAX_DEPTH, parse_json

DEEP = "[" * 100_000


@pytest.mark.parametrize(
    "text, message",
    [
        ('{"a": 1, "a": 1}', "key 'a' occurs twice"),
        ('{"a": {"b": NaN}}', "NaN is not a finite number"),
        ("[-Infinity]", "-Infinity is not a finite number"),
        ("[1e999]", "1e999 is not a finite number"),
        (DEEP, "nested more than"),
        (DEEP + "]" * 100_000, "nested more than"),
        ('{"a":' * 100_000, "nested more than"),
        ("[" * (MAX_DEPTH + 1) + "]" * (MAX_DEPTH + 1), "nested more than"),
        (r'{"a": ["\ud83d"]}', r"half of a surrogate pair"),
        (r'{"\uDC00": 1}', r"half of a surrogate pair"),
        (b'"\xff"', "utf-8"),
        (b"\xed\xa0\x80", "utf-8"),
        ('{"a": ' + "9" * 5000 + "}", "digits"),
        ("", "Expecting value"),
    ],
    ids=lambda value: repr(value)[:20],
)
def test_refused(text, message):
    with pytest.raises(ValueError, match=message):
        parse_json(text)


def test_what_is_allowed_reads_as_by_json():
    deepest = "[" * MAX_DEPTH + "]" * MAX_DEPTH
    texts = [deepest, r'["\ud83d\ude00", "\\ud83d"]', '{"a": [1, 2.5, null, true]}', " 3 "]
    for text in texts:
        assert parse_json(text) == json.loads(text)
    assert parse_json("[" + "[1]," * 1000 + "0]") == [[1]] * 1000 + [0]
    assert parse_json("[Infinity, 1e999]", finite=False) == [float("inf")] * 2
