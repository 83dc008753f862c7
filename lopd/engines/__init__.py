"""Inference behind one small protocol (`base.Engine`): generate answers, score given ones.

`load_engine` imports an engine where it is asked for by name, so that vLLM is needed only by
those who choose it.
"""

from dataclasses import dataclass
from pathlib import Path
from typing import Any

from lopd.engines.base import Engine
from lopd.errors import ConfigError


@dataclass(frozen=True)
class Numerics:
    """How an engine gets tail and entropy, in the words of `lopd.provenance.scoring.Scoring`."""

    tail: str
    entropy: str


ENGINES = {
    "transformers": Numerics(tail="computed", entropy="computed"),
    "vllm": Numerics(tail="derived", entropy="absent"),
}


def check_engine(name: str) -> None:
    if name not in ENGINES:
        raise ConfigError(f"engine: found '{name}'; expected one of {', '.join(ENGINES)}")


def load_engine(
    name: str,
    path: str | Path,
    *,
    dtype: str,
    device: str = "auto",
    local_rank: int | None = None,
    options: dict[str, Any] | None = None,
    **limits: int,
) -> Engine:
    """The model at `path` in the engine called `name`.

    Args:
        local_rank: number of this process among those that share the machine's GPUs; with
            `device="auto"` it gets its own. None where it is alone.
        options: see `lopd.engines.options`.
        limits: `batch_size`, `tokens_per_batch` of the transformers engine; vLLM schedules by
            itself and does not look at them.
    """
    check_engine(name)
    if name == "vllm":
        from lopd.engines.vllm import VllmEngine

        return VllmEngine.load(
            path, dtype=dtype, device=device, local_rank=local_rank, options=options
        )
    from lopd.engines.transformers import HfEngine

    return HfEngine.load(
        path, dtype=dtype, device=device, local_rank=local_rank, options=options, **limits
    )
