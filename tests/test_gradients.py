"""First derivatives: what jax.grad and loss_and_grad return is the exact gradient, in full.

With respect to logits and labels, times any cotangent, for every reduction, from a stored gradient
or a recomputed one. In float16 nothing underflows before the cotangent is applied.
"""

from collections.abc import Callable
from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import oracle
import pytest
from oracle import BFLOAT16, FLOAT16, FLOAT32

import jax_bce

pytestmark = [pytest.mark.any_jax, pytest.mark.quickly]

SIZE = 1003  # neither a power of two nor a multiple of a vector
REDUCTIONS = ("sum", "mean")
RESIDUALS = ("gradient", "recompute")


def inputs(dtype: np.dtype, size: int = SIZE) -> tuple[np.ndarray, np.ndarray]:
    logits = np.concatenate(
        [oracle.walk(dtype, size // 2, low=2**-10, high=30.0), oracle.random_logits(dtype, size, 1)]
    )[:size]
    return logits, oracle.random_labels(np.uint8, size, seed=2)


def factor_of(reduction: str, size: int = SIZE) -> float:
    return 1 / size if reduction == "mean" else 1.0


@pytest.fixture(params=RESIDUALS)
def residuals(request: pytest.FixtureRequest) -> str:
    return request.param


@pytest.fixture
def loss(implementation: str, residuals: str) -> Callable[..., jax.Array]:
    return partial(jax_bce.loss, implementation=implementation, residuals=residuals)


@pytest.mark.parametrize("jit", [False, True], ids=["eager", "jit"])
@pytest.mark.parametrize("reduction", REDUCTIONS)
def test_grad(check, loss, implementation: str, dtype: np.dtype, reduction: str, jit: bool) -> None:
    logits, labels = inputs(dtype)
    gradient_of = jax.grad(partial(loss, reduction=reduction))
    gradient = (jax.jit(gradient_of) if jit else gradient_of)(logits, labels)
    assert gradient.dtype == dtype
    check.elements(
        implementation,
        logits,
        labels,
        gradient=gradient,
        factor=factor_of(reduction),
        flushes=True,
    )


@pytest.mark.parametrize("reduction", REDUCTIONS)
def test_value_and_grad(check, loss, implementation: str, dtype: np.dtype, reduction: str) -> None:
    logits, labels = inputs(dtype)
    value, gradient = jax.value_and_grad(partial(loss, reduction=reduction))(logits, labels)
    factor = factor_of(reduction)
    exact = oracle.exact(logits, labels)
    check.elements(implementation, logits, labels, gradient=gradient, factor=factor, flushes=True)
    check.reduced(implementation, value, exact.loss.sum() * factor)


@pytest.mark.parametrize("reduction", REDUCTIONS)
def test_loss_and_grad(check, implementation: str, dtype: np.dtype, reduction: str) -> None:
    logits, labels = inputs(dtype)
    value, gradient = jax_bce.loss_and_grad(
        logits, labels, reduction=reduction, implementation=implementation
    )
    factor = factor_of(reduction)
    assert gradient.dtype == dtype
    check.elements(implementation, logits, labels, gradient=gradient, factor=factor)
    check.reduced(implementation, value, oracle.exact(logits, labels).loss.sum() * factor)


@pytest.mark.parametrize("reduction", ["none", *REDUCTIONS])
def test_one_loss_by_every_way(platform: str, dtype: np.dtype, reduction: str) -> None:
    """The kernel has the same bits alone, beside its gradient, and under differentiation."""
    logits, labels = inputs(dtype)
    keywords = {"reduction": reduction, "implementation": platform}
    expected = jax_bce.loss(logits, labels, **keywords)
    oracle.assert_same_bits(jax_bce.loss_and_grad(logits, labels, **keywords)[0], expected)
    for residuals in RESIDUALS:
        value, _ = jax.vjp(partial(jax_bce.loss, residuals=residuals, **keywords), logits, labels)
        oracle.assert_same_bits(value, expected)


@pytest.mark.parametrize("axis", [0, 1, -1, (0, 2)])
@pytest.mark.parametrize("reduction", REDUCTIONS)
def test_gradient_along_axes(check, loss, implementation: str, reduction: str, axis) -> None:
    """The loss of each row has a gradient in its own row: 1/N counts the row."""
    shape = (5, 6, 7)
    logits = oracle.random_logits(FLOAT32, shape, seed=3)
    labels = oracle.random_labels(np.uint8, shape, seed=4)
    cotangent = 2.0 ** np.arange(np.sum(oracle.exact(logits, labels).loss, axis=axis).size)
    cotangent = cotangent.reshape(np.sum(logits, axis=axis).shape).astype(FLOAT32)
    _, pullback = jax.vjp(lambda x: loss(x, labels, reduction=reduction, axis=axis), logits)
    axes = tuple(np.atleast_1d(axis))
    count = np.prod([shape[a] for a in axes]) if reduction == "mean" else 1
    factor = np.expand_dims(cotangent.astype(np.float64), axes) / count
    check.elements(
        implementation,
        logits,
        labels,
        gradient=pullback(cotangent)[0],
        factor=np.broadcast_to(factor, shape),
    )


@pytest.mark.parametrize("cotangent", [1.0, -3.0, 2.0**15, 1e-3, 0.0])
def test_cotangent(
    check, loss, implementation: str, residuals: str, dtype: np.dtype, cotangent: float
) -> None:
    logits, labels = inputs(dtype)
    # In float16 2^15 times a gradient is a number, times a loss it would be none.
    _, pullback = jax.vjp(lambda x: loss(x, labels, reduction="sum"), logits)
    (gradient,) = pullback(jnp.asarray(cotangent, oracle.arithmetic_dtype(dtype)))
    check.elements(
        implementation,
        logits,
        labels,
        gradient=gradient,
        factor=cotangent,
        flushes=True,
        stored=residuals == "gradient",
    )


def test_elementwise_cotangent(
    check, loss, implementation: str, residuals: str, dtype: np.dtype
) -> None:
    logits, labels = inputs(dtype)
    cotangent = oracle.random_logits(dtype, SIZE, seed=5)
    _, pullback = jax.vjp(lambda x: loss(x, labels, reduction="none"), logits)
    (gradient,) = pullback(jnp.asarray(cotangent))
    check.elements(
        implementation,
        logits,
        labels,
        gradient=gradient,
        factor=cotangent.astype(np.float64),
        flushes=True,
        stored=residuals == "gradient",
    )


def test_float16_does_not_underflow(check, loss, implementation: str) -> None:
    """grad(loss * 2**15) over 4 million elements has the zeros of one rounding to float16.

    The gradient of the mean alone, at most 2^-22, would be a float16 subnormal of few digits.
    """
    scale, repeats = 2.0**15, 32
    every = oracle.finite(oracle.every_16_bit(FLOAT16))
    every = np.resize(every, 2**16)
    labels = np.broadcast_to(np.array([[0], [1]], np.uint8), (2, every.size))
    logits = np.tile(every, (2 * repeats, 1))
    gradient = jax.jit(jax.grad(lambda x, y: loss(x, y) * scale))(
        logits, np.tile(labels, (repeats, 1))
    )
    gradient = np.asarray(gradient).reshape(repeats, *labels.shape)
    for repeat in gradient[1:]:
        oracle.assert_same_bits(repeat, gradient[0])

    factor = scale / logits.size
    zeros = oracle.round_to(oracle.exact(every, labels).gradient * factor, FLOAT16) == 0
    assert zeros.any()
    assert not (gradient[0] == 0)[~zeros].any()
    assert gradient.dtype == FLOAT16
    check.elements(implementation, logits[:2], labels, gradient=gradient[0], factor=factor)


def test_bfloat16_mean_of_many(check, loss, implementation: str) -> None:
    """1/N is no number of bfloat16's 8 bits: it must not be rounded to one."""
    size = 100_003
    logits, labels = inputs(BFLOAT16, size)
    check.elements(
        implementation,
        logits,
        labels,
        gradient=jax.grad(loss)(logits, labels),
        factor=1 / size,
        flushes=True,
    )


@pytest.mark.parametrize("label_dtype", oracle.FLOATS, ids=str, indirect=True)
def test_gradient_of_labels(check, loss, dtype: np.dtype, label_dtype: np.dtype) -> None:
    """dl/dy = log(1 + exp(-x)) - log(1 + exp(x)) = -x, in the labels' dtype."""
    logits = oracle.random_logits(dtype, SIZE, seed=6)
    labels = oracle.random_labels(label_dtype, SIZE, seed=7)
    gradient = jax.grad(loss, argnums=1)(logits, labels)
    assert gradient.dtype == label_dtype
    exact = -logits.astype(np.float64) / SIZE
    # Rounded in the arithmetic of the logits, then to the labels' dtype.
    coarser = max(label_dtype, oracle.arithmetic_dtype(dtype), key=lambda d: oracle.ulp(1.0, d))
    check.ulps(
        "gradient of labels",
        np.asarray(gradient).astype(coarser),
        exact,
        oracle.ROUNDED + oracle.FACTOR * oracle.ulp_of_arithmetic(coarser),
        flushes=True,
    )


@pytest.mark.parametrize("label_dtype", oracle.INTEGERS, ids=str, indirect=True)
def test_integer_labels_have_no_gradient(loss, label_dtype: np.dtype) -> None:
    logits, labels = np.ones(3, FLOAT32), np.ones(3, label_dtype)
    both = jax.grad(loss, argnums=(0, 1), allow_int=True)(logits, labels)
    assert both[0].dtype == FLOAT32
    assert both[1].dtype == jax.dtypes.float0
    assert both[1].shape == labels.shape


def test_gradient_of_one_label_for_all(check, loss) -> None:
    logits = abs(oracle.random_logits(FLOAT32, SIZE, seed=8))
    gradient = jax.grad(partial(loss, reduction="sum"), argnums=1)(logits, np.float32(0.25))
    # XLA adds this one up.
    check.reduced("xla", gradient, -logits.astype(np.float64).sum(), "gradient of a label")


def test_gradients_of_both(check, loss, implementation: str) -> None:
    logits = oracle.random_logits(FLOAT32, SIZE, seed=9)
    labels = oracle.random_labels(FLOAT32, SIZE, seed=10)
    both = jax.grad(partial(loss, reduction="sum"), argnums=(0, 1))(logits, labels)
    check.elements(implementation, logits, labels, gradient=both[0], flushes=True)
    oracle.assert_same_bits(both[1], -logits)


@pytest.mark.parametrize("label", [0.0, 1.0, 0.25])
def test_gradient_of_label_smoothing(check, implementation: str, label: float) -> None:
    """dl/ds = sum of x (y - 1/2)."""
    logits = abs(oracle.random_logits(FLOAT32, SIZE, seed=11))
    gradient = jax.grad(
        lambda s: jax_bce.loss(
            logits, label, label_smoothing=s, reduction="sum", implementation=implementation
        )
    )(0.25)
    exact = (logits.astype(np.float64) * (label - 0.5)).sum()
    check.reduced("xla", gradient, exact, "gradient of label_smoothing")


def test_smoothing_may_be_traced(check, implementation: str) -> None:
    logits, labels = inputs(FLOAT32)
    traces = 0

    @jax.jit
    def loss(smoothing: jax.Array) -> jax.Array:
        nonlocal traces
        traces += 1
        return jax_bce.loss(
            logits, labels, label_smoothing=smoothing, implementation=implementation
        )

    smoothings = (0.0, 0.25, 0.5)
    traced = [loss(s) for s in smoothings]
    assert traces == 1
    exact = [oracle.exact(logits, labels, s).loss.mean() for s in smoothings]
    check.reduced(implementation, traced, exact)


@pytest.mark.parametrize("reduction", ["none", *REDUCTIONS])
def test_recomputed_equals_stored(platform: str, dtype: np.dtype, reduction: str) -> None:
    """A power of two as cotangent and count rounds nothing: both ways have the same bits."""
    logits, labels = (values[:512] for values in inputs(dtype))

    def gradient(residuals: str) -> jax.Array:
        value, pullback = jax.vjp(
            lambda x: jax_bce.loss(
                x, labels, reduction=reduction, residuals=residuals, implementation=platform
            ),
            logits,
        )
        return pullback(jnp.full_like(value, 2.0))[0]

    oracle.assert_same_bits(gradient("recompute"), gradient("gradient"))


def test_donated_logits(implementation: str) -> None:
    """Where the gradient may lie in the logits' memory, the kernel still reads them first."""
    logits, labels = inputs(FLOAT32)
    function = partial(jax_bce.loss_and_grad, implementation=implementation)
    expected = jax.jit(function)(logits, labels)
    donated = jax.device_put(logits)
    results = jax.jit(function, donate_argnums=0)(donated, labels)
    assert donated.is_deleted()
    oracle.assert_same_bits(results, expected)


def test_gradient_keeps_dead_end_alive(implementation: str) -> None:
    """A gradient descent from logits that are entirely wrong comes back."""
    logits, labels = np.array([-50.0, 50.0, -200.0, 200.0], FLOAT32), np.array([1, 0, 1, 0])
    step = jax.jit(jax.grad(partial(jax_bce.loss, reduction="sum", implementation=implementation)))
    for _ in range(300):
        logits = logits - step(logits, labels)
    assert ((logits > 0) == (labels == 1)).all()
