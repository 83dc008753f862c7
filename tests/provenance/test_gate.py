"""The gate before distillation: each refusal, each override, and nothing else."""

import json
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from helpers_provenance import VOCAB, make_model, weights_of_model, write_weights

from lopd.errors import ConfigError, DataError, ProvenanceError
from lopd.provenance import (
    CacheManifest,
    build_manifest,
    check_distill,
    declare,
    describe_model,
    differing_token,
    fingerprint_weights,
    lineage_of,
    save_vocab,
    write_manifest,
)
from lopd.provenance.gate import other_teacher
from lopd.provenance.manifest import Override, parse_manifest

EVERY = frozenset(
    {
        *("teacher-mismatch", "student-mismatch", "tokenizer-mismatch", "incomplete-cache"),
        "eos-mismatch",
    }
)


class World:
    """A teacher, its student, and the manifest of a cache made by the two."""

    def __init__(self, root: Path) -> None:
        self.root = root
        self.teacher = make_model(root / "teacher", seed=1)
        self.student = make_model(root / "student", seed=2)
        self.cache = root / "cache"
        self.cache.mkdir()
        declare(self.student, teacher=self.teacher)

    def manifest(self, teacher: Path | None = None, student: Path | None = None) -> CacheManifest:
        teacher, student = teacher or self.teacher, student or self.student
        save_vocab(teacher, self.cache)
        return build_manifest(
            "cache",
            stage="score",
            config={},
            model=describe_model(teacher, dtype="float32", engine="hf"),
            inputs={
                "rollouts": {
                    "digest": "0" * 64,
                    "model": describe_model(student, dtype="float32", engine="hf"),
                    "lineage": lineage_of(student),
                    "sampling": {},
                }
            },
            plan={"shards": [1]},
            k=4,
            top_p=1.0,
            codec="exact",
            temperature=1.0,
        )

    def check(self, manifest: CacheManifest | None = None, **options) -> list[Override]:
        options = {"cache_path": self.cache, "used_ids": np.arange(8), **options}
        return check_distill(self.student, manifest or self.manifest(), **options)


@pytest.fixture
def world(tmp_path):
    return World(tmp_path)


def refused(world, name, message, manifest=None, **options):
    """The gate refuses for `name` alone, says so, and lets the flag through."""
    others = EVERY - {name}
    with pytest.raises(ProvenanceError, match=rf"(?s)^{name}: .*{message}") as caught:
        world.check(manifest, allow=others, **options)
    text = str(caught.value)
    assert "\n" not in text and f"or pass --allow-{name}" in text
    assert "found" in text and "expected" in text
    (override,) = world.check(manifest, allow={name}, **options)
    assert override.name == name and override.found and override.expected
    return text


def test_what_belongs_together_passes_without_reading_the_ids(world):
    def unexpected():
        raise AssertionError("scanned")

    assert world.check(used_ids=unexpected) == []
    assert world.check(allow=EVERY) == []


def test_another_teacher_is_refused(world):
    other = make_model(world.root / "other", seed=3)
    text = refused(
        world, "teacher-mismatch", "costs accuracy at a finite budget", world.manifest(other)
    )
    for model in (other, world.teacher):
        assert str(model) in text and fingerprint_weights(model)[:12] in text
    assert "irreducible" not in text


def test_another_teacher_is_warned_of_before_it_scores(world):
    other = make_model(world.root / "other", seed=3)
    assert other_teacher(world.manifest()) is None
    text = other_teacher(world.manifest(other))
    assert text.startswith(f"this will be a cache scored by {other} ")
    assert f"'lopd distill' expects {world.teacher} " in text and "'lopd calibrate'" in text
    assert text.endswith("or pass --allow-teacher-mismatch to 'lopd distill'")
    unknown = make_model(world.root / "unknown", seed=4)  # it may be declared later
    assert other_teacher(world.manifest(other, student=unknown)) is None


def test_an_unknown_sft_teacher_is_refused_and_points_at_declare(world):
    (world.student / "manifest.json").unlink()
    refused(world, "teacher-mismatch", "'lopd declare'")


