"""Distil a teacher into a student from a cache, without the teacher (`lopd distill`).

First the manifests are checked: teacher, cache, rollouts and student must belong together. No
model is loaded before that. The manifest of the checkpoint records the checks that flags override.
"""

from dataclasses import asdict, dataclass
from functools import partial
from pathlib import Path
from typing import Any, Literal

from lopd.config.fields import setting, setting_of
from lopd.errors import ConfigError, ProvenanceError
from lopd.models.load import check_model_folder
from lopd.provenance import (
    OVERRIDES,
    CacheManifest,
    check_distill,
    describe_model,
    digests_of,
    lineage_of,
    vocab_size_of,
)
from lopd.provenance.manifest import Override
from lopd.stages.sft import finish_checkpoint
from lopd.store import TeacherCache
from lopd.training import run as runs
from lopd.training.memory import MemorySettings
from lopd.training.objective import SPARSE, Importance, Objective, Tail
from lopd.training.options import MonitoringOptions, Schedule

_data = partial(setting, group="Model and data", identity=False)
_objective = partial(setting, group="Objective")
_override = partial(setting, group="Provenance overrides")


@dataclass(kw_only=True)
class DistillConfig(MonitoringOptions):
    """Train a student on a teacher cache (`lopd distill`)."""

    student: str = setting(identity=False, help="Folder of the model that made the rollouts.")
    cache: str = setting(identity=False, help="Folder that `lopd score` wrote.")
    out: str = setting(identity=False, help="Folder to write; an interrupted run is continued.")
    objective: Literal["reverse_kl", "forward_kl", "jsd", "policy_gradient"] = setting_of(
        MemorySettings, "objective"
    )
    tail: Tail = setting_of(Objective, "tail")
    beta: float | None = setting_of(Objective, "beta")
    advantage_clip: float | None = setting_of(Objective, "advantage_clip")
    importance: Importance = setting_of(Objective, "importance")
    importance_cap: float | None = setting_of(Objective, "importance_cap")
    clip_range: float | None = setting_of(Objective, "clip_range")
    temperature: float | None = setting_of(
        Objective,
        "temperature",
        default=None,
        help="Divides the student's logits; must be the cache's, which is the default.",
    )
    support: Literal["list+sampled", "list"] = _objective(
        "list+sampled", help="Whether the lists include the sampled token."
    )
    verify: bool = _data(True, help="Check the hashes of the cache before training.")
    allow_teacher_mismatch: bool = _override(
        False, help="Train although another teacher made the SFT answers."
    )
    allow_student_mismatch: bool = _override(
        False, help="Train although another model made the rollouts."
    )
    allow_tokenizer_mismatch: bool = _override(
        False, help="Train although ids mean different tokens to teacher and student."
    )
    allow_incomplete_cache: bool = _override(
        False, help="Train on the finished shards of the cache."
    )
    refresh_every: int = _objective(
        0,
        within="[0, inf)",
        help="Resample and rescore rollouts every N steps (needs --teacher); 0 uses the cache.",
    )
    teacher: str | None = _data(
        None, help="Folder of the teacher that scored the cache, for refresh_every."
    )
    refresh_batch_size: int = setting(
        64,
        within="[1, inf)",
        group="Memory",
        help="Sequences decoded together when rollouts are resampled.",
    )
    learning_rate: float = setting_of(MonitoringOptions, "learning_rate", default=2e-6)
    lr_scheduler_type: Schedule = setting_of(
        MonitoringOptions, "lr_scheduler_type", default="constant"
    )
    weight_decay: float = setting_of(MonitoringOptions, "weight_decay", default=0.1)

    def __post_init__(self) -> None:
        super().__post_init__()
        self.objective_at(1.0)
        if (self.refresh_every > 0) != (self.teacher is not None):
            raise ConfigError(
                f"refresh_every: found {self.refresh_every} with teacher {self.teacher!r}; "
                "expected a positive number and the teacher that scored the cache, or neither"
            )
        if self.refresh_every and self.drop_truncated:
            raise ConfigError(
                "drop_truncated: depends on the ends of the cached answers, which --refresh_every "
                "replaces; leave one of the two out"
            )

    def objective_at(self, cache_temperature: float) -> Objective:
        """The objective; its temperature is the cache's unless one is set."""
        temperature = cache_temperature if self.temperature is None else self.temperature
        names = ("tail", "beta", "advantage_clip", "importance", "importance_cap", "clip_range")
        settings = {name: getattr(self, name) for name in names}
        return Objective(
            self.objective, temperature=temperature, workspace_bytes=self.workspace, **settings
        )

    def allowed(self) -> frozenset[str]:
        """The checks of `lopd.provenance` that flags override."""
        return frozenset(
            name for name in OVERRIDES if getattr(self, f"allow_{name.replace('-', '_')}")
        )


