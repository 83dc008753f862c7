"""The TRL trainer checks that cache and model belong together, as `lopd distill` does."""

import json
import logging
import os
from types import SimpleNamespace

import pytest
import torch
from helpers_artefacts import write_cache, write_model
from helpers_cache import flip
from helpers_trl import QUIET, make_trainer
from transformers import AutoConfig, AutoModelForCausalLM

from lopd.errors import MissingFileError, ModelError, ProvenanceError, ShardError
from lopd.models.load import load_model, load_tokenizer
from lopd.provenance import describe_model, lineage_of, read_manifest
from lopd.store import TeacherCache

pytest.importorskip("trl", reason="part of the extra `trl`")

from lopd.integrations.datasets import to_dataset
from lopd.integrations.trl import OfflineDistillationConfig, OfflineDistillationTrainer


@pytest.fixture
def cache(pipeline):
    return TeacherCache.open(pipeline / "cache")


@pytest.fixture(scope="module")
def foreign(pipeline, tmp_path_factory):
    """Scores of another teacher than that of the student's fine-tuning."""
    folder = tmp_path_factory.mktemp("foreign")
    teacher = write_model(folder / "teacher", seed=7)
    return TeacherCache.open(write_cache(folder / "cache", teacher, pipeline / "rollouts"))


def test_a_cache_of_another_teacher_is_refused_before_the_model_is_built(
    pipeline, tmp_path, cache, foreign, monkeypatch
):
    args = OfflineDistillationConfig(str(tmp_path / "out"), **QUIET)
    monkeypatch.setattr(
        "trl.trainer.sft_trainer.create_model_from_path", lambda *_, **__: pytest.fail("built")
    )
    for data, held_out in ((foreign, None), (cache, foreign), (cache, {"a": cache, "b": foreign})):
        with pytest.raises(ProvenanceError, match="teacher-mismatch.*--allow-teacher-mismatch"):
            OfflineDistillationTrainer(str(pipeline / "student"), args, data, held_out)
    other = OfflineDistillationConfig(str(tmp_path), **QUIET, allow_teacher_mismatch=True)
    with pytest.raises(ProvenanceError, match="student-mismatch"):
        OfflineDistillationTrainer(pipeline / "teacher", other, cache)
    with pytest.raises(MissingFileError, match="absent: no such file or folder"):
        OfflineDistillationTrainer("absent", args, cache)


def test_a_later_evaluation_is_checked_too(pipeline, tmp_path, cache, foreign):
    trainer = make_trainer(pipeline, tmp_path, cache)
    with pytest.raises(ProvenanceError, match="teacher-mismatch"):
        trainer.evaluate(foreign)


def test_the_result_has_a_manifest_with_overrides_and_lineage(pipeline, tmp_path, foreign):
    trainer = make_trainer(
        pipeline, tmp_path / "out", foreign, allow_teacher_mismatch=True, max_steps=1,
        save_strategy="steps", save_steps=1, objective="jsd", beta=0.3,
    )  # fmt: skip
    trainer.train()
    out = tmp_path / "saved"
    trainer.save_model(out)
    manifest = read_manifest(out, kind="checkpoint")
    (override,) = manifest.overrides
    assert override.name == "teacher-mismatch"
    student = describe_model(pipeline / "student", dtype="float32", engine="transformers")
    assert manifest.base.weights == manifest.lineage.initial_student == student.weights
    assert (
        lineage_of(out).sft_teacher.weights == lineage_of(pipeline / "student").sft_teacher.weights
    )
    assert manifest.inputs["cache"]["digest"] == foreign.digest()
    assert (manifest.raw["objective"]["name"], manifest.raw["objective"]["beta"]) == ("jsd", 0.3)
    config = json.loads(json.dumps(manifest.config))
    assert config["max_steps"] == 1 and config["cache"] == str(foreign.path)
    assert not (tmp_path / "out/checkpoint-1/manifest.json").exists()  # lacks what a run needs


def test_an_override_for_the_evaluation_alone_is_recorded(pipeline, tmp_path, cache, foreign):
    trainer = make_trainer(pipeline, tmp_path, cache, foreign, allow_teacher_mismatch=True)
    trainer.save_model(tmp_path / "saved")
    (override,) = read_manifest(tmp_path / "saved", kind="checkpoint").overrides
    assert override.name == "teacher-mismatch"


@pytest.mark.parametrize("call", ["push_to_hub", "save_model"])
def test_the_manifest_is_uploaded(pipeline, tmp_path, cache, monkeypatch, call):
    uploaded = []
    hub = SimpleNamespace(
        create_repo=lambda name, **_: SimpleNamespace(repo_id=name),
        upload_folder=lambda folder_path, **_: uploaded.append({*os.listdir(folder_path)}),
    )
    monkeypatch.setattr("transformers.trainer.hf_api", lambda: hub)
    push = {"push_to_hub": call == "save_model", "hub_model_id": "some/model"}
    trainer = make_trainer(pipeline, tmp_path / "out", cache, **push)
    getattr(trainer, call)()
    (files,) = uploaded
    assert {"manifest.json", "model.safetensors"} <= files


