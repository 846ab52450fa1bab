"""What only a GPU shows of the CUDA kernel: every float32, rows and grids of every size, misaligned
and huge buffers, capture into CUDA graphs, threads.

The bits expected are the CPU kernel's, or those of the same call under other circumstances. Most of
the other files' tests run on a GPU, too.
"""

import re
import subprocess
import sys
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import oracle
import platforms
import pytest
from hlo import kernel_calls
from oracle import BFLOAT16, FLOAT16, FLOAT32, FLOAT64

import jax_bce
from jax_bce import _kernels

# From one float32 bit pattern to the next one asked; with 1 there are 2^33 gradients and losses.
STRIDE = 1
CHUNK = 2**22
# The share of losses that may be a neighbour of the CPU kernel's: a GPU's division is an ulp off
# for a few numbers.
OTHER_LOSSES = 1e-7
# More elements than 31 bits count.
MANY = 2**31
# What a warp and a thread block evaluate.
GROUP, BLOCK = 1024, 8192
LENGTHS = [
    *range(301),
    *(near + d for near in range(GROUP, 3 * BLOCK + 1, GROUP) for d in (-3, -1, 0, 1, 2)),
]
# What runs in a process of its own: the bits of ten steps, each with buffers of its own.
PROGRAM = """
import hashlib
import jax, numpy as np
import jax_bce

@jax.jit
def step(x, y):
    results = [jax_bce.loss_and_grad(x, y, axis=axis, implementation="cuda") for axis in (None, -1)]
    return results, x - 1000 * results[0][1]

rng = np.random.default_rng(0)
x, y = rng.normal(0, 4, (5, 20_011)).astype("f4"), rng.integers(0, 2, (5, 20_011), "u1")
kept = []
for _ in range(10):
    results, x = step(x, y)
    kept += [results, x]
print(hashlib.sha256(b"".join(np.asarray(a).tobytes() for a in jax.tree.leaves(kept))).hexdigest())
"""


def inputs(shape, dtype=FLOAT32, label_dtype=np.uint8) -> tuple[np.ndarray, np.ndarray]:
    return (
        oracle.random_logits(dtype, shape, seed=1),
        oracle.random_labels(label_dtype, shape, seed=2),
    )


def by_the_cpu_kernel(function: Callable, *operands):
    """What `function(*operands, implementation=...)` is on the CPU."""
    with platforms.kernel("cpu") as cpu:
        return function(*operands, implementation=cpu)


@partial(jax.jit, static_argnames="implementation")
def from_pattern(first: jax.Array, label: jax.Array, implementation: str):
    patterns = first + jnp.uint32(STRIDE) * jnp.arange(CHUNK, dtype=jnp.uint32)
    logits = jax.lax.bitcast_convert_type(patterns, jnp.float32)
    labels = jnp.full(CHUNK, label)
    return jax_bce.loss_and_grad(logits, labels, reduction="none", implementation=implementation)


@jax.jit
def differences(actual: jax.Array, expected: jax.Array) -> tuple[jax.Array, jax.Array]:
    """How many float32 numbers differ, and by how many ulp at most; NaN equals NaN."""
    bits, others = (jax.lax.bitcast_convert_type(v, jnp.int32) for v in (actual, expected))
    distance = jnp.where(jnp.isnan(actual) & jnp.isnan(expected), 0, bits - others)
    return jnp.sum(distance != 0), jnp.max(abs(distance.astype(jnp.float32)))


@pytest.mark.parametrize("label", [0, 1])
def test_every_float32(cuda: str, label: int) -> None:
    """Every gradient has the CPU kernel's bits, and so have all losses but a few."""
    device = jax.devices(cuda)[0]
    found = []
    for first in range(0, 2**32, CHUNK * STRIDE):
        arguments = np.uint32(first), np.uint8(label)
        actual = from_pattern(*arguments, implementation=cuda)
        expected = jax.device_put(by_the_cpu_kernel(from_pattern, *arguments), device)
        pairs = zip(actual, expected, strict=True)
        # Numbers, for which JAX is waited for: it would keep all results in memory.
        found.append([[float(number) for number in differences(*pair)] for pair in pairs])
    count, distance = np.moveaxis(np.array(found), -1, 0)
    loss, gradient = 0, 1
    assert count[:, gradient].sum() == 0
    assert count[:, loss].sum() <= OTHER_LOSSES * len(found) * CHUNK
    assert distance[:, loss].max() <= 1


