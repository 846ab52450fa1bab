"""What XLA compiles: the loss and its gradient are one call of the kernel and one pass over memory.

Read off the optimized HLO: which instructions touch as many elements as the logits have, and how
much temporary memory the program needs.
"""

import math
from collections.abc import Callable, Iterator
from functools import partial

import hlo
import jax
import jax.numpy as jnp
import numpy as np
import oracle
import platforms
import pytest
from hlo import kernel_calls
from jax.stages import Compiled
from oracle import BFLOAT16, FLOAT16, FLOAT32

import jax_bce

SHAPE = (1024, 1024)
SIZE = math.prod(SHAPE)
MIB = 2**20


def passes(compiled: Compiled) -> list[str]:
    return hlo.passes(compiled, SIZE)


def compile_for(function: Callable, *shapes, dtype=FLOAT32, label_dtype=FLOAT32) -> Compiled:
    """Compiles for logits and labels of these shapes, both of `SHAPE` unless given."""
    shapes = shapes or (SHAPE, SHAPE)
    operands = [
        jax.ShapeDtypeStruct(shape, kind)
        for shape, kind in zip(shapes, (dtype, label_dtype), strict=True)
    ]
    return jax.jit(function).lower(*operands).compile()


def assert_calls(compiled: Compiled, count: int = 1) -> None:
    """So many calls of the kernel, no other pass, no temporary of the logits' size."""
    calls = kernel_calls(compiled)
    assert len(calls) == count
    assert passes(compiled) == calls
    assert compiled.memory_analysis().temp_size_in_bytes < MIB


@pytest.fixture(params=[None, *platforms.PLATFORMS], ids=lambda name: f"implementation={name}")
def loss(request: pytest.FixtureRequest) -> Iterator[Callable]:
    """The loss with each kernel by name, and as everybody calls it, which is the CPU's on a CPU."""
    with platforms.kernel(request.param or "cpu"):
        yield partial(jax_bce.loss, implementation=request.param)


def test_the_reader_sees_other_passes(platform: str) -> None:
    """Of the formula in plain jnp it finds fusions, and a temporary of the logits' size."""

    def formula(x, y):
        return jnp.mean(jnp.maximum(x, 0) - x * y + jnp.log1p(jnp.exp(-jnp.abs(x))))

    compiled = compile_for(jax.value_and_grad(formula))
    assert "fusion" in passes(compiled)
    assert not kernel_calls(compiled)
    with_copy = compile_for(lambda x, y: (x.T.copy(), y))
    assert set(passes(with_copy)) & {"copy", "transpose", "fusion"}


@pytest.mark.parametrize("reduction", ["mean", "sum"])
def test_value_and_grad(loss: Callable, reduction: str) -> None:
    assert_calls(compile_for(jax.value_and_grad(partial(loss, reduction=reduction))))


@pytest.mark.parametrize("dtype", [FLOAT32, BFLOAT16], ids=str)
@pytest.mark.parametrize("label_dtype", ["float32", "bfloat16", "bool", "uint8", "int32"])
def test_dtypes_are_read_as_stored(loss: Callable, dtype: np.dtype, label_dtype: str) -> None:
    """No conversion of logits or labels in a pass of its own."""
    labels = np.dtype(BFLOAT16 if label_dtype == "bfloat16" else label_dtype)
    assert_calls(compile_for(jax.value_and_grad(loss), dtype=dtype, label_dtype=labels))


@pytest.mark.parametrize("reduction", ["none", "mean"])
@pytest.mark.parametrize("dtype", oracle.FLOATS[:3], ids=str)
def test_loss_alone(loss: Callable, dtype: np.dtype, reduction: str) -> None:
    """The loss without its gradient writes none."""
    compiled = compile_for(partial(loss, reduction=reduction), dtype=dtype)
    assert_calls(compiled)
    expected = SIZE * dtype.itemsize if reduction == "none" else FLOAT32.itemsize
    assert compiled.memory_analysis().output_size_in_bytes == expected


@pytest.mark.parametrize("reduction", ["none", "mean"])
@pytest.mark.parametrize("dtype", oracle.FLOATS[:3], ids=str)
def test_loss_and_grad(platform: str, dtype: np.dtype, reduction: str) -> None:
    function = partial(jax_bce.loss_and_grad, reduction=reduction, implementation=platform)
    assert_calls(compile_for(function, dtype=dtype))


def test_label_smoothing(loss: Callable) -> None:
    """Labels are read as stored and smoothed on the way."""

    def smoothed(x, y):
        return loss(x, y, label_smoothing=0.1)

    assert_calls(compile_for(jax.value_and_grad(smoothed), label_dtype=np.uint8))
    assert_calls(compile_for(smoothed, label_dtype=np.uint8))


def test_gradient_alone(loss: Callable) -> None:
    assert_calls(compile_for(jax.grad(loss)))


