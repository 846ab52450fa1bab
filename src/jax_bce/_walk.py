"""The primitive of `linear_loss`: logits = scale * features @ weight + bias, a block at a time.

    loss      = factor * (element losses, summed over each row, or over all)
    gradients = the derivatives of the sum with respect to features, weight, bias and scale

The longer dimension of the logits, rows or labels, is walked: a loop slices the operands,
multiplies them, and passes the block's logits to the primitive of `_primitive.py`, which returns
losses and gradient in one pass. The gradient's two products follow at once, so a block is computed
once and then forgotten: three products in all, and one if only the loss is requested.

Where XLA shards the program over several devices, a slice of a sharded dimension would have to be
sent to all of them. So the walked dimension is first divided into as many equal parts as the
devices can require, and a block consists of a slice of every part. (As in `_call.py`, the shardings
are not known here.) What is summed over the blocks is kept apart for each part until the end, if
that fits into the memory of a block: one all-reduce instead of one per block.

The derivative rules work as in `_derivatives.py`. If everything is summed, the loss is
differentiated into the same walk with gradients, which are the only residuals. A loss for each row
has a cotangent for each row, which a backward walk needs: its tangent is a primitive of its own,
which is linear and whose transpose is that walk. Everything else, such as second derivatives,
differentiates the loop as it stands.
"""

import functools
import math
from collections.abc import Mapping, Sequence
from types import MappingProxyType
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array, lax
from jax.core import ShapedArray
from jax.extend.core import Primitive
from jax.interpreters import ad, batching, mlir
from jax.sharding import AbstractMesh, NamedSharding, PartitionSpec

from jax_bce._call import MODIFIERS, devices_of
from jax_bce._derivatives import residual_dtype
from jax_bce._primitive import bce, vary_alike
from jax_bce._reference import arithmetic_dtype, two_sum

linear_p = Primitive("jax_bce_linear")
linear_p.multiple_results = True
tangent_p = Primitive("jax_bce_linear_tangent")

# What a walk returns gradients of.
PARAMETERS = ("features", "weight", "bias", "scale")
# The axes of rows and of labels; the operands that are not named here have both.
AXES: dict[str, tuple[int | None, int | None]] = {
    "features": (0, None),
    "weight": (None, 1),
    "bias": (None, 1),
    "positives": (0, None),
    "scale": (None, None),
    "loss": (0, None),
    "rows' scale": (0, None),
}
_ROWS, _LABELS = 0, 1
# Those of `bce`, by their names here, where weight is the matrix.
OPTIONS = {"class_weight" if name == "weight" else name: name for name in MODIFIERS}


def _as_bits(array: Array) -> Array:
    """bfloat16 as integers, which XLA on a CPU moves without a conversion of the whole array."""
    return lax.bitcast_convert_type(array, np.uint16) if array.dtype == jnp.bfloat16 else array


def _from_bits(array: Array) -> Array:
    return lax.bitcast_convert_type(array, jnp.bfloat16) if array.dtype == np.uint16 else array


def _kept(features: Array, given: dict[str, Array]) -> Array:
    """The features, with 0 in rows that are dropped as a whole.

    The gradient of their logits is 0, and its product with NaN would be NaN.
    """
    where = given.get("where")
    if where is None or where.shape != (len(features), 1):
        return features
    return jnp.where(where, features, 0)


