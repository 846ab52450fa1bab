"""Converts checked arguments to the primitive's operands; outside jit, compiles one call."""

import functools
import math
from collections.abc import Callable
from typing import Any, NamedTuple, TypeVar

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array
from jax.lax import stop_gradient

from jax_bce import _check
from jax_bce._arguments import Arguments, Options
from jax_bce._call import MODIFIERS
from jax_bce._operands import AnyArray
from jax_bce._primitive import bce, vary_alike
from jax_bce._reference import (
    Elements,
    arithmetic_dtype,
    divide,
    elements,
    in_two_parts,
    sum_trailing,
)

Result = TypeVar("Result")


class Call(NamedTuple):
    """The primitive's operands and parameters, with the summed axes last."""

    operands: tuple[Array, ...]
    params: dict[str, Any]
    shape: tuple[int, ...]  # of the logits, before their summed axes were moved last
    axes: tuple[int, ...]
    result_dtype: np.dtype
    numbers: dict[str, Array]  # of the related losses, such as gamma, as they were passed

    def in_place(self, gradient: Array) -> Array:
        """The gradient with the summed axes moved back to their place in the logits."""
        return _move(gradient, _last(self.axes, gradient.ndim), self.axes)

    def elements(self, absent: float = 0) -> Elements:
        """The inputs of a formula of `_reference.py`."""
        logits, labels, _, smoothing, *more = self.operands
        modifiers = dict(zip(self.params["modifiers"], more, strict=True))
        return elements(logits, labels, smoothing, modifiers, absent)

    def result(self, loss: Array) -> Array:
        """The loss as it is returned to the user."""
        return _check.loss(loss.astype(self.result_dtype))

    def total(self, values: Array) -> Array:
        """The result for element losses that the primitive does not compute."""
        shape, scale = self.operands[0].shape, self.operands[2]
        modifiers = dict(zip(self.params["modifiers"], self.operands[4:], strict=True))
        rank, count = self.params["reduced_rank"], self.params["count"]
        total = sum_trailing(jnp.broadcast_to(values, shape), rank)
        total = divide(total, scale, count, modifiers.get("divisor"), rank)
        return self.result(total)

    def number(self, name: str) -> Array:
        """A number, or one per class, as an operand in the arithmetic's dtype."""
        array = _trailing(self.numbers[name], len(self.shape)).astype(self.operands[2].dtype)
        return _move(array, self.axes, _last(self.axes, array.ndim))


def evaluate(function: Callable[..., Result], arguments: Arguments, *static: object) -> Result:
    """``function(call, *static)``, compiled as a whole: step by step takes thirty times as long.

    Inside jit, it is inlined.
    """
    # The debug check compiles its own parts, and reports the line that called.
    run = _run if _check.is_on() else _compiled
    arrays = {name: _owned(array) for name, array in arguments.arrays.items()}
    result: Result = run(function, static, arguments.options, arrays)
    return result


def _owned(array: AnyArray) -> AnyArray:
    """An array that the user cannot change while the call runs: jit reads NumPy's in place."""
    return array if isinstance(array, Array) else array.copy()


def _run(
    function: Callable[..., Any],
    static: tuple[object, ...],
    options: Options,
    arguments: dict[str, AnyArray],
) -> Any:
    named = {name: a if isinstance(a, Array) else jnp.asarray(a) for name, a in arguments.items()}
    return function(call_of(named, options), *static)


_run.__name__ = _run.__qualname__ = "jax_bce"  # what JAX's errors, profiles and HLO call it
_compiled = functools.partial(jax.jit, static_argnums=(0, 1, 2), inline=True)(_run)


def _last(axes: tuple[int, ...], rank: int) -> tuple[int, ...]:
    return tuple(range(rank - len(axes), rank))


def _move(array: Array, source: tuple[int, ...], destination: tuple[int, ...]) -> Array:
    return array if source == destination else jnp.moveaxis(array, source, destination)


def _trailing(array: Array, rank: int) -> Array:
    return array.reshape((1,) * (rank - array.ndim) + array.shape)


