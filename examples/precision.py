"""Shows how small a loss, and how small a gradient, each implementation can report.

    python examples/precision.py

A classifier that is right by a margin a has the (logit, label) pairs (-a, 0) and (a, 1). Both
losses are log(1 + exp(-a)), and both gradients have the magnitude 1 / (1 + exp(a)): they decrease
for ever. From probabilities (Keras 3 on JAX), the loss stops at a floor near 1.2e-7, and the
gradient is 0 from a = 17 on. PyTorch's loss for label 0 is 0 from a = 15 on, and its gradient for
label 1 from a = 17 on. optax and XLA continue to a = 87, where float32 becomes subnormal; jax_bce
to a = 103, where float32 ends.

Every implementation gets float32. The smaller of the two losses and the smaller of the two
gradients are shown.

Prints both as tables, then six extreme and infinite elements, and saves a plot.
"""

import argparse
import os
from collections.abc import Callable
from functools import partial
from importlib.util import find_spec

os.environ["KERAS_BACKEND"] = "jax"  # read when Keras is imported

import jax
import jax.numpy as jnp
import numpy as np
import optax
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from picture import WIDTH, Colors, add_options, plt, save
from rich import box
from rich.console import Console
from rich.table import Table

import jax_bce

# From logits (n,) and labels (n,) to losses (n,) and gradients (n,).
Elements = Callable[[np.ndarray, np.ndarray], tuple[np.ndarray, np.ndarray]]


