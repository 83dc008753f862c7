"""Rows of logits to losses and gradients, one program to a row.

A row holds u = h W^T in fp32, the whole vocabulary or a panel of it. Its life:

    take     gather u at the support, put SENTINEL in its place
    reduce   online log-sum-exp of what is left: the student's tail, never a difference
    settle   the K + 1 buckets to the loss and to one gradient scalar for all ids off the support
    write    exp(z - max) times that scalar, then the K entries of the support on top

`row_kernel` does all of it for whole rows. `reduce_kernel` and `write_kernel` are its two
halves for panels and for callers who settle in torch.

SENTINEL is a finite number that no logit takes, so that the arithmetic of masked columns
never meets inf - inf; it stands for "no mass", and so do columns beyond the row.

The gradient may be written into the storage of the logits in a narrower type: block i is
stored after block i + 1 has been loaded by all threads, and touches nothing beyond block i.
"""

import triton
import triton.language as tl

from lopd_kernels._triton.kernels.math import tanh
from lopd_kernels._triton.kernels.rules import bucket_rule, policy_terms

SENTINEL = tl.constexpr(-3.4028234663852886e38)
INF = tl.constexpr(float("inf"))


@triton.jit
def _finish(
    u, bias_ptr, columns, known, gain, cap,
    HAS_BIAS: tl.constexpr, SOFTCAP: tl.constexpr, INF_MASKS: tl.constexpr,
):  # fmt: skip
    """(z, 1 - tanh^2) of u at `columns`; SENTINEL stays where it is.

    An infinite u becomes NaN: it must not pass for an id without mass, nor, under a soft cap, for
    a large logit. With INF_MASKS -inf is an id without mass; in a bias it always is.
    """
    if INF_MASKS:
        x = tl.where(u == INF, float("nan"), u)
    else:
        x = tl.where(tl.abs(u) == INF, float("nan"), u)
    if HAS_BIAS:
        x += tl.load(bias_ptr + columns, mask=known, other=0.0).to(tl.float32)
    x = x * gain
    slope = 1.0
    if SOFTCAP:
        t = tl.where(tl.abs(x) == INF, float("nan"), tanh(x))
        slope = 1.0 - t * t
        x = t * cap
    free = known & (u != SENTINEL) & (x != -INF)
    return tl.where(free, x, SENTINEL), slope


@triton.jit
def _take(
    u_row, ids_row, on_row, bias_ptr, first, width, vocab, K, gain, cap,
    HAS_BIAS: tl.constexpr, SOFTCAP: tl.constexpr, INF_MASKS: tl.constexpr, KBLOCK: tl.constexpr,
):  # fmt: skip
    """z at the ids in [first, first + width) into on_row, SENTINEL into their places.

    Returns 1 if an id is out of range or stands twice. Twins are found by writing every id's
    number to its place and reading it back.
    """
    broken = 0
    for start in range(0, K, KBLOCK):
        k = start + tl.arange(0, KBLOCK)
        ids = tl.load(ids_row + k, mask=k < K, other=-1).to(tl.int64)
        here = (ids >= first) & (ids < first + width)
        u = tl.load(u_row + (ids - first), mask=here, other=0.0)
        z, _ = _finish(u, bias_ptr, ids, here, gain, cap, HAS_BIAS, SOFTCAP, INF_MASKS)
        tl.store(on_row + k, tl.where(z == SENTINEL, -INF, z), mask=here)
        bad = (ids < -1) | (ids >= vocab)
        broken = tl.maximum(broken, tl.max(bad.to(tl.int32), axis=0))
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
        number = tl.load(u_row + (ids - first), mask=here, other=0.0)
        twin = here & (number != k.to(tl.float32))
        broken = tl.maximum(broken, tl.max(twin.to(tl.int32), axis=0))
    tl.debug_barrier()
    for start in range(0, K, KBLOCK):
        k = start + tl.arange(0, KBLOCK)
        ids = tl.load(ids_row + k, mask=k < K, other=-1).to(tl.int64)
        here = (ids >= first) & (ids < first + width)
        tl.store(u_row + (ids - first), tl.full([KBLOCK], SENTINEL, tl.float32), mask=here)
    tl.debug_barrier()
    return broken


