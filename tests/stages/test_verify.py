"""`lopd verify`: checks from files, and the limit on the noise floor."""

import hashlib
import json
import shutil
from pathlib import Path

import numpy as np
import pytest
from conftest import save_qwen3
from helpers_cache import edit_receipt, flip, make_manifest, write_cache
from helpers_stages import make_rollouts, one_line, score_argv
from safetensors import safe_open
from safetensors.numpy import load_file, save_file

from lopd.cli import main
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


def test_complete_artefacts_pass(teacher_folder, rollouts, cache, capsys):
    assert verify(rollouts) == 0
    rows = shown(capsys)
    assert rows["sequences"] == "20, all in range" and "unchanged" in rows["model"]
    assert verify(cache) == 0
    rows = shown(capsys)
    assert rows["shards"] == "4, all match their receipts"
    assert rows["vocabulary"] == "matches the manifest"


@pytest.mark.parametrize("codec", ["exact", "packed", "compact"])
def test_lists_that_are_as_flat_as_can_be_pass(tmp_path, codec):
    """Their log-probs are low and alike, so that rounding moves them all in one direction."""
    write_cache(tmp_path, make_manifest(codec=codec, k=150, vocab_size=300), spread=0.01)
    gaps = [
        np.abs(item.lists.logprobs - item.teacher_logprobs[item.lists.rows])[listed]
        for item in TeacherCache.open(tmp_path)
        for listed in [item.lists.ids == item.rollout.tokens[3:][item.lists.rows]]
    ]
    assert np.concatenate(gaps).max() > 0.05 or codec != "compact"
    assert verify(tmp_path) == 0


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
    """Copy a cache, change the arrays of a shard and make its receipt match."""
    shutil.copytree(cache, out)
    file = out / "shard-00001.safetensors"
    with safe_open(file, framework="numpy") as opened:
        metadata = opened.metadata()
    arrays = load_file(file)
    change(arrays)
    save_file(arrays, file, metadata=metadata)
    digest = hashlib.sha256(file.read_bytes()).hexdigest()
    edit_receipt(out / "shard-00001.json", sha256=digest, bytes=file.stat().st_size)


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
def test_value_out_of_range_is_named_though_hashes_match(cache, tmp_path, capsys, change, message):
    rewrite(cache, tmp_path / "copy", change)
    assert verify(tmp_path / "copy") == 2
    assert message in one_line(capsys)


def test_checkpoint_must_match_its_manifest(teacher_folder, tmp_path, capsys):
    student = save_qwen3(tmp_path / "student", seed=5)
    assert main(["declare", "--model", str(student), "--teacher", str(teacher_folder)]) == 0
    assert verify(student) == 0
    config = json.loads((student / "config.json").read_text())
    (student / "config.json").write_text(json.dumps({**config, "rope_theta": 7.0}))
    assert verify(student) == 2
    assert "config.rope_theta was None, is 7.0 since its manifest was" in one_line(capsys)
    (student / "config.json").write_text(json.dumps(config))
    template = student / "chat_template.jinja"
    template.write_text("{{ x }}")
    assert verify(student) == 2
    assert "chat_template was None, is" in one_line(capsys)
    template.unlink()
    weights = load_file(student / "model.safetensors")
    weights["model.norm.weight"] += 1
    save_file(weights, student / "model.safetensors", metadata={"format": "pt"})
    assert verify(student) == 2
    assert "found weights" in one_line(capsys)


def test_evaluation_must_have_all_answers(teacher_folder, prompt_file, tmp_path, capsys):
    out = tmp_path / "eval"
    argv = ["eval", "--model", str(teacher_folder), "--prompts", str(prompt_file)]
    argv += ["--max-new-tokens", "4", "--num-samples", "2", "--device", "cpu"]
    assert main([*argv, "--out", str(out)]) == 0
    assert verify(out) == 0
    lines = (out / "answers.jsonl").read_text().splitlines(keepends=True)
    (out / "answers.jsonl").write_text("".join(lines[:-1]))
    assert verify(out) == 2
    assert "answers.jsonl: found" in one_line(capsys)
    (out / "receipt.json").unlink()  # as in evaluations of earlier versions
    assert verify(out) == 2
    assert f"found {len(lines) - 1} answers; expected {len(lines)}" in one_line(capsys)


