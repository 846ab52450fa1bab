"""What a user would call instead, each as a function of no arguments that ends with the work.

Every contestant gets the same float32 logits and labels as arguments, never as constants of a
compiled program, and gives the mean loss, or the mean loss and its gradient.
"""

import os
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from importlib.util import find_spec

# OpenMP's idle threads spin on the cores that the next contestant needs. Read when torch starts.
os.environ |= {"OMP_WAIT_POLICY": "PASSIVE", "GOMP_SPINCOUNT": "0"}

import jax
import jax.numpy as jnp
import numpy as np
import optax

import jax_bce

Contestant = Callable[[], object]
Loss = Callable[[jax.Array, jax.Array], jax.Array]

BYTES = {"value": 8, "value_and_grad": 12}  # an element: two reads, and a write of the gradient


def optax_losses(logits: jax.Array, labels: jax.Array) -> jax.Array:
    return optax.sigmoid_binary_cross_entropy(logits, labels)


def jnp_losses(logits: jax.Array, labels: jax.Array) -> jax.Array:
    return jnp.maximum(logits, 0) - logits * labels + jnp.log1p(jnp.exp(-jnp.abs(logits)))


def _mean_of(losses: Loss) -> Loss:
    return lambda logits, labels: jnp.mean(losses(logits, labels))


def _jax_contestant(loss: Loss, mode: str, logits: np.ndarray, labels: np.ndarray) -> Contestant:
    function = jax.jit(loss if mode == "value" else jax.value_and_grad(loss))
    operands = jax.device_put((logits, labels))
    return lambda: jax.block_until_ready(function(*operands))


def _torch_contestant(mode: str, logits: np.ndarray, labels: np.ndarray) -> Contestant:
    import torch

    function = torch.nn.functional.binary_cross_entropy_with_logits
    x, y = torch.tensor(logits, requires_grad=mode != "value"), torch.tensor(labels)

    def value() -> object:
        with torch.no_grad():
            return function(x, y)

    def value_and_grad() -> None:
        x.grad = None
        function(x, y).backward()

    return value if mode == "value" else value_and_grad


def _copy(bytes_moved: int, threads: int) -> Contestant:
    """Reads half of the bytes and writes the other half, both in memory touched before."""
    source, target = np.ones(bytes_moved // 2, np.uint8), np.zeros(bytes_moved // 2, np.uint8)
    parts = list(zip(np.array_split(target, threads), np.array_split(source, threads), strict=True))
    if threads == 1:
        return lambda: np.copyto(target, source)
    pool = ThreadPoolExecutor(threads)
    return lambda: list(pool.map(lambda part: np.copyto(*part), parts))


def contestants(mode: str, n: int) -> dict[str, Contestant]:
    """All of them at n elements; those named "copy" say what the machine's memory can do."""
    random = np.random.default_rng(n)
    logits = (3 * random.standard_normal(n, np.float32)).astype(np.float32)
    labels = random.integers(0, 2, n).astype(np.float32)
    found = {
        "jax_bce": _jax_contestant(jax_bce.loss, mode, logits, labels),
        "optax": _jax_contestant(_mean_of(optax_losses), mode, logits, labels),
        "jnp": _jax_contestant(_mean_of(jnp_losses), mode, logits, labels),
    }
    if find_spec("torch"):
        found["torch"] = _torch_contestant(mode, logits, labels)
    for threads in sorted({1, len(os.sched_getaffinity(0))}):
        found[f"copy, {threads} threads"] = _copy(BYTES[mode] * n, threads)
    return found
