"""`lopd distill`: checks before a model is loaded, and the final manifest."""

import json
import shutil
from functools import partial

import pytest
import torch
from helpers_artefacts import (
    VOCAB,
    describe,
    distill_config,
    logged,
    trained_weights,
    write_cache,
    write_model,
    write_sequences,
)
from helpers_training import largest_difference

from lopd.errors import ConfigError, DataError, MissingFileError, ProvenanceError, ShardError
from lopd.provenance import MANIFEST_NAME, declare, read_manifest
from lopd.stages import distill
from lopd.store import TeacherCache
from lopd.store.locks import FolderLock
from lopd.training import run as runs

SETTINGS = {
    "max_steps": 5,
    "batch_size": 4,
    "learning_rate": 1e-3,
    "device": "cpu",
    "save_every": 0,
    "log_every": 2,
}


config = partial(distill_config, **SETTINGS)


@pytest.mark.parametrize(
    "objective",
    [{}, {"objective": "jsd"}, {"objective": "policy_gradient", "advantage_clip": 1.0}],
    ids=["reverse_kl", "jsd", "policy_gradient"],
)
def test_distill_trains_and_records_its_inputs(pipeline, tmp_path, objective):
    out = distill.main(config(pipeline, tmp_path / "out", **objective))
    manifest = read_manifest(out, kind="checkpoint").raw
    student, teacher = describe(pipeline / "student"), describe(pipeline / "teacher")
    assert manifest["model"]["weights"] == describe(out).weights != student.weights
    assert manifest["model"]["tokenizer"] == student.tokenizer
    assert manifest["base"]["weights"] == student.weights
    assert manifest["inputs"]["cache"]["model"]["weights"] == teacher.weights
    assert manifest["lineage"]["sft_teacher"]["weights"] == teacher.weights
    assert manifest["lineage"]["declared"] is True
    assert manifest["lineage"]["initial_student"] == student.weights
    assert manifest["objective"]["name"] == objective.get("objective", "reverse_kl")
    assert manifest["objective"]["beta"] == (0.5 if objective.get("objective") == "jsd" else None)
    assert manifest["overrides"] == []
    assert manifest["training"] == {"sequences": 12, "dropped_share": 0.0}
    assert [entry["step"] for entry in logged(out)] == [2, 4, 5]
    assert json.loads((out / "config.json").read_text())["use_cache"] is True


def test_settings_reach_the_training(pipeline, tmp_path):
    def first(name, **changes):
        settings = {"max_steps": 1, "batch_size": 12, **changes}
        return logged(distill.main(config(pipeline, tmp_path / name, **settings)))[0]

    plain, by_sequence = first("plain"), first("mean", loss_aggregation="sequence_mean")
    stored = first("stored", support="list")
    assert plain["loss"] != pytest.approx(by_sequence["loss"], rel=1e-4)
    assert plain["teacher_tail"] < 0.99 * stored["teacher_tail"]


def test_ids_beyond_the_students_vocabulary_join_the_tail(tmp_path):
    teacher = write_model(tmp_path / "teacher", seed=1)
    settings = json.loads((teacher / "config.json").read_text())
    (teacher / "config.json").write_text(json.dumps(settings | {"vocab_size": 60}))
    student = write_model(tmp_path / "student", seed=2)
    declare(student, teacher=teacher)
    rollouts = write_sequences(tmp_path / "rollouts", student)
    cache = write_cache(tmp_path / "cache", teacher, rollouts, vocab=60)
    assert TeacherCache.open(cache).used_ids().max() >= VOCAB
    out = distill.main(config(tmp_path, tmp_path / "out", max_steps=1))
    assert logged(out)[0]["loss"] > 0


def test_loss_on_a_small_cache_falls(pipeline, tmp_path):
    settings = {"max_steps": 60, "batch_size": 12, "learning_rate": 1e-2, "log_every": 10}
    out = distill.main(config(pipeline, tmp_path / "out", **settings))
    losses = [entry["loss"] for entry in logged(out)]
    assert losses[-1] < 0.5 * losses[0]


