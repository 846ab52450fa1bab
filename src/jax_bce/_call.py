"""Lowers the primitive to a call of its FFI target, on one device or sharded over several.

By default, XLA's partitioner gathers the operands of a call on every device. It can split a call
along leading dimensions that operands and results share. So in a program for several devices, each
dimension that may be sharded becomes a leading one, including summed dimensions: the last of them,
of size d, is reshaped to (g, d / g), where g is the largest number of equal parts that the devices
can require, and everything after g is a block. The kernel sums blocks, and XLA adds their sums, on
each device and then across devices. If everything is summed, the kernel sums all of a device's
blocks as one row, however short they are, into fewer numbers, for XLA to add up: one for each part
into which XLA may split the blocks, and on a GPU, one for each 1,024 elements. It does not where
XLA may pad a dimension to divide it, since the kernel would add the padding to the sum. The
operands' shardings are not known here: XLA propagates them later.
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

# Summing parts of rows is not worth it if parts have fewer elements, and there are more rows, than
# this. If such rows are sharded nevertheless, XLA gathers them.
_NARROW, _MANY_ROWS = 32, 4096

# The possible operands after the first four. The index here is the bit in the attribute "modifiers"
# (csrc/bce_problem.h, csrc/ffi_common.h).
DIVISOR = ("divisor", "divisor_low")
FOCAL = ("alpha", "gamma", "gamma_pos", "clip")
MODIFIERS = (
    *("weight", "sample_weight", "pos_weight", "where", "ignore_label", *FOCAL, "hess_floor"),
    *DIVISOR,
)

# The number of float64 numbers that a kernel needs besides its results, given rows and columns.
Workspace = Callable[[Any, Any], Any]


def why_no_call(
    context: mlir.LoweringRuleContext,
    refusal: Callable[..., str],
    *,
    modifiers: tuple[str, ...],
    kind: str,
    reduced_rank: int,
    count: int,
    constant_power: bool,
) -> str | None:
    """Why the primitive cannot be a call, or None if it can; `refusal` is the handlers' check."""
    if devices_of(context) > 1:
        # In blocks, operands are broadcast in at most two ways, which is always supported.
        return "symbolic sizes on several devices" if _is_symbolic(context) else None

    def arrays(avals: Sequence[Any]) -> list[tuple[str, list[int]]]:
        """Symbolic sizes become 2: it only matters that they may differ from 1."""
        sizes = [[size if isinstance(size, int) else 2 for size in aval.shape] for aval in avals]
        return [(aval.dtype.name, size) for aval, size in zip(avals, sizes, strict=True)]

    if kind == "total":
        context, _ = _wide_result(context)
    inputs, outputs = arrays(context.avals_in), arrays(context.avals_out)
    summed = _summed(kind, reduced_rank)
    results = (kind != "grad", kind in ("loss_and_grad", "grad", "hess_and_grad"))
    reason = refusal(inputs, outputs, *results, _bits(modifiers), summed, count)
    return f"these shapes ({reason.removeprefix('jax_bce: ')})" if reason else None


def _is_symbolic(context: mlir.LoweringRuleContext) -> bool:
    """Whether some sizes are symbolic, in jax.export."""
    avals: Sequence[Any] = context.avals_in
    return not all(isinstance(size, int) for aval in avals for size in aval.shape)


def _summed(kind: str, reduced_rank: int) -> int:
    """The reduced rank for the kernel: 0 for a gradient alone, which is faster without rows."""
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
    constant_power: bool,
) -> Any:
    """The results of the primitive, computed by the target's kernel."""
    if kind == "total":  # the kernel returns float64
        context, in_parts = _wide_result(context)
    summed = _summed(kind, reduced_rank)
    avals: Sequence[Any] = context.avals_in
    shape = jnp.broadcast_shapes(*(aval.shape for aval in avals))
    bits = _bits(modifiers) | constant_power << len(MODIFIERS)
    numbers = {"modifiers": np.int64(bits), "count": np.int64(count)}
    if (devices := devices_of(context)) > 1:
        split = split_shape(shape, reduced_rank, devices)
        results = _in_blocks(
            context, operands, target, workspace, shape, split, summed, devices, numbers
        )
    else:
        kept = len(shape) - summed
        room = workspace(math.prod(shape[:kept]), math.prod(shape[kept:])) if summed else 0
        results = _emit(context, operands, target, (room,), summed, numbers)
    return in_parts(*results) if kind == "total" else results


