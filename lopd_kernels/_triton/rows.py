"""`backend.RowFunctions` by the kernels of `kernels/rows.py`, one program per row."""

from __future__ import annotations

from contextlib import AbstractContextManager, nullcontext
from typing import Any, NamedTuple

import torch
import triton
from torch import Tensor

from lopd_kernels._core.rules import DivergenceRule, PolicyGradientRule, Rule, UnbiasedRule
from lopd_kernels._core.types import LogitGrads, LogitOptions, RowState, SplitGrads
from lopd_kernels._core.waves import Gpu, occupancy
from lopd_kernels._triton import one_pass
from lopd_kernels._triton.kernels import rows, rules

WIDEST_LIST_BLOCK = 1024
COLUMNS_PER_WARP = 256


class RawListedIds(NamedTuple):
    """A `types.ListedIds` with the ids as passed: the kernels skip ids that are out of range."""

    ids: Tensor  # [N, K] int
    active: Tensor  # [N] bool: has an id and a weight other than 0
    vocab: int

    def rows(self, part: slice) -> RawListedIds:
        return RawListedIds(self.ids[part], self.active[part], self.vocab)


class Launch(NamedTuple):
    """How a kernel is launched for rows of some width."""

    BLOCK: int
    num_warps: int
    maxnreg: int  # without it ptxas limits itself to 64 registers and spills a few


# By compute capability; None is for devices that are not listed. No entry has been measured yet:
# eight columns per thread compile without spills for every target (tests/kernels/aot.py).
LAUNCHES: dict[tuple[int, int] | None, Launch] = {None: Launch(BLOCK=2048, num_warps=8, maxnreg=96)}

# Registers of `row_kernel`, by what it computes: as compiled for sm_80, sm_90 and sm_100, at most.
REGISTERS = {"plain": 64, "unbiased": 72, "capped": 80}


