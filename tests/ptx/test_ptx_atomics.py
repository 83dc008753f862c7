"""Atomic accesses on hand-written PTX: what one block learns of another, and blocks that wait."""

import numpy as np
import pytest
from ptx_machine import SCHEDULES
from ptx_memory import Fault, Race
from ptx_parser import PtxError
from ptx_snippets import execute

# Block 0 stores a number for each thread of block 1 and then sets the word before the last.
PASSING = """
    setp.eq.b32 %p1, %r1, 0;
    setp.ne.b32 %p2, %r2, 0;
    mov.b32 %r6, 1; add.s32 %r5, %r1, 7; xor.b32 %r7, %r3, 128;
    mul.wide.u32 %rd4, %r7, 1; add.s64 %rd5, %rd1, %rd4;
    @%p2 bra $wait;
    st.global.b32 [%rd5], %r5;
    {before}
    @%p1 {publish}
    bra.uni $end;
    $wait:
    mov.b32 %r8, 1;
    @%p1 {ask}
    bar.sync 0;
    @%p1 st.shared.b32 [global_smem], %r8;
    bar.sync 0;
    ld.shared.b32 %r8, [global_smem];
    bar.sync 0;
    setp.eq.b32 %p3, %r8, 0;
    @%p3 bra $wait;
    {after}
    ld.global.b32 {{%r9}}, [%rd3];
    st.global.b32 [%rd3+256], %r9;
    $end:
"""
ASK, PUBLISH = (
    "ld.acquire.gpu.global.b32 {%r8}, [%rd1+1016];",
    "st.release.gpu.global.b32 [%rd1+1016], %r6;",
)
RIGHT = {"before": "bar.sync 0;", "publish": PUBLISH, "ask": ASK, "after": "bar.sync 0;"}


def passing(**changes):
    return PASSING.format(**RIGHT | changes)


@pytest.mark.parametrize("schedule", SCHEDULES)
@pytest.mark.parametrize(
    "publish",
    [
        PUBLISH,
        "atom.acq_rel.gpu.global.add.u32 %r10, [%rd1+1016], %r6;",
        "atom.global.gpu.release.exch.b32 %r10, [%rd1+1016], %r6;",
        "st.release.sys.global.b32 [%rd1+1016], %r6;",
    ],
)
def test_a_release_and_an_acquire_order_blocks(publish, schedule):
    out = execute(passing(publish=publish), blocks=2, schedule=schedule, seed=5)
    assert out[64:128].tolist() == [(i ^ 32) + 7 for i in range(64)]


CHANGES = {
    "no release": {"publish": PUBLISH.replace("release", "relaxed")},
    "a volatile store": {"publish": "st.volatile.global.b32 [%rd1+1016], %r6;"},
    "an ordinary store": {"publish": "st.global.b32 [%rd1+1016], %r6;"},
    "no acquire": {"ask": ASK.replace("acquire", "relaxed")},
    "a volatile load": {"ask": "ld.volatile.global.b32 {%r8}, [%rd1+1016];"},
    "an ordinary load": {"ask": "ld.global.b32 {%r8}, [%rd1+1016];"},
    "nobody waits": {"ask": ASK.replace("%r8", "%r11")},
    "no barrier before the release": {"before": ""},
}


@pytest.mark.parametrize("schedule", SCHEDULES)
@pytest.mark.parametrize("change", CHANGES)
def test_without_one_of_them_it_is_a_race(change, schedule):
    with pytest.raises(Race):
        execute(passing(**CHANGES[change]), blocks=2, schedule=schedule, seed=5)


@pytest.mark.parametrize("what", ["publish", "ask"])
def test_a_scope_of_one_block_is_a_fault(what):
    with pytest.raises(Fault, match="scope"):
        execute(passing(**{what: RIGHT[what].replace("gpu", "cta")}), blocks=2)


@pytest.mark.parametrize("schedule", SCHEDULES)
def test_only_the_thread_that_asked_knows_before_a_barrier(schedule):
    body = """
    setp.ne.b32 %p2, %r2, 0; setp.eq.b32 %p1, %r1, 0; mov.b32 %r6, 1;
    @%p2 bra $wait;
    @%p1 st.global.b32 [%rd1+512], %r6;
    bar.sync 0;
    @%p1 st.release.gpu.global.b32 [%rd1+1016], %r6;
    bra.uni $end;
    $wait:
    mov.b32 %r8, 1;
    @%p1 ld.acquire.gpu.global.b32 {%r8}, [%rd1+1016];
    setp.eq.b32 %p3, %r8, 0;
    @%p3 bra $wait;
    READ
    $end:
    """
    one = body.replace("READ", "@%p1 ld.global.b32 {%r9}, [%rd1+512];")
    execute(one, blocks=2, schedule=schedule, seed=5)
    for barrier in ("", "bar.warp.sync -1;"):
        with pytest.raises(Race, match="blocks"):
            execute(
                body.replace("READ", barrier + "ld.global.b32 {%r9}, [%rd1+512];"),
                blocks=2, schedule=schedule, seed=5,
            )  # fmt: skip
    execute(
        body.replace("READ", "bar.sync 0; ld.global.b32 {%r9}, [%rd1+512];"),
        blocks=2, schedule=schedule, seed=5,
    )  # fmt: skip