@pytest.mark.parametrize(
    ("changes", "warned"),
    [
        ({"dtype": "bfloat16", "learning_rate": 2e-6}, True),
        ({"dtype": "bfloat16", "learning_rate": 1e-3}, False),
        ({"dtype": "bfloat16", "learning_rate": 2e-6, "lora_rank": 2}, False),
        ({"mixed_precision": "bf16", "learning_rate": 2e-6}, False),
    ],
)
def test_updates_lost_to_bfloat16_rounding_are_reported(
    pipeline, tmp_path, capsys, changes, warned
):
    if "lora_rank" in changes:
        pytest.importorskip("peft")
    out = distill.main(config(pipeline, tmp_path / "out", max_steps=1, **changes))
    assert ("this small are lost to rounding" in capsys.readouterr().err) == warned
    assert out.is_dir()


def test_finished_runs_and_other_folders_are_not_overwritten(pipeline, tmp_path, no_model):
    done = tmp_path / "done"
    done.mkdir()
    (done / MANIFEST_NAME).write_text("{}")
    with pytest.raises(DataError, match=r"manifest\.json is not a lopd manifest"):
        distill.main(config(pipeline, done))
    other = tmp_path / "other"
    other.mkdir()
    (other / "notes.txt").write_text("mine")
    with pytest.raises(ConfigError, match=r"holds notes\.txt and no recipe\.json"):
        distill.main(config(pipeline, other))
    assert [file.name for file in other.iterdir()] == ["notes.txt"]


def test_second_process_in_the_same_folder_is_refused(pipeline, tmp_path, no_model):
    first = config(pipeline, tmp_path / "out")
    (tmp_path / "out").mkdir()
    lock = FolderLock(tmp_path / "out")
    with pytest.raises(ShardError, match="another process is writing there"):
        distill.main(first)
    with pytest.raises(ShardError, match="another process is writing there"):
        runs.train(first, [], None, model_path=first.student, checkpoint=None)
    lock.release()


def test_out_that_cannot_be_a_folder_is_refused(pipeline, tmp_path, no_model):
    (tmp_path / "file").write_text("mine")
    with pytest.raises(ConfigError, match="file is a file; choose another"):
        distill.main(config(pipeline, tmp_path / "file"))
    with pytest.raises(ConfigError, match="file/below: .*file is a file; choose another"):
        distill.main(config(pipeline, tmp_path / "file" / "below"))


@pytest.mark.parametrize("text", ["", "{", "[]"])
def test_torn_recipe_is_named(pipeline, tmp_path, no_model, text):
    (tmp_path / "recipe.json").write_text(text)
    with pytest.raises(DataError, match=r"recipe\.json: (torn|holds no settings)"):
        distill.main(config(pipeline, tmp_path))


def test_cache_of_another_teacher_is_refused_before_a_model_is_loaded(pipeline, tmp_path, no_model):
    other = write_model(tmp_path / "other", seed=3)
    cache = write_cache(tmp_path / "cache", other, pipeline / "rollouts")
    with pytest.raises(ProvenanceError, match="teacher-mismatch.*--allow-teacher-mismatch"):
        distill.main(config(pipeline, tmp_path / "out", cache=str(cache)))
    assert not (tmp_path / "out").exists()


def test_override_accepts_another_teacher_and_is_recorded(pipeline, tmp_path):
    other = write_model(tmp_path / "other", seed=3)
    cache = write_cache(tmp_path / "cache", other, pipeline / "rollouts")
    changes = {"cache": str(cache), "allow_teacher_mismatch": True, "max_steps": 1}
    out = distill.main(config(pipeline, tmp_path / "out", **changes))
    (override,) = read_manifest(out).overrides
    assert override.name == "teacher-mismatch"


def test_student_that_did_not_make_the_rollouts_is_refused(pipeline, tmp_path, no_model):
    other = write_model(tmp_path / "other", seed=4)
    declare(other, teacher=pipeline / "teacher")
    with pytest.raises(ProvenanceError, match="student-mismatch"):
        distill.main(config(pipeline, tmp_path / "out", student=str(other)))


