"""One optimizer step on Qwen3 shapes: the fused loss against dense logits, random weights.

A step is forward, backward and update of one micro-batch, a pack of sequences of 4096 tokens of
which the first eighth, the prompt, bears no loss; weights are bf16, gradient checkpointing is on,
gradients are not clipped. `lopd.training.step.step` runs against the same step on
`model(...).logits`.
In this order:

1. the gate: on a tiny model of the family, loss and gradients of the fused and the dense step
   agree; a red one ends the part.
2. peak memory and, taking turns, time of each. `without head` is the same step with the sum of
   the loss rows and of the head's weight for a loss: no GEMM of the head, the same backbone and
   the same update. What a step takes beyond it is the head's, products and loss together.
3. `lopd plan` beside the measured peak, with every token bearing loss and gradients held, as in
   accumulation: that is what a plan counts.
4. the largest micro-batch that fits, from steps that ran out of memory or did not.
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
from benchmarks.harness import classify, excess, one_line, short
from benchmarks.projects import tail_bucket
from benchmarks.qwen3 import ADAMW, MIB, MODELS, STATELESS, TOY, Job, Loss, Size, build, make_items
from benchmarks.rows import Recorder
from lopd.models.flops import mfu, peak_flops, size_of, step_flops
from lopd.models.head import run_with_loss
from lopd.models.packing import check_packing, pack_attention
from lopd.training.batch import Batch, Collator, to_device
from lopd.training.dry_run import meta_model
from lopd.training.memory import MemoryPlanner, MemorySettings
from lopd.training.objective import Objective
from lopd.training.step import model_inputs, step

TRIES = 8  # micro-batches that a search may run
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
    """From the model's own logits, of all tokens or of the loss rows alone."""
    inputs, index = model_inputs(batch), batch["loss_index"]
    if loss_rows:
        logits = model(**inputs, use_cache=False, logits_to_keep=index).logits[0]
    else:
        logits = model(**inputs, use_cache=False).logits[0, index]
    given = batch["topk_ids"].long(), batch["topk_logprobs"], batch["tail_logprobs"]
    losses = tail_bucket(logits.float(), *given)
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
    """By parameter, and the loss among them."""
    model.zero_grad()
    value = loss(model, batch, num_items)
    value.backward()
    grads = {name: p.grad.float() for name, p in model.named_parameters()}
    model.zero_grad()
    return {"loss": value.detach().float(), **grads}


def off(found: dict[str, Tensor], exact: dict[str, Tensor]) -> tuple[float, float, float]:
    """Relative errors: of the loss, of the worst gradient, of all gradients as one vector."""
    distance = {name: (found[name] - exact[name]).norm().item() for name in exact}
    norm = {name: max(exact[name].norm().item(), 1e-6) for name in exact}
    loss = distance.pop("loss") / norm.pop("loss")
    whole = np.linalg.norm([*distance.values()]) / np.linalg.norm([*norm.values()])
    return loss, max(distance[name] / norm[name] for name in distance), float(whole)


def gate(model: Any, size: Size, device: torch.device) -> dict[str, Any]:
    """Fused against dense: in fp32 to rounding; in bf16 no further from fp32 than dense is.

    `model` is a bf16 one of this size; the fp32 one has the same weights.
    """
    batch = to_device(Collator(packed=True)(make_items(size, 3, size.prompt)), device)
    given = batch, batch["row_weights"].sum().item()
    wide = build(size, device, torch.float32)
    pack_attention(wide, "sdpa")
    wide.load_state_dict(model.state_dict())
    exact = gradients(wide, dense, *given)
    rows = off(gradients(wide, partial(dense, loss_rows=True), *given), exact)
    own = off(gradients(wide, fused, *given), exact)
    dense_16, own_16 = (off(gradients(model, loss, *given), exact)[2] for loss in (dense, fused))
    found = {
        "loss_error": max(own[0], rows[0]),
        "gradient_error": max(own[1], rows[1]),
        "bf16_gradient_error": own_16,
        "dense_bf16_gradient_error": dense_16,
    }
    bounds = {**FP32_BOUNDS, "bf16_gradient_error": max(1.25 * dense_16, 3e-3)}
    return {**found, "red": excess(found, bounds)}


def attend(recorder: Recorder, part: str, model: Any) -> str:
    """The attention of packs that a run takes by itself; where that fails, a red row and sdpa."""
    try:
        path = pack_attention(model)
        check_packing(model, path)
    except Exception as error:
        why = one_line(error)
        recorder.emit(part, "attention of packs", "failed", kind="ours", reason=why)
        path = pack_attention(model, "sdpa")
        check_packing(model, path)
    return path


# memory


