"""The one way in which this project measures: gate, memory, interleaved time, rows.

`measure` takes competing variants of one problem and, in this order,

1. runs each once and compares value and gradients with the fp64 oracle of its own loss.
   A variant that misses its gate gets a row that says so and is not timed. Where the gate
   looks at some of the rows, what is timed is compared with bare GEMMs over all of them.
2. runs each alone for its memory: peak allocated during one forward and backward, less
   what was allocated before; `extra` is that less the returned dH and dW. An fp32
   accumulator of dW is extra. cuBLAS's own workspace is there before and not counted.
3. warms up, then lets them take turns, in another order each turn: 5 to 30 steps each as its
   budget admits, the caches flushed before each step, CUDA events around it; median, 10th and
   90th percentile. Three fields tell a disturbed run: `drift`, the median of a variant's last
   steps over that of its first; `allocator_retries`, how often memory ran out and the
   allocator gave its cache back to the device amid the timing; `clocks`, after it.

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
from benchmarks.rows import Recorder

SANITY = 1.0  # a peer whose gradient is further off is worse than zeros
ERRORS = ("dhidden_error", "dweight_error", "loss_error", "row_loss_error")
GATED = ("ours", "peer")


@dataclass(frozen=True)
class Variant:
    name: str
    kind: str  # ours | peer | floor | piece; the last two are not gated
    loss: str  # a loss of problems.py, or what is timed in its place
    prepare: Callable[[Problem], Prepared]
    logits: str = "fp32"  # what logits pass through on their way to the loss
    note: str = ""
    bytes_per_logit: int = 0  # memory of one step per element of [N, V]; 0 does not depend on it
    missing: Callable[[Problem], str] = lambda problem: ""  # why it cannot run here
    row_losses: Callable[[Problem], Tensor] | None = None  # [N], for the gate
    check: Callable[[Problem], dict[str, Any]] | None = None  # a gate of its own, as `gate`
    gemms: int = 3  # of 2 N D V operations that the loss takes; floors are compared by it
    bytes_moved: Callable[[Problem], float] | None = None
    setting: str = "full"  # | frozen | buffer


def gradient_bound(dtype: torch.dtype, rounding: float) -> float:
    """Largest relative Frobenius error of a gradient; `rounding` is that of dz in the dtype."""
    if dtype == torch.bfloat16:
        return max(1.25 * rounding, 3e-3)
    return {torch.float16: 1e-3, torch.float32: 1e-5}[dtype]


def errors(outcome: Outcome, exact: Exact) -> dict[str, float | None]:
    pairs = (outcome.dhidden, exact.dhidden), (outcome.dweight, exact.dweight)
    dhidden, dweight = (None if a is None else relative_error(a, b) for a, b in pairs)
    assert outcome.loss is not None
    loss = loss_error(outcome.loss, exact.losses.mean())
    return {"dhidden_error": dhidden, "dweight_error": dweight, "loss_error": loss}


def gate(variant: Variant, problem: Problem, exact: Exact) -> dict[str, Any]:
    """The errors of one step, and in `red` what exceeds its bound.

    Ours: gradients within `gradient_bound`, every row's loss within 1e-5 (1 + |L|), or 1.25
    times the error that the library's own GEMM with fp32 output leaves in it.
    """
    prepared = variant.prepare(problem)
    prepared.restore()
    found: dict[str, Any] = errors(prepared.step(), exact)
    bounds = [SANITY] * 4
    if variant.kind == "ours":
        loss = max(1e-5, 1.25 * exact.gemm)
        bounds = [gradient_bound(problem.dtype, off) for off in exact.rounding] + [loss, loss]
    if variant.row_losses is not None:
        found["row_loss_error"] = loss_error(variant.row_losses(problem), exact.losses)
    return {**found, "red": excess(found, dict(zip(ERRORS, bounds, strict=True)))}


def excess(found: dict[str, Any], bounds: dict[str, float]) -> list[str]:
    """What is above its bound, or NaN."""
    return [
        f"{key} {found[key]:.1e} above {bound:.1e}"
        for key, bound in bounds.items()
        if found.get(key) is not None and not found[key] <= bound
    ]


def collect(device: torch.device) -> None:
    """Give back what nothing refers to any more."""
    if device.type == "cuda":
        gc.collect()
        torch.cuda.synchronize(device)
        torch.cuda.empty_cache()


def memory(prepared: Prepared, device: torch.device) -> dict[str, float | None]:
    """MiB of one step beyond what was allocated before it."""
    keys = ("peak_mib", "dhidden_mib", "dweight_mib", "extra_mib", "reserved_mib")
    if device.type != "cuda":
        return dict.fromkeys(keys)
    prepared.restore()
    collect(device)
    before, reserved = torch.cuda.memory_allocated(device), torch.cuda.memory_reserved(device)
    torch.cuda.reset_peak_memory_stats(device)
    outcome = prepared.step()
    torch.cuda.synchronize(device)
    peak = torch.cuda.max_memory_allocated(device) - before
    grads = [outcome.dhidden, None if outcome.given else outcome.dweight]
    sizes = [0 if grad is None else grad.nbytes for grad in grads]
    held = torch.cuda.max_memory_reserved(device) - reserved
    values = (peak, *sizes, peak - sum(sizes), held)
    return {key: round(value / 2**20, 2) for key, value in zip(keys, values, strict=True)}


def fitting(variant: Variant, problem: Problem) -> Problem:
    """The problem, or its first rows where the variant's step would not fit the free memory."""
    if problem.device.type != "cuda" or not variant.bytes_per_logit:
        return problem
    free, _ = torch.cuda.mem_get_info(problem.device)
    rows = int(0.85 * free / (variant.bytes_per_logit * problem.shape.vocab))
    rows = max(256, rows - rows % 256)
    return problem if rows >= problem.shape.rows else problem.rows(slice(0, rows))


