"""A training loop with optax and flax, in which jax_bce is one line.

    python examples/train_flax.py

Trains a network with Adam on mini-batches to say whether a handwritten digit is 5 or more, and
tests it on digits it has not seen.
"""

import argparse

import jax
import jax.numpy as jnp
import optax
from flax import nnx
from rich.progress import track
from sklearn.datasets import load_digits
from sklearn.model_selection import train_test_split

import jax_bce


@nnx.jit
def train_step(
    model: nnx.Module, optimizer: nnx.Optimizer, images: jax.Array, labels: jax.Array
) -> jax.Array:
    def objective(model: nnx.Module) -> jax.Array:
        return jax_bce.loss(model(images)[:, 0], labels)

    loss, gradients = nnx.value_and_grad(objective)(model)
    optimizer.update(model, gradients)
    return loss


def main() -> None:
    parser = argparse.ArgumentParser(description="jax_bce with optax and flax")
    parser.add_argument("--epochs", type=int, default=20)
    parser.add_argument("--batch", type=int, default=128)
    options = parser.parse_args()

    digits = load_digits()
    split = train_test_split(digits.data / 16.0, digits.target >= 5, random_state=0)
    train_images, test_images, train_labels, test_labels = map(jnp.asarray, split)

    rngs = nnx.Rngs(0)
    model = nnx.Sequential(nnx.Linear(64, 128, rngs=rngs), nnx.relu, nnx.Linear(128, 1, rngs=rngs))
    optimizer = nnx.Optimizer(model, optax.adam(3e-3), wrt=nnx.Param)
    for epoch in track(range(options.epochs), "training"):
        order = jax.random.permutation(jax.random.key(epoch), len(train_images))
        for start in range(0, len(order), options.batch):
            batch = order[start : start + options.batch]
            loss = train_step(model, optimizer, train_images[batch], train_labels[batch])

    correct = (model(test_images)[:, 0] > 0) == test_labels
    print(f"loss of the last batch {loss:.4f}, accuracy on unseen digits {correct.mean():.3f}")


if __name__ == "__main__":
    main()
