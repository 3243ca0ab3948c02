"""The activations and their slopes, in fp32, from exp, erf and comparisons: no libdevice.

Each is x times a distribution function: Phi for the GELU, a logistic for its tanh form and for
QuickGELU. Beyond 100 either way that function is 0 or 1 to the last bit, so clamping there changes
no result and keeps inf * 0 out: act(-inf) is -0, act(inf) is inf, the slopes there are 0 and 1. A
NaN stays one. Constants stand right of what they multiply: left of it, the interpreter takes the
product for a constant.
"""

import triton
import triton.language as tl

_FAR = tl.constexpr(100.0)
_SQRT_HALF = tl.constexpr(0.7071067811865476)
_DENSITY_AT_0 = tl.constexpr(0.3989422804014327)  # 1 / sqrt(2 pi)
# The tanh form is x logistic(2 sqrt(2 / pi) (x + 0.044715 x^3)).
_TANH_LINEAR = tl.constexpr(1.5957691216057308)
_TANH_CUBIC = tl.constexpr(0.044715)
_QUICK = tl.constexpr(1.702)


@triton.jit
def _logistic(z):
    """The logistic function of z, and its slope; no exponent is positive, so nothing overflows."""
    e = tl.exp(-tl.abs(z))
    inverse = 1.0 / (1.0 + e)
    return tl.where(z < 0, e, 1.0) * inverse, e * inverse * inverse


@triton.jit
def _distribution(x, ACTIVATION: tl.constexpr):
    """The function that multiplies x in act(x), and its slope."""
    if ACTIVATION == "gelu":
        value = 0.5 * (1.0 + tl.erf(x * _SQRT_HALF))
        slope = tl.exp(-0.5 * x * x) * _DENSITY_AT_0
    elif ACTIVATION == "gelu_tanh":
        cubic = x * x * _TANH_CUBIC
        value, slope = _logistic(x * (cubic + 1.0) * _TANH_LINEAR)
        slope = slope * (cubic * 3.0 + 1.0) * _TANH_LINEAR
    else:
        tl.static_assert(ACTIVATION == "quick_gelu")
        value, slope = _logistic(x * _QUICK)
        slope = slope * _QUICK
    return value, slope


@triton.jit
def activate(x, ACTIVATION: tl.constexpr):
    """act(x) of fp32 x."""
    if ACTIVATION == "relu":
        value = tl.where(x < 0, 0.0, x)
    else:
        x = tl.where(x < -_FAR, -_FAR, x)
        distribution, _ = _distribution(x, ACTIVATION)
        value = x * distribution
    return value


@triton.jit
def activate_with_slope(x, ACTIVATION: tl.constexpr):
    """act(x) and act'(x) of fp32 x; whichever is dropped costs nothing."""
    if ACTIVATION == "relu":
        value, slope = tl.where(x < 0, 0.0, x), tl.where(x > 0, 1.0, 0.0)
    else:
        near = tl.where(x < -_FAR, -_FAR, tl.where(x > _FAR, _FAR, x))
        distribution, rise = _distribution(near, ACTIVATION)
        value = tl.where(x > _FAR, x, near * distribution)
        slope = distribution + near * rise
    return value, slope
