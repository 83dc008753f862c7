"""The row pass that reads the logits once, executed: results, order of blocks, and what it needs.

Programs of a row wait for each other, so this form cannot be interpreted.
"""

import re

import pytest
import torch
from kernel_cases import INTERPRETED, relative_error
from ptx_launch import emulate, read_logits_once
from ptx_machine import SCHEDULES
from ptx_memory import Fault, Race
from ptx_mutations import barrier_lines, without_barriers
from row_cases import RULES, make_head, make_target, oracle_pass, padded_rows, ragged_ids
from test_ptx_kernels import BOUNDS, on_each

from lopd_kernels._triton import one_pass
from lopd_kernels._triton import rows as triton_rows
from lopd_kernels._triton.kernels import one_pass as kernels

pytestmark = [
    pytest.mark.thorough,
    pytest.mark.skipif(INTERPRETED, reason="compiles the kernels"),
    pytest.mark.filterwarnings("ignore:.* encountered in:RuntimeWarning"),
]
CAPABILITIES = [90, *(pytest.param(c, marks=pytest.mark.slow) for c in (80, 100))]

# rule, head, vocabulary, K, dtype of the gradient, columns of a program
ROWS = [
    ("reverse_kl:bucket", "plain", 4100, 8, torch.bfloat16, 1024),
    ("jsd:truncate", "capped+biased", 1000, 65, torch.float32, 256),
    ("reverse_kl:unbiased", "biased", 700, 33, torch.float16, 256),
    ("policy_gradient:advantage:clipped", "scaled", 601, 1, torch.bfloat16, 128),
    ("forward_kl:generalized", "capped", 211, 9, torch.float32, 256),
]
LARGE = [
    ("reverse_kl:bucket", "plain", 20011, 64, torch.bfloat16, None),
    ("forward_kl:bucket", "capped+biased", 9001, 200, torch.bfloat16, None),
    ("cross_entropy", "biased", 50257, 1, torch.float32, None),
]


@pytest.fixture
def use(monkeypatch):
    """Turns the form on for a device with so many multiprocessors; `machine` configures it."""

    def set_up(capability, columns=None, multiprocessors=2, **machine):
        read_logits_once(monkeypatch, columns, multiprocessors)
        return emulate(monkeypatch, capability, **machine)

    torch.manual_seed(0)
    return set_up


def run(name="reverse_kl:bucket", head_name="plain", vocab=700, k=8, dtype=torch.bfloat16):
    """(gradient, statistics, and both in fp64) of 5 rows, the third without weight."""
    torch.manual_seed(0)
    rule, head = RULES[name], make_head(head_name, vocab)
    u, ids = padded_rows(5, vocab), ragged_ids(5, vocab, k)
    ids[ids == vocab - 1] = -1
    ids[:, 0] = vocab - 1
    weights = torch.tensor([128.0, -256.0, 0.0, 64.0, 32.0])
    target = make_target(rule, ids, u)
    stats, exact = oracle_pass(u, ids, target, weights, rule, head)
    # a 16-bit gradient lies in the first half of its row of logits
    out = u if dtype == torch.float32 else u.view(dtype)[:, :vocab]
    ours = torch.zeros(5, 4 + len(rule.extras))
    listed_ids = triton_rows.locate(ids, weights, vocab)
    triton_rows.row_pass(u, listed_ids, target, weights, rule, head, True, ours, out)
    return out, ours, exact, stats


def check(out, ours, exact, stats):
    assert (out[2] == 0.0).all()
    assert relative_error(out, exact) < BOUNDS[out.dtype]
    error = (ours.double() - stats).abs()
    assert (error <= 1e-5 * (1.0 + stats.abs()))[stats.isfinite()].all()


@pytest.mark.parametrize("schedule", ["block", "random"])
@pytest.mark.parametrize("name, head, vocab, k, dtype, columns, capability", on_each(ROWS))
def test_the_results(name, head, vocab, k, dtype, columns, capability, schedule, use):
    used = use(capability, columns, schedule=schedule, seed=1)
    check(*run(name, head, vocab, k, dtype))
    assert used["one_pass_kernel"].launched and not used["row_kernel"].launched


