"""All that is known of the CUDA kernel without a GPU.

Its source runs on the host (cuda_kernel/on_host/), every bit against the CPU kernel, under the
sanitizers too; the built module holds code for the architectures it names and needs no CUDA
library; and XLA's program for CUDA calls it.
"""

import re
import subprocess
from collections.abc import Callable
from functools import partial
from pathlib import Path

import gpu_check
import jax
import jax.numpy as jnp
import numpy as np
import pytest

import jax_bce
from jax_bce import _primitive

KERNEL_TESTS = Path(__file__).parent / "cuda_kernel"
SOURCES = KERNEL_TESTS.parent.parent / "csrc"
FLAGS = ["-O1", "-g", "-std=c++20", "-pthread", "-march=x86-64-v3", "-ffp-contract=off"]
FLAGS += ["-fno-math-errno", "-Wall", "-Wextra", "-Werror", "-Wno-unknown-pragmas"]


@pytest.mark.parametrize(
    ("sanitizers", "effort"),
    [("", 1), ("address,undefined", 0), ("thread", 0)],
    ids=["bits", "address", "thread"],
)
def test_source_on_the_host(cpu: str, tmp_path: Path, sanitizers: str, effort: int) -> None:
    flags = [*FLAGS, "-DBCE_KERNEL=kBaselineKernel", '-DBCE_INSTRUCTION_SET=""']
    flags += ["-I", str(KERNEL_TESTS / "on_host")]
    if sanitizers:
        flags += [f"-fsanitize={sanitizers}", "-fno-sanitize-recover=all"]
    sources = [SOURCES / "bce_cuda.cu", SOURCES / "bce_cpu.cc", KERNEL_TESTS / "test.cc"]
    program = tmp_path / "test"
    subprocess.run(["g++", *flags, "-x", "c++", *map(str, sources), "-o", str(program)], check=True)
    done = subprocess.run([program, str(effort)], capture_output=True, text=True, timeout=900)
    assert done.returncode == 0, done.stdout[-3000:] + done.stderr[-3000:]
    assert re.search(r"[1-9]\d+ cases, 0 failed", done.stdout)


@pytest.mark.parametrize("program", ["test", "device"])
def test_programs_for_a_gpu_compile(
    require: Callable[[str], None], tmp_path: Path, program: str
) -> None:
    """`make gpu-check` runs them; its command is taken."""
    require("nvcc")
    source, target = KERNEL_TESTS / f"{program}.cc", tmp_path / "program.o"
    subprocess.run(
        [gpu_check.NVCC, *gpu_check.NVCC_FLAGS, "-c", str(source), "-o", str(target)], check=True
    )


@pytest.fixture
def module(require: Callable[[str], None]):
    """The built module, which every build has where there is an nvcc."""
    require("nvcc")
    assert _primitive._cuda is not None, _primitive.missing("cuda")
    return _primitive._cuda


def test_architectures(module) -> None:
    """As many generations as the compiler knows, from 7.5 on."""
    known = subprocess.run(["nvcc", "--list-gpu-arch"], capture_output=True, text=True).stdout
    wanted = ("75", "80", "86", "89", "90", "100", "120")
    assert module.architectures.split(", ") == [a for a in wanted if f"compute_{a}\n" in known]


def test_needs_no_cuda_library(module) -> None:
    libraries = subprocess.run(["ldd", module.__file__], capture_output=True, text=True).stdout
    assert "libc.so" in libraries
    assert not re.search("cuda|nv", libraries.replace(str(Path(module.__file__).parent), ""))
    symbols = subprocess.run(["nm", "-D", module.__file__], capture_output=True, text=True).stdout
    assert not re.search(r" U cu\w+", symbols)
    exported = re.findall(r" T (\w+)", symbols)
    assert exported == ["PyInit__cuda"]


def lowered(function: Callable, *shapes, dtype=jnp.float32, label_dtype=jnp.uint8) -> str:
    """The program that XLA gets for CUDA."""
    operands = [
        jax.ShapeDtypeStruct(shape, kind)
        for shape, kind in zip(shapes, (dtype, label_dtype), strict=True)
    ]
    traced = jax.jit(function).trace(*operands)
    return traced.lower(lowering_platforms=("cuda",)).as_text()


loss = partial(jax_bce.loss, implementation="cuda")
CALL = re.compile(r"custom_call @(jax_bce_v1_\w+)")


@pytest.mark.parametrize(("size", "blocks"), [(128, 0), (8192, 0), (8193, 2), (1 << 20, 128)])
def test_a_mean_is_one_call(module, size: int, blocks: int) -> None:
    """With room for the blocks' sums where there are several."""
    text = lowered(jax.value_and_grad(loss), (size,), (size,))
    assert CALL.findall(text) == ["jax_bce_v1_loss_and_grad"]
    assert re.findall(r"tensor<(\d+)xf64>", text)[:1] == ([str(blocks)] if blocks else [])
    assert CALL.findall(lowered(loss, (size,), (size,))) == ["jax_bce_v1_loss"]


def test_elements_and_rows_are_one_call(module) -> None:
    for keywords in ({"reduction": "none"}, {"axis": -1}):
        text = lowered(partial(loss, **keywords), (1000, 10), (1000, 10))
        assert CALL.findall(text) == ["jax_bce_v1_loss"]


def test_vmap_is_one_call(module) -> None:
    text = lowered(jax.vmap(jax.value_and_grad(loss)), (4, 20_000), (4, 20_000))
    assert CALL.findall(text) == ["jax_bce_v1_loss_and_grad"]
    assert re.findall(r"tensor<(\d+)xf64>", text)[:1] == ["12"]


def test_recompute_is_two_calls(module) -> None:
    function = jax.value_and_grad(partial(loss, residuals="recompute"))
    text = lowered(function, (20_000,), (20_000,), dtype=jnp.float16)
    assert sorted(CALL.findall(text)) == ["jax_bce_v1_grad", "jax_bce_v1_loss"]


def test_unasked_it_is_xla(module) -> None:
    """implementation=None is the fastest that was measured."""
    assert not CALL.findall(lowered(jax.value_and_grad(jax_bce.loss), (1 << 20,), (1 << 20,)))


def test_other_platforms_hold_no_call() -> None:
    traced = jax.jit(jax_bce.loss).trace(np.zeros(200, np.float32), np.zeros(200, np.int32))
    for platform in ("tpu", "rocm"):
        assert not CALL.findall(traced.lower(lowering_platforms=(platform,)).as_text())
