"""Inside shard_map and pmap a call is that of one device, and derivatives cross the boundary.

With check_vma, which tracks what differs between shards, and without; over all axes of the mesh or
some of them; with operands that only one of them is spread. Differentiated outside, an operand that
all shards share collects the gradients of all of them.
"""

from collections.abc import Callable
from functools import cache, partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import oracle
import pytest
from hlo import collectives, kernel_calls
from jax.sharding import AxisType, Mesh, NamedSharding, PartitionSpec
from oracle import FLOAT32

import jax_bce

pytestmark = pytest.mark.quickly

P = PartitionSpec
SHAPE = (16, 64)
LOSSES = {
    "mean": jax_bce.loss,
    "recompute": partial(jax_bce.loss, residuals="recompute"),
    "elements": lambda *operands, **keywords: jnp.mean(
        jax_bce.loss(*operands, reduction="none", **keywords)
    ),
    "xla": partial(jax_bce.loss, implementation="xla"),
}
# Over which axes of the mesh a dimension of logits and labels is spread.
SPREAD = {
    "rows": (P("data"), P("data")),
    "rows and columns": (P("data", "model"), P("data", "model")),
    "both on rows": (P(("data", "model")), P(("data", "model"))),
    "shared labels": (P("data"), P()),
    "shared logits": (P(), P("data")),
}
Objective = Callable[[jax.Array, jax.Array], jax.Array]


def mesh_of(kind: AxisType) -> Mesh:
    return jax.make_mesh((4, 2), ("data", "model"), (kind,) * 2, devices=jax.devices("cpu"))


@pytest.fixture
def mesh(cpu: str) -> Mesh:
    return mesh_of(AxisType.Auto)


@pytest.fixture(params=[True, False], ids=["check_vma", "unchecked"])
def checked(request: pytest.FixtureRequest) -> bool:
    return request.param


@pytest.fixture(params=LOSSES)
def loss(request: pytest.FixtureRequest) -> Objective:
    return LOSSES[request.param]


def axes_of(*specs: PartitionSpec) -> tuple[str, ...]:
    return tuple(name for name in ("data", "model") if any(name in str(spec) for spec in specs))


def inputs() -> tuple[np.ndarray, np.ndarray]:
    return oracle.random_logits(FLOAT32, SHAPE, 1), oracle.random_labels(FLOAT32, SHAPE, 2)