def _wide_result(
    context: mlir.LoweringRuleContext,
) -> tuple[mlir.LoweringRuleContext, Callable[..., Any]]:
    """The context of a call with one float64 result, and a function that splits the result."""
    part: Any = context.avals_out[0]
    wide = [ShapedArray(part.shape, np.dtype(np.float64))]
    replace: Any = context.replace

    def two_parts(number: Array) -> list[Array]:
        with jax.enable_x64(True):
            return in_two_parts(number, part.dtype)

    after = replace(avals_in=wide)
    return replace(avals_out=wide), functools.partial(mlir.lower_fun(two_parts), after)


def devices_of(context: mlir.LoweringRuleContext) -> int:
    """The number of devices over which XLA shards the program; in a shard_map, its auto axes."""
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
    """One custom call. Its last result is a workspace of that shape, unless it is empty.

    XLA may split the call along the leading dimensions `batch`: each into as many parts as the
    smallest size there is among operands and results.
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
    """The shape as leading dimensions and one block, which has size 1 if nothing is summed.

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
    """The rule for Shardy: all arrays share the leading dimensions, and no others.

    If such a dimension is shorter in some arrays, the others share its first factor only.
    """
    arrays = [array for array in (*operands, *results) if array.ndim]
    sizes = [min(array.shape[d] for array in arrays) for d in range(len(batch))]

    def factors(d: int, size: int) -> list[int]:
        shared = [d] if d < len(batch) else []
        if shared and size == sizes[d]:
            return shared
        sizes.append(size // sizes[d] if shared else size)
        return [*shared, len(sizes) - 1]

    def mapping(array: Any) -> ir.Attribute:
        dimensions = [factors(d, size) for d, size in enumerate(array.shape)]
        return sdy.TensorMappingAttr.get([sdy.DimMappingAttr.get(each) for each in dimensions])

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
    reduced_rank: int,
    devices: int,
    numbers: dict[str, np.int64],
) -> Any:
    """The call with the operands reshaped to `split`, whose last dimension is a block."""
    avals_in: Sequence[Any] = context.avals_in
    avals_out: Sequence[Any] = context.avals_out
    batch, block = split[:-1], split[-1]
    # The number of leading dimensions of the shape that are not part of the block.
    apart = next((d for d in range(len(batch)) if shape[d] != batch[d]), len(batch))

    def view(operand: Array) -> Array:
        """One value per element, or one per block if its elements share a value."""
        if math.prod(operand.shape[apart:]) > 1:
            return jnp.broadcast_to(operand, shape).reshape(split)
        own = operand.reshape(*operand.shape[:apart], *(1,) * (len(split) - apart))
        return jnp.broadcast_to(own, (*batch, 1))

    def enter(logits: Array, *others: Array) -> list[Array]:
        """A single number becomes a scalar on each device; the others get the batch dimensions."""
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
        """Sums of blocks are float64: the loss is rounded only once, after they are added."""
        if aval.ndim == len(shape):
            return ShapedArray(split, aval.dtype)
        return ShapedArray(sums, np.dtype(np.float64))

    replace: Any = context.replace
    # Even on an explicit mesh, the partitioner chooses the shardings of these views.
    with jax.sharding.use_abstract_mesh(AbstractMesh((), ())):
        plain = [ShapedArray(aval.shape, aval.dtype) for aval in avals_in]
        entered = [ShapedArray(a.shape, a.dtype) for a in jax.eval_shape(enter, *plain)]
        summed, room, sums = min(reduced_rank, 1), 0, batch
        if 0 < reduced_rank == len(shape) and all(size and size % devices == 0 for size in batch):
            # Each device adds up its part of the operands into its part of these.
            parts = (devices,) * len(batch)
            of_each = -(-workspace(1, math.prod(split)) // math.prod(parts))
            summed, sums = len(split), (*parts, max(1, of_each))
        elif reduced_rank > 0:
            room = workspace(1, block)
        results = [split_result(aval) for aval in avals_out]
        values = mlir.lower_fun(enter)(replace(avals_in=plain, avals_out=entered), *operands)
        inside = replace(avals_in=entered, avals_out=results)
        values = _emit(inside, values, target, (*batch, room), summed, numbers, batch)
        return mlir.lower_fun(leave)(replace(avals_in=results), *values)
