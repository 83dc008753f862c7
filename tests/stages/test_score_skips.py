"""`lopd score --skip-bad-records`: sequences that the teacher cannot read."""

import dataclasses

import pytest
from helpers_artefacts import COUNT, VOCAB, write_model, write_sequences
from helpers_training import make_rollouts
from transformers import AutoModelForCausalLM

from lopd.cli import main
from lopd.provenance import read_manifest
from lopd.store import RolloutStore, RolloutWriter, TeacherCache


@pytest.fixture(scope="module")
def folders(tmp_path_factory):
    """A teacher, and rollouts of a student with padding rows, two of which it sampled."""
    root = tmp_path_factory.mktemp("skips")
    teacher = write_model(root / "teacher", seed=1)
    student = write_model(root / "student", seed=2)
    model = AutoModelForCausalLM.from_pretrained(student)
    model.resize_token_embeddings(VOCAB + 4)
    model.save_pretrained(student)
    manifest = RolloutStore.open(write_sequences(root / "all", student)).manifest
    sequences = make_rollouts(COUNT, seed=0, vocab=VOCAB)
    for index in (1, COUNT - 1):
        tokens = sequences[index].tokens.copy()
        tokens[-1] = VOCAB + 2
        sequences[index] = dataclasses.replace(sequences[index], tokens=tokens)
    with RolloutWriter.create(root / "rollouts", manifest) as writer:
        writer.write(0, sequences[:-4])
        writer.write(1, sequences[-4:])
        writer.finish()
    return teacher, root / "rollouts", sequences


def score(teacher, rollouts, out, *flags):
    argv = ["score", "--teacher", str(teacher), "--rollouts", str(rollouts), "--out", str(out)]
    return main([*argv, "--k", "4", "--dtype", "float32", "--device", "cpu", *flags])


def test_a_sampled_padding_row_is_named_with_the_remedy(folders, tmp_path, capsys):
    teacher, rollouts, _ = folders
    assert score(teacher, rollouts, tmp_path / "cache") == 2
    error = capsys.readouterr().err
    assert f"has id {VOCAB + 2}" in error and "a padding row of the student's head" in error
    assert "skip_bad_records" in error.replace("-", "_") and not (tmp_path / "cache").exists()


@pytest.mark.thorough
def test_such_sequences_are_left_out_on_request_and_counted(folders, tmp_path, capsys):
    teacher, rollouts, sequences = folders
    cache, flag = tmp_path / "cache", "--skip-bad-records"
    assert score(teacher, rollouts, cache, flag) == 0
    assert f"left out 2 of {COUNT} records" in capsys.readouterr().err
    manifest = read_manifest(cache)
    assert manifest.shards == (COUNT - 5, 3)
    assert manifest.raw["inputs"]["rollouts"]["left_out"] == 2
    kept = [s for i, s in enumerate(sequences) if i not in (1, COUNT - 1)]
    found = [item.rollout for item in TeacherCache.open(cache)]
    assert [item.prompt_id for item in found] == [item.prompt_id for item in kept]
    assert [item.tokens.tolist() for item in found] == [item.tokens.tolist() for item in kept]
    assert main(["verify", "--path", str(cache)]) == 0
    (cache / "shard-00001.json").unlink()
    assert score(teacher, rollouts, cache, flag) == 0
    assert len(TeacherCache.open(cache)) == COUNT - 2
