"""The machine itself, on hand-written PTX: arithmetic, faults, races and schedules."""

import fractions

import numpy as np
import pytest
import torch
from ptx_machine import SCHEDULES
from ptx_memory import Fault, Race
from ptx_parser import Immediate, PtxError
from ptx_semantics import OPERATIONS, fma, from_bf16, to_bf16
from ptx_snippets import execute


def compute(opcode, *sources):
    function, result, types, _ = OPERATIONS[opcode]
    from ptx_semantics import TYPES

    arrays = [np.array([s], TYPES[t]) for s, t in zip(sources, types, strict=True)]
    with np.errstate(all="ignore"):
        return np.asarray(function(*arrays), TYPES[result])[0]


# -- arithmetic --


def test_fma_rounds_once():
    rng = np.random.default_rng(0)
    scale = np.exp2(rng.integers(-70, 40, (3, 2000))).astype(np.float32)
    a, b, c = rng.standard_normal((3, 2000)).astype(np.float32) * scale
    c[::2] = -(a * b)[::2]  # cancellation shows a product that was rounded
    c[1::4] *= np.float32(2.0**-24)
    for x, y, z, got in zip(a, b, c, fma(a, b, c), strict=True):
        exact = fractions.Fraction(float(x)) * fractions.Fraction(float(y)) + fractions.Fraction(
            float(z)
        )
        near = [got, np.nextafter(got, np.float32(np.inf)), np.nextafter(got, np.float32(-np.inf))]
        best = min(abs(fractions.Fraction(float(n)) - exact) for n in near)
        assert abs(fractions.Fraction(float(got)) - exact) == best


def test_fma_of_halfway_cases_where_a_double_would_round_twice():
    # a b is 1 + 2^-23 + 2^-46; with c = 2^-24 (1 - 2^-22) the sum is just below a tie
    one = np.float32(1.0)
    a = np.array([1 + 2.0**-12], np.float32)
    product = fractions.Fraction(float(a[0])) ** 2
    for c in (2.0**-24, -(2.0**-24), 2.0**-60, -(2.0**-60), 3 * 2.0**-25):
        got = fma(a, a, np.array([c], np.float32))[0]
        exact = product + fractions.Fraction(c)
        below = np.nextafter(got, -one)
        above = np.nextafter(got, np.float32(2.0))
        distance = abs(fractions.Fraction(float(got)) - exact)
        assert all(distance <= abs(fractions.Fraction(float(x)) - exact) for x in (below, above))


def test_fma_of_special_values():
    inf, nan, zero, one = (np.array([x], np.float32) for x in (np.inf, np.nan, 0.0, 1.0))
    with np.errstate(all="ignore"):
        assert np.isnan(fma(inf, zero, one))[0] and np.isnan(fma(one, nan, one))[0]
        assert fma(inf, one, one)[0] == np.inf
        assert np.isnan(fma(inf, one, -inf))[0]
        large = np.array([2e38], np.float32)
        assert fma(large, 2 * one, zero)[0] == np.inf


def test_bf16_rounds_as_torch_does():
    x = torch.randn(4000) * torch.logspace(-38, 38, 4000)
    x[:4] = torch.tensor([torch.inf, -torch.inf, 1.00390625, 1.01171875])
    ours = to_bf16(x.numpy())
    assert np.array_equal(ours, x.bfloat16().view(torch.uint16).numpy())
    assert np.array_equal(from_bf16(ours), x.bfloat16().float().numpy())
    assert to_bf16(np.array([np.nan], np.float32))[0] == 0x7FFF


