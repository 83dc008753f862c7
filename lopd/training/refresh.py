"""Rollouts renewed while the student trains (`lopd distill --refresh_every R`).

A window is R optimizer steps. When it begins, the sequences whose turn it is in them are sampled
anew by the student as it is and scored by the cache's teacher. They become a cache of their own,
`out/refresh/step-N`, written as the run's cache was and read as it is. With R = 1 this is standard
on-policy distillation; without it, Lightning OPD on the same prompts in the same order.
"""

import re
import shutil
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from transformers import TrainerCallback

from lopd.data.prompts import Prompt, check_prompts
from lopd.engines.base import Sampling, score_rollouts, sequence_seed, to_rollout
from lopd.engines.transformers import TransformersEngine
from lopd.errors import ConfigError, ProvenanceError, ShardError
from lopd.models.load import check_model_folder, context_of
from lopd.provenance import (
    CacheManifest,
    build_manifest,
    describe_model,
    vocab_size_of,
)
from lopd.provenance.gate import check_same_tokens
from lopd.provenance.manifest import short
from lopd.store import CacheWriter, Rollout, TeacherCache, TeacherScores
from lopd.store.workers import this_worker
from lopd.training.batch import sequence_of
from lopd.training.sampler import MicroBatches, StepDataset, StepSampler, split
from lopd.training.trainer import LopdTrainer

FOLDER = "refresh"
PARTS = ("generation_seconds", "scoring_seconds", "update_seconds")


@dataclass(frozen=True)
class Refresh:
    """What renews the rollouts of a run: a teacher, and the cache that says how."""

    teacher: str  # folder
    every: int  # optimizer steps
    batch_size: int  # sequences decoded together
    cache: TeacherCache
    base: str  # digest of the weights that training starts from

    @property
    def sampling(self) -> Sampling:
        """How the cache's rollouts were sampled; ConfigError if an imported cache does not say."""
        names = ("max_new_tokens", "temperature", "top_p")
        recorded = self.cache.manifest.rollouts.sampling
        values: list[Any] = [getattr(recorded, name, None) for name in names]
        if None in values:
            raise ConfigError(
                f"refresh_every: {self.cache.path} does not record the "
                f"{names[values.index(None)]} of its rollouts; roll out and score again, or leave "
                "--refresh_every out"
            )
        return Sampling(*values)

    @property
    def extra_ids(self) -> int:
        """How many of the student's top ids every list of the cache gained."""
        support = self.cache.manifest.scoring.support
        return 0 if support is None else support.extra_ids


def check_refresh(refresh: Refresh, student: str, max_tokens: int | None) -> None:
    """Refuse, from files only, what cannot renew the cache's rollouts in the way it was made.

    Raises:
        ProvenanceError: the teacher is not the one that scored the cache.
        ConfigError: several processes, a cache of another engine or of unknown sampling, or packs
            that an answer may not fit into.
        DataError: a prompt leaves a model no room for the longest answer.
    """
    cache, scorer = refresh.cache, refresh.cache.manifest.model
    if not (worker := this_worker(None)).alone:
        raise ConfigError(
            f"refresh_every: found {worker.count} processes; rollouts are renewed in one: start "
            "without torchrun, or leave --refresh_every out"
        )
    if scorer.engine != TransformersEngine.name:
        raise ConfigError(
            f"refresh_every: {cache.path} was scored by engine {scorer.engine or 'unknown'}; "
            f"expected {TransformersEngine.name}, which scores while the student trains; score "
            "again with it"
        )
    longest = refresh.sampling.max_new_tokens
    check_model_folder(refresh.teacher)
    dtype = str(scorer.dtype)
    teacher = describe_model(refresh.teacher, dtype=dtype, engine=TransformersEngine.name)
    for what in ("weights", "config", "tokenizer"):
        found, expected = getattr(teacher, what), getattr(scorer, what)
        if found != expected:
            raise ProvenanceError(
                f"teacher: {refresh.teacher} has {what} {short(found)}, {cache.path} was "
                f"scored with {short(expected)}; name that teacher, or score with this one"
            )
    prompts = [_prompt(rollout) for rollout in cache.rollouts()]
    for model in (student, refresh.teacher):
        check_prompts(
            prompts,
            str(cache.path),
            context=context_of(model),
            vocab_size=vocab_size_of(model),
            max_new_tokens=longest,
        )
    needed = max(len(prompt.tokens) for prompt in prompts) + longest
    if max_tokens is not None and max_tokens < needed:
        raise ConfigError(
            f"max_tokens_per_batch: found {max_tokens}, but a renewed sequence may have {needed} "
            f"tokens (max_new_tokens {longest}); expected at least that many"
        )


