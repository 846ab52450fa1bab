"""Checks a user's arguments before anything is computed."""

from __future__ import annotations

import inspect
import operator
import reprlib
from collections.abc import Callable, Mapping, Sequence
from types import MappingProxyType
from typing import Any, Literal, NamedTuple, TypedDict, TypeVar, get_args

import jax.numpy as jnp
import numpy as np
from jax.typing import ArrayLike, DTypeLike

from jax_bce._alignment import fixes, fixes_of_labels, spelled
from jax_bce._callers import refuse_keras
from jax_bce._kernels import missing
from jax_bce._operands import FLOATS, AnyArray, known, operand, ranged, typed

Reduction = Literal["none", "sum", "mean", "weighted_mean"]
Implementation = Literal["cpu", "cuda", "xla"]
Residuals = Literal["gradient", "recompute"]

_SAME = {  # the names of Keras and others for a reduction
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
_FUNCTION = TypeVar("_FUNCTION", bound=Callable[..., Any])


class Keywords(TypedDict, total=False):
    """The keywords of `jax_bce.loss` that all related losses accept as well."""

    weight: ArrayLike | None
    sample_weight: ArrayLike | None
    label_smoothing: ArrayLike
    where: ArrayLike | None
    ignore_label: ArrayLike | None
    reduction: Reduction
    axis: int | Sequence[int] | None
    normalizer: ArrayLike | None
    dtype: DTypeLike | None
    implementation: Implementation | None


_RESIDUALS = "only jax_bce.loss, focal_loss and asymmetric_loss have the option residuals"
_INSTEAD = {  # what to use in place of a keyword of `loss` that a related loss does not accept
    ("focal_loss", "pos_weight"): "alpha is the weight of the positive class",
    ("asymmetric_loss", "pos_weight"): (
        "use weight=jnp.where(labels == 1, pos_weight, 1); gamma_neg and gamma_pos, or alpha of "
        "focal_loss, are other ways to treat the classes differently"
    ),
    ("loss_and_grad", "residuals"): _RESIDUALS,
    ("loss_from_probs", "residuals"): _RESIDUALS,
}


def only_known(function: str, keywords: Keywords) -> None:
    """Raises Python's usual error for an unknown keyword, which ``**keywords`` would accept."""
    for name in keywords.keys() - Keywords.__annotations__.keys():
        hint = f": {_INSTEAD[function, name]}." if (function, name) in _INSTEAD else ""
        raise TypeError(f"{function}() got an unexpected keyword argument {name!r}{hint}")


def shows_keywords(function: _FUNCTION) -> _FUNCTION:
    """Gives the function a signature that lists the keywords behind ``**keywords``."""
    signature, shared = inspect.signature(function), inspect.signature(checked).parameters
    own = [p for p in signature.parameters.values() if p.kind is not p.VAR_KEYWORD]
    keywords = [shared[name] for name in Keywords.__annotations__]
    function.__signature__ = signature.replace(parameters=[*own, *keywords])  # type: ignore
    return function


class Options(NamedTuple):
    """The options that are static under jit."""

    name: str  # of the logits
    axes: tuple[int, ...]
    reduction: Reduction
    dtype: np.dtype | None
    implementation: Implementation | None


class Arguments(NamedTuple):
    """The checked arguments of a call: arrays by name, which may be traced, and options."""

    arrays: dict[str, AnyArray]
    options: Options


def one_of(name: str, value: object, allowed: Sequence[object]) -> None:
    same = None
    if isinstance(value, str | None):  # arrays are neither compared nor printed
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


def _smoothing(value: ArrayLike) -> AnyArray | None:
    """The smoothing s, or None if it is known to be 0."""
    array = ranged("label_smoothing", value)
    if array.ndim:
        raise ValueError(f"label_smoothing must be one number, got shape {array.shape}.")
    number = known(array)
    return None if number is not None and number == 0 else operand("label_smoothing", value)


def _trailing(name: str, value: ArrayLike, shape: tuple[int, ...]) -> AnyArray:
    """An array that NumPy would broadcast to the logits' shape."""
    array = operand(name, value)
    aligned = (1,) * (len(shape) - array.ndim) + array.shape
    if len(aligned) != len(shape) or not _broadcasts(aligned, shape):
        hint = fixes(spelled(name, value), array.shape, shape)
        raise ValueError(
            f"{name} of shape {array.shape} cannot be broadcast to logits of shape {shape}: "
            f"{hint or _expected_trailing(name, value, array.shape, shape)}."
        )
    return array


def _expected_trailing(name: str, value: Any, own: tuple[int, ...], shape: tuple[int, ...]) -> str:
    """The shapes that would fit, for an operand that matches no axes of the logits."""
    shapes = [f"shape {shape[-rank:]}" for rank in range(1, len(shape) + 1)]
    text = ", or ".join(["pass one number", *shapes])
    if name == "weight" and own == (2,):
        text += f"; for one weight per class of integer labels, {spelled(name, value)}[labels]"
    return text


def _broadcasts(own: Sequence[int], shape: Sequence[int]) -> bool:
    return all(size in (1, whole) for size, whole in zip(own, shape, strict=True))


def _check_leading(name: str, own: tuple[int, ...], shape: tuple[int, ...], hint: str) -> None:
    """Raises unless the shape equals the first axes of the logits, plus optional axes of size 1."""
    fits = len(own) <= len(shape)
    if fits:
        kept = next((d for d in range(len(own), 0, -1) if own[d - 1] != 1), 0)
        fits = own[:kept] == shape[:kept]
    if not fits:
        expected = _expected_leading(shape) + (hint and f"; {hint}")
        raise ValueError(f"{name} of shape {own} does not fit logits of shape {shape}: {expected}.")


def _expected_leading(shape: tuple[int, ...]) -> str:
    if not shape:
        return "expected one number"
    more = [str(shape[:rank]) for rank in range(2, len(shape) + 1)]
    return "expected " + ", or ".join([f"{shape[:1]}, one per row", *more])


def _sample_weight(value: ArrayLike, shape: tuple[int, ...]) -> AnyArray:
    array = operand("sample_weight", value)
    hint = fixes(spelled("sample_weight", value), array.shape, shape, fix="weight={}")
    _check_leading("sample_weight", array.shape, shape, hint)
    return array


def _where(value: ArrayLike, shape: tuple[int, ...]) -> AnyArray:
    array = operand("where", value, ("bool",), "compare, where > 0, or use where.astype(bool)")
    if array.ndim != len(shape) or not _broadcasts(array.shape, shape):
        hint = fixes(spelled("where", value), array.shape, shape, full=True)
        _check_leading("where", array.shape, shape, hint)
    return array


def _holds(dtype: np.dtype, number: float) -> bool:
    """Whether an integer dtype, or bool, can hold the number."""
    info = np.iinfo(dtype if dtype.kind in "iu" else np.uint8)
    low, high = (0, 1) if dtype.kind == "b" else (info.min, info.max)
    return number.is_integer() and low <= number <= high


def _ignored(value: ArrayLike, labels: AnyArray) -> AnyArray:
    """The label to ignore. The labels' dtype must be able to hold it."""
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
                f"labels of dtype {labels.dtype.name} cannot hold ignore_label={number[()]}: "
                f"{'use where=~jnp.isnan(labels)' if np.isnan(label) else fix}."
            )
    return operand("ignore_label", given)


