"""Every mode and nesting of differentiation gives the exact derivatives, to third order.

Forward and reverse, alone and through jit, scan, while, cond, checkpoint and vmap; with respect to
logits, labels and label smoothing. The memory-lean residuals="recompute" is differentiated once, in
reverse mode, and says so where more is asked.
"""

import json
from collections.abc import Callable
from functools import partial
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import oracle
import pytest
from jax import lax
from jax.ad_checkpoint import checkpoint_name
from oracle import FLOAT32, FLOAT64

import jax_bce

pytestmark = [pytest.mark.any_jax, pytest.mark.quickly]

SHAPE = (2, 3)
# Each way gives the sum of the mean losses of two rows.
FACTOR = 1 / SHAPE[1]
LOGITS = np.array([[-20.0, -1.5, 0.0], [0.7, 3.0, 30.0]], FLOAT32)
LABELS = np.array([[0.0, 1.0, 0.25], [0.9, 0.0, 1.0]], FLOAT32)
Loss = Callable[[jax.Array, jax.Array], jax.Array]


def _rows(loss: Loss, x: jax.Array, y: jax.Array) -> jax.Array:
    return loss(x[0], y[0]) + loss(x[1], y[1])


def _scan(loss: Loss, x: jax.Array, y: jax.Array) -> jax.Array:
    total = jnp.zeros((), oracle.arithmetic_dtype(x.dtype))
    return lax.scan(lambda carry, row: (carry + loss(*row), None), total, (x, y))[0]


def _for(loss: Loss, x: jax.Array, y: jax.Array) -> jax.Array:
    total = jnp.zeros((), oracle.arithmetic_dtype(x.dtype))
    return lax.fori_loop(0, len(x), lambda i, carry: carry + loss(x[i], y[i]), total)


def _while(loss: Loss, x: jax.Array, y: jax.Array) -> jax.Array:
    """A loop of unknown length: JAX has no reverse mode for it."""

    def step(state):
        i, total = state
        return i + 1, total + loss(x[i], y[i])

    start = 0, jnp.zeros((), oracle.arithmetic_dtype(x.dtype))
    return lax.while_loop(lambda state: state[0] < len(x), step, start)[1]


def _cond(loss: Loss, x: jax.Array, y: jax.Array) -> jax.Array:
    return lax.cond(x[0, 0] < 0, partial(_rows, loss), lambda x, y: jnp.sum(x), x, y)


WAYS = {
    "axis": lambda loss, x, y: jnp.sum(loss(x, y, axis=1)),
    "elementwise": lambda loss, x, y: jnp.sum(loss(x, y, reduction="none")) * FACTOR,
    "rows": _rows,
    "jit": lambda loss, x, y: _rows(jax.jit(loss), x, y),
    "vmap": lambda loss, x, y: jnp.sum(jax.vmap(loss)(x, y)),
    "checkpoint": lambda loss, x, y: _rows(jax.checkpoint(loss), x, y),
    "scan": _scan,
    "checkpointed scan": lambda loss, x, y: _scan(jax.checkpoint(loss), x, y),
    "for": _for,
    "cond": _cond,
    "map": lambda loss, x, y: jnp.sum(lax.map(lambda row: loss(*row), (x, y))),
    "while": _while,
}
REVERSIBLE = [way for way in WAYS if way != "while"]


def _linearized(function: Callable) -> Callable:
    def gradient(x: jax.Array) -> jax.Array:
        _, linear = jax.linearize(function, x)
        basis = jnp.eye(x.size, dtype=x.dtype).reshape(x.size, *x.shape)
        return jax.vmap(linear)(basis).reshape(x.shape)

    return gradient


def _pulled_back(function: Callable) -> Callable:
    def gradient(x: jax.Array) -> jax.Array:
        value, pullback = jax.vjp(function, x)
        return pullback(jnp.ones_like(value))[0]

    return gradient


