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

    For a logit :math:`x`, a label :math:`y`, a weight :math:`w` and a positive-class weight
    :math:`q`, the loss of each element is

    .. math:: l = w \left(q y \log(1 + e^{-x}) + (1 - y) \log(1 + e^{x})\right).

    With :math:`q = w = 1` this is the negative log-likelihood in nats of a Bernoulli variable with
    probability :math:`\sigma(x) = 1 / (1 + e^{-x})`. Pass the raw scores of the model: applying a
    sigmoid first loses accuracy. For Keras's ``compile``, which passes the labels first, use
    `jax_bce.keras`. With swapped arguments, accuracy stays near 0.5 and the loss falls far below 0.

    The steps, in order: drop the elements that `where` or ignore_label excludes; smooth labels;
    compute each element's loss; apply weights; sum in float32 or wider; divide; round once.

    Args:
      logits: float16, bfloat16, float32 or float64, any shape.
      labels: probabilities of the positive class, with the logits' shape or scalar. Any of the
        logits' dtypes (not necessarily the same), bool, int8, uint8, int16, int32 or int64. Labels
        are read as stored, and rounded to float32 unless the logits are float64: with float32
        logits, a label of 1 - 1e-9 is 1, and its 1 - y is 0. Integers are used as they are: labels
        of -1 and 1, or of 0 and 255, are probably a mistake; `checking` finds them.
      weight: a factor for each element, broadcast to the logits as in NumPy: a number, per-class
        weights of shape (C,), or an array of the logits' shape. Weights may have any dtype that
        labels may have, and are read as stored.
      sample_weight: another factor for each element, aligned with the first axes: an array of shape
        ``logits.shape[:k]``, optionally followed by axes of size 1.
      pos_weight: q, broadcast like `weight`. It does not multiply ``1 - y`` and is not part of any
        denominator.
      label_smoothing: s in [0, 1], checked unless it is traced. A label y becomes
        y (1 - s) + s / 2 before pos_weight is applied. Neither this value nor its complement is
        rounded before use. A known 0 leaves the option out.
      where: bool, aligned like sample_weight, or with as many axes as the logits, each of the same
        size or 1. Elements where it is False are ignored: they contribute neither to the loss nor
        to the denominator, and their gradients are 0, even if their logit, label or weight is NaN.
        (If the model's inputs are NaN, its own backward pass multiplies these zeros by NaN: replace
        them.)
      ignore_label: elements with this label, before smoothing, are ignored, too.
      reduction: "mean" divides the sum by the number of elements not ignored; "weighted_mean"
        divides it by the sum of their weight times sample_weight; "sum"; or "none". Kernels sum
        losses and weights in float64; XLA sums losses in float32. If a denominator is 0, the loss
        and its gradient are 0.
      axis: the axes to reduce; by default, all. Trailing axes are reduced in place, others are
        transposed first.
      normalizer: replaces the reduction's denominator: a number, or an array of the result's shape.
        As for weights, its range is not checked: a negative normalizer negates the loss.
      dtype: of the result. By default, a reduced loss is float32 (float64 for float64 logits), and
        reduction="none" has the logits' dtype.
      residuals: what is stored for the backward pass. "gradient" stores the gradient, computed
        together with the loss in one pass over memory. "recompute" stores only the operands; the
        backward pass reads them again, and only a single reverse-mode derivative is supported.
      implementation: None selects the SIMD kernel on a CPU, which is the fastest by measurement; on
        an NVIDIA GPU, the CUDA kernel for sums and means over all axes or the last ones, also with
        a weight or a mask, unless logits are float64 (its speed has not been measured); and XLA for
        everything else, as ``python -m jax_bce`` lists. The environment variable JAX_BCE_GPU, xla
        or cuda, pins the choice on GPUs. "cpu" is the SIMD kernel, "cuda" the GPU kernel, and "xla"
        plain JAX, which is also what ``jax.export`` stores unless a kernel is named. Like
        reduction, axis, dtype and residuals, it is static under jit; all other arguments may be
        traced.

    Returns:
      The loss, with the logits' shape without the reduced axes.

    Derivatives:
      With respect to logits, float labels, weight, sample_weight, pos_weight, label_smoothing and
      normalizer, to any order, in forward and reverse mode. Each has its argument's dtype and is
      computed only if requested. ``dl/dx = (1 - y) sigmoid(x) - q y sigmoid(-x)``. For every
      logit and labels of 0 and 1, float32 losses and gradients are within 1 ulp of the exact value:
      they have no floor and are not rounded to zero in the tails. An infinite logit gives the limit
      (0, or an infinite loss with a finite gradient); NaN gives NaN; a weight of 0 gives 0 even if
      the loss is infinite. XLA's own arithmetic (``implementation="xla"``, and the product with the
      cotangent if a gradient is not compiled) flushes subnormal results to zero. On a CPU it also
      treats weights and denominators below 1.2e-38 as 0; the kernels do not. In forward mode, the
      tangents of ignored elements must be finite, because they are multiplied by 0.

    Several devices:
      Sharded operands stay sharded: each device computes its own elements. XLA may gather operands
      if a reduced dimension is sharded and does not divide evenly, if logits and labels are sharded
      differently along a dimension, or if more than 4,096 rows are split into parts of fewer than
      32 elements. A weight that is neither a single number nor one per row of the last axis is
      first broadcast to the logits' shape. In a shard_map, the loss is that of the local shard.

    Raises:
      TypeError: if logits are not floating-point, `where` is not bool, or another dtype is not
        listed here.
      ValueError: if the shape of labels, weights or a mask does not fit, label_smoothing or an axis
        is out of range, the labels' dtype cannot hold ignore_label, operands are sharded
        differently over an explicit mesh or are in host memory, or an option is unknown.
      RuntimeError: if an implementation is not available, with the reason and the fix.

    Source:
      The derivation is in ``csrc/bce_math.h``.

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
    return evaluate(loss_of, arguments, residuals)


def loss_of(call: Call, residuals: str, constant_power: bool = False) -> Array:
    """The loss of a call, which may be a focal loss; its power may be a constant."""
    params = {**call.params, "constant_power": constant_power}
    if residuals == "recompute":
        result = recompute(call.operands, tuple(params.items()))
    else:
        (result,) = bce(*call.operands, kind="loss", **params)
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

    Equivalent to ``jax.value_and_grad(loss)``, but no derivative is traced. If the loss is not
    reduced to one number, the gradient is that of its sum.

    Args:
      logits: as for `loss`.
      labels: as for `loss`.
      pos_weight: as for `loss`.
      **keywords: the keywords of `loss` except residuals; dtype applies to the loss.

    Returns:
      The loss, as from `loss`, and the gradient in the logits' shape and dtype. With
      ``reduction="mean"`` the gradient includes the factor 1/N: in float16 it underflows for a mean
      over many elements.

    Raises:
      TypeError, ValueError, RuntimeError: as for `loss`.

    Source:
      The derivation is in ``csrc/bce_math.h``.

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
