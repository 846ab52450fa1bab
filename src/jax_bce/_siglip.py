"""`siglip_loss`: the pairwise sigmoid loss of two batches of embeddings, without their n^2 logits.

The logits are those of a linear layer whose weight is the other batch. On a mesh, each device holds
its own images and the texts of one device. Texts travel in a ring, together with their gradient:
after as many steps as there are devices, they have met all images, and are back.
"""

from __future__ import annotations  # help() shows names, not the Union behind them

import functools
from collections.abc import Hashable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array, lax
from jax.sharding import NamedSharding, PartitionSpec
from jax.typing import ArrayLike

from jax_bce import _check
from jax_bce._arguments import Implementation, available
from jax_bce._linear import (
    BLOCK_BYTES,
    block_size,
    explicit_mesh,
    number,
    owned,
    precision_of,
    refuse_sharded_width,
    refuse_symbolic,
    sharded_over,
)
from jax_bce._operands import FLOATS, AnyArray, operand
from jax_bce._primitive import vary_alike
from jax_bce._reference import arithmetic_dtype
from jax_bce._walk import PARAMETERS, add_in_two_parts, linear

_Four = tuple[Array, Array, Array, Array]
_Params = tuple[tuple[str, Any], ...]


def siglip_loss(
    images: ArrayLike,
    texts: ArrayLike,
    scale: ArrayLike,
    bias: ArrayLike,
    *,
    axis_name: Hashable | Sequence[Hashable] | None = None,
    precision: Any = None,
    block_bytes: int = BLOCK_BYTES,
    implementation: Implementation | None = None,
) -> Array:
    r"""The pairwise sigmoid loss of images and texts, without the logits of all pairs in memory.

    .. math:: -\frac{1}{n} \sum_{i, j} \log \sigma\left(z_{ij} (s \, x_i \cdot t_j + b)\right),
              \quad z_{ij} = 1 \text{ if } i = j \text{ else } -1

    The loss of SigLIP: image i and text i belong together, all other pairs do not. As in the paper,
    the sum over all pairs is divided by n, not by the number of pairs.

    Args:
      images: embeddings x of shape (n, width), usually normalized: float16, bfloat16, float32 or
        float64.
      texts: embeddings t of the same shape, usually normalized.
      scale: the number s. The paper learns its logarithm, and starts from ``log(10)``.
      bias: the number b. The paper starts from -10.
      axis_name: in a shard_map, the axis or axes over which images and texts are sharded, in the
        same way. The loss is then that of the pairs of all devices, and the same on each. None is
        right everywhere else: on one device, and under jit on any mesh.
      precision: as for `linear_loss`.
      block_bytes: as for `linear_loss`.
      implementation: as for `loss`.

    Returns:
      The loss, in float32, or float64 if the embeddings are.

    Memory:
      That of `linear_loss`. With axis_name, and on explicit mesh axes, each device holds its own
      embeddings and the texts of one other device: these travel in a ring, together with their
      gradient. On automatic axes, each device receives the texts of a block at a time, and their
      gradient is added up over the devices in each block.

    Derivatives:
      With respect to images, texts, scale and bias, to any order and in any mode. With axis_name,
      differentiate outside of the shard_map, or inside with check_vma, the default: then gradients
      are those of the whole loss. (With check_vma=False, JAX multiplies those inside by the number
      of devices, as for any psum, and does not add up those of scale and bias.)

    Raises:
      TypeError, ValueError, RuntimeError: as for `linear_loss`.

    Source:
      Zhai et al., Sigmoid Loss for Language Image Pre-Training, 2023,
      https://arxiv.org/abs/2303.15343.

    Example:
      >>> import jax.numpy as jnp, jax_bce
      >>> images, texts = jnp.eye(4), jnp.eye(4)
      >>> print(jax_bce.siglip_loss(images, texts, scale=10.0, bias=-10.0))
      0.6932834
    """
    available(implementation)
    arrays = _embeddings(images, texts)
    arrays["scale"], arrays["bias"] = number("scale", scale), number("bias", bias)
    axes: tuple[Hashable, ...] = () if axis_name is None else (axis_name,)
    if isinstance(axis_name, list | tuple):
        axes = (*axis_name,)
    if not all(isinstance(axis, Hashable) for axis in axes):
        raise TypeError(
            f"axis_name must be the name of an axis of a shard_map, or several, got {axis_name}."
        )
    try:
        lax.axis_size(axes)
    except NameError:
        raise NameError(
            f"axis_name={axis_name!r} is not an axis of a jax.shard_map around this call: leave it "
            "out everywhere else, also under jit on a mesh."
        ) from None
    params = {
        "reduced_rank": 2,
        "implementation": implementation,
        "budget": block_size(block_bytes),
        "precision": precision_of(precision),
    }
    run = _run if _check.is_on() else _compiled
    result: Array = run(axes, tuple(params.items()), owned(arrays))
    return result


def _embeddings(images: ArrayLike, texts: ArrayLike) -> dict[str, AnyArray]:
    arrays = {
        name: operand(name, value, FLOATS) for name, value in (("images", images), ("texts", texts))
    }
    first, second = (array.shape for array in arrays.values())
    if len(first) != 2 or first != second:
        fix = "text i belongs to image i; in a shard_map, shard both alike"
        if first == second:
            fix = "reshape both with .reshape(-1, width)"
        raise ValueError(
            f"images of shape {first} and texts of shape {second} must both have shape (n, width): "
            f"{fix}."
        )
    refuse_symbolic("siglip_loss", first, second)
    return arrays


