"""Taylor mode, `jax.experimental.jet`: derivatives of any order at once, by a rule of its own."""

import functools
from collections.abc import Callable

import jax
import jax.numpy as jnp
import numpy as np
import oracle
import pytest
from jax.experimental.jet import jet
from oracle import FLOAT32

import jax_bce

pytestmark = pytest.mark.quickly

LOGITS = np.array([[-30, -4, -0.5], [0, 0.25, 20]], FLOAT32)
LABELS = np.array([[0, 1, 1], [1, 0, 1]], np.uint8)


def along(function: Callable, x: np.ndarray, direction: np.ndarray, order: int = 3) -> list:
    """The value and the derivatives of function(x + t * direction) in t, at 0."""
    terms = [direction, *[np.zeros_like(direction)] * (order - 1)]
    value, derivatives = jet(function, (x,), (terms,))
    return [value, *derivatives]


def exact(x: np.ndarray, y: np.ndarray) -> list[np.ndarray]:
    """Those of (1 - y) log(1 + exp(x)) + y log(1 + exp(-x)), in closed form."""
    x, y = x.astype(np.float64), y.astype(np.float64)
    s, r = 1 / (1 + np.exp(-x)), 1 / (1 + np.exp(x))
    return [
        (1 - y) * np.logaddexp(0, x) + y * np.logaddexp(0, -x),
        (1 - y) * s - y * r,
        s * r,
        s * r * (r - s),
        s * r * (1 - 6 * s * r),
    ]


def close(actual: object, expected: object) -> None:
    for got, wanted in zip(actual, expected, strict=True):
        np.testing.assert_allclose(
            got, wanted, rtol=oracle.SURROUNDINGS, atol=oracle.SURROUNDINGS * np.max(np.abs(wanted))
        )


@pytest.mark.parametrize("jit", [False, True], ids=["eager", "jit"])
def test_elements(implementation: str, jit: bool) -> None:
    def function(x: jax.Array) -> jax.Array:
        return jax_bce.loss(x, LABELS, reduction="none", implementation=implementation)

    terms = along(jax.jit(function) if jit else function, LOGITS, np.ones_like(LOGITS))
    oracle.assert_same_bits(terms[0], function(LOGITS))
    close(terms, exact(LOGITS, LABELS)[:4])


def mean(x: jax.Array) -> jax.Array:
    return jax_bce.loss(x, LABELS)


def test_mean_and_its_gradient(cpu: str) -> None:
    """One is the derivative of the other along any direction."""
    direction = np.linspace(-1, 2, LOGITS.size, dtype=FLOAT32).reshape(LOGITS.shape)
    of_elements = [
        term * direction.astype(np.float64) ** n for n, term in enumerate(exact(LOGITS, LABELS))
    ]
    close(along(mean, LOGITS, direction, order=4), [np.mean(term) for term in of_elements])

    gradients = along(jax.grad(mean), LOGITS, direction)
    close(gradients, [term / direction / LOGITS.size for term in of_elements[1:]])


@pytest.mark.thorough
def test_series_of_every_operand(cpu: str) -> None:
    """By a formula in plain jnp that jet itself gets through."""
    x, y = LOGITS, np.linspace(0, 1, LOGITS.size, dtype=FLOAT32).reshape(LOGITS.shape)
    w, q = np.linspace(0.5, 2, 6, dtype=FLOAT32).reshape(2, 3), FLOAT32.type([1, 2, 3])

    def plain(x: jax.Array, y: jax.Array, w: jax.Array, q: jax.Array) -> jax.Array:
        e = jnp.log(1 + jnp.exp(-jnp.abs(x)))
        positive, negative = e + jnp.where(x >= 0, 0, -x), e + jnp.where(x >= 0, x, 0)
        y = y * 0.9 + 0.05
        return jnp.sum(w * (q * y * positive + (1 - y) * negative), axis=-1) / jnp.sum(w, axis=-1)

    def loss(x: jax.Array, y: jax.Array, w: jax.Array, q: jax.Array) -> jax.Array:
        options = {"label_smoothing": 0.1, "reduction": "weighted_mean", "axis": -1}
        return jax_bce.loss(x, y, weight=w, pos_weight=q, **options)

    operands = x / 4, y, w, q
    series = [[np.sin(o + n) for n in range(3)] for o in operands]
    (value, terms), (expected, expected_terms) = (
        jet(function, operands, series) for function in (loss, plain)
    )
    close([value, *terms], [expected, *expected_terms])


def test_what_is_dropped_has_no_series(cpu: str) -> None:
    x = np.where(LABELS, LOGITS, np.nan).astype(FLOAT32)
    terms = along(lambda x: jax_bce.loss(x, 1, where=LABELS > 0), x, np.ones_like(x))
    kept = LOGITS[LABELS > 0]
    close(terms, [np.mean(term) for term in exact(kept, np.ones_like(kept))[:4]])


@pytest.mark.parametrize("dtype", [np.float16, jnp.bfloat16, np.float64])
def test_dtypes(cpu: str, dtype: np.dtype) -> None:
    with jax.enable_x64(True):
        x = (LOGITS / 4).astype(dtype)
        function = functools.partial(jax_bce.loss, labels=LABELS, reduction="none")
        terms = along(function, x, np.ones_like(x), order=2)
    for actual, expected in zip(terms, exact(x, LABELS)[:3], strict=True):
        assert actual.dtype == dtype
        absolute = oracle.DERIVATIVE[actual.dtype.name] * float(jnp.finfo(dtype).eps)
        np.testing.assert_allclose(np.float64(actual), expected, atol=absolute)


@pytest.mark.any_jax
def test_what_is_refused() -> None:
    """docs/transforms.md says what: JAX's jet gets through no function with a rule of its own."""
    refused = [
        jax.nn.relu,
        lambda x: jax_bce.loss(x, LABELS, residuals="recompute"),
        lambda x: jax.jvp(jax.grad(mean), (x,), (x,))[1],
    ]
    for function in refused:
        with pytest.raises((jax.errors.UnexpectedTracerError, TypeError)):
            along(function, LOGITS, np.ones_like(LOGITS), order=2)
