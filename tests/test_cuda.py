"""All that is known of the CUDA kernel without a GPU.

Its source runs on the host (cuda_kernel/on_host/), every float32 bit against the CPU kernel, under
the sanitizers too; the built module holds code for the architectures it names, without detours
through memory, and needs no CUDA library; and XLA's program for CUDA calls it. What XLA compiles of
that program is in test_gpu_compilation.py.
"""

import os
import re
import subprocess
from collections.abc import Callable
from functools import partial
from pathlib import Path

import disassembly
import gpu_check
import jax
import jax.numpy as jnp
import numpy as np
import pytest
import sample
from jax import export

import jax_bce
from jax_bce import _kernels

KERNEL_TESTS = Path(__file__).parent / "cuda_kernel"
SOURCES = KERNEL_TESTS.parent.parent / "csrc"
FLAGS = ["-O1", "-g1", "-std=c++20", "-pthread", "-march=x86-64-v3", "-ffp-contract=off"]
FLAGS += ["-fno-math-errno", "-Wall", "-Wextra", "-Werror", "-Wno-unknown-pragmas"]


@pytest.mark.any_jax
@pytest.mark.parametrize(
    ("sanitizers", "effort"),
    [
        pytest.param("", 1 if sample.everything else 0, id="bits"),
        pytest.param("address,undefined", 0, id="address", marks=pytest.mark.thorough),
        pytest.param("thread", -1, id="thread", marks=pytest.mark.thorough),
    ],
)
def test_source_on_the_host(cpu: str, tmp_path: Path, sanitizers: str, effort: int) -> None:
    flags = [*FLAGS, "-DBCE_INSTRUCTION_SET=baseline", "-I", str(KERNEL_TESTS / "on_host")]
    if sanitizers:
        flags += [f"-fsanitize={sanitizers}", "-fno-sanitize-recover=all"]
    sources = [SOURCES / "bce_cuda.cu", *SOURCES.glob("bce_cpu_*.cc"), KERNEL_TESTS / "test.cc"]
    program = tmp_path / "test"
    subprocess.run(["g++", *flags, "-x", "c++", *map(str, sources), "-o", str(program)], check=True)
    done = subprocess.run([program, str(effort)], capture_output=True, text=True, timeout=900)
    assert done.returncode == 0, done.stdout[-3000:] + done.stderr[-3000:]
    assert re.search(r"[1-9]\d+ cases, 0 failed", done.stdout)


@pytest.mark.any_jax
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
    """The built module."""
    require("gpu-code")
    return _kernels._cuda


@pytest.mark.any_jax
def test_architectures(module, require: Callable[[str], None]) -> None:
    """As many generations as the compiler knows, from 7.5 on, or those that were asked for."""
    require("nvcc")
    known = subprocess.run(["nvcc", "--list-gpu-arch"], capture_output=True, text=True).stdout
    generations = [a for a in (75, 80, 86, 89, 90, 100, 120) if f"compute_{a}\n" in known]
    named = [int(a) for a in re.findall(r"\d+", os.environ.get("CUDAARCHS", ""))]
    present = sorted(set(module.compute_capabilities()))
    assert module.machine_code in ([named] if named else [present, generations])


@pytest.mark.any_jax
def test_needs_no_cuda_library(module) -> None:
    libraries = subprocess.run(["ldd", module.__file__], capture_output=True, text=True).stdout
    assert "libc.so" in libraries
    assert not re.search("cuda|nv", libraries.replace(str(Path(module.__file__).parent), ""))
    symbols = subprocess.run(["nm", "-D", module.__file__], capture_output=True, text=True).stdout
    assert not re.search(r" U cu\w+", symbols)
    exported = re.findall(r" T (\w+)", symbols)
    assert exported == ["PyInit__cuda"]


@pytest.fixture
def code(module, require: Callable[[str], None]):
    """The module's machine code."""
    require("cuobjdump")
    return disassembly


