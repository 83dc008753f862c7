"""Checks of shapes, dtypes, devices and settings, from metadata only.

A message names the argument, what was found, and what to pass instead. `_values` checks values.
"""

from __future__ import annotations

import math
from collections.abc import Mapping

import torch
from torch import Tensor
from torch.autograd.forward_ad import unpack_dual

from lopd_kernels._core.gemm import compute_dtype
from lopd_kernels._core.rules import DIVERGENCES, IMPORTANCE, TAILS

FLOATS = (torch.bfloat16, torch.float16, torch.float32, torch.float64)
INTEGERS = (torch.int32, torch.int64)
REDUCTIONS = ("sum", "mean", "none")


class DtypeError(TypeError, ValueError):
    """Raised when the type or dtype of an argument is not supported."""


def cast_for_autocast(
    hidden: Tensor, weight: Tensor, bias: Tensor | None
) -> tuple[Tensor, Tensor, Tensor | None]:
    """Under autocast, tensors of different dtypes are cast to autocast's, as in F.linear.

    Tensors of one dtype are not cast: the losses choose the precision of their products.
    """
    tensors = [x for x in (hidden, weight, bias) if x is not None]
    device = hidden.device.type
    if all(x.dtype == hidden.dtype for x in tensors) or not torch.is_autocast_enabled(device):
        return hidden, weight, bias
    dtype = torch.get_autocast_dtype(device)
    return hidden.to(dtype), weight.to(dtype), None if bias is None else bias.to(dtype)


def check_tensor(name: str, tensor: Tensor) -> None:
    if isinstance(tensor, torch.nn.Module):
        raise DtypeError(
            f"{name} is the module {type(tensor).__name__}, expected a tensor; pass its weight, "
            "and its bias as bias="
        )
    if not isinstance(tensor, Tensor):
        raise DtypeError(
            f"{name} is of type {type(tensor).__name__}, expected a torch.Tensor; "
            f"pass torch.as_tensor({name})"
        )
    if unpack_dual(tensor).tangent is not None:
        raise NotImplementedError(
            f"{name} has a tangent, but forward-mode differentiation (jvp, jacfwd) is not "
            "supported; use backward, or lopd_kernels.reference"
        )
    if hasattr(tensor, "device_mesh"):
        raise ValueError(
            f"{name} is a DTensor, expected a plain tensor; call the loss inside the head's "
            f"forward, where a sharded weight is gathered, or pass {name}.full_tensor()"
        )


def check_linear(hidden: Tensor, weight: Tensor, bias: Tensor | None) -> None:
    if hidden.dim() < 2:
        raise ValueError(f"hidden has shape {list(hidden.shape)}, expected [N, D] or [B, T, D]")
    if weight.dim() != 2:
        raise ValueError(
            f"weight has shape {list(weight.shape)}, expected [V, D]; pass the lm_head weight"
        )
    for name, tensor in (("hidden", hidden), ("weight", weight)):
        if tensor.dtype not in FLOATS:
            raise DtypeError(f"{name} is {tensor.dtype}, expected bfloat16, float16 or float32")
    if hidden.shape[-1] != weight.shape[1]:
        raise ValueError(
            f"hidden {list(hidden.shape)} and weight {list(weight.shape)} differ in their last "
            "dimension; pass the lm_head weight as [V, D]"
        )
    if 0 in weight.shape:
        raise ValueError(f"weight {list(weight.shape)} has no rows or columns; expected [V, D]")
    if hidden.dtype != weight.dtype:
        raise DtypeError(
            f"hidden is {hidden.dtype} and weight is {weight.dtype}; cast one to the other"
        )
    check_device("weight", weight, hidden)
    if bias is not None:
        check_rows("bias", bias, (weight.shape[0],), hidden)
        if bias.dtype != weight.dtype:
            raise DtypeError(f"bias is {bias.dtype} and weight is {weight.dtype}; cast one")


def flat_rows(
    name: str, tensor: Tensor, leading: torch.Size, columns: tuple[str, ...] = ()
) -> Tensor:
    """[N, ...] from a tensor with the same leading dimensions as hidden [..., D].

    Args:
        leading: the shape of hidden without D.
        columns: names of the dimensions after the leading ones, for the message.
    """
    check_tensor(name, tensor)
    rows = tensor.shape[: len(leading)]
    if rows != leading or tensor.dim() != len(leading) + len(columns):
        expected = ", ".join([*map(str, leading), *columns])
        raise ValueError(f"{name} has shape {list(tensor.shape)}, expected [{expected}]")
    if len(leading) == 1:
        return tensor
    return tensor.reshape(math.prod(leading), *tensor.shape[len(leading) :])


def check_device(name: str, tensor: Tensor, like: Tensor) -> None:
    if tensor.device != like.device:
        raise ValueError(
            f"{name} is on {tensor.device} and hidden is on {like.device}; move {name} there"
        )


