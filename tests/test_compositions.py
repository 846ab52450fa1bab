"""Any three of JAX's transformations, nested, do to the loss what they do to a formula in jnp.

Drawn at random: each transformation turns a function of logits and labels into another one, whose
result has a shape that the next can take, so that every nesting is possible.
"""

from collections.abc import Callable
from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import oracle
import pytest
import sample
from hypothesis import given, reject, seed, settings
from hypothesis import strategies as st
from jax import lax
from jax.sharding import AxisType, NamedSharding, PartitionSpec
from platforms import QUICKLY

import jax_bce

pytestmark = pytest.mark.quickly

SIZE = 8
LOGITS = np.linspace(-3.0, 4.0, SIZE, dtype=np.float32)
LABELS = np.array([0.0, 1.0, 0.25, 1.0, 0.0, 0.75, 1.0, 0.0], np.float32)
FACTORS = np.array([1.0, 0.5, -0.25, 2.0, 1.5, -1.0, 0.75, 1.25], np.float32)
Function = Callable[[jax.Array, jax.Array], jax.Array]


def formula(x: jax.Array, y: jax.Array, reduction: str, smoothing: float) -> jax.Array:
    """The loss in plain jnp: in float64 it is good for moderate logits, and smooth everywhere."""
    y = y * (1 - smoothing) + smoothing / 2
    losses = jnp.log1p(jnp.exp(x)) - y * x
    return {"none": lambda v: v, "sum": jnp.sum, "mean": jnp.mean}[reduction](losses)


def several(x: jax.Array) -> jax.Array:
    """A few different logits in place of each."""
    return x * FACTORS.reshape(-1, *(1,) * x.ndim)


def directional(function: Function, x: jax.Array, y: jax.Array) -> jax.Array:
    return jax.jvp(lambda x: function(x, y), (x,), (jnp.cos(x),))[1]


def linearized(function: Function, x: jax.Array, y: jax.Array) -> jax.Array:
    return jax.linearize(lambda x: function(x, y), x)[1](jnp.sin(x))


def both_tangents(function: Function, x: jax.Array, y: jax.Array) -> jax.Array:
    return jax.jvp(function, (x, y), (jnp.ones_like(x), jnp.cos(y)))[1]


def pulled_back(function: Function, x: jax.Array, y: jax.Array) -> jax.Array:
    result, pullback = jax.vjp(function, x, y)
    by_logits, by_labels = pullback(jnp.tanh(result))
    return by_logits + 2 * by_labels


def gradient(function: Function, x: jax.Array, y: jax.Array, argnums: int = 0) -> jax.Array:
    return jax.grad(lambda x, y: jnp.sum(function(x, y) ** 2), argnums)(x, y)


def forward_jacobian(function: Function, x: jax.Array, y: jax.Array) -> jax.Array:
    return jnp.sum(jax.jacfwd(function)(x, y), axis=-1)


def reverse_jacobian(function: Function, x: jax.Array, y: jax.Array) -> jax.Array:
    return jnp.sum(jax.jacrev(function)(x, y), axis=-1)


def mapped(function: Function, x: jax.Array, y: jax.Array, axis: int = 0) -> jax.Array:
    logits = jnp.moveaxis(several(x), 0, axis)
    return jnp.sum(jax.vmap(function, (axis, None), out_axes=-1)(logits, y), axis=-1)


def mapped_labels(function: Function, x: jax.Array, y: jax.Array) -> jax.Array:
    return jnp.sum(jax.vmap(function, (None, 0))(x, several(y)), axis=0)


def mapped_both(function: Function, x: jax.Array, y: jax.Array) -> jax.Array:
    return jnp.sum(jax.vmap(function, (0, -1))(several(x), several(y).T), axis=0)


def mapped_by_name(function: Function, x: jax.Array, y: jax.Array) -> jax.Array:
    def of_one(x: jax.Array) -> jax.Array:
        return lax.psum(function(x, y), "batch")

    return jax.vmap(of_one, axis_name="batch")(several(x))[0]


def scanned(function: Function, x: jax.Array, y: jax.Array) -> jax.Array:
    def step(total: jax.Array, logits: jax.Array) -> tuple[jax.Array, None]:
        return total + function(logits, y), None

    logits = several(x)[:3]
    start = jnp.zeros_like(jax.eval_shape(function, x, y))
    return lax.scan(step, start, logits)[0]


def repeated(function: Function, x: jax.Array, y: jax.Array) -> jax.Array:
    start = jnp.zeros_like(jax.eval_shape(function, x, y))
    return lax.fori_loop(0, 3, lambda i, total: total + function(x * (i + 1), y), start)


def in_turn(function: Function, x: jax.Array, y: jax.Array) -> jax.Array:
    return jnp.sum(lax.map(lambda logits: function(logits, y), several(x), batch_size=4), axis=0)


