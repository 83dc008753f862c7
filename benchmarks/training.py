"""One optimizer step on Qwen3 shapes with random weights: the fused loss against dense logits.

A step is forward, backward and update of one micro-batch: a pack of sequences of 4096 tokens, of
which the first eighth, the prompt, has no loss. Weights are bf16, gradient checkpointing is on,
gradients are not clipped. `lopd.training.step.step` is compared with the same step on
`model(...).logits`. In this order:

1. The gate: on a tiny model of the family, loss and gradients of the fused and the dense step
   agree. A failed gate ends the part.
2. Peak memory of each variant, then interleaved timing. `without head` is the same step, but its
   loss is the sum of the loss rows and of the head's weight: no GEMM of the head, the same backbone
   and the same update. The additional time of the other variants is that of the head: its products
   and the loss.
3. `lopd plan` beside the measured peak, with a loss on every token and with stored gradients, as in
   accumulation, because that is what a plan includes.
4. The largest micro-batch that fits, found by steps that do or do not run out of memory.
"""

from __future__ import annotations

import tempfile
import time
from collections.abc import Callable
from dataclasses import asdict, replace
from functools import partial
from typing import Any

import numpy as np
import torch
from torch import Tensor

from benchmarks.clock import Prepared, take_turns
from benchmarks.harness import classify, dtype_name, exceeded, one_line
from benchmarks.projects import tail_bucket
from benchmarks.qwen3 import (
    ADAMW,
    MIB,
    MODELS,
    STATELESS,
    TOY,
    Job,
    Loss,
    Size,
    build,
    make_sequences,
)
from benchmarks.recorder import Recorder
from lopd.config.objective import Objective
from lopd.config.training import MemorySettings
from lopd.models.flops import mfu, peak_flops, size_of, step_flops
from lopd.models.head import run_with_loss
from lopd.models.packing import check_packing, pack_attention
from lopd.training.batch import Batch, Collator, to_device
from lopd.training.dry_run import meta_model
from lopd.training.memory import MemoryPlanner
from lopd.training.step import model_inputs, step

TRIES = 8  # largest number of steps in a search
FP32_BOUNDS = {"loss_error": 1e-5, "gradient_error": 1e-4}
OBJECTIVE = Objective("reverse_kl")
NOTES = {
    STATELESS: "SGD, which has no state: AdamW's would take 4 bytes a parameter more",
    ADAMW: "AdamW, states in bf16",
}


# the losses


def fused(model: Any, batch: Batch, num_items: float) -> Tensor:
    return step(model, batch, OBJECTIVE, num_items)[0]


def dense(model: Any, batch: Batch, num_items: float, *, loss_rows: bool = False) -> Tensor:
    """The loss from the model's own logits, of all tokens or only of the loss rows."""
    inputs, index = model_inputs(batch), batch["loss_index"]
    if loss_rows:
        logits = model(**inputs, use_cache=False, logits_to_keep=index).logits[0]
    else:
        logits = model(**inputs, use_cache=False).logits[0, index]
    teacher = batch["topk_ids"].long(), batch["topk_logprobs"], batch["tail_logprobs"]
    losses = tail_bucket(logits.float(), *teacher)
    return (batch["row_weights"] * losses).sum() / num_items


def without_head(model: Any, batch: Batch, num_items: float) -> Tensor:
    def loss_fn(hidden: Tensor, weight: Tensor, *_: Any) -> Tensor:
        return (hidden[0, batch["loss_index"]].sum() + weight.sum()) / num_items

    return run_with_loss(model, model_inputs(batch), loss_fn)


BASE = "without head"
LOSSES: dict[str, tuple[str, Loss]] = {  # variant -> (kind, loss)
    "fused": ("ours", fused),
    "dense logits": ("peer", dense),
    "dense logits of loss rows": ("peer", partial(dense, loss_rows=True)),
    BASE: ("floor", without_head),
}


# the gate


def gradients(model: Any, loss: Loss, batch: Batch, num_items: float) -> dict[str, Tensor]:
    """Gradients by parameter name, and the loss as `loss`."""
    model.zero_grad()
    value = loss(model, batch, num_items)
    value.backward()
    grads = {name: p.grad.float() for name, p in model.named_parameters()}
    model.zero_grad()
    return {"loss": value.detach().float(), **grads}


def relative_errors(
    values: dict[str, Tensor], exact: dict[str, Tensor]
) -> tuple[float, float, float]:
    """Of the loss, of the worst gradient, and of all gradients as one vector."""
    distance = {name: (values[name] - exact[name]).norm().item() for name in exact}
    norm = {name: max(exact[name].norm().item(), 1e-6) for name in exact}
    loss = distance.pop("loss") / norm.pop("loss")
    whole = np.linalg.norm([*distance.values()]) / np.linalg.norm([*norm.values()])
    return loss, max(distance[name] / norm[name] for name in distance), float(whole)