def largest(
    fits: Callable[[int], bool | None], first: int, tries: int, good: int = 0
) -> tuple[int, int | None, int]:
    """(largest count that fitted, smallest that did not, how many were tried).

    Strides from `first` that double until one fitted and one did not, then halves of what lies
    between, to a sixteenth. `fits` says None where there is no time to tell, which ends it.
    """
    bad, stride, count, tried = None, max(1, first // 8), first, 0
    while tried < tries and (bad is None or bad - good > max(1, good // 16)):
        if (found := fits(count)) is None:
            break
        tried += 1
        good, bad = (count, bad) if found else (good, count)
        if bad is not None and good:
            count = (good + bad) // 2
        else:
            count = good + stride if bad is None else max(1, bad - stride)
            stride *= 2
    return good, bad, tried


def search(job: Job, loss: Loss, sequence_s: float, deadline: float) -> dict[str, Any]:
    """The largest micro-batch, in sequences; the peaks of 1 and 2 say where to look.

    Raises RuntimeError for a step that fails in another way than by memory.
    """
    peaks: dict[int, float | None] = {}
    end = min(deadline, time.monotonic() + job.size.search_s)

    def fits(count: int) -> bool | None:
        if time.monotonic() + count * sequence_s > end:
            return None
        found = job.attempt(lambda: job.prepare(loss, *job.batch(count)).step())
        if found["status"] not in ("ok", "out of memory"):
            raise RuntimeError(found["reason"])
        peaks[count] = found["peak_mib"]
        return found["status"] == "ok"

    good, bad, tried = largest(fits, 1, 2)
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
        good, bad, more = largest(fits, first, most, good=2)
        tried += more
    return {
        "largest_sequences": good if tried else None,
        "too_many_sequences": bad,  # null: not found in the time and tries that it had
        "extrapolated_sequences": expected,
        "tries": tried,
        "largest_peak_mib": peaks.get(good),
    }


def planned(job: Job) -> dict[str, Any]:
    """What `lopd plan` says of one pack, in MiB by part, and what it took."""
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
    given = job.pack(make_items(size, 1, prompt=1))

    def accumulate() -> None:
        for _ in range(2):
            job.forget_peak()
            fused(job.model, *given).backward()

    found, total = job.attempt(accumulate), parts.total / MIB
    peak = found["peak_mib"]
    return {
        **found,
        "planned_mib": {name: round(count / MIB, 1) for name, count in vars(parts).items()},
        "planned_total_mib": round(total, 1),
        "difference": None if peak is None else round(peak / total - 1, 4),
    }


# the part


def run(recorder: Recorder, part: str, name: str, quick: bool, budget_s: float) -> None:
    size, device = MODELS[name], recorder.device
    toy = replace(size, **TOY)
    model = build(toy, device, torch.bfloat16)
    attention = attend(recorder, part, model)
    found = gate(model, toy, device)
    red = found.pop("red")
    recorder.emit(
        part, "fused against dense", "red gate" if red else "ok", kind="ours", **found,
        **({"reason": "; ".join(red)} if red else {}),
    )  # fmt: skip
    del model
    if red:
        return
    size = toy if quick else size
    job = Job(size, device, attention)
    here = {
        "model": "toy" if quick else f"Qwen3-{name} shape",
        **{key: value for key, value in asdict(size).items() if key != "search_s"},
        "parameters": sum(p.numel() for p in job.model.parameters()),
        "dtype": short(torch.bfloat16),
        "attention": attention,
        "gradient_checkpointing": True,
        "prompt_share": size.prompt / size.length,
        "note": NOTES[size.optim],
    }
    times = compare(recorder, part, job, here, budget_s)
    recorder.check_time()
    found = planned(job)
    recorder.emit(part, "planned peak", found.pop("status"), kind="ours", **{**here, **found})
    for variant, seconds in times.items():
        recorder.check_time()
        kind, loss = LOSSES[variant]
        found = {"status": "ok"}
        try:
            found |= search(job, loss, seconds / size.sequences, recorder.deadline)
        except RuntimeError as error:
            found = {"status": "failed", "reason": one_line(error)}
        label = f"{variant}, largest micro-batch"
        recorder.emit(part, label, found.pop("status"), kind=kind, **{**here, **found})


def compare(
    recorder: Recorder, part: str, job: Job, here: dict[str, Any], budget_s: float
) -> dict[str, float]:
    """Rows of peak and time; median seconds of the variants that have a head."""
    batch, num_items = job.batch(job.size.sequences)
    job.prepare(without_head, batch, num_items).step()  # the optimizer's state is there from now on
    ready: dict[str, Prepared] = {}
    peaks: dict[str, dict[str, Any]] = {}
    for variant, (kind, loss) in LOSSES.items():
        recorder.check_time()
        prepared = job.prepare(loss, batch, num_items)
        found = job.attempt(prepared.step)
        if found["status"] == "ok":
            ready[variant], peaks[variant] = prepared, found
        else:
            recorder.emit(part, variant, found.pop("status"), kind=kind, **{**here, **found})
    times, failures = take_turns(ready, job.device, budget_s, recorder.deadline)
    base = times.get(BASE, {}).get("median_ms")
    for variant, found in peaks.items():
        row = {**here, "kind": LOSSES[variant][0], "peak_mib": found["peak_mib"]}
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
    """Tokens per second, prompts included, and the utilisation by `lopd.models.flops`."""
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