# How many instructions an H200 can issue for an element in the time that its memory takes: 132
# processors, each 4 x 32 threads a clock of 1.98 GHz; 12 bytes an element at 4.3 TB/s.
BUDGET = 93
# 5 bytes an element allow 38 at that speed, 47.5 at the 80% of it that is asked for.
BUDGET_BFLOAT16 = 47.5


LISTING = """
    first: LDG.E.128 R4, desc[UR4][R2.64]
           @P0 BRA last_elements
           LDG.E R8, desc[UR4][R10.64]
           BRA evaluate
    last_elements: @P1 LDG.E.U8 R8, desc[UR4][R10.64]
           @P2 LDG.E.U8 R9, desc[UR4][R10.64+0x1]
    evaluate: @P3 FMUL R12, R12, R14
           @P4 BRA P5, rare
           @P6 BRA no_gradient
           MUFU.RCP R16, R4
    no_gradient: DADD R18, R18, R4
           BRA.U UP0, finish
           BRA finish
    rare: MUFU.RCP R16, R4
           FADD R16, R16, R4
           FADD R16, R16, R4
           FADD R16, R16, R4
           FADD R16, R16, R4
           DADD R18, R18, R16
    finish: @!P6 BRA next
           STG.E.128 desc[UR4][R20.64], R16
    next:  @P0 BRA first
           EXIT
"""


@pytest.mark.any_jax
def test_the_reader_takes_the_common_way() -> None:
    """Wide loads, all of the arithmetic, the store; but not what is for rare elements."""
    lines = [line.strip() for line in LISTING.strip().splitlines()]
    places = {line.partition(":")[0]: place for place, line in enumerate(lines) if ":" in line}
    text = ""
    for place, line in enumerate(lines):
        line = line.partition(":")[2] if ":" in line else line
        for name, target in places.items():
            line = re.sub(rf"\b{name}$", f"{16 * target:#x}", line)
        text += f"        /*{16 * place:04x}*/    {line.strip()} ;\n"
    code = disassembly.parse(text)
    assert disassembly.innermost_loops(code) == [(0, len(code) - 2)]
    way = disassembly.common_way(code, 0, len(code) - 2, logit_bytes=4, label_bytes=1)
    assert [code.index(instruction) for instruction in way] == [
        *(0, 1, 2, 3),
        *(6, 7, 8, 9, 10, 11),
        *(19, 20, 21),
    ]
    assert [width for instruction in way if (width := instruction.width("LDG"))] == [128, 32]


@pytest.mark.any_jax
def test_code_for_each_architecture(module, code) -> None:
    """What it states; PTX of the oldest, so that no newer GPU is without, and of the newest."""
    assert code.architectures("elf") == module.machine_code
    assert code.architectures("ptx") == module.ptx
    assert module.ptx == sorted({min(module.machine_code), max(module.machine_code)})
    newer = range(min(module.machine_code), 150)
    assert all(_kernels._runs_on(gpu, module.machine_code, module.ptx) for gpu in newer)


@pytest.mark.any_jax
def test_everything_is_in_registers(code) -> None:
    """No kernel keeps a variable in memory, on any architecture."""
    kernels = [kernel for number in code.architectures("elf") for kernel in code.kernels(number)]
    assert {kernel.name for kernel in kernels} == {"evaluate", "finish_rows"}
    assert {kernel.logits for kernel in kernels} == set(code.BYTES)
    assert [kernel for kernel in kernels if kernel.stack] == []


@pytest.mark.any_jax
def test_loads_of_sixteen_bytes(code) -> None:
    for architecture in code.architectures("elf"):
        kernel = code.long_rows(architecture, "float32", 4)
        assert set(kernel.widths("LDG")) == {128}, kernel


@pytest.mark.any_jax
def test_stores_of_sixteen_bytes(code) -> None:
    for architecture in code.architectures("elf"):
        kernel = code.long_rows(architecture, "float32", 4)
        assert set(kernel.widths("STG")) == {128}, kernel


