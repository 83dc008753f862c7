"""Fingerprints of models, tokenizers and files."""

import hashlib
import json
import os
import shutil
import subprocess
import sys
import time

import numpy as np
import pytest
from helpers_provenance import VOCAB, make_model, weights_of_model, write_weights

from lopd.errors import (
    DataError,
    MissingFileError,
    ModelError,
)
from lopd.provenance import (
    behaviour_of,
    chat_template_digest,
    config_digest,
    describe_file,
    describe_model,
    fingerprint,
    fingerprint_weights,
    load_vocab,
    save_vocab,
    tokenizer_digest,
    vocab_size_of,
)


@pytest.fixture(autouse=True)
def memo(tmp_path_factory, monkeypatch):
    folder = tmp_path_factory.mktemp("memo")
    monkeypatch.setenv("XDG_CACHE_HOME", str(folder))
    monkeypatch.setattr(fingerprint, "_RACY_NS", 0)  # the change time of a file cannot be set back
    return folder / "lopd" / "fingerprints.json"


def age(folder, seconds=60):
    then = time.time_ns() - seconds * 10**9
    for path in folder.glob("*.safetensors"):
        os.utime(path, ns=(then, then))
    newest = max(path.stat().st_ctime_ns for path in folder.glob("*.safetensors"))
    while time.time_ns() <= newest:
        time.sleep(0.001)


def test_fingerprints_do_not_depend_on_sharding(tmp_path):
    tensors = weights_of_model(seed=0)
    found = set()
    for shards in (1, 2, 3):
        folder = make_model(tmp_path / str(shards), seed=0, shards=shards)
        found.add(fingerprint_weights(folder))
    backwards = make_model(tmp_path / "backwards")
    write_weights(backwards, dict(reversed(list(tensors.items()))))
    assert found == {fingerprint_weights(backwards)}


def test_fingerprints_follow_their_definition(tmp_path):
    folder = make_model(tmp_path / "m")
    entries = []
    for name, values in weights_of_model(seed=0).items():
        head = json.dumps([name, "F32", list(values.shape)], separators=(",", ":")).encode()
        entries.append([name, hashlib.sha256(head + values.tobytes()).hexdigest()])
    whole = json.dumps(sorted(entries), separators=(",", ":")).encode()
    assert fingerprint_weights(folder) == hashlib.sha256(whole).hexdigest()


def one_bit(tensors):
    tensors["b"].view(np.uint32)[1, 1] ^= 1


def renamed(tensors):
    tensors["B"] = tensors.pop("b")


def reshaped(tensors):
    tensors["b"] = tensors["b"].reshape(-1)


def retyped(tensors):
    tensors["b"] = tensors["b"].view(np.int32)


def swapped(tensors):
    tensors["a"], tensors["c"] = tensors["c"], tensors["a"]


@pytest.mark.parametrize("change", [one_bit, renamed, reshaped, retyped, swapped])
def test_any_change_of_a_tensor_changes_the_fingerprint(tmp_path, change):
    before = fingerprint_weights(make_model(tmp_path / "before"))
    tensors = weights_of_model(seed=0)
    change(tensors)
    after = make_model(tmp_path / "after")
    write_weights(after, tensors)
    assert fingerprint_weights(after) != before


def test_the_weights_that_are_hashed_are_those_that_transformers_loads(tmp_path):
    """It prefers the single file to an index, and a name in the config to both."""
    folder = make_model(tmp_path / "m", seed=1)
    only = fingerprint_weights(folder)
    write_weights(folder, weights_of_model(seed=2), shards=2)
    assert fingerprint_weights(folder) == only
    config = json.loads((folder / "config.json").read_text())
    named = config | {"transformers_weights": "model-0.safetensors"}
    (folder / "config.json").write_text(json.dumps(named))
    with pytest.raises(ModelError, match="names other weights"):
        fingerprint_weights(folder)


def test_safetensors_metadata_and_alignment_do_not_matter(tmp_path):
    folder = make_model(tmp_path / "m")
    before = fingerprint_weights(folder)
    write_weights(folder, weights_of_model(seed=0), metadata={"format": "pt"})
    assert fingerprint_weights(folder) == before


