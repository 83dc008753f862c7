"""Distil a teacher into a student from a cache, without the teacher (`lopd distill`).

First the manifests are checked: teacher, cache, rollouts and student must belong together. No
model is loaded before that. The manifest of the checkpoint records the checks that flags override.
"""

import logging
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import numpy as np

from lopd.config.distill import DistillConfig
from lopd.config.objective import SAMPLED, SPARSE, Objective
from lopd.errors import ConfigError, ProvenanceError
from lopd.models.load import check_model_folder
from lopd.provenance import (
    CacheManifest,
    ModelIdentity,
    check_distill,
    describe_model,
    digests_of,
    lineage_of,
    vocab_size_of,
)
from lopd.provenance.gate import is_own_teacher
from lopd.provenance.manifest import Override, short
from lopd.provenance.teachers import described
from lopd.stages.finished import is_finished, say_finished
from lopd.stages.model_access import loads_models
from lopd.stages.privileged import view_of_cache
from lopd.stages.sft import finish_checkpoint
from lopd.store import TeacherCache
from lopd.training import run as runs

LOG = logging.getLogger(__name__)


@loads_models
def main(config: DistillConfig) -> Path:
    """Check, train, save the model and, last, its manifest. Returns the model's folder.

    A finished run is left as it is.

    Raises:
        ProvenanceError: the artefacts do not belong together.
        ShardError: a shard is altered.
        ConfigError: `out` holds another recipe, the temperature is not the
            cache's, or the cache lacks what the objective needs.
        MissingFileError, DataError, ModelError: the student or the cache cannot be used.
    """
    check_model_folder(config.student)
    if is_finished(config, "distill", config.student, describe_inputs):
        return say_finished(config.out)
    cache, overrides = open_cache(config)
    _say_privileged(cache.manifest)
    objective = objective_of(config, cache)
    base = describe_model(config.student, dtype=config.dtype, engine="transformers")
    refresh = _refresh(config, cache, base.weights)
    made_of = origin(config, objective, base)
    checkpoint = runs.begin(config, base=base, **digests_of(made_of["inputs"]))
    trained = runs.train(
        config,
        cache,
        objective,
        model_path=config.student,
        checkpoint=checkpoint,
        k=cache.manifest.most_listed,
        refresh=refresh,
    )
    return finish_checkpoint(config, "distill", overrides=overrides, **made_of, **trained)


def describe_inputs(config: DistillConfig) -> dict[str, Any]:
    """Describe the cache and the teacher of a refresh for the manifest."""
    cache = TeacherCache.open(config.cache, allow_incomplete=True)
    scorer = cache.manifest.model
    made_by = described(cache.manifest.models)
    rollouts = cache.manifest.rollouts.digest
    inputs: dict[str, Any] = {"cache": {"digest": cache.digest(), "rollouts": rollouts, **made_by}}
    if cache.manifest.scoring.is_calibrated:
        inputs["cache"]["calibration"] = cache.manifest.raw["calibration"]
    if (template := cache.manifest.teacher_template) is not None:
        inputs["cache"]["teacher_template"] = template
    if config.teacher is not None:
        dtype, engine = str(scorer.dtype), str(scorer.engine)
        inputs["teacher"] = describe_model(config.teacher, dtype=dtype, engine=engine)
    return inputs


def _say_privileged(manifest: CacheManifest) -> None:
    """Say that the teacher read other prompts than the student's."""
    if manifest.teacher_template is not None:
        own = [is_own_teacher(manifest, model) for model in manifest.models.values()]
        who = "the student itself" if all(own) else "the teacher" + "s" * (len(own) > 1)
        LOG.info(
            f"scored by {who} with prompts of its own (template {short(manifest.teacher_template)})"
        )


def _refresh(config: DistillConfig, cache: TeacherCache, base: str) -> Any:
    """The refresh of the rollouts, checked; None without --teacher."""
    if config.teacher is None:
        return None
    from lopd.training.refresh import Refresh, check_one_at_work, check_refresh

    check_one_at_work(cache)
    view = view_of_cache(cache, {None: config.teacher}, config.student, "--refresh-every")
    settings = (config.teacher, config.refresh_every, config.refresh_batch_size)
    refresh = Refresh(*settings, cache, base, view.of)
    check_refresh(refresh, config.student, config.max_tokens_per_batch)
    return refresh


