"""Reverse KL of a model to a teacher, in nats per token.

KL(p || q), p the model, q the teacher, over the ids in the teacher's list and one bucket for
all others. `lopd distill` minimises the same quantity with the same code.
"""

from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch

from lopd.config.objective import Objective
from lopd.data.prompts import Prompt
from lopd.engines.base import Generation, score_rollouts, to_rollout
from lopd.engines.support import Support
from lopd.engines.transformers import TransformersEngine
from lopd.errors import ConfigError
from lopd.provenance import load_vocab, tokenizer_digest
from lopd.provenance.gate import check_same_tokens
from lopd.store import TeacherCache, scored_sequence
from lopd.training.batch import Collator, SequenceDataset, to_device
from lopd.training.metrics import OF_TEACHER
from lopd.training.step import step


def on_policy_kl(
    student: TransformersEngine,
    teacher: TransformersEngine,
    prompts: list[Prompt],
    sampled: list[Generation],
    k: int,
    eos_class: tuple[int, ...] = (),
) -> dict[str, Any]:
    """KL(student || teacher) on the student's own samples.

    Args:
        sampled: answers of the student at temperature 1 and top_p 1, the same number for each
            prompt, ordered by prompt.
        k: length of the teacher's lists; lowered to the size of the teacher's vocabulary.
        eos_class: ids that count as one token; they are in every list besides.

    Returns:
        What `reverse_kl` returns, the `k` that was used, and whether the value is `exact`: all ids
        are in the lists.

    Raises:
        ProvenanceError: an id that occurs stands for different tokens in the two tokenizers.
    """
    repeats = len(sampled) // len(prompts)
    jobs = [(prompt, i) for prompt in prompts for i in range(repeats)]
    rollouts = [to_rollout(*job, answer) for job, answer in zip(jobs, sampled, strict=True)]
    k = min(k, teacher.vocab_size)
    scores = score_rollouts(teacher, rollouts, Support(k, eos_class=eos_class))
    records = [
        scored_sequence(*pair, support="list", vocab_size=student.vocab_size)
        for pair in zip(rollouts, scores, strict=True)
    ]
    used = np.concatenate(
        [part for r in records for part in (r.rollout.tokens, r.topk_ids[r.topk_ids >= 0])]
    )
    check_same_tokens(
        student.tokenizer.get_vocab(), teacher.tokenizer.get_vocab(), np.unique(used), "teacher"
    )
    size = student.batch_size
    batches = (records[i : i + size] for i in range(0, len(records), size))
    result = reverse_kl(student, batches, Objective("reverse_kl", eos_class=eos_class))
    return {**result, "k": k, "exact": k == teacher.vocab_size}


def open_cache(path: str | Path, model: str | Path, student: TransformersEngine) -> TeacherCache:
    """Open a teacher cache for `cache_kl` and check that it is complete and unaltered.

    Args:
        model: folder of the student, for its tokenizer.

    Raises:
        ConfigError: the lists were renormalised, so the mass outside them is unknown.
        ProvenanceError: an id that occurs stands for different tokens in the two tokenizers.
        ShardError: a shard is missing or altered.
    """
    cache = TeacherCache.open(path, vocab_size=student.vocab_size)
    if cache.manifest.scoring.tail == "renormalized":
        raise ConfigError(
            f"{path}: its lists were renormalised before they were imported, so the mass outside "
            "them is lost; a KL needs it: leave --cache out, or score the rollouts again"
        )
    cache.verify()
    ours = tokenizer_digest(model)
    for name, teacher in cache.manifest.models.items():
        if teacher.tokenizer != ours:
            theirs, used = load_vocab(path, teacher.tokenizer), cache.used_ids(name)
            check_same_tokens(student.tokenizer.get_vocab(), theirs, used, "cache")
    return cache


def cache_kl(student: TransformersEngine, cache: TeacherCache) -> dict[str, Any]:
    """KL(student || stored teacher) over all loss tokens of a cache, at the cache's temperature.

    The buckets are those of training: the stored list with the sampled token, and all other ids.

    Returns:
        What `reverse_kl` returns, `sequences` and `temperature`.

    Raises:
        DataError: a sequence is longer than the model's context.
    """
    data = SequenceDataset(cache, context=student.context, vocab_size=student.vocab_size)
    longest = max(len(rollout.tokens) for rollout in cache.rollouts())
    size = max(1, student.tokens_per_batch // longest)
    batches = (data.__getitems__(range(len(data))[i : i + size]) for i in range(0, len(data), size))
    temperature = cache.manifest.temperature
    objective = Objective(
        "reverse_kl", temperature=temperature, eos_class=cache.manifest.scoring.eos_class
    )
    result = reverse_kl(student, batches, objective)
    return {**result, "sequences": len(data), "temperature": temperature}


@torch.no_grad()
def reverse_kl(
    student: TransformersEngine,
    batches: Iterable[Sequence[Any]],
    objective: Objective = Objective("reverse_kl"),  # noqa: B008 (it is frozen)
) -> dict[str, Any]:
    """Mean reverse KL over the loss tokens of batches of scored sequences.

    Returns:
        `nats_per_token`, `tokens`, and `outside_lists`, the mean share of the model's probability
        outside the lists. These ids count as one, so the value is at most the KL over all ids. With
        several teachers also `by_teacher`, the mean over the tokens of each.
    """
    collate, by_teacher = Collator(weighted=False), dict[str, Any]()
    total, outside, tokens = 0.0, 0.0, 0
    for items in batches:
        batch = to_device(collate(items), student.device)
        loss, stats = step(student.model, batch, objective, num_items=1.0)
        total += float(loss)
        outside += float(stats["student_tail"])
        tokens += len(batch["labels"])
        for name in batch.get("teacher_names", ()):
            pair = stats[f"{OF_TEACHER}{name}"].double().cpu()
            by_teacher[name] = by_teacher.get(name, 0) + pair
    means = {name: float(value / weight) for name, (value, weight) in sorted(by_teacher.items())}
    found = {"nats_per_token": total / tokens, "tokens": tokens, "outside_lists": outside / tokens}
    return found | ({"by_teacher": means} if means else {})
