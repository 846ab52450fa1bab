"""The package as installed: what import does and does not do, the ABI guard, the command line, the
documentation's examples, and the formulas under other compilers."""

import ctypes
import doctest
import os
import re
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace

import jax
import numpy as np
import oracle
import pytest

import jax_bce
from jax_bce import _primitive

ROOT = Path(__file__).parent.parent


def run(code: str, **environment: str) -> subprocess.CompletedProcess[str]:
    """Python code in a process of its own, with warnings as errors, away from the source folder."""
    return subprocess.run(
        [sys.executable, "-W", "error", "-c", code],
        cwd="/",
        env=os.environ | {"JAX_PLATFORMS": "cpu"} | environment,
        capture_output=True,
        text=True,
        timeout=300,
    )


def test_import_is_harmless() -> None:
    """No backend is started, no configuration or environment changed, nothing heavy imported."""
    done = run(
        "import os, sys, jax\n"
        "before, values = dict(os.environ), dict(jax.config.values)\n"
        "import jax_bce\n"
        "assert dict(os.environ) == before and dict(jax.config.values) == values\n"
        "heavy = {'torch', 'keras', 'optax', 'flax', 'matplotlib', 'sklearn', 'rich'}\n"
        "assert not heavy & set(sys.modules), heavy & set(sys.modules)\n"
        "jax.config.update('jax_platforms', 'nothing')\n"  # refused once a backend has started
        "try: jax.devices()\n"
        "except RuntimeError: print('no backend yet')\n"
    )
    assert done.returncode == 0, done.stderr
    assert done.stdout == "no backend yet\n"
    assert done.stderr == ""


def test_second_import_registers_nothing_twice() -> None:
    done = run(
        "import importlib, jax_bce\n"
        "from jax_bce import _primitive\n"
        "importlib.reload(_primitive)\n"
        "importlib.reload(jax_bce)\n"
        "print(jax_bce.loss([0.0], [1.0]))"
    )
    assert done.stdout.startswith("0.693147"), done.stderr


@pytest.mark.parametrize(
    ("built", "running", "usable"),
    [
        ((0, 1), (0, 1), True),
        ((0, 1), (0, 5), True),
        ((0, 3), (0, 3), True),
        ((0, 4), (0, 3), False),
        ((1, 0), (0, 3), False),
        ((0, 1), (1, 0), False),
    ],
)
def test_abi_guard(built: tuple[int, int], running: tuple[int, int], usable: bool) -> None:
    module = SimpleNamespace(xla_ffi_api_version=built, instruction_set=lambda: "x86-64-v3")
    reason = _primitive._why_no_cpu_kernel(module, running)
    if usable:
        assert reason is None
    else:
        assert reason is not None
        for words in (f"{built[0]}.{built[1]}", f"{running[0]}.{running[1]}", "upgrade jaxlib"):
            assert words in reason


def test_abi_mismatch_leaves_jax_alone(tmp_path: Path) -> None:
    """A module newer than jaxlib would keep the CPU backend from starting: it is not registered."""
    header = tmp_path / "xla" / "ffi" / "api" / "c_api.h"
    header.parent.mkdir(parents=True)
    header.write_text("#define XLA_FFI_API_MAJOR 0\n#define XLA_FFI_API_MINOR 0\n")
    code = (
        "import warnings, jax\n"
        f"jax.ffi.include_dir = lambda: {str(tmp_path)!r}\n"
        "with warnings.catch_warnings(record=True) as caught:\n"
        "    warnings.simplefilter('always')\n"
        "    import jax_bce\n"
        "print([str(w.message) for w in caught])\n"
        "print('jax_bce_v1' in jax.jit(jax_bce.loss).lower([0.0], [1.0]).as_text())\n"
        "print(jax_bce.loss([0.0], [1.0]))\n"
        "try: jax_bce.loss([0.0], [1.0], implementation='cpu')\n"
        "except RuntimeError as error: print(error)\n"
    )
    warned, called, value, refused = run(code).stdout.splitlines()
    assert "built for XLA FFI 0.1, but the running jaxlib has 0.0" in warned
    assert called == "False"
    assert value.startswith("0.693147")
    assert "implementation='cpu' is not available" in refused


def test_headers_come_from_the_oldest_supported_jaxlib(cpu: str) -> None:
    assert _primitive._cpu.xla_ffi_api_version == (0, 1)


def test_without_built_modules_the_error_names_the_mend(tmp_path: Path) -> None:
    package = tmp_path / "jax_bce"
    package.mkdir()
    for source in Path(jax_bce.__file__).parent.glob("*.py"):
        shutil.copy(source, package)
    done = run(f"import sys; sys.path.insert(0, {str(tmp_path)!r}); import jax_bce")
    assert "built modules missing" in done.stderr
    assert "pip install ." in done.stderr


