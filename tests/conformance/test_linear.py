"""linear_loss against the loops over chunks of labels that users of optax and PyTorch write.

They are the implementations of benchmarks/linear.py: what is timed there is the same.
"""

import importlib
from collections.abc import Callable
from pathlib import Path
from types import ModuleType

import jax
import numpy as np
import oracle
import pytest

FOLDER = Path(__file__).parents[2] / "benchmarks"
SIZES = (24, 120, 8)


@pytest.fixture
def linear(monkeypatch: pytest.MonkeyPatch) -> ModuleType:
    monkeypatch.syspath_prepend(FOLDER)
    module = importlib.import_module("linear")
    monkeypatch.setattr(module, "BLOCK_BYTES", 4096)  # several chunks
    assert module.chunks_of(*SIZES[:2]) > 1
    return module


def gradients(linear: ModuleType, name: str) -> tuple[jax.Array, tuple[jax.Array, ...]]:
    function = jax.value_and_grad(linear.LOSSES[name], argnums=(0, 1, 2))
    return jax.jit(function)(*linear.inputs(*SIZES).values())


@pytest.mark.parametrize("name", ["dense, jax_bce", "dense, optax", "chunks, optax"])
def test_jax(linear: ModuleType, name: str) -> None:
    found, wanted = (gradients(linear, each) for each in ("linear_loss", name))
    np.testing.assert_allclose(found[0], wanted[0], oracle.SURROUNDINGS)
    for ours, theirs in zip(found[1], wanted[1], strict=True):
        largest = np.max(abs(theirs))
        np.testing.assert_allclose(ours, theirs, 0, oracle.SURROUNDINGS * largest)


def test_torch(linear: ModuleType, require: Callable[[str], None]) -> None:
    require("torch")
    call = linear.chunks_torch(linear.inputs(*SIZES))
    call()
    theirs = call().numpy()  # the weight's gradient, of this call alone
    _, (_, ours, _) = gradients(linear, "linear_loss")
    np.testing.assert_allclose(ours, theirs, 0, oracle.SURROUNDINGS * np.max(abs(theirs)))