def _leading(array: Array, rank: int) -> Array:
    return array.reshape((*array.shape[:rank], *(1,) * (rank - array.ndim)))


def _smoothing(array: Array | None, rank: int, wide: np.dtype) -> Array:
    return (
        jnp.zeros((1,) * rank, wide) if array is None else array.astype(wide).reshape((1,) * rank)
    )


def _divisor(normalizer: Array, shape: tuple[int, ...], axes: tuple[int, ...]) -> Array:
    """The normalizer with sizes of 1 in the summed dimensions, or in all."""
    kept = (1 if a in axes or not normalizer.ndim else size for a, size in enumerate(shape))
    return normalizer.reshape(tuple(kept))


def _mean_weight(
    labels: Array,
    factors: dict[str, Array],
    axes: tuple[int, ...],
    shape: tuple[int, ...],
    wide: np.dtype,
    implementation: str | None,
) -> tuple[Array, Array]:
    """The mean over axes of each element's weight, which is 0 for dropped elements.

    For symbolic sizes it is the sum. Nothing as large as the logits is formed unless a factor is.
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
    if not axes:  # a kernel sums over at least one dimension
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
    """A denominator in the arithmetic's dtype, and its rounding error."""
    if number.dtype in (np.float64, np.int32, np.int64):
        high, low = in_two_parts(number, wide)
        return high, low
    return number.astype(wide), jnp.zeros(number.shape, wide)


def call_of(arrays: dict[str, Array], options: Options) -> Call:
    """The call for checked arguments."""
    x, y = arrays.pop("logits"), arrays.pop("labels")
    shape, rank, axes = x.shape, x.ndim, options.axes
    wide = arithmetic_dtype(x.dtype)
    y = y if y.ndim else y.reshape((1,) * rank)
    smoothing = _smoothing(arrays.pop("label_smoothing", None), rank, wide)
    normalizer = arrays.pop("normalizer", None)

    if "ignore_label" in arrays:
        ignored = arrays["ignore_label"].astype(y.dtype)
        arrays["ignore_label"] = stop_gradient(ignored)
    align = {"sample_weight": _leading, "where": _leading}
    modifiers = {
        option: align.get(option, _trailing)(arrays.pop(option), rank)
        for option in MODIFIERS
        if option in arrays
    }

    count: Any = 1
    divisor = None
    if normalizer is not None:
        divisor = _parts(_divisor(normalizer, shape, axes), wide)
    elif options.reduction in ("mean", "weighted_mean"):
        weights = ("weight", "sample_weight") if options.reduction == "weighted_mean" else ()
        counted = {*weights, "where", "ignore_label"}
        factors = {option: modifiers[option] for option in modifiers if option in counted}
        count = math.prod(shape[a] for a in axes)
        if factors:
            divisor = _mean_weight(y, factors, axes, shape, wide, options.implementation)
        elif not isinstance(count, int):  # symbolic sizes, in jax.export
            divisor = _parts(jnp.asarray(count).reshape((1,) * rank), wide)
        count = count if isinstance(count, int) else 1
    if divisor is not None:
        modifiers["divisor"], modifiers["divisor_low"] = divisor[0], stop_gradient(divisor[1])

    result_dtype = options.dtype or (wide if options.reduction != "none" else x.dtype)
    # The kernel rounds element losses to the result's dtype; it returns sums and float64 unrounded.
    direct = options.reduction == "none" and wide == np.float32 and result_dtype != np.float64
    params = {
        "modifiers": tuple(modifiers),
        "reduced_rank": len(axes),
        "count": max(1, count),
        "implementation": options.implementation,
        "transposed": axes != _last(axes, rank),
        "loss_dtype": result_dtype if direct else wide,
    }
    last = _last(axes, rank)
    operands = (x, y, jnp.ones((1,) * rank, wide), smoothing, *modifiers.values())
    operands = vary_alike(*(_move(operand, axes, last) for operand in operands))
    _check.operands(options.name, operands, tuple(modifiers))
    return Call(operands, params, shape, axes, result_dtype, arrays)