def test_unknown_instruction_set_falls_back_to_xla() -> None:
    code = (
        "import jax_bce; from jax_bce._primitive import missing\n"
        "print(missing('cpu')); print(jax_bce.loss([0.0], [1.0]))"
    )
    reason, value = run(code, JAX_BCE_CPU="mmx").stdout.splitlines()
    assert "JAX_BCE_CPU" in reason
    assert value.startswith("0.693147")


def test_report() -> None:
    done = subprocess.run(
        [sys.executable, "-W", "error", "-m", "jax_bce"], cwd="/", capture_output=True, text=True
    )
    assert done.returncode == 0, done.stderr
    assert done.stderr == ""
    facts = dict(re.split(r"  +", line, maxsplit=1) for line in done.stdout.splitlines())
    assert facts["jax_bce"] == jax_bce.__version__
    assert facts["jax"].startswith(jax.__version__)
    if _primitive.missing("cpu") is None:
        assert facts["cpu kernel"].startswith("loaded, ")
        assert facts["implementation=None"] == "the cpu kernel"
    assert "leave implementation=None" in facts["cuda kernel"]


@pytest.mark.parametrize("name", jax_bce.__all__)
def test_docstring_examples(name: str) -> None:
    function = getattr(jax_bce, name)
    (test,) = doctest.DocTestFinder().find(function, name)
    assert test.examples
    assert doctest.DocTestRunner().run(test).failed == 0


def test_readme_examples() -> None:
    """Every Python block of the README runs as it stands, one after the other."""
    blocks = re.findall(r"```python\n(.*?)```", (ROOT / "README.md").read_text(), re.DOTALL)
    assert blocks
    done = run("\n".join(blocks))
    assert done.returncode == 0, done.stderr


# --- the formulas under other compilers ---------------------------------------------------------

SOURCE = Path(__file__).parent / "scalar_lanes.cu"


@pytest.mark.parametrize(("dtype", "bits"), [("float32", np.uint32), ("float64", np.uint64)])
def test_scalar_lane_has_the_bits_of_the_kernel(
    tmp_path: Path, cpu: str, dtype: str, bits: type
) -> None:
    """One formula, one order of operations: a scalar and a vector agree."""
    library = tmp_path / "scalar_lanes.so"
    flags = ["-O2", "-ffp-contract=off", "-Wall", "-Wextra", "-Werror", "-shared", "-fPIC"]
    subprocess.run(
        ["g++", "-x", "c++", "-std=c++17", *flags, str(SOURCE), "-o", str(library)], check=True
    )
    logits = np.concatenate(
        [
            oracle.walk(dtype, 20_000),
            oracle.walk(dtype, 20_000, 1e-8, 120.0),
            oracle.random_logits(dtype, 20_000, seed=1),
        ]
    )
    logits = logits[~np.isnan(logits)]
    for labels in (np.zeros_like(logits), oracle.random_labels(dtype, logits.shape, seed=2)):
        loss, gradient = np.empty_like(logits), np.empty_like(logits)
        pointers = [v.ctypes.data_as(ctypes.c_void_p) for v in (logits, labels, loss, gradient)]
        evaluate = getattr(ctypes.CDLL(str(library)), f"evaluate_{dtype}")
        evaluate(*pointers, ctypes.c_int64(logits.size))
        with jax.enable_x64(dtype == "float64"):
            actual = jax_bce.loss_and_grad(logits, labels, reduction="none", implementation=cpu)
        np.testing.assert_array_equal(np.asarray(actual[0]).view(bits), loss.view(bits))
        np.testing.assert_array_equal(np.asarray(actual[1]).view(bits), gradient.view(bits))


@pytest.mark.parametrize("architecture", ["75", "90", "120"])
def test_formulas_compile_as_cuda(
    tmp_path: Path, require: Callable[[str], None], architecture: str
) -> None:
    """nvcc takes the formulas as they stand, and keeps them in registers."""
    require("nvcc")
    target = f"arch=compute_{architecture},code=sm_{architecture}"
    flags = ["-std=c++17", "--fmad=false", "-Werror", "all-warnings", "-Xptxas", "-v"]
    flags += ["-gencode", target]
    done = subprocess.run(
        ["nvcc", *flags, "-c", str(SOURCE), "-o", str(tmp_path / "scalar_lanes.o")],
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stderr
    frames = re.findall(r"(\d+) bytes stack frame, (\d+) bytes spill", done.stderr)
    assert frames == [("0", "0")] * 2
