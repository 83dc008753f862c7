"""The examples in the docstrings of the public modules run and give what they show."""

import doctest

import pytest
import torch

from lopd_kernels import divergence, logprobs, policy, reference, workspace


@pytest.mark.parametrize(
    "module", [divergence, logprobs, policy, reference, workspace], ids=lambda m: m.__name__
)
def test_the_examples_run(module):
    torch.manual_seed(0)
    failed, attempted = doctest.testmod(module, extraglobs={"torch": torch})
    assert failed == 0 and attempted > 0
