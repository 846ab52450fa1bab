"""What is exact, how far from it a result may be, and the inputs worth asking.

Nothing here knows the package or JAX. Exact values are float64, or mpmath numbers (numpy arrays of
dtype object) where the logits are float64. Distances are counted in ulp: units in the last place
of the result's type at the exact value. `TOLERANCE` is the only place that holds a tolerance.
"""

from dataclasses import dataclass, replace

import ml_dtypes
import mpmath
import numpy as np
from numpy.typing import ArrayLike, DTypeLike

Values = np.ndarray

FLOAT16, BFLOAT16, FLOAT32, FLOAT64 = map(
    np.dtype, (np.float16, ml_dtypes.bfloat16, np.float32, np.float64)
)
FLOATS = (FLOAT16, BFLOAT16, FLOAT32, FLOAT64)
INTEGERS = tuple(map(np.dtype, (bool, np.int8, np.uint8, np.int16, np.int32, np.int64)))

# 200 bits: twice the digits that a float64 number and a sum of two of them can ask for.
_MP = mpmath.MPContext()
_MP.prec = 200


@dataclass(frozen=True)
class Ulp:
    """How far a loss and a gradient may be from the exact value, in ulp of the result's type.

    One ulp of a float32 or float64 gradient is taken at max((1 - y) sigmoid(x), y sigmoid(-x)):
    with labels 0 and 1 that is the gradient itself, with others the larger of what cancels. Of a
    16-bit gradient it is taken at the gradient; `cancelled` times that larger term is allowed, too.
    """

    loss: float
    gradient: float
    cancelled: float = 0


@dataclass(frozen=True)
class Tolerance:
    """What an implementation promises; "hard" labels are 0 and 1, "soft" ones lie between."""

    elements: dict[tuple[str, str], Ulp]
    factor: float  # more ulp of the arithmetic's type, for each weight, sample_weight, pos_weight
    sum: float  # relative, of a loss that adds up float32 elements
    sum_16_bit: float  # the same for 16-bit logits
    sum_float64: float  # relative, for up to 4096 elements
    flushes: bool  # a result below the arithmetic's smallest normal number may be 0


# The accuracy contract, which also stands in csrc/bce_math.h.
_CONTRACT = Tolerance(
    elements={
        ("float32", "hard"): Ulp(loss=1, gradient=1),
        ("float32", "soft"): Ulp(loss=2, gradient=1),
        ("bfloat16", "hard"): Ulp(loss=0.502, gradient=0.502),
        ("bfloat16", "soft"): Ulp(loss=0.502, gradient=0.502, cancelled=2**-22),
        ("float16", "hard"): Ulp(loss=0.502, gradient=0.502),
        ("float16", "soft"): Ulp(loss=0.502, gradient=0.502, cancelled=2**-22),
        ("float64", "hard"): Ulp(loss=4, gradient=4),
        ("float64", "soft"): Ulp(loss=4, gradient=4),
    },
    factor=1,
    sum=2**-23,
    sum_16_bit=2**-21,
    sum_float64=2**-40,
    flushes=False,
)

# What XLA's own exp, log1p and sums reach on CPU. No contract: it shows that the formula is right.
_XLA = Tolerance(
    elements={
        ("float32", "hard"): Ulp(loss=6, gradient=6),
        ("float32", "soft"): Ulp(loss=6, gradient=6),
        ("bfloat16", "hard"): Ulp(loss=0.51, gradient=0.51),
        ("bfloat16", "soft"): Ulp(loss=0.51, gradient=0.51, cancelled=2**-21),
        ("float16", "hard"): Ulp(loss=0.51, gradient=0.51),
        ("float16", "soft"): Ulp(loss=0.51, gradient=0.51, cancelled=2**-21),
        ("float64", "hard"): Ulp(loss=6, gradient=6),
        ("float64", "soft"): Ulp(loss=6, gradient=6),
    },
    factor=1,
    sum=2**-16,
    sum_16_bit=2**-16,
    sum_float64=2**-40,
    flushes=True,
)