def test_a_stored_fingerprint_is_used_unless_rehash_is_set(tmp_path, memo, monkeypatch):
    folder = make_model(tmp_path / "m", shards=2)
    age(folder)
    calls = []
    real = fingerprint._tensor_digests
    monkeypatch.setattr(
        fingerprint, "_tensor_digests", lambda file: calls.append(file) or real(file)
    )
    first = fingerprint_weights(folder)
    assert fingerprint_weights(folder) == first and len(calls) == 2
    assert fingerprint_weights(folder, rehash=True) == first and len(calls) == 4
    memo.write_text("{ torn")
    assert fingerprint_weights(folder) == first and len(calls) == 6
    memo.write_text('["a list"]')
    assert fingerprint_weights(folder) == first and len(calls) == 8
    assert fingerprint_weights(folder) == first and len(calls) == 8


@pytest.mark.parametrize("how", ["content", "time", "inode", "change time"])
def test_the_memo_notices_a_changed_file(tmp_path, how):
    folder = make_model(tmp_path / "m")
    age(folder)
    first = fingerprint_weights(folder)
    file = folder / "model.safetensors"
    stat = file.stat()
    data = bytearray(file.read_bytes())
    data[-1] ^= 1
    if how == "inode":
        (tmp_path / "new").write_bytes(data)
        (tmp_path / "new").replace(file)
    else:
        file.write_bytes(data)
    if how != "content":
        os.utime(file, ns=(stat.st_mtime_ns, stat.st_mtime_ns + (how == "time")))
    assert fingerprint_weights(folder) != first


def test_a_file_written_just_now_is_not_remembered(tmp_path, memo, monkeypatch):
    monkeypatch.setattr(fingerprint, "_RACY_NS", 10**15)
    fingerprint_weights(make_model(tmp_path / "m"))
    assert not memo.exists()


def test_a_memo_that_cannot_be_written_costs_nothing(tmp_path, memo, monkeypatch):
    memo.parent.write_text("a file where the folder should be")
    folder = make_model(tmp_path / "m")
    age(folder)
    assert fingerprint_weights(folder) == fingerprint_weights(folder)


def drop_shard(folder):
    (folder / "model-1.safetensors").unlink()


def truncate(folder):
    os.truncate(folder / "model-1.safetensors", 100)


def misindex(folder):
    index = folder / "model.safetensors.index.json"
    content = json.loads(index.read_text())
    content["weight_map"]["ghost"] = "model-0.safetensors"
    index.write_text(json.dumps(content))


def duplicate(folder):
    shutil.copy(folder / "model-0.safetensors", folder / "model-1.safetensors")


@pytest.mark.parametrize(
    "spoil, error, message",
    [
        (drop_shard, MissingFileError, "names model-1.safetensors, which is not there"),
        (truncate, ModelError, r"model-1.safetensors is truncated or altered"),
        (misindex, ModelError, "'ghost' is in only one"),
        (duplicate, ModelError, "is in two weight files"),
    ],
)
def test_broken_checkpoints_are_refused(tmp_path, spoil, error, message):
    folder = make_model(tmp_path / "m", shards=2)
    spoil(folder)
    with pytest.raises(error, match=message):
        fingerprint_weights(folder)


def test_folders_without_safetensors_are_refused_with_a_remedy(tmp_path):
    with pytest.raises(MissingFileError, match="no such file or folder"):
        fingerprint_weights(tmp_path / "nowhere")
    with pytest.raises(MissingFileError, match="neither model.safetensors nor"):
        fingerprint_weights(tmp_path)
    (tmp_path / "pytorch_model.bin").write_bytes(b"pickle")
    with pytest.raises(MissingFileError, match="safe_serialization=True"):
        fingerprint_weights(tmp_path)


