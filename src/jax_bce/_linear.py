"""`linear_loss`: the last layer of a classifier and its loss, without the logits in memory."""

from __future__ import annotations  # help() shows names, not the Union behind them

import functools
import operator
from collections.abc import Hashable, Mapping, Sequence
from typing import Any, NoReturn

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array
from jax.sharding import AxisType, NamedSharding, PartitionSpec
from jax.typing import ArrayLike, DTypeLike

from jax_bce import _check
from jax_bce._arguments import Implementation, Options, Reduction, checked
from jax_bce._callers import renamed
from jax_bce._evaluate import call_of
from jax_bce._operands import FLOATS, AnyArray, known, operand, typed
from jax_bce._primitive import vary_alike
from jax_bce._reference import arithmetic_dtype
from jax_bce._walk import AXES, OPTIONS, linear

_INTEGERS = ("int32", "int8", "uint8", "int16", "int64")
BLOCK_BYTES = 64 * 2**20


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
    block_bytes: int = BLOCK_BYTES,
    implementation: Implementation | None = None,
) -> Array:
    r"""Binary cross-entropy of the scores of a linear layer, without the scores in memory.

    .. math:: \text{loss}(\text{scale} \cdot \text{features} \, \text{weight} + \text{bias},
              \, \text{labels})

    For classifiers with many labels, whose logits of shape (rows, labels) would be most of the
    memory: 8,192 rows and 1,000,000 labels are 31 GiB in float32, and as much again for their
    gradient. This function computes a block of logits, its loss and its gradient in one pass, and
    from them this block's part of all gradients, and then forgets the block.

    Args:
      features: the input of the layer, of shape (rows, width): float16, bfloat16, float32 or
        float64.
      weight: the matrix of the layer, of shape (width, labels), in one of these dtypes.
      labels: as for `loss`, of shape (rows, labels), or scalar.
      bias: of shape (labels,), or one number.
      positives: in place of labels, the indices of each row's positive labels, as integers of shape
        (rows, k), padded with -1. All other labels are 0. An index that occurs twice counts once.
        Known indices are checked, also those that a compiled function closes over; a traced one
        that is not from 0 to labels - 1 is padding, and `checking` warns of it.
      scale: a number that multiplies the products, such as a learned inverse temperature.
      class_weight: the `weight` of `loss`: a factor for each element, usually of shape (labels,).
      sample_weight: as for `loss`, usually of shape (rows,).
      pos_weight: as for `loss`, usually of shape (labels,).
      label_smoothing: as for `loss`.
      where: as for `loss`, usually of shape (rows,). The features of a row that is dropped as a
        whole may be NaN, too, if `where` has that shape.
      ignore_label: as for `loss`; not with positives.
      reduction: as for `loss`, except "none", whose result would have the size of the logits.
      axis: None for one loss, or 1 for one loss per row. (One per label is not available.)
      normalizer: as for `loss`.
      dtype: of the result; by default float32, or float64 if features or weight are.
      precision: of the matrix products, as for `jax.numpy.dot`; by default, the context's.
      block_bytes: the memory of a block of logits, its gradient, labels and slices, on each
        device. The size matters little for the speed, unless it is a fraction of the default.
      implementation: as for `loss`.

    Returns:
      The loss: one number, or of shape (rows,).

    Cost:
      The loss alone takes one matrix product, of 2 rows * width * labels operations. The loss and
      all its gradients take three, as for any linear layer: nothing is computed twice, unless axis
      is 1, which takes a fourth. 16-bit features and weights are multiplied as they are, and summed
      in float32: logits are float32; their gradient is rounded to bfloat16 before its products if
      both are bfloat16.

    Memory:
      block_bytes, the results, and float32 sums of the features' size (if rows > labels, of the
      weight's size). If rows <= labels, blocks are columns of the logits, otherwise rows. For
      backpropagation, the gradients themselves are stored, in the size of their arguments (those of
      float16 in float32); if axis is 1, nothing. With bfloat16, XLA on a CPU copies features and
      weight once. ``implementation="xla"`` takes up to twice block_bytes. Reverse-mode
      differentiation of a gradient (not `jax.jvp` of it) stores every block.

    Derivatives:
      As for `loss`, with respect to features, weight, bias, scale, and everything else that may be
      traced, to any order and in any mode. One call computes those with respect to the first four.
      Others take an additional pass.

    Several devices:
      Rows, labels or both may be sharded, over different mesh axes, by jit or in a shard_map; the
      width may not on explicit axes. Neither features nor weight is gathered, if the number of
      labels (or of rows, if rows > labels) is a multiple of the devices that share them. On
      explicit axes (the default of `jax.make_mesh`, except in JAX 0.8) and in a shard_map, each
      gradient takes one all-reduce over the axes that its argument is not sharded over. On
      automatic axes, where the shardings are not known when the loop is written:

      - The weight's gradient (if rows > labels: the features') is reduced block by block, in as
        many bytes.
      - The other gradient is kept on each device for the rows of all devices, if that takes at most
        block_bytes. If it takes more, sharded labels cost an all-reduce of it in each block.

      In a shard_map over labels, positives count from the first label of the shard: subtract
      ``jax.lax.axis_index(axis) * weight.shape[1]``. The result is the loss of the shard. With
      reduction "sum" or a normalizer, `jax.lax.psum` gives that of all; `jax.lax.pmean` gives the
      mean of all only if no element is dropped or weighted.

    Raises:
      TypeError, ValueError, RuntimeError: as for `loss`; ValueError if the shapes of features,
        weight, bias, scale or positives do not fit, a known index is out of range, or an option is
        not available.

    Source:
      For softmax, the idea is that of Wijmans et al., Cut Your Losses in Large-Vocabulary Language
      Models, 2024, https://arxiv.org/abs/2411.09009.

    Example:
      >>> import jax, jax.numpy as jnp, jax_bce
      >>> features = jnp.array([[1.0, 0.0], [0.0, 1.0]])
      >>> weight = jnp.array([[2.0, -1.0, 0.0], [0.0, 1.0, -3.0]])
      >>> positives = jnp.array([[0, -1], [1, 2]])  # rows with one and with two positive labels
      >>> loss = lambda weight: jax_bce.linear_loss(features, weight, positives=positives)
      >>> value, gradient = jax.value_and_grad(loss)(weight)
      >>> print(value, gradient)
      0.86472213 [[-0.01986715  0.04482357  0.08333334]
       [ 0.08333334 -0.04482357 -0.15876237]]
    """
    x, w = _factors(features, weight)
    shape = x.shape[0], w.shape[1]
    arrays = {"features": x, "weight": w}
    if bias is not None:
        arrays["bias"] = _bias(bias, shape)
    if scale is not None:
        arrays["scale"] = number("scale", scale)
    if (labels is None) == (positives is None):
        raise TypeError(
            "linear_loss() takes either labels or positives, got "
            f"{'neither' if labels is None else 'both'}."
        )
    if positives is not None:
        arrays["positives"] = _positives(positives, shape, ignore_label)
    _refuse_elements(reduction, shape)
    _refuse_indices(labels, shape)
    # A view of one number, for its shape: the checks are those of `loss`.
    wide = arithmetic_dtype(jnp.promote_types(x.dtype, w.dtype))
    logits = np.broadcast_to(np.zeros((), wide), shape)
    with renamed(**{"weight": "class_weight", "logits.shape": f"{shape}"}):
        arguments = checked(
            logits,
            0 if labels is None else labels,
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
    if arguments.options.axes not in ((1,), (0, 1)):
        raise ValueError(
            f"axis={axis} is not available for linear_loss: use axis=1 for one loss per row, or "
            "None for one number; for one loss per label, jax_bce.loss."
        )
    others = {name: array for name, array in arguments.arrays.items() if name != "logits"}
    run = _run if _check.is_on() else _compiled
    static = arguments.options, block_size(block_bytes), precision_of(precision)
    result: Array = run(*static, owned(arrays), owned(others))
    return result


def owned(arrays: Mapping[str, AnyArray]) -> dict[str, AnyArray]:
    """Arrays that the user cannot change while the call runs: jit reads NumPy's in place."""
    return {name: a if isinstance(a, Array) else a.copy() for name, a in arrays.items()}


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
    refuse_symbolic("linear_loss", x.shape, w.shape)
    return x, w


def refuse_symbolic(function: str, first: tuple[Any, ...], second: tuple[Any, ...]) -> None:
    if not all(isinstance(size, int) for size in (*first, *second)):
        raise ValueError(
            f"{function} needs known sizes, got {first} and {second}: export it for each size."
        )


def _bias(bias: ArrayLike, shape: tuple[int, ...]) -> AnyArray:
    array = operand("bias", bias)
    if array.shape not in ((), shape[1:]):
        raise ValueError(
            f"bias of shape {array.shape} does not fit {shape[1]} labels: expected {shape[1:]}, "
            "or one number."
        )
    return array


def number(name: str, value: ArrayLike) -> AnyArray:
    """One number, which may be traced."""
    array = operand(name, value)
    if array.ndim:
        raise ValueError(f"{name} must be one number, got shape {array.shape}.")
    return array


def _positives(
    positives: ArrayLike, shape: tuple[int, ...], ignore_label: ArrayLike | None
) -> AnyArray:
    fix = "pass a matrix of 0 and 1 as labels"
    if getattr(getattr(positives, "dtype", None), "kind", "") != "b":
        fix = f"use positives.astype(jnp.int32), or {fix}"
    array = typed("positives", positives, _INTEGERS, fix)
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
        # As indices, they would name the labels 0 and 1 several times in each row.
        if array.shape == shape and shape[1] > 2 and low >= 0 and high <= 1:
            raise ValueError(
                f"positives of shape {shape} are 0 and 1 alone: pass a matrix of labels as labels."
            )
    return operand("positives", array, _INTEGERS)


def _refuse_indices(labels: Any, shape: tuple[int, ...]) -> None:
    """Raises for one or more indices per row, which `loss` would want as a matrix."""
    own = getattr(labels, "shape", ())
    kind = getattr(getattr(labels, "dtype", None), "kind", "")
    if kind in ("i", "u") and own[:1] == shape[:1] and own != shape and len(own) <= 2:
        raise ValueError(
            f"labels of shape {own} do not match features @ weight of shape {shape}: for the "
            f"indices of labels, use positives=labels{'[:, None]' if len(own) == 1 else ''}."
        )


def _refuse_elements(reduction: Any, shape: tuple[int, ...]) -> None:
    if isinstance(reduction, str | None) and reduction in ("none", None):
        raise ValueError(
            f"reduction={reduction!r} would return all {shape[0]} x {shape[1]} losses, which "
            "linear_loss does not hold in memory: use axis=1 for one loss per row, or jax_bce.loss."
        )


def block_size(value: int) -> int:
    """The number of bytes of a block, which is static."""
    try:
        size = operator.index(value)
    except TypeError:
        size = 0
    if size < 1 or isinstance(value, bool):
        raise ValueError(
            f"block_bytes must be a positive number of bytes, such as 64 * 2**20, got {value!r}."
        )
    return size


def precision_of(precision: Any) -> Any:
    """The precision of the products: the context's, too, which does not reach the lowering."""
    if precision is None:
        context: Any = jax.config
        return context.jax_default_matmul_precision
    precision = tuple(precision) if isinstance(precision, list) else precision
    if not isinstance(precision, Hashable):
        raise TypeError(
            f"precision must be one that jax.numpy.dot accepts, such as 'highest', got {precision}."
        )
    return precision


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
        indices = arrays["positives"]
        _check.positives(indices, shape)
        indices = indices.astype(jnp.promote_types(indices.dtype, np.int32))
        # An index that int32 cannot hold is out of range, and stays so.
        arrays["positives"] = jnp.clip(indices, -1, shape[1]).astype(np.int32)
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
    refuse_sharded_width({"features": (arrays["features"], 1), "weight": (arrays["weight"], 0)})
    places = {name: AXES.get(name, (0, 1)) for name in arrays}
    rows, labels = (
        sharded_over(
            {
                name: (arrays[name], at)
                for name, both in places.items()
                if (at := both[k]) is not None
            }
        )
        for k in (0, 1)
    )
    if not rows and not labels:
        return _local(arrays, **params)
    if {*rows} & {*labels}:
        _refuse_same_axes(arrays, places, rows, labels)
    specs = {}
    mesh = explicit_mesh(*arrays.values())
    for name, array in arrays.items():
        spec: list[Any] = [None] * array.ndim
        for own, names in zip(places[name], (rows, labels), strict=True):
            if own is not None and array.shape[own] > 1:
                spec[own] = names or None
        specs[name] = PartitionSpec(*spec)
        reshard: Any = jax.sharding.reshard
        arrays[name] = reshard(array, NamedSharding(mesh, specs[name]))
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
        mesh=mesh,
        in_specs=(specs,),
        out_specs=PartitionSpec(rows or None) if per_row else PartitionSpec(),
        # All explicit axes: JAX 0.8 has no scan where some are manual and others are not.
        axis_names=_explicit_axes(mesh),
    )
    return function(arrays)  # type: ignore[no-any-return]


