"""Every dtype of logits and labels in every shape: values, gradients, result dtypes and shapes.

Sizes around a vector register, a tile and a block; rows that start at misaligned addresses (XLA
aligns every buffer, so a row of odd length is what brings them about); any axes reduced.
"""

from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import oracle
import platforms
import pytest
import sample
from oracle import BFLOAT16, FLOAT16, FLOAT32, FLOAT64

import jax_bce

pytestmark = pytest.mark.any_jax

SHAPES = [(), (0,), (1,), (8,), (17,), (1, 1), (0, 3), (4, 0), (3, 5), (2, 3, 4, 5)]
ALL_AXES = [
    ((3, 5), [None, 0, 1, -1, -2, (0, 1), (1, 0), [0, 1]]),
    ((2, 3, 4, 5), [None, 3, (2, 3), (1, 2, 3), 0, (0, 1), (0, 2), (1, 3), -2, (-1, 0), 1]),
]
AXES = [(shape, axis) for shape, axes in ALL_AXES for axis in axes]
# The last sizes before and after 16 K and 64 K elements, and a size that is shared by threads.
BLOCK_SIZES = (511, 512, 513, 16383, 16384, 16385, 65535, 65536, 65537, 300_001)


# Every dtype by the kernel; XLA's side is the same code for all of them.
IMPLEMENTED = [
    (name, dtype)
    for name in platforms.IMPLEMENTATIONS
    for dtype in (oracle.FLOATS if name.endswith("kernel") else [FLOAT32])
]


def inputs(shape, dtype, label_dtype, seed: int = 1) -> tuple[np.ndarray, np.ndarray]:
    logits = oracle.random_logits(dtype, shape, seed)
    if np.dtype(label_dtype) not in oracle.FLOATS:
        return logits, oracle.random_labels(label_dtype, shape, seed + 1)
    # Numbers of every dtype: it does not matter where they are rounded.
    labels = np.random.default_rng(seed + 1).integers(0, 257, shape) / 256
    return logits, np.asarray(labels, label_dtype)


