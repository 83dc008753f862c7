"""A teacher that sees more than the student: `lopd score --teacher-template`, to distillation."""

import json
import shutil

import numpy as np
import pytest
import torch
from conftest import TEMPLATE, TEXT, save_qwen3
from helpers_stages import COMMON, one_line, rollout_argv, score_argv, shard_bytes

from lopd.cli import main
from lopd.engines.transformers import TransformersEngine
from lopd.evaluation.kl import cache_kl, open_cache
from lopd.provenance import declare, read_manifest
from lopd.store import RolloutStore, TeacherCache

pytestmark = pytest.mark.thorough  # pipelines from prompts to trained students


HINT = "{{ prompt }} hint {{ answer }} so"


@pytest.fixture(scope="module")
def world(tmp_path_factory):
    """Two models with a chat template, prompts with answers, and the rollouts of the student."""
    root = tmp_path_factory.mktemp("privileged")
    for seed, name in enumerate(("teacher", "student"), 1):
        save_qwen3(root / name, seed, chat_template=TEMPLATE, num_hidden_layers=seed)
    words = TEXT.split()
    records = [{"prompt": " ".join(words[i : i + 3]), "answer": words[-i - 1]} for i in range(10)]
    write(root / "prompts.jsonl", records)
    argv = rollout_argv(root / "student", root / "prompts.jsonl", root / "rollouts")
    assert main(argv) == 0
    write_template(root / "hint.jinja", HINT)
    return root


def write(path, records):
    path.write_text("".join(json.dumps(record) + "\n" for record in records))
    return path


def write_template(path, text):
    path.write_text(text)
    return path


def privileged_argv(world, out, *flags, teacher="teacher", template="hint.jinja"):
    flags = ["--teacher-template", world / template, *flags]
    return score_argv(world / teacher, world / "rollouts", out, *flags)


def dense_logprobs(folder, prompt, answer):
    """[R, V] fp64: the model's log-probs of each token of the answer after the prompt."""
    engine = TransformersEngine.load(folder, dtype="float32", device="cpu")
    ids = torch.tensor([[*prompt, *answer]])
    with torch.no_grad():
        logits = engine.model(ids).logits[0].double()
    return torch.log_softmax(logits, -1).numpy()[len(prompt) - 1 : -1]


def teachers_prompts(world):
    """Those of HINT by the student's prompt, without the code under test."""
    tokenizer = TransformersEngine.load(world / "teacher", dtype="float32", device="cpu").tokenizer
    found = {}
    for line in (world / "prompts.jsonl").read_text().splitlines():
        record = json.loads(line)
        prompt = f"<|user|>{record['prompt']}<eos><|assistant|>"
        seen = f"{record['prompt']} hint {record['answer']} so"
        found[tuple(tokenizer(prompt)["input_ids"])] = tokenizer(seen)["input_ids"]
    return found


@pytest.mark.parametrize("list_of", ["teacher", "student"])
def test_scores_are_those_of_the_answer_after_the_teachers_prompt(world, tmp_path, list_of):
    """Against dense logits; entries that are one position off are far from them."""
    out = tmp_path / "cache"
    assert main(privileged_argv(world, out, "--support", list_of, "--top-p", "1")) == 0
    cache, prompts = TeacherCache.open(out, support="list"), teachers_prompts(world)
    rollouts = RolloutStore.open(world / "rollouts")
    for item in [cache[i] for i in range(0, 20, 3)]:
        rollout, at = item.rollout, item.rollout.prompt_length
        own, answer = rollout.tokens[:at].tolist(), rollout.tokens[at:].tolist()
        q = dense_logprobs(world / "teacher", prompts[tuple(own)], answer)
        rows = np.arange(len(answer))
        np.testing.assert_allclose(item.teacher_logprobs, q[rows, answer], atol=2e-5)
        np.testing.assert_allclose(
            item.topk_logprobs, np.take_along_axis(q, item.topk_ids, 1), atol=2e-5
        )
        tail = np.log1p(-np.exp(item.topk_logprobs.astype(float)).sum(1))
        np.testing.assert_allclose(item.tail_logprobs, tail, atol=1e-4)
        chooser = q if list_of == "teacher" else dense_logprobs(world / "student", own, answer)
        assert [set(row) for row in item.topk_ids] == [
            set(row) for row in np.argsort(-chooser, 1)[:, :6]
        ]
        for step in (1, -1):  # the test can fail
            wrong = np.take_along_axis(np.roll(q, step, axis=0), item.topk_ids, 1)
            assert np.abs(wrong - item.topk_logprobs).max() > 0.1
        plain = dense_logprobs(world / "teacher", own, answer)
        assert np.abs(plain - q).max() > 0.1
    stored = [item.rollout.tokens.tolist() for item in cache]
    assert stored == [rollout.tokens.tolist() for rollout in rollouts]


