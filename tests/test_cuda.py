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
from jax import export

import jax_bce
from jax_bce import _kernels

KERNEL_TESTS = Path(__file__).parent / "cuda_kernel"
SOURCES = KERNEL_TESTS.parent.parent / "csrc"
# -Og compiles four times as fast as -O1 with the sanitizers, and runs as fast.
FLAGS = ["-Og", "-g1", "-std=c++20", "-pthread", "-march=x86-64-v3", "-ffp-contract=off"]
FLAGS += ["-fno-math-errno", "-Wall", "-Wextra", "-Werror", "-Wno-unknown-pragmas"]


@pytest.mark.any_jax
@pytest.mark.thorough
@pytest.mark.parametrize(
    ("sanitizers", "effort", "cluster"),
    [
        pytest.param("", 1, 16, id="bits"),
        pytest.param("address,undefined", 0, 1, id="address"),
        pytest.param("thread", -1, 8, id="thread"),
    ],
)
def test_source_on_the_host(
    cpu: str, tmp_path: Path, sanitizers: str, effort: int, cluster: int
) -> None:
    flags = [*FLAGS, "-DBCE_INSTRUCTION_SET=baseline", "-I", str(KERNEL_TESTS / "on_host")]
    flags += [f"-DBCE_LARGEST_CLUSTER={cluster}"]
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
@pytest.mark.thorough
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
    generations = [a for a in (75, 80, 90, 100, 120) if f"compute_{a}\n" in known]
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


# Upper bounds of the instructions for an element, to notice when a loop gets longer. An H200 can
# issue 93 in the time that its memory takes for 12 bytes (132 processors, each 4 x 32 threads a
# clock of 1.98 GHz; 4.3 TB/s), and 38 for 5 bytes.
BUDGETS = {
    "float32": 72,
    "float32, uint8": 75,
    "float32, short rows": 72,
    "float32, soft or smoothed": 91,
    "float32, a turn with padding": 104,
    "float32, one label": 72,
    "float32, loss alone": 54,
    "float32, a weight per class": 85,
    "float32, pos_weight per class": 88,
    "float32, weight, pos_weight and sample_weight": 98,
    "float32, where": 102,
    "float32, int32, ignore_label": 98,
    "float32, a weight per class, soft labels": 102,
    "float32, pos_weight per class, soft labels": 182,
    "bfloat16, uint8, a weight per class": 100,
    "bfloat16, uint8": 29,
    "bfloat16, uint8, loss alone": 22,
    "bfloat16": 32,
    "float16, uint8": 32,
}

LISTING = """
    first: VOTE.ANY P0, P0
           @P0 BRA rare
           LDG.E.128 R4, desc[UR4][R2.64]
           @P1 BRA aligned
           LDG.E R8, desc[UR4][R10.64]
           BRA evaluate
    aligned: LDG.E.128 R8, desc[UR4][R10.64]
    evaluate: MUFU.RCP R16, R4
           @P4 BRA tile
           DADD R18, R18, R4
           BRA finish
    tile:  STS.128 [R4], R16
           BRA.U finish
    finish: @P6 STG.E desc[UR4][R20.64], R16
           @!P6 STG.E.128 desc[UR4][R20.64], R16
           @P0 BRA first
    rare:  VOTE.ANY P0, P0
           LDG.E.128 R4, desc[UR4][R2.64]
           LDG.E.128 R8, desc[UR4][R10.64]
           MUFU.RCP R16, R4
           FADD R16, R16, R4
           FADD R16, R16, R4
           FADD R16, R16, R4
           FADD R16, R16, R4
           FADD R16, R16, R4
           FADD R16, R16, R4
           DADD R18, R18, R16
           STG.E.128 desc[UR4][R20.64], R16
           @P0 BRA rare
           @P1 BRA first
           EXIT
"""


@pytest.mark.any_jax
@pytest.mark.parametrize(
    ("turn", "expected"),
    [
        ({"additions": 1}, [0, 1, 2, 3, 6, 7, 8, 9, 10, 13, 14, 15]),
        ({"shared": 1}, [0, 1, 2, 3, 6, 7, 8, 11, 12, 13, 14, 15]),
        ({"additions": 1, "loop": 1}, list(range(16, 29))),
        ({"additions": 1, "votes": 2}, [*range(16, 30), 0, 1]),
    ],
)
def test_the_reader_takes_the_way_of_a_turn(turn: dict, expected: list[int]) -> None:
    """Wide loads, all of the arithmetic, the store; nothing of the other ways."""
    lines = [line.strip() for line in LISTING.strip().splitlines()]
    places = {line.partition(":")[0]: place for place, line in enumerate(lines) if ":" in line}
    text = ""
    for place, line in enumerate(lines):
        line = line.partition(":")[2] if ":" in line else line
        for name, target in places.items():
            line = re.sub(rf"\b{name}$", f"{16 * target:#x}", line)
        text += f"        /*{16 * place:04x}*/    {line.strip()} ;\n"
    code = disassembly.parse(text)
    way = disassembly.way(code, disassembly.Turn({128: 2}, (128, 1), 1, **turn))
    assert [code.index(instruction) for instruction in way] == expected


