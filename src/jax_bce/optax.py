"""The losses of optax that this package has too, under optax's names, which is not imported here.

They broadcast where the package's own functions raise: that is what optax's callers rely on.
"""

from __future__ import annotations  # help() shows names, not the Union behind them

import jax.numpy as jnp
from jax import Array
from jax.typing import ArrayLike

from jax_bce._loss import loss
from jax_bce._operands import AnyArray, operand
from jax_bce._relatives import focal_loss


def sigmoid_binary_cross_entropy(logits: ArrayLike, labels: ArrayLike) -> Array:
    r"""Binary cross-entropy of each element, called as optax's function of this name.

    .. math:: l = y \log(1 + e^{-x}) + (1 - y) \log(1 + e^{x})

    Differs from optax on purpose: no result is flushed to zero or NaN (at (-90, 0) the loss is
    8.19e-40, optax's 0; at (inf, 1) it is 0, optax's NaN), and labels are read as they are stored,
    where optax rounds them to the logits' dtype first.

    Args:
      logits: float16, bfloat16, float32 or float64, any shape.
      labels: any dtype that `jax_bce.loss` takes, any shape that broadcasts with the logits'. Mind
        that (n, 1) with (n,) is n by n elements.

    Returns:
      The losses, of the broadcast shape, in the logits' dtype.

    Derivatives:
      As `jax_bce.loss` has them, with respect to logits and float labels.

    Raises:
      TypeError: a dtype that `jax_bce.loss` does not take; optax raises ValueError for logits.
      ValueError: shapes that do not broadcast.

    Source:
      ``optax.sigmoid_binary_cross_entropy`` of optax 0.2.8.

    Example:
      >>> import jax.numpy as jnp
      >>> from jax_bce.optax import sigmoid_binary_cross_entropy
      >>> print(sigmoid_binary_cross_entropy(jnp.array([[-90.0, 0.0], [2.0, jnp.inf]]), [0, 1]))
      [[8.194009e-40 6.931472e-01]
       [2.126928e+00 0.000000e+00]]
    """
    return loss(*_broadcast(logits, labels), reduction="none")


def sigmoid_focal_loss(
    logits: ArrayLike,
    labels: ArrayLike,
    *,
    alpha: ArrayLike | None = None,
    gamma: ArrayLike = 2.0,
) -> Array:
    r"""Focal loss of each element, called as optax's function of this name.

    .. math:: l = \alpha_t (1 - p_t)^\gamma \left(y \log(1 + e^{-x})
        + (1 - y) \log(1 + e^{x})\right)

    with :math:`p_t = y \sigma(x) + (1 - y) \sigma(-x)` and
    :math:`\alpha_t = \alpha y + (1 - \alpha)(1 - y)`.

    Differs from optax on purpose: at an infinite logit optax's loss or gradient is NaN, here both
    have their limits; labels are read as they are stored.

    Args:
      logits: as for `sigmoid_binary_cross_entropy`.
      labels: as for `sigmoid_binary_cross_entropy`.
      alpha: the weight of the positive class; None weights neither.
      gamma: the exponent; 0 is `sigmoid_binary_cross_entropy`.

    Returns:
      The losses, of the broadcast shape, in the logits' dtype.

    Derivatives:
      As `jax_bce.focal_loss` has them.

    Raises:
      TypeError, ValueError: as `sigmoid_binary_cross_entropy` does.

    Source:
      ``optax.sigmoid_focal_loss`` of optax 0.2.8.

    Example:
      >>> import jax.numpy as jnp
      >>> from jax_bce.optax import sigmoid_focal_loss
      >>> losses = sigmoid_focal_loss(jnp.array([0.0, 2.0]), jnp.array([1, 0]), alpha=0.25)
      >>> print(losses.round(4))
      [0.0433 1.2376]
    """
    operands = _broadcast(logits, labels)
    return focal_loss(*operands, alpha=alpha, gamma=gamma, reduction="none")


def _broadcast(logits: ArrayLike, labels: ArrayLike) -> tuple[AnyArray, AnyArray]:
    """Of one shape, but for one label for all, which is read in place."""
    x, y = operand("logits", logits), operand("labels", labels)
    if y.ndim and x.shape != y.shape:
        x, y = jnp.broadcast_arrays(x, y)
    return x, y