def test_config_digest_ignores_how_it_was_loaded_and_nothing_else(tmp_path):
    folder = make_model(tmp_path / "m")
    first = config_digest(folder)
    config = json.loads((folder / "config.json").read_text())
    volatile = {"_name_or_path": "x", "transformers_version": "9", "dtype": "float16"}
    text = dict(reversed(list((config | volatile).items())))
    (folder / "config.json").write_text(json.dumps(text))
    assert config_digest(folder) == first
    (folder / "config.json").write_text(json.dumps(config | {"rope_theta": 2}))
    assert config_digest(folder) != first


def test_vocab_size_is_the_heads_also_inside_a_text_config(tmp_path):
    folder = make_model(tmp_path / "m", rows=10)
    assert vocab_size_of(folder) == 10
    (folder / "config.json").write_text('{"text_config": {"vocab_size": 12}}')
    assert vocab_size_of(folder) == 12
    (folder / "config.json").write_text("{}")
    with pytest.raises(ModelError, match="has no vocab_size"):
        vocab_size_of(folder)
    (folder / "config.json").write_text("{")
    with pytest.raises(DataError, match=r"config\.json is not JSON"):
        vocab_size_of(folder)


def test_tokenizer_digest_is_of_the_map_with_added_tokens(tmp_path):
    first = tokenizer_digest(make_model(tmp_path / "a"))
    other_order = dict(reversed(list(VOCAB.items())))
    assert tokenizer_digest(make_model(tmp_path / "b", vocab=other_order)) == first
    moved = VOCAB | {"x": VOCAB["y"], "y": VOCAB["x"]}
    assert tokenizer_digest(make_model(tmp_path / "c", vocab=moved)) != first
    assert tokenizer_digest(make_model(tmp_path / "d", added=["<think>"])) != first


def test_the_vocabulary_is_stored_with_added_tokens(tmp_path):
    folder = make_model(tmp_path / "m", added=["<think>"])
    save_vocab(folder, tmp_path)
    assert load_vocab(tmp_path) == VOCAB | {"<think>": len(VOCAB)}
    with pytest.raises(MissingFileError, match="run 'lopd score' again"):
        load_vocab(folder)


def test_a_folder_without_a_tokenizer_is_refused(tmp_path):
    folder = make_model(tmp_path / "m")
    (folder / "tokenizer.json").unlink()
    with pytest.raises(MissingFileError, match=r"no tokenizer\.json"):
        tokenizer_digest(folder)
    (folder / "tokenizer.json").write_text("{}")
    with pytest.raises(DataError, match="is not a tokenizer"):
        tokenizer_digest(folder)


def test_chat_templates_are_read_from_either_file(tmp_path):
    folder = make_model(tmp_path / "m")
    assert chat_template_digest(folder) is None
    (folder / "tokenizer_config.json").write_text('{"chat_template": "{{ x }}"}')
    in_settings = chat_template_digest(folder)
    (folder / "tokenizer_config.json").unlink()
    (folder / "chat_template.jinja").write_text("{{ x }}")
    assert chat_template_digest(folder) == in_settings is not None
    (folder / "chat_template.jinja").write_text("{{ y }}")
    assert chat_template_digest(folder) != in_settings


def test_descriptions_have_what_manifests_need(tmp_path):
    folder = make_model(tmp_path / "m", rows=10)
    found = describe_model(folder, dtype="float32", engine="hf")
    assert found.raw == {
        "path": str(folder),
        "weights": fingerprint_weights(folder),
        "config": config_digest(folder),
        "tokenizer": tokenizer_digest(folder),
        "chat_template": None,
        "behaviour": behaviour_of(folder),
        "eos_ids": None,
        "hub": None,
        "vocab_size": 10,
        "dtype": "float32",
        "engine": "hf",
    }
    file = tmp_path / "prompts.jsonl"
    file.write_bytes(b"{}\n")
    digest = hashlib.sha256(b"{}\n").hexdigest()
    assert describe_file(file) == {"path": str(file), "bytes": 3, "sha256": digest}
    with pytest.raises(MissingFileError, match="is not a file"):
        describe_file(tmp_path)


def test_importing_builds_and_imports_no_model_code():
    code = (
        "import sys, lopd.provenance, lopd.store; "
        "print([m for m in ('torch', 'transformers', 'tokenizers') if m in sys.modules])"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout == "[]\n"
