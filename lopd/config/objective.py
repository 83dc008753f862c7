"""Training objectives and their settings."""

from dataclasses import dataclass, replace
from functools import partial
from typing import Literal

from lopd.config.fields import Settings, setting
from lopd.errors import ConfigError

SPARSE = ("reverse_kl", "forward_kl", "jsd")
SAMPLED = ("policy_gradient", "log_ratio")  # of the sampled token's teacher log-prob only
OBJECTIVES = (*SPARSE, *SAMPLED, "cross_entropy")
DELTA = 5.0  # nat; that of LSPD
Tail = Literal["bucket", "renormalize", "truncate", "generalized", "unbiased"]
Importance = Literal["none", "token", "token_truncated", "sequence"]
TokenWeights = Literal["none", "advantage", "entropy", "divergence_rank", "prefix"]
# The settings of each kind of token weights, with their defaults.
WEIGHT_SETTINGS = {
    "none": {},
    "advantage": {"weight_beta": 1.0},
    "entropy": {"weight_entropy": 0.8},
    "divergence_rank": {"weight_share": 0.4, "weight_beta": 0.5},
    "prefix": {"weight_share": 0.3},
}
_objective = partial(setting, group="Objective")


@dataclass(frozen=True)
class Objective(Settings):
    """The loss at a response token, with p the student and q the teacher.

    `reverse_kl` is KL(p || q), `forward_kl` KL(q || p), `jsd` lies between them at `beta`; each
    is over the teacher's list and, by `tail`, the mass outside it. `policy_gradient` is -A log p of
    the sampled token with A = log q - log p of the current student, a constant, clipped to
    [-advantage_clip, advantage_clip]. `cross_entropy` is -log p of the token.

    `log_ratio` is rho(log p - log q) - entropy_bonus H(p) of the sampled token, with rho(d) = d^2
    up to |d| = delta and delta (2 |d| - delta) beyond. It needs no lists. The policy gradient on
    stored tokens has half its gradient, for an advantage_clip of delta and no bonus.

    `importance` weights the rows of the policy gradient by a constant ratio to the policy that
    sampled: `token` is p / p_rollout of the token, `token_truncated` the smaller of that and
    `importance_cap`, `sequence` the product over the loss tokens of the sequence, capped if a cap
    is set. The normaliser stays the sum of the uncorrected weights, so that the sequences that
    share a batch do not bias the loss. `clip_range` selects PPO's clipped objective, which has its
    own ratio.

    The tail `unbiased` of `reverse_kl` corrects the bucket at the sampled token, weighted by
    p / p_rollout, at most `importance_cap`; on average it is the KL over the whole vocabulary.

    `token_weights` multiplies the row weights, as `lopd.training.token_weights` says, but for
    `entropy`: there tokens where the teacher is uncertain take the forward KL instead of the
    reverse, and weigh as before.

    `dense_share` and `tolerance` save work in the backward, as in
    `lopd_kernels.linear_sparse_divergence`: outside the lists the gradient is formed for some
    tokens only, either a sample, without bias, or all but the least important ones.

    Args:
        name: one of `OBJECTIVES`.
        tail: how the mass outside the teacher's list is treated, as in
            `lopd_kernels.linear_sparse_divergence`.
        beta: of jsd; 0.5 by default.
        advantage_clip, importance, clip_range: of the policy gradient, as above.
        delta, entropy_bonus: of log_ratio; 5 nat and 0 by default. A delta of 0 means no bound.
        importance_cap: of the policy gradient and of tail "unbiased".
        token_weights: which tokens of an answer weigh more.
        weight_beta, weight_share, weight_entropy: of `token_weights`, those in `WEIGHT_SETTINGS`.
        temperature: divides the student's logits; equals the temperature of the teacher's scores.
        workspace_bytes: limit on what the loss allocates; changes only rounding.
        calibrated: whether the teacher's log-probs are calibrated and thus of no distribution; a
            divergence refuses them, and held-out sequences are evaluated by log_ratio.
        eos_class: ids that a divergence takes as one token; every teacher's list must hold them.

    Raises:
        ConfigError: a setting is out of range or does not belong to this objective.

    Source: GKD, arXiv:2306.13649, for the divergences; Lightning OPD, arXiv:2604.13010, and PPO,
    arXiv:1707.06347, for the policy gradient; LSPD, arXiv:2609.35505, for log_ratio.

    >>> Objective("jsd").beta
    0.5
    >>> Objective("reverse_kl", clip_range=0.2)
    Traceback (most recent call last):
    lopd.errors.ConfigError: clip_range: reverse_kl has no correction; use policy_gradient
    """

    name: str
    tail: Tail = setting(
        "bucket",
        group="Objective",
        help="How the mass outside the teacher's list is treated; unbiased (reverse_kl only) needs "
        "rollouts at top_p 1 and the temperature of the scores.",
    )
    beta: float | None = _objective(
        None,
        within="(0, 1)",
        remedy="; at the ends use forward_kl or reverse_kl",
        help="jsd: weight of its mixture, between 0 and 1; 0.5 by default.",
    )
    advantage_clip: float | None = _objective(
        None,
        within="(0, inf)",
        help="policy_gradient: clip |log q - log p| to this; not clipped by default.",
    )
    temperature: float = _objective(1.0, within="(0, inf)", help="Divides the student's logits.")
    importance: Importance = setting(
        "none",
        group="Objective",
        help="policy_gradient: importance weights relative to the rollout policy.",
    )
    importance_cap: float | None = _objective(
        None,
        within="(0, inf)",
        help="Upper bound on the weights of token_truncated, sequence or the unbiased tail.",
    )
    clip_range: float | None = _objective(
        None, within="(0, inf)", help="policy_gradient: PPO's clip range around a ratio of 1."
    )
    delta: float | None = _objective(
        None,
        within="[0, inf)",
        help="log_ratio: |log p - log q| from which the loss is linear, 5 by default; 0: never.",
    )
    entropy_bonus: float | None = _objective(
        None, within="[0, inf)", help="log_ratio: weight of the student's entropy; 0 by default."
    )
    token_weights: TokenWeights = setting(
        "none",
        group="Objective",
        help="Weigh the tokens of an answer: advantage (by the teacher's preference and the "
        "answer's reward), divergence_rank (the share where teacher and student differ most), "
        "prefix (the first share), or entropy (forward KL where the teacher is uncertain).",
    )
    weight_beta: float | None = _objective(
        None,
        within="[0, inf)",
        help="advantage: steepness, 1 by default; divergence_rank: exponent of the mean of the "
        "two probabilities, 0.5 by default.",
    )
    weight_share: float | None = _objective(
        None,
        within="(0, 1]",
        help="Share of an answer's tokens that are kept; divergence_rank 0.4, prefix 0.3 by "
        "default.",
    )
    weight_entropy: float | None = _objective(
        None,
        within="[0, inf)",
        help="entropy: nat from which the teacher counts as uncertain, 0.8 by default.",
    )
    dense_share: float | None = _objective(
        None,
        within="(0, 1]",
        help="Share of the tokens whose gradient outside the list is formed: a sample, without "
        "bias; all by default.",
    )
    tolerance: float | None = _objective(
        None,
        within="(0, 1)",
        help="Leave out the smallest gradients outside the lists, up to this share of the rest of "
        "the gradient; none by default.",
    )
    workspace_bytes: int | None = None
    eos_class: tuple[int, ...] = ()
    calibrated: bool = False

    def __post_init__(self) -> None:
        if self.name not in OBJECTIVES:
            known = ", ".join(OBJECTIVES)
            raise ConfigError(f"objective: found '{self.name}'; expected one of {known}")
        super().__post_init__()
        if self.beta is not None and self.name != "jsd":
            raise ConfigError(f"beta: {self.name} has no mixture; only jsd does")
        if self.name == "jsd" and self.beta is None:
            object.__setattr__(self, "beta", 0.5)
        for setting_name in ("delta", "entropy_bonus"):
            if getattr(self, setting_name) is not None and self.name != "log_ratio":
                raise ConfigError(f"{setting_name}: {self.name} has none; use log_ratio")
        if self.name == "log_ratio" and self.delta is None:
            object.__setattr__(self, "delta", DELTA)
        if self.tail != "bucket" and self.name not in SPARSE:
            raise ConfigError(f"tail: {self.name} has none; only {', '.join(SPARSE)} do")
        if self.tail == "unbiased" and self.name != "reverse_kl":
            raise ConfigError(
                f"tail: unbiased is a form of reverse_kl; found {self.name}; use bucket, "
                "generalized or another objective"
            )
        if self.advantage_clip is not None and self.name != "policy_gradient":
            raise ConfigError(f"advantage_clip: {self.name} has no advantage; use policy_gradient")
        if self.eos_class and self.name not in SPARSE:
            raise ConfigError(
                f"eos_class: {self.name} has no lists to merge ids in; the cache was scored with "
                f"--eos-class, which needs one of {', '.join(SPARSE)}"
            )
        if self.calibrated and self.name not in SAMPLED:
            raise ConfigError(
                f"calibrated: {self.name} needs a distribution of the teacher, and calibrated "
                f"log-probs are of none; use {' or '.join(SAMPLED)}"
            )
        self._check_importance()
        self._check_token_weights()
        self._check_skipping()

    def _check_skipping(self) -> None:
        for setting_name in ("dense_share", "tolerance"):
            if getattr(self, setting_name) is None:
                continue
            if self.name not in (*SPARSE, "policy_gradient"):
                raise ConfigError(
                    f"{setting_name}: {self.name} forms every gradient; only "
                    f"{', '.join(SPARSE)} and policy_gradient can leave some out"
                )
            if self.tail == "renormalize":
                raise ConfigError(
                    f"{setting_name}: tail renormalize has no gradient outside the lists and does "
                    "less already; leave one of the two out"
                )
        if self.dense_share is not None and self.tolerance is not None:
            raise ConfigError(
                f"dense_share: found {self.dense_share} with tolerance {self.tolerance}; a sample "
                "is unbiased, a tolerance bounds an error: set one of them"
            )

    def _check_token_weights(self) -> None:
        kind, settings = self.token_weights, WEIGHT_SETTINGS[self.token_weights]
        for name in ("weight_beta", "weight_share", "weight_entropy"):
            if name not in settings and getattr(self, name) is not None:
                kinds = [other for other, known in WEIGHT_SETTINGS.items() if name in known]
                raise ConfigError(
                    f"{name}: token_weights '{kind}' has none; expected {' or '.join(kinds)}"
                )
            if name in settings and getattr(self, name) is None:
                object.__setattr__(self, name, settings[name])
        if kind != "none" and not self.needs_teacher:
            raise ConfigError(f"token_weights: {self.name} has no teacher to weigh tokens by")
        if kind == "entropy" and (self.name != "reverse_kl" or self.tail == "unbiased"):
            raise ConfigError(
                "token_weights: entropy exchanges reverse for forward KL; found objective "
                f"{self.name} with tail {self.tail}; expected reverse_kl with another tail than "
                "unbiased"
            )
        if kind in ("advantage", "divergence_rank") and self.tail == "unbiased":
            raise ConfigError(
                f"token_weights: {kind} depends on the sampled token, over which the unbiased tail "
                "is an average, and would bias it; use another tail, or prefix"
            )
        if kind in ("divergence_rank", "prefix") and self.importance == "sequence":
            raise ConfigError(
                f"token_weights: {kind} leaves tokens out, and importance 'sequence' is a product "
                "over all of an answer; use importance 'token'"
            )

    def _check_importance(self) -> None:
        is_corrected = self.importance != "none" or self.clip_range is not None
        if is_corrected and self.name != "policy_gradient":
            name = "clip_range" if self.importance == "none" else "importance"
            raise ConfigError(f"{name}: {self.name} has no correction; use policy_gradient")
        if self.importance == "token_truncated" and self.importance_cap is None:
            raise ConfigError("importance_cap: token_truncated needs one; set a positive number")
        has_cap = self.tail == "unbiased" or self.importance not in ("none", "token")
        if self.importance_cap is not None and not has_cap:
            raise ConfigError(
                f"importance_cap: importance '{self.importance}' has none; only token_truncated, "
                "sequence and tail unbiased do"
            )
        if self.clip_range is not None and self.importance != "none":
            raise ConfigError(
                f"clip_range: found importance '{self.importance}' too; the clipped objective has "
                "its own ratio; omit importance"
            )

    @property
    def held_out(self) -> "Objective":
        """The divergence that held-out sequences are evaluated by.

        The policy gradient is evaluated by the reverse KL, of which it is a one-sample estimate:
        its loss is not a divergence, and on stored tokens it has no minimum. So are `log_ratio` and
        the unbiased tail, whose sampled tokens would be noise in a comparison of steps. Token
        weights do not count, so that runs with different ones can be compared. Nor does what is
        left out of gradients.
        """
        if self.calibrated:
            return Objective(
                "log_ratio",
                temperature=self.temperature,
                workspace_bytes=self.workspace_bytes,
                calibrated=True,
            )
        if self.name in SAMPLED or self.tail == "unbiased":
            return Objective(
                "reverse_kl",
                temperature=self.temperature,
                workspace_bytes=self.workspace_bytes,
                eos_class=self.eos_class,
            )
        return replace(
            self,
            token_weights="none",
            weight_beta=None,
            weight_share=None,
            weight_entropy=None,
            dense_share=None,
            tolerance=None,
        )

    @property
    def needs_teachers_list(self) -> str | None:
        """Why the teacher's most probable ids must be listed; None if any list will do.

        The reverse KL weighs each id with the student's probability, so the student's list holds
        what matters, and the tail's bucket counts the teacher's mass outside it. Terms that are
        weighted with the teacher's probability need the ids at which it is large: in the tail's
        bucket their gradient raises what the student has there already, and `truncate` drops them.
        A renormalised teacher has forgotten how little of its mass the list holds.
        """
        if self.name in ("forward_kl", "jsd"):
            return f"{self.name} weighs ids with the teacher's probability"
        if self.token_weights == "entropy":
            return (
                "forward KL, which uncertain tokens take, weighs ids with the teacher's probability"
            )
        if self.name == "reverse_kl" and self.tail == "renormalize":
            return "renormalize ignores the teacher's probability outside the list"
        return None

    @property
    def needs_rollout_logprobs(self) -> bool:
        """Whether batches must have the log-probs of the rollout policy."""
        return self.importance != "none" or self.clip_range is not None or self.tail == "unbiased"

    @property
    def needs_teacher(self) -> bool:
        """Whether batches must have the teacher's scores."""
        return self.name != "cross_entropy"