@pytest.mark.parametrize(
    "text",
    [
        "{{ chat(messages) }}",
        "{{ chat([{'role': 'user', 'content': prompt}]) }}\n",
        "<|user|>{{ prompt }}{{ eos_token }}<|assistant|>",
    ],
)
def test_a_template_of_the_students_prompt_gives_the_scores_without_a_template(
    world, tmp_path, text
):
    assert main(score_argv(world / "teacher", world / "rollouts", tmp_path / "plain")) == 0
    write_template(tmp_path / "same.jinja", text)
    template = tmp_path / "same.jinja"
    assert main(privileged_argv(world, tmp_path / "cache", template=template)) == 0
    plain, cache = (TeacherCache.open(tmp_path / name) for name in ("plain", "cache"))
    for theirs, ours in zip(plain, cache, strict=True):
        assert (theirs.teacher_logprobs == ours.teacher_logprobs).all()
        assert (theirs.lists.ids == ours.lists.ids).all()


def distill_argv(world, cache, out, *flags):
    argv = ["distill", "--student", world / "student", "--cache", cache, "--out", out, *COMMON]
    return list(map(str, [*argv, "--batch-size", "5", "--save-every", "0", *flags]))


def test_a_student_learns_from_itself_with_the_answer_at_hand(world, tmp_path, capsys):
    """No teacher and no override: the student without context comes nearer to itself with it."""
    cache, out = tmp_path / "cache", tmp_path / "out"
    assert main(privileged_argv(world, cache, teacher="student")) == 0
    manifest = read_manifest(cache, kind="cache")
    described = manifest.inputs["teacher_prompts"]
    assert described["template"]["text"] == HINT
    assert manifest.teacher_template == described["template"]["sha256"]
    flags = ["--max-steps", "16", "--learning-rate", "1e-3"]
    capsys.readouterr()
    assert main(distill_argv(world, cache, out, *flags)) == 0
    assert "scored by the student itself with prompts of its own" in capsys.readouterr().err
    result = read_manifest(out)
    assert result.overrides == ()
    assert result.inputs["cache"]["teacher_template"] == manifest.teacher_template
    before, after = (
        cache_kl(engine, open_cache(cache, folder, engine))["nats_per_token"]
        for folder in (world / "student", out)
        for engine in [TransformersEngine.load(folder, dtype="float32", device="cpu")]
    )
    assert after < 0.9 * before
    assert main(["inspect", "--path", str(cache)]) == 0
    assert "hint.jinja" in capsys.readouterr().out
    assert main(["inspect", "--path", str(out)]) == 0
    assert f"template {manifest.teacher_template[:12]}" in capsys.readouterr().out
    assert main(["verify", "--path", str(cache)]) == 0


def test_without_a_template_or_with_another_teacher_the_gate_asks_for_the_lineage(
    world, tmp_path, capsys
):
    plain, other = tmp_path / "plain", tmp_path / "other"
    assert main(score_argv(world / "student", world / "rollouts", plain)) == 0
    assert main(privileged_argv(world, other)) == 0
    for cache in (plain, other):
        capsys.readouterr()
        assert main(distill_argv(world, cache, tmp_path / "out", "--max-steps", "1")) == 2
        assert "teacher-mismatch: found a cache scored by" in one_line(capsys)
    student = tmp_path / "student"
    shutil.copytree(world / "student", student)
    declare(student, teacher=world / "teacher")
    argv = distill_argv(world, other, tmp_path / "out", "--max-steps", "1")
    argv[argv.index("--student") + 1] = str(student)
    assert main(argv) == 0
    assert "scored by the teacher with prompts of its own" in capsys.readouterr().err


