"""Components of one loss call timed separately, and variants of a teacher's scoring pass."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager
from dataclasses import replace
from functools import partial
from typing import Any

import torch
from torch import Tensor

from benchmarks.clock import Outcome, Prepared
from benchmarks.harness import SANITY, Variant, exceeded
from benchmarks.problems import REVERSE_KL, Problem, loss_error, row_losses, wide_mm
from benchmarks.variants import ours, project
from lopd_kernels import linear_topk
from lopd_kernels._core import chunks
from lopd_kernels._core.backend import row_functions
from lopd_kernels._core.gemm import in_place, operand_dtype
from lopd_kernels._core.rules import DivergenceRule, teacher_buckets
from lopd_kernels._core.types import STATS, LogitOptions
from lopd_kernels._core.workspace import padded

# Of the form that reads the logits once: columns of a program, warps, registers of a thread.
ONE_PASS_SWEEP = ((4096, 4, 80), (8192, 8, 88), (16384, 8, 128))
SWEEP = ((1024, 4), (2048, 4), (2048, 16), (4096, 8), (4096, 16), (8192, 16), (8192, 32))


def component(name: str, step: Callable[[Problem], Callable[[], Any]], **rest: Any) -> Variant:
    def prepare(problem: Problem) -> Prepared:
        run = step(problem)
        return Prepared(lambda: Outcome(run()))

    return Variant(name, "piece", name, prepare, **rest)


def gemm_1(problem: Problem, dtype: torch.dtype) -> Callable[[], Any]:
    out = problem.hidden.new_empty(problem.dlogits.shape, dtype=dtype)
    return lambda: project(problem.hidden, problem.weight, out)


def gemm_2(problem: Problem) -> Callable[[], Any]:
    out = torch.empty_like(problem.hidden)
    return lambda: torch.mm(problem.dlogits, problem.weight, out=out)


def gemm_3(problem: Problem) -> Callable[[], Any]:
    out = torch.empty_like(problem.weight)
    return lambda: torch.mm(problem.dlogits.t(), problem.hidden, out=out)


def time_row_kernel(problem: Problem, logits: Tensor) -> tuple[Callable[[], None], Tensor]:
    """The row kernel on fp32 logits [R, V], in place, and the tensor of its statistics."""
    vocab, functions = problem.shape.vocab, row_functions(problem.hidden)
    listed_ids = functions.locate(problem.ids, None, vocab)
    target = teacher_buckets(problem.ids, problem.logprobs, problem.tail, vocab).logprobs
    rule, logit_options = DivergenceRule("reverse_kl", "bucket"), LogitOptions()
    weights = torch.ones_like(problem.tail)
    stats = logits.new_zeros((len(logits), len(STATS)))
    dz = in_place(logits, operand_dtype(problem.hidden))

    def run() -> None:
        functions.row_pass(
            logits, listed_ids, target, weights, rule, logit_options, False, stats, dz
        )

    return run, stats


@contextmanager
def launched_as(block: int | None, warps: int) -> Iterator[None]:
    """Replace the launch table by this one entry."""
    if block is None:
        yield
        return
    from lopd_kernels._triton import rows as triton_rows

    original = dict(triton_rows.LAUNCHES)
    triton_rows.LAUNCHES.clear()
    triton_rows.LAUNCHES[None] = triton_rows.Launch(block, warps, original[None].maxnreg)
    try:
        yield
    finally:
        triton_rows.LAUNCHES.clear()
        triton_rows.LAUNCHES.update(original)


def launch_sweep() -> list[Variant]:
    """The row kernel with block sizes and warps that are not in the table."""
    return [row_kernel(block, warps) for block, warps in SWEEP]


def row_kernel(block: int | None = None, warps: int = 8) -> Variant:
    """2 reads of fp32 logits and one 16-bit write: 10 bytes for each of N V elements.

    `block` and `warps` replace the entry of the launch table, to search for better ones.
    """
    name = "row kernel" if block is None else f"row kernel, BLOCK={block}, {warps} warps"
    return _row_pass(name, partial(launched_as, block, warps), 10.0)


@contextmanager
def reading_once(launch: tuple[int, int, int] | None) -> Iterator[None]:
    """Let several programs share a row, launched as the table says or with these settings."""
    from lopd_kernels._triton import one_pass

    table = one_pass.LAUNCHES
    one_pass.ENABLED = True
    if launch is not None:
        one_pass.LAUNCHES = dict.fromkeys(table, one_pass.Launch(*launch))
    try:
        yield
    finally:
        one_pass.ENABLED, one_pass.LAUNCHES = False, table


def one_pass(launch: tuple[int, int, int] | None = None) -> Variant:
    """One read and one 16-bit write: 6 bytes; `launch` is (BLOCK, warps, registers)."""
    settings = "" if launch is None else ", BLOCK={}, {} warps, {} registers".format(*launch)
    return _row_pass(f"one pass{settings}", partial(reading_once, launch), 6.0)


def in_one_pass(variant: Variant) -> Variant:
    """The variant with the row pass that reads the logits once."""

    def prepare(problem: Problem) -> Prepared:
        prepared = variant.prepare(problem)

        def step() -> Outcome:
            with reading_once(None):
                return prepared.step()

        return Prepared(step, prepared.restore)

    return replace(variant, name=f"{variant.name}, one pass", prepare=prepare)


def _row_pass(
    name: str, form: Callable[[], AbstractContextManager[None]], bytes_per_logit: float
) -> Variant:
    def prepare(problem: Problem) -> Prepared:
        vocab = problem.shape.vocab
        source = wide_mm(problem.hidden, problem.weight.t())
        logits = source.new_empty((len(source), padded(vocab)))[:, :vocab]
        run, stats = time_row_kernel(problem, logits)

        def step() -> Outcome:
            with form():
                run()
            return Outcome(stats[:, 0])

        return Prepared(step, lambda: logits.copy_(source))

    def check(problem: Problem) -> dict[str, Any]:
        prepared = prepare(problem)
        prepared.restore()
        losses = prepared.step().loss
        assert losses is not None
        logits = wide_mm(problem.hidden, problem.weight.t()).double()
        exact = row_losses(REVERSE_KL, logits, problem, problem.weight)
        errors: dict[str, Any] = {"row_loss_error": loss_error(losses, exact)}
        return {**errors, "red": exceeded(errors, {"row_loss_error": 1e-5})}

    return Variant(
        name, "ours", REVERSE_KL, prepare, check=check, gemms=0,
        bytes_moved=lambda problem: bytes_per_logit * problem.shape.rows * problem.shape.vocab,
    )  # fmt: skip


def in_chunks_of(rows: int) -> Variant:
    """Our loss with chunks of this many rows, whatever the device would choose."""
    chosen = ours(f"ours, chunks of {rows} rows")

    def prepare(problem: Problem) -> Prepared:
        step = chosen.prepare(problem).step

        def changed() -> Outcome:
            original = chunks.chunk_rows
            chunks.chunk_rows = lambda sizes, *_: min(rows, sizes.n)  # type: ignore[assignment]
            try:
                return step()
            finally:
                chunks.chunk_rows = original

        return Prepared(changed)

    return replace(chosen, prepare=prepare)


def copy() -> Variant:
    """A device copy that moves as many bytes as the row kernel."""

    def step(problem: Problem) -> Callable[[], Any]:
        size = 5 * problem.shape.rows * problem.shape.vocab
        source = torch.empty(size, dtype=torch.int8, device=problem.device).fill_(1)
        target = torch.empty_like(source)
        return lambda: target.copy_(source)

    return component(
        "copy", step, gemms=0,
        bytes_moved=lambda problem: 10.0 * problem.shape.rows * problem.shape.vocab,
    )  # fmt: skip


def components() -> list[Variant]:
    return [
        component("GEMM 1, fp32 logits", partial(gemm_1, dtype=torch.float32), gemms=1),
        component("GEMM 1, bf16 logits", partial(gemm_1, dtype=torch.bfloat16), gemms=1),
        row_kernel(),
        component("GEMM 2", gemm_2, gemms=1),
        component("GEMM 3", gemm_3, gemms=1),
        copy(),
    ]


# scoring: the teacher's top-k

Scores = tuple[Tensor, Tensor]  # logprobs [N, K], tail [N]


def scores_full(problem: Problem, rows: int | None = None) -> Scores:
    """bf16 logits, fp32 log-softmax, top-k; `rows` at a time, or all at once."""
    scores = []
    for hidden in problem.hidden.split(rows or problem.shape.rows):
        logprobs = (hidden @ problem.weight.t()).float().log_softmax(1)
        top, _ = logprobs.topk(problem.shape.topk, 1)
        scores.append((top, torch.log1p(-top.exp().sum(1).clamp(max=1.0 - 2.0**-23))))
    top, tail = zip(*scores, strict=True)
    return torch.cat(top), torch.cat(tail)


def scores_ours(problem: Problem, workspace_bytes: int | None = None) -> Scores:
    result = linear_topk(
        problem.hidden, problem.weight, problem.shape.topk, validate=False,
        workspace_bytes=workspace_bytes,
    )  # fmt: skip
    return result.logprobs, result.tail_logprobs


def exact_scores(problem: Problem, logits: Tensor) -> Scores:
    """Scores from fp64 logits [N, V]."""
    logprobs = logits.log_softmax(1)
    top, ids = logprobs.topk(problem.shape.topk, 1)
    return top, logprobs.scatter_(1, ids, -torch.inf).logsumexp(1)


def scorer(name: str, kind: str, score: Callable[[Problem], Scores], **rest: Any) -> Variant:
    def prepare(problem: Problem) -> Prepared:
        @torch.no_grad()
        def step() -> Outcome:
            return Outcome(score(problem)[0])

        return Prepared(step)

    @torch.no_grad()
    def check(problem: Problem) -> dict[str, Any]:
        exact = exact_scores(problem, problem.hidden.double() @ problem.weight.double().t())
        wide = exact_scores(problem, wide_mm(problem.hidden, problem.weight.t()).double())
        pairs = list(zip(score(problem), exact, strict=True))
        errors: dict[str, Any] = {
            key: loss_error(*pair)
            for key, pair in zip(("logprob_error", "tail_error"), pairs, strict=True)
        }
        gemm = max(loss_error(a, b) for a, b in zip(wide, exact, strict=True))
        bound = max(1e-5, 1.25 * gemm) if kind == "ours" else SANITY
        return {**errors, "red": exceeded(errors, dict.fromkeys(errors, bound))}

    return Variant(name, kind, "top-k scoring", prepare, check=check, gemms=1, **rest)


def scorers(workspace_bytes: int) -> list[Variant]:
    project_only = [
        replace(each, kind="floor") for each in components() if each.name.startswith("GEMM 1")
    ]
    bounded = partial(scores_ours, workspace_bytes=workspace_bytes)
    return [
        *project_only,
        scorer("linear_topk", "ours", scores_ours),
        scorer(f"linear_topk, {workspace_bytes / 2**20:g} MiB", "ours", bounded),
        scorer("full logits, top-k", "peer", scores_full, bytes_per_logit=12, logits="bf16"),
        scorer("1024-row chunks, top-k", "peer", partial(scores_full, rows=1024), logits="bf16"),
    ]
