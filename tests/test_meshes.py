"""On several devices, elements stay where they are, and the results are those of one device.

Eight devices of a CPU, as a mesh of four by two: operands spread by jit, on automatic and explicit
axes, and by shard_map. A mean costs the call of the kernel on each device's own elements and one
number to be added up; no operand is gathered.
"""

import functools
import re
from collections.abc import Callable, Iterator
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import oracle
import pytest
from hlo import collectives, kernel_calls
from jax.sharding import AxisType, Mesh, NamedSharding, PartitionSpec
from oracle import BFLOAT16, FLOAT16, FLOAT32
from platforms import QUICKLY

import jax_bce
from jax_bce import _call

pytestmark = pytest.mark.quickly

P = PartitionSpec
AXES = {"data": 4, "model": 2}
SHAPE = (16, 64)
SPECS = [
    P(),
    P("data"),
    P("model"),
    P(("data", "model")),
    P(None, "model"),
    P(None, ("data", "model")),
    P("data", "model"),
    P("model", "data"),
]
REDUCTIONS = {
    "none": {"reduction": "none"},
    "sum": {"reduction": "sum"},
    "mean": {"reduction": "mean"},
    "rows": {"axis": 1},
    "columns": {"axis": 0},
    "recompute": {"residuals": "recompute"},
}
every_spec = pytest.mark.parametrize("spec", SPECS, ids=str)
some_specs = pytest.mark.parametrize("spec", [P("data"), P("data", "model")], ids=str)


def mesh_of(kind: AxisType) -> Mesh:
    return jax.make_mesh(
        tuple(AXES.values()), tuple(AXES), (kind,) * len(AXES), devices=jax.devices("cpu")
    )


@pytest.fixture(params=[AxisType.Auto, AxisType.Explicit], ids=lambda kind: kind.name)
def mesh(request: pytest.FixtureRequest, cpu: str) -> Iterator[Mesh]:
    mesh = mesh_of(request.param)
    with jax.set_mesh(mesh):
        yield mesh


@pytest.fixture
def auto(cpu: str) -> Mesh:
    return mesh_of(AxisType.Auto)


@pytest.fixture
def explicit(cpu: str) -> Iterator[Mesh]:
    mesh = mesh_of(AxisType.Explicit)
    with jax.set_mesh(mesh):
        yield mesh


def inputs(shape=SHAPE, dtype=FLOAT32, label_dtype=FLOAT32) -> tuple[np.ndarray, np.ndarray]:
    return oracle.random_logits(dtype, shape, 1), oracle.random_labels(label_dtype, shape, 2)


def put(mesh: Mesh, operands: tuple, *specs: PartitionSpec) -> tuple[jax.Array, ...]:
    """The operands spread as the specs say, or all of them as the only one does."""
    specs = specs * len(operands) if len(specs) == 1 else specs
    pairs = zip(operands, specs, strict=True)
    return tuple(jax.device_put(x, NamedSharding(mesh, spec)) for x, spec in pairs)


def derivatives(**keywords: Any) -> Callable:
    """The loss, its gradient, and the Hessian times the logits where a second order exists."""

    def objective(x: jax.Array, y: jax.Array) -> jax.Array:
        return jnp.sum(jax_bce.loss(x, y, **keywords))

    def results(x: jax.Array, y: jax.Array) -> dict[str, jax.Array]:
        loss = jax_bce.loss(x, y, **keywords)
        gradient = jax.grad(objective)(x, y)
        found = {"loss": loss, "gradient": gradient}
        if keywords.get("residuals") != "recompute":
            found["product"] = jax.jvp(lambda x: jax.grad(objective)(x, y), (x,), (x,))[1]
        return found

    return results


def assert_same(actual: Any, expected: Any, rounding: float = 0.0) -> None:
    """The same bits, or where sums are added up in another order, up to rounding."""

    def compare(a: jax.Array, b: jax.Array) -> None:
        tolerance = rounding * float(jnp.finfo(a.dtype).eps)
        np.testing.assert_allclose(
            np.asarray(a, np.float64), np.asarray(b, np.float64), rtol=tolerance, atol=0
        )

    jax.tree.map(compare, actual, expected)


