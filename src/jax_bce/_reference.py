"""The whole operation in plain jnp: its definition, the fallback on all platforms, derivatives.

An element has a logit x, a label y, smoothed by s, y <- y (1 - s) + s / 2, and a positive-class
weight q. With n = 1 - y, p = q y, e = exp(-|x|) and c = (n if x >= 0 else p):

    loss     = n log(1 + exp(x)) + p log(1 + exp(-x)) = (n + p) log1p(e) + c |x|
    gradient = n sigmoid(x) - p sigmoid(-x)           = sign(x) (c - (n + p) e / (1 + e))
    hessian  = (n + p) sigmoid(x) sigmoid(-x)

None of these subtracts nearly equal numbers, and if an infinite |x| has the coefficient 0, the
product is set to 0. `csrc/bce_math.h` evaluates the same lines and also tracks rounding errors.
"""

import functools
from collections.abc import Callable, Mapping
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array

# exp(80), and a few times that, is finite in float32.
_EXPONENT = 80
# exp(-_FAR) is 0, even in float64: beyond such a logit, powers of probabilities do not change.
_FAR = 2.0**20
# Multiplying by 2**_UP makes every subnormal number normal, in float32 and in float64.
_UP = 64
_LARGEST_BFLOAT16 = (2 - 2.0**-7) * 2.0**127
_Four = tuple[Array, Array, Array, Array]
# The exponential of this, or of any small fraction of it, is 0; 0 times this is 0.
_NOTHING = -1e9


def arithmetic_dtype(logits_dtype: np.dtype) -> np.dtype:
    """Returns float64 for float64 logits, else float32."""
    return np.dtype(np.float64 if logits_dtype == np.float64 else np.float32)


class Elements(NamedTuple):
    """The inputs of the formulas, in the arithmetic's dtype; None for options that are not used.

    Dropped elements are replaced by a harmless logit, a label of 0 and a weight of 0, so that their
    loss and derivatives are 0, whatever their values were.
    """

    logits: Array
    labels: Array  # smoothed: y
    complements: Array  # 1 - y
    pos_weight: Array | None
    weight: Array | None
    keep: Array | None

    def select(self, values: Array, otherwise: float = 0) -> Array:
        """The values, with those of dropped elements replaced by `otherwise`."""
        return values if self.keep is None else jnp.where(self.keep, values, otherwise)

    def weighted(self, values: Array) -> Array:
        """The values times the weight."""
        return values if self.weight is None else times(self.weight, values)


def elements(
    logits: Array,
    labels: Array,
    smoothing: Array,
    modifiers: Mapping[str, Array],
    absent: float = 0,
) -> Elements:
    """The elements of operands of one rank; `absent` replaces the logits of dropped elements."""
    wide = arithmetic_dtype(logits.dtype)
    keep = modifiers.get("where")
    if "ignore_label" in modifiers:
        differs = ~_same(labels, modifiers["ignore_label"])
        keep = differs if keep is None else keep & differs

    def select(values: Array, otherwise: float) -> Array:
        values = values.astype(wide)
        return values if keep is None else jnp.where(keep, values, otherwise)

    factors = [select(modifiers[w], 0) for w in ("weight", "sample_weight") if w in modifiers]
    product = factors[0] * factors[1] if len(factors) == 2 else factors[0] if factors else None
    if keep is not None and product is None:
        product = keep.astype(wide)
    y = select(labels, 0)
    return Elements(
        select(logits, absent),
        y * (1 - smoothing) + smoothing / 2,
        (1 - y) * (1 - smoothing) + smoothing / 2,
        select(modifiers["pos_weight"], 1) if "pos_weight" in modifiers else None,
        product,
        keep,
    )


def _same(labels: Array, ignored: Array) -> Array:
    """Whether labels equal a number; NaN never does. Compares bits: XLA treats subnormals as 0."""
    if not jnp.issubdtype(labels.dtype, jnp.floating):
        return labels == ignored
    bits = np.dtype(f"u{labels.dtype.itemsize}")
    a, b = (jax.lax.bitcast_convert_type(number, bits) for number in (labels, ignored))
    return ((a == b) & (ignored == ignored)) | ((a | b) << 1 == 0)


@jax.custom_jvp
def times(coefficient: Array, values: Array) -> Array:
    """The product; 0 if the coefficient is 0 and the value is infinite."""
    return coefficient * jnp.where((coefficient == 0) & jnp.isinf(values), 0, values)