def local(values: np.ndarray, spec: PartitionSpec) -> np.ndarray:
    """What all shards share is as large as one shard of the rest."""
    return values if spec != P() else values[: SHAPE[0] // 4]


def on_shards(loss: Objective, mesh: Mesh, specs: tuple, checked: bool) -> Objective:
    """The mean of the shards' losses."""

    def mean(x: jax.Array, y: jax.Array) -> jax.Array:
        return jax.lax.pmean(loss(x, y), axes_of(*specs))

    return jax.shard_map(mean, mesh=mesh, in_specs=specs, out_specs=P(), check_vma=checked)


def on_one_device(x: jax.Array, y: jax.Array) -> jax.Array:
    """Of what all shards share, each has a copy."""
    rows = max(len(x), len(y))
    x, y = (jnp.tile(values, (rows // len(values), 1)) for values in (x, y))
    return jax_bce.loss(x, y)


def assert_close(actual: Any, expected: Any) -> None:
    """Up to the rounding of a sum of the shards' gradients, which may cancel, and of factors."""
    eps = float(np.finfo(FLOAT32).eps)
    relative, cancelled = oracle.SHARDS * eps, oracle.SHARDS_CANCELLED * eps

    def close(a: jax.Array, b: jax.Array) -> None:
        np.testing.assert_allclose(a, b, relative, atol=cancelled * float(jnp.max(abs(b))))

    jax.tree.map(close, actual, expected)


def product(objective: Objective) -> Objective:
    """The Hessian times the logits, forward over reverse."""
    return lambda x, y: jax.jvp(lambda x: jax.grad(objective)(x, y), (x,), (x,))[1]


def reverse_product(objective: Objective) -> Objective:
    """The same, reverse over reverse."""
    return lambda x, y: jax.vjp(lambda x: jax.grad(objective)(x, y), x)[1](x)[0]


def operands_of(spread: str) -> tuple[np.ndarray, ...]:
    return tuple(local(x, spec) for x, spec in zip(inputs(), SPREAD[spread], strict=True))


@cache
def expected(transform: Callable, spread: str) -> Any:
    """On one device, which is compiled once for all that is compared with it."""
    return jax.jit(transform(on_one_device))(*operands_of(spread))


def with_gradients(objective: Objective) -> Objective:
    return jax.value_and_grad(objective, argnums=(0, 1))


@pytest.mark.parametrize("spread", SPREAD)
def test_differentiated_outside(mesh: Mesh, checked: bool, loss: Objective, spread: str) -> None:
    objective = on_shards(loss, mesh, SPREAD[spread], checked)
    actual = jax.jit(with_gradients(objective))(*operands_of(spread))
    assert_close(actual, expected(with_gradients, spread))


@pytest.mark.parametrize("spread", SPREAD)
@pytest.mark.parametrize("order", [product, reverse_product])
def test_second_derivatives_outside(
    mesh: Mesh, checked: bool, order: Callable, spread: str
) -> None:
    objective = on_shards(jax_bce.loss, mesh, SPREAD[spread], checked)
    actual = jax.jit(order(objective))(*operands_of(spread))
    assert_close(actual, expected(order, spread))


@pytest.mark.parametrize("spread", ["rows", "rows and columns", "both on rows"])
def test_differentiated_inside(mesh: Mesh, checked: bool, loss: Objective, spread: str) -> None:
    """As a data-parallel training step does; one number goes from device to device."""
    specs = SPREAD[spread]
    axes = axes_of(*specs)
    shards = int(np.prod([mesh.shape[axis] for axis in axes]))

    def step(x: jax.Array, y: jax.Array) -> tuple[jax.Array, jax.Array]:
        value, gradient = jax.value_and_grad(loss)(x, y)
        return jax.lax.pmean(value, axes), gradient / shards

    function = jax.shard_map(
        step, mesh=mesh, in_specs=specs, out_specs=(P(), specs[0]), check_vma=checked
    )
    compiled = jax.jit(function).lower(*inputs()).compile()
    expected = jax.jit(jax.value_and_grad(on_one_device))(*inputs())
    assert_close(jax.jit(function)(*inputs()), expected)
    assert collectives(compiled) == ["all-reduce f32[]"]
    if loss is jax_bce.loss:
        assert len(kernel_calls(compiled)) == 1


def test_shared_parameters(mesh: Mesh, checked: bool) -> None:
    """With check_vma the gradient of what all shards share is their sum already."""
    images, labels = inputs()
    weights = oracle.random_logits(FLOAT32, SHAPE[1:], 3, scale=0.1)

    def objective(weights: jax.Array, images: jax.Array, labels: jax.Array) -> jax.Array:
        return jax_bce.loss(images @ weights, labels[:, 0])

    def step(*operands: jax.Array) -> tuple[jax.Array, jax.Array]:
        value, gradient = jax.value_and_grad(objective)(*operands)
        gradient = gradient / 4 if checked else jax.lax.pmean(gradient, "data")
        return jax.lax.pmean(value, "data"), gradient

    specs = (P(), P("data"), P("data"))
    function = jax.shard_map(
        step, mesh=mesh, in_specs=specs, out_specs=(P(), P()), check_vma=checked
    )
    actual = jax.jit(function)(weights, images, labels)
    expected = jax.value_and_grad(objective)(weights, images, labels)
    for found, wanted in zip(actual, expected, strict=True):
        largest = float(jnp.max(abs(wanted)))
        np.testing.assert_allclose(found, wanted, 0, atol=oracle.SURROUNDINGS * largest)


def test_smoothing_that_shards_share(mesh: Mesh, checked: bool) -> None:
    def loss(x: jax.Array, y: jax.Array, smoothing: jax.Array) -> jax.Array:
        return jax_bce.loss(x, y, label_smoothing=smoothing)

    def mean(*operands: jax.Array) -> jax.Array:
        return jax.lax.pmean(loss(*operands), "data")

    specs = (P("data"), P("data"), P())
    objective = jax.shard_map(mean, mesh=mesh, in_specs=specs, out_specs=P(), check_vma=checked)
    smoothing = jnp.float32(0.1)
    gradients = [
        jax.jit(jax.grad(f, argnums=(0, 2)))(*inputs(), smoothing) for f in (objective, loss)
    ]
    assert_close(gradients[0][0], gradients[1][0])
    np.testing.assert_allclose(gradients[0][1], gradients[1][1], oracle.SURROUNDINGS)


def test_without_jit(mesh: Mesh, checked: bool) -> None:
    specs = SPREAD["rows and columns"]
    objective = on_shards(jax_bce.loss, mesh, specs, checked)
    actual = jax.value_and_grad(objective)(*inputs())
    assert_close(actual, jax.value_and_grad(on_one_device)(*inputs()))


@pytest.mark.parametrize("residuals", ["gradient", "recompute"])
@pytest.mark.parametrize("kind", [AxisType.Auto, AxisType.Explicit], ids=lambda kind: kind.name)
def test_partially_manual(cpu: str, checked: bool, kind: AxisType, residuals: str) -> None:
    """Rows by hand, columns by the partitioner; on automatic axes nothing is gathered."""
    mesh = mesh_of(kind)
    loss = partial(jax_bce.loss, residuals=residuals)

    def mean(x: jax.Array, y: jax.Array) -> jax.Array:
        return jax.lax.pmean(loss(x, y), "data")

    spread = [jax.device_put(x, NamedSharding(mesh, P("data", "model"))) for x in inputs()]
    with jax.set_mesh(mesh):
        function = jax.shard_map(
            mean, in_specs=P("data"), out_specs=P(), axis_names={"data"}, check_vma=checked
        )
        compiled = jax.jit(jax.value_and_grad(function)).lower(*spread).compile()
    assert_close(compiled(*spread), jax.jit(jax.value_and_grad(on_one_device))(*inputs()))
    if kind == AxisType.Auto:
        assert all(what.startswith("all-reduce") for what in collectives(compiled))


def test_vmap_inside(mesh: Mesh, checked: bool) -> None:
    function = jax.shard_map(
        jax.vmap(jax.value_and_grad(jax_bce.loss)),
        mesh=mesh,
        in_specs=P("data"),
        out_specs=P("data"),
        check_vma=checked,
    )
    expected = jax.jit(jax.vmap(jax.value_and_grad(jax_bce.loss)))(*inputs())
    oracle.assert_same_bits(jax.jit(function)(*inputs()), expected)


@pytest.mark.parametrize("residuals", ["gradient", "recompute"])
def test_pmap(cpu: str, residuals: str) -> None:
    if not hasattr(jax, "pmap"):
        pytest.skip("this JAX has no pmap any more")
    function = jax.value_and_grad(partial(jax_bce.loss, residuals=residuals))
    operands = [values.reshape(8, 2, 64) for values in inputs()]
    actual = jax.pmap(function, devices=jax.devices("cpu"))(*operands)
    oracle.assert_same_bits(actual, jax.jit(jax.vmap(function))(*operands))