FORWARD = {"jacfwd": jax.jacfwd, "linearize": _linearized}
REVERSE = {"grad": jax.grad, "jacrev": jax.jacrev, "vjp": _pulled_back}
FIRST = FORWARD | REVERSE
HESSIANS = {
    "fwd fwd": lambda function: jax.jacfwd(jax.jacfwd(function)),
    "fwd rev": lambda function: jax.jacfwd(jax.jacrev(function)),
    "rev fwd": lambda function: jax.jacrev(jax.jacfwd(function)),
    "rev rev": lambda function: jax.jacrev(jax.jacrev(function)),
}
THIRDS = {
    "fwd fwd fwd": lambda function: jax.jacfwd(jax.jacfwd(jax.jacfwd(function))),
    "fwd fwd rev": lambda function: jax.jacfwd(jax.jacfwd(jax.jacrev(function))),
    "rev rev rev": lambda function: jax.jacrev(jax.jacrev(jax.jacrev(function))),
}


def combinations(modes: dict[str, Callable]) -> list:
    return [
        pytest.param(way, name, id=f"{way}-{name}")
        for way in WAYS
        for name in modes
        if way in REVERSIBLE or ("rev" not in name and name not in REVERSE)
    ]


@pytest.fixture
def loss(implementation: str) -> Loss:
    return partial(jax_bce.loss, implementation=implementation)


def through(way: str, loss: Loss, labels: np.ndarray = LABELS) -> Callable:
    """The sum of the rows' mean losses as a function of the logits."""
    return lambda x: WAYS[way](loss, x, jnp.asarray(labels))


def diagonal(values: np.ndarray, order: int) -> np.ndarray:
    """The tensor of derivatives of a sum of functions of one variable each."""
    size = values.size
    tensor = np.zeros((size,) * order)
    tensor[(np.arange(size),) * order] = values.ravel()
    return tensor.reshape(values.shape * order)


def check_derivative(check, actual: jax.Array, name: str, factor: float = FACTOR) -> None:
    """The second or third derivative: nothing beside the diagonal."""
    order = {"hessian": 2, "third": 3}[name]
    exact = oracle.exact(LOGITS, LABELS)
    check.ulps(
        f"{name} derivative" if order == 3 else name,
        actual,
        diagonal(getattr(exact, name) * factor, order),
        oracle.DERIVATIVE[actual.dtype.name],
        scale=diagonal(exact.hessian * factor, order),
    )


@pytest.mark.parametrize(("way", "mode"), combinations(FIRST))
def test_first(check, loss, implementation: str, way: str, mode: str) -> None:
    gradient = jax.jit(FIRST[mode](through(way, loss)))(LOGITS)
    check.elements(implementation, LOGITS, LABELS, gradient=gradient, factor=FACTOR, flushes=True)


@pytest.mark.parametrize("mode", FIRST)
def test_first_without_jit(check, loss, implementation: str, mode: str) -> None:
    with jax.disable_jit():
        gradient = FIRST[mode](through("rows", loss))(LOGITS)
    check.elements(implementation, LOGITS, LABELS, gradient=gradient, factor=FACTOR, flushes=True)


@pytest.mark.parametrize(("way", "nesting"), combinations(HESSIANS))
def test_hessian(check, loss, way: str, nesting: str) -> None:
    check_derivative(check, jax.jit(HESSIANS[nesting](through(way, loss)))(LOGITS), "hessian")


@pytest.mark.parametrize(("way", "nesting"), combinations(THIRDS))
@pytest.mark.thorough
def test_third(check, loss, way: str, nesting: str) -> None:
    check_derivative(check, jax.jit(THIRDS[nesting](through(way, loss)))(LOGITS), "third")


@pytest.mark.parametrize("mode", FIRST)
def test_derivatives_of_loss_and_grad(check, implementation: str, mode: str) -> None:
    """The gradient that comes with the loss is differentiable like any other result."""

    def gradient_norm(x: jax.Array) -> jax.Array:
        _, gradient = jax_bce.loss_and_grad(
            x, LABELS, reduction="sum", implementation=implementation
        )
        return jnp.sum(gradient)

    exact = oracle.exact(LOGITS, LABELS).hessian
    actual = jax.jit(FIRST[mode](gradient_norm))(LOGITS)
    check.ulps("hessian", actual, exact, oracle.DERIVATIVE["float32"])


