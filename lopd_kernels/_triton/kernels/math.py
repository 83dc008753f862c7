"""Elementary functions that are accurate in fp32 on every target and in the interpreter.

The hardware's exp and log are accurate enough away from 0 and 1. Near them, `exp(x) - 1` and
`log(1 + x)` are computed as series.
"""

import triton
import triton.language as tl


@triton.jit
def expm1(x):
    """exp(x) - 1: a polynomial of degree 8 for |x| <= 0.35, within 1e-7 of the value."""
    s = x * (1.0 / 40320.0) + 1.0 / 5040.0
    s = s * x + 1.0 / 720.0
    s = s * x + 1.0 / 120.0
    s = s * x + 1.0 / 24.0
    s = s * x + 1.0 / 6.0
    s = s * x + 0.5
    s = s * x * x + x
    return tl.where(tl.abs(x) <= 0.35, s, tl.exp(x) - 1.0)


@triton.jit
def log1p(x):
    """log(1 + x), x > -1: 2 atanh(x / (2 + x)) as a series of degree 9 for |x| <= 0.3."""
    s = x / (2.0 + x)
    t = s * s
    series = t * (1.0 / 9.0) + 1.0 / 7.0
    series = series * t + 1.0 / 5.0
    series = series * t + 1.0 / 3.0
    series = series * t + 1.0
    return tl.where(tl.abs(x) <= 0.3, 2.0 * s * series, tl.log(1.0 + x))


@triton.jit
def tanh(x):
    """1 beyond |x| = 10, which is its fp32 value; NaN stays NaN."""
    a = tl.abs(x)
    twice = expm1(2.0 * tl.where(a > 10.0, 10.0, a))
    y = twice / (twice + 2.0)
    return tl.where(x < 0.0, -y, y)
