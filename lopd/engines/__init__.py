"""Inference engines behind one protocol; `load_engine` loads one by name."""

import gc
from pathlib import Path
from typing import Any

from lopd.engines.base import Engine
from lopd.errors import ConfigError

# Sources of an engine's tail and entropy; values as in `lopd.provenance.scoring`.
ENGINES = {
    "transformers": {"tail": "computed", "entropy": "computed"},
    "vllm": {"tail": "derived", "entropy": "absent"},
}


def load_engine(
    name: str,
    path: str | Path,
    *,
    dtype: str,
    device: str = "auto",
    local_rank: int | None = None,
    options: dict[str, Any] | None = None,
    **limits: int | None,
) -> Engine:
    """The model at `path` in the engine called `name`.

    Args:
        local_rank: number of this process among those that share the machine's GPUs; with
            `device="auto"` each uses another GPU. None for a single process.
        options: see `lopd.config.inference`.
        limits: `batch_size` and `tokens_per_batch` of the transformers engine; vLLM schedules its
            batches itself and ignores them.

    Raises:
        ConfigError: an unknown engine, or one that is not installed.
        ModelError: the model cannot be loaded.
    """
    if name not in ENGINES:
        raise ConfigError(f"engine: found '{name}'; expected one of {', '.join(ENGINES)}")
    shared: Any = {"dtype": dtype, "device": device, "local_rank": local_rank, "options": options}
    if name == "vllm":
        from lopd.engines.vllm import VllmEngine

        return VllmEngine.load(path, **shared)
    from lopd.engines.transformers import TransformersEngine

    return TransformersEngine.load(path, **(shared | limits))


def free_memory() -> None:
    """Return the memory of engines that are no longer referred to, before another is loaded."""
    import torch

    gc.collect()  # a model has cycles, and a vLLM engine ends its process when it is collected
    if torch.cuda.is_available():
        torch.cuda.empty_cache()
