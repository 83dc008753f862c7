"""What does lopd cost on a real model, against plain transformers and TRL, on a CPU?

    python -m benchmarks.real_model [--sequences N] [--length N] [--threads N] [--tiny] [--out DIR]

SmolLM2-135M-Instruct (`lopd demo --task smollm2` says how to install it) in float32. In one run:

1. The gate: loss and gradients of the fused and the plain step agree. A failed gate ends the run.
2. Training steps (forward, backward, AdamW) on the same padded batch, interleaved: cross-entropy,
   fused, by the model's own loss, and by `compute_loss` of TRL's SFTTrainer, which forms the logits
   in chunks, and entropy and accuracy from them; and the top-64 reverse KL, fused and on the
   model's logits.
3. Scoring (top 64) against a plain forward with log_softmax and topk; sampling against
   `model.generate`, both at temperature 1 for a fixed number of tokens.

Memory is the peak resident size of a process per variant, minus that before the step: after a first
step, so that the optimizer's state exists, and after the allocator gave back what it had kept. It
has the gradients of all parameters and what the backward pass needs of every layer. One JSON row
per variant goes to DIR/real_model.jsonl, with its ratios to the plain variant of the same part. A
fourth of each sequence is its prompt. `--tiny` takes a random model.
"""

from __future__ import annotations

import argparse
import multiprocessing
import sys
import tempfile
from collections.abc import Callable
from dataclasses import asdict, dataclass
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from benchmarks.clock import Outcome, Prepared, take_turns
from benchmarks.fused_loss import resident_mib
from benchmarks.projects import tail_bucket
from benchmarks.qwen3 import make_sequences
from benchmarks.recorder import Recorder
from benchmarks.training import FP32_BOUNDS, gradients, relative_errors
from lopd.config.inference import Sampling
from lopd.config.objective import Objective
from lopd.engines.transformers import TransformersEngine
from lopd.stages.demo.memory import reset_peak
from lopd.stages.demo.smollm2 import find_gguf, load_gguf
from lopd.training.batch import Batch, Collator
from lopd.training.step import model_inputs, step

NAME = "real_model.jsonl"
MODEL = "SmolLM2-135M-Instruct"
BUDGET_S, MIN_STEPS = 5.0, 3  # of timing per variant
Loss = Callable[[Any, Batch, float], Tensor]


@dataclass(frozen=True)
class Size:
    """A batch; `length` is with the prompt, whose tokens have no loss."""

    sequences: int = 8
    length: int = 128
    prompt: int = 32
    vocab: int = 49152
    topk: int = 64


TINY = Size(sequences=2, length=12, prompt=4, vocab=512, topk=8)


def load(tiny: bool) -> tuple[Any, Any]:
    """Model and tokenizer."""
    if not tiny:
        return load_gguf(find_gguf())
    from tokenizers import Tokenizer, models
    from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

    vocab = {f"t{i}": i for i in range(TINY.vocab)}
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=Tokenizer(models.WordLevel(vocab, unk_token="t3")),
        eos_token="t2",
        pad_token="t2",
    )
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=TINY.vocab, hidden_size=32, intermediate_size=64, num_hidden_layers=2,
        num_attention_heads=2, num_key_value_heads=1, max_position_embeddings=64,
        tie_word_embeddings=True, eos_token_id=2, pad_token_id=2,
    )  # fmt: skip
    return LlamaForCausalLM(config), tokenizer


# training


def fused(model: Any, batch: Batch, num_items: float, *, objective: str) -> Tensor:
    return step(model, batch, Objective(objective), num_items)[0]


def labels_of(batch: Batch) -> Tensor:
    """Labels as transformers shifts them; -100 where there is no loss."""
    labels = torch.full_like(batch["input_ids"], -100).flatten()
    labels[batch["loss_index"] + 1] = batch["labels"]
    return labels.view_as(batch["input_ids"])


def plain_cross_entropy(model: Any, batch: Batch, num_items: float) -> Tensor:
    """The loss that transformers computes from labels."""
    return model(**model_inputs(batch), labels=labels_of(batch), use_cache=False).loss


def plain_reverse_kl(model: Any, batch: Batch, num_items: float) -> Tensor:
    """The list and its tail from the logits of all tokens."""
    logits = model(**model_inputs(batch), use_cache=False).logits.flatten(0, 1)
    rows = logits[batch["loss_index"]].float()
    teacher = batch["topk_ids"].long(), batch["topk_logprobs"], batch["tail_logprobs"]
    return tail_bucket(rows, *teacher).sum() / num_items


