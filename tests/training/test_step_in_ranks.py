"""A step in two processes, with DDP and FSDP2, equals a step in one."""

import pytest
from helpers_ranks import MODELS, WRAPPERS, one_process, run_ranks

pytestmark = pytest.mark.thorough

# A tied weight is in the group of the embedding, so the head has no separate group.
CASES = [
    (name, wrapper)
    for name in MODELS
    for wrapper in WRAPPERS
    if not (wrapper == "fsdp2-head-alone" and "tied" in name.split("-"))
]


@pytest.fixture(scope="module")
def found(tmp_path_factory):
    return run_ranks(tmp_path_factory.mktemp("ranks"), CASES)


@pytest.fixture(scope="module")
def expected():
    return {name: one_process(name) for name in MODELS}


@pytest.mark.parametrize(("name", "wrapper"), CASES)
def test_loss_and_every_gradient_equal_those_of_one_process(found, expected, name, wrapper):
    loss, gradients = expected[name]
    result = found[name, wrapper]
    assert result["loss"] == pytest.approx(loss, rel=1e-5)
    assert result["gradients"].keys() == gradients.keys()
    for key, value in gradients.items():
        assert value.abs().max() > 0, key
        error = (result["gradients"][key] - value).norm() / value.norm()
        assert error < 1e-4 or (result["gradients"][key] - value).abs().max() < 1e-7, key
