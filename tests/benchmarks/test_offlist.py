"""Masses inside and outside the lists against autograd, and rows drawn from a measurement."""

import json

import pytest
import torch

from benchmarks import measured_rows, noised_student, offlist
from benchmarks.problems import Shape
from lopd.stages.demo import arithmetic as toy
from lopd_kernels import sparse_divergence


@pytest.fixture
def rows():
    """Logits, lists of the teacher with a shorter one, and the teacher's tails, in fp64."""
    torch.manual_seed(0)
    logits = 3.0 * torch.randn(6, 40, dtype=torch.float64)
    teacher = (logits + 0.5 * torch.randn_like(logits)).log_softmax(1)
    logprobs, ids = teacher.topk(5)
    ids[0, 3:] = -1
    outside = teacher.scatter(1, ids.clamp(min=0), -torch.inf)
    outside[0] = teacher[0].index_fill(0, ids[0, :3], -torch.inf)
    return logits, ids, logprobs, outside.logsumexp(1)


def test_the_masses_are_those_of_the_gradient(rows):
    logits, ids, logprobs, tail = rows
    logits.requires_grad_()
    loss = sparse_divergence(logits, ids, logprobs, tail_logprobs=tail, reduction="sum")
    (gradient,) = torch.autograd.grad(loss, logits)
    found = offlist.row_masses(logits.detach(), ids, logprobs, tail)
    for n, listed in enumerate(ids):
        on = gradient[n, listed[listed >= 0]].abs().sum()
        torch.testing.assert_close(found["on"][n], on)
        torch.testing.assert_close(found["off"][n], gradient[n].abs().sum() - on)


def test_the_smallest_rows_are_dropped_within_the_tolerance():
    on, off = torch.full((4,), 1.0), torch.tensor([0.5, 0.0, 0.01, 2.0])
    assert offlist.dense_share(on, off, 0.0) == 0.75
    assert offlist.dense_share(on, off, 0.0016) == 0.5  # 0.01 / (6.51 - 0.01)
    assert offlist.dense_share(on, off, 0.1) == 0.25


SHAPE = Shape(rows=256, hidden=128, vocab=30000, topk=16)


@pytest.mark.parametrize("tail", [1e-4, 0.05, 0.5])
def test_drawn_rows_have_the_measured_tails_and_divergences(tail):
    sample = torch.tensor([[tail, 2.0 * tail / 3.0, 0.6, 0.2]])
    problem = measured_rows.measured_problem(SHAPE, sample)
    logits = (problem.hidden @ problem.weight.t()).double()
    found = offlist.row_masses(logits, problem.ids, problem.logprobs.double(), problem.tail)
    assert problem.shape == SHAPE
    for name, value in zip(measured_rows.FIELDS, sample[0], strict=True):
        assert float(found[name].median()) == pytest.approx(float(value), rel=0.06), name
    assert float(found["student_tail"].std()) < 0.15 * tail


def test_any_model_can_be_measured_with_a_noised_student(tmp_path, monkeypatch):
    teacher = toy.write_model(tmp_path / "teacher", {"hidden_size": 16, "intermediate_size": 16}, 0)
    prompts = toy.write_prompts(tmp_path / "prompts.jsonl", toy.sample_prompts(4, 0, exclude=set()))
    monkeypatch.setattr(noised_student, "LONGEST_LIST", 4)
    made, out = tmp_path / "made", tmp_path / "rows"
    out.mkdir()
    noised_student.main(
        [str(teacher), "--prompts", str(prompts), "--out", str(made), "--limit", "3"]
    )
    folders = ["--start", str(made / "student"), "--cache", str(made / "cache")]
    for name in ("a", "b", "a"):  # the lines of a model replace its former ones
        offlist.main(["--name", name, *folders, "--k", "1", "4", "--rows", "9", "--out", str(out)])
    rows = [json.loads(line) for line in (out / "offlist.jsonl").read_text().splitlines()]
    assert [(row["model"], row["k"], row["rows"]) for row in rows] == [
        ("b", 1, 9), ("b", 4, 9), ("a", 1, 9), ("a", 4, 9),
    ]  # fmt: skip
    assert rows[0]["mean_tail"] > rows[1]["mean_tail"] > 0.0
    assert 0.0 < rows[0]["kl"] < rows[1]["kl"] < 1.0  # of a student near its teacher
    assert "<svg" in (out / "offlist.svg").read_text()


def test_the_committed_samples():
    for line in (measured_rows.RESULTS / measured_rows.NAME).read_text().splitlines():
        row = json.loads(line)
        sample = measured_rows.measured_sample(row["model"], row["at"], row["k"])
        assert sample.shape == (offlist.SAMPLE, 4) and ((sample >= 0) & (sample <= 20)).all()
    with pytest.raises(ValueError, match="no rows of model x, at start, k = 3"):
        measured_rows.measured_sample("x", "start", 3)
