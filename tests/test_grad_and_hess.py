"""First and second derivatives, for boosting: their values, in one pass, and their derivatives."""

from collections.abc import Callable
from functools import partial

import hlo
import jax
import jax.numpy as jnp
import numpy as np
import oracle
import platforms
import pytest
from jax.sharding import AxisType, NamedSharding, PartitionSpec
from oracle import BFLOAT16, FLOAT16, FLOAT32, FLOAT64

import jax_bce

pytestmark = pytest.mark.any_jax

LABELS = {"hard": (0.0, 1.0), "soft": (0.1, 0.9)}


@pytest.fixture(params=platforms.PLATFORMS, autouse=True)
def anywhere(request: pytest.FixtureRequest):
    """A kernel computes them on a CPU, XLA elsewhere."""
    with platforms.on(request.param):
        yield


def bound(platform: str, dtype: np.dtype, weights: int = 0) -> float:
    """The kernel's Hessian is as accurate as its gradient; XLA's is no contract."""
    if platform != "cpu":
        return oracle.DERIVATIVE[dtype.name] + oracle.FACTOR * weights
    of_gradient = oracle.TOLERANCE["cpu"].elements[dtype.name, "hard"].gradient
    return of_gradient + oracle.ulp_of_arithmetic(dtype) * weights


def check_hessians(
    check, platform: str, logits: np.ndarray, labels: np.ndarray, pos_weight: float | None = None
) -> None:
    _, hessian = jax_bce.grad_and_hess(logits, labels, pos_weight=pos_weight)
    exact = oracle.exact(logits, labels, pos_weight=pos_weight or 1.0).hessian
    check.ulps(
        "hessian, for boosting",
        hessian,
        exact,
        bound(platform, logits.dtype, weights=pos_weight is not None),
        flushes=platform != "cpu",
        inputs=(logits, labels),
    )


@pytest.mark.parametrize("pos_weight", [None, 0.75])
@pytest.mark.parametrize("labels", ["hard", "soft"])
def test_values(check, platform: str, dtype: np.dtype, labels: str, pos_weight) -> None:
    x = oracle.chosen_logits(dtype) if labels == "hard" else oracle.random_logits(dtype, 300, 0, 9)
    x = x[np.isfinite(x.astype(np.float64))]
    y = oracle.random_labels(np.uint8 if labels == "hard" else dtype, x.shape, 1)
    gradient, hessian = jax_bce.grad_and_hess(x, y, pos_weight=pos_weight)
    assert gradient.dtype == hessian.dtype == dtype
    expected = oracle.exact(x, y, pos_weight=pos_weight or 1.0)
    allowed = oracle.TOLERANCE[platform].elements[dtype.name, labels].gradient
    allowed += oracle.FACTOR * oracle.ulp_of_arithmetic(dtype) * (pos_weight is not None)
    full = oracle.arithmetic_dtype(dtype) == dtype
    scale = expected.gradient_scale if full else None
    check.ulps("gradient, for boosting", gradient, expected.gradient, allowed, scale=scale)
    check_hessians(check, platform, x, y, pos_weight)


@pytest.mark.parametrize("labels", LABELS)
@pytest.mark.parametrize("dtype", [BFLOAT16, FLOAT16], ids=lambda dtype: dtype.name)
def test_every_16_bit_logit(check, platform: str, dtype: np.dtype, labels: str) -> None:
    logits = oracle.every_16_bit(dtype)
    for label in LABELS[labels]:
        check_hessians(check, platform, logits, np.full_like(logits, label))


@pytest.mark.parametrize("pos_weight", [None, 2.7])
@pytest.mark.parametrize("labels", LABELS)
@pytest.mark.parametrize("dtype", [FLOAT32, FLOAT64], ids=lambda dtype: dtype.name)
def test_tails(check, platform: str, dtype: np.dtype, labels: str, pos_weight) -> None:
    """A stride through the logits whose Hessian is neither flat nor 0."""
    many = 2**17 if dtype == FLOAT32 else 2**11
    logits = oracle.walk(dtype, many, low=2.0**-6, high=110 if dtype == FLOAT32 else 760)
    for label in LABELS[labels]:
        check_hessians(check, platform, logits, np.full_like(logits, label), pos_weight)


def test_subnormal_hessians_are_not_flushed(cpu: str) -> None:
    _, hessian = jax_bce.grad_and_hess(np.float32([-88, 95, 103, 200]), 1)
    np.testing.assert_array_equal(hessian, np.exp(np.float64([-88, -95, -103, -200])).astype("f4"))
    assert (np.asarray(hessian)[:3] > 0).all()


@pytest.mark.parametrize("dtype", [FLOAT16, FLOAT32], ids=lambda dtype: dtype.name)
@pytest.mark.parametrize("pos_weight", [None, 3.0])
def test_the_gradient_is_that_of_loss_and_grad(cpu: str, dtype: np.dtype, pos_weight) -> None:
    logits, labels = oracle.chosen_logits(dtype), oracle.random_labels(dtype, 118, 0)
    labels = np.resize(labels, logits.shape)
    options = {"pos_weight": pos_weight, "weight": 0.7}
    gradient, _ = jax_bce.grad_and_hess(logits, labels, **options)
    _, expected = jax_bce.loss_and_grad(logits, labels, reduction="none", **options)
    oracle.assert_same_bits(gradient, expected)


