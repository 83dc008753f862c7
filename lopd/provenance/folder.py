"""What the files of a Hugging Face model folder say: config, vocabulary, end-of-sequence ids."""

import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from lopd.errors import DataError, MissingFileError, ModelError
from lopd.provenance.found import found_at
from lopd.provenance.io import read_json_object, read_optional_json
from lopd.provenance.remote_code import loading_code

CONFIG_NAME = "config.json"
GENERATION_NAME = "generation_config.json"
TOKENIZER_NAME = "tokenizer.json"
TOKENIZER_SETTINGS = "tokenizer_config.json"
SPECIAL_TOKENS = "special_tokens_map.json"
# Where huggingface_hub keeps the files of a revision of a repository.
_SNAPSHOT = re.compile(r"models--(?P<repository>[^/]+)/snapshots/(?P<revision>[0-9a-f]{40})$")


def model_folder(path: str | Path) -> Path:
    """The model folder as a Path.

    Raises:
        MissingFileError: it does not exist, or is a GGUF file.
    """
    folder = Path(path)
    if not folder.is_dir():
        refuse_gguf(folder)
        raise MissingFileError(
            f"{folder}: {found_at(folder)}; name a local Hugging Face model folder or a hub id "
            "such as org/name"
        )
    return folder


def refuse_gguf(path: Path) -> None:
    """Raise MissingFileError for a GGUF file, or a folder of them: how to convert it."""
    files = [path] if path.is_file() else sorted(path.glob("*.gguf"))
    file = next((file for file in files if file.suffix == ".gguf"), None)
    if file is None:
        return
    raise MissingFileError(
        f"{file}: is a GGUF file, whose weights are quantised and which has no config.json; "
        "convert it once with transformers (pip install gguf): "
        f"AutoModelForCausalLM.from_pretrained('{file.parent}', gguf_file='{file.name}')"
        ".save_pretrained(OUT), AutoTokenizer likewise, then name OUT"
    )


def read_config(path: str | Path) -> dict[str, Any]:
    """config.json of a model folder."""
    file = model_folder(path) / CONFIG_NAME
    if not file.exists():
        refuse_gguf(file.parent)
        raise MissingFileError(
            f"{file.parent}: {found_at(file.parent)}; expected the folder of a Hugging Face model, "
            f"which has a {CONFIG_NAME}"
        )
    return read_json_object(file)


def vocab_size_of(path: str | Path) -> int:
    """Rows of the LM head by config.json, padding rows included."""
    for part in _config_parts(read_config(path)):
        rows = part.get("vocab_size")
        if type(rows) is int and 0 < rows < 2**31:
            return rows
    raise ModelError(f"{path}/config.json has no vocab_size; name a causal language model")


def _config_parts(config: Mapping[str, Any]) -> list[Mapping[str, Any]]:
    """A config and, if it has one, the config of its text model."""
    text = config.get("text_config")
    return [config, text] if isinstance(text, dict) else [config]


def read_vocab(path: str | Path) -> dict[str, int]:
    """token -> id of a model folder's tokenizer, added tokens included."""
    folder = model_folder(path)
    file = folder / TOKENIZER_NAME
    if file.exists():
        from tokenizers import Tokenizer

        try:
            return dict(Tokenizer.from_file(str(file)).get_vocab(with_added_tokens=True))
        except Exception as error:  # the library raises bare Exception
            raise DataError(f"{file} is not a tokenizer: {error}; save it again") from error
    if not (folder / TOKENIZER_SETTINGS).exists():
        raise MissingFileError(
            f"{folder}: no tokenizer.json; save the model's tokenizer into the same folder"
        )
    from transformers import AutoTokenizer

    with loading_code(folder, "its tokenizer cannot be loaded; save it there again") as trust:
        tokenizer = AutoTokenizer.from_pretrained(folder, **trust)
    return dict(tokenizer.get_vocab())


def eos_ids_of(path: str | Path) -> list[int] | None:
    """The ids that end an answer by a model folder's files, sorted; None if they name none.

    Those of generation_config.json or, without that file, of config.json, and the tokenizer's
    end-of-sequence token.

    Raises:
        DataError: a file is damaged, or what it names is no id.
    """
    folder = model_folder(path)
    generation = read_optional_json(folder / GENERATION_NAME)
    ids: set[int] = set()
    for part in _config_parts(read_config(folder)) if generation is None else [generation]:
        found = part.get("eos_token_id")
        values = found if isinstance(found, list) else [] if found is None else [found]
        if any(type(value) is not int for value in values):
            name = CONFIG_NAME if generation is None else GENERATION_NAME
            raise DataError(f"{folder / name}: eos_token_id is {found!r}; expected ids")
        ids.update(values)
        if ids:
            break
    for name in (TOKENIZER_SETTINGS, SPECIAL_TOKENS):
        token = (read_optional_json(folder / name) or {}).get("eos_token")
        if isinstance(token, dict):
            token = token.get("content")
        if isinstance(token, str):
            vocab = read_vocab(folder)
            ids.update([vocab[token]] if token in vocab else [])
            break
    return sorted(ids) or None


def hub_source(path: str | Path) -> str | None:
    """ "org/name@revision" of a folder in the cache of huggingface_hub; None for any other."""
    match = _SNAPSHOT.search(Path(path).resolve().as_posix())
    return match and f"{match['repository'].replace('--', '/')}@{match['revision']}"
