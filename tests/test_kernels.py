"""Which kernel runs: the table, JAX_BCE_GPU, and the known-answer test that guards the CUDA kernel.

No GPU is needed. The known-answer test runs on the host (known_answer/), with kernels as they are
and with faulty ones. The rest has a module that says what a machine would.
"""

import os
import re
import shutil
import subprocess
import warnings
from collections.abc import Callable, Iterator
from pathlib import Path
from types import SimpleNamespace

import jax
import jax.numpy as jnp
import mpmath
import numpy as np
import pytest

import jax_bce
from jax_bce import _kernels

HERE = Path(__file__).parent
SOURCES = HERE.parent / "csrc"
GUARD = HERE / "known_answer"
FLAGS = ["-Og", "-std=c++20", "-pthread", "-march=x86-64-v3", "-ffp-contract=off"]
FLAGS += ["-fno-math-errno", "-Wall", "-Wextra", "-Werror", "-Wno-unknown-pragmas"]
FLAGS += ["-include", str(GUARD / "cuda_runtime.h"), "-I", str(HERE / "cuda_kernel" / "on_host")]

# A coefficient of exp and one of artanh in float32, wrong from the 12th bit on.
# Of the formulas, and of one loop each.
FAULTS = [
    ("bce_math.h", "0x1.555556p-3f", "0x1.556556p-3f"),
    ("bce_math.h", "0x1.555556p-2f", "0x1.556556p-2f"),
    ("bce_cuda_loop.cuh", "rest_ * turns[c] * rounded", "rest_ * turns[c] * turns[c] * rounded"),
    ("bce_cuda_loop.cuh", "L::fma(2, narrow[c].half_log1p", "L::fma(3, narrow[c].half_log1p"),
    (
        "bce_cuda_loop.cuh",
        "loss_from<L, true>(x[c], coefficients[c], log1p_of",
        "loss_from<L, true>(-2 * x[c], coefficients[c], log1p_of",
    ),
    ("bce_math.h", "-(zero - q.high * exponential.scale)", "q.high * exponential.scale + 1"),
    ("bce_cuda_loop.cuh", ": product_of<L>(losses[c], weight[c].high)", ": losses[c]"),
    ("bce_cuda_loop.cuh", ": Pair<Scalar>{own, 0}", ": Pair<Scalar>{1, 0}"),
    ("bce_cuda_loop.cuh", "with(Exactly<kWeights>())", "with(Exactly<kOneWeight>())"),
    ("bce_cuda_loop.cuh", "nonzero_bytes(where_[q])", "nonzero_bytes(where_[q] | 1)"),
    ("bce_cuda_numbers.cuh", "? odd : word", "? odd & 0 : word"),
    ("bce_cuda.cu", "? factors[warp].times(total)", "? total"),
    ("bce_cuda.cu", "plan.sums[i] = 0;", "plan.sums[i] = 1;"),
    ("bce_cuda.cu", "  sync_cluster();", "  gridDim.x > 1 ? __syncthreads() : sync_cluster();"),
]


def compile_with_gcc(target: Path, *arguments: object) -> Path:
    subprocess.run(["g++", *FLAGS, *map(str, arguments), "-o", str(target)], check=True)
    return target


def kernel_object(folder: Path, sources: Path) -> Path:
    renamed = [f"-D{name}=healthy_{name}" for name in ("bce_cuda", "cuda_scratch")]
    return compile_with_gcc(
        folder / "kernel.o", *renamed, "-x", "c++", "-c", sources / "bce_cuda.cu"
    )


@pytest.fixture(scope="module")
def parts(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path, Path]:
    """The known-answer test with its driver program, the driver, and the healthy kernel."""
    folder = tmp_path_factory.mktemp("known_answer")
    objects = [
        compile_with_gcc(folder / f"{source.stem}.o", "-x", "c++", "-c", source)
        for source in (SOURCES / "known_answer.cc", GUARD / "test.cc")
    ]
    test = folder / "guard.o"
    subprocess.run(["ld", "-r", *map(str, objects), "-o", str(test)], check=True)
    shared = ("-shared", "-fPIC", "-Wl,-soname,libcuda.so.1", GUARD / "driver.cc")
    driver = compile_with_gcc(folder / "libcuda.so.1", *shared)
    return test, driver, kernel_object(folder, SOURCES)