def test_altered_results_of_an_evaluation_are_found(teacher_folder, prompt_file, tmp_path, capsys):
    out = tmp_path / "eval"
    argv = [
        "eval",
        "--model",
        str(teacher_folder),
        "--prompts",
        str(prompt_file),
        "--out",
        str(out),
    ]
    argv += ["--max-new-tokens", "4", "--num-samples", "1", "--device", "cpu"]
    assert main(argv) == 0
    inspect = ["inspect", str(out), "--verify"]
    assert main(inspect) == 0
    assert "all 2 files match their receipt" in capsys.readouterr().out
    file = out / "results.json"
    results = file.read_text()
    for found, changed in ('"prompts"', '"prompus"'), ('"mean_tokens": 4.0', '"mean_tokens": 5.0'):
        assert found in results
        file.write_text(results.replace(found, changed))
        capsys.readouterr()
        assert verify(out) == main(inspect) == main(argv) == 2
        assert capsys.readouterr().err.count("results.json: altered") == 3
    (out / "receipt.json").unlink()
    assert main(inspect) == 2
    assert "'evaluation' of an earlier version, which has no hashes" in one_line(capsys)
    file.write_text(results.replace('"prompts"', '"prompus"'))
    assert verify(out) == 2
    assert "torn or altered ('prompts')" in one_line(capsys)


def test_noise_is_small_compared_with_the_signal(teacher_folder, student_folder, cache, capsys):
    flags = ["--dtype", "float32", "--tokens-per-batch", "20"]
    assert rescore(cache, teacher_folder, student_folder, *flags) == 0
    rows = shown(capsys)
    assert number(rows["teacher"]) < 1e-6 < 0.1 < number(rows["student"])
    assert rows["rescored"].startswith("12 sequences, ")
    assert rows["buckets"].startswith("100.0 %")
    assert "not the model" not in rows["student"]


def test_a_cache_is_scored_again_in_its_own_dtype(teacher_folder, student_folder, cache, capsys):
    assert rescore(cache, teacher_folder, student_folder, "--tokens-per-batch", "20") == 0
    rows = shown(capsys)
    assert rows["rescored with"] == "transformers, float32, tokens_per_batch 20"
    assert number(rows["teacher"]) < 1e-6


def test_noise_above_the_allowed_share_fails(teacher_folder, student_folder, cache, capsys):
    flags = ["--dtype", "bfloat16"]
    assert rescore(cache, teacher_folder, student_folder, *flags) == 0
    share = float(shown(capsys)["noise share"])
    assert 0 < share < 0.1
    limit = ["--max-noise-share", share / 2]
    assert rescore(cache, teacher_folder, student_folder, *flags, *limit) == 1
    assert "the noise floor is" in one_line(capsys)


def test_student_equal_to_the_teacher_leaves_only_noise(teacher_folder, cache, capsys):
    assert rescore(cache, teacher_folder, teacher_folder, "--dtype", "bfloat16") == 1
    rows = shown(capsys)
    assert rows["noise share"] == "1" and "not the model that made the rollouts" in rows["student"]


def test_teacher_that_did_not_score_the_cache_is_refused(student_folder, cache, capsys):
    assert rescore(cache, student_folder, student_folder) == 2
    assert "name the model that scored it" in one_line(capsys)


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (["--rescore", "3"], "requires --teacher and --student"),
        (["--teacher", "t"], "--teacher and --student require --rescore N"),
        (["--rescore", "-1"], "found -1; expected 0 or a positive number"),
        (["--max-noise-share", "0"], "expected a positive number"),
    ],
)
def test_settings_that_do_not_fit_together(cache, capsys, flags, message):
    assert verify(cache, *flags) == 2
    assert message in one_line(capsys)


def test_only_a_cache_is_rescored(rollouts, teacher_folder, student_folder, capsys):
    assert rescore(rollouts, teacher_folder, student_folder) == 2
    assert "--rescore requires a cache" in one_line(capsys)


def test_unfinished_cache_does_not_pass(cache, tmp_path, capsys):
    manifest = TeacherCache.open(cache).manifest
    with CacheWriter.create(tmp_path / "cache", manifest):
        pass
    assert verify(tmp_path / "cache") == 2
    assert "shard-00000.json" in one_line(capsys)
