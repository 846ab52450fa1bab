"""What a loss is divided by: summed exactly, of what exists alone; never in the way of a result.

Dropped elements hold NaN and infinity here; exact values are those of the kept elements alone.
"""

from collections.abc import Callable
from functools import partial

import hypothesis.strategies as st
import jax
import jax.numpy as jnp
import numpy as np
import oracle
import pytest
import sample
from hypothesis import given, settings
from platforms import QUICKLY

import jax_bce

pytestmark = pytest.mark.quickly

SHAPE = (2, 3)
BAD = (np.nan, np.inf, -np.inf)


def exact_loss(operands: dict, keep: np.ndarray, reduction: str, axis: object) -> tuple:
    """In float64, from the kept elements alone: the loss, and its derivatives by each operand.

    The derivatives are those of the sum of all losses.
    """
    x, y = operands["logits"], operands["labels"]
    wide = {k: np.asarray(v, np.float64) for k, v in operands.items()}
    w = wide.get("weight", np.float64(1))
    s = wide.get("sample_weight", np.float64(1))
    s = s.reshape(s.shape + (1,) * (2 - s.ndim)) if s.ndim else s
    q = np.broadcast_to(operands.get("pos_weight", np.float32(1)), SHAPE)
    exact = oracle.exact(
        np.where(keep, x, 0), np.where(keep, y, 0), pos_weight=np.where(keep, q, 1)
    )
    softplus = oracle.exact(np.where(keep, x, 0), np.float32(1)).loss

    def kept(values: np.ndarray) -> np.ndarray:
        return np.where(keep, np.broadcast_to(values, SHAPE), 0)

    both, one, other = kept(w * s), kept(s), kept(w)
    losses = kept(exact.loss)
    total = np.sum(losses * both, axis, keepdims=True)
    divisor = {
        "sum": np.ones_like(total),
        "mean": np.sum(keep, axis, keepdims=True),
        "weighted_mean": np.sum(both, axis, keepdims=True),
        "normalizer": np.reshape(wide.get("normalizer", 1), (1, 1)),
    }[reduction]
    with np.errstate(all="ignore"):
        inverse = np.where(divisor == 0, 0, 1 / divisor)
    loss = total * inverse
    divided = loss if reduction == "weighted_mean" else 0
    derivatives = {
        "logits": both * kept(exact.gradient) * inverse,
        "weight": one * kept(exact.loss - divided) * inverse,
        "sample_weight": other * kept(exact.loss - divided) * inverse,
        "pos_weight": both * kept(np.where(keep, y, 0) * softplus) * inverse,
        "normalizer": -loss * inverse,
    }
    return np.squeeze(loss, axis), {
        name: np.sum(derivatives[name].reshape(-1), keepdims=True).reshape(())
        if np.ndim(operands[name]) == 0
        else _sum_to(derivatives[name], operands[name], name == "sample_weight")
        for name in operands
        if name != "labels"
    }


def _sum_to(values: np.ndarray, like: np.ndarray, leading: bool) -> np.ndarray:
    shape = np.shape(like)
    own = shape + (1,) * (2 - len(shape)) if leading else (1,) * (2 - len(shape)) + shape
    axes = tuple(a for a in range(2) if own[a] == 1 and values.shape[a] != 1)
    return np.sum(values, axes, keepdims=True).reshape(shape)


