"""`lopd import --format rollouts`: a multi-turn transcript, scored and distilled end to end."""

import json
import shutil

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from helpers_import import distill

from lopd.cli import main
from lopd.engines.transformers import TransformersEngine
from lopd.models.load import load_tokenizer
from lopd.provenance import declare, read_manifest
from lopd.store import RolloutStore, TeacherCache
from lopd.training.batch import Collator

MARKED = (
    "{% for m in messages %}{{ '<|' + m.role + '|>' }}"
    "{% if m.role == 'assistant' %}{% generation %}{{ m.content + eos_token }}{% endgeneration %}"
    "{% else %}{{ m.content + eos_token }}{% endif %}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|assistant|>' }}{% endif %}"
)
CONVERSATION = [
    ("user", "the cat sat"),
    ("assistant", "a dog ran"),
    ("tool", "it was raining"),
    ("assistant", "the cat"),
]
ON_CPU = ["--dtype", "float32", "--device", "cpu"]


@pytest.fixture(scope="module")
def student(student_folder, teacher_folder, tmp_path_factory):
    folder = tmp_path_factory.mktemp("import") / "student"
    shutil.copytree(student_folder, folder)
    tokenizer = load_tokenizer(folder)
    tokenizer.chat_template = MARKED
    tokenizer.save_pretrained(folder)
    declare(folder, teacher=teacher_folder)
    return folder


@pytest.fixture(scope="module")
def transcript(student):
    """Token ids and mask, written turn by turn as an agent framework would."""
    tokenizer, tokens, mask = load_tokenizer(student), [], []
    for role, text in CONVERSATION:
        head = tokenizer.encode(f"<|{role}|>", add_special_tokens=False)
        body = [*tokenizer.encode(text, add_special_tokens=False), tokenizer.eos_token_id]
        tokens += head + body
        mask += [0] * len(head) + [int(role == "assistant")] * len(body)
    return tokens, mask


def run(source, student, out, *flags):
    argv = ["import", "--format", "rollouts", "--source", str(source), "--student", str(student)]
    return main([*argv, "--out", str(out), *flags])


def score(teacher, rollouts, out):
    argv = ["score", "--teacher", str(teacher), "--rollouts", str(rollouts), "--out", str(out)]
    return main([*argv, "--k", "4", "--top-p", "1", *ON_CPU])


def write(path, *records):
    path.write_text("".join(json.dumps(record) + "\n" for record in records))
    return path


@pytest.mark.thorough
def test_a_tool_transcript_is_scored_and_distilled_on_the_models_tokens(
    student, teacher_folder, transcript, tmp_path, capsys
):
    tokens, mask = transcript
    record = {"input_ids": tokens, "loss_mask": mask}
    source = write(tmp_path / "r.jsonl", *[{**record, "id": f"task-{i}"} for i in range(3)])
    rollouts, cache = tmp_path / "rollouts", tmp_path / "cache"
    assert run(source, student, rollouts, "--shard-size", "2") == 0
    manifest = read_manifest(rollouts)
    assert manifest.kind == "rollouts" and manifest.declared and manifest.shards == (2, 1)
    assert manifest.scoring.rollout_logprobs == "absent"
    assert "retokenized" not in manifest.inputs["source"]
    assert score(teacher_folder, rollouts, cache) == 0
    scored = read_manifest(cache)
    assert scored.scoring.rollout_logprobs == "absent" and scored.declared
    for folder in (rollouts, cache):
        assert main(["verify", "--path", str(folder)]) == 0
        assert main(["inspect", "--path", str(folder)]) == 0
    item = TeacherCache.open(cache)[0]
    assert item.rollout.tokens.tolist() == tokens
    assert item.rollout.loss_mask.astype(int).tolist() == mask
    # Entry t is the teacher's log-prob of token t given those before it.
    engine = TransformersEngine.load(teacher_folder, dtype="float32", device="cpu")
    (expected,) = engine.score([np.array(tokens, np.int32)], [1], 4)
    first = item.rollout.prompt_length
    np.testing.assert_allclose(
        item.teacher_logprobs, expected.teacher_logprobs[first - 1 :], rtol=1e-4
    )
    capsys.readouterr()
    assert run(source, student, rollouts, "--shard-size", "2") == 0
    assert "rollouts: finished already, nothing to do" in capsys.readouterr().err
    assert distill(student, cache, tmp_path / "out") == 0
    trained = json.loads((tmp_path / "out" / "train_log.jsonl").read_text().splitlines()[0])
    assert trained["reverse_kl"] > 0
    batch = Collator()([TeacherCache.open(cache)[0]])
    assert batch["labels"].tolist() == [t for t, m in zip(tokens, mask, strict=True) if m]


