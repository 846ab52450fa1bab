"""Compares five binary cross-entropies in one experiment: which of them train?

    python examples/train_digits.py                     # the handwritten digits of scikit-learn
    python examples/train_digits.py --data mnist.npz    # Keras's file of the real MNIST

The data are 1,000 digits with raw pixels (0 to 255), and the question is "is it 5 or more?". A
network with one hidden layer is trained by full-batch SGD from the same initial weights. Raw pixels
make the first logits large, and their probabilities round to 0 or 1 in float32. There the logarithm
of a probability is infinite, a clipped probability has no gradient, and training never starts.
Losses on logits, optax's and this one, reach an accuracy near 0.97; the three losses on
probabilities stay near 0.50.

The losses on logits differ in two ways. The gradient of a confident correct prediction becomes 0
from a logit of 17 on with probabilities, from 88 on with optax, and from 104 on with jax_bce, where
float32 ends. And jax_bce computes loss and gradient in a fraction of optax's time, as measured
here. (The loss is a small part of these training steps: the network takes most of their time.)

Prints accuracy and loss by step, where gradients become 0 and the time per call, and saves a
picture.
"""

import argparse
import os
import statistics
import time
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from importlib.util import find_spec
from pathlib import Path

os.environ["KERAS_BACKEND"] = "jax"  # read when Keras is imported

import jax
import jax.numpy as jnp
import numpy as np
import optax
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from picture import MEASURED, WIDTH, Colors, add_options, plt, save
from precision import LINES as FLOORS
from precision import draw_floors, keras_loss, measure, of_jax
from rich.console import Console
from rich.progress import Progress
from rich.table import Table

import jax_bce

Weights = list[tuple[jax.Array, jax.Array]]
Loss = Callable[[jax.Array, jax.Array], jax.Array]

# The curves overlap: later ones are thinner or dashed.
LINES = {
    "naive": {"linewidth": 8},
    "clipped": {"linewidth": 5},
    "Keras 3 on JAX": {"linewidth": 2, "linestyle": "--"},
    "jax_bce": {"linewidth": 7},
    "optax": {"linewidth": 2.5, "linestyle": (0, (2, 2))},
}
MARGINS = np.arange(111)
BATCHES = (1_000, 32_000, 1_000_000)


