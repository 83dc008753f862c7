"""`lopd verify`: what files can tell, and the noise of scoring against its signal."""

import hashlib
import json
import shutil
from pathlib import Path

import numpy as np
import pytest
from conftest import save_qwen3
from helpers_cache import flip
from helpers_stages import make_rollouts, one_line, score_argv
from safetensors import safe_open
from safetensors.numpy import load_file, save_file

from lopd.cli import main
from lopd.engines.transformers import TransformersEngine
from lopd.evaluation.noise_floor import _bucket_kl, _candidates, _fold
from lopd.provenance.io import pretty_json
from lopd.store import CacheWriter, TeacherCache


@pytest.fixture(scope="module")
def rollouts(student_folder, tmp_path_factory):
    return make_rollouts(student_folder, tmp_path_factory.mktemp("rollouts"))


@pytest.fixture(scope="module")
def cache(teacher_folder, rollouts, tmp_path_factory):
    out = tmp_path_factory.mktemp("cache") / "cache"
    assert main(score_argv(teacher_folder, rollouts, out)) == 0
    return out


def verify(path, *flags):
    return main(["verify", "--path", str(path), *map(str, flags)])


def rescore(path, teacher, student, *flags):
    models = ["--rescore", "12", "--teacher", teacher, "--student", student, "--device", "cpu"]
    return verify(path, *models, *flags)


def shown(capsys):
    lines = capsys.readouterr().out.splitlines()
    return {name.strip(): value.strip() for name, value in (row.split("  ", 1) for row in lines)}


def number(text):
    return float(text.split()[0])


def test_whole_artefacts_pass(teacher_folder, rollouts, cache, capsys):
    assert verify(rollouts) == 0
    rows = shown(capsys)
    assert rows["sequences"] == "20, all in range" and "there, unchanged" in rows["model"]
    assert verify(cache) == 0
    rows = shown(capsys)
    assert rows["shards"].startswith("4, every one") and "the tokenizer" in rows["vocabulary"]


@pytest.mark.parametrize("name", ["cache", "rollouts"])
@pytest.mark.parametrize("damage", ["bit", "receipt", "vocabulary"])
def test_damage_is_named(request, tmp_path, capsys, name, damage):
    folder = Path(shutil.copytree(request.getfixturevalue(name), tmp_path / "copy"))
    if damage == "bit":
        flip(folder / "shard-00002.safetensors", -1)
    elif damage == "receipt":
        (folder / "shard-00002.json").unlink()
    else:
        vocab = json.loads((folder / "teacher_vocab.json").read_text())
        first, second = list(vocab)[:2]
        vocab[first], vocab[second] = vocab[second], vocab[first]
        (folder / "teacher_vocab.json").write_text(json.dumps(vocab))
    assert verify(folder) == 2
    assert ("teacher_vocab.json" if damage == "vocabulary" else "shard-00002") in one_line(capsys)


def rewrite(cache, out, change):
    """The same cache with hashes that fit, but other contents."""
    shutil.copytree(cache, out)
    file = out / "shard-00001.safetensors"
    with safe_open(file, framework="numpy") as opened:
        metadata = opened.metadata()
    arrays = load_file(file)
    change(arrays)
    save_file(arrays, file, metadata=metadata)
    receipt = out / "shard-00001.json"
    content = json.loads(receipt.read_text())
    content["sha256"] = hashlib.sha256(file.read_bytes()).hexdigest()
    content["bytes"] = file.stat().st_size
    receipt.write_bytes(pretty_json(content))


def shift(arrays):
    arrays["teacher_logprobs"][:] = np.roll(arrays["teacher_logprobs"], 1)


def shrink(arrays):
    arrays["tail_logprobs"] -= 1


def positive(arrays):
    arrays["teacher_logprobs"][3] = 0.5


