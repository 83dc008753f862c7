"""Load models and tokenizers from local Hugging Face folders; resolve devices and dtypes."""

from pathlib import Path
from typing import Any

import torch

from lopd.config.device import resolve_device
from lopd.errors import ConfigError, MissingFileError, ModelError
from lopd.models.architecture import attention_softcap_of, context_of_config
from lopd.models.machine import limit_threads
from lopd.provenance.folder import (
    GENERATION_NAME,
    SPECIAL_TOKENS,
    TOKENIZER_SETTINGS,
    refuse_gguf,
)
from lopd.provenance.found import found_at
from lopd.provenance.io import read_optional_json
from lopd.provenance.remote_code import loading_code

DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}
ADAPTER_CONFIG = "adapter_config.json"
OPTIONAL_FILES = (GENERATION_NAME, TOKENIZER_SETTINGS, SPECIAL_TOKENS, "added_tokens.json")
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
        DataError: a file that a model folder need not have is damaged.
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
        refuse_gguf(folder)
        raise MissingFileError(
            f"{folder}: {found_at(folder)}; expected a local Hugging Face model folder, which has "
            "a config.json, or a hub id org/name"
        )
    for name in OPTIONAL_FILES:  # transformers takes a default for some that are damaged
        read_optional_json(folder / name)
    return folder


def context_of(path: str | Path, engine: str = "transformers") -> int | None:
    """Longest sequence that the model supports; None if its config does not say.

    See `lopd.models.architecture.context_of_config`.

    Raises:
        MissingFileError, ModelError: the folder has no config.json that can be read.
    """
    from transformers import AutoConfig

    folder = check_model_folder(path)
    with loading_code(folder, "its config cannot be read; restore config.json") as options:
        config = AutoConfig.from_pretrained(folder, **options)
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
    with loading_code(folder, "its tokenizer cannot be loaded; save it there again") as options:
        return AutoTokenizer.from_pretrained(folder, **options)


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
    from transformers import AutoConfig, AutoModelForCausalLM

    folder, torch_dtype = check_model_folder(path), resolve_dtype(dtype)
    where = None if device_map is not None else resolve_device(device, local_rank)
    if where is not None and where.type == "cpu":
        limit_threads()
    with loading_code(
        folder,
        "not loadable as a causal language model; expected config.json and *.safetensors of such "
        "an architecture",
    ) as options:
        config = AutoConfig.from_pretrained(folder, **options)
        model, report = AutoModelForCausalLM.from_pretrained(
            folder,
            dtype=torch_dtype,
            attn_implementation=attention_for(config),
            use_safetensors=True,
            device_map=device_map,
            output_loading_info=True,
            **options,
        )
    for what in ("missing_keys", "unexpected_keys", "mismatched_keys"):
        if report[what]:
            raise ModelError(
                f"{folder}: {len(report[what])} {what.replace('_', ' ')} in its weights (such as "
                f"{min(map(str, report[what]))}); expected exactly the model's own; save it again"
            )
    return model.eval() if where is None else model.to(where).eval()


def attention_for(config: Any) -> str:
    """Attention with the model's own outputs: "sdpa", or "eager" if sdpa would leave something out.

    These are soft caps, and what families that do not support sdpa have, such as sinks.
    """
    from transformers import AutoModelForCausalLM

    family = AutoModelForCausalLM._model_mapping.get(type(config), None)
    exact = getattr(family, "_supports_sdpa", True) and attention_softcap_of(config) is None
    return "sdpa" if exact else "eager"


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
