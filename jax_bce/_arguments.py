"""What a user passes, checked, and as the primitive takes it."""

import math
import operator
from collections.abc import Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array
from jax.typing import ArrayLike, DTypeLike

from jax_bce._primitive import missing
from jax_bce._reference import arithmetic_dtype

_LOGITS = ("float16", "bfloat16", "float32", "float64")
_LABELS = (*_LOGITS, "bool", "int8", "uint8", "int16", "int32", "int64")
_REDUCTIONS = ("none", "sum", "mean")
_IMPLEMENTATIONS = (None, "cpu", "cuda", "xla")


class Call(NamedTuple):
    """A validated call: the primitive's operands and parameters, with the summed axes last."""

    operands: tuple[Array, Array, Array]
    params: dict[str, Any]
    axes: tuple[int, ...]
    result_dtype: np.dtype

    def in_place(self, gradient: Array) -> Array:
        """The gradient with the summed axes where the logits have them."""
        return jnp.moveaxis(gradient, _last(self.axes), self.axes)


def _last(axes: tuple[int, ...]) -> tuple[int, ...]:
    return tuple(range(-len(axes), 0))


def one_of(name: str, value: object, allowed: Sequence[object]) -> None:
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


def _smoothed(labels: Array, smoothing: ArrayLike, wide: np.dtype) -> Array:
    """y (1 - s) + s / 2; the labels themselves, as stored, where s is known to be 0."""
    known = None if isinstance(smoothing, jax.core.Tracer) else np.asarray(smoothing)
    if jnp.ndim(smoothing) or (known is not None and not 0 <= known <= 1):
        raise ValueError(f"label_smoothing must be one number from 0 to 1, got {smoothing}.")
    if known == 0:
        return labels
    share = jnp.asarray(smoothing, wide)
    return labels.astype(wide) * (1 - share) + share / 2


def prepare(
    logits: ArrayLike,
    labels: ArrayLike,
    reduction: str,
    axis: int | Sequence[int] | None,
    label_smoothing: ArrayLike,
    dtype: DTypeLike | None,
    implementation: str | None,
) -> Call:
    """Checks the arguments of `jax_bce.loss`, which documents them."""
    one_of("reduction", reduction, _REDUCTIONS)
    one_of("implementation", implementation, _IMPLEMENTATIONS)
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
    y = _smoothed(y, label_smoothing, wide)
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
    return Call((x, y, jnp.ones((1,) * x.ndim, wide)), params, axes, result_dtype)