def objective_of(config: DistillConfig, cache: TeacherCache) -> Objective:
    """The objective, checked against the cache that it is minimised on.

    Raises:
        ConfigError: the cache lacks what the objective needs, or was scored at another temperature.
    """
    check_lists(config, cache)
    temperature = cache.manifest.temperature
    objective = config.objective_at(temperature)
    if merged := cache.manifest.scoring.eos_class:
        objective = replace(objective, eos_class=merged)
    if cache.manifest.scoring.is_calibrated:
        objective = replace(objective, calibrated=True)
    check_importance(config, objective, cache.manifest)
    check_sampling(config, objective, cache.manifest)
    check_token_weights(config, cache)
    if objective.temperature != temperature:
        raise ConfigError(
            f"temperature: found {objective.temperature}, but {config.cache} was scored at "
            f"{temperature}; leave it out, or score the rollouts again at that temperature"
        )
    return objective


def check_lists(config: DistillConfig, cache: TeacherCache) -> None:
    """Check that a cache has the lists that the objective needs.

    Raises:
        ConfigError: it has none, they were renormalised before they were imported, or they are the
            student's and the objective needs the teacher's.
    """
    if cache.manifest.scoring.is_calibrated:
        if config.objective in SPARSE:
            raise ConfigError(
                f"{config.cache}: its log-probs are calibrated and it has no lists; found "
                f"objective {config.objective}; expected {' or '.join(SAMPLED)}, or the cache that "
                "was calibrated"
            )
        if config.refresh_every:
            raise ConfigError(
                f"refresh_every: the log-probs of {config.cache} are calibrated, and those of "
                "refreshed answers would not be; leave --refresh-every out"
            )
    reason = config.objective_at(cache.manifest.temperature).needs_teachers_list
    if reason and cache.manifest.scoring.list_of == "student":
        raise ConfigError(
            f"{config.cache}: its lists hold the student's most probable ids; {reason}: score with "
            "--support union, or use --objective reverse_kl with --tail bucket"
        )
    if config.objective in SPARSE and config.lists == "list" and cache.has_no_lists:
        raise ConfigError(
            f"{config.cache}: has no lists, only the log-probs of the sampled tokens; found "
            f"objective {config.objective} with support list; expected --objective "
            "policy_gradient, or --support list+sampled with two buckets for each token"
        )
    ignores_tail = (
        config.objective in SPARSE and config.tail == "renormalize" and config.lists == "list"
    )
    if cache.manifest.scoring.tail == "renormalized" and not ignores_tail:
        raise ConfigError(
            f"{config.cache}: its lists were renormalised before they were imported, so the mass "
            f"outside them is lost; found objective {config.objective} with tail {config.tail} and "
            f"support {config.lists}; expected one of {', '.join(SPARSE)} with --tail "
            "renormalize --support list; or score the rollouts again"
        )


def check_importance(config: DistillConfig, objective: Objective, manifest: CacheManifest) -> None:
    """Check that the cache has the rollout log-probs that an importance correction needs.

    Raises:
        ConfigError: they are unknown, or the rollouts were not sampled.
    """
    if objective.needs_rollout_logprobs and (reason := missing_ratios(manifest)):
        flag = "clip_range" if objective.importance == "none" else "importance"
        flag = "tail" if objective.tail == "unbiased" else flag
        spelt = flag.replace("_", "-")
        raise ConfigError(
            f"{flag}: {config.cache}: {reason}, and the correction divides by the probability "
            f"that a token was sampled with; leave --{spelt} out, or roll out and score again"
        )


