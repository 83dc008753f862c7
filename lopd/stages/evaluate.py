"""Measure a model on prompts with answers (`lopd eval`).

Greedy accuracy, and over n sampled answers avg@n and the unbiased
pass@k = 1 - C(n - c, k) / C(n, k) (Chen et al., arXiv 2107.03374), each the mean over
prompts with a 95 % interval: Wilson's, at the number of independent trials that the
prompts' spread is worth. Answers are judged by `lopd.evaluation.grading`, and one that did not
end by itself is wrong. With a teacher, also the on-policy reverse KL: nats per token of the model's
own samples, K+1 buckets, the same quantity that `lopd distill` descends; exact when k covers
the vocabulary and a lower bound otherwise. With a teacher cache, the same on its sequences.
"""

import json
import re
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Literal

import numpy as np
from tqdm import tqdm

from lopd.config.fields import setting, setting_of
from lopd.data.prompts import Prompt, check_prompts, load_prompts
from lopd.engines.base import Generation, Sampling, sequence_seed
from lopd.engines.options import GenerationOptions, ScoringOptions
from lopd.engines.transformers import TransformersEngine
from lopd.errors import ConfigError, DataError
from lopd.evaluation.accuracy import by_length, estimate, pass_at_k, table
from lopd.evaluation.grading import Judge, exact_judge, math_judge
from lopd.evaluation.kl import cache_kl, on_policy_kl, open_cache
from lopd.models.load import resolve_device
from lopd.provenance import (
    MANIFEST_NAME,
    build_manifest,
    describe_file,
    describe_model,
    digests_of,
    read_manifest,
    write_manifest,
)
from lopd.provenance.io import pretty_json, write_atomic
from lopd.store import TeacherCache
from lopd.store.folders import examine_folder

RESULTS = ("answers.jsonl", "results.json")  # written before the manifest
ANSWER_REGEX = r"#+\s*(\S[^#\n]*)"


@dataclass(kw_only=True)
class EvalConfig(GenerationOptions, ScoringOptions):
    """Measure accuracy on prompts with answers, and the KL to a teacher (`lopd eval`)."""

    model: str = setting(identity=False, help="Folder of the model to evaluate.")
    prompts: str = setting_of(
        GenerationOptions,
        "prompts",
        help="JSONL or parquet file with 'prompt' or 'messages', and 'answer', in each record.",
    )
    out: str = setting(identity=False, help="Folder for results.json and the answers.")
    teacher: str | None = setting(
        None, group="Model and data", identity=False, help="Folder of the teacher, for the KL."
    )
    cache: str | None = setting(
        None,
        group="Model and data",
        identity=False,
        help="Teacher cache of held-out rollouts, for the KL on them.",
    )
    kl_k: int = setting(
        64, within="[1, inf)", group="Evaluation", help="Teacher tokens per position of the KL."
    )
    num_samples: int = setting(
        4, within="[1, inf)", group="Sampling", help="Number of sampled answers to each prompt."
    )
    temperature: float = setting_of(
        GenerationOptions,
        "temperature",
        within="(0, inf)",
        remedy=" (greedy answers are evaluated as well)",
        help="Temperature of the sampled answers; greedy answers are evaluated as well.",
    )
    judge: Literal["exact", "math"] = setting(
        "exact",
        group="Evaluation",
        help="exact compares what answer_regex finds; math uses math-verify (lopd[eval]).",
    )
    answer_regex: str = setting(
        ANSWER_REGEX,
        group="Evaluation",
        help="Regular expression with one group, whose last match is the model's answer.",
    )

    def __post_init__(self) -> None:
        super().__post_init__()
        resolve_device(self.device)
        try:
            groups = re.compile(self.answer_regex).groups
        except re.error as error:
            raise ConfigError(f"answer_regex: {error}; expected a regular expression") from None
        if groups != 1:
            raise ConfigError(f"answer_regex: found {groups} groups; expected exactly one")
        if self.judge == "math":
            if self.answer_regex != ANSWER_REGEX:
                raise ConfigError(
                    "answer_regex: --judge math does not use it; leave one of them out"
                )
            math_judge()


def main(config: EvalConfig) -> Path:
    """Evaluate, write answers, results and, last, the manifest; returns the folder.

    Raises:
        ConfigError: `out` holds something already.
        ProvenanceError: model and teacher, or cache, do not mean the same by the ids that occur.
        DataError: prompts without answers, or that the model has no room for.
        ShardError: the cache is incomplete or altered.
    """
    out = examine_folder(config.out, final=MANIFEST_NAME, own_files=RESULTS).require_writable().path
    engine = _load(config, config.model)
    prompts = _prompts(config, engine)
    if config.cache is not None:
        cache = open_cache(config.cache, config.model, engine)
    inputs = describe_inputs(config)
    results, answers, sampled = measure(engine, prompts, config)
    if config.cache is not None:
        held_out = not _trained_on(config.model, cache.digest())
        results["cache_kl"] = cache_kl(engine, cache) | {"held_out": held_out}
    if config.teacher is not None:
        teacher = _load(config, config.teacher)
        if not config.sampling().is_raw:
            sampled = sample(engine, prompts, Sampling(config.max_new_tokens), 1, config.seed)
        results["kl"] = on_policy_kl(engine, teacher, prompts, sampled, config.kl_k)
    manifest = build_manifest(
        "evaluation",
        stage="eval",
        config=asdict(config),
        model=describe_model(config.model, dtype=config.dtype, engine=TransformersEngine.name),
        inputs=inputs,
    )
    out.mkdir(parents=True, exist_ok=True)
    lines = "".join(json.dumps(answer) + "\n" for answer in answers)
    write_atomic(out / "answers.jsonl", lines.encode())
    write_atomic(out / "results.json", pretty_json(results))
    write_manifest(out, manifest)
    for line in table(results):
        print(line)
    return out


