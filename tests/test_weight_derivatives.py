"""Derivatives with respect to everything that may be traced, against a plain formula in float64.

All operands are one vector, along which derivatives are taken, so that every mixed term is met.
At elements that do not exist, at infinite ones and at denominators of 0 the formula has no answer:
there it is the documented one. What nobody asks for is not computed, and what is, in one pass.
"""

import functools
import itertools
import math
import re
from collections.abc import Callable
from functools import partial

import hlo
import jax
import jax.numpy as jnp
import numpy as np
import oracle
import pytest
from jax.flatten_util import ravel_pytree
from oracle import BFLOAT16, FLOAT16, FLOAT32, FLOAT64
from platforms import QUICKLY

import jax_bce

pytestmark = pytest.mark.quickly

Point = dict[str, jax.Array]

SHAPE = (3, 3)
VALUES = {
    "logits": [-12.0, -1.5, 0.0, 0.7, 3.0, 20.0, 0.0, -40.0, 5.0],
    "labels": [0.0, 1.0, 0.25, 0.9, -1.0, 1.0, 1.0, 0.0, 0.5],
    "weight": [0.5, 2.0, 1.5, 0.0, 0.25, 3.0, 1.0, 0.75, 1.25],
    "sample_weight": [1.5, 0.75, 2.0, 0.0, 1.0, 0.5, 2.5, 1.25, 3.0],
    "pos_weight": [1.0, 3.0, 0.25, 0.0, 2.0, 0.5, 1.5, 4.0, 1.25],
}
# The shapes of weight, sample_weight and pos_weight.
FORMS = {
    "numbers": ((), (), ()),
    "classes and rows": ((3,), (3,), (3,)),
    "columns": ((3, 1), (3, 1), (3, 1)),
    "elements": (SHAPE, SHAPE, SHAPE),
}
ROWS = np.array([True, False, True])
ELEMENTS = np.array([[True, False, True], [True, True, True], [False, True, False]])
OPTIONS = {
    "mean": {},
    "mean of kept rows": {"where": ROWS},
    "mean of kept elements": {"where": ELEMENTS, "ignore_label": -1.0},
    "weighted mean": {"reduction": "weighted_mean"},
    "weighted mean of kept rows": {
        "reduction": "weighted_mean",
        "where": ROWS,
        "ignore_label": -1.0,
    },
    "weighted mean of columns": {"reduction": "weighted_mean", "where": ELEMENTS, "axis": 0},
    "sum of rows": {"reduction": "sum", "axis": 1, "ignore_label": -1.0},
    "none": {"reduction": "none", "where": ROWS},
    "normalizer": {"where": ELEMENTS},
    "normalizer of rows": {"axis": 1},
}
NORMALIZERS = {"normalizer": 2.5, "normalizer of rows": [2.5, 0.5, 1.5]}


def point_of(form: str, option: str, dtype: np.dtype = FLOAT64) -> Point:
    shapes = dict.fromkeys(("logits", "labels"), SHAPE)
    shapes |= zip(("weight", "sample_weight", "pos_weight"), FORMS[form], strict=True)
    point = {name: np.resize(VALUES[name], shape) for name, shape in shapes.items()}
    point["label_smoothing"] = np.array(0.1)
    if option in NORMALIZERS:
        point["normalizer"] = np.array(NORMALIZERS[option])
    return {name: values.astype(dtype) for name, values in point.items()}


def formula(point: Point, *, where=None, ignore_label=None, reduction="mean", axis=None):
    """Every line of the definition, for logits whose exponential is finite."""

    def leading(values):
        return jnp.reshape(values, jnp.shape(values) + (1,) * (len(SHAPE) - jnp.ndim(values)))

    def softplus(x):
        return jnp.log1p(jnp.exp(x))

    x, y, s = point["logits"], point["labels"], point["label_smoothing"]
    keep = jnp.ones(SHAPE, bool) if where is None else jnp.broadcast_to(leading(where), SHAPE)
    keep = keep if ignore_label is None else keep & (y != ignore_label)
    weight = jnp.where(keep, point["weight"] * leading(point["sample_weight"]), 0)
    y = y * (1 - s) + s / 2
    loss = weight * (point["pos_weight"] * y * softplus(-x) + (1 - y) * softplus(x))
    if reduction == "none":
        return loss
    denominators = {"sum": 1, "mean": jnp.sum(keep, axis), "weighted_mean": jnp.sum(weight, axis)}
    return jnp.sum(loss, axis) / point.get("normalizer", denominators[reduction])