@st.composite
def calls(draw: st.DrawFn) -> tuple:
    """Operands, some of them broadcast, a mask, and what is bad where it drops."""
    rng = np.random.default_rng(draw(st.integers(0, 2**32 - 1)))
    keep = np.ones(SHAPE, bool)
    operands = {
        "logits": rng.normal(0, 4, SHAPE).astype(np.float32),
        "labels": rng.integers(0, 2, SHAPE).astype(np.float32),
    }
    shapes = {
        "weight": [(), (3,), (1, 3), (2, 1), SHAPE],
        "sample_weight": [(), (2,), (2, 1), SHAPE],
        "pos_weight": [(), (3,), SHAPE],
    }
    for name, forms in shapes.items():
        if form := draw(st.sampled_from([None, *forms])):
            operands[name] = rng.uniform(0.5, 2, form).astype(np.float32)
    masks = {}
    if form := draw(st.sampled_from([None, (2,), (2, 1), (1, 3), SHAPE])):
        mask = rng.random(form) < draw(st.sampled_from([0, 0.5, 0.8]))
        masks["where"] = mask
        keep &= mask.reshape(form + (1,) * (2 - len(form)))
    if draw(st.booleans()):
        operands["labels"][rng.random(SHAPE) < 0.3] = -1
        masks["ignore_label"] = -1
        keep &= operands["labels"] != -1
    reduction = draw(st.sampled_from(["sum", "mean", "weighted_mean", "normalizer"]))
    axis = draw(st.sampled_from([None, 0, 1, (0, 1)]))
    if reduction == "normalizer":
        operands["normalizer"] = np.float32(draw(st.sampled_from([0, 0.7, 3])))
    bad = draw(st.sampled_from(BAD))
    for name, array in operands.items():
        if name == "normalizer" or np.ndim(array) == 0:
            continue
        # An element that a mask drops may be bad, and a broadcast one, if nothing of it exists.
        some = _sum_to(keep.astype(int), array, name == "sample_weight") > 0
        array[~some & (array != masks.get("ignore_label"))] = bad
    return operands, masks, keep, reduction, axis


@pytest.mark.any_jax
@settings(max_examples=sample.examples(30), deadline=None)
@given(calls())
def test_a_dropped_element_does_not_exist(call: tuple) -> None:
    """Values and derivatives are those of the kept elements alone, in every implementation."""
    operands, masks, keep, reduction, axis = call
    expected, derivatives = exact_loss(operands, keep, reduction, axis)
    chosen = {"reduction": "mean" if reduction == "normalizer" else reduction, "axis": axis}
    for implementation in "cpu", "xla":

        def loss(arguments: dict, implementation: str = implementation) -> jax.Array:
            return jax_bce.loss(**arguments, **masks, **chosen, implementation=implementation)

        fixed = {"labels": operands["labels"]}
        moving = {name: array for name, array in operands.items() if name != "labels"}

        @partial(jax.jit, compiler_options=QUICKLY)
        def every(moving: dict, fixed: dict = fixed, loss: Callable = loss) -> tuple:
            value, pullback = jax.vjp(lambda moving: loss(moving | fixed), moving)
            operands = moving | fixed
            tangent = jax.jvp(loss, (operands,), (jax.tree.map(jnp.ones_like, operands),))[1]
            return value, pullback(jnp.ones_like(value))[0], tangent

        value, found, tangent = every(moving)
        assert_close(value, expected)
        for name, value in found.items():
            assert_close(value, derivatives[name])
            if np.shape(value) == SHAPE:
                assert not np.asarray(value)[~keep].any()
        assert np.isfinite(tangent).all()


def assert_close(actual: object, exact: np.ndarray) -> None:
    largest = np.max(np.abs(exact), initial=1e-30)
    assert np.max(np.abs(np.asarray(actual, np.float64) - exact), initial=0) <= (
        oracle.SURROUNDINGS * max(1, largest)
    ), (actual, exact)


