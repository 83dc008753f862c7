"""Problems whose rows have the tails and the divergences that were measured on a model.

How much work the loss can skip depends on the rows, so random rows would not do. `offlist.jsonl`
has some hundred rows of each measurement as four numbers, `FIELDS`. The mass outside the list and
the size of the gradient there follow from them, whatever the vocabulary is.
"""

import json
from pathlib import Path

import torch
from torch import Tensor

from benchmarks.problems import Problem, Shape

NAME = "offlist.jsonl"
RESULTS = Path(__file__).parent / "results"
# Mass outside the list of the student and of the teacher; the student's first id and the KL of
# student and teacher, both within the list, that is after its renormalisation.
FIELDS = ("student_tail", "teacher_tail", "first", "list_kl")
SPREAD = 2.0  # standard deviation of a logit for a hidden state of unit variance
LEAST = 1e-7
STEPS = 40  # of each bisection


def measured_sample(model: str, at: str, k: int) -> Tensor:
    """The committed sample [M, 4] of a measurement."""
    for line in (RESULTS / NAME).read_text(encoding="utf-8").splitlines():
        row = json.loads(line)
        if (row["model"], row["at"], row["k"]) == (model, at, k):
            return torch.tensor(row["sample"])
    raise ValueError(f"{RESULTS / NAME} has no rows of model {model}, at {at}, k = {k}")


def measured_problem(shape: Shape, sample: Tensor, seed: int = 0) -> Problem:
    """A problem in fp32 whose rows are drawn from a sample; no [N, V] tensor is made.

    An eighth of the vocabulary falls into topics of K ids, whose rows of the weight have half their
    variance in common; a list is a topic. All else is random. A hidden state is the shortest one
    with the wanted logits at the listed ids. The logits at all other ids are then normal, so their
    log-sum-exp is known in advance; masses outside the list are right within some percent. That
    holds while the spread of these logits, 2 |h| / sqrt(D), stays well below sqrt(2 log V): beyond
    it so few logits make up the sum that it is smaller than expected, and so are the masses.

    Args:
        sample: [M, 4], the columns `FIELDS`. Tails below `LEAST` count as that.

    Raises:
        ValueError: the hidden size is too small for logits so large at so many ids.
    """
    torch.manual_seed(seed)
    n, k, d = shape.rows, shape.topk, shape.hidden
    weight = torch.randn(shape.vocab, d).mul_(SPREAD * d**-0.5)
    topics = torch.randperm(shape.vocab)[: max(1, shape.vocab // 8 // k) * k].view(-1, k)
    common = torch.randn(len(topics), 1, d).mul_(SPREAD * d**-0.5)
    weight[topics] = (weight[topics] + common) * 0.5**0.5
    ids = topics[torch.randint(len(topics), (n,))]
    drawn = sample[torch.randint(len(sample), (n,))].T.unsqueeze(2)
    tail, teacher_tail = drawn[:2].clamp(LEAST, 1.0 - LEAST)
    first, list_kl = drawn[2:]
    within = _ranked(first, k)
    noise = torch.randn(n, k)
    noise[:, 0] = -noise[:, 0].abs()  # else a sharp row could not be far from its teacher
    logprobs = _at_distance(within, noise, list_kl) + torch.log1p(-teacher_tail)
    hidden = _hidden_states(weight, ids, within - torch.logit(tail))
    if not hidden.isfinite().all():
        raise ValueError(f"hidden size {d} is too small for lists of {k}; use a larger one")
    return Problem(
        hidden, weight, hidden, ids, logprobs, teacher_tail[:, 0].log(), ids[:, 0],
        logprobs[:, 0], "measured",
    )  # fmt: skip


def _ranked(first: Tensor, k: int) -> Tensor:
    """Log-probs [N, K] that fall as a power of the rank and begin with `first` [N, 1]."""
    ranks = torch.arange(1.0, k + 1).log().expand(len(first), -1)
    power = _bisect(lambda s: (-s * ranks).log_softmax(1)[:, :1].exp() < first, len(first))
    return (-power * ranks).log_softmax(1)


def _at_distance(student: Tensor, noise: Tensor, kl: Tensor) -> Tensor:
    """The teacher's log-probs [N, K]: the student's with noise, scaled so that the KL is `kl`."""

    def teacher(scale: Tensor) -> Tensor:
        return (student + scale * noise).log_softmax(1)

    def too_near(scale: Tensor) -> Tensor:
        return (student.exp() * (student - teacher(scale))).sum(1, keepdim=True) < kl

    return teacher(_bisect(too_near, len(student)))


def _bisect(too_small, rows: int) -> Tensor:
    """The largest values [N, 1] in [0, 64] that are too small."""
    low, high = torch.zeros(rows, 1), torch.full((rows, 1), 64.0)
    for _ in range(STEPS):
        middle = (low + high) / 2
        small = too_small(middle)
        low, high = torch.where(small, middle, low), torch.where(small, high, middle)
    return low


def _hidden_states(weight: Tensor, ids: Tensor, wanted: Tensor) -> Tensor:
    """Hidden states [N, D] whose listed logits exceed the log-sum-exp of the others by `wanted`."""
    vocab, width = weight.shape
    hidden = []
    for part in torch.arange(len(ids)).split(64):
        listed = weight[ids[part]]  # [n, K, D]
        system = listed @ listed.mT
        outside = torch.full((len(part), 1), vocab - ids.shape[1]).log()
        rest = outside
        for _ in range(STEPS):  # the spread of the other logits depends on the hidden state
            solved = torch.linalg.solve(system, (wanted[part] + rest).unsqueeze(2))
            state = (listed.mT @ solved).squeeze(2)
            rest = outside + state.square().sum(1, keepdim=True) * SPREAD**2 / (2 * width)
        hidden.append(state)
    return torch.cat(hidden)
