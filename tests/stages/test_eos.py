"""Teacher and student that end answers with different ids, and edits between stages."""

import json

import pytest
from conftest import save_qwen3
from helpers_artefacts import write_model, write_pipeline, write_sequences
from helpers_stages import COMMON, make_rollouts, one_line, rollout_argv, score_argv, write_prompts

from lopd.cli import main
from lopd.provenance import declare, read_manifest
from lopd.store import TeacherCache


def edit(file, **changes):
    file.write_text(json.dumps({**json.loads(file.read_text()), **changes}))


def test_score_refuses_another_end_of_sequence_unless_allowed(tmp_path, capsys):
    student = save_qwen3(tmp_path / "student", seed=2)
    teacher = save_qwen3(tmp_path / "teacher", seed=1)
    edit(teacher / "generation_config.json", eos_token_id=[7])
    rollouts = make_rollouts(student, tmp_path)
    argv = score_argv(teacher, rollouts, tmp_path / "cache")
    assert main(argv) == 2
    error = one_line(capsys)
    assert "end with id 1, the teacher's answers with 1 or 7" in error
    assert "set eos_token_id to [1, 7]" in error and "--allow-eos-mismatch" in error
    assert main([*argv, "--allow-eos-mismatch"]) == 0
    manifest = read_manifest(tmp_path / "cache")
    assert [override.name for override in manifest.overrides] == ["eos-mismatch"]
    assert manifest.model.eos_ids == (1, 7) and manifest.rollouts.model.eos_ids == (1,)
    capsys.readouterr()
    assert main(["inspect", "--path", str(tmp_path / "cache")]) == 0
    lines = [line.split("  ", 1) for line in capsys.readouterr().out.splitlines()]
    rows = {name: value.strip() for name, value in lines}
    assert rows["model ends answers with"] == "id 1 or 7" and rows["rollouts end with"] == "id 1"


@pytest.mark.thorough
def test_a_class_of_ids_is_in_every_list_and_trains_as_one_token(tmp_path, capsys):
    student = save_qwen3(tmp_path / "student", seed=2)
    teacher = save_qwen3(tmp_path / "teacher", seed=1)
    edit(teacher / "generation_config.json", eos_token_id=[7])
    declare(student, teacher=teacher)
    rollouts, cache = make_rollouts(student, tmp_path), tmp_path / "cache"
    flags = ["--eos-class", "7,1", "--student", str(student), "--extra-ids", "3"]
    assert main(score_argv(teacher, rollouts, cache, *flags)) == 0
    assert read_manifest(cache).scoring.eos_class == (1, 7)
    for sequence in TeacherCache.open(cache, support="list"):
        assert all({1, 7} <= set(ids.tolist()) for ids in sequence.topk_ids)
        assert all(len(set(ids[ids >= 0])) == (ids >= 0).sum() for ids in sequence.topk_ids)
    argv = ["distill", "--student", student, "--cache", cache, "--out", tmp_path / "out"]
    argv = [*map(str, argv), *COMMON, "--max-steps", "1", "--batch-size", "4"]
    assert main([*argv, "--objective", "policy_gradient"]) == 2
    assert "has no lists to merge ids in" in one_line(capsys)
    assert main(argv) == 0
    manifest = read_manifest(tmp_path / "out")
    assert manifest.overrides == () and manifest.raw["objective"]["eos_class"] == [1, 7]
    capsys.readouterr()
    assert main(["inspect", "--path", str(cache)]) == 0
    assert "ids 1, 7\n" in capsys.readouterr().out


@pytest.mark.parametrize(
    "value, message",
    [
        *((text, "expected two or more different ids") for text in ("1", "1,1", "1,x", "1,-3")),
        ("1,999", "found 999; expected ids in [0, 309), the vocabulary of the teacher"),
    ],
)
def test_a_class_that_cannot_be_is_refused(tmp_path, capsys, student_folder, value, message):
    rollouts = make_rollouts(student_folder, tmp_path)
    capsys.readouterr()
    argv = score_argv(student_folder, rollouts, tmp_path / "cache", "--eos-class", value)
    assert main(argv) == 2
    assert message in one_line(capsys)


def test_sft_refuses_another_end_of_sequence_unless_allowed(tmp_path, capsys):
    teacher, model = (write_model(tmp_path / name, seed=i) for i, name in enumerate("tm"))
    data = write_sequences(tmp_path / "data", teacher, kind="sft_data")
    edit(model / "generation_config.json", eos_token_id=[7])
    argv = ["sft", "--model", str(model), "--data", str(data), "--out", str(tmp_path / "out")]
    argv += [*COMMON, "--max-steps", "1", "--batch-size", "4"]
    assert main(argv) == 2
    assert "eos-mismatch: found that answers of" in one_line(capsys)
    assert main([*argv, "--allow-eos-mismatch"]) == 0
    manifest = read_manifest(tmp_path / "out")
    assert [override.name for override in manifest.overrides] == ["eos-mismatch"]
    assert 7 in manifest.model.eos_ids


def test_sft_says_that_rollouts_will_be_written_with_another_template(tmp_path, capsys):
    teacher, model = (write_model(tmp_path / name, seed=i) for i, name in enumerate("tm"))
    (teacher / "chat_template.jinja").write_text("{{ messages[0].content }}")
    data = write_sequences(tmp_path / "data", teacher, kind="sft_data")
    argv = ["sft", "--model", str(model), "--data", str(data), *COMMON, "--max-steps", "1"]
    assert main([*argv, "--out", str(tmp_path / "one")]) == 0
    assert f"{model}: its chat template is not that of {teacher}" in capsys.readouterr().err
    (model / "chat_template.jinja").write_text("{{ messages[0].content }}")
    assert main([*argv, "--out", str(tmp_path / "two")]) == 0
    assert "chat template" not in capsys.readouterr().err


def test_a_store_does_not_mix_two_behaviours(tmp_path, capsys):
    student = save_qwen3(tmp_path / "student", seed=2)
    argv = rollout_argv(student, write_prompts(tmp_path / "p.jsonl"), tmp_path / "rollouts")
    assert main(argv) == 0
    (tmp_path / "rollouts" / "shard-00001.json").unlink()
    edit(student / "config.json", rms_norm_eps=1e-3)
    assert main(argv) == 2
    assert "model.behaviour.config.rms_norm_eps was 1e-06, is 0.001" in one_line(capsys)


@pytest.mark.parametrize("name", ["tokenizer_config.json", "generation_config.json"])
def test_an_unfinished_training_run_does_not_mix_two_behaviours(tmp_path, capsys, name):
    write_pipeline(tmp_path)
    argv = ["distill", "--student", tmp_path / "student", "--cache", tmp_path / "cache"]
    argv += ["--out", tmp_path / "out", *COMMON, "--max-steps", "2", "--save-every", "1"]
    argv = [*map(str, argv), "--allow-student-mismatch"]
    assert main(argv) == 0
    (tmp_path / "out" / "manifest.json").unlink()
    edit(tmp_path / "student" / name, suppress_tokens=[3])
    assert main(argv) == 2
    assert ".suppress_tokens was None, is [3]" in one_line(capsys)


def test_ids_that_only_a_default_names_are_refused_before_sampling(tmp_path, capsys):
    student = save_qwen3(tmp_path / "student", seed=2)
    edit(student / "generation_config.json", eos_token_id=[3])
    edit(student / "tokenizer_config.json", eos_token="<gone>")
    argv = rollout_argv(student, write_prompts(tmp_path / "p.jsonl"), tmp_path / "rollouts")
    assert main(argv) == 2
    assert "eos_token_id of generation_config.json" in one_line(capsys)
