"""One HTML page about one or several training runs (`lopd report`)."""

import logging
from pathlib import Path
from typing import Any

from lopd.config.dtype import with_dtype
from lopd.config.report import ReportConfig
from lopd.engines.transformers import TransformersEngine
from lopd.evaluation.tokens import compare_tokens
from lopd.provenance.io import make_folder, remove_dead_writers, storing, write_atomic
from lopd.stages.model_access import loads_models
from lopd.stages.report.facts import Run, read_evaluation, read_run
from lopd.stages.report.page import render
from lopd.store import TeacherCache

logger = logging.getLogger(__name__)


@loads_models
def main(config: ReportConfig) -> Path:
    """Write the page: no external requests, and no markup of a model's text is interpreted.

    Raises:
        ConfigError: a folder is not one of a training run or of an evaluation.
        ShardError: the cache is incomplete or altered.
        ModelError, DataError: a model cannot be loaded, or not score the answers.
    """
    runs = [read_run(folder) for folder in config.folders]
    evaluations = [read_evaluation(folder) for folder in config.eval_folders]
    for evaluation in evaluations:
        if evaluation.weights not in {run.weights for run in runs}:
            logger.warning("%s: is of a model that is none of the runs'", evaluation.folder)
    answers = _answers(runs, config) if config.answers else []
    lengths = [_lengths(run) for run in runs]
    page = render(runs, evaluations, answers, lengths)
    out = Path(config.out or Path(config.folders[0]) / "report.html")
    with storing(out):
        make_folder(out.parent)
        remove_dead_writers(out)
        write_atomic(out, page.encode())
    return out


def _cache(run: Run) -> TeacherCache | None:
    """The cache of a run, if it has one and it is where it was."""
    if run.cache is None:
        return None
    if not Path(run.cache).is_dir():
        logger.warning("%s: its cache %s is not there; no answers", run.folder, run.cache)
        return None
    return TeacherCache.open(run.cache)


def _lengths(run: Run) -> dict[str, Any] | None:
    """Lengths and ends of the cached answers of a run."""
    cache = _cache(run)
    if cache is None:
        return None
    rollouts = list(cache.rollouts())
    lengths = [len(rollout.tokens) - rollout.prompt_length for rollout in rollouts]
    truncated = sum(rollout.finish_reason == "length" for rollout in rollouts)
    return {"lengths": lengths, "truncated": truncated}


def _answers(runs: list[Run], config: ReportConfig) -> list[dict[str, Any]]:
    """The first answers of each run's cache, token by token."""
    config, answers = with_dtype(config), []
    for run in runs:
        cache = _cache(run)
        if cache is None:
            continue
        if cache.manifest.scoring.tail == "renormalized":
            logger.warning("%s: its lists are renormalised; no answers are shown", run.cache)
            continue
        if cache.manifest.scoring.is_calibrated:
            logger.warning("%s: its log-probs are calibrated; no answers are shown", run.cache)
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
    return {
        "run": run.name,
        "id": rollout.prompt_id,
        "sample": rollout.sample,
        "finish": rollout.finish_reason,
        "prompt": str(tokenizer.decode(rollout.tokens[: rollout.prompt_length].tolist())),
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