def summed_over(spec: PartitionSpec, reduced: tuple[int, ...]) -> int:
    """How many all-reduces XLA needs: one for each spread dimension that is summed."""
    return sum(dimension in reduced and axes is not None for dimension, axes in enumerate(spec))


@functools.cache
def on_one_device(reduction: str) -> dict[str, jax.Array]:
    return jax.jit(derivatives(**REDUCTIONS[reduction]))(*inputs())


@every_spec
@pytest.mark.parametrize("reduction", REDUCTIONS)
def test_as_on_one_device(mesh: Mesh, reduction: str, spec: PartitionSpec) -> None:
    """One number is sent where all dimensions are summed, or one a row; all else stays."""
    spread = put(mesh, inputs(), spec)
    compiled = jax.jit(derivatives(**REDUCTIONS[reduction])).lower(*spread).compile()
    results, expected = compiled(*spread), dict(on_one_device(reduction))
    oracle.assert_same_bits(results["gradient"], expected["gradient"])
    if "product" in expected:  # which is XLA's
        product = results.pop("product"), expected.pop("product")
        assert_same(*product, oracle.OTHER_VECTORS)
    assert_same(results, expected)
    assert results["gradient"].sharding.is_equivalent_to(spread[0].sharding, 2)

    reduced = {"none": (), "rows": (1,), "columns": (0,)}.get(reduction, (0, 1))
    sent = collectives(compiled)
    assert len(sent) == summed_over(spec, reduced)
    assert all(re.match(r"all-reduce f64\[", what) for what in sent)
    if len(reduced) == 2:
        assert set(sent) <= {"all-reduce f64[]"}


def test_one_call_with_a_devices_own_elements(auto: Mesh) -> None:
    spread = put(auto, inputs(), P("data", "model"))
    compiled = jax.jit(jax.value_and_grad(jax_bce.loss)).lower(*spread).compile()
    assert kernel_calls(compiled) == ["jax_bce_v3_loss_and_grad"]
    (call,) = re.findall(r"= \((.*?)\) custom-call\(", compiled.as_text())
    assert re.findall(r"f\d\d\[[\d,]*\]", call) == ["f64[2,4,1]", "f32[4,4,8]"]


def test_the_reader_sees_gathering(auto: Mesh) -> None:
    spread = put(auto, inputs(), P("data"))
    everywhere = NamedSharding(auto, P())
    compiled = jax.jit(lambda x, y: x + y, out_shardings=everywhere).lower(*spread).compile()
    assert [what.split()[0] for what in collectives(compiled)] == ["all-gather"]


@some_specs
def test_xla_path(mesh: Mesh, spec: PartitionSpec) -> None:
    """The fallback of other platforms is spread by XLA itself."""
    spread = put(mesh, inputs(), spec)
    keywords = {"implementation": "xla"}
    compiled = jax.jit(derivatives(**keywords)).lower(*spread).compile()
    assert_same(compiled(*spread), jax.jit(derivatives(**keywords))(*inputs()), rounding=16)
    assert len(collectives(compiled)) == summed_over(spec, (0, 1))


@some_specs
def test_without_jit(mesh: Mesh, spec: PartitionSpec) -> None:
    spread = put(mesh, inputs(), spec)
    value, gradient = jax.value_and_grad(jax_bce.loss)(*spread)
    expected = on_one_device("mean")
    assert_same(value, expected["loss"])
    oracle.assert_same_bits(gradient, expected["gradient"])


DIFFERENT = [
    (P("data"), P()),
    (P(), P("data")),
    (P("data"), P(None, "model")),
    (P("data", "model"), P("data")),
    (P("data"), P("data", "model")),
]