@pytest.fixture(scope="module")
def healthy(parts: tuple[Path, Path, Path]) -> Path:
    test, _, kernel = parts
    return compile_with_gcc(test.parent / "healthy", test, kernel, "-ldl")


def guard(program: Path, driver: Path, *fault: str, devices: str = "1") -> tuple[int, str]:
    """How often the kernels are called the first time, and what fails."""
    environment = {**os.environ, "LD_PRELOAD": str(driver), "DEVICES": devices}
    done = subprocess.run(
        [program, *fault], capture_output=True, text=True, env=environment, timeout=300, check=True
    )
    calls, again, failure = re.fullmatch(r"(\d+) calls, then (\d+)\n(.*)\n", done.stdout).groups()
    remembered = again == "0"
    assert remembered == ("no memory" not in fault)  # there may be memory later
    return int(calls), failure


@pytest.mark.any_jax
@pytest.mark.thorough
def test_healthy_kernels_pass(parts: tuple, healthy: Path) -> None:
    """Each device that is in use is tested, and no other."""
    calls, failure = guard(healthy, parts[1])
    assert failure == ""
    assert calls > 300
    assert guard(healthy, parts[1], devices="0101") == (2 * calls, "")


@pytest.mark.any_jax
@pytest.mark.thorough
def test_nothing_runs_without_a_device_in_use(parts: tuple, healthy: Path) -> None:
    assert guard(healthy, parts[1], devices="00") == (0, "")
    done = subprocess.run([healthy], capture_output=True, text=True, check=True)
    assert done.stdout == "0 calls, then 0\n\n"  # without a driver


@pytest.mark.any_jax
@pytest.mark.parametrize(
    ("fault", "words"),
    [
        ("tail", "gradient 73732 is .*1 x 73733"),
        ("short tail", "gradient 2499 is .*1 x 2500"),
        ("swapped labels", "gradient 0 is -1, not 1 .float32 logits, uint8 labels"),
        ("beside", "something beside the results was written"),
        ("changing", "a second call gives other results"),
        ("ulps", "gradient 115 is"),
        ("no image", "no kernel image is available"),
        ("no image for a kernel", "no kernel image is available"),
        ("old driver", "CUDA driver version is insufficient"),
        ("no memory", "out of memory"),
    ],
)
@pytest.mark.thorough
def test_faults_are_found(parts: tuple, healthy: Path, fault: str, words: str) -> None:
    _, failure = guard(healthy, parts[1], fault)
    assert re.match(f"GPU 0: {words}", failure), failure


@pytest.mark.any_jax
@pytest.mark.thorough
@pytest.mark.parametrize(("file", "right", "wrong"), FAULTS)
def test_a_fault_in_the_source_is_found(
    parts: tuple, tmp_path: Path, file: str, right: str, wrong: str
) -> None:
    test, driver, _ = parts
    sources = shutil.copytree(SOURCES, tmp_path / "csrc")
    source = (sources / file).read_text()
    assert right in source
    (sources / file).write_text(source.replace(right, wrong))
    kernel = kernel_object(tmp_path, sources)
    program = compile_with_gcc(tmp_path / "program", test, kernel, "-ldl")
    _, failure = guard(program, driver)
    assert re.match(
        r"GPU 0: ((sum|gradient|loss) \d+ is|a second call gives other results) .*"
        r"(float32|float16|float64) logits",
        failure,
    ), failure


