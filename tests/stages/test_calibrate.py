"""`lopd calibrate`: the new cache, resuming, who may read it, and the gate that admits it."""

import dataclasses
import shutil

import numpy as np
import pytest
from helpers_artefacts import (
    without_logprobs,
    write_cache,
    write_model,
    write_pipeline,
    write_sequences,
)
from helpers_cache import make_manifest, make_pair

from lopd.cli import main
from lopd.errors import ShardError
from lopd.evaluation.calibration import Calibration
from lopd.provenance import MANIFEST_NAME, read_manifest
from lopd.store import CODECS, CacheWriter, TeacherCache

ON_CPU = ["--dtype", "float32", "--device", "cpu"]
PLAN = (7, 7, 7, 4)


def write_scored(folder, codec, **changes):
    """A cache of 25 sequences in four shards, with given weights in one of them."""
    pairs = [make_pair(index, length=5 + index % 4)[:2] for index in range(sum(PLAN))]
    pairs[3] = (dataclasses.replace(pairs[3][0], weight=2.0, reward=1.0), pairs[3][1])
    manifest = make_manifest(codec=codec, plan=PLAN, **changes)
    if manifest.scoring.rollout_logprobs == "absent":
        pairs = [(without_logprobs(rollout), scores) for rollout, scores in pairs]
    with CacheWriter.create(folder, manifest) as writer:
        for shard, size in enumerate(PLAN):
            writer.write(shard, pairs[7 * shard :][:size])
        writer.finish()
    return folder


def calibrate(cache, out, *flags):
    return main(["calibrate", "--cache", str(cache), "--out", str(out), *flags])


def shard_bytes(folder):
    return {file.name: file.read_bytes() for file in sorted(folder.glob("shard-*"))}


@pytest.mark.parametrize("codec", CODECS)
def test_it_writes_the_formula_and_leaves_the_rest(tmp_path, codec, capsys):
    source = write_scored(tmp_path / "cache", codec)
    assert calibrate(source, tmp_path / "out", "--folds", "3") == 0
    assert "log q - log p_ref after" in capsys.readouterr().out
    old, new = TeacherCache.open(source, support="list"), TeacherCache.open(tmp_path / "out")
    calibration = Calibration(40, 3, "rollout_logprobs_raw")
    for item in old:
        calibration.add(item)
    changed = 0
    for before, after in zip(old, new, strict=True):
        np.testing.assert_array_equal(after.teacher_logprobs, calibration.calibrated(before))
        changed += (after.teacher_logprobs != before.teacher_logprobs).sum()
        assert np.array_equal(after.teacher_entropy, before.teacher_entropy)
        assert not after.lists.lengths.any() and not after.tail_logprobs.any()
        for name in ("tokens", "loss_mask", "rollout_logprobs", "prompt_id", "weight", "reward"):
            assert np.array_equal(getattr(after.rollout, name), getattr(before.rollout, name))
    assert changed > 100
    manifest = read_manifest(tmp_path / "out", kind="cache")
    assert manifest.stage == "calibrate" and manifest.codec == "exact" and manifest.k == 0
    assert manifest.scoring.is_calibrated and manifest.shards == PLAN
    assert manifest.inputs["cache"]["digest"] == old.digest()
    assert manifest.raw["calibration"]["folds"] == 3
    assert manifest.rollouts.digest == old.manifest.rollouts.digest
    for command in (["verify"], ["inspect", "--verify"]):
        assert main([*command, str(tmp_path / "out")]) == 0
    shown = capsys.readouterr().out
    assert "teacher_logprobs calibrated" in shown and "the teacher are calibrated" in shown


def test_an_interrupted_run_is_continued_to_the_same_bytes(tmp_path, monkeypatch, capsys):
    source = write_scored(tmp_path / "cache", "packed")
    assert calibrate(source, tmp_path / "whole") == 0
    write, written = CacheWriter.write, []

    def fail(writer, shard, records):
        if len(written) == 2:
            raise ShardError("disk full")
        written.append(shard)
        write(writer, shard, records)

    with monkeypatch.context() as patch:
        patch.setattr(CacheWriter, "write", fail)
        assert calibrate(source, tmp_path / "out") == 2
    assert TeacherCache.open(tmp_path / "out", allow_incomplete=True).missing_shards == [2, 3]
    (tmp_path / "out" / "shard-00000.safetensors").write_bytes(b"torn")
    capsys.readouterr()
    assert calibrate(source, tmp_path / "out") == 0
    assert shard_bytes(tmp_path / "out") == shard_bytes(tmp_path / "whole")
    assert "tokens" in capsys.readouterr().out
    assert calibrate(source, tmp_path / "out") == 0
    assert "finished already, nothing to do" in capsys.readouterr().err
    assert calibrate(source, tmp_path / "out", "--folds", "4") == 2
    assert "folds was 5, is 4" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("scoring", "message"),
    [
        ({"rollout_logprobs": "absent"}, "the log-probs of the rollouts are unknown, and"),
        ({"tail": "renormalized"}, "lists were renormalised"),
        ({"teacher_logprobs": "calibrated"}, "is calibrated already"),
        ({"support": {"ids": "x", "eos_class": [1, 2]}}, "count as one"),
    ],
)
def test_other_caches_are_refused(tmp_path, capsys, scoring, message):
    source = write_scored(tmp_path / "cache", "exact", scoring=scoring)
    assert calibrate(source, tmp_path / "out") == 2
    assert message in capsys.readouterr().err
    assert not (tmp_path / "out").exists()


