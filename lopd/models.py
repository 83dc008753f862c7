"""Loading local Hugging Face folders, and the words for devices and dtypes."""

from pathlib import Path
from typing import Any

import torch

from lopd.errors import ConfigError, MissingFileError, ModelError

DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}


def resolve_dtype(name: str) -> torch.dtype:
    if name not in DTYPES:
        raise ConfigError(f"dtype: found '{name}'; expected one of {', '.join(DTYPES)}")
    return DTYPES[name]


def resolve_device(name: str) -> torch.device:
    """`"auto"` is CUDA where there is one, else the CPU; anything else is taken literally."""
    if name == "auto":
        return torch.device("cuda" if torch.cuda.is_available() else "cpu")
    try:
        device = torch.device(name)
    except RuntimeError:
        raise ConfigError(f"device: found '{name}'; expected auto, cpu, cuda or cuda:N") from None
    if device.type == "cuda" and not torch.cuda.is_available():
        raise ConfigError(f"device: found '{name}', but torch sees no CUDA device; use cpu or auto")
    return device


def check_model_folder(path: str | Path) -> Path:
    """The folder as a Path, or MissingFileError that says what is not there."""
    folder = Path(path)
    if not (folder / "config.json").is_file():
        found = "a folder without config.json" if folder.is_dir() else "no such folder"
        raise MissingFileError(f"{folder}: {found}; expected a local Hugging Face model folder")
    return folder


def context_of(path: str | Path) -> int | None:
    """Positions that the model was built for; None where its config does not say."""
    from transformers import AutoConfig

    folder = check_model_folder(path)
    config = AutoConfig.from_pretrained(folder, local_files_only=True).get_text_config()
    return getattr(config, "max_position_embeddings", None)


def load_tokenizer(path: str | Path) -> Any:
    from transformers import AutoTokenizer

    folder = check_model_folder(path)
    try:
        return AutoTokenizer.from_pretrained(folder, local_files_only=True)
    except (OSError, ValueError) as error:
        first_line = str(error).strip().splitlines()[0]
        raise ModelError(
            f"{folder}: its tokenizer cannot be loaded ({first_line}); save one there with "
            "tokenizer.save_pretrained"
        ) from error


def load_model(path: str | Path, *, dtype: str, device: str = "auto") -> Any:
    """A causal LM from a local folder, in eval mode, on its device."""
    from transformers import AutoModelForCausalLM

    folder, torch_dtype, where = (
        check_model_folder(path),
        resolve_dtype(dtype),
        resolve_device(device),
    )
    try:
        model = AutoModelForCausalLM.from_pretrained(
            folder, dtype=torch_dtype, local_files_only=True, attn_implementation="sdpa"
        )
    except (OSError, ValueError, KeyError) as error:
        first_line = str(error).strip().splitlines()[0]
        raise ModelError(
            f"{folder}: not loadable as a causal language model ({first_line}); expected "
            "config.json and *.safetensors of an architecture that the installed transformers knows"
        ) from error
    return model.to(where).eval()


def eos_token_ids(model: Any, tokenizer: Any) -> list[int]:
    """Every id that ends an answer: the generation config's and the tokenizer's."""
    configured = getattr(model.generation_config, "eos_token_id", None)
    ids = set(configured if isinstance(configured, list) else [configured])
    ids.add(tokenizer.eos_token_id)
    ids.discard(None)
    if not ids:
        raise ModelError(
            "neither the generation config nor the tokenizer names an end-of-sequence token; "
            "set tokenizer.eos_token and save the folder again"
        )
    return sorted(ids)