@times.defjvp
def _times_jvp(primals: tuple[Array, Array], tangents: tuple[Array, Array]) -> tuple[Array, Array]:
    """Ignores infinite values: a coefficient that is multiplied by one is at its limit."""
    (coefficient, values), (coefficient_dot, values_dot) = primals, tangents
    finite = jnp.where(jnp.isinf(values), 0, values)
    return times(coefficient, values), coefficient_dot * finite + coefficient * values_dot


def magnitude(x: Array) -> Array:
    """|x| with derivative 1 at 0, so that functions that are smooth there get the right one."""
    return jnp.where(x >= 0, x, -x)


def softplus(x: Array) -> Array:
    """log(1 + exp(x))."""
    return jnp.log1p(jnp.exp(-magnitude(x))) + jnp.where(x >= 0, x, 0)


def sigmoid(x: Array) -> Array:
    """1 / (1 + exp(-x)). Unlike for JAX's, the derivative is not 0 if the value rounds to 1."""
    e = jnp.exp(-magnitude(x))
    return jnp.where(x >= 0, 1, e) / (1 + e)


def _positive(y: Array, pos_weight: Array) -> Array:
    """q y, which is 0 for a label of 0, even if q is infinite or NaN."""
    return y * jnp.where((y == 0) & ~jnp.isfinite(pos_weight), 0, pos_weight)


def _coefficients(element: Elements) -> tuple[Array, Array | float]:
    """The c and n + p of the formulas."""
    n, p = element.complements, element.labels
    if element.pos_weight is None:
        return jnp.where(element.logits >= 0, n, p), 1.0
    p = _positive(p, element.pos_weight)
    return jnp.where(element.logits >= 0, n, p), n + p


def element_loss(element: Elements) -> Array:
    """The loss of each element, without its weight."""
    c, total = _coefficients(element)
    a = magnitude(element.logits)
    return total * jnp.log1p(jnp.exp(-a)) + times(c, a)


def element_gradient(element: Elements) -> Array:
    """The derivative of each element's loss with respect to its logit."""
    c, total = _coefficients(element)
    e = jnp.exp(-magnitude(element.logits))
    return jnp.where(element.logits >= 0, 1, -1) * (c - total * (e / (1 + e)))


def element_hessian(element: Elements) -> Array:
    """The second derivative, in a smooth form that has a third."""
    _, total = _coefficients(element)
    return total * (jax.nn.sigmoid(element.logits) * jax.nn.sigmoid(-element.logits))


def floored_hessian(element: Elements, floor: Array) -> Array:
    """The second derivative, at least the floor."""
    return jnp.maximum(element_hessian(element), floor.astype(element.logits.dtype))


def by_label(element: Elements) -> tuple[Array, Array]:
    """The derivatives of loss and gradient with respect to the smoothed label."""
    x, q = element.logits, element.pos_weight
    if q is None:
        return -x, jnp.full_like(x, -1)
    return (
        times(q, softplus(-x)) - softplus(x),
        -(q * sigmoid(-x) + sigmoid(x)),
    )


def by_pos_weight(element: Elements) -> tuple[Array, Array]:
    """The derivatives of loss and gradient with respect to the weight of the positive class."""
    x, y = element.logits, element.labels
    return times(y, softplus(-x)), -y * sigmoid(-x)


def _bounded(x: Array) -> Array:
    """The logit, bounded for use in a power: a larger one would overflow in a derivative."""
    return jnp.where(jnp.abs(x) < _FAR, x, jnp.copysign(_FAR, x))


def _above(x: Array, clip: Array) -> tuple[Array, Array]:
    """Whether sigmoid(x) is above clip, and by how much, at least 0."""
    p = sigmoid(x)
    return p > clip, jnp.where(p > clip, p - clip, 0)


@jax.custom_jvp
def _mixture(x: Array, y: Array, n: Array, clip: Array) -> _Four:
    """log b, sigmoid(-x) / b, p / b and 1 / b of b = y sigmoid(-x) + n p.

    Here p = max(sigmoid(x) - clip, 0). The derivatives of the four are products of the four: 1 /
    b^2, which may overflow when they do not, is never formed. Without a clip, b is (c + d e) / (1 +
    e), where c = n and d = y if x >= 0, and vice versa otherwise. If c = 0, d is 1, and there is no
    division by e, which may be 0. Infinite values there are limited to exp(80).
    """
    positive, a = x >= 0, magnitude(x)
    e = jnp.exp(-a)
    c, d = jnp.where(positive, n, y), jnp.where(positive, y, n)
    none = c == 0
    scaled = jnp.where(none, 1, c + d * e)
    logarithm = jnp.where(none, -a, jnp.log(scaled)) - jnp.log1p(e)
    small = jnp.where(none, 1, e / scaled)
    large = jnp.where(none, jnp.exp(jnp.minimum(a, _EXPONENT)), 1 / scaled)
    negative_share = jnp.where(positive, small, large)
    positive_share = jnp.where(positive, large, small)
    inverse = small + large

    _, above = _above(x, clip)
    clipped = y * sigmoid(-x) + n * above
    some = clipped > 0
    divisor = jnp.where(some, clipped, 1)
    formed = (clip == 0) | (n == 0)
    inverse = jnp.where(formed, inverse, jnp.where(some, 1 / divisor, 0))
    return (
        jnp.where(formed, logarithm, jnp.where(some, jnp.log(divisor), _NOTHING)),
        jnp.where(formed, negative_share, sigmoid(-x) * inverse),
        jnp.where(clip == 0, positive_share, above * inverse),
        inverse,
    )