def _refuse_same_axes(
    arrays: Mapping[str, Array],
    places: Mapping[str, tuple[int | None, int | None]],
    rows: tuple[str, ...],
    labels: tuple[str, ...],
) -> NoReturn:
    """Raises for rows and labels over one axis, as where a weight is sharded over all (FSDP)."""
    first, second = (
        next(
            name
            for name, array in arrays.items()
            if (at := places[name][k]) is not None and _axes_at(array, at)
        )
        for k in (0, 1)
    )
    raise ValueError(
        f"the rows of {first} are sharded over {rows} and the labels of {second} over {labels}, "
        "so that most rows and labels never meet on a device. Use different axes, or gather "
        f"{second} for this call: jax.sharding.reshard({second}, PartitionSpec())."
    )


def explicit_mesh(*arrays: Array) -> Any:
    """The mesh of arrays that are sharded over it; `jax.set_mesh` may not have been called."""
    meshes = (jax.typeof(array).sharding.mesh for array in arrays)
    return next(mesh for mesh in meshes if not mesh.empty)


def _explicit_axes(mesh: Any) -> set[str]:
    types = zip(mesh.axis_names, mesh.axis_types, strict=True)
    return {name for name, kind in types if kind == AxisType.Explicit}


def _axes_at(array: Array, place: int) -> tuple[str, ...]:
    """The axes of an explicit mesh that a dimension of the array is sharded over."""
    aval: Any = jax.typeof(array)
    spec = (*aval.sharding.spec, *[None] * array.ndim)
    axes = spec[place]
    return axes if isinstance(axes, tuple) else (axes,) if axes else ()


def sharded_over(arrays: Mapping[str, tuple[Array, int]]) -> tuple[str, ...]:
    """The axes of an explicit mesh that these dimensions of the arrays are sharded over."""
    found: dict[tuple[str, ...], str] = {}
    for name, (array, place) in arrays.items():
        if axes := _axes_at(array, place):
            found.setdefault(axes, name)
    if len(found) > 1:
        (one, first), (other, second) = list(found.items())[:2]
        raise ValueError(
            f"{first} is sharded over {one} and {second} over {other} in the same dimension: shard "
            "them alike with jax.sharding.reshard."
        )
    return next(iter(found), ())


def refuse_sharded_width(arrays: Mapping[str, tuple[Array, int]]) -> None:
    """Raises if this dimension, over which the products sum, is sharded over an explicit mesh."""
    for name, (array, place) in arrays.items():
        if axes := _axes_at(array, place):
            raise ValueError(
                f"{name} is sharded over its width, by {axes}: reshard it with "
                "jax.sharding.reshard, so that only its other dimension is."
            )