@pytest.mark.slow
@pytest.mark.parametrize("capability", [80, 90, 100])
@pytest.mark.parametrize("name, head, vocab, k, dtype, columns", LARGE)
def test_the_results_as_launched_on_a_device(name, head, vocab, k, dtype, columns, capability, use):
    use(capability, columns, multiprocessors=8)
    check(*run(name, head, vocab, k, dtype))


def test_every_order_of_blocks_gives_the_same_bits(use):
    results = []
    for schedule, seed, multiprocessors in (
        *((schedule, 0, 2) for schedule in SCHEDULES), ("random", 1, 2), ("random", 2, 1),
    ):  # fmt: skip
        use(90, 256, multiprocessors, schedule=schedule, seed=seed)
        results.append(run()[:2])
    assert all(
        torch.equal(x, y) for result in results for x, y in zip(result, results[0], strict=True)
    )


def test_the_two_forms_agree(use):
    use(90, 256)
    ours = run(dtype=torch.float32)
    one_pass.ENABLED = False
    theirs = run(dtype=torch.float32)
    assert relative_error(ours[0], theirs[0].double()) < 1e-6
    torch.testing.assert_close(ours[1], theirs[1], rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize("capability", CAPABILITIES)
@pytest.mark.parametrize("line", barrier_lines(kernels))
def test_a_missing_barrier_is_a_race(line, capability, use):
    removed = []

    def rewrite(text):
        text, count = without_barriers(text, "one_pass.py", line)
        removed.append(count)
        return text

    use(capability, 256, rewrite=rewrite)
    with pytest.raises(Race):
        run()
    assert removed[-1] > 0


ADD = re.compile(r"atom\.global\.gpu\.acq_rel\.add\.u32")
ASK = re.compile(r"ld\.global\.gpu\.acquire\.b32")
CHANGES = {
    "the addition releases nothing": (ADD, "atom.global.gpu.relaxed.add.u32", Race),
    "the addition acquires only": (ADD, "atom.global.gpu.acquire.add.u32", Race),
    "the question acquires nothing": (ASK, "ld.global.gpu.relaxed.b32", Race),
    "an ordinary load asks": (ASK, "ld.global.b32", Race),
    "a volatile load asks": (ASK, "ld.volatile.global.b32", Race),
    "the addition reaches one block": (ADD, "atom.global.cta.acq_rel.add.u32", Fault),
    "the question reaches one block": (ASK, "ld.global.cta.acquire.b32", Fault),
}


@pytest.mark.parametrize("capability", CAPABILITIES)
@pytest.mark.parametrize("change", CHANGES)
def test_a_weaker_order_is_noticed(change, capability, use):
    pattern, replacement, fault = CHANGES[change]
    counts = []

    def rewrite(text):
        text, count = pattern.subn(replacement, text)
        counts.append(count)
        return text

    use(capability, 256, rewrite=rewrite)
    with pytest.raises(fault):
        run()
    assert counts[-1] == 1


@pytest.mark.parametrize("seed", range(3))
def test_reading_before_all_have_published_is_a_race(seed, use):
    """A counter that starts at 1: one program too few is waited for."""
    use(90, 256, schedule="random", seed=seed)
    take = kernels.take_kernel

    class Miscounting:
        def __getitem__(self, grid):
            def launch(*args, **options):
                take[grid](*args, **options)
                args[4].fill_(1)

            return launch

    kernels.take_kernel = Miscounting()  # undone with the fixture's own replacement
    with pytest.raises(Race, match="blocks"):
        run()


@pytest.mark.parametrize("schedule", SCHEDULES)
def test_a_program_that_cannot_start_is_a_deadlock_and_not_a_hang(schedule, use):
    use(90, 256, schedule=schedule, resident=2, cooperative=False)
    with pytest.raises(Fault, match="wait for ever: the device holds 2 of 6"):
        run()


def test_a_device_refuses_a_launch_that_it_cannot_hold(use):
    use(90, 256, resident=2)
    with pytest.raises(Fault, match="cooperative launch of 6 blocks, but 2"):
        run()