def check_rows(name: str, tensor: Tensor, shape: tuple[int, ...], like: Tensor) -> None:
    """A floating-point tensor of exactly this shape, on the device of `like`."""
    check_tensor(name, tensor)
    if tuple(tensor.shape) != shape:
        raise ValueError(f"{name} has shape {list(tensor.shape)}, expected {list(shape)}")
    if tensor.dtype not in FLOATS:
        raise DtypeError(f"{name} is {tensor.dtype}, expected a floating-point type")
    check_device(name, tensor, like)


def constant_rows(
    name: str,
    tensor: Tensor | None,
    leading: torch.Size,
    like: Tensor,
    columns: tuple[str, ...] = (),
) -> Tensor | None:
    """`flat_rows` of a floating-point tensor that gets no gradient; None is accepted."""
    if tensor is None:
        return None
    flat = flat_rows(name, tensor, leading, columns)
    check_rows(name, flat, tuple(flat.shape), like)
    if tensor.requires_grad:
        raise ValueError(
            f"{name} requires grad, but it is a constant of the loss; pass {name}.detach()"
        )
    return flat


def weight_rows(row_weights: Tensor | None, leading: torch.Size, like: Tensor) -> Tensor | None:
    """Row weights [N]; a mask counts as ones and zeros."""
    if isinstance(row_weights, Tensor) and row_weights.dtype == torch.bool:
        row_weights = row_weights.to(torch.float32)
    return constant_rows("row_weights", row_weights, leading, like)


def id_rows(
    name: str, ids: Tensor, leading: torch.Size, like: Tensor, columns: tuple[str, ...] = ()
) -> Tensor:
    """Ids [N] or [N, K], int32 or int64."""
    ids = flat_rows(name, ids, leading, columns)
    if columns and ids.shape[1] == 0:
        raise ValueError(f"{name} has shape {list(ids.shape)}, expected at least one column")
    if ids.dtype not in INTEGERS:
        raise DtypeError(f"{name} is {ids.dtype}, expected int32 or int64")
    check_device(name, ids, like)
    return ids


def check_list_shape(name: str, tensor: Tensor, ids: Tensor) -> None:
    if tensor.shape != ids.shape:
        raise ValueError(
            f"{name} has shape {list(tensor.shape)} and topk_ids {list(ids.shape)}, expected the "
            "same; pass one log-prob for each id"
        )


def check_list_length(name: str, ids: Tensor, vocab: int) -> None:
    if ids.shape[1] > vocab:
        raise ValueError(
            f"{name} has {ids.shape[1]} columns, expected at most the vocabulary size {vocab}: the "
            "ids of a row are distinct"
        )


def check_choice(name: str, value: str, choices: tuple[str, ...]) -> None:
    if value not in choices:
        raise ValueError(f"{name} is {value!r}, expected one of {', '.join(choices)}")


def check_number(name: str, value: float) -> None:
    if isinstance(value, bool) or not isinstance(value, (int, float, torch.SymFloat)):
        raise DtypeError(f"{name} is {value!r}, expected a number; pass a Python float")


def check_positive(name: str, value: float) -> None:
    check_number(name, value)
    if not 0.0 < value < math.inf:
        raise ValueError(f"{name} is {value}, expected a finite number above 0")


def check_optional_positive(name: str, value: float | None) -> None:
    if value is not None:
        check_positive(name, value)


def check_integer(name: str, value: int, what: str = "an integer") -> None:
    if isinstance(value, bool) or not isinstance(value, (int, torch.SymInt)):
        raise DtypeError(f"{name} is {value!r}, expected {what}; pass a Python int")


def check_count(name: str, value: int, low: int, high: float, what: str) -> None:
    check_integer(name, value, what)
    if not low <= value <= high:
        raise ValueError(f"{name} is {value}, expected {what}")


def check_divergence(divergence: str, tail: str, beta: float | None) -> None:
    check_choice("divergence", divergence, tuple(DIVERGENCES))
    check_choice("tail", tail, TAILS)
    if tail == "unbiased" and divergence != "reverse_kl":
        raise ValueError(
            f"tail is 'unbiased' and divergence is {divergence!r}; the correction by a sampled "
            "token is that of divergence='reverse_kl'"
        )
    if divergence != "jsd":
        if beta is not None:
            raise ValueError(
                f"beta is {beta}, but {divergence} has no mixture; drop it or use divergence='jsd'"
            )
        return
    if beta is not None:
        check_number("beta", beta)
        if not 0.0 < beta < 1.0:
            raise ValueError(
                f"beta is {beta}, expected strictly between 0 and 1, because jsd is 0 at both "
                "ends; use divergence='forward_kl' or 'reverse_kl'"
            )