def test_prompts_of_one_fold_are_too_few(tmp_path, capsys):
    pair = make_pair(0)[:2]
    pairs = [(dataclasses.replace(pair[0], sample=sample), pair[1]) for sample in range(3)]
    with CacheWriter.create(tmp_path / "cache", make_manifest(plan=(3,))) as writer:
        writer.write(0, pairs)
        writer.finish()
    assert calibrate(tmp_path / "cache", tmp_path / "out") == 2
    assert "all its prompts are in one of 5 folds" in capsys.readouterr().err


@pytest.fixture(scope="module")
def foreign(tmp_path_factory):
    """A pipeline whose cache another teacher scored, and that cache calibrated."""
    folder = write_pipeline(tmp_path_factory.mktemp("foreign"))
    other = write_model(folder / "other", seed=9)
    rollouts = write_sequences(folder / "rollouts-2", folder / "student")
    write_cache(folder / "other-cache", other, rollouts)
    assert calibrate(folder / "other-cache", folder / "calibrated") == 0
    return folder


def distill(folder, cache, out, *flags):
    argv = ["distill", "--student", str(folder / "student"), "--cache", str(folder / cache)]
    settings = ["--max-steps", "2", "--batch-size", "4", "--save-every", "0", "--log-every", "1"]
    return main([*argv, "--out", str(out), *settings, *ON_CPU, *flags])


@pytest.mark.thorough
def test_the_gate_names_it_where_it_helps_and_admits_it(foreign, tmp_path, capsys):
    assert distill(foreign, "other-cache", tmp_path / "out") == 2
    assert "lopd calibrate" not in capsys.readouterr().err
    sampled = ["--objective", "policy_gradient", "--holdout", "2"]
    assert distill(foreign, "other-cache", tmp_path / "out", *sampled) == 2
    assert "out of the cache ('lopd calibrate'), or pass --allow-" in capsys.readouterr().err
    out = tmp_path / "out"
    assert distill(foreign, "calibrated", out, *sampled) == 0
    manifest = read_manifest(out)
    (override,) = manifest.overrides
    assert override.name == "teacher-mismatch" and override.found.endswith(", calibrated")
    assert manifest.inputs["cache"]["calibration"]["folds"] == 5
    assert manifest.raw["objective"]["calibrated"] is True
    assert manifest.raw["holdout"]["objective"] == "log_ratio"
    assert distill(foreign, "calibrated", out, *sampled) == 0
    assert "finished already" in capsys.readouterr().err
    assert main(["report", str(out), "--answers", "2"]) == 0
    assert "calibrated; no answers are shown" in capsys.readouterr().err
    ratio = ["--objective", "log_ratio", "--token-weights", "divergence_rank"]
    assert distill(foreign, "calibrated", tmp_path / "ratio", *ratio) == 0


def test_a_student_of_unknown_origin_is_still_refused(foreign, tmp_path, capsys):
    shutil.copytree(foreign / "student", tmp_path / "student")
    (tmp_path / "student" / MANIFEST_NAME).unlink()
    argv = ["distill", "--student", str(tmp_path / "student"), "--out", str(tmp_path / "out")]
    flags = ["--cache", str(foreign / "calibrated"), "--objective", "log_ratio"]
    assert main([*argv, *flags, *ON_CPU]) == 2
    assert "SFT teacher is not recorded" in capsys.readouterr().err


def test_readers_of_distributions_refuse_it(foreign, tmp_path, capsys):
    student, cache = str(foreign / "student"), str(foreign / "calibrated")
    assert distill(foreign, "calibrated", tmp_path / "out") == 2
    assert "expected policy_gradient or log_ratio, or the cache that was" in capsys.readouterr().err
    flags = ["--objective", "log_ratio", "--refresh-every", "1", "--teacher"]
    assert distill(foreign, "calibrated", tmp_path / "o", *flags, str(foreign / "other")) == 2
    assert "those of refreshed answers would not be" in capsys.readouterr().err
    assert main(["eval", "--model", student, "--cache", cache, "--out", str(tmp_path / "e")]) == 2
    assert "a KL needs those of the teacher" in capsys.readouterr().err
    rescore = ["--rescore", "2", "--teacher", str(foreign / "other"), "--student", student]
    assert main(["verify", cache, *rescore, "--device", "cpu"]) == 2
    assert "differ from the teacher's on purpose" in capsys.readouterr().err


def test_a_calibrated_cache_holds_any_finite_number(tmp_path):
    rollout, scores, _ = make_pair(0)
    none = {
        "topk_ids": np.zeros((6, 0), np.int32),
        "topk_logprobs": np.zeros((6, 0), np.float32),
        "tail_logprobs": np.zeros(6, np.float32),
    }
    manifest = make_manifest(plan=(1,), k=0, scoring={"teacher_logprobs": "calibrated"})
    values = np.array([0.5, -3, 1.25, 0, -1, 2], np.float32)
    given = dataclasses.replace(scores, teacher_logprobs=values, **none)
    with CacheWriter.create(tmp_path, manifest) as writer:
        bad = dataclasses.replace(given, teacher_logprobs=np.full(6, np.nan, np.float32))
        with pytest.raises(Exception, match="nan, expected a finite number of nat"):
            writer.write(0, [(rollout, bad)])
        writer.write(0, [(rollout, given)])
        writer.finish()
    (item,) = TeacherCache.open(tmp_path)  # list+sampled adds nothing
    assert item.teacher_logprobs.tolist() == values.tolist() and item.topk_ids.shape == (6, 0)
