"""Weights, masks and denominators: values against the oracle, and what a dropped element leaves.

Operands have every shape that is documented, so that rows end inside a tile of the kernel and one
tile spans several rows. Derivatives with respect to them are in test_weight_derivatives.py.
"""

import itertools
from collections.abc import Callable
from functools import cache, partial

import jax
import jax.numpy as jnp
import numpy as np
import oracle
import pytest
from oracle import BFLOAT16, FLOAT16, FLOAT32, FLOAT64

import jax_bce

SHAPES = [(37,), (5, 8), (7, 300), (3, 4, 11), (2, 1, 3000), (1, 9), (0, 4)]
# What an operand may be, as the shape it has beside logits of a shape.
TRAILING = {
    "scalar": lambda shape: (),
    "class": lambda shape: shape[-1:],
    "full": lambda shape: shape,
}
LEADING = {
    "scalar": lambda shape: (),
    "sample": lambda shape: shape[:1],
    "column": lambda shape: shape[:1] + (1,) * (len(shape) - 1),
    "full": lambda shape: shape,
}
TYPES = [FLOAT32, BFLOAT16, np.dtype(np.uint8), np.dtype(np.int32), np.dtype(bool)]


def align(values: np.ndarray, shape: tuple[int, ...], leading: bool) -> np.ndarray:
    values = np.asarray(values)
    if leading:
        values = values.reshape(values.shape + (1,) * (len(shape) - values.ndim))
    return np.broadcast_to(values, shape)


class Drawn:
    """Operands of random values, some of them left out, and the exact results."""

    def __init__(self, shape: tuple[int, ...], dtype: np.dtype, seed: int) -> None:
        self.rng = np.random.default_rng(seed)
        self.shape = shape
        self.logits = oracle.random_logits(dtype, shape, seed)
        self.labels = self.rng.choice([-1, 0, 1], shape).astype(np.int8)
        self.keywords: dict[str, object] = {}
        forms = itertools.cycle([*TRAILING, *reversed(TRAILING)])
        self.w, self.q, self.keep = np.ones(shape), np.ones(shape), np.ones(shape, bool)
        for name, chosen in (("weight", seed & 1), ("sample_weight", seed & 2)):
            if chosen:
                self.w = self.w * self._weight(name, name == "sample_weight", next(forms))
        if seed & 4:
            self.q = self._weight("pos_weight", False, next(forms))
        if seed & 8:
            mask = self.rng.random(LEADING[list(LEADING)[seed % 4]](shape)) < 0.7
            self.keywords["where"] = mask
            self.keep = align(mask, shape, leading=True)
        if seed & 16:
            self.keywords["ignore_label"] = -1
            self.keep = self.keep & (self.labels != -1)
        else:
            self.labels = abs(self.labels)
        if seed & 32:
            self.labels = oracle.random_labels(dtype, shape, seed)
            self.keep = align(self.keywords.get("where", True), shape, leading=True)

    def _weight(self, name: str, leading: bool, form: str) -> np.ndarray:
        forms = LEADING if leading else TRAILING
        own = forms[form if form in forms else "sample"](self.shape)
        dtype = TYPES[self.rng.integers(len(TYPES))]
        values = oracle.round_to(self.rng.uniform(0, 3, own), FLOAT32).astype(dtype)
        self.keywords[name] = values
        return align(values, self.shape, leading).astype(np.float64)

    def total(self, values: np.ndarray, axis: object) -> np.ndarray:
        return np.sum(np.where(self.keep, values, 0), axis=axis)

    def divide(self, sums: np.ndarray, divisor: np.ndarray) -> np.ndarray:
        return np.where(divisor == 0, 0, sums / np.where(divisor == 0, 1, divisor))


def drawn_cases() -> list:
    """One for each set of options; a sample has one option, all of them, or all but one."""
    return [
        pytest.param(
            SHAPES[seed % len(SHAPES)],
            seed,
            marks=[pytest.mark.thorough] if seed.bit_count() in (2, 3, 4) else [],
        )
        for seed in range(1, 64)
    ]


