"""Rows of logits to losses and gradients, one program per row.

A row holds u = h W^T in fp32, over the whole vocabulary or over a panel of it:

    take     gather u at the listed ids and put SENTINEL in their places
    reduce   online log-sum-exp of the other ids: the student's tail, never a difference
    rule     the K + 1 buckets to the loss, and to one factor for the gradient of all unlisted ids
    write    exp(z - max) times that factor, then the K gradients at the listed ids over it

`row_kernel` does all of it on whole rows. `reduce_kernel` and `write_kernel` are the two halves
for panels; the rule then runs in torch.

SENTINEL is a finite number that no logit equals, so that arithmetic on masked columns never meets
inf - inf. It stands for an id without mass, and so do columns beyond the row; -inf in a bias does
too. The loops over a row need not tell them apart: all are so far below a maximum of at least
LOWEST_MAX that their exp is 0. The same holds for finite logits below LOWEST_MAX.

The gradient may be written into the storage of the logits in a narrower dtype: block i is stored
after all threads have loaded block i + 1, and reaches nothing beyond block i.
"""

import triton
import triton.language as tl

from lopd_kernels._triton.kernels.math import tanh
from lopd_kernels._triton.kernels.rules import bucket_rule, policy_terms, unbiased_terms

SENTINEL = tl.constexpr(-3.4028234663852886e38)
INF = tl.constexpr(float("inf"))
LOWEST_MAX = tl.constexpr(-1.7e38)  # maximum of nothing: SENTINEL is far below it
FAINT = tl.constexpr(-1000.0)  # exp of it is 0
LOG2_E = tl.constexpr(1.4426950408889634)
THREAD_COLUMNS = tl.constexpr(8)  # neighbours that share a maximum: those of a thread in `Launch`
# Arguments that change from batch to batch with the longest list, or with where a chunk of rows
# begins. Triton would compile a kernel again for a 1, a multiple of 16 or an aligned pointer.
PER_BATCH = (
    "ids_ptr", "listed_ptr", "target_ptr", "active_ptr", "weights_ptr", "stats_ptr",
    "unlisted_ptr", "listed_grad_ptr", "coefficients_ptr", "split_ptr", "rows_ptr",
    "K", "target_width", "stats_width",
)  # fmt: skip


@triton.jit
def apply_logit_options(
    u, bias_ptr, columns, known, gain, cap,
    HAS_BIAS: tl.constexpr, SOFTCAP: tl.constexpr, INF_MASKS: tl.constexpr,
):  # fmt: skip
    """(z, 1 - tanh^2) of u at `columns`; SENTINEL stays SENTINEL.

    An infinite u becomes NaN: it must not look like an id without mass or, under a softcap, like
    a large logit. With INF_MASKS, -inf marks an id without mass. In a bias it always does.
    """
    # the sum is one instruction; it is NaN for an infinite u and u for any other
    x = tl.where(u == INF, float("nan"), u) if INF_MASKS else u * 0.0 + u
    if HAS_BIAS:
        x += tl.load(bias_ptr + columns, mask=known, other=0.0).to(tl.float32)
    x = x * gain
    slope = 1.0
    if SOFTCAP:
        t = tl.where(tl.abs(x) == INF, float("nan"), tanh(x))
        slope = 1.0 - t * t
        x = t * cap
    return tl.where(known & (u != SENTINEL), x, SENTINEL), slope


@triton.jit
def shifted(z, largest):
    """d = z - largest, bounded so that d exp(d) is 0 where an id has no mass; NaN stays NaN."""
    return tl.maximum(z - largest, FAINT, propagate_nan=tl.PropagateNan.ALL)


