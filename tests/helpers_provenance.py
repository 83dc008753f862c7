"""Hugging Face model folders made by hand: weights, config and tokenizer, no model class."""

import json
from pathlib import Path

import numpy as np
from safetensors.numpy import save_file

VOCAB = {token: index for index, token in enumerate(["<unk>", "<eos>", *"abcxyz"])}


def weights_of_model(seed: int) -> dict[str, np.ndarray]:
    rng = np.random.default_rng(seed)
    return {name: rng.normal(size=(3, 4)).astype(np.float32) for name in "bcad"}


def write_weights(
    folder: Path,
    tensors: dict[str, np.ndarray],
    *,
    shards: int = 1,
    metadata: dict[str, str] | None = None,
) -> None:
    if shards == 1:
        save_file(tensors, folder / "model.safetensors", metadata=metadata)
        return
    weight_map = {name: f"model-{i % shards}.safetensors" for i, name in enumerate(tensors)}
    for file in set(weight_map.values()):
        save_file({n: t for n, t in tensors.items() if weight_map[n] == file}, folder / file)
    index = folder / "model.safetensors.index.json"
    index.write_text(json.dumps({"weight_map": weight_map}))


def write_tokenizer(folder: Path, vocab: dict[str, int], added: list[str]) -> None:
    from tokenizers import Tokenizer, models

    tokenizer = Tokenizer(models.WordLevel(vocab, unk_token="<unk>"))
    tokenizer.add_special_tokens(added)
    tokenizer.save(str(folder / "tokenizer.json"))


def make_model(
    folder: Path,
    *,
    seed: int = 0,
    rows: int = 16,
    shards: int = 1,
    vocab: dict[str, int] | None = None,
    added: list[str] | None = None,
) -> Path:
    folder.mkdir(parents=True)
    write_weights(folder, weights_of_model(seed), shards=shards)
    config = {"model_type": "toy", "vocab_size": rows, "hidden_size": 4}
    (folder / "config.json").write_text(json.dumps(config))
    write_tokenizer(folder, vocab or VOCAB, added or [])
    return folder
