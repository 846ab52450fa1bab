"""How the primitive becomes a call of its FFI target: as it stands, or spread over devices.

Left alone, XLA's partitioner gathers the operands of a call on every device. It can split a call
along leading dimensions that operands and results have in common. So in a program for several
devices each dimension that may be spread becomes a leading one, those that are summed included: the
last of them, of size d, is seen as (g, d / g), where g is the largest number of equal parts that
the devices can ask for, and all that follows g is a block. The kernel sums blocks, and XLA adds up
their sums, on each device and then across devices. How the operands lie is not known here: it is
XLA that propagates it, later.
"""

import functools
import math
from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array
from jax.core import ShapedArray
from jax.extend.mlir import ir
from jax.extend.mlir.dialects import sdy
from jax.interpreters import mlir
from jax.sharding import AbstractMesh

from jax_bce._reference import in_two_parts

# A sum for each part of a row is not worth it where parts have fewer elements, and rows are more,
# than that. Where such rows are spread over devices nevertheless, XLA gathers them.
_NARROW, _MANY_ROWS = 32, 4096

# What an operand behind the first four may be; its place here is its bit in the attribute
# "modifiers" (csrc/bce_problem.h, csrc/ffi_common.h).
_DIVISOR = ("divisor", "divisor_low")
MODIFIERS = ("weight", "sample_weight", "pos_weight", "where", "ignore_label", *_DIVISOR)

# How many float64 numbers a kernel needs beside its results, for so many rows of so many columns.
Workspace = Callable[[Any, Any], Any]


def why_no_call(
    context: mlir.LoweringRuleContext,
    refusal: Callable[..., str],
    *,
    modifiers: tuple[str, ...],
    kind: str,
    reduced_rank: int,
    count: int,
) -> str | None:
    """Where or for what the primitive cannot be a call, None if it can: handlers tell `refusal`."""
    if _devices(context) > 1:
        # What is seen in blocks has two ways of broadcasting at most.
        return "symbolic sizes on several devices" if _is_symbolic(context) else None

    def arrays(avals: Sequence[Any]) -> list[tuple[str, list[int]]]:
        """All that matters of a symbolic size is that it may not be 1."""
        sizes = [[size if isinstance(size, int) else 2 for size in aval.shape] for aval in avals]
        return [(aval.dtype.name, size) for aval, size in zip(avals, sizes, strict=True)]

    if kind == "total":
        context, _ = _wide_result(context)
    inputs, outputs = arrays(context.avals_in), arrays(context.avals_out)
    summed = _summed(kind, reduced_rank)
    results = (kind != "grad", kind in ("loss_and_grad", "grad"))
    reason = refusal(inputs, outputs, *results, _bits(modifiers), summed, count)
    return f"these shapes ({reason.removeprefix('jax_bce: ')})" if reason else None


def _is_symbolic(context: mlir.LoweringRuleContext) -> bool:
    """Whether sizes are left open, in jax.export."""
    avals: Sequence[Any] = context.avals_in
    return not all(isinstance(size, int) for aval in avals for size in aval.shape)


def _summed(kind: str, reduced_rank: int) -> int:
    """A gradient alone needs no rows, and without them the kernel is faster."""
    return reduced_rank if kind != "grad" else 0


def _bits(modifiers: Sequence[str]) -> int:
    return sum(1 << MODIFIERS.index(name) for name in modifiers)


def ffi_call(
    context: mlir.LoweringRuleContext,
    operands: Sequence[Any],
    target: str,
    workspace: Workspace,
    *,
    modifiers: tuple[str, ...],
    kind: str,
    reduced_rank: int,
    count: int,
) -> Any:
    """The results of the primitive by the target's kernel."""
    if kind == "total":  # which a kernel gives in float64
        context, in_parts = _wide_result(context)
    summed = _summed(kind, reduced_rank)
    avals: Sequence[Any] = context.avals_in
    shape = jnp.broadcast_shapes(*(aval.shape for aval in avals))
    numbers = {"modifiers": np.int64(_bits(modifiers)), "count": np.int64(count)}
    if (devices := _devices(context)) > 1:
        split = split_shape(shape, reduced_rank, devices)
        results = _in_blocks(
            context, operands, target, workspace, shape, split, summed > 0, numbers
        )
    else:
        kept = len(shape) - summed
        room = workspace(math.prod(shape[:kept]), math.prod(shape[kept:])) if summed else 0
        results = _emit(context, operands, target, (room,), summed, numbers)
    return in_parts(*results) if kind == "total" else results


def _wide_result(
    context: mlir.LoweringRuleContext,
) -> tuple[mlir.LoweringRuleContext, Callable[..., Any]]:
    """The context of a call with one float64 result, and what makes two parts of it."""
    part: Any = context.avals_out[0]
    wide = [ShapedArray(part.shape, np.dtype(np.float64))]
    replace: Any = context.replace

    def two_parts(number: Array) -> list[Array]:
        with jax.enable_x64(True):
            return in_two_parts(number, part.dtype)

    after = replace(avals_in=wide)
    return replace(avals_out=wide), functools.partial(mlir.lower_fun(two_parts), after)


def _devices(context: mlir.LoweringRuleContext) -> int:
    """Over how many devices XLA spreads the program; in a shard_map, over the axes left to XLA."""
    where: Any = context.module_context.axis_context
    if hasattr(where, "num_devices"):
        return int(where.num_devices)
    if hasattr(where, "manual_axes"):
        sizes = where.mesh.shape
        return math.prod(sizes[axis] for axis in sizes if axis not in where.manual_axes)
    return 1


