"""What a user passes, checked, and as the primitive takes it."""

import math
import operator
import reprlib
from collections.abc import Sequence
from typing import Any, NamedTuple, TypedDict

import jax.numpy as jnp
import numpy as np
from jax import Array
from jax.lax import stop_gradient
from jax.typing import ArrayLike, DTypeLike

from jax_bce import _check
from jax_bce._alignment import fixes, fixes_of_labels, spelled
from jax_bce._call import MODIFIERS
from jax_bce._callers import refuse_keras
from jax_bce._operands import FLOATS, known, operand, ranged, typed
from jax_bce._primitive import bce, missing, vary_alike
from jax_bce._reference import (
    Elements,
    arithmetic_dtype,
    divide,
    elements,
    in_two_parts,
    sum_trailing,
)

_REDUCTIONS = ("none", "sum", "mean", "weighted_mean")
_SAME = {  # what Keras and others call a reduction
    None: "none",
    "average": "mean",
    "avg": "mean",
    "mean_with_sample_weight": "weighted_mean",
    "sum_over_batch_size": "mean",
}
_SCORES = {
    "logits": "logits come first, labels second; pass the model's raw scores before the sigmoid, "
    "or logits.astype(jnp.float32)",
    "probs": "probs come first, labels second; or use probs.astype(jnp.float32)",
}
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


_RESIDUALS = "residuals is an option of jax_bce.loss alone"
_INSTEAD = {  # of keywords of `loss` that a relative does not take
    ("focal_loss", "pos_weight"): "alpha is the weight of the positive class",
    ("asymmetric_loss", "pos_weight"): (
        "weight=jnp.where(labels == 1, pos_weight, 1) does that; gamma_neg and gamma_pos, or alpha "
        "of focal_loss, are other ways to treat the classes apart"
    ),
    ("loss_and_grad", "residuals"): _RESIDUALS,
    ("focal_loss", "residuals"): _RESIDUALS,
    ("asymmetric_loss", "residuals"): _RESIDUALS,
    ("loss_from_probs", "residuals"): _RESIDUALS,
}


def only_known(function: str, keywords: Keywords) -> None:
    """Python's own error where keywords have a type, but no check."""
    for name in keywords.keys() - Keywords.__annotations__.keys():
        hint = f": {_INSTEAD[function, name]}." if (function, name) in _INSTEAD else ""
        raise TypeError(f"{function}() got an unexpected keyword argument {name!r}{hint}")


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
        ranged(name, value)
        array = _trailing(name, value, self.shape)
        array = array.astype(self.operands[2].dtype)
        return _move(array, self.axes, _last(self.axes, array.ndim))


def _last(axes: tuple[int, ...], rank: int) -> tuple[int, ...]:
    return tuple(range(rank - len(axes), rank))


def _move(array: Array, source: tuple[int, ...], destination: tuple[int, ...]) -> Array:
    return array if source == destination else jnp.moveaxis(array, source, destination)


def one_of(name: str, value: object, allowed: Sequence[object]) -> None:
    same = None
    if isinstance(value, str | None):  # an array is not compared, nor printed
        if value in allowed:
            return
        same = _SAME.get(value)
    shape = getattr(value, "shape", None)
    got = reprlib.repr(value) if shape is None else f"an array of shape {shape}"
    hint = f": use {same!r}" if same and same in allowed else ""
    raise ValueError(f"{name} must be one of {list(allowed)}, got {got}{hint}.")


def _float_dtype(dtype: DTypeLike | None) -> np.dtype | None:
    if dtype is None:
        return None
    try:
        found = jnp.dtype(dtype)
    except TypeError:
        found = None
    if found is None or found.name not in FLOATS:
        raise TypeError(f"dtype must be one of {list(FLOATS)}, got {dtype!r}.")
    return found


def _axes(axis: int | Sequence[int] | None, shape: tuple[int, ...]) -> tuple[int, ...]:
    """The axes to sum as non-negative numbers in ascending order."""
    if axis is None:
        return tuple(range(len(shape)))
    many = isinstance(axis, Sequence) and not isinstance(axis, str)
    try:
        given = tuple(operator.index(a) for a in (axis if many else (axis,)))  # type: ignore
    except TypeError:
        raise TypeError(f"axis must be an int or a sequence of ints, got {axis!r}.") from None
    if any(isinstance(a, bool | np.bool_) for a in (axis if many else (axis,))):  # type: ignore
        raise TypeError(f"axis must be an int or a sequence of ints, got {axis!r}.")
    outside = [a for a in given if not -len(shape) <= a < len(shape)]
    if outside:
        raise ValueError(f"axis {outside[0]} is out of range for logits of shape {shape}.")
    axes = sorted(a % len(shape) for a in given)
    if len(set(axes)) < len(axes):
        raise ValueError(f"axis names a dimension twice: {given} for logits of shape {shape}.")
    return tuple(axes)


def _smoothing(value: ArrayLike, rank: int, wide: np.dtype) -> Array:
    """The share s."""
    array = operand("label_smoothing", ranged("label_smoothing", value))
    if array.ndim:
        raise ValueError(f"label_smoothing must be one number, got shape {array.shape}.")
    return array.astype(wide).reshape((1,) * rank)