@pytest.mark.any_jax
def test_code_for_each_architecture(module, code) -> None:
    """What it states; PTX of the oldest, so that no newer GPU is without, and of the newest."""
    assert code.architectures("elf") == module.machine_code
    assert code.architectures("ptx") == module.ptx
    targets = [max(p for p in (75, 80, 90) if p <= code) for code in module.machine_code]
    assert module.ptx == sorted({targets[0], targets[-1]})
    newer = range(min(module.machine_code), 150)
    assert all(_kernels._runs_on(gpu, module.machine_code, module.ptx) for gpu in newer)


@pytest.mark.any_jax
def test_clusters(module, code) -> None:
    """Thread blocks wait for each other wherever elements are evaluated and GPUs have clusters."""
    for architecture in module.machine_code:
        listing = code.cuobjdump("-sass", "-arch", f"sm_{architecture}")
        for kernel in listing.split("Function : ")[1:]:
            evaluates = "evaluate" in kernel.partition("\n")[0]
            assert ("UCGABAR_WAIT" in kernel) == (evaluates and architecture >= 90)
            assert ("PREEXIT" in kernel) == (evaluates and architecture >= 90)
            # The second launch may begin before the first one ends. It waits before all else.
            first = re.search(r"(@\S+ +)?(ACQBULK|BRA|(LD|ST)[GSL]?[ .])", kernel)[0]
            assert (first == "ACQBULK") == (not evaluates and architecture >= 90)


@pytest.mark.any_jax
def test_everything_is_in_registers(code) -> None:
    """No kernel keeps a variable in memory, on any architecture."""
    kernels = [kernel for number in code.architectures("elf") for kernel in code.kernels(number)]
    assert {kernel.name for kernel in kernels} == {"evaluate", "finish_rows"}
    assert {kernel.logits for kernel in kernels} == set(code.LOGITS.values())
    assert [kernel for kernel in kernels if kernel.stack] == []


@pytest.mark.any_jax
@pytest.mark.parametrize("name", disassembly.LOOPS)
def test_instructions_of_an_element(code, name: str) -> None:
    """On the way of wide loads and stores, which every loop has to have."""
    if 90 not in code.architectures("elf"):
        pytest.skip("the module was built for other GPUs")
    assert code.loop(90, name).instructions <= BUDGETS[name]


def lowered(function: Callable, *shapes, dtype=jnp.float32, label_dtype=jnp.uint8) -> str:
    """The program that XLA gets for CUDA."""
    operands = [
        jax.ShapeDtypeStruct(shape, kind)
        for shape, kind in zip(shapes, (dtype, label_dtype), strict=True)
    ]
    traced = jax.jit(function).trace(*operands)
    return traced.lower(lowering_platforms=("cuda",)).as_text()


loss = partial(jax_bce.loss, implementation="cuda")
CALL = re.compile(r"custom_call @(jax_bce_v3_\w+)")


@pytest.mark.parametrize(("size", "groups"), [(128, 0), (1024, 0), (1025, 2), (1 << 20, 1024)])
def test_a_mean_is_one_call(module, size: int, groups: int) -> None:
    """With room for the groups' sums where there are several."""
    text = lowered(jax.value_and_grad(loss), (size,), (size,))
    assert CALL.findall(text) == ["jax_bce_v3_loss_and_grad"]
    assert re.findall(r"tensor<(\d+)xf64>", text)[:1] == ([str(groups)] if groups else [])
    assert CALL.findall(lowered(loss, (size,), (size,))) == ["jax_bce_v3_loss"]


def test_elements_and_rows_are_one_call(module) -> None:
    for keywords in ({"reduction": "none"}, {"axis": -1}):
        text = lowered(partial(loss, **keywords), (1000, 10), (1000, 10))
        assert CALL.findall(text) == ["jax_bce_v3_loss"]


def test_vmap_is_one_call(module) -> None:
    text = lowered(jax.vmap(jax.value_and_grad(loss)), (4, 20_000), (4, 20_000))
    assert CALL.findall(text) == ["jax_bce_v3_loss_and_grad"]
    assert re.findall(r"tensor<(\d+)xf64>", text)[:1] == ["80"]


@pytest.mark.parametrize("name", ["focal_loss", "asymmetric_loss"])
def test_focal_losses_are_one_call(module, name: str) -> None:
    function = partial(getattr(jax_bce, name), implementation="cuda", weight=2.0)
    text = lowered(jax.value_and_grad(function), (3000,), (3000,))
    assert CALL.findall(text) == ["jax_bce_v3_loss_and_grad"]


def test_recompute_is_two_calls(module) -> None:
    function = jax.value_and_grad(partial(loss, residuals="recompute"))
    text = lowered(function, (20_000,), (20_000,), dtype=jnp.float16)
    assert sorted(CALL.findall(text)) == ["jax_bce_v3_grad", "jax_bce_v3_loss"]


@pytest.mark.parametrize("keywords", [{}, {"axis": 1}, {"reduction": "none"}], ids=str)
@pytest.mark.parametrize("sizes", ["rows, 19", "rows, 9000", "rows, columns"])
def test_export_for_any_sizes(module, sizes: str, keywords: dict) -> None:
    """With room for sums wherever a row may have several blocks."""
    shape = export.symbolic_shape(sizes)
    operands = [jax.ShapeDtypeStruct(shape, dtype) for dtype in (jnp.float32, jnp.uint8)]
    known = [export.DisabledSafetyCheck.custom_call("jax_bce_v3_loss")]
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
