"""Aligned tables."""

from lopd.stages import table
from lopd.stages.table import print_fields, print_rows


def test_columns_are_aligned(capsys):
    print_rows([("a", 1, "x"), ("bcd", 20.0 / 3, "")], right={1})
    assert capsys.readouterr().out == "a        1  x\nbcd  6.667\n"
    print_fields({"one": "two words", "three": 4})
    assert capsys.readouterr().out == "one    two words\nthree  4\n"
    print_rows([])
    assert capsys.readouterr().out == ""


def test_fields_fit_into_a_terminal_and_are_lines_elsewhere(capsys, monkeypatch):
    print_fields({"name": "many words " * 20, "other": 1})
    assert len(capsys.readouterr().out.splitlines()) == 2
    monkeypatch.setattr(table, "terminal_columns", lambda: 80)
    path = "/a/" + "long-" * 20 + "path"
    long = "words that go on and on, " * 8
    print_fields({"name": "short  [0, 1]", "a_long_name": long, "where": path, "none": ""})
    lines = capsys.readouterr().out.splitlines()
    assert lines[0] == "name         short  [0, 1]" and lines[-1] == "none"
    assert max(len(line) for line in lines if path not in line) in range(70, 81)
    assert all(line.startswith(" " * 13) for line in lines[2:4])
    assert " ".join(" ".join(lines[1:-2]).split()) == f"a_long_name {long}".strip()
    assert lines[-2] == f"where        {path}"


def test_an_error_stands_beside_its_value_and_counts_in_one_row(capsys):
    print_fields({"kl": 12.7213, "kl_error": 0.37671, "ends": {"stop": 13, "length": 17}})
    assert capsys.readouterr().out == (
        "kl    12.72, standard error 0.3767\nends  stop 13, length 17\n"
    )
    print_fields({"kl": 1.0, "kl_error": None, "codec": "compact", "codec_error": "0 nat"})
    assert capsys.readouterr().out == "kl           1\ncodec        compact\ncodec_error  0 nat\n"
