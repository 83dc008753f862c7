"""Every public loss against its definition in fp64, and bitwise equality of repeated runs.

The definition is `lopd_kernels.reference` on the CPU. The problems are small enough for it and
large enough for several blocks of the vocabulary. The gate of each measurement checks the full
size.
"""

from __future__ import annotations

import math
import re
import subprocess
import sys
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

import lopd_kernels
from benchmarks.harness import classify, dtype_name, gradient_bound, one_line
from benchmarks.problems import Problem, Shape, make_problem, relative_error
from benchmarks.recorder import ROOT, Recorder
from lopd_kernels import reference

FULL, QUICK = Shape(96, 136, 4099, 16), Shape(12, 24, 211, 6)
ON_ITS_OWN = "tests/kernels/test_one_pass.py"
DTYPES = (torch.bfloat16, torch.float16, torch.float32)
SHARPEST = 6.0  # near the teacher, the rounding of fp32 logits near 20 costs 1e-5 of the gradient
HEAD = {"logit_scale": 1.3, "softcap": 4.0, "temperature": 0.7}


@dataclass(frozen=True)
class Case:
    """A call of a public function; `options` do not apply to the definition."""

    function: str
    label: str
    inputs: tuple[Any, ...]  # after hidden and weight
    settings: dict[str, Any]
    options: dict[str, Any]


def cases(problem: Problem) -> Iterator[Case]:
    n, k = problem.shape.rows, problem.shape.topk
    generator = torch.Generator(problem.device).manual_seed(1)
    noise = {"generator": generator, "device": problem.device}
    weights = torch.rand(n, **noise) + 0.5
    weights[::5] = 0.0
    rollout = problem.label_logprobs + 0.1 * torch.randn(n, **noise)
    bias = torch.randn(problem.shape.vocab, **noise).to(problem.dtype)
    head = {**HEAD, "bias": bias}
    padded = (
        torch.arange(k, device=problem.device)
        >= torch.arange(n, device=problem.device).unsqueeze(1) % k + 1
    )
    ragged = problem.ids.masked_fill(padded, -1), problem.logprobs.masked_fill(padded, -math.inf)
    full = problem.ids, problem.logprobs
    tail = {"tail_logprobs": problem.tail}

    def sparse(
        label: str,
        inputs: tuple[Tensor, Tensor] = full,
        options: dict[str, Any] | None = None,
        **settings: Any,
    ) -> Case:
        return Case("linear_sparse_divergence", label, inputs, {**tail, **settings}, options or {})

    for divergence in ("reverse_kl", "forward_kl", "jsd"):
        for kind in ("bucket", "renormalize", "truncate", "generalized"):
            yield sparse(
                f"{divergence}, {kind}",
                divergence=divergence,
                tail=kind,
                row_weights=weights,
                **({"beta": 0.3} if divergence == "jsd" else {}),
            )
    unbiased = {
        "tail": "unbiased",
        "sampled_ids": problem.labels,
        "sampled_logprobs": problem.label_logprobs,
        "rollout_logprobs": rollout.clamp(max=0.0),
        "row_weights": weights,
    }
    yield sparse("unbiased", **unbiased)
    yield sparse("unbiased, capped", importance_cap=1.1, **unbiased)
    yield sparse("head options", **head)
    yield sparse("none", reduction="none", row_weights=weights)
    yield sparse("mean", reduction="mean", row_weights=weights)
    yield sparse("weights of 1e-6", options={"upstream": 1e6}, row_weights=1e-6 * weights)
    yield sparse("ragged, derived tail", ragged, tail_logprobs=None)
    yield sparse("gradient buffer", options={"buffer": True})
    yield sparse("smallest workspace", options={"smallest": True}, row_weights=weights)
    yield sparse("frozen weight", options={"frozen": "weight"})
    yield sparse("frozen hidden", options={"frozen": "hidden"})
    sampled = problem.labels, problem.label_logprobs
    for label, settings in {
        "plain": {"advantage_clip": 2.0},
        "token": {"importance": "token", "rollout_logprobs": rollout},
        "truncated": {
            "importance": "token_truncated",
            "importance_cap": 1.1,
            "rollout_logprobs": rollout,
        },
        "clipped": {"clip_range": 0.1, "rollout_logprobs": rollout, "row_weights": weights},
        "head options": head,
    }.items():
        yield Case("linear_policy_gradient", label, sampled, settings, {})
    ignored = problem.labels.clone()
    ignored[::4] = -100
    yield Case("linear_cross_entropy", "mean, ignored labels", (ignored,), {}, {})
    yield Case(
        "linear_cross_entropy", "head options", (problem.labels,), {**head, "reduction": "sum"}, {}
    )
    yield Case("linear_logprobs", "with entropy", (ragged[0],), {"return_entropy": True}, {})
    yield Case("linear_logprobs", "head options", (problem.ids,), head, {})
    ids = {"extra_ids": problem.labels.unsqueeze(1), "sampled_ids": problem.labels}
    yield Case("linear_topk", "top-k", (k,), ids, {})
    for kind in ("bucket", "renormalize", "truncate", "generalized"):
        yield Case(
            "sparse_divergence", kind, full, {**tail, "tail": kind, "row_weights": weights}, {}
        )
    yield Case("sparse_divergence", "unbiased", full, {**tail, **unbiased}, {})


