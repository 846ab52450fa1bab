"""The JAX primitive: its types, batching and lowering.

    factor   = scale / count / (divisor + divisor_low)
    loss     = factor * (element losses, summed over the last reduced_rank dimensions)
    gradient = factor * (element gradients)
    total    = factor * (weights of the elements that are not dropped, summed likewise)
    hessian  = factor * weight * max(second derivative of the element, hess_floor)

The operands are logits, labels, scale, smoothing (of the labels), and those of `_call.MODIFIERS`
that the parameter `modifiers` names. With a gamma among them, the loss is focal or asymmetric, and
`constant_power` leaves the derivative of its power out of the gradient. The operands all have the
same rank and are broadcast against each other. scale, smoothing and the divisor have the
arithmetic's dtype, float32 (float64 for float64 logits); ignore_label has the labels' dtype; where
is bool. scale and divisor have size 1 in the summed dimensions; if one is 0, the results are 0. A
summed loss has the arithmetic's dtype, too; an element's loss and gradient may be rounded to a
16-bit dtype. A vmapped axis is one more leading dimension. `transposed` says that the summed
dimensions were moved last for this call, and only matters for the choice of a kernel. The five
kinds differ in their results: "loss", "loss_and_grad", "grad"; "hess_and_grad", which sums nothing,
and whose Hessian has the dtype of a loss; and "total", which is the divisor of another call: a
number of the arithmetic's dtype, and its rounding error.

On CPU and CUDA, a kind is one call of the FFI target `jax_bce_v3_<kind>`; there is no
"hess_and_grad" on CUDA. If the target is not available, and on all other platforms, XLA compiles
`_reference.py`.
"""

import functools
from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array
from jax.extend.core import Primitive
from jax.interpreters import batching, mlir
from jax.sharding import NamedSharding, PartitionSpec

from jax_bce import _kernels
from jax_bce._call import DIVISOR, devices_of, ffi_call, why_no_call
from jax_bce._reference import reference

bce_p = Primitive("jax_bce")
bce_p.multiple_results = True


def bce(
    logits: Array,
    labels: Array,
    scale: Array,
    smoothing: Array,
    *more: Array,
    modifiers: tuple[str, ...],
    kind: str,
    reduced_rank: int,
    count: int,
    implementation: str | None,
    loss_dtype: np.dtype,
    gradient_dtype: np.dtype | None = None,
    transposed: bool = False,
    constant_power: bool = False,
) -> list[Array]:
    """Binds the primitive; the gradient has the logits' dtype unless another is given."""
    return bce_p.bind(  # type: ignore[no-any-return]
        logits,
        labels,
        scale,
        smoothing,
        *more,
        modifiers=modifiers,
        kind=kind,
        reduced_rank=reduced_rank,
        count=count,
        implementation=implementation,
        loss_dtype=loss_dtype,
        gradient_dtype=np.dtype(gradient_dtype or logits.dtype),
        transposed=transposed,
        constant_power=constant_power,
    )


@functools.partial(
    jax.jit,
    static_argnames=(
        "modifiers",
        "kind",
        "reduced_rank",
        "count",
        "implementation",
        "loss_dtype",
        "gradient_dtype",
        "transposed",
        "constant_power",
    ),
)
def _compiled(*operands: Array, **params: Any) -> list[Array]:
    if not any(isinstance(operand, jax.core.Tracer) for operand in operands):
        # jax_debug_nans runs a function that returned NaN again without jit, to find the cause.
        raise FloatingPointError("invalid value (nan or inf) encountered in jax_bce")
    return bce_p.bind(*operands, **params)  # type: ignore[no-any-return]


@bce_p.def_impl
def _evaluate(*operands: Array, **params: Any) -> list[Array]:
    # Evaluation is always compiled, even if the user has disabled jit: there is no other way.
    with jax.disable_jit(False):
        return _compiled(*operands, **params)  # type: ignore[no-any-return]


def _spread(
    operands: Sequence[Any], modifiers: tuple[str, ...], shape: tuple[int, ...]
) -> list[Any]:
    """The axes of an explicit mesh over which each dimension is sharded in some operand."""
    if any(o.sharding.spec.unreduced or o.sharding.spec.reduced for o in operands):
        raise ValueError(
            "operands of jax_bce cannot be unreduced or reduced over axes of a mesh: use "
            "jax.sharding.reshard with a PartitionSpec that has neither."
        )
    spec, used, fits = [], [], True
    for dimension, size in enumerate(shape):
        found = {o.sharding.spec[dimension] for o in operands if o.shape[dimension] == size}
        found.discard(None)
        fits = fits and len(found) <= 1
        spec.append(next(iter(found), None))
        used += [name for axes in found for name in (axes if isinstance(axes, tuple) else (axes,))]
    if not fits or len(set(used)) < len(used):
        logits, labels, _, _, *more = (operand.sharding.spec for operand in operands)
        others = "".join(
            f", {name} as {spec}" for name, spec in zip(modifiers, more, strict=True) if any(spec)
        )
        raise ValueError(
            f"logits are sharded as {logits} and labels as {labels}{others}, which is not "
            "compatible: shard them alike, for example with "
            "jax.sharding.reshard(labels, jax.typeof(logits).sharding)."
        )
    return spec


