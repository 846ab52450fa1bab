"""The loss of a linear layer against the loss of its logits, which are computed in float64.

Values and gradients, in blocks that do and do not divide either dimension; labels as a matrix and
as indices; memory and products, counted in what XLA compiles; every transformation against that of
the logits' loss.
"""

import re
from collections.abc import Callable
from dataclasses import dataclass, field, replace
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import oracle
import pytest
import sample
from hlo import kernel_calls
from hypothesis import given, settings
from hypothesis import strategies as st
from jax import export
from oracle import BFLOAT16, FLOAT16, FLOAT32, FLOAT64
from platforms import QUICKLY

import jax_bce

pytestmark = pytest.mark.quickly

PARAMETERS = ("features", "weight", "bias", "scale")
# Of features and weight: the longer dimension of the logits is the second, the first, and one of
# them is a single block.
SIZES = {"labels": (24, 60, 8), "rows": (60, 24, 8), "uneven": (13, 101, 5), "column": (30, 1, 3)}
# A column or a row at a time, a few, and everything.
quick = partial(jax.jit, compiler_options=QUICKLY)
BLOCKS = {"one": 1, "some": 4096, "all": 2**26}


@dataclass(frozen=True)
class Case:
    """A layer, its labels in [0, 1] or as indices, and the options of the loss."""

    arrays: dict[str, np.ndarray]
    options: dict[str, Any] = field(default_factory=dict)

    def loss(self, **changed: Any) -> jax.Array:
        arrays = self.arrays | {k: changed.pop(k) for k in list(changed) if k in self.arrays}
        features, weight = arrays.pop("features"), arrays.pop("weight")
        return jax_bce.linear_loss(features, weight, **arrays, **self.options, **changed)

    def gradients(self, names: tuple[str, ...], **changed: Any) -> tuple[jax.Array, dict]:
        def objective(moving: dict[str, jax.Array]) -> jax.Array:
            losses = self.loss(**moving, **changed)
            return jnp.sum(losses * row_cotangents(losses)), losses

        moving = {name: jnp.asarray(self.arrays[name]) for name in names}
        (_, losses), found = quick(jax.value_and_grad(objective, has_aux=True))(moving)
        return losses, found


def row_cotangents(losses: Any) -> Any:
    """One for a mean or a sum, and another for each row's loss."""
    return 1.0 if not np.ndim(losses) else np.linspace(-1, 2, len(losses), dtype=np.float32)


def dense_labels(case: Case) -> np.ndarray:
    arrays = case.arrays
    shape = len(arrays["features"]), arrays["weight"].shape[1]
    if "positives" not in arrays:
        return np.broadcast_to(arrays["labels"], shape)
    labels = np.zeros((shape[0], shape[1] + 1))
    np.put_along_axis(labels, arrays["positives"], 1, axis=1)  # -1 is the last column
    return labels[:, :-1]


def expected(case: Case) -> tuple[np.ndarray, dict[str, np.ndarray]]:
    """The loss, and its gradients in all parameters, from float64 arithmetic."""
    arrays, options = {k: np.asarray(v) for k, v in case.arrays.items()}, case.options
    x, w = (arrays[name].astype(np.float64) for name in ("features", "weight"))
    scale, bias = (np.float64(arrays.get(*pair)) for pair in (("scale", 1.0), ("bias", 0.0)))
    products, y = x @ w, dense_labels(case)
    logits = (products * scale + bias).astype(np.longdouble)  # float64 would be mpmath's
    smoothing, q = options.get("label_smoothing", 0.0), options.get("pos_weight", 1.0)
    exact = oracle.exact(logits, y, smoothing, np.broadcast_to(q, logits.shape))
    keep = np.ones(logits.shape, bool)
    weights = np.ones(logits.shape)
    if "where" in options:
        keep &= options["where"][:, None]
    if "ignore_label" in options:
        keep &= y != options["ignore_label"]
    if "class_weight" in options:
        weights = weights * options["class_weight"]
    if "sample_weight" in options:
        weights = weights * options["sample_weight"][:, None]
    weights = np.where(keep, weights, 0)
    axis = options.get("axis")
    reduction = options.get("reduction", "mean")
    divisor = {"sum": 1, "mean": keep.sum(axis), "weighted_mean": weights.sum(axis)}[reduction]
    divisor = np.asarray(options.get("normalizer", divisor), np.float64)
    shares = np.where(divisor == 0, 0, 1 / np.where(divisor == 0, 1, divisor))
    losses = (np.where(keep, weights * exact.loss, 0)).sum(axis) * shares
    factor = np.broadcast_to(row_cotangents(losses) * shares, losses.shape)
    factor = factor[:, None] if losses.ndim else factor
    g = np.where(keep, weights * exact.gradient, 0) * factor
    return losses, {
        "features": scale * g @ w.T,
        "weight": scale * x.T @ g,
        "bias": g.sum(0) if bias.ndim else g.sum(),
        "scale": (g * products).sum(),
    }