def hessian_vector_products(function: Callable, x: jax.Array, vector: jax.Array) -> dict:
    return {
        "jvp of grad": lambda: jax.jvp(jax.grad(function), (x,), (vector,))[1],
        "vjp of grad": lambda: jax.vjp(jax.grad(function), x)[1](vector)[0],
        "grad of vdot": lambda: jax.grad(lambda x: jnp.vdot(jax.grad(function)(x), vector))(x),
        "grad of jvp": lambda: jax.grad(lambda x: jax.jvp(function, (x,), (vector,))[1])(x),
        "linearized grad": lambda: jax.linearize(jax.grad(function), x)[1](vector),
    }


@pytest.mark.parametrize("name", hessian_vector_products(jnp.sum, None, None))
def test_hessian_vector_product(check, loss, dtype: np.dtype, name: str) -> None:
    """Of many elements, whose Hessian nobody forms; no floor in the tails."""
    logits = oracle.walk(dtype, 500, low=2**-8, high=80.0 if dtype.itemsize > 2 else 15.0)
    vector = oracle.random_logits(dtype, logits.shape, seed=1)
    product = hessian_vector_products(
        lambda x: loss(x, 1, reduction="sum"), jnp.asarray(logits), jnp.asarray(vector)
    )[name]()
    assert product.dtype == dtype
    exact = oracle.exact(logits, 1).hessian * vector.astype(np.float64)
    check.ulps("hessian times vector", product, exact, oracle.DERIVATIVE[dtype.name], flushes=True)


@pytest.mark.parametrize("dtype", [FLOAT32, FLOAT64], ids=str, indirect=True)
def test_published_hessians(check, loss, dtype: np.dtype) -> None:
    cases = json.loads(Path(__file__).with_name("cases.json").read_text())
    cases = [case for case in cases if case["id"].startswith("E") and "hess" in case["expected"]]
    exact = np.array([case["expected"]["hess"] for case in cases])
    x, y = (np.array([case["inputs"][name] for case in cases]) for name in ("x", "y"))
    logits, labels = x.astype(dtype), y.astype(dtype)
    gradient_of = jax.grad(lambda x: loss(x, labels, reduction="sum"))
    _, hessian = jax.jvp(gradient_of, (logits,), (np.ones_like(logits),))
    # In float32 the published value is that of another logit, unless the decimal number is one.
    exact = np.where(logits == x, exact, oracle.exact(logits, labels).hessian.astype(np.float64))
    bound = oracle.DERIVATIVE[dtype.name] + oracle.CASE
    check.ulps("published hessian", hessian, exact, bound, flushes=True, inputs=(x, y))


POLICIES = {
    "nothing saved": jax.checkpoint_policies.nothing_saveable,
    "all saved": jax.checkpoint_policies.everything_saveable,
    "losses saved": jax.checkpoint_policies.save_only_these_names("loss"),
}


@pytest.mark.parametrize("policy", POLICIES)
@pytest.mark.parametrize("residuals", ["gradient", "recompute"])
def test_checkpoint_policies(check, loss, implementation: str, residuals: str, policy: str) -> None:
    """Whatever is kept for the backward pass, the derivatives are the same."""

    @partial(jax.checkpoint, policy=POLICIES[policy])
    def named(x: jax.Array, y: jax.Array) -> jax.Array:
        return checkpoint_name(loss(x, y, residuals=residuals), "loss")

    function = through("scan", named)
    gradient = jax.jit(jax.grad(function))(LOGITS)
    check.elements(implementation, LOGITS, LABELS, gradient=gradient, factor=FACTOR, flushes=True)
    if residuals == "gradient":
        check_derivative(check, jax.jit(HESSIANS["rev rev"](function))(LOGITS), "hessian")


