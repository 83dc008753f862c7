"""Mutated files: a slice of the campaign, and that a finding is reported."""

import pytest
from torture import fuzz


@pytest.mark.thorough
def test_no_mutated_file_gives_a_traceback(tmp_path, monkeypatch):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "memo"))
    findings = fuzz.fuzz(tmp_path, 1000, seed=1)
    assert not findings.failures
    assert sum(findings.tried.values()) > 950
    assert all(findings.refused[name] for name in findings.tried if "trainer_state" not in name)


def test_a_reader_that_fails_is_a_finding(tmp_path):
    def fail():
        raise KeyError("x\ny")

    findings = fuzz.Findings()
    target = fuzz.Target("file", tmp_path / "file", fail, ())
    fuzz.attempt(target, "0 file 3", findings)
    ((key, (count, name, example)),) = findings.failures.items()
    assert key.startswith("KeyError at test_fuzz.py:") and (count, name) == (1, "file")
    assert example.startswith("[0 file 3] ") and "\n" not in example
