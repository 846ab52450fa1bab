"""A few steps of training end at the same parameters with jax_bce as with the peer's loss.

Through optax with each of the libraries that models are written in, and with solvers that look for
the optimum themselves: nothing changes but the one line that names the loss.
"""

import warnings
from collections.abc import Callable
from functools import cache, partial

import equinox
import jax
import jax.numpy as jnp
import numpy as np
import optax
import oracle
import pytest
from jax.scipy.optimize import minimize
from oracle import FLOAT32, FLOAT64

import jax_bce

with warnings.catch_warnings():
    # Any flax that takes the oldest JAX asks it for what it is about to lose.
    warnings.simplefilter("ignore", DeprecationWarning)
    import flax.linen
    from flax import nnx
    from flax.training.train_state import TrainState

pytestmark = pytest.mark.filterwarnings("ignore::DeprecationWarning:flax")

FEATURES, WIDTH, STEPS = 8, 16, 20
Loss = Callable[[jax.Array, jax.Array], jax.Array]


def peer(logits: jax.Array, labels: jax.Array) -> jax.Array:
    return jnp.mean(optax.sigmoid_binary_cross_entropy(logits, labels))


def data(dtype: np.dtype = FLOAT32) -> tuple[np.ndarray, np.ndarray]:
    """Labels that the features tell, but for some noise: no weights are right about all of them."""
    rng = np.random.default_rng(0)
    features = rng.normal(size=(64, FEATURES))
    labels = features @ rng.normal(size=FEATURES) + rng.normal(size=64) > 0
    return features.astype(dtype), labels.astype(np.uint8)


def train_nnx(loss: Loss) -> tuple:
    """Normalized by the batch, so that the model has a state beside its parameters."""

    class Model(nnx.Module):
        def __init__(self, rngs: nnx.Rngs) -> None:
            self.hidden = nnx.Linear(FEATURES, WIDTH, use_bias=False, rngs=rngs)
            self.norm = nnx.BatchNorm(WIDTH, rngs=rngs)
            self.out = nnx.Linear(WIDTH, 1, rngs=rngs)

        def __call__(self, x: jax.Array) -> jax.Array:
            return self.out(jnp.tanh(self.norm(self.hidden(x))))[:, 0]

    @nnx.jit
    def step(model: Model, optimizer: nnx.Optimizer, features, labels) -> jax.Array:
        def objective(model: Model) -> jax.Array:
            return loss(model(features), labels)

        value, gradients = nnx.value_and_grad(objective)(model)
        optimizer.update(model, gradients)
        return value

    model = Model(nnx.Rngs(0))
    optimizer = nnx.Optimizer(model, optax.adamw(1e-2), wrt=nnx.Param)
    losses = [step(model, optimizer, *data()) for _ in range(STEPS)]
    return losses, nnx.to_pure_dict(nnx.state(model))


def train_linen(loss: Loss) -> tuple:
    """With clipped gradients, and a state that each step gives away."""
    layers = [flax.linen.Dense(WIDTH), flax.linen.tanh, flax.linen.Dense(1)]
    model = flax.linen.Sequential(layers)

    @partial(jax.jit, donate_argnums=0)
    def step(state: TrainState, features, labels) -> tuple[TrainState, jax.Array]:
        def objective(parameters) -> jax.Array:
            return loss(state.apply_fn(parameters, features)[:, 0], labels)

        value, gradients = jax.value_and_grad(objective)(state.params)
        return state.apply_gradients(grads=gradients), value

    features, labels = data()
    optimizer = optax.chain(optax.clip_by_global_norm(0.5), optax.sgd(0.5, momentum=0.9))
    state = TrainState.create(
        apply_fn=model.apply, params=model.init(jax.random.key(0), features), tx=optimizer
    )
    losses = []
    for _ in range(STEPS):
        state, value = step(state, features, labels)
        losses.append(value)
    return losses, state.params


def train_equinox(loss: Loss) -> tuple:
    """Three models at once, each with a loss and an optimizer of its own."""
    optimizer = optax.adam(1e-2)

    @equinox.filter_vmap
    def create(key: jax.Array):
        model = equinox.nn.MLP(FEATURES, "scalar", WIDTH, 1, jnp.tanh, key=key)
        return model, optimizer.init(equinox.filter(model, equinox.is_array))

    @equinox.filter_jit
    @equinox.filter_vmap(in_axes=(equinox.if_array(0), equinox.if_array(0), None, None))
    def step(model, state, features, labels):
        def objective(model) -> jax.Array:
            return loss(jax.vmap(model)(features), labels)

        value, gradients = equinox.filter_value_and_grad(objective)(model)
        updates, state = optimizer.update(gradients, state, model)
        return equinox.apply_updates(model, updates), state, value

    models, states = create(jax.random.split(jax.random.key(0), 3))
    losses = []
    for _ in range(STEPS):
        models, states, values = step(models, states, *data())
        losses.append(jnp.mean(values))
    return losses, equinox.filter(models, equinox.is_array)