@pytest.mark.any_jax
@pytest.mark.parametrize(
    ("logits", "label_bytes", "budget"),
    [("float32", 4, BUDGET), ("bfloat16", 1, BUDGET_BFLOAT16)],
)
def test_instructions_of_an_element(code, logits: str, label_bytes: int, budget: float) -> None:
    if 90 not in code.architectures("elf"):
        pytest.skip("the module was built for other GPUs")
    assert code.long_rows(90, logits, label_bytes).instructions_per_element <= budget


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


@pytest.mark.parametrize(("size", "groups"), [(128, 0), (1024, 0), (1025, 2), (1 << 20, 1024)])
def test_a_mean_is_one_call(module, size: int, groups: int) -> None:
    """With room for the groups' sums where there are several."""
    text = lowered(jax.value_and_grad(loss), (size,), (size,))
    assert CALL.findall(text) == ["jax_bce_v1_loss_and_grad"]
    assert re.findall(r"tensor<(\d+)xf64>", text)[:1] == ([str(groups)] if groups else [])
    assert CALL.findall(lowered(loss, (size,), (size,))) == ["jax_bce_v1_loss"]


def test_elements_and_rows_are_one_call(module) -> None:
    for keywords in ({"reduction": "none"}, {"axis": -1}):
        text = lowered(partial(loss, **keywords), (1000, 10), (1000, 10))
        assert CALL.findall(text) == ["jax_bce_v1_loss"]


def test_vmap_is_one_call(module) -> None:
    text = lowered(jax.vmap(jax.value_and_grad(loss)), (4, 20_000), (4, 20_000))
    assert CALL.findall(text) == ["jax_bce_v1_loss_and_grad"]
    assert re.findall(r"tensor<(\d+)xf64>", text)[:1] == ["80"]


def test_recompute_is_two_calls(module) -> None:
    function = jax.value_and_grad(partial(loss, residuals="recompute"))
    text = lowered(function, (20_000,), (20_000,), dtype=jnp.float16)
    assert sorted(CALL.findall(text)) == ["jax_bce_v1_grad", "jax_bce_v1_loss"]


@pytest.mark.parametrize("keywords", [{}, {"axis": 1}, {"reduction": "none"}], ids=str)
@pytest.mark.parametrize("sizes", ["rows, 19", "rows, 9000", "rows, columns"])
def test_export_for_any_sizes(module, sizes: str, keywords: dict) -> None:
    """With room for sums wherever a row may have several blocks."""
    shape = export.symbolic_shape(sizes)
    operands = [jax.ShapeDtypeStruct(shape, dtype) for dtype in (jnp.float32, jnp.uint8)]
    known = [export.DisabledSafetyCheck.custom_call("jax_bce_v1_loss")]
    function = jax.jit(partial(loss, **keywords))
    exported = export.export(function, platforms=("cuda",), disabled_checks=known)(*operands)
    (call,) = [line for line in exported.mlir_module().splitlines() if CALL.search(line)]
    room = keywords == {} or (keywords == {"axis": 1} and sizes != "rows, 19")
    assert ("tensor<?xf64>" in call) == room


@pytest.mark.any_jax
@pytest.mark.parametrize("columns", [1, 1024, 1025, 16384, 100_000])
def test_room_is_enough(module, columns: int) -> None:
    """Also where the sizes are no integers of Python's, as a symbolic one."""
    needed = module.workspace(3, columns)
    assert _kernels.workspace(3, columns) == needed
    assert _kernels.workspace(np.int64(3), np.int64(columns)) == (needed or 3)


def test_other_platforms_hold_no_call() -> None:
    traced = jax.jit(jax_bce.loss).trace(np.zeros(200, np.float32), np.zeros(200, np.int32))
    for platform in ("tpu", "rocm"):
        assert not CALL.findall(traced.lower(lowering_platforms=(platform,)).as_text())