@pytest.mark.parametrize(
    ("opcode", "sources", "expected"),
    [
        ("div.s64", (-7, 2), -3),
        ("div.s64", (7, -2), -3),
        ("div.s64", (-8, 2), -4),
        ("div.u32", (2**32 - 1, 2), 2**31 - 1),
        ("shl.b32", (1, 31), 2**31),
        ("shl.b32", (1, 32), 0),
        ("shr.u32", (2**31, 40), 0),
        ("shr.s32", (-8, 1), -4),
        ("shr.s32", (-8, 99), -1),
        ("bfe.u32", (0xABCD, 4, 8), 0xBC),
        ("bfe.u32", (0xFFFFFFFF, 0, 32), 0xFFFFFFFF),
        ("bfe.u32", (0xFFFFFFFF, 33, 4), 0),
        ("bfe.s32", (0xB0, 4, 4), -5),
        ("bfe.s32", (0x70, 4, 4), 7),
        ("bfe.s32", (0x80, 7, 1), -1),
        ("bfe.s32", (-1, 0, 0), 0),
        ("bfe.s32", (-2, 0, 32), -2),
        ("bfe.s32", (-(2**31), 30, 9), -2),
        ("bfe.s32", (-1, 40, 4), -1),
        ("mul.wide.s32", (-2, 3), -6),
        ("mul.wide.u32", (2**32 - 1, 2), 2**33 - 2),
        ("mad.wide.s32", (-2, 3, 10), 4),
        ("mad.lo.s64", (-2, 3, 10), 4),
        ("cvt.s64.s32", (-5,), -5),
        ("cvt.u64.u32", (2**32 - 5,), 2**32 - 5),
        ("cvt.u32.u64", (2**35 + 3,), 3),
        ("max.f32", (np.nan, 2.0), 2.0),
        ("min.f32", (np.nan, 2.0), 2.0),
        ("max.f32/3", (1.0, 5.0, 2.0), 5.0),
        ("setp.ne.f32", (np.nan, 1.0), False),
        ("setp.neu.f32", (np.nan, 1.0), True),
        ("setp.lt.f32", (np.nan, 1.0), False),
        ("setp.geu.f32", (np.nan, 1.0), True),
        ("setp.nan.f32", (1.0, np.nan), True),
        ("setp.gt.u32", (2**31, 1), True),
        ("setp.gt.s32", (-1, 1), False),
        ("selp.f32", (1.0, 2.0, False), 2.0),
        ("not.pred", (True,), False),
        ("ex2.approx.f32", (-np.inf,), 0.0),
        ("ex2.approx.f32", (3.0,), 8.0),
        ("div.full.f32", (1.0, 0.0), np.inf),
        ("cvt.rn.f32.u32", (2**32 - 1,), 2.0**32),
        ("cvt.rn.f32.s32", (16777217,), 16777216.0),
        ("cvt.rn.f16.f32", (70000.0,), np.inf),
        ("cvt.rn.f16x2.f32", (1.0, -2.0), 0x3C00C000),
        ("cvt.rn.bf16x2.f32", (1.0, -2.0), 0x3F80C000),
        ("fma.rn.ftz.f32", (1e-30, 1e-10, 0.0), 0.0),
        ("fma.rn.f32.bf16", (0x4000, 0xC000, 1.0), -3.0),
        ("add.rn.f32.bf16", (0x4000, 1.0), 3.0),
    ],
)
def test_operations(opcode, sources, expected):
    assert compute(opcode, *sources) == expected


def test_a_max_that_keeps_nan():
    assert np.isnan(compute("max.NaN.f32", np.nan, 2.0))
    assert np.isnan(compute("max.NaN.f32", 2.0, np.nan))
    assert compute("max.NaN.f32", -np.inf, 2.0) == 2.0


def test_zeros_have_an_order_in_max_and_min():
    assert not np.signbit(compute("max.f32", -0.0, 0.0))
    assert not np.signbit(compute("max.f32", 0.0, -0.0))
    assert np.signbit(compute("min.f32", 0.0, -0.0))


