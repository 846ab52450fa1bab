"""Trains a classifier with tens of thousands of labels, whose logits are never in memory.

    python examples/many_labels.py --epochs 4 --plot many_labels.png

The data are the functions and classes of Python's standard library: from the names in its code, the
model predicts which words, and pairs of words, are in its docstring. Very frequent ones do not
count. The features are the sum of the embeddings of the names' parts; the last layer and its loss
are one call of jax_bce.linear_loss, with the indices of each docstring's words as positives.

Prints the loss, how many of the five most likely words are right in docstrings that were not used
for training, and the memory that XLA needs for one step, with and without the logits. The picture
shows this memory against the number of labels.
"""

import argparse
import ast
import re
import sysconfig
import time
from collections import Counter
from functools import partial
from itertools import pairwise
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import optax
from matplotlib.figure import Figure
from picture import WIDTH, Colors, add_options, plt, save
from rich.console import Console
from rich.progress import track

import jax_bce

MIB = 2**20
BLOCK_BYTES = 8 * MIB  # of the training; the default, 64 MiB, would hold all logits of its batches
PART = re.compile(r"[a-z]{3,}")
FREQUENT = 0.05  # the share of docstrings from which on a word is left out
LINES = {
    "features @ weight, then loss": {"color": "plain jnp", "marker": "s", "linestyle": "--"},
    "linear_loss": {"color": "jax_bce", "marker": "o", "linewidth": 3},
}
NUMBERS = (1_000, 3_000, 10_000, 30_000, 100_000, 300_000, 1_000_000)
ROWS, FEATURES = 1024, 128  # of the picture

Weights = dict[str, jax.Array]


def parts_of(text: str) -> list[str]:
    """The words of a text, or of names such as camelCase and snake_case."""
    return PART.findall(re.sub(r"([a-z])([A-Z])", r"\1 \2", text).lower())


def documented(tree: ast.Module) -> list[tuple[set[str], set[str]]]:
    """Of each documented function and class: parts of its names; words and pairs of its text."""
    found = []
    for node in ast.walk(tree):
        if not isinstance(node, ast.FunctionDef | ast.ClassDef):
            continue
        if text := ast.get_docstring(node):
            inside = (getattr(n, "id", getattr(n, "attr", None)) for n in ast.walk(node))
            names = " ".join([node.name, *(name for name in inside if isinstance(name, str))])
            words = parts_of(text)
            found.append((set(parts_of(names)), {*words, *map(" ".join, pairwise(words))}))
    return found


def load(most: int) -> list[tuple[set[str], set[str]]]:
    """The first functions and classes of the standard library, in the order of its files."""
    found: list[tuple[set[str], set[str]]] = []
    for path in track(sorted(Path(sysconfig.get_path("stdlib")).glob("*.py")), "reading"):
        if len(found) < most:
            found += documented(ast.parse(path.read_bytes()))
    return found[:most]


def numbered(sets: list[set[str]], least: int, share: float) -> list[str]:
    """The strings of at least `least` sets, but at most a share of all, in alphabetical order."""
    counts = Counter(string for strings in sets for string in strings)
    most = share * len(sets)
    return sorted(string for string, count in counts.items() if least <= count <= most)


def padded(sets: list[set[str]], strings: list[str]) -> np.ndarray:
    """The strings' numbers, a row for each set, padded with -1."""
    number = {string: i for i, string in enumerate(strings)}
    rows = [sorted(number[string] for string in each if string in number) for each in sets]
    result = np.full((len(rows), max(map(len, rows))), -1, np.int32)
    for row, numbers in zip(result, rows, strict=True):
        row[: len(numbers)] = numbers
    return result


def initial(names: int, width: int, labels: int, seed: int) -> Weights:
    keys = jax.random.split(jax.random.key(seed), 2)
    return {
        "names": 0.1 * jax.random.normal(keys[0], (names, width)),
        "weight": 0.1 * jax.random.normal(keys[1], (width, labels)),
        "bias": jnp.full(labels, -7.0),
    }


def features_of(weights: Weights, names: jax.Array) -> jax.Array:
    """The sum of the names' embeddings; -1 is padding."""
    rows = jnp.where(names[..., None] < 0, 0, weights["names"][names])
    return jnp.tanh(rows.sum(1))


@jax.jit
def five_best(weights: Weights, names: jax.Array) -> jax.Array:
    logits = features_of(weights, names) @ weights["weight"] + weights["bias"]
    return jax.lax.top_k(logits, 5)[1]


def precision(best: np.ndarray, words: np.ndarray) -> float:
    """The share of the predicted words that are right."""
    return float(np.mean((best[:, :, None] == words[:, None, :]).any(-1)))


def dense(features: jax.Array, weight: jax.Array, bias: jax.Array, words: jax.Array) -> jax.Array:
    """The same with all logits and labels."""
    labels = jnp.zeros((len(features), weight.shape[1] + 1), jnp.uint8)
    labels = labels.at[jnp.arange(len(words))[:, None], words].set(1)[:, :-1]
    return jax_bce.loss(features @ weight + bias, labels, normalizer=len(features))