def of_jax(loss: Callable[[jax.Array, jax.Array], jax.Array]) -> Elements:
    """`loss` maps arrays of logits and labels to the losses of the elements."""

    def elements(logits: np.ndarray, labels: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        # Compiled, as in training: eagerly, XLA would flush subnormal intermediate results.
        gradient = jax.jit(jax.grad(lambda x, y: jnp.sum(loss(x, y))))
        return np.asarray(jax.jit(loss)(logits, labels)), np.asarray(gradient(logits, labels))

    return elements


def jax_bce_loss(logits: jax.Array, labels: jax.Array) -> jax.Array:
    return jax_bce.loss(logits, labels, reduction="none")


def keras_loss(logits: jax.Array, labels: jax.Array) -> jax.Array:
    import keras

    probabilities = jax.nn.sigmoid(logits)
    return keras.losses.binary_crossentropy(labels[:, None], probabilities[:, None])


def torch_elements(logits: np.ndarray, labels: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    import torch

    x = torch.tensor(logits, requires_grad=True)
    loss = torch.nn.functional.binary_cross_entropy_with_logits(
        x, torch.tensor(labels), reduction="none"
    )
    loss.sum().backward()
    return loss.detach().numpy(), x.grad.numpy()


def peers(console: Console) -> dict[str, Elements]:
    found: dict[str, Elements] = {"jax_bce": of_jax(jax_bce_loss)}
    found["optax"] = of_jax(optax.sigmoid_binary_cross_entropy)
    for name, package, elements in (
        ("PyTorch", "torch", torch_elements),
        ("Keras 3 on JAX", "keras", of_jax(keras_loss)),
    ):
        if find_spec(package):
            found[name] = elements
        else:
            console.print(f"{name} is not installed and is left out (pip install {package})")
    return found


def measure(elements: Elements, margins: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """The smaller of the two losses and of the two gradients' magnitudes, at each margin."""
    a = margins.astype(np.float32)
    loss_0, gradient_0 = elements(-a, np.zeros_like(a))
    loss_1, gradient_1 = elements(a, np.ones_like(a))
    gradient = np.minimum(np.abs(gradient_0), np.abs(gradient_1))
    return np.minimum(loss_0, loss_1).astype(np.float64), gradient.astype(np.float64)


def table_of(title: str, margins: list[int], rows: dict[str, np.ndarray]) -> Table:
    table = Table(title=title)
    table.add_column("margin a")
    for name in rows:
        table.add_column(name, justify="right")
    for a in margins:
        table.add_row(str(a), *(f"{values[a]:.4g}" for values in rows.values()))
    return table


# Where implementations differ: a logit, its label, and the result to show.
CASES = [
    (-20.0, 0, "loss"),
    (20.0, 1, "gradient"),
    (-90.0, 0, "gradient"),
    (30.0, 0, "loss"),
    (np.inf, 1, "loss"),
    (np.inf, 0, "gradient"),
]


def cases(found: dict[str, Elements]) -> Table:
    table = Table(title="what, (logit, label)", box=box.MARKDOWN, padding=(0, 0))
    for column in ("", "exact", *found):
        table.add_column(column, justify="right", no_wrap=True)
    for logit, label, asked in CASES:
        sign = 1 - 2 * label
        loss, gradient = np.logaddexp(0, sign * logit), sign / (1 + np.exp(-sign * logit))
        x, y = np.array([logit], np.float32), np.array([label], np.float32)
        values = [loss if asked == "loss" else gradient]
        values += [of(x, y)[asked == "gradient"][0] for of in found.values()]
        table.add_row(f"{asked} ({logit:g}, {label})", *(f"{value:.3g}" for value in values))
    return table


LINES = {
    "exact": {"linewidth": 7, "solid_capstyle": "round"},
    "jax_bce": {"linewidth": 2.5},
    "optax": {"linewidth": 2.5, "linestyle": (0, (4, 3))},
    "PyTorch": {"linewidth": 3},
    "Keras 3 on JAX": {"linewidth": 2.5},
}


def draw_floors(
    axis: Axes,
    margins: np.ndarray,
    curves: dict[str, np.ndarray],
    lines: dict[str, dict],
    colors: Colors,
) -> None:
    """Draws each curve up to where it becomes 0 or NaN, with a note there."""
    ends: dict[tuple[int, str], list[str]] = {}
    for name, values in curves.items():
        shown = np.where(values > 0, values, np.nan)
        axis.plot(margins, shown, label=name, color=colors[name], **lines.get(name, {}))
        if not (values > 0).all():
            first = int(np.argmin(values > 0))
            becomes = "0" if values[first] == 0 else "NaN"
            ends.setdefault((first, becomes), []).append(name)
        elif values[-1] == values[-2]:  # a floor
            note = f"{name}: never below {values[-1]:.2g}"
            place = {"xytext": (0, -6), "textcoords": "offset points", "ha": "right", "va": "top"}
            axis.annotate(note, (margins[-1], values[-1]), color=colors[name], **place)
    # Notes at small margins are to the right, stacked; notes at large margins are to the left.
    early = sorted(end for end in ends if end[0] <= 40)
    for (first, becomes), names in ends.items():
        last = (margins[first - 1], curves[names[0]][first - 1])
        color = colors[names[0]]
        axis.plot(*last, "o", color=color)
        note = f"{', '.join(names)}: {becomes} from {first}"
        place = {"ha": "right", "va": "top", "xytext": (-10, 4)}
        if (first, becomes) in early:
            above = 13 * (len(early) - 1 - early.index((first, becomes)))
            place = {"ha": "left", "va": "bottom", "xytext": (9, above + 1)}
        axis.annotate(note, last, textcoords="offset points", color=color, **place)
    axis.set(yscale="log", xlabel="margin a: logit a, label 1, or logit -a, label 0")
    axis.set_yticks(10.0 ** np.arange(-45, 1, 15))
    axis.minorticks_off()


def draw(margins: np.ndarray, panels: dict[str, dict[str, np.ndarray]], colors: Colors) -> Figure:
    figure, axes = plt.subplots(len(panels), 1, figsize=(WIDTH, 5.4), sharex=True)
    for axis, (title, curves) in zip(axes, panels.items(), strict=True):
        draw_floors(axis, margins, curves, LINES, colors)
        middle = len(margins) // 2
        place = {"xytext": (8, 0), "textcoords": "offset points"}
        exact = (margins[middle], curves["exact"][middle])
        axis.annotate("exact (grey)", exact, color=colors["text"], **place)
        axis.set_title(f"{title.capitalize()} of a correct prediction, float32")
    axes[0].set_xlabel("")
    return figure


def main() -> None:
    parser = argparse.ArgumentParser(
        description="Show the smallest loss and gradient of each implementation."
    )
    parser.add_argument("--max", type=int, default=110, help="the largest margin")
    add_options(parser, "precision.png")
    options = parser.parse_args()

    console = Console()
    margins = np.arange(options.max + 1)
    e = np.exp(-margins.astype(np.float64))
    losses, gradients = {"exact": np.log1p(e)}, {"exact": e / (1 + e)}
    found = peers(console)
    for name, elements in found.items():
        losses[name], gradients[name] = measure(elements, margins)

    shown = [a for a in (0, 1, 5, 10, 15, 16, 17, 20, 40, 80, 90, 100) if a <= options.max]
    panels = {"loss": losses, "gradient": gradients}
    for title, rows in panels.items():
        console.print(table_of(f"{title} of a correct prediction", shown, rows))
    console.print(cases(found))
    save(partial(draw, margins, panels), options.plot, options.dark)
    console.print(f"Plot: {options.plot}")


if __name__ == "__main__":
    main()