def trl_loss(model: Any, tokenizer: Any) -> Loss:
    """`compute_loss` of TRL's SFTTrainer with its default settings."""
    from datasets import Dataset
    from trl import SFTConfig, SFTTrainer

    trainer = SFTTrainer(
        model,
        SFTConfig(
            tempfile.mkdtemp(),
            report_to="none",
            use_cpu=True,
            bf16=False,
            gradient_checkpointing=False,
            disable_tqdm=True,
        ),
        train_dataset=Dataset.from_dict({"input_ids": [[5, 6, 7]]}),
        processing_class=tokenizer,
    )

    def loss(model: Any, batch: Batch, num_items: float) -> Tensor:
        inputs = {**model_inputs(batch), "labels": labels_of(batch)}
        return trainer.compute_loss(model, inputs, num_items_in_batch=None)

    return loss


# variant -> its part
TRAINING = {
    "cross-entropy, fused": "cross-entropy",
    "cross-entropy, transformers": "cross-entropy",
    "cross-entropy, TRL": "cross-entropy",
    "reverse KL, fused": "reverse KL",
    "reverse KL, transformers": "reverse KL",
}
INFERENCE = {
    "scoring, lopd": "scoring",
    "scoring, transformers": "scoring",
    "sampling, lopd": "sampling",
    "sampling, transformers": "sampling",
}
PARTS = TRAINING | INFERENCE


class Bench:
    """The model, a batch, and a step for each variant."""

    def __init__(self, size: Size) -> None:
        self.size = size
        self.model, self.tokenizer = load(size is TINY)
        self.model.train()
        self.optimizer = torch.optim.AdamW(self.model.parameters(), lr=1e-6, fused=True)
        self.items = make_sequences(self.size, self.size.sequences, self.size.prompt)
        self.batch = Collator()(self.items)
        self.num_items = float(self.batch["row_weights"].sum())

    def loss(self, variant: str) -> Loss:
        if variant == "cross-entropy, TRL":
            return trl_loss(self.model, self.tokenizer)
        return {
            "cross-entropy, fused": partial(fused, objective="cross_entropy"),
            "cross-entropy, transformers": plain_cross_entropy,
            "reverse KL, fused": partial(fused, objective="reverse_kl"),
            "reverse KL, transformers": plain_reverse_kl,
        }[variant]

    def prepare(self, variant: str) -> Prepared:
        if variant in INFERENCE:
            return Prepared(self._inference(variant))
        loss = self.loss(variant)

        def run() -> Outcome:
            value = loss(self.model, self.batch, self.num_items)
            value.backward()
            self.optimizer.step()
            self.optimizer.zero_grad()
            return Outcome(value.detach())

        return Prepared(run, self.model.train)

    def _inference(self, variant: str) -> Callable[[], Outcome]:
        size, tokens = self.size, [item.rollout.tokens for item in self.items]
        ids = torch.stack([torch.from_numpy(each).long() for each in tokens])
        new = size.length - size.prompt
        engine = TransformersEngine(self.model, self.tokenizer)
        engine.eos_ids = []  # a fixed number of tokens

        @torch.no_grad()
        def plain_scores() -> Outcome:
            self.model.eval()
            logits = self.model(ids, use_cache=False).logits[:, size.prompt - 1 : -1]
            logits.log_softmax(-1).topk(size.topk)
            return Outcome()

        def scores() -> Outcome:
            self.model.eval()
            engine.score(tokens, [size.prompt] * size.sequences, size.topk)
            return Outcome()

        def plain_samples() -> Outcome:
            self.model.eval()
            prompts = ids[:, : size.prompt]
            self.model.generate(
                prompts, attention_mask=torch.ones_like(prompts), do_sample=True, top_k=0,
                max_new_tokens=new, min_new_tokens=new, pad_token_id=2,
            )  # fmt: skip
            return Outcome()

        def samples() -> Outcome:
            self.model.eval()
            prompts = [each[: size.prompt].tolist() for each in tokens]
            engine.generate(prompts, Sampling(new), list(range(size.sequences)))
            return Outcome()

        return {
            "scoring, lopd": scores,
            "scoring, transformers": plain_scores,
            "sampling, lopd": samples,
            "sampling, transformers": plain_samples,
        }[variant]

    def errors(self) -> dict[str, float]:
        """Of the fused losses against the plain ones, in loss and gradients."""
        worst = {"loss_error": 0.0, "gradient_error": 0.0}
        for part in ("cross-entropy", "reverse KL"):
            values, exact = (
                gradients(self.model, self.loss(f"{part}, {kind}"), self.batch, self.num_items)
                for kind in ("fused", "transformers")
            )
            loss, _, whole = relative_errors(values, exact)
            worst["loss_error"] = max(worst["loss_error"], loss)
            worst["gradient_error"] = max(worst["gradient_error"], whole)
        return worst