@pytest.mark.any_jax
def test_the_answers_are_exact() -> None:
    table = re.search(
        r"kTable\[\] = \{(.*?)INFINITY", (SOURCES / "known_answer.cc").read_text(), re.S
    )
    rows = re.findall(r"\{([^{}]+)\}", table[1])
    assert len(rows) == 21
    for row in rows:
        x, *found = map(float, row.split(","))
        with mpmath.workprec(200):
            signed = (mpmath.mpf(x), -mpmath.mpf(x))
            exact = [mpmath.log1p(mpmath.exp(s)) for s in signed]
            exact += [1 / (1 + mpmath.exp(-s)) for s in signed]
            assert found == [float(value) for value in exact]


def module(**states: object) -> SimpleNamespace:
    """A CUDA module as on a machine with a GPU that runs it, but for these states."""
    healthy = {
        "xla_ffi_api_version": (0, 1),
        "runtime_version": 13000,
        "machine_code": [90],
        "ptx": [90],
        "group": 1024,
        "driver_version": lambda: 13000,
        "compute_capabilities": lambda: [90],
        "known_answer": lambda: "",
        "workspace": lambda rows, columns: 0,
    }
    return SimpleNamespace(**healthy | states)


STATES = {
    "known answer": module(known_answer=lambda: "GPU 0: sum 0 is 1, not 2"),
    "no memory": module(known_answer=lambda: "GPU 0: out of memory"),
    "old driver": module(driver_version=lambda: 12080),
    "other GPU": module(compute_capabilities=lambda: [70]),
}
REASONS = {
    "known answer": "fails its known-answer test on GPU 0: sum 0 is 1, not 2",
    "no memory": "its known-answer test finds no memory on GPU 0: leave it a few MB",
    "old driver": "the driver supports at most CUDA 12.8",
    "other GPU": "the GPU has 7.0",
}
unfit = pytest.mark.parametrize("state", STATES)


@pytest.fixture
def machine(monkeypatch: pytest.MonkeyPatch) -> Iterator[Callable[[object], None]]:
    """Takes a module, or None, for the one that is built."""
    cached = (_kernels._why_not_installed, _kernels._why_not_on_this_machine, _kernels._warn)

    def put(module: object) -> None:
        monkeypatch.setattr(_kernels, "_cuda", module)
        for function in cached:
            function.cache_clear()

    monkeypatch.delenv("JAX_BCE_GPU", raising=False)
    put(module())
    yield put
    monkeypatch.undo()
    put(_kernels._cuda)


def calls(dtype: object = jnp.float32, **keywords: object) -> list[str]:
    """The kernels that a loss and its gradient call, compiled for an NVIDIA GPU."""

    def total(x: jax.Array, y: jax.Array) -> jax.Array:
        return jnp.sum(jax_bce.loss(x, y, **keywords))

    operand = jax.ShapeDtypeStruct((16, 40), dtype)
    lowered = jax.jit(jax.value_and_grad(total)).trace(operand, operand)
    text = lowered.lower(lowering_platforms=("cuda",)).as_text()
    return re.findall(r"custom_call @jax_bce_v3_(\w+)", text)