def test_incomplete_cache_needs_its_override(pipeline, tmp_path):
    part = write_cache(tmp_path / "cache", pipeline / "teacher", pipeline / "rollouts", shards=(1,))
    with pytest.raises(ProvenanceError, match="incomplete-cache"):
        distill.main(config(pipeline, tmp_path / "out", cache=str(part)))
    changes = {"cache": str(part), "allow_incomplete_cache": True, "max_steps": 1}
    out = distill.main(config(pipeline, tmp_path / "out", **changes))
    assert read_manifest(out).raw["training"]["sequences"] == 4


def test_altered_shard_is_refused(pipeline, tmp_path, no_model):
    cache = shutil.copytree(pipeline / "cache", tmp_path / "cache")
    shard = cache / "shard-00001.safetensors"
    data = bytearray(shard.read_bytes())
    data[-1] ^= 1
    shard.write_bytes(data)
    with pytest.raises(ShardError, match="shard-00001"):
        distill.main(config(pipeline, tmp_path / "out", cache=str(cache)))


def test_temperature_must_be_that_of_the_cache(pipeline, tmp_path):
    warm = write_cache(
        tmp_path / "cache", pipeline / "teacher", pipeline / "rollouts", temperature=0.7
    )
    with pytest.raises(ConfigError, match=r"found 1.0, but .* was scored at 0.7"):
        distill.main(config(pipeline, tmp_path / "out", cache=str(warm), temperature=1.0))
    out = distill.main(config(pipeline, tmp_path / "out", cache=str(warm), max_steps=1))
    assert read_manifest(out).raw["objective"]["temperature"] == 0.7


def test_missing_inputs_are_named(pipeline, tmp_path, no_model):
    with pytest.raises(MissingFileError, match="nowhere"):
        distill.main(config(pipeline, tmp_path / "out", student=str(tmp_path / "nowhere")))
    with pytest.raises(MissingFileError, match="nowhere"):
        distill.main(config(pipeline, tmp_path / "out", cache=str(tmp_path / "nowhere")))


def test_sequence_beyond_the_context_is_refused(tmp_path):
    write_model(tmp_path / "teacher", seed=1)
    student = write_model(tmp_path / "student", seed=2)
    settings = json.loads((student / "config.json").read_text())
    (student / "config.json").write_text(json.dumps(settings | {"max_position_embeddings": 8}))
    declare(student, teacher=tmp_path / "teacher")
    rollouts = write_sequences(tmp_path / "rollouts", student)
    write_cache(tmp_path / "cache", tmp_path / "teacher", rollouts)
    with pytest.raises(DataError, match="expected at most 8, the context of the model"):
        distill.main(config(tmp_path, tmp_path / "out"))


def test_truncated_rollouts_can_be_dropped(tmp_path):
    write_model(tmp_path / "teacher", seed=1)
    student = write_model(tmp_path / "student", seed=2)
    declare(student, teacher=tmp_path / "teacher")
    rollouts = write_sequences(tmp_path / "rollouts", student, truncated=(0, 1, 2))
    write_cache(tmp_path / "cache", tmp_path / "teacher", rollouts)
    out = distill.main(config(tmp_path, tmp_path / "out", drop_truncated=True, max_steps=1))
    assert read_manifest(out).raw["training"] == {"sequences": 9, "dropped_share": 0.25}


def test_result_depends_only_on_the_seed(pipeline, tmp_path):
    results = []
    for name, seed in (("a", 0), ("b", 0), ("c", 1)):
        torch.rand(7)
        out = distill.main(config(pipeline, tmp_path / name, seed=seed))
        results.append(trained_weights(out))
    assert largest_difference(results[0], results[1]) == 0.0
    assert largest_difference(results[0], results[2]) > 0.0


def test_config_checks_the_objective():
    with pytest.raises(ConfigError, match="beta"):
        distill.DistillConfig(student="s", cache="c", out="o", objective="jsd", beta=0.0)
    with pytest.raises(ConfigError, match="beta: forward_kl has no mixture"):
        distill.DistillConfig(student="s", cache="c", out="o", objective="forward_kl", beta=0.3)
    with pytest.raises(ConfigError, match="advantage_clip"):
        distill.DistillConfig(student="s", cache="c", out="o", advantage_clip=1.0)