@triton.jit
def _reduce(
    u_row, bias_ptr, first, width, limit, gain, cap,
    HAS_BIAS: tl.constexpr, SOFTCAP: tl.constexpr, INF_MASKS: tl.constexpr,
    SPREAD: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """(m, sum e, sum e (z - m)) with e = exp(z - m) and m = max z; m = SENTINEL if empty.

    Every lane keeps a maximum and sums of its own, so that a block costs one exponential an
    element and no reduction across threads.
    """
    m = tl.full([BLOCK], SENTINEL, tl.float32)
    s = tl.zeros([BLOCK], tl.float32)
    t = tl.zeros([BLOCK], tl.float32)
    u = tl.load(u_row + tl.arange(0, BLOCK), mask=tl.arange(0, BLOCK) < limit, other=0.0)
    for start in range(0, width, BLOCK):
        j = start + tl.arange(0, BLOCK)
        ahead = tl.load(u_row + j + BLOCK, mask=j + BLOCK < limit, other=0.0)
        known = j < width
        z, _ = _finish(u, bias_ptr, first + j, known, gain, cap, HAS_BIAS, SOFTCAP, INF_MASKS)
        d = z - m
        e = tl.where(z == SENTINEL, 0.0, tl.exp(-tl.abs(d)))
        grows = d > 0.0
        if SPREAD:
            t = tl.where(grows, e * (t - s * d), t + tl.where(z == SENTINEL, 0.0, e * d))
        s = tl.where(grows, s * e + 1.0, s + e)
        m = tl.where(grows, z, m)
        u = ahead
    top = tl.max(m, axis=0)
    scale = tl.exp(m - top)
    spread = 0.0
    if SPREAD:
        spread = tl.sum(tl.where(s == 0.0, 0.0, scale * (t + s * (m - top))), axis=0)
    return top, tl.sum(scale * s, axis=0), spread


@triton.jit
def _write_off(
    u_row, out_row, bias_ptr, first, width, limit, out_limit, gain, cap, own, factor, pull,
    HAS_BIAS: tl.constexpr, SOFTCAP: tl.constexpr, INF_MASKS: tl.constexpr,
    SPREAD: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """e (factor - pull (z - own)), e = exp(z - own), 0 on the support; ends with a barrier."""
    u = tl.load(u_row + tl.arange(0, BLOCK), mask=tl.arange(0, BLOCK) < limit, other=0.0)
    for start in range(0, width, BLOCK):
        j = start + tl.arange(0, BLOCK)
        ahead = tl.load(u_row + j + BLOCK, mask=j + BLOCK < limit, other=0.0)
        tl.debug_barrier()
        known = j < width
        z, slope = _finish(u, bias_ptr, first + j, known, gain, cap, HAS_BIAS, SOFTCAP, INF_MASKS)
        d = tl.where(z == SENTINEL, 0.0, z - own)
        e = tl.where(z == SENTINEL, 0.0, tl.exp(d))
        grad = e * factor
        if SPREAD:
            grad = e * (factor - pull * d)
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
def _bucket_logprobs(on_row, k, K, top, lse, tail):
    z = tl.load(on_row + k, mask=k < K, other=-INF)
    lp = tl.where(z == -INF, -INF, z - top - lse)
    return tl.where(k == K, tail, lp)


@triton.jit
def row_kernel(
    u_ptr,  # [R, V] fp32, rows of u_stride; overwritten
    out_ptr,  # [R, V] gradient, rows of out_stride; may share the storage of u
    ids_ptr,  # [R, K] int, -1 pads
    on_ptr,  # [R, K] fp32 scratch, -inf
    target_ptr,  # [R, target_width] fp32
    active_ptr,  # [R] int8; the other rows get a gradient of zero
    weights_ptr,  # [R] fp32 factor of the gradient
    stats_ptr,  # [R, stats_width] fp32
    bias_ptr,  # [V]
    u_stride, out_stride, out_limit, V, K, target_width, stats_width,
    gain, cap, option_0, option_1, option_2,
    RULE: tl.constexpr, DIVERGENCE: tl.constexpr, SHIFT: tl.constexpr, TRUNCATE: tl.constexpr,
    DERIVED: tl.constexpr, IMPORTANCE: tl.constexpr,
    HAS_BIAS: tl.constexpr, SOFTCAP: tl.constexpr, INF_MASKS: tl.constexpr,
    ENTROPY: tl.constexpr, GRAD: tl.constexpr, BLOCK: tl.constexpr, KBLOCK: tl.constexpr,
):  # fmt: skip
    row = tl.program_id(0).to(tl.int64)
    u_row, out_row = u_ptr + row * u_stride, out_ptr + row * out_stride
    if tl.load(active_ptr + row) == 0:
        if GRAD:
            _zero(out_row, V, out_limit, BLOCK)
    else:
        ids_row, on_row = ids_ptr + row * K, on_ptr + row * K
        target_row, stats_row = target_ptr + row * target_width, stats_ptr + row * stats_width
        broken = _take(
            u_row, ids_row, on_row, bias_ptr, 0, V, V, K, gain, cap,
            HAS_BIAS, SOFTCAP, INF_MASKS, KBLOCK,
        )  # fmt: skip
        own, total, spread = _reduce(
            u_row, bias_ptr, 0, V, u_stride, gain, cap,
            HAS_BIAS, SOFTCAP, INF_MASKS, ENTROPY, BLOCK,
        )  # fmt: skip

        largest_on = -INF
        for start in range(0, K, KBLOCK):
            k = start + tl.arange(0, KBLOCK)
            z = tl.load(on_row + k, mask=k < K, other=-INF)
            largest_on = tl.maximum(largest_on, tl.max(z, axis=0))
        top = tl.maximum(own, largest_on)
        top = tl.where(top == SENTINEL, 0.0, top)
        total_on, largest = 0.0, K
        for start in range(0, K, KBLOCK):
            k = start + tl.arange(0, KBLOCK)
            z = tl.load(on_row + k, mask=k < K, other=-INF)
            total_on += tl.sum(tl.exp(z - top), axis=0)
            first = tl.min(tl.where((z == largest_on) & (k < K), k, K), axis=0)
            largest = tl.minimum(largest, first)
        lse = tl.log(total_on + total * tl.exp(own - top))
        tail = (own - top) + tl.log(total) - lse
        tail = tl.where(total == 0.0, -INF, tail)
        largest = tl.where(tail > largest_on - top - lse, K, largest)

        loss, listed, first_lp = 0.0, 0.0, 0.0
        own_g, own_p, other_g, other_p, tail_g = 0.0, 0.0, 0.0, 0.0, 0.0
        for start in range(0, K + 1, KBLOCK):
            k = start + tl.arange(0, KBLOCK)
            lp = _bucket_logprobs(on_row, k, K, top, lse, tail)
            phi, g = bucket_rule(
                lp, k, K, target_row, option_0, option_1, option_2,
                RULE, DIVERGENCE, SHIFT, TRUNCATE, DERIVED, IMPORTANCE,
            )  # fmt: skip
            p = tl.exp(lp)
            loss += tl.sum(phi, axis=0)
            own_g += tl.sum(tl.where(k == largest, g, 0.0), axis=0)
            own_p += tl.sum(tl.where(k == largest, p, 0.0), axis=0)
            other_g += tl.sum(tl.where(k == largest, 0.0, g), axis=0)
            other_p += tl.sum(tl.where(k == largest, 0.0, p), axis=0)
            tail_g += tl.sum(tl.where(k == K, g, 0.0), axis=0)
            if ENTROPY:
                listed += tl.sum(tl.where((k < K) & (lp != -INF), p * lp, 0.0), axis=0)
            if RULE == "policy_gradient":
                first_lp += tl.sum(tl.where(k == 0, lp, 0.0), axis=0)
        spoil = tl.where(broken > 0, float("nan"), 0.0)
        loss += spoil

        tl.store(stats_row, loss)
        tl.store(stats_row + 1, top + lse)
        tl.store(stats_row + 2, tail)
        if ENTROPY:
            shift = own - top - lse
            off = tl.where(total == 0.0, 0.0, tl.exp(shift) * (spread + total * shift))
            tl.store(stats_row + 3, -off - listed)
        if RULE == "policy_gradient":
            _loss, _slope, advantage, ratio = policy_terms(
                first_lp, tl.load(target_row), tl.load(target_row + 1),
                option_0, option_1, option_2, DERIVED, IMPORTANCE,
            )  # fmt: skip
            tl.store(stats_row + 4, first_lp)
            tl.store(stats_row + 5, advantage)
            tl.store(stats_row + 6, ratio)

        if GRAD:
            weight = tl.load(weights_ptr + row) + spoil
            sum_g = own_g + other_g
            # g - p sum(g) cancels in a bucket that holds nearly all the mass: taken without it
            own_grad = own_g * other_p - own_p * other_g
            tail_grad = tl.where(largest == K, own_grad, tail_g - tl.exp(tail) * sum_g)
            factor = tl.where(total == 0.0, 0.0, tail_grad / total) * weight
            _write_off(
                u_row, out_row, bias_ptr, 0, V, u_stride, out_limit, gain, cap, own, factor, 0.0,
                HAS_BIAS, SOFTCAP, INF_MASKS, False, BLOCK,
            )  # fmt: skip
            for start in range(0, K, KBLOCK):
                k = start + tl.arange(0, KBLOCK)
                lp = _bucket_logprobs(on_row, k, K, top, lse, tail)
                _phi, g = bucket_rule(
                    lp, k, K, target_row, option_0, option_1, option_2,
                    RULE, DIVERGENCE, SHIFT, TRUNCATE, DERIVED, IMPORTANCE,
                )  # fmt: skip
                grad = tl.where(k == largest, own_grad, g - tl.exp(lp) * sum_g) * weight
                if SOFTCAP:
                    t = tl.load(on_row + k, mask=k < K, other=0.0) / cap
                    grad = grad * (1.0 - t * t)
                ids = tl.load(ids_row + k, mask=k < K, other=-1).to(tl.int64)
                inside = (ids >= 0) & (ids < V)
                tl.store(out_row + ids, grad.to(out_row.dtype.element_ty), mask=inside)


@triton.jit
def reduce_kernel(
    u_ptr,  # [R, width] fp32, rows of u_stride; SENTINEL at the support afterwards
    ids_ptr,  # [R, K] int, -1 pads
    on_ptr,  # [R, K] fp32, -inf; gets z at the ids of this panel
    active_ptr,  # [R] int8
    state_ptr,  # [R, 4] fp32 (max, sum, spread, broken) of the panels before, updated
    bias_ptr,  # [V]
    u_stride, first, width, V, K, gain, cap,
    HAS_BIAS: tl.constexpr, SOFTCAP: tl.constexpr, INF_MASKS: tl.constexpr,
    SPREAD: tl.constexpr, BLOCK: tl.constexpr, KBLOCK: tl.constexpr,
):  # fmt: skip
    row = tl.program_id(0).to(tl.int64)
    if tl.load(active_ptr + row) != 0:
        u_row, state_row = u_ptr + row * u_stride, state_ptr + row * 4
        broken = _take(
            u_row, ids_ptr + row * K, on_ptr + row * K, bias_ptr, first, width, V, K, gain, cap,
            HAS_BIAS, SOFTCAP, INF_MASKS, KBLOCK,
        )  # fmt: skip
        own, total, spread = _reduce(
            u_row, bias_ptr, first, width, u_stride, gain, cap,
            HAS_BIAS, SOFTCAP, INF_MASKS, SPREAD, BLOCK,
        )  # fmt: skip
        before, sum_before = tl.load(state_row), tl.load(state_row + 1)
        top = tl.maximum(before, own)
        low, high = tl.exp(before - top), tl.exp(own - top)
        if SPREAD:
            left = low * (tl.load(state_row + 2) + sum_before * (before - top))
            left = tl.where(sum_before == 0.0, 0.0, left)
            right = tl.where(total == 0.0, 0.0, high * (spread + total * (own - top)))
            tl.store(state_row + 2, left + right)
        tl.store(state_row, top)
        tl.store(state_row + 1, low * sum_before + high * total)
        tl.store(state_row + 3, tl.maximum(tl.load(state_row + 3), broken.to(tl.float32)))


@triton.jit
def write_kernel(
    u_ptr,  # [R, width] fp32, rows of u_stride
    out_ptr,  # [R, width] gradient, rows of out_stride; may share the storage of u
    ids_ptr,  # [R, K] int
    on_grad_ptr,  # [R, K] fp32 gradient with respect to z at the ids
    active_ptr,  # [R] int8; the other rows get zeros
    coefficients_ptr,  # [R, 3] fp32 (own, factor, pull)
    on_ptr,  # [R, K] fp32, z at the ids
    bias_ptr,  # [V]
    u_stride, out_stride, out_limit, first, width, K, gain, cap,
    HAS_BIAS: tl.constexpr, SOFTCAP: tl.constexpr, SPREAD: tl.constexpr,
    BLOCK: tl.constexpr, KBLOCK: tl.constexpr,
):  # fmt: skip
    row = tl.program_id(0).to(tl.int64)
    u_row, out_row = u_ptr + row * u_stride, out_ptr + row * out_stride
    if tl.load(active_ptr + row) == 0:
        _zero(out_row, width, out_limit, BLOCK)
    else:
        own = tl.load(coefficients_ptr + row * 3)
        factor = tl.load(coefficients_ptr + row * 3 + 1)
        pull = tl.load(coefficients_ptr + row * 3 + 2)
        _write_off(
            u_row, out_row, bias_ptr, first, width, u_stride, out_limit, gain, cap,
            own, factor, pull, HAS_BIAS, SOFTCAP, False, SPREAD, BLOCK,
        )  # fmt: skip
        for start in range(0, K, KBLOCK):
            k = start + tl.arange(0, KBLOCK)
            ids = tl.load(ids_ptr + row * K + k, mask=k < K, other=-1).to(tl.int64)
            here = (ids >= first) & (ids < first + width)
            grad = tl.load(on_grad_ptr + row * K + k, mask=here, other=0.0)
            if SOFTCAP:
                t = tl.load(on_ptr + row * K + k, mask=here, other=0.0) / cap
                grad = grad * (1.0 - t * t)
            tl.store(out_row + (ids - first), grad.to(out_row.dtype.element_ty), mask=here)
