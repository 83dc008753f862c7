"""The lineage of checkpoints, and declared ones."""

import json

import pytest
from helpers_provenance import make_model, weights_of_model, write_weights

from lopd.errors import MissingFileError, ProvenanceError
from lopd.provenance import (
    behaviour_of,
    build_manifest,
    declare,
    describe_model,
    fingerprint_weights,
    lineage_of,
    read_manifest,
    tokenizer_digest,
    warn_if_edited,
    write_manifest,
)


def test_declared_checkpoints_have_a_lineage(tmp_path):
    student, teacher = make_model(tmp_path / "s", seed=1), make_model(tmp_path / "t", seed=2)
    nothing = {"sft_teacher": None, "declared": False, "initial_student": None}
    assert lineage_of(student).raw == nothing
    manifest = declare(student, teacher=teacher)
    assert read_manifest(student, kind="checkpoint") == manifest
    assert manifest.model.weights == fingerprint_weights(student)
    lineage = lineage_of(student)
    assert lineage.declared is True
    assert lineage.sft_teacher.raw == {
        "weights": fingerprint_weights(teacher),
        "tokenizer": tokenizer_digest(teacher),
        "path": str(teacher),
        "behaviour": behaviour_of(teacher),
        "eos_ids": None,
    }
    declare(student, teacher="ab" * 32)
    assert lineage_of(student).sft_teacher.weights == "ab" * 32


def test_declare_does_not_replace_what_a_stage_wrote(tmp_path):
    student = make_model(tmp_path / "s")
    described = describe_model(student, dtype="float32", engine="hf")
    said = {"kind": "checkpoint", "stage": "sft", "config": {}, "model": described}
    write_manifest(student, build_manifest(**said, lineage={"sft_teacher": {"weights": "cd" * 32}}))
    with pytest.raises(ProvenanceError, match="a stage wrote"):
        declare(student, teacher="ab" * 32)
    # fine-tuned on demonstrations of unknown origin: a declaration says more than that
    write_manifest(student, build_manifest(**said, lineage={"sft_teacher": None}))
    assert declare(student, teacher="ab" * 32).lineage.declared is True
    with pytest.raises(MissingFileError, match="nowhere: no such file or folder"):
        declare(make_model(tmp_path / "new"), teacher="nowhere")


def test_a_manifest_of_other_weights_gives_no_lineage(tmp_path):
    student = make_model(tmp_path / "s", seed=1)
    declare(student, teacher="ab" * 32)
    write_weights(student, weights_of_model(seed=5))
    with pytest.raises(ProvenanceError, match="describes weights .* the folder holds"):
        lineage_of(student)


def test_an_edited_checkpoint_is_named(tmp_path, caplog):
    student = make_model(tmp_path / "s", seed=1)
    warn_if_edited(student)  # it has no manifest
    declare(student, teacher="ab" * 32)
    warn_if_edited(student)
    assert not caplog.messages
    config = json.loads((student / "config.json").read_text())
    (student / "config.json").write_text(json.dumps({**config, "rope_theta": 7.0}))
    warn_if_edited(student)
    (found,) = caplog.messages
    assert "rope_theta" in found and "is 7.0 since its manifest.json was written" in found