@_mixture.defjvp
def _mixture_jvp(primals: _Four, tangents: _Four) -> tuple[_Four, _Four]:
    (x, y, n, clip), (x_dot, y_dot, n_dot, clip_dot) = primals, tangents
    results = _, by_y, by_n, inverse = _mixture(*primals)
    p, m = sigmoid(x), sigmoid(-x)
    above, _ = _above(x, clip)
    # p m / b, with m = 1 - p, computed from the share that is not limited.
    ratio = jnp.where((x >= 0) | (clip != 0), p * by_y, m * by_n)
    of_p = jnp.where(above, ratio, 0) * x_dot - jnp.where(above, inverse, 0) * clip_dot
    slope = jnp.where(above, n - y, -y) * ratio
    log_dot = slope * x_dot + by_y * y_dot + by_n * n_dot
    log_dot -= jnp.where(above, n * inverse, 0) * clip_dot
    return results, (
        log_dot,
        -by_y * (p * x_dot + log_dot),
        of_p - by_n * log_dot,
        -inverse * log_dot,
    )


class Focus(NamedTuple):
    """The numbers of a focal or asymmetric loss, in the arithmetic's dtype.

    If the power is a constant, it has no derivative.
    """

    gamma: Array  # of label 0; and of label 1, unless there is gamma_pos
    gamma_pos: Array | None
    clip: Array | None
    alpha: Array | None
    constant_power: bool


def focus_of(modifiers: Mapping[str, Array], dtype: np.dtype, constant_power: bool) -> Focus | None:
    """The numbers among a call's modifiers, or None if its loss is the cross-entropy."""
    given = {n: modifiers[n].astype(dtype) for n in Focus._fields if n in modifiers}
    if "gamma" not in given:
        return None
    gamma_pos, clip, alpha = (given.get(name) for name in ("gamma_pos", "clip", "alpha"))
    return Focus(given["gamma"], gamma_pos, clip, alpha, constant_power)


def focal_loss(element: Elements, focus: Focus) -> Array:
    """The cross-entropy times b^gamma and, with an alpha, times the weight of the label's class.

    Here b = y (1 - p) + (1 - y) p_m with p = sigmoid(x) and p_m = max(p - clip, 0), the
    cross-entropy is -y log(p) - (1 - y) log(1 - p_m), and gamma = y gamma_pos + (1 - y) gamma.
    Logarithms of numbers that may be close to 0 are computed from the logit: log(p) =
    -softplus(-x), and, for p_m near 1, log(1 - p_m) = log(sigmoid(-x) + clip).
    """
    x, y, n = element.logits, element.labels, element.complements
    gamma, gamma_pos, clip, alpha, constant_power = focus
    if clip is None:
        clip = jnp.zeros_like(gamma)
        cross_entropy = element_loss(element)
    else:
        _, shifted = _above(x, clip)
        floored, *_ = _mixture(_bounded(x), 1 + clip, clip, jnp.zeros_like(clip))
        near = shifted < 0.5
        unlikely = jnp.where(near, -jnp.log1p(-jnp.where(near, shifted, 0)), -floored)
        unlikely = jnp.where(clip == 0, softplus(x), unlikely)
        cross_entropy = times(y, softplus(-x)) + times(n, unlikely)

    logarithm, *_ = _mixture(_bounded(x), y, n, clip)
    exponent = gamma if gamma_pos is None else y * gamma_pos + n * gamma
    weight = jnp.exp(exponent * logarithm)
    if constant_power:
        weight = jax.lax.stop_gradient(weight)
    if alpha is not None:
        weight *= alpha * y + (1 - alpha) * n
    return times(weight, cross_entropy)