BAD_TEMPLATES = {
    "syntax": ("{{ prompt }\n", "bad.jinja:1: unexpected '}'; expected a jinja template"),
    "filter": ("a\n{{ prompt | nonsense }}", "bad.jinja:2: No filter named 'nonsense'"),
    "no field": ("Answer the question.", "reads no field of the records"),
    "absent field": ("{{ prompt }} {{ hint }}", "prompts.jsonl:1: {}: 'hint' is undefined; found"),
    "absent part": ("{{ prompt.hint }}", "1: {}: 'str object' has no attribute 'hint'; found"),
    "nothing": ("{% if not prompt %}x{% endif %}", "prompts.jsonl:1: {} renders nothing"),
    "refusal": ("{{ raise_exception('no ' ~ answer) }}", "{} refuses it: no again"),
    "failure": ("{{ prompt + 1 }}", "prompts.jsonl:1: {} fails: "),
    "unsafe": ("{{ prompt.__class__.__mro__ }}", "prompts.jsonl:1: {}"),
    "chat": ("{{ chat(prompt) }}", "'messages' is a str; expected a list of messages"),
    "variable": ("{{ chat(messages, depth=2) }}", "the chat template does not read 'depth'"),
    "no room": ("{{ prompt * 40 }}", "expected at most 64, the context of the teacher; shorten"),
    "random": ("{{ prompt }} {{ range(999) | random }}", "rendered twice, {} gave different texts"),
}


@pytest.mark.parametrize(("text", "message"), BAD_TEMPLATES.values(), ids=BAD_TEMPLATES)
def test_templates_that_cannot_be_used_are_refused_before_a_model_is_loaded(
    world, tmp_path, capsys, monkeypatch, text, message
):
    def load(*args, **kwargs):
        raise AssertionError("a model was loaded")

    monkeypatch.setattr("lopd.stages.score.load_engine", load)
    template = write_template(tmp_path / "bad.jinja", text)
    assert main(privileged_argv(world, tmp_path / "cache", template=template)) == 2
    assert message.replace("{}", str(template)) in one_line(capsys)
    assert not (tmp_path / "cache").exists()


def test_a_template_that_is_not_there_and_one_that_is_not_text(world, tmp_path, capsys):
    argv = privileged_argv(world, tmp_path / "cache", template=tmp_path / "none.jinja")
    assert main(argv) == 2
    assert "none.jinja: no such file" in one_line(capsys)
    (tmp_path / "none.jinja").write_bytes(b"\xff\xfe")
    assert main(argv) == 2
    assert "cannot be read as UTF-8" in one_line(capsys)


def test_null_counts_as_absent_and_a_template_can_ask_for_a_field(world, tmp_path, capsys):
    lines = (world / "prompts.jsonl").read_text().splitlines()
    records = [json.loads(line) | {"hint": "x" * i or None} for i, line in enumerate(lines)]
    file = write(tmp_path / "more.jsonl", records)
    template = write_template(tmp_path / "hint.jinja", "{{ prompt }} {{ hint }}")
    flags = ["--prompts", file]
    assert main(privileged_argv(world, tmp_path / "cache", *flags, template=template)) == 2
    assert f"{file}:1: {template}: 'hint' is undefined" in one_line(capsys)
    write_template(template, "{{ prompt }}{% if hint is defined %} {{ hint }}{% endif %}")
    assert main(privileged_argv(world, tmp_path / "cache", *flags, template=template)) == 0


