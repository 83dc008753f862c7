"""What the arithmetic instructions of PTX compute, on vectors with one element per thread.

An entry of `OPERATIONS` has the types of its result and of its sources; the machine refuses other
numbers of operands and registers of other widths. Rounding is that of the PTX ISA. For the
approximate instructions the result is the correctly rounded one, times an optional error within
the bound of the ISA.
"""

import itertools
from collections.abc import Callable
from typing import NamedTuple

import numpy as np

TYPES = {
    "pred": np.bool_,
    "b8": np.uint8, "u8": np.uint8,
    "b16": np.uint16, "u16": np.uint16, "s16": np.int16, "bf16": np.uint16, "f16": np.float16,
    "b32": np.uint32, "u32": np.uint32, "s32": np.int32, "f32": np.float32,
    "bf16x2": np.uint32, "f16x2": np.uint32,
    "b64": np.uint64, "u64": np.uint64, "s64": np.int64, "f32x2": np.uint64,
}  # fmt: skip


class Operation(NamedTuple):
    function: Callable
    result: str
    sources: tuple[str, ...]
    error: float = 0.0  # relative error that the ISA allows


def fma(a, b, c):
    """a b + c in fp32 with one rounding: the sum in fp64 is rounded to odd, then to fp32."""
    product, addend = a.astype(np.float64) * b.astype(np.float64), c.astype(np.float64)
    total = np.asarray(product + addend)
    part = total - product
    rest = (product - (total - part)) + (addend - part)
    bits = np.array(total).view(np.int64)
    inexact = np.isfinite(total) & (rest != 0.0) & (bits & 1 == 0)
    away = (rest > 0.0) == (total > 0.0)
    bits = bits + np.where(inexact, np.where(away, 1, -1), 0)
    return bits.view(np.float64).astype(np.float32)


def flush(x):
    """Subnormal fp32 numbers become zeros of their sign."""
    return np.where(np.abs(x) < np.finfo(np.float32).tiny, np.copysign(np.float32(0), x), x)


def from_bf16(bits):
    return (np.asarray(bits).astype(np.uint32) << np.uint32(16)).view(np.float32)


def to_bf16(x):
    """Rounded to nearest, ties to even; NaN is 0x7fff."""
    bits = np.ascontiguousarray(x, np.float32).view(np.uint32)
    rounded = (bits + np.uint32(0x7FFF) + ((bits >> np.uint32(16)) & np.uint32(1))) >> np.uint32(16)
    return np.where(np.isnan(x), np.uint32(0x7FFF), rounded).astype(np.uint16)


def _packed(convert):
    """Two converted numbers in 32 bits; the first source is the upper half."""

    def pack(upper, lower):
        high, low = (convert(x).view(np.uint16).astype(np.uint32) for x in (upper, lower))
        return (high << np.uint32(16)) | low

    return pack


def _pairs(function):
    """An fp32 function on both halves of 64-bit registers."""

    def apply(*sources):
        halves = [np.ascontiguousarray(s).view(np.float32).reshape(-1, 2) for s in sources]
        return np.ascontiguousarray(function(*halves), np.float32).view(np.uint64).ravel()

    return apply


def _extreme(choose, of_zeros):
    """max or min: -0 is below +0; `choose` decides between a NaN and a number."""

    def extreme(*sources):
        best = sources[0]
        for x in sources[1:]:
            both = of_zeros(best.view(np.uint32), x.view(np.uint32)).view(np.float32)
            best = np.where((best == 0) & (x == 0), both, choose(best, x))
        return np.where(np.isnan(best), np.float32(np.nan), best)

    return extreme


def _shift(function, dtype):
    def shift(x, amount):
        bits = 8 * np.dtype(dtype).itemsize
        return np.where(amount < bits, function(x, np.minimum(amount, bits - 1).astype(dtype)), 0)

    return shift


def _quotient(a, b):
    """Rounded towards zero; a division by zero gives all ones (the ISA leaves it open)."""
    safe = np.where(b == 0, np.ones_like(b), b)
    if a.dtype.kind == "i":
        quotient = np.floor_divide(a, safe)
        quotient = quotient + ((quotient * safe != a) & ((a < 0) != (safe < 0)))
    else:
        quotient = a // safe
    return np.where(b == 0, np.array(-1).astype(a.dtype), quotient).astype(a.dtype)


def _field(x, position, length):
    """bfe.u32: `length` bits of x from `position`."""
    position, length = position & 255, length & 255
    mask = np.where(length >= 32, 0xFFFFFFFF, (np.uint64(1) << length.astype(np.uint64)) - 1)
    moved = np.where(position >= 32, 0, x.astype(np.uint64) >> position.astype(np.uint64))
    return (moved.astype(np.uint64) & mask.astype(np.uint64)).astype(np.uint32)


