"""The gate for caches of several teachers: compared by name, tokenizers and ends included."""

import json

import numpy as np
import pytest
from helpers_provenance import make_model

from lopd.cli import main
from lopd.errors import DataError, ProvenanceError
from lopd.provenance import (
    build_manifest,
    check_distill,
    declare,
    describe_model,
    lineage_of,
    save_vocab,
)
from lopd.provenance.manifest import parse_manifest
from lopd.provenance.teachers import described


@pytest.fixture
def models(tmp_path):
    names = ("math", "code", "student")
    return {name: make_model(tmp_path / name, seed=i) for i, name in enumerate(names)}


def manifest_of(models, folder, **teachers):
    """The manifest of a cache with a shard of each teacher, or of one under None."""
    named = {name: models[model] for name, model in teachers.items()} or {None: models["math"]}
    for model in named.values():
        save_vocab(model, folder, one_of_several=bool(teachers))
    student = describe_model(models["student"], dtype="float32", engine="hf")
    parts = {n: describe_model(m, dtype="float32", engine="hf") for n, m in named.items()}
    return build_manifest(
        "cache",
        stage="score",
        config={},
        **described(parts),
        inputs={"rollouts": {"digest": "0" * 64, "model": student, "lineage": None}},
        plan={"shards": [1] * len(named)} | ({"teachers": [*named]} if teachers else {}),
        k=4,
        top_p=1.0,
        codec="exact",
        temperature=1.0,
    )


def check(models, tmp_path, allow=(), **teachers):
    manifest = manifest_of(models, tmp_path, **teachers)
    ids = {"used_ids": lambda name=None: np.arange(8), "cache_path": tmp_path}
    return check_distill(models["student"], manifest, allow=allow, **ids)


def declared(models, **teachers):
    argv = ["declare", "--model", models["student"]]
    for name, model in teachers.items():
        argv += ["--teacher", f"{name}={models[model]}"]
    assert main(list(map(str, argv))) == 0
    assert set(lineage_of(models["student"]).sft_teachers) == set(teachers)


def test_each_name_has_its_teacher(models, tmp_path):
    declared(models, math="math", code="code")
    assert check(models, tmp_path, math="math", code="code") == []
    assert check(models, tmp_path, code="code") == []  # the student knows another besides
    with pytest.raises(ProvenanceError, match="records of 'code' scored by .*math .*expected"):
        check(models, tmp_path, math="math", code="math")
    with pytest.raises(ProvenanceError, match="'law' scored by .* fine-tuned on, code, math;"):
        check(models, tmp_path, math="math", code="code", law="math")
    overrides = check(models, tmp_path, {"teacher-mismatch"}, math="code", code="math")
    assert [each.name for each in overrides] == ["teacher-mismatch"] * 2


def test_one_teacher_of_all_is_compared_with_every_one(models, tmp_path):
    declared(models, math="math", code="code")
    with pytest.raises(ProvenanceError, match="a cache scored by .*math .*expected .*code"):
        check(models, tmp_path)
    declared(models, math="math", code="math")
    assert check(models, tmp_path) == []


def test_a_student_of_one_teacher_wants_it_under_every_name(models, tmp_path):
    declare(models["student"], teacher=models["math"])
    assert check(models, tmp_path, a="math", b="math") == []
    with pytest.raises(ProvenanceError, match="records of 'b' scored by"):
        check(models, tmp_path, a="math", b="code")


def write_eos(folder, token):
    file = folder / "config.json"
    file.write_text(json.dumps(json.loads(file.read_text()) | {"eos_token_id": token}))


def test_ends_and_tokens_are_compared_for_each(models, tmp_path):
    for name, token in {"math": 1, "code": 5, "student": 1}.items():
        write_eos(models[name], token)
    declared(models, math="math", code="code")
    with pytest.raises(ProvenanceError, match="eos-mismatch: .* teacher code's answers with"):
        check(models, tmp_path, math="math", code="code")
    write_eos(models["code"], 1)
    tokenizer = models["code"] / "tokenizer.json"
    found = json.loads(tokenizer.read_text())
    vocab = found["model"]["vocab"]
    (first, one), (second, two) = list(vocab.items())[:2]
    vocab[first], vocab[second] = two, one
    tokenizer.write_text(json.dumps(found))
    with pytest.raises(ProvenanceError, match="tokenizer-mismatch: found id"):
        check(models, tmp_path, {"teacher-mismatch"}, math="math", code="code")
    assert len(list(tmp_path.glob("teacher_vocab-*.json"))) == 2


@pytest.mark.parametrize(
    ("plan", "message"), [(["math"], r"plan\.teachers"), (["math", "law"], r"teachers\.law")]
)
def test_a_manifest_whose_shards_have_no_teacher_is_refused(models, tmp_path, plan, message):
    raw = dict(manifest_of(models, tmp_path, math="math", code="code").raw)
    raw["plan"] = {"shards": [1, 1], "teachers": plan}
    with pytest.raises(DataError, match=message):
        parse_manifest(raw, error=DataError)