def gate(model: Any, size: Size, device: torch.device) -> dict[str, Any]:
    """Fused against dense: equal up to rounding in fp32; in bf16 as close to fp32 as dense is.

    `model` is a bf16 model of this size; the fp32 model has the same weights.
    """
    batch = to_device(Collator(packed=True)(make_sequences(size, 3, size.prompt)), device)
    inputs = batch, batch["row_weights"].sum().item()
    wide = build(size, device, torch.float32)
    pack_attention(wide, "sdpa")
    wide.load_state_dict(model.state_dict())
    exact = gradients(wide, dense, *inputs)
    rows = relative_errors(gradients(wide, partial(dense, loss_rows=True), *inputs), exact)
    ours = relative_errors(gradients(wide, fused, *inputs), exact)
    dense_16, ours_16 = (
        relative_errors(gradients(model, loss, *inputs), exact)[2] for loss in (dense, fused)
    )
    errors = {
        "loss_error": max(ours[0], rows[0]),
        "gradient_error": max(ours[1], rows[1]),
        "bf16_gradient_error": ours_16,
        "dense_bf16_gradient_error": dense_16,
    }
    bounds = {**FP32_BOUNDS, "bf16_gradient_error": max(1.25 * dense_16, 3e-3)}
    return {**errors, "red": exceeded(errors, bounds)}


def choose_attention(recorder: Recorder, part: str, model: Any) -> str:
    """The pack attention that a run selects by default; if it fails, a red row, and sdpa."""
    try:
        path = pack_attention(model)
        check_packing(model, path)
    except Exception as error:
        reason = one_line(error)
        recorder.emit(part, "attention of packs", "failed", kind="ours", reason=reason)
        path = pack_attention(model, "sdpa")
        check_packing(model, path)
    return path


# memory


