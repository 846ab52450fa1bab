"""In every mode of JAX that checks or forbids something, and without jit, the results are the same.

A mode is a flag that a user sets to find a mistake in a program of theirs: it must find none here.
"""

import subprocess
import sys
import sysconfig
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from functools import cache, partial

import jax
import jax.numpy as jnp
import numpy as np
import oracle
import platforms
import pytest
from oracle import FLOAT32

import jax_bce

pytestmark = pytest.mark.quickly

SHAPE = (4, 19)


@contextmanager
def no_promotion() -> Iterator[None]:
    with jax.numpy_dtype_promotion("strict"), jax.numpy_rank_promotion("raise"):
        yield


MODES: dict[str, Callable[[], AbstractContextManager]] = {
    "no mode": nullcontext,
    "disable_jit": jax.disable_jit,
    "debug_nans": partial(jax.debug_nans, True),
    "enable_checks": partial(jax.enable_checks, True),
    "checking_leaks": jax.checking_leaks,
    "no promotion": no_promotion,
    "no transfers": partial(jax.transfer_guard, "disallow"),
    "x64": partial(jax.enable_x64, True),
    "checking values": jax_bce.checking,
}
# Each with and without jit, but what every other test is, what is the same without jit, and what
# JAX itself cannot do without: it transfers the number in x * 2.0.
WAYS = [
    pytest.param(mode, jit, id=f"{mode}-{'jit' if jit else 'eager'}")
    for mode in MODES
    for jit in (True, False)
    if (mode, jit)
    not in (
        ("no mode", True),
        ("disable_jit", False),
        ("no transfers", False),
        ("checking values", False),  # in test_check.py
    )
]


def with_labels(loss: Callable) -> Callable:
    """With respect to the labels as well, which have to be floating-point."""
    return lambda x, y: jax.value_and_grad(loss, argnums=(0, 1))(x, y.astype(x.dtype))


def hessian_vector_product(loss: Callable) -> Callable:
    return lambda x, y: jax.jvp(jax.grad(lambda x: loss(x, y)), (x,), (jnp.ones_like(x),))[1]


# From the loss to a function of logits and labels, new each time: JAX keeps what it has traced.
FUNCTIONS = {
    "smoothed": lambda loss: partial(loss, reduction="none", label_smoothing=0.1),
    "vmap": lambda loss: jax.vmap(with_labels(loss)),
    "recompute": lambda loss: with_labels(partial(loss, residuals="recompute")),
    "hessian-vector product": hessian_vector_product,
}


def evaluate(
    name: str, implementation: str, mode: str, jit: bool, logits: np.ndarray, labels: np.ndarray
) -> object:
    function = FUNCTIONS[name](partial(jax_bce.loss, implementation=implementation))
    operands = jax.device_put((logits, labels))
    with MODES[mode]():
        return jax.block_until_ready((jax.jit(function) if jit else function)(*operands))


def inputs() -> tuple[np.ndarray, np.ndarray]:
    return (
        oracle.random_logits(FLOAT32, SHAPE, seed=1),
        oracle.random_labels(np.uint8, SHAPE, seed=2),
    )


@cache
def expected(name: str, implementation: str) -> object:
    return evaluate(name, implementation, "no mode", True, *inputs())


@pytest.mark.parametrize("name", FUNCTIONS)
@pytest.mark.parametrize(("mode", "jit"), WAYS)
@pytest.mark.second
def test_same_results(implementation: str, mode: str, jit: bool, name: str) -> None:
    """Close, not the same bits: without jit XLA compiles what is not the kernel in other pieces."""
    results = evaluate(name, implementation, mode, jit, *inputs())
    tolerance = oracle.TOLERANCE["xla"].sum
    close = partial(np.testing.assert_allclose, rtol=tolerance, atol=tolerance, strict=True)
    jax.tree.map(close, results, expected(name, implementation))


@pytest.mark.parametrize(("mode", "jit"), WAYS)
def test_same_bits_of_the_kernel(platform: str, mode: str, jit: bool) -> None:
    logits, labels = jax.device_put(inputs())

    def function(x: jax.Array, y: jax.Array) -> tuple[jax.Array, jax.Array]:
        return jax_bce.loss_and_grad(x, y, axis=-1, implementation=platform)

    without = function(logits, labels)
    with MODES[mode]():
        results = (jax.jit(function) if jit else function)(logits, labels)
    oracle.assert_same_bits(results, without)


@pytest.mark.parametrize("jit", [True, False], ids=["jit", "eager"])
@pytest.mark.parametrize("name", FUNCTIONS)
def test_debug_nans_finds_none_at_infinity(implementation: str, name: str, jit: bool) -> None:
    """Where the loss has a finite limit. With respect to the labels it has none, and is no NaN."""
    logits = np.array([[np.inf, -np.inf, 1.0], [-np.inf, 0.0, np.inf]], FLOAT32)
    labels = np.array([[1, 0, 1], [0, 0, 1]], np.uint8)
    evaluate(name, implementation, "debug_nans", jit, logits, labels)


@pytest.mark.parametrize("jit", [True, False], ids=["jit", "eager"])
@pytest.mark.parametrize("name", FUNCTIONS)
def test_debug_nans_finds_that_of_the_user(implementation: str, name: str, jit: bool) -> None:
    logits, labels = inputs()
    logits[-1, -1] = np.nan
    with pytest.raises(FloatingPointError, match="nan"):
        evaluate(name, implementation, "debug_nans", jit, logits, labels)


@pytest.mark.skipif(
    not sysconfig.get_config_var("Py_GIL_DISABLED"), reason="this Python has no free threads"
)
def test_import_keeps_free_threads() -> None:
    """A module that does not say that it can do without makes Python lock, with a warning."""
    done = subprocess.run(
        [sys.executable, "-W", "error", "-c", "import sys, jax_bce; print(sys._is_gil_enabled())"],
        cwd="/",
        env=platforms.environment("cpu"),
        capture_output=True,
        text=True,
        timeout=300,
    )
    assert done.stdout == "False\n", done.stderr
