"""`dense_share`, `tolerance` and `seed`: what is refused, and the settings of the modules."""

import math

import pytest
import torch
from kernel_cases import gradients, make_case

from lopd_kernels import (
    LinearPolicyGradient,
    LinearSparseDivergence,
    linear_cross_entropy,
    linear_policy_gradient,
    linear_sparse_divergence,
)

REFUSED = [
    ({"dense_share": 0.5}, "seed is None"),
    ({"dense_share": 0.0, "seed": 1}, "dense_share is 0.0, expected above 0"),
    ({"dense_share": 1.5, "seed": 1}, "dense_share is 1.5"),
    ({"dense_share": "half", "seed": 1}, "expected a number"),
    ({"dense_share": 0.5, "seed": -1}, "seed is -1"),
    ({"dense_share": 0.5, "seed": 0.5}, "seed is 0.5"),
    ({"dense_share": 0.5, "seed": torch.zeros(2)}, "expected a Python int or a torch.int64"),
    ({"seed": 1}, "without dense_share"),
    ({"tolerance": -0.1}, "tolerance is -0.1"),
    ({"tolerance": 1.0}, "tolerance is 1.0"),
    ({"tolerance": math.nan}, "tolerance is nan"),
    ({"tolerance": None}, "expected a number"),
    ({"dense_share": 0.5, "seed": 1, "tolerance": 0.1}, "pass one of them"),
    ({"dense_share": 0.5, "seed": 1, "reduction": "none"}, "reduction is 'none'"),
    ({"tolerance": 0.1, "reduction": "none"}, "tolerance is set and reduction is 'none'"),
    ({"tolerance": 0.1, "tail": "renormalize"}, "no gradient outside the list"),
]


@pytest.mark.parametrize(("options", "message"), REFUSED, ids=str)
def test_settings_that_contradict_each_other_are_refused(options, message):
    case = make_case("near")
    with pytest.raises(ValueError, match=message):
        linear_sparse_divergence(case.hidden, case.weight, *case.teacher, **options)
    ids = case.hidden, case.weight, case.sampled_ids
    if "tail" not in options:
        with pytest.raises(ValueError, match=message):
            linear_policy_gradient(*ids, case.sampled_logprobs, **options)
        with pytest.raises(ValueError, match=message):
            linear_cross_entropy(*ids, **options)


def test_modules_take_the_settings_and_forward_the_seed():
    case = make_case("near")
    tensors = (case.weight, *case.teacher)
    module = LinearSparseDivergence(dense_share=0.3)
    ours = gradients(lambda h: module(h, *tensors, seed=5), case.hidden)
    expected = gradients(
        lambda h: linear_sparse_divergence(h, *tensors, dense_share=0.3, seed=5), case.hidden
    )
    assert torch.equal(ours[1], expected[1])
    with pytest.raises(ValueError, match="pass one of them"):
        LinearPolicyGradient(dense_share=0.3, tolerance=0.1)
    with pytest.raises(ValueError, match="seed is None"):
        module(case.hidden, *tensors)