def _signed_field(x, position, length):
    """bfe.s32: the same with the sign of the field's highest bit, or of x beyond its end."""
    position, length = position & 255, length & 255
    last = np.minimum(position.astype(np.int64) + length - 1, 31)
    sign = (x.astype(np.int64) >> np.maximum(last, 0)) & 1
    value = _field(x.view(np.uint32), position, length).astype(np.int64)
    high = np.where(length >= 32, 32, length).astype(np.int64)
    kept = np.clip(np.minimum(high, 32 - position.astype(np.int64)), 0, 32)
    return np.where((length > 0) & (sign == 1), value | (-1 << kept), value).astype(np.int32)


def _comparisons():
    ordered = {
        "eq": np.equal, "ne": np.not_equal, "lt": np.less,
        "le": np.less_equal, "gt": np.greater, "ge": np.greater_equal,
    }  # fmt: skip
    for (name, compare), type_ in itertools.product(
        ordered.items(), ("b16", "b32", "b64", "u16", "u32", "u64", "s16", "s32", "s64")
    ):
        if type_[0] != "b" or name in ("eq", "ne"):
            yield f"setp.{name}.{type_}", Operation(compare, "pred", (type_, type_))
    for name, compare in ordered.items():

        def with_order(a, b, compare=compare):
            return compare(a, b) & ~np.isnan(a) & ~np.isnan(b)

        def or_unordered(a, b, compare=compare):
            return compare(a, b) | np.isnan(a) | np.isnan(b)

        yield f"setp.{name}.f32", Operation(with_order, "pred", ("f32", "f32"))
        yield f"setp.{name}u.f32", Operation(or_unordered, "pred", ("f32", "f32"))
    unordered = Operation(lambda a, b: np.isnan(a) | np.isnan(b), "pred", ("f32", "f32"))
    yield "setp.nan.f32", unordered
    yield "setp.num.f32", unordered._replace(function=lambda a, b: ~(np.isnan(a) | np.isnan(b)))


def _integers():
    for type_ in ("s16", "u16", "s32", "u32", "s64", "u64"):
        dtype, two = TYPES[type_], (type_, type_)
        yield f"add.{type_}", Operation(np.add, type_, two)
        yield f"sub.{type_}", Operation(np.subtract, type_, two)
        yield f"mul.lo.{type_}", Operation(np.multiply, type_, two)
        yield f"mad.lo.{type_}", Operation(lambda a, b, c: a * b + c, type_, (*two, type_))
        yield f"min.{type_}", Operation(np.minimum, type_, two)
        yield f"max.{type_}", Operation(np.maximum, type_, two)
        yield f"div.{type_}", Operation(_quotient, type_, two)
        shift = _shift(np.right_shift, dtype)
        if type_[0] == "s":  # an arithmetic shift by all bits leaves the sign

            def shift(x, amount, dtype=dtype):
                last = 8 * np.dtype(dtype).itemsize - 1
                return np.right_shift(x, np.minimum(amount, last).astype(dtype))

        yield f"shr.{type_}", Operation(shift, type_, (type_, "u32"))
    for type_, wide in (("s32", "s64"), ("u32", "u64")):
        dtype = TYPES[wide]

        def product(a, b, dtype=dtype):
            return a.astype(dtype) * b.astype(dtype)

        def sum_of_product(a, b, c, dtype=dtype):
            return a.astype(dtype) * b.astype(dtype) + c

        yield f"mul.wide.{type_}", Operation(product, wide, (type_, type_))
        yield f"mad.wide.{type_}", Operation(sum_of_product, wide, (type_, type_, wide))
    yield "neg.s32", Operation(np.negative, "s32", ("s32",))
    yield "bfe.u32", Operation(_field, "u32", ("u32", "u32", "u32"))
    yield "bfe.s32", Operation(_signed_field, "s32", ("s32", "u32", "u32"))
    for type_ in ("pred", "b16", "b32", "b64"):
        for name, function in (
            ("and", np.bitwise_and), ("or", np.bitwise_or), ("xor", np.bitwise_xor),
        ):  # fmt: skip
            yield f"{name}.{type_}", Operation(function, type_, (type_, type_))
        yield f"not.{type_}", Operation(np.invert, type_, (type_,))
        if type_ != "pred":
            shift = _shift(np.left_shift, TYPES[type_])
            yield f"shl.{type_}", Operation(shift, type_, (type_, "u32"))


