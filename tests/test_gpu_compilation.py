"""What XLA makes of the loss on one GPU, on eight and on two hosts of eight, seen without a GPU.

gpu_compiler.py compiles; in a process of its own, as the CUDA plugin is for nobody else.
"""

import functools
import math
import multiprocessing
import re
import subprocess
import sys
from collections.abc import Callable, Iterator
from concurrent.futures import ProcessPoolExecutor
from pathlib import Path

import gpu_compiler
import pytest
from gpu_compiler import SHAPE, Compiled

from jax_bce import _kernels

ROWS, COLUMNS = SHAPE
SIZE = math.prod(SHAPE)
FLOAT64 = 8
SMALL = 4096  # bytes: losses, scale and smoothing
ALIGNMENT = 512  # bytes: XLA's, of a few buffers
# An element's logit, label and gradient.
TYPES = {("float32", "float32"): (4, 4, 4), ("bfloat16", "uint8"): (2, 1, 2)}
FORWARD, BACKWARD, BOTH = (f"jax_bce_v3_{kind}" for kind in ("loss", "grad", "loss_and_grad"))

both_types = pytest.mark.parametrize("types", TYPES, ids="+".join)


@pytest.fixture(scope="module")
def compiled(require: Callable[[str], None]) -> Iterator[Callable[..., Compiled]]:
    require("gpu-compiler")
    spawn = multiprocessing.get_context("spawn")
    with ProcessPoolExecutor(1, spawn, initializer=gpu_compiler.prepare) as process:
        yield functools.cache(
            lambda *arguments: process.submit(gpu_compiler.compiled, *arguments).result()
        )


def assert_memory(
    program: Compiled, bytes_per_element: int, sums: int, gpus: int = 1, read: int = 0
) -> None:
    """The traffic is that of elements and of the groups' sums, the only temporaries.

    `read` is how many of the sums XLA adds up. The kernel adds up the others.
    """
    sums *= FLOAT64
    moved = program.bytes_per_element * SIZE / gpus
    assert 0 <= moved - bytes_per_element * SIZE / gpus - sums - read * FLOAT64 <= SMALL
    assert 0 <= program.temporary_bytes - sums <= ALIGNMENT


@both_types
@pytest.mark.parametrize("name", ["value_and_grad", "value_and_grad, smoothed labels"])
def test_one_pass(compiled: Callable[..., Compiled], name: str, types: tuple[str, str]) -> None:
    """One kernel: nothing is converted, copied, transposed or done elsewhere."""
    program = compiled(name, *types)
    assert program.kernels == [BOTH]
    assert program.collectives == []
    assert_memory(program, sum(TYPES[types]), _kernels._cuda.workspace(1, SIZE))


@both_types
def test_vmap(compiled: Callable[..., Compiled], types: tuple[str, str]) -> None:
    program = compiled("vmap of value_and_grad", *types)
    assert program.kernels == [BOTH]
    assert_memory(program, sum(TYPES[types]), _kernels._cuda.workspace(ROWS, COLUMNS))


@both_types
def test_export_for_any_sizes(compiled: Callable[..., Compiled], types: tuple[str, str]) -> None:
    """The kernel finds its room for the sums, as large as that of a program of these sizes."""
    program = compiled("value_and_grad, exported for any sizes", *types)
    assert program.kernels.count(BOTH) == 1
    assert_memory(program, sum(TYPES[types]), _kernels._cuda.workspace(1, SIZE))


@both_types
def test_loss_alone(compiled: Callable[..., Compiled], types: tuple[str, str]) -> None:
    program = compiled("loss alone", *types)
    assert program.kernels == [FORWARD]
    assert_memory(program, sum(TYPES[types][:2]), _kernels._cuda.workspace(1, SIZE))


@both_types
def test_recompute(compiled: Callable[..., Compiled], types: tuple[str, str]) -> None:
    """Logits and labels are read twice, and nothing is kept: the sums fit into the gradient."""
    program = compiled("value_and_grad, recompute", *types)
    assert sorted(program.kernels) == [BACKWARD, FORWARD]
    assert program.temporary_bytes <= ALIGNMENT
    logit, label, gradient = TYPES[types]
    expected = (2 * (logit + label) + gradient) * SIZE
    sums = FLOAT64 * _kernels._cuda.workspace(1, SIZE)
    assert 0 <= program.bytes_per_element * SIZE - expected - sums <= SMALL