def chosen(function: Function, x: jax.Array, y: jax.Array) -> jax.Array:
    return lax.cond(jnp.sum(x) > 0, function, lambda x, y: 2 * function(-x, y), x, y)


def switched(function: Function, x: jax.Array, y: jax.Array) -> jax.Array:
    branches = [function, lambda x, y: function(x / 2, y)]
    return lax.switch(jnp.int32(jnp.sum(x) > 5), branches, x, y)


def checkpointed(function: Function, x: jax.Array, y: jax.Array) -> jax.Array:
    return jax.checkpoint(function)(x, y)


def keeping_dots(function: Function, x: jax.Array, y: jax.Array) -> jax.Array:
    policy = jax.checkpoint_policies.dots_with_no_batch_dims_saveable
    return jax.checkpoint(function, policy=policy)(x, y)


def compiled(function: Function, x: jax.Array, y: jax.Array) -> jax.Array:
    return jax.jit(function)(x, y)


def on_mesh(function: Function, x: jax.Array, y: jax.Array) -> jax.Array:
    sharding = NamedSharding(_mesh(), PartitionSpec("device"))

    def spread(x: jax.Array, y: jax.Array) -> jax.Array:
        place = partial(lax.with_sharding_constraint, shardings=sharding)
        return function(place(x), place(y))

    return jax.jit(spread)(x, y)


def on_shards(function: Function, x: jax.Array, y: jax.Array, checked: bool = True) -> jax.Array:
    def shard(x: jax.Array, y: jax.Array) -> jax.Array:
        return lax.psum(function(x[0], y), "device")

    p = PartitionSpec
    specs = {"in_specs": (p("device"), p()), "out_specs": p()}
    return jax.shard_map(shard, mesh=_mesh(), check_vma=checked, **specs)(several(x), y)


def _mesh() -> jax.sharding.Mesh:
    return jax.make_mesh((SIZE,), ("device",), (AxisType.Auto,), devices=jax.devices("cpu"))


TRANSFORMATIONS = {
    "jvp": directional,
    "jvp of both": both_tangents,
    "linearize": linearized,
    "vjp of both": pulled_back,
    "grad": gradient,
    "grad of labels": partial(gradient, argnums=1),
    "jacfwd": forward_jacobian,
    "jacrev": reverse_jacobian,
    "vmap": mapped,
    "vmap of the last axis": partial(mapped, axis=-1),
    "vmap of labels": mapped_labels,
    "vmap of both": mapped_both,
    "vmap with a name": mapped_by_name,
    "scan": scanned,
    "fori_loop": repeated,
    "map": in_turn,
    "cond": chosen,
    "switch": switched,
    "checkpoint": checkpointed,
    "checkpoint of dots": keeping_dots,
    "jit": compiled,
    "mesh": on_mesh,
    "shard_map": on_shards,
    "shard_map unchecked": partial(on_shards, checked=False),
}
NAMES = sorted(TRANSFORMATIONS)


def nested(function: Function, names: tuple[str, ...], dtype: str) -> jax.Array:
    for name in reversed(names):
        function = partial(TRANSFORMATIONS[name], function)
    compiled = jax.jit(function, compiler_options=QUICKLY)
    return compiled(LOGITS.astype(dtype), LABELS.astype(dtype))


# In parts, for several processes at once.
@pytest.mark.parametrize(
    "part",
    [0, *(pytest.param(n, marks=[pytest.mark.any_jax, pytest.mark.thorough]) for n in (1, 2, 3))],
)
def test_any_three(cpu: str, part: int) -> None:
    @seed(part)
    @settings(max_examples=sample.examples(50), deadline=None, database=None)
    @given(
        names=st.tuples(*[st.sampled_from(NAMES)] * 3),
        reduction=st.sampled_from(["none", "sum", "mean"]),
        smoothing=st.sampled_from([0.0, 0.125]),
    )
    def agree(names: tuple[str, ...], reduction: str, smoothing: float) -> None:
        try:
            with jax.enable_x64(True):
                exact = partial(formula, reduction=reduction, smoothing=smoothing)
                expected = np.asarray(nested(exact, names, "float64"))
        except (ValueError, AssertionError):
            reject()  # JAX itself refuses it, such as a shard_map in a shard_map
        loss = partial(jax_bce.loss, reduction=reduction, label_smoothing=smoothing)
        actual = nested(loss, names, "float32")
        assert actual.shape == expected.shape
        # In float32, terms that cancel leave the rounding of the largest.
        largest = max(1.0, float(np.max(abs(expected))))
        relative = oracle.SURROUNDINGS
        np.testing.assert_allclose(actual, expected, 10 * relative, atol=relative * largest)

    agree()
