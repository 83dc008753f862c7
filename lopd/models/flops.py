"""Utilisation of a device in training: model FLOPs, their share of the peak, and memory.

Model FLOPs are those that the mathematics of a step needs; padding and recomputed activations do
not count. With N matrix elements applied to each token, N_t of them trained, and a head [V, D]
applied to the loss tokens only, a sequence costs

    tokens * (4 N + 2 N_t) + loss tokens * (4 or 6) V D + 12 * heads * head_dim * pairs

An element costs two FLOPs in the forward, two for the gradient of the layer's input and two for
its own gradient if it is trained: 6 N in full training. `pairs` counts, over all layers, the
(query, key) pairs inside the causal mask and the sliding window. Of a mixture of experts only the
experts that a token is routed to count.

Source of the definition: PaLM, arXiv:2204.02311, appendix B; there attention is not causal.
"""

from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import torch
from torch import nn

from lopd.models.architecture import attention_width_of, experts_of, layer_windows_of
from lopd.models.head import lm_head, plain_model

TERA = 1e12
# Dense peaks in TFLOP/s from the vendor's data sheets: (16-bit with fp32 sums, fp32 without TF32).
# Keys are parts of device names; the first that matches counts.
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
    """The sizes of a model that determine its FLOPs."""

    matrices: float  # elements applied to each token, without the head
    trained: float  # those of `matrices` that are trained
    head: int
    head_trained: bool
    attention: int  # heads * head_dim
    windows: Sequence[int | None]  # one per layer


def size_of(model: Any) -> Size | None:
    """Sizes of a model; None if FLOPs cannot be counted from them.

    That is so if the config does not say how many experts a token uses, without attention, and if
    layers differ in the width of their attention.
    """
    plain, head = plain_model(model), lm_head(model).weight
    embeddings = {
        id(module.weight) for module in plain.modules() if isinstance(module, nn.Embedding)
    }
    experts, per_token = experts_of(plain)
    matrices = trained = 0.0
    for name, parameter in plain.named_parameters():
        if parameter.dim() < 2 or parameter is head or id(parameter) in embeddings:
            continue
        size: float = parameter.numel()
        if ".experts." in name:
            if not (experts and per_token):
                return None
            size *= per_token / experts
        matrices += size
        trained += size * parameter.requires_grad
    attention = attention_width_of(plain.config)
    if attention is None:
        return None
    windows = layer_windows_of(plain.config)
    return Size(matrices, trained, head.numel(), head.requires_grad, attention, windows)


def pairs(length: int, window: int | None) -> int:
    """(query, key) pairs in the causal mask of `length` tokens, within the window if any."""
    near = length if window is None else min(length, window)
    return near * (near + 1) // 2 + (length - near) * near


def step_flops(size: Size, lengths: Sequence[int], loss_tokens: int) -> float:
    """FLOPs of the forward and backward of sequences of these lengths."""
    attended = sum(pairs(length, window) for length in lengths for window in size.windows)
    return (
        sum(lengths) * (4 * size.matrices + 2 * size.trained)
        + loss_tokens * (6 if size.head_trained else 4) * size.head
        + 12 * size.attention * attended
    )


def peak_flops(name: str, dtype: torch.dtype) -> float | None:
    """Peak FLOP/s of a device by its name; None if unknown, for example with TF32."""
    peaks = next((peak for key, peak in PEAKS.items() if key in name), None)
    if peaks is None or dtype == torch.float64:
        return None
    if dtype == torch.float32:
        exact = torch.get_float32_matmul_precision() == "highest"
        return peaks[1] * TERA if exact else None
    return peaks[0] * TERA


def mfu(flops: float, seconds: float, peak: float, devices: int = 1) -> float:
    """Model FLOPs utilisation: the share of what the devices can do in this time."""
    return flops / (seconds * peak * devices)


class FlopsMeter:
    """Counts FLOPs between two logs.

    Args:
        dtype: of the matrix products; None for the dtype of the model's weights.
        devices: number of devices that train in parallel.
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
        self.planned: int | None = None  # planned peak memory in bytes
        self._flops, self._tokens = 0.0, 0

    def count(self, batches: Sequence[Mapping[str, Any]]) -> float:
        """Add and return the FLOPs of these micro-batches; 0 if they are unknown."""
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
        """`mfu` of the steps since the last call, `peak_mib` and `planned_mib`, those known.

        Args:
            tokens_per_second: loss tokens per second over all devices. The other devices are
                assumed to have sequences of the same lengths as this one.
        """
        figures = {}
        if self.peak is not None and self._tokens and self._flops:
            seconds = self._tokens / tokens_per_second * self.devices
            figures["mfu"] = mfu(self._flops, seconds, self.peak)
        if self.device.type == "cuda":
            figures["peak_mib"] = torch.cuda.max_memory_allocated(self.device) / 2**20
        if self.planned is not None:
            figures["planned_mib"] = self.planned / 2**20
        self._flops, self._tokens = 0.0, 0
        return figures