@both_types
@pytest.mark.parametrize(("where", "gpus"), [("8 GPUs", 8), ("2 hosts of 8 GPUs", 16)])
def test_shard_map(
    compiled: Callable[..., Compiled], types: tuple[str, str], where: str, gpus: int
) -> None:
    """Each GPU evaluates its own elements; one number goes over the wire."""
    program = compiled(f"shard_map, {where}", *types)
    assert program.kernels == [BOTH]
    assert program.collectives == ["all-reduce f32[]"]
    sums = _kernels._cuda.workspace(1, SIZE // gpus)
    assert_memory(program, sum(TYPES[types]), sums, gpus)


@both_types
@pytest.mark.parametrize(("where", "gpus"), [("8 GPUs", 8), ("2 hosts of 8 GPUs", 16)])
def test_sharded_operands_stay_where_they_are(
    compiled: Callable[..., Compiled], types: tuple[str, str], where: str, gpus: int
) -> None:
    """Spread by jit alone: the kernel on each GPU's elements, its sums, and one number sent."""
    program = compiled(f"value_and_grad, {where}", *types)
    assert program.kernels == [BOTH, "fusion", "fusion"]
    assert program.collectives == ["all-reduce f64[]"]
    groups = SIZE // gpus // 1024
    assert_memory(program, sum(TYPES[types]), groups, gpus, read=groups)


@both_types
@pytest.mark.parametrize("where", ["8 GPUs", "2 hosts of 8 GPUs"])
def test_sharded_rows_and_columns(
    compiled: Callable[..., Compiled], types: tuple[str, str], where: str
) -> None:
    """XLA makes one of the two all-reduces that the mesh's axes ask for."""
    program = compiled(f"rows and columns, {where}", *types)
    assert program.kernels.count(BOTH) == 1
    assert program.collectives == ["all-reduce f64[]"]


@both_types
@pytest.mark.parametrize(
    "name",
    [
        "short rows, 8 GPUs",
        "columns of short rows, 8 GPUs",
        "rows and columns of short rows, 8 GPUs",
        "uneven rows, 8 GPUs",
    ],
)
def test_sharded_short_rows(
    compiled: Callable[..., Compiled], types: tuple[str, str], name: str
) -> None:
    """Nothing is gathered, however the logits are spread; XLA adds up sums of 1,024 elements."""
    program = compiled(name, *types)
    assert program.kernels.count(BOTH) == 1
    assert program.collectives == ["all-reduce f64[]"]
    if not name.startswith("uneven"):
        assert program.kernels == [BOTH, "fusion", "fusion"]
        assert 0 <= program.bytes_per_element - sum(TYPES[types]) <= 2.5 * FLOAT64 / 1024


@both_types
def test_sharded_second_derivative(
    compiled: Callable[..., Compiled], types: tuple[str, str]
) -> None:
    """A Hessian times a vector sends nothing."""
    program = compiled("Hessian times vector, 8 GPUs", *types)
    assert program.collectives == []


@both_types
@pytest.mark.parametrize("peer", ["optax", "plain jnp", 'implementation="xla"'])
def test_no_peer_needs_less(
    compiled: Callable[..., Compiled], types: tuple[str, str], peer: str
) -> None:
    """XLA may match the traffic; it never does with one kernel."""
    ours, theirs = compiled("value_and_grad", *types), compiled(peer, *types)
    sums = FLOAT64 * _kernels._cuda.workspace(1, SIZE)
    assert len(ours.kernels) < len(theirs.kernels)
    assert (ours.bytes_per_element - theirs.bytes_per_element) * SIZE <= sums + SMALL
    assert ours.temporary_bytes <= theirs.temporary_bytes + sums


@both_types
def test_the_reader_sees_other_kernels(
    compiled: Callable[..., Compiled], types: tuple[str, str]
) -> None:
    """optax computes in several passes, and what they hand over is memory."""
    program = compiled("optax", *types)
    assert "fusion" in program.kernels
    assert program.bytes_per_element > 1.5 * sum(TYPES[types])
    assert program.temporary_bytes >= SIZE * TYPES[types][0]


@both_types
@pytest.mark.parametrize("where", ["", ", 8 GPUs", ", 2 hosts of 8 GPUs"])
def test_unasked_it_is_the_kernel(
    compiled: Callable[..., Compiled], types: tuple[str, str], where: str
) -> None:
    assert compiled(f"implementation=None{where}", *types) == compiled(
        f"value_and_grad{where}", *types
    )


@both_types
def test_unasked_it_is_the_kernel_with_a_weight(
    compiled: Callable[..., Compiled], types: tuple[str, str]
) -> None:
    """No weight is broadcast. On several GPUs it would be, so there XLA does it on the way."""
    program = compiled("implementation=None, weight per class", *types)
    assert program.kernels.count(BOTH) == 1
    assert program.bytes_per_element < sum(TYPES[types]) + 0.1
    of_several = compiled("implementation=None, weight per class, 8 GPUs", *types)
    assert BOTH not in of_several.kernels


@both_types
def test_the_kernel_would_copy_transposed_operands(
    compiled: Callable[..., Compiled], types: tuple[str, str]
) -> None:
    chosen = compiled("implementation=None, axis=0", *types)
    named = compiled('implementation="cuda", axis=0', *types)
    assert BOTH in named.kernels
    assert BOTH not in chosen.kernels
    assert chosen.bytes_per_element < named.bytes_per_element


@both_types
@pytest.mark.parametrize("name", ['implementation=None, reduction="none"', 'implementation="xla"'])
def test_without_the_kernel(
    compiled: Callable[..., Compiled], types: tuple[str, str], name: str
) -> None:
    """XLA makes one kernel of what has a result per element, and more where it adds up."""
    program = compiled(name, *types)
    assert not any("jax_bce" in kernel for kernel in program.kernels)
    assert (len(program.kernels) == 1) == ("None" in name)


@pytest.mark.any_jax
@pytest.mark.thorough
def test_model_of_both(require: Callable[[str], None]) -> None:
    """Where None is the kernel, it is at or ahead of XLA by the model: one case of each kind."""
    for what in ("gpu-compiler", "cuobjdump", "nvcc"):
        require(what)
    cases = ["mean, bfloat16 and uint8", "mean of 2^16", "rows, 1,000,000 x 10"]
    cases += ["weight (C,)", "weight and pos_weight (C,), sample_weight (B,)"]
    script = Path(__file__).with_name("gpu_model.py")
    command = [sys.executable, script, "--gpus", "H200", "--cases", *cases]
    done = subprocess.run(command, check=True, capture_output=True, text=True, timeout=300)
    rows = [line for line in done.stdout.splitlines() if line.startswith("| ")][2:]
    assert [row.split(" | ")[0].removeprefix("| ") for row in rows] == cases
    assert all(float(re.search(r"\((\S+)x\)", row)[1]) >= 1 for row in rows)
