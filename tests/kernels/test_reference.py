"""The definitions against the losses that PyTorch has."""

import inspect

import pytest
import torch
import torch.nn.functional as F
from kernel_cases import make_case

import lopd_kernels
from lopd_kernels import reference


def test_the_definitions_work_on_the_device_of_their_arguments():
    """The default device stands for a GPU's: what is made elsewhere cannot be combined with it."""
    case = make_case(k=2)
    labels = case.ids[:, 0]
    expected = reference.linear_sparse_divergence(case.hidden, case.weight, *case.teacher)
    with torch.device("meta"):
        actual = reference.linear_sparse_divergence(case.hidden, case.weight, *case.teacher)
        reference.linear_policy_gradient(case.hidden, case.weight, labels, case.logprobs[:, 0])
        reference.linear_cross_entropy(case.hidden, case.weight, labels)
        reference.linear_logprobs(case.hidden, case.weight, case.ids, return_entropy=True)
        reference.linear_topk(case.hidden, case.weight, 2, extra_ids=case.ids, sampled_ids=labels)
    assert torch.equal(actual, expected)


@pytest.mark.parametrize("name", sorted(set(dir(reference)) & set(lopd_kernels.__all__)))
def test_a_definition_takes_the_arguments_of_its_function(name):
    public, definition = (
        inspect.signature(getattr(module, name)).parameters for module in (lopd_kernels, reference)
    )
    left_out = {"workspace_bytes", "weight_grad_buffer", "validate", "return_stats"}
    left_out |= {"dense_share", "tolerance", "seed"}
    assert {*definition} == {*public} - left_out
    for key, parameter in definition.items():
        assert parameter.default == public[key].default
        assert parameter.kind == public[key].kind


def test_ignored_and_padded_rows_of_the_definitions():
    case = make_case(dtype=torch.float64)
    labels, scores = case.sampled_ids.clone(), case.sampled_logprobs
    labels[3:5] = -100
    expected = lopd_kernels.linear_policy_gradient(case.hidden, case.weight, labels, scores)
    actual = reference.linear_policy_gradient(case.hidden, case.weight, labels, scores)
    torch.testing.assert_close(actual, expected)
    labels[3:5] = -1
    expected = lopd_kernels.linear_topk(case.hidden, case.weight, 2, sampled_ids=labels)
    *_, sampled = reference.linear_topk(case.hidden, case.weight, 2, sampled_ids=labels)
    torch.testing.assert_close(sampled, expected.sampled_logprobs)


def test_cross_entropy_equals_pytorchs():
    case = make_case(dtype=torch.float64)
    labels = torch.randint(0, 211, (20,))
    labels[3] = -100
    expected = F.cross_entropy(case.hidden @ case.weight.t() / 0.7 + case.bias / 0.7, labels)
    loss = reference.linear_cross_entropy(
        case.hidden, case.weight, labels, bias=case.bias, temperature=0.7
    )
    torch.testing.assert_close(loss, expected)


@pytest.mark.parametrize("divergence", ["reverse_kl", "forward_kl"])
def test_the_divergence_of_full_lists_equals_pytorchs_kl(divergence):
    student = torch.randn(5, 9, dtype=torch.float64).log_softmax(1)
    teacher = torch.randn(5, 9, dtype=torch.float64).log_softmax(1)
    loss = reference.sparse_divergence(
        student, torch.arange(9).repeat(5, 1), teacher, divergence=divergence, reduction="sum"
    )
    pair = (teacher, student) if divergence == "reverse_kl" else (student, teacher)
    torch.testing.assert_close(loss, F.kl_div(*pair, log_target=True, reduction="sum"))


def test_jsd_tends_to_the_kl_divergences_at_its_ends():
    student = torch.randn(5, 9, dtype=torch.float64).log_softmax(1)
    teacher = torch.randn(5, 9, dtype=torch.float64).log_softmax(1)
    ids = torch.arange(9).repeat(5, 1)

    def value(**options):
        return reference.sparse_divergence(student, ids, teacher, **options)

    small = value(divergence="jsd", beta=1e-6) / 1e-6
    torch.testing.assert_close(small, value(divergence="forward_kl"), rtol=1e-4, atol=0)
    large = value(divergence="jsd", beta=1 - 1e-6) / 1e-6
    torch.testing.assert_close(large, value(divergence="reverse_kl"), rtol=1e-4, atol=0)


def test_the_bucketed_divergence_grows_with_the_list():
    student = torch.randn(5, 30, dtype=torch.float64)
    teacher = torch.randn(5, 30, dtype=torch.float64).log_softmax(1)
    values = []
    for k in (1, 5, 20, 30):
        logprobs, ids = teacher.topk(k, 1)
        values.append(float(reference.sparse_divergence(student, ids, logprobs)))
    assert values == sorted(values)
    assert values[0] > 0


def test_the_order_of_the_head_options():
    z = reference.linear_logits(
        torch.ones(1, 1), torch.tensor([[2.0]]), torch.tensor([1.0]), 0.5, 1.2, 0.7
    )
    expected = 1.2 * torch.tanh(torch.tensor(1.5 / 1.2)) / 0.7
    torch.testing.assert_close(z[0, 0], expected)
