"""Attention for packs: rows of several sequences that do not attend to each other.

Without a flash-attention package, transformers builds a dense `[T, T]` mask from the position ids
of a pack. The two implementations here need neither the mask nor the package:

    varlen   torch.nn.attention.varlen: one kernel call per pack (CUDA, 16-bit weights)
    sdpa     scaled_dot_product_attention, one call per sequence (any device)

Like transformers' flash_attention_2 and _3, they read the sequence boundaries from keyword
arguments (`pack_kwargs`) that the model passes on to its attention layers. Some architectures do
not pass them on, so `check_packing` compares a pack with its separate sequences before a run.
"""

import importlib.util
import inspect
import logging
import math
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor
from torch.nn.utils.rnn import pad_sequence

from lopd.config.training import ATTENTION
from lopd.errors import ConfigError, ModelError
from lopd.models.admission import attempt, ceiling, distance, hidden_of, one_row
from lopd.models.architecture import (
    attention_softcap_of,
    context_of_config,
    head_rows_of,
    switches_of,
)
from lopd.models.head import eval_mode, plain_model

LOG = logging.getLogger(__name__)

REMEDY = "this architecture cannot be packed, omit --max-tokens-per-batch (padding_free in TRL)"
REGISTERED = {"varlen": "lopd_varlen", "sdpa": "lopd_sdpa"}  # name in transformers


def pack_attention(
    model: Any,
    path: str = "auto",
    device: torch.device | None = None,
    dtype: torch.dtype | None = None,
) -> str:
    """Set the attention implementation of `model` to one for packs, and print its name.

    Padded batches and generation still work. Call `check_packing` afterwards.

    Args:
        path: one of `ATTENTION`; "auto" selects the first in their order that is installed and
            supports device and dtype.
        device: where the model will run; None for where it is.
        dtype: of the activations, as under autocast; None for that of the weights.

    Returns:
        The name of the implementation.

    Raises:
        ConfigError: the path is unknown, not installed, or does not support device or dtype.
        ModelError: the model does not support it.
    """
    weight = model.get_input_embeddings().weight
    device = device or weight.device
    dtype = dtype or weight.dtype
    if path == "auto":
        softcap = attention_softcap_of(model.config) is not None
        usable = [p for p in ATTENTION[1:] if not (p == "varlen" and softcap)]
        path = next(p for p in usable if not _unavailable(p, device, dtype))
    if why := _unavailable(path, device, dtype):
        raise ConfigError(f"attention: found '{path}'; {why}")
    plain = plain_model(model)
    if path in REGISTERED:
        if not plain._supports_sdpa:  # it has something besides, such as sinks or a bias
            raise ModelError(
                f"{type(plain).__name__}: its attention is its own, so attention by {path} would "
                f"give other outputs; {REMEDY}"
            )
        _register()
    name = REGISTERED.get(path, path)
    attempt(plain, f"attention by {path}", lambda: model.set_attn_implementation(name))
    LOG.info(f"packing: attention by {path}")
    return path


def pack_kwargs(lengths: Sequence[int], device: Any) -> dict[str, Any]:
    """Keyword arguments that tell attention where each packed sequence ends.

    The names are those of transformers, with `sequence_lengths` added.
    """
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
    """Why an implementation cannot be used; empty if it can."""
    from transformers.utils import import_utils

    if path not in ATTENTION:
        return f"expected one of {', '.join(ATTENTION)}"
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
    """Whether torch has varlen_attn with a scale and a window (torch 2.10 has not)."""
    if importlib.util.find_spec("torch.nn.attention.varlen") is None:
        return False
    from torch.nn.attention.varlen import varlen_attn

    return {"scale", "window_size"} <= inspect.signature(varlen_attn).parameters.keys()


def _register() -> None:
    from transformers import AttentionInterface
    from transformers.masking_utils import AttentionMaskInterface

    for name, attend in (("varlen", varlen_attention), ("sdpa", sdpa_attention)):
        AttentionInterface.register(REGISTERED[name], attend)
        AttentionMaskInterface.register(REGISTERED[name], _mask_of_padding)


def _mask_of_padding(*args: Any, attention_mask: Tensor | None = None, **kwargs: Any) -> Any:
    """None for rows without padding (a pack or one sequence), otherwise the mask of sdpa."""
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
    """Attention by scaled dot products, sequence by sequence if the row is a pack."""
    from transformers.integrations.sdpa_attention import sdpa_attention_forward

    lengths, window = kwargs.pop("sequence_lengths", None), kwargs.get("sliding_window")
    attend = sdpa_attention_forward if kwargs.get("softcap") is None else _capped_attention
    # One token after cached ones, as in generation, attends to all of them: no mask either.
    if attention_mask is not None or query.shape[2] != key.shape[2]:
        return attend(module, query, key, value, attention_mask, **kwargs)
    parts = lengths or (query.shape[2],)
    outputs = [
        attend(module, q, k, v, _band(q, window), **kwargs)[0]
        for q, k, v in zip(*(x.split(parts, dim=2) for x in (query, key, value)), strict=True)
    ]
    return torch.cat(outputs, dim=1), None


