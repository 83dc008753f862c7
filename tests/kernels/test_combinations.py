"""Every value of every argument of a public function with every value of every other, against fp64.

Other tests vary what they are about and leave the rest at its default, so two arguments may never
meet there.
"""

import inspect
import math
import re

import pytest
import torch
from kernel_cases import (
    FORMS,
    assert_close,
    make_case,
    skip_bf16_stores_of_the_interpreter,
)
from pairwise import pairwise

import lopd_kernels
from lopd_kernels import reference

VOCAB, WIDTH, K = 50, 8, 4
HEAD = {
    "bias": [False, True],
    "logit_scale": [1.0, 1.3],
    "softcap": [None, 4.0],
    "temperature": [1.0, 0.7],
}
CALL = {
    "dtype": [torch.float32, torch.float64, torch.float16, torch.bfloat16],
    "leading": [(6,), (2, 3), (1,), (0,), (2, 0)],
    "strided": [False, True],
    "ids": [torch.int32, torch.int64],
    "workspace_bytes": [None, "smallest"],
    "validate": [None, True, False],
}
LOSS = {
    "row_weights": [None, "mask", "some", "negative"],
    "reduction": ["sum", "mean", "none"],
    "frozen": ["", "hidden", "weight", "bias"],
}
FUSED = {
    "weight_grad_buffer": [False, True],
    "skip": [{}, {"tolerance": 1e-12}, {"dense_share": 0.9, "seed": 3}],
}
DIVERGENCE = {"form": FORMS, "tail_logprobs": [False, True], "importance_cap": [None, 1.1]}
CHOICES = {
    "linear_sparse_divergence": {
        **CALL, **HEAD, **LOSS, **FUSED, **DIVERGENCE, "return_stats": [False, True],
    },
    "sparse_divergence": {
        **CALL, **LOSS, **DIVERGENCE, "temperature": [1.0, 0.7], "return_stats": [False, True],
    },
    "linear_policy_gradient": {
        **CALL, **HEAD, **LOSS, **FUSED, "return_stats": [False, True],
        "advantages": [False, True], "advantage_clip": [None, 0.5], "ignore_index": [-100, 3],
        "correction": [
            {"importance": "none"},
            {"importance": "token"},
            {"importance": "token_truncated", "importance_cap": 1.1},
            {"clip_range": 0.2},
        ],
    },
    "linear_cross_entropy": {**CALL, **HEAD, **LOSS, **FUSED, "ignore_index": [-100, 3]},
    "linear_logprobs": {
        **CALL, **HEAD, "frozen": LOSS["frozen"], "return_entropy": [False, True],
    },
    "linear_topk": {
        **CALL, **HEAD, "k": [1, 3, VOCAB],
        "extra_ids": [False, True], "sampled_ids": [False, True],
    },
}  # fmt: skip
TENSORS = {  # the arguments that are always given, or that come with another
    "hidden", "weight", "logits", "topk_ids", "topk_logprobs", "labels", "teacher_logprobs",
    "sampled_ids", "sampled_logprobs", "rollout_logprobs", "ids", "divergence", "tail", "beta",
}  # fmt: skip
HARNESS = {"dtype", "leading", "strided", "frozen", "form", "skip", "correction"}


def is_allowed(row):
    """Whether the functions accept the combination, and the interpreter computes it right."""
    skip, form = row.get("skip"), row.get("form", ("", ""))
    if row.get("reduction") == "mean" and row["row_weights"] == "negative":
        return False
    if skip and (row["reduction"] == "none" or form[1] == "renormalize"):
        return False
    if row.get("weight_grad_buffer") and row["frozen"] == "weight":
        return False
    if row.get("importance_cap") and form[1] != "unbiased":
        return False
    return not (row.get("advantages") and row["advantage_clip"])


ROWS = [
    pytest.param(name, row, id=f"{name}-{number}")
    for name, choices in CHOICES.items()
    for number, row in enumerate(pairwise(allowed=is_allowed, **choices))
]


@pytest.mark.parametrize("name", CHOICES)
def test_every_argument_takes_part(name):
    varied = set(CHOICES[name]) - HARNESS
    for value in ("skip", "correction"):
        varied |= {key for options in CHOICES[name].get(value, []) for key in options}
    assert set(inspect.signature(getattr(lopd_kernels, name)).parameters) <= varied | TENSORS