def describe_inputs(config: EvalConfig) -> dict[str, Any]:
    """The prompts, the cache and the teacher, for the manifest."""
    inputs: dict[str, Any] = {"prompts": describe_file(config.prompts)}
    if config.cache is not None:
        cache = TeacherCache.open(config.cache)
        inputs["cache"] = {"digest": cache.digest(), "model": cache.manifest.model}
    if config.teacher is not None:
        teacher = describe_model(config.teacher, dtype=config.dtype, engine=TransformersEngine.name)
        inputs["teacher"] = teacher
    return inputs


def _load(config: EvalConfig, path: str) -> TransformersEngine:
    return TransformersEngine.load(
        path,
        dtype=config.dtype,
        device=config.device,
        batch_size=config.batch_size,
        tokens_per_batch=config.tokens_per_batch,
    )


def _prompts(config: EvalConfig, engine: TransformersEngine) -> list[Prompt]:
    """The prompts, each with an answer and with room for the model's."""
    prompts = load_prompts(config.prompts, engine.tokenizer, limit=config.limit)
    unanswered = [prompt.id for prompt in prompts if prompt.answer is None]
    if unanswered:
        raise DataError(
            f"{config.prompts}: {len(unanswered)} of {len(prompts)} prompts have no 'answer' "
            f"(first: '{unanswered[0]}'); expected one in each line"
        )
    check_prompts(
        prompts,
        config.prompts,
        context=engine.context,
        vocab_size=engine.vocab_size,
        max_new_tokens=config.max_new_tokens,
    )
    return prompts


def _trained_on(model: str, digest: str) -> bool:
    """Whether the model's manifest, if it has one, says that it was distilled on this cache."""
    if not (Path(model) / MANIFEST_NAME).is_file():
        return False
    return digests_of(read_manifest(model).inputs).get("cache") == digest


def _judge(config: EvalConfig, prompts: list[Prompt]) -> Judge:
    return math_judge(prompts) if config.judge == "math" else exact_judge(config.answer_regex)


def sample(
    engine: TransformersEngine, prompts: list[Prompt], sampling: Sampling, n: int, seed: int
) -> list[Generation]:
    """n answers to every prompt, prompt by prompt."""
    with tqdm(total=len(prompts) * n, unit="seq", desc="answering") as bar:
        return engine.generate(
            [prompt.tokens for prompt in prompts for _ in range(n)],
            sampling,
            [sequence_seed(seed, prompt.id, i) for prompt in prompts for i in range(n)],
            progress=bar.update,
        )


def measure(
    engine: TransformersEngine, prompts: list[Prompt], config: EvalConfig
) -> tuple[dict[str, Any], list[dict[str, Any]], list[Generation]]:
    """Accuracies; every answer as a record; the sampled answers as tokens, prompt by prompt."""
    n, judge = config.num_samples, _judge(config, prompts)
    first = sample(engine, prompts, Sampling(config.max_new_tokens, temperature=0.0), 1, 0)
    sampled = sample(engine, prompts, config.sampling(), n, config.seed)

    def record(prompt: Prompt, answer: Generation, number: int | None) -> dict[str, Any]:
        text = engine.tokenizer.decode(answer.tokens.tolist(), skip_special_tokens=True)
        given, right = judge(text, str(prompt.answer))
        return {
            "id": prompt.id,
            "sample": number,
            "text": text,
            "tokens": len(answer.tokens),
            "finish_reason": answer.finish_reason,
            "answer": given,
            "correct": answer.finish_reason == "stop" and right,
        }

    jobs = [(prompt, number) for prompt in prompts for number in range(n)]
    greedy = [record(*pair, None) for pair in zip(prompts, first, strict=True)]
    drawn = [record(p, answer, i) for (p, i), answer in zip(jobs, sampled, strict=True)]
    correct = np.array([answer["correct"] for answer in drawn]).reshape(len(prompts), n)
    results: dict[str, Any] = {
        "prompts": len(prompts),
        "samples": n,
        "greedy": estimate(np.array([answer["correct"] for answer in greedy], dtype=float)),
        f"avg@{n}": estimate(correct.mean(1)),
        "truncated": float(np.mean([answer.finish_reason == "length" for answer in sampled])),
        "mean_tokens": float(np.mean([len(answer.tokens) for answer in sampled])),
    }
    results["by_length"] = by_length(
        np.array([len(answer.tokens) for answer in sampled]),
        correct.ravel(),
        np.array([answer.finish_reason == "length" for answer in sampled]),
    )
    for k in sorted({1 << i for i in range(n.bit_length())} | {n}):
        results[f"pass@{k}"] = estimate(pass_at_k(correct.sum(1), n, k))
    return results, greedy + drawn, sampled
