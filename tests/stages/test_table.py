"""Aligned tables."""

from lopd.stages.table import print_fields, print_rows


def test_columns_are_aligned(capsys):
    print_rows([("a", 1, "x"), ("bcd", 20.0 / 3, "")], right={1})
    assert capsys.readouterr().out == "a        1  x\nbcd  6.667\n"
    print_fields({"one": "two words", "three": 4})
    assert capsys.readouterr().out == "one    two words\nthree  4\n"
    print_rows([])
    assert capsys.readouterr().out == ""
