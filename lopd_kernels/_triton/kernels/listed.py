"""Products of each row of hidden states with the K rows of the weight that it lists.

No two programs add into the same memory: a row of dH belongs to one row of hidden states, a row
of dW to one id, whose entries are visited in a fixed order.
"""

import triton
import triton.language as tl

PER_BATCH = ("ids_ptr", "K", "first")  # change with the batch or a panel, see kernels/rows.py


@triton.jit(do_not_specialize=PER_BATCH)
def gather_dot_kernel(
    hidden_ptr,  # [N, D]
    weight_ptr,  # [V, D]
    ids_ptr,  # [N, K] in [0, V)
    out_ptr,  # [N, K] fp32: hidden[n] . weight[ids[n, k]]
    hidden_stride, weight_stride, D, K, DBLOCK: tl.constexpr, KBLOCK: tl.constexpr,
):  # fmt: skip
    row = tl.program_id(0).to(tl.int64)
    k = tl.program_id(1) * KBLOCK + tl.arange(0, KBLOCK)
    ids = tl.load(ids_ptr + row * K + k, mask=k < K, other=0).to(tl.int64)
    total = tl.zeros([KBLOCK], tl.float32)
    for start in range(0, D, DBLOCK):
        d = start + tl.arange(0, DBLOCK)
        h = tl.load(hidden_ptr + row * hidden_stride + d, mask=d < D, other=0.0)
        at = ids[:, None] * weight_stride + d[None, :]
        w = tl.load(weight_ptr + at, mask=(k < K)[:, None] & (d < D)[None, :], other=0.0)
        total += tl.sum(w.to(tl.float32) * h.to(tl.float32)[None, :], axis=1)
    tl.store(out_ptr + row * K + k, total, mask=k < K)


@triton.jit(do_not_specialize=PER_BATCH)
def gather_sum_kernel(
    grad_ptr,  # [N, K] fp32
    weight_ptr,  # [V, D]
    ids_ptr,  # [N, K] in [0, V)
    out_ptr,  # [N, D]: sum_k grad[n, k] weight[ids[n, k]]
    weight_stride, D, K, DBLOCK: tl.constexpr, KBLOCK: tl.constexpr,
):  # fmt: skip
    row = tl.program_id(0).to(tl.int64)
    d = tl.program_id(1) * DBLOCK + tl.arange(0, DBLOCK)
    total = tl.zeros([DBLOCK], tl.float32)
    for start in range(0, K, KBLOCK):
        k = start + tl.arange(0, KBLOCK)
        ids = tl.load(ids_ptr + row * K + k, mask=k < K, other=0).to(tl.int64)
        grad = tl.load(grad_ptr + row * K + k, mask=k < K, other=0.0)[:, None]
        at = ids[:, None] * weight_stride + d[None, :]
        w = tl.load(weight_ptr + at, mask=(k < K)[:, None] & (d < D)[None, :], other=0.0)
        total += tl.sum(tl.where(grad == 0.0, 0.0, grad * w.to(tl.float32)), axis=0)
    tl.store(out_ptr + row * D + d, total.to(out_ptr.dtype.element_ty), mask=d < D)


@triton.jit(do_not_specialize=PER_BATCH)
def segment_sum_kernel(
    grad_ptr,  # [N * K] fp32
    hidden_ptr,  # [N, D]
    order_ptr,  # [N * K] int64, entries sorted by id, in order of n within an id
    starts_ptr,  # [V + 1] int64, where the entries of each id begin
    out_ptr,  # [P, D], from id `first`: sum over the entries of an id of grad[n, k] hidden[n]
    hidden_stride, out_stride, first, D, K,
    ADD: tl.constexpr, DBLOCK: tl.constexpr, EBLOCK: tl.constexpr,
):  # fmt: skip
    v = tl.program_id(0).to(tl.int64)
    d = tl.program_id(1) * DBLOCK + tl.arange(0, DBLOCK)
    begin, end = tl.load(starts_ptr + first + v), tl.load(starts_ptr + first + v + 1)
    total = tl.zeros([DBLOCK], tl.float32)
    for start in range(begin, end, EBLOCK):
        e = start + tl.arange(0, EBLOCK)
        entry = tl.load(order_ptr + e, mask=e < end, other=0)
        grad = tl.load(grad_ptr + entry, mask=e < end, other=0.0)[:, None]
        at = (entry // K)[:, None] * hidden_stride + d[None, :]
        h = tl.load(hidden_ptr + at, mask=(e < end)[:, None] & (d < D)[None, :], other=0.0)
        total += tl.sum(tl.where(grad == 0.0, 0.0, grad * h.to(tl.float32)), axis=0)
    at = v * out_stride + d
    if ADD:
        total += tl.load(out_ptr + at, mask=d < D, other=0.0).to(tl.float32)
    tl.store(out_ptr + at, total.to(out_ptr.dtype.element_ty), mask=d < D)
