"""Manifests, their digests, and the lineage of checkpoints."""

import dataclasses
import json
import re

import pytest
from helpers_cache import damaged, make_manifest
from helpers_provenance import make_model

from lopd.errors import (
    ConfigError,
    DataError,
    MissingFileError,
    ShardError,
)
from lopd.provenance import (
    build_manifest,
    manifest_digest,
    read_manifest,
    save_vocab,
    write_manifest,
)


@dataclasses.dataclass
class Config:
    out: str = "x"


def test_manifests_come_back(tmp_path):
    manifest = build_manifest(
        "rollouts",
        stage="rollout",
        config=Config(),
        model={"path": "p", "weights": "w", "tokenizer": "t", "vocab_size": 4},
        plan={"shards": (1, 2)},
        seed=3,
    )
    write_manifest(tmp_path / "new", manifest)
    assert read_manifest(tmp_path / "new", kind="rollouts") == manifest
    assert manifest.config == {"out": "x"} and manifest.raw["seed"] == 3
    assert manifest.shards == (1, 2)
    with pytest.raises(ConfigError, match="holds 'rollouts', expected 'cache'"):
        read_manifest(tmp_path / "new", kind="cache")
    with pytest.raises(MissingFileError, match=r"has no manifest\.json"):
        read_manifest(tmp_path)


@pytest.mark.parametrize(
    "text, message",
    [("{", "is not JSON"), ("[]", "not a lopd manifest"), ('{"kind": "x"}', "not a lopd")],
)
def test_broken_manifests_are_refused(tmp_path, text, message):
    (tmp_path / "manifest.json").write_text(text)
    with pytest.raises(DataError, match=message):
        read_manifest(tmp_path)


def without(key):
    def change(manifest):
        *parents, last = key.split(".")
        for part in parents:
            manifest = manifest[part]
        del manifest[last]

    return key, change


@pytest.mark.parametrize(
    "key, change",
    [
        *map(without, ("base", "k", "temperature", "plan.shards", "model.weights")),
        *map(without, ("model.tokenizer", "inputs.rollouts.model.weights")),
        ("model.path", lambda manifest: manifest.update(model=["a list"])),
        ("plan.shards", lambda manifest: manifest.update(plan=None)),
        ("lineage", lambda manifest: manifest.update(lineage=["a list"])),
        ("config", lambda manifest: (manifest.clear(), manifest.update(kind="cache", schema=1))),
    ],
)
def test_manifests_without_what_their_kind_needs_are_refused(tmp_path, key, change):
    manifest = make_manifest()
    file = write_manifest(tmp_path, manifest)
    assert read_manifest(tmp_path) == manifest
    raw = json.loads(file.read_text())
    change(raw)
    file.write_text(json.dumps(raw))
    with pytest.raises(DataError, match=rf"manifest\.json has no {re.escape(key)}, which"):
        read_manifest(tmp_path)


@pytest.mark.parametrize("inputs", [{"prompts": {"sha256": "a" * 64}}, {"cache": {"digest": "a"}}])
def test_an_evaluation_is_of_prompts_or_of_a_cache(tmp_path, inputs):
    model = {"path": "m", "weights": "a" * 64}
    manifest = build_manifest("evaluation", stage="eval", config={}, model=model, inputs=inputs)
    file = write_manifest(tmp_path, manifest)
    assert read_manifest(tmp_path).inputs == inputs
    file.write_text(json.dumps(json.loads(file.read_text()) | {"inputs": {}}))
    with pytest.raises(DataError, match="has no inputs.prompts.sha256 or inputs.cache.digest, "):
        read_manifest(tmp_path)


@pytest.mark.parametrize(
    "key, change",
    [
        ("k", {"k": "8"}),
        ("k", {"k": True}),
        ("temperature", {"temperature": "1"}),
        ("plan.shards", {"plan": {"shards": [1, "2"]}}),
        ("config", {"config": []}),
        ("sampling.seed", {"sampling": {"seed": 0.5}}),
        ("sampling", {"sampling": "greedy"}),
        ("scoring", {"scoring": "derived"}),
        ("scoring.tail", {"scoring": {"tail": ["derived"]}}),
        ("scoring.support.ids", {"scoring": {"support": {}}}),
        ("overrides.found", {"overrides": [{"name": "teacher-mismatch"}]}),
        ("lineage.declared", {"lineage": {"sft_teacher": None, "declared": "yes"}}),
    ],
)
def test_fields_of_another_type_are_refused(tmp_path, key, change):
    file = write_manifest(tmp_path, make_manifest())
    file.write_text(json.dumps({**json.loads(file.read_text()), **change}))
    with pytest.raises(DataError, match=rf"manifest\.json has no {re.escape(key)}, which"):
        read_manifest(tmp_path)