class Plan(NamedTuple):
    """Which dimension is walked, in how many parts, and by how many columns or rows of each."""

    axis: int
    parts: int
    block: int  # of each part
    blocks: int
    rest: int  # what is left of each part after these blocks

    @property
    def one(self) -> bool:
        """Whether everything is one block."""
        return self.blocks == 1 and not self.rest

    def cut(self, array: Array, axis: int | None, start: Any, block: int) -> Array:
        """A block of an array whose axis is walked, or the array itself."""
        if axis is None or array.shape[axis] == 1 or self.one:
            return array
        view = self._view(array, axis)
        piece = lax.dynamic_slice_in_dim(view, start, block, axis + 1)
        return piece.reshape(*array.shape[:axis], self.parts * block, *array.shape[axis + 1 :])

    def put(self, array: Array, piece: Array, axis: int, start: Any, block: int) -> Array:
        """The array with a block replaced."""
        view = self._view(array, axis)
        piece = piece.reshape(*view.shape[: axis + 1], block, *view.shape[axis + 2 :])
        return lax.dynamic_update_slice_in_dim(view, piece, start, axis + 1).reshape(array.shape)

    def _view(self, array: Array, axis: int) -> Array:
        size = array.shape[axis] // self.parts
        return array.reshape(*array.shape[:axis], self.parts, size, *array.shape[axis + 1 :])


