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
from torch.nn.utils.rnn import pad_sequence

from lopd.errors import ConfigError, ModelError
from lopd.models.head import lm_head, plain_model, run_with_loss

FLASH = ("flash_attention_3", "flash_attention_2")
OWN = {"varlen": "lopd_varlen", "sdpa": "lopd_sdpa"}
PATHS = ("auto", *FLASH, *OWN)


def pack_attention(
    model: Any,
    path: str = "auto",
    device: torch.device | None = None,
    dtype: torch.dtype | None = None,
) -> str:
    """Have `model` attend within sequences; prints and returns the path that was taken.

    "auto" takes the first that is installed and fits device (where the model will be, if it is not
    there yet) and dtype (of autocast; None for the weights'), in the order of `PATHS`. Padded
    batches and generation go on working. `check_packing` tells whether the model hands the bounds
    down.

    Raises:
        ConfigError: the path is unknown, not installed, or does not fit device or dtype.
    """
    weight = model.get_input_embeddings().weight
    where = weight.device if device is None else device
    dtype = dtype or weight.dtype
    if path == "auto":
        path = next(p for p in PATHS[1:] if not _unavailable(p, where, dtype))
    if why := _unavailable(path, where, dtype):
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
        return f"it needs CUDA and a 16-bit dtype, found {device.type} and {dtype}; use sdpa"
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
    if torch.is_autocast_enabled(query.device.type):  # norms and rotations leave float32
        low = torch.get_autocast_dtype(query.device.type)
        query, key, value = (x.to(low) for x in (query, key, value))
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
def check_packing(model: Any, path: str, longest: int | None = None) -> None:
    """Compare the last hidden states of a pack of three sequences with those of each alone.

    The error is relative, in the norm over a sequence; what rounding may do is measured on the
    same sequences as a padded batch. A third sequence is longer than the model's window, if it has
    one and packs may be (`longest`).

    Raises:
        ModelError: they differ by more than 4 times what padding makes of them, 4 units in the
            last place, and 1e-5.
    """
    config = plain_model(model).config.get_text_config()
    beyond = (getattr(config, "sliding_window", None) or 0) + 2
    lengths = (7, 3, max(12, beyond if longest is None else min(beyond, longest)))
    rows, device = lm_head(model).weight.shape[0], next(model.parameters()).device
    ids = torch.linspace(0, rows - 1, sum(lengths), device=device).long().flip(0)
    positions = torch.cat([torch.arange(length, device=device) for length in lengths])
    pack = {"input_ids": ids[None], "position_ids": positions[None]}
    parts = ids.split(lengths)
    batch = {
        "input_ids": pad_sequence(parts, batch_first=True),
        "attention_mask": pad_sequence([torch.ones_like(p) for p in parts], batch_first=True),
    }
    training = model.training
    model.eval()
    try:
        together = _hidden(model, {**pack, **pack_kwargs(lengths, device)})[0].split(lengths)
        padded = [row[:length] for row, length in zip(_hidden(model, batch), lengths, strict=True)]
        alone = [
            _hidden(model, {"input_ids": own[None], "attention_mask": torch.ones_like(own[None])})[
                0
            ]
            for own in parts
        ]
    finally:
        model.train(training)
    dtype = alone[0].dtype
    if torch.is_autocast_enabled(device.type):
        dtype = torch.get_autocast_dtype(device.type)
    floor = max(map(_distance, padded, alone))
    bound = max(4 * floor, 4 * torch.finfo(dtype).eps, 1e-5)
    error = max(map(_distance, together, alone))
    if not error <= bound:
        raise ModelError(
            f"{type(model).__name__}: in a pack its hidden states differ by {error:.2g} of their "
            f"norm from those of the same sequence alone (at most {bound:.2g} is rounding), "
            f"attention by {path}; this architecture cannot be packed, leave "
            "--max_tokens_per_batch out"
        )


def _distance(found: Tensor, expected: Tensor) -> float:
    expected = expected.float()
    return ((found.float() - expected).norm() / expected.norm().clamp(min=1e-30)).item()


def _hidden(model: Any, inputs: dict[str, Any]) -> Tensor:
    return run_with_loss(model, inputs, lambda hidden, *_: hidden)
