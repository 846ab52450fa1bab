"""The whole operation in plain jnp: its definition, every platform's fallback, derivatives.

One element has a logit x, a label y, smoothed by s, y <- y (1 - s) + s / 2, and a weight q of the
positive class. With n = 1 - y, p = q y, e = exp(-|x|) and c = (n if x >= 0 else p):

    loss     = n log(1 + exp(x)) + p log(1 + exp(-x)) = (n + p) log1p(e) + c |x|
    gradient = n sigmoid(x) - p sigmoid(-x)           = sign(x) (c - (n + p) e / (1 + e))
    hessian  = (n + p) sigmoid(x) sigmoid(-x)

None subtracts nearly equal numbers, and a coefficient 0 of an infinite |x| is selected, not
multiplied. `csrc/bce_math.h` evaluates the same lines and carries their rounding errors along.
"""

from collections.abc import Mapping
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array

# exp of it, and a few times that, is finite in float32.
_EXPONENT = 80
# exp of it, and of any small part of it, is 0; 0 times it is 0.
_NOTHING = -1e9


def arithmetic_dtype(logits_dtype: np.dtype) -> np.dtype:
    """float64 for float64 logits, else float32."""
    return np.dtype(np.float64 if logits_dtype == np.float64 else np.float32)


class Elements(NamedTuple):
    """What enters the formulas, in the arithmetic's type; None where there is nothing to do.

    In the place of an element that does not exist stand a harmless logit, a label of 0 and a weight
    of 0: whatever was there, its loss and its derivatives are 0.
    """

    logits: Array
    labels: Array  # smoothed: y
    complements: Array  # 1 - y
    pos_weight: Array | None
    weight: Array | None
    keep: Array | None

    def select(self, values: Array, otherwise: float = 0) -> Array:
        """The values of elements that exist."""
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
    """The elements of operands that have one rank; `absent` is the logit of those that are not."""
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
    """Whether labels are a number that is not NaN; by their bits, as XLA reads subnormals as 0."""
    if not jnp.issubdtype(labels.dtype, jnp.floating):
        return labels == ignored
    bits = np.dtype(f"u{labels.dtype.itemsize}")
    a, b = (jax.lax.bitcast_convert_type(number, bits) for number in (labels, ignored))
    return ((a == b) & (ignored == ignored)) | ((a | b) << 1 == 0)


@jax.custom_jvp
def times(coefficient: Array, values: Array) -> Array:
    """The product, in which a coefficient of 0 wins over an infinite value."""
    return coefficient * jnp.where((coefficient == 0) & jnp.isinf(values), 0, values)


@times.defjvp
def _times_jvp(primals: tuple[Array, Array], tangents: tuple[Array, Array]) -> tuple[Array, Array]:
    """An infinite value has no part in it, as the coefficient that meets one is at its limit."""
    (coefficient, values), (coefficient_dot, values_dot) = primals, tangents
    finite = jnp.where(jnp.isinf(values), 0, values)
    return times(coefficient, values), coefficient_dot * finite + coefficient * values_dot


def magnitude(x: Array) -> Array:
    """|x|, whose derivative at 0 is 1, so that what is smooth there has the right ones."""
    return jnp.where(x >= 0, x, -x)


def softplus(x: Array) -> Array:
    """log(1 + exp(x))."""
    return jnp.log1p(jnp.exp(-magnitude(x))) + jnp.where(x >= 0, x, 0)


def sigmoid(x: Array) -> Array:
    """1 / (1 + exp(-x)), whose derivative, unlike JAX's, does not vanish where it rounds to 1."""
    e = jnp.exp(-magnitude(x))
    return jnp.where(x >= 0, 1, e) / (1 + e)


def _positive(y: Array, pos_weight: Array) -> Array:
    """q y; a label of 0 has no part that q, whatever it is, could multiply."""
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
    """The second derivative; smooth, so that it has a third."""
    _, total = _coefficients(element)
    return total * (jax.nn.sigmoid(element.logits) * jax.nn.sigmoid(-element.logits))


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


def focal_loss(element: Elements, alpha: Array | None, gamma: Array) -> Array:
    """alpha_t (1 - p_t)^gamma times the loss, where p_t is the probability of the label.

    The power is that of log(1 - p_t) = log(y sigmoid(-x) + (1 - y) sigmoid(x)), formed without
    either sigmoid: with c as above it is log(c + (1 - c) e) - log1p(e), of which -|x| - log1p(e) is
    left where c = 0, also where e vanishes.
    """
    x, y, n = element.logits, element.labels, element.complements
    c = jnp.where(x >= 0, n, y)
    a = jnp.minimum(magnitude(x), np.finfo(x.dtype).max)
    e = jnp.exp(-a)
    # Of c = 0 the value, and the derivative in c as far as it is finite.
    near = -a + c * jnp.expm1(jnp.minimum(a, _EXPONENT))
    logarithm = jnp.where(c == 0, near, jnp.log(jnp.where(c == 0, 1, c + (1 - c) * e)))
    weight = jnp.exp(gamma * (logarithm - jnp.log1p(e)))
    if alpha is not None:
        weight *= alpha * y + (1 - alpha) * n
    return times(weight, element_loss(element))


