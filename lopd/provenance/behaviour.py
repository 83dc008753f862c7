"""What a model folder computes besides its weights: config, tokenizer, chat template, code.

Two folders of equal weights compute different things if, for example, their rope settings,
end-of-sequence ids or normalisers differ. A manifest records these values by name, so that a
comparison can say which of them differs.
"""

import hashlib
import math
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from lopd.provenance.folder import (
    GENERATION_NAME,
    SPECIAL_TOKENS,
    TOKENIZER_NAME,
    TOKENIZER_SETTINGS,
    model_folder,
    read_config,
)
from lopd.provenance.io import (
    canonical_json,
    json_digest,
    read_json_object,
    read_optional_json,
    sha256_file,
    without_keys,
)
from lopd.provenance.remote_code import is_code_trusted

# What a config says about how it was loaded or saved; every load sets the dtype itself.
VOLATILE_CONFIG = frozenset(
    {"_name_or_path", "transformers_version", "use_cache", "torch_dtype", "dtype"}
)
# Settings of the sampler, which every stage sets itself.
SAMPLER_KEYS = frozenset(
    {
        *("do_sample", "temperature", "top_k", "top_p", "typical_p", "min_p"),
        *("max_length", "max_new_tokens", "cache_implementation", "_from_model_config"),
    }
)
# How a tokenizer was saved, and its template, which has a digest of its own.
VOLATILE_TOKENIZER = VOLATILE_CONFIG | {
    *("name_or_path", "chat_template", "tokenizer_file", "is_local", "local_files_only"),
    *("backend", "padding_side", "truncation_side", "padding", "truncation", "version"),
}
SLOW_TOKENIZER_FILES = ("*.model", "vocab.json", "merges.txt", "vocab.txt", "*.tiktoken")
TEMPLATE_NAME = "chat_template.jinja"
MORE_TEMPLATES = "additional_chat_templates"
MOST_KEYS = 64  # of an object whose values are recorded one by one
LONGEST = 64  # bytes of a value that is recorded as it is


def behaviour_of(path: str | Path) -> dict[str, Any]:
    """The values that decide what a model folder computes, by file and key.

    Values of more than `LONGEST` bytes of JSON are replaced by their sha256. Code counts only where
    it is run.

    Raises:
        MissingFileError: no such folder, or no config in it.
        DataError: a file is damaged.
    """
    folder = model_folder(path)
    config = read_config(folder)
    generation = read_optional_json(folder / GENERATION_NAME)
    behaviour: dict[str, Any] = {
        "config": without_keys(config, VOLATILE_CONFIG),
        "generation_config": without_keys(generation or {}, VOLATILE_CONFIG | SAMPLER_KEYS),
        "tokenizer": _tokenizer(folder),
        "chat_template": chat_template_digest(folder),
    }
    settings = read_optional_json(folder / TOKENIZER_SETTINGS) or {}
    if is_code_trusted() and ("auto_map" in config or "auto_map" in settings):
        behaviour["code"] = {f.name: sha256_file(f) for f in sorted(folder.glob("*.py"))}
    return {name: value and finite(_brief(value)) for name, value in behaviour.items()}


def chat_template_digest(path: str | Path) -> str | None:
    """sha256 of the chat template; None if the tokenizer has none."""
    folder = model_folder(path)
    files = [folder / TEMPLATE_NAME, *sorted((folder / MORE_TEMPLATES).glob("*.jinja"))]
    digests = {file.name: sha256_file(file) for file in files if file.exists()}
    inline = (read_optional_json(folder / TOKENIZER_SETTINGS) or {}).get("chat_template")
    if inline is not None and TEMPLATE_NAME not in digests:  # which takes precedence
        text = inline.encode("utf-8") if isinstance(inline, str) else canonical_json(inline)
        digests[TEMPLATE_NAME] = hashlib.sha256(text).hexdigest()
    if set(digests) == {TEMPLATE_NAME}:
        return digests[TEMPLATE_NAME]
    return json_digest(digests) if digests else None


def _tokenizer(folder: Path) -> dict[str, Any]:
    parts: dict[str, Any] = {}
    if (folder / TOKENIZER_NAME).exists():
        parts |= read_json_object(folder / TOKENIZER_NAME)
    else:
        files = {file for name in SLOW_TOKENIZER_FILES for file in folder.glob(name)}
        parts |= {file.name: sha256_file(file) for file in sorted(files)}
    parts |= read_optional_json(folder / TOKENIZER_SETTINGS) or {}
    for name in (SPECIAL_TOKENS, "added_tokens.json"):
        if values := read_optional_json(folder / name):
            parts[Path(name).stem] = values
    return {key: value for key, value in parts.items() if key not in VOLATILE_TOKENIZER}


def _brief(value: Any) -> Any:
    """A JSON value with long lists, strings and objects replaced by their digests."""
    if isinstance(value, Mapping) and len(value) <= MOST_KEYS:
        return {key: _brief(item) for key, item in value.items()}
    data = canonical_json(value)
    return value if len(data) <= LONGEST else hashlib.sha256(data).hexdigest()


def finite(value: Any) -> Any:
    """A JSON value with its infinite and NaN numbers, which manifests refuse, as words."""
    if isinstance(value, Mapping):
        return {key: finite(item) for key, item in value.items()}
    if isinstance(value, list):
        return [finite(item) for item in value]
    return str(value) if isinstance(value, float) and not math.isfinite(value) else value
