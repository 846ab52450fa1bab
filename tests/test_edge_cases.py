"""Limits at infinity, NaN, signed zeros, subnormal results, and losses of no or one element."""

import itertools

import jax
import ml_dtypes
import numpy as np
import oracle
import pytest
from oracle import BFLOAT16, FLOAT16, FLOAT32, FLOAT64

import jax_bce

pytestmark = pytest.mark.any_jax

INF, NAN = np.inf, np.nan
# logit, label, loss, gradient
LIMITS = [
    (INF, 1.0, 0.0, 0.0),
    (-INF, 0.0, 0.0, 0.0),
    (INF, 0.0, INF, 1.0),
    (-INF, 1.0, INF, -1.0),
    (INF, 0.25, INF, 0.75),
    (-INF, 0.25, INF, -0.25),
    (INF, 0.5, INF, 0.5),
    (-INF, 0.5, INF, -0.5),
    (NAN, 0.0, NAN, NAN),
    (NAN, 1.0, NAN, NAN),
    (NAN, 0.5, NAN, NAN),
    (1.0, NAN, NAN, NAN),
    (-1.0, NAN, NAN, NAN),
    (INF, NAN, NAN, NAN),
    (NAN, NAN, NAN, NAN),
    (1000.0, 1.0, 0.0, 0.0),
    (-1000.0, 0.0, 0.0, 0.0),
    (1000.0, 0.0, 1000.0, 1.0),
    (-1000.0, 1.0, 1000.0, -1.0),
    (1000.0, 0.25, 750.0, 0.75),
]
# In a vector register, among others, after whole vectors, and as a lone element of rank 0.
LENGTHS = (None, 1, 5, 16, 67)
REDUCTIONS = ("none", "sum", "mean")


def name_of(case: tuple[float, ...]) -> str:
    return "x={:g},y={:g}".format(*case)


@pytest.mark.parametrize("case", LIMITS, ids=name_of)
def test_limits(implementation: str, dtype: np.dtype, case: tuple[float, ...]) -> None:
    logit, label, *expected = case
    for length in LENGTHS:
        shape = () if length is None else (length,)
        logits, labels = (np.full(shape, value, dtype) for value in (logit, label))
        results = jax_bce.loss_and_grad(
            logits, labels, reduction="none", implementation=implementation
        )
        for actual, value in zip(results, expected, strict=True):
            # The same numbers; a gradient of zero may have either sign, a loss of zero has none.
            value = float(oracle.round_to(value, dtype))
            np.testing.assert_array_equal(np.asarray(actual, np.float64), np.full(shape, value))
        assert not (np.signbit(results[0]) & (np.asarray(results[0]) == 0)).any()


@pytest.mark.parametrize("label", [0.0, 0.5, 1.0])
def test_signed_zeros(check, implementation: str, dtype: np.dtype, label: float) -> None:
    """A logit of -0 is one of 0: log 2, and a gradient of exactly 1/2 - y."""
    for length in LENGTHS:
        shape = () if length is None else (length,)
        for zero in (0.0, -0.0):
            logits, labels = (np.full(shape, value, dtype) for value in (zero, label))
            loss, gradient = jax_bce.loss_and_grad(
                logits, labels, reduction="none", implementation=implementation
            )
            check.elements(implementation, logits, labels, loss=loss)
            np.testing.assert_array_equal(np.asarray(gradient, np.float64), 0.5 - label)


@pytest.mark.parametrize("dtype", [BFLOAT16, FLOAT16], ids=str)
@pytest.mark.parametrize("bits", [0x7FFFFFFF, 0xFFFFFFFF, 0x7F800001])
def test_any_nan_is_still_nan_in_16_bits(implementation: str, dtype: np.dtype, bits: int) -> None:
    """Rounded like a number, the first two would become zeros."""
    logits, labels = np.ones(67, dtype), np.full(67, bits, np.uint32).view(FLOAT32)
    for operands in {"labels": labels}, {"labels": 1, "weight": labels}:
        results = jax_bce.loss_and_grad(
            logits, **operands, reduction="none", implementation=implementation
        )
        assert all(result.dtype == dtype and np.isnan(result).all() for result in results)


@pytest.mark.parametrize("case", LIMITS, ids=name_of)
def test_one_limit_among_others(implementation: str, case: tuple[float, ...]) -> None:
    """An infinity or NaN leaves its neighbours alone."""
    logits = oracle.random_logits(FLOAT32, 67, seed=1)
    labels = oracle.random_labels(FLOAT32, 67, seed=2)
    others = jax_bce.loss_and_grad(logits, labels, reduction="none", implementation=implementation)
    logits[33], labels[33] = case[:2]
    results = jax_bce.loss_and_grad(logits, labels, reduction="none", implementation=implementation)
    for actual, expected in zip(results, others, strict=True):
        oracle.assert_same_bits(np.delete(actual, 33), np.delete(expected, 33))


