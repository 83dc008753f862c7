"""Attention within each sequence of a pack: several sequences in one row, none sees another.

Transformers builds such attention from position ids alone, by a dense `[T, T]` mask, unless a
flash-attention package is there. The two paths here need neither mask nor package:

    varlen   torch.nn.attention.varlen: one kernel for the pack (CUDA, 16-bit weights)
    sdpa     scaled_dot_product_attention, sequence by sequence (everywhere)

Both, and transformers' flash_attention_2 and _3, get the sequences' ends from keyword arguments
(`pack_kwargs`) that a model hands down to its attention. Not every architecture does, so
`check_packing` compares a pack with its sequences alone before a run trusts it.
"""

import importlib.util
import inspect
import sys
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from lopd.errors import ConfigError, ModelError
from lopd.heads import lm_head, run_with_loss

FLASH = ("flash_attention_3", "flash_attention_2")
OWN = {"varlen": "lopd_varlen", "sdpa": "lopd_sdpa"}
PATHS = ("auto", *FLASH, *OWN)


def pack_attention(model: Any, path: str = "auto", device: torch.device | None = None) -> str:
    """Have `model` attend within sequences; prints and returns the path that was taken.

    "auto" takes the first that is installed and fits dtype and device (where the model will be,
    if it is not there yet), in the order of `PATHS`. Padded batches and generation go on working.
    `check_packing` tells whether the model hands the bounds down.

    Raises:
        ConfigError: the path is unknown, not installed, or does not fit device or dtype.
    """
    weight = model.get_input_embeddings().weight
    where = weight.device if device is None else device
    if path == "auto":
        path = next(p for p in PATHS[1:] if not _unavailable(p, where, weight.dtype))
    if why := _unavailable(path, where, weight.dtype):
        raise ConfigError(f"attention: found '{path}'; {why}")
    if path in OWN:
        _register()
    model.set_attn_implementation(OWN.get(path, path))
    print(f"packing: attention by {path}", file=sys.stderr)
    return path


def pack_kwargs(lengths: Sequence[int], device: Any) -> dict[str, Any]:
    """What attention wants to know of a pack, by the names of transformers, and the lengths."""
    ends = torch.tensor([0, *lengths], dtype=torch.int32).cumsum(0, dtype=torch.int32).to(device)
    longest = max(lengths)
    return {
        "cu_seq_lens_q": ends,
        "cu_seq_lens_k": ends,
        "max_length_q": longest,
        "max_length_k": longest,
        "sequence_lengths": tuple(lengths),
    }


def _unavailable(path: str, device: torch.device, dtype: torch.dtype) -> str:
    """Why a path cannot be taken; empty where it can."""
    from transformers.utils import import_utils

    if path not in PATHS:
        return f"expected one of {', '.join(PATHS)}"
    if path == "sdpa":
        return ""
    if device.type != "cuda" or dtype not in (torch.bfloat16, torch.float16):
        return f"it needs CUDA and 16-bit weights, found {device.type} and {dtype}; use sdpa"
    if path == "varlen":
        return (
            ""
            if _has_varlen()
            else f"torch {torch.__version__} has no varlen_attn with a window; use sdpa"
        )
    if not getattr(import_utils, f"is_{path.replace('attention', 'attn')}_available")():
        return "the package is not installed; install flash-attn, or use varlen or sdpa"
    return ""


def _has_varlen() -> bool:
    """Whether torch has it, and in the form that takes a scale and a window (2.10's does not)."""
    if importlib.util.find_spec("torch.nn.attention.varlen") is None:
        return False
    from torch.nn.attention.varlen import varlen_attn

    return {"scale", "window_size"} <= inspect.signature(varlen_attn).parameters.keys()


def _register() -> None:
    from transformers import AttentionInterface
    from transformers.masking_utils import AttentionMaskInterface

    for name, attend in (("varlen", varlen_attention), ("sdpa", sdpa_attention)):
        AttentionInterface.register(OWN[name], attend)
        AttentionMaskInterface.register(OWN[name], _mask_of_padding)


def _mask_of_padding(*args: Any, attention_mask: Tensor | None = None, **kwargs: Any) -> Any:
    """No mask for rows without padding: a pack, or one sequence; else that of sdpa."""
    from transformers.masking_utils import sdpa_mask

    if attention_mask is None and kwargs.get("q_length") == kwargs.get("kv_length"):
        return None
    return sdpa_mask(*args, attention_mask=attention_mask, **kwargs)