@pytest.mark.parametrize("late", [True, False])
def test_a_mask_that_is_shifted_by_one_is_refused(student, transcript, tmp_path, capsys, late):
    tokens, mask = transcript
    shifted = [0, *mask[:-1]] if late else [*mask[1:], 0]
    record = {"input_ids": tokens, "loss_mask": shifted}
    assert run(write(tmp_path / "r.jsonl", record), student, tmp_path / "out") == 2
    error = capsys.readouterr().err
    assert "r.jsonl:1: the mask is shifted by one" in error and not (tmp_path / "out").exists()


def test_messages_give_the_tokens_of_the_template_and_the_manifest_says_so(
    student, transcript, tmp_path, capsys
):
    tokens, mask = transcript
    messages = [{"role": role, "content": text} for role, text in CONVERSATION]
    source = tmp_path / "r.parquet"
    pq.write_table(pa.Table.from_pylist([{"messages": messages, "id": "a"}]), source)
    assert run(source, student, tmp_path / "no") == 2
    assert "pass --retokenize" in capsys.readouterr().err
    assert run(source, student, tmp_path / "out", "--retokenize") == 0
    assert read_manifest(tmp_path / "out").inputs["source"]["retokenized"] == 1
    (rollout,) = RolloutStore.open(tmp_path / "out")
    assert rollout.loss_mask.sum() == sum(mask)
    tokenizer = load_tokenizer(student)
    assert tokenizer.decode(rollout.tokens) == tokenizer.decode(tokens)


def test_records_with_and_without_log_probs_do_not_mix_and_bad_ones_are_left_out(
    student, transcript, tmp_path, capsys
):
    tokens, mask = transcript
    record = {"input_ids": tokens, "loss_mask": mask}
    values = np.linspace(-0.1, -1, len(tokens)).tolist()
    known = {**record, "rollout_logprobs": values}
    source = write(tmp_path / "r.jsonl", known, record)
    assert run(source, student, tmp_path / "out") == 2
    assert "1 of 2 rollouts have log-probs" in capsys.readouterr().err
    source = write(tmp_path / "r.jsonl", known, {"input_ids": tokens})
    assert run(source, student, tmp_path / "out") == 2
    assert "r.jsonl:2: recognised as a whole sequence" in capsys.readouterr().err
    assert run(source, student, tmp_path / "out", "--skip-bad-records") == 0
    assert "left out 1 of 2 records" in capsys.readouterr().err
    manifest = read_manifest(tmp_path / "out")
    assert manifest.inputs["source"]["left_out"] == 1
    assert manifest.scoring.rollout_logprobs == "computed"


def test_settings_without_a_meaning_are_refused(student, tmp_path, capsys):
    source = write(tmp_path / "r.jsonl", {})
    for flags, message in (
        (["--teacher", "t"], "expected no teacher"),
        (["--codec", "compact"], "codec: has no meaning for format rollouts"),
    ):
        assert run(source, student, tmp_path / "out", *flags) == 2
        assert message in capsys.readouterr().err
    argv = ["import", "--format", "topk", "--source", str(source), "--student", str(student)]
    assert main([*argv, "--out", str(tmp_path / "out")]) == 2
    assert "expected the one that scored" in capsys.readouterr().err
