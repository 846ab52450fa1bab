"""The public functions: each one call of the primitive."""

from __future__ import annotations  # help() shows names, not the Union behind them

from collections.abc import Sequence
from typing import Unpack, get_args

from jax import Array
from jax.typing import ArrayLike, DTypeLike

from jax_bce._arguments import (
    Implementation,
    Keywords,
    Reduction,
    Residuals,
    checked,
    one_of,
    only_known,
    shows_keywords,
)
from jax_bce._derivatives import recompute
from jax_bce._evaluate import Call, evaluate
from jax_bce._primitive import bce, spread_like


def loss(
    logits: ArrayLike,
    labels: ArrayLike,
    *,
    weight: ArrayLike | None = None,
    sample_weight: ArrayLike | None = None,
    pos_weight: ArrayLike | None = None,
    label_smoothing: ArrayLike = 0.0,
    where: ArrayLike | None = None,
    ignore_label: ArrayLike | None = None,
    reduction: Reduction = "mean",
    axis: int | Sequence[int] | None = None,
    normalizer: ArrayLike | None = None,
    dtype: DTypeLike | None = None,
    residuals: Residuals = "gradient",
    implementation: Implementation | None = None,
) -> Array:
    r"""Binary cross-entropy between labels and the sigmoid of logits.

    For a logit :math:`x`, a label :math:`y` and a weight :math:`q` of the positive class, each
    element is

    .. math:: l = w \left(q y \log(1 + e^{-x}) + (1 - y) \log(1 + e^{x})\right),

    with :math:`q = w = 1` the negative log-likelihood in nats of a Bernoulli variable with
    probability :math:`\sigma(x) = 1 / (1 + e^{-x})`. Pass the raw scores of the model: a sigmoid in
    front of this function loses what it computes. For Keras's ``compile``, which passes the labels
    first, there is `jax_bce.keras`: arguments that are swapped show as an accuracy near 0.5 and a
    loss that falls far below 0.

    In this order: elements that `where` or ignore_label drops do not exist; labels are smoothed;
    elements are evaluated, weighted, summed in float32 or wider, divided, and rounded once.

    Args:
      logits: float16, bfloat16, float32 or float64, any shape.
      labels: probabilities of the positive class, of the logits' shape or a scalar: any of the
        logits' dtypes (not necessarily the same), bool, int8, uint8, int16, int32 or int64. Read as
        stored, and rounded to float32 unless the logits are float64: 1 - 1e-9 is 1 beside float32
        logits, and its 1 - y is 0. Integers other than 0 and 1 are taken at their value: labels of
        -1 and 1, or of 0 and 255, are not what you want, and `checking` finds them.
      weight: a factor of each element, aligned with the logits' last axes as NumPy broadcasts: a
        number, one for each class, of shape (C,), or of the logits' shape. It and the other weights
        may have any dtype that labels may, and are read as stored.
      sample_weight: another one, aligned with the first axes: of shape ``logits.shape[:k]``, with
        sizes of 1 behind it if you like.
      pos_weight: q, aligned as `weight` is. It is no factor of ``1 - y``, nor a part of any
        denominator.
      label_smoothing: s in [0, 1], which is checked unless it is traced; a label y becomes
        y (1 - s) + s / 2, before pos_weight, and neither that nor its complement is rounded before
        it is used.
      where: bool, aligned as sample_weight is, or with as many axes as the logits, of their size or
        1. What is False does not exist: whatever its logit, label and weights are, also NaN,
        nothing of them is seen, and their gradients are 0. (A model that made NaN of NaN multiplies
        those zeros by NaN: put numbers into what it reads.)
      ignore_label: elements whose label, before smoothing, is this number do not exist either.
      reduction: "mean", the sum divided by the number of elements that exist; "weighted_mean",
        divided by the sum of their weight and sample_weight; "sum"; or "none". A kernel adds up
        losses and weights in float64, XLA losses in float32. Where a denominator is 0, the loss and
        its gradient are 0.
      axis: the axes to reduce; None reduces all. Trailing axes are read in place, others are
        transposed first.
      normalizer: the denominator instead of the reduction's; a number, or one for each number of
        the result. Like weights, it has no range that is checked: a negative one negates.
      dtype: of the result. None: float32 (float64 for float64 logits) for a reduced loss, the
        logits' dtype for reduction="none".
      residuals: what is kept for the backward pass. "gradient": the gradient, computed together
        with the loss in one pass over memory. "recompute": nothing but the operands themselves; the
        backward pass reads them again, which allows reverse mode only, and once.
      implementation: None, the fastest that was measured (the SIMD kernel on a CPU, XLA elsewhere);
        "cpu", the SIMD kernel; "cuda", the GPU kernel; "xla", plain JAX, which is also what
        ``jax.export`` stores unless a kernel is named. Like reduction, axis, dtype and residuals,
        it is static under jit; everything else may be traced.

    Returns:
      The loss, of the logits' shape without the reduced axes.

    Derivatives:
      With respect to logits, float labels, weight, sample_weight, pos_weight, label_smoothing and
      normalizer, to any order, in forward and reverse mode, in their argument's dtype; each is
      computed only if it is asked for. ``dl/dx = (1 - y) sigmoid(x) - q y sigmoid(-x)``. float32
      losses and gradients are within 1 ulp of the exact value for every logit and labels 0 and 1:
      neither has a floor, neither is rounded to zero in the tails. An infinite logit gives the
      limit (0, or an infinite loss with a finite gradient), NaN gives NaN; a weight of 0 wins over
      an infinite loss. XLA's own arithmetic (``implementation="xla"``, and the product with the
      cotangent where a gradient is not compiled) flushes subnormal results to zero. There, on a
      CPU, weights and denominators below 1.2e-38 count as 0 as well; in a kernel they do not. A
      tangent of a dropped element is multiplied by 0: in forward mode it must be finite.

    Several devices:
      Operands that are spread over a mesh stay there: each device evaluates its own elements. XLA
      may gather them where a summed dimension is spread and does not divide evenly, or logits and
      labels are spread over one dimension in different ways, or more than 4,096 rows into parts of
      fewer than 32 elements. A weight that is neither one number nor one for each row of the last
      axis is first spread out to the logits' shape. In a shard_map the loss is that of the shard.

    Raises:
      TypeError: logits that are not floating-point, a `where` that is not bool, or another dtype
        that is not listed here.
      ValueError: labels, weights or a mask of a shape that does not fit, a label_smoothing outside
        its range, an ignore_label that the labels' dtype cannot hold, operands that are spread
        differently over an explicit mesh or lie in the host's memory, an unknown option, an axis
        out of range.
      RuntimeError: an implementation that is not available, with the reason and the remedy.

    Source:
      The derivation stands in ``csrc/bce_math.h``.

    Example:
      >>> import jax, jax.numpy as jnp, jax_bce
      >>> logits, labels = jnp.array([-20.0, 0.0, 20.0]), jnp.array([0, 1, 0])
      >>> print(jax_bce.loss(logits, labels, reduction="none"))
      [2.0611537e-09 6.9314718e-01 2.0000000e+01]
      >>> value, gradient = jax.value_and_grad(jax_bce.loss)(logits, labels)
      >>> print(value, gradient)
      6.8977156 [ 6.8705125e-10 -1.6666667e-01  3.3333334e-01]
      >>> print(jax_bce.loss(logits, labels, pos_weight=3, where=jnp.array([True, True, False])))
      1.0397208
    """
    one_of("residuals", residuals, get_args(Residuals))
    arguments = checked(
        logits,
        labels,
        weight=weight,
        sample_weight=sample_weight,
        pos_weight=pos_weight,
        label_smoothing=label_smoothing,
        where=where,
        ignore_label=ignore_label,
        reduction=reduction,
        axis=axis,
        normalizer=normalizer,
        dtype=dtype,
        implementation=implementation,
    )
    return evaluate(_loss, arguments, residuals)