def test_knowledge_is_passed_on():
    """Block 2 asks block 1 alone, which has asked block 0."""
    body = """
    setp.eq.b32 %p1, %r2, 0; setp.eq.b32 %p2, %r2, 1;
    mov.b32 %r6, 1; mov.b32 %r7, 2;
    @!%p1 bra $others;
    st.global.b32 [%rd1], %r7;
    bar.sync 0;
    st.release.gpu.global.b32 [%rd1+512], %r6;
    bra.uni $end;
    $others:
    @!%p2 bra $last;
    $first:
    ld.acquire.gpu.global.b32 {%r8}, [%rd1+512];
    setp.eq.b32 %p3, %r8, 0;
    @%p3 bra $first;
    st.release.gpu.global.b32 [%rd1+520], %r6;
    bra.uni $end;
    $last:
    ld.acquire.gpu.global.b32 {%r8}, [%rd1+520];
    setp.eq.b32 %p3, %r8, 0;
    @%p3 bra $last;
    ld.global.b32 {%r9}, [%rd1];
    st.global.b32 [%rd1+8], %r9;
    $end:
    """
    for schedule in SCHEDULES:
        assert execute(body, blocks=3, threads=32, schedule=schedule, seed=2)[2] == 2
    for place in ("512", "520"):
        with pytest.raises(Race):
            execute(
                body.replace(f"st.release.gpu.global.b32 [%rd1+{place}]",
                             f"st.relaxed.gpu.global.b32 [%rd1+{place}]"),
                blocks=3, threads=32,
            )  # fmt: skip


@pytest.mark.parametrize("schedule", SCHEDULES)
def test_every_thread_adds_once(schedule):
    body = "mov.b32 %r6, 3; atom.global.gpu.relaxed.add.u32 %r4, [%rd1], %r6;"
    assert execute(body, blocks=4, schedule=schedule)[0] == 3 * 4 * 64
    numbers = body + "mul.wide.u32 %rd4, %r4, 4; add.s64 %rd5, %rd1, %rd4; "
    out = execute(numbers + "st.global.b32 [%rd5+4], %r6;", blocks=1, words=512, schedule=schedule)
    assert np.flatnonzero(out).tolist() == [0, *range(1, 3 * 64, 3)]


@pytest.mark.parametrize("schedule", SCHEDULES)
def test_blocks_that_wait_for_ever_are_a_fault(schedule):
    body = passing(publish=PUBLISH.replace("%r6", "%r1"))  # thread 0 stores 0
    with pytest.raises(Fault, match="wait for ever"):
        execute(body, blocks=2, schedule=schedule)


def test_a_block_that_waits_for_one_that_has_not_started_is_a_fault():
    with pytest.raises(Fault, match=r"blocks \[1\] wait for ever: the device holds 1 of 2"):
        execute(passing(), blocks=2, schedule="reverse", resident=1)
    execute(passing(), blocks=2, resident=1)
    with pytest.raises(Fault, match="cooperative launch of 2 blocks, but 1"):
        execute(passing(), blocks=2, resident=1, cooperative=True)


def test_a_cooperative_launch_holds_all_its_blocks():
    """Each of 12 blocks waits for all others."""
    body = """
    setp.eq.b32 %p1, %r1, 0; mov.b32 %r6, 1;
    @%p1 atom.global.gpu.acq_rel.add.u32 %r7, [%rd1], %r6;
    $wait:
    mov.b32 %r8, 12;
    @%p1 ld.acquire.gpu.global.b32 {%r8}, [%rd1];
    setp.lt.u32 %p2, %r8, 12;
    @%p2 bra $wait;
    """
    with pytest.raises(Fault, match="wait for ever"):
        execute(body, blocks=12)
    assert execute(body, blocks=12, cooperative=True)[0] == 12


@pytest.mark.parametrize(
    "line",
    [
        "atom.global.add.u32 %r4, [%rd3], %r1;",
        "atom.global.gpu.relaxed.min.u32 %r4, [%rd3], %r1;",
        "atom.global.gpu.relaxed.add.u64 %rd4, [%rd3], %rd2;",
        "atom.shared.gpu.relaxed.add.u32 %r4, [%rd3], %r1;",
        "atom.global.gpu.relaxed.add.u32 %r4, [%rd3];",
        "red.global.gpu.relaxed.add.u32 [%rd3], %r1;",
        "ld.release.gpu.global.b32 {%r4}, [%rd3];",
        "st.acquire.gpu.global.b32 [%rd3], %r4;",
        "ld.acquire.gpu.global.v2.b32 {%r4, %r5}, [%rd3];",
        "ld.acquire.global.b32 {%r4}, [%rd3];",
        "fence.acq_rel.gpu;",
    ],
)
def test_an_atomic_access_of_unknown_meaning_is_refused(line):
    with pytest.raises(PtxError):
        execute(line)