def linear(
    features: jax.Array,
    weight: jax.Array,
    bias: jax.Array,
    words: jax.Array,
    block_bytes: int = BLOCK_BYTES,
) -> jax.Array:
    """The sum over all labels, averaged over the batch, a block of labels at a time."""
    return jax_bce.linear_loss(
        features,
        weight,
        bias=bias,
        positives=words,
        normalizer=len(features),
        block_bytes=block_bytes,
    )


def loss_of(weights: Weights, names: jax.Array, words: jax.Array) -> jax.Array:
    return linear(features_of(weights, names), weights["weight"], weights["bias"], words)


def memory_of(loss, rows: int, width: int, labels: int, words: int) -> float:
    """The temporary memory of loss and gradients in MiB, from XLA's analysis: nothing is run."""
    shapes = (rows, width), (width, labels), (labels,)
    operands = [jax.ShapeDtypeStruct(shape, jnp.float32) for shape in shapes]
    operands.append(jax.ShapeDtypeStruct((rows, words), jnp.int32))
    function = jax.jit(jax.value_and_grad(loss, argnums=(0, 1, 2)))
    return function.lower(*operands).compile().memory_analysis().temp_size_in_bytes / MIB


def draw(curves: dict[str, list[float]], colors: Colors) -> Figure:
    figure, axis = plt.subplots(figsize=(WIDTH, 3.6))
    for name, style in LINES.items():
        own = style | {"color": colors[style["color"]], "label": name}
        axis.plot(NUMBERS, curves[name], markersize=5, **own)
    axis.set(
        xscale="log", yscale="log", xlabel="labels", ylabel=f"MiB of temporaries, {ROWS:,} rows"
    )
    axis.set_title("Memory of a linear layer's loss and gradients")
    axis.legend(loc="upper left")
    return figure


def main() -> None:
    parser = argparse.ArgumentParser(description="Train a classifier with many labels.")
    parser.add_argument("--functions", type=int, default=4000, help="at most")
    parser.add_argument("--epochs", type=int, default=4)
    parser.add_argument("--batch", type=int, default=128)
    parser.add_argument("--width", type=int, default=64)
    parser.add_argument("--rate", type=float, default=0.01, help="learning rate of Adam")
    parser.add_argument("--seed", type=int, default=0)
    add_options(parser, "many_labels.png")
    options = parser.parse_args()
    console = Console()

    data = load(options.functions)
    names, words = ([pair[i] for pair in data] for i in (0, 1))
    parts, labels = numbered(names, 2, 1.0), numbered(words, 1, FREQUENT)
    inputs, targets = padded(names, parts), padded(words, labels)
    order = np.random.default_rng(options.seed).permutation(len(data))
    train, test = np.split(order, [int(0.9 * len(order))])
    console.print(
        f"{len(data):,} docstrings, {len(labels):,} labels, at most {targets.shape[1]} in one"
    )

    weights = initial(len(parts), options.width, len(labels), options.seed)
    optimizer = optax.adam(options.rate)
    state = optimizer.init(weights)

    @jax.jit
    def step(weights, state, names, words):
        loss, gradients = jax.value_and_grad(loss_of)(weights, names, words)
        updates, state = optimizer.update(gradients, state)
        return loss, optax.apply_updates(weights, updates), state

    start = time.perf_counter()
    for epoch in range(options.epochs):
        shuffled = np.random.default_rng(epoch).permutation(train)
        batches = range(0, len(shuffled) - options.batch + 1, options.batch)
        losses = []
        for first in track(batches, f"epoch {epoch + 1}", transient=True):
            rows = shuffled[first : first + options.batch]
            loss, weights, state = step(weights, state, inputs[rows], targets[rows])
            losses.append(loss)
        right = precision(np.asarray(five_best(weights, inputs[test])), targets[test])
        console.print(f"epoch {epoch + 1}: loss {np.mean(losses):.1f}, five best {right:.1%} right")
    seconds = time.perf_counter() - start

    counts = np.bincount(targets[train][targets[train] >= 0], minlength=len(labels))
    frequent = np.broadcast_to(np.argsort(-counts)[:5], (len(test), 5))
    sizes = (options.batch, options.width, len(labels), targets.shape[1])
    needed = [memory_of(loss, *sizes) for loss in (dense, linear)]
    by_default = partial(linear, block_bytes=64 * MIB)
    numbers = [(dense, "features @ weight, then loss"), (by_default, "linear_loss")]
    curves = {
        name: [memory_of(loss, ROWS, FEATURES, labels, 5) for labels in NUMBERS]
        for loss, name in numbers
    }
    save(partial(draw, curves), options.plot, options.dark)
    console.print(
        f"{len(labels)} labels, {options.epochs} epochs in {seconds:.0f} s. Of the five most "
        f"likely words, {right:.3f} are right; of the five most frequent, "
        f"{precision(frequent, targets[test]):.3f}. Memory of a step: {needed[1]:.0f} MiB, with "
        f"logits {needed[0]:.0f} MiB. Picture: {options.plot}",
        soft_wrap=True,
    )


if __name__ == "__main__":
    main()