def plan(given: dict[str, Array], gradients: Sequence[str], budget: int, devices: int) -> Plan:
    """Walks the longer dimension, in blocks of equal size that fit into the budget."""
    features, weight = given["features"], given["weight"]
    (rows, width), labels = features.shape, weight.shape[1]
    axis = _LABELS if rows <= labels else _ROWS
    size, other = (labels, rows) if axis == _LABELS else (rows, labels)
    if not rows or not labels:
        return Plan(axis, 1, size, 1, 0)
    wide = arithmetic_dtype(jnp.promote_types(features.dtype, weight.dtype)).itemsize
    of_shape = [
        given[name].dtype.itemsize
        for name in ("labels", *OPTIONS)
        if name in given and given[name].size > max(rows, labels)
    ]
    # Logits, and a second array: their products, or their gradient; and what it is rounded to.
    arrays = 2 if gradients or "scale" in given or "bias" in given else 1
    element = arrays * wide + sum(of_shape) + ("positives" in given)
    rounded = residual_dtype(jnp.promote_types(features.dtype, weight.dtype)).itemsize
    element += rounded if gradients and rounded < wide else 0
    walked = (weight if axis == _LABELS else features).dtype.itemsize
    bytes_per_index = other * element + width * walked * (2 if gradients else 1)
    kept = 2 * other * width * wide if gradients else 0  # a sum and what is added to it
    kept += 4 * rows * wide  # the rows' losses
    parts = math.gcd(size, devices)
    size //= parts
    room = max(budget - kept, budget // 2) * devices
    largest = max(1, room // (parts * bytes_per_index))
    least = -(-size // largest)
    # Blocks that divide the size need a rest neither in the program nor in memory.
    for blocks in range(least, 2 * least):
        if size % blocks == 0:
            return Plan(axis, parts, size // blocks, blocks, 0)
    block = max(1, 2 * largest // 3)
    return Plan(axis, parts, block, size // block, size % block)


def _dense(positives: Array, start: Any, block: int, parts: int, labels: int) -> Array:
    """The labels of a block, of shape (rows, parts * block), from the indices of the positives."""
    origins = jnp.arange(parts, dtype=np.int32) * (labels // parts) + start
    index = positives[:, None, :] - origins[:, None]
    index = jnp.where((index >= 0) & (index < block), index, block)

    def of_row(index: Array) -> Array:
        return jnp.zeros(block, np.uint8).at[index].set(1, mode="drop")

    return jax.vmap(jax.vmap(of_row))(index).reshape(len(positives), parts * block)


class _Walk:
    """The operands of one walk, and what it does with them."""

    def __init__(
        self,
        given: dict[str, Array],
        gradients: tuple[str, ...],
        params: dict[str, Any],
        budget: int,
        precision: Any,
        devices: int,
        bits: bool,
    ) -> None:
        features, weight = given["features"], given["weight"]
        self.given, self.gradients, self.params = given, gradients, params
        self.plan = plan(given, gradients, budget, devices)
        self.stored = _as_bits if bits and not self.plan.one else lambda array: array
        self.walked = {name: self.stored(array) for name, array in given.items()}
        self.by_label = self.plan.axis == _LABELS
        self.dtype = jnp.promote_types(features.dtype, weight.dtype)
        self.wide = arithmetic_dtype(self.dtype)
        self.dot = functools.partial(
            jnp.einsum, precision=precision, preferred_element_type=self.wide
        )
        self.scale = given["scale"].astype(self.wide) if "scale" in given else None
        self.parts = self.plan.parts if self.by_label else 1  # of the labels
        # The gradient that is summed over the blocks, for each part or for all.
        summed = features if self.by_label else weight
        fits = summed.size * self.wide.itemsize <= budget
        self.apart = self.plan.parts if fits else 1
        # By name: the results of a block.
        self.results = ["loss", *(name for name in ("features", "weight") if name in gradients)]
        if "scale" in gradients:
            self.results += ["features"] * ("features" not in gradients)
            self.results += ["rows' scale"] * (not self.by_label)
        self.results += ["bias"] * ("bias" in gradients)

    def axis(self, name: str) -> int | None:
        """The axis of an operand or result that is walked."""
        return AXES.get(name, (0, 1))[self.plan.axis]

    def split(self, array: Array) -> Array:
        """Rows, parts of the labels, and labels of each part."""
        rows, labels = array.shape
        parts = self.parts if labels > 1 else 1
        return array.reshape(rows, parts, labels // parts)

    def block(self, start: Array, size: int) -> dict[str, Array]:
        """The losses of one block, of shape (rows, parts), and its gradients."""
        at = {
            name: _from_bits(self.plan.cut(array, self.axis(name), start, size))
            for name, array in self.walked.items()
        }
        x, w = _kept(at["features"], at), at["weight"]
        logits = self.dot("rd,dl->rl", x, w)
        if self.scale is not None:
            logits = logits * self.scale
        if "bias" in at:
            logits = logits + at["bias"].astype(self.wide)
        if "positives" in at:
            labels = self.given["weight"].shape[1]
            first, length = (start, size) if self.by_label else (0, labels)
            at["labels"] = _dense(at["positives"], first, length, self.parts, labels)
        factor = at["cotangent"] if "cotangent" in at else jnp.ones((1, 1), self.wide)
        options = [name for name in OPTIONS if name in at]  # in this order
        operands = (logits, at["labels"], factor, at["smoothing"], *(at[n] for n in options))
        loss, *gradient = bce(
            *vary_alike(*map(self.split, operands)),
            modifiers=tuple(OPTIONS[name] for name in options),
            kind="loss_and_grad" if self.gradients else "loss",
            reduced_rank=1,
            loss_dtype=self.wide,
            **self.params,
        )
        found = {"loss": loss}
        return (
            found | self._gradients(x, w, gradient[0].reshape(logits.shape)) if gradient else found
        )

    def _gradients(self, x: Array, w: Array, exact: Array) -> dict[str, Array]:
        """The gradients of a block by that of its logits."""
        g = exact.astype(residual_dtype(self.dtype))  # a factor 1/N would underflow in float16
        found = {}
        if "features" in self.results:
            if self.by_label and self.apart > 1:
                found["features"] = self.dot("rpl,dpl->prd", self.split(g), self.split(w))
            else:
                found["features"] = self.dot("rl,dl->rd", g, w)
            if not self.by_label:
                self._scale(found, x)
        if "weight" in self.results:
            if not self.by_label and self.apart > 1:
                of_parts = (
                    a.reshape(self.apart, a.shape[0] // self.apart, a.shape[1]) for a in (x, g)
                )
                product = self.dot("prd,prl->pdl", *of_parts)
            else:
                product = self.dot("rd,rl->dl", x, g)
            found["weight"] = product if self.scale is None else product * self.scale
        if "bias" in self.results:
            found["bias"] = jnp.sum(exact, axis=0, keepdims=True)
        return found

    def _scale(self, found: dict[str, Array], x: Array) -> None:
        """Scales the features' gradient, whose product with them is the scale's."""
        if "scale" in self.gradients:
            products = x.astype(self.wide) * found["features"]
            found["rows' scale"] = jnp.sum(products, axis=1, keepdims=True)
        if self.scale is not None:
            found["features"] = found["features"] * self.scale

    def _zeros(self, name: str) -> Any:
        rows = self.given["features"].shape[0]
        if name == "loss":
            zeros = jnp.zeros((rows, self.parts), self.wide)
            return (zeros, zeros) if self.by_label else zeros
        if name == "rows' scale":
            return jnp.zeros((rows, 1), self.wide)
        shape, dtype = self.given[name].shape, self.given[name].dtype
        if self.axis(name) is not None:
            return self.stored(jnp.zeros(shape, residual_dtype(dtype)))
        apart = self.apart > 1 and name != "bias"
        return jnp.zeros((self.apart, *shape) if apart else shape, self.wide)

    def _merge(self, so_far: dict[str, Any], start: Array, size: int) -> dict[str, Any]:
        """The results so far and those of a block: put into their place, or added."""
        merged: dict[str, Any] = {}
        for name, piece in jax.checkpoint(self.block, static_argnums=(1,))(start, size).items():
            before, axis = so_far[name], self.axis(name)
            if axis is not None:
                dtype = jnp.bfloat16 if before.dtype == np.uint16 else before.dtype
                piece = self.stored(piece.astype(dtype))
                merged[name] = self.plan.put(before, piece, axis, start, size)
            elif name == "loss":
                high, low = before
                merged[name] = add_in_two_parts(high, low, piece)
            else:
                merged[name] = before + piece
        return merged

    def run(self) -> dict[str, Any]:
        """The losses of each row and part, in one part or two, and the gradients."""
        how = self.plan
        if how.one:
            found: dict[str, Any] = self.block(jnp.int32(0), how.block)
        else:
            structure: Any
            leaves, structure = jax.tree.flatten({n: self._zeros(n) for n in self.results})
            found = structure.unflatten(vary_alike(*leaves, self.given["features"])[:-1])
            starts = jnp.arange(how.blocks, dtype=np.int32) * how.block
            found, _ = lax.scan(
                lambda so_far, start: (self._merge(so_far, start, how.block), None), found, starts
            )
            if how.rest:
                found = self._merge(found, jnp.int32(how.blocks * how.block), how.rest)
        for name in [name for name in ("features", "weight", "bias") if name in found]:
            found[name] = _from_bits(found[name])
            if found[name].ndim == 3:
                found[name] = jnp.sum(found[name], axis=0)
        if "features" in found and self.by_label:
            self._scale(found, _kept(self.given["features"], self.given))
        if "rows' scale" in found:
            found["scale"] = jnp.sum(found["rows' scale"])
        return found


def walk(
    *operands: Array,
    names: tuple[str, ...],
    gradients: tuple[str, ...],
    reduced_rank: int,
    count: int,
    implementation: str | None,
    budget: int,
    precision: Any,
    devices: int = 1,
    bits: bool = False,
) -> list[Array]:
    """The primitive in plain JAX around `bce`; `linear` documents the arguments.

    With `bits`, arrays of bfloat16 are integers in the loop, which has no derivative.
    """
    given = dict(zip(names, operands, strict=True))
    params = {"count": count, "implementation": implementation}
    found = _Walk(given, gradients, params, budget, precision, devices, bits).run()
    loss = found["loss"]
    high, low = loss if isinstance(loss, tuple) else (loss, jnp.zeros_like(loss))
    total = jnp.sum(high + low, axis=1) if reduced_rank == 1 else _total(high, low, implementation)
    return [total, *(found[name].astype(residual_dtype(given[name].dtype)) for name in gradients)]


def add_in_two_parts(high: Array, low: Array, more: Array) -> tuple[Array, Array]:
    """A sum in two parts, with one more term."""
    total, error = two_sum(high, more)
    return total, jnp.where(jnp.isfinite(total), low + error, 0)


def _total(high: Array, low: Array, implementation: str | None) -> Array:
    """The sum of all rows, rounded once."""
    none = jnp.zeros((1, 1), high.dtype)
    total, error = bce(
        *vary_alike(none, none, none + 1, none, high),
        modifiers=("weight",),
        kind="total",
        reduced_rank=2,
        count=1,
        implementation=implementation,
        loss_dtype=high.dtype,
    )
    return total + (error + jnp.sum(low))


def _jvp_as_it_stands(function: Any, primals: Sequence[Array], tangents: Sequence[Any]) -> Any:
    """Differentiates a function that is written in JAX; None is the tangent of a constant."""
    moving = [
        i for i, dot in enumerate(tangents) if dot is not None and not isinstance(dot, ad.Zero)
    ]

    def of_moving(*values: Array) -> Any:
        changed = dict(zip(moving, values, strict=True))
        return function(*(changed.get(i, primal) for i, primal in enumerate(primals)))

    return jax.jvp(of_moving, [primals[i] for i in moving], [tangents[i] for i in moving])


def linear(*operands: Array, **params: Any) -> list[Array]:
    """Binds the primitive.

    `names` are those of the operands: features (rows, width), weight (width, labels), smoothing
    (1, 1), labels (rows or 1, labels or 1) or positives (rows, k); maybe bias (1, labels), scale,
    those of OPTIONS, which broadcast against the logits, and cotangent (rows, 1), a factor for each
    row. The first result is the loss, in the arithmetic's dtype: of each row (reduced_rank 1)
    or of all (2), divided by count. The others are the named gradients of its sum. A block and its
    gradient take at most `budget` bytes on each device.
    """
    return linear_p.bind(*operands, **params)  # type: ignore[no-any-return]


@functools.partial(jax.jit, static_argnames=("primitive", "params"))
def _compiled(*operands: Array, primitive: Primitive, params: tuple[tuple[str, Any], ...]) -> Any:
    return primitive.bind(*operands, **dict(params))


def _types(
    operands: Sequence[Any],
    *,
    names: tuple[str, ...],
    gradients: tuple[str, ...],
    reduced_rank: int,
    **params: Any,
) -> list[tuple[tuple[int, ...], np.dtype]]:
    """The shapes and dtypes of the results of a walk."""
    given = dict(zip(names, operands, strict=False))
    x, w = given["features"], given["weight"]
    loss = x.shape[:1] if reduced_rank == 1 else ()
    of_gradients = [(given[n].shape, residual_dtype(given[n].dtype)) for n in gradients]
    return [(loss, arithmetic_dtype(jnp.promote_types(x.dtype, w.dtype))), *of_gradients]


def _implement(
    primitive: Primitive,
    function: Any,
    types: Any,
    on_cpu: Mapping[str, Any] = MappingProxyType({}),
) -> None:
    """Gives a primitive that is written in JAX its rules for evaluation, vmap and lowering."""
    multiple = primitive.multiple_results

    def evaluate(*operands: Array, **params: Any) -> Any:
        with jax.disable_jit(False):
            return _compiled(*operands, primitive=primitive, params=tuple(params.items()))

    def shapes(*operands: Any, **params: Any) -> Any:
        like = next((aval for aval in operands if not aval.sharding.mesh.empty), None)

        def result(shape: tuple[int, ...], dtype: np.dtype) -> Any:
            if like is None:
                return ShapedArray(shape, dtype)
            sharding = NamedSharding(like.sharding.mesh, PartitionSpec(*[None] * len(shape)))
            return like.update(shape=shape, dtype=dtype, weak_type=False, sharding=sharding)

        results = [result(*of_one) for of_one in types(operands, **params)]
        return results if multiple else results[0]

    def batch(operands: Sequence[Array], axes: Sequence[int | None], **params: Any) -> Any:
        results = jax.vmap(functools.partial(function, **params), in_axes=axes)(*operands)
        return results, [0] * len(results) if multiple else 0

    def lower(
        more: Mapping[str, Any], context: mlir.LoweringRuleContext, *operands: Any, **params: Any
    ) -> Any:
        of_context: Any = context
        plain = {
            name: [ShapedArray(aval.shape, aval.dtype) for aval in getattr(of_context, name)]
            for name in ("avals_in", "avals_out")
        }
        written = functools.partial(function, devices=devices_of(context), **more, **params)
        # Even on an explicit mesh, the partitioner chooses the shardings inside.
        with jax.sharding.use_abstract_mesh(AbstractMesh((), ())):
            rule = mlir.lower_fun(written, multiple_results=multiple)
            return rule(of_context.replace(**plain), *operands)

    primitive.def_impl(evaluate)
    primitive.def_abstract_eval(shapes)
    batching.primitive_batchers[primitive] = batch
    mlir.register_lowering(primitive, functools.partial(lower, {}))
    if on_cpu:
        mlir.register_lowering(primitive, functools.partial(lower, on_cpu), platform="cpu")


def _jvp(
    primals: Sequence[Array], tangents: Sequence[Any], **params: Any
) -> tuple[list[Array], list[Array]]:
    names, function = params["names"], functools.partial(walk, **params)
    if params["gradients"] or "cotangent" in names:
        return _jvp_as_it_stands(function, primals, tangents)  # type: ignore[no-any-return]
    named = {n: d for n, d in zip(names, tangents, strict=True) if not isinstance(d, ad.Zero)}
    dots = {name: named.pop(name) for name in PARAMETERS if name in named}
    terms = []
    if dots and params["reduced_rank"] == 2:
        loss, *gradients = linear(*primals, **params | {"gradients": tuple(dots)})
        for gradient, dot in zip(gradients, dots.values(), strict=True):
            terms.append(jnp.sum(gradient.astype(loss.dtype) * dot.astype(loss.dtype)))
    else:
        (loss,) = linear(*primals, **params)
        if dots:
            terms.append(tangent_p.bind(*primals, *dots.values(), moving=tuple(dots), **params))
    if named:
        _, more = _jvp_as_it_stands(function, primals, [named.get(name) for name in names])
        terms += more
    return [loss], [sum(terms[1:], terms[0])]


def _tangent(*operands: Array, moving: tuple[str, ...], devices: int = 1, **params: Any) -> Array:
    """The tangent of each row's loss; the last operands are the tangents of those named."""
    names = params["names"]
    primals, dots = operands[: len(names)], dict(zip(moving, operands[len(names) :], strict=True))
    function = functools.partial(walk, devices=devices, **params)
    _, (dot,) = _jvp_as_it_stands(function, primals, [dots.get(name) for name in names])
    return dot  # type: ignore[no-any-return]


def _transpose(cotangent: Any, *operands: Any, moving: tuple[str, ...], **params: Any) -> Any:
    names = params["names"]
    primals, dots = operands[: len(names)], operands[len(names) :]
    results: list[Any] = [None] * len(operands)
    if isinstance(cotangent, ad.Zero):
        return results
    wanted = tuple(
        name for name, dot in zip(moving, dots, strict=True) if ad.is_undefined_primal(dot)
    )
    changed = params | {"names": (*names, "cotangent"), "gradients": wanted}
    _, *gradients = linear(*primals, cotangent[:, None], **changed)
    for name, gradient in zip(wanted, gradients, strict=True):
        place = len(names) + moving.index(name)
        results[place] = gradient.astype(operands[place].aval.dtype)
    return results


def _jvp_of_tangent(primals: Sequence[Array], tangents: Sequence[Any], **params: Any) -> Any:
    return _jvp_as_it_stands(functools.partial(_tangent, **params), primals, tangents)


_implement(linear_p, walk, _types, on_cpu={"bits": True})
_implement(tangent_p, _tangent, lambda operands, moving, **params: _types(operands, **params))
ad.primitive_jvps[linear_p] = _jvp
ad.primitive_jvps[tangent_p] = _jvp_of_tangent
ad.primitive_transposes[tangent_p] = _transpose
