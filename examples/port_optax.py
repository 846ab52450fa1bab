"""A training script with missing labels, ported from optax to jax_bce.

    python examples/port_optax.py

The data are answers to four yes-or-no questions about each of 1,797 handwritten digits. A third of
the answers is unknown and stored as NaN. The original script multiplies the losses by a mask: 0
times NaN is NaN, and the model learns nothing. Repaired by hand, the script replaces the unknown
labels before the loss and masks the losses after it. With jax_bce it passes the mask to the loss,
and gets the same numbers as the repaired script.

    losses = optax.sigmoid_binary_cross_entropy(logits, answers)      # before
    return jnp.sum(losses * known) / jnp.sum(known)

    return jax_bce.loss(logits, answers, where=known)                 # after
"""

import argparse
from collections.abc import Callable

import jax
import jax.numpy as jnp
import numpy as np
import optax
from rich.console import Console
from rich.table import Table
from sklearn.datasets import load_digits

import jax_bce

Loss = Callable[[jax.Array, jax.Array, jax.Array], jax.Array]


def multiplied(logits: jax.Array, answers: jax.Array, known: jax.Array) -> jax.Array:
    losses = optax.sigmoid_binary_cross_entropy(logits, answers)
    return jnp.sum(losses * known) / jnp.sum(known)


def repaired(logits: jax.Array, answers: jax.Array, known: jax.Array) -> jax.Array:
    losses = optax.sigmoid_binary_cross_entropy(logits, jnp.where(known, answers, 0))
    return jnp.sum(jnp.where(known, losses, 0)) / jnp.sum(known)


def ours(logits: jax.Array, answers: jax.Array, known: jax.Array) -> jax.Array:
    return jax_bce.loss(logits, answers, where=known)


def train(loss: Loss, pixels: jax.Array, answers: jax.Array, epochs: int) -> list[float]:
    """The mean loss of each epoch; batches and initial weights are the same for every loss."""
    rng = np.random.default_rng(0)
    shapes = [(64, 32), (32,), (32, 4), (4,)]
    weights = [jnp.asarray(rng.normal(0, 0.1, shape), jnp.float32) for shape in shapes]
    batches = rng.permutation(len(pixels))[: len(pixels) // 128 * 128].reshape(-1, 128)
    optimizer = optax.adam(3e-3)

    @jax.jit
    def step(weights: list[jax.Array], state: optax.OptState, batch: jax.Array) -> tuple:
        def objective(weights: list[jax.Array]) -> jax.Array:
            w1, b1, w2, b2 = weights
            logits = jax.nn.relu(pixels[batch] @ w1 + b1) @ w2 + b2
            return loss(logits, answers[batch], ~jnp.isnan(answers[batch]))

        value, gradients = jax.value_and_grad(objective)(weights)
        updates, state = optimizer.update(gradients, state)
        return value, optax.apply_updates(weights, updates), state

    state, curve = optimizer.init(weights), []
    for _ in range(epochs):
        values = []
        for batch in batches:
            value, weights, state = step(weights, state, batch)
            values.append(float(value))
        curve.append(float(np.mean(values)))
    return curve


def main() -> None:
    parser = argparse.ArgumentParser(description="train with a mask: optax and jax_bce")
    parser.add_argument("--epochs", type=int, default=10)
    options = parser.parse_args()

    digits = load_digits()
    yes = [[5, 6, 7, 8, 9], [0, 2, 4, 6, 8], [2, 3, 5, 7], [0, 6, 8, 9]]  # large, even, prime, loop
    answers = np.stack([np.isin(digits.target, group) for group in yes], axis=1).astype(np.float32)
    answers[np.random.default_rng(0).random(answers.shape) < 1 / 3] = np.nan
    data = jnp.asarray(digits.data / 16, jnp.float32), jnp.asarray(answers)

    losses = {"optax, times the mask": multiplied, "optax, repaired": repaired, "jax_bce": ours}
    curves = {name: train(loss, *data, options.epochs) for name, loss in losses.items()}
    table = Table("epoch", *curves, title="mean loss of an epoch")
    for epoch, values in enumerate(zip(*curves.values(), strict=True), start=1):
        table.add_row(str(epoch), *(f"{value:.7f}" for value in values))
    Console().print(table)
    expected, actual = np.array(curves["optax, repaired"]), np.array(curves["jax_bce"])
    difference = np.max(abs(actual / expected - 1))
    print(f"largest relative difference between optax, repaired, and jax_bce: {difference:.1e}")


if __name__ == "__main__":
    main()
