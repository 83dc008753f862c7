"""The training benchmark at toy size: gate, rows, and search of the largest batch."""

from dataclasses import replace
from functools import partial
from types import SimpleNamespace

import pytest
import torch

from benchmarks import criteria, gpu_suite, training
from benchmarks.clock import Prepared
from benchmarks.qwen3 import MODELS, TOY, Job
from lopd.models import flops
from lopd.training.dry_run import meta_model

PART = "training_1.7B"
PUBLISHED = {"0.6B": 596_049_920, "1.7B": 1_720_574_976, "4B": 4_022_468_096, "8B": 8_190_735_360}
SEARCHED = "{}, largest micro-batch"


def rows_of(tmp_path, part=PART):
    code = gpu_suite.main(["--out", str(tmp_path), "--quick", "--device", "cpu", "--only", part])
    return code, {row["variant"]: row for row in criteria.read([tmp_path / "rows.jsonl"])}


@pytest.mark.parametrize("name", MODELS)
def test_shapes_have_the_parameter_counts_of_the_published_models(name, tmp_path):
    MODELS[name].config().save_pretrained(tmp_path)
    model = meta_model(str(tmp_path), "bfloat16")
    assert sum(p.numel() for p in model.parameters()) == PUBLISHED[name]


@pytest.mark.parametrize("part", [p for p in gpu_suite.ON_REQUEST if p.startswith("training_")])
def test_rows(part, tmp_path, monkeypatch):
    monkeypatch.setitem(flops.PEAKS, "cpu", (1.0, 1.0))
    code, rows = rows_of(tmp_path, part)
    assert code == 0 and part not in gpu_suite.DEFAULT
    base = rows[training.BASE]
    for name in ("fused", "dense logits", "dense logits of loss rows"):
        row, result = rows[name], rows[SEARCHED.format(name)]
        assert row["status"] == result["status"] == "ok"
        seconds = row["median_ms"] / 1e3
        assert row["tokens_per_s"] * seconds == pytest.approx(row["tokens"])
        assert row["loss_tokens"] == (1 - row["prompt_share"]) * row["tokens"]
        assert row["head_ms"] == pytest.approx(row["median_ms"] - base["median_ms"])
        assert row["mfu"] * seconds > base["mfu"] * base["median_ms"] / 1e3  # the head's FLOPs
        assert row["peak_mib"] is None and row["optim"] == "adamw_torch_fused"
        assert result["too_many_sequences"] is None and result["tries"] <= 4
    assert sum(rows["planned peak"]["planned_mib"].values()) == pytest.approx(
        rows["planned peak"]["planned_total_mib"], abs=0.3
    )


def test_the_step_without_head_updates_the_same_parameters():
    cpu, size = torch.device("cpu"), replace(MODELS["8B"], **TOY)
    job = Job(size, cpu, "sdpa")
    for loss in (training.fused, training.without_head):
        loss(job.model, *job.batch(1)).backward()
        assert all(p.grad is not None and p.grad.any() for p in job.model.parameters())
        job.optimizer.zero_grad()


def test_a_step_that_differs_from_the_dense_one_is_red_and_not_timed(tmp_path, monkeypatch):
    right = training.step

    def biased(*args):
        loss, stats = right(*args)
        return 1.001 * loss, stats

    monkeypatch.setattr(training, "step", biased)
    code, rows = rows_of(tmp_path)
    assert code == 1 and set(rows) == {"fused against dense", PART}
    assert rows["fused against dense"]["status"] == "red gate"
    assert "gradient_error" in rows["fused against dense"]["reason"]


def hungry(room, model, batch, num_items):
    """A loss with memory for `room` sequences."""
    if len(batch["sequence_names"]) > room:
        raise torch.cuda.OutOfMemoryError("no room")
    return training.dense(model, batch, num_items)