@triton.jit
def take_listed(
    u_row, ids_row, listed_row, bias_ptr, first, width, vocab, K, gain, cap,
    HAS_BIAS: tl.constexpr, SOFTCAP: tl.constexpr, INF_MASKS: tl.constexpr, KBLOCK: tl.constexpr,
):  # fmt: skip
    """Move z at the ids in [first, first + width) into listed_row; put SENTINEL in their places.

    Returns 1 if an id is out of range or repeated. A repetition is detected by writing each id's
    position in the list to the id's place and reading it back.
    """
    invalid = 0
    for start in range(0, K, KBLOCK):
        k = start + tl.arange(0, KBLOCK)
        ids = tl.load(ids_row + k, mask=k < K, other=-1).to(tl.int64)
        here = (ids >= first) & (ids < first + width)
        u = tl.load(u_row + (ids - first), mask=here, other=0.0)
        z, _ = apply_logit_options(u, bias_ptr, ids, here, gain, cap, HAS_BIAS, SOFTCAP, INF_MASKS)
        tl.store(listed_row + k, tl.where(z == SENTINEL, -INF, z), mask=here)
        bad = (ids < -1) | (ids >= vocab)
        invalid = tl.maximum(invalid, tl.max(bad.to(tl.int32), axis=0))
    tl.debug_barrier()
    for start in range(0, K, KBLOCK):
        k = start + tl.arange(0, KBLOCK)
        ids = tl.load(ids_row + k, mask=k < K, other=-1).to(tl.int64)
        here = (ids >= first) & (ids < first + width)
        tl.store(u_row + (ids - first), k.to(tl.float32), mask=here)
    tl.debug_barrier()
    for start in range(0, K, KBLOCK):
        k = start + tl.arange(0, KBLOCK)
        ids = tl.load(ids_row + k, mask=k < K, other=-1).to(tl.int64)
        here = (ids >= first) & (ids < first + width)
        position = tl.load(u_row + (ids - first), mask=here, other=0.0)
        repeated = here & (position != k.to(tl.float32))
        invalid = tl.maximum(invalid, tl.max(repeated.to(tl.int32), axis=0))
    tl.debug_barrier()
    for start in range(0, K, KBLOCK):
        k = start + tl.arange(0, KBLOCK)
        ids = tl.load(ids_row + k, mask=k < K, other=-1).to(tl.int64)
        here = (ids >= first) & (ids < first + width)
        tl.store(u_row + (ids - first), tl.full([KBLOCK], SENTINEL, tl.float32), mask=here)
    tl.debug_barrier()
    return invalid


