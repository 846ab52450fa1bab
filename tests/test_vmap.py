"""vmap of the loss and its gradient is a loop over the mapped axis, bit for bit with the kernel.

Whichever operand is mapped, along whichever axis, nested, and together with grad in either order.
"""

from collections.abc import Callable
from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import oracle
import pytest
from jax import lax
from jax.sharding import Mesh, NamedSharding, PartitionSpec
from oracle import BFLOAT16, FLOAT32

import jax_bce

pytestmark = [pytest.mark.any_jax, pytest.mark.quickly]

BATCH, COLUMNS = 5, 19
FUNCTIONS = {
    "mean": lambda **keywords: partial(jax_bce.loss, **keywords),
    "none": lambda **keywords: partial(jax_bce.loss, reduction="none", **keywords),
    "loss_and_grad": lambda **keywords: partial(jax_bce.loss_and_grad, **keywords),
    "value_and_grad": lambda **keywords: jax.value_and_grad(partial(jax_bce.loss, **keywords)),
    "recompute": lambda **keywords: jax.value_and_grad(
        partial(jax_bce.loss, residuals="recompute", **keywords)
    ),
}
# in_axes, and the shapes of logits and labels.
IN_AXES = {
    "both": ((0, 0), (BATCH, COLUMNS), (BATCH, COLUMNS)),
    "logits": ((0, None), (BATCH, COLUMNS), (COLUMNS,)),
    "labels": ((None, 0), (COLUMNS,), (BATCH, COLUMNS)),
    "last": ((-1, 1), (COLUMNS, BATCH), (COLUMNS, BATCH)),
    "different": ((0, 1), (BATCH, COLUMNS), (COLUMNS, BATCH)),
    "middle": ((1, 1), (3, BATCH, COLUMNS), (3, BATCH, COLUMNS)),
    "one label for all": ((0, None), (BATCH, COLUMNS), ()),
    "a label for each": ((0, 0), (BATCH, COLUMNS), (BATCH,)),
    "a label for each, logits for all": ((None, 0), (COLUMNS,), (BATCH,)),
    "scalars": ((0, 0), (BATCH,), (BATCH,)),
}


@pytest.fixture(params=FUNCTIONS)
def function(request: pytest.FixtureRequest, implementation: str) -> Callable:
    """From logits and labels to a tuple of arrays, or one; compiled, as a loop calls it often."""
    return jax.jit(FUNCTIONS[request.param](implementation=implementation))


def assert_close(actual: object, expected: object) -> None:
    tolerance = oracle.TOLERANCE["xla"].sum
    close = partial(np.testing.assert_allclose, rtol=tolerance, atol=tolerance)
    jax.tree.map(close, actual, expected)


@pytest.fixture
def assert_same(implementation: str) -> Callable[[object, object], None]:
    """The kernel has the same bits; XLA compiles a mapped function to other instructions."""
    return assert_close if implementation == "xla" else oracle.assert_same_bits


def inputs(logits_shape, labels_shape, dtype=FLOAT32) -> tuple[np.ndarray, np.ndarray]:
    return (
        oracle.random_logits(dtype, logits_shape, seed=1),
        oracle.random_labels(dtype, labels_shape, seed=2),
    )


def loop(function: Callable, in_axes, logits, labels, size: int = BATCH):
    """What vmap stands for."""
    results = [
        function(
            *(
                values if axis is None else np.take(values, i, axis)
                for values, axis in zip((logits, labels), in_axes, strict=True)
            )
        )
        for i in range(size)
    ]
    return jax.tree.map(lambda *rows: np.stack(rows), *results)


@pytest.mark.parametrize("case", IN_AXES)
def test_equals_a_loop(function: Callable, assert_same: Callable, case: str) -> None:
    in_axes, *shapes = IN_AXES[case]
    logits, labels = inputs(*shapes)
    mapped = jax.jit(jax.vmap(function, in_axes))(logits, labels)
    assert_same(mapped, loop(function, in_axes, logits, labels))


@pytest.mark.parametrize("case", IN_AXES)
def test_gradient_of_labels(implementation: str, case: str) -> None:
    """-x, which XLA adds up where one label is for all."""
    in_axes, *shapes = IN_AXES[case]
    logits, labels = inputs(*shapes)
    function = jax.jit(jax.grad(partial(jax_bce.loss, implementation=implementation), argnums=1))
    mapped = jax.vmap(function, in_axes)(logits, labels)
    assert_close(mapped, loop(function, in_axes, logits, labels))


@pytest.mark.parametrize("label_dtype", ["uint8", "float32"])
def test_equals_a_loop_in_16_bits(platform: str, label_dtype: str) -> None:
    logits, _ = inputs((BATCH, COLUMNS), (), BFLOAT16)
    labels = oracle.random_labels(label_dtype, (BATCH, COLUMNS), seed=3)
    function = partial(jax_bce.loss_and_grad, implementation=platform)
    mapped = jax.vmap(function)(logits, labels)
    oracle.assert_same_bits(mapped, loop(function, (0, 0), logits, labels))