@bce_p.def_abstract_eval
def _shapes(*operands: Any, kind: str, reduced_rank: int, **params: Any) -> list[Any]:
    """On an explicit mesh, the results are sharded like the operands.

    In a shard_map, the results vary like the operands, which all vary alike (`vary_alike`).
    """
    shape = jnp.broadcast_shapes(*(operand.shape for operand in operands))
    like = next((operand for operand in operands if not operand.sharding.mesh.empty), None)
    spec = _spread(operands, params["modifiers"], shape) if like is not None else []

    def result(rank: int, dtype: np.dtype) -> Any:
        if like is None:
            return jax.core.ShapedArray(shape[:rank], dtype)
        sharding = NamedSharding(like.sharding.mesh, PartitionSpec(*spec[:rank]))
        return like.update(shape=shape[:rank], dtype=dtype, weak_type=False, sharding=sharding)

    loss = result(len(shape) - reduced_rank, params["loss_dtype"])
    gradient = result(len(shape), params["gradient_dtype"])
    return {
        "loss": [loss],
        "loss_and_grad": [loss, gradient],
        "grad": [gradient],
        "total": [loss, loss],
        "hess_and_grad": [loss, gradient],
    }[kind]


def spread_like(gradient: Array, logits: Array) -> Array:
    """The gradient, sharded over an explicit mesh like the logits, not like other operands."""
    spread: Any = jax.typeof(logits).sharding
    actual: Any = jax.typeof(gradient).sharding
    reshard: Any = jax.sharding.reshard
    return gradient if spread.spec == actual.spec else reshard(gradient, spread)


def _varies_over(operand: Array) -> frozenset[Any]:
    """The axes of a shard_map along which the shards of an operand may differ."""
    aval: Any = jax.typeof(operand)
    axes: frozenset[Any]
    axes = aval.manual_axis_type.varying if hasattr(aval, "manual_axis_type") else aval.vma
    return axes


def vary_alike(*operands: Array) -> tuple[Array, ...]:
    """The operands, made to vary over all shard_map axes that any of them varies over.

    As a result, the derivative with respect to a shared operand is summed over the shards.
    """
    axes = [_varies_over(operand) for operand in operands]
    missing = [sorted(frozenset().union(*axes) - own) for own in axes]
    lax: Any = jax.lax
    cast = functools.partial(lax.pcast, to="varying") if hasattr(lax, "pcast") else lax.pvary
    return tuple(
        cast(operand, tuple(names)) if names else operand
        for operand, names in zip(operands, missing, strict=True)
    )


def _batch(
    operands: Sequence[Array], axes: Sequence[int | None], **params: Any
) -> tuple[list[Array], list[int]]:
    """The mapped axis stays in its place in the first operand, unless that dimension is summed.

    An unmapped operand gets a dimension of size 1 there: nothing is copied.
    """
    first, axis = next((o, a) for o, a in zip(operands, axes, strict=True) if a is not None)
    where = axis if axis < first.ndim - params["reduced_rank"] else 0
    batched = [
        jnp.expand_dims(operand, where) if axis is None else jnp.moveaxis(operand, axis, where)
        for operand, axis in zip(operands, axes, strict=True)
    ]
    if "divisor" in params["modifiers"]:
        # The kernels read both of its parts in one shape.
        parts = [4 + params["modifiers"].index(name) for name in DIVISOR]
        shape = jnp.broadcast_shapes(*(batched[i].shape for i in parts))
        for i in parts:
            batched[i] = jnp.broadcast_to(batched[i], shape)
    results = bce_p.bind(*batched, **params)
    return results, [where] * len(results)


batching.primitive_batchers[bce_p] = _batch


def _lowering(platform: str | None) -> Callable[..., Any]:
    """The rule for one platform, or for all platforms without their own rule (None)."""

    def rule(
        context: mlir.LoweringRuleContext,
        *operands: Any,
        implementation: str | None,
        transposed: bool,
        **params: Any,
    ) -> Any:
        avals: Sequence[Any] = context.avals_in
        names = ("modifiers", "kind", "reduced_rank", "count", "constant_power")
        call = {name: params[name] for name in names}
        where: str | None = platform or "another platform"
        if platform is not None and implementation in (None, platform):
            where = why_no_call(context, _kernels.refusal, **call)
        if where and implementation not in (None, "xla"):
            raise RuntimeError(
                f"implementation={implementation!r} is compiled for {where}, where that kernel "
                "cannot run: use implementation=None."
            )
        why_modifiers = None
        for_export = context.module_context.lowering_parameters.for_export
        if platform == "cuda" and implementation is None and not for_export:
            modifiers = dict(zip(params["modifiers"], avals[4:], strict=True))
            gradient = params["gradient_dtype"] if params["kind"] == "loss_and_grad" else None
            why_modifiers = _kernels.why_xla_with_modifiers(
                avals[:4], modifiers, gradient, params["reduced_rank"], devices_of(context)
            )
        use_xla = (
            platform is None
            or where is not None
            # Nothing to compute, and nothing to shard.
            or any(size == 0 for aval in avals for size in aval.shape)
            # An exported program may run without this package.
            or (implementation is None and for_export)
            or not _kernels.runs(
                platform,
                implementation,
                params["kind"],
                params["reduced_rank"],
                avals[0].dtype,
                transposed,
                why_modifiers,
                "gamma" in params["modifiers"],
            )
        )
        if use_xla:
            fallback = mlir.lower_fun(reference, multiple_results=True)
            return fallback(context, *operands, **params)
        workspace = _kernels.workspace if platform == "cuda" else lambda rows, columns: 0
        return ffi_call(context, operands, f"jax_bce_v3_{params['kind']}", workspace, **call)

    return rule


mlir.register_lowering(bce_p, _lowering(None))
for _platform in ("cpu", "cuda"):
    mlir.register_lowering(bce_p, _lowering(_platform), platform=_platform)
_kernels.register()
