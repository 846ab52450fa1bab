"""The implementations that bench.py compares, each as a function without arguments.

A function returns when its work is done. Every implementation gets the same logits and labels as
arguments, never as constants of a compiled program, and computes the mean loss, or the mean loss
and its gradient. PyTorch wants labels of the logits' dtype: the conversion is part of its call.
"""

import os
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from importlib.util import find_spec

# Idle OpenMP threads would spin on the cores that the next implementation needs. Read by torch on
# import.
os.environ |= {"OMP_WAIT_POLICY": "PASSIVE", "GOMP_SPINCOUNT": "0"}

import jax
import jax.numpy as jnp
import numpy as np
import optax

import jax_bce

Implementation = Callable[[], object]
Loss = Callable[[jax.Array, jax.Array], jax.Array]


def bytes_moved(mode: str, logits: str, labels: str) -> int:
    """Per element: two reads and, with a gradient, a write."""
    size = np.dtype(jnp.dtype(logits)).itemsize
    return size * (1 if mode == "value" else 2) + np.dtype(jnp.dtype(labels)).itemsize


def optax_losses(logits: jax.Array, labels: jax.Array) -> jax.Array:
    return optax.sigmoid_binary_cross_entropy(logits, labels)


def jnp_losses(logits: jax.Array, labels: jax.Array) -> jax.Array:
    return jnp.maximum(logits, 0) - logits * labels + jnp.log1p(jnp.exp(-jnp.abs(logits)))


def _mean_of(losses: Loss) -> Loss:
    return lambda logits, labels: jnp.mean(losses(logits, labels))


def _of_jax(loss: Loss, mode: str, logits: np.ndarray, labels: np.ndarray) -> Implementation:
    function = jax.jit(loss if mode == "value" else jax.value_and_grad(loss))
    operands = jax.device_put((logits, labels))
    return lambda: jax.block_until_ready(function(*operands))


def _of_torch(
    mode: str, logits: np.ndarray, labels: np.ndarray, compiled: bool = False
) -> Implementation:
    import torch

    def function(x: torch.Tensor, y: torch.Tensor) -> torch.Tensor:
        return torch.nn.functional.binary_cross_entropy_with_logits(x, y.to(x.dtype))

    if compiled:
        function = torch.compile(function, dynamic=True)  # one compilation for all sizes
    x, y = (
        torch.tensor(array.astype(np.float32)).to(getattr(torch, array.dtype.name))
        for array in (logits, labels)
    )
    x.requires_grad_(mode != "value")

    def value() -> object:
        with torch.no_grad():
            return function(x, y)

    def value_and_grad() -> None:
        x.grad = None
        function(x, y).backward()

    return value if mode == "value" else value_and_grad


def _copy(bytes_moved: int, threads: int) -> Implementation:
    """Reads half of the bytes and writes the other half, in memory that was accessed before."""
    source, target = np.ones(bytes_moved // 2, np.uint8), np.zeros(bytes_moved // 2, np.uint8)
    parts = list(zip(np.array_split(target, threads), np.array_split(source, threads), strict=True))
    if threads == 1:
        return lambda: np.copyto(target, source)
    pool = ThreadPoolExecutor(threads)
    return lambda: list(pool.map(lambda part: np.copyto(*part), parts))


def implementations(
    mode: str, n: int, dtypes: tuple[str, str], compiled_torch: bool
) -> dict[str, Implementation]:
    """All implementations for n logits and labels of these dtypes.

    Those named "copy" measure the memory bandwidth.
    """
    random = np.random.default_rng(n)
    logits = (3 * random.standard_normal(n, np.float32)).astype(jnp.dtype(dtypes[0]))
    labels = random.integers(0, 2, n).astype(jnp.dtype(dtypes[1]))
    found = {
        "jax_bce": _of_jax(jax_bce.loss, mode, logits, labels),
        "optax": _of_jax(_mean_of(optax_losses), mode, logits, labels),
        "jnp": _of_jax(_mean_of(jnp_losses), mode, logits, labels),
    }
    if find_spec("torch"):
        found["torch"] = _of_torch(mode, logits, labels)
        if compiled_torch:
            found["torch, compiled"] = _of_torch(mode, logits, labels, compiled=True)
    for threads in sorted({1, len(os.sched_getaffinity(0))}):
        found[f"copy, {threads} threads"] = _copy(bytes_moved(mode, *dtypes) * n, threads)
    return found