def main(config: DistillConfig) -> Path:
    """Check, train, save the model and, last, its manifest. Returns the model's folder.

    Raises:
        ProvenanceError: the artefacts do not belong together.
        ShardError: a shard is altered.
        ConfigError: `out` holds a finished run or another recipe, the temperature is not the
            cache's, or the cache lacks what the objective needs.
        MissingFileError, DataError, ModelError: the student or the cache cannot be used.
    """
    check_model_folder(config.student)
    cache, overrides = open_cache(config)
    check_lists(config, cache)
    temperature = cache.manifest.temperature
    objective = config.objective_at(temperature)
    check_importance(config, objective, cache.manifest)
    if objective.temperature != temperature:
        raise ConfigError(
            f"temperature: found {objective.temperature}, but {config.cache} was scored at "
            f"{temperature}; leave it out, or score the rollouts again at that temperature"
        )
    base = describe_model(config.student, dtype=config.dtype, engine="transformers")
    refresh = _refresh(config, cache, base.weights)
    inputs = describe_inputs(config)
    checkpoint = runs.begin(config, base=base, **digests_of(inputs))
    trained = runs.train(
        config,
        cache,
        objective,
        model_path=config.student,
        checkpoint=checkpoint,
        k=cache.manifest.k,
        refresh=refresh,
    )
    return finish_checkpoint(
        config,
        "distill",
        base=base,
        inputs=inputs,
        lineage={**_lineage(config.student), "initial_student": base.weights},
        overrides=overrides,
        objective={k: v for k, v in asdict(objective).items() if k != "workspace_bytes"},
        **trained,
    )


def describe_inputs(config: DistillConfig) -> dict[str, Any]:
    """Describe the cache and the teacher of a refresh for the manifest."""
    cache = TeacherCache.open(config.cache, allow_incomplete=True)
    scorer = cache.manifest.model
    inputs: dict[str, Any] = {"cache": {"digest": cache.digest(), "model": scorer}}
    if config.teacher is not None:
        dtype, engine = str(scorer.dtype), str(scorer.engine)
        inputs["teacher"] = describe_model(config.teacher, dtype=dtype, engine=engine)
    return inputs


def _refresh(config: DistillConfig, cache: TeacherCache, base: str) -> Any:
    """The refresh of the rollouts, checked; None without --teacher."""
    if config.teacher is None:
        return None
    from lopd.training.refresh import Refresh, check_refresh

    settings = (config.teacher, config.refresh_every, config.refresh_batch_size)
    refresh = Refresh(*settings, cache, base)
    check_refresh(refresh, config.student, config.max_tokens_per_batch)
    return refresh


def check_lists(config: DistillConfig, cache: TeacherCache) -> None:
    """Check that an imported cache has the lists that the objective needs.

    Raises:
        ConfigError: it has none, or they were renormalised before they were imported.
    """
    if config.objective in SPARSE and config.support == "list" and cache.has_no_lists:
        raise ConfigError(
            f"{config.cache}: has no lists, only the log-probs of the sampled tokens; found "
            f"objective {config.objective} with support list; expected --objective "
            "policy_gradient, or --support list+sampled with two buckets for each token"
        )
    ignores_tail = (
        config.objective in SPARSE and config.tail == "renormalize" and config.support == "list"
    )
    if cache.manifest.scoring.tail == "renormalized" and not ignores_tail:
        raise ConfigError(
            f"{config.cache}: its lists were renormalised before they were imported, so the mass "
            f"outside them is lost; found objective {config.objective} with tail {config.tail} and "
            f"support {config.support}; expected one of {', '.join(SPARSE)} with --tail "
            "renormalize --support list; or score the rollouts again"
        )


def check_importance(config: DistillConfig, objective: Objective, manifest: CacheManifest) -> None:
    """Check that the cache has the rollout log-probs that an importance correction needs.

    Raises:
        ConfigError: they are unknown, or the rollouts were not sampled.
    """
    if objective.needs_rollout_logprobs and (reason := missing_ratios(manifest)):
        flag = "clip_range" if objective.importance == "none" else "importance"
        raise ConfigError(
            f"{flag}: {config.cache}: {reason}, and the correction divides by the probability "
            f"that a token was sampled with; leave --{flag} out, or roll out and score again"
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
    """Open the cache for the student's vocabulary; also return the overrides that were needed."""
    cache = TeacherCache.open(
        config.cache,
        support=config.support,
        vocab_size=vocab_size_of(config.student),
        allow_incomplete=True,
    )
    overrides = check_distill(
        config.student,
        cache.manifest,
        used_ids=cache.used_ids,
        cache_path=config.cache,
        missing_shards=cache.missing_shards,
        allow=config.allowed(),
    )
    if config.verify and runs.is_first():  # the other processes wait for it when the run begins
        cache.verify()
    return cache, overrides


def _lineage(student: str) -> dict[str, Any]:
    """The student's lineage; unknown if its manifest describes other weights."""
    try:
        return dict(lineage_of(student).raw)
    except ProvenanceError:
        return {"sft_teacher": None, "declared": False}
