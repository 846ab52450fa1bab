"""Five binary cross-entropies, one experiment: which of them trains?

    python examples/train_digits.py                     # the handwritten digits of scikit-learn
    python examples/train_digits.py --data mnist.npz    # Keras's file of the real MNIST

1,000 digits with raw pixels (0 to 255), the question "is it 5 or more?", a network of one hidden
layer, full-batch SGD, the same initial weights. Raw pixels make the first logits large, and their
probabilities round to 0 or 1 in float32. There the logarithm of a probability is infinite, a
clipped one has no gradient, and training stops before it starts. A loss on logits trains, optax's
and this one: an accuracy near 0.97, where the three on probabilities stay near 0.50.

Prints accuracy and loss by step and saves a plot.
"""

import argparse
import os
from collections.abc import Callable
from dataclasses import dataclass
from importlib.util import find_spec
from pathlib import Path

os.environ["KERAS_BACKEND"] = "jax"  # read when Keras is imported

import jax
import jax.numpy as jnp
import matplotlib
import numpy as np
import optax
from picture import save
from rich.console import Console
from rich.progress import Progress
from rich.table import Table

import jax_bce

matplotlib.use("Agg")
import matplotlib.pyplot as plt

Weights = list[tuple[jax.Array, jax.Array]]
Loss = Callable[[jax.Array, jax.Array], jax.Array]

COLORS = {
    "naive": "#D55E00",
    "clipped": "#E69F00",
    "Keras 3 on JAX": "#CC79A7",
    "jax_bce": "#0072B2",
    "optax on logits": "#000000",
}


@dataclass
class Data:
    """Pixels (n, width) from 0 to 255, and labels (n,) that say whether the digit is 5 or more."""

    pixels: np.ndarray
    labels: np.ndarray


def load(path: Path | None, samples: int) -> Data:
    if path is None:
        from sklearn.datasets import load_digits

        digits = load_digits()
        pixels, digit = digits.data * (255 / 16), digits.target
    else:
        with np.load(path) as file:
            pixels, digit = file["x_train"], file["y_train"]
    pixels = pixels[:samples].reshape(min(samples, len(pixels)), -1)
    return Data(pixels.astype(np.float32), (digit[:samples] >= 5).astype(np.float32))


def initial_weights(width: int, hidden: int, seed: int) -> Weights:
    glorot = jax.nn.initializers.glorot_uniform()
    keys = jax.random.split(jax.random.key(seed), 2)
    return [
        (glorot(key, shape), jnp.zeros(shape[1]))
        for key, shape in zip(keys, [(width, hidden), (hidden, 1)], strict=True)
    ]


def logits_of(weights: Weights, pixels: jax.Array) -> jax.Array:
    (w1, b1), (w2, b2) = weights
    return (jax.nn.relu(pixels @ w1 + b1) @ w2 + b2)[:, 0]


def naive(logits: jax.Array, labels: jax.Array) -> jax.Array:
    p = jax.nn.sigmoid(logits)
    return -jnp.mean(labels * jnp.log(p) + (1 - labels) * jnp.log(1 - p))


def clipped(logits: jax.Array, labels: jax.Array) -> jax.Array:
    p = jnp.clip(jax.nn.sigmoid(logits), 1e-7, 1 - 1e-7)
    return -jnp.mean(labels * jnp.log(p) + (1 - labels) * jnp.log(1 - p))


def optax_loss(logits: jax.Array, labels: jax.Array) -> jax.Array:
    return jnp.mean(optax.sigmoid_binary_cross_entropy(logits, labels))


@jax.jit
def accuracy(weights: Weights, pixels: jax.Array, labels: jax.Array) -> jax.Array:
    return jnp.mean((logits_of(weights, pixels) > 0) == (labels > 0.5))


@dataclass
class Curve:
    """Loss and training accuracy before each step and after the last."""

    loss: list[float]
    accuracy: list[float]


def train(
    loss: Loss, weights: Weights, data: Data, steps: int, rate: float, done: Callable[[], None]
) -> Curve:
    pixels, labels = jnp.asarray(data.pixels), jnp.asarray(data.labels)

    @jax.jit
    def step(weights: Weights) -> tuple[jax.Array, Weights]:
        value, gradients = jax.value_and_grad(lambda w: loss(logits_of(w, pixels), labels))(weights)
        return value, jax.tree.map(lambda w, g: w - rate * g, weights, gradients)

    curve = Curve([], [])
    for number in range(steps + 1):
        value, stepped = step(weights)
        curve.loss.append(float(value))
        curve.accuracy.append(float(accuracy(weights, pixels, labels)))
        if number < steps:
            weights = stepped
            done()
    return curve