@dataclass
class Data:
    """Pixels (n, width) from 0 to 255, and labels (n,): whether the digit is 5 or more."""

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
    """The same in Keras, as in its documentation: a sigmoid layer and "binary_crossentropy"."""
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
    table = Table(title="training accuracy and mean loss, as reported by each loss function")
    table.add_column("step", justify="right")
    for name in curves:
        table.add_column(name, justify="right")
    for step in sorted({*range(0, steps, max(1, steps // 10)), steps}):
        cells = (f"{c.accuracy[step]:.3f} {c.loss[step]:9.4g}" for c in curves.values())
        table.add_row(str(step), *cells)
    return table


def gradients_of(loss: Loss) -> np.ndarray:
    """The magnitude of the gradient of a correct prediction, for each margin."""
    one_by_one = jax.vmap(lambda logit, label: loss(logit[None], label[None]))
    return measure(of_jax(one_by_one), MARGINS)[1]


def times_of(losses: dict[str, Loss], batch: int, seconds: float = 0.5) -> dict[str, float]:
    """The median time of a compiled call for the mean and its gradient, in seconds."""
    random = np.random.default_rng(0)
    logits = jnp.asarray(3 * random.standard_normal(batch, np.float32))
    labels = jnp.asarray(random.integers(0, 2, batch).astype(np.float32))
    calls = {name: jax.jit(jax.value_and_grad(loss)) for name, loss in losses.items()}
    for call in calls.values():
        jax.block_until_ready(call(logits, labels))  # compile before timing
    turns: dict[str, list[float]] = {name: [] for name in losses}
    end = time.perf_counter() + seconds
    while time.perf_counter() < end:
        for name, call in calls.items():
            jax.block_until_ready(call(logits, labels))
            start = time.perf_counter()
            jax.block_until_ready(call(logits, labels))
            turns[name].append(time.perf_counter() - start)
    return {name: statistics.median(values) for name, values in turns.items()}


def in_words(seconds: float) -> str:
    return f"{seconds * 1e6:.0f} µs" if seconds < 1e-3 else f"{seconds * 1e3:.1f} ms"


def table_of_tails(gradients: dict[str, np.ndarray], times: dict[int, dict[str, float]]) -> Table:
    table = Table(
        title="where a correct prediction's gradient becomes 0; time of loss and gradient"
    )
    table.add_column("")
    table.add_column("0 from logit", justify="right")
    for batch in times:
        table.add_column(f"{batch:,} logits", justify="right")
    for name, values in gradients.items():
        end = str(int(np.argmin(values > 0)))
        measured = [in_words(row[name]) if name in row else "" for row in times.values()]
        table.add_row(name, end, *measured)
    return table


def draw_accuracy(axis: Axes, curves: dict[str, Curve], title: str, colors: Colors) -> None:
    for name, curve in curves.items():
        style = {"color": colors[name], "label": name, "marker": "o"} | LINES[name]
        axis.plot(curve.accuracy, markersize=style["linewidth"] + 2, **style)
    axis.set(ylim=(0.4, 1.02), xlabel="step of gradient descent", ylabel="training accuracy")
    axis.set_title(title)
    axis.legend(loc="center right")


def draw_times(axis: Axes, times: dict[int, dict[str, float]], colors: Colors) -> None:
    """Bars for the ratio to jax_bce's time, with the time beside each bar."""
    places, ticks = [], []
    for batch, row in reversed(times.items()):
        ticks.append(f"{batch:,}\nlogits")
        places.append(len(ticks) * 3.0 - 0.5)
        for offset, (name, seconds) in enumerate(reversed(row.items())):
            place, ratio = len(ticks) * 3.0 - 1 + offset, seconds / row["jax_bce"]
            label = f"{name}, {batch}"
            axis.barh(place, ratio, 0.9, color=colors[name], label=label, gid=MEASURED)
            note = f" {name}: {in_words(seconds)}"
            axis.text(ratio, place, note, va="center", color=colors[name], gid=MEASURED)
    axis.set_yticks(places, ticks)
    axis.set_xlim(0, 1.4 * axis.get_xlim()[1])  # room for the notes
    axis.set_xlabel("relative to jax_bce")
    axis.set_title("Time of loss and gradient, on this machine")
    axis.grid(axis="y", visible=False)


def draw(
    curves: dict[str, Curve],
    gradients: dict[str, np.ndarray],
    times: dict[int, dict[str, float]],
    title: str,
    colors: Colors,
) -> Figure:
    figure, axes = plt.subplots(3, 1, figsize=(WIDTH, 9), height_ratios=(3, 2.6, 2.4))
    draw_accuracy(axes[0], curves, title, colors)
    draw_floors(axes[1], MARGINS, gradients, FLOORS, colors)
    axes[1].set_title("Gradient of a correct prediction, float32")
    draw_times(axes[2], times, colors)
    return figure


def main() -> None:
    parser = argparse.ArgumentParser(description="Compare which binary cross-entropies train.")
    parser.add_argument(
        "--data", type=Path, help=".npz file with x_train and y_train, like Keras's MNIST"
    )
    parser.add_argument("--samples", type=int, default=1000)
    parser.add_argument("--hidden", type=int, default=1000)
    parser.add_argument("--steps", type=int, default=10)
    parser.add_argument("--rate", type=float, default=0.01, help="learning rate of plain SGD")
    parser.add_argument("--seed", type=int, default=0)
    add_options(parser, "train_digits.png")
    options = parser.parse_args()

    console = Console()
    data = load(options.data, options.samples)
    weights = initial_weights(data.pixels.shape[1], options.hidden, options.seed)
    losses: dict[str, Loss] = {"naive": naive, "clipped": clipped}
    if find_spec("keras"):
        losses["Keras 3 on JAX"] = keras_loss
    else:
        console.print("Keras is not installed and is left out (pip install keras)")
    losses |= {"jax_bce": jax_bce.loss, "optax": optax_loss}

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
            keras = name.startswith("Keras")
            curves[name] = train_keras(*arguments) if keras else train(loss, *arguments)

    gradients = {name: gradients_of(loss) for name, loss in losses.items()}
    train_well = {"jax_bce": losses["jax_bce"], "optax": losses["optax"]}
    times = {batch: times_of(train_well, batch) for batch in BATCHES}
    console.print(table_of(curves))
    console.print(table_of_tails(gradients, times))
    title = f"{len(data.labels):,} digits, pixels 0..255: which losses train?"
    save(partial(draw, curves, gradients, times, title), options.plot, options.dark)
    console.print(
        f"{len(data.labels)} digits, {options.steps} steps: "
        + ", ".join(f"{name} {curve.accuracy[-1]:.2f}" for name, curve in curves.items())
        + f". Picture: {options.plot}",
        soft_wrap=True,
    )


if __name__ == "__main__":
    main()
