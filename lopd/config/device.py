"""Names of devices: their syntax, and the torch device of a name."""

import re
from typing import TYPE_CHECKING

from lopd.errors import ConfigError

if TYPE_CHECKING:
    import torch


def check_device(name: str) -> None:
    """Refuse what is not the name of a device, without a look at the machine."""
    if not re.fullmatch(r"auto|cpu|cuda(:\d+)?", name):
        raise ConfigError(f"device: found '{name}'; expected auto, cpu, cuda or cuda:N")


def resolve_device(name: str, local_rank: int | None = None) -> "torch.device":
    """The torch device of this name.

    Args:
        name: "auto" selects CUDA if available, otherwise the CPU; other names are torch's.
        local_rank: the GPU that "auto" and "cuda" select.

    Raises:
        ConfigError: the name is not a device, or torch does not see it.
    """
    import torch

    if name == "auto":
        name = "cuda" if torch.cuda.is_available() else "cpu"
    if name == "cuda" and local_rank is not None:
        name = f"cuda:{local_rank}"
    try:
        device = torch.device(name)
    except RuntimeError:
        raise ConfigError(f"device: found '{name}'; expected auto, cpu, cuda or cuda:N") from None
    if device.type == "cuda" and not torch.cuda.is_available():
        raise ConfigError(f"device: found '{name}', but torch sees no CUDA device; use cpu or auto")
    if device.type == "cuda" and (device.index or 0) >= torch.cuda.device_count():
        raise ConfigError(
            f"device: found '{name}', but torch sees {torch.cuda.device_count()} CUDA devices; "
            "start fewer workers, or choose another"
        )
    return device