def train_keras(
    weights: Weights, data: Data, steps: int, rate: float, done: Callable[[], None]
) -> Curve:
    """The same in Keras, as its documentation begins: a sigmoid layer and "binary_crossentropy"."""
    import keras

    hidden = weights[0][0].shape[1]
    model = keras.Sequential(
        [
            keras.Input((data.pixels.shape[1],)),
            keras.layers.Dense(hidden, activation="relu"),
            keras.layers.Dense(1, activation="sigmoid"),
        ]
    )
    model.set_weights([np.asarray(array) for layer in weights for array in layer])
    model.compile(keras.optimizers.SGD(rate), "binary_crossentropy", metrics=["binary_accuracy"])
    labels = data.labels[:, None]
    curve = Curve([], [])
    for number in range(steps + 1):
        loss, accuracy = model.evaluate(data.pixels, labels, len(labels), verbose=0)
        curve.loss.append(loss)
        curve.accuracy.append(accuracy)
        if number < steps:
            model.fit(data.pixels, labels, len(labels), epochs=1, verbose=0)
            done()
    return curve


def table_of(curves: dict[str, Curve]) -> Table:
    steps = len(next(iter(curves.values())).loss) - 1
    table = Table(title="training accuracy and mean loss, as each loss function reports it")
    table.add_column("step", justify="right")
    for name in curves:
        table.add_column(name, justify="right")
    for step in sorted({*range(0, steps, max(1, steps // 10)), steps}):
        cells = (f"{c.accuracy[step]:.3f} {c.loss[step]:9.4g}" for c in curves.values())
        table.add_row(str(step), *cells)
    return table


def plot(curves: dict[str, Curve], path: Path) -> None:
    figure, axes = plt.subplots(1, 2, figsize=(9, 3.6), constrained_layout=True)
    # Curves lie on each other: the later ones are thinner, and broken.
    lines = [("-", 8.0), ("-", 5.0), ("--", 2.0), ("-", 5.0), (":", 2.0)]
    styles = dict(zip(COLORS, lines, strict=True))
    for name, curve in curves.items():
        line, width = styles[name]
        style = {"color": COLORS[name], "label": name, "linestyle": line, "linewidth": width}
        axes[0].plot(curve.accuracy, marker="o", markersize=width + 2, **style)
        finite = np.where(np.isfinite(curve.loss), curve.loss, np.nan)
        axes[1].plot(finite, marker="o", markersize=width + 2, **style)
    axes[0].set(ylim=(0.4, 1.02), ylabel="training accuracy")
    axes[1].set(yscale="log", ylabel="mean loss, as each reports it")
    broken = [name for name, curve in curves.items() if not np.isfinite(curve.loss[-1])]
    if broken:
        note = f"{', '.join(broken)}: not a number from the first step"
        axes[1].text(0.98, 0.94, note, transform=axes[1].transAxes, ha="right", color="#555555")
    for axis in axes:
        axis.set(xlabel="step")
        axis.grid(alpha=0.3)
        axis.spines[["top", "right"]].set_visible(False)
    axes[0].legend(frameon=False, loc="center right")
    save(figure, path)


def main() -> None:
    parser = argparse.ArgumentParser(description="Which binary cross-entropy trains?")
    parser.add_argument(
        "--data", type=Path, help="an .npz with x_train and y_train, as Keras's MNIST"
    )
    parser.add_argument("--samples", type=int, default=1000)
    parser.add_argument("--hidden", type=int, default=1000)
    parser.add_argument("--steps", type=int, default=10)
    parser.add_argument("--rate", type=float, default=0.01, help="of plain SGD")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--plot", type=Path, default=Path("train_digits.png"))
    options = parser.parse_args()

    console = Console()
    data = load(options.data, options.samples)
    weights = initial_weights(data.pixels.shape[1], options.hidden, options.seed)
    losses: dict[str, Loss | None] = {"naive": naive, "clipped": clipped}
    if find_spec("keras"):
        losses["Keras 3 on JAX"] = None
    else:
        console.print("Keras is not installed, so it is left out: pip install 'jax-bce[examples]'")
    losses["jax_bce"] = jax_bce.loss
    losses["optax on logits"] = optax_loss

    curves: dict[str, Curve] = {}
    with Progress(console=console, transient=True) as progress:
        for name, loss in losses.items():
            task = progress.add_task(name, total=options.steps)
            arguments = (
                weights,
                data,
                options.steps,
                options.rate,
                lambda t=task: progress.advance(t),
            )
            curves[name] = train(loss, *arguments) if loss else train_keras(*arguments)

    console.print(table_of(curves))
    plot(curves, options.plot)
    console.print(
        f"{len(data.labels)} digits, {options.steps} steps: "
        + ", ".join(f"{name} {curve.accuracy[-1]:.2f}" for name, curve in curves.items())
        + f". Plot: {options.plot}",
        soft_wrap=True,
    )


if __name__ == "__main__":
    main()