@pytest.mark.parametrize("axis", [-1, (0, 1)], ids=str)
def test_trailing_axes(platform: str, axis) -> None:
    function = partial(jax_bce.loss_and_grad, axis=axis, implementation=platform)
    assert_calls(compile_for(function))


def test_one_label_for_all(loss: Callable) -> None:
    """A scalar label is not spread over memory first."""
    assert_calls(compile_for(jax.value_and_grad(loss), SHAPE, ()))


def test_vmap(loss: Callable) -> None:
    """A mapped axis is one more dimension of the same call."""
    assert_calls(compile_for(jax.vmap(jax.value_and_grad(loss))))


def test_vmap_of_logits_alone(loss: Callable) -> None:
    """Labels that are shared stay as small as they are."""
    function = jax.vmap(jax.value_and_grad(loss), (0, None))
    assert_calls(compile_for(function, SHAPE, SHAPE[1:]))


def test_vmap_of_labels_alone(loss: Callable) -> None:
    """Logits that are shared stay as small as they are."""
    function = jax.vmap(jax.value_and_grad(loss), (None, 0))
    assert_calls(compile_for(function, SHAPE[1:], SHAPE))


def test_vmap_of_one_label_for_each(loss: Callable) -> None:
    assert_calls(compile_for(jax.vmap(jax.value_and_grad(loss)), SHAPE, SHAPE[:1]))


def test_vmap_in_place(loss: Callable) -> None:
    """A mapped axis in front of the summed ones is not moved to the first place."""
    elementwise = partial(loss, reduction="none")
    assert_calls(compile_for(jax.vmap(elementwise, 1, 1)))
    assert_calls(compile_for(jax.vmap(elementwise, (1, None), 1), SHAPE, SHAPE[:1]))
    shape = (16, 256, 256)
    assert_calls(compile_for(jax.vmap(partial(loss, axis=-1), 1, 1), shape, shape))


def test_vmap_twice(loss: Callable) -> None:
    shape = (4, 256, 1024)
    assert_calls(compile_for(jax.vmap(jax.vmap(jax.value_and_grad(loss))), shape, shape))


def test_scan(loss: Callable) -> None:
    """Each step is the call; XLA copies its row, not more."""

    def total(x, y):
        return jax.lax.scan(lambda carry, row: (carry + loss(*row), None), 0.0, (x, y))[0]

    compiled = compile_for(total)
    assert len(kernel_calls(compiled)) == 1
    assert compiled.memory_analysis().temp_size_in_bytes < MIB


def test_recompute(loss: Callable) -> None:
    """One call forward, one backward, and nothing kept in between."""
    recompute = partial(loss, residuals="recompute")
    assert_calls(compile_for(jax.value_and_grad(recompute)), count=2)
    assert_calls(compile_for(recompute))


def test_recompute_keeps_only_its_operands(loss: Callable) -> None:
    """The pullback holds logits and labels; the default holds the gradient alone."""

    def residuals(kind: str) -> list[tuple[int, ...]]:
        def pullback(x, y):
            return jax.vjp(partial(loss, labels=y, residuals=kind), x)[1]

        kept = jax.eval_shape(pullback, *[jax.ShapeDtypeStruct(SHAPE, FLOAT32)] * 2)
        return [leaf.shape for leaf in jax.tree.leaves(kept) if leaf.shape == SHAPE]

    assert len(residuals("recompute")) == 2
    assert len(residuals("gradient")) == 1


def test_recompute_takes_the_cotangent(loss: Callable) -> None:
    """A loss scale goes into the backward call: no pass multiplies the gradient afterwards."""

    def scaled(x, y, scale):
        return loss(x, y, residuals="recompute") * scale

    operands = [jax.ShapeDtypeStruct(SHAPE, FLOAT16), jax.ShapeDtypeStruct(SHAPE, np.uint8)]
    compiled = (
        jax.jit(jax.value_and_grad(scaled))
        .lower(*operands, jax.ShapeDtypeStruct((), FLOAT32))
        .compile()
    )
    assert_calls(compiled, count=2)


@pytest.mark.parametrize(
    "transform", [lambda f: f, jax.grad, jax.value_and_grad], ids=["loss", "grad", "value_and_grad"]
)
@pytest.mark.parametrize("residuals", ["gradient", "recompute"])
def test_xla_holds_no_call(platform: str, transform: Callable, residuals: str) -> None:
    function = partial(jax_bce.loss, residuals=residuals, implementation="xla")
    compiled = compile_for(transform(function))
    assert "jax_bce_v" not in compiled.as_text()
    assert passes(compiled)


def test_xla_passes_through_loss_and_grad(platform: str) -> None:
    compiled = compile_for(partial(jax_bce.loss_and_grad, implementation="xla"))
    assert "jax_bce_v" not in compiled.as_text()