def of_vector(function: Callable, point: Point) -> Callable:
    """A number, in which each of several results has a factor of its own."""
    unravel = ravel_pytree(point)[1]

    def weigh(vector: jax.Array) -> jax.Array:
        results = jnp.ravel(function(unravel(vector)))
        return jnp.sum(results * (1 + jnp.arange(results.size, dtype=results.dtype)))

    return weigh


def along(vector: jax.Array) -> jax.Array:
    """A direction without zeros and without equal parts."""
    return jnp.cos(1 + jnp.arange(vector.size, dtype=vector.dtype))


def forward(function: Callable) -> Callable:
    return lambda vector: jax.jvp(function, (vector,), (along(vector),))[1]


def reverse(function: Callable) -> Callable:
    return lambda vector: jnp.vdot(jax.grad(function)(vector), along(vector))


def derivative(function: Callable, nesting: str, point: Point) -> np.ndarray:
    """The gradient, by the first mode, of what the others find along a direction each."""
    weigh = of_vector(function, point)
    outer, *others = nesting.split()
    for mode in reversed(others):
        weigh = {"fwd": forward, "rev": reverse}[mode](weigh)
    weigh = {"fwd": jax.jacfwd, "rev": jax.jacrev}[outer](weigh)
    return np.asarray(jax.jit(weigh, compiler_options=QUICKLY)(ravel_pytree(point)[0]))


@functools.cache
def expected(form: str, option: str, order: int) -> np.ndarray:
    with jax.enable_x64(True):
        function = partial(formula, **OPTIONS[option])
        return derivative(function, " ".join(["rev", "fwd", "fwd"][:order]), point_of(form, option))


def ours(implementation: str, option: str, **keywords: object) -> Callable:
    options = OPTIONS[option] | keywords | {"implementation": implementation}
    return lambda point: jax_bce.loss(**point, **options)


def assert_close(actual: np.ndarray, exact: np.ndarray) -> None:
    double = actual.dtype == FLOAT64
    relative = oracle.TOLERANCE["xla"].sum_float64 if double else oracle.SURROUNDINGS
    np.testing.assert_allclose(actual, exact, 0, atol=relative * np.max(abs(exact)))


# Each option with some of the forms, and each form with some of the options.
PAIRS = [
    (option, form)
    for i, option in enumerate(OPTIONS)
    for j, form in enumerate(FORMS)
    if (i + j) % 4 == 0
]
SECOND = [
    ("mean of kept elements", "elements", "rev rev"),
    ("weighted mean of kept rows", "classes and rows", "fwd rev"),
    ("weighted mean of columns", "columns", "rev fwd"),
    ("normalizer of rows", "numbers", "fwd fwd"),
]


@pytest.mark.any_jax
@pytest.mark.parametrize(("option", "form"), PAIRS)
def test_first(implementation: str, option: str, form: str) -> None:
    with jax.enable_x64(True):
        function = ours(implementation, option)
        actual = derivative(function, "rev", point_of(form, option))
    assert_close(actual, expected(form, option, 1))


@pytest.mark.parametrize("nesting", ["fwd", "jvp", "vjp"])
def test_first_in_float32(platform: str, nesting: str) -> None:
    """The kernel's own arithmetic, in forward mode, along one direction, and pulled back."""
    option, form = "weighted mean of kept rows", "classes and rows"
    point, exact = point_of(form, option, FLOAT32), expected(form, option, 1)
    function = ours(platform, option)
    if nesting == "fwd":
        assert_close(derivative(function, "fwd", point), exact)
        return
    weigh, vector = of_vector(function, point), ravel_pytree(point)[0]
    if nesting == "vjp":
        (bars,) = jax.vjp(jax.jit(function), point)[1](jnp.float32(1))
        assert jax.tree.map(jnp.shape, bars) == jax.tree.map(jnp.shape, point)
        assert_close(np.asarray(ravel_pytree(bars)[0]), exact)
    else:
        assert_close(np.asarray(jax.jit(forward(weigh))(vector)), exact @ np.asarray(along(vector)))


@pytest.mark.any_jax
@pytest.mark.parametrize(("option", "form", "nesting"), SECOND)
@pytest.mark.second
def test_second(platform: str, option: str, form: str, nesting: str) -> None:
    """With every mixed term, such as that of a weight and the denominator it is part of."""
    with jax.enable_x64(True):
        function = ours(platform, option)
        actual = derivative(function, nesting, point_of(form, option))
    assert_close(actual, expected(form, option, 2))


@pytest.mark.any_jax
@pytest.mark.thorough
def test_third(platform: str) -> None:
    option, form = "weighted mean of kept rows", "classes and rows"
    with jax.enable_x64(True):
        function = ours(platform, option)
        actual = derivative(function, "rev fwd rev", point_of(form, option))
    assert_close(actual, expected(form, option, 3))