@pytest.mark.parametrize(("of_logits", "of_labels"), DIFFERENT, ids=str)
@pytest.mark.parametrize("residuals", ["gradient", "recompute"])
def test_operands_spread_differently(
    mesh: Mesh, residuals: str, of_logits: PartitionSpec, of_labels: PartitionSpec
) -> None:
    """Gradients come back as their arguments are spread on explicit axes."""
    spread = put(mesh, inputs(), of_logits, of_labels)
    loss = partial(jax_bce.loss, residuals=residuals)
    function = jax.jit(jax.value_and_grad(loss, argnums=(0, 1)))
    value, gradients = function(*spread)
    expected, (by_logits, by_labels) = jax.jit(function)(*inputs())
    assert_same(value, expected)
    oracle.assert_same_bits(gradients[0], by_logits)
    assert_same(gradients[1], by_labels, rounding=2)
    if mesh.axis_types[0] == AxisType.Explicit:
        for gradient, operand in zip(gradients, spread, strict=True):
            assert gradient.sharding.is_equivalent_to(operand.sharding, 2)


@pytest.mark.parametrize(
    ("of_logits", "of_labels"), [(P("data"), P("model")), (P("data"), P(None, "data"))], ids=str
)
@pytest.mark.parametrize("transform", [lambda f: f, jax.grad], ids=["loss", "grad"])
def test_what_does_not_fit_together_is_refused(
    explicit: Mesh, transform: Callable, of_logits: PartitionSpec, of_labels: PartitionSpec
) -> None:
    logits, labels = put(explicit, inputs(), of_logits, of_labels)
    with pytest.raises(ValueError, match=r"'data'.* and labels as .* jax\.sharding\.reshard"):
        transform(jax_bce.loss)(logits, labels)
    fixed = jax.sharding.reshard(labels, jax.typeof(logits).sharding)
    assert_same(jax_bce.loss(logits, fixed), on_one_device("mean")["loss"])


UNEVEN = [
    ((10, 64), P("data")),
    ((16, 10), P(None, ("data", "model"))),
    ((16, 10), P("data", "model")),
    ((13, 7), P("data", "model")),
    ((1003,), P(("data", "model"))),
    ((3, 3, 5), P(None, "data", "model")),
    ((3,), P("data")),
]


@pytest.mark.parametrize(("shape", "spec"), UNEVEN, ids=str)
@pytest.mark.parametrize("reduction", ["none", "mean", "columns", "recompute"])
def test_uneven(auto: Mesh, reduction: str, shape: tuple, spec: PartitionSpec) -> None:
    """Where dimensions do not divide, elements may have to be gathered; nothing else changes."""
    place = partial(jax.lax.with_sharding_constraint, shardings=NamedSharding(auto, spec))
    function = derivatives(**REDUCTIONS[reduction])

    def spread(x: jax.Array, y: jax.Array) -> dict[str, jax.Array]:
        return function(place(x + 1), place(y))

    logits, labels = inputs(shape)
    results = jax.jit(spread)(*put(auto, (logits, labels), P()))
    expected = jax.jit(function)(logits + 1, labels)
    assert_same(results, expected, rounding=2)
    oracle.assert_same_bits(results["gradient"], expected["gradient"])


def test_uneven_rows_stay(auto: Mesh) -> None:
    """Ten rows on four devices: those that are short of one evaluate padding, which is dropped."""
    place = partial(jax.lax.with_sharding_constraint, shardings=NamedSharding(auto, P("data")))
    operands = inputs((10, 64))

    def spread(x: jax.Array, y: jax.Array) -> jax.Array:
        return jax_bce.loss(place(x), place(y))

    compiled = jax.jit(spread).lower(*put(auto, operands, P())).compile()
    assert collectives(compiled) == ["all-reduce f64[]"]
    assert_same(compiled(*put(auto, operands, P())), jax_bce.loss(*operands))