def unknown(arrays):
    arrays["teacher_logprobs"][3] = np.nan


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (shift, "lacks teacher_logprobs"),
        (shrink, "lacks a mass of list and tail of 1"),
        (positive, "lacks valid teacher_logprobs"),
        (unknown, "lacks valid teacher_logprobs"),
    ],
)
def test_contents_out_of_range_are_found_though_hashes_fit(
    cache, tmp_path, capsys, change, message
):
    rewrite(cache, tmp_path / "copy", change)
    assert verify(tmp_path / "copy") == 2
    assert message in one_line(capsys)


def test_a_checkpoint_is_its_manifests(teacher_folder, tmp_path, capsys):
    student = save_qwen3(tmp_path / "student", seed=5)
    assert main(["declare", "--model", str(student), "--teacher", str(teacher_folder)]) == 0
    assert verify(student) == 0
    config = json.loads((student / "config.json").read_text())
    (student / "config.json").write_text(json.dumps({**config, "rope_theta": 7.0}))
    assert verify(student) == 2
    assert "its config" in one_line(capsys)
    (student / "config.json").write_text(json.dumps(config))
    weights = load_file(student / "model.safetensors")
    weights["model.norm.weight"] += 1
    save_file(weights, student / "model.safetensors", metadata={"format": "pt"})
    assert verify(student) == 2
    assert "its weights" in one_line(capsys)


def test_an_evaluation_holds_all_of_its_answers(teacher_folder, prompt_file, tmp_path, capsys):
    out = tmp_path / "eval"
    argv = ["eval", "--model", str(teacher_folder), "--prompts", str(prompt_file)]
    argv += ["--max_new_tokens", "4", "--num_samples", "2", "--device", "cpu"]
    assert main([*argv, "--out", str(out)]) == 0
    assert verify(out) == 0
    lines = (out / "answers.jsonl").read_text().splitlines(keepends=True)
    (out / "answers.jsonl").write_text("".join(lines[:-1]))
    assert verify(out) == 2
    assert f"holds {len(lines) - 1} answers, expected {len(lines)}" in one_line(capsys)


def test_the_noise_is_small_beside_the_signal(teacher_folder, student_folder, cache, capsys):
    flags = ["--dtype", "float32", "--tokens_per_batch", "20"]
    assert rescore(cache, teacher_folder, student_folder, *flags) == 0
    rows = shown(capsys)
    assert number(rows["teacher"]) < 1e-6 < 0.1 < number(rows["student"])
    assert rows["rescored"].startswith("12 sequences, ")
    assert rows["buckets"].startswith("100.0 %")
    assert "not the one" not in rows["student"]


def test_the_noise_of_another_dtype_fails_where_less_is_allowed(
    teacher_folder, student_folder, cache, capsys
):
    flags = ["--dtype", "bfloat16"]
    assert rescore(cache, teacher_folder, student_folder, *flags) == 0
    share = float(shown(capsys)["noise share"])
    assert 0 < share < 0.1
    limit = ["--max_noise_share", share / 2]
    assert rescore(cache, teacher_folder, student_folder, *flags, *limit) == 1
    assert "the noise floor is" in one_line(capsys)


def test_a_student_that_equals_the_teacher_leaves_only_noise(teacher_folder, cache, capsys):
    assert rescore(cache, teacher_folder, teacher_folder, "--dtype", "bfloat16") == 1
    rows = shown(capsys)
    assert rows["noise share"] == "1" and "not the one that rolled out" in rows["student"]