@pytest.mark.any_jax
@pytest.mark.parametrize("option", ["weighted mean of kept rows", "none"])
def test_recompute(implementation: str, option: str) -> None:
    """First order in reverse mode, where each cotangent is another number."""
    point = point_of("classes and rows", option, FLOAT32)
    actual = derivative(ours(implementation, option, residuals="recompute"), "rev", point)
    assert_close(actual, expected("classes and rows", option, 1))


WEIGHTS = ("weight", "sample_weight", "pos_weight")


@pytest.mark.any_jax
@pytest.mark.parametrize(
    ("dtype", "residuals"), [(bool, "gradient"), (np.uint8, "recompute"), (np.int32, "gradient")]
)
def test_integers_have_no_derivative(implementation: str, dtype: np.dtype, residuals: str) -> None:
    """Labels and weights of them take float0, beside logits that have a gradient."""
    point = {"logits": point_of("elements", "mean", FLOAT32)["logits"]}
    point |= {name: np.ones(SHAPE, dtype) for name in ("labels", *WEIGHTS)}

    def loss(point: Point) -> jax.Array:
        return jax_bce.loss(
            **point,
            where=ROWS,
            ignore_label=0,
            reduction="weighted_mean",
            residuals=residuals,
            implementation=implementation,
        )

    bars = jax.jit(jax.grad(loss, allow_int=True))(point)
    assert bars["logits"].any()
    zeros = {name: bars[name] for name in ("labels", *WEIGHTS)}
    assert all(zero.dtype == jax.dtypes.float0 for zero in zeros.values())
    assert all(zero.shape == SHAPE for zero in zeros.values())
    if residuals == "gradient":
        tangent = jax.jvp(loss, (point,), ({"logits": np.ones(SHAPE, FLOAT32), **zeros},))[1]
        np.testing.assert_allclose(tangent, jnp.sum(bars["logits"]), oracle.SURROUNDINGS)


@pytest.mark.any_jax
@pytest.mark.parametrize("dtype", [BFLOAT16, FLOAT16], ids=str)
@pytest.mark.parametrize("residuals", ["gradient", "recompute"])
def test_16_bits(check, implementation: str, dtype: np.dtype, residuals: str) -> None:
    """Each derivative has its argument's dtype, and is rounded to it once."""
    option, form = "mean of kept rows", "elements"
    stored = point_of(form, option, dtype) | {"label_smoothing": np.float32(0.1)}
    function = ours(implementation, option, residuals=residuals)
    gradient = jax.jit(jax.grad(function), compiler_options=QUICKLY)(stored)
    with jax.enable_x64(True):
        wide = {name: np.asarray(values, FLOAT64) for name, values in stored.items()}
        exact = jax.jit(jax.grad(partial(formula, **OPTIONS[option])))(wide)
    for name in ("logits", "labels", *WEIGHTS):
        assert gradient[name].dtype == dtype
        bound = oracle.TOLERANCE["xla"].elements[dtype.name, "soft"].gradient
        if name == "logits" and dtype == BFLOAT16 and residuals == "gradient":
            bound += oracle.STORED_BFLOAT16
        # What cancels, in the arithmetic's type, leaves the rounding of the largest.
        largest = np.max(abs(np.asarray(exact[name])))
        scale = np.maximum(abs(exact[name]), largest * oracle.SURROUNDINGS)
        check.ulps(f"gradient of {name}", gradient[name], exact[name], bound, scale=scale)


def test_float16_does_not_underflow(platform: str) -> None:
    """The derivative of a mean waits for the factor of the loss in float32."""
    shape = (2048, 2048)
    rng = np.random.default_rng(1)
    logits = (4 * rng.standard_normal(shape, FLOAT32)).astype(FLOAT16)
    labels = rng.integers(0, 2, shape, np.uint8)
    weights = rng.uniform(0.5, 2, (3, shape[0])).astype(FLOAT16)
    keywords = dict(zip(WEIGHTS, weights, strict=True)) | {"where": labels | (logits > -3) > 0}

    def scaled(logits: jax.Array, residuals: str = "gradient") -> jax.Array:
        options = {"residuals": residuals, "implementation": platform}
        loss = jax_bce.loss(logits, labels, reduction="weighted_mean", **keywords, **options)
        return loss * 2.0**15

    wide = np.asarray(jax.jit(jax.grad(scaled))(logits.astype(FLOAT32))).astype(FLOAT16)
    for residuals in "gradient", "recompute":
        narrow = jax.jit(jax.grad(partial(scaled, residuals=residuals)))(logits)
        assert narrow.dtype == FLOAT16
        np.testing.assert_array_equal(narrow == 0, wide == 0)
    assert np.count_nonzero(wide) > wide.size // 2


