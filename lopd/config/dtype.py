"""The dtype `auto`: what the device at hand computes fast and exactly enough."""

import logging
from dataclasses import replace
from typing import Any, TypeVar

from lopd.config.device import resolve_device

LOG = logging.getLogger(__name__)

AUTO = "auto"
Config = TypeVar("Config")


def with_dtype(config: Config, *, quiet: bool = False) -> Config:
    """The settings of a stage with its dtype resolved, so that its manifest names one.

    "auto" is bfloat16 on a GPU with kernels for it, otherwise float32. CPUs count as others, also
    those with instructions for bfloat16: sampled log-probs would be rounded more for little speed.
    The choice is printed on stderr.

    Args:
        config: a dataclass with `dtype` and `device`.
        quiet: do not print the choice.
    """
    settings: Any = config
    if settings.dtype != AUTO:
        return config
    import torch

    device = resolve_device(settings.device)
    fast = device.type == "cuda" and torch.cuda.get_device_capability(device) >= (8, 0)
    dtype = "bfloat16" if fast else "float32"
    if not quiet:
        LOG.info(f"dtype: {dtype} (auto, on {device.type})")
    resolved: Config = replace(settings, dtype=dtype)
    return resolved
