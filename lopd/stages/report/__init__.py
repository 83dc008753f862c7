"""One HTML page about one or several training runs (`lopd report`)."""

import logging
from collections import Counter
from pathlib import Path
from typing import Any

from lopd.config.dtype import with_dtype
from lopd.config.report import ReportConfig
from lopd.engines.transformers import TransformersEngine
from lopd.errors import LopdError
from lopd.evaluation.tokens import compare_tokens
from lopd.provenance.found import artefact_kind
from lopd.provenance.io import make_folder, remove_dead_writers, storing, write_atomic
from lopd.stages.model_access import loads_models
from lopd.stages.report.facts import Evaluation, Run, read_evaluation, read_run
from lopd.stages.report.memory import memory_of
from lopd.stages.report.page import render
from lopd.store import TeacherCache

LOG = logging.getLogger(__name__)
TITLE = 50  # characters of a prompt's end by which an answer is known


@loads_models
def main(config: ReportConfig) -> Path:
    """Write the page: no external requests, and no markup of a model's text is interpreted.

    Raises:
        ConfigError: a folder is not one of a training run or of an evaluation.
        ShardError: the cache is incomplete or altered.
        ModelError, DataError: a model cannot be loaded, or not score the answers.
    """
    runs = [read_run(folder) for folder in config.folders]
    evaluations = _evaluations(runs, config)
    caches = [_cache(run) for run in runs]
    answers = _answers(runs, caches, config) if config.answers else []
    lengths = [None if cache is None else _lengths(cache) for cache in caches]
    memory = [
        None if found is None else memory_of(run, found["longest"], found["k"])
        for run, found in zip(runs, lengths, strict=True)
    ]
    page = render(runs, evaluations, answers, lengths, memory)
    out = Path(config.out or Path(config.folders[0]) / "report.html")
    with storing(out):
        make_folder(out.parent)
        remove_dead_writers(out)
        write_atomic(out, page.encode())
    return out


def _cache(run: Run) -> TeacherCache | None:
    """The cache of a run, where it was or beside the run; None if it is gone or another."""
    if run.cache is None:
        return None
    beside = Path(run.folder).resolve().parent / Path(run.cache).name
    folder = next((f for f in (Path(run.cache), beside) if artefact_kind(f) == "cache"), None)
    if folder is None:
        LOG.warning(f"{run.folder}: its cache {run.cache} is not there, nor {beside}; no answers")
        return None
    cache = TeacherCache.open(folder, vocab_size=run.vocab_size)
    if run.cache_digest not in (None, cache.digest()):
        LOG.warning(f"{run.folder}: was trained on another cache than {folder}; no answers")
        return None
    return cache


def _lengths(cache: TeacherCache) -> dict[str, Any] | None:
    """Lengths and ends of the cached answers, and the longest sequence; None if there are none."""
    rollouts = list(cache.rollouts())
    if not rollouts:
        return None
    return {
        "lengths": [len(rollout.tokens) - rollout.prompt_length for rollout in rollouts],
        "k": cache.manifest.k,
        "longest": max(len(rollout.tokens) for rollout in rollouts),
        "ends": Counter(rollout.finish_reason for rollout in rollouts),
    }


def _evaluations(runs: list[Run], config: ReportConfig) -> list[Evaluation]:
    """The evaluations that are named, or those beside the runs: of their models and students.

    Those beside the runs that cannot be read are left out, with a warning: nobody asked for them.
    """
    known = {weights for run in runs for weights in (run.base, run.weights)}
    if config.evals is not None:
        evaluations = [read_evaluation(folder) for folder in config.eval_folders]
        for evaluation in evaluations:
            if evaluation.weights not in known:
                LOG.warning(f"{evaluation.folder}: is of a model that is none of the runs'")
        return evaluations
    parents = dict.fromkeys(Path(run.folder).resolve().parent for run in runs)
    found = []
    for folder in (
        folder
        for parent in parents
        for pattern in ("*", "eval/*")
        for folder in sorted(parent.glob(pattern))
    ):
        try:
            if artefact_kind(folder) == "evaluation":
                found.append(read_evaluation(str(folder)))
        except LopdError as error:
            LOG.warning(f"{error}; left out")
    own = [evaluation for evaluation in found if evaluation.weights in known]
    bases = {run.base for run in runs}
    return sorted(own, key=lambda evaluation: evaluation.weights not in bases)  # before, then after


def _answers(
    runs: list[Run], caches: list[TeacherCache | None], config: ReportConfig
) -> list[dict[str, Any]]:
    """The first answers of each run's cache, token by token."""
    config, answers = with_dtype(config), []
    for run, cache in zip(runs, caches, strict=True):
        if cache is None:
            continue
        if cache.manifest.scoring.tail == "renormalized":
            LOG.warning(f"{run.cache}: its lists are renormalised; no answers are shown")
            continue
        if cache.manifest.scoring.is_calibrated:
            LOG.warning(f"{run.cache}: its log-probs are calibrated; no answers are shown")
            continue
        engine = TransformersEngine.load(
            run.folder,
            dtype=config.dtype,
            device=config.device,
            tokens_per_batch=config.tokens_per_batch,
        )
        sequences = [cache[i] for i in range(min(config.answers, len(cache)))]
        compared = compare_tokens(
            engine,
            sequences,
            length=config.list_length,
            temperature=cache.manifest.temperature,
            eos_class=cache.manifest.scoring.eos_class,
        )
        for sequence, tokens in zip(sequences, compared, strict=True):
            answers.append(describe_answer(run, sequence, tokens, engine.tokenizer))
    return answers


def describe_answer(run: Run, sequence: Any, tokens: Any, tokenizer: Any) -> dict[str, Any]:
    """An answer as the page's script reads it: texts, divergences in nat, and lists."""
    rollout = sequence.rollout

    def text(token: int) -> str:
        return str(tokenizer.decode([int(token)])) if token < len(tokenizer) else f"id {token}"

    def listed(ids: Any, logprobs: Any) -> list[list[Any]]:
        return [
            [text(token), round(float(lp), 3)]
            for token, lp in zip(ids, logprobs, strict=True)
            if token >= 0
        ]

    response = rollout.tokens[rollout.prompt_length :]
    prompt = rollout.tokens[: rollout.prompt_length].tolist()
    plain = " ".join(str(tokenizer.decode(prompt, skip_special_tokens=True)).split())
    return {
        "title": plain if len(plain) <= TITLE else f"...{plain[-TITLE:]}",
        "run": run.name,
        "id": rollout.prompt_id,
        "sample": rollout.sample,
        "finish": rollout.finish_reason,
        "prompt": str(tokenizer.decode(prompt)),
        "tokens": [text(token) for token in response],
        "divergence": [round(float(x), 4) for x in tokens.divergence],
        "teacher": [
            listed(*row) for row in zip(tokens.teacher_ids, tokens.teacher_logprobs, strict=True)
        ],
        "model": [
            listed(*row) for row in zip(tokens.model_ids, tokens.model_logprobs, strict=True)
        ],
        "sampled": [
            [round(float(q), 3), round(float(p), 3)]
            for q, p in zip(tokens.teacher_sampled, tokens.model_sampled, strict=True)
        ],
    }