INFINITY = np.float32(np.inf)
# Logit, label, and the derivatives with respect to logit, label, weight and pos_weight, at weights
# of 2 and 3; the last is an ordinary neighbour.
LIMITS = [
    (INFINITY, 1.0, 0.0, -INFINITY, 0.0, 0.0),
    (-INFINITY, 0.0, 0.0, INFINITY, 0.0, 0.0),
    (INFINITY, 0.0, 2.0, -INFINITY, INFINITY, 0.0),
    (-INFINITY, 1.0, -6.0, INFINITY, INFINITY, INFINITY),
    (INFINITY, 0.75, 0.5, -INFINITY, INFINITY, 0.0),
    (-INFINITY, 0.25, -1.5, INFINITY, INFINITY, INFINITY),
    (0.0, 0.5, -1.0, 4 * np.log(2.0), 2 * np.log(2.0), np.log(2.0)),
]


@pytest.mark.any_jax
@pytest.mark.parametrize("weight", ["weight", "sample_weight"])
def test_infinite_logits(implementation: str, weight: str) -> None:
    """The limit, and no curvature."""
    logits, labels, *limits = np.transpose(np.asarray(LIMITS, FLOAT32))
    point = {"logits": logits, "labels": labels}
    point |= {weight: np.full_like(logits, 2), "pos_weight": np.full_like(logits, 3)}

    def loss(point: Point) -> jax.Array:
        return jnp.sum(jax_bce.loss(**point, reduction="none", implementation=implementation))

    gradient = jax.jit(jax.grad(loss))(point)
    for name, limit in zip(("logits", "labels", weight, "pos_weight"), limits, strict=True):
        np.testing.assert_allclose(gradient[name], limit, oracle.SURROUNDINGS, err_msg=name)

    def curvature(logits: jax.Array) -> jax.Array:
        return jnp.sum(jax.grad(loss)(point | {"logits": logits})["logits"])

    np.testing.assert_array_equal(jax.jit(jax.grad(curvature))(logits), [0] * 6 + [1])


@pytest.mark.any_jax
@pytest.mark.parametrize("name", ["logits", "labels", *WEIGHTS])
def test_nan_in_gives_nan_out(implementation: str, name: str) -> None:
    """In the loss and in the gradient of the element that has it, and in no other element's."""
    point = {key: np.float32([0.5, 1.0]) for key in ("logits", "labels", *WEIGHTS)}
    point[name] = np.float32([0.5, np.nan])

    def loss(point: Point) -> jax.Array:
        losses = jax_bce.loss(**point, reduction="none", implementation=implementation)
        return jnp.sum(losses), losses

    gradient, losses = jax.jit(jax.grad(loss, has_aux=True), compiler_options=QUICKLY)(point)
    np.testing.assert_array_equal(np.isnan(losses), [False, True])
    np.testing.assert_array_equal(np.isnan(gradient["logits"]), [False, True])
    assert not any(np.isnan(values[0]) for values in gradient.values())


@pytest.mark.any_jax
@pytest.mark.parametrize("reduction", ["mean", "weighted_mean"])
def test_nothing_dropped_has_a_second_derivative(implementation: str, reduction: str) -> None:
    """The bits of what harmless values in its place have, and 0 in it."""
    point, bad = point_of("elements", "mean", FLOAT32), np.float32([np.nan, np.inf, -np.inf])
    spoilt = {
        name: np.where(ROWS[:, None], values, bad) if values.ndim else values
        for name, values in point.items()
    }

    def loss(point: Point) -> jax.Array:
        options = {"where": ROWS, "reduction": reduction, "implementation": implementation}
        return jax_bce.loss(**point, **options)

    @partial(jax.jit, compiler_options=QUICKLY)
    def second(point: Point) -> Point:
        tangents = jax.tree.map(jnp.ones_like, point)
        return jax.jvp(jax.grad(loss), (point,), (tangents,))[1]

    actual, clean = second(spoilt), second(point)
    for name, values in actual.items():
        oracle.assert_same_bits(values, clean[name])
        assert values.ndim == 0 or not np.asarray(values)[~ROWS].any()


