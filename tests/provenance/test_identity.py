"""Which settings and inputs identify a run, and how differences are described."""

import pytest
from helpers_cache import damaged
from helpers_provenance import make_model

from lopd.provenance import (
    behaviour_of,
    build_manifest,
    describe_file,
    describe_model,
    difference,
    digests_of,
    fingerprint_weights,
    manifest_digest,
)
from lopd.provenance.io import json_digest


def test_manifest_digests_are_of_the_recipe():
    def digest(path="/a", weights="w", config=None, created=None, k=8, **extra):
        model = {"path": path, "weights": weights, "tokenizer": "t", "vocab_size": 9}
        rollouts = {"digest": "d", "model": {"path": path, "weights": "s"}}
        manifest = build_manifest(
            "cache",
            stage="score",
            config=config or {},
            model=model,
            inputs={"rollouts": rollouts},
            plan={"shards": [1]},
            **{"k": k, "top_p": 1.0, "codec": "exact", "temperature": 1.0, **extra},
        )
        return manifest_digest(damaged(manifest, created=created or manifest.raw["created"]))

    assert digest() == digest(path="/b", config={"out": "/c"}, created="later")
    assert len({digest(), digest(weights="v"), digest(k=4), digest(sampling={"seed": 1})}) == 4


def test_inputs_are_identified_by_their_content(tmp_path):
    """A file by its sha256, a model by weights and behaviour, a folder of shards by its digest."""
    model = make_model(tmp_path / "m")
    file = tmp_path / "prompts.jsonl"
    file.write_text("{}")
    inputs = {
        "prompts": describe_file(file),
        "teacher": describe_model(model, dtype="float32", engine="hf"),
        "cache": {"digest": "d", "model": describe_model(model, dtype="float32", engine="hf")},
        "nothing": {},
    }
    assert digests_of(inputs) == {
        "prompts": describe_file(file)["sha256"],
        "teacher": fingerprint_weights(model),
        "teacher.behaviour": json_digest(behaviour_of(model)),
        "cache": "d",
        "nothing": None,
    }


@pytest.mark.parametrize(
    "found, expected, words",
    [
        ({"k": 8, "p": {"a": 1}}, {"k": 8, "p": {"a": 1}}, ""),
        ({"k": 8}, {"k": 4}, "k was 8, is 4"),
        ({"k": 8}, {}, "k was 8, is None"),
        ({"k": None, "p": {}}, {}, ""),
        ({"p": {"a": {"b": 1}}}, {"p": {"a": {"b": 2}}}, "p.a.b was 1, is 2"),
        ({"p": None}, {"p": {"a": 1}}, "p.a was None, is 1"),
        ({"p": {"a": "0" * 64}}, {"p": None}, f"p.a was '{'0' * 12}...', is None"),
        ({"model": {}}, {"model": {"behaviour": {"a": 1}}}, ""),
        ({"t": "w", "t.behaviour": "b"}, {"t": "w"}, ""),
        (
            {"m": {"behaviour": {"a": 1}}},
            {"m": {"behaviour": {"a": 2}}},
            "m.behaviour.a was 1, is 2",
        ),
        ({"m": {"behaviour": {"a": 1}}}, {"m": {"behaviour": {}}}, "m.behaviour.a was 1, is None"),
        (dict.fromkeys("edcba", 1), {}, "a was 1, is None; b was 1, is None; and 3 more"),
    ],
)
def test_what_differs_is_named(found, expected, words):
    assert difference(found, expected, most=2) == words