def test_pairs_are_computed_in_both_halves():
    def pair(low, high):
        return np.array([low, high], np.float32).view(np.uint64)[0]

    assert compute("mul.f32x2", pair(2, 3), pair(5, -1)) == pair(10, -3)
    assert compute("fma.rn.f32x2", pair(2, 3), pair(5, -1), pair(1, 1)) == pair(11, -2)


# -- refusals --


@pytest.mark.parametrize(
    "line",
    [
        "popc.b32 %r4, %r1;",
        "add.sat.s32 %r4, %r1, %r2;",
        "add.rz.f32 %r4, %r1, %r2;",
        "add.s32 %r4, %r1, %r2, %r3;",
        "add.s32 %r4, %r1;",
        "add.s64 %r4, %r1, %r2;",
        "add.s32 %rd4, %r1, %r2;",
        "mov.b32 %r4, somewhere;",
        "ld.global.nc.b32 {%r4}, [%rd3];",
        "ld.local.b32 {%r4}, [%rd3];",
        "ld.global.b32 {%r4, %r5}, [%rd3];",
        "ld.global.v2.b32 {%r4}, [%rd3];",
        "ld.global.b64 {%r4}, [%rd3];",
        "atom.global.add.u32 %r4, [%rd3], 1;",
        "shfl.sync.down.b32 %r4, %r1, 1, 31, -1;",
        "shfl.sync.bfly.b32 %r4, %r1, 1, 15, -1;",
        "@%p1 shfl.sync.bfly.b32 %r4, %r1, 1, 31, -1;",
        "redux.sync.add.s32 %r4, %r1, %r2;",
        "bar.warp.sync 15;",
        "bar.sync 1;",
        "bar.sync 0, 32;",
        "bra $nowhere;",
        "ldmatrix.sync.aligned.m8n8.x1.trans.shared.b16 {%r4}, [%r3];",
    ],
)
def test_an_instruction_of_unknown_meaning_is_refused(line):
    with pytest.raises(PtxError):
        execute(line)


@pytest.mark.parametrize(
    "line", ["add.s32 %r99, %r1, %r2;", ".local .b8 x[4];", "neg.s32 %r4, $!;"]
)
def test_text_of_unknown_meaning_is_refused(line):
    with pytest.raises(PtxError):
        execute(line)


def test_immediates_may_be_negative_or_hexadecimal():
    assert execute("mov.b32 %r4, -1; st.global.b32 [%rd3], %r4;")[0] == 2**32 - 1
    assert execute("mov.b32 %r4, 0f3F800000; st.global.b32 [%rd3+0], %r4;")[5] == 0x3F800000
    assert Immediate(-1) != Immediate(1)


# -- memory --


def test_every_thread_has_its_own_registers():
    out = execute("st.global.b32 [%rd3], %r1;")
    assert out[:64].tolist() == list(range(64)) and (out[64:] == 0).all()


def test_a_vector_is_stored_and_loaded_in_order():
    body = """
    mul.wide.u32 %rd4, %r1, 8; add.s64 %rd5, %rd1, %rd4; add.s32 %r4, %r1, 100;
    st.global.v2.b32 [%rd5], {%r1, %r4}; ld.global.b64 {%rd6}, [%rd5];
    mov.b64 {%r5, %r6}, %rd6; st.global.v2.b32 [%rd5], {%r6, %r5};
    """
    assert execute(body)[:4].tolist() == [100, 0, 101, 1]


@pytest.mark.parametrize(
    ("line", "message"),
    [
        ("st.global.b32 [%rd3+4096], %r1;", "outside"),
        ("st.global.b32 [%rd1+1021], %r1;", "aligned"),
        ("ld.global.b32 {%r4}, [%rd3+-4];", "outside"),
        ("ld.global.b32 {%r4}, [%rd3+1024];", "outside"),
        ("ld.global.v4.b32 {%r4,%r5,%r6,%r7}, [%rd1+4];", "aligned"),
        ("st.shared.b32 [%r3+1024], %r1;", "beyond"),
        ("st.shared.b32 [%r3+2], %r1;", "aligned"),
    ],
)
def test_an_access_that_a_device_forbids_is_a_fault(line, message):
    with pytest.raises(Fault, match=message):
        execute(line)