def launch(width: int, list_block: int, device: torch.device) -> dict[str, int]:
    """The table's entry as options of a launch.

    Narrower rows get a narrower block with as many columns per warp, and as many warps as a
    block of the list needs.
    """
    key = torch.cuda.get_device_capability(device) if device.type == "cuda" else None
    entry = LAUNCHES.get(key, LAUNCHES[None])
    block = min(entry.BLOCK, max(128, triton.next_power_of_2(width)))
    warps = max(entry.num_warps * block // entry.BLOCK, list_block // COLUMNS_PER_WARP, 1)
    options = {"BLOCK": block, "KBLOCK": list_block, "num_warps": warps, "num_stages": 1}
    return options if torch.version.hip else {**options, "maxnreg": entry.maxnreg}


def list_block(buckets: int) -> int:
    return min(WIDEST_LIST_BLOCK, max(16, triton.next_power_of_2(buckets)))


def on_device(device: torch.device) -> AbstractContextManager[Any]:
    """Triton launches on the current device, which may not be the tensors'."""
    return torch.cuda.device(device) if device.type == "cuda" else nullcontext()


def locate(ids: Tensor, row_weights: Tensor | None, vocab: int) -> RawListedIds:
    active = (ids != -1).any(1)
    if row_weights is not None:
        active = active & (row_weights != 0)
    return RawListedIds(ids.contiguous(), active, vocab)


def gpu(
    like: Tensor, width: int, buckets: int, rule: Rule, logit_options: LogitOptions
) -> Gpu | None:
    if not like.is_cuda or torch.version.hip:
        return None
    kind = "unbiased" if isinstance(rule, UnbiasedRule) else "plain"
    registers = REGISTERS["capped" if logit_options.softcap is not None else kind]
    warps = launch(width, list_block(buckets), like.device)["num_warps"]
    multiprocessors = torch.cuda.get_device_properties(like.device).multi_processor_count
    return Gpu(multiprocessors, occupancy(registers, warps))


def nonfinite_rows(hidden: Tensor, weight: Tensor, logit_options: LogitOptions) -> None:
    """The kernels see every logit before it is masked or capped."""


def rule_arguments(rule: Rule) -> dict[str, Any]:
    """A rule as the constants and options of `row_kernel`."""
    options: tuple[float, ...] = ()
    constants: dict[str, Any] = {
        "RULE": "cross_entropy",
        "DIVERGENCE": rules.reverse_kl,
        "SHIFT": 0.0,
        "TAIL": "bucket",
        "FROM_TEACHER": False,
        "IMPORTANCE": "none",
    }
    if isinstance(rule, DivergenceRule):
        options = (rule.beta,)
        constants |= {
            "RULE": "divergence",
            "DIVERGENCE": rules.DIVERGENCES[rule.divergence],
            "SHIFT": rules.SHIFTS[rule.divergence],
            "TAIL": rule.tail,
        }
    elif isinstance(rule, UnbiasedRule):
        options = (rule.importance_cap,)
        constants |= {"RULE": "divergence", "SHIFT": rules.SHIFTS["reverse_kl"], "TAIL": "unbiased"}
    elif isinstance(rule, PolicyGradientRule):
        options = rule.advantage_clip, rule.importance_cap, rule.clip_range
        constants |= {
            "RULE": "policy_gradient",
            "FROM_TEACHER": rule.from_teacher,
            "IMPORTANCE": rule.importance,
        }
    values = (*options, 0.0, 0.0, 0.0)[:3]
    return {**{f"option_{i}": float(value) for i, value in enumerate(values)}, **constants}


def _logit_arguments(logit_options: LogitOptions) -> dict[str, Any]:
    return {
        "gain": logit_options.gain,
        "cap": logit_options.cap,
        "HAS_BIAS": logit_options.bias is not None,
        "SOFTCAP": logit_options.softcap is not None,
    }


def row_pass(
    u: Tensor,
    listed_ids: RawListedIds,
    target: Tensor,
    weights: Tensor | None,
    rule: Rule,
    logit_options: LogitOptions,
    want_entropy: bool,
    stats: Tensor,
    out: Tensor | None,
    inf_masks: bool = False,
    split: SplitGrads | None = None,
) -> None:
    (count, vocab), k = u.shape, listed_ids.ids.shape[1]
    if not count:
        return
    out = u if out is None else out
    listed = u.new_full((count, k), float("-inf"))
    bias = u if logit_options.bias is None else logit_options.bias
    constants = {**_logit_arguments(logit_options), "INF_MASKS": inf_masks}
    with on_device(u.device):
        if one_pass.ENABLED and weights is not None and split is None:
            one_pass.row_pass(
                u, listed_ids.ids, listed_ids.active, listed, target.contiguous(), weights, stats,
                out, bias, list_block(k + 1), constants, rule_arguments(rule), want_entropy,
            )  # fmt: skip
            return
        rows.row_kernel[(count,)](
            u, out, listed_ids.ids, listed, target.contiguous(),
            listed_ids.active, u if weights is None else weights, stats,
            *((u, u) if split is None else (split.unlisted, split.listed)),
            bias, u.stride(0), out.stride(0), min(u.stride(0), out.stride(0)), vocab, k,
            target.shape[1], stats.stride(0),
            **constants, **rule_arguments(rule), ENTROPY=want_entropy, GRAD=weights is not None,
            SPLIT=split is not None, **launch(vocab, list_block(k + 1), u.device),
        )  # fmt: skip


def reduce(
    u: Tensor,
    first: int,
    listed_ids: RawListedIds,
    logit_options: LogitOptions,
    want_entropy: bool,
    state: RowState,
) -> None:
    (count, width), k = u.shape, listed_ids.ids.shape[1]
    if not count:
        return
    options = launch(width, list_block(k), u.device)
    with on_device(u.device):
        rows.reduce_kernel[(count,)](
            u, listed_ids.ids, state.listed, listed_ids.active, state.unlisted,
            u if logit_options.bias is None else logit_options.bias,
            u.stride(0), first, width, listed_ids.vocab, k,
            **_logit_arguments(logit_options), INF_MASKS=False, ENTROPY=want_entropy, **options,
        )  # fmt: skip


def write(
    u: Tensor,
    first: int,
    listed_ids: RawListedIds,
    logit_options: LogitOptions,
    grads: LogitGrads,
    listed: Tensor,
    out: Tensor,
) -> None:
    (count, width), k = u.shape, listed_ids.ids.shape[1]
    if not count:
        return
    options = launch(width, list_block(k), u.device)
    unlisted_max, factor, entropy_factor, listed_grad = grads
    last = torch.zeros_like(factor) if entropy_factor is None else entropy_factor
    with on_device(u.device):
        rows.write_kernel[(count,)](
            u, u, out, listed_ids.ids, listed_grad.contiguous(), listed_ids.active,
            torch.stack([unlisted_max, factor, last], 1), listed,
            u if logit_options.bias is None else logit_options.bias,
            u.stride(0), out.stride(0), min(u.stride(0), out.stride(0)), first, width, k,
            **_logit_arguments(logit_options), ENTROPY=entropy_factor is not None, PICK=False,
            **options,
        )  # fmt: skip


def write_unlisted(
    u: Tensor,
    rows_of_u: Tensor,
    unlisted_max: Tensor,
    factor: Tensor,
    logit_options: LogitOptions,
    out: Tensor,
) -> None:
    count, vocab = out.shape
    if not count:
        return
    options = launch(vocab, list_block(0), u.device)
    no_list = rows_of_u
    with on_device(u.device):
        rows.write_kernel[(count,)](
            u, rows_of_u, out, no_list, factor, torch.ones_like(rows_of_u, dtype=torch.bool),
            torch.stack([unlisted_max, factor, torch.zeros_like(factor)], 1), factor,
            u if logit_options.bias is None else logit_options.bias,
            u.stride(0), out.stride(0), min(u.stride(0), out.stride(0)), 0, vocab, 0,
            **_logit_arguments(logit_options), ENTROPY=False, PICK=True, **options,
        )  # fmt: skip