@pytest.mark.parametrize("axis", [0, 1, (0, 1)], ids=str)
def test_axis_counts_without_the_mapped_one(
    implementation: str, assert_same: Callable, axis
) -> None:
    logits, labels = inputs((3, BATCH, 7), (3, BATCH, 7))
    function = partial(jax_bce.loss_and_grad, axis=axis, implementation=implementation)
    mapped = jax.vmap(function, 1)(logits, labels)
    assert_same(mapped, loop(function, (1, 1), logits, labels))


def test_out_axes(implementation: str, assert_same: Callable) -> None:
    logits, labels = inputs((BATCH, COLUMNS), (BATCH, COLUMNS))
    function = partial(jax_bce.loss_and_grad, implementation=implementation)
    loss, gradient = jax.vmap(function, out_axes=(0, 1))(logits, labels)
    assert_same((loss, gradient.T), loop(function, (0, 0), logits, labels))
    elementwise = partial(jax_bce.loss, reduction="none", implementation=implementation)
    losses = jax.vmap(elementwise, in_axes=1, out_axes=-1)(logits, labels)
    assert_same(losses, elementwise(logits, labels))


def test_nested(function: Callable, assert_same: Callable) -> None:
    """Every row of logits against every row of labels."""
    logits, labels = inputs((3, COLUMNS), (BATCH, COLUMNS))
    by_label = jax.vmap(function, (None, 0))
    mapped = jax.vmap(by_label, (0, None))(logits, labels)
    expected = loop(partial(loop, function, (None, 0)), (0, None), logits, labels, size=3)
    assert_same(mapped, expected)


def test_nested_thrice(implementation: str, assert_same: Callable) -> None:
    shape = (2, 3, 4, COLUMNS)
    logits, labels = inputs(shape, shape)
    function = partial(jax_bce.loss_and_grad, implementation=implementation)
    # The second vmap takes the axis of 4, and the last that of 3.
    mapped = jax.vmap(jax.vmap(jax.vmap(function), in_axes=1, out_axes=1))(logits, labels)
    rows = logits.reshape(-1, COLUMNS), labels.reshape(-1, COLUMNS)
    loss, gradient = loop(function, (0, 0), *rows, size=24)
    expected = loss.reshape(2, 3, 4), gradient.reshape(shape)
    assert_same(mapped, expected)


@pytest.mark.parametrize("case", ["both", "logits", "labels", "different", "a label for each"])
def test_spmd_axis_name(cpu: str, case: str) -> None:
    """The mapped axis is spread over 8 devices, also where logits are constrained inside."""
    in_axes, *shapes = IN_AXES[case]
    size = 8
    shapes = [tuple(size if d == BATCH else d for d in shape) for shape in shapes]
    logits, labels = inputs(*shapes)
    mesh = Mesh(np.array(jax.devices(cpu)), "rows")

    def function(logits, labels):
        logits = lax.with_sharding_constraint(logits, NamedSharding(mesh, PartitionSpec()))
        return jax_bce.loss_and_grad(logits, labels, implementation=cpu)

    mapped = jax.jit(jax.vmap(function, in_axes, spmd_axis_name="rows"))
    loss, gradient = mapped(logits, labels)
    oracle.assert_same_bits((loss, gradient), loop(function, in_axes, logits, labels, size))
    rows = NamedSharding(mesh, PartitionSpec("rows"))
    if in_axes[0] is not None:
        assert gradient.sharding.is_equivalent_to(rows, gradient.ndim)


def test_grad_of_vmap_is_vmap_of_grad(implementation: str, assert_same: Callable) -> None:
    logits, labels = inputs((BATCH, COLUMNS), (BATCH, COLUMNS))
    for residuals in ("gradient", "recompute"):
        loss = partial(jax_bce.loss, residuals=residuals, implementation=implementation)
        inside = jax.grad(lambda x, loss=loss: jnp.sum(jax.vmap(loss)(x, labels)))(logits)
        assert_same(inside, jax.vmap(jax.grad(loss))(logits, labels))


def test_traced_smoothing_for_each(implementation: str, assert_same: Callable) -> None:
    logits, labels = inputs((COLUMNS,), (COLUMNS,))
    smoothings = np.array([0.0, 0.25, 1.0], FLOAT32)

    def loss(smoothing):
        return jax_bce.loss(
            logits, labels, label_smoothing=smoothing, implementation=implementation
        )

    assert_same(jax.vmap(loss)(smoothings), np.stack([loss(s) for s in smoothings]))


def test_no_rows(implementation: str) -> None:
    logits = np.zeros((0, 3), FLOAT32)
    function = partial(jax_bce.loss_and_grad, implementation=implementation)
    results = jax.vmap(function)(logits, logits)
    oracle.assert_same_bits(results, (np.zeros(0, FLOAT32), logits))
