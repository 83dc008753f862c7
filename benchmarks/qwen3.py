"""Random students with the shapes of Qwen3, and packs of sequences to train them on."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from benchmarks import cache
from benchmarks.clock import Outcome, Prepared
from benchmarks.harness import classify, free_memory, one_line
from lopd.config.training import DEFAULT_OPTIM, optimizer_class
from lopd.models.packing import pack_attention
from lopd.store import TeacherSequence, TopKLists
from lopd.training.batch import Batch, Collator, to_device

Loss = Callable[[Any, Batch, float], Tensor]  # (model, batch, normaliser) -> the micro-batch's loss
MIB = 1 << 20
LEARNING_RATE = 1e-6  # too small to change bf16 weights: every step has the same model


@dataclass(frozen=True)
class Size:
    """A Qwen3 shape and its training data; the widths are those of the published configs."""

    hidden: int
    intermediate: int
    layers: int
    heads: int
    tied: bool
    optim: str
    sequences: int  # in the timed micro-batch
    search_s: float  # time to search the largest micro-batch of each variant
    kv_heads: int = 8
    head_dim: int = 128
    vocab: int = 151936
    length: int = 4096
    prompt: int = 512
    topk: int = 64

    def config(self) -> Any:
        from transformers import Qwen3Config

        return Qwen3Config(
            vocab_size=self.vocab,
            hidden_size=self.hidden,
            intermediate_size=self.intermediate,
            num_hidden_layers=self.layers,
            num_attention_heads=self.heads,
            num_key_value_heads=self.kv_heads,
            head_dim=self.head_dim,
            max_position_embeddings=40960,
            tie_word_embeddings=self.tied,
        )


ADAMW, STATELESS = DEFAULT_OPTIM, "sgd"
MODELS = {
    "0.6B": Size(1024, 3072, 28, 16, True, ADAMW, 4, 10.0),
    "1.7B": Size(2048, 6144, 28, 16, True, ADAMW, 2, 12.0),
    "4B": Size(2560, 9728, 36, 32, True, ADAMW, 1, 25.0),
    "8B": Size(4096, 12288, 36, 32, False, STATELESS, 1, 40.0),
}
TOY: dict[str, Any] = {
    "hidden": 32, "intermediate": 64, "layers": 2, "heads": 4, "kv_heads": 2, "head_dim": 16,
    "vocab": 509, "length": 64, "prompt": 8, "topk": 8, "search_s": 0.5,
}  # fmt: skip


def build(size: Size, device: torch.device, dtype: torch.dtype) -> Any:
    """A random model in training mode, with gradient checkpointing."""
    from transformers import AutoModelForCausalLM

    torch.manual_seed(0)
    with device:
        model = AutoModelForCausalLM.from_config(size.config(), dtype=dtype)
    model.gradient_checkpointing_enable()
    return model.train()


def make_sequences(size: Size, count: int, prompt: int) -> list[TeacherSequence]:
    """Sequences of the synthetic teacher in `benchmarks/cache.py`; the prompt has no loss."""
    shape = cache.Shape(count, size.length - prompt, prompt, size.vocab, size.topk)
    return [
        TeacherSequence(
            scores.teacher_logprobs,
            scores.teacher_entropy,
            TopKLists.from_padded(scores.topk_ids, scores.topk_logprobs),
            scores.tail_logprobs,
            rollout,
        )
        for rollout, scores in cache.make_records(shape, ids="zipf")
    ]


class Job:
    """A model, its optimizer, and packs that repeat the same sequences."""

    def __init__(self, size: Size, device: torch.device, attention: str) -> None:
        free_memory(device)
        self.size, self.device = size, device
        self.before = torch.cuda.memory_allocated(device) if device.type == "cuda" else 0
        self.model = build(size, device, torch.bfloat16)
        pack_attention(self.model, attention)
        kind, options = optimizer_class(size.optim)
        self.optimizer = kind(self.model.parameters(), **{**options, "lr": LEARNING_RATE})
        self.items = make_sequences(size, 2, size.prompt)

    def batch(self, sequences: int) -> tuple[Batch, float]:
        return self.pack([self.items[i % len(self.items)] for i in range(sequences)])

    def pack(self, items: list[TeacherSequence]) -> tuple[Batch, float]:
        """The batch on the device, and its normaliser."""
        batch = Collator(packed=True)(items)
        return to_device(batch, self.device), batch["row_weights"].sum().item()

    def prepare(self, loss: Loss, batch: Batch, num_items: float) -> Prepared:
        def run() -> Outcome:
            value = loss(self.model, batch, num_items)
            value.backward()
            self.optimizer.step()
            self.optimizer.zero_grad()
            return Outcome(value.detach())

        return Prepared(run, self.optimizer.zero_grad)

    def attempt(self, run: Callable[[], Any]) -> dict[str, Any]:
        """Status and peak memory of one call; its memory is freed even if it fails."""
        result: dict[str, Any] = {"status": "ok", "peak_mib": None}
        self.reset_peak()
        try:
            run()
            if self.device.type == "cuda":
                torch.cuda.synchronize(self.device)
                peak = torch.cuda.max_memory_allocated(self.device) - self.before
                result["peak_mib"] = round(peak / MIB, 1)
        except Exception as error:
            result = {"status": classify(error), "reason": one_line(error), "peak_mib": None}
        self.optimizer.zero_grad()
        free_memory(self.device)
        return result

    def reset_peak(self) -> None:
        if self.device.type == "cuda":
            torch.cuda.reset_peak_memory_stats(self.device)