def largest_fitting(
    fits: Callable[[int], bool | None], first: int, tries: int, good: int = 0
) -> tuple[int, int | None, int]:
    """(largest count that fits, smallest that does not, number of tries).

    The stride from `first` doubles until one count fits and one does not; then the interval is
    halved, down to a sixteenth. `fits` returns None if there is no time to try, which ends the
    search.
    """
    bad, stride, count, tried = None, max(1, first // 8), first, 0
    while tried < tries and (bad is None or bad - good > max(1, good // 16)):
        if (fitted := fits(count)) is None:
            break
        tried += 1
        good, bad = (count, bad) if fitted else (good, count)
        if bad is not None and good:
            count = (good + bad) // 2
        else:
            count = good + stride if bad is None else max(1, bad - stride)
            stride *= 2
    return good, bad, tried


def search(job: Job, loss: Loss, sequence_s: float, deadline: float) -> dict[str, Any]:
    """The largest micro-batch in sequences; the search starts from the peaks of 1 and 2.

    Raises:
        RuntimeError: a step failed for another reason than memory.
    """
    peaks: dict[int, float | None] = {}
    end = min(deadline, time.monotonic() + job.size.search_s)

    def fits(count: int) -> bool | None:
        if time.monotonic() + count * sequence_s > end:
            return None
        result = job.attempt(lambda: job.prepare(loss, *job.batch(count)).step())
        if result["status"] not in ("ok", "out of memory"):
            raise RuntimeError(result["reason"])
        peaks[count] = result["peak_mib"]
        return result["status"] == "ok"

    good, bad, tried = largest_fitting(fits, 1, 2)
    expected = None
    if good == 2:
        one, two = peaks[1], peaks[2]
        if one is not None and two is not None and two > one:
            free, _ = torch.cuda.mem_get_info(job.device)
            room = free + torch.cuda.memory_reserved(job.device) - job.before
            expected = 1 + int((room / MIB - one) / (two - one))
        affordable = int((end - time.monotonic()) / sequence_s)
        first = max(3, min(expected or 4, affordable))
        most = TRIES if job.device.type == "cuda" else 2
        good, bad, more = largest_fitting(fits, first, most, good=2)
        tried += more
    return {
        "largest_sequences": good if tried else None,
        "too_many_sequences": bad,  # null: not found within the time and tries
        "extrapolated_sequences": expected,
        "tries": tried,
        "largest_peak_mib": peaks.get(good),
    }


def planned(job: Job) -> dict[str, Any]:
    """The memory that `lopd plan` predicts for one pack, in MiB by part, and the measured peak."""
    size = job.size
    with tempfile.TemporaryDirectory() as folder:
        size.config().save_pretrained(folder)
        settings = MemorySettings(
            dtype="bfloat16",
            sequence_length=size.length,
            max_tokens_per_batch=size.length,
            gradient_checkpointing=True,
            optim=size.optim,
            k=size.topk,
        )
        parts = MemoryPlanner(meta_model(folder, "bfloat16")).estimate(settings)
    inputs = job.pack(make_sequences(size, 1, prompt=1))

    def accumulate() -> None:
        for _ in range(2):
            job.reset_peak()
            fused(job.model, *inputs).backward()

    result, total = job.attempt(accumulate), parts.total / MIB
    peak = result["peak_mib"]
    return {
        **result,
        "planned_mib": {name: round(count / MIB, 1) for name, count in vars(parts).items()},
        "planned_total_mib": round(total, 1),
        "difference": None if peak is None else round(peak / total - 1, 4),
    }


# the part


def run(recorder: Recorder, part: str, name: str, quick: bool, budget_s: float) -> None:
    size, device = MODELS[name], recorder.device
    toy = replace(size, **TOY)
    model = build(toy, device, torch.bfloat16)
    attention = choose_attention(recorder, part, model)
    errors = gate(model, toy, device)
    red = errors.pop("red")
    recorder.emit(
        part, "fused against dense", "red gate" if red else "ok", kind="ours", **errors,
        **({"reason": "; ".join(red)} if red else {}),
    )  # fmt: skip
    del model
    if red:
        return
    size = toy if quick else size
    job = Job(size, device, attention)
    fields = {
        "model": "toy" if quick else f"Qwen3-{name} shape",
        **{key: value for key, value in asdict(size).items() if key != "search_s"},
        "parameters": sum(p.numel() for p in job.model.parameters()),
        "dtype": dtype_name(torch.bfloat16),
        "attention": attention,
        "gradient_checkpointing": True,
        "prompt_share": size.prompt / size.length,
        "note": NOTES[size.optim],
    }
    times = compare(recorder, part, job, fields, budget_s)
    recorder.check_time()
    plan = planned(job)
    recorder.emit(part, "planned peak", plan.pop("status"), kind="ours", **{**fields, **plan})
    for variant, seconds in times.items():
        recorder.check_time()
        kind, loss = LOSSES[variant]
        result = {"status": "ok"}
        try:
            result |= search(job, loss, seconds / size.sequences, recorder.deadline)
        except RuntimeError as error:
            result = {"status": "failed", "reason": one_line(error)}
        label = f"{variant}, largest micro-batch"
        recorder.emit(part, label, result.pop("status"), kind=kind, **{**fields, **result})


def compare(
    recorder: Recorder, part: str, job: Job, fields: dict[str, Any], budget_s: float
) -> dict[str, float]:
    """Emit rows with peak and time; return median seconds of the variants with a head."""
    batch, num_items = job.batch(job.size.sequences)
    job.prepare(without_head, batch, num_items).step()  # creates the optimizer state
    ready: dict[str, Prepared] = {}
    peaks: dict[str, dict[str, Any]] = {}
    for variant, (kind, loss) in LOSSES.items():
        recorder.check_time()
        prepared = job.prepare(loss, batch, num_items)
        result = job.attempt(prepared.step)
        if result["status"] == "ok":
            ready[variant], peaks[variant] = prepared, result
        else:
            recorder.emit(part, variant, result.pop("status"), kind=kind, **{**fields, **result})
    times, failures = take_turns(ready, job.device, budget_s, recorder.deadline)
    base = times.get(BASE, {}).get("median_ms")
    for variant, result in peaks.items():
        row = {**fields, "kind": LOSSES[variant][0], "peak_mib": result["peak_mib"]}
        if (error := failures.get(variant)) is not None:
            recorder.emit(part, variant, classify(error), **row, reason=one_line(error))
            continue
        middle = times[variant]["median_ms"]
        row |= {**times[variant], **rates(job, batch, middle, has_head=variant != BASE)}
        if base is not None and variant != BASE:
            row |= {"head_ms": middle - base, "head_share": 1.0 - base / middle}
        recorder.emit(part, variant, "ok", **row)
    return {name: each["median_ms"] / 1e3 for name, each in times.items() if name != BASE}


def rates(job: Job, batch: Batch, milliseconds: float, has_head: bool) -> dict[str, Any]:
    """Tokens per second, including prompts, and the utilisation by `lopd.models.flops`."""
    device, size = job.device, size_of(job.model)
    assert size is not None
    name = torch.cuda.get_device_name(device) if device.type == "cuda" else "cpu"
    peak, lengths = peak_flops(name, torch.bfloat16), batch["sequence_lengths"]
    loss_tokens = len(batch["labels"])
    flops = step_flops(size, lengths, loss_tokens if has_head else 0)
    seconds = milliseconds / 1e3
    return {
        "tokens": sum(lengths),
        "loss_tokens": loss_tokens,
        "tokens_per_s": sum(lengths) / seconds,
        "mfu": None if peak is None else mfu(flops, seconds, peak),
    }
