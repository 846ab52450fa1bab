"""What a user passes, checked, and as the primitive takes it."""

import math
import operator
from collections.abc import Sequence
from typing import Any, NamedTuple, TypedDict

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array
from jax.lax import stop_gradient
from jax.typing import ArrayLike, DTypeLike

from jax_bce import _check
from jax_bce._call import MODIFIERS
from jax_bce._callers import refuse_keras
from jax_bce._primitive import bce, missing, vary_alike
from jax_bce._reference import (
    Elements,
    arithmetic_dtype,
    divide,
    elements,
    in_two_parts,
    sum_trailing,
)

_LOGITS = ("float16", "bfloat16", "float32", "float64")
_LABELS = (*_LOGITS, "bool", "int8", "uint8", "int16", "int32", "int64")
_REDUCTIONS = ("none", "sum", "mean", "weighted_mean")
_TO_FLOAT = "use probs.astype(jnp.float32)"
IMPLEMENTATIONS = (None, "cpu", "cuda", "xla")


class Keywords(TypedDict, total=False):
    """The keywords of `jax_bce.loss` that all its relatives take, too."""

    weight: ArrayLike | None
    sample_weight: ArrayLike | None
    label_smoothing: ArrayLike
    where: ArrayLike | None
    ignore_label: ArrayLike | None
    reduction: str
    axis: int | Sequence[int] | None
    normalizer: ArrayLike | None
    dtype: DTypeLike | None
    implementation: str | None


def only_known(function: str, keywords: Keywords) -> None:
    """Python's own error where keywords have a type, but no check."""
    for name in keywords.keys() - Keywords.__annotations__.keys():
        raise TypeError(f"{function}() got an unexpected keyword argument {name!r}")