def _like_result(value: ArrayLike, own: tuple[int, ...], kept: tuple[int, ...]) -> str:
    fix = f"jnp.broadcast_to({{}}, {kept})"
    hint = fixes(spelled("normalizer", value), own, kept, fix=fix, of="result")
    return hint and f": {hint}"


def _normalizer(value: ArrayLike, shape: tuple[int, ...], axes: tuple[int, ...]) -> AnyArray:
    """A number, or an array of the result's shape."""
    array = operand("normalizer", value)
    kept = tuple(size for a, size in enumerate(shape) if a not in axes)
    if array.ndim and array.shape != kept:
        raise ValueError(
            f"normalizer of shape {array.shape} must be one number, or have the result's shape "
            f"{kept}{_like_result(value, array.shape, kept)}."
        )
    return array


def available(implementation: Implementation | None) -> None:
    """Raises unless the implementation is None or one that this machine has."""
    one_of("implementation", implementation, (None, *get_args(Implementation)))
    if implementation in ("cpu", "cuda") and (reason := missing(implementation)):
        raise RuntimeError(f"implementation={implementation!r} is not available: {reason}.")


def checked(
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
    implementation: Implementation | None = None,
    name: str = "logits",
    numbers: Mapping[str, ArrayLike] = MappingProxyType({}),
) -> Arguments:
    """Checks the arguments of `jax_bce.loss`, and the numbers of a related loss.

    `numbers` maps names to numbers, or to one number per class, in the range for that name.
    """
    refuse_keras()
    one_of("reduction", reduction, get_args(Reduction))
    available(implementation)
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

    arrays = {"logits": x, "labels": y}
    smoothing = _smoothing(label_smoothing)
    if smoothing is not None:
        arrays["label_smoothing"] = smoothing
    for option, value in (("weight", weight), ("pos_weight", pos_weight)):
        if value is not None:
            arrays[option] = _trailing(option, value, shape)
    if sample_weight is not None:
        arrays["sample_weight"] = _sample_weight(sample_weight, shape)
    if where is not None:
        arrays["where"] = _where(where, shape)
    if ignore_label is not None:
        arrays["ignore_label"] = _ignored(ignore_label, y)
    if normalizer is not None:
        arrays["normalizer"] = _normalizer(normalizer, shape, axes)
    options = Options(name, axes, reduction, _float_dtype(dtype), implementation)
    for number, value in numbers.items():
        ranged(number, value)
        arrays[number] = _trailing(number, value, shape)
    return Arguments(arrays, options)