def test_records_of_other_prompts_are_refused(world, tmp_path, capsys):
    records = [json.loads(line) for line in (world / "prompts.jsonl").read_text().splitlines()]
    file = write(tmp_path / "some.jsonl", records[1:])
    assert main(privileged_argv(world, tmp_path / "cache", "--prompts", file)) == 2
    assert "some.jsonl: has no record of the rollouts' prompt '" in one_line(capsys)
    named = [record | {"id": f"p{i}"} for i, record in enumerate(records)]
    argv = rollout_argv(world / "student", write(tmp_path / "named.jsonl", named), tmp_path / "r")
    assert main(argv) == 0
    swapped = [record | {"id": f"p{9 - i}"} for i, record in enumerate(records)]
    argv = privileged_argv(world, tmp_path / "cache")
    argv[argv.index("--rollouts") + 1] = str(tmp_path / "r")
    capsys.readouterr()
    assert main([*argv, "--prompts", str(write(tmp_path / "swapped.jsonl", swapped))]) == 2
    assert "swapped.jsonl:1: prompt 'p9' is another than that of the rollouts" in one_line(capsys)
    write(tmp_path / "named.jsonl", swapped)
    assert main(argv) == 2
    assert "named.jsonl: altered since the rollouts were made" in one_line(capsys)
    (tmp_path / "named.jsonl").unlink()
    assert main(argv) == 2
    assert "name the file of their prompts with --prompts" in one_line(capsys)


def test_an_unfinished_cache_is_continued_with_the_same_prompts_only(world, tmp_path, capsys):
    cache = tmp_path / "cache"
    template = write_template(tmp_path / "own.jinja", HINT)
    assert main(privileged_argv(world, cache, template=template)) == 0
    whole = shard_bytes(cache)
    (cache / "shard-00001.json").unlink()
    write_template(template, HINT + "!")
    assert main(privileged_argv(world, cache, template=template)) == 2
    assert "inputs.teacher_prompts.digest was" in one_line(capsys)
    assert main(score_argv(world / "teacher", world / "rollouts", cache)) == 2
    write_template(template, HINT)
    records = [json.loads(line) for line in (world / "prompts.jsonl").read_text().splitlines()]
    moved = write(tmp_path / "moved.jsonl", [record | {"more": 1} for record in records])
    argv = privileged_argv(world, cache, "--prompts", moved, template=template)
    assert main(argv) == 0
    assert shard_bytes(cache) == whole


def test_sequences_without_room_are_left_out_on_request(world, tmp_path):
    text = "{{ prompt * 40 if answer == 'again' else prompt }}"
    template = write_template(tmp_path / "long.jinja", text)
    flags = ["--skip-bad-records"]
    assert main(privileged_argv(world, tmp_path / "cache", *flags, template=template)) == 0
    cache = TeacherCache.open(tmp_path / "cache")
    assert len(cache) == 18 and cache.manifest.rollouts.raw["left_out"] == 2


def test_rescoring_renders_the_same_prompts(world, tmp_path, capsys):
    cache, file = tmp_path / "cache", tmp_path / "prompts.jsonl"
    shutil.copy(world / "prompts.jsonl", file)
    assert main(privileged_argv(world, cache, "--prompts", file)) == 0
    argv = ["verify", "--path", cache, "--rescore", "8", "--teacher", world / "teacher"]
    argv = [*map(str, [*argv, "--student", world / "student"]), *COMMON]
    capsys.readouterr()
    assert main(argv) == 0
    assert float(capsys.readouterr().out.split("noise share")[1].split()[0]) < 1e-6
    write(file, [json.loads(line) | {"answer": "x"} for line in file.read_text().splitlines()])
    assert main(argv) == 2
    assert "gives the teacher other prompts than when it scored" in one_line(capsys)
    file.unlink()
    assert main(argv) == 2
    assert "which is not there; restore it" in one_line(capsys)


