"""The stages on randomly initialised models: what they write, how they resume, what they refuse."""

import json
import shutil
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from conftest import TEMPLATE, TEXT, save_qwen3
from safetensors.numpy import load_file, save_file

from lopd.cli import main
from lopd.config.objective import Objective
from lopd.engines.transformers import TransformersEngine
from lopd.models.load import load_model
from lopd.store import RolloutStore, TeacherCache, scored_sequence
from lopd.training.batch import Collator
from lopd.training.step import step

COMMON = ["--dtype", "float32", "--device", "cpu"]


def shard_bytes(folder) -> dict[str, bytes]:
    return {file.name: file.read_bytes() for file in sorted(Path(folder).glob("shard-*"))}


@pytest.fixture(scope="module")
def prompts(tmp_path_factory):
    path = tmp_path_factory.mktemp("prompts") / "prompts.jsonl"
    words = TEXT.split()
    records = [{"prompt": " ".join(words[i : i + 3]), "answer": "1"} for i in range(10)]
    path.write_text("".join(json.dumps(record) + "\n" for record in records))
    return path


@pytest.fixture(scope="module")
def tuned(teacher_folder, student_folder, prompts, tmp_path_factory):
    """A student fine-tuned on the teacher's answers."""
    root = tmp_path_factory.mktemp("tuned")
    sample = ["--prompts", str(prompts), "--max-new-tokens", "5", *COMMON]
    data, out = str(root / "data"), str(root / "sft")
    assert main(["sft-data", "--teacher", str(teacher_folder), "--out", data, *sample]) == 0
    train = ["--max-steps", "2", "--batch-size", "4", "--save-every", "0", *COMMON]
    assert main(["sft", "--model", str(student_folder), "--data", data, "--out", out, *train]) == 0
    return Path(out)


def roll_out(student, prompts, out, *flags):
    return main(
        [
            *("rollout", "--student", str(student), "--prompts", str(prompts), "--out", str(out)),
            *("--max-new-tokens", "8", "--num-samples", "2", "--shard-size", "6", *COMMON, *flags),
        ]
    )


@pytest.fixture(scope="module")
def rollouts(tuned, prompts, tmp_path_factory):
    out = tmp_path_factory.mktemp("stages") / "rollouts"
    assert roll_out(tuned, prompts, out) == 0
    return out


def score(teacher, rollouts, out, *flags):
    return main(
        [
            *("score", "--teacher", str(teacher), "--rollouts", str(rollouts), "--out", str(out)),
            *("--k", "6", *COMMON, *flags),
        ]
    )


@pytest.fixture(scope="module")
def cache(teacher_folder, rollouts, tmp_path_factory):
    out = tmp_path_factory.mktemp("stages") / "cache"
    assert score(teacher_folder, rollouts, out) == 0
    return out


def one_line(capsys) -> str:
    error = capsys.readouterr().err.strip().splitlines()
    lines = [line for line in error if line.startswith("lopd ") and " error: " in line]
    assert len(lines) == 1, error
    return lines[0]


def test_rollouts_hold_every_sample_of_every_prompt(rollouts):
    store = RolloutStore.open(rollouts, kind="rollouts")
    assert len(store) == 20
    assert len({(store[i].prompt_id, store[i].sample) for i in range(20)}) == 20
    assert store.manifest.shards == (6, 6, 6, 2)
    sampling = store.manifest.sampling.raw
    assert (sampling["temperature"], sampling["top_p"], sampling["seed"]) == (1.0, 1.0, 0)


def test_a_rollout_does_not_depend_on_order_shards_or_batches(tuned, prompts, rollouts, tmp_path):
    shuffled = tmp_path / "shuffled.jsonl"
    shuffled.write_text("".join(sorted(prompts.read_text().splitlines(keepends=True))))
    flags = ["--shard-size", "7", "--batch-size", "3"]
    assert roll_out(tuned, shuffled, tmp_path / "out", *flags) == 0

    def by_name(folder):
        store = RolloutStore.open(folder)
        items = [store[i] for i in range(len(store))]
        return {(item.prompt_id, item.sample): item.tokens.tolist() for item in items}

    assert by_name(tmp_path / "out") == by_name(rollouts)


def test_sampling_elsewhere_than_at_temperature_1_keeps_both_logprobs(tuned, prompts, tmp_path):
    assert roll_out(tuned, prompts, tmp_path / "out", "--temperature", "0.6") == 0
    item = RolloutStore.open(tmp_path / "out")[0]
    assert np.abs(item.rollout_logprobs - item.rollout_logprobs_raw).max() > 1e-3