class Call(NamedTuple):
    """A validated call: the primitive's operands and parameters, with the summed axes last."""

    operands: tuple[Array, ...]
    params: dict[str, Any]
    shape: tuple[int, ...]  # of the logits, before their summed axes went last
    axes: tuple[int, ...]
    result_dtype: np.dtype

    def in_place(self, gradient: Array) -> Array:
        """The gradient with the summed axes where the logits have them."""
        return _move(gradient, _last(self.axes, gradient.ndim), self.axes)

    def elements(self, absent: float = 0) -> Elements:
        """What enters a formula of `_reference.py`."""
        logits, labels, _, smoothing, *more = self.operands
        modifiers = dict(zip(self.params["modifiers"], more, strict=True))
        return elements(logits, labels, smoothing, modifiers, absent)

    def result(self, loss: Array) -> Array:
        """The loss as the user gets it."""
        return _check.loss(loss.astype(self.result_dtype))

    def total(self, values: Array) -> Array:
        """The result of a formula other than that of the primitive."""
        shape, scale = self.operands[0].shape, self.operands[2]
        modifiers = dict(zip(self.params["modifiers"], self.operands[4:], strict=True))
        rank, count = self.params["reduced_rank"], self.params["count"]
        total = sum_trailing(jnp.broadcast_to(values, shape), rank)
        total = divide(total, scale, count, modifiers.get("divisor"), rank)
        return self.result(total)

    def of_class(self, name: str, value: ArrayLike) -> Array:
        """A number, or one for each class, as an operand of the arithmetic's type."""
        array = _trailing(name, _operand(name, value), self.shape)
        array = array.astype(self.operands[2].dtype)
        return _move(array, self.axes, _last(self.axes, array.ndim))


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
        reason = str(error).partition("\n")[0]
        raise TypeError(
            f"{name} must be an array of numbers, got {type(value).__name__}: {reason}"
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


def _mend_labels(labels: Array, logits: Array, name: str) -> str:
    """What to do about labels of another shape."""
    if [d for d in logits.shape if d != 1] == [d for d in labels.shape if d != 1]:
        return f"reshape one to the other, for example labels.reshape({name}.shape)"
    if labels.shape == logits.shape[:-1] and not jnp.issubdtype(labels.dtype, jnp.floating):
        return f"for class indices, jax.nn.one_hot(labels, {logits.shape[-1]})"
    try:
        fits = jnp.broadcast_shapes(labels.shape, logits.shape) == logits.shape
    except ValueError:
        fits = False
    if fits:
        return f"to use them for several {name}, jnp.broadcast_to(labels, {name}.shape)"
    return "pass one label for each logit, or one scalar label for all"


def _operand(
    name: str, value: ArrayLike, dtypes: Sequence[str] = _LABELS, mend: str | None = None
) -> Array:
    """An array of one of the dtypes, in the device's memory."""
    array = _array(name, value)
    if array.dtype.name not in dtypes:
        nearest = "int32" if jnp.issubdtype(array.dtype, jnp.integer) else "float32"
        mend = mend or f"use {name}.astype(jnp.{nearest})"
        raise TypeError(f"{name} must be one of {list(dtypes)}, got {array.dtype.name}: {mend}.")
    space = getattr(jax.typeof(array), "memory_space", None)
    if space and space.name == "Host":
        raise ValueError(
            f"{name} are in the host's memory: move them to the device's first, "
            f"jax.device_put({name}, jax.memory.Space.Device)."
        )
    return array


def _trailing(name: str, array: Array, shape: tuple[int, ...]) -> Array:
    """As NumPy broadcasts it to the logits' shape."""
    aligned = (1,) * (len(shape) - array.ndim) + array.shape
    if len(aligned) != len(shape) or any(
        own not in (1, size) for own, size in zip(aligned, shape, strict=True)
    ):
        hint = "one number, or one for each of the last axis"
        if array.shape == shape[: array.ndim] and array.ndim:
            ones = ", ".join([":"] * array.ndim + ["None"] * (len(shape) - array.ndim))
            hint = f"for one number a sample, {name}[{ones}]"
            hint += " or sample_weight" if name == "weight" else ""
        raise ValueError(
            f"{name} of shape {array.shape} cannot be broadcast to logits of shape {shape}: {hint}."
        )
    return array.reshape(aligned)


def _leading(name: str, array: Array, shape: tuple[int, ...], mend: str) -> Array:
    """One for each index of the first axes, or, then with sizes of 1 behind them, of all."""
    own = array.shape
    fits = len(own) <= len(shape)
    if fits:
        kept = next((d for d in range(len(own), 0, -1) if own[d - 1] != 1), 0)
        fits = own[:kept] == shape[:kept]
    if not fits:
        raise ValueError(
            f"{name} of shape {own} is not one for each index of the first axes of logits of shape "
            f"{shape}: {mend}."
        )
    return array.reshape(own + (1,) * (len(shape) - len(own)))


def _mend_sample_weight(array: Array, shape: tuple[int, ...]) -> str:
    if array.ndim == 1 and shape and array.shape[0] == shape[-1]:
        return "for one number a class, use weight"
    return f"pass shape {shape[:1]}, or as many of {shape} as it has axes"


def _holds(dtype: np.dtype, number: float) -> bool:
    """Whether an integer dtype, or bool, has that number."""
    info = np.iinfo(dtype if dtype.kind in "iu" else np.uint8)
    low, high = (0, 1) if dtype.kind == "b" else (info.min, info.max)
    return number.is_integer() and low <= number <= high


def _ignored(value: ArrayLike, labels: Array) -> Array:
    """The label to ignore, which is checked unless it is traced, in the labels' dtype."""
    given = _array("ignore_label", value)
    if given.ndim:
        raise ValueError(f"ignore_label must be one number, got shape {given.shape}.")
    if not isinstance(value, jax.core.Tracer):
        label = float(np.asarray(value))
        integers = labels.dtype == bool or jnp.issubdtype(labels.dtype, jnp.integer)
        if np.isnan(label) or (integers and not _holds(labels.dtype, label)):
            dtypes = (name for name in ("int8", "int16", "int32") if _holds(np.dtype(name), label))
            mend = f"store them as jnp.{next(dtypes, 'float32')} from the start, or mask with where"
            raise ValueError(
                f"ignore_label={value!r} cannot be among labels of dtype {labels.dtype.name}: "
                f"{'use where=~jnp.isnan(labels)' if np.isnan(label) else mend}."
            )
    return stop_gradient(given.astype(labels.dtype))


def _divisor(
    value: ArrayLike, shape: tuple[int, ...], axes: tuple[int, ...], wide: np.dtype
) -> tuple[Array, Array]:
    """The normalizer, which is one number or one for each that the result has."""
    array = _operand("normalizer", value)
    kept = tuple(size for a, size in enumerate(shape) if a not in axes)
    if array.ndim and array.shape != kept:
        raise ValueError(
            f"normalizer of shape {array.shape} must be one number, or have the result's shape "
            f"{kept}."
        )
    own = tuple(1 if a in axes or not array.ndim else size for a, size in enumerate(shape))
    return _parts(array.reshape(own), wide)


def _mean_weight(
    labels: Array,
    factors: dict[str, Array],
    axes: tuple[int, ...],
    shape: tuple[int, ...],
    wide: np.dtype,
    implementation: str | None,
) -> tuple[Array, Array]:
    """The mean over axes of the weight of each element, 0 of those that do not exist.

    In symbolic sizes it is the sum. Nothing of the shape's size is formed unless a factor has it.
    """
    rank = len(shape)
    symbolic = not all(isinstance(size, int) for size in shape)
    zero = jnp.zeros((1,) * rank, wide)
    labels = stop_gradient(labels) if "ignore_label" in factors else zero
    logits = jnp.broadcast_to(zero, shape) if symbolic else zero
    operands: tuple[Array, ...] = (logits, labels, jnp.ones_like(zero), zero, *factors.values())
    own = jnp.broadcast_shapes(*(operand.shape for operand in operands))
    if all(own[a] == 1 for a in axes) and not {"weight", "sample_weight"} <= factors.keys():
        weights = elements(logits, labels, zero, factors).weight
        assert weights is not None
        return weights, jnp.zeros_like(weights)
    operands = tuple(_move(operand, axes, _last(axes, rank)) for operand in operands)
    if not axes:  # a kernel adds up at least one dimension
        operands = tuple(operand[..., None] for operand in operands)
    high, low = bce(
        *vary_alike(*operands),
        modifiers=tuple(factors),
        kind="total",
        reduced_rank=max(1, len(axes)),
        count=1 if symbolic else max(1, math.prod(own[a] for a in axes)),
        implementation=implementation,
        loss_dtype=wide,
    )
    return jnp.expand_dims(high, axes), jnp.expand_dims(low, axes)


def _parts(number: Array, wide: np.dtype) -> tuple[Array, Array]:
    """A denominator in the arithmetic's type, and what its rounding lost."""
    if number.dtype in (np.float64, np.int32, np.int64):
        high, low = in_two_parts(number, wide)
        return high, low
    return number.astype(wide), jnp.zeros(number.shape, wide)


def prepare(
    logits: ArrayLike,
    labels: ArrayLike,
    *,
    weight: ArrayLike | None = None,
    sample_weight: ArrayLike | None = None,
    pos_weight: ArrayLike | None = None,
    label_smoothing: ArrayLike = 0.0,
    where: ArrayLike | None = None,
    ignore_label: ArrayLike | None = None,
    reduction: str = "mean",
    axis: int | Sequence[int] | None = None,
    normalizer: ArrayLike | None = None,
    dtype: DTypeLike | None = None,
    implementation: str | None = None,
    name: str = "logits",
) -> Call:
    """Checks the arguments of `jax_bce.loss`, which documents them."""
    refuse_keras()
    one_of("reduction", reduction, _REDUCTIONS)
    one_of("implementation", implementation, IMPLEMENTATIONS)
    if implementation in ("cpu", "cuda") and (reason := missing(implementation)):
        raise RuntimeError(f"implementation={implementation!r} is not available: {reason}.")
    scores = "pass the model's raw scores before the sigmoid, or logits.astype(jnp.float32)"
    x = _operand(name, logits, _LOGITS, scores if name == "logits" else _TO_FLOAT)
    y = _operand("labels", labels)
    shape = x.shape
    if y.ndim and y.shape != shape:
        raise ValueError(
            f"labels of shape {y.shape} do not match {name} of shape {shape}: "
            f"{_mend_labels(y, x, name)}."
        )
    if reduction == "none":
        for option, value in (("axis", axis), ("normalizer", normalizer)):
            if value is not None:
                raise ValueError(
                    f"{option}={value} has no meaning with reduction='none': leave {option}=None."
                )
    axes = () if reduction == "none" else _axes(axis, shape)
    last = _last(axes, x.ndim)
    wide = arithmetic_dtype(x.dtype)
    smoothing = _smoothing(label_smoothing, x.ndim, wide)
    y = y if y.ndim else y.reshape((1,) * x.ndim)

    modifiers: dict[str, Array] = {}
    for option, value in (("weight", weight), ("pos_weight", pos_weight)):
        if value is not None:
            array = _operand(option, value)
            modifiers[option] = _trailing(option, array, shape)
    if sample_weight is not None:
        array = _operand("sample_weight", sample_weight)
        mend = _mend_sample_weight(array, shape)
        modifiers["sample_weight"] = _leading("sample_weight", array, shape, mend)
    if where is not None:
        array = _operand("where", where, ("bool",), "compare, where > 0, or use where.astype(bool)")
        mend = f"for one a class, jnp.broadcast_to(where, {shape})"
        modifiers["where"] = _leading("where", array, shape, mend)
    if ignore_label is not None:
        modifiers["ignore_label"] = _ignored(ignore_label, y).reshape((1,) * x.ndim)
    modifiers = {option: modifiers[option] for option in MODIFIERS if option in modifiers}

    count: Any = 1
    divisor = None
    if normalizer is not None:
        divisor = _divisor(normalizer, shape, axes, wide)
    elif reduction in ("mean", "weighted_mean"):
        weights = ("weight", "sample_weight") if reduction == "weighted_mean" else ()
        counted = {*weights, "where", "ignore_label"}
        factors = {option: modifiers[option] for option in modifiers if option in counted}
        count = math.prod(shape[a] for a in axes)
        if factors:
            divisor = _mean_weight(y, factors, axes, shape, wide, implementation)
        elif not isinstance(count, int):  # of symbolic sizes, in jax.export
            divisor = _parts(jnp.asarray(count).reshape((1,) * x.ndim), wide)
        count = count if isinstance(count, int) else 1
    if divisor is not None:
        modifiers["divisor"], modifiers["divisor_low"] = divisor[0], stop_gradient(divisor[1])

    result_dtype = _float_dtype(dtype) or (wide if reduction != "none" else x.dtype)
    # The kernel rounds an element once to its result; a sum, and float64, it returns as they are.
    direct = reduction == "none" and wide == np.float32 and result_dtype != np.float64
    params = {
        "modifiers": tuple(modifiers),
        "reduced_rank": len(axes),
        "count": max(1, count),
        "implementation": implementation,
        "loss_dtype": result_dtype if direct else wide,
    }
    operands = (x, y, jnp.ones((1,) * x.ndim, wide), smoothing, *modifiers.values())
    operands = vary_alike(*(_move(operand, axes, last) for operand in operands))
    _check.operands(name, operands, tuple(modifiers))
    return Call(operands, params, shape, axes, result_dtype)