def sdpa_attention(
    module: Any,
    query: Tensor,  # [B, H, T, d]
    key: Tensor,  # [B, H_kv, T_kv, d]
    value: Tensor,
    attention_mask: Tensor | None,
    **kwargs: Any,
) -> tuple[Tensor, None]:  # [B, T, H, d]
    """Scaled dot products within each sequence of a pack, in turn; as ever where it is none."""
    from transformers.integrations.sdpa_attention import sdpa_attention_forward

    lengths, window = kwargs.pop("sequence_lengths", None), kwargs.get("sliding_window")
    if attention_mask is not None:
        return sdpa_attention_forward(module, query, key, value, attention_mask, **kwargs)
    parts = lengths or (query.shape[2],)
    outputs = [
        sdpa_attention_forward(module, q, k, v, _band(q, window), **kwargs)[0]
        for q, k, v in zip(*(x.split(parts, dim=2) for x in (query, key, value)), strict=True)
    ]
    return torch.cat(outputs, dim=1), None


def _band(query: Tensor, window: int | None) -> Tensor | None:
    """The causal mask of a window, where a sequence is longer than it: [1, 1, T, T]."""
    length = query.shape[2]
    if window is None or length <= window:
        return None
    distance = torch.arange(length, device=query.device)
    distance = distance.unsqueeze(1) - distance
    return ((distance >= 0) & (distance < window)).unsqueeze(0).unsqueeze(0)


def varlen_attention(
    module: Any,
    query: Tensor,  # [1, H, T, d]
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    **kwargs: Any,
) -> tuple[Tensor, None]:  # [1, T, H, d]
    """A pack in one call of torch's varlen_attn; anything else as `sdpa_attention`."""
    if attention_mask is not None or "sequence_lengths" not in kwargs:
        return sdpa_attention(module, query, key, value, attention_mask, **kwargs)
    from torch.nn.attention.varlen import varlen_attn

    if kwargs.get("dropout"):
        raise ConfigError("attention: varlen has no dropout; use sdpa, or set it to 0")
    groups, window = query.shape[1] // key.shape[1], kwargs.get("sliding_window")
    q, k, v = (x[0].transpose(0, 1) for x in (query, key, value))  # [T, H, d]
    if groups > 1:
        k, v = k.repeat_interleave(groups, 1), v.repeat_interleave(groups, 1)
    ends, longest = kwargs["cu_seq_lens_q"], kwargs["max_length_q"]
    left = -1 if window is None or longest <= window else window - 1
    out: Any = varlen_attn(
        q, k, v, ends, ends, longest, longest, scale=kwargs.get("scaling"), window_size=(left, 0)
    )
    return out.unsqueeze(0), None


@torch.no_grad()
def check_packing(model: Any, path: str) -> None:
    """Compare the last hidden states of a pack of three sequences with those of each alone.

    Raises:
        ModelError: they differ by more than rounding.
    """
    rows, lengths = lm_head(model).weight.shape[0], (7, 3, 12)
    device = next(model.parameters()).device
    ids = torch.linspace(0, rows - 1, sum(lengths), device=device).long().flip(0)
    positions = torch.cat([torch.arange(length, device=device) for length in lengths])
    pack = {"input_ids": ids[None], "position_ids": positions[None]}
    training = model.training
    model.eval()
    try:
        together = _hidden(model, {**pack, **pack_kwargs(lengths, device)})[0]
        for found, own in zip(together.split(lengths), ids.split(lengths), strict=True):
            alone = _hidden(
                model, {"input_ids": own[None], "attention_mask": torch.ones_like(own[None])}
            )[0]
            error, size = (found - alone).abs().max().item(), alone.abs().max().item()
            if not error <= 64 * torch.finfo(found.dtype).eps * max(size, 1e-6):
                raise ModelError(
                    f"{type(model).__name__}: in a pack its hidden states differ by {error:.3g} "
                    f"(of {size:.3g}) from those of the same sequence alone, attention by {path}; "
                    "this architecture cannot be packed, leave --max_tokens_per_batch out"
                )
    finally:
        model.train(training)


def _hidden(model: Any, inputs: dict[str, Any]) -> Tensor:
    return run_with_loss(model, inputs, lambda hidden, *_: hidden)