def test_a_stale_manifest_beside_the_student_is_refused(world):
    manifest = world.manifest()
    write_weights(world.student, weights_of_model(seed=9))
    with pytest.raises(ProvenanceError, match="describes weights .*'lopd declare'"):
        world.check(manifest, allow={"student-mismatch"})
    names = [o.name for o in world.check(manifest, allow=EVERY)]
    assert names == ["teacher-mismatch", "student-mismatch"]


def test_another_students_rollouts_are_refused(world):
    other = make_model(world.root / "other", seed=3)
    declare(other, teacher=world.teacher)
    text = refused(world, "student-mismatch", "'lopd rollout'", world.manifest(student=other))
    assert str(other) in text and fingerprint_weights(world.student)[:12] in text


def edit(file, **changes):
    value = json.loads(file.read_text()) if file.exists() else {}
    file.write_text(json.dumps({**value, **changes}))


@pytest.mark.parametrize(
    "name, changes, words",
    [
        ("config.json", {"rope_theta": 1e6}, "config.rope_theta was None, is 1000000.0"),
        ("generation_config.json", {"eos_token_id": 3}, "generation_config.eos_token_id was None"),
        ("tokenizer.json", {"normalizer": {"type": "NFC"}}, "tokenizer.normalizer.type was None"),
        ("tokenizer_config.json", {"chat_template": "{{ x }}"}, "chat_template was None, is"),
    ],
)
def test_a_student_that_was_edited_since_its_rollouts_is_refused(world, name, changes, words):
    manifest = world.manifest()
    edit(world.student / name, **changes)
    refused(world, "student-mismatch", f"edited since it made the rollouts: {words}", manifest)


def test_a_teacher_whose_config_was_edited_between_sampling_and_scoring_is_refused(world):
    edit(world.teacher / "config.json", rope_theta=1e6)
    words = "edited config: config.rope_theta was None, is 1000000.0"
    refused(world, "teacher-mismatch", words)


def test_a_template_or_sampler_setting_of_the_teacher_does_not_change_its_scores(world):
    edit(world.teacher / "tokenizer_config.json", chat_template="{{ x }}")
    edit(world.teacher / "generation_config.json", temperature=0.6)
    assert world.check() == []


def test_what_older_artefacts_do_not_record_is_not_compared(world):
    manifest = world.manifest()
    raw = json.loads(json.dumps(dict(manifest.raw)))
    for model in (raw["model"], raw["inputs"]["rollouts"]["model"]):
        del model["behaviour"], model["eos_ids"]
    lineage = json.loads((world.student / "manifest.json").read_text())
    del lineage["lineage"]["sft_teacher"]["behaviour"]
    (world.student / "manifest.json").write_text(json.dumps(lineage))
    edit(world.student / "config.json", rope_theta=1e6)
    edit(world.teacher / "config.json", rope_theta=1e6)
    assert world.check(parse_manifest(raw)) == []


def test_other_ids_that_end_an_answer_are_refused(world):
    edit(world.teacher / "generation_config.json", eos_token_id=1)
    edit(world.student / "generation_config.json", eos_token_id=[5, 3])
    text = "rollouts end with id 3 or 5, the teacher's answers with 1"
    assert "set eos_token_id to [1, 3, 5]" in refused(world, "eos-mismatch", text)
    edit(world.student / "generation_config.json", eos_token_id=[1])
    assert world.check() == []


@pytest.mark.parametrize("teacher", [{}, {"tokenizer": "t"}, {"weights": 3}, "someone", []])
def test_a_lineage_without_weights_is_refused_despite_overrides(world, teacher):
    cache = world.manifest()
    manifest = json.loads((world.student / "manifest.json").read_text())
    manifest["lineage"]["sft_teacher"] = teacher
    (world.student / "manifest.json").write_text(json.dumps(manifest))
    with pytest.raises(DataError, match=r"has no lineage\.sft_teacher\.weights, which"):
        world.check(cache, allow=EVERY)