@pytest.mark.parametrize("residuals", ["gradient", "recompute"])
@pytest.mark.parametrize(("position", "size"), [(0, 1), (3, 5), (700, 1003), (99_999, 100_000)])
@pytest.mark.parametrize("reduction", ["sum", "mean"])
def test_reduced_limits(
    implementation: str, residuals: str, reduction: str, position: int, size: int
) -> None:
    """One infinite loss makes the sum infinite, one NaN makes it NaN; other gradients stand."""
    logits, labels = np.zeros(size, FLOAT32), np.zeros(size, np.uint8)
    value_and_grad = jax.value_and_grad(
        lambda x: jax_bce.loss(
            x, labels, reduction=reduction, residuals=residuals, implementation=implementation
        )
    )
    _, usual = value_and_grad(logits)
    for logit, expected in ((INF, INF), (NAN, NAN), (-INF, None)):
        logits[position] = logit
        value, gradient = value_and_grad(logits)
        if expected is None:
            assert np.isfinite(value)
        else:
            oracle.assert_same_bits(value, FLOAT32.type(expected))
        assert np.isnan(gradient[position]) == np.isnan(logit)
        oracle.assert_same_bits(np.delete(gradient, position), np.delete(usual, position))


def test_both_infinities_reduced(implementation: str) -> None:
    logits, labels = np.array([INF, -INF, INF, -INF], FLOAT32), np.array([1, 0, 0, 1])
    right = jax_bce.loss(logits[:2], labels[:2], implementation=implementation)
    wrong = jax_bce.loss(logits[2:], labels[2:], implementation=implementation)
    assert (right, wrong) == (0, INF)


def test_mean_of_losses_whose_sum_overflows(check, platform: str) -> None:
    """Sums are wider than float32: 4 times 3e38 has a mean."""
    logits = np.full(4, 3e38, FLOAT32)
    loss = jax_bce.loss(logits, 0, implementation=platform)
    check.reduced(platform, loss, np.float64(logits[0]))
    assert np.isinf(jax_bce.loss(logits, 0, reduction="sum", implementation=platform))


@pytest.mark.parametrize("dtype", [BFLOAT16, FLOAT32, FLOAT64], ids=str, indirect=True)
@pytest.mark.parametrize("label", [0, 1])
@pytest.mark.parametrize("size", [1, 67, 100_003])
def test_gradual_underflow(check, platform: str, dtype: np.dtype, label: int, size: int) -> None:
    """A result below the smallest normal number keeps what digits there are.

    Also on XLA's pool threads, whose mode flushes such numbers to zero.
    """
    # mpmath, the oracle of float64, takes its time.
    size = min(size, 1003) if dtype == FLOAT64 else size
    tiny, smallest = (
        float(-np.log(np.longdouble(value)))
        for value in (ml_dtypes.finfo(dtype).tiny, ml_dtypes.finfo(dtype).smallest_subnormal)
    )
    logits = oracle.round_to(np.linspace(tiny, smallest, size + 2)[1:-1], dtype)
    logits = logits if label else -logits
    labels = np.full(size, label, np.uint8)
    loss, gradient = jax_bce.loss_and_grad(
        logits, labels, reduction="none", implementation=platform
    )
    check.elements(platform, logits, labels, loss=loss, gradient=gradient)
    for result in (loss, gradient):
        assert (abs(np.asarray(result).astype(np.float64)) > 0).all()
        assert (abs(np.asarray(result)) <= ml_dtypes.finfo(dtype).tiny).all()


def test_subnormal_gradient_of_a_mean(check, platform: str) -> None:
    """Normal gradients whose 1/N makes them subnormal."""
    logits = np.linspace(-87, -70, 10_007).astype(FLOAT32)
    _, gradient = jax_bce.loss_and_grad(logits, 0, implementation=platform)
    assert (np.asarray(gradient) < np.finfo(np.float32).tiny).any()
    check.elements(platform, logits, 0, gradient=gradient, factor=1 / logits.size)


def test_subnormal_logits_and_labels(check, platform: str) -> None:
    smallest = float(np.finfo(np.float32).smallest_subnormal)
    logits = np.array([1, -1, 3, -3, 1e30 / smallest, -1e30 / smallest], np.float64) * smallest
    logits, labels = logits.astype(FLOAT32), np.full(6, 5 * smallest, FLOAT32)
    loss, gradient = jax_bce.loss_and_grad(
        logits, labels, reduction="none", implementation=platform
    )
    check.elements(platform, logits, labels, loss=loss, gradient=gradient)