def _prompt(rollout: Any) -> Prompt:
    return Prompt(rollout.prompt_id, rollout.tokens[: rollout.prompt_length].tolist(), None)


def renewed_seed(seed: int, window: int, prompt_id: str, sample: int) -> int:
    """The random stream that belongs to a sequence in the window of this number."""
    return sequence_seed(sequence_seed(seed, "window", window), prompt_id, sample)


class RefreshTrainer(LopdTrainer):
    """`LopdTrainer` on rollouts that are renewed every `refresh.every` optimizer steps.

    `train_dataset` says which prompts are whose turn; its answers are not trained on.
    """

    def __init__(
        self, *given: Any, refresh: Refresh, tokenizer: Any, dtype: str, **kwargs: Any
    ) -> None:
        super().__init__(*given, callbacks=[Clock(refresh.every)], **kwargs)
        self.refresh = refresh
        self.student = TransformersEngine(self.model, tokenizer, batch_size=refresh.batch_size)
        self.teacher = TransformersEngine.load(
            refresh.teacher,
            dtype=str(refresh.cache.manifest.model.dtype),
            device=str(self.args.device),
        )
        self.described = {"base": refresh.base, "dtype": dtype, "seed": self.args.seed}
        theirs = self.teacher.tokenizer.get_vocab()
        self.teacher_vocab = None if theirs == tokenizer.get_vocab() else theirs

    def step_dataset(self, sampler: StepSampler) -> "WindowDataset":
        return WindowDataset(self, sampler)

    def renew(self, sequences: Sequence[Any], window: int) -> list[tuple[Rollout, TeacherScores]]:
        """Fresh answers to the sequences' prompts, scored; the model's mode is as it was."""
        assert self.model is not None
        training = self.model.training
        self.model.eval()
        try:
            began = _now(self.args.device)
            rollouts = self._generate(sequences, window)
            generated = _now(self.args.device)
            scores = self._score(rollouts)
            scored = _now(self.args.device)
        finally:
            self.model.train(training)
        self.window.leave_out(scored - began)
        self.state.log_history.append(
            {
                "generation_seconds": generated - began,
                "scoring_seconds": scored - generated,
                "renewed_sequences": len(rollouts),
                "renewed_tokens": sum(len(r.tokens) - r.prompt_length for r in rollouts),
                "step": self.state.global_step,
            }
        )
        return [*zip(rollouts, scores, strict=True)]

    def _generate(self, sequences: Sequence[Any], window: int) -> list[Rollout]:
        prompts = [_prompt(sequence) for sequence in sequences]
        seeds = [
            renewed_seed(self.args.seed, window, sequence.prompt_id, sequence.sample)
            for sequence in sequences
        ]
        answers = self.student.generate([p.tokens for p in prompts], self.refresh.sampling, seeds)
        return [
            to_rollout(prompt, sequence.sample, answer)
            for prompt, sequence, answer in zip(prompts, sequences, answers, strict=True)
        ]

    def _score(self, rollouts: list[Rollout]) -> list[TeacherScores]:
        manifest = self.refresh.cache.manifest
        scores = score_rollouts(
            self.teacher,
            rollouts,
            manifest.k,
            temperature=manifest.temperature,
            student=self.student,
            extra_ids=self.refresh.extra_ids,
        )
        if self.teacher_vocab is not None:
            tokens = [rollout.tokens for rollout in rollouts]
            used = np.unique(np.concatenate([*tokens, *(s.topk_ids.ravel() for s in scores)]))
            check_same_tokens(
                self.student.tokenizer.get_vocab(), self.teacher_vocab, used, "teacher"
            )
        return scores