@pytest.mark.parametrize(
    ("shape", "reduced_rank", "devices", "expected"),
    [
        ((16, 64), 2, 8, (16, 8, 8)),
        ((16, 64), 1, 8, (16, 8, 8)),
        ((16, 64), 0, 8, (16, 64, 1)),
        ((16, 10), 2, 8, (16, 2, 5)),
        ((16, 9), 2, 8, (8, 18)),
        ((4096, 1), 2, 16, (16, 256)),
        ((8, 3, 4), 3, 8, (8, 3, 4, 1)),
        ((5, 6, 7), 2, 8, (5, 2, 21)),
        ((5, 7), 2, 8, (35,)),
        ((1_000_000, 8), 2, 8, (8, 1_000_000)),
        ((1_000_000, 8), 1, 8, (1_000_000, 8)),
        ((4096, 8), 2, 8, (4096, 8, 1)),
        ((1_000_000, 256), 2, 8, (1_000_000, 8, 32)),
        ((), 0, 8, (1,)),
        ((0, 3), 2, 8, (8, 0)),
    ],
    ids=str,
)
def test_split_shape(shape: tuple, reduced_rank: int, devices: int, expected: tuple) -> None:
    """Every number of equal parts that the devices can ask for is there, and no more.

    But many short rows stay whole.
    """
    assert _call.split_shape(shape, reduced_rank, devices) == expected


@pytest.mark.parametrize(
    ("shape", "keywords", "expected"),
    [
        ((64, 48), {}, 3),  # (64, 8, 6): each device's elements are one row
        ((64, 16, 48), {}, 4),
        ((10, 48), {}, 1),  # XLA may pad the rows, and the kernel would add the padding
        ((64, 13, 48), {}, 1),
        ((64, 48), {"axis": 1}, 1),
        ((64, 48), {"reduction": "none"}, 0),
    ],
    ids=str,
)
def test_whole_rows(auto: Mesh, shape: tuple, keywords: dict, expected: int) -> None:
    """How many dimensions of the blocks the kernel sums; and what it sums, for every spec."""
    operands = inputs(shape)
    function = jax.value_and_grad(lambda x, y: jnp.sum(jax_bce.loss(x, y, **keywords)))
    value, gradient = function(*operands)
    for spec in (P(), P("data"), P(None, "model"), P("data", "model")):
        if any(size % 4 for size in shape) and spec != P():
            continue
        spread = put(auto, operands, spec)
        lowered = jax.jit(function).lower(*spread)
        ranks = re.findall(r"reduced_rank = (\d+)", lowered.as_text())
        assert ranks == [str(expected)]
        compiled = lowered.compile()
        assert {what.split()[0] for what in collectives(compiled)} <= {"all-reduce"}
        found, slopes = compiled(*spread)
        assert_same(found, value, rounding=2)
        oracle.assert_same_bits(slopes, gradient)


def test_many_short_rows(auto: Mesh) -> None:
    """Where they lie whole, nothing is gathered; where they do not, the results are the same."""
    operands = inputs((8192, 8))
    function = jax.value_and_grad(jax_bce.loss)
    expected = jax.jit(function)(*operands)
    for spec, sent in (
        (P(("data", "model")), {"all-reduce"}),
        (P("data", "model"), {"all-gather"}),
    ):
        spread = put(auto, operands, spec)
        compiled = jax.jit(function).lower(*spread).compile()
        value, gradient = compiled(*spread)
        assert_same(value, expected[0])
        oracle.assert_same_bits(gradient, expected[1])
        assert {what.split()[0] for what in collectives(compiled)} >= sent
        assert (spec == P(("data", "model"))) == (collectives(compiled) == ["all-reduce f64[]"])


def test_loss_and_grad_as_logits_are_spread(explicit: Mesh) -> None:
    """Like the gradient of jax.grad, where labels are spread over more axes."""
    for of_logits, of_labels in ((P(), P("data")), (P("data"), P("data", "model"))):
        spread = put(explicit, inputs(), of_logits, of_labels)
        _, gradient = jax.jit(jax_bce.loss_and_grad)(*spread)
        assert jax.typeof(gradient) == jax.typeof(spread[0])