def check_result(check, implementation: str, logits, labels, results, reduction: str, axis=None):
    """Loss and gradient of one reduction."""
    loss, gradient = results
    exact = oracle.exact(logits, labels)
    if reduction == "none":
        assert loss.dtype == logits.dtype
        check.elements(implementation, logits, labels, loss=loss)
        factor = 1.0
    else:
        assert loss.dtype == oracle.arithmetic_dtype(logits.dtype)
        axes = tuple(axis) if isinstance(axis, list) else axis
        total = np.asarray(exact.loss.sum(axis=axes))
        # The mean of no elements is 0: it has some denominator.
        count = max(1, logits.size // max(1, total.size)) if reduction == "mean" else 1
        factor = 1 / count
        check.reduced(implementation, loss, total * factor, logits=logits.dtype)
    assert gradient.dtype == logits.dtype
    check.elements(implementation, logits, labels, gradient=gradient, factor=factor)


def check_call(
    check, implementation: str, logits, labels, reductions=("none", "mean"), axis=None
) -> None:
    """`loss_and_grad`, and `loss` alone, which is another kernel with the same result."""

    @jax.jit
    def evaluate(logits, labels):
        keywords = {"axis": axis, "implementation": implementation}
        return [
            (function(logits, labels, reduction=reduction, **keywords))
            for reduction in reductions
            for function in (jax_bce.loss_and_grad, jax_bce.loss)
        ]

    results = evaluate(logits, labels)
    for reduction, pair, alone in zip(reductions, results[::2], results[1::2], strict=True):
        assert (alone.shape, alone.dtype) == (pair[0].shape, pair[0].dtype)
        if implementation != "xla":
            oracle.assert_same_bits(alone, pair[0])
        check_result(check, implementation, logits, labels, pair, reduction, axis)


def test_every_pair_of_dtypes(
    check, implementation: str, dtype: np.dtype, label_dtype: np.dtype
) -> None:
    logits, labels = inputs(37, dtype, label_dtype)
    check_call(check, implementation, logits, labels)


@pytest.mark.parametrize("shape", SHAPES, ids=str)
@pytest.mark.parametrize(("implementation", "dtype"), IMPLEMENTED, ids=str, indirect=True)
def test_every_shape(check, implementation: str, dtype: np.dtype, shape) -> None:
    logits, labels = inputs(shape, dtype, dtype)
    check_call(check, implementation, logits, labels, ("none", "sum", "mean"))


@pytest.mark.parametrize(("shape", "axis"), AXES, ids=str)
def test_every_axis(check, implementation: str, shape, axis) -> None:
    logits, labels = inputs(shape, FLOAT32, np.uint8)
    check_call(check, implementation, logits, labels, ("sum", "mean"), axis)


@pytest.mark.parametrize("axis", [0, 1, (0, 2)], ids=str)
@pytest.mark.parametrize(("implementation", "dtype"), IMPLEMENTED, ids=str, indirect=True)
def test_every_axis_in_other_dtypes(check, implementation: str, dtype: np.dtype, axis) -> None:
    logits, labels = inputs((3, 4, 5), dtype, np.int16)
    check_call(check, implementation, logits, labels, ("mean",), axis)


@pytest.mark.parametrize(
    ("shape", "axis"), [((), None), ((9,), None), ((3, 5), -1), ((2, 3, 5), (0, 1))], ids=str
)
@pytest.mark.parametrize(("implementation", "dtype"), IMPLEMENTED, ids=str, indirect=True)
def test_one_label_for_all(check, implementation: str, dtype: np.dtype, shape, axis) -> None:
    """A scalar label is every element's; only the logits' axes are there to be reduced."""
    for label_dtype in (dtype, np.bool_):
        logits, label = inputs(shape, dtype, dtype)[0], np.asarray(1, label_dtype)
        reductions = ("none", "mean") if axis is None else ("mean",)
        check_call(check, implementation, logits, label, reductions, axis)


@pytest.mark.parametrize("width", [1, 2, 3, 4, 7, 31, 32, 33, 64, 95, 96, 97, 257, 1025])
def test_short_rows_add_up_like_long_ones(platform: str, width: int) -> None:
    """Several of them in a tile, or each on its own: the same bits."""
    logits, labels = inputs((77, width), FLOAT32, np.uint8)
    together = jax_bce.loss_and_grad(logits, labels, axis=-1, implementation=platform)
    alone = [
        jax_bce.loss_and_grad(*row, implementation=platform)
        for row in zip(logits, labels, strict=True)
    ]
    oracle.assert_same_bits(together[0], np.array([loss for loss, _ in alone]))
    oracle.assert_same_bits(together[1], np.array([gradient for _, gradient in alone]))


def test_every_rank(check, implementation: str) -> None:
    """Also more dimensions than the kernel counts: those that are read alike are one to it."""
    loss = jax_bce.loss(jnp.zeros((1,) * 20), 0, implementation=implementation)
    check.reduced(implementation, loss, np.log(2))
    function = partial(jax_bce.loss, implementation=implementation)
    for _ in range(20):
        function = jax.vmap(function)
    losses = function(jnp.zeros((1,) * 19 + (2, 3)), jnp.zeros((1,) * 19 + (2, 3)))
    assert losses.shape == (1,) * 19 + (2,)


def test_more_than_2_to_the_31_elements(implementation: str) -> None:
    """Compiled, not run: no count overflows a type."""
    many = jax.ShapeDtypeStruct((2**16, 2**16), FLOAT32)

    def loss(x, y):
        return jax_bce.loss(x, y, implementation=implementation)

    def curvature(x, y):
        return jax.jvp(lambda x: jax.grad(loss)(x, y), (x,), (x,))

    for function in (loss, jax.grad(loss, argnums=(0, 1)), curvature):
        assert jax.jit(function).lower(many, many)


@pytest.mark.parametrize(
    ("label_dtype", "value"),
    [("int8", -3), ("int8", 2), ("uint8", 2), ("uint8", 255), ("int16", -3), ("int32", -70_000)],
)
def test_integers_are_taken_at_their_value(
    check, implementation: str, label_dtype: str, value: int
) -> None:
    """1 - y is computed beyond the labels' own type, where 1 - uint8(255) would be 2."""
    logits = oracle.walk(FLOAT32, 1024, low=2**-10, high=80.0)
    labels = np.full(logits.shape, value, label_dtype)
    loss, gradient = jax_bce.loss_and_grad(
        logits, labels, reduction="none", implementation=implementation
    )
    exact = oracle.exact(logits, labels)
    bound = oracle.LABEL_BEYOND_1
    # Outside [0, 1] the terms cancel: the error is one of the larger term.
    check.ulps("loss, label beyond 1", loss, exact.loss, bound, scale=exact.loss_scale)
    check.ulps(
        "gradient, label beyond 1", gradient, exact.gradient, bound, scale=exact.gradient_scale
    )


@pytest.mark.parametrize(
    ("dtype", "label_dtype"),
    [(FLOAT32, FLOAT32), (FLOAT32, "uint8"), (BFLOAT16, BFLOAT16), (FLOAT16, "int32")],
    ids=str,
)
def test_every_length(check, platform: str, dtype: np.dtype, label_dtype: np.dtype) -> None:
    """0 to 130 elements, all in one compiled function, each a slice of its own offset.

    A sample has every third length, which is every remainder that a vector leaves.
    """
    logits, labels = inputs(300, dtype, label_dtype)
    lengths = range(0, 131, 1 if sample.everything else 3)

    @partial(jax.jit, static_argnames="reduction")
    def all_lengths(logits, labels, reduction: str):
        return [
            jax_bce.loss_and_grad(
                logits[n : 2 * n], labels[n : 2 * n], reduction=reduction, implementation=platform
            )
            for n in lengths
        ]

    for reduction in ("none", "mean"):
        results = all_lengths(logits, labels, reduction=reduction)
        for n, result in zip(lengths, results, strict=True):
            of_n = logits[n : 2 * n], labels[n : 2 * n]
            check_result(check, platform, *of_n, result, reduction)


@pytest.mark.parametrize("size", BLOCK_SIZES)
def test_lengths_around_blocks(check, platform: str, size: int) -> None:
    logits, labels = inputs(size, FLOAT32, np.uint8)
    check_call(check, platform, logits, labels)


@pytest.mark.parametrize("columns", [1, 3, 31, 33, 511, 515, 16387])
@pytest.mark.parametrize("dtype", [FLOAT32, BFLOAT16], ids=str)
def test_rows_at_misaligned_addresses(check, platform: str, dtype: np.dtype, columns: int) -> None:
    """Row i starts i * columns elements into an aligned buffer."""
    logits, labels = inputs((7, columns), dtype, np.uint8)
    check_call(check, platform, logits, labels, ("mean",), 1)


@pytest.mark.parametrize("offset", [0, 1, 3, 4, 8, 16, 64])
def test_views_of_a_larger_buffer(check, platform: str, offset: int) -> None:
    """NumPy views at any byte, and slices under jit: whether JAX copies them or not."""
    size = 1003
    logits, labels = inputs(size, FLOAT32, np.uint8)
    raw = np.zeros(logits.nbytes + 64, np.uint8)
    raw[offset : offset + logits.nbytes] = logits.view(np.uint8)
    view = np.frombuffer(raw.data, np.float32, size, offset)
    oracle.assert_same_bits(view, logits)

    call = partial(jax_bce.loss_and_grad, implementation=platform)
    sliced = jax.jit(lambda x, y: call(x[offset:], y[offset:]))
    padding = np.zeros(offset, np.uint8)
    whole = np.concatenate([padding.astype(FLOAT32), logits]), np.concatenate([padding, labels])
    expected = call(logits, labels)
    check_result(check, platform, logits, labels, expected, "mean")
    oracle.assert_same_bits(call(view, labels), expected)
    imported = jax.device_put(jax.dlpack.from_dlpack(view), jax.devices(platform)[0])
    oracle.assert_same_bits(call(imported, labels), expected)
    oracle.assert_same_bits(sliced(*whole), expected)


@pytest.mark.parametrize("step", [2, -1])
def test_strided_and_transposed(check, platform: str, step: int) -> None:
    """What is no plain buffer, in NumPy and under jit."""

    def turned(values):
        return values[::step, ::step].T

    logits, labels = inputs((12, 34), FLOAT32, np.uint8)
    keywords = {"axis": 0, "implementation": platform}
    results = jax_bce.loss_and_grad(turned(logits), turned(labels), **keywords)
    check_result(check, platform, turned(logits), turned(labels), results, "mean", 0)
    inside = jax.jit(lambda x, y: jax_bce.loss_and_grad(turned(x), turned(y), **keywords))
    oracle.assert_same_bits(inside(logits, labels), results)


@pytest.mark.parametrize("result", oracle.FLOATS[:3], ids=str)
@pytest.mark.parametrize("dtype", oracle.FLOATS[:3], ids=str)
def test_dtype_of_the_result(check, implementation: str, dtype: np.dtype, result: np.dtype) -> None:
    """`dtype` is the loss's; the gradient keeps the logits'."""
    logits, labels = inputs(100, dtype, np.uint8)
    exact = oracle.exact(logits, labels).loss
    bound = oracle.TOLERANCE[implementation].elements[result.name, "hard"].loss
    for reduction, expected in (("none", exact), ("mean", exact.mean())):
        keywords = {"reduction": reduction, "dtype": result, "implementation": implementation}
        loss, gradient = jax_bce.loss_and_grad(logits, labels, **keywords)
        value, pullback = jax.vjp(
            lambda x, keywords=keywords: jax_bce.loss(x, labels, **keywords), logits
        )
        assert loss.dtype == value.dtype == result
        assert gradient.dtype == pullback(jnp.ones_like(value))[0].dtype == dtype
        check.ulps(f"loss with dtype, {implementation}", loss, expected, bound)


@pytest.mark.parametrize("kind", ["list", "list of lists", "jax"])
def test_array_likes(check, implementation: str, kind: str) -> None:
    logits, labels = [1.0, -2.0, 3.0, -4.0], [1, 0, 0, 1]
    if kind == "list of lists":
        logits, labels = [logits[:2], logits[2:]], [labels[:2], labels[2:]]
    if kind == "jax":
        logits, labels = jnp.array(logits), jnp.array(labels)
    loss = jax_bce.loss(logits, labels, implementation=implementation)
    assert loss.dtype == FLOAT32
    exact = oracle.exact(np.array(logits, FLOAT32), np.array(labels)).loss.mean()
    check.reduced(implementation, loss, exact)


@pytest.mark.parametrize("value", [-3, 2, 2**40])
def test_int64_labels(check, implementation: str, value: int) -> None:
    with jax.enable_x64(True):
        logits = oracle.walk(FLOAT32, 256, low=2**-10, high=80.0)
        labels = np.full(logits.shape, value, np.int64)
        loss = jax_bce.loss(logits, labels, reduction="none", implementation=implementation)
    exact = oracle.exact(logits, labels)
    check.ulps(
        "loss, label beyond 1", loss, exact.loss, oracle.LABEL_BEYOND_1, scale=exact.loss_scale
    )


@pytest.mark.parametrize("result", [FLOAT16, FLOAT32, FLOAT64], ids=str)
def test_elements_in_a_wider_or_narrower_dtype(
    implementation: str, dtype: np.dtype, result: np.dtype
) -> None:
    """The loss of an element in any dtype is the one in the arithmetic's, rounded."""
    logits, labels = np.array([0.3, -25, 700], dtype), np.array([0, 1, 1], np.uint8)
    with jax.enable_x64(True):
        of = partial(jax_bce.loss, logits, labels, reduction="none", implementation=implementation)
        wide = of(dtype=oracle.arithmetic_dtype(dtype))
        actual = of(dtype=result)
    assert actual.dtype == result
    oracle.assert_same_bits(actual, np.asarray(wide).astype(result))
