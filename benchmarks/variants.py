"""Competing variants: our losses, bare GEMMs, eager PyTorch, and the peers.

Each computes the mean over the rows with an upstream gradient of one, which is the fastest case of
the peers, and returns fresh gradients of hidden states and weight in the inputs' dtype. A peer that
is not installed gives a row that says so.
"""

from __future__ import annotations

import functools
import importlib.util
from collections.abc import Callable
from functools import partial
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from benchmarks.clock import Outcome, Prepared
from benchmarks.harness import Variant
from benchmarks.problems import (
    CROSS_ENTROPY,
    DENSE_KL,
    FORWARD_KL,
    FORWARD_TRUNCATED,
    POLICY_GRADIENT,
    RENORMALIZED,
    REVERSE_KL,
    Problem,
    wide_mm,
)
from benchmarks.projects import (
    advantage_times_logprob,
    bucket_forward,
    eager,
    eager_renormalised,
    full,
    in_chunks,
    renormalised,
    tail_bucket,
    teacher,
    truncated_forward,
)
from lopd_kernels import (
    linear_cross_entropy,
    linear_policy_gradient,
    linear_sparse_divergence,
)

Loss = Callable[[Problem, Tensor, Tensor], Tensor]  # (problem, hidden, weight) -> mean loss
FORMS: dict[str, dict[str, Any]] = {
    REVERSE_KL: {},
    RENORMALIZED: {"tail": "renormalize"},
    FORWARD_KL: {"divergence": "forward_kl"},
    FORWARD_TRUNCATED: {"divergence": "forward_kl", "tail": "truncate"},
}
EAGER_BYTES = 26  # per logit: bf16 and fp32 logits, log-softmax, and their gradients


def backward(
    loss: Loss, problem: Problem, *, frozen: bool = False, buffer: Tensor | None = None
) -> Prepared:
    """One forward and backward from fresh leaves."""

    def step() -> Outcome:
        hidden = problem.hidden.detach().requires_grad_()
        weight = problem.weight.detach().requires_grad_(not frozen)
        value = loss(problem, hidden, weight)
        value.backward()
        dweight = weight.grad if buffer is None else buffer
        return Outcome(value.detach(), hidden.grad, dweight, is_buffer=buffer is not None)

    return Prepared(step) if buffer is None else Prepared(step, buffer.zero_)


# ours


def sparse(
    problem: Problem,
    hidden: Tensor,
    weight: Tensor,
    row_weights: float | None = None,
    **options: Any,
) -> Tensor:
    if row_weights is not None:
        options["row_weights"] = torch.full_like(problem.tail, row_weights)
    return linear_sparse_divergence(
        hidden, weight, problem.ids, problem.logprobs, tail_logprobs=problem.tail,
        **{"reduction": "mean", "validate": False, **options},
    )  # fmt: skip


def ours(
    name: str,
    loss: str = REVERSE_KL,
    *,
    frozen: bool = False,
    buffered: bool = False,
    **options: Any,
) -> Variant:
    """`linear_sparse_divergence` with the arguments of the given loss."""
    options = {**FORMS[loss], **options}

    def prepare(problem: Problem) -> Prepared:
        buffer = problem.buffer if buffered else None
        run = partial(sparse, **options, weight_grad_buffer=buffer)
        return backward(run, problem, frozen=frozen, buffer=buffer)

    @torch.no_grad()
    def rows(problem: Problem) -> Tensor:
        changed = {**options, "reduction": "none", "row_weights": None}
        return sparse(problem, problem.hidden, problem.weight, **changed)

    setting = "frozen" if frozen else "buffer" if buffered else "full"
    gemms = 2 if frozen else 3
    return Variant(name, "ours", loss, prepare, row_losses=rows, gemms=gemms, setting=setting)


def ours_policy_gradient(problem: Problem, hidden: Tensor, weight: Tensor) -> Tensor:
    return linear_policy_gradient(
        hidden, weight, problem.labels, problem.label_logprobs, reduction="mean", validate=False
    )


def ours_cross_entropy(problem: Problem, hidden: Tensor, weight: Tensor) -> Tensor:
    return linear_cross_entropy(hidden, weight, problem.labels, validate=False)


# floors: bare GEMMs on the same operands


def bare(problem: Problem, logits_dtype: torch.dtype, frozen: bool = False) -> Prepared:
    """H W^T, dz W and dz^T H, each on one [N, V], into preallocated memory."""
    hidden, weight, dz = problem.hidden, problem.weight, problem.dlogits
    logits = hidden.new_empty(dz.shape, dtype=logits_dtype)
    dhidden, dweight = torch.empty_like(hidden), torch.empty_like(weight)

    def step() -> Outcome:
        project(hidden, weight, logits)
        torch.mm(dz, weight, out=dhidden)
        if not frozen:
            torch.mm(dz.t(), hidden, out=dweight)
        return Outcome()

    return Prepared(step)