def focal_gradient(element: Elements, focus: Focus) -> Array:
    """The derivative of each element's focal loss with respect to its logit."""

    def loss_at(x: Array) -> Array:
        return focal_loss(element._replace(logits=x), focus)

    gradient: Array
    _, gradient = jax.jvp(loss_at, (element.logits,), (jnp.ones_like(element.logits),))
    return gradient


@functools.partial(jax.custom_jvp, nondiff_argnums=(1,))
def scaled_up(x: Array, exponent: int) -> Array:
    """x times 2^exponent, even for subnormal x, which XLA's arithmetic on a CPU treats as 0."""
    info = np.finfo(x.dtype)
    unsigned = np.dtype(f"u{x.dtype.itemsize}").type
    bits = jax.lax.bitcast_convert_type(x, unsigned)
    mantissa = bits & unsigned(2 ** (info.bits - 1) - 1)
    subnormal = mantissa.astype(x.dtype) * x.dtype.type(
        2.0 ** (info.minexp - info.nmant + exponent)
    )
    subnormal = jnp.where(bits == mantissa, subnormal, -subnormal)
    factor = x.dtype.type(2.0**exponent)
    return jnp.where(mantissa < unsigned(2**info.nmant), subnormal, x * factor)


@scaled_up.defjvp
def _scaled_up_jvp(
    exponent: int, primals: tuple[Array], tangents: tuple[Array]
) -> tuple[Array, Array]:
    (x,), (x_dot,) = primals, tangents
    return scaled_up(x, exponent), x_dot * x.dtype.type(2.0**exponent)


def two_sum(a: Array, b: Array) -> tuple[Array, Array]:
    """a + b and its rounding error (Knuth)."""
    total = a + b
    b_part = total - a
    return total, (a - (total - b_part)) + (b - b_part)


@functools.partial(jax.custom_jvp, nondiff_argnums=(0, 1))
def _log_of_probability(complement: bool, order: int, p: Array, shift: Array) -> Array:
    """log(p + shift), or log(1 - p + shift), or its derivative of that order in the shift.

    Neither sum is rounded before its logarithm is taken. If p is outside [0, 1], the result is NaN.
    The derivatives are at most the largest bfloat16 number (float64 number in float64): they are
    finite, so that a coefficient of 0 drops them.
    """
    wide = p.dtype
    outside = ~((scaled_up(p, _UP) >= 0) & (p <= 1)) | jnp.isnan(shift)
    # No constants from here on: XLA would reorder their sums, which loses the rounding errors.
    one, p, shift = (jnp.where(outside, np.nan, v).astype(wide) for v in (1, p, shift))
    term, low = two_sum(one, -p) if complement else (p, one - one)
    # Sums that may be subnormal are computed, and inverted, 2^64 times as large.
    small = jnp.maximum(term, shift) < 2.0**-_UP
    unit = jnp.where(small, wide.type(2.0**_UP), one)
    total, rest = two_sum(*(jnp.where(small, scaled_up(v, _UP), v) for v in (term, shift)))
    if order == 0:
        lost = (low + rest) / jnp.where(total == 0, 1, total)
        return jnp.log(total) - jnp.log(unit) + lost
    largest = np.finfo(wide).max if wide == np.float64 else wide.type(_LARGEST_BFLOAT16)
    inverse = jnp.minimum(unit / total, largest)
    size = inverse
    for k in range(1, order):
        size = jnp.minimum(size * (k * inverse), largest)
    return size if order % 2 else -size


@_log_of_probability.defjvp
def _log_of_probability_jvp(
    complement: bool, order: int, primals: tuple[Array, Array], tangents: tuple[Array, Array]
) -> tuple[Array, Array]:
    p_dot, shift_dot = tangents
    slope = _log_of_probability(complement, order + 1, *primals)
    value = _log_of_probability(complement, order, *primals)
    return value, slope * (shift_dot - p_dot if complement else shift_dot + p_dot)


def _clip(p: Array, low: Array, high: Array) -> Array:
    """p, clipped to [low, high].

    On a CPU, a minimum or maximum would flush subnormal numbers to 0, and XLA compiles a comparison
    of p that selects p to one. So scaled numbers are compared instead.
    """
    up, up_low, up_high = (scaled_up(number, _UP) for number in (p, low, high))
    return jnp.where(up < up_low, low, jnp.where(up > up_high, high, p))


def loss_of_probabilities(element: Elements, epsilon: Array | None, log_epsilon: Array) -> Array:
    """-q y log(p + log_epsilon) - (1 - y) log(1 - p + log_epsilon) of probabilities p.

    They take the place of the logits, and are first clipped to [epsilon, 1 - epsilon].
    """
    p, y, n = element.logits, element.labels, element.complements
    if epsilon is not None:
        p = _clip(p, epsilon, 1 - epsilon)
    likely = -_log_of_probability(False, 0, p, log_epsilon)
    unlikely = -_log_of_probability(True, 0, p, log_epsilon)
    if element.pos_weight is not None:
        y = _positive(y, element.pos_weight)
    return times(y, likely) + times(n, unlikely)


