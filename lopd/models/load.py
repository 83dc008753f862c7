"""Load models and tokenizers from local Hugging Face folders; resolve devices and dtypes."""

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch

from lopd.config.device import resolve_device
from lopd.errors import ConfigError, MissingFileError, ModelError
from lopd.models.architecture import attention_softcap_of, context_of_config

DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}
ADAPTER_CONFIG = "adapter_config.json"
TOKENIZER_FILES = ("tokenizer.json", "tokenizer.model", "vocab.json", "vocab.txt")


def resolve_dtype(name: str) -> torch.dtype:
    """The torch dtype of this name.

    Raises:
        ConfigError: the name is not one of DTYPES.
    """
    if name not in DTYPES:
        raise ConfigError(f"dtype: found '{name}'; expected one of {', '.join(DTYPES)}")
    return DTYPES[name]


def check_model_folder(path: str | Path) -> Path:
    """The model folder as a Path.

    Raises:
        MissingFileError: the folder or its config.json does not exist.
        ModelError: it contains an adapter, such as a LoRA.
    """
    folder = Path(path)
    if (folder / ADAPTER_CONFIG).is_file():
        raise ModelError(
            f"{folder}: holds an adapter ({ADAPTER_CONFIG}), which is not a model; merge it into "
            "its base model and pass the folder of the result (peft: model.merge_and_unload(), "
            "then save_pretrained)"
        )
    if not (folder / "config.json").is_file():
        found = "a folder without config.json" if folder.is_dir() else "no such folder"
        raise MissingFileError(f"{folder}: {found}; expected a local Hugging Face model folder")
    return folder


def context_of(path: str | Path, engine: str = "transformers") -> int | None:
    """Longest sequence that the model supports; None if its config does not say.

    See `lopd.models.architecture.context_of_config`.

    Raises:
        MissingFileError, ModelError: the folder has no config.json that can be read.
    """
    from transformers import AutoConfig

    folder = check_model_folder(path)
    with _loading(folder, "its config cannot be read; restore config.json"):
        config = AutoConfig.from_pretrained(folder, local_files_only=True)
        return context_of_config(config, engine)


def load_tokenizer(path: str | Path) -> Any:
    """The tokenizer in a model folder.

    Raises:
        MissingFileError: the folder has no tokenizer.
        ModelError: the tokenizer cannot be loaded.
    """
    from transformers import AutoTokenizer

    folder = check_model_folder(path)
    if not any((folder / name).is_file() for name in TOKENIZER_FILES):
        raise MissingFileError(
            f"{folder}: has no tokenizer; save it there with tokenizer.save_pretrained"
        )
    with _loading(folder, "its tokenizer cannot be loaded; save it there again"):
        return AutoTokenizer.from_pretrained(folder, local_files_only=True)


def load_model(
    path: str | Path,
    *,
    dtype: str,
    device: str = "auto",
    local_rank: int | None = None,
    device_map: Any = None,
) -> Any:
    """Load a causal LM from a local folder, in eval mode.

    Args:
        path: the model folder.
        dtype: one of DTYPES.
        device, local_rank: as in `resolve_device`; unused with `device_map`.
        device_map: places the model's parts on devices, as in transformers.

    Raises:
        MissingFileError: the folder does not exist.
        ModelError: the folder cannot be loaded, or its weights are not exactly the model's, so
            that some would keep their random initialisation.
    """
    from transformers import AutoModelForCausalLM

    folder, torch_dtype = check_model_folder(path), resolve_dtype(dtype)
    where = None if device_map is not None else resolve_device(device, local_rank)
    with _loading(
        folder,
        "not loadable as a causal language model; expected config.json and *.safetensors of such "
        "an architecture",
    ):
        implementation = attention_for(folder)
        model, report = AutoModelForCausalLM.from_pretrained(
            folder,
            dtype=torch_dtype,
            local_files_only=True,
            attn_implementation=implementation,
            use_safetensors=True,
            device_map=device_map,
            output_loading_info=True,
        )
    for what in ("missing_keys", "unexpected_keys", "mismatched_keys"):
        if report[what]:
            raise ModelError(
                f"{folder}: {len(report[what])} {what.replace('_', ' ')} in its weights (such as "
                f"{min(map(str, report[what]))}); expected exactly the model's own; save it again"
            )
    return model.eval() if where is None else model.to(where).eval()


def attention_for(folder: Path) -> str:
    """Attention with the model's own outputs: "sdpa", or "eager" if sdpa would leave something out.

    These are soft caps, and what families that do not support sdpa have, such as sinks.
    """
    from transformers import AutoConfig, AutoModelForCausalLM

    config = AutoConfig.from_pretrained(folder, local_files_only=True)
    known = AutoModelForCausalLM._model_mapping
    family = known.get(type(config), None)
    exact = getattr(family, "_supports_sdpa", True) and attention_softcap_of(config) is None
    return "sdpa" if exact else "eager"


@contextmanager
def _loading(folder: Path, problem: str) -> Iterator[None]:
    """Turn any failure of transformers to read a folder into a ModelError that names it."""
    try:
        yield
    except Exception as error:
        found = (str(error).strip().splitlines() or [type(error).__name__])[0]
        raise ModelError(f"{folder}: {problem} ({found})") from error


def eos_ids_of(path: str | Path, tokenizer: Any) -> list[int]:
    """`eos_token_ids` of a model folder, without loading its weights."""
    from transformers import AutoConfig, GenerationConfig

    folder = check_model_folder(path)
    with _loading(folder, "its generation config cannot be read; restore it"):
        if (folder / "generation_config.json").is_file():
            configured = GenerationConfig.from_pretrained(folder, local_files_only=True)
        else:
            config = AutoConfig.from_pretrained(folder, local_files_only=True)
            configured = GenerationConfig.from_model_config(config)
    return eos_token_ids(configured, tokenizer)


def eos_token_ids(generation_config: Any, tokenizer: Any) -> list[int]:
    """Every id that ends an answer: those of the generation config and the tokenizer.

    Raises:
        ModelError: neither of them has one.
    """
    configured = getattr(generation_config, "eos_token_id", None)
    ids = set(configured if isinstance(configured, list) else [configured])
    ids.add(tokenizer.eos_token_id)
    ids.discard(None)
    if not ids:
        raise ModelError(
            "neither the generation config nor the tokenizer names an end-of-sequence token; "
            "set tokenizer.eos_token and save the folder again"
        )
    return sorted(ids)
