"""The row functions by the kernels of `kernels/rows.py`, one program to a row."""

from __future__ import annotations

from contextlib import AbstractContextManager, nullcontext
from typing import Any, NamedTuple

import torch
import triton
from torch import Tensor

from lopd_kernels._core.rules import RowRule
from lopd_kernels._core.types import Coefficients, Head, Reduction
from lopd_kernels._triton.kernels import rows, rules

WIDEST_SUPPORT_BLOCK = 1024
COLUMNS_TO_A_WARP = 256


class Support(NamedTuple):
    """The ids as given: the kernels never index with an id that is out of range."""

    ids: Tensor  # [N, K] int
    active: Tensor  # [N] bool: has an id and a weight other than 0
    vocab: int

    def rows(self, part: slice) -> Support:
        return Support(self.ids[part], self.active[part], self.vocab)


class Launch(NamedTuple):
    """How a kernel is launched for rows of some width."""

    BLOCK: int
    num_warps: int
    maxnreg: int  # without it ptxas spills a few registers to reach 64 of them


# By compute capability; None for devices that are not listed. No entry has been measured yet:
# eight columns to a thread is what compiles without spills for every target (tests/aot.py).
LAUNCHES: dict[tuple[int, int] | None, Launch] = {None: Launch(BLOCK=2048, num_warps=8, maxnreg=96)}


def launch(width: int, support: int, device: torch.device) -> dict[str, int]:
    """The table's entry as options of a launch.

    Narrower rows get a narrower block with as many columns to a warp, and as many warps as a
    block of the support needs.
    """
    key = torch.cuda.get_device_capability(device) if device.type == "cuda" else None
    entry = LAUNCHES.get(key, LAUNCHES[None])
    block = min(entry.BLOCK, max(128, triton.next_power_of_2(width)))
    warps = max(entry.num_warps * block // entry.BLOCK, support // COLUMNS_TO_A_WARP, 1)
    options = {"BLOCK": block, "KBLOCK": support, "num_warps": warps, "num_stages": 1}
    return options if torch.version.hip else {**options, "maxnreg": entry.maxnreg}


def support_block(buckets: int) -> int:
    return min(WIDEST_SUPPORT_BLOCK, max(16, triton.next_power_of_2(buckets)))


def on_device(device: torch.device) -> AbstractContextManager[Any]:
    """Triton launches on the current device, which need not be the tensors'."""
    return torch.cuda.device(device) if device.type == "cuda" else nullcontext()


def locate(ids: Tensor, row_weights: Tensor | None, vocab: int) -> Support:
    active = (ids != -1).any(1)
    if row_weights is not None:
        active = active & (row_weights != 0)
    return Support(ids.contiguous(), active, vocab)


def spoilt(hidden: Tensor, weight: Tensor, head: Head) -> None:
    """The kernels see every logit before it is masked or capped."""


def rule_arguments(rule: RowRule) -> dict[str, Any]:
    """A rule as the constants and options of `row_kernel`."""
    name, *form = rule.name.split(":")
    options = [*rule.options, 0.0, 0.0, 0.0][:3]
    arguments: dict[str, Any] = {
        **{f"option_{i}": float(value) for i, value in enumerate(options)},
        "RULE": name,
        "DIVERGENCE": rules.reverse_kl,
        "SHIFT": 0.0,
        "TRUNCATE": False,
        "DERIVED": False,
        "IMPORTANCE": "none",
    }
    if name in rules.DIVERGENCES:
        arguments |= {
            "RULE": "divergence",
            "DIVERGENCE": rules.DIVERGENCES[name],
            "SHIFT": rules.SHIFTS[name],
            "TRUNCATE": form[0] == "truncate",
        }
    elif name == "policy_gradient":
        arguments |= {"DERIVED": form[0] == "log_ratio", "IMPORTANCE": form[1]}
    return arguments


def _head_arguments(head: Head) -> dict[str, Any]:
    return {
        "gain": head.gain,
        "cap": head.cap,
        "HAS_BIAS": head.bias is not None,
        "SOFTCAP": head.softcap is not None,
    }


def row_pass(
    u: Tensor,
    support: Support,
    target: Tensor,
    weights: Tensor | None,
    rule: RowRule,
    head: Head,
    want_entropy: bool,
    stats: Tensor,
    out: Tensor | None,
    inf_masks: bool = False,
) -> None:
    (count, vocab), k = u.shape, support.ids.shape[1]
    if not count:
        return
    options = launch(vocab, support_block(k + 1), u.device)
    out = u if out is None else out
    with on_device(u.device):
        rows.row_kernel[(count,)](
            u, out, support.ids, u.new_full((count, k), float("-inf")), target.contiguous(),
            support.active, u if weights is None else weights, stats,
            u if head.bias is None else head.bias,
            u.stride(0), out.stride(0), min(u.stride(0), out.stride(0)), vocab, k,
            target.shape[1], stats.stride(0),
            **_head_arguments(head), **rule_arguments(rule),
            INF_MASKS=inf_masks, ENTROPY=want_entropy, GRAD=weights is not None, **options,
        )  # fmt: skip


def reduce(
    u: Tensor, first: int, support: Support, head: Head, want_spread: bool, reduction: Reduction
) -> None:
    (count, width), k = u.shape, support.ids.shape[1]
    if not count:
        return
    options = launch(width, support_block(k), u.device)
    with on_device(u.device):
        rows.reduce_kernel[(count,)](
            u, support.ids, reduction.on, support.active, reduction.state,
            u if head.bias is None else head.bias, u.stride(0), first, width, support.vocab, k,
            **_head_arguments(head), INF_MASKS=False, SPREAD=want_spread, **options,
        )  # fmt: skip


def write(
    u: Tensor,
    first: int,
    support: Support,
    head: Head,
    coefficients: Coefficients,
    on: Tensor,
    out: Tensor,
) -> None:
    (count, width), k = u.shape, support.ids.shape[1]
    if not count:
        return
    options = launch(width, support_block(k), u.device)
    own, factor, pull, on_grad = coefficients
    packed = torch.stack([own, factor, torch.zeros_like(own) if pull is None else pull], 1)
    with on_device(u.device):
        rows.write_kernel[(count,)](
            u, out, support.ids, on_grad.contiguous(), support.active, packed, on,
            u if head.bias is None else head.bias,
            u.stride(0), out.stride(0), min(u.stride(0), out.stride(0)), first, width, k,
            **_head_arguments(head), SPREAD=pull is not None, **options,
        )  # fmt: skip
