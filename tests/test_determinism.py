"""The same bits for any run, position, batch split, thread count and device; and an exact sum.

An element's result depends on its logit and label alone, and a row's on that row alone. A reduced
loss is within 2^-23 of the sum of its exact elements, whatever they are.
"""

import json
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from functools import partial

import jax
import numpy as np
import oracle
import platforms
import pytest
from oracle import BFLOAT16, FLOAT16, FLOAT32, FLOAT64

import jax_bce

pytestmark = pytest.mark.any_jax

# More than one block, so that several threads share the work.
SIZE = 300_007
# What runs in a process of its own: the bits of some results, and the size of XLA's thread pool.
PROGRAM = """
import hashlib, json, os, sys
import jax, numpy as np
import jax_bce

rng = np.random.default_rng(0)
hashes = []
for shape in ((300_007,), (300, 1001), (3, 100_003)):
    logits, labels = rng.normal(0, 4, shape).astype("f4"), rng.integers(0, 2, shape, "u1")
    weighted = {"weight": rng.uniform(0, 2, shape).astype("f4"), "where": logits > -3}
    for reduction, axis, options in (("none", None, {}), ("mean", -1, {}), ("sum", None, {}),
                                     ("weighted_mean", None, weighted)):
        call = jax.jit(lambda x, y: jax_bce.loss_and_grad(
            x, y, **options, reduction=reduction, axis=axis, implementation="cpu"))
        placed = [jax.device_put((logits, labels), device) for device in jax.devices()]
        results = [call(*operands) for operands in placed]  # all devices at once
        hashes.append([hashlib.sha256(np.asarray(l).tobytes() + np.asarray(g).tobytes()).hexdigest()
                       for l, g in results])
names = [open(f"/proc/self/task/{task}/comm").read() for task in os.listdir("/proc/self/task")]
print(json.dumps({"threads": sum("XLAEigen" in name for name in names), "hashes": hashes}))
"""


def inputs(shape, dtype=FLOAT32) -> tuple[np.ndarray, np.ndarray]:
    return oracle.random_logits(dtype, shape, seed=1), oracle.random_labels(dtype, shape, seed=2)


@pytest.mark.parametrize("reduction", ["none", "mean"])
def test_every_run(platform: str, dtype: np.dtype, reduction: str) -> None:
    logits, labels = inputs(SIZE, dtype)
    call = partial(jax_bce.loss_and_grad, reduction=reduction, implementation=platform)
    expected = call(logits, labels)
    for _ in range(5):
        oracle.assert_same_bits(call(logits, labels), expected)


@pytest.mark.parametrize("dtype", oracle.FLOATS[:3], ids=str)
def test_every_position(platform: str, dtype: np.dtype) -> None:
    """In a full vector, in a tail, alone: an element has the same result."""
    logits, labels = inputs(1003, dtype)
    call = partial(jax_bce.loss_and_grad, reduction="none", implementation=platform)
    expected = call(logits, labels)
    for start, stop in ((0, 1), (1, 1003), (3, 10), (500, 517), (1002, 1003), (7, 1000)):
        part = call(logits[start:stop], labels[start:stop])
        oracle.assert_same_bits(part, tuple(np.asarray(r)[start:stop] for r in expected))
    order = np.random.default_rng(3).permutation(1003)
    permuted = call(logits[order], labels[order])
    oracle.assert_same_bits(permuted, tuple(np.asarray(r)[order] for r in expected))


@pytest.mark.parametrize("intruder", [(np.inf, 0.0), (np.nan, 1.0), (1.0, 0.3)], ids=str)
def test_every_neighbour(platform: str, dtype: np.dtype, intruder: tuple[float, float]) -> None:
    """An element far out, or a soft label, changes the kernel's path for those around it."""
    logits = oracle.walk(dtype, 51_200, 1e-7, 60.0)
    logits = np.concatenate([logits, -logits])[:102_000]
    labels = np.random.default_rng(3).integers(0, 2, logits.size).astype(dtype)
    call = partial(jax_bce.loss_and_grad, reduction="none", implementation=platform)
    disturbed = [
        np.insert(values, range(0, values.size, 100), np.asarray(value, dtype))
        for values, value in zip((logits, labels), intruder, strict=True)
    ]
    results = [np.delete(np.asarray(r), np.s_[::101]) for r in call(*disturbed)]
    oracle.assert_same_bits(results, call(logits, labels))