def test_limits(platform: str) -> None:
    logits = np.float32([np.inf, -np.inf, np.nan])
    gradient, hessian = jax_bce.grad_and_hess(logits, np.float32([0, 0.25, 1]), pos_weight=2.0)
    np.testing.assert_array_equal(gradient, [1, -0.5, np.nan])
    np.testing.assert_array_equal(hessian, [0, 0, np.nan])
    for floor, expected in ((0.5, [0.5, 0.5, np.nan]), (np.nan, [np.nan] * 3)):
        floored = jax.jit(lambda x, f: jax_bce.grad_and_hess(x, 1, hess_floor=f)[1])
        np.testing.assert_array_equal(floored(logits, np.float32(floor)), expected)


@pytest.mark.parametrize("floor", ["number", "one per class", "one per element"])
@pytest.mark.parametrize("soft", [False, True])
def test_are_weighted(check, platform: str, dtype: np.dtype, floor: str, soft: bool) -> None:
    """The floor comes after pos_weight and before the other weights: where those are 0, it is 0."""
    shape = (70, 5)
    x = oracle.random_logits(dtype, shape, 0, 20)
    y = oracle.random_labels(dtype if soft else np.uint8, shape, 1)
    weight = np.array([1, 0, 2, 0.5, 3], FLOAT32)
    sample_weight = np.resize(np.array([0.5, 1, 0, 3], FLOAT32), 70)
    pos_weight = np.array([0.25, 1, 3, 0.5, 7], FLOAT32)
    floors = {
        "number": FLOAT32.type(1e-3),
        "one per class": np.float32([0, 1e-3, 1e-16, 0.5, 1e-2]),
        "one per element": np.random.default_rng(0).uniform(0, 0.5, shape).astype(FLOAT32),
    }
    factor = (weight * sample_weight[:, None]).astype(np.float64)
    found = jax_bce.grad_and_hess(
        x,
        y,
        weight=weight,
        sample_weight=sample_weight,
        pos_weight=pos_weight,
        hess_floor=floors[floor],
    )
    expected = oracle.exact(x, y, pos_weight=pos_weight)
    hessian = np.asarray(expected.hessian).astype(np.float64)
    assert (hessian < floors[floor]).any()
    floored = np.maximum(hessian, floors[floor].astype(np.float64)) * factor
    allowed = bound(platform, dtype, weights=3)
    check.ulps("weighted hessian, for boosting", found[1], floored, allowed)
    if not soft:
        gradient = np.asarray(expected.gradient).astype(np.float64) * factor
        allowed = oracle.TOLERANCE[platform].elements[dtype.name, "hard"].gradient
        allowed += 2 * oracle.FACTOR * oracle.ulp_of_arithmetic(dtype)
        check.ulps("weighted gradient, for boosting", found[0], gradient, allowed)


@pytest.mark.parametrize("option", ["weight", "pos_weight"])
def test_the_floor_comes_between_pos_weight_and_weight(
    check, platform: str, dtype: np.dtype, option: str
) -> None:
    """With hard labels and a single weight, which the kernel treats as a case of its own."""
    x, y = oracle.random_logits(dtype, 700, 0, 8), oracle.random_labels(np.uint8, 700, 1)
    numbers = np.resize(np.array([0.25, 3, 1, 7, 0], FLOAT32), 700)
    floor = FLOAT32.type(1e-2)
    _, hessian = jax_bce.grad_and_hess(x, y, hess_floor=floor, **{option: numbers})
    weighs = option == "weight"
    exact = np.asarray(oracle.exact(x, y, pos_weight=1 if weighs else numbers).hessian)
    expected = np.maximum(exact.astype(np.float64), np.float64(floor))
    expected *= numbers.astype(np.float64) if weighs else 1
    allowed = bound(platform, dtype, weights=1)
    check.ulps("floored hessian, for boosting", hessian, expected, allowed, inputs=(x, y))


def test_of_one_label_and_no_logits() -> None:
    gradient, hessian = jax_bce.grad_and_hess(np.zeros((0, 3), FLOAT32), 1)
    assert gradient.shape == hessian.shape == (0, 3)
    np.testing.assert_array_equal(jax_bce.grad_and_hess(np.float32(0), 1), [-0.5, 0.25])


@pytest.mark.parametrize("dtype", [BFLOAT16, FLOAT32], ids=lambda dtype: dtype.name)
def test_are_one_pass(cpu: str, dtype: np.dtype) -> None:
    size = 2**20
    x, y = (jax.ShapeDtypeStruct((size,), kind) for kind in (dtype, np.uint8))
    weight = jax.ShapeDtypeStruct((size,), FLOAT32)

    def derivatives(x, y, weight, floor):
        return jax_bce.grad_and_hess(x, y, sample_weight=weight, hess_floor=floor)

    compiled = jax.jit(derivatives).lower(x, y, weight, 1e-16).compile()
    assert hlo.passes(compiled, size) == ["jax_bce_v3_hess_and_grad"]
    assert compiled.memory_analysis().temp_size_in_bytes < 2**20


