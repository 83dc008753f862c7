"""Rollouts refreshed during training (`lopd distill --refresh-every R`).

A window is R optimizer steps. When it begins, the current student resamples the sequences of these
steps and the cache's teacher scores them. The result is a cache in `out/refresh/step-N`, with the
settings of the run's cache. R = 1 is standard on-policy distillation; without refresh the run is
Lightning OPD on the same prompts in the same order.
"""

import re
import shutil
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from lopd.data.prompts import Prompt, check_prompts
from lopd.engines.base import Sampling, score_rollouts, sequence_seed, to_rollout
from lopd.engines.support import Support
from lopd.engines.transformers import TransformersEngine
from lopd.errors import ConfigError, ProvenanceError, ShardError
from lopd.models.head import eval_mode
from lopd.models.load import check_model_folder, context_of
from lopd.provenance import (
    CacheManifest,
    build_manifest,
    describe_model,
    difference,
    vocab_size_of,
)
from lopd.provenance.gate import check_same_tokens
from lopd.provenance.manifest import short
from lopd.store import CacheWriter, Rollout, TeacherCache, TeacherScores
from lopd.store.workers import this_worker
from lopd.training.batch import sequence_of
from lopd.training.refresh_timing import UpdateTimer, now
from lopd.training.sampler import MicroBatches, StepDataset, StepSampler, split
from lopd.training.trainer import LopdTrainer

FOLDER = "refresh"
WINDOW = re.compile(r"step-\d{8}")  # names of the folders in it


@dataclass(frozen=True)
class Refresh:
    """Settings of refreshed rollouts; sampling and scoring are those of the run's cache."""

    teacher: str  # model folder
    every: int  # optimizer steps per window
    batch_size: int  # sequences decoded together
    cache: TeacherCache
    base: str  # digest of the weights that training starts from
    seen_by_teacher: Callable[[Rollout], Rollout] = lambda rollout: rollout  # to score

    @property
    def sampling(self) -> Sampling:
        """How the cache's rollouts were sampled; ConfigError if an imported cache does not say."""
        names = ("max_new_tokens", "temperature", "top_p")
        recorded = self.cache.manifest.rollouts.sampling
        values: list[Any] = [getattr(recorded, name, None) for name in names]
        if None in values:
            raise ConfigError(
                f"refresh_every: {self.cache.path} does not record the "
                f"{names[values.index(None)]} of its rollouts; roll out and score again, or omit "
                "--refresh-every"
            )
        return Sampling(*values)


def check_one_at_work(cache: TeacherCache) -> None:
    """Check that one process trains with one teacher, as a refresh does.

    Raises:
        ConfigError: there are several processes or teachers.
    """
    if not (worker := this_worker(None)).is_single:
        raise ConfigError(
            f"refresh_every: found {worker.count} processes; expected one: start without torchrun, "
            "or omit --refresh-every"
        )
    if cache.manifest.teachers is not None:
        raise ConfigError(
            f"refresh_every: {cache.path} was scored by {len(cache.manifest.teachers)} teachers; "
            "expected one, which training keeps in memory: omit --refresh-every, or roll out and "
            "score again between two runs"
        )


def check_refresh(refresh: Refresh, student: str, max_tokens: int | None) -> None:
    """Check from files only that rollouts can be refreshed in the way the cache was made.

    Args:
        refresh: settings of the refresh.
        student: the student's model folder.
        max_tokens: tokens per pack; None for padded micro-batches.

    Raises:
        ProvenanceError: the teacher is not the one that scored the cache.
        ConfigError: the cache was scored by another engine or its sampling is unknown, or packs
            are too small for the longest answer.
        DataError: a prompt leaves no room for the longest answer in a model's context.
    """
    cache, scorer = refresh.cache, refresh.cache.manifest.model
    if scorer.engine != TransformersEngine.name:
        raise ConfigError(
            f"refresh_every: {cache.path} was scored by engine {scorer.engine or 'unknown'}; "
            f"expected {TransformersEngine.name}, which can score during training: score again "
            "with it"
        )
    longest = refresh.sampling.max_new_tokens
    check_model_folder(refresh.teacher)
    dtype = str(scorer.dtype)
    teacher = describe_model(refresh.teacher, dtype=dtype, engine=TransformersEngine.name)
    was, now = ((model.behaviour or {}).get("config") for model in (scorer, teacher))
    if was is not None and now is not None and (changed := difference(was, now)):
        raise ProvenanceError(
            f"teacher: {refresh.teacher}: {changed} in its config since {cache.path} was scored; "
            "restore it, or score again"
        )
    for what in ("weights", "config", "tokenizer"):
        found, expected = getattr(teacher, what), getattr(scorer, what)
        if found != expected:
            raise ProvenanceError(
                f"teacher: {refresh.teacher} has {what} {short(found)}, {cache.path} was "
                f"scored with {short(expected)}; use that teacher, or score with this one"
            )
    prompts = [_prompt(rollout) for rollout in cache.rollouts()]
    seen = [_prompt(refresh.seen_by_teacher(rollout)) for rollout in cache.rollouts()]
    for model, read in ((student, prompts), (refresh.teacher, seen)):
        check_prompts(
            read,
            str(cache.path),
            context=context_of(model),
            vocab_size=vocab_size_of(model),
            max_new_tokens=longest,
        )
    needed = max(len(prompt.tokens) for prompt in prompts) + longest
    if max_tokens is not None and max_tokens < needed:
        raise ConfigError(
            f"max_tokens_per_batch: found {max_tokens}, but a refreshed sequence may have {needed} "
            f"tokens (max_new_tokens {longest}); expected at least that many"
        )


