"""How near student and teacher are on the rollouts of a cache, from its columns alone.

The rollouts are samples of the student (p), and the cache has log p and log q (the teacher) of each
sampled token, so means over the tokens estimate, without a model and without bias,

    E[log p - log q] = KL(p || q)
    E[min(1, q / p)] = 1 - TV(p, q), the probability that p and q share

This holds if p was sampled as it is, at the temperature of the scores and without `top_p`.
"""

from dataclasses import dataclass
from typing import Any

import numpy as np

from lopd.evaluation.standard_error import standard_error
from lopd.provenance import CacheManifest
from lopd.store import TeacherCache, TeacherSequence

MOST_SEQUENCES = 512  # that are read of a cache, spread evenly over it
LOW_COVERAGE = 0.9  # a mean mass inside the lists below this is warned of
NEAR_ESS = 0.5  # `lopd distill` warns below it: the default of --stale-ess
LENGTH_QUANTILES = (10, 50, 90, 100)


@dataclass(frozen=True)
class Mean:
    """A mean over tokens, with the standard error of prompts drawn at random."""

    value: float
    error: float | None  # None for a single prompt


@dataclass(frozen=True)
class Agreement:
    """What `measure` finds. Values are None where the cache cannot tell."""

    sequences: int  # that were read
    log_ratio: Mean | None  # log p - log q of the sampled tokens, nat
    is_kl: bool  # whether log_ratio estimates KL(p || q)
    unknown: str  # why it does not; empty if it does
    shared: Mean | None  # 1 - TV(p, q)
    ess: float | None  # share of the tokens' worth as samples of the teacher
    covered: Mean | None  # the teacher's probability inside the lists
    sampled_listed: Mean | None  # share of the sampled tokens that are in the lists
    student_top_listed: Mean | None  # share of the student's top ids among the teacher's top k
    truncated: float  # share of the answers of the whole cache
    lengths: np.ndarray  # of the answers that were read, in tokens

    def means(self) -> dict[str, Mean]:
        """The known means by name."""
        name = "kl_to_teacher" if self.is_kl else "log_ratio_to_teacher"
        means = {
            name: self.log_ratio,
            "shared_probability": self.shared,
            "teacher_in_lists": self.covered,
            "sampled_in_lists": self.sampled_listed,
            "student_top_in_teachers": self.student_top_listed,
        }
        return {name: mean for name, mean in means.items() if mean is not None}

    def rows(self) -> dict[str, Any]:
        """The known values by name, and what follows from them in words."""
        rows: dict[str, Any] = {"sequences_compared": self.sequences}
        for name, mean in self.means().items():
            rows[name] = mean.value
            rows[f"{name}_error"] = mean.error
        if self.ess is not None:
            rows["ess_as_teacher"] = self.ess
        rows["truncated"] = self.truncated
        rows["mean_answer_tokens"] = float(self.lengths.mean())
        quantiles = np.percentile(self.lengths, LENGTH_QUANTILES, method="inverted_cdf")
        pairs = zip(LENGTH_QUANTILES, quantiles, strict=True)
        rows["answer tokens"] = ", ".join(f"{share}% <= {length:.0f}" for share, length in pairs)
        rows["frozen rollouts"] = self.advice()
        if self.shared is not None:
            rows["rule of thumb"] = (
                "frozen rollouts win at low to moderate initial overlap, live ones at high "
                f"(Semi-OPD); shared here: {self.shared.value:.2f} of the probability"
            )
        return rows

    def advice(self) -> str:
        """Whether the rollouts serve to the end of training, and what to try if they do not."""
        if self.ess is None:
            return f"cannot be judged: {self.unknown}"
        worth = (
            f"a token is worth {self.ess:.0%} of a fresh one to a student that has become the "
            "teacher"
        )
        if self.ess >= NEAR_ESS:
            return f"stay near: {worth}, so begin without --refresh-every"
        return (
            f"may go stale: {worth}; begin without --refresh-every but with --holdout, and if the "
            "held-out KL stalls, try --refresh-every of a tenth of the steps"
        )


def measure(cache: TeacherCache, teacher: str | None = None) -> Agreement | None:
    """Compare student and teacher over the loss tokens of a cache, or of a part of a large one.

    Args:
        cache: opened with `support="list"`.
        teacher: the name of one of several teachers, to compare on its sequences only.

    Returns:
        None if no shard is finished, or no token of the answers bears loss.
    """
    assert cache.support == "list", cache.support
    own = cache.of_teacher(teacher)
    if not len(own):
        return None
    manifest = cache.manifest
    source, unknown = logprob_source(manifest)
    has_lists, extra_ids = not cache.has_no_lists, _extra_ids(manifest)
    chosen = own[np.unique(np.linspace(0, len(own) - 1, MOST_SEQUENCES).round().astype(np.int64))]
    values: dict[str, list[np.ndarray]] = {}
    prompts, lengths = [], []
    for index in chosen.tolist():
        sequence = cache[index]
        prompts.append(sequence.rollout.prompt_id)
        lengths.append(len(sequence.teacher_logprobs))
        columns = _columns(sequence, source, has_lists, extra_ids, manifest.k)
        for name, column in columns.items():
            values.setdefault(name, []).append(column)
    if not sum(map(len, values["tokens"])):
        return None
    means = {name: _mean(columns, prompts) for name, columns in values.items()}
    is_kl = source is not None and not unknown
    sampled_listed = means.get("sampled_listed")
    if manifest.stage == "import" and sampled_listed is not None and sampled_listed.value == 1:
        sampled_listed = None  # each list has its sampled token because it was sampled, as vLLM's
    return Agreement(
        sequences=len(chosen),
        log_ratio=means.get("log_ratio"),
        is_kl=is_kl,
        unknown=unknown,
        shared=means.get("shared") if is_kl else None,
        ess=_ess(np.concatenate(values["log_ratio"])) if is_kl else None,
        covered=means.get("covered"),
        sampled_listed=sampled_listed,
        student_top_listed=means.get("student_top_listed"),
        truncated=cache.totals(teacher)["finish_reasons"]["length"] / len(own),
        lengths=np.array(lengths),
    )


