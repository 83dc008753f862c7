"""Settings of `lopd distill`."""

from dataclasses import dataclass
from functools import partial
from typing import Literal

from lopd.config.eos import EosOptions
from lopd.config.fields import setting, setting_of
from lopd.config.objective import Importance, Objective, Tail, TokenWeights
from lopd.config.training import MemorySettings, MonitoringOptions, Schedule, refuse_unused
from lopd.errors import ConfigError

OVERRIDES = (
    "incomplete-cache",
    "teacher-mismatch",
    "student-mismatch",
    "tokenizer-mismatch",
    "eos-mismatch",
)
_data = partial(setting, group="Model and data", identity=False)
_objective = partial(setting, group="Objective")
_override = partial(setting, group="Provenance overrides")


@dataclass(kw_only=True)
class DistillConfig(MonitoringOptions):
    """Train a student on a teacher cache (`lopd distill`)."""

    student: str = setting(
        identity=False, help="Folder or hub id of the model that made the rollouts."
    )
    cache: str = setting(identity=False, help="Folder that `lopd score` wrote.")
    out: str = setting(identity=False, help="Folder to write; an interrupted run is continued.")
    objective: Literal["reverse_kl", "forward_kl", "jsd", "policy_gradient", "log_ratio"] = (
        setting_of(MemorySettings, "objective")
    )
    tail: Tail = setting_of(Objective, "tail")
    beta: float | None = setting_of(Objective, "beta")
    advantage_clip: float | None = setting_of(Objective, "advantage_clip")
    importance: Importance = setting_of(Objective, "importance")
    importance_cap: float | None = setting_of(Objective, "importance_cap")
    clip_range: float | None = setting_of(Objective, "clip_range")
    delta: float | None = setting_of(Objective, "delta")
    entropy_bonus: float | None = setting_of(Objective, "entropy_bonus")
    dense_share: float | None = setting_of(Objective, "dense_share")
    tolerance: float | None = setting_of(Objective, "tolerance")
    token_weights: TokenWeights = setting_of(Objective, "token_weights")
    weight_beta: float | None = setting_of(Objective, "weight_beta")
    weight_share: float | None = setting_of(Objective, "weight_share")
    weight_entropy: float | None = setting_of(Objective, "weight_entropy")
    temperature: float | None = setting_of(
        Objective,
        "temperature",
        default=None,
        help="Divides the student's logits; must be the cache's, which is the default.",
    )
    support: Literal["list+sampled", "list"] = _objective(
        "list+sampled",
        help="Whether the lists include the sampled token. The unbiased tail reads them without.",
    )
    verify: bool = _data(
        True,
        help="Check the hashes of the cache before training.",
        off="Train without checking the hashes of the cache first.",
    )
    allow_teacher_mismatch: bool = _override(
        False, help="Train although another or an edited teacher made the SFT answers."
    )
    allow_student_mismatch: bool = _override(
        False, help="Train although another or an edited model made the rollouts."
    )
    allow_tokenizer_mismatch: bool = _override(
        False, help="Train although ids mean different tokens to teacher and student."
    )
    allow_eos_mismatch: bool = setting_of(EosOptions, "allow_eos_mismatch")
    allow_incomplete_cache: bool = _override(
        False, help="Train on the finished shards of the cache."
    )
    refresh_every: int = _objective(
        0,
        within="[0, inf)",
        help="Resample and rescore rollouts every N steps (needs --teacher); 0 uses the cache.",
    )
    teacher: str | None = _data(
        None, help="Folder or hub id of the teacher that scored the cache, for refresh_every."
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
        if not self.refresh_every:
            refuse_unused(self, ("refresh_batch_size",), "refresh_every is 0; set it")
        if self.refresh_every and self.drop_truncated:
            raise ConfigError(
                "drop_truncated: depends on the ends of the cached answers, which --refresh-every "
                "replaces; leave one of the two out"
            )

        if self.refresh_every and self.token_weights == "advantage":
            raise ConfigError(
                "token_weights: advantage needs the reward of each answer, and --refresh-every "
                "replaces the answers; leave one of the two out"
            )

    def objective_at(self, cache_temperature: float) -> Objective:
        """The objective; its temperature is the cache's unless one is set."""
        temperature = cache_temperature if self.temperature is None else self.temperature
        names = (
            "tail", "beta", "advantage_clip", "importance", "importance_cap", "clip_range",
            "delta", "entropy_bonus", "token_weights", "weight_beta", "weight_share",
            "weight_entropy", "dense_share", "tolerance",
        )  # fmt: skip
        settings = {name: getattr(self, name) for name in names}
        return Objective(
            self.objective, temperature=temperature, workspace_bytes=self.workspace, **settings
        )

    @property
    def lists(self) -> Literal["list+sampled", "list"]:
        """The support that is read; the unbiased tail wants lists that ignore the sample."""
        return "list" if self.tail == "unbiased" else self.support

    def allowed(self) -> frozenset[str]:
        """The checks of `lopd.provenance` that flags override."""
        return frozenset(
            name for name in OVERRIDES if getattr(self, f"allow_{name.replace('-', '_')}")
        )
