"""A PyTorch script with pos_weight, ported to JAX and jax_bce.

    python examples/port_torch.py    # without PyTorch, it trains with jax_bce only

One handwritten digit in ten is an 8, so `pos_weight` counts an 8 nine times. Both versions train
the same network with the same initial weights, by full-batch SGD. `pos_weight` keeps its name,
shape and meaning, and the mean has the same denominator, so the curves agree. They can differ where
the loss is almost 0: at logit 20, label 1, PyTorch's gradient is 0 instead of -2.06e-09.

    loss = nn.BCEWithLogitsLoss(pos_weight=torch.tensor(9.0))(model(pixels)[:, 0], is_8)    # before
    loss = jax_bce.loss(model(weights, pixels)[:, 0], is_8, pos_weight=9.0)                 # after
"""

import argparse
from importlib.util import find_spec

import jax
import jax.numpy as jnp
import numpy as np
from rich.console import Console
from rich.table import Table
from sklearn.datasets import load_digits

import jax_bce

POS_WEIGHT, RATE = 9.0, 0.1


def initial_weights() -> list[np.ndarray]:
    rng = np.random.default_rng(0)
    shapes = [(64, 32), (32,), (32, 1), (1,)]
    return [rng.normal(0, 0.1, shape).astype(np.float32) for shape in shapes]


def train_torch(pixels: np.ndarray, is_8: np.ndarray, epochs: int) -> list[float]:
    import torch
    from torch import nn

    model = nn.Sequential(nn.Linear(64, 32), nn.ReLU(), nn.Linear(32, 1))
    with torch.no_grad():
        for parameter, array in zip(model.parameters(), initial_weights(), strict=True):
            parameter.copy_(torch.tensor(array.T))
    optimizer = torch.optim.SGD(model.parameters(), RATE)
    criterion = nn.BCEWithLogitsLoss(pos_weight=torch.tensor(POS_WEIGHT))
    inputs, targets, curve = torch.tensor(pixels), torch.tensor(is_8), []
    for _ in range(epochs):
        optimizer.zero_grad()
        loss = criterion(model(inputs)[:, 0], targets)
        loss.backward()
        optimizer.step()
        curve.append(loss.item())
    return curve


def train_jax(pixels: np.ndarray, is_8: np.ndarray, epochs: int) -> list[float]:
    def objective(weights: list[jax.Array]) -> jax.Array:
        w1, b1, w2, b2 = weights
        logits = (jax.nn.relu(pixels @ w1 + b1) @ w2 + b2)[:, 0]
        return jax_bce.loss(logits, is_8, pos_weight=POS_WEIGHT)

    @jax.jit
    def step(weights: list[jax.Array]) -> tuple[jax.Array, list[jax.Array]]:
        loss, gradients = jax.value_and_grad(objective)(weights)
        return loss, jax.tree.map(lambda w, g: w - RATE * g, weights, gradients)

    weights, curve = [jnp.asarray(array) for array in initial_weights()], []
    for _ in range(epochs):
        loss, weights = step(weights)
        curve.append(float(loss))
    return curve


def main() -> None:
    parser = argparse.ArgumentParser(description="train with pos_weight: PyTorch and jax_bce")
    parser.add_argument("--epochs", type=int, default=100)
    options = parser.parse_args()

    digits = load_digits()
    data = (digits.data / 16).astype(np.float32), (digits.target == 8).astype(np.float32)
    curves = {"jax_bce": train_jax(*data, options.epochs)}
    if find_spec("torch"):
        curves["PyTorch"] = train_torch(*data, options.epochs)
    table = Table("epoch", *curves, title="mean loss before each step")
    for epoch in sorted(
        {*range(0, options.epochs, max(1, options.epochs // 10)), options.epochs - 1}
    ):
        table.add_row(str(epoch + 1), *(f"{curve[epoch]:.7f}" for curve in curves.values()))
    Console().print(table)
    if "PyTorch" in curves:
        difference = np.max(abs(np.array(curves["jax_bce"]) / curves["PyTorch"] - 1))
        print(f"largest relative difference between PyTorch and jax_bce: {difference:.1e}")
    else:
        print("PyTorch is not installed, so its curve is missing (pip install torch)")


if __name__ == "__main__":
    main()