def test_hessian_of_each_row(check, loss) -> None:
    """vmap of the Hessian, where "vmap" above is the Hessian of vmap."""
    hessians = jax.jit(jax.vmap(jax.hessian(loss)))(LOGITS, LABELS)
    exact = oracle.exact(LOGITS, LABELS).hessian * FACTOR
    exact = np.stack([diagonal(row, 2) for row in exact])
    check.ulps("hessian", hessians, exact, oracle.DERIVATIVE["float32"], scale=exact)


def test_gradient_of_each_example_through_a_model(check, loss) -> None:
    """Of a linear model: the gradient of the logit times the example's features."""
    features = oracle.random_logits(FLOAT32, (SHAPE[1], 5), seed=4)
    weights = oracle.random_logits(FLOAT32, (5,), seed=5, scale=1.0)

    def objective(weights: jax.Array, row: jax.Array, label: jax.Array) -> jax.Array:
        return loss(jnp.dot(row, weights, precision="highest"), label)

    each = jax.vmap(jax.grad(objective), (None, 0, 0))
    gradients = jax.jit(each)(weights, features, LABELS[0])
    logits = features.astype(np.float64) @ weights.astype(np.float64)
    exact = oracle.exact(logits, LABELS[0]).gradient.astype(np.float64)[:, None] * features
    np.testing.assert_allclose(gradients, exact, rtol=oracle.TOLERANCE["xla"].sum)


@pytest.mark.parametrize("mode", ["fwd", "rev"])
def test_implicit_derivative_of_an_optimum(check, loss, mode: str) -> None:
    """The best logit for n labels of mean p is b = log(p / (1 - p)): db/dy = 1 / (n p (1 - p)).

    JAX has it from the optimality condition, that the gradient is zero, by a second derivative.
    """
    labels = np.array([0.1, 0.9, 1.0, 0.0, 1.0])

    def best(labels: jax.Array) -> jax.Array:
        def condition(b: jax.Array) -> jax.Array:
            return jax.grad(lambda b: loss(jnp.full(labels.shape, b), labels))(b)

        def newton(condition: Callable, b: jax.Array) -> jax.Array:
            def step(_: int, b: jax.Array) -> jax.Array:
                return b - condition(b) / jax.grad(condition)(b)

            return lax.fori_loop(0, 8, step, b)

        def solve(linear: Callable, right: jax.Array) -> jax.Array:
            return right / linear(jnp.ones_like(right))

        return lax.custom_root(condition, jnp.zeros(()), newton, solve)

    with jax.enable_x64(True):
        jacobian = {"fwd": jax.jacfwd, "rev": jax.jacrev}[mode]
        b, derivative = best(labels), jax.jit(jacobian(best))(labels)
    p = labels.mean()
    check.reduced("xla", b, np.log(p / (1 - p)), "optimum")
    check.reduced("xla", derivative, np.full(5, 1 / (5 * p * (1 - p))), "derivative of an optimum")


def test_no_derivative_at_the_ends_is_nan(loss) -> None:
    logits = np.array([np.inf, -np.inf, np.inf, -np.inf, 1e38, -1e38, 0.0, -0.0], FLOAT32)
    labels = np.array([1, 0, 0, 1, 0, 0, 1, 1], np.uint8)
    function = partial(loss, labels=labels, reduction="sum")
    hessian = jax.hessian(function)(logits)
    third = jax.jacfwd(jax.hessian(function))(logits)
    oracle.assert_same_bits(hessian, np.diag([0, 0, 0, 0, 0, 0, 0.25, 0.25]).astype(FLOAT32))
    assert not np.any(third)


def test_jvp_of_logits_and_labels(check, loss) -> None:
    """dl = g dx - x dy, each alone and both."""
    dx, dy = (oracle.random_logits(FLOAT32, SHAPE, seed=s, scale=1.0) for s in (2, 3))
    function = partial(loss, reduction="none")
    zero = np.zeros_like(dx)
    exact = oracle.exact(LOGITS, LABELS)
    by_logits, by_labels = exact.gradient * dx, -LOGITS.astype(np.float64) * dy
    for tangents, terms in (
        ((dx, zero), (by_logits,)),
        ((zero, dy), (by_labels,)),
        ((dx, dy), (by_logits, by_labels)),
    ):
        _, tangent = jax.jvp(function, (LOGITS, LABELS), tangents)
        scale = sum(abs(term) for term in terms)
        check.ulps("jvp", tangent, sum(terms), oracle.DERIVATIVE["float32"], scale=scale)


