"""Distil a teacher into a student from the cache alone (`lopd distill`).

Whether teacher, cache, rollouts and student belong together is checked first, from files,
before any model is built. Overrides given by flags are recorded in the result's manifest.
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
    build_manifest,
    check_distill,
    describe_model,
    digests_of,
    lineage_of,
    vocab_size_of,
    write_manifest,
)
from lopd.provenance.manifest import Override
from lopd.store import TeacherCache
from lopd.training import run as runs
from lopd.training.memory import MemorySettings
from lopd.training.objective import SPARSE, Importance, Objective, Tail
from lopd.training.options import Schedule, WatchOptions

_override = partial(setting, group="Provenance overrides")


@dataclass(kw_only=True)
class DistillConfig(WatchOptions):
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
    support: Literal["list+sampled", "list"] = setting(
        "list+sampled", group="Objective", help="Whether the lists include the sampled token."
    )
    verify: bool = setting(
        True,
        group="Model and data",
        identity=False,
        help="Check the hashes of the cache before training.",
    )
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
    refresh_every: int = setting(
        0,
        within="[0, inf)",
        group="Objective",
        help="Resample and rescore rollouts every N steps (needs --teacher); 0 uses the cache.",
    )
    teacher: str | None = setting(
        None,
        group="Model and data",
        identity=False,
        help="Folder of the teacher that scored the cache, for refresh_every.",
    )
    refresh_batch_size: int = setting(
        64,
        within="[1, inf)",
        group="Memory",
        help="Sequences decoded together when rollouts are resampled.",
    )
    learning_rate: float = setting_of(WatchOptions, "learning_rate", default=2e-6)
    lr_scheduler_type: Schedule = setting_of(WatchOptions, "lr_scheduler_type", default="constant")
    weight_decay: float = setting_of(WatchOptions, "weight_decay", default=0.1)

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
                "drop_truncated: goes by the ends of the cached answers, which --refresh_every "
                "replaces; leave one of them out"
            )

    def objective_at(self, cache_temperature: float) -> Objective:
        """The objective on a cache that was scored at this temperature."""
        temperature = cache_temperature if self.temperature is None else self.temperature
        return Objective(
            self.objective,
            self.tail,
            self.beta,
            self.advantage_clip,
            temperature,
            self.importance,
            self.importance_cap,
            self.clip_range,
            self.workspace,
        )

    def allowed(self) -> frozenset[str]:
        flags = {name: getattr(self, f"allow_{name.replace('-', '_')}") for name in OVERRIDES}
        return frozenset(name for name, given in flags.items() if given)


def main(config: DistillConfig) -> Path:
    """Check, train, save, and write the manifest last. Returns the model's folder.

    Raises:
        ProvenanceError: artefacts that do not belong together.
        ShardError: a shard is altered.
        ConfigError: `out` holds a finished run or another recipe, or another temperature than
            the cache's is asked for.
        MissingFileError, DataError, ModelError: student or cache that cannot be used.
    """
    check_model_folder(config.student)
    cache, overrides = open_cache(config)
    check_lists(config, cache)
    temperature = cache.manifest.temperature
    objective = config.objective_at(temperature)
    check_correction(config, objective, cache.manifest)
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
    if not runs.is_first():
        return Path(config.out)
    manifest = build_manifest(
        "checkpoint",
        stage="distill",
        config=asdict(config),
        model=describe_model(config.out, dtype=config.dtype, engine="transformers"),
        base=base,
        inputs=inputs,
        lineage={**_lineage(config.student), "initial_student": base.weights},
        overrides=overrides,
        objective={k: v for k, v in asdict(objective).items() if k != "workspace_bytes"},
        **trained,
    )
    write_manifest(config.out, manifest)
    return Path(config.out)


def describe_inputs(config: DistillConfig) -> dict[str, Any]:
    """The cache that is trained on and the teacher that renews it, for the manifest."""
    cache = TeacherCache.open(config.cache, allow_incomplete=True)
    scorer = cache.manifest.model
    inputs: dict[str, Any] = {"cache": {"digest": cache.digest(), "model": scorer}}
    if config.teacher is not None:
        dtype, engine = str(scorer.dtype), str(scorer.engine)
        inputs["teacher"] = describe_model(config.teacher, dtype=dtype, engine=engine)
    return inputs


def _refresh(config: DistillConfig, cache: TeacherCache, base: str) -> Any:
    """What renews the cache's rollouts; None if nothing does."""
    if config.teacher is None:
        return None
    from lopd.training.refresh import Refresh, check_refresh

    settings = (config.teacher, config.refresh_every, config.refresh_batch_size)
    refresh = Refresh(*settings, cache, base)
    check_refresh(refresh, config.student, config.max_tokens_per_batch)
    return refresh


def check_lists(config: DistillConfig, cache: TeacherCache) -> None:
    """Refuse an objective that needs more of the lists than an imported cache has.

    Raises:
        ConfigError: there are none, or they were renormalised before they were imported.
    """
    if config.objective in SPARSE and config.support == "list" and cache.has_no_lists:
        raise ConfigError(
            f"{config.cache}: holds the log-probs of the sampled tokens and no lists; found "
            f"objective {config.objective} with support list, expected --objective "
            "policy_gradient, or --support list+sampled with its two buckets a token"
        )
    sees_lists_alone = (
        config.objective in SPARSE and config.tail == "renormalize" and config.support == "list"
    )
    if cache.manifest.scoring.tail == "renormalized" and not sees_lists_alone:
        raise ConfigError(
            f"{config.cache}: its lists were renormalised before they were imported, so the mass "
            f"outside them is lost; found objective {config.objective} with tail {config.tail} and "
            f"support {config.support}, expected one of {', '.join(SPARSE)} with --tail "
            "renormalize --support list; or score the rollouts again"
        )


def check_correction(config: DistillConfig, objective: Objective, manifest: CacheManifest) -> None:
    """Refuse a correction by ratios that the cache does not have.

    Raises:
        ConfigError: rollout log-probs that are unknown, or rollouts that were not sampled.
    """
    if objective.needs_rollout_logprobs and (why := without_ratios(manifest)):
        flag = "clip_range" if objective.importance == "none" else "importance"
        raise ConfigError(
            f"{flag}: {config.cache}: {why}, and the correction divides by the probability that "
            f"a token was sampled with; leave --{flag} out, or roll out and score again"
        )


def without_ratios(manifest: CacheManifest) -> str | None:
    """Why the cache's rollouts have no ratio to the policy that sampled them, if so."""
    if manifest.scoring.rollout_logprobs == "absent":
        return "its rollout log-probs are unknown (they were imported without)"
    sampling = manifest.rollouts.sampling
    if sampling is not None and sampling.temperature == 0:
        return "its rollouts are greedy (temperature 0)"
    return None


def open_cache(config: DistillConfig) -> tuple[TeacherCache, list[Override]]:
    """The cache as the student will read it, and the overrides that admitted it."""
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
    if config.verify and runs.is_first():  # the others wait for it where the run begins
        cache.verify()
    return cache, overrides


def _lineage(student: str) -> dict[str, Any]:
    """The student's lineage; unknown where an override admitted one that contradicts itself."""
    try:
        return dict(lineage_of(student).raw)
    except ProvenanceError:
        return {"sft_teacher": None, "declared": False}