def test_lost_shards_are_made_again_byte_for_byte(tuned, prompts, rollouts, tmp_path, capsys):
    copy = tmp_path / "rollouts"
    shutil.copytree(rollouts, copy)
    (copy / "shard-00001.json").unlink()
    (copy / "shard-00003.safetensors").write_bytes(b"torn")
    capsys.readouterr()
    assert roll_out(tuned, prompts, copy, "--quiet") == 0
    assert shard_bytes(copy) == shard_bytes(rollouts)
    cut = RolloutStore.open(copy).summary()["finish_reasons"]["length"]
    (line,) = (line for line in capsys.readouterr().err.splitlines() if "cut off" in line)
    assert cut > 2  # a share that --quiet does not hide
    assert f"{cut} answers ({cut / 20:.0%}) were cut off at max_new_tokens 8" in line


def test_another_recipe_is_not_mixed_in(tuned, prompts, rollouts, tmp_path, capsys):
    copy = tmp_path / "rollouts"
    shutil.copytree(rollouts, copy)
    (copy / "shard-00001.json").unlink()
    assert roll_out(tuned, prompts, copy, "--seed", "1") == 2
    assert str(copy) in one_line(capsys)
    assert shard_bytes(copy)["shard-00000.json"] == shard_bytes(rollouts)["shard-00000.json"]


KILLED_AFTER = """
import os, signal, sys
from lopd.store import CacheWriter
from lopd.cli import main
write, count = CacheWriter.write, 0
def counting(self, *args):
    global count
    write(self, *args)
    count += 1
    if count == int(sys.argv[1]):
        os.kill(os.getpid(), signal.SIGKILL)
CacheWriter.write = counting
main(sys.argv[2:])
"""


@pytest.mark.thorough
@pytest.mark.parametrize("codec", ["exact", "packed"])
def test_a_killed_score_resumes_to_the_same_bytes(teacher_folder, rollouts, tmp_path, codec):
    argv = ["score", "--teacher", str(teacher_folder), "--rollouts", str(rollouts), "--k", "6"]
    argv += ["--codec", codec, *COMMON]
    whole, resumed = tmp_path / "whole", tmp_path / "resumed"
    assert main([*argv, "--out", str(whole)]) == 0
    command = [sys.executable, "-c", KILLED_AFTER, "2", *argv, "--out", str(resumed)]
    killed = subprocess.run(command, capture_output=True)
    assert killed.returncode == -9, killed.stderr.decode()
    before = shard_bytes(resumed)
    assert 0 < len(before) < len(shard_bytes(whole))
    written = {file: file.stat().st_mtime_ns for file in resumed.glob("shard-*")}
    assert main([*argv, "--out", str(resumed)]) == 0
    assert shard_bytes(resumed) == shard_bytes(whole)
    assert all(file.stat().st_mtime_ns == time for file, time in written.items())


def test_the_cache_agrees_with_the_teacher(cache, teacher_folder):
    model = load_model(teacher_folder, dtype="float32", device="cpu")
    items = TeacherCache.open(cache)
    for i in (0, 7, 19):
        item = items[i]
        tokens = torch.from_numpy(item.rollout.tokens.astype(np.int64))[None]
        with torch.no_grad():
            rows = torch.log_softmax(model(tokens).logits[0].double(), -1).numpy()
        length = item.rollout.prompt_length
        expected = rows[np.arange(length - 1, tokens.shape[1] - 1), item.rollout.tokens[length:]]
        np.testing.assert_allclose(item.teacher_logprobs, expected, atol=2e-5)


@pytest.mark.parametrize("objective", ["reverse_kl", "policy_gradient"])
def test_offline_and_live_gradients_agree_at_the_student_that_rolled_out(
    teacher_folder, tuned, rollouts, tmp_path, objective
):
    """The cache written to disk and a teacher asked there and then give the same gradient."""
    assert score(teacher_folder, rollouts, tmp_path / "cache", "--top-p", "1") == 0
    stored = TeacherCache.open(tmp_path / "cache")
    items = [stored[i] for i in range(8)]
    teacher = TransformersEngine.load(teacher_folder, dtype="float32", device="cpu")
    scores = teacher.score(
        [item.rollout.tokens for item in items], [item.rollout.prompt_length for item in items], 6
    )
    live = [scored_sequence(i.rollout, s) for i, s in zip(items, scores, strict=True)]
    student = load_model(tuned, dtype="float32", device="cpu")
    gradients = []
    for records in (items, live):
        batch = Collator()(records)
        student.zero_grad()
        loss, _ = step(student, batch, Objective(objective), batch["row_weights"].sum().item())
        loss.backward()
        gradients.append([p.grad.clone() for p in student.parameters()])
    assert max(g.abs().max() for g in gradients[0]) > 1e-4
    for offline, online in zip(*gradients, strict=True):
        torch.testing.assert_close(offline, online, rtol=1e-4, atol=1e-7)


