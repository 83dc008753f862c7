"""Batch sizes of generation that nobody chose: what fits, recorded, and kept on resuming."""

import json

import pytest
import torch
from helpers_artefacts import write_model

from lopd.cli import main
from lopd.engines.transformers import TransformersEngine
from lopd.models.architecture import head_rows_of
from lopd.stages import batch_size
from lopd.training.dry_run import cache_bytes, meta_model, storage_bytes

PROMPTS = "".join(json.dumps({"prompt": text}) + "\n" for text in ("3", "3 + 4"))


@pytest.fixture
def teacher(tmp_path):
    (tmp_path / "prompts.jsonl").write_text(PROMPTS)
    return write_model(tmp_path / "teacher", seed=1)


def sample(root, *more, out="out"):
    flags = {"teacher": root / "teacher", "prompts": root / "prompts.jsonl", "out": root / out}
    words = [str(word) for name, value in flags.items() for word in (f"--{name}", value)]
    return main(["sft-data", *words, "--max-new-tokens", "4", "--device", "cpu", *more])


def recorded(root, out="out"):
    return json.loads((root / out / "manifest.json").read_text())["config"]["batch_size"]


def needed(model, sequences, length=4 + 5):
    """Free bytes at which this many sequences just fit."""
    dry = meta_model(str(model), "float32").eval()
    each = cache_bytes(dry, length) + batch_size.LOGIT_BYTES * head_rows_of(dry)
    return (storage_bytes(list(dry.parameters())) + sequences * each) / batch_size.SHARE


def test_the_cache_of_a_sequence_is_that_of_a_real_one(teacher):
    engine = TransformersEngine.load(teacher, dtype="float32", device="cpu")
    past = engine.model(torch.zeros((1, 7), dtype=torch.int64), use_cache=True).past_key_values
    real = sum(layer.keys.nbytes + layer.values.nbytes for layer in past.layers)
    assert cache_bytes(meta_model(str(teacher), "float32").eval(), 7) == real > 0


@pytest.mark.thorough
def test_memory_decides_and_the_number_is_printed_and_recorded(
    teacher, tmp_path, monkeypatch, capsys
):
    assert sample(tmp_path, out="much") == 0
    assert recorded(tmp_path, "much") == batch_size.MOST["cpu"] == 64
    for sequences, expected in ((7.9, 4), (8.1, 8), (0, 1)):
        monkeypatch.setattr(
            batch_size, "free_bytes", lambda device, n=sequences: needed(teacher, n)
        )
        assert sample(tmp_path, out=f"out{expected}") == 0
        assert f"batch size: {expected} (auto" in capsys.readouterr().err
        assert recorded(tmp_path, f"out{expected}") == expected


@pytest.mark.thorough
def test_a_resumed_run_keeps_its_number(teacher, tmp_path, monkeypatch):
    monkeypatch.setattr(batch_size, "free_bytes", lambda device: needed(teacher, 2.5))
    assert sample(tmp_path) == 0 and recorded(tmp_path) == 2
    for file in (tmp_path / "out").glob("shard-*"):
        file.unlink()
    sizes, generate = [], TransformersEngine.generate

    def spy(self, *args, **kwargs):
        sizes.append(self.batch_size)
        return generate(self, *args, **kwargs)

    monkeypatch.setattr(batch_size, "free_bytes", lambda device: 1 << 40)
    monkeypatch.setattr(TransformersEngine, "generate", spy)
    assert sample(tmp_path) == 0
    assert set(sizes) == {2}
    sizes.clear()
    for file in (tmp_path / "out").glob("shard-*"):
        file.unlink()
    assert sample(tmp_path, "--batch-size", "5") == 0
    assert set(sizes) == {5}


def test_a_batch_that_does_not_fit_names_the_next_size(teacher, tmp_path, monkeypatch, capsys):
    def full(self, prompts, *args):
        raise torch.OutOfMemoryError("CUDA out of memory")

    monkeypatch.setattr(TransformersEngine, "_generate_batch", full)
    assert sample(tmp_path, "--batch-size", "2") == 2
    error = capsys.readouterr().err
    assert "out of memory decoding 2 sequences of up to" in error
    assert "rerun the same command with --batch-size 1 or less" in error