def _moves():
    for type_ in ("pred", "b16", "b32", "b64", "u16", "u32", "u64", "s32", "s64", "f32"):
        yield f"mov.{type_}", Operation(lambda a: a, type_, (type_,))
        if type_ != "pred":

            def select(a, b, p):
                return np.where(p, a, b)

            yield f"selp.{type_}", Operation(select, type_, (type_, type_, "pred"))
    for source, target in (
        ("s32", "s64"), ("u32", "u64"), ("u64", "u32"), ("s64", "s32"), ("u32", "u16"),
        ("u16", "u32"), ("s16", "s32"), ("s16", "s64"), ("u16", "u64"), ("u64", "u16"),
    ):  # fmt: skip

        def convert(a, dtype=TYPES[target]):
            return a.astype(dtype)

        yield f"cvt.{target}.{source}", Operation(convert, target, (source,))


def _floats():
    f32, one, two, three = "f32", ("f32",), ("f32", "f32"), ("f32", "f32", "f32")
    for rounding in ("", ".rn"):
        yield f"add{rounding}.f32", Operation(np.add, f32, two)
        yield f"sub{rounding}.f32", Operation(np.subtract, f32, two)
        yield f"mul{rounding}.f32", Operation(np.multiply, f32, two)
        yield f"add{rounding}.f32x2", Operation(_pairs(np.add), "f32x2", ("f32x2",) * 2)
        yield f"sub{rounding}.f32x2", Operation(_pairs(np.subtract), "f32x2", ("f32x2",) * 2)
        yield f"mul{rounding}.f32x2", Operation(_pairs(np.multiply), "f32x2", ("f32x2",) * 2)
    yield "fma.rn.f32", Operation(fma, f32, three)
    yield "fma.rn.f32x2", Operation(_pairs(fma), "f32x2", ("f32x2",) * 3)
    yield (
        "fma.rn.ftz.f32",
        Operation(lambda a, b, c: flush(fma(flush(a), flush(b), flush(c))), f32, three),
    )
    yield (
        "fma.rn.f32.bf16",
        Operation(lambda a, b, c: fma(from_bf16(a), from_bf16(b), c), f32, ("bf16", "bf16", f32)),
    )
    yield "fma.rn.f32.f16", Operation(
        lambda a, b, c: fma(a.astype(np.float32), b.astype(np.float32), c), f32,
        ("f16", "f16", f32),
    )  # fmt: skip
    yield "add.rn.f32.bf16", Operation(lambda a, c: from_bf16(a) + c, f32, ("bf16", f32))
    yield "abs.f32", Operation(np.abs, f32, one)
    yield "neg.f32", Operation(np.negative, f32, one)
    maximum = _extreme(np.fmax, np.bitwise_and)
    minimum = _extreme(np.fmin, np.bitwise_or)
    yield "max.f32", Operation(maximum, f32, two)
    yield "min.f32", Operation(minimum, f32, two)
    yield "max.NaN.f32", Operation(_extreme(np.maximum, np.bitwise_and), f32, two)
    yield "max.f32/3", Operation(maximum, f32, three)
    yield "min.f32/3", Operation(minimum, f32, three)
    yield (
        "ex2.approx.f32",
        Operation(lambda a: np.exp2(a.astype(np.float64)).astype(np.float32), f32, one, 2.0**-22),
    )
    yield (
        "ex2.approx.ftz.f32",
        Operation(
            lambda a: flush(np.exp2(flush(a).astype(np.float64)).astype(np.float32)),
            f32,
            one,
            2.0**-22,
        ),
    )
    yield "div.full.f32", Operation(np.divide, f32, two, 2.0**-22)
    yield "cvt.rn.f32.s32", Operation(lambda a: a.astype(np.float32), f32, ("s32",))
    yield "cvt.rn.f32.u32", Operation(lambda a: a.astype(np.float32), f32, ("u32",))
    yield "cvt.f32.bf16", Operation(from_bf16, f32, ("bf16",))
    yield "cvt.f32.f16", Operation(lambda a: a.astype(np.float32), f32, ("f16",))
    yield "cvt.rn.bf16.f32", Operation(to_bf16, "bf16", one)
    yield "cvt.rn.f16.f32", Operation(lambda a: a.astype(np.float16), "f16", one)
    yield "cvt.rn.bf16x2.f32", Operation(_packed(to_bf16), "bf16x2", two)
    yield (
        "cvt.rn.f16x2.f32",
        Operation(_packed(lambda a: np.ascontiguousarray(a).astype(np.float16)), "f16x2", two),
    )


OPERATIONS: dict[str, Operation] = dict(
    itertools.chain(_comparisons(), _integers(), _moves(), _floats())
)