@pytest.mark.any_jax
@pytest.mark.parametrize(("shape", "seed"), drawn_cases(), ids=str)
def test_reductions(check, implementation: str, shape: tuple[int, ...], seed: int) -> None:
    """Every set of options: sum, mean, weighted mean and normalizer, over all axes and the last."""
    case = Drawn(shape, FLOAT32, seed)
    exact = oracle.exact(case.logits, case.labels, pos_weight=case.q).loss * case.w
    loss = partial(jax_bce.loss, **case.keywords, implementation=implementation)
    ways = {
        **{reduction: {"reduction": reduction} for reduction in ("sum", "mean", "weighted_mean")},
        "normalizer": {"normalizer": np.float32(7)},
    }

    @jax.jit
    def every(x, y):
        return [
            {way: loss(x, y, axis=axis, **keywords) for way, keywords in ways.items()}
            for axis in (None, -1)
        ]

    for axis, found in zip((None, -1), every(case.logits, case.labels), strict=True):
        sums = case.total(exact, axis)
        divisors = {
            "sum": np.ones_like(sums),
            "mean": case.total(np.ones(shape), axis),
            "weighted_mean": case.total(case.w, axis),
            "normalizer": np.full_like(sums, 7),
        }
        for way, actual in found.items():
            what = "weighted loss" if way == "sum" else "weighted loss, divided"
            check.reduced(implementation, actual, case.divide(sums, divisors[way]), what)


@pytest.mark.any_jax
@pytest.mark.parametrize(("shape", "seed"), drawn_cases()[::3], ids=str)
def test_elements(check, implementation: str, shape: tuple[int, ...], seed: int) -> None:
    """Each element's loss and gradient, within the ulp of its own arithmetic and its factors'."""
    case = Drawn(shape, FLOAT32, seed)
    loss, gradient = jax_bce.loss_and_grad(
        case.logits, case.labels, **case.keywords, reduction="none", implementation=implementation
    )
    exact = oracle.exact(case.logits, case.labels, pos_weight=case.q)
    tolerance = oracle.TOLERANCE[implementation]
    bound = tolerance.elements["float32", "soft"]
    for what, actual, value, scale, ulps in (
        ("loss", loss, exact.loss, exact.loss_scale, bound.loss),
        ("gradient", gradient, exact.gradient, exact.gradient_scale, bound.gradient),
    ):
        check.ulps(
            f"weighted {what}, {implementation}",
            actual,
            np.where(case.keep, value * case.w, 0),
            ulps + oracle.FACTOR + oracle.FACTOR * (what == "gradient"),
            scale=np.where(case.keep, scale * case.w, 0),
            flushes=tolerance.flushes,
        )
        assert not np.asarray(actual)[~case.keep].any()


@pytest.mark.any_jax
@pytest.mark.parametrize("logits", [BFLOAT16, FLOAT16, FLOAT64], ids=str)
@pytest.mark.parametrize("seed", [31, 47, 63])
def test_other_dtypes(check, implementation: str, logits: np.dtype, seed: int) -> None:
    with jax.enable_x64(logits == FLOAT64):
        case = Drawn((7, 300), logits, seed)
        exact = oracle.exact(case.logits, case.labels, pos_weight=case.q).loss
        sums = case.total((exact * case.w).astype(np.float64), None)
        actual = jax_bce.loss(
            case.logits,
            case.labels,
            **case.keywords,
            reduction="sum",
            implementation=implementation,
        )
        assert actual.dtype == (FLOAT64 if logits == FLOAT64 else FLOAT32)
        check.reduced(implementation, actual, sums, "weighted loss", logits=logits)


DROPPED = [
    {"where": np.array([True, False, True])},
    {"where": np.array([[True], [False], [True]])},
    {"where": np.tile(np.array([[True], [False], [True]]), (1, 4))},
    {"ignore_label": -1},
    {"where": np.array([True, True, True]), "ignore_label": -1},
]


@cache  # one program for every bad value
def loss_and_gradients(implementation: str, mask: int, reduction: str) -> Callable:
    @jax.jit
    def evaluate(*operands):
        def f(logits, labels, weight, pos_weight, sample_weight):
            return jnp.sum(
                jax_bce.loss(
                    logits,
                    labels,
                    weight=abs(weight),
                    pos_weight=abs(pos_weight),
                    sample_weight=sample_weight,
                    label_smoothing=0.1,
                    reduction=reduction,
                    implementation=implementation,
                    **DROPPED[mask],
                )
            )

        return jax.value_and_grad(f, range(5))(*operands)

    return evaluate


@pytest.mark.any_jax
@pytest.mark.parametrize("bad", [np.nan, np.inf, -np.inf])
@pytest.mark.parametrize("reduction", ["none", "sum", "mean", "weighted_mean"])
@pytest.mark.parametrize("mask", range(len(DROPPED)), ids=["-".join(mask) for mask in DROPPED])
def test_nothing_of_a_dropped_element_is_seen(
    implementation: str, mask: int, bad: float, reduction: str
) -> None:
    """Neither its logit, nor its label, nor its weights: all results have the same bits."""
    rng = np.random.default_rng(0)
    logits, weight, pos_weight = rng.normal(0, 4, (3, 3, 4)).astype(np.float32)
    labels = rng.integers(0, 2, (3, 4)).astype(np.float32)
    labels[1] = -1
    sample_weight = np.float32([1, 2, 3])
    evaluate = loss_and_gradients(implementation, mask, reduction)
    expected = evaluate(logits, labels, weight, pos_weight, sample_weight)
    spoilt = [v.copy() for v in (logits, labels, weight, pos_weight, sample_weight)]
    for values in spoilt[:1] + spoilt[2:] if "ignore_label" in DROPPED[mask] else spoilt:
        values[1] = bad
    actual = evaluate(*spoilt)
    oracle.assert_same_bits(actual, expected)
    assert not any(np.asarray(gradient)[1].any() for gradient in actual[1])