def asymmetric_loss(
    element: Elements, gamma_neg: Array, gamma_pos: Array, clip: Array, stop_gradient_weight: bool
) -> Array:
    """(1 - p_t)^gamma (-y log(p) - (1 - y) log(1 - p_m)), p = sigmoid(x), p_m = max(p - clip, 0).

    Here 1 - p_t = y (1 - p) + (1 - y) p_m and gamma = y gamma_pos + (1 - y) gamma_neg. Logarithms
    of numbers that may vanish are formed from the logit: log(p) = -softplus(-x).
    """
    x, y, n = element.logits, element.labels, element.complements
    unclipped = clip == 0
    shifted = jnp.maximum(sigmoid(x) - clip, 0)
    unlikely = jnp.where(unclipped, softplus(x), -jnp.log1p(-jnp.where(unclipped, 0, shifted)))
    cross_entropy = times(y, softplus(-x)) + times(n, unlikely)

    mixed = y * sigmoid(-x) + n * shifted
    positive, negative = y == 1, (y == 0) & unclipped
    formed = positive | negative | (mixed == 0)
    logarithm = jnp.where(formed, _NOTHING, jnp.log(jnp.where(formed, 1, mixed)))
    # Of these two the value, and the derivative in the label as far as it is finite.
    by_n = shifted * (1 + jnp.exp(jnp.minimum(x, _EXPONENT))) - 1
    logarithm = jnp.where(positive, n * by_n - softplus(x), logarithm)
    by_y = jnp.expm1(jnp.minimum(-x, _EXPONENT))
    logarithm = jnp.where(negative, y * by_y - softplus(-x), logarithm)
    power = (y * gamma_pos + n * gamma_neg) * jnp.maximum(logarithm, np.finfo(x.dtype).min)
    weight = jnp.exp(power)
    if stop_gradient_weight:
        weight = jax.lax.stop_gradient(weight)
    return times(weight, cross_entropy)


def loss_of_probabilities(element: Elements, epsilon: Array | None, log_epsilon: Array) -> Array:
    """-q y log(p + log_epsilon) - (1 - y) log(1 - p + log_epsilon) of probabilities p.

    They stand in the logits' place, and are clipped to [epsilon, 1 - epsilon] first.
    """
    p, y, n = element.logits, element.labels, element.complements
    if epsilon is not None:
        p = jnp.clip(p, epsilon, 1 - epsilon)
    # A logarithm that a coefficient of 0 drops has no derivative to speak of either.
    likely = -jnp.log(jnp.where((y == 0) & (p <= 0), 1, p) + log_epsilon)
    unlikely = -jnp.log1p(log_epsilon - jnp.where((n == 0) & (p >= 1), 0, p))
    if element.pos_weight is not None:
        y = _positive(y, element.pos_weight)
    return times(y, likely) + times(n, unlikely)


def sum_trailing(values: Array, reduced_rank: int) -> Array:
    """The sum over the last `reduced_rank` dimensions."""
    return jnp.sum(values, axis=tuple(range(values.ndim - reduced_rank, values.ndim)))


def divide(
    values: Array, scale: Array, count: int, divisor: Array | None, reduced_rank: int = 0
) -> Array:
    """scale / count / divisor times values, without the last dimensions of both; 0 where one is."""

    def of_result(number: Array) -> Array:
        return number.reshape(number.shape[: number.ndim - reduced_rank])

    factor = of_result(scale * scale.dtype.type(1 / count))
    values = values * factor
    drops = factor == 0
    if divisor is not None:
        by = of_result(divisor)
        drops = drops | (by == 0)
        values = values / jnp.where(by == 0, 1, by)
    return jnp.where(drops, 0, values)


def sum_of_weights(
    element: Elements, shape: tuple[int, ...], reduced_rank: int, count: int
) -> list[Array]:
    """The sum of the weights of what exists, by count, and what its rounding lost."""
    weight = jnp.ones((), element.logits.dtype) if element.weight is None else element.weight
    with jax.enable_x64(True):
        weight = jnp.broadcast_to(weight, shape).astype(np.float64)
        return in_two_parts(sum_trailing(weight, reduced_rank) / count, element.logits.dtype)


def in_two_parts(number: Array, dtype: np.dtype) -> list[Array]:
    """A number of a wider dtype, rounded, and what that lost."""
    high = number.astype(dtype)
    low = (number - high.astype(number.dtype)).astype(dtype)
    low = jnp.where(jnp.isfinite(high), low, 0)
    if number.dtype == np.float64 and dtype == np.float32:
        # XLA would flush what is subnormal in float32: its bits are how many times 2^-149 it is.
        multiple = jnp.rint(jnp.abs(number) * 2.0**149)
        tiny = multiple < 2**23
        bits = jnp.where(tiny, multiple, 0).astype(np.uint32)
        bits = jnp.where(number < 0, bits | np.uint32(1 << 31), bits)
        high = jnp.where(tiny, jax.lax.bitcast_convert_type(bits, dtype), high)
        low = jnp.where(tiny, 0, low)
    return [high, low]


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
    divisor = given.get("divisor")
    results = []
    if kind != "grad":
        loss = jnp.broadcast_to(element.weighted(element_loss(element)), shape)
        loss = divide(sum_trailing(loss, reduced_rank), scale, count, divisor, reduced_rank)
        results.append(loss.astype(loss_dtype))
    if kind != "loss":
        gradient = divide(element.weighted(element_gradient(element)), scale, count, divisor)
        gradient = element.select(gradient)
        results.append(jnp.broadcast_to(gradient, shape).astype(gradient_dtype))
    return results