@pytest.mark.any_jax
@pytest.mark.parametrize(
    ("loss", "implementation"),
    [
        *((jax_bce.loss, implementation) for implementation in ("cpu", "xla")),
        *((relative, "xla") for relative in (jax_bce.focal_loss, jax_bce.asymmetric_loss)),
    ],
)
@pytest.mark.second
def test_a_dropped_row_is_not_summed(loss: Callable, implementation: str) -> None:
    """0, and not NaN times 0: the mask varies from row to row, the weights within one."""
    x, w = (np.float32([[1, 2], [np.nan, np.inf]]) for _ in range(2))
    where = np.array([True, False])

    def divided(x: jax.Array, w: jax.Array, where: jax.Array) -> jax.Array:
        options = {"reduction": "weighted_mean", "axis": -1, "implementation": implementation}
        return loss(x, x > 1.5, weight=w, where=where, **options)

    def mapped(*operands: jax.Array) -> jax.Array:
        return jax.vmap(divided)(*(o[:, None] for o in operands))[:, 0]

    @jax.jit
    def every(x: jax.Array, w: jax.Array, where: jax.Array) -> list[tuple]:
        return [
            (f(x, w, where), jax.grad(lambda x, w, f=f: f(x, w, where).sum(), (0, 1))(x, w))
            for f in (divided, mapped)
        ]

    (alone, _), _ = every(x[:1], w[:1], where[:1])
    for both, found in every(x, w, where):
        oracle.assert_same_bits(np.asarray(both), np.append(np.asarray(alone), np.float32(0)))
        assert not np.asarray(found)[:, 1].any()
        assert np.asarray(found)[:, 0].all()
    for nothing, _ in every(x, w, np.array([False, False])):
        assert not np.any(nothing)


@pytest.mark.any_jax
def test_a_normalizer_of_nan_leaves_what_is_dropped_at_0(implementation: str) -> None:
    """So does a kept weight of NaN, which makes a denominator of NaN."""
    x, w = np.float32([1, 2, 3, -4]), np.float32([1, np.nan, 1, 1])
    where = np.array([True, True, False, False])
    for options in {"normalizer": np.float32(np.nan)}, {"weight": w, "reduction": "weighted_mean"}:

        def loss(x: jax.Array, options: dict = options) -> jax.Array:
            return jax_bce.loss(x, 1, where=where, implementation=implementation, **options)

        value, gradient = jax_bce.loss_and_grad(
            x, 1, where=where, implementation=implementation, **options
        )
        assert np.isnan(value)
        for found in gradient, jax.grad(loss)(x):
            np.testing.assert_array_equal(np.isnan(found), where)
            assert not np.any(np.asarray(found)[2:])
    by_weight = jax.grad(
        lambda w: jax_bce.loss(
            x, 1, where=where, weight=w, reduction="weighted_mean", implementation=implementation
        )
    )(w)
    assert not np.any(np.asarray(by_weight)[2:])


@pytest.mark.any_jax
def test_denominators_are_not_rounded_on_the_way(check, cpu: str) -> None:
    """Weights that cancel, that float32 cannot add up, and so many that uint8 could not count."""
    x = np.linspace(-3, 3, 1025, dtype=np.float32)
    many = np.append(np.float32(2**24), np.ones(1024, np.float32))
    for weight in np.float32([1e8, 1, -1e8]), np.float32([3e38, 3e38, 1]), many:
        # Of weights that cancel the losses do, too, unless they are alike.
        logits = np.full(3, 1, np.float32) if weight.size == 3 else x[: weight.size]
        exact = oracle.exact(logits, 0).loss
        total = np.sum(exact * weight.astype(np.float64)) / np.sum(weight.astype(np.float64))
        options = {"weight": weight, "reduction": "weighted_mean", "implementation": cpu}
        check.reduced(cpu, jax_bce.loss(logits, 0, **options), total, "weighted mean")
    where = np.arange(1_000_003) % 7 != 0
    logits = oracle.random_logits(oracle.FLOAT32, where.size, 0)
    exact = oracle.exact(logits, 1).loss[where].mean()
    check.reduced(
        cpu, jax_bce.loss(logits, 1, where=where, implementation=cpu), exact, "masked mean"
    )