DISTILL = ["--max-steps", "2", "--batch-size", "4", "--save-every", "0", *COMMON]


def distill(student, cache, out, *flags):
    argv = ["--student", str(student), "--cache", str(cache), "--out", str(out)]
    return main(["distill", *argv, *DISTILL, *flags])


@pytest.mark.parametrize(
    "flags",
    [
        [],
        ["--objective", "forward_kl"],
        ["--objective", "jsd", "--beta", "0.3"],
        ["--objective", "policy_gradient", "--advantage-clip", "1"],
        ["--tail", "renormalize"],
    ],
    ids=lambda flags: " ".join(flags) or "default",
)
def test_every_objective_trains(tuned, cache, tmp_path, flags):
    assert distill(tuned, cache, tmp_path / "out", *flags) == 0
    before, after = (load_file(f / "model.safetensors") for f in (tuned, tmp_path / "out"))
    assert any(not np.array_equal(before[name], after[name]) for name in before)
    lineage = json.loads((tmp_path / "out/manifest.json").read_text())["lineage"]
    tuned_lineage = json.loads((tuned / "manifest.json").read_text())["lineage"]
    assert lineage["sft_teacher"] == tuned_lineage["sft_teacher"]


def refuse_models(patch):
    from transformers import AutoModelForCausalLM

    def refuse(*args, **kwargs):
        raise AssertionError("a model was built before the gate")

    patch.setattr(AutoModelForCausalLM, "from_pretrained", refuse)


def test_another_teachers_scores_are_refused_before_a_model_is_built(
    tuned, rollouts, tmp_path, capsys, monkeypatch
):
    other = save_qwen3(tmp_path / "other", seed=9)
    assert score(other, rollouts, tmp_path / "cache") == 0
    with monkeypatch.context() as patch:
        refuse_models(patch)
        assert distill(tuned, tmp_path / "cache", tmp_path / "out") == 2
    assert "--allow" in one_line(capsys) and not (tmp_path / "out/manifest.json").exists()
    assert distill(tuned, tmp_path / "cache", tmp_path / "out", "--allow-teacher-mismatch") == 0
    overrides = json.loads((tmp_path / "out/manifest.json").read_text())["overrides"]
    assert [item["name"] for item in overrides] == ["teacher-mismatch"]


def test_another_students_rollouts_are_refused(
    student_folder, cache, tmp_path, monkeypatch, capsys
):
    refuse_models(monkeypatch)
    assert distill(student_folder, cache, tmp_path / "out") == 2
    assert "lopd declare" in one_line(capsys)


def test_a_declared_student_passes(teacher_folder, prompts, tmp_path):
    student = save_qwen3(tmp_path / "student", seed=5)
    declared = ["--model", str(student), "--teacher", str(teacher_folder)]
    assert main(["declare", *declared]) == 0
    assert roll_out(student, prompts, tmp_path / "rollouts") == 0
    assert score(teacher_folder, tmp_path / "rollouts", tmp_path / "cache") == 0
    assert distill(student, tmp_path / "cache", tmp_path / "out") == 0
    assert json.loads((tmp_path / "out/manifest.json").read_text())["lineage"]["declared"] is True


def test_a_tokenizer_that_differs_is_refused(tuned, teacher_folder, rollouts, tmp_path, capsys):
    other = tmp_path / "teacher"
    shutil.copytree(teacher_folder, other)
    tokenizer = json.loads((other / "tokenizer.json").read_text())
    vocab = tokenizer["model"]["vocab"]
    a, b = [token for token in vocab if vocab[token] > 50][:2]
    vocab[a], vocab[b] = vocab[b], vocab[a]
    (other / "tokenizer.json").write_text(json.dumps(tokenizer))
    assert score(other, rollouts, tmp_path / "cache", "--k", "300", "--top-p", "1") == 0
    assert distill(tuned, tmp_path / "cache", tmp_path / "out") == 2
    assert "tokenizer" in one_line(capsys)


def test_an_id_beyond_the_teachers_vocabulary(tuned, rollouts, prompts, tmp_path, capsys):
    small = save_qwen3(tmp_path / "small", seed=3, vocab_size=40)
    assert score(small, rollouts, tmp_path / "cache") == 2
    assert "expected ids in [0, 40), the vocabulary of" in one_line(capsys)


def test_nan_in_the_teachers_logprobs_names_the_sequence(
    teacher_folder, rollouts, tmp_path, capsys
):
    store = RolloutStore.open(rollouts)
    item = store[3]
    token = int(item.tokens[item.prompt_length])
    broken = tmp_path / "broken"
    shutil.copytree(teacher_folder, broken)
    weights = load_file(broken / "model.safetensors")
    weights["model.embed_tokens.weight"][token] = np.nan
    save_file(weights, broken / "model.safetensors", metadata={"format": "pt"})
    assert score(broken, rollouts, tmp_path / "cache") == 2
    message = one_line(capsys)
    assert "sequence" in message and "nan" in message.lower()


