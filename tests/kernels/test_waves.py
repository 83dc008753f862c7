"""Chunks that fill a GPU's waves: the model of their time, and what it chooses on known GPUs."""

import json
from types import SimpleNamespace

import aot
import pytest
import torch
from test_workspace import TARGET

from lopd_kernels._core import waves, workspace
from lopd_kernels._core.rules import DivergenceRule, UnbiasedRule
from lopd_kernels._core.types import LogitOptions, Needs
from lopd_kernels._core.waves import Gpu, Work, call_time, filled, occupancy
from lopd_kernels._triton import rows as triton_rows

ALL = Needs(True, True, True)
GPUS = {"H100": 132, "H200": 132, "A100": 108, "B200": 148, "RTX 4090": 128}
ACCUMULATED = TARGET._replace(d=2048)


def gpu(name):
    return Gpu(GPUS[name], programs=4)


def test_programs_by_registers():
    assert [occupancy(x, 8) for x in (48, 56, 64, 65, 72, 80, 96)] == [5, 4, 4, 3, 3, 3, 2]
    assert occupancy(64, 16) == 2


def test_a_call_by_hand():
    """Two chunks of 256 rows and one of 88, on two multiprocessors with one program each."""
    work, tiny = Work(600, 512, 256, hidden_grad=True, weight_grad=False), Gpu(2, 1)
    weight = 2 * 512 * 256
    of_256 = 128 * 10 * 512 * 2 + 2 * (2 * 256 * 512 * 256 / 200)  # the row pass, GEMMs 1 and 2
    assert max(weight + 4 * 256 * 512, weight + 2 * 256 * 512) > 2 * 256 * 512 * 256 / 200
    of_256 += weight + 4 * 256 * 512 - 2 * 256 * 512 * 256 / 200  # memory bounds GEMM 1
    of_256 += weight + 2 * 256 * 512 - 2 * 256 * 512 * 256 / 200  # and GEMM 2
    of_88 = 44 * 10 * 512 * 2 + 2 * weight + 4 * 88 * 512 + 2 * 88 * 512
    assert call_time(work, tiny, 256) == pytest.approx(2 * of_256 + of_88)


def test_tiles_fill_the_multiprocessors():
    """Bound by operations, 16 x 16 tiles take two turns of 132 multiprocessors, 13 x 16 as many."""
    work = Work(2048, 1 << 20, 4096, hidden_grad=True, weight_grad=False)
    gemm_2 = [
        call_time(work._replace(n=n), gpu("H100"), n)
        - call_time(work._replace(n=n, hidden_grad=False), gpu("H100"), n)
        for n in (1664, 2048)
    ]
    assert gemm_2[0] == pytest.approx(gemm_2[1])


@pytest.mark.parametrize(
    ("name", "n", "accumulated", "stored"),
    [
        ("H100", 8192, 2048, 2048),
        ("H200", 8192, 2048, 2048),
        ("A100", 8192, 1664, 2048),
        ("B200", 8192, 2176, 2176),
        ("RTX 4090", 8192, 2048, 2048),
        ("H100", 32768, 2048, 2048),
        ("A100", 32768, 1664, 2048),
        ("H100", 2000, 2000, 2000),  # fits in one chunk
    ],
)
def test_rows_of_a_chunk(name, n, accumulated, stored):
    """V = 151936 and D = 4096 within the default workspace."""
    sizes = TARGET._replace(n=n)
    assert workspace.chunk_rows(sizes, ALL, False, None, gpu(name)) == accumulated
    assert workspace.chunk_rows(sizes, ALL, True, None, gpu(name)) == stored