# The GPU's arithmetic for 16-bit logits is shorter.
_CUDA = replace(
    _CONTRACT,
    elements=_CONTRACT.elements
    | {
        (dtype, "soft"): Ulp(loss=0.502, gradient=0.502, cancelled=2**-21)
        for dtype in ("bfloat16", "float16")
    },
)

TOLERANCE = {"cpu": _CONTRACT, "cuda": _CUDA, "xla": _XLA}

# More ulp of the arithmetic's type, for a factor such as 1/N: it is rounded, and so is the product.
FACTOR = 2.0
# One rounding to nearest.
ROUNDED = 0.5
# More ulp of bfloat16, where a gradient is stored in it before its cotangent arrives.
STORED_BFLOAT16 = 1.0
# Labels outside [0, 1], in ulp of the largest term: no contract, but no other formula either.
LABEL_BEYOND_1 = 2.0
# Second and third derivatives are plain jnp: ulp of sigmoid(x) sigmoid(-x) in the result's type.
DERIVATIVE = {"float16": 2.0, "bfloat16": 2.0, "float32": 16.0, "float64": 16.0}
# The decimal inputs and the expected values of cases.json are themselves rounded to float64.
CASE = 2.0
# The related losses, by XLA's exp and log: ulp of the largest term times 1 + |log of the power|, as
# a power is the exponential of a number that is itself rounded.
FOCAL = 4.0
# The same, but p_m, a difference, is as far from exact as the rounded probability.
ASYMMETRIC = 16.0
# The kernel's: ulp of the result for labels 0 and 1; with others, of the largest term.
KERNEL_FOCAL = 4.0
KERNEL_ASYMMETRIC = 8.0
KERNEL_SOFT = 16.0
KERNEL_16_BIT = 0.51
# Of a mean: its elements' errors, and one rounding on each of two sides.
FOCAL_MEAN = 2e-7
# The kernel's results and derivatives beside XLA's, whose exp and log err by a few ulp each.
FOCAL_MODES = {"rtol": 1e-5, "atol": 1e-7}
# XLA's log and one division, of an element that is a product of a few numbers.
ARITHMETIC = 8.0
# Their derivatives in a label, a focus, alpha or clip, at logits up to 25, where a power may be the
# exponential of 100: ulp of the derivative or the loss, whichever is larger.
IN_ARGUMENTS = 32.0
# Below this a factor of their result may be subnormal, which XLA flushes to zero.
FLUSHED = 2.0**-110
# Relative: what others print of their results, in six or seven digits.
PUBLISHED = 1e-6
# Relative: a value that is farther off than this is wrong, and not just less exact.
WRONG = 1e-2
# In eps: XLA's own sigmoid has other bits in vectors of another length (jax 0.12 with AVX-512).
OTHER_VECTORS = 4.0
# In eps: a sum of the shards' gradients, and its factors; more, relative to the largest, as the
# gradients may cancel.
SHARDS, SHARDS_CANCELLED = 4.0, 2.0
# Float32 arithmetic around the loss in another order or on other devices, relative to the largest.
SURROUNDINGS = 1e-5
# Of a linear layer's gradients, relative to the largest: that of the logits is rounded to bfloat16
# where both factors are, and the results are stored in their arguments' type.
LINEAR = {"float16": 2**-10, "bfloat16": 2**-7, "float32": SURROUNDINGS, "float64": 2**-40}


def kind_of(labels: ArrayLike) -> str:
    y = np.asarray(labels, np.float64)
    return "hard" if np.all((y == 0) | (y == 1)) else "soft"


def arithmetic_dtype(dtype: DTypeLike) -> np.dtype:
    """The type that elements of `dtype` are evaluated in."""
    return FLOAT64 if np.dtype(dtype) == FLOAT64 else FLOAT32


def ulp_of_arithmetic(dtype: DTypeLike) -> float:
    """One ulp of the arithmetic's type in ulp of `dtype`."""
    return 2.0 ** (ml_dtypes.finfo(dtype).nmant - ml_dtypes.finfo(arithmetic_dtype(dtype)).nmant)


