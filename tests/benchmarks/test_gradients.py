"""The enumeration of `benchmarks.gradients` at a small size, and its committed rows."""

import math

import pytest

from benchmarks import gradients, readme


@pytest.fixture
def small(monkeypatch):
    monkeypatch.setattr(gradients, "VOCAB", 30)
    monkeypatch.setattr(gradients, "SEEDS", range(3))


UNBIASED = ("sampled token", "published correction", "unbiased")


@pytest.mark.parametrize("drift", [0.0, 0.5])
def test_the_bias_and_the_noise_of_each_form(small, drift):
    found = {form: gradients.measure(form, 4, drift) for form in gradients.FORMS}
    for form, row in found.items():
        assert (row["bias"] < 1e-12) == (
            form in UNBIASED or (drift == 0.0 and form.startswith("unbiased"))
        ), form
    noise = {form: row["noise"] for form, row in found.items()}
    assert noise["bucket, the list alone"] < 1e-12
    assert noise["unbiased"] < noise["published correction"] < noise["sampled token"]


def test_the_committed_rows_are_those_of_this_code():
    rows = readme.read_rows(gradients.NAME)
    assert len(rows) == len(gradients.FORMS) * len(gradients.LISTS) * len(gradients.DRIFTS)
    row = next(r for r in rows if r["form"] == "bucket, the list alone" and r["k"] == 64)
    again = gradients.measure(row["form"], row["k"], row["drift"])
    assert all(math.isclose(row[key], again[key], rel_tol=1e-6, abs_tol=1e-9) for key in again)