def to_cpu(value: Any) -> Any:
    """The same values in fp64 on the CPU."""
    if isinstance(value, tuple):
        return tuple(map(to_cpu, value))
    if isinstance(value, dict):
        return {key: to_cpu(item) for key, item in value.items()}
    if not isinstance(value, Tensor):
        return value
    return value.cpu().double() if value.is_floating_point() else value.cpu()


def evaluate(
    function: Callable[..., Any], leaves: list[Tensor], case: Case, inputs: Any, settings: Any
) -> list[Tensor]:
    """Values, and gradients of sum_i c_i value_i, with fixed c, for every leaf not frozen."""
    frozen = case.options.get("frozen")
    names = ["logits"] if len(leaves) == 1 else ["hidden", "weight"]
    leaves = [
        x.detach().requires_grad_(name != frozen) for name, x in zip(names, leaves, strict=True)
    ]
    result = function(*leaves, *inputs, **settings)
    if case.function == "linear_topk":
        return [x.detach() for x in result[1:]]
    values = torch.cat(
        [x.reshape(-1) for x in (result if isinstance(result, tuple) else (result,))]
    )
    values = values.masked_fill(values == -math.inf, 0.0)
    scale = torch.cos(torch.arange(len(values), device=values.device, dtype=torch.float64))
    scale *= case.options.get("upstream", 1.0)
    (values * scale.to(values.dtype)).sum().backward()
    buffer = settings.get("weight_grad_buffer")
    grads = [x.grad if x.grad is not None else buffer for x in leaves if x.requires_grad]
    return [values.detach(), *grads]


def leaves_of(problem: Problem, case: Case) -> list[Tensor]:
    if case.function == "sparse_divergence":
        return [problem.hidden @ problem.weight.t()]
    return [problem.hidden, problem.weight]


def call_settings(case: Case, problem: Problem) -> dict[str, Any]:
    """The settings of one call of the fused function."""
    settings = dict(case.settings)
    if case.options.get("buffer"):
        buffer = torch.zeros_like(problem.weight, dtype=torch.float32)
        settings["weight_grad_buffer"] = buffer
    if case.options.get("smallest"):
        settings["workspace_bytes"] = smallest_workspace(case, problem)
    return settings


def smallest_workspace(case: Case, problem: Problem) -> int:
    """The smallest workspace, from the error message."""
    leaves = leaves_of(problem, case)
    try:
        evaluate(
            getattr(lopd_kernels, case.function), leaves, case, case.inputs,
            {**case.settings, "workspace_bytes": 1},
        )  # fmt: skip
    except ValueError as error:
        match = re.search(r"workspace_bytes=(\d+)", str(error))
        if match:
            return int(match[1])
        raise
    raise AssertionError("a workspace of one byte was accepted")