def train_plain(loss: Loss) -> tuple:
    """Plain JAX: all steps in one scan, each over the sum of two micro-batches' gradients."""
    rng = np.random.default_rng(1)
    parameters = {
        "hidden": rng.normal(0, 0.3, (FEATURES, WIDTH)).astype(FLOAT32),
        "out": rng.normal(0, 0.3, WIDTH).astype(FLOAT32),
    }
    halves = jax.tree.map(lambda values: values.reshape(2, -1, *values.shape[1:]), data())

    def objective(parameters, features, labels) -> jax.Array:
        return loss(jnp.tanh(features @ parameters["hidden"]) @ parameters["out"], labels)

    @jax.checkpoint
    def mean_objective(parameters) -> jax.Array:
        return jnp.mean(jax.lax.map(lambda half: objective(parameters, *half), halves))

    def step(parameters, _):
        value, gradients = jax.value_and_grad(mean_objective)(parameters)
        return jax.tree.map(lambda p, g: p - 0.5 * g, parameters, gradients), value

    parameters, losses = jax.jit(lambda p: jax.lax.scan(step, p, length=STEPS))(parameters)
    return list(losses), parameters


TRAININGS = {
    "flax.nnx": train_nnx,
    "flax.linen": train_linen,
    "equinox": train_equinox,
    "plain JAX": train_plain,
}


@cache
def trained_with_peer(name: str) -> tuple:
    return TRAININGS[name](peer)


@pytest.mark.parametrize(
    ("name", "residuals"),
    [*((name, "gradient") for name in TRAININGS), ("plain JAX", "recompute")],
)
@pytest.mark.second
def test_training_ends_at_the_same_parameters(platform: str, name: str, residuals: str) -> None:
    loss = partial(jax_bce.loss, residuals=residuals, implementation=platform)
    losses, parameters = TRAININGS[name](loss)
    assert losses[-1] < 0.8 * losses[0]
    tolerance = oracle.TOLERANCE["xla"].sum
    close = partial(np.testing.assert_allclose, rtol=tolerance, atol=tolerance)
    jax.tree.map(close, (losses, parameters), trained_with_peer(name))


RIDGE = 0.1  # keeps the optimum near, and the solvers' problem well conditioned


def lbfgs(objective: Callable, start: jax.Array) -> jax.Array:
    """Its line search asks for values and gradients in a while loop."""
    solver = optax.lbfgs()
    value_and_grad = optax.value_and_grad_from_state(objective)

    def step(carry: tuple, _: None) -> tuple[tuple, None]:
        weights, state = carry
        value, gradient = value_and_grad(weights, state=state)
        updates, state = solver.update(
            gradient, state, weights, value=value, grad=gradient, value_fn=objective
        )
        return (optax.apply_updates(weights, updates), state), None

    run = jax.jit(lambda weights: jax.lax.scan(step, (weights, solver.init(weights)), length=30))
    return run(start)[0][0]


def bfgs(objective: Callable, start: jax.Array) -> jax.Array:
    return minimize(objective, start, method="BFGS", options={"gtol": 1e-9}).x


def newton(objective: Callable, start: jax.Array) -> jax.Array:
    def step(_: int, weights: jax.Array) -> jax.Array:
        return weights - jnp.linalg.solve(
            jax.hessian(objective)(weights), jax.grad(objective)(weights)
        )

    return jax.lax.fori_loop(0, 10, step, start)


def optimum() -> np.ndarray:
    """Logistic regression by Newton's method, in NumPy."""
    features, labels = data(FLOAT64)
    weights = np.zeros(FEATURES)
    for _ in range(20):
        p = 1 / (1 + np.exp(-features @ weights))
        gradient = features.T @ (p - labels) / len(labels) + RIDGE * weights
        hessian = (features.T * (p * (1 - p))) @ features / len(labels)
        weights -= np.linalg.solve(hessian + RIDGE * np.eye(FEATURES), gradient)
    return weights


@pytest.mark.parametrize("solver", [lbfgs, bfgs, newton])
@pytest.mark.second
def test_solvers_find_the_optimum(platform: str, solver: Callable) -> None:
    with jax.enable_x64(True):
        features, labels = data(FLOAT64)

        def objective(weights: jax.Array) -> jax.Array:
            loss = jax_bce.loss(features @ weights, labels, implementation=platform)
            return loss + RIDGE / 2 * jnp.sum(weights**2)

        weights = solver(objective, jnp.zeros(FEATURES))
    np.testing.assert_allclose(weights, optimum(), rtol=oracle.TOLERANCE["xla"].sum)