def project(hidden: Tensor, weight: Tensor, out: Tensor) -> None:
    """out = H W^T, accumulated in fp32 and stored in the dtype of `out`."""
    if out.dtype == hidden.dtype:
        torch.mm(hidden, weight.t(), out=out)
    elif hidden.is_cuda:
        torch.mm(hidden, weight.t(), out_dtype=out.dtype, out=out)
    else:
        out.copy_(wide_mm(hidden, weight.t()))


def floors(*counts: str) -> list[Variant]:
    """Bare GEMMs, `three` or `two`, with fp32 and with bf16 logits."""
    return [
        Variant(
            f"{count} GEMMs, {name} logits", "floor", f"bare {count} GEMMs",
            partial(bare, logits_dtype=dtype, frozen=count == "two"), name,
            gemms=2 if count == "two" else 3,
        )
        for count in counts
        for name, dtype in (("fp32", torch.float32), ("bf16", torch.bfloat16))
    ]  # fmt: skip


# eager PyTorch


def narrow_loss(hidden: Tensor, weight: Tensor, *inputs: Tensor) -> Tensor:
    return tail_bucket((hidden @ weight.t()).float(), *inputs).mean()


def eager_wide(problem: Problem, hidden: Tensor, weight: Tensor) -> Tensor:
    return tail_bucket(hidden.float() @ weight.float().t(), *teacher(problem)).mean()


def eager_cross_entropy(problem: Problem, hidden: Tensor, weight: Tensor) -> Tensor:
    return F.cross_entropy((hidden @ weight.t()).float(), problem.labels)


@functools.cache
def compile_loss() -> Callable[..., Tensor]:
    return torch.compile(narrow_loss, dynamic=False)


def compiled(problem: Problem, hidden: Tensor, weight: Tensor) -> Tensor:
    return compile_loss()(hidden, weight, *teacher(problem))


# peers


def torch_cross_entropy(problem: Problem, hidden: Tensor, weight: Tensor) -> Tensor:
    options = torch.nn.LinearCrossEntropyOptions()
    return F.linear_cross_entropy(hidden, weight, problem.labels, options=options)


def liger_cross_entropy(problem: Problem, hidden: Tensor, weight: Tensor, chunks: int) -> Tensor:
    from liger_kernel.transformers.functional import liger_fused_linear_cross_entropy

    return liger_fused_linear_cross_entropy(
        hidden, weight, problem.labels, reduction="mean", chunk_mem_const=chunks
    )


def liger_jsd(problem: Problem, hidden: Tensor, weight: Tensor) -> Tensor:
    from liger_kernel.transformers.fused_linear_jsd import LigerFusedLinearJSD

    loss = LigerFusedLinearJSD(jsd_beta=1.0)
    return loss(hidden, weight, problem.teacher_hidden, problem.weight, None)


def liger_chunked(problem: Problem, hidden: Tensor, weight: Tensor) -> Tensor:
    from liger_kernel.chunked_loss import LigerFusedLinearJSDLoss

    loss = LigerFusedLinearJSDLoss(weight_hard_loss=0.0, weight_soft_loss=1.0, beta=1.0)
    return loss(hidden, weight, problem.teacher_hidden, problem.weight, problem.labels)


def cut_cross_entropy(
    problem: Problem, hidden: Tensor, weight: Tensor, filter_eps: str | None
) -> Tensor:
    from cut_cross_entropy import linear_cross_entropy as cut

    return cut(hidden, weight, problem.labels, filter_eps=filter_eps, reduction="mean")


def on_cuda_only(problem: Problem) -> str:
    return "" if problem.device.type == "cuda" else "runs on CUDA only"


def needs(module: str) -> Callable[[Problem], str]:
    def missing(problem: Problem) -> str:
        if importlib.util.find_spec(module) is None:
            return f"{module} is not installed"
        return on_cuda_only(problem)

    return missing


def needs_torch(problem: Problem) -> str:
    if hasattr(F, "linear_cross_entropy") and hasattr(torch.nn, "LinearCrossEntropyOptions"):
        return ""
    return f"torch {torch.__version__} has no chunked linear_cross_entropy"


def peer(name: str, loss: str, function: Loss, logits: str = "bf16", **rest: Any) -> Variant:
    return Variant(name, "peer", loss, partial(backward, function), logits=logits, **rest)