def _loss(call: Call, residuals: str) -> Array:
    if residuals == "recompute":
        result = recompute(call.operands, tuple(call.params.items()))
    else:
        (result,) = bce(*call.operands, kind="loss", **call.params)
    return call.result(result)


@shows_keywords
def loss_and_grad(
    logits: ArrayLike,
    labels: ArrayLike,
    *,
    pos_weight: ArrayLike | None = None,
    **keywords: Unpack[Keywords],
) -> tuple[Array, Array]:
    """The loss and its derivative with respect to the logits, in one pass over memory.

    The same as ``jax.value_and_grad(loss)`` without tracing a derivative; for a loss that is not
    reduced to one number, the gradient of its sum.

    Args:
      logits: as for `loss`.
      labels: as for `loss`.
      pos_weight: as for `loss`.
      **keywords: those of `loss`, but residuals; dtype is that of the loss.

    Returns:
      The loss as `loss` returns it, and the gradient in the logits' shape and dtype. With
      ``reduction="mean"`` the gradient holds the factor 1/N; in float16 a long mean underflows.

    Raises:
      TypeError, ValueError, RuntimeError: as `loss` does.

    Source:
      The derivation stands in ``csrc/bce_math.h``.

    Example:
      >>> import jax.numpy as jnp, jax_bce
      >>> value, gradient = jax_bce.loss_and_grad(jnp.array([-20.0, 20.0]), 0, reduction="sum")
      >>> print(value, gradient)
      20.0 [2.0611537e-09 1.0000000e+00]
    """
    only_known("loss_and_grad", keywords)
    arguments = checked(logits, labels, pos_weight=pos_weight, **keywords)
    return evaluate(_loss_and_grad, arguments)


def _loss_and_grad(call: Call) -> tuple[Array, Array]:
    value, gradient = bce(*call.operands, kind="loss_and_grad", **call.params)
    gradient = call.in_place(spread_like(gradient, call.operands[0]))
    return call.result(value), gradient