def test_differing_token_names_the_first_id_in_the_order_given():
    ours, theirs = {"a": 0, "b": 1, "c": 2}, {"a": 0, "x": 1, "y": 2, "z": 3}
    assert differing_token(ours, theirs, np.array([0, 2, 1])) == (2, "c", "y")
    assert differing_token(ours, theirs, np.array([[0], [3]])) == (3, None, "z")
    assert differing_token(ours, theirs, np.array([0, 9])) is None
    assert differing_token(ours, theirs, np.array([], np.int64)) is None


def retokenised(world, vocab=None, **options):
    """The same weights with another tokenizer, as the scoring teacher."""
    folder = make_model(world.root / "retokenised", seed=1, vocab=vocab, **options)
    return world.manifest(folder)


def test_an_id_of_two_meanings_is_refused_if_used(world):
    moved = VOCAB | {"x": VOCAB["y"], "y": VOCAB["x"]}
    manifest = retokenised(world, moved)
    refused(world, "tokenizer-mismatch", "id 5 is 'y' to the teacher and 'x'", manifest)
    assert world.check(manifest, used_ids=np.array([0, 1, 2, 7])) == []
    assert world.check(manifest, used_ids=lambda: np.array([3])) == []


def test_a_token_that_only_one_side_has_is_refused_if_used(world):
    manifest = retokenised(world, added=["<think>"])
    text = "id 8 is '<think>' to the teacher and None to the student"
    refused(world, "tokenizer-mismatch", text, manifest, used_ids=np.array([8]))
    assert world.check(manifest) == []
    assert world.check(manifest, used_ids=np.array([15, 400])) == []


def test_an_id_beyond_the_students_rows_that_the_tokenizer_has_is_refused(tmp_path):
    world = World(tmp_path)
    short = make_model(tmp_path / "short", seed=2, rows=6)
    declare(short, teacher=world.teacher)
    world.student = short
    message = r"id 7 \('z'\) in the data, expected ids that the student's 6 vocabulary rows"
    refused(world, "tokenizer-mismatch", message, used_ids=np.array([7]))
    assert world.check(used_ids=np.array([5, 9])) == []


def test_differing_tokenizers_without_records_are_refused(world):
    manifest = retokenised(world, added=["<think>"])
    refused(world, "tokenizer-mismatch", "no record of the ids", manifest, used_ids=None)
    refused(world, "tokenizer-mismatch", "no record of the ids", manifest, cache_path=None)
    (world.cache / "teacher_vocab.json").unlink()
    refused(world, "tokenizer-mismatch", "teacher_vocab.json does not exist", manifest)


def test_an_incomplete_cache_is_refused(world):
    message = "2 unfinished or damaged shards, .*; the first is shard-00004: torn; redo it, or pass"
    faults = ["shard-00004: torn; redo it", "shard-00007: torn; redo it"]
    refused(world, "incomplete-cache", message, faults=faults)


def test_every_override_that_was_needed_is_recorded_in_order(world):
    other = make_model(world.root / "other", seed=3, added=["<think>"])
    manifest = world.manifest(other, student=other)
    found = world.check(manifest, allow=EVERY, faults=["torn"], used_ids=np.array([8]))
    assert [item.name for item in found] == [
        "incomplete-cache",
        "teacher-mismatch",
        "student-mismatch",
        "tokenizer-mismatch",
    ]
    assert all(item.found and item.expected for item in found)


def test_unknown_overrides_are_refused(world):
    with pytest.raises(ConfigError, match="override 'teacher' is unknown; use one of"):
        world.check(allow={"teacher"})


def test_the_gate_builds_no_model(world):
    write_manifest(world.cache, world.manifest())
    code = (
        "import sys; from lopd.provenance import check_distill, read_manifest; "
        "check_distill(sys.argv[1], read_manifest(sys.argv[2])); "
        "print([m for m in ('torch', 'transformers') if m in sys.modules])"
    )
    done = subprocess.run(
        [sys.executable, "-c", code, world.student, world.cache],
        capture_output=True,
        text=True,
        check=True,
    )
    assert done.stdout == "[]\n"
