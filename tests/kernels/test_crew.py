"""Pieces that threads take as they become free: the same bits, modes and errors as without."""

import threading

import pytest
import torch
from kernel_cases import make_case, relative_error

from lopd_kernels import linear_logprobs, linear_sparse_divergence, linear_topk
from lopd_kernels._core import crew, gemm
from lopd_kernels._torch import rows


@pytest.fixture
def threads():
    before = torch.get_num_threads()
    yield torch.set_num_threads
    torch.set_num_threads(before)


@pytest.fixture
def small_pieces(monkeypatch):
    """Pieces that small tensors have too."""
    for name, value in {"PIECE_OPERATIONS": 1, "PIECE_COLUMNS": 16, "PIECE_ROWS": 4}.items():
        monkeypatch.setattr(gemm, name, value)
    monkeypatch.setattr(gemm, "WIDEN_BYTES", 1 << 10)
    monkeypatch.setattr(rows, "BLOCK_BYTES", 8 << 10)


CALLS = {
    "sum": {},
    "panels": {"reduction": "none"},
    "sampled": {"dense_share": 0.4, "seed": 3},
    "capped": {"softcap": 20.0, "tail": "renormalize"},
}


def results(case, dtype, **options):
    h, w, b = (
        x.detach().to(dtype, copy=True).requires_grad_()
        for x in (case.hidden, case.weight, case.bias)
    )
    teacher = [x.double() if dtype == torch.float64 and x.is_floating_point() else x
               for x in case.teacher]  # fmt: skip
    loss = linear_sparse_divergence(h, w, *teacher, bias=b, **options)
    loss.sum().backward()
    return loss.detach(), h.grad, w.grad, b.grad


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("options", CALLS.values(), ids=CALLS)
def test_the_number_of_threads_does_not_change_a_bit(options, dtype, threads, small_pieces):
    """Unless `workspace_bytes` leaves smaller chunks for more threads."""
    case = make_case(rows=70, vocab=1200, width=24, k=6)
    threads(1)
    expected = results(case, dtype, **options)
    for count in (2, 3):
        threads(count)
        for a, b in zip(results(case, dtype, **options), expected, strict=True):
            assert torch.equal(a, b)
        assert torch.get_num_threads() == count
    exact = results(case, torch.float64, **options)
    bound = 1e-5 if dtype == torch.float32 else 2e-2  # the parameters are rounded
    for a, b in zip(expected, exact, strict=True):
        assert relative_error(a, b) <= bound


@torch.inference_mode()
def test_calls_without_gradients(threads, small_pieces):
    case = make_case(rows=70, vocab=1200, width=24, k=6)
    found = []
    for count in (1, 2):
        threads(count)
        top = linear_topk(case.hidden, case.weight, 4)
        found.append((*top[:4], linear_logprobs(case.hidden, case.weight, case.ids)))
    for a, b in zip(*found, strict=True):
        assert torch.equal(a, b)


def test_a_gemm_of_pieces_adds_to_what_is_there(threads, small_pieces):
    torch.manual_seed(0)
    dlogits, weight, total = torch.randn(50, 1200), torch.randn(1200, 16), torch.randn(50, 16)
    expected = total.double() + dlogits.double() @ weight.double()
    assert gemm.partial_sums(1200, 16) > 8
    threads(2)
    gemm.hidden_grad(dlogits, gemm.WeightRows(weight), 0, total, accumulate=True)
    assert relative_error(total, expected) < 1e-5


def test_a_slow_piece_holds_up_no_other(threads):
    """One thread waits in its first piece until the other has done all the rest."""
    threads(2)
    done, others = [], threading.Event()

    def work(piece):
        if piece == 0:
            assert others.wait(60)
        done.append(piece)
        if len(done) == 19:
            others.set()

    crew.hand_out(work, range(20))
    assert sorted(done) == list(range(20)) and done[-1] == 0


def test_an_error_in_a_piece_is_raised_and_leaves_the_crew_intact(threads):
    threads(2)

    def fail(piece):
        if piece == 5:
            raise ValueError("piece 5")

    with pytest.raises(ValueError, match="piece 5"):
        crew.hand_out(fail, range(20))
    done = []
    crew.hand_out(done.append, range(20))
    assert sorted(done) == list(range(20))


def test_the_modes_and_threads_of_a_piece(threads):
    threads(2)
    seen = []

    def look(piece):
        modes = torch.is_grad_enabled(), torch.is_inference_mode_enabled()
        seen.append((*modes, torch.get_num_threads()))

    crew.hand_out(look, range(20))
    assert set(seen) == {(False, False, 1)}
    seen.clear()
    with torch.inference_mode():
        crew.hand_out(look, range(20))
    assert set(seen) == {(False, True, 1)}
    new = []
    thread = threading.Thread(target=lambda: new.append(torch.get_num_threads()))
    thread.start()
    thread.join()
    assert new == [2] and torch.get_num_threads() == 2


@pytest.mark.parametrize(("count", "crew_size", "each"), [(3, 3, 1), (20, 8, 2)])
def test_many_cores_are_divided(count, crew_size, each, threads):
    threads(count)
    names, found = set(), set()

    def look(piece):
        names.add(threading.current_thread().name)
        found.add(torch.get_num_threads())

    crew.hand_out(look, range(200))
    assert crew.size() == crew_size and len(names) <= crew_size and found == {each}