def _capped_attention(
    module: Any,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    *,
    softcap: float,
    scaling: float | None = None,
    dropout: float = 0.0,
    **kwargs: Any,
) -> tuple[Tensor, None]:
    """Attention whose scores pass a soft cap, which scaled_dot_product_attention leaves out."""
    groups = query.shape[1] // key.shape[1]
    key, value = key.repeat_interleave(groups, 1), value.repeat_interleave(groups, 1)
    scale = query.shape[-1] ** -0.5 if scaling is None else scaling
    scores = softcap * torch.tanh(query @ key.transpose(2, 3) * (scale / softcap))
    if attention_mask is None:
        shape = (query.shape[2], key.shape[2])
        before = key.shape[2] - query.shape[2]  # tokens in a cache
        attention_mask = torch.ones(shape, dtype=torch.bool, device=query.device).tril(before)
    scores = scores.masked_fill(~attention_mask, torch.finfo(scores.dtype).min)
    weights = scores.softmax(-1, dtype=torch.float32).to(query.dtype)
    weights = torch.nn.functional.dropout(weights, dropout, module.training)
    return (weights @ value).transpose(1, 2).contiguous(), None


def _band(query: Tensor, window: int | None) -> Tensor | None:
    """The causal mask [1, 1, T, T] of a window; None if the sequence fits into the window."""
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
    """Attention by one call of torch's varlen_attn per pack; otherwise `sdpa_attention`.

    Raises:
        ConfigError: the model has attention dropout, which varlen_attn does not support.
    """
    if attention_mask is not None or "sequence_lengths" not in kwargs:
        return sdpa_attention(module, query, key, value, attention_mask, **kwargs)
    from torch.nn.attention.varlen import varlen_attn

    if kwargs.get("dropout"):
        raise ConfigError("attention: varlen has no dropout; use sdpa, or set it to 0")
    if kwargs.get("softcap") is not None:
        raise ConfigError("attention: varlen has no soft cap; use sdpa")
    groups, window = query.shape[1] // key.shape[1], kwargs.get("sliding_window")
    if torch.is_autocast_enabled(query.device.type):  # norms and rotations return float32
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
    """Compare the last hidden states of a pack of three sequences with those of each sequence.

    The error is relative to the norm over a sequence. A padded batch of the same sequences
    measures what rounding contributes. The third sequence is longer than every window and chunk
    of the model that packs may exceed.

    Args:
        path: the implementation, for the error message.
        longest: the largest number of tokens of a pack; None for no limit.

    Raises:
        ModelError: the model fails on a pack, or the error is above the largest of 4 times that of
            padding, 4 units in the last place, and 1e-5; or above `admission.ceiling` in any case,
            since a model that depends on its neighbours does so in padded batches too.
    """
    attempt(plain_model(model), "a pack", lambda: _compare_pack(model, path, longest), REMEDY)


def _compare_pack(model: Any, path: str, longest: int | None) -> None:
    plain = plain_model(model)
    lengths = (7, 3, max(12, 2 + _reach(plain.config, longest)))
    rows, device = head_rows_of(plain), next(model.parameters()).device
    ids = torch.linspace(0, rows - 1, sum(lengths), device=device).long().flip(0)
    positions = torch.cat([torch.arange(length, device=device) for length in lengths])
    pack = {"input_ids": ids[None], "position_ids": positions[None]}
    parts = ids.split(lengths)
    batch = {
        "input_ids": pad_sequence(parts, batch_first=True),
        "attention_mask": pad_sequence([torch.ones_like(p) for p in parts], batch_first=True),
    }
    with eval_mode(model):
        packed = hidden_of(model, {**pack, **pack_kwargs(lengths, device)})[0].split(lengths)
        batched = hidden_of(model, batch)
        padded = [row[:length] for row, length in zip(batched, lengths, strict=True)]
        separate = [hidden_of(model, one_row(part))[0] for part in parts]
    example = separate[0]
    if torch.is_autocast_enabled(device.type):
        example = example.to(torch.get_autocast_dtype(device.type))
    rounding = max(map(distance, padded, separate))
    least = max(4 * torch.finfo(example.dtype).eps, 1e-5)
    bound = min(max(4 * rounding, least), ceiling(example))
    error = max(map(distance, packed, separate))
    if not error <= bound:
        raise ModelError(
            f"{type(model).__name__}: in a pack its hidden states differ by {error:.2g} of their "
            f"norm from those of the separate sequences (expected at most {bound:.2g}), with "
            f"attention by {path}; {REMEDY}"
        )


def _reach(config: Any, longest: int | None) -> int:
    """The largest number of tokens in a pack's sequence at which a layer changes what it does."""
    limits = [limit for limit in (longest, context_of_config(config)) if limit is not None]
    room = min(limits, default=math.inf) - 2
    return max((switch for switch in switches_of(config) if switch <= room), default=0)
