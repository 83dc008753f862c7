"""Every benchmark at toy size: each runs, and each criterion can be missed."""

import json
import shlex
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch

from benchmarks import cache, demo_seeds, fused_loss, readme, skipping
from benchmarks.problems import Shape
from benchmarks.variants import ours
from lopd.stages.demo.report import DISTILLED, FINE_TUNED, ONLINE

pytestmark = pytest.mark.thorough

ROOT = Path(__file__).parents[2]


def test_the_fused_loss_is_measured(tmp_path):
    command = [sys.executable, "-m", "benchmarks.fused_loss", "--quick"]
    done = subprocess.run(
        [*command, "--out", str(tmp_path)], check=True, capture_output=True, text=True, cwd=ROOT
    )
    row = json.loads(done.stdout)
    assert json.loads((tmp_path / "fused_loss_cpu.jsonl").read_text()) == row
    assert row["gradient_error"] < 1e-5
    assert row["time_ratio"] > 0 and row["fused_peak_mib"] > 0


def test_skipping_is_measured(tmp_path, monkeypatch, capsys):
    sample = "--sample 'SmolLM2-135M, noised' start 8"
    quick = ["--quick", "--shares", "0.15", "--turns", "1", *shlex.split(sample)]
    assert skipping.main([*quick, "--out", str(tmp_path)]) == 0
    row = json.loads(capsys.readouterr().out)
    assert json.loads((tmp_path / skipping.NAME).read_text()) == row
    assert row["command"] == (
        f"python -m benchmarks.skipping --quick --shares 0.15 {sample} --turns 1"
    )
    assert f"`{sample}`" in skipping.table([row])
    assert row["ratios"]["exact"] == 1.0 and row["ratios"]["share 0.15"] > 0.0
    assert 0.0 < row["kept"]["0.01"] < row["kept"]["0.001"] < 1.0
    assert (tmp_path / "skipping.svg").exists()
    assert f"| {row['hidden']} | {row['ratios']['share 0.15']:.2f} |" in skipping.table([row])
    monkeypatch.setattr(skipping, "gate_error", lambda: 2.0 * skipping.GATE)
    assert skipping.main(quick) == 1


def test_another_sample_fails_the_gate_of_the_suite(monkeypatch):
    problem = skipping.problem_of(skipping.QUICK)
    assert skipping.sampled(0.3).check(problem)["red"] == []
    gradients = skipping.gradients
    monkeypatch.setattr(
        skipping, "gradients", lambda p, dtype, **o: gradients(p, dtype, dense_share=0.3,
                                                               seed=int(dtype == torch.float32))
    )  # fmt: skip
    assert skipping.sampled(0.3).check(problem)["red"]


def test_a_wrong_fused_loss_is_not_measured(monkeypatch, capsys):
    wrong = ours("fused", divergence="forward_kl")
    monkeypatch.setitem(fused_loss.VARIANTS, "fused", wrong)
    assert fused_loss.main(["--quick"]) == 1
    printed = capsys.readouterr()
    assert "dweight_error" in printed.err and not printed.out


def test_only_the_largest_vocabulary_has_limits(monkeypatch, capsys):
    """The command of each row measures the vocabulary and threads of that row."""
    slow = {"time_ratio": 2.0, "memory_ratio": 0.1}
    monkeypatch.setattr(fused_loss, "measure", lambda shape: {**slow, "vocab": shape.vocab})
    threads = str(torch.get_num_threads())
    assert fused_loss.main(["--vocab", "32000", "--threads", threads]) == 0
    assert fused_loss.main(["--vocab", "151936", "32000", "--threads", threads]) == 1
    for row in map(json.loads, capsys.readouterr().out.splitlines()):
        head, flags = row["command"].split(" --", 1)
        args = fused_loss.parse(shlex.split("--" + flags))
        assert head == "python -m benchmarks.fused_loss"
        assert (args.vocab, args.threads) == ([row["vocab"]], int(threads))


def test_a_peak_before_the_call_is_not_counted(monkeypatch):
    """Making the inputs may need more memory than the call."""
    small, make = Shape(rows=8, hidden=8, vocab=64, topk=2), fused_loss.problem

    def with_a_peak(shape):
        torch.ones(64 << 20, dtype=torch.float32).sum()  # 256 MiB, gone before the call
        return make(shape)

    monkeypatch.setattr(fused_loss, "problem", with_a_peak)
    assert fused_loss.measure_peak("fused", small) < 64


