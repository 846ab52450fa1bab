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

from jax_bce._primitive import missing, vary_alike
from jax_bce._reference import arithmetic_dtype

_LOGITS = ("float16", "bfloat16", "float32", "float64")
_LABELS = (*_LOGITS, "bool", "int8", "uint8", "int16", "int32", "int64")
_REDUCTIONS = ("none", "sum", "mean")
_IMPLEMENTATIONS = (None, "cpu", "cuda", "xla")


class Call(NamedTuple):
    """A validated call: the primitive's operands and parameters, with the summed axes last."""

    operands: tuple[Array, ...]
    params: dict[str, Any]
    axes: tuple[int, ...]
    result_dtype: np.dtype

    def in_place(self, gradient: Array) -> Array:
        """The gradient with the summed axes where the logits have them."""
        return _move(gradient, _last(self.axes, gradient.ndim), self.axes)


def _last(axes: tuple[int, ...], rank: int) -> tuple[int, ...]:
    return tuple(range(rank - len(axes), rank))


def _move(array: Array, source: tuple[int, ...], destination: tuple[int, ...]) -> Array:
    return array if source == destination else jnp.moveaxis(array, source, destination)


def one_of(name: str, value: object, allowed: Sequence[object]) -> None:
    if value not in allowed:
        raise ValueError(f"{name} must be one of {list(allowed)}, got {value!r}.")


def _float_dtype(dtype: DTypeLike | None) -> np.dtype | None:
    if dtype is None:
        return None
    try:
        found = jnp.dtype(dtype)
    except TypeError:
        found = None
    if found is None or found.name not in _LOGITS:
        raise TypeError(f"dtype must be one of {list(_LOGITS)}, got {dtype!r}.")
    return found


def _array(name: str, value: ArrayLike) -> Array:
    if isinstance(value, Array):
        return value
    try:
        return jnp.asarray(value)
    except (TypeError, ValueError) as error:
        raise TypeError(
            f"{name} must be an array of numbers, got {type(value).__name__}: {error}"
        ) from error


def _axes(axis: int | Sequence[int] | None, shape: tuple[int, ...]) -> tuple[int, ...]:
    """The axes to sum as non-negative numbers in ascending order."""
    if axis is None:
        return tuple(range(len(shape)))
    many = isinstance(axis, Sequence) and not isinstance(axis, str)
    try:
        given = tuple(operator.index(a) for a in (axis if many else (axis,)))  # type: ignore
    except TypeError:
        raise TypeError(f"axis must be an int or a sequence of ints, got {axis!r}.") from None
    outside = [a for a in given if not -len(shape) <= a < len(shape)]
    if outside:
        raise ValueError(f"axis {outside[0]} is out of range for logits of shape {shape}.")
    axes = sorted(a % len(shape) for a in given)
    if len(set(axes)) < len(axes):
        raise ValueError(f"axis names a dimension twice: {given} for logits of shape {shape}.")
    return tuple(axes)


def _smoothing(value: ArrayLike, rank: int, wide: np.dtype) -> Array:
    """The share s, which is checked unless it is traced."""
    known = None if isinstance(value, jax.core.Tracer) else np.asarray(value)
    fits = known is None or (known.dtype.kind in "bfiuV" and known.ndim == 0 and 0 <= known <= 1)
    if not fits or jnp.ndim(value):
        raise ValueError(f"label_smoothing must be one number from 0 to 1, got {value!r}.")
    return jnp.asarray(value, wide).reshape((1,) * rank)


def _mend_labels(labels: Array, logits: Array) -> str:
    """What to do about labels of another shape."""
    if [d for d in logits.shape if d != 1] == [d for d in labels.shape if d != 1]:
        return "reshape one to the other, for example labels.reshape(logits.shape)"
    if labels.shape == logits.shape[:-1] and not jnp.issubdtype(labels.dtype, jnp.floating):
        return f"for class indices, jax.nn.one_hot(labels, {logits.shape[-1]})"
    try:
        fits = jnp.broadcast_shapes(labels.shape, logits.shape) == logits.shape
    except ValueError:
        fits = False
    if fits:
        return "to use them for several logits, jnp.broadcast_to(labels, logits.shape)"
    return "pass one label for each logit, or one scalar label for all"


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
    x, y = _array("logits", logits), _array("labels", labels)
    if x.dtype.name not in _LOGITS:
        raise TypeError(
            f"logits must be one of {list(_LOGITS)}, got {x.dtype.name}: pass the model's raw "
            "scores before the sigmoid, or logits.astype(jnp.float32)."
        )
    if y.dtype.name not in _LABELS:
        mend = "int32" if jnp.issubdtype(y.dtype, jnp.integer) else "float32"
        raise TypeError(
            f"labels must be one of {list(_LABELS)}, got {y.dtype.name}: use "
            f"labels.astype(jnp.{mend})."
        )
    for name, operand in (("logits", x), ("labels", y)):
        if (space := getattr(jax.typeof(operand), "memory_space", None)) and space.name == "Host":
            raise ValueError(
                f"{name} are in the host's memory: move them to the device's first, "
                f"jax.device_put({name}, jax.memory.Space.Device)."
            )
    if y.ndim and y.shape != x.shape:
        raise ValueError(
            f"labels of shape {y.shape} do not match logits of shape {x.shape}: "
            f"{_mend_labels(y, x)}."
        )
    if reduction == "none" and axis is not None:
        raise ValueError(f"axis={axis} has no meaning with reduction='none': leave axis=None.")
    axes = () if reduction == "none" else _axes(axis, x.shape)
    wide = arithmetic_dtype(x.dtype)
    smoothing = _smoothing(label_smoothing, x.ndim, wide)
    scale = jnp.ones((1,) * x.ndim, wide)
    count = math.prod(x.shape[a] for a in axes) if reduction == "mean" else 1
    if not isinstance(count, int):  # of symbolic sizes, in jax.export
        scale, count = scale / jnp.maximum(1, jnp.asarray(count)).astype(wide), 1
    last = _last(axes, x.ndim)
    y = _move(y, axes, last) if y.ndim else y.reshape((1,) * x.ndim)
    x = _move(x, axes, last)
    result_dtype = _float_dtype(dtype) or (wide if reduction != "none" else x.dtype)
    # The kernel rounds an element once to its result; a sum, and float64, it returns as they are.
    direct = reduction == "none" and wide == np.float32 and result_dtype != np.float64
    params = {
        "reduced_rank": len(axes),
        "count": max(1, count),
        "implementation": implementation,
        "loss_dtype": result_dtype if direct else wide,
    }
    operands = vary_alike(x, y, scale, smoothing)
    return Call(operands, params, axes, result_dtype)
