"""A Keras model with class weights, ported to jax_bce.

    python examples/port_keras.py

One handwritten digit in ten is an 8, so `class_weight` counts an 8 nine times. The pixels are raw,
0 to 255, and the first probabilities are close to 0 or 1. On JAX, Keras clips these, their gradient
is 0, and the model learns nothing. The port removes the sigmoid from the model and uses a loss on
logits. It trains, with the same curve as Keras's own loss on logits.

    layers.Dense(1, activation="sigmoid")                             # before
    model.compile(optimizer, loss="binary_crossentropy")

    layers.Dense(1)                                                   # after
    model.compile(optimizer, loss=jax_bce.keras.BinaryCrossentropy(from_logits=True))

`fit`, `class_weight`, the optimizer and the weights stay the same. The model now predicts logits:
`> 0.5` becomes `> 0`, and the sigmoid of a logit is the probability.
"""

import argparse
import os

os.environ["KERAS_BACKEND"] = "jax"  # read when Keras is imported

import keras
import numpy as np
from rich.console import Console
from rich.table import Table
from sklearn.datasets import load_digits
from sklearn.metrics import balanced_accuracy_score

import jax_bce

CLASS_WEIGHT = {0: 1.0, 1: 9.0}


def train(
    activation: str | None,
    loss: str | keras.losses.Loss,
    pixels: np.ndarray,
    is_8: np.ndarray,
    epochs: int,
) -> tuple[list[float], float]:
    """The loss of each epoch as Keras reports it, and the final balanced accuracy."""
    keras.utils.set_random_seed(0)
    layers = keras.layers
    model = keras.Sequential(
        [
            keras.Input((64,)),
            layers.Dense(128, activation="relu"),
            layers.Dense(1, activation=activation),
        ]
    )
    model.compile(keras.optimizers.SGD(3e-5), loss)
    options = {"batch_size": 128, "epochs": epochs, "shuffle": False, "verbose": 0}
    history = model.fit(pixels, is_8[:, None], class_weight=CLASS_WEIGHT, **options)
    threshold = 0.5 if activation else 0.0
    answers = model.predict(pixels, len(pixels), verbose=0)[:, 0] > threshold
    return history.history["loss"], balanced_accuracy_score(is_8, answers)


def main() -> None:
    parser = argparse.ArgumentParser(description="train with class weights: Keras and jax_bce")
    parser.add_argument("--epochs", type=int, default=20)
    options = parser.parse_args()

    digits = load_digits()
    pixels = (digits.data * (255 / 16)).astype(np.float32)
    data = pixels, (digits.target == 8).astype(np.float32), options.epochs
    ours = jax_bce.keras.BinaryCrossentropy(from_logits=True)
    theirs = keras.losses.BinaryCrossentropy(from_logits=True)
    runs = {
        "Keras, sigmoid": train("sigmoid", "binary_crossentropy", *data),
        "Keras, from logits": train(None, theirs, *data),
        "jax_bce": train(None, ours, *data),
    }

    table = Table("epoch", *runs, title="weighted mean loss of an epoch")
    for epoch, values in enumerate(zip(*(curve for curve, _ in runs.values()), strict=True), 1):
        table.add_row(str(epoch), *(f"{value:.6f}" for value in values))
    table.add_section()
    table.add_row("balanced accuracy", *(f"{accuracy:.2f}" for _, accuracy in runs.values()))
    Console().print(table)
    expected, actual = (np.array(runs[name][0]) for name in ("Keras, from logits", "jax_bce"))
    difference = np.max(abs(actual / expected - 1))
    print(f"largest relative difference between Keras, from logits, and jax_bce: {difference:.1e}")


if __name__ == "__main__":
    main()