def largest_derivative(dtype: DTypeLike) -> float:
    """Where a derivative of a logarithm of a probability stops."""
    return float(ml_dtypes.finfo(FLOAT64 if np.dtype(dtype) == FLOAT64 else BFLOAT16).max)


# --- exact values --------------------------------------------------------------------------------


@dataclass(frozen=True)
class Exact:
    """One element: l = q y log(1 + exp(-x)) + (1 - y) log(1 + exp(x)), and its derivatives in x."""

    loss: Values
    gradient: Values
    hessian: Values
    third: Values
    loss_scale: Values  # |q y| log(1 + exp(-x)) + |1 - y| log(1 + exp(x))
    gradient_scale: Values  # max(|1 - y| sigmoid(x), |q y| sigmoid(-x))


def exact(
    logits: ArrayLike,
    labels: ArrayLike,
    label_smoothing: float = 0.0,
    pos_weight: ArrayLike = 1.0,
) -> Exact:
    """The exact element at logits, labels and positive weights as they are stored.

    With e = exp(-|x|), c = 1 - y where x >= 0, else q y, and t = 1 - y + q y, no two nearly equal
    numbers are subtracted: l = t log1p(e) + c |x| and dl/dx = sign(x) (c - t e / (1 + e)).
    """
    wide, exp, log1p = np.float64, np.exp, np.log1p
    if np.asarray(logits).dtype == FLOAT64:
        wide, exp, log1p = _to_mpmath, np.frompyfunc(_MP.exp, 1, 1), np.frompyfunc(_log1p, 1, 1)
    arrays = np.broadcast_arrays(*map(np.asarray, (logits, labels, pos_weight)))
    with np.errstate(all="ignore"):
        x, y, q = (np.asarray(wide(v.astype(np.float64))) for v in arrays)
        # y (1 - s) + s / 2, and of its complement 1 - y as many digits.
        smoothed, complement = (v * (1 - label_smoothing) + label_smoothing / 2 for v in (y, 1 - y))
        smoothed = np.where(smoothed == 0, 0, smoothed * q)
        total = np.where(q == 1, 1, smoothed + complement)
        positive, magnitude = x >= 0, abs(x)
        e = np.asarray(exp(-magnitude))
        log_part = np.asarray(log1p(e))
        near = np.where(positive, complement, smoothed)
        far = np.where(positive, smoothed, complement)
        finite = np.where(near == 0, 0, magnitude)  # the coefficient 0 wins over infinity
        small = e / (1 + e)  # sigmoid(-|x|), so that sigmoid(|x|) = 1 / (1 + e)
        hessian = total * small / (1 + e)
        sign = np.where(positive, 1, -1)
        values = {
            "loss": total * log_part + near * finite,
            "gradient": sign * (near - total * small),
            "hessian": hessian,
            "third": -sign * hessian * (1 - 2 * small),
            "loss_scale": (abs(near) + abs(far)) * log_part + abs(near) * finite,
            "gradient_scale": np.maximum(abs(near) / (1 + e), abs(far) * small),
        }
    # NumPy turns an array of rank 0 into a number.
    return Exact(**{name: np.asarray(value) for name, value in values.items()})


def _to_mpmath(values: Values) -> Values:
    return np.asarray(np.frompyfunc(_MP.mpf, 1, 1)(values), dtype=object)


def _log1p(e: mpmath.mpf) -> mpmath.mpf:
    # mpmath's own log1p turns the smallest numbers into 1 + e, digits and all.
    return _MP.log(1 + e) if e > 2**-70 else e * (1 - e * (_MP.mpf(1) / 2 - e / 3))


def ulp(values: ArrayLike, dtype: DTypeLike) -> Values:
    """The unit in the last place of `dtype` at each value, at least its smallest subnormal."""
    info = ml_dtypes.finfo(dtype)
    values = np.abs(np.asarray(values).astype(np.float64))
    exponent = np.where(values == 0, info.minexp, np.frexp(values)[1] - 1)
    return np.ldexp(1.0, np.maximum(exponent, info.minexp) - info.nmant)