@pytest.mark.any_jax
@pytest.mark.parametrize("cotangent", [np.inf, -np.inf, np.nan])
@pytest.mark.parametrize(
    "options", [{}, {"weight": 2.0, "pos_weight": 3.0}], ids=["plain", "weights"]
)
def test_no_cotangent_reaches_a_dropped_element(
    implementation: str, options: dict, cotangent: float
) -> None:
    """`recompute` multiplies by it in the kernel, where 0 times infinity would be NaN."""
    keep = np.arange(300) % 3 > 0
    loss = partial(
        jax_bce.loss,
        labels=np.zeros(300, np.float32),
        where=keep,
        reduction="sum",
        residuals="recompute",
        implementation=implementation,
        **options,
    )
    _, pullback = jax.vjp(loss, np.ones(300, np.float32))
    (gradient,) = pullback(jnp.float32(cotangent))
    np.testing.assert_array_equal(gradient, np.where(keep, np.float32(cotangent), 0))


@pytest.mark.parametrize("divisor", ["where", "ignore_label", "normalizer", "weight", "empty"])
def test_a_denominator_of_zero(implementation: str, divisor: str) -> None:
    """Loss 0 and gradient 0, whatever the logits are, and never NaN."""
    shape = (0, 3) if divisor == "empty" else (2, 3)
    labels = np.zeros(shape, np.float32)
    keywords = {
        "where": {"where": np.zeros(2, bool)},
        "ignore_label": {"ignore_label": 0},
        "normalizer": {"normalizer": np.float32(0)},
        "weight": {"weight": np.zeros(3, np.float32), "reduction": "weighted_mean"},
        "empty": {"sample_weight": np.ones(0, np.float32)},
    }[divisor]
    for residuals in "gradient", "recompute":
        keywords |= {"residuals": residuals, "implementation": implementation}
        function = jax.jit(jax.value_and_grad(partial(jax_bce.loss, **keywords)))
        for value in 1, np.nan, np.inf:
            loss, gradient = function(np.full(shape, value, np.float32), labels)
            oracle.assert_same_bits(loss, np.float32(0))
            assert not np.asarray(gradient).any()
            assert not np.isnan(gradient).any()


def test_rows_without_an_element_beside_others(implementation: str) -> None:
    """A denominator for each result: only those of 0 give 0."""
    logits, where = np.float32([[1, 2], [3, 4]]), np.array([[True, False], [False, False]])
    losses = jax_bce.loss(logits, 0, where=where, axis=1, implementation=implementation)
    np.testing.assert_allclose(losses, [np.log1p(np.exp(1.0)), 0], rtol=oracle.PUBLISHED)


def test_a_weight_of_zero_wins_over_an_infinite_loss(implementation: str) -> None:
    logits = np.float32([np.inf, -np.inf, 1])
    for keywords in {"weight": np.float32([0, 0, 1])}, {"sample_weight": np.float32([0, 0, 1])}:
        loss, gradient = jax_bce.loss_and_grad(
            logits, [0, 1, 0], **keywords, reduction="sum", implementation=implementation
        )
        np.testing.assert_allclose(loss, np.log1p(np.exp(1.0)), rtol=oracle.PUBLISHED)
        np.testing.assert_allclose(gradient, [0, 0, 1 / (1 + np.exp(-1.0))], rtol=oracle.PUBLISHED)


def test_pos_weight_is_no_part_of_a_negative_label(implementation: str) -> None:
    """Nor of the denominator."""
    for q in np.inf, np.nan, 0.0, 3.0:
        plain = jax_bce.loss_and_grad(np.float32([1, -2]), 0, implementation=implementation)
        found = jax_bce.loss_and_grad(
            np.float32([1, -2]),
            0,
            pos_weight=np.float32(q),
            reduction="weighted_mean",
            implementation=implementation,
        )
        oracle.assert_same_bits(found, plain)