def test_unreduced_is_refused(explicit: Mesh) -> None:
    logits, labels = put(explicit, inputs(), P("data"))
    unreduced = P("data", None, unreduced={"model"})
    product = partial(jnp.einsum, "ij,jk->ik", out_sharding=unreduced)

    def loss(x: jax.Array, y: jax.Array) -> jax.Array:
        weights = jax.sharding.reshard(jnp.ones((64, 64)), P("model", None))
        return jax_bce.loss(product(jax.sharding.reshard(x, P("data", "model")), weights), y)

    with pytest.raises(ValueError, match=r"unreduced .* jax\.sharding\.reshard"):
        jax.jit(loss)(logits, labels)


@pytest.mark.parametrize("dtype", [BFLOAT16, FLOAT16, oracle.FLOAT64], ids=str, indirect=True)
def test_dtypes(auto: Mesh, dtype: np.dtype) -> None:
    """Labels are still read as stored: nothing is converted on the way."""
    operands = inputs((16, 512), dtype, np.dtype(np.uint8))
    spread = put(auto, operands, P("data", "model"))
    function = jax.value_and_grad(jax_bce.loss)
    compiled = jax.jit(function).lower(*spread).compile()
    value, gradient = compiled(*spread)
    expected = jax.jit(function)(*operands)
    assert_same(value, expected[0], rounding=4 if dtype == oracle.FLOAT64 else 1)
    oracle.assert_same_bits(gradient, expected[1])
    assert "u8[4,4,64]" in compiled.as_text()
    assert set(collectives(compiled)) == {"all-reduce f64[]"}


def test_one_label_for_all(auto: Mesh) -> None:
    logits, _ = inputs()
    (spread,) = put(auto, (logits,), P("data", "model"))
    function = jax.value_and_grad(jax_bce.loss)
    compiled = jax.jit(function).lower(spread, 1).compile()
    assert_same(compiled(spread, 1), function(logits, 1))
    assert set(collectives(compiled)) == {"all-reduce f64[]"}


def test_smoothing_and_its_derivative(mesh: Mesh) -> None:
    def loss(x: jax.Array, y: jax.Array, smoothing: jax.Array) -> jax.Array:
        return jax_bce.loss(x, y, label_smoothing=smoothing)

    function = jax.jit(jax.value_and_grad(loss, argnums=(0, 2)))
    spread = put(mesh, inputs(), P("data", "model"))
    value, (by_logits, by_smoothing) = function(*spread, 0.1)
    expected = function(*inputs(), 0.1)
    assert_same((value, by_smoothing), (expected[0], expected[1][1]), rounding=16)
    oracle.assert_same_bits(by_logits, expected[1][0])


EMPTY = [((0,), P()), ((16, 0), P("data")), ((0, 64), P(None, "model"))]
OPTIONS = REDUCTIONS | {
    "rows": {"axis": -1},
    "kept": {"axis": ()},
    "by name": {"implementation": "cpu"},
    "denominator": {"normalizer": 0.0},
    "smoothed": {"label_smoothing": 0.1},
    "ignored": {"ignore_label": 1},
    "weighted": {"weight": 2.0, "reduction": "weighted_mean"},
}


@pytest.mark.parametrize(("shape", "spec"), EMPTY, ids=str)
@pytest.mark.second
def test_no_elements(mesh: Mesh, shape: tuple, spec: PartitionSpec) -> None:
    """0, or nothing, as on one device: with every option, modifier and derivative."""

    def results(x: jax.Array, y: jax.Array, weight: jax.Array, where: jax.Array) -> dict:
        found: dict[str, Any] = {name: derivatives(**OPTIONS[name])(x, y) for name in OPTIONS}
        modified = {"where": where, "reduction": "weighted_mean"}
        found["modified"] = derivatives(weight=weight, axis=-1, **modified)(x, y)
        total = partial(jax_bce.loss, x, y, **modified)
        found["by weight"] = jax.grad(lambda weight: total(weight=weight))(weight)
        found["both"] = jax_bce.loss_and_grad(x, y)
        found["mapped"] = jax.vmap(jax.value_and_grad(jax_bce.loss))(x[None], y[None])
        return found

    zeros = np.zeros(shape, FLOAT32)
    operands = (zeros, zeros, zeros, np.ones(shape[:1], bool))
    spread = put(mesh, operands, spec, spec, spec, P(*spec[:1]))
    compiled = jax.jit(results, compiler_options=QUICKLY)
    jax.tree.map(assert_same, compiled(*spread), jax.tree.map(np.zeros_like, compiled(*operands)))