@pytest.mark.parametrize(
    ("dtype", "keywords", "expected"),
    [
        (jnp.float32, {}, ["loss_and_grad"]),
        (jnp.bfloat16, {}, ["loss_and_grad"]),
        (jnp.float16, {}, ["loss_and_grad"]),
        (jnp.float32, {"axis": -1}, ["loss_and_grad"]),
        (jnp.float32, {"axis": 0}, []),
        (jnp.float32, {"axis": (0, 1)}, ["loss_and_grad"]),
        (jnp.float32, {"normalizer": 2.0, "label_smoothing": 0.1}, ["loss_and_grad"]),
        (jnp.float32, {"weight": 2.0}, ["loss_and_grad"]),
        (jnp.float32, {"pos_weight": np.ones(40, np.float32)}, []),
        (jnp.float32, {"weight": np.ones((16, 40), np.float32)}, ["loss_and_grad"]),
        (jnp.float32, {"sample_weight": np.ones(16, np.float32)}, ["loss_and_grad"]),
        (jnp.float32, {"weight": np.ones((16, 40), np.int8)}, []),
        (jnp.float32, {"weight": np.ones(40, np.float32), "pos_weight": 2.0}, []),
        (jnp.float32, {"axis": -1, "normalizer": jnp.ones(16)}, []),
        (jnp.float32, {"reduction": "none"}, []),
        (jnp.float32, {"residuals": "recompute"}, ["loss"]),
        (jnp.bfloat16, {"weight": 2.0}, ["loss_and_grad"]),
        (jnp.float16, {"weight": 2.0}, []),  # the gradient is float32
        (jnp.float32, {"ignore_label": 0, "reduction": "sum"}, ["loss_and_grad"]),
        (jnp.float32, {"ignore_label": 0}, ["loss_and_grad"]),
        (jnp.float32, {"where": np.ones((16, 1), bool)}, ["loss_and_grad"]),
        (jnp.float32, {"where": np.ones((16, 40), bool), "axis": -1}, []),
    ],
    ids=str,
)
def test_the_table(machine: Callable, dtype: object, keywords: dict, expected: list[str]) -> None:
    assert calls(dtype, **keywords) == expected
    named = calls(dtype, implementation="cuda", **keywords)
    assert set(named) >= set(expected)
    assert named


@pytest.mark.parametrize(
    ("shape", "reduced", "modifiers", "reason"),
    [
        ((6, 5, 8), 3, {"weight": (8,)}, None),
        ((6, 5, 8), 3, {"weight": (5, 8)}, None),
        ((6, 5, 8), 3, {"weight": (6, 1, 1)}, None),
        ((6, 5, 8), 3, {"weight": (6, 5, 8)}, None),
        ((6, 5, 8), 3, {"weight": (1, 5, 1)}, "the shapes of weight"),
        ((6, 5, 10), 3, {"weight": (10,)}, "no multiple of four"),
        ((6, 5, 10), 3, {"weight": (6, 1, 1)}, "no multiple of four"),
        ((6, 5, 10), 3, {"weight": (6, 5, 10)}, None),
        ((6, 1025), 1, {"weight": ()}, "no multiple of four"),
        ((6, 1025), 2, {"weight": ()}, None),
        ((6, 1023), 1, {"weight": ()}, None),
        ((6, 1028), 1, {"where": (1028,)}, None),
        ((6, 8), 2, {"weight": (8,), "sample_weight": (6, 1)}, "several"),
        ((6, 8), 2, {"where": (6, 8), "ignore_label": ()}, "several"),
        ((6, 8), 2, {"pos_weight": (8,)}, "pos_weight"),
        ((6, 8), 2, {"ignore_label": ()}, None),
        ((6, 1024), 1, {"divisor": (6, 1)}, "a denominator per row"),
        ((), 0, {"weight": ()}, None),
    ],
    ids=str,
)
def test_which_weights_are_the_kernels(
    shape: tuple, reduced: int, modifiers: dict, reason: str | None
) -> None:
    dtypes = {"where": bool, "ignore_label": np.int32}
    of_each = {
        name: jax.ShapeDtypeStruct(own, dtypes.get(name, np.float32))
        for name, own in modifiers.items()
    }
    operands = of_shape(shape)
    found = _kernels.why_xla_with_modifiers(operands, of_each, np.float32, reduced)
    assert (found is None) == (reason is None)
    assert (reason or "") in (found or "")
    assert _kernels.why_xla_with_modifiers(operands, of_each, np.float32, reduced, devices=2)
    assert _kernels.why_xla_with_modifiers(operands, of_each, None, reduced)
    assert _kernels.why_xla_with_modifiers(operands, of_each, np.float16, reduced)


def of_shape(shape: tuple, **others: tuple) -> list[jax.ShapeDtypeStruct]:
    """Logits, labels, scale and smoothing."""
    shapes = {"logits": shape, "labels": shape, "scale": (), "smoothing": ()} | others
    dtypes = {"labels": np.int32}
    return [jax.ShapeDtypeStruct(s, dtypes.get(n, np.float32)) for n, s in shapes.items()]


