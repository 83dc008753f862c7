"""Rows of logits to losses and gradients, several programs per row, which read the logits once.

    take_kernel       gather z at the listed ids and put SENTINEL in their places, as `rows` does
    one_pass_kernel   load     each of a row's programs its slice, into registers
                      publish  the slice's (max, sum, spread) of the other ids
                      wait     until all programs of the row have published
                      merge    what they published, always in the same order: equal bits
                      rule     each program for itself, on all K + 1 buckets
                      write    the gradient of the slice from registers, then of its listed ids

A program that waits needs the others to run: the grid is persistent, and its launch cooperative,
so that a device either holds all programs at once or refuses the launch. Programs visit rows in
the same order and wait for earlier ones only of the same row, so somebody can always go on.

The counter of a row orders memory. Adding to it releases what all threads of a program have done
before the barrier: the partial result is stored, and the slice has been loaded. A read of the
full counter acquires that of all programs. So partial results are complete when they are
merged, and no logit is overwritten, by a narrower gradient in their storage, that another
program has yet to load. `take_kernel` sets the counters to zero in every launch, which a captured
graph repeats.
"""

import triton
import triton.language as tl

from lopd_kernels._triton.kernels.rows import (
    LOG2_E,
    LOWEST_MAX,
    PER_BATCH,
    SENTINEL,
    apply_logit_options,
    row_loss,
    shifted,
    take_listed,
    write_listed,
)

PER_ROWS = (*PER_BATCH, "arrived_ptr", "invalid_ptr", "partials_ptr", "rows")


@triton.jit(do_not_specialize=PER_ROWS)
def take_kernel(
    u_ptr,  # [R, V] fp32, rows of u_stride; SENTINEL at the listed ids afterwards
    ids_ptr,  # [R, K] int, -1 pads
    listed_ptr,  # [R, K] fp32, filled with -inf; z at the ids is written to it
    active_ptr,  # [R] int8
    arrived_ptr,  # [R] int32, set to 0
    invalid_ptr,  # [R] int32, set to 1 if an id is out of range or repeated
    bias_ptr,  # [V]
    u_stride, V, K, gain, cap,
    HAS_BIAS: tl.constexpr, SOFTCAP: tl.constexpr, INF_MASKS: tl.constexpr, KBLOCK: tl.constexpr,
):  # fmt: skip
    row = tl.program_id(0).to(tl.int64)
    tl.store(arrived_ptr + row, 0)
    if tl.load(active_ptr + row) != 0:
        invalid = take_listed(
            u_ptr + row * u_stride, ids_ptr + row * K, listed_ptr + row * K, bias_ptr,
            0, V, V, K, gain, cap, HAS_BIAS, SOFTCAP, INF_MASKS, KBLOCK,
        )  # fmt: skip
        tl.store(invalid_ptr + row, invalid)


@triton.jit
def _reduce_slice(z, cap, SOFTCAP: tl.constexpr, ENTROPY: tl.constexpr):
    """(e (1 - tanh^2), m, sum e, sum e (z - m)); e = exp(z - m), m = max z, at least LOWEST_MAX.

    Only one number of a column is alive at a time.
    """
    m = tl.maximum(tl.max(z, axis=0), LOWEST_MAX)
    spread = 0.0
    if ENTROPY:
        d = shifted(z, m)
        e = tl.exp2(d * LOG2_E)
        spread = tl.sum(e * d, axis=0)
    else:
        e = tl.exp2((z - m) * LOG2_E)
    total = tl.sum(e, axis=0)
    if SOFTCAP:
        t = tl.maximum(z, -cap) / cap
        e = e * (1.0 - t * t)
    return e, m, total, spread


@triton.jit
def _merge(partials_row, programs, ENTROPY: tl.constexpr, PBLOCK: tl.constexpr):
    """(max, sum, spread) of a row from those of its programs."""
    p = tl.arange(0, PBLOCK)
    m = tl.load(partials_row + 4 * p, mask=p < programs, other=SENTINEL)
    s = tl.load(partials_row + 4 * p + 1, mask=p < programs, other=0.0)
    top = tl.max(m, axis=0)
    back = shifted(m, top)
    scale = tl.exp(back)
    spread = 0.0
    if ENTROPY:
        t = tl.load(partials_row + 4 * p + 2, mask=p < programs, other=0.0)
        spread = tl.sum(scale * (t + s * back), axis=0)
    return top, tl.sum(scale * s, axis=0), spread


@triton.jit
def _zero_slice(out_row, first, width, out_limit, BLOCK: tl.constexpr):
    c = tl.arange(0, BLOCK)
    zero = tl.zeros([BLOCK], tl.float32).to(out_row.dtype.element_ty)
    tl.store(out_row + first + c, zero, mask=(c < width) & (first + c < out_limit))


