"""The package as installed: what import does and does not do, the ABI guard, the command line, the
documentation's examples."""

import doctest
import re
import shutil
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import jax
import platforms
import pytest

import jax_bce
from jax_bce import _kernels

ROOT = Path(__file__).parent.parent


def run(code: str, **environment: str) -> subprocess.CompletedProcess[str]:
    """Python code in a process of its own, with warnings as errors, away from the source folder."""
    return subprocess.run(
        [sys.executable, "-W", "error", "-c", code],
        cwd="/",
        env=platforms.environment("cpu") | environment,
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
        "from jax_bce import _kernels, _primitive\n"
        "importlib.reload(_kernels)\n"
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
    cpu = SimpleNamespace(xla_ffi_api_version=built, instruction_set=lambda: "x86-64-v3")
    cuda = SimpleNamespace(xla_ffi_api_version=built)
    for reason in (
        _kernels._why_no_cpu_kernel(cpu, running),
        _kernels._why_no_cuda_kernel(cuda, running),
    ):
        if usable:
            assert reason is None
            continue
        assert reason is not None
        for words in (f"{built[0]}.{built[1]}", f"{running[0]}.{running[1]}", "upgrade jaxlib"):
            assert words in reason


@pytest.mark.parametrize(
    ("driver", "usable"), [(0, True), (12080, False), (13000, True), (13020, True), (14000, True)]
)
def test_driver_guard(driver: int, usable: bool) -> None:
    """A driver older than the CUDA that the kernel was built with cannot run it."""
    module = SimpleNamespace(runtime_version=13000, driver_version=lambda: driver)
    reason = _kernels._why_driver_is_too_old(module)
    assert (reason is None) == usable
    if reason:
        assert "CUDA 13" in reason
        assert "12.8" in reason
        assert "upgrade the NVIDIA driver" in reason


# The default build's, and that of CUDAARCHS=90.
ALL, ALL_PTX = [75, 80, 90, 100, 120], [75, 80]
HOPPER = [90], [90]


@pytest.mark.any_jax
@pytest.mark.parametrize(
    ("capability", "machine_code", "ptx", "runs"),
    [
        (75, ALL, ALL_PTX, True),
        (87, ALL, [], True),  # as 8.6
        (103, ALL, [], True),  # as 10.0
        (110, ALL, [], False),  # a generation of its own
        (110, ALL, [120], False),
        (110, ALL, [90], True),
        (110, ALL, ALL_PTX, True),
        (130, ALL, ALL_PTX, True),
        (70, ALL, ALL_PTX, False),
        (80, [86], [], False),  # older than the code of its generation
        (89, *HOPPER, False),
        (90, *HOPPER, True),
        (100, [90], [], False),
        (100, *HOPPER, True),
    ],
)
def test_which_gpu_runs_what(
    capability: int, machine_code: list[int], ptx: list[int], runs: bool
) -> None:
    assert _kernels._runs_on(capability, machine_code, ptx) == runs


def cuda_module(code: tuple[list[int], list[int]], gpus: list[int], driver: int) -> SimpleNamespace:
    machine_code, ptx = code
    return SimpleNamespace(
        machine_code=machine_code,
        ptx=ptx,
        runtime_version=13000,
        driver_version=lambda: driver,
        compute_capabilities=lambda: gpus,
    )


@pytest.mark.any_jax
@pytest.mark.parametrize(
    ("gpus", "driver", "words"),
    [
        ([], 0, None),  # no driver: the program is for another machine
        ([], 13000, None),
        ([90], 13000, None),
        ([75, 90], 13000, None),  # one of them can
        ([100], 13000, None),
        ([75, 75], 13000, ("capability 9.0", "the GPU has 7.5:", "CUDAARCHS='75' pip install .")),
        ([89, 75], 13000, ("7.5, 8.9", "CUDAARCHS='75;89' pip install .")),
    ],
)
def test_gpu_guard(gpus: list[int], driver: int, words: tuple[str, ...] | None) -> None:
    reason = _kernels._why_no_gpu_runs_it(cuda_module(HOPPER, gpus, driver))
    assert (reason is None) == (words is None)
    for word in words or ():
        assert word in reason
    assert reason is None or "upgrade" not in reason


@pytest.mark.any_jax
def test_gpu_guard_where_the_driver_is_older() -> None:
    """It runs the machine code of a newer CUDA of its generation, but compiles none of its PTX."""
    module = cuda_module(HOPPER, [90], 13000)
    module.runtime_version = 13020
    assert _kernels._why_no_gpu_runs_it(module) is None
    module.compute_capabilities = lambda: [100]
    reason = _kernels._why_no_gpu_runs_it(module)
    assert "CUDAARCHS='100' pip install ." in reason
    assert "upgrade the NVIDIA driver to one for CUDA 13.2" in reason


@pytest.mark.any_jax
def test_the_kernel_is_missing_where_no_gpu_runs_it(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(_kernels, "_why_not_installed", lambda platform: None)
    monkeypatch.setattr(_kernels, "_why_not_on_this_machine", lambda: "no code")
    assert _kernels.missing("cuda") == "no code"
    assert _kernels.missing("cpu") is None


def test_import_does_not_start_the_driver() -> None:
    """A process that is forked later could not use it; and it reads CUDA_VISIBLE_DEVICES."""
    done = run(
        "import importlib, types, jax_bce\n"
        "from jax_bce import _kernels\n"
        "asked, cuda = [], _kernels._cuda or types.SimpleNamespace()\n"
        "cuda.compute_capabilities = lambda: asked.append('asked') or []\n"
        "importlib.reload(_kernels)\n"
        "print(jax_bce.loss([0.0], [1.0]), asked)\n"
        "if _kernels.missing('cuda') is None: print(asked)"
    )
    first, *rest = done.stdout.splitlines()
    assert first.endswith(" []"), done.stderr
    assert rest == ([] if _kernels.missing("cuda") else ["['asked']"])


def test_without_the_cuda_module_the_reason_names_the_fix() -> None:
    reason = _kernels._why_no_cuda_kernel(None, (0, 3))
    assert reason is not None
    assert "JAX_BCE_CUDA=PYPI pip install ." in reason


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
        "print('jax_bce_v3' in jax.jit(jax_bce.loss).lower([0.0], [1.0]).as_text())\n"
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
    assert _kernels._cpu.xla_ffi_api_version == (0, 1)


def test_without_built_modules_the_error_names_the_fix(tmp_path: Path) -> None:
    package = tmp_path / "jax_bce"
    package.mkdir()
    for source in Path(jax_bce.__file__).parent.glob("*.py"):
        shutil.copy(source, package)
    done = run(f"import sys; sys.path.insert(0, {str(tmp_path)!r}); import jax_bce")
    assert "compiled modules are missing" in done.stderr
    assert "pip install ." in done.stderr


def test_unknown_instruction_set_falls_back_to_xla() -> None:
    code = (
        "import jax_bce; from jax_bce._kernels import missing\n"
        "print(missing('cpu')); print(jax_bce.loss([0.0], [1.0]))"
    )
    reason, value = run(code, JAX_BCE_CPU="mmx").stdout.splitlines()
    assert "JAX_BCE_CPU" in reason
    assert value.startswith("0.693147")


def test_report(platform: str) -> None:
    done = subprocess.run(
        [sys.executable, "-W", "error", "-m", "jax_bce"],
        cwd="/",
        env=platforms.environment(platform),
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stderr
    assert done.stderr == ""
    report, choices = done.stdout.split("\n\n")
    facts = dict(re.split(r"  +", line, maxsplit=1) for line in report.splitlines())
    assert facts["jax_bce"] == jax_bce.__version__
    assert facts["jax"].startswith(jax.__version__)
    assert facts[f"{platform} kernel"].startswith("loaded, ")
    assert facts["default platform"] == {"cpu": "cpu", "cuda": "gpu"}[platform]
    if platform == "cpu":
        assert re.search("sums and means.*CPU: the kernel", choices)
        assert facts["cuda kernel"].startswith(("not in use", "not built", "not usable"))


@pytest.mark.parametrize("name", jax_bce.__all__)
def test_docstring_examples(cpu: str, name: str) -> None:
    function = getattr(jax_bce, name)
    (test,) = doctest.DocTestFinder().find(function, name)
    assert test.examples
    assert doctest.DocTestRunner().run(test).failed == 0


def test_the_readme_says_where_small_gradients_are_flushed(cpu: str) -> None:
    """Outside of jax.jit XLA multiplies by the cotangent; loss_and_grad does not."""
    gradient, logit = jax.grad(jax_bce.loss), jax.numpy.float32(-90)
    assert gradient(logit, 0.0) == 0
    for value in (jax.jit(gradient)(logit, 0.0), jax_bce.loss_and_grad(logit, 0.0)[1]):
        assert f"{float(value):.3g}" == "8.19e-40"


@pytest.mark.any_jax
def test_the_api_reference_has_every_public_name() -> None:
    page = (ROOT / "docs/api.md").read_text()
    assert sorted(re.findall(r"autofunction:: (\w+)", page)) == sorted(jax_bce.__all__)
    modules = {f"jax_bce.{name}" for name in ("keras", "optax", "torch_like")}
    assert set(re.findall(r"automodule:: (\S+)", page)) == modules


def test_readme_examples() -> None:
    """Every Python block of the README runs as it stands, one after the other."""
    blocks = re.findall(r"```python\n(.*?)```", (ROOT / "README.md").read_text(), re.DOTALL)
    assert blocks
    # What flax's import warns of, on an older JAX than it was made for, is not ours.
    flax = "import warnings\nwith warnings.catch_warnings(action='ignore'):\n    import flax.nnx\n"
    done = run(flax + "\n".join(blocks))
    assert done.returncode == 0, done.stderr