def test_vmap_is_one_call(cpu: str) -> None:
    x, y = oracle.random_logits(FLOAT32, (4, 9), 0), oracle.random_labels(np.uint8, (4, 9), 1)
    floors = np.float32([0, 0.1, 0.2, 0.25])
    mapped = jax.jit(jax.vmap(lambda x, y, f: jax_bce.grad_and_hess(x, y, hess_floor=f)))
    compiled = mapped.lower(x, y, floors).compile()
    assert hlo.kernel_calls(compiled) == ["jax_bce_v3_hess_and_grad"]
    expected = jax_bce.grad_and_hess(x, y, hess_floor=np.broadcast_to(floors[:, None], x.shape))
    oracle.assert_same_bits(mapped(x, y, floors), expected)


@pytest.mark.parametrize("kind", [AxisType.Auto, AxisType.Explicit])
def test_shards_stay_where_they_are(cpu: str, kind: AxisType) -> None:
    mesh = jax.make_mesh((8,), ("i",), axis_types=(kind,))
    spec = NamedSharding(mesh, PartitionSpec("i"))
    x, y = oracle.random_logits(FLOAT32, (16, 40), 0), oracle.random_labels(FLOAT32, (16, 40), 1)
    function = jax.jit(partial(jax_bce.grad_and_hess, pos_weight=2.0, hess_floor=1e-3))
    expected = function(x, y)
    with jax.set_mesh(mesh):
        operands = jax.device_put(x, spec), jax.device_put(y, spec)
        compiled = function.lower(*operands).compile()
        found = compiled(*operands)
    assert hlo.collectives(compiled) == []
    assert all(result.sharding.is_equivalent_to(spec, 2) for result in found)
    oracle.assert_same_bits(tuple(map(np.asarray, found)), tuple(map(np.asarray, expected)))


def formula(x, y, w, q, floor):
    """In plain jnp, with the derivatives that JAX finds."""
    n, p, s = 1 - y, q * y, jax.nn.sigmoid
    return w * (n * s(x) - p * s(-x)), w * jnp.maximum((n + p) * s(x) * s(-x), floor)


def derivatives(x, y, w, q, floor):
    return jax_bce.grad_and_hess(x, y, weight=w, pos_weight=q, hess_floor=floor)


OPERANDS = (
    np.float32([[-3, -0.5, 0.25, 2], [7, -6, 1, 0.125]]),
    np.float32([[0, 1, 0.25, 1], [0, 0.75, 1, 0]]),
    np.float32([1, 0.5, 2, 3]),
    np.float32([2, 1, 0.5, 3]),
    np.float32([[0.01, 0.0, 0.5, 0.05]]),
)


def _jacobians(transform: Callable) -> Callable:
    return lambda f: transform(f, argnums=tuple(range(5)))


MODES = {
    "reverse": _jacobians(jax.jacrev),
    "forward": _jacobians(jax.jacfwd),
    "forward over reverse": lambda f: _jacobians(jax.jacfwd)(_jacobians(jax.jacrev)(f)),
    "the floor alone": lambda f: jax.jacrev(f, argnums=4),
}


def assert_close(found: object, expected: object) -> None:
    for one, other in zip(jax.tree.leaves(found), jax.tree.leaves(expected), strict=True):
        np.testing.assert_allclose(one, other, **oracle.FOCAL_MODES)


@pytest.mark.parametrize("mode", MODES)
def test_derivatives(platform: str, mode: str) -> None:
    assert_close(*(jax.jit(MODES[mode](f))(*OPERANDS) for f in (derivatives, formula)))


def test_derivatives_where_only_the_floor_is_mapped(platform: str) -> None:
    floors = np.float32([[[0.01, 0, 0.5, 0.05]], [[0, 0.3, 0, 0]]])

    def mapped(f: Callable) -> Callable:
        over_floors = jax.vmap(f, in_axes=(None,) * 4 + (0,))
        return jax.jit(_jacobians(jax.jacrev)(over_floors))

    assert_close(*(mapped(f)(*OPERANDS[:4], floors) for f in (derivatives, formula)))


def test_boosting_lowers_the_loss() -> None:
    """Stumps as XGBoost grows them: a leaf moves by - sum of gradients / sum of second ones."""
    rng = np.random.default_rng(0)
    features = rng.normal(size=(400, 5))
    labels = (features[:, 0] - features[:, 1] + rng.normal(0, 0.5, 400) > 0).astype(np.uint8)
    scores, losses = np.zeros(400, FLOAT32), []
    for step in range(10):
        losses.append(float(jax_bce.loss(scores, labels)))
        gradient, hessian = map(np.asarray, jax_bce.grad_and_hess(scores, labels, hess_floor=1e-16))
        for leaf in (mask := features[:, step % 2] > 0), ~mask:
            scores[leaf] -= gradient[leaf].sum() / (hessian[leaf].sum() + 1)
    assert (np.diff(losses) < 0).all()