def test_a_masked_access_is_not_checked():
    body = "setp.lt.u32 %p1, %r1, 64; @!%p1 st.global.b32 [%rd3+4096], %r1;"
    assert (execute(body) == 0).all()


def test_a_register_that_nobody_wrote_holds_no_number():
    word = execute("st.global.b32 [%rd3], %r20;")[:1]
    assert word.view(np.float32)[0] < -1e37


# -- order --

NEIGHBOUR = "xor.b32 %r5, %r3, {bit}; st.shared.b32 [%r3], %r1; {barrier} ld.shared.b32 %r4, [%r5];"
STORE = "st.global.b32 [%rd3], %r4;"


def neighbour(bit, barrier):
    return NEIGHBOUR.format(bit=bit, barrier=barrier) + STORE


@pytest.mark.parametrize("schedule", SCHEDULES)
@pytest.mark.parametrize(
    ("bit", "barrier"), [(128, "bar.sync 0;"), (4, "bar.sync 0;"), (4, "bar.warp.sync -1;")]
)
def test_a_barrier_orders_what_threads_exchange(bit, barrier, schedule):
    out = execute(neighbour(bit, barrier), schedule=schedule, seed=3)
    assert out[:64].tolist() == [i ^ (bit // 4) for i in range(64)]


@pytest.mark.parametrize("schedule", SCHEDULES)
@pytest.mark.parametrize(
    ("bit", "barrier", "kind"),
    [(128, "", "warps"), (4, "", "lanes"), (128, "bar.warp.sync -1;", "warps")],
)
def test_a_missing_barrier_is_a_race(bit, barrier, kind, schedule):
    with pytest.raises(Race, match=kind):
        execute(neighbour(bit, barrier), schedule=schedule)


@pytest.mark.parametrize("schedule", SCHEDULES)
@pytest.mark.parametrize("barrier", ["", "bar.sync 0;"])
def test_a_read_before_a_write_is_a_race_too(barrier, schedule):
    body = f"""
    st.shared.b32 [%r3], %r1; bar.sync 0; ld.shared.b32 %r4, [global_smem]; {barrier}
    add.s32 %r6, %r1, 7; st.shared.b32 [%r3], %r6; {STORE}
    """
    if barrier:
        assert (execute(body, schedule=schedule)[:64] == 0).all()
    else:
        with pytest.raises(Race, match="a read, then a write|a write, then a read"):
            execute(body, schedule=schedule)


@pytest.mark.parametrize("schedule", SCHEDULES)
def test_copies_of_one_value_may_be_stored_together(schedule):
    body = "mov.b32 %r4, 5; st.global.b32 [%rd1], %r4;"
    assert execute(body, schedule=schedule)[0] == 5
    with pytest.raises(Race):
        execute("st.global.b32 [%rd1], %r1;", schedule=schedule)


def test_blocks_are_never_ordered():
    body = "bar.sync 0; st.global.b32 [%rd3], %r2; bar.sync 0;"
    assert (execute(body, blocks=1)[:64] == 0).all()
    with pytest.raises(Race, match="blocks"):
        execute(body, blocks=2)
    with pytest.raises(Race, match="blocks"):
        execute(body, blocks=12, schedule="reverse")


def test_blocks_may_read_the_same_bytes():
    body = """
    ld.global.b32 {%r4}, [%rd1]; mul.wide.u32 %rd4, %r2, 256; add.s64 %rd5, %rd3, %rd4;
    st.global.b32 [%rd5+512], %r2;
    """
    assert execute(body, blocks=2, words=512)[128:256].tolist() == [0] * 64 + [1] * 64


@pytest.mark.parametrize("schedule", SCHEDULES)
def test_divergent_threads_meet_again(schedule):
    body = f"""
    mov.b32 %r4, 0; mov.b32 %r5, 0;
    $loop:
    add.s32 %r4, %r4, 2; add.s32 %r5, %r5, 1;
    setp.lt.u32 %p1, %r5, %r1;
    @%p1 bra $loop;
    bar.sync 0;
    {STORE}
    """
    out = execute(body, schedule=schedule)
    assert out[:64].tolist() == [2 * max(i, 1) for i in range(64)]


@pytest.mark.parametrize("schedule", SCHEDULES)
@pytest.mark.parametrize("bound", [40, 64])
def test_a_barrier_that_some_threads_miss_is_a_fault(bound, schedule):
    body = f"setp.ge.u32 %p1, %r1, {bound}; @%p1 bra $end;\nbar.sync 0;\n$end:\n{STORE}"
    if bound == 64:
        execute(body, schedule=schedule)
    else:
        with pytest.raises(Fault, match="wait at"):
            execute(body, schedule=schedule)


def test_a_warp_wide_instruction_needs_all_lanes():
    body = (
        "setp.lt.u32 %p1, %r1, 40; @%p1 bra $end;\nshfl.sync.bfly.b32 %r4, %r1, 1, 31, -1;\n$end:\n"
    )
    with pytest.raises(Fault, match="some lanes"):
        execute(body)
    whole = body.replace("40", "32")
    execute(whole)


@pytest.mark.parametrize("schedule", SCHEDULES)
def test_a_warp_wide_instruction_waits_for_lanes_on_a_longer_way(schedule):
    body = f"""
    and.b32 %r5, %r1, 1; setp.eq.b32 %p1, %r5, 0; @%p1 bra $far;
    $near:
    shfl.sync.bfly.b32 %r4, %r1, 1, 31, -1; {STORE} bra.uni $end;
    $far:
    bra.uni $near;
    $end:
    """
    assert execute(body, schedule=schedule)[:64].tolist() == [i ^ 1 for i in range(64)]


def test_warp_wide_instructions():
    swap = "shfl.sync.bfly.b32 %r4, %r1, 16, 31, -1;" + STORE
    assert execute(swap)[:64].tolist() == [i ^ 16 for i in range(64)]
    most = "mov.b32 %r5, -1; redux.sync.max.s32 %r4, %r1, %r5;" + STORE
    assert execute(most)[:64].tolist() == [31] * 32 + [63] * 32


def test_matrices_pass_through_shared_memory():
    """Lane i gives and receives elements 2i and 2i + 1 of an 8 x 8 matrix of 16-bit elements."""
    body = (
        """
    and.b32 %r5, %r1, 31; shl.b32 %r6, %r5, 4; shr.u32 %r7, %r1, 5; shl.b32 %r7, %r7, 9;
    add.s32 %r6, %r6, %r7;
    stmatrix.sync.aligned.m8n8.x1.shared.b16 [%r6], {%r1};
    bar.sync 0;
    ldmatrix.sync.aligned.m8n8.x1.shared.b16 {%r4}, [%r6];
    ld.shared.b32 %r8, [%r3];
    """
        + STORE
    )
    assert execute(body)[:64].tolist() == list(range(64))
    read = body.replace("%r4}", "%r9}").replace("%r8, [%r3]", "%r4, [%r3]")
    assert execute(read)[:32].tolist() == list(range(32))


def test_noise_stays_within_the_bound_of_the_instruction():
    body = "cvt.rn.f32.u32 %r5, %r1; ex2.approx.f32 %r4, %r5;" + STORE
    exact = execute(body)[:64].view(np.float32)
    noisy = execute(body, noise=True, seed=1)[:64].view(np.float32)
    assert (noisy != exact).any()
    assert (abs(noisy / exact - 1.0) <= 2.0**-22 + 2.0**-24).all()
