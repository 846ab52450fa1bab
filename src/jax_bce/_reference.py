"""The whole operation in plain jnp: its definition, every platform's fallback, second derivatives.

One element with logit x and label y, from e = exp(-|x|) and c = (1 - y if x >= 0 else y), where the
label is smoothed by s, y <- y (1 - s) + s / 2:

    loss     = (1 - y) log(1 + exp(x)) + y log(1 + exp(-x)) = log1p(e) + c |x|
    gradient = (1 - y) sigmoid(x) - y sigmoid(-x)           = sign(x) (c - e / (1 + e))

Neither subtracts nearly equal numbers, and a coefficient 0 of an infinite |x| is selected, not
multiplied. `csrc/bce_math.h` evaluates the same two lines and carries their rounding errors along.
"""

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array


def arithmetic_dtype(logits_dtype: np.dtype) -> np.dtype:
    """float64 for float64 logits, else float32."""
    return np.dtype(np.float64 if logits_dtype == np.float64 else np.float32)


def _parts(logits: Array, labels: Array, smoothing: Array) -> tuple[Array, Array, Array]:
    """x, the coefficient c and e = exp(-|x|), in the arithmetic's type."""
    x = logits.astype(arithmetic_dtype(logits.dtype))
    y = labels.astype(x.dtype)
    c = jnp.where(x >= 0, 1 - y, y) * (1 - smoothing) + smoothing / 2
    return x, c, jnp.exp(-jnp.abs(x))


def element_loss(logits: Array, labels: Array, smoothing: Array) -> Array:
    """The loss of each element."""
    x, c, e = _parts(logits, labels, smoothing)
    return jnp.log1p(e) + jnp.where(c == 0, 0, jnp.abs(x)) * c


def element_gradient(logits: Array, labels: Array, smoothing: Array) -> Array:
    """The derivative of each element's loss with respect to its logit."""
    x, c, e = _parts(logits, labels, smoothing)
    return jnp.where(x >= 0, 1, -1) * (c - e / (1 + e))


def element_hessian(logits: Array) -> Array:
    """The second derivative, sigmoid(x) sigmoid(-x); smooth, so that it has a third."""
    x = logits.astype(arithmetic_dtype(logits.dtype))
    return jax.nn.sigmoid(x) * jax.nn.sigmoid(-x)


def sum_trailing(values: Array, reduced_rank: int) -> Array:
    """The sum over the last `reduced_rank` dimensions."""
    return jnp.sum(values, axis=tuple(range(values.ndim - reduced_rank, values.ndim)))


def reference(
    logits: Array,
    labels: Array,
    scale: Array,
    smoothing: Array,
    *,
    kind: str,
    reduced_rank: int,
    count: int,
    loss_dtype: np.dtype,
    gradient_dtype: np.dtype,
) -> list[Array]:
    """The primitive of `_primitive.py`, which documents the arguments."""
    results = []
    shape = jnp.broadcast_shapes(logits.shape, labels.shape, scale.shape, smoothing.shape)
    factor = scale * scale.dtype.type(1 / count)
    if kind != "grad":
        loss = jnp.broadcast_to(element_loss(logits, labels, smoothing), shape)
        loss = sum_trailing(loss, reduced_rank) * factor.reshape(
            factor.shape[: factor.ndim - reduced_rank] if reduced_rank else factor.shape
        )
        results.append(loss.astype(loss_dtype))
    if kind != "loss":
        gradient = element_gradient(logits, labels, smoothing) * factor
        results.append(jnp.broadcast_to(gradient, shape).astype(gradient_dtype))
    return results