class Arguments:
    """The arguments of one combination: constants as the public function takes them, or flat."""

    def __init__(self, name, row):
        self.name, self.row = name, row
        self.count = math.prod(row["leading"])
        self.case = make_case(
            dtype=row["dtype"], rows=self.count, vocab=VOCAB, width=WIDTH, k=K, seed=1
        )
        self.generator = torch.Generator().manual_seed(2)

    def leaves(self):
        """The differentiable arguments, by name."""
        case, found = self.case, {}
        if self.name == "sparse_divergence":
            return {"logits": (case.hidden.double() @ case.weight.double().t()).to(case.hidden)}
        found |= {"hidden": case.hidden, "weight": case.weight}
        return found | ({"bias": case.bias} if self.row["bias"] else {})

    def constants(self):
        """Positional and keyword constants, flat, in the order of the signature."""
        row, case = self.row, self.case
        head = {key: row[key] for key in ("logit_scale", "softcap", "temperature") if key in row}
        options = dict(head)
        if "reduction" in row:
            options |= {"reduction": row["reduction"], "row_weights": self.weights()}
        if "ignore_index" in row:
            options["ignore_index"] = row["ignore_index"]
        labels = case.sampled_ids.to(row["ids"])
        if self.name in ("linear_sparse_divergence", "sparse_divergence"):
            options |= case.form(*row["form"])
            options["tail_logprobs"] = case.tail if row["tail_logprobs"] else None
            if row["form"][1] == "unbiased":
                options["sampled_ids"] = labels
                options["importance_cap"] = row["importance_cap"]
            return (case.ids.to(row["ids"]), case.logprobs), options
        if self.name == "linear_logprobs":
            return (case.ids.to(row["ids"]),), options | {"return_entropy": row["return_entropy"]}
        if self.name == "linear_topk":
            options["extra_ids"] = case.ids.to(row["ids"]) if row["extra_ids"] else None
            options["sampled_ids"] = labels if row["sampled_ids"] else None
            return (row["k"],), options
        ignored = torch.arange(self.count) % 3 == 1
        labels = labels.masked_fill(ignored, row["ignore_index"])
        if self.name == "linear_cross_entropy":
            return (labels,), options
        options |= {"advantage_clip": row["advantage_clip"], **row["correction"]}
        if row["correction"] != {"importance": "none"}:
            options["rollout_logprobs"] = case.rollout_logprobs
        if row["advantages"]:
            return (labels, None), options | {"advantages": case.sampled_logprobs + 2.0}
        return (labels, case.sampled_logprobs), options

    def weights(self):
        kind, drawn = self.row["row_weights"], torch.rand(self.count, generator=self.generator)
        return {
            None: None, "mask": drawn < 0.7, "some": drawn * (drawn < 0.7), "negative": drawn - 0.5,
        }[kind]  # fmt: skip

    def given(self, value):
        """A constant or leaf as the public function is given it: in a batch, and strided."""
        if not isinstance(value, torch.Tensor):
            return value
        if value.dim() and len(value) == self.count:
            value = value.reshape(*self.row["leading"], *value.shape[1:])
        return strided(value) if self.row["strided"] else value


def strided(x):
    """The same values in every second place of the last dimension."""
    wide = x.new_zeros(*x.shape, 2)
    wide[..., 0] = x
    return wide[..., 0]


def wide(value):
    """In fp64, as the definitions take it."""
    is_real = isinstance(value, torch.Tensor) and value.is_floating_point()
    return value.double() if is_real else value


@pytest.mark.parametrize(("name", "row"), ROWS)
def test_value_and_gradients(name, row):
    dtype = row["dtype"]
    if row.get("form", ("", ""))[1] == "renormalize" or name == "sparse_divergence":
        skip_bf16_stores_of_the_interpreter(dtype)
    arguments, frozen = Arguments(name, row), row.get("frozen", "hidden weight bias")
    leaves, (positional, options) = arguments.leaves(), arguments.constants()
    ours = {
        key: arguments.given(leaf).detach().requires_grad_(key not in frozen)
        for key, leaf in leaves.items()
    }
    exact = {
        key: leaf.double().clone().requires_grad_(key not in frozen) for key, leaf in leaves.items()
    }
    buffer = (
        torch.zeros(VOCAB, WIDTH, dtype=single(dtype)) if row.get("weight_grad_buffer") else None
    )
    given = {key: arguments.given(value) for key, value in options.items()}
    given |= {"validate": row["validate"], **row.get("skip", {}), **named(ours)}
    given |= {"return_stats": True} if row.get("return_stats") else {}
    given |= {"weight_grad_buffer": buffer} if buffer is not None else {}
    function = getattr(lopd_kernels, name)
    fixed = [*tensors(ours), *(arguments.given(value) for value in positional)]
    if row["workspace_bytes"] and name != "sparse_divergence":
        with pytest.raises(ValueError, match="pass workspace_bytes") as refusal:
            function(*fixed, workspace_bytes=1, **given)
        smallest = re.search(r"pass workspace_bytes=(\d+)", str(refusal.value))
        given["workspace_bytes"] = int(smallest[1])

    found = function(*fixed, **given)
    expected = getattr(reference, name)(
        *tensors(exact), *map(wide, positional), **{k: wide(v) for k, v in options.items()},
        **named(exact),
    )  # fmt: skip
    leading = () if row.get("reduction") in ("sum", "mean") else row["leading"]
    found = found[0] if row.get("return_stats") else found
    total, exact_total = totals(found, expected, leading, dtype)
    names = [key for key, leaf in exact.items() if leaf.requires_grad]
    if name == "linear_topk" or not names:
        return
    total.backward()
    exact_total.backward()
    zero = torch.zeros((), dtype=torch.float64)
    for key in names:
        grad, bound = ours[key].grad, dtype
        if key == "weight" and buffer is not None:
            assert grad is None
            grad, bound = buffer, buffer.dtype
        assert_close([zero, grad], [zero, exact[key].grad.reshape(grad.shape)], bound)


def totals(found, expected, leading, dtype):
    """Compare results one by one, and add up those that are finite and have a gradient."""
    total = exact_total = 0.0
    pairs = zip(results(found), results(expected), strict=True)
    for mine, right in pairs:
        assert mine.shape == (*leading, *right.shape[len(leading) > 0 :])
        mine, finite = mine.reshape(right.shape), right.isfinite()
        assert torch.equal(mine.isfinite(), finite)
        if not mine.is_floating_point():
            assert torch.equal(mine, right)
            continue
        assert mine.dtype == single(dtype)
        assert_close([mine[finite].detach()], [right[finite].detach()], dtype)
        if mine.requires_grad:
            total = total + 1.7 * mine[finite].sum()
            exact_total = exact_total + 1.7 * right[finite].sum()
    return total, exact_total


def results(value):
    return [x for x in (value if isinstance(value, tuple) else (value,)) if x is not None]


def single(dtype):
    """The dtype of results."""
    return torch.float64 if dtype == torch.float64 else torch.float32


def tensors(leaves):
    return [leaf for key, leaf in leaves.items() if key != "bias"]


def named(leaves):
    return {key: leaf for key, leaf in leaves.items() if key == "bias"}
