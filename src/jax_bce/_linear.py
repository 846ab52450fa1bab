"""`linear_loss`: the last layer of a classifier and its loss, without the logits in memory."""

from __future__ import annotations  # help() shows names, not the Union behind them

import functools
import operator
from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array
from jax.sharding import PartitionSpec
from jax.typing import ArrayLike, DTypeLike

from jax_bce import _check
from jax_bce._arguments import Implementation, Options, Reduction, checked
from jax_bce._callers import renamed
from jax_bce._evaluate import call_of
from jax_bce._operands import FLOATS, AnyArray, known, operand
from jax_bce._primitive import vary_alike
from jax_bce._reference import arithmetic_dtype
from jax_bce._walk import AXES, OPTIONS, linear

_INTEGERS = ("int32", "int8", "uint8", "int16", "int64")
_BLOCK_BYTES = 64 * 2**20


def linear_loss(
    features: ArrayLike,
    weight: ArrayLike,
    labels: ArrayLike | None = None,
    *,
    bias: ArrayLike | None = None,
    positives: ArrayLike | None = None,
    scale: ArrayLike | None = None,
    class_weight: ArrayLike | None = None,
    sample_weight: ArrayLike | None = None,
    pos_weight: ArrayLike | None = None,
    label_smoothing: ArrayLike = 0.0,
    where: ArrayLike | None = None,
    ignore_label: ArrayLike | None = None,
    reduction: Reduction = "mean",
    axis: int | Sequence[int] | None = None,
    normalizer: ArrayLike | None = None,
    dtype: DTypeLike | None = None,
    precision: Any = None,
    block_bytes: int = _BLOCK_BYTES,
    implementation: Implementation | None = None,
) -> Array:
    """DOC"""
    x, w = _factors(features, weight)
    shape = x.shape[0], w.shape[1]
    arrays = {"features": x, "weight": w}
    if bias is not None:
        arrays["bias"] = _bias(bias, shape)
    if scale is not None:
        arrays["scale"] = _number("scale", scale)
    if (labels is None) == (positives is None):
        raise TypeError(
            "linear_loss() takes either labels or positives, got "
            f"{'neither' if labels is None else 'both'}."
        )
    if positives is not None:
        arrays["positives"] = _positives(positives, shape, ignore_label)
    _check_reduction(reduction, axis, shape)
    given = _indices_hint(labels, shape)
    # A view of one number, for its shape: the checks are those of `loss`.
    wide = arithmetic_dtype(jnp.promote_types(x.dtype, w.dtype))
    logits = np.broadcast_to(np.zeros((), wide), shape)
    with renamed(weight="class_weight"):
        arguments = checked(
            logits,
            0 if labels is None else given,
            weight=class_weight,
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
    options = dict(arguments.arrays)
    options.pop("logits")
    owned = {
        name: {key: a if isinstance(a, Array) else a.copy() for key, a in group.items()}
        for name, group in (("arrays", arrays), ("options", options))
    }
    run = _run if _check.is_on() else _compiled
    static = arguments.options, _bytes(block_bytes), _precision(precision)
    result: Array = run(*static, owned["arrays"], owned["options"])
    return result


def _factors(features: ArrayLike, weight: ArrayLike) -> tuple[AnyArray, AnyArray]:
    x, w = operand("features", features, FLOATS), operand("weight", weight, FLOATS)
    if x.ndim != 2:
        raise ValueError(
            f"features must have shape (rows, width), got {x.shape}: use "
            f"{'features[None]' if x.ndim < 2 else 'features.reshape(-1, features.shape[-1])'}."
        )
    if w.ndim != 2 or w.shape[0] != x.shape[1]:
        transposed = w.ndim == 2 and w.shape[1] == x.shape[1]
        raise ValueError(
            f"weight of shape {w.shape} does not fit features of shape {x.shape}: "
            f"{'use weight.T' if transposed else f'expected ({x.shape[1]}, labels)'}."
        )
    if not all(isinstance(size, int) for size in (*x.shape, *w.shape)):
        raise ValueError(
            f"linear_loss needs known sizes, got {x.shape} and {w.shape}: export it for each size."
        )
    return x, w


def _bias(bias: ArrayLike, shape: tuple[int, ...]) -> AnyArray:
    array = operand("bias", bias)
    if array.shape not in ((), shape[1:]):
        raise ValueError(
            f"bias of shape {array.shape} does not fit {shape[1]} labels: expected {shape[1:]}, "
            "or one number."
        )
    return array


def _number(name: str, value: ArrayLike) -> AnyArray:
    array = operand(name, value)
    if array.ndim:
        raise ValueError(f"{name} must be one number, got shape {array.shape}.")
    return array


def _positives(
    positives: ArrayLike, shape: tuple[int, ...], ignore_label: ArrayLike | None
) -> AnyArray:
    array = operand("positives", positives, _INTEGERS)
    if array.ndim != 2 or array.shape[0] != shape[0]:
        one = array.ndim == 1 and array.shape == shape[:1]
        raise ValueError(
            f"positives of shape {array.shape} do not fit {shape[0]} rows: "
            f"{'use positives[:, None]' if one else f'expected ({shape[0]}, k), padded with -1'}."
        )
    if ignore_label is not None:
        raise ValueError(
            f"ignore_label={ignore_label} has no meaning with positives, which are all labels of 1:"
            " pad them with -1, and drop rows with where."
        )
    numbers = known(array)
    if numbers is not None and numbers.size:
        low, high = numbers.min(), numbers.max()
        if low < -1 or high >= shape[1]:
            raise ValueError(
                f"positives must be indices from 0 to {shape[1] - 1}, or -1, got "
                f"{low if low < -1 else high}."
            )
    return array


def _indices_hint(labels: Any, shape: tuple[int, ...]) -> Any:
    """The labels; raises if they are class indices."""
    own = getattr(labels, "shape", None)
    kind = getattr(getattr(labels, "dtype", None), "kind", "")
    if own == shape[:1] and shape[1:] != shape[:1] and kind in "iu":
        raise ValueError(
            f"labels of shape {own} do not match features @ weight of shape {shape}: for class "
            "indices, use positives=labels[:, None]."
        )
    return labels


def _check_reduction(reduction: str, axis: Any, shape: tuple[int, ...]) -> None:
    if reduction == "none":
        raise ValueError(
            f"reduction='none' would return all {shape[0]} x {shape[1]} losses, which linear_loss "
            "does not hold in memory: use axis=1 for one loss per row, or jax_bce.loss."
        )
    if axis is None or isinstance(axis, str):
        return
    axes = axis if isinstance(axis, Sequence) else (axis,)
    if {*axes} <= {0, 1, -1, -2} and {a % 2 for a in axes} not in ({1}, {0, 1}):
        raise ValueError(
            f"axis={axis} is not available for linear_loss: use axis=1 for one loss per row, or "
            "None for one number; for one loss per label, jax_bce.loss."
        )


def _bytes(value: int) -> int:
    try:
        number = operator.index(value)
    except TypeError:
        number = 0
    if number < 1 or isinstance(value, bool):
        raise ValueError(
            f"block_bytes must be a positive number of bytes, such as 64 * 2**20, got {value!r}."
        )
    return number


def _precision(precision: Any) -> Any:
    """The precision of the products: the context's, too, which does not reach the lowering."""
    context: Any = jax.config
    return precision if precision is not None else context.jax_default_matmul_precision


def _run(
    options: Options,
    block_bytes: int,
    precision: Any,
    arrays: dict[str, Any],
    others: dict[str, Any],
) -> Array:
    arrays = {name: jnp.asarray(array) for name, array in arrays.items()}
    others = {name: jnp.asarray(array) for name, array in others.items()}
    x, w = arrays["features"], arrays["weight"]
    shape = x.shape[0], w.shape[1]
    wide = arithmetic_dtype(jnp.promote_types(x.dtype, w.dtype))
    call = call_of({"logits": jnp.broadcast_to(jnp.zeros((), wide), shape)} | others, options)
    _, labels, _, smoothing, *modifiers = call.operands
    if "bias" in arrays:
        arrays["bias"] = jnp.broadcast_to(arrays["bias"], shape[1:])[None]
    if "scale" in arrays:
        arrays["scale"] = arrays["scale"].astype(wide)
    if "positives" in arrays:
        arrays["positives"] = arrays["positives"].astype(np.int32)
    else:
        arrays["labels"] = labels
    arrays["smoothing"] = smoothing
    given = dict(zip(call.params["modifiers"], modifiers, strict=True))
    arrays |= {here: given[there] for here, there in OPTIONS.items() if there in given}
    total = _on_mesh(
        arrays,
        gradients=(),
        reduced_rank=len(options.axes),
        count=call.params["count"],
        implementation=options.implementation,
        budget=block_bytes,
        precision=precision,
    )
    return call.result(total)


_run.__name__ = _run.__qualname__ = "jax_bce_linear"
_compiled = functools.partial(jax.jit, static_argnums=(0, 1, 2), inline=True)(_run)


def _local(arrays: dict[str, Array], **params: Any) -> Array:
    names = tuple(arrays)
    return linear(*vary_alike(*arrays.values()), names=names, **params)[0]


def _on_mesh(arrays: dict[str, Array], **params: Any) -> Array:
    """The loss; on an explicit mesh, each device walks its own rows and labels."""
    rows, labels = (_spread(arrays, dimension) for dimension in (0, 1))
    if not rows and not labels:
        return _local(arrays, **params)
    specs = {}
    for name, array in arrays.items():
        axes = AXES.get(name, (0, 1))
        spec: list[Any] = [None] * array.ndim
        for own, names in zip(axes, (rows, labels), strict=True):
            if own is not None and array.shape[own] > 1:
                spec[own] = names or None
        specs[name] = PartitionSpec(*spec)
        reshard: Any = jax.sharding.reshard
        arrays[name] = reshard(array, specs[name])
    per_row = params["reduced_rank"] == 1

    def of_device(arrays: dict[str, Array]) -> Array:
        if labels and "positives" in arrays:
            first = jax.lax.axis_index(labels) * arrays["weight"].shape[1]
            arrays = arrays | {"positives": arrays["positives"] - first}
        total = _local(arrays, **params)
        over = labels if per_row else (*rows, *labels)
        return jax.lax.psum(total, over) if over else total

    shard_map: Any = jax.shard_map
    function = shard_map(
        of_device,
        in_specs=(specs,),
        out_specs=PartitionSpec(rows or None) if per_row else PartitionSpec(),
        axis_names={*rows, *labels},
    )
    return function(arrays)  # type: ignore[no-any-return]


def _spread(arrays: dict[str, Array], dimension: int) -> tuple[str, ...]:
    """The axes of an explicit mesh that the rows (0), or the labels (1), are sharded over."""
    found: dict[tuple[str, ...], str] = {}
    for name, array in arrays.items():
        aval: Any = jax.typeof(array)
        spec = [*aval.sharding.spec, *[None] * array.ndim][: array.ndim]
        own = AXES.get(name, (0, 1))[dimension]
        for place, axes in enumerate(spec):
            names = axes if isinstance(axes, tuple) else (axes,) if axes else ()
            if names and place == own:
                found.setdefault(names, name)
            elif names and name in ("features", "weight") and place != AXES[name][1 - dimension]:
                raise ValueError(
                    f"{name} is sharded over its width as {aval.sharding.spec}: reshard it with "
                    f"jax.sharding.reshard, to shard rows and labels only."
                )
    if len(found) > 1:
        (one, first), (other, second) = list(found.items())[:2]
        raise ValueError(
            f"{first} is sharded over {one} and {second} over {other} along the same dimension: "
            "shard them alike with jax.sharding.reshard."
        )
    return next(iter(found), ())