def assert_close(actual: Any, exact: Any, tolerance: float, what: str = "") -> None:
    """Relative to the largest."""
    __tracebackhide__ = True
    actual, exact = np.asarray(actual, np.float64), np.asarray(exact, np.float64)
    assert actual.shape == exact.shape
    largest = np.max(abs(exact), initial=0)
    np.testing.assert_allclose(actual, exact, rtol=0, atol=tolerance * largest, err_msg=what)


def assert_as_dense(case: Case, **keywords: Any) -> None:
    __tracebackhide__ = True
    names = tuple(name for name in PARAMETERS if name in case.arrays)
    losses, gradients = case.gradients(names, **keywords)
    exact, exact_gradients = expected(case)
    dtypes = [np.asarray(case.arrays[name]).dtype for name in ("features", "weight")]
    wide = FLOAT64 if FLOAT64 in dtypes else FLOAT32
    assert losses.dtype == wide
    assert_close(losses, exact, oracle.LINEAR[wide.name], "the loss")
    loosest = max(oracle.LINEAR[dtype.name] for dtype in dtypes)
    for name, gradient in gradients.items():
        assert gradient.dtype == case.arrays[name].dtype
        assert_close(gradient, exact_gradients[name], loosest, name)
    assert_close(quick(partial(case.loss, **keywords))(), exact, oracle.LINEAR[wide.name])


def layer(
    rows: int, labels: int, width: int, seed: int = 0, dtype: Any = FLOAT32, other: Any = None
) -> dict[str, np.ndarray]:
    random = np.random.default_rng(seed)
    return {
        "features": oracle.round_to(random.normal(size=(rows, width)), dtype),
        "weight": oracle.round_to(random.normal(size=(width, labels)), other or dtype),
        "bias": oracle.round_to(random.normal(size=labels), other or dtype),
        "scale": np.float32(0.7),
        "labels": oracle.random_labels(dtype, (rows, labels), seed + 1),
    }