def short(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")


def describe_problem(problem: Problem) -> dict[str, Any]:
    return {
        **asdict(problem.shape),
        "dtype": short(problem.dtype),
        "regime": problem.regime,
    }


def measure(
    recorder: Recorder,
    part: str,
    problem: Problem,
    variants: list[Variant],
    *,
    budget_s: float = 1.5,
    gate_rows: int | None = None,  # rows of the problem that the gate looks at; None: all
    timed: bool = True,
    **fields: Any,
) -> list[dict[str, Any]]:
    """Rows of all variants.

    `floor_ratio` is the time over that of the fastest floor among them with as many GEMMs.
    """
    gated = problem if gate_rows is None else problem.rows(slice(0, gate_rows))
    done: list[dict[str, Any]] = []
    passed: list[tuple[Variant, dict[str, Any]]] = []
    oracles: dict[str, Exact] = {}
    for variant in sorted(variants, key=lambda variant: variant.loss):
        recorder.check_time()
        here = {**describe_problem(problem), **told(variant), **fields}
        status, found = admit(variant, gated, oracles)
        if timed and status == "ok":
            passed.append((variant, {**here, **found}))
        else:
            done.append(recorder.emit(part, variant.name, status, **here, **found))
    oracles.clear()
    passed.sort(key=lambda each: variants.index(each[0]))
    ready: dict[str, Prepared] = {}
    kept: list[tuple[Variant, dict[str, Any]]] = []
    for variant, here in passed:
        recorder.check_time()
        collect(problem.device)
        try:
            prepared = get_ready(variant, problem, here, at_full_size=gated is not problem)
        except Exception as error:
            here |= {"reason": one_line(error)}
            done.append(recorder.emit(part, variant.name, classify(error), **here))
            continue
        if here.get("reason"):
            done.append(recorder.emit(part, variant.name, "red gate", **here))
            continue
        ready[variant.name] = prepared
        kept.append((variant, here))
    collect(problem.device)
    times, failures = take_turns(ready, problem.device, budget_s, recorder.deadline)
    floors: dict[int, float] = {}
    for variant, _ in kept:
        if variant.kind == "floor" and variant.name in times:
            found = times[variant.name]["median_ms"]
            floors[variant.gemms] = min(floors.get(variant.gemms, found), found)
    for variant, here in kept:
        if variant.name in failures:
            error = failures[variant.name]
            here |= {"reason": one_line(error)}
            done.append(recorder.emit(part, variant.name, classify(error), **here))
            continue
        here |= times[variant.name]
        whole = here["rows"] == problem.shape.rows
        here |= rates(variant, problem, here, floors.get(variant.gemms) if whole else None)
        done.append(recorder.emit(part, variant.name, "ok", **here))
    return done


def get_ready(
    variant: Variant, problem: Problem, row: dict[str, Any], at_full_size: bool
) -> Prepared:
    """Run a variant once, then once for its memory; adds to the row."""
    some = fitting(variant, problem)
    prepared = variant.prepare(some)
    prepared.restore()
    outcome = prepared.step()
    if at_full_size and variant.kind == "ours" and variant.loss == REVERSE_KL:
        row |= off_bare_gemms(outcome, problem)
    del outcome
    if variant.kind in GATED:
        row |= memory(prepared, problem.device)
    if some is not problem:
        row["note"] += f"; on {some.shape.rows} rows, {problem.shape.rows} do not fit"
        row["rows"] = some.shape.rows
    return prepared


def off_bare_gemms(outcome: Outcome, problem: Problem) -> dict[str, Any]:
    """Gradients of the mean reverse KL against GEMMs on the dense dz of all rows.

    The gate's oracle looks at few rows, which a schedule may take in one piece; this is the
    step that is timed, with every chunk of it. Both sides round dz and the result, so the
    bound is twice the gate's.
    """
    if outcome.dhidden is None:
        return {}
    count, dz = problem.shape.rows, problem.dlogits
    found = {"full_dhidden_error": relative_error(count * outcome.dhidden, dz @ problem.weight)}
    if outcome.dweight is not None:
        exact = wide_mm(dz.t(), problem.hidden)
        found["full_dweight_error"] = relative_error(count * outcome.dweight, exact)
    bound = 2 * gradient_bound(problem.dtype, 0.0)
    return {**found, "reason": "; ".join(excess(found, dict.fromkeys(found, bound)))}


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


def told(variant: Variant) -> dict[str, Any]:
    return {
        "kind": variant.kind,
        "loss": variant.loss,
        "logits": variant.logits,
        "note": variant.note,
        "setting": variant.setting,
        "gemms": variant.gemms,
    }


def admit(
    variant: Variant, problem: Problem, oracles: dict[str, Exact]
) -> tuple[str, dict[str, Any]]:
    """(status, errors of the gate and, where the variant goes no further, the reason)"""
    reason = variant.missing(problem)
    if reason:
        return "unavailable", {"reason": reason}
    if variant.kind not in GATED:
        return "ok", {}
    try:
        if variant.check is not None:
            found = variant.check(problem)
        else:
            if variant.loss not in oracles:
                oracles.clear()  # one at a time, they are large
                collect(problem.device)
                oracles[variant.loss] = oracle(problem, variant.loss)
            found = gate(variant, problem, oracles[variant.loss])
    except Exception as error:
        return classify(error), {"reason": one_line(error)}
    red = found.pop("red")
    return ("red gate", {**found, "reason": "; ".join(red)}) if red else ("ok", found)


def classify(error: Exception) -> str:
    if isinstance(error, torch.cuda.OutOfMemoryError) or "CUBLAS_STATUS_ALLOC" in str(error):
        return "out of memory"
    refused = isinstance(error, ValueError) and "workspace_bytes" in str(error)
    return "refused" if refused else "failed"


def one_line(error: Exception) -> str:
    return f"{type(error).__name__}: {' '.join(str(error).split())}"[:300]


def is_red(row: dict[str, Any]) -> bool:
    """Rows that make a run fail: ours, wrong or broken."""
    return row.get("kind") == "ours" and row["status"] in ("red gate", "failed")