@pytest.mark.parametrize("shape", [(64, 1001), (7, 40_003), (1000, 3)], ids=str)
@pytest.mark.parametrize("dtype", [FLOAT32, BFLOAT16], ids=str)
def test_batch_of_rows(platform: str, dtype: np.dtype, shape: tuple[int, int]) -> None:
    """Rows in another order, in smaller batches or one by one."""
    logits, labels = inputs(shape, dtype)
    call = jax.jit(partial(jax_bce.loss_and_grad, axis=-1, implementation=platform))
    expected = tuple(map(np.asarray, call(logits, labels)))
    order = np.random.default_rng(4).permutation(len(logits))
    oracle.assert_same_bits(call(logits[order], labels[order]), tuple(r[order] for r in expected))
    for split in (1, 3):
        parts = [call(logits[rows], labels[rows]) for rows in (slice(split), slice(split, None))]
        joined = tuple(np.concatenate(results) for results in zip(*parts, strict=True))
        oracle.assert_same_bits(joined, expected)
    alone = jax_bce.loss_and_grad(logits[-1], labels[-1], implementation=platform)
    oracle.assert_same_bits(alone, tuple(r[-1] for r in expected))


def test_implicit_choice_is_the_kernel(cpu: str) -> None:
    """On a CPU implementation=None is as deterministic as what it chooses."""
    logits, labels = inputs(SIZE)
    for reduction in ("none", "mean"):
        keywords = {"reduction": reduction}
        oracle.assert_same_bits(
            jax_bce.loss_and_grad(logits, labels, **keywords),
            jax_bce.loss_and_grad(logits, labels, implementation=cpu, **keywords),
        )


def test_8_devices_at_once(cpu: str) -> None:
    logits, labels = inputs(SIZE)
    call = jax.jit(partial(jax_bce.loss_and_grad, implementation=cpu))
    expected = call(logits, labels)
    devices = jax.devices(cpu)
    assert len(devices) == 8
    placed = [jax.device_put((logits, labels), device) for device in devices]
    for results in [call(*operands) for operands in placed * 3]:
        oracle.assert_same_bits(results, expected)


def test_calls_from_many_threads(platform: str) -> None:
    """Handlers share nothing."""
    # Placed: the default device is this thread's, not the others'.
    device = jax.devices(platform)[0]
    problems = [jax.device_put(inputs(SIZE - 1000 * i), device) for i in range(8)]
    call = partial(jax_bce.loss_and_grad, implementation=platform)
    expected = [call(*problem) for problem in problems]
    with ThreadPoolExecutor(8) as threads:
        for _ in range(3):
            for results, right in zip(
                threads.map(lambda problem: call(*problem), problems), expected, strict=True
            ):
                oracle.assert_same_bits(results, right)


def run_with(threads: int, devices: int, instruction_set: str = "") -> dict:
    """The program's results in a process where XLA's pool has so many threads.

    XLA takes the number of processors from NPROC, and at least one thread for each device.
    """
    flags = f"--xla_force_host_platform_device_count={devices}"
    environment = platforms.environment("cpu") | {"NPROC": str(threads), "XLA_FLAGS": flags}
    environment["JAX_BCE_CPU"] = instruction_set
    # -P: the source folder holds no compiled modules. The limit: a deadlock is a failure.
    done = subprocess.run(
        [sys.executable, "-P", "-c", PROGRAM],
        env=environment,
        capture_output=True,
        text=True,
        timeout=120,
        check=False,
    )
    if instruction_set and "names an instruction set it does not have" in done.stderr:
        pytest.skip(f"this processor has no {instruction_set}")
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout.splitlines()[-1])


@pytest.fixture(scope="module")
def one_thread(require) -> dict:
    require("cpu")
    return run_with(threads=1, devices=1)


@pytest.mark.parametrize(
    ("threads", "devices"), [(2, 1), pytest.param(5, 1, marks=pytest.mark.thorough), (1, 8)]
)
def test_every_thread_count(one_thread: dict, threads: int, devices: int) -> None:
    """Also 8 devices that share a pool: they would deadlock if a caller waited for the pool."""
    several = run_with(threads, devices)
    assert one_thread["threads"] == 1
    assert several["threads"] == max(threads, devices)
    for expected, hashes in zip(one_thread["hashes"], several["hashes"], strict=True):
        assert set(hashes) == set(expected)
        assert len(hashes) == devices


@pytest.mark.parametrize("instruction_set", ["x86-64-v3", "x86-64-v4", "aarch64"])
@pytest.mark.second
def test_every_instruction_set(one_thread: dict, instruction_set: str) -> None:
    """As many of them as this processor has."""
    assert run_with(1, 1, instruction_set)["hashes"] == one_thread["hashes"]


def _dynamic_range(size: int) -> np.ndarray:
    """Losses from 1e-38 to 1e38, most of them lost in the largest if added in float32."""
    magnitude = 10.0 ** np.random.default_rng(5).uniform(-30, 30, size)
    return np.where(magnitude < 1, np.log(magnitude), magnitude)