class WindowDataset(StepDataset):
    """A step's items out of the window that it falls into, which opens with its first step."""

    def __init__(self, trainer: RefreshTrainer, sampler: StepSampler) -> None:
        super().__init__(trainer.train_dataset)
        self.trainer, self.sampler = trainer, sampler
        self.out = Path(str(trainer.args.output_dir)) / FOLDER
        self.first: int | None = None  # step of the open window, from 0

    def __getitems__(self, micro_batches: MicroBatches) -> list[list[Any]]:
        step, sampler = self.trainer.state.global_step, self.sampler
        first = step - step % self.trainer.refresh.every
        if first != self.first:
            self._open(first, step)
        sequences = self._sequences(step)
        assert sorted(sequences) == sorted(i for part in micro_batches for i in part)
        items = self.window.read([self.places[i] for i in sequences])
        lengths = [len(item.rollout.tokens) for item in items]
        parts = split(lengths, sampler.batch_size, sampler.max_tokens)
        return [[items[i] for i in part] for part in parts]

    def _sequences(self, step: int) -> list[int]:
        epoch, number = divmod(step, len(self.sampler))
        return self.sampler.steps(epoch)[number]

    def _open(self, first: int, step: int) -> None:
        """Open the window of steps `first` on; one that a checkpoint lies within is on disk.

        Raises:
            ShardError: the run continues within a window that is gone or altered.
        """
        refresh = self.trainer.refresh
        last = min(first + refresh.every, self.trainer.state.max_steps)
        wanted = sorted({i for s in range(first, last) for i in self._sequences(s)})
        self._drop(step)
        folder = self.out / f"step-{first:08d}"
        with CacheWriter.create(folder, self._manifest(first, len(wanted))) as writer:
            if writer.missing():
                if first < step:
                    raise ShardError(
                        f"{folder}: gone or altered, and checkpoint-{step} lies within that "
                        "window; restore it, or remove the checkpoint to go on from an earlier one"
                    )
                sequences = [sequence_of(item) for item in self.dataset.__getitems__(wanted)]
                writer.write(0, self.trainer.renew(sequences, first // refresh.every))
            writer.finish()
        cache = refresh.cache
        self.window = TeacherCache.open(folder, support=cache.support, vocab_size=cache.vocab_size)
        self.places = {index: place for place, index in enumerate(wanted)}
        self.first = first

    def _drop(self, step: int) -> None:
        """Remove all windows but those that the run, or a checkpoint, is in the middle of."""
        every = self.trainer.refresh.every
        found = [re.fullmatch(r"checkpoint-(\d+)", f.name) for f in self.out.parent.glob("*")]
        steps = {step, *(int(match[1]) for match in found if match)}
        needed = {f"step-{s - s % every:08d}" for s in steps if s % every}
        for folder in self.out.glob("step-*"):
            if folder.name not in needed:
                shutil.rmtree(folder)

    def _manifest(self, first: int, sequences: int) -> CacheManifest:
        """Like that of the run's cache, except for who sampled and how many sequences."""
        refresh, source = self.trainer.refresh, self.trainer.refresh.cache.manifest
        maker = {"weights": f"{refresh.base} after {first} steps", **self.trainer.described}
        return build_manifest(
            "cache",
            stage="refresh",
            config={},
            model=source.model,
            inputs={
                "rollouts": {
                    "digest": refresh.cache.digest(),  # of the cache whose prompts these are
                    "model": maker,
                    "sampling": source.rollouts.sampling,
                    "lineage": source.rollouts.lineage,
                }
            },
            plan={"shards": [sequences]},
            k=source.k,
            top_p=source.top_p,
            codec=source.codec,
            temperature=source.temperature,
            scoring=source.scoring,
        )


class Clock(TrainerCallback):
    """Seconds from a step's first forward to its update, logged after every `every` steps."""

    def __init__(self, every: int) -> None:
        self.every, self.seconds, self.steps = every, 0.0, 0

    def on_step_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        self.began = _now(args.device)

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        self.seconds, self.steps = self.seconds + _now(args.device) - self.began, self.steps + 1
        if state.global_step % self.every == 0:
            self._tell(state)

    def on_train_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        if self.steps:
            self._tell(state)

    def _tell(self, state: Any) -> None:
        state.log_history.append(
            {
                "update_seconds": self.seconds,
                "update_steps": self.steps,
                "step": state.global_step,
            }
        )
        self.seconds, self.steps = 0.0, 0


def _now(device: torch.device) -> float:
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    return time.perf_counter()


def refresh_summary(refresh: Refresh, history: Sequence[dict[str, Any]]) -> dict[str, Any]:
    """What the manifest says: how much was renewed, and the seconds of each part.

    Updates between a checkpoint and the log before it are counted only where the run was not cut.
    """

    def total(name: str) -> Any:
        return sum(entry.get(name, 0) for entry in history)

    windows = sum("generation_seconds" in entry for entry in history)
    renewed = {"sequences": total("renewed_sequences"), "tokens": total("renewed_tokens")}
    return {
        "refresh": {"every": refresh.every, "windows": windows, **renewed},
        "seconds": {name.removesuffix("_seconds"): total(name) for name in PARTS},
    }
