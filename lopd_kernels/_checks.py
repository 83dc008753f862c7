"""Checks of arguments. A message names the argument, what was found, and what to pass
instead.

Shapes, dtypes, devices and settings are always checked, from metadata only. Values are checked
where `checks_values` says so, because on a GPU that waits for the device.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

from lopd_kernels._core.gemm import compute_dtype
from lopd_kernels._core.rules import DIVERGENCES, IMPORTANCE, TAILS

FLOATS = (torch.bfloat16, torch.float16, torch.float32, torch.float64)
INTEGERS = (torch.int32, torch.int64)
REDUCTIONS = ("sum", "mean", "none")
MASS_SLACK = 1e-3


class DtypeError(TypeError, ValueError):
    """Raised when the dtype of an argument is not supported."""


def checks_values(validate: bool | None, like: Tensor) -> bool:
    """`validate`; None checks values except while compiling or capturing a CUDA graph."""
    if validate is not None:
        return validate
    if torch.compiler.is_compiling():
        return False
    return not (like.is_cuda and torch.cuda.is_current_stream_capturing())


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


def check_no_dtensor(name: str, tensor: Tensor) -> None:
    if hasattr(tensor, "device_mesh"):
        raise ValueError(
            f"{name} is a DTensor, expected a plain tensor; call the loss inside the head's "
            f"forward, where a sharded weight is gathered, or pass {name}.full_tensor()"
        )


def check_linear(hidden: Tensor, weight: Tensor, bias: Tensor | None) -> None:
    for name, tensor in (("hidden", hidden), ("weight", weight)):
        check_no_dtensor(name, tensor)
        if tensor.dim() != 2:
            raise ValueError(
                f"{name} has shape {list(tensor.shape)}, expected two dimensions; "
                "select the loss-bearing rows, e.g. hidden.flatten(0, -2)[index]"
            )
        if tensor.dtype not in FLOATS:
            raise DtypeError(f"{name} is {tensor.dtype}, expected bfloat16, float16 or float32")
    if hidden.shape[1] != weight.shape[1]:
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


def check_device(name: str, tensor: Tensor, like: Tensor) -> None:
    check_no_dtensor(name, tensor)
    if tensor.device != like.device:
        raise ValueError(
            f"{name} is on {tensor.device} and hidden is on {like.device}; move {name} there"
        )


def check_rows(name: str, tensor: Tensor, shape: tuple[int, ...], like: Tensor) -> None:
    """A floating-point tensor of exactly this shape, on the device of `like`."""
    if tuple(tensor.shape) != shape:
        raise ValueError(f"{name} has shape {list(tensor.shape)}, expected {list(shape)}")
    if tensor.dtype not in FLOATS:
        raise DtypeError(f"{name} is {tensor.dtype}, expected a floating-point type")
    check_device(name, tensor, like)


def check_constant(name: str, tensor: Tensor | None, shape: tuple[int, ...], like: Tensor) -> None:
    """`check_rows` of a tensor that gets no gradient; None is accepted."""
    if tensor is None:
        return
    check_rows(name, tensor, shape, like)
    if tensor.requires_grad:
        raise ValueError(
            f"{name} requires grad, but it is a constant of the loss; pass {name}.detach()"
        )


def check_ids(name: str, ids: Tensor, rows: int, like: Tensor, dims: int = 2) -> None:
    if ids.dim() != dims or ids.shape[0] != rows:
        expected = f"[{rows}]" if dims == 1 else f"[{rows}, K]"
        raise ValueError(f"{name} has shape {list(ids.shape)}, expected {expected}")
    if dims == 2 and ids.shape[1] == 0:
        raise ValueError(f"{name} has shape {list(ids.shape)}, expected at least one column")
    if ids.dtype not in INTEGERS:
        raise DtypeError(f"{name} is {ids.dtype}, expected int32 or int64")
    check_device(name, ids, like)


def check_list_length(name: str, ids: Tensor, vocab: int) -> None:
    if ids.shape[1] > vocab:
        raise ValueError(
            f"{name} has {ids.shape[1]} columns, expected at most the vocabulary size {vocab}: the "
            "ids of a row are distinct"
        )


def mask_unweighted(tensor: Tensor, row_weights: Tensor | None, fill: float) -> Tensor:
    """`tensor` with `fill` in rows of weight 0, which may hold anything."""
    if row_weights is None:
        return tensor
    unweighted = row_weights == 0
    return tensor.masked_fill(unweighted.unsqueeze(1) if tensor.dim() == 2 else unweighted, fill)


def check_id_values(
    name: str, ids: Tensor, vocab: int, *, pads: bool = True, distinct: bool = True
) -> None:
    bad = (ids < (-1 if pads else 0)) | (ids >= vocab)
    if bad.any():
        row, column = (bad if bad.dim() == 2 else bad.unsqueeze(1)).nonzero()[0].tolist()
        found = int(ids.reshape(ids.shape[0], -1)[row, column])
        padding = " or -1 for padding" if pads else ""
        raise ValueError(
            f"{name} has {found} in row {row}, expected ids from 0 to {vocab - 1}{padding}; "
            "check that teacher and student share the tokenizer"
        )
    if distinct and ids.dim() == 2:
        ordered = ids.sort(1).values
        repeated = (ordered[:, 1:] == ordered[:, :-1]) & (ordered[:, 1:] >= 0)
        if repeated.any():
            row, column = repeated.nonzero()[0].tolist()
            raise ValueError(
                f"{name} has id {int(ordered[row, column])} twice in row {row}, expected distinct "
                "ids; add up the probabilities of equal ids"
            )


def check_weight_values(row_weights: Tensor | None, reduction: str) -> None:
    if row_weights is None:
        return
    check_finite("row_weights", row_weights, None)
    if reduction == "mean" and (row_weights < 0).any():
        raise ValueError(
            "row_weights has negative entries, but reduction='mean' divides by their sum; "
            "use reduction='sum' or 'none'"
        )


def check_finite(name: str, tensor: Tensor, row_weights: Tensor | None) -> None:
    """Finite values [N] in the rows whose weight is not 0."""
    tensor = mask_unweighted(tensor, row_weights, 0.0)
    bad = ~tensor.isfinite()
    if bad.any():
        row = int(bad.nonzero()[0])
        raise ValueError(f"{name} is {float(tensor[row])} in row {row}, expected a finite number")


def check_teacher_values(
    ids: Tensor, logprobs: Tensor, tail_logprobs: Tensor | None, vocab: int
) -> None:
    """Log-probs whose mass is at most 1 per row.

    `tail_logprobs` is None if the loss does not use it. A row without ids or with all of them
    does not use it either.
    """
    listed = ids >= 0
    bad = listed & ~logprobs.isfinite()
    if bad.any():
        row, column = bad.nonzero()[0].tolist()
        raise ValueError(
            f"topk_logprobs is {float(logprobs[row, column])} in row {row}, expected finite "
            "log-probs; drop ids without mass from the list (id -1)"
        )
    mass = logprobs.masked_fill(~listed, -math.inf).double().logsumexp(1)
    if tail_logprobs is not None:
        counts = listed.sum(1)
        used = (counts > 0) & (counts < vocab)
        bad = (tail_logprobs.isnan() | (tail_logprobs == math.inf)) & used
        if bad.any():
            row = int(bad.nonzero()[0])
            raise ValueError(
                f"tail_logprobs is {float(tail_logprobs[row])} in row {row}, expected a log-prob, "
                "or -inf if no mass is left"
            )
        mass = torch.where(used, torch.logaddexp(mass, tail_logprobs.double()), mass)
    over = mass > math.log1p(MASS_SLACK)
    if over.any():
        row = int(over.nonzero()[0])
        raise ValueError(
            f"the teacher's probabilities sum to {float(mass[row].exp()):.6g} in row {row}, "
            f"expected at most 1 + {MASS_SLACK}; pass log-probs of the full softmax, not logits"
        )


def check_choice(name: str, value: str, choices: tuple[str, ...]) -> None:
    if value not in choices:
        raise ValueError(f"{name} is {value!r}, expected one of {', '.join(choices)}")


def check_positive(name: str, value: float | None) -> None:
    if value is not None and not 0.0 < value < math.inf:
        raise ValueError(f"{name} is {value}, expected a finite number above 0")


def check_divergence(divergence: str, tail: str, beta: float) -> None:
    check_choice("divergence", divergence, tuple(DIVERGENCES))
    check_choice("tail", tail, TAILS)
    if divergence == "jsd" and not 0.0 < beta < 1.0:
        raise ValueError(
            f"beta is {beta}, expected strictly between 0 and 1, because jsd is 0 at both ends; "
            "use divergence='forward_kl' or 'reverse_kl'"
        )


def check_tolerance(tolerance: float) -> None:
    if tolerance != 0.0:
        raise ValueError(
            f"tolerance is {tolerance}, but certified skipping is not available in this version; "
            "pass tolerance=0.0 for the exact gradient"
        )


def check_workspace(workspace_bytes: int | None) -> None:
    if workspace_bytes is not None and workspace_bytes <= 0:
        raise ValueError(f"workspace_bytes is {workspace_bytes}, expected None or a positive count")


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
    importance: str,
    importance_cap: float | None,
    clip_range: float | None,
    rollout_logprobs: Tensor | None,
) -> None:
    check_choice("importance", importance, IMPORTANCE)
    check_positive("importance_cap", importance_cap)
    check_positive("clip_range", clip_range)
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
    if (clip_range is not None or importance != "none") and rollout_logprobs is None:
        raise ValueError(
            "rollout_logprobs is None, but the importance ratio needs it; pass the log-probs under "
            "the policy that sampled the ids"
        )