def test_the_noise_is_that_of_dense_distributions(teacher_folder, student_folder, cache, capsys):
    """Every quantity again from full rows, all buckets by hand."""
    assert rescore(cache, teacher_folder, student_folder, "--dtype", "float32") == 0
    rows = shown(capsys)
    chosen = np.sort(np.random.default_rng(0).choice(20, 12, replace=False))
    items = [TeacherCache.open(cache, support="list")[int(i)] for i in chosen]
    student = TransformersEngine.load(student_folder, dtype="float32", device="cpu")
    asked = [s.rollout.tokens for s in items], [s.rollout.prompt_length for s in items]
    kls = []
    for item, score in zip(items, student.score(*asked, student.vocab_size), strict=True):
        for row in range(len(score.teacher_logprobs)):
            dense = np.empty(student.vocab_size)
            dense[score.topk_ids[row]] = score.topk_logprobs[row]
            ids = item.topk_ids[row][item.topk_ids[row] >= 0]
            outside = np.setdiff1d(np.arange(student.vocab_size), ids)
            p = np.append(dense[ids], np.log(np.exp(dense[outside]).sum()))
            q = np.append(item.topk_logprobs[row][: len(ids)], item.tail_logprobs[row])
            kls.append((np.exp(p) * (p - q)).sum())
    assert number(rows["student"]) == pytest.approx(np.mean(kls), rel=1e-3)


def test_ids_that_a_top_k_lacks_join_the_rest_on_both_sides():
    stored_ids = np.array([[3, 5, 7, -1]])
    stored = np.log(np.array([[0.5, 0.2, 0.1, 0.0]]) + 1e-300)
    shared = np.array([[3, -1, 7, -1]])
    q = _fold(shared, stored_ids, stored, np.log(np.array([0.2])))
    np.testing.assert_allclose(np.exp(q), [[0.5, 0, 0.1, 0, 0.4]], atol=1e-12)
    p = _fold(
        shared, np.array([[3, 7, 9]]), np.log(np.array([[0.6, 0.1, 0.1]])), np.log(np.array([0.2]))
    )
    np.testing.assert_allclose(np.exp(p), [[0.6, 0, 0.1, 0, 0.3]], atol=1e-12)
    expected = 0.6 * np.log(0.6 / 0.5) + 0.3 * np.log(0.3 / 0.4)
    np.testing.assert_allclose(_bucket_kl(p, q), expected)
    assert 0 < _bucket_kl(q + 1e-6, q)[0] < 1e-11 and 0 < _bucket_kl(q - 1e-6, q)[0] < 1e-11


def test_candidates_list_an_id_once(teacher_folder):
    engine = TransformersEngine.load(teacher_folder, dtype="float32", device="cpu")
    (top,) = engine.score([np.array([5, 6, 7, 8])], [2], 3)
    (score,) = engine.score([np.array([5, 6, 7, 8])], [2], 3, extra_ids=[top.topk_ids])
    ids, logprobs, tail = _candidates(score)
    mass = np.where(ids >= 0, np.exp(logprobs.astype(float)), 0).sum(1) + np.exp(tail.astype(float))
    np.testing.assert_allclose(mass, 1, atol=1e-5)


def test_a_teacher_that_did_not_score_the_cache_is_refused(student_folder, cache, capsys):
    assert rescore(cache, student_folder, student_folder) == 2
    assert "name the model that scored it" in one_line(capsys)


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (["--rescore", "3"], "needs --teacher and --student"),
        (["--teacher", "t"], "--teacher and --student require --rescore N"),
        (["--rescore", "-1"], "found -1; expected 0 or a positive number"),
        (["--max_noise_share", "0"], "expected a positive number"),
    ],
)
def test_settings_that_cannot_be_meant(cache, capsys, flags, message):
    assert verify(cache, *flags) == 2
    assert message in one_line(capsys)


def test_only_a_cache_is_rescored(rollouts, teacher_folder, student_folder, capsys):
    assert rescore(rollouts, teacher_folder, student_folder) == 2
    assert "only a cache is rescored" in one_line(capsys)


def test_an_unfinished_cache_does_not_pass(cache, tmp_path, capsys):
    manifest = TeacherCache.open(cache).manifest
    with CacheWriter.create(tmp_path / "cache", manifest):
        pass
    assert verify(tmp_path / "cache") == 2
    assert "shard-00000.json" in one_line(capsys)