@pytest.mark.parametrize(
    ("shape", "axis"),
    [((0,), None), ((0, 3), None), ((3, 0), None), ((3, 0), 1), ((0, 3), 0), ((2, 0, 3), (1, 2))],
)
@pytest.mark.parametrize("reduction", ["sum", "mean"])
def test_no_elements_reduced(
    implementation: str, dtype: np.dtype, reduction: str, shape: tuple[int, ...], axis
) -> None:
    """A sum of nothing is 0, and so is a mean: never NaN."""
    logits, labels = np.zeros(shape, dtype), np.zeros(shape, np.uint8)
    keywords = {"reduction": reduction, "axis": axis, "implementation": implementation}
    expected = np.zeros(logits.sum(axis=axis).shape, oracle.arithmetic_dtype(dtype))
    loss, gradient = jax_bce.loss_and_grad(logits, labels, **keywords)
    oracle.assert_same_bits((loss, gradient), (expected, logits))
    for residuals in ("gradient", "recompute"):
        value, pullback = jax.vjp(
            lambda x, residuals=residuals: jax_bce.loss(x, labels, residuals=residuals, **keywords),
            logits,
        )
        oracle.assert_same_bits((value, *pullback(expected)), (expected, logits))


@pytest.mark.parametrize("shape", [(0,), (0, 3), (3, 0)])
def test_no_elements(implementation: str, dtype: np.dtype, shape: tuple[int, ...]) -> None:
    logits, labels = np.zeros(shape, dtype), np.zeros(shape, np.uint8)
    keywords = {"reduction": "none", "implementation": implementation}
    oracle.assert_same_bits(jax_bce.loss(logits, labels, **keywords), logits)
    oracle.assert_same_bits(jax_bce.loss_and_grad(logits, labels, **keywords), (logits, logits))


@pytest.mark.parametrize("axis", [0, 1])
def test_no_rows(implementation: str, axis: int) -> None:
    """The axis that is kept is the empty one: no loss at all."""
    shape = (0, 3) if axis == 1 else (3, 0)
    logits = np.zeros(shape, FLOAT32)
    loss, gradient = jax_bce.loss_and_grad(logits, 0, axis=axis, implementation=implementation)
    oracle.assert_same_bits((loss, gradient), (np.zeros(0, FLOAT32), logits))


@pytest.mark.parametrize("reduction", REDUCTIONS)
@pytest.mark.parametrize("label", [0, 1, 0.25, True])
def test_python_scalars(check, implementation: str, reduction: str, label: float) -> None:
    keywords = {"reduction": reduction, "implementation": implementation}
    loss, gradient = jax_bce.loss_and_grad(-2.0, label, **keywords)
    assert loss.shape == gradient.shape == ()
    assert loss.dtype == gradient.dtype == FLOAT32
    check.elements(implementation, np.float32(-2), float(label), loss=loss, gradient=gradient)


@pytest.mark.parametrize(
    ("reduction", "jit"), list(itertools.product(REDUCTIONS, [False, True])), ids=str
)
def test_rank_0(check, implementation: str, dtype: np.dtype, reduction: str, jit: bool) -> None:
    def loss_and_grad(x, y):
        return jax_bce.loss_and_grad(x, y, reduction=reduction, implementation=implementation)

    logits, labels = np.asarray(2.5, dtype), np.asarray(1, np.int8)
    loss, gradient = (jax.jit(loss_and_grad) if jit else loss_and_grad)(logits, labels)
    assert loss.shape == gradient.shape == ()
    check.elements(implementation, logits, labels, loss=loss, gradient=gradient)


@pytest.mark.parametrize("size", [1, 10, 70_000])
@pytest.mark.parametrize(
    ("logit", "dtype"), [(-90.0, FLOAT32), (-90.0, BFLOAT16), (-720.0, FLOAT64)]
)
def test_a_subnormal_sum_is_not_lost(check, platform: str, size: int, logit: float, dtype) -> None:
    """XLA's threads flush; neither an element nor the sum of many is flushed."""
    with jax.enable_x64(dtype == FLOAT64):
        logits = np.full(size, logit, dtype)
        exact = oracle.exact(logits[:1], 0).loss[0]
        for reduction, count in (("mean", 1), ("sum", size)):
            loss = jax_bce.loss(logits, 0, reduction=reduction, implementation=platform)
            # Each element is rounded to the format's smallest number.
            bound = 1 + count / 2
            check.ulps(f"subnormal {reduction}", loss, np.asarray(exact * count), bound)


@pytest.mark.parametrize(("logit", "label"), [(INF, 2), (-INF, -1), (3e38, 3)])
def test_a_loss_of_minus_infinity(implementation: str, logit: float, label: int) -> None:
    """A label beyond 1 is taken at its value, and so is the limit."""
    loss = jax_bce.loss(
        np.float32([logit]), np.int32([label]), reduction="none", implementation=implementation
    )
    assert loss[0] == -INF


def test_masked_gradients_are_not_negative_zeros(cpu: str) -> None:
    """By a kernel that knows the factor, even where that is -0."""
    logits, labels = np.linspace(-3, 3, 64, dtype=FLOAT32), np.arange(64) % 2
    where = np.arange(64) % 3 > 0

    def negative(x):
        keywords = {"normalizer": np.float32(INF), "residuals": "recompute"}
        return -jax_bce.loss(x, labels, where=where, reduction="sum", **keywords)

    gradient = np.asarray(jax.jit(jax.grad(negative))(logits))
    assert not np.any(np.signbit(gradient[~where]))
