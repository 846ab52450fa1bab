"""The public functions: validation and options, ending in one call of the primitive."""

import math
import numbers
import operator
from collections.abc import Sequence
from typing import Any, NamedTuple

import jax.numpy as jnp
import numpy as np
from jax import Array
from jax.typing import ArrayLike, DTypeLike

from jax_bce._derivatives import recompute
from jax_bce._primitive import bce, missing
from jax_bce._reference import arithmetic_dtype

_LOGITS = ("float16", "bfloat16", "float32", "float64")
_LABELS = (*_LOGITS, "bool", "int8", "uint8", "int16", "int32", "int64")
_REDUCTIONS = ("none", "sum", "mean")
_RESIDUALS = ("gradient", "recompute")
_IMPLEMENTATIONS = (None, "cpu", "cuda", "xla")


class _Call(NamedTuple):
    """A validated call: the primitive's operands and parameters, with the summed axes last."""

    operands: tuple[Array, Array, Array]
    params: dict[str, Any]
    axes: tuple[int, ...]
    result_dtype: np.dtype


def _one_of(name: str, value: object, allowed: Sequence[object]) -> None:
    if value not in allowed:
        raise ValueError(f"{name} must be one of {list(allowed)}, got {value!r}.")


def _float_dtype(dtype: DTypeLike | None) -> np.dtype | None:
    if dtype is not None and jnp.dtype(dtype).name not in _LOGITS:
        raise TypeError(f"dtype must be one of {list(_LOGITS)}, got {jnp.dtype(dtype).name}.")
    return None if dtype is None else jnp.dtype(dtype)


def _axes(axis: int | Sequence[int] | None, shape: tuple[int, ...]) -> tuple[int, ...]:
    """The axes to sum as non-negative numbers in ascending order."""
    if axis is None:
        return tuple(range(len(shape)))
    given = tuple(operator.index(a) for a in (axis if isinstance(axis, Sequence) else (axis,)))
    outside = [a for a in given if not -len(shape) <= a < len(shape)]
    if outside:
        raise ValueError(f"axis {outside[0]} is out of range for logits of shape {shape}.")
    axes = sorted(a % len(shape) for a in given)
    if len(set(axes)) < len(axes):
        raise ValueError(f"axis names a dimension twice: {given} for logits of shape {shape}.")
    return tuple(axes)


def _prepare(
    logits: ArrayLike,
    labels: ArrayLike,
    reduction: str,
    axis: int | Sequence[int] | None,
    label_smoothing: ArrayLike,
    dtype: DTypeLike | None,
    implementation: str | None,
) -> _Call:
    _one_of("reduction", reduction, _REDUCTIONS)
    _one_of("implementation", implementation, _IMPLEMENTATIONS)
    if implementation in ("cpu", "cuda") and (reason := missing(implementation)):
        raise RuntimeError(f"implementation={implementation!r} is not available: {reason}.")
    x, y = jnp.asarray(logits), jnp.asarray(labels)
    if x.dtype.name not in _LOGITS:
        raise TypeError(
            f"logits must be one of {list(_LOGITS)}, got {x.dtype.name}: pass the model's raw "
            "scores before the sigmoid, or logits.astype(jnp.float32)."
        )
    if y.dtype.name not in _LABELS:
        raise TypeError(
            f"labels must be one of {list(_LABELS)}, got {y.dtype.name}: use "
            "labels.astype(jnp.int32)."
        )
    if y.ndim and y.shape != x.shape:
        squeezed = [d for d in x.shape if d != 1] == [d for d in y.shape if d != 1]
        mend = (
            "reshape one to the other, for example labels.reshape(logits.shape)"
            if squeezed
            else "pass labels of the logits' shape, or one scalar label for all; "
            "jnp.broadcast_to(labels, logits.shape) says so explicitly"
        )
        raise ValueError(
            f"labels of shape {y.shape} do not match logits of shape {x.shape}: {mend}."
        )
    if reduction == "none" and axis is not None:
        raise ValueError(f"axis={axis} has no meaning with reduction='none': leave axis=None.")
    axes = () if reduction == "none" else _axes(axis, x.shape)
    wide = arithmetic_dtype(x.dtype)
    if isinstance(label_smoothing, numbers.Real) and not 0 <= float(label_smoothing) <= 1:
        raise ValueError(f"label_smoothing must be between 0 and 1, got {label_smoothing}.")
    if not (isinstance(label_smoothing, numbers.Real) and label_smoothing == 0):
        smoothing = jnp.asarray(label_smoothing, wide)
        y = y.astype(wide) * (1 - smoothing) + smoothing / 2
    count = max(1, math.prod(x.shape[a] for a in axes)) if reduction == "mean" else 1
    y = jnp.moveaxis(y, axes, _last(axes)) if y.ndim else y.reshape((1,) * x.ndim)
    x = jnp.moveaxis(x, axes, _last(axes))
    result_dtype = _float_dtype(dtype) or (wide if reduction != "none" else x.dtype)
    # The kernel rounds an element once to its result; a sum, and float64, it returns as they are.
    direct = reduction == "none" and wide == np.float32 and result_dtype != np.float64
    params = {
        "reduced_rank": len(axes),
        "count": count,
        "implementation": implementation,
        "loss_dtype": result_dtype if direct else wide,
    }
    return _Call((x, y, jnp.ones((1,) * x.ndim, wide)), params, axes, result_dtype)