def test_adapters_alone_have_no_manifest(pipeline, tmp_path, cache):
    peft = pytest.importorskip("peft", reason="part of the extra `peft`")
    config = peft.LoraConfig(r=2, target_modules=["q_proj"], task_type="CAUSAL_LM")
    trainer = make_trainer(pipeline, tmp_path, cache, peft_config=config)
    trainer.save_model(tmp_path / "saved")
    assert (tmp_path / "saved/adapter_config.json").exists()
    assert not (tmp_path / "saved/manifest.json").exists()
    args = OfflineDistillationConfig(str(tmp_path / "out"), **QUIET)
    with pytest.raises(ModelError, match="holds an adapter"):
        OfflineDistillationTrainer(str(tmp_path / "saved"), args, cache)


def test_it_says_once_what_cannot_be_checked(pipeline, tmp_path, cache, foreign, caplog):
    dataset = to_dataset(foreign)
    cases = [
        (dataset, True, "a Dataset does not record which teacher scored it"),
        ([*foreign], True, "a list does not record"),
        (foreign, False, "the model was not loaded from a folder or the hub"),
    ]
    for number, (data, folder, reason) in enumerate(cases):
        caplog.clear()
        with caplog.at_level(logging.WARNING, "lopd"):
            trainer = make_trainer(
                pipeline, tmp_path / str(number), data, data, folder=folder, max_steps=1
            )
            trainer.train()
        (said,) = [r.getMessage() for r in caplog.records if "provenance" in r.getMessage()]
        assert said.startswith(f"provenance is not checked: {reason}")
        trainer.save_model(tmp_path / str(number))
        assert not (tmp_path / str(number) / "manifest.json").exists()
    with caplog.at_level(logging.WARNING, "lopd"):
        caplog.clear()
        make_trainer(pipeline, tmp_path / "quiet", cache)
    assert not caplog.records


def test_shards_are_verified_and_may_be_missing_if_allowed(pipeline, tmp_path):
    folder = write_cache(tmp_path / "cache", pipeline / "teacher", pipeline / "rollouts")
    (folder / "shard-00001.json").unlink()
    (folder / "shard-00001.safetensors").unlink()
    part = TeacherCache.open(folder, allow_incomplete=True)
    allowed = {"allow_incomplete_cache": True}
    for known in (True, False):
        trainer = make_trainer(pipeline, tmp_path / "out", part, folder=known, **allowed)
        assert len(trainer.train_dataset) == len(part) == 8
    flip(folder / "shard-00000.safetensors", -40)
    with pytest.raises(ShardError, match="shard-00000"):
        make_trainer(pipeline, tmp_path / "out", part, **allowed)
    make_trainer(pipeline, tmp_path / "out", part, verify=False, **allowed)


def test_a_model_with_adapters_is_not_the_one_in_its_folder(pipeline, tmp_path, foreign, caplog):
    peft = pytest.importorskip("peft", reason="part of the extra `peft`")
    model = load_model(pipeline / "student", dtype="float32", device="cpu")
    torch.manual_seed(0)
    adapted = peft.get_peft_model(
        model, peft.LoraConfig(r=2, target_modules=["q_proj"], task_type="CAUSAL_LM")
    )
    with caplog.at_level(logging.WARNING, "lopd"):
        OfflineDistillationTrainer(
            adapted,
            OfflineDistillationConfig(str(tmp_path), **QUIET),
            foreign,
            processing_class=load_tokenizer(pipeline / "student"),
        )
    assert "the model has adapters already" in caplog.text


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_only_a_model_with_the_weights_of_its_folder_counts_as_that_folder(
    pipeline, tmp_path, cache, caplog, dtype
):
    """What a model names as its folder says nothing of weights that were changed in memory."""
    tokenizer = load_tokenizer(pipeline / "student")
    unchanged = load_model(pipeline / "student", dtype=dtype, device="cpu")
    one_weight = load_model(pipeline / "student", dtype=dtype, device="cpu")
    with torch.no_grad():
        one_weight.model.norm.weight[0] += 1
    config = AutoConfig.from_pretrained(pipeline / "student")
    random = AutoModelForCausalLM.from_config(config)
    for number, (model, known) in enumerate(
        [(unchanged, True), (one_weight, False), (random, False)]
    ):
        assert model.name_or_path == str(pipeline / "student")
        caplog.clear()
        out = tmp_path / str(number)
        args = OfflineDistillationConfig(str(out), **QUIET)
        with caplog.at_level(logging.WARNING, "lopd"):
            trainer = OfflineDistillationTrainer(model, args, cache, processing_class=tokenizer)
        trainer.save_model(out)
        assert (out / "manifest.json").exists() == known
        said = f"provenance is not checked: the model has other weights than {pipeline}/student"
        assert (said in caplog.text) != known