@pytest.mark.any_jax
@pytest.mark.parametrize("jit", [False, True], ids=["eager", "jit"])
def test_tiny_and_huge_denominators(check, cpu: str, jit: bool) -> None:
    """Those that float32 holds as subnormal, and whose reciprocal it does."""
    compiled = jax.jit if jit else lambda function: function
    x, w = np.float32([1, 80]), np.float32([1e-40, 1e-40])
    exact = oracle.exact(x, 0)

    def weighted(x: jax.Array, w: jax.Array) -> jax.Array:
        return jax_bce.loss(x, 0, weight=w, reduction="weighted_mean", implementation=cpu)

    check.reduced(cpu, compiled(weighted)(x, w), exact.loss.mean(), "weighted mean")
    check.reduced(cpu, compiled(jax.grad(weighted))(x, w), exact.gradient / 2, "its gradient")

    def normalized(x: jax.Array, n: jax.Array) -> jax.Array:
        return jax_bce.loss(x, 0, normalizer=n, implementation=cpu)

    for x, n in (np.float32([-20, -30]), 1e-39), (np.float32([1e37, 2e37]), 1e38):
        n = np.float32(n)
        exact = oracle.exact(x, 0)
        check.reduced(
            cpu, compiled(normalized)(x, n), exact.loss.sum() / np.float64(n), "normalized"
        )
        if not jit and n > 1:  # XLA flushes the product with the cotangent
            continue
        found = compiled(jax.grad(normalized))(x, n)
        check.ulps("its gradient", found, exact.gradient / np.float64(n), 1 + oracle.FACTOR)
    # XLA divides, too, but reads what is subnormal as 0.
    x = np.float32([1e37, 2e37])
    divided = compiled(lambda x: jax_bce.loss(x, 0, normalizer=1e38, implementation="xla"))(x)
    check.reduced("xla", divided, oracle.exact(x, 0).loss.sum() / np.float32(1e38), "normalized")


@pytest.mark.any_jax
def test_derivatives_of_a_denominator_do_not_overflow_before_the_loss(implementation: str) -> None:
    x = np.full(4, 8e37, np.float32)

    def normalized(n: jax.Array) -> jax.Array:
        return jax_bce.loss(x, 0, normalizer=n, implementation=implementation)

    def weighted(w: jax.Array) -> jax.Array:
        return jax_bce.loss(
            x, 0, weight=w, reduction="weighted_mean", implementation=implementation
        )

    n = np.float32(4)
    np.testing.assert_array_equal(jax.grad(normalized)(n), np.float32(-2e37))
    assert not np.any(jax.grad(weighted)(np.ones(4, np.float32)))
    assert np.isfinite(jax.jacfwd(jax.grad(normalized))(n))


@pytest.mark.any_jax
@pytest.mark.parametrize(
    "columns",
    [
        *(1, 33, 300),
        *(
            pytest.param(n, marks=pytest.mark.thorough)
            for n in (2, 3, 4, 5, 8, 31, 32, 64, 95, 96, 97, 130)
        ),
    ],
)
@pytest.mark.thorough
def test_rows_that_share_a_tile_have_the_bits_they_have_alone(cpu: str, columns: int) -> None:
    """Whatever a row has of its own: a denominator, be it 0, a mask, a cotangent, labels."""
    rng = np.random.default_rng(columns)
    rows = 37
    x = rng.normal(0, 6, (rows, columns)).astype(np.float32)
    x[3], x[5, 0] = 50, np.inf
    y = rng.integers(0, 2, x.shape).astype(np.float32)
    n = rng.uniform(0.5, 2, rows).astype(np.float32)
    n[[1, 4, 7, 9]] = 0, 1e-39, 1e38, -2
    where = rng.random(x.shape) < 0.8
    x, y, n, where = map(jnp.asarray, (x, y, n, where))
    cotangents = jnp.asarray(1 + np.arange(rows, dtype=np.float32) % 3)
    for options in (
        lambda i: {"normalizer": n[i]},
        lambda i: {"where": where[i]},
        lambda i: {
            "where": where[i],
            "weight": jnp.abs(x[i, ..., :1]),
            "reduction": "weighted_mean",
        },
        lambda i: {"normalizer": n[i], "residuals": "recompute"},
    ):

        @jax.jit
        def loss_and_pullback(i: jax.Array, options=options) -> tuple:
            loss, pullback = jax.vjp(
                lambda x: jax_bce.loss(x, y[i], axis=-1, implementation=cpu, **options(i)), x[i]
            )
            return loss, pullback(cotangents[i])[0]

        together = loss_and_pullback(np.arange(rows))
        for i in range(rows):
            alone = loss_and_pullback(i)
            oracle.assert_same_bits(tuple(np.asarray(t[i]) for t in together), alone)
    # Labels that vmap does not map.
    of_row = jax.value_and_grad(lambda x: jax_bce.loss(x, y[0], implementation=cpu))
    shared, of_row = jax.jit(jax.vmap(of_row))(x), jax.jit(of_row)
    for i in range(rows):
        alone = of_row(x[i])
        oracle.assert_same_bits(tuple(np.asarray(s[i]) for s in shared), alone)