@triton.jit(do_not_specialize=PER_ROWS)
def one_pass_kernel(
    u_ptr,  # [R, V] fp32 as `take_kernel` has left it, rows of u_stride
    out_ptr,  # [R, V] gradient, rows of out_stride; may share the storage of u
    ids_ptr,  # [R, K] int, -1 pads
    listed_ptr,  # [R, K] fp32, z at the ids
    target_ptr,  # [R, target_width] fp32
    active_ptr,  # [R] int8; the other rows get a gradient of zero
    weights_ptr,  # [R] fp32 factor of the gradient
    stats_ptr,  # [R, stats_width] fp32
    arrived_ptr,  # [R] int32, 0: how many programs have published
    invalid_ptr,  # [R] int32
    partials_ptr,  # [R, programs, 4] fp32 scratch: max, sum and spread of each slice
    bias_ptr,  # [V]
    u_stride, out_stride, out_limit, V, K, target_width, stats_width,
    gain, cap, option_0, option_1, option_2, rows,
    programs,  # of a row
    width,  # columns of a slice: a multiple of 16, at most BLOCK
    RULE: tl.constexpr, DIVERGENCE: tl.constexpr, SHIFT: tl.constexpr, TAIL: tl.constexpr,
    FROM_TEACHER: tl.constexpr, IMPORTANCE: tl.constexpr,
    HAS_BIAS: tl.constexpr, SOFTCAP: tl.constexpr, INF_MASKS: tl.constexpr,
    ENTROPY: tl.constexpr, BLOCK: tl.constexpr, KBLOCK: tl.constexpr, PBLOCK: tl.constexpr,
):  # fmt: skip
    member, group = tl.program_id(0) % programs, tl.program_id(0) // programs
    first = member * width
    c = tl.arange(0, BLOCK)
    for index in range(group, rows, tl.num_programs(0) // programs):
        row = tl.cast(index, tl.int64)
        u_row, out_row = u_ptr + row * u_stride, out_ptr + row * out_stride
        if tl.load(active_ptr + row) == 0:
            _zero_slice(out_row, first, width, out_limit, BLOCK)
        else:
            ids_row, listed_row = ids_ptr + row * K, listed_ptr + row * K
            target_row, stats_row = target_ptr + row * target_width, stats_ptr + row * stats_width
            j, mine = first + c, c < width
            u = tl.load(u_row + j, mask=mine & (j < u_stride), other=0.0)
            z, _slope = apply_logit_options(
                u, bias_ptr, j, mine & (j < V), gain, cap, HAS_BIAS, SOFTCAP, INF_MASKS
            )
            held, own_max, own_sum, own_spread = _reduce_slice(z, cap, SOFTCAP, ENTROPY)
            partials_row = partials_ptr + row * programs * 4
            partial = partials_row + member * 4
            tl.store(partial, tl.where(own_sum == 0.0, SENTINEL, own_max))
            tl.store(partial + 1, own_sum)
            if ENTROPY:
                tl.store(partial + 2, own_spread)
            tl.debug_barrier()  # all threads have loaded their columns and stored the results
            tl.atomic_add(arrived_ptr + row, 1, sem="acq_rel", scope="gpu")
            while tl.atomic_add(arrived_ptr + row, 0, sem="acquire", scope="gpu") < programs:
                pass

            unlisted_max, total, spread = _merge(partials_row, programs, ENTROPY, PBLOCK)
            invalid = tl.load(invalid_ptr + row)
            buckets, tail_grad = row_loss(
                listed_row, target_row, stats_row, member == 0, unlisted_max, total, spread,
                invalid, K, option_0, option_1, option_2,
                RULE, DIVERGENCE, SHIFT, TAIL, FROM_TEACHER, IMPORTANCE, ENTROPY, KBLOCK,
            )  # fmt: skip
            weight = tl.load(weights_ptr + row) + tl.where(invalid > 0, float("nan"), 0.0)
            factor = tl.where(total == 0.0, 0.0, tail_grad / total) * weight
            grad = held * (tl.exp(own_max - tl.maximum(unlisted_max, LOWEST_MAX)) * factor)
            tl.store(out_row + j, grad.to(out_row.dtype.element_ty), mask=mine & (j < out_limit))
            tl.debug_barrier()
            end = tl.minimum(first + width, V)
            write_listed(
                out_row, listed_row, ids_row, listed_row, target_row, first, end, K,
                buckets, weight, cap, option_0, option_1, option_2,
                RULE, DIVERGENCE, SHIFT, TAIL, FROM_TEACHER, IMPORTANCE, SOFTCAP, False, KBLOCK,
            )  # fmt: skip
