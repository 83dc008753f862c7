"""Measure a model on prompts with answers, and its KL to a teacher (`lopd eval`).

Accuracy is that of one greedy answer and of n sampled answers to each prompt, as avg@n and
pass@k. The KL is the reverse KL that `lopd distill` minimises, on the model's own samples with
`--teacher` and on stored sequences with `--cache`. It is exact if the lists cover the vocabulary
and a lower bound otherwise.
"""

import json
import logging
from dataclasses import asdict
from pathlib import Path
from typing import Any

from lopd.config.dtype import with_dtype
from lopd.config.eos import parse_eos_class
from lopd.config.evaluate import EvalConfig
from lopd.config.inference import Sampling
from lopd.data.prompts import Prompt, check_prompts, describe_prompts, load_prompts
from lopd.data.records import data_files, describe_data
from lopd.data.rendering import PromptEncoder
from lopd.data.skipped import Skipped
from lopd.engines.base import Engine
from lopd.engines.transformers import TransformersEngine
from lopd.errors import DataError
from lopd.evaluation.accuracy import Z95, generate_answers, measure_accuracy
from lopd.evaluation.grading import Grader, exact_grader, math_grader
from lopd.evaluation.kl import cache_kl, on_policy_kl, open_cache
from lopd.evaluation.results import RESULTS_NAME, accuracies, read_results
from lopd.models.limits import ModelLimits
from lopd.provenance import (
    MANIFEST_NAME,
    build_manifest,
    describe_model,
    eos_ids_of,
    read_manifest,
    vocab_size_of,
    warn_if_edited,
    write_manifest,
)
from lopd.provenance.folder_receipt import RECEIPT_NAME, seal
from lopd.provenance.io import pretty_json, storing, write_atomic
from lopd.provenance.teachers import described
from lopd.provenance.typed_json import value_at
from lopd.stages.batch_size import with_batch_size
from lopd.stages.finished import is_finished, say_finished
from lopd.stages.model_access import loads_models
from lopd.stages.table import print_fields
from lopd.store import TeacherCache
from lopd.store.folders import examine_folder, locked

LOG = logging.getLogger(__name__)

ANSWERS_NAME = "answers.jsonl"
# name in the summary, key of the results, digits
SHARES = (
    ("truncated", "truncated", 3),
    ("no answer found", "no_answer", 3),
    ("mean tokens", "mean_tokens", 1),
)
RESULTS = (ANSWERS_NAME, RESULTS_NAME, RECEIPT_NAME)  # written before the manifest


@loads_models
def main(config: EvalConfig) -> Path:
    """Evaluate, and write the answers, the results and, last, the manifest.

    The results of a finished evaluation are only printed again.

    Returns:
        The folder.

    Raises:
        ConfigError: `out` holds something else, or an evaluation with other settings or inputs.
        ProvenanceError: an id that occurs stands for different tokens in the model's tokenizer
            and in that of the teacher or the cache.
        DataError: a prompt has no answer, or is too long for the model.
        ShardError: the cache is incomplete or altered, or another process writes to `out`.
    """
    config, out = with_dtype(config), Path(config.out)
    if config.prompts is not None:
        data_files(config.prompts)  # a wrong path is told before models are read
    if is_finished(config, "eval", config.model, describe_inputs):
        print_fields(results_of(out))
        return say_finished(out)
    examine_folder(
        out, final=MANIFEST_NAME, allowed_files=RESULTS, kind="evaluation"
    ).require_writable()
    warn_if_edited(config.model)
    engine = _load(config, config.model)
    inputs = describe_inputs(config)
    prompts: list[Prompt] = []
    if config.prompts is not None:
        encoder = PromptEncoder(engine.tokenizer, config)
        prompts = _prompts(config.prompts, config, engine, encoder)
        inputs["prompts"] = describe_prompts(config.prompts, encoder)
        grader, prompts = _grader(config, prompts)
        tokens = [prompt.tokens for prompt in prompts]
        config = with_batch_size(config, [config.model], tokens, loaded=True)
        engine.batch_size = config.batch_size or engine.batch_size
    if config.cache is not None:
        cache = open_cache(config.cache, config.model, engine)
    if config.teacher is not None:
        merged = _merged_ids(config, config.teacher, engine)
    with locked(out):
        results: dict[str, Any] = {"prompts": 0, "samples": 0}
        answers: list[dict[str, Any]] = []
        if config.prompts is not None:
            results, answers, sampled = measure_accuracy(
                engine,
                prompts,
                grader,
                config.sampling(),
                num_samples=config.num_samples,
                seed=config.seed,
            )
        if config.cache is not None:
            held_out = not _trained_on(config.model, cache)
            results["cache_kl"] = cache_kl(engine, cache) | {"held_out": held_out}
        if config.teacher is not None:
            teacher = _load(config, config.teacher)
            if not config.sampling().is_raw:
                sampling = Sampling(config.max_new_tokens)
                sampled = generate_answers(engine, prompts, sampling, 1, config.seed)
            results["kl"] = on_policy_kl(engine, teacher, prompts, sampled, config.kl_k, merged)
        manifest = build_manifest(
            "evaluation",
            stage="eval",
            config=asdict(config),
            model=describe_model(config.model, dtype=config.dtype, engine=TransformersEngine.name),
            inputs=inputs,
        )
        lines = "".join(json.dumps(answer) + "\n" for answer in answers)
        with storing(out):
            write_atomic(out / ANSWERS_NAME, lines.encode())
            write_atomic(out / RESULTS_NAME, pretty_json(results))
            seal(out, (ANSWERS_NAME, RESULTS_NAME))
        write_manifest(out, manifest)
    print_fields(_summary(results))
    _show_without_answer(answers, config.judge)
    return out