@pytest.mark.parametrize("name", GPUS)
@pytest.mark.parametrize("bound", [None, 3 << 30, 5 << 30])
@pytest.mark.parametrize(("n", "v", "d"), [(16384, 151936, 2048), (9000, 262208, 2560)])
def test_no_chunk_is_larger_than_the_limit_or_slower_than_equal_ones(name, bound, n, v, d):
    sizes = TARGET._replace(n=n, v=v, d=d)
    for stored in (False, True):
        if bound is not None and sizes.chunked(128, ALL, stored) > bound:
            continue
        rows = workspace.chunk_rows(sizes, ALL, stored, bound, gpu(name))
        equal = workspace.chunk_rows(sizes, ALL, stored, bound)
        assert rows <= workspace.most_rows(sizes, ALL, stored, bound, waves=True)
        if bound is not None:
            assert sizes.chunked(rows, ALL, stored) <= bound
        work = Work(n, v, d, not stored, not stored)
        times = [call_time(work, gpu(name), each) for each in (rows, equal // 128 * 128)]
        assert times[0] <= waves.CLOSE * times[1]


def test_where_no_gpu_decides():
    """On a CPU, in fp32, and where the sample of rows would depend on the GPU."""
    for sizes in (
        TARGET._replace(device="cpu", mixed=False),
        TARGET._replace(mixed=False),
        TARGET._replace(kept=1000),
    ):
        expected = workspace.chunk_rows(sizes, ALL, False, None)
        assert workspace.chunk_rows(sizes, ALL, False, None, Gpu(7, 3)) == expected


def test_chunks_are_larger_only_where_waves_choose():
    rows = {True: (5 << 28) // (151936 * 4), False: (1 << 30) // (151936 * 4)}
    for gpu_of in (None, gpu("H100")):
        for sizes in (TARGET, TARGET._replace(mixed=False), TARGET._replace(kept=1000)):
            found = workspace.chunk_rows(sizes._replace(n=1 << 16), ALL, False, None, gpu_of)
            waves = gpu_of is not None and sizes == TARGET
            assert (1 << 10) <= found <= rows[waves]
            assert waves == (found > rows[False])


def test_the_choice_takes_the_host_few_comparisons(monkeypatch):
    compared = []
    choose = waves.best_rows

    def counted(work, gpu, candidates):
        compared.append(len(candidates))
        return choose(work, gpu, candidates)

    monkeypatch.setattr(workspace, "best_rows", counted)
    for vocab in (1000, 2048, 8192, 151936, 262208):
        sizes = TARGET._replace(v=vocab, n=1_000_000)
        rows = workspace.chunk_rows(sizes, ALL, False, None, gpu("H100"))
        assert rows <= workspace.most_rows(sizes, ALL, False, None, waves=True)
    assert len(compared) == 5 and max(compared) <= 64 and min(compared) >= 8


def test_the_plan_holds_for_every_gpu():
    needs = Needs(True, True)
    for sizes in (TARGET, ACCUMULATED):
        stored = workspace.stores_dlogits(sizes, needs, None)
        for count in (*GPUS.values(), 16, 46, 80):
            rows = workspace.chunk_rows(sizes, needs, stored, None, Gpu(count, 3))
            assert sizes.chunked(rows, needs, stored) <= workspace.allocated(sizes, needs, None)


def test_the_registers_of_the_compiled_kernel():
    """What `gpu` assumes, against the table that test_aot.py holds the compiler to."""
    table = json.loads(aot.LIMITS.read_text(encoding="utf-8"))
    found = {kind: [] for kind in triton_rows.REGISTERS}
    for case, costs in table.items():
        if "row_kernel" in case and "split" not in case and "V=33 " not in case:
            kind = "capped" if "capped" in case else "plain"
            found["unbiased" if "unbiased" in case else kind].append(costs["registers"])
    for kind, registers in triton_rows.REGISTERS.items():
        assert registers - 8 < max(found[kind]) <= registers, kind


def test_what_a_device_runs_at_a_time(monkeypatch):
    facts = SimpleNamespace(multi_processor_count=132)
    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda device: facts)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: (9, 0))
    like = SimpleNamespace(is_cuda=True, device=torch.device("cuda"))
    rule, plain = DivergenceRule("reverse_kl", "bucket"), LogitOptions()

    def of(rule, options, k=64, vocab=151936):
        return triton_rows.gpu(like, vocab, k + 1, rule, options)

    assert of(rule, plain) == (132, 4)
    assert of(rule, LogitOptions(softcap=30.0)) == (132, 3)
    assert of(UnbiasedRule(2.0), plain) == (132, 3)
    assert of(rule, plain, vocab=500) == (132, 16)  # two warps
    assert triton_rows.gpu(torch.zeros(1), 500, 65, rule, plain) is None
    assert filled(1664, 132 * 4) == pytest.approx(1664 / 2112)