@pytest.mark.parametrize("name", ["logits", "labels", "scale", "smoothing"])
def test_weights_of_operands_that_are_broadcast_are_xlas(name: str) -> None:
    """The kernel reads these an element at a time."""
    weight = {"weight": jax.ShapeDtypeStruct((8, 1, 12), np.float32)}
    operands = of_shape((8, 6, 12), **{name: (1 if name in ("logits", "labels") else 8, 6, 12)})
    assert _kernels.why_xla_with_modifiers(of_shape((8, 6, 12)), {}, np.float32, 2) is None
    found = _kernels.why_xla_with_modifiers(operands, weight, np.float32, 2)
    assert found
    assert "the shapes of weight" in found


def test_float64_is_xla(machine: Callable) -> None:
    with jax.enable_x64(True):
        assert calls(jnp.float64) == []
        assert calls(jnp.float64, implementation="cuda") == ["loss_and_grad"]


def test_the_pin(machine: Callable, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("JAX_BCE_GPU", "xla")
    assert calls() == []
    assert calls(implementation="cuda") == ["loss_and_grad"]
    monkeypatch.setenv("JAX_BCE_GPU", "cuda")
    assert calls(reduction="none") == ["loss_and_grad"]
    assert calls(implementation="xla") == []
    monkeypatch.setenv("JAX_BCE_GPU", "")
    assert calls() == ["loss_and_grad"]
    monkeypatch.setenv("JAX_BCE_GPU", "gpu")
    with pytest.raises(ValueError, match="JAX_BCE_GPU must be xla or cuda, got 'gpu'"):
        calls()


@unfit
def test_one_process_warns_once_and_takes_xla(machine: Callable, state: str) -> None:
    machine(STATES[state])
    with pytest.warns(RuntimeWarning, match=REASONS[state]) as caught:
        assert calls() == []
    assert len(caught) == 1
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert calls(axis=-1) == []


@unfit
def test_a_named_kernel_raises(
    machine: Callable, monkeypatch: pytest.MonkeyPatch, state: str
) -> None:
    machine(STATES[state])
    with pytest.raises(RuntimeError, match=REASONS[state]):
        calls(implementation="cuda")
    monkeypatch.setenv("JAX_BCE_GPU", "cuda")
    with pytest.raises(RuntimeError, match=f"JAX_BCE_GPU=cuda is not available.*{REASONS[state]}"):
        calls()


@unfit
def test_one_of_several_processes_raises(
    machine: Callable, monkeypatch: pytest.MonkeyPatch, state: str
) -> None:
    """Never another program than the other hosts'; the pin is the same on all of them."""
    monkeypatch.setattr(jax, "process_count", lambda: 2)
    assert calls() == ["loss_and_grad"]
    machine(STATES[state])
    with pytest.raises(RuntimeError, match=f"{REASONS[state]}.*JAX_BCE_GPU=xla in all"):
        calls()
    assert calls(reduction="none") == []  # all hosts know that this is XLA's
    monkeypatch.setenv("JAX_BCE_GPU", "xla")
    assert calls() == []


@pytest.mark.parametrize(
    "installed", [None, module(xla_ffi_api_version=(9, 9))], ids=["no CUDA", "newer FFI"]
)
def test_what_is_not_installed_is_xla(
    machine: Callable, monkeypatch: pytest.MonkeyPatch, installed: object
) -> None:
    """Without a word: on all hosts, as they have the same packages."""
    machine(installed)
    monkeypatch.setattr(jax, "process_count", lambda: 2)
    assert calls() == []
    monkeypatch.setenv("JAX_BCE_GPU", "cuda")
    with pytest.raises(RuntimeError, match=r"JAX_BCE_GPU=cuda is not available: .*pip install"):
        calls()


def test_without_a_driver_all_is_compiled(machine: Callable) -> None:
    """For another machine."""
    machine(module(driver_version=lambda: 0, compute_capabilities=lambda: []))
    assert calls() == ["loss_and_grad"]