def check_sample(tail: str, given: Mapping[str, object]) -> None:
    """Only tail "unbiased" uses the sampled tokens and their cap."""
    if tail != "unbiased":
        for name, value in given.items():
            if value is not None:
                raise ValueError(f"{name} is set, but tail is {tail!r}; only 'unbiased' uses it")


def check_skipping(
    dense_share: float | None, tolerance: float, reduction: str, tail: str | None
) -> None:
    """The settings that leave out some of the gradient outside the lists."""
    check_number("tolerance", tolerance)
    if not 0.0 <= tolerance < 1.0:
        raise ValueError(f"tolerance is {tolerance}, expected at least 0 and below 1")
    if dense_share is not None:
        check_number("dense_share", dense_share)
        if not 0.0 < dense_share <= 1.0:
            raise ValueError(
                f"dense_share is {dense_share}, expected above 0 and at most 1; "
                "None forms the gradient of every row"
            )
        if tolerance > 0.0:
            raise ValueError(
                f"dense_share is {dense_share} and tolerance is {tolerance}; a sample of the rows "
                "is unbiased, a tolerance bounds an error: pass one of them"
            )
    if dense_share is None and tolerance == 0.0:
        return
    name = "tolerance" if dense_share is None else "dense_share"
    if reduction == "none":
        raise ValueError(
            f"{name} is set and reduction is 'none'; which rows matter depends on their weights: "
            "pass them as row_weights, with reduction='sum' or 'mean'"
        )
    if tail == "renormalize":
        raise ValueError(
            f"{name} is set and tail is 'renormalize', which has no gradient outside the list and "
            f"already runs no GEMM over the vocabulary; drop {name}"
        )


def check_seed(seed: int | Tensor | None, dense_share: float | None, like: Tensor) -> None:
    if dense_share is None:
        if seed is not None:
            raise ValueError("seed is set, but without dense_share no rows are drawn; drop it")
        return
    if seed is None:
        raise ValueError(
            f"seed is None, but dense_share {dense_share} draws rows; pass a number that changes "
            "from call to call, such as that of the step"
        )
    if not isinstance(seed, Tensor):
        check_count("seed", seed, 0, 2**63 - 1, "an integer from 0 to 2^63 - 1")
        return
    if seed.dim() or seed.dtype != torch.int64:
        raise DtypeError(
            f"seed is {seed.dtype} {list(seed.shape)}, expected a Python int or a torch.int64 "
            "tensor without dimensions"
        )
    check_device("seed", seed, like)


def check_workspace(workspace_bytes: int | None) -> None:
    if workspace_bytes is not None:
        what = "None or a number of bytes above 0"
        check_count("workspace_bytes", workspace_bytes, 1, math.inf, what)


def check_weight_grad_buffer(buffer: Tensor | None, weight: Tensor) -> None:
    if buffer is None:
        return
    check_rows("weight_grad_buffer", buffer, tuple(weight.shape), weight)
    expected = compute_dtype(weight.dtype)
    if buffer.dtype != expected:
        raise DtypeError(f"weight_grad_buffer is {buffer.dtype}, expected {expected}")
    if buffer.shape[1] > 1 and buffer.stride(1) != 1:
        raise ValueError(
            f"weight_grad_buffer has strides {list(buffer.stride())}, expected contiguous rows; "
            "pass a row-major tensor"
        )
    if buffer.requires_grad:
        raise ValueError("weight_grad_buffer requires grad; pass a plain tensor to add dW to")
    if torch.is_grad_enabled() and not weight.requires_grad:
        raise ValueError(
            "weight_grad_buffer is set, but weight does not require grad and has no gradient to "
            "add; drop the buffer or unfreeze the weight"
        )


def check_importance(
    importance: str, importance_cap: float | None, clip_range: float | None
) -> None:
    check_choice("importance", importance, IMPORTANCE)
    check_optional_positive("importance_cap", importance_cap)
    check_optional_positive("clip_range", clip_range)
    if importance == "token_truncated" and importance_cap is None:
        raise ValueError("importance is 'token_truncated' but importance_cap is None; pass the cap")
    if importance != "token_truncated" and importance_cap is not None:
        raise ValueError(
            f"importance_cap is {importance_cap} but importance is {importance!r}; "
            "the cap belongs to 'token_truncated'"
        )
    if clip_range is not None and importance != "none":
        raise ValueError(
            f"clip_range is {clip_range} and importance is {importance!r}; the clipped loss has "
            "its own ratio, pass importance='none'"
        )


def check_rollout(rollout_logprobs: Tensor | None, needed: bool) -> None:
    if needed and rollout_logprobs is None:
        raise ValueError(
            "rollout_logprobs is None, but the importance ratio needs it; pass the log-probs under "
            "the policy that sampled the ids"
        )