@pytest.mark.parametrize(
    "key, changes",
    [
        ("k that is 0 or a positive number (found -1)", {"k": -1}),
        ("top_p that is a number in (0, 1] (found 0)", {"top_p": 0}),
        ("temperature that is a positive number (found -1.0)", {"temperature": -1.0}),
        ("sampling.num_samples that is at least 1 (found 0)", {"sampling": {"num_samples": 0}}),
        ("model.vocab_size that is at least 1 (found 0)", {"model": {"vocab_size": 0}}),
    ],
)
def test_numbers_out_of_range_are_refused(tmp_path, key, changes):
    file = write_manifest(tmp_path, make_manifest())
    raw = json.loads(file.read_text())
    for name, value in changes.items():
        raw[name] = {**raw[name], **value} if isinstance(raw.get(name), dict) else value
    file.write_text(json.dumps(raw))
    with pytest.raises(DataError, match=re.escape(f"manifest.json has no {key}, which")):
        read_manifest(tmp_path)


def test_keys_of_a_newer_version_survive(tmp_path):
    """Digests are of the JSON on disk, so they do not depend on the version that reads it."""
    newer = damaged(make_manifest(), model={**make_manifest().model.raw, "quantised": "no"}, new=1)
    write_manifest(tmp_path, newer)
    found = read_manifest(tmp_path)
    assert found.raw["new"] == 1 and found.model.raw["quantised"] == "no"
    assert manifest_digest(found) == manifest_digest(newer) != manifest_digest(make_manifest())


LONG = "reduced over the vocabulary without the list"


@pytest.mark.parametrize(
    "old, expected",
    [
        ({}, ("computed", "computed", "computed")),
        ({"scoring": {"tail": LONG}, "entropy": "absent"}, ("computed", "absent", "computed")),
        (
            {"tail": "renormalized", "entropy": "buckets", "rollout_logprobs": "unknown"},
            ("renormalized", "derived", "absent"),
        ),
        ({"tail": "derived", "entropy": "buckets"}, ("derived", "derived", "computed")),
    ],
)
def test_caches_of_older_versions_mean_the_same(tmp_path, old, expected):
    """These were written before `scoring` had its present words."""
    write_manifest(tmp_path, damaged(make_manifest(), **old))
    scoring = read_manifest(tmp_path, kind="cache").scoring
    assert (scoring.tail, scoring.entropy, scoring.rollout_logprobs) == expected


def test_a_folder_in_place_of_a_manifest_is_refused(tmp_path):
    (tmp_path / "manifest.json").mkdir()
    with pytest.raises(DataError, match=r"manifest\.json cannot be read \(Is a directory\)"):
        read_manifest(tmp_path)


def test_what_cannot_be_written_is_named(tmp_path):
    model = make_model(tmp_path / "m")
    (tmp_path / "file").write_text("")
    with pytest.raises(ShardError, match=r"manifest\.json: not written \("):
        write_manifest(tmp_path / "file", make_manifest())
    with pytest.raises(ShardError, match=r"teacher_vocab\.json: not written \("):
        save_vocab(model, tmp_path / "file")


def test_newer_manifests_are_refused(tmp_path):
    write_manifest(tmp_path, damaged(make_manifest(), schema=99))
    with pytest.raises(DataError, match="schema 99, expected 1"):
        read_manifest(tmp_path)


def test_manifest_arguments_are_checked():
    with pytest.raises(ConfigError, match="kind 'cashe' is unknown"):
        build_manifest("cashe", stage="score", config={})
    with pytest.raises(ConfigError, match="manifest key 'created' is taken"):
        build_manifest("cache", stage="score", config={}, created="now")