def test_refreshed_rollouts_are_scored_after_the_teachers_prompts(world, tmp_path, capsys):
    cache, out, file = tmp_path / "cache", tmp_path / "out", tmp_path / "prompts.jsonl"
    shutil.copy(world / "prompts.jsonl", file)
    assert main(privileged_argv(world, cache, "--prompts", file, teacher="student")) == 0
    flags = ["--max-steps", "2", "--teacher", world / "student", "--refresh-every", "2"]
    argv = distill_argv(world, cache, out, *flags)
    argv[argv.index("--save-every") + 1] = "1"
    assert main(argv) == 0
    (window,) = (out / "refresh").glob("step-*")
    fresh, prompts = TeacherCache.open(window, support="list"), teachers_prompts(world)
    assert fresh.manifest.teacher_template == read_manifest(cache, kind="cache").teacher_template
    for item in [fresh[i] for i in range(0, len(fresh), 4)]:
        own, answer = np.split(item.rollout.tokens, [item.rollout.prompt_length])
        q = dense_logprobs(world / "student", prompts[tuple(own.tolist())], answer.tolist())
        expected = q[np.arange(len(answer)), answer]
        np.testing.assert_allclose(item.teacher_logprobs, expected, atol=2e-5)
    file.unlink()
    capsys.readouterr()
    argv[argv.index("--out") + 1] = str(tmp_path / "other")
    assert main(argv) == 2
    assert "which is not there; restore it, or leave --refresh-every out" in one_line(capsys)


def test_imported_rollouts_are_tied_to_records_by_their_ids(world, tmp_path, capsys):
    records = []
    for i, rollout in enumerate(RolloutStore.open(world / "rollouts")):
        prompt, answer = np.split(rollout.tokens, [rollout.prompt_length])
        ids = {"prompt_token_ids": prompt.tolist(), "response_token_ids": answer.tolist()}
        records.append(
            ids | {"id": f"p{i // 2}", "question": f"q {i // 2}", "reference": "the dog"}
        )
    source = write(tmp_path / "dump.jsonl", records)
    argv = ["import", "--source", source, "--format", "rollouts", "--student", world / "student"]
    assert main(list(map(str, [*argv, "--out", tmp_path / "rollouts"]))) == 0
    template = write_template(tmp_path / "t.jinja", "{{ question }} is {{ reference }}")
    flags = ["--teacher-template", template]
    argv = score_argv(world / "teacher", tmp_path / "rollouts", tmp_path / "cache", *flags)
    assert main(argv) == 0
    item = TeacherCache.open(tmp_path / "cache")[0]
    engine = TransformersEngine.load(world / "teacher", dtype="float32", device="cpu")
    prompt = engine.tokenizer("q 0 is the dog")["input_ids"]
    answer = item.rollout.tokens[item.rollout.prompt_length :].tolist()
    q = dense_logprobs(world / "teacher", prompt, answer)
    np.testing.assert_allclose(item.teacher_logprobs, q[np.arange(len(answer)), answer], atol=2e-5)
    other = write(tmp_path / "other.jsonl", [record | {"id": "x"} for record in records])
    shutil.rmtree(tmp_path / "cache")
    capsys.readouterr()
    assert main([*argv, "--prompts", str(other)]) == 2
    assert "has no record of the rollouts' prompt 'p0' (and 9 more)" in one_line(capsys)
    mixed = [record | {"reference": f"the {i}"} for i, record in enumerate(records)]
    assert main([*argv, "--prompts", str(write(tmp_path / "mixed.jsonl", mixed))]) == 2
    assert "mixed.jsonl:2: " in (error := one_line(capsys)) and "renders another prompt" in error


def test_prompts_without_a_template_have_no_use(world, tmp_path, capsys):
    flags = ["--prompts", str(world / "prompts.jsonl")]
    argv = score_argv(world / "teacher", world / "rollouts", tmp_path / "cache", *flags)
    assert main(argv) == 2
    assert "which has no effect: only teacher_template and teacher_field read" in one_line(capsys)


def test_a_damaged_manifest_is_refused_by_name(world, tmp_path, capsys):
    cache = tmp_path / "cache"
    assert main(privileged_argv(world, cache)) == 0
    manifest = json.loads((cache / "manifest.json").read_text())
    del manifest["inputs"]["teacher_prompts"]["template"]["text"]
    (cache / "manifest.json").write_text(json.dumps(manifest))
    capsys.readouterr()
    assert main(["inspect", "--path", str(cache)]) == 2
    assert "has no inputs.teacher_prompts.template.text" in one_line(capsys)