@pytest.mark.any_jax
@pytest.mark.parametrize("size", [2**31, 2**32 + 2**20])
def test_more_elements_than_32_bits_count(size: int) -> None:
    """What is one for all stays a number, and its count a float64 one."""
    x = jax.ShapeDtypeStruct((size,), np.float32)
    for options in (
        {"where": True},
        {"weight": 2.0, "reduction": "weighted_mean"},
        {"ignore_label": 1},
    ):
        traced = jax.jit(lambda x, options=options: jax_bce.loss(x, 0, **options)).trace(x)
        assert "jax_bce_v3_loss" in traced.lower().as_text()


@pytest.mark.any_jax
def test_an_ignored_label_is_compared_by_its_bits(implementation: str) -> None:
    """XLA reads 1e-40 as 0."""
    y = np.float32([1e-40, -0.0, 0, 1])
    losses = jax_bce.loss(
        np.ones(4, np.float32), y, ignore_label=0.0, reduction="none", implementation=implementation
    )
    np.testing.assert_array_equal(np.asarray(losses) != 0, [True, False, False, True])


@pytest.mark.any_jax
@pytest.mark.parametrize("axis", [-1, None])
def test_the_total_has_a_second_derivative(axis: int | None) -> None:
    """The sum is linear in a weight: of its square, the Hessian is known."""
    w = np.float32([[1, 2], [3, 4]])
    where = np.array([[True, False], [True, True]])

    def loss(w: jax.Array) -> jax.Array:
        options = {"weight": w, "where": where, "reduction": "weighted_mean", "axis": axis}
        return jnp.sum(jax_bce.loss(np.float32([[1, 2], [3, 4]]), 0, **options))

    def plain(w: jax.Array) -> jax.Array:
        losses = jnp.where(where, w * jax.nn.softplus(np.float32([[1, 2], [3, 4]])), 0)
        return jnp.sum(losses.sum(axis) / jnp.where(where, w, 0).sum(axis))

    @partial(jax.jit, compiler_options=QUICKLY)
    def every(w: jax.Array) -> list[tuple]:
        return [(of(loss)(w), of(plain)(w)) for of in (jax.grad, jax.hessian)]

    for found, expected in every(w):
        assert_close(found, np.asarray(expected, np.float64))


@pytest.mark.any_jax
@pytest.mark.parametrize("columns", [1, 2])
def test_a_dropped_row_has_the_loss_that_its_denominator_has(
    implementation: str, columns: int
) -> None:
    """0 divided by NaN, however many elements are dropped."""
    losses = jax_bce.loss(
        np.ones((2, columns), np.float32),
        0,
        axis=1,
        where=np.zeros((2, columns), bool),
        normalizer=np.float32([np.nan, 1]),
        implementation=implementation,
    )
    np.testing.assert_array_equal(losses, np.float32([np.nan, 0]))