@pytest.mark.parametrize("dtype", [FLOAT32, FLOAT64], ids=str, indirect=True)
def test_the_classes_may_change_places(platform: str, dtype: np.dtype) -> None:
    """A class that counts 4 times as much, or the other one a quarter: the same bits.

    So 1 - y + q y has all its digits, whichever of the terms is the larger one.
    """
    logits = oracle.random_logits(dtype, 1 << 14, seed=31)
    labels = 1 - oracle.random_labels(dtype, 1 << 14, seed=32)  # 1 - y is not rounded
    evaluate = partial(jax_bce.loss_and_grad, reduction="none", implementation=platform)
    loss, gradient = evaluate(logits, labels, pos_weight=dtype.type(4))
    other_loss, other_gradient = evaluate(-logits, 1 - labels, pos_weight=dtype.type(0.25))
    oracle.assert_same_bits(loss, 4 * other_loss)
    oracle.assert_same_bits(gradient, -4 * other_gradient)


@pytest.mark.parametrize("smoothing", [0.0, 0.2])
def test_ones_change_nothing(implementation: str, smoothing: float) -> None:
    """Weights of 1 and a mask of all give the bits of the loss without them."""
    logits = oracle.random_logits(FLOAT32, (9, 1000), 0)
    labels = oracle.random_labels(FLOAT32, (9, 1000), 1)
    labels[::2] = labels[::2] > 0.5
    keywords = {"label_smoothing": smoothing, "implementation": implementation}
    for reduction in "sum", "mean", "none":
        plain = jax_bce.loss_and_grad(logits, labels, reduction=reduction, **keywords)
        found = jax_bce.loss_and_grad(
            logits,
            labels,
            reduction=reduction,
            weight=np.ones(1000, np.float32),
            sample_weight=np.ones(9, np.float32),
            pos_weight=np.ones(1000, np.float32),
            where=np.ones((9, 1000), bool),
            ignore_label=-1.0,
            **keywords,
        )
        if implementation == "xla":
            np.testing.assert_allclose(found[0], plain[0], rtol=oracle.SURROUNDINGS)
        else:
            oracle.assert_same_bits(found, plain)


@pytest.mark.any_jax
@pytest.mark.parametrize("columns", [1, 3, 96, 97, 1000])
def test_an_element_has_the_same_bits_beside_any_other(platform: str, columns: int) -> None:
    """A row's results do not depend on which rows are in the batch."""
    rows = 13
    logits = oracle.random_logits(FLOAT32, (rows, columns), 0, scale=30)
    labels = oracle.random_labels(np.uint8, (rows, columns), 1)
    rng = np.random.default_rng(2)
    pos_weight = rng.uniform(0, 4, columns).astype(np.float32)
    sample_weight = rng.uniform(0, 4, rows).astype(np.float32)
    keep = rng.random((rows, columns)) < 0.8

    def of(selected: slice):
        return jax_bce.loss_and_grad(
            logits[selected],
            labels[selected],
            pos_weight=pos_weight,
            sample_weight=sample_weight[selected],
            where=keep[selected],
            reduction="sum",
            axis=-1,
            implementation=platform,
        )

    whole = [np.asarray(v) for v in of(slice(None))]
    for first in range(0, rows, 4):
        part = slice(first, first + 3)
        oracle.assert_same_bits(of(part), tuple(v[part] for v in whole))


@pytest.mark.any_jax
def test_labels_are_compared_as_they_are_stored(implementation: str) -> None:
    """Neither rounded to float32, as 2^24 + 1 would be, nor smoothed."""
    labels = np.array([2**24, 2**24 + 1, 0], np.int32)
    kept = jax_bce.loss(
        np.zeros(3, np.float32),
        labels,
        ignore_label=2**24,
        label_smoothing=0.5,
        reduction="none",
        implementation=implementation,
    )
    np.testing.assert_array_equal(np.asarray(kept) != 0, [False, True, True])
    halves = np.array([0.1, 0.5], FLOAT16)
    kept = jax_bce.loss(
        np.zeros(2, np.float32),
        halves,
        ignore_label=0.1,
        reduction="none",
        implementation=implementation,
    )
    np.testing.assert_array_equal(np.asarray(kept) != 0, [False, True])


def test_a_new_value_does_not_recompile(implementation: str) -> None:
    traces = 0

    @jax.jit
    def f(logits, options):
        nonlocal traces
        traces += 1
        return jax_bce.loss(logits, 1, implementation=implementation, **options)

    for number in 1.0, 2.0:
        value = jnp.float32(number)
        options = {
            "weight": value,
            "sample_weight": value,
            "pos_weight": value,
            "label_smoothing": value / 4,
            "normalizer": value,
            "ignore_label": jnp.int32(number) + 5,
        }
        assert np.isfinite(f(jnp.ones(3), options))
    assert traces == 1