def round_to(values: ArrayLike, dtype: DTypeLike) -> Values:
    """Float64 values rounded once, to nearest even.

    `astype` will not do: to bfloat16 it rounds to float32 on the way.
    """
    values = np.asarray(values, np.float64)
    with np.errstate(all="ignore"):
        unit = ulp(values, dtype)
        rounded = np.rint(values / unit) * unit
        largest = float(ml_dtypes.finfo(dtype).max)
        rounded = np.where(abs(rounded) > largest, np.copysign(np.inf, values), rounded)
        return rounded.astype(dtype)


def ulp_distance(
    actual: ArrayLike, exact: ArrayLike, dtype: DTypeLike, scale: ArrayLike | None = None
) -> Values:
    """|actual - exact| in ulp of `dtype` at `scale`, by default at the exact value.

    NaN is right where the exact value is NaN, and infinity where it is infinite or rounds to it.
    """
    exact = np.asarray(exact)
    with np.errstate(all="ignore"):
        actual = np.asarray(actual).astype(np.float64)
        exact64 = exact.astype(np.float64)
        unit = ulp(exact64 if scale is None else scale, dtype)
        error = np.asarray(abs(actual.astype(exact.dtype) - exact) / unit).astype(np.float64)
        right = np.isnan(actual) & np.isnan(exact64)
        right |= (actual == exact64) & np.isinf(exact64)
        right |= (actual == round_to(exact64, dtype).astype(np.float64)) & np.isinf(actual)
    return np.where(right, 0.0, np.where(np.isnan(error), np.inf, error))


def relative_error(actual: ArrayLike, exact: ArrayLike) -> Values:
    """|actual - exact| / |exact|; 0 where both are equal, be it 0 or infinity."""
    exact = np.asarray(exact)
    actual = np.asarray(actual).astype(np.float64).astype(exact.dtype)
    with np.errstate(all="ignore"):
        error = abs(actual - exact) / abs(exact)
    return np.where(actual == exact, 0.0, error).astype(np.float64)


def assert_same_bits(actual: object, expected: object) -> None:
    """Arrays, or tuples of arrays, hold the same bits; any NaN equals any other."""
    if isinstance(expected, tuple | list):
        assert isinstance(actual, tuple | list)
        assert len(actual) == len(expected)
        for one, other in zip(actual, expected, strict=True):
            assert_same_bits(one, other)
        return
    actual, expected = np.asarray(actual), np.asarray(expected)
    assert (actual.shape, actual.dtype) == (expected.shape, expected.dtype)
    bits = f"u{expected.dtype.itemsize}"
    differ = np.atleast_1d(actual).view(bits) != np.atleast_1d(expected).view(bits)
    differ &= ~np.atleast_1d(np.isnan(actual) & np.isnan(expected))
    assert not differ.any(), (
        f"{differ.sum()} of {differ.size} differ: {np.atleast_1d(actual)[differ][:5]} against "
        f"{np.atleast_1d(expected)[differ][:5]} at {np.argwhere(differ)[:5].tolist()}"
    )


_MAGNITUDES = (
    *(0.0, 0.1, 0.5, np.log(2), 1.0, np.log(9), 2.5, 5.0, 8.0, 10.0, 12.0, 15.0, 16.0, 16.7, 17.0),
    *(20.0, 30.0, 36.7, 37.43, 40.0, 80.0, 87.0, 87.4, 88.0, 88.8, 92.2, 95.0, 100.0, 103.2, 103.9),
    *(104.0, 105.0, 150.0, 232.8, 700.0, 708.4, 720.0, 744.4, 745.2, 750.0, 1e4, 1e9, np.inf),
)


def chosen_logits(dtype: DTypeLike) -> Values:
    """Both signs of zero, subnormals, every magnitude where a formula may change, inf; and NaN."""
    info = ml_dtypes.finfo(dtype)
    smallest, tiny = float(info.smallest_subnormal), float(info.tiny)
    ends = (smallest, 3 * smallest, tiny - smallest, tiny, float(info.eps), float(info.max))
    around = [np.nextafter(1.0, 0), np.nextafter(1.0, 2), *_MAGNITUDES, *ends]
    return round_to([*around, *np.negative(around), np.nan], dtype)