def peak_mib(bench: Bench, variant: str) -> float:
    """Memory of a second step beyond what was in use before it, in MiB, in a fork of this process.

    What a fork shares with its parent counts as in use.
    """
    context = multiprocessing.get_context("fork")
    results = context.SimpleQueue()
    child = context.Process(target=_measure_peak, args=(bench, variant, results.put))
    child.start()
    child.join()
    if child.exitcode != 0:
        raise RuntimeError(f"{variant}: the process that measures its memory failed")
    return float(results.get())


def _measure_peak(bench: Bench, variant: str, report: Callable[[float], None]) -> None:
    torch.set_num_threads(1)  # a fork has none of the threads that OpenMP waits for
    prepared = bench.prepare(variant)
    prepared.restore()
    prepared.step()
    prepared.restore()
    reset_peak()
    before = resident_mib("VmRSS")
    prepared.step()
    report(resident_mib("VmHWM") - before)


def run(recorder: Recorder, size: Size) -> int:
    bench = Bench(size)
    fields = {"model": "tiny" if size is TINY else MODEL, "dtype": "float32", **asdict(size)}
    errors = bench.errors()
    red = [key for key, bound in FP32_BOUNDS.items() if not errors[key] <= bound]
    recorder.emit("gate", "fused against plain", "red gate" if red else "ok", **fields, **errors)
    if red:
        return 1
    for variants in (TRAINING, INFERENCE):
        ready = {variant: bench.prepare(variant) for variant in variants}
        times, failures = take_turns(ready, recorder.device, BUDGET_S, min_steps=MIN_STEPS)
        for error in failures.values():
            raise error
        peaks = {variant: peak_mib(bench, variant) for variant in variants}
        for variant, part in variants.items():
            plain = f"{part}, transformers"
            seconds = times[variant]["median_ms"] / 1e3
            recorder.emit(
                part, variant, "ok", **fields, **times[variant],
                tokens_per_s=round(bench.num_items / seconds, 1),
                extra_mib=round(peaks[variant], 1),
                time_ratio=round(times[variant]["median_ms"] / times[plain]["median_ms"], 3),
                memory_ratio=round(peaks[variant] / max(peaks[plain], 1.0), 3),
            )  # fmt: skip
    return 0


def table(rows: list[dict[str, Any]]) -> str:
    """Markdown: ratios to plain transformers within the newest run, and the scatter of times."""
    newest = {row["variant"]: row for row in rows if row["variant"] in PARTS}
    lines = [
        "| variant | time / transformers | p10 to p90 | extra memory / transformers |",
        "| --- | ---: | ---: | ---: |",
    ]
    for variant, part in PARTS.items():
        row, plain = newest[variant], newest[f"{part}, transformers"]["median_ms"]
        scatter = f"{row['p10_ms'] / plain:.2f} to {row['p90_ms'] / plain:.2f}"
        ratios = f"{row['time_ratio']:.2f} | {scatter} | {row['memory_ratio']:.2f}"
        lines.append(f"| {variant} | {ratios} |")
    return "\n".join(
        [
            "{model}, {sequences} sequences of {length} tokens ({prompt} of them the prompt), "
            "K = {topk}, {dtype},".format(**row),
            "on a CPU, threads: {threads}; medians of at least {fewest} steps in".format(
                **row, fewest=min(newest[variant]["repetitions"] for variant in PARTS)
            ),
            "alternation.",
            "",
            *lines,
        ]
    )


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--sequences", type=int, default=Size.sequences)
    parser.add_argument("--length", type=int, default=Size.length, help="tokens of a sequence")
    parser.add_argument("--threads", type=int, default=2, help="of torch")
    parser.add_argument("--tiny", action="store_true", help="a random model, in seconds")
    parser.add_argument("--out", type=Path, default=Path("benchmarks/results"))
    args = parser.parse_args(arguments)
    size = TINY if args.tiny else Size(args.sequences, args.length, args.length // 4)
    command = f"python -m benchmarks.real_model --threads {args.threads}"
    command += " --tiny" if args.tiny else f" --sequences {size.sequences} --length {size.length}"
    torch.set_num_threads(args.threads)
    return run(Recorder(args.out / NAME, torch.device("cpu"), command), size)


if __name__ == "__main__":
    sys.exit(main())