@pytest.mark.parametrize("path", readme.DOCUMENTS, ids=lambda path: path.name)
def test_generated_blocks_are_up_to_date(path):
    text = path.read_text(encoding="utf-8")
    assert readme.rendered(text) == text, "run python -m benchmarks.readme"


def test_the_cache_is_measured(tmp_path):
    command = [sys.executable, "-m", "benchmarks.cache", "--quick", "--repeats", "1"]
    done = subprocess.run(
        [*command, "--out", str(tmp_path)], check=True, capture_output=True, text=True, cwd=ROOT
    )
    rows = [json.loads(line) for line in done.stdout.splitlines()]
    assert [json.loads(line) for line in (tmp_path / "cache.jsonl").open()] == rows
    assert [(row["codec"], row["top_p"]) for row in rows[:4]] == cache.CACHES
    for row in rows:
        by_array = row["bytes_per_token_by_array"]
        assert sum(by_array.values()) == pytest.approx(row["bytes_per_token"])
        assert row["read_tokens_per_s"] > 0 and row["write_tokens_per_s"] > 0
        assert 0 <= row["error_nat"] < cache.MAX_ERROR


def test_the_committed_rows_of_the_cache_meet_the_limits():
    rows = [json.loads(line) for line in (ROOT / "benchmarks/results/cache.jsonl").open()]
    assert {(row["codec"], row["top_p"]) for row in rows} == set(cache.CACHES)
    assert cache.missed(rows, rates=True) == []
    for row in rows:
        assert 0.4 < row["mean_entropy_nat"] < 0.5 and row["mean_list_length"] > 4


def test_each_limit_of_the_cache_can_be_missed():
    row = {"codec": "compact", "top_p": 0.99, "ids": "zipf", "bytes_per_token": 25.0}
    row |= {"error_nat": 2e-3, "read_tokens_per_s": 9e5, "write_tokens_per_s": 9e4}
    assert len(cache.missed([row], rates=True)) == 4
    assert len(cache.missed([row], rates=False)) == 2


def test_the_synthetic_teacher_is_a_distribution_of_distinct_ids():
    rng = np.random.default_rng(1)
    ids, logprobs, tail, entropy = cache.distributions(4000, 151936, 64, rng)
    assert all(len(set(row)) == 64 for row in ids.tolist())
    np.testing.assert_allclose(np.exp(logprobs).sum(1) + np.exp(tail), 1, rtol=1e-12)
    assert 0.4 < entropy.mean() < 0.5 and 0.26 < np.median(entropy) < 0.32
    assert (np.diff(logprobs, axis=1) <= 0).all()


def rows_of(start, end, online):
    names = {FINE_TUNED: start, DISTILLED: end, ONLINE: online}
    rows = [
        {"seed": 0, "stage": name, "greedy": 1.0, "sampled": sampled, "kl": kl}
        for name, (sampled, kl) in names.items()
    ]
    return [*rows, {"seed": 0, "stage": "teacher's scores"}]


def test_criteria_can_be_met():
    rows = rows_of((0.8, 0.1), (0.95, 0.01), (0.96, 0.01))
    assert demo_seeds.missed(rows) == []
    table = demo_seeds.table(rows)
    assert "| 1.000 | 0.950 | 0.950 ± 0.015 | 0.0100 | 0.0100 to 0.0100 |" in table


@pytest.mark.parametrize(
    ("start", "end", "online", "criterion"),
    [
        ((0.91, 0.1), (0.95, 0.01), (0.95, 0.01), "5 points"),
        ((0.8, 0.1), (0.92, 0.01), (0.92, 0.01), "at least 0.93"),
        ((0.8, 0.1), (0.95, 0.04), (0.95, 0.01), "0.35"),
        ((0.8, 0.1), (0.94, 0.01), (0.99, 0.01), "within 4"),
    ],
)
def test_each_criterion_can_be_missed(start, end, online, criterion):
    (failure,) = demo_seeds.missed(rows_of(start, end, online))
    assert criterion in failure