def by_teacher(cache: TeacherCache) -> dict[str, str]:
    """One line about the sequences of each of several teachers; empty if there is one."""
    lines = {}
    for name in cache.manifest.teachers or ():
        totals = cache.totals(name)
        words = [f"{totals['sequences']} sequences, {totals['response_tokens']} response tokens"]
        if (found := measure(cache, name)) is not None:
            words += [f"{what} {mean.value:.4g}" for what, mean in found.means().items()]
        lines[f"teacher {name}"] = ", ".join(words)
    return lines


def low_coverage(cache: TeacherCache, found: Agreement | None) -> str | None:
    """A warning if the lists lack much of the probability that they are there to hold.

    A list of the student's ids lacks what the teacher knows better, which the tail counts.
    """
    if found is None:
        return None
    manifest = cache.manifest
    means = {"the teacher's probability": found.covered, "the sampled tokens": found.sampled_listed}
    if manifest.scoring.list_of == "student":
        del means["the teacher's probability"]
    shares = {name: mean.value for name, mean in means.items() if mean is not None}
    if min(shares.values(), default=1) >= LOW_COVERAGE:
        return None
    held = " and ".join(f"{share:.1%} of {what}" for what, share in shares.items())
    remedy = f"score with a larger --k than {manifest.k}"
    if manifest.top_p < 1:
        remedy += f" or --top-p than {manifest.top_p:g}"
    if found.is_kl:  # which needs what --tail unbiased needs
        remedy += ", or train with --tail unbiased"
    if manifest.stage == "import":
        remedy = "dump longer lists"
    return (
        f"{cache.path}: the lists hold {held}; a loss over the lists sees all else as one outcome, "
        f"and its KL is a lower bound that can be far too low; {remedy}"
    )


def logprob_source(manifest: CacheManifest) -> tuple[str | None, str]:
    """The column of log p to compare with log q, and why no KL follows from it (empty: it does)."""
    sampling, temperature = manifest.rollouts.sampling, manifest.temperature
    if manifest.scoring.rollout_logprobs == "absent":
        return None, "the log-probs of the rollouts are unknown"
    if manifest.scoring.is_calibrated:
        return None, "the log-probs of the teacher are calibrated"
    if manifest.scoring.tail == "renormalized":
        return None, "the lists of the teacher were renormalised"
    if manifest.scoring.eos_class:
        return None, "ids that end an answer count as one, and log-probs of the sampled id do not"
    raw = "rollout_logprobs_raw" if temperature == 1 else None
    if sampling is None or sampling.temperature is None or sampling.top_p is None:
        return raw, "how the rollouts were sampled is unknown"
    if sampling.temperature != temperature or sampling.top_p != 1:
        return raw, (
            f"sampled at temperature {sampling.temperature:g} and top_p {sampling.top_p:g}, scored "
            f"at temperature {temperature:g}; expected the same temperature, and top_p 1"
        )
    return "rollout_logprobs", ""


def _extra_ids(manifest: CacheManifest) -> int:
    """The number of the student's top ids in every list, if no other id is in it but the top k."""
    support = manifest.scoring.support
    if support is None or support.eos_class or manifest.top_p < 1:
        return 0
    return support.extra_ids


def _columns(
    sequence: TeacherSequence, source: str | None, has_lists: bool, extra_ids: int, k: int
) -> dict[str, np.ndarray]:
    """The values of the loss tokens [N] of one answer whose means are taken."""
    rollout, lists = sequence.rollout, sequence.lists
    chosen = rollout.loss_mask[rollout.prompt_length :]
    columns = {"tokens": chosen}
    if has_lists:
        columns["covered"] = -np.expm1(sequence.tail_logprobs.astype(np.float64))
        columns["sampled_listed"] = lists.contains(rollout.tokens[rollout.prompt_length :])
    if source is not None:
        ratio = getattr(rollout, source).astype(np.float64) - sequence.teacher_logprobs
        columns |= {"log_ratio": ratio, "shared": np.exp(np.minimum(-ratio, 0.0))}
    if extra_ids:
        # A list is the teacher's top k and those of the student's top ids that are not among them.
        columns["student_top_listed"] = 1 - (lists.lengths - k) / extra_ids
    return {name: column[chosen] for name, column in columns.items()}


def _mean(columns: list[np.ndarray], prompts: list[str]) -> Mean:
    """The mean over all tokens, and its error."""
    sums = np.array([column.sum() for column in columns], np.float64)
    counts = np.array([len(column) for column in columns])
    return Mean(float(sums.sum() / counts.sum()), standard_error(sums, counts, prompts))


def _ess(log_ratio: np.ndarray) -> float:
    """(sum w)^2 / (N sum w^2) with w = q / p, the weights of samples of p as samples of q."""
    first, second = (np.logaddexp.reduce(-power * log_ratio) for power in (1, 2))
    return float(np.exp(2 * first - second) / len(log_ratio))