def test_out_of_memory_is_reported_and_the_rest_is_measured(tmp_path, monkeypatch):
    size = {**TOY, "sequences": 2, "search_s": 30.0}
    monkeypatch.setattr(training, "TOY", size)
    for name, room in (("dense logits", 3), ("dense logits of loss rows", 1)):
        monkeypatch.setitem(training.LOSSES, name, ("peer", partial(hungry, room)))
    code, rows = rows_of(tmp_path)
    assert code == 0
    result = rows[SEARCHED.format("dense logits")]
    assert (result["largest_sequences"], result["too_many_sequences"]) == (3, 4)
    assert rows["dense logits of loss rows"]["status"] == "out of memory"
    assert SEARCHED.format("dense logits of loss rows") not in rows
    assert rows["fused"]["status"] == rows[SEARCHED.format("fused")]["status"] == "ok"


def test_a_search_that_fails_for_another_reason_reports_it(tmp_path, monkeypatch):
    def broken(model, batch, num_items):
        if len(batch["sequence_names"]) == 1:
            raise ValueError("oh")
        return training.dense(model, batch, num_items)

    monkeypatch.setattr(training, "TOY", {**TOY, "sequences": 2, "search_s": 30.0})
    monkeypatch.setitem(training.LOSSES, "dense logits", ("peer", broken))
    code, rows = rows_of(tmp_path)
    row = rows[SEARCHED.format("dense logits")]
    assert code == 0 and row["status"] == "failed" and "oh" in row["reason"]


@pytest.mark.parametrize("first", [1, 3, 40, 1000])
@pytest.mark.parametrize("room", [1, 2, 3, 7, 30, 64, 65, 700])
def test_the_search_returns_the_largest_that_fits(room, first):
    asked = []

    def fits(count):
        asked.append(count)
        return count <= room

    good, bad, tried = training.largest_fitting(fits, first, tries=40)
    assert good <= room < bad and bad - good <= max(1, good // 16)
    assert len(asked) == len(set(asked)) == tried and min(asked) > 0


class Gpu:
    """A job on a device with `memory` MiB; a sequence takes 50 and the model 1000."""

    def __init__(self, memory):
        self.memory, self.before, self.device = memory, 7 << 20, SimpleNamespace(type="cuda")
        self.size = replace(MODELS["8B"], search_s=1000.0)

    def batch(self, sequences):
        return sequences, 1.0

    def prepare(self, loss, sequences, num_items):
        return Prepared(lambda: sequences)

    def attempt(self, run):
        peak = 1000.0 + 50.0 * run()
        if peak > self.memory - 7:
            return {"status": "out of memory", "reason": "no room", "peak_mib": None}
        return {"status": "ok", "peak_mib": peak}


@pytest.mark.parametrize(("memory", "room"), [(1060, 1), (1110, 2), (1160, 3), (5008, 80)])
def test_the_search_starts_from_the_peaks_of_small_batches(memory, room, monkeypatch):
    free, reserved = (memory - 900) << 20, 900 << 20
    monkeypatch.setattr(torch.cuda, "mem_get_info", lambda device: (free, memory << 20))
    monkeypatch.setattr(torch.cuda, "memory_reserved", lambda device: reserved)
    result = training.search(Gpu(memory), None, 1.0, float("inf"))
    good, bad = result["largest_sequences"], result["too_many_sequences"]
    assert good <= room < bad and bad - good <= max(1, good // 16)
    assert result["largest_peak_mib"] == 1000.0 + 50.0 * good and result["tries"] <= 5
    assert result["extrapolated_sequences"] == (None if room == 1 else room)


def test_a_search_without_time_for_the_largest_gives_a_lower_bound(monkeypatch):
    monkeypatch.setattr(torch.cuda, "mem_get_info", lambda device: (4000 << 20, 0))
    monkeypatch.setattr(torch.cuda, "memory_reserved", lambda device: 1007 << 20)
    result = training.search(Gpu(5007), None, 20.0, float("inf"))
    assert result["largest_sequences"] == 49 and result["too_many_sequences"] is None
    assert result["extrapolated_sequences"] == 80


def test_a_search_ends_with_its_tries_or_its_time():
    assert training.largest_fitting(lambda count: True, 1, tries=4) == (8, None, 4)
    assert training.largest_fitting(lambda count: None if count > 2 else True, 1, tries=4) == (
        2,
        None,
        2,
    )
    assert training.largest_fitting(lambda count: False, 1, tries=4) == (0, 1, 1)