def _prompt(rollout: Any) -> Prompt:
    return Prompt(rollout.prompt_id, rollout.tokens[: rollout.prompt_length].tolist(), None)


def renewed_seed(seed: int, window: int, prompt_id: str, sample: int) -> int:
    """Seed of the random numbers that sample a sequence in window number `window`."""
    return sequence_seed(sequence_seed(seed, "window", window), prompt_id, sample)


class RefreshTrainer(LopdTrainer):
    """`LopdTrainer` on rollouts that are refreshed every `refresh.every` optimizer steps.

    The answers in `train_dataset` are replaced; only its prompts and their order are used.

    Args:
        args, kwargs: as in `LopdTrainer`.
        refresh: settings of the refresh.
        tokenizer: the student's.
        dtype: of the student's weights, for the windows' manifests.
    """

    def __init__(
        self, *args: Any, refresh: Refresh, tokenizer: Any, dtype: str, **kwargs: Any
    ) -> None:
        super().__init__(*args, callbacks=[UpdateTimer(refresh.every)], **kwargs)
        self.refresh = refresh
        self.student = TransformersEngine(self.model, tokenizer, batch_size=refresh.batch_size)
        self.teacher = TransformersEngine.load(
            refresh.teacher,
            dtype=str(refresh.cache.manifest.model.dtype),
            device=str(self.args.device),
        )
        self.description = {"base": refresh.base, "dtype": dtype, "seed": self.args.seed}
        vocab = self.teacher.tokenizer.get_vocab()
        self.teacher_vocab = None if vocab == tokenizer.get_vocab() else vocab

    def step_dataset(self, sampler: StepSampler) -> "WindowDataset":
        """Items whose answers are those of the present window."""
        return WindowDataset(self, sampler)

    def renew(self, sequences: Sequence[Any], window: int) -> list[tuple[Rollout, TeacherScores]]:
        """Sample and score new answers to the sequences' prompts.

        Records the time in the log history.
        """
        with eval_mode(self.model):
            began = now(self.args.device)
            rollouts = self._generate(sequences, window)
            generated = now(self.args.device)
            scores = self._score(rollouts)
            scored = now(self.args.device)
        self.metrics.exclude_time(scored - began)
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
            Support.of(manifest),
            temperature=manifest.temperature,
            student=self.student,
            seen_by_teacher=self.refresh.seen_by_teacher,
        )
        if self.teacher_vocab is not None:
            tokens = [rollout.tokens for rollout in rollouts]
            listed = [ids for s in scores for ids in (s.topk_ids, s.extra_ids) if ids is not None]
            used = np.unique(np.concatenate([*tokens, *map(np.ravel, listed)]))
            check_same_tokens(
                self.student.tokenizer.get_vocab(), self.teacher_vocab, used[used >= 0], "teacher"
            )
        return scores


class WindowDataset(StepDataset):
    """The items of a step from the cache of its window, which is made at its first step."""

    def __init__(self, trainer: RefreshTrainer, sampler: StepSampler) -> None:
        super().__init__(trainer.train_dataset)
        self.trainer, self.sampler = trainer, sampler
        self.out = Path(str(trainer.args.output_dir)) / FOLDER
        self.first: int | None = None  # first step of the open window, from 0

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
        """Open the window that begins at step `first`, and make its cache if it does not exist.

        Raises:
            ShardError: the run continues within a window whose cache is missing or altered.
        """
        refresh = self.trainer.refresh
        last = min(first + refresh.every, self.trainer.state.max_steps)
        wanted = sorted({i for s in range(first, last) for i in self._sequences(s)})
        self._remove_unneeded(step)
        folder = self.out / f"step-{first:08d}"
        with CacheWriter.create(folder, self._manifest(first, len(wanted))) as writer:
            if writer.missing():
                if first < step:
                    raise ShardError(
                        f"{folder}: missing or altered, and checkpoint-{step} lies within that "
                        "window; restore it, or remove the checkpoint to continue from an earlier "
                        "one"
                    )
                sequences = [sequence_of(item) for item in self.dataset.__getitems__(wanted)]
                writer.write(0, self.trainer.renew(sequences, first // refresh.every))
            writer.finish()
        cache = refresh.cache
        self.window = TeacherCache.open(folder, support=cache.support, vocab_size=cache.vocab_size)
        self.places = {index: place for place, index in enumerate(wanted)}
        self.first = first

    def _remove_unneeded(self, step: int) -> None:
        """Remove all windows except those that contain the current step or a checkpoint.

        Folders with other names, such as copies of windows, are somebody else's.
        """
        every = self.trainer.refresh.every
        matches = [re.fullmatch(r"checkpoint-(\d+)", f.name) for f in self.out.parent.glob("*")]
        steps = {step, *(int(match[1]) for match in matches if match)}
        needed = {f"step-{s - s % every:08d}" for s in steps if s % every}
        for folder in self.out.glob("step-*"):
            if WINDOW.fullmatch(folder.name) and folder.name not in needed:
                shutil.rmtree(folder)

    def _manifest(self, first: int, sequences: int) -> CacheManifest:
        """The manifest of the run's cache with another sampler and number of sequences."""
        refresh, source = self.trainer.refresh, self.trainer.refresh.cache.manifest
        maker = {"weights": f"{refresh.base} after {first} steps", **self.trainer.description}
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
                },
                **{k: v for k, v in source.inputs.items() if k == "teacher_prompts"},
            },
            plan={"shards": [sequences]},
            k=source.k,
            top_p=source.top_p,
            codec=source.codec,
            temperature=source.temperature,
            scoring=source.scoring,
        )