def test_the_known_answers(cuda: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """The kernel passes on this GPU, and is what a call takes that does not name it."""
    monkeypatch.delenv("JAX_BCE_GPU", raising=False)
    assert _kernels.fails() is None
    compiled = jax.jit(lambda x, y: jax_bce.loss_and_grad(x, y)).lower(*inputs(1000)).compile()
    assert kernel_calls(compiled) == ["jax_bce_v3_loss_and_grad"]
    assert compiled(*inputs(1000))[0] == jax_bce.loss(*inputs(1000), implementation=cuda)


@partial(jax.jit, static_argnames="implementation")
def each(problems: list[tuple[jax.Array, jax.Array]], implementation: str):
    """In one program: as it holds nothing but calls, it is compiled in no time."""
    return [jax_bce.loss_and_grad(*problem, implementation=implementation) for problem in problems]


def test_every_length(cuda: str) -> None:
    """A mean's additions have one order on both platforms, so it has the same bits."""
    problems = [inputs(length) for length in LENGTHS]
    oracle.assert_same_bits(each(problems, cuda), by_the_cpu_kernel(each, problems))


def in_parts(
    logits: np.ndarray, labels: np.ndarray, parts: int, workspace: int = 0
) -> list[jax.Array]:
    """Mean and gradient by the handler, the mean as so many float64 numbers."""
    shapes = [((parts,), FLOAT64), (logits.shape, FLOAT32), ((workspace,), FLOAT64)]
    with jax.enable_x64(True):
        results = [jax.ShapeDtypeStruct(*each) for each in shapes[: 3 if workspace else 2]]
        call = jax.ffi.ffi_call("jax_bce_v3_loss_and_grad", results, has_side_effect=True)
        attributes = {"modifiers": 0, "reduced_rank": 1, "count": logits.size}
        numbers = {name: np.int64(number) for name, number in attributes.items()}
        return jax.block_until_ready(call(logits, labels, np.float32(1), np.float32(0), **numbers))


@pytest.mark.parametrize("size", [1, 1000, GROUP + 1, 5 * GROUP, 3 * BLOCK + 7, 300_001])
def test_a_mean_in_parts(cuda: str, size: int) -> None:
    """For XLA to add up where jit spreads elements over GPUs: one a group, and some zeros."""
    operands = inputs(size)
    groups = -(-size // GROUP)
    parts, gradient = in_parts(*operands, groups + 3)
    mean, expected = jax.jit(partial(jax_bce.loss_and_grad, implementation=cuda))(*operands)
    assert np.float32(np.sum(parts)) == mean
    assert np.all(parts[groups:] == 0)
    oracle.assert_same_bits(gradient, expected)
    if groups > 2:
        with pytest.raises(jax.errors.JaxRuntimeError, match=f"room for {groups} float64 sums"):
            in_parts(*operands, groups - 1)
        with pytest.raises(jax.errors.JaxRuntimeError, match="a result too many"):
            in_parts(*operands, groups - 1, workspace=groups)


GRIDS = [(2**20 + 3, 5), (70_001, 33), (70_001, GROUP), (70_001, GROUP + 1), (999, BLOCK + 1)]
GRIDS += [(5, 3_000_017), (1, 50_000_001), (50_000_001, 1)]


@pytest.mark.parametrize("shape", GRIDS, ids=str)
def test_every_grid(cuda: str, shape: tuple[int, int]) -> None:
    """More rows than a grid is high, more blocks in a row than are added up at once."""
    logits, labels = (np.resize(values, shape) for values in inputs(2**20 + 7))
    function = jax.jit(partial(jax_bce.loss_and_grad, axis=-1), static_argnames="implementation")
    expected = by_the_cpu_kernel(function, logits, labels)
    oracle.assert_same_bits(function(logits, labels, implementation=cuda), expected)


def test_every_pair_of_dtypes_in_blocks(
    check, cuda: str, dtype: np.dtype, label_dtype: np.dtype
) -> None:
    # mpmath, the oracle of float64, takes its time.
    size = 2_003 if dtype == FLOAT64 else 20_011
    logits, labels = inputs(size, dtype, label_dtype)
    if label_dtype in oracle.FLOATS:
        # Numbers of every dtype: it does not matter where they are rounded.
        labels = oracle.round_to(np.arange(size) % 257 / 256, label_dtype)
    call = partial(jax_bce.loss_and_grad, logits, labels, implementation=cuda)
    loss, gradient = call(reduction="none")
    check.elements(cuda, logits, labels, loss=loss, gradient=gradient)
    mean, gradient = call()
    check.elements(cuda, logits, labels, gradient=gradient, factor=1 / size)
    exact = oracle.exact(logits, labels).loss.sum() / size
    check.reduced(cuda, mean, exact, logits=logits.dtype)


WIDTHS = pytest.mark.parametrize(
    ("dtype", "label_dtype"),
    [(FLOAT32, np.uint8), (FLOAT32, FLOAT32), (BFLOAT16, np.uint8), (FLOAT16, BFLOAT16)],
    ids=str,
)


@WIDTHS
@pytest.mark.parametrize("columns", [259, 2051, 20_003])
def test_every_misalignment(cuda: str, columns: int, dtype: np.dtype, label_dtype) -> None:
    """Rows of odd length start anywhere, and have the bits that they have alone."""
    logits, labels = inputs((9, columns), dtype, label_dtype)
    results = jax_bce.loss_and_grad(logits, labels, axis=-1, implementation=cuda)
    alone = each(list(zip(logits, labels, strict=True)), cuda)
    oracle.assert_same_bits(list(zip(*results, strict=True)), alone)


@WIDTHS
def test_slices(cuda: str, dtype: np.dtype, label_dtype) -> None:
    """Under jit, whether XLA copies a slice or passes it on as it lies."""
    logits, labels = inputs(20_011, dtype, label_dtype)

    def slices(x, y):
        return [(x[offset : offset + 20_000], y[offset : offset + 20_000]) for offset in range(9)]

    sliced = jax.jit(lambda x, y: each(slices(x, y), cuda))(logits, labels)
    oracle.assert_same_bits(sliced, each(slices(logits, labels), cuda))


@pytest.mark.parametrize("library", ["cupy", "torch"])
def test_borrowed_buffers(cuda: str, library: str) -> None:
    """Views of another library's memory on the GPU, at every offset that XLA takes."""
    module = pytest.importorskip(library)
    place = {"device": "cuda"} if library == "torch" else {}
    logits, labels = inputs(20_011, FLOAT32, FLOAT32)
    lenders = [module.asarray(values, **place) for values in (logits, labels)]
    call = partial(jax_bce.loss_and_grad, implementation=cuda)
    for offset in range(9):
        try:
            borrowed = [jax.dlpack.from_dlpack(lender[offset:]) for lender in lenders]
            results = jax.block_until_ready(call(*borrowed))
        except (RuntimeError, ValueError) as error:
            # XLA takes arguments at multiples of 16 bytes, and says so before it calls anything.
            if offset % 4 == 0 or not re.search(r"multiple of|align", str(error)):
                raise
            continue
        oracle.assert_same_bits(results, call(logits[offset:], labels[offset:]))


@pytest.mark.parametrize(
    ("rows", "columns"),
    [(1, BLOCK + 17), (1000, 33), (3, 2 * BLOCK + 17)],
    ids=["one row", "short rows", "long rows"],
)
def test_more_than_2_to_the_31_elements(check, cuda: str, rows: int, columns: int) -> None:
    """Some rows over and over, or one row that goes on and on: no index is cut to 32 bits."""
    logits, labels = inputs((rows, columns), BFLOAT16)
    times = MANY // logits.size + 1
    shape = (times * columns,) if rows == 1 else (times * rows, columns)
    # Logits, labels and gradient are 5 bytes an element.
    needed, limit = 6 * times * logits.size, jax.devices(cuda)[0].memory_stats()["bytes_limit"]
    if needed > limit:
        pytest.skip(f"needs {needed} bytes of a GPU's memory, JAX has {limit}")

    @jax.jit
    def repeat(*arrays):
        return [jnp.broadcast_to(a, (times, *a.shape)).reshape(shape) for a in arrays]

    @partial(jax.jit, static_argnums=1)
    def repeats(values, size):
        """The first of the repetitions, and whether all are like it."""
        values = values.reshape(-1, *size)
        return values[0], jnp.all(values == values[0])

    call = jax.jit(partial(jax_bce.loss_and_grad, axis=-1, implementation=cuda))
    loss, gradient = call(*repeat(logits, labels))
    loss, same_loss = repeats(loss, (rows,))
    gradient, same_gradient = repeats(gradient, (rows, columns))
    assert same_loss
    assert same_gradient
    check.reduced(cuda, loss, oracle.exact(logits, labels).loss.mean(axis=-1))
    check.elements(cuda, logits, labels, gradient=gradient, factor=1 / shape[-1])


@pytest.mark.parametrize(
    ("reduction", "axis"), [("none", None), ("mean", None), ("mean", -1)], ids=str
)
def test_every_time(cuda: str, reduction: str, axis: int | None) -> None:
    logits, labels = jax.device_put(inputs((50, 100_003)), jax.devices(cuda)[0])
    call = partial(jax_bce.loss_and_grad, reduction=reduction, axis=axis, implementation=cuda)
    expected = jax.tree.map(np.asarray, call(logits, labels))
    for _ in range(20):
        oracle.assert_same_bits(call(logits, labels), expected)


def test_two_threads(cuda: str) -> None:
    """Two programs in turn on one device: neither waits for the other, nor writes into it."""
    device = jax.devices(cuda)[0]
    problems = [jax.device_put(inputs(shape), device) for shape in ((3_000_017,), (30_001, 101))]
    call = jax.jit(partial(jax_bce.loss_and_grad, axis=-1, implementation=cuda))
    expected = [jax.tree.map(np.asarray, call(*problem)) for problem in problems]
    with ThreadPoolExecutor(2) as threads:
        several = threads.map(lambda problem: [call(*problem) for _ in range(20)], problems)
        for results, right in zip(several, expected, strict=True):
            for result in results:
                oracle.assert_same_bits(result, right)


def run_with(flags: str, folder: Path) -> tuple[str, bool]:
    """The program's bits, and whether XLA captured a call of the kernel into a CUDA graph."""
    flags += f" --xla_dump_to={folder} --xla_dump_hlo_as_text"
    # -P: the source folder holds no compiled modules.
    done = subprocess.run(
        [sys.executable, "-P", "-c", PROGRAM],
        env=platforms.environment("cuda") | {"XLA_FLAGS": flags},
        capture_output=True,
        text=True,
        timeout=300,
    )
    assert done.returncode == 0, done.stderr
    programs = [path.read_text() for path in folder.glob("*jit_step*thunk_sequence*")]
    assert programs, sorted(folder.iterdir())
    captured = re.compile(r"kCommandBuffer.*\n(?: .*\n)*? +\d+: kCustomCall")
    return done.stdout.split()[-1], any(captured.search(program) for program in programs)


def test_cuda_graphs(cuda: str, tmp_path: Path) -> None:
    """A captured call has the bits of one that is launched, whichever buffers it is given."""
    launched = run_with("--xla_gpu_enable_command_buffer=", tmp_path / "launched")
    types = "--xla_gpu_enable_command_buffer=FUSION,CUSTOM_CALL"
    captured = run_with(f"{types} --xla_gpu_graph_min_graph_size=1", tmp_path / "captured")
    assert (launched[1], captured[1]) == (False, True)
    assert captured[0] == launched[0]