# Logits whose losses with label 0 are hard to add.
ADVERSARIES = {
    "random": lambda size: np.random.default_rng(6).normal(0, 4, size),
    "all the same": lambda size: np.full(size, 0.1),
    "all log 2": lambda size: np.zeros(size),
    "all tiny": lambda size: np.full(size, -60.0),
    "one huge": lambda size: np.where(np.arange(size) == size // 3, 1e7, 0.0),
    "huge first": lambda size: np.where(np.arange(size) == 0, 3e7, 1.0),
    "ascending": lambda size: np.linspace(-80, 80, size),
    "descending": lambda size: np.linspace(80, -80, size),
    "dynamic range": _dynamic_range,
    "just above a power of two": lambda size: np.full(size, 16 + 2.0**-19),
}


def check_sum(check, implementation: str, name: str, size: int) -> None:
    """Sum and mean against the float64 sum of exact elements."""
    logits = ADVERSARIES[name](size).astype(FLOAT32)
    elements = oracle.exact(logits, 0).loss
    for reduction, exact in (("sum", elements.sum()), ("mean", elements.mean())):
        keywords = {"reduction": reduction, "implementation": implementation}
        for loss in (
            jax_bce.loss(logits, 0, **keywords),
            jax_bce.loss_and_grad(logits, 0, **keywords)[0],
        ):
            check.reduced(implementation, loss, exact, f"sum, {name}")


@pytest.mark.parametrize("name", ADVERSARIES)
@pytest.mark.parametrize("size", [1, 2, 1000, 65_537])
def test_sum(check, implementation: str, size: int, name: str) -> None:
    check_sum(check, implementation, name, size)


@pytest.mark.parametrize("name", ADVERSARIES)
@pytest.mark.thorough
def test_sum_of_millions(check, platform: str, name: str) -> None:
    check_sum(check, platform, name, size=3_000_017)


@pytest.mark.parametrize("label", [0.1, 0.5, 0.9])
@pytest.mark.parametrize("dtype", [FLOAT16, BFLOAT16, FLOAT32], ids=str)
def test_sum_of_soft_labels(check, implementation: str, dtype: np.dtype, label: float) -> None:
    logits = oracle.random_logits(dtype, 100_003, seed=7)
    labels = np.full_like(logits, label)
    loss = jax_bce.loss(logits, labels, implementation=implementation)
    check.reduced(implementation, loss, oracle.exact(logits, labels).loss.mean(), logits=dtype)


@pytest.mark.parametrize("label", [0, 1])
@pytest.mark.parametrize("dtype", [FLOAT16, BFLOAT16], ids=str)
def test_sum_of_equal_16_bit_logits(check, platform: str, dtype: np.dtype, label: int) -> None:
    """Their errors, and those of their sums, add up."""
    logits = oracle.every_16_bit(dtype)
    logits = logits[np.abs(logits.astype(FLOAT32)) <= 80]
    exact = oracle.exact(logits, label).loss
    rows = np.broadcast_to(logits[:, None], (logits.size, 300))
    loss = jax_bce.loss(rows, label, axis=-1, implementation=platform)
    check.reduced(platform, loss, exact, "equal logits", logits=dtype)


@pytest.mark.parametrize("dtype", [FLOAT16, BFLOAT16], ids=str)
def test_16_bit_results_do_not_depend_on_their_neighbours(platform: str, dtype: np.dtype) -> None:
    """Soft labels have longer arithmetic, which rounds a few results of hard labels otherwise."""
    logits = oracle.every_16_bit(dtype)
    logits = logits[np.isfinite(logits.astype(FLOAT32))]
    call = partial(jax_bce.loss_and_grad, reduction="none", implementation=platform)
    alone = call(logits, np.zeros(logits.shape, FLOAT32))
    labels = np.tile(np.array([0, 0.3], FLOAT32), logits.size)
    for found, expected in zip(call(np.repeat(logits, 2), labels), alone, strict=True):
        np.testing.assert_array_equal(np.asarray(found)[::2], np.asarray(expected))


@pytest.mark.parametrize("dtype", [FLOAT64], ids=str, indirect=True)
def test_sum_in_float64(check, implementation: str, dtype: np.dtype) -> None:
    logits = oracle.random_logits(dtype, 4096, seed=8)
    loss = jax_bce.loss(logits, 0, reduction="sum", implementation=implementation)
    check.reduced(implementation, loss, oracle.exact(logits, 0).loss.sum())


@pytest.mark.parametrize("shape", [(3, 50_001), (501, 301)], ids=str)
def test_sums_of_rows(check, platform: str, shape: tuple[int, int]) -> None:
    logits, labels = inputs(shape)
    loss = jax_bce.loss(logits, labels, axis=-1, reduction="sum", implementation=platform)
    check.reduced(platform, loss, oracle.exact(logits, labels).loss.sum(axis=-1))


def test_sum_in_any_order(check, platform: str) -> None:
    """Another order may change the last bit, and no more."""
    logits = _dynamic_range(SIZE).astype(FLOAT32)
    exact = oracle.exact(logits, 0).loss.sum()
    for values in (logits, logits[::-1], np.sort(logits), -np.sort(-logits)):
        check.reduced(
            platform, jax_bce.loss(values, 0, reduction="sum", implementation=platform), exact
        )
