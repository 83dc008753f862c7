"""Measurement: correctness gate, memory, interleaved timing, rows.

`measure` takes competing variants of one problem. In this order:

1. It runs each variant once and compares value and gradients with the fp64 oracle of the
   variant's own loss. A variant that fails its gate gets a row that says so and is not timed. If
   the gate uses only some of the rows, the timed step is also compared with bare GEMMs over all.
2. It runs each variant separately for its memory: the peak allocated during one forward and
   backward, minus what was allocated before. `extra` is that minus the returned dH and dW. An fp32
   accumulator of dW is extra. cuBLAS's own workspace is allocated before and not counted.
3. It warms up, then times the variants in alternation, in another order each turn: 5 to 30 steps
   each as the budget permits, with flushed caches before each step and CUDA events around it. It
   reports the median, 10th and 90th percentile. Three fields show a disturbed run: `drift`, the
   median of a variant's last steps over that of its first; `allocator_retries`, how often memory
   ran out during the timing and the allocator returned its cache to the device; `clocks`, read
   afterwards.

On a CPU the clock is perf_counter and memory is null.
"""

from __future__ import annotations

import gc
from collections.abc import Callable
from dataclasses import asdict, dataclass
from typing import Any

import torch
from torch import Tensor

from benchmarks.clock import Outcome, Prepared, take_turns
from benchmarks.problems import (
    REVERSE_KL,
    Exact,
    Problem,
    loss_error,
    oracle,
    relative_error,
    wide_mm,
)
from benchmarks.recorder import Recorder

SANITY = 1.0  # a larger error than this is worse than a gradient of zeros
ERRORS = ("dhidden_error", "dweight_error", "loss_error", "row_loss_error")
GATED = ("ours", "peer")


@dataclass(frozen=True)
class Variant:
    name: str
    kind: str  # ours | peer | floor | piece (a component); the last two are not gated
    loss: str  # a loss of problems.py, or what is timed instead
    prepare: Callable[[Problem], Prepared]
    logits: str = "fp32"  # lowest precision of the logits before the loss
    note: str = ""
    bytes_per_logit: int = 0  # memory of one step per element of [N, V]; 0: independent of it
    missing: Callable[[Problem], str] = lambda problem: ""  # why it cannot run here, if so
    row_losses: Callable[[Problem], Tensor] | None = None  # [N], for the gate
    check: Callable[[Problem], dict[str, Any]] | None = None  # replaces `gate`
    gemms: int = 3  # GEMMs of 2 N D V operations; compared with floors of the same count
    bytes_moved: Callable[[Problem], float] | None = None
    setting: str = "full"  # | frozen | buffer


def gradient_bound(dtype: torch.dtype, rounding: float) -> float:
    """Bound on the relative Frobenius error.

    `rounding` is the error of rounding dz and the gradient itself, and nothing else.
    """
    if dtype == torch.bfloat16:
        return max(1.25 * rounding, 3e-3)
    return {torch.float16: 1e-3, torch.float32: 1e-5}[dtype]


def errors_of(outcome: Outcome, exact: Exact) -> dict[str, float | None]:
    pairs = (outcome.dhidden, exact.dhidden), (outcome.dweight, exact.dweight)
    dhidden, dweight = (None if a is None else relative_error(a, b) for a, b in pairs)
    assert outcome.loss is not None
    loss = loss_error(outcome.loss, exact.losses.mean())
    return {"dhidden_error": dhidden, "dweight_error": dweight, "loss_error": loss}


def gate(variant: Variant, problem: Problem, exact: Exact) -> dict[str, Any]:
    """The errors of one step; `red` lists those that exceed their bounds.

    Ours: gradients within `gradient_bound`; the loss of every row within 1e-5 (1 + |L|), or
    within 1.25 times the error that the GEMM library with fp32 output causes.
    """
    prepared = variant.prepare(problem)
    prepared.restore()
    errors: dict[str, Any] = errors_of(prepared.step(), exact)
    bounds = [SANITY] * 4
    if variant.kind == "ours":
        loss = max(1e-5, 1.25 * exact.gemm)
        bounds = [gradient_bound(problem.dtype, each) for each in exact.rounding] + [loss, loss]
    if variant.row_losses is not None:
        errors["row_loss_error"] = loss_error(variant.row_losses(problem), exact.losses)
    return {**errors, "red": exceeded(errors, dict(zip(ERRORS, bounds, strict=True)))}


def exceeded(errors: dict[str, Any], bounds: dict[str, float]) -> list[str]:
    """The errors that are above their bound or NaN."""
    return [
        f"{key} {errors[key]:.1e} above {bound:.1e}"
        for key, bound in bounds.items()
        if errors.get(key) is not None and not errors[key] <= bound
    ]