@triton.jit
def _reduce(
    u_row, bias_ptr, first, width, limit, gain, cap,
    HAS_BIAS: tl.constexpr, SOFTCAP: tl.constexpr, INF_MASKS: tl.constexpr,
    ENTROPY: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """(m, sum e, sum e (z - m)) with e = exp(z - m) and m = max z; m = SENTINEL if empty.

    Each thread has its own maximum and sums, so a block costs one exponential per element and
    one per thread, and no reduction across threads.
    """
    LANES: tl.constexpr = BLOCK // THREAD_COLUMNS
    m = tl.full([LANES], LOWEST_MAX, tl.float32)
    s = tl.zeros([LANES], tl.float32)
    t = tl.zeros([LANES], tl.float32)
    u = tl.load(u_row + tl.arange(0, BLOCK), mask=tl.arange(0, BLOCK) < limit, other=0.0)
    for start in range(0, width, BLOCK):
        j = start + tl.arange(0, BLOCK)
        ahead = tl.load(u_row + j + BLOCK, mask=j + BLOCK < limit, other=0.0)
        known = j < width
        z, _ = apply_logit_options(
            u, bias_ptr, first + j, known, gain, cap, HAS_BIAS, SOFTCAP, INF_MASKS
        )
        z = tl.reshape(z, [LANES, THREAD_COLUMNS])
        largest = tl.maximum(m, tl.max(z, axis=1))
        d = shifted(z, largest[:, None])
        e = tl.exp2(d * LOG2_E)
        back = shifted(m, largest)
        scale = tl.exp2(back * LOG2_E)
        if ENTROPY:
            t = scale * (t + s * back) + tl.sum(e * d, axis=1)
        s = scale * s + tl.sum(e, axis=1)
        m = largest
        u = ahead
    top = tl.max(m, axis=0)
    back = shifted(m, top)
    scale = tl.exp(back)
    total = tl.sum(scale * s, axis=0)
    spread = 0.0
    if ENTROPY:
        spread = tl.sum(scale * (t + s * back), axis=0)
    return tl.where(total == 0.0, SENTINEL, top), total, spread


@triton.jit
def _write_unlisted(
    u_row, out_row, bias_ptr, first, width, limit, out_limit, gain, cap,
    unlisted_max, factor, entropy_factor,
    HAS_BIAS: tl.constexpr, SOFTCAP: tl.constexpr, INF_MASKS: tl.constexpr,
    ENTROPY: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """e (factor - entropy_factor d) with d = z - unlisted_max and e = exp(d); 0 at listed ids.

    Ends with a barrier.
    """
    unlisted_max = tl.maximum(unlisted_max, LOWEST_MAX)
    u = tl.load(u_row + tl.arange(0, BLOCK), mask=tl.arange(0, BLOCK) < limit, other=0.0)
    for start in range(0, width, BLOCK):
        j = start + tl.arange(0, BLOCK)
        ahead = tl.load(u_row + j + BLOCK, mask=j + BLOCK < limit, other=0.0)
        tl.debug_barrier()
        known = j < width
        z, slope = apply_logit_options(
            u, bias_ptr, first + j, known, gain, cap, HAS_BIAS, SOFTCAP, INF_MASKS
        )
        if ENTROPY:
            d = shifted(z, unlisted_max)
            grad = tl.exp2(d * LOG2_E) * (factor - entropy_factor * d)
        else:
            grad = tl.exp2((z - unlisted_max) * LOG2_E) * factor
        grad = grad * slope
        tl.store(out_row + j, grad.to(out_row.dtype.element_ty), mask=j < out_limit)
        u = ahead
    tl.debug_barrier()


@triton.jit
def _zero(out_row, width, out_limit, BLOCK: tl.constexpr):
    for start in range(0, width, BLOCK):
        j = start + tl.arange(0, BLOCK)
        zero = tl.zeros([BLOCK], tl.float32).to(out_row.dtype.element_ty)
        tl.store(out_row + j, zero, mask=j < out_limit)


@triton.jit
def _bucket_logprobs(listed_row, k, K, top, lse, tail):
    z = tl.load(listed_row + k, mask=k < K, other=-INF)
    lp = tl.where(z == -INF, -INF, z - top - lse)
    return tl.where(k == K, tail, lp)


@triton.jit
def row_loss(
    listed_row, target_row, stats_row, stores, unlisted_max, total, spread, invalid, K,
    option_0, option_1, option_2,
    RULE: tl.constexpr, DIVERGENCE: tl.constexpr, SHIFT: tl.constexpr, TAIL: tl.constexpr,
    FROM_TEACHER: tl.constexpr, IMPORTANCE: tl.constexpr,
    ENTROPY: tl.constexpr, KBLOCK: tl.constexpr,
):  # fmt: skip
    """The rule on a row's K + 1 buckets; its statistics are written where `stores` is true.

    Returns (what `write_listed` needs of it, the gradient of the unlisted ids' bucket).
    """
    largest_listed = -INF
    for start in range(0, K, KBLOCK):
        k = start + tl.arange(0, KBLOCK)
        z = tl.load(listed_row + k, mask=k < K, other=-INF)
        largest_listed = tl.maximum(largest_listed, tl.max(z, axis=0))
    top = tl.maximum(unlisted_max, largest_listed)
    top = tl.where(top == SENTINEL, 0.0, top)
    total_listed, largest = 0.0, K
    for start in range(0, K, KBLOCK):
        k = start + tl.arange(0, KBLOCK)
        z = tl.load(listed_row + k, mask=k < K, other=-INF)
        total_listed += tl.sum(tl.exp(z - top), axis=0)
        first = tl.min(tl.where((z == largest_listed) & (k < K), k, K), axis=0)
        largest = tl.minimum(largest, first)
    lse = tl.log(total_listed + total * tl.exp(unlisted_max - top))
    tail = (unlisted_max - top) + tl.log(total) - lse
    tail = tl.where(total == 0.0, -INF, tail)
    largest = tl.where(tail > largest_listed - top - lse, K, largest)

    student_tail, correction, sampled = tail, 0.0, 0.0
    if TAIL == "unbiased":
        z = tl.load(listed_row + K - 1)
        sampled = tl.where(z == -INF, -INF, z - top - lse)
        student_tail, correction, importance = unbiased_terms(
            sampled, tail, target_row, K, option_0
        )
        tl.store(stats_row + 4, sampled, mask=stores)
        tl.store(stats_row + 5, correction, mask=stores)
        tl.store(stats_row + 6, importance, mask=stores)

    loss, list_term, first_lp = 0.0, 0.0, 0.0
    g_largest, p_largest, g_others, p_others, tail_g = 0.0, 0.0, 0.0, 0.0, 0.0
    for start in range(0, K + 1, KBLOCK):
        k = start + tl.arange(0, KBLOCK)
        lp = _bucket_logprobs(listed_row, k, K, top, lse, tail)
        phi, g = bucket_rule(
            lp, k, K, target_row, student_tail, correction, option_0, option_1, option_2,
            RULE, DIVERGENCE, SHIFT, TAIL, FROM_TEACHER, IMPORTANCE,
        )  # fmt: skip
        p = tl.exp(lp)
        loss += tl.sum(phi, axis=0)
        g_largest += tl.sum(tl.where(k == largest, g, 0.0), axis=0)
        p_largest += tl.sum(tl.where(k == largest, p, 0.0), axis=0)
        g_others += tl.sum(tl.where(k == largest, 0.0, g), axis=0)
        p_others += tl.sum(tl.where(k == largest, 0.0, p), axis=0)
        tail_g += tl.sum(tl.where(k == K, g, 0.0), axis=0)
        if ENTROPY:
            list_term += tl.sum(tl.where((k < K) & (lp != -INF), p * lp, 0.0), axis=0)
        if RULE == "policy_gradient":
            first_lp += tl.sum(tl.where(k == 0, lp, 0.0), axis=0)

    tl.store(stats_row, loss + tl.where(invalid > 0, float("nan"), 0.0), mask=stores)
    tl.store(stats_row + 1, top + lse, mask=stores)
    tl.store(stats_row + 2, tail, mask=stores)
    if ENTROPY:
        shift = unlisted_max - top - lse
        tail_term = tl.where(total == 0.0, 0.0, tl.exp(shift) * (spread + total * shift))
        tl.store(stats_row + 3, -tail_term - list_term, mask=stores)
    if RULE == "policy_gradient":
        _loss, _slope, advantage, ratio = policy_terms(
            first_lp, tl.load(target_row), tl.load(target_row + 1),
            option_0, option_1, option_2, FROM_TEACHER, IMPORTANCE,
        )  # fmt: skip
        tl.store(stats_row + 4, first_lp, mask=stores)
        tl.store(stats_row + 5, advantage, mask=stores)
        tl.store(stats_row + 6, ratio, mask=stores)

    sum_g = g_largest + g_others
    # g - p sum(g) cancels in a bucket that holds nearly all the mass, see buckets.center
    largest_grad = g_largest * p_others - p_largest * g_others
    tail_grad = tl.where(largest == K, largest_grad, tail_g - tl.exp(tail) * sum_g)
    buckets = (top, lse, tail, student_tail, correction, largest, largest_grad, sum_g)
    return buckets, tail_grad


@triton.jit
def write_listed(
    out_row, listed_grad_row, ids_row, listed_row, target_row, first, end, K, buckets, weight, cap,
    option_0, option_1, option_2,
    RULE: tl.constexpr, DIVERGENCE: tl.constexpr, SHIFT: tl.constexpr, TAIL: tl.constexpr,
    FROM_TEACHER: tl.constexpr, IMPORTANCE: tl.constexpr,
    SOFTCAP: tl.constexpr, SPLIT: tl.constexpr, KBLOCK: tl.constexpr,
):  # fmt: skip
    """Write the gradient at the ids in [first, end), with SPLIT to `listed_grad_row`.

    Returns its L1 norm, with SPLIT, before the slope of a softcap.
    """
    top, lse, tail, student_tail, correction, largest, largest_grad, sum_g = buckets
    listed_l1 = 0.0
    for start in range(0, K, KBLOCK):
        k = start + tl.arange(0, KBLOCK)
        lp = _bucket_logprobs(listed_row, k, K, top, lse, tail)
        _phi, g = bucket_rule(
            lp, k, K, target_row, student_tail, correction, option_0, option_1, option_2,
            RULE, DIVERGENCE, SHIFT, TAIL, FROM_TEACHER, IMPORTANCE,
        )  # fmt: skip
        grad = tl.where(k == largest, largest_grad, g - tl.exp(lp) * sum_g) * weight
        ids = tl.load(ids_row + k, mask=k < K, other=-1).to(tl.int64)
        inside = (ids >= first) & (ids < end)
        if SPLIT:
            listed_l1 += tl.sum(tl.where(inside, tl.abs(grad), 0.0), axis=0)
        if SOFTCAP:
            t = tl.load(listed_row + k, mask=k < K, other=0.0) / cap
            grad = grad * (1.0 - t * t)
        if SPLIT:
            tl.store(listed_grad_row + k, grad, mask=inside)
        else:
            tl.store(out_row + ids, grad.to(out_row.dtype.element_ty), mask=inside)
    return listed_l1


@triton.jit(do_not_specialize=PER_BATCH)
def row_kernel(
    u_ptr,  # [R, V] fp32, rows of u_stride; overwritten
    out_ptr,  # [R, V] gradient, rows of out_stride; may share the storage of u
    ids_ptr,  # [R, K] int, -1 pads
    listed_ptr,  # [R, K] fp32 scratch, filled with -inf
    target_ptr,  # [R, target_width] fp32
    active_ptr,  # [R] int8; the other rows get a gradient of zero
    weights_ptr,  # [R] fp32 factor of the gradient
    stats_ptr,  # [R, stats_width] fp32
    split_ptr,  # [R, 4] fp32 (unlisted_max, factor, L1 norms), with SPLIT in place of out
    listed_grad_ptr,  # [R, K] fp32 gradient at the ids, with SPLIT
    bias_ptr,  # [V]
    u_stride, out_stride, out_limit, V, K, target_width, stats_width,
    gain, cap, option_0, option_1, option_2,
    RULE: tl.constexpr, DIVERGENCE: tl.constexpr, SHIFT: tl.constexpr, TAIL: tl.constexpr,
    FROM_TEACHER: tl.constexpr, IMPORTANCE: tl.constexpr,
    HAS_BIAS: tl.constexpr, SOFTCAP: tl.constexpr, INF_MASKS: tl.constexpr,
    ENTROPY: tl.constexpr, GRAD: tl.constexpr, SPLIT: tl.constexpr,
    BLOCK: tl.constexpr, KBLOCK: tl.constexpr,
):  # fmt: skip
    row = tl.program_id(0).to(tl.int64)
    u_row, out_row = u_ptr + row * u_stride, out_ptr + row * out_stride
    if tl.load(active_ptr + row) == 0:
        if GRAD and not SPLIT:
            _zero(out_row, V, out_limit, BLOCK)
    else:
        ids_row, listed_row = ids_ptr + row * K, listed_ptr + row * K
        target_row, stats_row = target_ptr + row * target_width, stats_ptr + row * stats_width
        invalid = take_listed(
            u_row, ids_row, listed_row, bias_ptr, 0, V, V, K, gain, cap,
            HAS_BIAS, SOFTCAP, INF_MASKS, KBLOCK,
        )  # fmt: skip
        unlisted_max, total, spread = _reduce(
            u_row, bias_ptr, 0, V, u_stride, gain, cap,
            HAS_BIAS, SOFTCAP, INF_MASKS, ENTROPY, BLOCK,
        )  # fmt: skip
        buckets, tail_grad = row_loss(
            listed_row, target_row, stats_row, True, unlisted_max, total, spread, invalid, K,
            option_0, option_1, option_2,
            RULE, DIVERGENCE, SHIFT, TAIL, FROM_TEACHER, IMPORTANCE, ENTROPY, KBLOCK,
        )  # fmt: skip
        if GRAD:
            weight = tl.load(weights_ptr + row) + tl.where(invalid > 0, float("nan"), 0.0)
            factor = tl.where(total == 0.0, 0.0, tail_grad / total) * weight
            if not SPLIT:
                _write_unlisted(
                    u_row, out_row, bias_ptr, 0, V, u_stride, out_limit, gain, cap,
                    unlisted_max, factor, 0.0,
                    HAS_BIAS, SOFTCAP, INF_MASKS, False, BLOCK,
                )  # fmt: skip
            listed_l1 = write_listed(
                out_row, listed_grad_ptr + row * K, ids_row, listed_row, target_row, 0, V, K,
                buckets, weight, cap, option_0, option_1, option_2,
                RULE, DIVERGENCE, SHIFT, TAIL, FROM_TEACHER, IMPORTANCE, SOFTCAP, SPLIT, KBLOCK,
            )  # fmt: skip
            if SPLIT:
                split_row = split_ptr + row * 4
                tl.store(split_row, tl.maximum(unlisted_max, LOWEST_MAX))
                tl.store(split_row + 1, factor)
                tl.store(split_row + 2, listed_l1)
                tl.store(split_row + 3, tl.abs(factor) * total)


@triton.jit(do_not_specialize=PER_BATCH)
def reduce_kernel(
    u_ptr,  # [R, width] fp32, rows of u_stride; SENTINEL at the listed ids afterwards
    ids_ptr,  # [R, K] int, -1 pads
    listed_ptr,  # [R, K] fp32; z at the ids of this panel is written to it
    active_ptr,  # [R] int8
    unlisted_ptr,  # [R, 4] fp32 (max, sum, spread, invalid) of earlier panels, updated
    bias_ptr,  # [V]
    u_stride, first, width, V, K, gain, cap,
    HAS_BIAS: tl.constexpr, SOFTCAP: tl.constexpr, INF_MASKS: tl.constexpr,
    ENTROPY: tl.constexpr, BLOCK: tl.constexpr, KBLOCK: tl.constexpr,
):  # fmt: skip
    row = tl.program_id(0).to(tl.int64)
    if tl.load(active_ptr + row) != 0:
        u_row, unlisted_row = u_ptr + row * u_stride, unlisted_ptr + row * 4
        invalid = take_listed(
            u_row, ids_ptr + row * K, listed_ptr + row * K, bias_ptr, first, width, V, K, gain, cap,
            HAS_BIAS, SOFTCAP, INF_MASKS, KBLOCK,
        )  # fmt: skip
        unlisted_max, total, spread = _reduce(
            u_row, bias_ptr, first, width, u_stride, gain, cap,
            HAS_BIAS, SOFTCAP, INF_MASKS, ENTROPY, BLOCK,
        )  # fmt: skip
        before, sum_before = tl.load(unlisted_row), tl.load(unlisted_row + 1)
        spread_before, invalid_before = tl.load(unlisted_row + 2), tl.load(unlisted_row + 3)
        tl.debug_barrier()  # every thread has loaded the state that one thread now replaces
        top = tl.maximum(before, unlisted_max)
        low, high = tl.exp(before - top), tl.exp(unlisted_max - top)
        if ENTROPY:
            left = low * (spread_before + sum_before * (before - top))
            left = tl.where(sum_before == 0.0, 0.0, left)
            right = tl.where(total == 0.0, 0.0, high * (spread + total * (unlisted_max - top)))
            tl.store(unlisted_row + 2, left + right)
        tl.store(unlisted_row, top)
        tl.store(unlisted_row + 1, low * sum_before + high * total)
        tl.store(unlisted_row + 3, tl.maximum(invalid_before, invalid.to(tl.float32)))


@triton.jit(do_not_specialize=PER_BATCH)
def write_kernel(
    u_ptr,  # [R, width] fp32, rows of u_stride
    rows_ptr,  # [R] int64, with PICK: the row of u that each row of out belongs to
    out_ptr,  # [R, width] gradient, rows of out_stride; may share the storage of u, without PICK
    ids_ptr,  # [R, K] int
    listed_grad_ptr,  # [R, K] fp32 gradient with respect to z at the ids
    active_ptr,  # [R] int8; the other rows get zeros
    coefficients_ptr,  # [R, 3] fp32 (unlisted_max, factor, entropy_factor)
    listed_ptr,  # [R, K] fp32, z at the ids
    bias_ptr,  # [V]
    u_stride, out_stride, out_limit, first, width, K, gain, cap,
    HAS_BIAS: tl.constexpr, SOFTCAP: tl.constexpr, ENTROPY: tl.constexpr, PICK: tl.constexpr,
    BLOCK: tl.constexpr, KBLOCK: tl.constexpr,
):  # fmt: skip
    row = tl.program_id(0).to(tl.int64)
    source = tl.load(rows_ptr + row) if PICK else row
    u_row, out_row = u_ptr + source * u_stride, out_ptr + row * out_stride
    if tl.load(active_ptr + row) == 0:
        _zero(out_row, width, out_limit, BLOCK)
    else:
        unlisted_max = tl.load(coefficients_ptr + row * 3)
        factor = tl.load(coefficients_ptr + row * 3 + 1)
        entropy_factor = tl.load(coefficients_ptr + row * 3 + 2)
        _write_unlisted(
            u_row, out_row, bias_ptr, first, width, u_stride, out_limit, gain, cap,
            unlisted_max, factor, entropy_factor, HAS_BIAS, SOFTCAP, False, ENTROPY, BLOCK,
        )  # fmt: skip
        for start in range(0, K, KBLOCK):
            k = start + tl.arange(0, KBLOCK)
            ids = tl.load(ids_ptr + row * K + k, mask=k < K, other=-1).to(tl.int64)
            here = (ids >= first) & (ids < first + width)
            grad = tl.load(listed_grad_ptr + row * K + k, mask=here, other=0.0)
            if SOFTCAP:
                t = tl.load(listed_ptr + row * K + k, mask=here, other=0.0) / cap
                grad = grad * (1.0 - t * t)
            tl.store(out_row + (ids - first), grad.to(out_row.dtype.element_ty), mask=here)