def every_16_bit(dtype: DTypeLike) -> Values:
    """All 65,536 numbers of a 16-bit type."""
    return np.arange(2**16, dtype=np.uint16).view(dtype)


def finite(values: Values) -> Values:
    """Those that are neither infinite nor NaN."""
    with np.errstate(invalid="ignore"):  # a signalling NaN among the bit patterns
        return values[np.isfinite(values.astype(np.float64))]


def walk(
    dtype: DTypeLike, count: int, low: float = 0.0, high: float | None = None, offset: int = 0
) -> Values:
    """Bit patterns at an even stride from `low` to `high` (None: to the last NaN), both signs."""
    dtype = np.dtype(dtype)
    unsigned = np.dtype(f"u{dtype.itemsize}")
    sign = 1 << (8 * dtype.itemsize - 1)
    first = int(np.array(low, dtype).view(unsigned))
    last = sign if high is None else int(np.array(high, dtype).view(unsigned))
    half = max(1, count // 2)
    stride = max(1, (last - first) // half)
    patterns = first + np.arange(half, dtype=np.uint64) * np.uint64(stride)
    patterns = np.minimum(patterns + np.uint64(offset % stride), np.uint64(last - 1))
    return np.concatenate([patterns, patterns + np.uint64(sign)]).astype(unsigned).view(dtype)


def random_logits(
    dtype: DTypeLike, shape: int | tuple[int, ...], seed: int, scale: float = 4.0
) -> Values:
    """Normally distributed, as a model's scores are."""
    return round_to(np.random.default_rng(seed).normal(0, scale, shape), dtype)


def exact_focal(
    logits: Values, labels: Values, gamma_neg: float, gamma_pos: float, clip: np.floating
) -> tuple[Values, Values, Values]:
    """Focal and asymmetric loss, the derivative in the logit, and its largest term, in float64.

    loss = b^gamma cross, cross = -y log(p) - n log(1 - v), b = y m + n v, with p = sigmoid(x),
    m = 1 - p, n = 1 - y and v = max(p - clip, 0). `clip` is a float32 number, or 0. In extended
    precision: v is c m (exp(d) - 1), with the distance d from the logit of the clip.
    """
    x, y, c = (np.asarray(v, np.longdouble) for v in (logits, labels, clip))
    n, e = 1 - y, np.exp(-abs(x))
    p, m = np.where(x >= 0, 1, e) / (1 + e), np.where(x >= 0, e, 1) / (1 + e)
    log_p = -(np.log1p(e) + np.maximum(-x, 0))
    if c == 0:
        v, log_u, rises = p, -(np.log1p(e) + np.maximum(x, 0)), p
    else:
        d = x - np.log(c / (1 - c))
        v = np.where(d > 0, np.where(d < 1, c * m * np.expm1(np.clip(d, 0, 1)), p - c), 0)
        log_u = np.where(v < 0.5, np.log1p(-np.minimum(v, 0.5)), np.log(m + c))
        rises = np.where(d > 0, p * m / (m + c), 0)
    above = (v > 0) | (c == 0)
    cross = -np.where(y == 0, 0, y * log_p) - np.where(n == 0, 0, n * log_u)
    b, gamma = y * m + n * v, y * gamma_pos + n * gamma_neg
    power = np.where(b == 0, gamma == 0, np.where(b == 0, 1, b) ** gamma)
    share = p * m * (n * above - y) / np.where(b == 0, 1, b)
    terms = [
        power * n * rises,
        -power * y * m,
        power * np.where(share == 0, 0, gamma * share * cross),
    ]
    loss, gradient, scale = power * cross, sum(terms), np.maximum.reduce([abs(t) for t in terms])
    return tuple(v.astype(np.float64) for v in (loss, gradient, scale))


def random_labels(dtype: DTypeLike, shape: int | tuple[int, ...], seed: int) -> Values:
    """Uniform in [0, 1]; 0 or 1 for integers and bool."""
    uniform = np.random.default_rng(seed).uniform(0, 1, shape)
    dtype = np.dtype(dtype)
    return round_to(uniform, dtype) if dtype in FLOATS else (uniform < 0.5).astype(dtype)