def free_memory(device: torch.device) -> None:
    """Collect garbage and return cached memory to the device."""
    if device.type == "cuda":
        gc.collect()
        torch.cuda.synchronize(device)
        torch.cuda.empty_cache()


def measure_memory(prepared: Prepared, device: torch.device) -> dict[str, float | None]:
    """Memory of one step in MiB, beyond what was allocated before it."""
    keys = ("peak_mib", "dhidden_mib", "dweight_mib", "extra_mib", "reserved_mib")
    if device.type != "cuda":
        return dict.fromkeys(keys)
    prepared.restore()
    free_memory(device)
    before, reserved = torch.cuda.memory_allocated(device), torch.cuda.memory_reserved(device)
    torch.cuda.reset_peak_memory_stats(device)
    outcome = prepared.step()
    torch.cuda.synchronize(device)
    peak = torch.cuda.max_memory_allocated(device) - before
    grads = [outcome.dhidden, None if outcome.is_buffer else outcome.dweight]
    sizes = [0 if grad is None else grad.nbytes for grad in grads]
    newly_reserved = torch.cuda.max_memory_reserved(device) - reserved
    values = (peak, *sizes, peak - sum(sizes), newly_reserved)
    return {key: round(value / 2**20, 2) for key, value in zip(keys, values, strict=True)}


def fit_to_memory(variant: Variant, problem: Problem) -> Problem:
    """The problem, or its first rows if the variant's step would exceed the free memory."""
    if problem.device.type != "cuda" or not variant.bytes_per_logit:
        return problem
    free, _ = torch.cuda.mem_get_info(problem.device)
    rows = int(0.85 * free / (variant.bytes_per_logit * problem.shape.vocab))
    rows = max(256, rows - rows % 256)
    return problem if rows >= problem.shape.rows else problem.rows(slice(0, rows))