@pytest.mark.parametrize("damage", ["truncated", "altered", "foreign", "missing"])
def test_a_damaged_cache_is_named(tuned, cache, tmp_path, capsys, damage):
    copy = tmp_path / "cache"
    shutil.copytree(cache, copy)
    shard = copy / "shard-00002.safetensors"
    data = bytearray(shard.read_bytes())
    if damage == "truncated":
        shard.write_bytes(data[:-7])
    elif damage == "altered":
        data[len(data) // 2] ^= 4
        shard.write_bytes(data)
    elif damage == "foreign":
        shutil.copy(copy / "shard-00001.safetensors", shard)
    else:
        shard.unlink()
    assert distill(tuned, copy, tmp_path / "out") == 2
    assert "shard-00002" in one_line(capsys)


@pytest.mark.parametrize(
    ("content", "flags", "message"),
    [
        (None, [], "no such file"),
        ("", [], "holds no prompts"),
        ('{"prompt": "' + "the cat " * 40 + '"}\n', [], "at most 64, the context"),
        ('{"prompt": "a"}\n', ["--max-new-tokens", "64"], "at most 64, the context"),
    ],
)
def test_prompts_that_cannot_be_used(tuned, tmp_path, capsys, content, flags, message):
    path = tmp_path / "prompts.jsonl"
    if content is not None:
        path.write_text(content)
    assert roll_out(tuned, path, tmp_path / "out", *flags) == 2
    assert message in one_line(capsys)


def test_altered_inputs_are_detected_before_they_are_used(
    tuned, teacher_folder, student_folder, rollouts, tmp_path, capsys
):
    """The last bytes of a shard are token ids or log-probs: whatever it is, it is hashed."""
    data = tuned.parent / "data"
    for name, folder in (("rollouts", rollouts), ("data", data)):
        shutil.copytree(folder, tmp_path / name)
        shard = tmp_path / name / "shard-00000.safetensors"
        content = bytearray(shard.read_bytes())
        content[-1] ^= 1
        shard.write_bytes(content)
    assert score(teacher_folder, tmp_path / "rollouts", tmp_path / "cache") == 2
    assert "shard-00000" in one_line(capsys)
    argv = ["--model", str(student_folder), "--data", str(tmp_path / "data"), *DISTILL]
    assert main(["sft", *argv, "--out", str(tmp_path / "sft")]) == 2
    assert "shard-00000" in one_line(capsys)


@pytest.mark.parametrize("damage", ["missing", "truncated", "config", "tokenizer", "embedding"])
def test_a_damaged_model_folder_is_refused(student_folder, prompts, tmp_path, capsys, damage):
    model = tmp_path / "model"
    shutil.copytree(student_folder, model)
    weights = load_file(model / "model.safetensors")
    if damage == "missing":
        del weights["model.layers.0.mlp.up_proj.weight"]
        save_file(weights, model / "model.safetensors", metadata={"format": "pt"})
    elif damage == "truncated":
        (model / "model.safetensors").write_bytes((model / "model.safetensors").read_bytes()[:-9])
    elif damage == "config":
        (model / "config.json").write_text("{}")
    elif damage == "tokenizer":
        (model / "tokenizer.json").unlink()
    else:
        save_qwen3(tmp_path / "small", seed=1, vocab_size=40)
        for name in ("config.json", "model.safetensors"):
            shutil.copy(tmp_path / "small" / name, model / name)
    assert roll_out(model, prompts, tmp_path / "out") == 2
    assert str(model) in one_line(capsys) or damage == "embedding"


def test_an_interrupted_command_says_so(tuned, prompts, tmp_path, capsys, monkeypatch):
    def interrupt(*args, **kwargs):
        raise KeyboardInterrupt

    monkeypatch.setattr(TransformersEngine, "generate", interrupt)
    assert roll_out(tuned, prompts, tmp_path / "out") == 130
    assert "finished shards are kept; rerun the same command to continue" in capsys.readouterr().err


def test_a_chat_model_goes_through_its_template(tmp_path, write_jsonl, teacher_folder):
    student = save_qwen3(tmp_path / "chat", seed=4, chat_template=TEMPLATE)
    path = write_jsonl([{"messages": [{"role": "user", "content": "the cat"}]}])
    assert roll_out(student, path, tmp_path / "rollouts") == 0
    item = RolloutStore.open(tmp_path / "rollouts")[0]
    assert item.tokens[0] == 2 and item.tokens[item.prompt_length - 1] == 3
