"""Models, and timed runs of lopd on them, for `benchmarks.offline_live`."""

from __future__ import annotations

import gc
import json
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import transformers

from benchmarks.qwen3 import MODELS
from lopd.provenance import declare, read_manifest
from lopd.stages import distill, evaluate, rollout, score
from lopd.stages.demo import arithmetic as toy
from lopd.stages.demo.toy import COMMON, OPD_SETTINGS, TOP_K, ToyDemo

PARTS = ("generation", "scoring", "training")
SHAPE = (
    "vocab_size",
    "hidden_size",
    "intermediate_size",
    "num_hidden_layers",
    "num_attention_heads",
    "num_key_value_heads",
    "head_dim",
)
SMALL = {
    "vocab_size": 50,  # at least that of the toy tokenizer
    "num_hidden_layers": 1,
    "num_attention_heads": 2,
    "num_key_value_heads": 1,
    "head_dim": 16,
    "initializer_range": 0.2,  # so that answers vary
}


class InvalidResult(Exception):
    """A run gave a wrong result; its time must not be reported."""


def qwen3_shape(name: str) -> dict[str, int]:
    """The config of a published Qwen3 as a mapping."""
    config = MODELS[name].config()
    return {key: getattr(config, key) for key in SHAPE}


@dataclass(frozen=True)
class Size:
    """Settings that all runs share."""

    steps: int
    batch: int
    prompts: int  # sampled once by the offline run; read steps * batch / prompts times
    new_tokens: int
    decoded: int  # largest number of sequences decoded together
    k: int
    dtype: str
    eval_prompts: int
    seeds: tuple[int, ...]
    every: tuple[int, ...]
    # Of random models; None: train those of the demo.
    shapes: dict[str, dict[str, Any]] | None = None

    @property
    def epoch(self) -> int:
        """Number of steps that use each prompt once."""
        return self.prompts // self.batch


SIZES = {
    "toy": Size(
        224, 64, 7168, toy.MAX_NEW_TOKENS, 512, TOP_K, "float32", 1024, (0, 1, 2), (1, 4, 16)
    ),
    "0.6b": Size(
        16, 16, 256, 512, 64, 64, "bfloat16", 64, (0,), (1, 4, 16),
        {"student": qwen3_shape("0.6B"), "teacher": qwen3_shape("1.7B")},
    ),
    "quick": Size(
        8, 4, 16, 6, 16, 4, "float32", 8, (0,), (1, 4),
        {
            "student": {"hidden_size": 16, "intermediate_size": 16, **SMALL},
            "teacher": {"hidden_size": 32, "intermediate_size": 32, **SMALL},
        },
    ),
}  # fmt: skip


@dataclass(frozen=True)
class Run:
    """A distilled student and the seconds of each part."""

    out: str
    seconds: dict[str, float]  # by PARTS; the sum is the wall-clock time
    renewed: dict[str, Any]  # the manifest's `refresh`; empty offline
    update_seconds: float | None
    peak_mib: float | None

    @property
    def total(self) -> float:
        return sum(self.seconds.values())