def dtype_name(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")


def problem_fields(problem: Problem) -> dict[str, Any]:
    return {
        **asdict(problem.shape),
        "dtype": dtype_name(problem.dtype),
        "regime": problem.regime,
    }


def measure(
    recorder: Recorder,
    part: str,
    problem: Problem,
    variants: list[Variant],
    *,
    budget_s: float = 1.5,
    gate_rows: int | None = None,  # rows of the problem that the gate uses; None: all
    timed: bool = True,
    **fields: Any,
) -> list[dict[str, Any]]:
    """Measure all variants and return their rows.

    `floor_ratio` is the time over that of the fastest floor with the same number of GEMMs.
    """
    gate_problem = problem if gate_rows is None else problem.rows(slice(0, gate_rows))
    rows: list[dict[str, Any]] = []

    def emit(variant: Variant, status: str, row: dict[str, Any]) -> None:
        rows.append(recorder.emit(part, variant.name, status, **row))

    ready: dict[str, tuple[Variant, Prepared, dict[str, Any]]] = {}
    for variant, row in run_gates(recorder, gate_problem, problem, variants, fields, timed, emit):
        recorder.check_time()
        free_memory(problem.device)
        try:
            all_rows = gate_problem is not problem
            prepared = prepare_variant(variant, problem, row, check_all_rows=all_rows)
        except Exception as error:
            emit(variant, classify(error), row | {"reason": one_line(error)})
            continue
        if row.get("reason"):
            emit(variant, "red gate", row)
            continue
        ready[variant.name] = variant, prepared, row
    free_memory(problem.device)
    steps = {name: prepared for name, (_, prepared, _) in ready.items()}
    times, failures = take_turns(steps, problem.device, budget_s, recorder.deadline)
    floors: dict[int, float] = {}
    for name, (variant, _, _) in ready.items():
        if variant.kind == "floor" and name in times:
            median = times[name]["median_ms"]
            floors[variant.gemms] = min(floors.get(variant.gemms, median), median)
    for name, (variant, _, row) in ready.items():
        if name in failures:
            error = failures[name]
            emit(variant, classify(error), row | {"reason": one_line(error)})
            continue
        row |= times[name]
        complete = row["rows"] == problem.shape.rows
        row |= rates(variant, problem, row, floors.get(variant.gemms) if complete else None)
        emit(variant, "ok", row)
    return rows


def run_gates(
    recorder: Recorder,
    gate_problem: Problem,
    problem: Problem,
    variants: list[Variant],
    fields: dict[str, Any],
    timed: bool,
    emit: Callable[[Variant, str, dict[str, Any]], None],
) -> list[tuple[Variant, dict[str, Any]]]:
    """Variants that passed their gate and are to be timed, in their order, with their rows."""
    passed: list[tuple[Variant, dict[str, Any]]] = []
    oracles: dict[str, Exact] = {}
    for variant in sorted(variants, key=lambda variant: variant.loss):
        recorder.check_time()
        status, errors = check_variant(variant, gate_problem, oracles)
        row = {**problem_fields(problem), **variant_fields(variant), **fields, **errors}
        if timed and status == "ok":
            passed.append((variant, row))
        else:
            emit(variant, status, row)
    passed.sort(key=lambda each: variants.index(each[0]))
    return passed


def prepare_variant(
    variant: Variant, problem: Problem, row: dict[str, Any], check_all_rows: bool
) -> Prepared:
    """Run a variant once, then once for its memory; extend its row."""
    fitting = fit_to_memory(variant, problem)
    prepared = variant.prepare(fitting)
    prepared.restore()
    outcome = prepared.step()
    if check_all_rows and variant.kind == "ours" and variant.loss == REVERSE_KL:
        row |= compare_with_gemms(outcome, problem)
    del outcome
    if variant.kind in GATED:
        row |= measure_memory(prepared, problem.device)
    if fitting is not problem:
        row["note"] += f"; on {fitting.shape.rows} rows, {problem.shape.rows} do not fit"
        row["rows"] = fitting.shape.rows
    return prepared


def compare_with_gemms(outcome: Outcome, problem: Problem) -> dict[str, Any]:
    """Compare gradients of the mean reverse KL with GEMMs on the dense dz of all rows.

    The gate's oracle uses few rows, which a schedule may process in one chunk; this check covers
    every chunk of the timed step. Both sides round dz and the result, so the bound is twice that
    of the gate.
    """
    if outcome.dhidden is None:
        return {}
    count, dz = problem.shape.rows, problem.dlogits
    errors = {"full_dhidden_error": relative_error(count * outcome.dhidden, dz @ problem.weight)}
    if outcome.dweight is not None:
        exact = wide_mm(dz.t(), problem.hidden)
        errors["full_dweight_error"] = relative_error(count * outcome.dweight, exact)
    bound = 2 * gradient_bound(problem.dtype, 0.0)
    return {**errors, "reason": "; ".join(exceeded(errors, dict.fromkeys(errors, bound)))}


def rates(
    variant: Variant, problem: Problem, row: dict[str, Any], floor: float | None
) -> dict[str, Any]:
    milliseconds, shape = row["median_ms"], problem.shape
    operations = 2.0 * variant.gemms * row["rows"] * shape.hidden * shape.vocab
    moved = None if variant.bytes_moved is None else variant.bytes_moved(problem)
    return {
        "floor_ratio": milliseconds / floor if floor else None,
        "tokens_per_s": 1e3 * row["rows"] / milliseconds,
        "tflops": operations / milliseconds * 1e-9 if variant.gemms else None,
        "tb_per_s": None if moved is None else moved / milliseconds * 1e-9,
    }


def variant_fields(variant: Variant) -> dict[str, Any]:
    return {
        "kind": variant.kind,
        "loss": variant.loss,
        "logits": variant.logits,
        "note": variant.note,
        "setting": variant.setting,
        "gemms": variant.gemms,
    }


def check_variant(
    variant: Variant, problem: Problem, oracles: dict[str, Exact]
) -> tuple[str, dict[str, Any]]:
    """The status, and the errors of the gate with the reason if the variant stops here."""
    reason = variant.missing(problem)
    if reason:
        return "unavailable", {"reason": reason}
    if variant.kind not in GATED:
        return "ok", {}
    try:
        if variant.check is not None:
            errors = variant.check(problem)
        else:
            if variant.loss not in oracles:
                oracles.clear()  # only one at a time: they are large
                free_memory(problem.device)
                oracles[variant.loss] = oracle(problem, variant.loss)
            errors = gate(variant, problem, oracles[variant.loss])
    except Exception as error:
        return classify(error), {"reason": one_line(error)}
    red = errors.pop("red")
    return ("red gate", {**errors, "reason": "; ".join(red)}) if red else ("ok", errors)


def classify(error: Exception) -> str:
    if isinstance(error, torch.cuda.OutOfMemoryError) or "CUBLAS_STATUS_ALLOC" in str(error):
        return "out of memory"
    refused = isinstance(error, ValueError) and "workspace_bytes" in str(error)
    return "refused" if refused else "failed"


def one_line(error: Exception) -> str:
    return f"{type(error).__name__}: {' '.join(str(error).split())}"[:300]


def is_red(row: dict[str, Any]) -> bool:
    """Whether a row makes the run fail: one of our variants is wrong or broken."""
    return row.get("kind") == "ours" and row["status"] in ("red gate", "failed")
