"""Training objectives and their settings."""

import math
from dataclasses import dataclass

from lopd.errors import ConfigError

SPARSE = ("reverse_kl", "forward_kl", "jsd")
OBJECTIVES = (*SPARSE, "policy_gradient", "cross_entropy")
TAILS = ("bucket", "renormalize", "truncate")
IMPORTANCE = ("none", "token", "token_truncated", "sequence")
CAPPED = ("token_truncated", "sequence")


@dataclass(frozen=True)
class Objective:
    """The loss of a response token; p is the student and q the teacher.

    Args:
        name: `reverse_kl` KL(p || q), `forward_kl` KL(q || p), or `jsd` between them, each over the
            teacher's list; `policy_gradient` -A log p of the sampled token with the advantage
            A = log q - log p of the current student, a constant; `cross_entropy` -log p of the
            token.
        tail: how the divergences treat the mass outside the list, as in
            `lopd_kernels.linear_sparse_divergence`.
        beta: weight of the mixture of jsd.
        advantage_clip: clips the advantage to [-advantage_clip, advantage_clip].
        temperature: divides the student's logits; the temperature at which the teacher scored.
        importance: constant ratio to the rollout policy that multiplies the policy gradient's
            rows: `token` p / p_rollout of the token, `token_truncated` that but at most
            `importance_cap`, `sequence` the product over the sequence's loss tokens, at most
            `importance_cap` if set. The normaliser remains the sum of the uncorrected weights, so
            the other sequences of a batch cause no bias.
        importance_cap: upper bound of the ratio.
        clip_range: PPO's clipped loss, which has its own ratio.
        workspace_bytes: bound on what the loss allocates; affects only rounding.

    Raises:
        ConfigError: a setting is unknown, out of range, or not for this objective.
    """

    name: str
    tail: str = "bucket"
    beta: float | None = None  # 0.5 for jsd
    advantage_clip: float | None = None
    temperature: float = 1.0
    importance: str = "none"
    importance_cap: float | None = None
    clip_range: float | None = None
    workspace_bytes: int | None = None

    def __post_init__(self) -> None:
        if self.name == "jsd" and self.beta is None:
            object.__setattr__(self, "beta", 0.5)
        for setting, value, known in (
            ("objective", self.name, OBJECTIVES),
            ("tail", self.tail, TAILS),
            ("importance", self.importance, IMPORTANCE),
        ):
            if value not in known:
                raise ConfigError(f"{setting}: found '{value}'; expected one of {', '.join(known)}")
        for setting in ("advantage_clip", "temperature", "importance_cap", "clip_range"):
            value = getattr(self, setting)
            if value is not None and not 0 < value < math.inf:
                raise ConfigError(f"{setting}: found {value}; expected a positive number")
        if self.beta is not None and self.name != "jsd":
            raise ConfigError(f"beta: {self.name} has no mixture; use jsd, or omit it")
        if self.beta is not None and not 0 < self.beta < 1:
            raise ConfigError(
                f"beta: found {self.beta}; expected strictly between 0 and 1; at the ends use "
                "forward_kl or reverse_kl"
            )
        if self.tail != "bucket" and self.name not in SPARSE:
            raise ConfigError(f"tail: {self.name} has none; use one of {', '.join(SPARSE)}")
        if self.advantage_clip is not None and self.name != "policy_gradient":
            raise ConfigError(f"advantage_clip: {self.name} has no advantage; use policy_gradient")
        self._check_importance()

    def _check_importance(self) -> None:
        if self.needs_rollout_logprobs and self.name != "policy_gradient":
            name = "clip_range" if self.importance == "none" else "importance"
            raise ConfigError(f"{name}: {self.name} has no correction; use policy_gradient")
        if self.importance == "token_truncated" and self.importance_cap is None:
            raise ConfigError("importance_cap: token_truncated needs one; use a positive number")
        if self.importance_cap is not None and self.importance not in CAPPED:
            raise ConfigError(
                f"importance_cap: importance '{self.importance}' has none; use "
                f"{' or '.join(CAPPED)}"
            )
        if self.clip_range is not None and self.importance != "none":
            raise ConfigError(
                f"clip_range: found importance '{self.importance}' too; the clipped loss has its "
                "own ratio, omit importance"
            )

    @property
    def held_out(self) -> "Objective":
        """The objective to evaluate on held-out sequences: a divergence.

        The policy-gradient loss is not a divergence, and on stored tokens its log-ratio has no
        minimum, so the reverse KL that it estimates takes its place.
        """
        if self.name == "policy_gradient":
            return Objective(
                "reverse_kl", temperature=self.temperature, workspace_bytes=self.workspace_bytes
            )
        return self

    @property
    def needs_rollout_logprobs(self) -> bool:
        """Whether batches must have the log-probs of the rollout policy."""
        return self.importance != "none" or self.clip_range is not None

    @property
    def needs_teacher(self) -> bool:
        """Whether batches must have the teacher's scores."""
        return self.name != "cross_entropy"