class Bench:
    """Teacher, student and prompts of one seed, and lopd commands that use them."""

    def __init__(self, folder: Path, size: Size, device: str, seed: int) -> None:
        folder.mkdir()
        self.folder, self.size, self.device, self.seed = folder, size, device, seed
        make = self._train if size.shapes is None else self._make_random
        self.student, self.teacher, self.prompts, self.eval_prompts = make()

    def _train(self) -> tuple[str, str, str, str]:
        """The demo's teacher, and its student fine-tuned on that teacher's answers."""
        demo = ToyDemo(self.folder / "demo", self.seed)
        for stage in demo.stages(online=False)[:3]:
            stage.run()
        prompts = str(demo.prompts["opd"]), str(demo.prompts["eval"])
        return demo.path("sft"), demo.path("teacher"), *prompts

    def _make_random(self) -> tuple[str, str, str, str]:
        """Random weights; `declare` records the teacher as the student's."""
        assert self.size.shapes is not None
        seen: set[str] = set()
        counts = {"opd": self.size.prompts, "eval": self.size.eval_prompts}
        prompts = [
            toy.write_prompts(
                self.folder / f"{name}.jsonl", toy.sample_prompts(count, self.seed, exclude=seen)
            )
            for name, count in counts.items()
        ]
        for number, (name, shape) in enumerate(self.size.shapes.items()):
            seed = 2 * self.seed + number
            write_random(self.folder / name, shape, seed, self.size.dtype, self.device)
        student, teacher = self.folder / "student", self.folder / "teacher"
        declare(student, teacher=teacher)
        return str(student), str(teacher), *map(str, prompts)

    @property
    def common(self) -> dict[str, Any]:
        return {"dtype": self.size.dtype, "device": self.device}

    def roll_out(self, name: str, limit: int, temperature: float = 1.0) -> str:
        config = rollout.RolloutConfig(
            student=self.student,
            prompts=self.prompts,
            limit=limit,
            out=str(self.folder / name),
            max_new_tokens=self.size.new_tokens,
            temperature=temperature,
            batch_size=self.size.decoded,
            seed=self.seed,
            **self.common,
        )
        return str(rollout.main(config))

    def score(self, rollouts: str, name: str) -> str:
        config = score.ScoreConfig(
            teacher=self.teacher,
            rollouts=rollouts,
            out=str(self.folder / name),
            k=self.size.k,
            top_p=1.0,
            **self.common,
        )
        score.main(config)
        return config.out

    def distill(self, cache: str, name: str, every: int | None, **changes: Any) -> str:
        live: dict[str, Any] = {
            "teacher": self.teacher,
            "refresh_every": every,
            "refresh_batch_size": self.size.decoded,
        }
        settings = OPD_SETTINGS | COMMON | self.common
        settings |= {"max_steps": self.size.steps, "batch_size": self.size.batch}
        settings["seed"] = self.seed
        settings["warmup_steps"] = min(OPD_SETTINGS["warmup_steps"], self.size.steps)
        config = distill.DistillConfig(
            student=self.student,
            cache=cache,
            out=str(self.folder / name),
            **(settings | changes | (live if every else {})),
        )
        return str(distill.main(config))

    def quality(self, model: str, name: str) -> dict[str, float]:
        """Accuracies, and the KL to the teacher on the model's own samples."""
        config = evaluate.EvalConfig(
            model=model,
            teacher=self.teacher,
            prompts=self.eval_prompts,
            limit=self.size.eval_prompts,
            out=str(self.folder / "eval" / name),
            num_samples=1,
            max_new_tokens=self.size.new_tokens,
            batch_size=self.size.decoded,
            seed=self.seed,
            **self.common,
        )
        results = json.loads((evaluate.main(config) / "results.json").read_text("utf-8"))
        return {
            "greedy": results["greedy"]["mean"],
            "sampled": results["avg@1"]["mean"],
            "kl": results["kl"]["nats_per_token"],
        }

    def run(self, cache: str, name: str, every: int | None) -> Run:
        """Distil once and time it; with `every` None, its rollouts and scores are included."""
        clock = Clock(self.device)
        if every is None:
            rollouts = self.roll_out(f"{name}-rollouts", self.size.prompts)
            generation = clock.lap()
            cache = self.score(rollouts, f"{name}-cache")
            scoring = clock.lap()
            out = self.distill(cache, name, None)
            seconds = dict(zip(PARTS, (generation, scoring, clock.lap()), strict=True))
            if "seconds" in read_manifest(out).raw:
                raise InvalidResult("the offline run's manifest records renewed rollouts")
            return Run(out, seconds, {}, None, clock.peak_mib())
        out = self.distill(cache, name, every)
        total, manifest = clock.lap(), read_manifest(out).raw
        logged = manifest["seconds"]
        check_parts(logged, total, manifest["refresh"], self.size, every)
        seconds = {part: logged[part] for part in ("generation", "scoring")}
        seconds["training"] = total - sum(seconds.values())
        return Run(out, seconds, manifest["refresh"], logged["update"], clock.peak_mib())


def write_random(folder: Path, shape: dict[str, Any], seed: int, dtype: str, device: str) -> None:
    """A random Qwen3 with the toy tokenizer, whose ids are the first ids of its vocabulary."""
    tokenizer = toy.build_tokenizer()
    config = transformers.Qwen3Config(
        max_position_embeddings=4096,
        tie_word_embeddings=True,
        eos_token_id=tokenizer.eos_token_id,
        pad_token_id=tokenizer.pad_token_id,
        **shape,
    )
    torch.manual_seed(seed)
    with torch.device(device):
        model = transformers.Qwen3ForCausalLM(config).to(getattr(torch, dtype))
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)


class Clock:
    """Seconds between laps, and peak memory of the device since the start."""

    def __init__(self, device: str) -> None:
        self.cuda = device == "cuda"
        gc.collect()  # trainers are reference cycles; their models would count for the next run
        if self.cuda:
            torch.cuda.empty_cache()
            torch.cuda.reset_peak_memory_stats()
        self.start = self._now()

    def _now(self) -> float:
        if self.cuda:
            torch.cuda.synchronize()
        return time.perf_counter()

    def lap(self) -> float:
        start, self.start = self.start, self._now()
        return self.start - start

    def peak_mib(self) -> float | None:
        return round(torch.cuda.max_memory_allocated() / 2**20, 1) if self.cuda else None


def check_parts(
    seconds: dict[str, float], total: float, renewed: dict[str, Any], size: Size, every: int
) -> None:
    """Raise InvalidResult unless a live run renewed every window and its parts fit its time."""
    if not all(value > 0 for value in seconds.values()) or sum(seconds.values()) > total:
        raise InvalidResult(f"R = {every}: parts {seconds} do not fit into {total:.3f} s")
    starts = range(0, size.steps, every)
    expected = sum(size.batch * min(every, size.steps - start, size.epoch) for start in starts)
    counts = renewed["windows"], renewed["sequences"]
    if counts != (len(starts), expected):
        raise InvalidResult(f"R = {every}: renewed {counts}; expected {(len(starts), expected)}")
