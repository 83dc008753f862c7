"""How much of a device a run uses: model FLOPs, their share of the peak, memory, a line a step.

FLOPs are those that the mathematics of a step needs, whatever is done twice or in vain: padding
and recomputed activations are not counted. With N matrix elements that a token meets, N_t of
them trained, and a head [V, D] that only the tokens with a loss go through, a sequence costs

    tokens * (4 N + 2 N_t) + loss tokens * (4 or 6) V D + 12 * heads * head_dim * pairs

two FLOPs an element in the forward, two for the gradient of its input and two for its own where
it is trained: 6 N in full training. `pairs` counts, over layers, the (query, key) pairs that a
causal mask, and a sliding window, leave. Of experts a token meets `num_experts_per_tok`.

Source of the definition: PaLM, arXiv:2204.02311, appendix B; there attention is not causal.
"""

from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import torch
from torch import nn

from lopd.models.head import lm_head, plain_model
from lopd.models.moe import EXPERTS

TERA = 1e12
# Dense peaks in TFLOP/s by the vendor's data sheets, and what a device's name holds, the longest
# first: (16-bit with fp32 sums, fp32 without TF32).
PEAKS = {
    "H100 PCIe": (756.0, 51.2),
    "RTX 4090": (165.2, 82.6),
    "H100 NVL": (835.0, 60.0),
    "GH200": (989.4, 66.9),
    "H200": (989.4, 66.9),
    "H100": (989.4, 66.9),
    "A100": (312.0, 19.5),
    "L40S": (362.0, 91.6),
    "L4": (121.0, 30.3),
}


class Size(NamedTuple):
    """What a model's FLOPs depend on."""

    matrices: float  # elements that a token meets, the head's aside
    trained: float  # of them
    head: int
    head_trained: bool
    attention: int  # heads * head_dim
    windows: Sequence[int | None]  # of each layer


def size_of(model: Any) -> Size | None:
    """None for a mixture of experts whose config does not say how many a token goes to."""
    plain, head = plain_model(model), lm_head(model).weight
    config = plain.config.get_text_config()
    looked_up = {
        id(module.weight) for module in plain.modules() if isinstance(module, nn.Embedding)
    }
    matrices = trained = 0.0
    for name, parameter in plain.named_parameters():
        if parameter.dim() < 2 or parameter is head or id(parameter) in looked_up:
            continue
        share: float | None = 1.0
        if ".experts." in name:
            share = _active_experts(config)
        if share is None:
            return None
        matrices += share * parameter.numel()
        trained += share * parameter.numel() * parameter.requires_grad
    heads = config.num_attention_heads
    width = getattr(config, "head_dim", None) or config.hidden_size // heads
    return Size(
        matrices, trained, head.numel(), head.requires_grad, heads * width, _windows(config)
    )


def _active_experts(config: Any) -> float | None:
    number = next((n for name in EXPERTS if (n := getattr(config, name, None))), None)
    active = getattr(config, "num_experts_per_tok", None)
    return active / number if active and number else None


def _windows(config: Any) -> list[int | None]:
    layers, window = config.num_hidden_layers, getattr(config, "sliding_window", None)
    kinds = getattr(config, "layer_types", None)
    if kinds is None:
        return [window] * layers
    return [window if kind == "sliding_attention" else None for kind in kinds]


def pairs(length: int, window: int | None) -> int:
    """(query, key) pairs of a causal mask over `length` tokens."""
    near = length if window is None else min(length, window)
    return near * (near + 1) // 2 + (length - near) * near


def step_flops(size: Size, lengths: Sequence[int], loss_tokens: int) -> float:
    """Forward and backward of sequences of these lengths."""
    attended = sum(pairs(length, window) for length in lengths for window in size.windows)
    return (
        sum(lengths) * (4 * size.matrices + 2 * size.trained)
        + loss_tokens * (6 if size.head_trained else 4) * size.head
        + 12 * size.attention * attended
    )


def peak_flops(name: str, dtype: torch.dtype) -> float | None:
    """FLOP/s of a device by its name; None where it is not known, as under TF32."""
    found = next((peak for key, peak in PEAKS.items() if key in name), None)
    if found is None or dtype == torch.float64:
        return None
    if dtype == torch.float32:
        exact = torch.get_float32_matmul_precision() == "highest"
        return found[1] * TERA if exact else None
    return found[0] * TERA


def mfu(flops: float, seconds: float, peak: float, devices: int = 1) -> float:
    """Share of what the devices could have done in that time."""
    return flops / (seconds * peak * devices)


class Meter:
    """Counts FLOPs between two logs.

    Args:
        dtype: of the matrix products; None for that of the model's weights.
    """

    def __init__(
        self,
        model: Any,
        device: torch.device,
        *,
        dtype: torch.dtype | None = None,
        devices: int = 1,
    ) -> None:
        self.size, self.device, self.devices = size_of(model), device, devices
        name = torch.cuda.get_device_name(device) if device.type == "cuda" else "cpu"
        self.peak = peak_flops(name, dtype or lm_head(model).weight.dtype)
        self.planned: int | None = None  # bytes at the peak
        self._flops, self._tokens = 0.0, 0

    def count(self, batches: Sequence[Mapping[str, Any]]) -> float:
        """FLOPs of these micro-batches; 0 where they are not known."""
        if self.size is None:
            return 0.0
        flops = 0.0
        for batch in batches:
            packed = batch.get("sequence_lengths")
            lengths = batch["attention_mask"].sum(1).tolist() if packed is None else packed
            flops += step_flops(self.size, lengths, len(batch["labels"]))
            self._tokens += len(batch["labels"])
        self._flops += flops
        return flops

    def read(self, tokens_per_second: float) -> dict[str, float]:
        """`mfu` of the steps since the last call, `peak_mib` and `planned_mib`, where known.

        `tokens_per_second` is of loss tokens over all devices, which are taken to have sequences
        of the same lengths.
        """
        found = {}
        if self.peak is not None and self._tokens and self._flops:
            seconds = self._tokens / tokens_per_second * self.devices
            found["mfu"] = mfu(self._flops, seconds, self.peak)
        if self.device.type == "cuda":
            found["peak_mib"] = torch.cuda.max_memory_allocated(self.device) / 2**20
        if self.planned is not None:
            found["planned_mib"] = self.planned / 2**20
        self._flops, self._tokens = 0.0, 0
        return found
