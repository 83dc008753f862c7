"""The training objectives and their settings."""

import math
from dataclasses import dataclass

from lopd.errors import ConfigError

SPARSE = ("reverse_kl", "forward_kl", "jsd")


OBJECTIVES = (*SPARSE, "policy_gradient", "cross_entropy")


TAILS = ("bucket", "renormalize", "truncate")


IMPORTANCE = ("none", "token", "token_truncated", "sequence")


@dataclass(frozen=True)
class Objective:
    """What is minimised at a response token, p the student and q the teacher.

    `reverse_kl` KL(p || q), `forward_kl` KL(q || p), `jsd` between them at `beta`, each over
    the teacher's list and, by `tail`, the mass outside it; `policy_gradient` -A log p of the
    sampled token with A = log q - log p of the current student, a constant, clipped to
    [-advantage_clip, advantage_clip]; `cross_entropy` -log p of the token.

    `importance` multiplies the policy gradient's rows by a constant ratio to the policy that
    sampled: `token` p / p_rollout of the token, `token_truncated` the smaller of that and
    `importance_cap`, `sequence` the product over the sequence's loss tokens, capped where a cap
    is given. The normaliser stays the sum of the uncorrected weights, so nothing is biased by
    which sequences share a batch. `clip_range` is PPO's clipped form, which has its own ratio.

    `temperature` divides the student's logits: the one that the teacher was scored at.
    `workspace_bytes` bounds what the loss allocates, and so changes rounding alone.
    """

    name: str
    tail: str = "bucket"
    beta: float | None = None  # 0.5 for jsd, which alone has one
    advantage_clip: float | None = None
    temperature: float = 1.0
    importance: str = "none"
    importance_cap: float | None = None
    clip_range: float | None = None
    workspace_bytes: int | None = None

    def __post_init__(self) -> None:
        if self.name not in OBJECTIVES:
            known = ", ".join(OBJECTIVES)
            raise ConfigError(f"objective: found '{self.name}'; expected one of {known}")
        if self.tail not in TAILS:
            raise ConfigError(f"tail: found '{self.tail}'; expected one of {', '.join(TAILS)}")
        if self.name == "jsd" and self.beta is None:
            object.__setattr__(self, "beta", 0.5)
        if self.beta is not None and self.name != "jsd":
            raise ConfigError(f"beta: {self.name} has no mixture; only jsd does")
        if self.beta is not None and not 0 < self.beta < 1:
            raise ConfigError(
                f"beta: found {self.beta}; expected strictly between 0 and 1; at the ends use "
                "forward_kl or reverse_kl"
            )
        if self.tail != "bucket" and self.name not in SPARSE:
            raise ConfigError(f"tail: {self.name} has none; only {', '.join(SPARSE)} do")
        if self.advantage_clip is not None and self.name != "policy_gradient":
            raise ConfigError(f"advantage_clip: {self.name} has no advantage; use policy_gradient")
        if self.advantage_clip is not None and not 0 < self.advantage_clip < math.inf:
            raise ConfigError(
                f"advantage_clip: found {self.advantage_clip}; expected a positive number"
            )
        if not 0 < self.temperature < math.inf:
            raise ConfigError(f"temperature: found {self.temperature}; expected a positive number")
        self._check_importance()

    def _check_importance(self) -> None:
        if self.importance not in IMPORTANCE:
            raise ConfigError(
                f"importance: found '{self.importance}'; expected one of {', '.join(IMPORTANCE)}"
            )
        for name in ("importance_cap", "clip_range"):
            value = getattr(self, name)
            if value is not None and not 0 < value < math.inf:
                raise ConfigError(f"{name}: found {value}; expected a positive number")
        if self.needs_rollout_logprobs and self.name != "policy_gradient":
            name = "clip_range" if self.importance == "none" else "importance"
            raise ConfigError(f"{name}: {self.name} has no correction; use policy_gradient")
        if self.importance == "token_truncated" and self.importance_cap is None:
            raise ConfigError("importance_cap: token_truncated needs one; give a positive number")
        if self.importance_cap is not None and self.importance not in (
            "token_truncated",
            "sequence",
        ):
            raise ConfigError(
                f"importance_cap: importance '{self.importance}' has none; only token_truncated "
                "and sequence do"
            )
        if self.clip_range is not None and self.importance != "none":
            raise ConfigError(
                f"clip_range: found importance '{self.importance}' too; the clipped form has its "
                "own ratio, leave importance out"
            )

    @property
    def held_out(self) -> "Objective":
        """What sequences kept out of training are judged by: the divergence that is minimised.

        The policy gradient's loss is none, and on stored tokens its log-ratio has no minimum; the
        reverse KL that it estimates stands in for it.
        """
        if self.name == "policy_gradient":
            return Objective(
                "reverse_kl", temperature=self.temperature, workspace_bytes=self.workspace_bytes
            )
        return self

    @property
    def needs_rollout_logprobs(self) -> bool:
        return self.importance != "none" or self.clip_range is not None

    @property
    def needs_teacher(self) -> bool:
        return self.name != "cross_entropy"