def with_indices(arrays: dict[str, np.ndarray], most: int = 4, seed: int = 7) -> dict:
    """The same with indices in place of labels: some rows have none, some have one twice."""
    random = np.random.default_rng(seed)
    labels = arrays["weight"].shape[1]
    positives = random.integers(-labels // 2, labels, (len(arrays["features"]), most))
    positives = np.maximum(positives, -1).astype(np.int32)
    positives[::3, -1] = positives[::3, 0]
    return {name: a for name, a in arrays.items() if name != "labels"} | {"positives": positives}


def options_of(rows: int, labels: int) -> dict[str, dict[str, Any]]:
    random = np.random.default_rng(5)
    weights = {
        "class_weight": random.random(labels).astype(np.float32),
        "sample_weight": random.random(rows).astype(np.float32),
    }
    where = random.random(rows) < 0.7
    return {
        "mean": {},
        "sum": {"reduction": "sum"},
        "rows": {"axis": 1},
        "sums of rows": {"axis": -1, "reduction": "sum"},
        "weighted mean": {"reduction": "weighted_mean", **weights},
        "weighted rows": {"reduction": "weighted_mean", "axis": 1, **weights},
        "positives' weight": {"pos_weight": random.uniform(0, 9, labels).astype(np.float32)},
        "smoothed": {"label_smoothing": 0.1, "where": where},
        "masked rows": {"where": where, "axis": 1, **weights},
        "normalizer": {"normalizer": np.float32(7.5)},
        "normalizers": {"axis": 1, "normalizer": np.linspace(0, 3, rows, dtype=np.float32)},
    }


OPTIONS = options_of(1, 1)


@pytest.mark.parametrize("block", BLOCKS)
@pytest.mark.parametrize("sizes", SIZES)
@pytest.mark.parametrize("options", OPTIONS)
def test_options(options: str, sizes: str, block: str) -> None:
    rows, labels, width = SIZES[sizes]
    case = Case(layer(rows, labels, width), options_of(rows, labels)[options])
    assert_as_dense(case, block_bytes=BLOCKS[block])


@pytest.mark.parametrize("block", BLOCKS)
@pytest.mark.parametrize("sizes", SIZES)
@pytest.mark.parametrize("options", ["mean", "weighted rows", "positives' weight", "smoothed"])
def test_indices(options: str, sizes: str, block: str) -> None:
    rows, labels, width = SIZES[sizes]
    case = Case(with_indices(layer(rows, labels, width)), options_of(rows, labels)[options])
    assert_as_dense(case, block_bytes=BLOCKS[block])


@pytest.mark.parametrize("sizes", SIZES)
def test_indices_are_the_same_as_their_matrix(cpu: str, sizes: str) -> None:
    """Bit for bit: the kernel gets the same labels."""
    case = Case(with_indices(layer(*SIZES[sizes])))
    matrix = {name: a for name, a in case.arrays.items() if name != "positives"}
    dense = Case(matrix | {"labels": dense_labels(case).astype(np.uint8)})
    found, wanted = (c.gradients(PARAMETERS, block_bytes=4096) for c in (case, dense))
    jax.tree.map(oracle.assert_same_bits, found, wanted)


@pytest.mark.parametrize("indices", ["int8", "uint8", "int16", "int32", "int64"])
def test_types_of_indices(indices: str) -> None:
    arrays = layer(6, 9, 4)
    arrays = {name: a for name, a in arrays.items() if name != "labels"}
    positives = np.array([[0], [8], [3], [3], [1], [0]], indices)
    assert_as_dense(Case(arrays | {"positives": positives}))


def test_indices_in_python() -> None:
    features, weight = np.eye(2, dtype=np.float32), np.ones((2, 3), np.float32)
    found = jax_bce.linear_loss(features, weight, positives=[[0, 2], [1, -1]])
    assert found == jax_bce.loss(weight[:2], [[1, 0, 1], [0, 1, 0]])


TYPES = [(d, d) for d in oracle.FLOATS] + [(BFLOAT16, FLOAT32), (FLOAT16, BFLOAT16)]


@pytest.mark.parametrize("sizes", ["labels", "rows"])
@pytest.mark.parametrize("types", TYPES, ids=lambda pair: f"{pair[0]} @ {pair[1]}")
def test_types(types: tuple[np.dtype, np.dtype], sizes: str) -> None:
    with jax.enable_x64(FLOAT64 in types):
        arrays = layer(*SIZES[sizes], 0, *types)
        if FLOAT64 in types:
            arrays["scale"] = np.float64(0.7)
        assert_as_dense(Case(arrays), block_bytes=4096)


def test_types_of_labels(label_dtype: np.dtype) -> None:
    arrays = layer(24, 60, 8)
    arrays["labels"] = oracle.random_labels(label_dtype, (24, 60), 3)
    assert_as_dense(Case(arrays), block_bytes=4096)


@pytest.mark.parametrize("sizes", ["labels", "rows"])
def test_ignored_labels(sizes: str) -> None:
    arrays = layer(*SIZES[sizes])
    random = np.random.default_rng(1)
    arrays["labels"] = random.integers(-1, 2, arrays["labels"].shape).astype(np.int8)
    for axis in (None, 1):
        assert_as_dense(Case(arrays, {"ignore_label": -1, "axis": axis}), block_bytes=4096)


def test_full_shapes() -> None:
    """Weights and masks may have the logits' shape."""
    arrays = layer(24, 60, 8)
    random = np.random.default_rng(1)
    shape = arrays["labels"].shape
    weight = random.random(shape).astype(np.float32)
    assert_as_dense(Case(arrays, {"class_weight": weight}), block_bytes=4096)
    where = random.random(shape) < 0.5
    found = jax_bce.linear_loss(*list(arrays.values())[:2], arrays["labels"], where=where)
    logits = arrays["features"] @ arrays["weight"]
    wanted = jax_bce.loss(logits, arrays["labels"], where=where)
    np.testing.assert_allclose(found, wanted, oracle.SURROUNDINGS)


def test_a_scalar_label() -> None:
    for label in (0, 1, 0.3):
        assert_as_dense(Case(layer(24, 60, 8) | {"labels": np.float32(label)}), block_bytes=4096)


def test_one_bias_for_all() -> None:
    assert_as_dense(Case(layer(24, 60, 8) | {"bias": np.float32(0.3)}), block_bytes=4096)


def test_without_bias_and_scale() -> None:
    arrays = {n: a for n, a in layer(24, 60, 8).items() if n not in ("bias", "scale")}
    assert_as_dense(Case(arrays), block_bytes=4096)


@settings(max_examples=sample.examples(40), deadline=None)
@given(
    rows=st.integers(1, 40),
    labels=st.integers(1, 90),
    width=st.integers(1, 9),
    blocks=st.integers(1, 30_000),
    seed=st.integers(0, 99),
    options=st.sampled_from(sorted(OPTIONS)),
    indices=st.booleans(),
)
@pytest.mark.second
def test_random_shapes(
    rows: int, labels: int, width: int, blocks: int, seed: int, options: str, indices: bool
) -> None:
    arrays = layer(rows, labels, width, seed)
    arrays = with_indices(arrays, 1 + seed % 4, seed) if indices else arrays
    assert_as_dense(Case(arrays, options_of(rows, labels)[options]), block_bytes=blocks)


@pytest.mark.parametrize("sizes", ["labels", "rows"])
def test_a_sum_is_as_exact_as_that_of_the_logits(check: Any, cpu: str, sizes: str) -> None:
    """Products with 1 and 0 are exact: what is left is the loss itself, in many blocks."""
    rows, labels, _ = SIZES[sizes]
    logits = oracle.random_logits(FLOAT32, (rows, labels), 3)
    y = oracle.random_labels(FLOAT32, (rows, labels), 4)
    exact = oracle.exact(logits, y).loss
    identity = np.eye(rows, dtype=np.float32)
    for block in BLOCKS.values():
        found = jax_bce.linear_loss(identity, logits, y, reduction="sum", block_bytes=block)
        check.reduced(cpu, found, exact.sum())
        found = jax_bce.linear_loss(identity, logits, y, reduction="sum", axis=1, block_bytes=block)
        check.reduced(cpu, found, exact.sum(1))


def test_tails(cpu: str, check: Any) -> None:
    """Exact in both: no softplus minus the positives' logits."""
    logits = np.array([[-100, -20, 20, 100, 87.5, -87.5]], np.float32)
    one = np.ones((1, 1), np.float32)
    for index in range(logits.shape[1]):
        y = np.arange(logits.shape[1])[None] == index
        exact = oracle.exact(logits, y)
        found = jax_bce.linear_loss(one, logits, positives=[[index]], reduction="sum")
        check.reduced(cpu, found, exact.loss.sum())
        gradient = jax.jit(
            jax.grad(lambda w, i: jax_bce.linear_loss(one, w, positives=[[i]], reduction="sum")),
            static_argnums=1,
        )(logits, index)
        check.elements(cpu, logits, y, gradient=gradient, flushes=True)
    confident = np.array([[20.0, -20.0]], np.float32)
    found = jax_bce.linear_loss(one, confident, positives=[[0]], reduction="sum")
    np.testing.assert_allclose(found, 2 * 2.061153622438558e-09, 1e-7)


def test_infinite_logits() -> None:
    one, logits = np.ones((1, 1), np.float32), np.array([[np.inf, -np.inf, 1.0]], np.float32)
    for block in (1, 2**26):
        loss = partial(jax_bce.linear_loss, one, logits, block_bytes=block, reduction="sum")
        np.testing.assert_allclose(loss(positives=[[0]]), np.log1p(np.exp(1.0)), 1e-6)
        assert loss(positives=[[1]]) == np.inf


@pytest.mark.parametrize("options", [{}, {"axis": 1}])
def test_dropped_rows_may_be_nan(options: dict[str, Any]) -> None:
    """Also where NaN would reach the weight's gradient, as a factor of 0."""
    arrays = layer(24, 60, 8)
    where = np.arange(24) % 3 != 0
    wanted = Case(arrays, {"where": where, **options}).gradients(PARAMETERS, block_bytes=4096)
    broken = arrays | {name: arrays[name].copy() for name in ("features", "labels")}
    for name in ("features", "labels"):
        broken[name][~where] = np.nan
    found = Case(broken, {"where": where, **options}).gradients(PARAMETERS, block_bytes=4096)
    jax.tree.map(oracle.assert_same_bits, found, wanted)
    assert not np.any(found[1]["features"][~where])


@pytest.mark.parametrize("shape", [(0, 5, 3), (4, 0, 3), (4, 5, 0), (0, 0, 0)], ids=str)
@pytest.mark.parametrize("axis", [None, 1])
def test_empty(shape: tuple[int, int, int], axis: int | None) -> None:
    case = Case(layer(*shape), {"axis": axis})
    losses, gradients = case.gradients(PARAMETERS)
    logits = np.broadcast_to(case.arrays["bias"], shape[:2])
    np.testing.assert_allclose(losses, jax_bce.loss(logits, case.arrays["labels"], axis=axis), 1e-6)
    for name, gradient in gradients.items():
        assert gradient.shape == np.shape(case.arrays[name])
        assert np.all(np.isfinite(gradient))
    none = np.full((shape[0], 2), -1)
    losses = jax_bce.linear_loss(*list(case.arrays.values())[:2], positives=none, axis=axis)
    np.testing.assert_allclose(losses, jax_bce.loss(np.zeros(shape[:2]), 0, axis=axis), 1e-6)


def test_nothing_kept() -> None:
    case = Case(layer(6, 9, 4), {"where": np.zeros(6, bool)})
    losses, gradients = case.gradients(PARAMETERS)
    assert losses == 0
    assert all(not np.any(gradient) for gradient in gradients.values())


# --- what is compiled ----------------------------------------------------------------------------

LARGE = {"labels": (512, 16384, 64), "rows": (16384, 512, 64), "uneven": (500, 16411, 64)}


def compiled(
    sizes: str,
    names: tuple[str, ...],
    dtype: str = "float32",
    indices: bool = False,
    **keywords: Any,
) -> jax.stages.Compiled:
    rows, labels, width = LARGE[sizes]
    of = {
        "features": jax.ShapeDtypeStruct((rows, width), dtype),
        "weight": jax.ShapeDtypeStruct((width, labels), dtype),
        "bias": jax.ShapeDtypeStruct((labels,), dtype),
        "scale": jax.ShapeDtypeStruct((), "float32"),
        "labels": jax.ShapeDtypeStruct((rows, labels), "uint8"),
        "positives": jax.ShapeDtypeStruct((rows, 8), "int32"),
    }
    del of["labels" if indices else "positives"]

    def loss(moving: dict[str, jax.Array], others: dict[str, jax.Array]) -> jax.Array:
        arrays = moving | others
        features, weight = arrays.pop("features"), arrays.pop("weight")
        return jnp.sum(jax_bce.linear_loss(features, weight, **arrays, **keywords))

    moving = {name: of.pop(name) for name in names}
    function = jax.value_and_grad(loss) if names else loss
    return jax.jit(function).lower(moving, of).compile()


def products(program: jax.stages.Compiled) -> int:
    """The matrix products: once for the loop, and once for what it leaves over."""
    return len(re.findall(r" dot\(", program.as_text()))


@pytest.mark.parametrize("sizes", ["labels", "rows"])
@pytest.mark.parametrize(
    ("names", "options", "number"),
    [
        ((), {}, 1),
        (PARAMETERS, {}, 3),
        (("features",), {}, 2),
        (("weight", "bias"), {}, 2),
        (("features", "weight"), {"axis": 1}, 4),
    ],
    ids=str,
)
def test_products(
    cpu: str, sizes: str, names: tuple[str, ...], options: dict[str, Any], number: int
) -> None:
    """Three with the gradients, and one without; a loss per row recomputes its logits."""
    program = compiled(sizes, names, block_bytes=2**22, **options)
    assert products(program) == number
    kernels = ["jax_bce_v3_loss", "jax_bce_v3_loss_and_grad"]
    own = kernels if options and names else kernels[bool(names) :][:1]
    assert sorted(name for name in kernel_calls(program) if name != "jax_bce_v3_total") == own


@pytest.mark.parametrize("sizes", LARGE)
@pytest.mark.parametrize("names", [(), PARAMETERS], ids=["loss", "gradients"])
@pytest.mark.parametrize("indices", [False, True], ids=["labels", "indices"])
@pytest.mark.parametrize("budget", [2**21, 2**23])
def test_memory(cpu: str, sizes: str, names: tuple[str, ...], indices: bool, budget: int) -> None:
    """The temporaries take the budget, and the logits 8 or 4 times as much."""
    program = compiled(sizes, names, indices=indices, block_bytes=budget)
    assert program.memory_analysis().temp_size_in_bytes <= 1.1 * budget


@pytest.mark.parametrize("sizes", ["labels", "rows"])
def test_a_loss_per_row_keeps_nothing(cpu: str, sizes: str) -> None:
    budget = 2**22
    program = compiled(sizes, ("features", "weight"), block_bytes=budget, axis=1)
    assert program.memory_analysis().temp_size_in_bytes <= 1.1 * budget


@pytest.mark.parametrize("sizes", ["labels", "rows"])
def test_bfloat16_is_never_converted_as_a_whole(cpu: str, sizes: str) -> None:
    """A copy, at most: otherwise XLA on a CPU would convert all weights for each block."""
    budget = 2**22
    program = compiled(sizes, PARAMETERS, "bfloat16", indices=True, block_bytes=budget)
    rows, labels, width = LARGE[sizes]
    copy = max(rows, labels) * width * 2
    assert program.memory_analysis().temp_size_in_bytes <= 1.1 * budget + copy


def test_a_mask_of_rows_does_not_copy_the_features(cpu: str) -> None:
    budget = 2**22
    where = jnp.arange(LARGE["rows"][0]) % 2 == 0
    program = compiled("rows", PARAMETERS, block_bytes=budget, where=where)
    assert program.memory_analysis().temp_size_in_bytes <= 1.1 * budget


def test_second_derivatives_in_blocks(cpu: str) -> None:
    """A Hessian times a vector, forward over reverse, holds a few blocks."""
    rows, labels, width = LARGE["labels"]
    x, w = jnp.ones((rows, width)), jax.ShapeDtypeStruct((width, labels), "float32")

    def product(w: jax.Array) -> jax.Array:
        gradient = jax.grad(lambda w: jax_bce.linear_loss(x, w, 0, block_bytes=2**20))
        return jax.jvp(gradient, (w,), (w,))[1]

    program = jax.jit(product).lower(w).compile()
    assert program.memory_analysis().temp_size_in_bytes < rows * labels * 4 / 2


# --- transformations -----------------------------------------------------------------------------


def of_logits(arrays: dict[str, jax.Array], **keywords: Any) -> jax.Array:
    """What linear_loss replaces."""
    logits = arrays["features"] @ arrays["weight"] * arrays["scale"] + arrays["bias"]
    given = {n: arrays[n] for n in arrays if n not in (*PARAMETERS, "labels")} | keywords
    if "class_weight" in given:
        given["weight"] = given.pop("class_weight")
    return jax_bce.loss(logits, arrays["labels"], **given)


def of_layer(arrays: dict[str, jax.Array], **keywords: Any) -> jax.Array:
    arrays = dict(arrays)
    features, weight = arrays.pop("features"), arrays.pop("weight")
    return jax_bce.linear_loss(features, weight, **arrays, **keywords, block_bytes=3000)


WEIGHTS = {
    "class_weight": np.linspace(0.5, 2, 37, dtype=np.float32),
    "sample_weight": np.linspace(0.1, 3, 11, dtype=np.float32),
    "pos_weight": np.linspace(1, 9, 37, dtype=np.float32),
    "label_smoothing": np.float32(0.1),
}
INPUTS = layer(11, 37, 5) | WEIGHTS
REDUCED = {
    "mean": {"reduction": "mean"},
    "weighted mean": {"reduction": "weighted_mean"},
    "rows": {"reduction": "sum", "axis": 1},
}


def tangents(arrays: Any) -> Any:
    random = np.random.default_rng(11)
    return jax.tree.map(lambda a: jnp.asarray(random.normal(size=a.shape), a.dtype), arrays)


def scalar(function: Callable) -> Callable:
    def total(arrays: dict[str, jax.Array]) -> jax.Array:
        losses = function(arrays)
        return jnp.sum(losses * row_cotangents(losses))

    return total


def stacked(arrays: dict[str, jax.Array]) -> dict[str, jax.Array]:
    return jax.tree.map(lambda a: jnp.stack([a, 0.9 * a]), arrays)


def in_a_scan(function: Callable) -> Callable:
    def last(arrays: dict[str, jax.Array]) -> jax.Array:
        def step(so_far: jax.Array, factor: jax.Array) -> tuple[jax.Array, None]:
            changed = arrays | {"features": arrays["features"] * factor}
            return so_far + jnp.sum(jnp.sin(0.01 * function(changed))), None

        return jax.lax.scan(step, jnp.zeros(()), jnp.array([0.5, 1.0, 2.0]))[0]

    return last


def hessian_vector(function: Callable) -> Callable:
    return lambda a: jax.jvp(jax.grad(scalar(function)), (a,), (tangents(a),))[1]


def reverse_hessian_vector(function: Callable) -> Callable:
    return lambda a: jax.vjp(jax.grad(scalar(function)), a)[1](tangents(a))[0]


TRANSFORMED = {
    "gradient": lambda f: jax.grad(scalar(f)),
    "tangent": lambda f: lambda a: jax.jvp(f, (a,), (tangents(a),)),
    "linearize": lambda f: lambda a: jax.linearize(f, a)[1](tangents(a)),
    "vmap": lambda f: lambda a: jax.vmap(f)(stacked(a)),
    "vmap of the gradient": lambda f: lambda a: jax.vmap(jax.grad(scalar(f)))(stacked(a)),
    "jacrev": lambda f: jax.jacrev(f),
    "jacfwd in scale": lambda f: lambda a: jax.jacfwd(lambda s: f(a | {"scale": s}))(a["scale"]),
    "checkpoint": lambda f: jax.grad(scalar(jax.checkpoint(f))),
    "scan": lambda f: jax.grad(in_a_scan(f)),
    "Hessian": hessian_vector,
}
SLOWLY_COMPILED = {
    "Hessian, reverse": reverse_hessian_vector,
    "Hessian of a scan": lambda f: hessian_vector(in_a_scan(f)),
    "third": lambda f: lambda a: jax.jvp(hessian_vector(f), (a,), (tangents(a),))[1],
}


@pytest.mark.parametrize("reduced", REDUCED)
@pytest.mark.parametrize("name", TRANSFORMED)
@pytest.mark.second
def test_transformations(name: str, reduced: str) -> None:
    """With respect to everything that has a derivative, in several blocks."""
    assert_transforms(TRANSFORMED[name], reduced, 10 * oracle.SURROUNDINGS)


@pytest.mark.thorough
@pytest.mark.parametrize("reduced", ["mean", "rows"])
@pytest.mark.parametrize("name", SLOWLY_COMPILED)
def test_other_transformations(name: str, reduced: str) -> None:
    tolerance = (100 if name == "third" else 10) * oracle.SURROUNDINGS
    assert_transforms(SLOWLY_COMPILED[name], reduced, tolerance)


def assert_transforms(transform: Callable, reduced: str, tolerance: float) -> None:
    """The same of the layer and of its logits, relative to the largest."""
    __tracebackhide__ = True
    arrays = jax.tree.map(jnp.asarray, INPUTS)
    found = quick(transform(partial(of_layer, **REDUCED[reduced])))(arrays)
    wanted = quick(transform(partial(of_logits, **REDUCED[reduced])))(arrays)
    assert jax.tree.structure(found) == jax.tree.structure(wanted)
    jax.tree.map(partial(assert_close, tolerance=tolerance), found, wanted)


@pytest.mark.parametrize("sizes", ["labels", "rows"])
@pytest.mark.parametrize("name", ["gradient", "tangent", "vmap of the gradient", "Hessian"])
@pytest.mark.thorough
def test_transformations_of_each_walk(name: str, sizes: str) -> None:
    arrays = jax.tree.map(jnp.asarray, layer(*SIZES[sizes]))
    for keywords in ({}, {"axis": 1}):
        found, wanted = (
            quick(TRANSFORMED[name](partial(f, **keywords)))(arrays) for f in (of_layer, of_logits)
        )
        jax.tree.map(partial(assert_close, tolerance=10 * oracle.SURROUNDINGS), found, wanted)


def test_a_normalizers_derivative() -> None:
    x, w = INPUTS["features"], INPUTS["weight"]

    def losses(normalizer: jax.Array) -> tuple[jax.Array, ...]:
        ours = jax_bce.linear_loss(x, w, 1, normalizer=normalizer, block_bytes=3000)
        return ours, jax_bce.loss(x @ w, 1, normalizer=normalizer)

    found, wanted = jax.jacrev(losses)(3.0)
    np.testing.assert_allclose(found, wanted, oracle.SURROUNDINGS)


def test_without_jit() -> None:
    case = Case(layer(24, 60, 8))
    found = jax.value_and_grad(lambda w: case.loss(weight=w, block_bytes=4096))(
        jnp.asarray(case.arrays["weight"])
    )
    exact, gradients = expected(case)
    assert_close(found[0], exact, oracle.SURROUNDINGS)
    assert_close(found[1], gradients["weight"], oracle.SURROUNDINGS)
    with jax.disable_jit():
        assert_close(case.loss(block_bytes=4096), exact, oracle.SURROUNDINGS)


def test_xla() -> None:
    assert_as_dense(Case(layer(24, 60, 8)), block_bytes=4096, implementation="xla")


@pytest.mark.parametrize("axis", [None, 1])
def test_export(axis: int | None) -> None:
    """For platforms that have no kernel, and back."""
    case = Case(layer(24, 60, 8), {"axis": axis})

    def gradient(weight: jax.Array) -> jax.Array:
        return jax.grad(lambda w: jnp.sum(case.loss(weight=w, block_bytes=4096)))(weight)

    weight = jnp.asarray(case.arrays["weight"])
    platforms = ("cpu", "cuda", "tpu")
    exported = export.export(jax.jit(gradient), platforms=platforms)(weight)
    assert "jax_bce" not in re.sub(r"loc\(.*", "", exported.mlir_module())
    loaded = export.deserialize(exported.serialize())
    assert_close(loaded.call(weight), jax.jit(gradient)(weight), oracle.SURROUNDINGS)


def test_no_new_value_compiles_again() -> None:
    traced = []

    @jax.jit
    def loss(x: jax.Array, scale: jax.Array, smoothing: jax.Array) -> jax.Array:
        traced.append(scale)
        keywords = {"scale": scale, "label_smoothing": smoothing, "normalizer": scale}
        return jax_bce.linear_loss(x, jnp.ones((5, 7)), 0, **keywords)

    for number in (0.1, 0.2):
        loss(jnp.ones((3, 5)), number, number)
    assert len(traced) == 1


def test_the_precision_of_the_products() -> None:
    def text(**keywords: Any) -> str:
        x = jnp.ones((3, 5))
        return jax.jit(lambda x: jax_bce.linear_loss(x, x.T, 0, **keywords)).lower(x).as_text()

    assert "precision = [HIGHEST, HIGHEST]" in text(precision="highest")
    assert "HIGHEST" not in text()
    with jax.default_matmul_precision("highest"):
        assert "precision = [HIGHEST, HIGHEST]" in text()


def test_the_debug_check() -> None:
    x = np.ones((4, 3), np.float32)
    with jax_bce.checking(), pytest.warns(UserWarning, match="labels are -1 and 1"):
        jax_bce.linear_loss(x, x.T, np.where(np.eye(4) > 0, 1, -1))


# --- errors --------------------------------------------------------------------------------------

X, W = np.ones((4, 3), np.float32), np.ones((3, 5), np.float32)
Y = np.zeros((4, 5), np.float32)


@pytest.mark.parametrize(
    ("arguments", "keywords", "words"),
    [
        ((X[0], W, Y), {}, ("(3,)", "features[None]")),
        ((X[None], W, Y), {}, ("(1, 4, 3)", "features.reshape(-1, features.shape[-1])")),
        ((X, W.T, Y), {}, ("(5, 3)", "(4, 3)", "use weight.T")),
        ((X, W[:2], Y), {}, ("(2, 5)", "expected (3, labels)")),
        ((X, W, Y.T), {}, ("(5, 4)", "(4, 5)", "transpose(labels, (1, 0))")),
        ((X, W, np.arange(4)), {}, ("(4,)", "(4, 5)", "positives=labels[:, None]")),
        ((X, X.T, np.arange(4)), {}, ("(4,)", "(4, 4)", "positives=labels[:, None]")),
        ((X, W, np.zeros((4, 2), int)), {}, ("(4, 2)", "(4, 5)", "positives=labels.")),
        ((X, W, Y[:, 0]), {}, ("(4,)", "jnp.broadcast_to(labels[:, None], (4, 5))")),
        ((X, W, Y), {"bias": X[0]}, ("bias of shape (3,)", "(5,)")),
        ((X, W, Y), {"scale": X[0]}, ("scale must be one number", "(3,)")),
        ((X, W, Y), {"class_weight": X[0]}, ("class_weight of shape (3,)", "(4, 5)")),
        ((X, W, Y), {"sample_weight": W[0]}, ("(5,)", "class_weight=sample_weight")),
        ((X, W, Y), {"reduction": "none"}, ("4 x 5", "axis=1", "jax_bce.loss")),
        ((X, W, Y), {"reduction": None}, ("None", "4 x 5", "axis=1")),
        ((X, W, Y), {"axis": 0}, ("axis=0", "axis=1", "jax_bce.loss")),
        ((X, W, Y), {"axis": ()}, ("axis=()", "axis=1")),
        ((X, W, Y), {"axis": 2}, ("axis 2 is out of range",)),
        ((X, W, Y), {"block_bytes": 0}, ("block_bytes", "0")),
        ((X, W, Y), {"block_bytes": 1e6}, ("block_bytes", "1000000.0")),
        ((X, W), {"positives": np.arange(4)}, ("(4,)", "positives[:, None]")),
        ((X, W), {"positives": np.zeros((3, 2), int)}, ("(3, 2)", "4 rows", "(4, k)")),
        ((X, W), {"positives": [[0], [1], [5], [1]]}, ("0 to 4", "got 5")),
        ((X, W), {"positives": [[0], [1], [-2], [1]]}, ("or -1", "got -2")),
        ((X, W), {"positives": [np.arange(2), np.arange(1)]}, ("(2,)", "(1,)", "pad all with -1")),
        ((X, W), {"positives": np.full((4, 1), 2**32)}, ("0 to 4", "got 4294967296")),
        ((X, W), {"positives": np.eye(4, 5, dtype=int)}, ("(4, 5)", "0 and 1", "as labels")),
        (
            (X, W),
            {"positives": np.zeros((4, 1), int), "ignore_label": -1},
            ("ignore_label=-1", "positives", "where"),
        ),
        ((X, W, Y), {"label_smoothing": 2.0}, ("label_smoothing", "from 0 to 1")),
        ((X, W, Y), {"where": X[:3, 0] > 0}, ("where of shape (3,)", "(4, 5)")),
        ((X, W, Y), {"implementation": "gpu"}, ("implementation", "'gpu'")),
    ],
    ids=lambda value: None,
)
def test_value_errors(arguments: tuple, keywords: dict[str, Any], words: tuple[str, ...]) -> None:
    with pytest.raises(ValueError, match=re.escape(words[0])) as caught:
        jax_bce.linear_loss(*arguments, **keywords)
    for word in words:
        assert word in str(caught.value)


@pytest.mark.parametrize(
    ("arguments", "keywords", "words"),
    [
        ((X, W), {}, ("either labels or positives", "neither")),
        ((X, W, Y), {"positives": np.zeros((4, 1), int)}, ("either", "both")),
        ((np.ones((4, 3), int), W, Y), {}, ("features", "int", "float32")),
        ((X, W.astype(complex), Y), {}, ("weight", "complex")),
        ((X, W), {"positives": np.zeros((4, 1))}, ("float64", "positives.astype(jnp.int32)")),
        ((X, W), {"positives": Y > 0}, ("positives", "bool: pass a matrix of 0 and 1 as labels")),
        ((X, W, Y), {"axis": [[1]]}, ("axis must be an int", "[[1]]")),
        ((X, W, Y), {"precision": {}}, ("precision", "{}", "'highest'")),
        ((X, W, Y), {"where": np.ones(4)}, ("where", "bool")),
        ((X, W, Y), {"residuals": "recompute"}, ("residuals",)),
    ],
    ids=lambda value: None,
)
def test_type_errors(arguments: tuple, keywords: dict[str, Any], words: tuple[str, ...]) -> None:
    with pytest.raises(TypeError, match=re.escape(words[0])) as caught:
        jax_bce.linear_loss(*arguments, **keywords)
    for word in words:
        assert word in str(caught.value)


def test_a_missing_kernel(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("jax_bce._arguments.missing", lambda platform: "for a reason")
    with pytest.raises(RuntimeError, match="'cuda' is not available: for a reason"):
        jax_bce.linear_loss(X, W, Y, implementation="cuda")


def test_traced_indices_that_are_out_of_range_are_padding() -> None:
    positives = np.array([[0, -1], [1, -1], [2, -1], [3, -1]])
    loss = jax.jit(lambda positives: jax_bce.linear_loss(X, W, positives=positives))
    for padding in (-1, -7, 5, 2**31 - 1):
        assert loss(np.where(positives < 0, padding, positives)) == loss(positives)


def test_a_traced_index_is_not_cut_to_32_bits() -> None:
    with jax.enable_x64(True):
        loss = jax.jit(lambda positives: jax_bce.linear_loss(X, W, positives=positives))
        for padding in (2**32, -(2**32), 2**62):
            assert loss(np.full((4, 1), padding)) == loss(np.full((4, 1), -1))


def test_precisions_in_a_list() -> None:
    found, wanted = (
        jax_bce.linear_loss(X, W, Y, precision=kind(["highest"] * 2)) for kind in (list, tuple)
    )
    assert found == wanted


def test_case_can_be_changed() -> None:
    """The tests' own reference: another label has another loss."""
    case = Case(layer(3, 4, 2))
    other = replace(case, arrays=case.arrays | {"labels": 1 - case.arrays["labels"]})
    assert expected(case)[0] != expected(other)[0]