def eager_variants() -> list[Variant]:
    size = {"bytes_per_logit": EAGER_BYTES}
    return [
        peer("eager, bf16 logits", REVERSE_KL, eager, **size),
        peer("eager, fp32 logits", REVERSE_KL, eager_wide, "fp32", **size),
        peer("torch.compile, bf16 logits", REVERSE_KL, compiled, missing=on_cuda_only, **size),
        peer("eager, 1024-row chunks", REVERSE_KL, partial(in_chunks, tail_bucket, rows=1024)),
        peer("eager, 256-row fp32 chunks", REVERSE_KL,
             partial(in_chunks, tail_bucket, rows=256, wide=True), "fp32"),
        peer("eager cross-entropy", CROSS_ENTROPY, eager_cross_entropy, **size),
    ]  # fmt: skip


def project_variants() -> list[Variant]:
    """The losses of other OPD projects; each note names the projects that use it."""
    size = {"bytes_per_logit": EAGER_BYTES}
    return [
        peer("sampled token", POLICY_GRADIENT, partial(full, advantage_times_logprob),
             note="as Lightning OPD, slime and tinker", **size),
        peer("top-k forward KL", FORWARD_TRUNCATED, partial(full, truncated_forward),
             note="as verl", **size),
        peer("top-k forward KL, 1024-row chunks", FORWARD_TRUNCATED,
             partial(in_chunks, truncated_forward, rows=1024), note="as VeOmni"),
        peer("top-k and tail forward KL", FORWARD_KL, partial(full, bucket_forward),
             note="as TRL with a teacher server, Megatron-LM and DistillKit", **size),
        peer("renormalised top-k", RENORMALIZED, eager_renormalised,
             note="as NeMo-RL and ms-swift", **size),
        peer("renormalised top-k, 1024-row chunks", RENORMALIZED,
             partial(in_chunks, renormalised, rows=1024), note="as axolotl"),
    ]  # fmt: skip


def peer_variants() -> list[Variant]:
    nearest = "nearest primitive: cross-entropy, there is no sparse-teacher loss"
    dense = "nearest primitive: reverse KL to dense teacher logits, which it computes as well"
    liger = needs("liger_kernel")
    return [
        peer("torch linear_cross_entropy", CROSS_ENTROPY, torch_cross_entropy, note=nearest,
             missing=needs_torch),
        *(
            peer(f"Liger cross-entropy, C={chunks}", CROSS_ENTROPY,
                 partial(liger_cross_entropy, chunks=chunks), note=nearest, missing=liger)
            for chunks in (1, 8, 16)
        ),
        peer("Liger fused linear JSD", DENSE_KL, liger_jsd, "fp32", note=dense, missing=liger),
        peer("Liger chunked distillation", DENSE_KL, liger_chunked, note=dense, missing=liger),
        *(
            peer(name, CROSS_ENTROPY, partial(cut_cross_entropy, filter_eps=eps), "fp32",
                 note=nearest, missing=needs("cut_cross_entropy"))
            for name, eps in (("Cut Cross-Entropy", "high"), ("Cut Cross-Entropy, exact", None))
        ),
    ]  # fmt: skip


def our_variants() -> list[Variant]:
    return [
        ours("ours"),
        ours("ours, 8 GiB", workspace_bytes=8 << 30),
        ours("ours, gradient buffer", buffered=True),
        ours("ours, frozen weight", frozen=True),
        ours("ours, renormalised top-k", RENORMALIZED),
        ours("ours, forward KL", FORWARD_KL),
        ours("ours, top-k forward KL", FORWARD_TRUNCATED),
        Variant("ours, policy gradient", "ours", POLICY_GRADIENT,
                partial(backward, ours_policy_gradient)),
        Variant("ours, cross-entropy", "ours", CROSS_ENTROPY,
                partial(backward, ours_cross_entropy)),
    ]  # fmt: skip


def competitors() -> list[Variant]:
    others = [*eager_variants(), *project_variants(), *peer_variants()]
    return [*floors("three", "two"), *our_variants(), *others]


def divergences() -> list[Variant]:
    """Variants of the `accuracy` part: every divergence, and ours with tiny row weights."""
    small = ours("ours, weights of 1e-6", row_weights=1e-6)
    variants = [small, *our_variants(), *eager_variants(), *peer_variants()]
    return [each for each in variants if each.loss in (REVERSE_KL, DENSE_KL)]


def curve(workspaces: list[int]) -> list[Variant]:
    return [
        ours(f"ours{name}, {size / 2**20:g} MiB", buffered=bool(name), workspace_bytes=size)
        for name in ("", ", gradient buffer")
        for size in workspaces
    ]


def scaling() -> list[Variant]:
    """Variants for shapes other than the target: one of each kind."""
    peers = ("eager, bf16 logits", "Liger cross-entropy, C=16")
    variants = [*floors("three"), ours("ours"), *eager_variants(), *peer_variants()]
    return [each for each in variants if each.kind != "peer" or each.name in peers]