@pytest.mark.parametrize("mode", ["fwd", "rev"])
def test_mixed_derivatives_of_labels(check, loss, mode: str) -> None:
    """d2l / dx dy = -1 and d2l / dy2 = 0."""
    jacobian = {"fwd": jax.jacfwd, "rev": jax.jacrev}[mode]
    function = partial(loss, reduction="mean")
    exact = diagonal(np.full(SHAPE, -1 / LOGITS.size), 2)
    for first, second in ((0, 1), (1, 0)):
        mixed = jacobian(jax.grad(function, argnums=first), argnums=second)(LOGITS, LABELS)
        check.ulps("mixed derivative", mixed, exact, oracle.FACTOR)
    assert not np.any(jacobian(jax.grad(function, argnums=1), argnums=1)(LOGITS, LABELS))


@pytest.mark.parametrize("mode", ["fwd", "rev"])
def test_mixed_derivatives_of_smoothing(check, loss, mode: str) -> None:
    """d2l / dx ds = y - 1/2."""
    jacobian = {"fwd": jax.jacfwd, "rev": jax.jacrev}[mode]

    def gradient(smoothing: float) -> jax.Array:
        return jax.grad(partial(loss, reduction="sum"))(LOGITS, LABELS, label_smoothing=smoothing)

    mixed = jacobian(gradient)(0.25)
    check.ulps("mixed derivative", mixed, LABELS.astype(np.float64) - 0.5, oracle.FACTOR)


@pytest.mark.parametrize("label_dtype", ["bool", "uint8", "int32"])
@pytest.mark.parametrize("residuals", ["gradient", "recompute"])
def test_integer_labels_have_no_tangent(loss, residuals: str, label_dtype: str) -> None:
    labels = (LABELS > 0.5).astype(label_dtype)
    function = partial(loss, residuals=residuals)
    _, pullback = jax.vjp(function, LOGITS, labels)
    cotangents = pullback(np.float32(1))
    assert [c.dtype for c in cotangents] == [FLOAT32, jax.dtypes.float0]
    assert cotangents[1].shape == labels.shape
    if residuals == "gradient":
        tangents = np.ones_like(LOGITS), np.zeros(SHAPE, jax.dtypes.float0)
        _, tangent = jax.jvp(function, (LOGITS, labels), tangents)
        np.testing.assert_allclose(tangent, np.sum(cotangents[0]), rtol=oracle.TOLERANCE["xla"].sum)


@pytest.mark.parametrize("way", REVERSIBLE)
def test_recompute_in_reverse(check, loss, implementation: str, way: str) -> None:
    function = through(way, partial(loss, residuals="recompute"))
    value, gradient = jax.jit(jax.value_and_grad(function))(LOGITS)
    check.elements(implementation, LOGITS, LABELS, gradient=gradient, factor=FACTOR, flushes=True)
    check.reduced("xla", value, oracle.exact(LOGITS, LABELS).loss.sum() * FACTOR)


@pytest.mark.parametrize(("way", "mode"), combinations(FORWARD | {"fwd rev": None}))
def test_recompute_refuses_forward_mode(loss, way: str, mode: str) -> None:
    """Also of its gradient; some of it JAX refuses, in words of its own."""
    function = through(way, partial(loss, residuals="recompute"))
    with pytest.raises((TypeError, NotImplementedError), match=r"forward-mode|residuals"):
        (FORWARD | HESSIANS)[mode](function)(LOGITS)


@pytest.mark.parametrize("way", REVERSIBLE)
def test_recompute_refuses_a_second_derivative(loss, way: str) -> None:
    """It names the keyword that asks for what it cannot do."""
    function = through(way, partial(loss, residuals="recompute"))
    with pytest.raises(NotImplementedError, match="residuals='recompute'"):
        HESSIANS["rev rev"](function)(LOGITS)