@pytest.mark.any_jax
@pytest.mark.parametrize("zero", ["normalizer", "weight", "where"])
@pytest.mark.parametrize(
    ("residuals", "logits"),
    [("gradient", "finite"), ("gradient", "any"), ("recompute", "any")],
)
def test_a_denominator_of_zero(implementation: str, residuals: str, logits: str, zero: str) -> None:
    """Every derivative is 0, whatever the logits are."""
    point = point_of("classes and rows", "mean", FLOAT32)
    if logits == "any":
        point["logits"][:2] = [[np.nan], [np.inf]]
    where = np.zeros(3, bool) if zero == "where" else None
    if zero != "where":
        point[zero] = np.zeros_like(point.get(zero, np.float32(0)))

    def loss(point: Point) -> jax.Array:
        return jax_bce.loss(
            **point,
            where=where,
            reduction="weighted_mean",
            residuals=residuals,
            implementation=implementation,
        )

    value, gradient = jax.jit(jax.value_and_grad(loss), compiler_options=QUICKLY)(point)
    assert value == 0
    for name, values in gradient.items():
        assert not np.asarray(values).any(), f"{name}: {values}"


LARGE = (1024, 512)
SIZE = math.prod(LARGE)
MIB = 2**20
# Beside the logits, and the elements that the denominator reads.
PLACES = {
    "numbers": {"weight": (), "sample_weight": (), "pos_weight": ()},
    "classes and rows": {"weight": LARGE[1:], "sample_weight": LARGE[:1], "pos_weight": LARGE[1:]},
    "row mask": {"pos_weight": LARGE[1:], "where": LARGE[:1]},
    "element mask": {"weight": LARGE[1:], "sample_weight": LARGE[:1], "where": LARGE},
    "ignored labels": {"pos_weight": LARGE[1:], "where": LARGE[:1], "ignore_label": ()},
    "everything": {
        "weight": LARGE[1:],
        "sample_weight": LARGE[:1],
        "pos_weight": LARGE[1:],
        "where": LARGE,
        "ignore_label": (),
        "label_smoothing": (),
    },
}
OF_ELEMENTS = ("element mask", "ignored labels", "everything")
TYPES = {"where": bool, "ignore_label": np.uint8, "label_smoothing": FLOAT32}


def readers(compiled: jax.stages.Compiled, parameter: int) -> list[str]:
    """The opcodes of what reads a parameter of the program."""
    text = compiled.as_text()
    entry = text[text.index("ENTRY") :]
    (name,) = re.findall(rf"(%\S+) = \S+ parameter\({parameter}\)", entry)
    lines = [line for line in entry.splitlines() if re.search(rf"{re.escape(name)}[,)]", line)]
    return [hlo.INSTRUCTION.match(line)[3] for line in lines]


def compile_for(places: dict[str, tuple], argnums: object = 0, **keywords: object):
    """value_and_grad with weights of bfloat16, which are read as stored."""
    shapes = [jax.ShapeDtypeStruct(LARGE, FLOAT32), jax.ShapeDtypeStruct(LARGE, np.uint8)]
    shapes += [jax.ShapeDtypeStruct(s, TYPES.get(name, BFLOAT16)) for name, s in places.items()]

    def loss(x: jax.Array, y: jax.Array, *more: jax.Array) -> jax.Array:
        return jax_bce.loss(x, y, **dict(zip(places, more, strict=True)), **keywords)

    return jax.jit(jax.value_and_grad(loss, argnums)).lower(*shapes).compile()


@pytest.mark.parametrize(
    ("case", "reduction"),
    [*itertools.product(PLACES, ["mean", "weighted_mean"]), ("everything", "sum")],
)
def test_only_what_is_asked_for(platform: str, case: str, reduction: str) -> None:
    """Logits are read by one call, and nothing of their size is written beside their gradient."""
    compiled = compile_for(PLACES[case], reduction=reduction, implementation=platform)
    *denominator, loss = hlo.kernel_calls(compiled)
    assert loss == "jax_bce_v3_loss_and_grad"
    assert set(denominator) <= {"jax_bce_v3_total"}
    assert readers(compiled, 0) == ["custom-call"]
    assert compiled.memory_analysis().temp_size_in_bytes < MIB // 2
    reads_elements = case in OF_ELEMENTS and reduction != "sum"
    assert hlo.passes(compiled, SIZE) == [*denominator * reads_elements, loss]


def test_the_reader_sees_what_else_is_asked_for(platform: str) -> None:
    """A derivative with respect to a weight is another pass over the logits."""
    places = PLACES["classes and rows"]
    compiled = compile_for(places, (0, 2), reduction="weighted_mean", implementation=platform)
    assert len(readers(compiled, 0)) > 1
    assert hlo.passes(compiled, SIZE) != hlo.kernel_calls(compiled)
