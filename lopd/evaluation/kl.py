"""Reverse KL of a model to a teacher, in nats per token.

KL(p || q), p the model, q the teacher, over the ids in the teacher's list and one bucket for
all others. `lopd distill` minimises the same quantity with the same code.
"""

from collections.abc import Iterable, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from lopd.config.objective import Objective
from lopd.data.prompts import Prompt
from lopd.engines.base import Generation, score_rollouts, to_rollout
from lopd.engines.support import Support
from lopd.engines.transformers import TransformersEngine
from lopd.errors import ConfigError
from lopd.evaluation.standard_error import standard_error
from lopd.models.head import HeadOptions, run_with_loss
from lopd.provenance import load_vocab, tokenizer_digest
from lopd.provenance.gate import check_same_tokens
from lopd.store import TeacherCache, scored_sequence
from lopd.training.batch import Batch, Collator, SequenceDataset, to_device
from lopd.training.metrics import sequence_sums
from lopd.training.row_losses import loss_of_rows
from lopd.training.step import head_arguments, model_inputs


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
        ConfigError: the lists were renormalised, so the mass outside them is unknown, or the
            log-probs are calibrated.
        ProvenanceError: an id that occurs stands for different tokens in the two tokenizers.
        ShardError: a shard is missing or altered.
    """
    cache = TeacherCache.open(path, vocab_size=student.vocab_size)
    if cache.manifest.scoring.tail == "renormalized":
        raise ConfigError(
            f"{path}: its lists were renormalised before they were imported, so the mass outside "
            "them is lost; a KL needs it: leave --cache out, or score the rollouts again"
        )
    if cache.manifest.scoring.is_calibrated:
        raise ConfigError(
            f"{path}: its log-probs are calibrated, and a KL needs those of the teacher; name the "
            "cache that was calibrated"
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
        `nats_per_token`, its `standard_error` (absent where all answers are to one prompt),
        `tokens`, and `outside_lists`, the mean share of the model's probability outside the lists.
        These ids count as one, so the value is at most the KL over all ids. With several teachers
        also `by_teacher`, the mean over the tokens of each.
    """
    collate = Collator(weighted=False)
    by_sequence = []  # [S, 3]: sums of KL, probability outside the list, and tokens
    teachers: list[str | None] = []  # [S]
    prompts: list[str] = []  # [S]
    for items in batches:
        teachers += [item.teacher_id for item in items]
        prompts += [item.rollout.prompt_id for item in items]
        batch = to_device(collate(items), student.device)
        loss_fn = partial(_row_values, batch, objective)
        values = run_with_loss(student.model, model_inputs(batch), loss_fn)
        count = len(batch["sequence_names"])
        sums = [sequence_sums(rows.double(), batch["sequence_index"], count) for rows in values]
        by_sequence.append(torch.stack(sums, 1).cpu().numpy())
    sums_of = np.concatenate(by_sequence)
    total, outside, tokens = sums_of.sum(0)
    result: dict[str, Any] = {"nats_per_token": float(total / tokens)}
    if (error := standard_error(sums_of[:, 0], sums_of[:, 2], prompts)) is not None:
        result["standard_error"] = error
    if names := sorted({name for name in teachers if name is not None}):
        sums_by = {name: sums_of[[name == each for each in teachers]].sum(0) for name in names}
        result["by_teacher"] = {name: float(kl / count) for name, (kl, _, count) in sums_by.items()}
    return {**result, "tokens": int(tokens), "outside_lists": float(outside / tokens)}


def _row_values(
    batch: Batch,
    objective: Objective,
    hidden: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    head: HeadOptions,
) -> tuple[Tensor, Tensor, Tensor]:
    """KL, probability outside the list, and 1, for each row."""
    rows, options = head_arguments(batch, objective, hidden, bias, head)
    _, by_row = loss_of_rows(rows, weight, batch, objective, options)
    return by_row["reverse_kl"], by_row["student_tail"], torch.ones_like(by_row["reverse_kl"])