def _show_without_answer(records: list[dict[str, Any]], judge: str) -> None:
    """Print how many complete answers the judge found nothing in, and the ends of some."""
    complete = [record for record in records if record["finish_reason"] == "stop"]
    without = [record for record in complete if record["answer"] is None]
    if not without:
        return
    remedy = "; --answer-regex or --judge math may find more" if judge == "exact" else ""
    shown = "".join(f"\n  {record['id']}: ...{record['text'][-60:]!r}" for record in without[:3])
    LOG.warning(
        f"eval: judge {judge} found nothing to grade in {len(without)} of {len(complete)} complete "
        f"answers, which count as wrong{remedy}. Some end in{shown}"
    )


def describe_inputs(config: EvalConfig) -> dict[str, Any]:
    """Describe the prompts, the cache and the teacher for the manifest."""
    inputs: dict[str, Any] = {}
    if config.prompts is not None:
        inputs["prompts"] = describe_data(config.prompts)
    if config.cache is not None:
        cache = TeacherCache.open(config.cache)
        inputs["cache"] = {"digest": cache.digest(), **described(cache.manifest.models)}
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


def _grader(config: EvalConfig, prompts: list[Prompt]) -> tuple[Grader, list[Prompt]]:
    """The grader, and the prompts without those whose answer it cannot grade.

    Raises:
        DataError: it cannot grade an answer, and `skip_bad_records` is not set, or any.
    """
    skipped = Skipped(str(config.prompts), config.skip_bad_records, kept=len(prompts))
    bad: set[int] = set()

    def refuse(prompt: Prompt, error: DataError) -> None:
        skipped.kept -= 1
        skipped.handle(error)
        bad.add(id(prompt))

    if config.judge == "math":
        grader = math_grader(prompts, refuse)
    else:
        grader = exact_grader(config.answer_regex, prompts, refuse)
    skipped.report()
    if not skipped.kept:
        raise DataError(f"{config.prompts}: no prompt is left; {skipped.errors[0]}")
    return grader, [prompt for prompt in prompts if id(prompt) not in bad]


def _prompts(
    path: str, config: EvalConfig, engine: TransformersEngine, encoder: PromptEncoder
) -> list[Prompt]:
    """Load the prompts, with their answers; check that each fits into the model's context."""
    prompts = load_prompts(path, encoder, limit=config.limit, answers=True)
    return check_prompts(
        prompts,
        path,
        context=engine.context,
        vocab_size=engine.vocab_size,
        max_new_tokens=config.max_new_tokens,
        skip=config.skip_bad_records,
    )