def check_sampling(config: DistillConfig, objective: Objective, manifest: CacheManifest) -> None:
    """Check that the rollouts are samples of the distributions that the unbiased tail compares.

    Raises:
        ConfigError: they were sampled at another temperature than the teacher's scores, or at a
            top_p below 1, or it is unknown how.
    """
    if objective.tail != "unbiased":
        return
    sampling, needed = manifest.rollouts.sampling, manifest.temperature
    known = None if sampling is None else (sampling.temperature, sampling.top_p)
    if known == (needed, 1):
        return
    found = "settings that it does not record"
    if known is not None and None not in known:
        found = f"temperature {known[0]:g} and top_p {known[1]:g}"
    raise ConfigError(
        f"tail: {config.cache}: its rollouts were sampled at {found}; unbiased needs temperature "
        f"{needed:g}, at which the teacher scored, and top_p 1; use --tail bucket, or roll out at "
        "these and score again"
    )


def check_token_weights(config: DistillConfig, cache: TeacherCache) -> None:
    """Check that the cache has what `token_weights` reads, and weights that are not lost.

    Raises:
        ConfigError: a reward or what the teacher thinks of a token is unknown, or `refresh_every`
            would replace answers that have weights of their own.
    """
    if config.token_weights == "advantage" and (unknown := np.isnan(cache.rewards()).sum()):
        raise ConfigError(
            f"token_weights: advantage reads the reward of each answer, and {config.cache} has "
            f"none for {unknown} of {len(cache)}; write 'reward' into every record and import the "
            "rollouts again ('lopd import --format rollouts'), or use divergence_rank or prefix"
        )
    lost = cache.manifest.scoring.tail == "renormalized"
    if lost and config.token_weights not in ("none", "prefix"):
        raise ConfigError(
            f"token_weights: {config.token_weights} reads the teacher's log-probs or entropies, "
            f"and {config.cache} has those of renormalised lists only; use prefix, or score the "
            "rollouts again"
        )
    if config.token_weights == "entropy" and cache.manifest.scoring.entropy == "absent":
        raise ConfigError(
            f"token_weights: entropy reads the teacher's entropy, which {config.cache} lacks; "
            "score with --engine transformers, or use divergence_rank or prefix"
        )
    if config.refresh_every and (cache.has_token_weights or (cache.weights() != 1).any()):
        raise ConfigError(
            f"refresh_every: the answers of {config.cache} have weights, and refreshed ones would "
            "have none; leave --refresh-every out, or import the rollouts without weights"
        )


def missing_ratios(manifest: CacheManifest) -> str | None:
    """Why the ratio to the policy that sampled the rollouts is unknown; None if it is known."""
    if manifest.scoring.rollout_logprobs == "absent":
        return "its rollout log-probs are unknown (it was imported without them)"
    sampling = manifest.rollouts.sampling
    if sampling is not None and sampling.temperature == 0:
        return "its rollouts are greedy (temperature 0)"
    return None


def open_cache(config: DistillConfig) -> tuple[TeacherCache, list[Override]]:
    """Open the cache for the student's vocabulary; also return the overrides that were needed.

    The first process verifies the shards; the others must wait for it before they read any.
    """
    cache = TeacherCache.open(
        config.cache,
        support=config.lists,
        vocab_size=vocab_size_of(config.student),
        allow_incomplete=True,
    )
    overrides = check_distill(
        config.student,
        cache.manifest,
        used_ids=cache.used_ids,
        cache_path=config.cache,
        faults=cache.faults,
        allow=config.allowed(),
        sampled_only=config.objective in SAMPLED,
    )
    if config.verify and runs.is_first():  # the others wait in `runs.begin`
        cache.verify()
    return cache, overrides


def origin(config: DistillConfig, objective: Objective, base: ModelIdentity) -> dict[str, Any]:
    """Entries of the result's manifest that are known before training.

    Args:
        base: the student.
    """
    return {
        "base": base,
        "inputs": describe_inputs(config),
        "lineage": {**_lineage(config.student), "initial_student": base.weights},
        "objective": {k: v for k, v in asdict(objective).items() if k != "workspace_bytes"},
    }


def _lineage(student: str) -> dict[str, Any]:
    """The student's lineage; unknown if its manifest describes other weights."""
    try:
        return dict(lineage_of(student).raw)
    except ProvenanceError:
        return {"sft_teacher": None, "declared": False}