def check(case: Case, problem: Problem, repeats: int) -> dict[str, Any]:
    """Errors of one case; `red` lists those that exceed their bounds."""
    leaves = leaves_of(problem, case)
    function = getattr(lopd_kernels, case.function)
    runs = [
        evaluate(function, leaves, case, case.inputs, call_settings(case, problem))
        for _ in range(repeats)
    ]
    exact = evaluate(
        getattr(reference, case.function),
        to_cpu(tuple(leaves)),
        case,
        to_cpu(case.inputs),
        to_cpu(case.settings),
    )
    count = len(exact) if case.function == "linear_topk" else 1
    slack = problem.shape.rows if exact[0].numel() == 1 else 1.0
    values = list(zip(to_cpu(tuple(runs[0])), exact, strict=True))
    value_errors = [
        float(((a - b).abs() / (slack + b.abs())).nan_to_num(math.inf, math.inf).max())
        for a, b in values[:count]
    ]
    grads = [relative_error(a, b) for a, b in values[count:]]
    bounds = [
        gradient_bound(problem.dtype, relative_error(b.to(problem.dtype), b))
        for _, b in values[count:]
    ]
    red = [f"value off by {x:.1e}" for x in value_errors if not x <= 1e-5]
    red += [
        f"gradient off by {x:.1e} above {bound:.1e}"
        for x, bound in zip(grads, bounds, strict=True)
        if not x <= bound
    ]
    if not all(torch.equal(a, b) for run in runs for a, b in zip(run, runs[0], strict=True)):
        red.append(f"{repeats} runs differ in their bits")
    return {"loss_error": max(value_errors), "gradient_errors": grads, "red": red}


def run_api(recorder: Recorder, quick: bool) -> None:
    """Emit one row per case and dtype."""
    for dtype in DTYPES:
        problem = make_problem(
            QUICK if quick else FULL, dtype, recorder.device, "near", 3, SHARPEST
        )
        for case in cases(problem):
            recorder.check_time()
            repeats = 2 if quick else 20
            name = f"{case.function}: {case.label}, {dtype_name(dtype)}"
            fields = {
                "kind": "ours",
                "dtype": dtype_name(dtype),
                "repetitions": repeats,
            }
            try:
                errors = check(case, problem, repeats)
            except Exception as error:
                recorder.emit(
                    "correctness", name, classify(error), reason=one_line(error), **fields
                )
                continue
            red = errors.pop("red")
            status = "red gate" if red else "ok"
            recorder.emit("correctness", name, status, reason="; ".join(red), **fields, **errors)


def gpu_tests() -> list[str]:
    """Arguments for pytest: only files with GPU tests, because others may need more packages.

    Without `ON_ITS_OWN`, which may wait for ever.
    """
    files = sorted((ROOT / "tests").rglob("test_*.py"))
    marked = [
        str(path.relative_to(ROOT)) for path in files if "mark.gpu" in path.read_text("utf-8")
    ]
    return ["-m", "gpu and not slow", *(name for name in marked if name != ON_ITS_OWN)]


def run_tests(
    recorder: Recorder, log: Path, arguments: list[str], limit_s: float, part: str = "correctness"
) -> str:
    """Run pytest in a subprocess: one row, and its output in `log`. Returns the row's status."""
    command = [sys.executable, "-m", "pytest", "-q", *arguments]
    with log.open("w", encoding="utf-8") as file:
        try:
            code = subprocess.run(
                command, stdout=file, stderr=subprocess.STDOUT, cwd=ROOT, timeout=limit_s
            ).returncode
        except subprocess.TimeoutExpired:
            code = None
    lines = log.read_text(encoding="utf-8").strip().splitlines()
    counts = re.findall(
        r"(\d+) (passed|failed|errors?|skipped|deselected)", lines[-1] if lines else ""
    )
    status = {0: "ok", 5: "no tests", None: "cut off"}.get(code, "failed")
    if code == 1 and "No module named pytest" in "".join(lines):
        status = "unavailable"
    reason = (
        f"after {limit_s:.0f} s" if code is None else lines[-1] if lines and status != "ok" else ""
    )
    recorder.emit(
        part, "pytest " + " ".join(arguments[:2]), status, kind="ours", reason=reason,
        tests={what: int(number) for number, what in counts},
    )  # fmt: skip
    return status