MAPPED = {
    "rows": ((0, 0), P("data", "model"), P("data", "model")),
    "columns": ((1, 1), P("data", "model"), P("data", "model")),
    "logits alone": ((0, None), P("data", "model"), P("model")),
    "labels alone": ((None, 0), P("model"), P("data", "model")),
}


@pytest.mark.parametrize("case", MAPPED)
def test_vmap(mesh: Mesh, case: str) -> None:
    """The mapped axis stays spread over the devices, as one more dimension of the call."""
    in_axes, *specs = MAPPED[case]
    operands = tuple(
        x if axis is not None else x[0] for x, axis in zip(inputs(), in_axes, strict=True)
    )
    spread = put(mesh, operands, *specs)
    function = jax.vmap(jax.value_and_grad(jax_bce.loss), in_axes)
    compiled = jax.jit(function).lower(*spread).compile()
    value, gradient = compiled(*spread)
    expected = jax.jit(function)(*operands)
    assert_same(value, expected[0])
    oracle.assert_same_bits(gradient, expected[1])
    assert len(kernel_calls(compiled)) == 1
    assert [what.split()[0] for what in collectives(compiled)] == ["all-reduce"]


def test_vmap_with_spmd_axis_name(auto: Mesh) -> None:
    function = jax.vmap(jax.value_and_grad(jax_bce.loss), spmd_axis_name="data")
    spread = put(auto, inputs(), P("data"))
    with jax.set_mesh(auto):
        compiled = jax.jit(function).lower(*spread).compile()
    expected = jax.vmap(jax.value_and_grad(jax_bce.loss))(*inputs())
    oracle.assert_same_bits(compiled(*spread), expected)
    assert collectives(compiled) == []


def test_a_spread_model(mesh: Mesh) -> None:
    """Rows of the images on "data", classes on "model": logits are never whole on a device."""
    images, weights = inputs((16, 32))[0], inputs((32, 64))[0]
    labels = inputs()[1]

    def step(weights: jax.Array, images: jax.Array, labels: jax.Array) -> tuple:
        return jax.value_and_grad(lambda w: jax_bce.loss(images @ w, labels))(weights)

    specs = P(None, "model"), P("data"), P("data", "model")
    operands = (weights, images, labels)
    spread = put(mesh, operands, *specs)
    compiled = jax.jit(step).lower(*spread).compile()
    value, gradient = compiled(*spread)
    expected = jax.jit(step)(*operands)
    for actual, wanted in zip((value, gradient), expected, strict=True):
        largest = float(jnp.max(abs(wanted)))
        np.testing.assert_allclose(actual, wanted, 0, atol=oracle.SURROUNDINGS * largest)
    sent = collectives(compiled)
    assert sorted({what.split()[0] for what in sent}) == ["all-reduce"]
    assert not any(re.search(r"\[16,64\]|\[64,16\]", what) for what in sent)


def test_a_donated_gradient_buffer(auto: Mesh) -> None:
    """Donation reuses logits for the updated ones on every device."""
    spread = put(auto, inputs(), P("data", "model"))

    def step(x: jax.Array, y: jax.Array) -> jax.Array:
        return x - jax.grad(jax_bce.loss)(x, y)

    expected = jax.jit(step)(*inputs())
    updated = jax.jit(step, donate_argnums=0)(*spread)
    assert spread[0].is_deleted()
    assert_same(updated, expected)