def _emit(
    context: mlir.LoweringRuleContext,
    operands: Sequence[Any],
    target: str,
    workspace: Sequence[int],
    reduced_rank: int,
    numbers: dict[str, np.int64],
    batch: Sequence[int] = (),
) -> Any:
    """One custom call, whose last result is a workspace of that shape, unless it is empty.

    `batch` are the leading dimensions along which XLA may split it.
    """
    results: list[Any] = list(context.avals_out)
    if math.prod(workspace):
        results.append(ShapedArray(tuple(workspace), np.dtype(np.float64)))
    attributes: dict[str, ir.Attribute] = {}
    if batch:
        number = ir.StringAttr.get(str(len(batch)))
        attributes["mhlo.frontend_attributes"] = ir.DictAttr.get({"num_batch_dims": number})
        if getattr(jax.config, "jax_use_shardy_partitioner", True):
            attributes["sdy.sharding_rule"] = _sharding_rule(batch, context.avals_in, results)
    context_of_call: Any = context.replace(avals_out=results)  # type: ignore[no-untyped-call]
    rule: Any = jax.ffi.ffi_lowering(target, extra_attributes=attributes)
    results = rule(context_of_call, *operands, reduced_rank=np.int64(reduced_rank), **numbers)
    return results[: len(context.avals_out)]


def split_shape(shape: Sequence[int], reduced_rank: int, devices: int) -> tuple[int, ...]:
    """The shape as leading dimensions and one block, of size 1 where nothing is summed.

    The number of equal parts of a dimension divides both its size and the number of devices.
    """
    kept = len(shape) - reduced_rank
    for last in reversed(range(kept, len(shape))):
        parts = math.gcd(shape[last], devices)
        block = shape[last] // parts * math.prod(shape[last + 1 :])
        narrow = block < _NARROW and math.prod(shape[:last]) > _MANY_ROWS
        if parts > 1 and not narrow:
            return (*shape[:last], parts, block)
    return (*shape[:kept], math.prod(shape[kept:]))


def _sharding_rule(batch: Sequence[int], operands: Any, results: Any) -> ir.Attribute:
    """For Shardy: the leading dimensions are common to all, any other one is alone."""
    sizes = list(batch)

    def mapping(array: Any) -> ir.Attribute:
        own = array.shape[len(batch) :]
        factors = [*range(len(batch))[: array.ndim], *range(len(sizes), len(sizes) + len(own))]
        sizes.extend(own)
        return sdy.TensorMappingAttr.get([sdy.DimMappingAttr.get([factor]) for factor in factors])

    return sdy.OpShardingRuleAttr.get(
        operand_mappings=[mapping(operand) for operand in operands],
        result_mappings=[mapping(result) for result in results],
        factor_sizes=sizes,
        is_custom=True,
    )


def _in_blocks(
    context: mlir.LoweringRuleContext,
    operands: Sequence[Any],
    target: str,
    workspace: Workspace,
    shape: tuple[int, ...],
    split: tuple[int, ...],
    sums: bool,
    numbers: dict[str, np.int64],
) -> Any:
    """The call with the operands seen as `split` in place of their shape; a block is its last."""
    avals_in: Sequence[Any] = context.avals_in
    avals_out: Sequence[Any] = context.avals_out
    batch, block = split[:-1], split[-1]
    # How many leading dimensions of the shape are none of the block's.
    apart = next((d for d in range(len(batch)) if shape[d] != batch[d]), len(batch))

    def view(operand: Array) -> Array:
        """One for each element, unless the elements of a block have one in common."""
        if math.prod(operand.shape[apart:]) > 1:
            return jnp.broadcast_to(operand, shape).reshape(split)
        own = operand.reshape(*operand.shape[:apart], *(1,) * (len(split) - apart))
        return jnp.broadcast_to(own, (*batch, 1))

    def enter(logits: Array, *others: Array) -> list[Array]:
        """A number for all is a scalar, which each device has; the rest is as wide as the batch."""
        logits = jnp.broadcast_to(logits, shape).reshape(split)
        return [logits, *(x.reshape(()) if x.size == 1 else view(x) for x in others)]

    def leave(*results: Array) -> list[Array]:
        return [
            result.reshape(shape) if aval.ndim == len(shape) else add_up(result, aval)
            for result, aval in zip(results, avals_out, strict=True)
        ]

    def add_up(blocks: Array, aval: ShapedArray) -> Array:
        with jax.enable_x64(True):
            return jnp.sum(blocks, axis=tuple(range(aval.ndim, blocks.ndim))).astype(aval.dtype)

    def split_result(aval: Any) -> ShapedArray:
        """Sums of blocks are float64: the loss is rounded once, when they are added up."""
        if aval.ndim == len(shape):
            return ShapedArray(split, aval.dtype)
        return ShapedArray(batch, np.dtype(np.float64))

    replace: Any = context.replace
    # Also on an explicit mesh, how these views are spread is left to the partitioner.
    with jax.sharding.use_abstract_mesh(AbstractMesh((), ())):
        plain = [ShapedArray(aval.shape, aval.dtype) for aval in avals_in]
        entered = [ShapedArray(a.shape, a.dtype) for a in jax.eval_shape(enter, *plain)]
        results = [split_result(aval) for aval in avals_out]
        room = workspace(1, block) if sums else 0
        values = mlir.lower_fun(enter)(replace(avals_in=plain, avals_out=entered), *operands)
        inside = replace(avals_in=entered, avals_out=results)
        values = _emit(inside, values, target, (*batch, room), int(sums), numbers, batch)
        return mlir.lower_fun(leave)(replace(avals_in=results), *values)