def _last(axes: tuple[int, ...]) -> tuple[int, ...]:
    return tuple(range(-len(axes), 0))


def loss(
    logits: ArrayLike,
    labels: ArrayLike,
    *,
    reduction: str = "mean",
    axis: int | Sequence[int] | None = None,
    label_smoothing: ArrayLike = 0.0,
    dtype: DTypeLike | None = None,
    residuals: str = "gradient",
    implementation: str | None = None,
) -> Array:
    r"""Binary cross-entropy between labels and the sigmoid of logits.

    For a logit :math:`x` and a label :math:`y`, each element is

    .. math:: l = y \log(1 + e^{-x}) + (1 - y) \log(1 + e^{x}),

    the negative log-likelihood in nats of a Bernoulli variable with probability
    :math:`\sigma(x) = 1 / (1 + e^{-x})`. Pass the raw scores of the model: a sigmoid in front of
    this function loses what it computes.

    Args:
      logits: float16, bfloat16, float32 or float64, any shape.
      labels: probabilities of the positive class, of the logits' shape or a scalar: any of the
        logits' dtypes (not necessarily the same), bool, int8, uint8, int16, int32 or int64. Read as
        stored; integers other than 0 and 1 are taken at their value.
      reduction: "mean", "sum" or "none". Sums are accumulated beyond float32. Without any element,
        the loss is 0.
      axis: the axes to reduce; None reduces all. Trailing axes are read in place, others are
        transposed first.
      label_smoothing: s in [0, 1]; a label y becomes y (1 - s) + s / 2.
      dtype: of the result. None: float32 (float64 for float64 logits) for a reduced loss, the
        logits' dtype for reduction="none".
      residuals: what is kept for the backward pass. "gradient": the gradient, computed together
        with the loss in one pass over memory. "recompute": nothing but logits and labels
        themselves; the backward pass reads them again. Reverse mode only, and only once.
      implementation: None, the fastest that the platform has; "cpu", the SIMD kernel; "xla", plain
        JAX; "cuda".

    Returns:
      The loss, of the logits' shape without the reduced axes.

    Derivatives:
      With respect to logits, float labels and label_smoothing, to any order, in forward and reverse
      mode, in their argument's dtype; ``dl/dx = (1 - y) sigmoid(x) - y sigmoid(-x)``. float32
      losses and gradients are within 1 ulp of the exact value for every logit and labels 0 and 1:
      neither has a floor, neither is rounded to zero in the tails. An infinite logit gives the
      limit (0, or an infinite loss with a finite gradient), NaN gives NaN. XLA's own arithmetic
      (``implementation="xla"``) flushes subnormal results to zero.

    Raises:
      TypeError: logits that are not floating-point, or another dtype that is not listed here.
      ValueError: labels of another shape, an unknown option, an axis out of range.
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
    """
    _one_of("residuals", residuals, _RESIDUALS)
    call = _prepare(logits, labels, reduction, axis, label_smoothing, dtype, implementation)
    if residuals == "recompute":
        result = recompute(*call.operands, tuple(call.params.items()))
    else:
        (result,) = bce(*call.operands, kind="loss", **call.params)
    return result.astype(call.result_dtype)


def loss_and_grad(
    logits: ArrayLike,
    labels: ArrayLike,
    *,
    reduction: str = "mean",
    axis: int | Sequence[int] | None = None,
    label_smoothing: ArrayLike = 0.0,
    dtype: DTypeLike | None = None,
    implementation: str | None = None,
) -> tuple[Array, Array]:
    """The loss and its derivative with respect to the logits, in one pass over memory.

    The same as ``jax.value_and_grad(loss)`` without tracing a derivative; for a loss that is not
    reduced to one number, the gradient of its sum.

    Args:
      logits: as for `loss`.
      labels: as for `loss`.
      reduction: as for `loss`.
      axis: as for `loss`.
      label_smoothing: as for `loss`.
      dtype: of the loss, as for `loss`.
      implementation: as for `loss`.

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
    call = _prepare(logits, labels, reduction, axis, label_smoothing, dtype, implementation)
    value, gradient = bce(*call.operands, kind="loss_and_grad", **call.params)
    gradient = jnp.moveaxis(gradient, _last(call.axes), call.axes)
    return value.astype(call.result_dtype), gradient