def _run(axes: tuple[Hashable, ...], params: _Params, arrays: dict[str, Any]) -> Array:
    names = ("images", "texts", "scale", "bias")
    images, texts, scale, bias = (jnp.asarray(arrays[name]) for name in names)
    wide = arithmetic_dtype(jnp.promote_types(images.dtype, texts.dtype))
    operands: _Four = (images, texts, scale.astype(wide), bias.astype(wide))
    if axes:
        return _check.loss(_ring(axes, params, *operands))
    refuse_sharded_width({"images": (images, 1), "texts": (texts, 1)})
    over = sharded_over({"images": (images, 0), "texts": (texts, 0)})
    if not over:
        return _check.loss(_block(*operands, np.int32(0), (), max(1, len(images)), params)[0])
    mesh, spec = explicit_mesh(images, texts), PartitionSpec(over)
    reshard: Any = jax.sharding.reshard
    images, texts = (reshard(array, NamedSharding(mesh, spec)) for array in (images, texts))
    shard_map: Any = jax.shard_map
    ring = shard_map(
        functools.partial(_ring, over, params),
        mesh=mesh,
        in_specs=(spec, spec, PartitionSpec(), PartitionSpec()),
        out_specs=PartitionSpec(),
        axis_names={*over},
    )
    return _check.loss(ring(images, texts, *operands[2:]))


_run.__name__ = _run.__qualname__ = "jax_bce_siglip"
_compiled = functools.partial(jax.jit, static_argnums=(0, 1), inline=True)(_run)


def _ring(axes: tuple[Hashable, ...], params: _Params, *operands: Array) -> Array:
    """The loss of all pairs, from inside of a shard_map."""
    # The cast makes the gradients of scale and bias sums over the devices.
    of_all: Any = lax.axis_index(axes)
    total: Array = lax.psum(_share(axes, params, vary_alike(*operands, of_all)[:-1]), axes)
    return total


@functools.partial(jax.custom_jvp, nondiff_argnums=(0, 1))
def _share(axes: tuple[Hashable, ...], params: _Params, operands: _Four) -> Array:
    """This device's part of the loss. Only the sum of the parts has the derivatives below."""
    return _around(axes, params, (), operands)[0]


@_share.defjvp
def _share_jvp(
    axes: tuple[Hashable, ...], params: _Params, primals: tuple[_Four], tangents: tuple[_Four]
) -> tuple[Array, Array]:
    """A text's gradient is that of all pairs with it, also on other devices."""
    loss, *gradients = _around(axes, params, PARAMETERS, *primals)
    products = (
        jnp.sum(gradient * dot.astype(loss.dtype))
        for gradient, dot in zip(gradients, *tangents, strict=True)
    )
    return loss, sum(products, jnp.zeros_like(loss))


def _around(
    axes: tuple[Hashable, ...], params: _Params, gradients: tuple[str, ...], operands: _Four
) -> list[Array]:
    """The loss and its gradients, while the texts of all devices pass."""
    images, texts, scale, bias = operands
    devices = lax.axis_size(axes)
    onwards = [(i, (i - 1) % devices) for i in range(devices)]
    count = max(1, devices * len(images))
    send = functools.partial(lax.ppermute, axis_name=axes, perm=onwards)

    def step(number: Array, so_far: Any) -> Any:
        texts, high, low, sums = so_far
        loss, *found = _block(images, texts, scale, bias, number, gradients, count, params)
        high, low = add_in_two_parts(high, low, loss)
        sums = [total + more.astype(total.dtype) for total, more in zip(sums, found, strict=True)]
        if sums:
            sums[1] = send(sums[1])  # the texts' gradient stays with them
        return send(texts), high, low, sums

    wide = scale.dtype
    zeros = [jnp.zeros_like(o, wide) for o in (images, texts, scale, bias)] if gradients else []
    none = jnp.zeros_like(scale)
    _, high, low, sums = lax.fori_loop(0, devices, step, (texts, none, none, zeros))
    return [high + low, *sums]


def _block(
    images: Array,
    texts: Array,
    scale: Array,
    bias: Array,
    step: Any,
    gradients: tuple[str, ...],
    count: int,
    params: _Params,
) -> list[Array]:
    """The loss of all images with some texts, which are their own in step 0, and its gradients."""
    own = jnp.where(step == 0, jnp.arange(len(images), dtype=np.int32), -1)
    operands = {
        "features": images,
        "weight": texts.T,
        "bias": jnp.broadcast_to(bias, (1, len(texts))),
        "scale": scale,
        "positives": own[:, None],
        "smoothing": jnp.zeros((1, 1), scale.dtype),
    }
    loss, *found = linear(
        *vary_alike(*operands.values()),
        names=tuple(operands),
        gradients=gradients,
        count=count,
        **dict(params),
    )
    if found:
        by_images, by_texts, by_bias, by_scale = found
        found = [by_images, by_texts.T, by_scale, jnp.sum(by_bias)]
    return [loss, *found]