def _trained_on(model: str, cache: TeacherCache) -> bool:
    """Whether the model's manifest says that it was distilled on this cache or its rollouts."""
    if not (Path(model) / MANIFEST_NAME).is_file():
        return False
    inputs = read_manifest(model).inputs
    known = {"cache.digest": cache.digest(), "cache.rollouts": cache.manifest.rollouts.digest}
    return any(value_at(inputs, name) == digest for name, digest in known.items())


def _merged_ids(config: EvalConfig, teacher: str, model: Engine) -> tuple[int, ...]:
    """The ids that the KL takes as one token: of the flag, the cache, or the distillation.

    Warns if model and teacher end answers with different ids that do not count as one.

    Raises:
        ConfigError: an id is beyond a vocabulary.
    """
    merged = parse_eos_class(config.eos_class)
    if not merged and config.cache is not None:
        merged = TeacherCache.open(config.cache).manifest.scoring.eos_class
    if not merged and (Path(config.model) / MANIFEST_NAME).is_file():
        trained = read_manifest(config.model).raw.get("objective")
        merged = tuple(trained.get("eos_class") or ()) if isinstance(trained, dict) else ()
    for name, rows in (("the model", model.vocab_size), ("the teacher", vocab_size_of(teacher))):
        ModelLimits(name, rows).check_ids("eos_class", merged)
    ours = set(model.eos_ids)
    theirs = set(eos_ids_of(teacher) or ours)
    if ours != theirs and not ours | theirs <= set(merged):
        flag = ",".join(map(str, sorted(ours | theirs)))
        LOG.warning(
            f"the model ends answers with id {sorted(ours)}, the teacher with {sorted(theirs)}, "
            f"which the KL counts as different tokens; --eos-class {flag} counts them as one"
        )
    return merged


def _accuracy(results: dict[str, Any]) -> dict[str, str]:
    fields = {"prompts": f"{results['prompts']}, {results['samples']} sampled answers each"}
    for name in accuracies(results):
        value = results[name]
        fields[name] = f"{value['mean']:.3f}  [{value['low']:.3f}, {value['high']:.3f}]"
    for name, key, digits in SHARES:
        if (value := results.get(key)) is not None:
            fields[name] = f"{value:.{digits}f}"
    for row in results.get("by_length", ()):
        fields[f"{row['shortest']} to {row['longest']} tokens"] = (
            f"{row['accuracy']:.3f} of {row['count']} answers, {row['truncated']:.3f} truncated"
        )
    return fields


def _summary(results: dict[str, Any]) -> dict[str, str]:
    """The results as `main` prints them."""
    fields = _accuracy(results) if results["prompts"] else {}
    if "kl" in results:
        kl = results["kl"]
        exact = kl.get("exact", False)
        remedy = "" if exact else "; a --kl-k of at least the vocabulary gives the whole KL"
        fields["KL to the teacher"] = f"{_bound(kl, exact)} (k={kl.get('k')}{remedy})"
    if "cache_kl" in results:
        kl = results["cache_kl"]
        trained = "" if kl.get("held_out") else ", which the model was trained on"
        fields["KL to the cached teacher"] = (
            f"{_bound(kl, exact=False)} ({kl.get('sequences')} sequences{trained})"
        )
        for name, value in kl.get("by_teacher", {}).items():
            fields[f"KL to the cached {name}"] = f"at least {value:.4f} nat/token"
    return fields


def results_of(out: Path) -> dict[str, str]:
    """The results of a finished evaluation by name, as `main` prints them."""
    return _summary(read_results(out))


def headline(out: Path) -> str:
    """Accuracy and KL of a finished evaluation in one line."""
    results = read_results(out)
    words = [f"{name} {results[name]['mean']:.3f}" for name in accuracies(results)]
    if "kl" in results:
        words.append(f"KL {_bound(results['kl'], results['kl'].get('exact', False))}")
    if "cache_kl" in results:
        words.append(f"KL on the cache {_bound(results['cache_kl'], exact=False)}")
    return "  ".join(words)


def _bound(kl: dict[str, Any], exact: bool) -> str:
    """A KL in words; one over lists and one bucket is at most the KL over all ids."""
    spread = f" ± {Z95 * kl['standard_error']:.4f}" if "standard_error" in kl else ""
    value = f"{kl['nats_per_token']:.4f}{spread} nat/token"
    if exact or "outside_lists" not in kl:
        return value
    return f"at least {value}, {kl['outside_lists']:.1%} of the model outside the lists"