def _trailing(name: str, value: ArrayLike, shape: tuple[int, ...]) -> Array:
    """As NumPy broadcasts it to the logits' shape."""
    array = operand(name, value)
    aligned = (1,) * (len(shape) - array.ndim) + array.shape
    if len(aligned) != len(shape) or not _broadcasts(aligned, shape):
        hint = fixes(spelled(name, value), array.shape, shape)
        raise ValueError(
            f"{name} of shape {array.shape} cannot be broadcast to logits of shape {shape}: "
            f"{hint or _expected_trailing(name, value, array, shape)}."
        )
    return array.reshape(aligned)


def _expected_trailing(name: str, value: Any, array: Array, shape: tuple[int, ...]) -> str:
    """What would fit, where no axes of the logits do."""
    shapes = [f"shape {shape[-rank:]}" for rank in range(1, len(shape) + 1)]
    text = ", or ".join(["pass one number", *shapes])
    if name == "weight" and array.shape == (2,):
        text += f"; for one weight for each class of integer labels, {spelled(name, value)}[labels]"
    return text


def _broadcasts(own: Sequence[int], shape: Sequence[int]) -> bool:
    return all(size in (1, whole) for size, whole in zip(own, shape, strict=True))


def _leading(name: str, array: Array, shape: tuple[int, ...], hint: str) -> Array:
    """One for each index of the first axes, or, then with sizes of 1 behind them, of all."""
    own = array.shape
    fits = len(own) <= len(shape)
    if fits:
        kept = next((d for d in range(len(own), 0, -1) if own[d - 1] != 1), 0)
        fits = own[:kept] == shape[:kept]
    if not fits:
        expected = _expected_leading(shape) + (hint and f"; {hint}")
        raise ValueError(f"{name} of shape {own} does not fit logits of shape {shape}: {expected}.")
    return array.reshape(own + (1,) * (len(shape) - len(own)))


def _expected_leading(shape: tuple[int, ...]) -> str:
    if not shape:
        return "expected one number"
    more = [str(shape[:rank]) for rank in range(2, len(shape) + 1)]
    return "expected " + ", or ".join([f"{shape[:1]}, one per row", *more])


def _sample_weight(value: ArrayLike, shape: tuple[int, ...]) -> Array:
    array = operand("sample_weight", value)
    name = spelled("sample_weight", value)
    return _leading("sample_weight", array, shape, fixes(name, array.shape, shape, fix="weight={}"))


def _where(value: ArrayLike, shape: tuple[int, ...]) -> Array:
    array = operand("where", value, ("bool",), "compare, where > 0, or use where.astype(bool)")
    if array.ndim == len(shape) and _broadcasts(array.shape, shape):
        return array
    hint = fixes(spelled("where", value), array.shape, shape, full=True)
    return _leading("where", array, shape, hint)


def _holds(dtype: np.dtype, number: float) -> bool:
    """Whether an integer dtype, or bool, has that number."""
    info = np.iinfo(dtype if dtype.kind in "iu" else np.uint8)
    low, high = (0, 1) if dtype.kind == "b" else (info.min, info.max)
    return number.is_integer() and low <= number <= high


def _ignored(value: ArrayLike, labels: Array) -> Array:
    """The label to ignore, in the labels' dtype, which must hold it."""
    given = typed("ignore_label", value)
    if given.ndim:
        raise ValueError(f"ignore_label must be one number, got shape {given.shape}.")
    number = known(given)
    if number is not None:
        label = float(number)
        integers = labels.dtype == bool or jnp.issubdtype(labels.dtype, jnp.integer)
        if np.isnan(label) or (integers and not _holds(labels.dtype, label)):
            dtypes = (name for name in ("int8", "int16", "int32") if _holds(np.dtype(name), label))
            fix = f"store them as jnp.{next(dtypes, 'float32')} from the start, or mask with where"
            raise ValueError(
                f"ignore_label={number[()]} cannot be among labels of dtype {labels.dtype.name}: "
                f"{'use where=~jnp.isnan(labels)' if np.isnan(label) else fix}."
            )
    return stop_gradient(operand("ignore_label", given).astype(labels.dtype))


def _like_result(value: ArrayLike, own: tuple[int, ...], kept: tuple[int, ...]) -> str:
    fix = f"jnp.broadcast_to({{}}, {kept})"
    hint = fixes(spelled("normalizer", value), own, kept, fix=fix, of="result")
    return hint and f": {hint}"


def _divisor(
    value: ArrayLike, shape: tuple[int, ...], axes: tuple[int, ...], wide: np.dtype
) -> tuple[Array, Array]:
    """The normalizer, which is one number or one for each that the result has."""
    array = operand("normalizer", value)
    kept = tuple(size for a, size in enumerate(shape) if a not in axes)
    if array.ndim and array.shape != kept:
        raise ValueError(
            f"normalizer of shape {array.shape} must be one number, or have the result's shape "
            f"{kept}{_like_result(value, array.shape, kept)}."
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
    x = operand(name, logits, FLOATS, _SCORES[name])
    y = operand("labels", labels)
    shape = x.shape
    if y.ndim and y.shape != shape:
        hint = fixes_of_labels(spelled("labels", labels), y, shape, name)
        raise ValueError(
            f"labels of shape {y.shape} do not match {name} of shape {shape}: "
            f"{hint or 'pass one label for each logit, or one scalar label for all'}."
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
            modifiers[option] = _trailing(option, value, shape)
    if sample_weight is not None:
        modifiers["sample_weight"] = _sample_weight(sample_weight, shape)
    if where is not None:
        modifiers["where"] = _where(where, shape)
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