def sum_trailing(values: Array, reduced_rank: int) -> Array:
    """The sum over the last `reduced_rank` dimensions."""
    return jnp.sum(values, axis=tuple(range(values.ndim - reduced_rank, values.ndim)))


def divide(
    values: Array, scale: Array, count: int, divisor: Array | None, reduced_rank: int = 0
) -> Array:
    """values * scale / count / divisor, in the shape of values; 0 if scale or divisor is 0."""

    def of_result(number: Array) -> Array:
        return number.reshape(number.shape[: number.ndim - reduced_rank])

    factor = of_result(scale * scale.dtype.type(1 / count))
    values = values * factor
    drops = factor == 0
    if divisor is not None:
        by = of_result(divisor)
        drops = drops | (by == 0)
        # XLA would multiply by the reciprocal of a constant, and flush it to 0 for a large one.
        # This divisor is not constant.
        by = jnp.where(jnp.isnan(values), np.nan, jnp.where(by == 0, 1, by))
        values = values / by
    return jnp.where(drops, 0, values)


def sum_of_weights(
    element: Elements, shape: tuple[int, ...], reduced_rank: int, count: int
) -> list[Array]:
    """The sum of the weights of elements not dropped, divided by count, and its rounding error."""
    weight = jnp.ones((), element.logits.dtype) if element.weight is None else element.weight
    with jax.enable_x64(True):
        weight = jnp.broadcast_to(weight, shape).astype(np.float64)
        return in_two_parts(sum_trailing(weight, reduced_rank) / count, element.logits.dtype)


def in_two_parts(number: Array, dtype: np.dtype) -> list[Array]:
    """A number of a wider dtype: its rounded value, and the rounding error."""
    high = number.astype(dtype)
    low = (number - high.astype(number.dtype)).astype(dtype)
    low = jnp.where(jnp.isfinite(high), low, 0)
    if number.dtype == np.float64 and dtype == np.float32:
        # XLA would flush float32 subnormals: use their bits, which are the multiple of 2^-149.
        multiple = jnp.rint(jnp.abs(number) * 2.0**149)
        tiny = multiple < 2**23
        bits = jnp.where(tiny, multiple, 0).astype(np.uint32)
        bits = jnp.where(number < 0, bits | np.uint32(1 << 31), bits)
        high = jnp.where(tiny, jax.lax.bitcast_convert_type(bits, dtype), high)
        low = jnp.where(tiny, 0, low)
    return [high, low]


def formulas(
    focus: Focus | None,
) -> tuple[Callable[[Elements], Array], Callable[[Elements], Array]]:
    """The loss of each element and its derivative, without weights."""
    if focus is None:
        return element_loss, element_gradient
    return functools.partial(focal_loss, focus=focus), functools.partial(
        focal_gradient, focus=focus
    )


def reference(
    logits: Array,
    labels: Array,
    scale: Array,
    smoothing: Array,
    *more: Array,
    modifiers: tuple[str, ...],
    kind: str,
    reduced_rank: int,
    count: int,
    constant_power: bool,
    loss_dtype: np.dtype,
    gradient_dtype: np.dtype,
) -> list[Array]:
    """The primitive of `_primitive.py`, which documents the arguments."""
    operands = (logits, labels, scale, smoothing, *more)
    shape = jnp.broadcast_shapes(*(operand.shape for operand in operands))
    given = dict(zip(modifiers, more, strict=True))
    element = elements(logits, labels, smoothing, given)
    if kind == "total":
        return sum_of_weights(element, shape, reduced_rank, count)
    focus = focus_of(given, element.logits.dtype, constant_power)
    loss_of, gradient_of = formulas(focus)
    if kind == "hess_and_grad":
        loss_of = functools.partial(floored_hessian, floor=given["hess_floor"])
    divisor = given.get("divisor")
    results = []
    if kind != "grad":
        loss = jnp.broadcast_to(element.weighted(loss_of(element)), shape)
        loss = divide(sum_trailing(loss, reduced_rank), scale, count, divisor, reduced_rank)
        results.append(loss.astype(loss_dtype))
    if kind != "loss":
        gradient = divide(element.weighted(gradient_of(element)), scale, count, divisor)
        gradient = element.select(gradient)
        results.append(jnp.broadcast_to(gradient, shape).astype(gradient_dtype))
    return results
