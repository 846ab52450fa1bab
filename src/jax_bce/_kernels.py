"""The kernels: which there are, why one is missing, and which one `implementation=None` takes.

A kernel is compiled code, registered with XLA for its platform, "cpu" or "cuda". On a CPU None is
the kernel, which is the fastest by measurement. On an NVIDIA GPU it is what `why_xla_on_gpu` says:
speed has not been measured there. Before a CUDA kernel's results are used, it has to pass a
known-answer test (csrc/known_answer.h) on each GPU.

Processes that run one program on several hosts must all compile the same one, or they wait for each
other forever. So None depends on what all hosts share: the call, the environment variable
JAX_BCE_GPU, and what is installed. Where this machine's driver or GPU does not allow the kernel,
XLA takes over only in a program of one process.
"""

import functools
import importlib
import math
import os
import re
import warnings
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

try:
    from jax_bce import _cpu
except ImportError as error:
    raise ImportError(
        "jax_bce: the compiled modules are missing. Run `pip install .` in the source folder, and "
        f"import jax_bce from elsewhere (this is {Path(__file__).parent}). The cause: {error}"
    ) from error

_cuda: Any
try:
    _cuda = importlib.import_module("jax_bce._cuda")
except ImportError:  # built without CUDA
    _cuda = None

refusal = _cpu.refusal  # why no kernel can evaluate a call


def ffi_version_of_jaxlib() -> tuple[int, int]:
    """The FFI version of the running jaxlib, which only its headers state."""
    header = Path(jax.ffi.include_dir(), "xla", "ffi", "api", "c_api.h").read_text()
    major, minor = (
        int(re.search(rf"#define XLA_FFI_API_{part} (\d+)", header)[1])  # type: ignore[index]
        for part in ("MAJOR", "MINOR")
    )
    return major, minor


def _why_not_registered(module: Any, runtime: tuple[int, int]) -> str | None:
    """The reason why this jaxlib cannot use the module's handlers, or None if it can."""
    built = module.xla_ffi_api_version
    # A handler that is newer than the running jaxlib would prevent the whole backend from starting.
    if built[0] == runtime[0] and built[1] <= runtime[1]:
        return None
    return (
        f"it was built for XLA FFI {built[0]}.{built[1]}, but the running jaxlib has "
        f"{runtime[0]}.{runtime[1]}: upgrade jaxlib, or reinstall jax_bce: in the "
        "source folder, run `pip install --force-reinstall --no-cache-dir .`"
    )


def _why_no_cpu_kernel(module: Any, runtime: tuple[int, int]) -> str | None:
    """The reason why the CPU kernel cannot run, or None if it can."""
    if not module.instruction_set():
        return (
            "this processor lacks AVX2, FMA or F16C (x86-64-v3), or the environment variable "
            "JAX_BCE_CPU names an instruction set it does not have: unset it"
        )
    return _why_not_registered(module, runtime)


def _why_no_cuda_kernel(module: Any, runtime: tuple[int, int]) -> str | None:
    """The reason why the CUDA kernel cannot run on any machine, or None if it can."""
    if module is None:
        return (
            "jax_bce was built without CUDA: in the source folder, run "
            "`JAX_BCE_CUDA=ON pip install .` if a CUDA toolkit is installed, or else "
            "`JAX_BCE_CUDA=PYPI pip install .`, which downloads the compiler"
        )
    return _why_not_registered(module, runtime)


def _why_driver_is_too_old(module: Any) -> str | None:
    """The reason why this machine's driver cannot run the CUDA kernel, or None if it can.

    If there is no driver at all, the kernel can only be compiled for another machine.
    """
    driver, needed = module.driver_version(), module.runtime_version
    if 0 < driver // 1000 < needed // 1000:
        return (
            f"it was built with CUDA {needed // 1000}, but the driver supports at most CUDA "
            f"{driver // 1000}.{driver % 1000 // 10}: upgrade the NVIDIA driver, or "
            f"reinstall jax_bce with nvcc {driver // 1000}"
        )
    return None


def _runs_on(capability: int, machine_code: Sequence[int], ptx: Sequence[int]) -> bool:
    """Whether a GPU of that compute capability, 75 for 7.5, can run some of the code.

    Machine code runs on GPUs of its generation from its version on, PTX on all from its version on.
    """
    of_generation = [code for code in machine_code if code // 10 == capability // 10]
    return any(code <= capability for code in (*of_generation, *ptx))


def _why_no_gpu_runs_it(module: Any) -> str | None:
    """The reason why none of this machine's GPUs can run the CUDA kernel, or None."""
    capabilities = sorted(set(module.compute_capabilities()))
    # A driver compiles PTX of its own CUDA version and of older ones.
    compiles = module.driver_version() >= module.runtime_version
    ptx = module.ptx if compiles else []
    if not capabilities or any(_runs_on(c, module.machine_code, ptx) for c in capabilities):
        return None

    def names(numbers: Sequence[int]) -> str:
        return ", ".join(f"{number // 10}.{number % 10}" for number in numbers)

    wanted = ";".join(map(str, capabilities))
    reason = (
        f"it has code for compute capability {names(module.machine_code)}, but the GPU has "
        f"{names(capabilities)}: in the source folder, run `CUDAARCHS='{wanted}' pip install .`"
    )
    if not compiles and any(_runs_on(c, [], module.ptx) for c in capabilities):
        needed = f"{module.runtime_version // 1000}.{module.runtime_version % 1000 // 10}"
        reason += (
            f", or upgrade the NVIDIA driver to one for CUDA {needed}, which can compile its PTX"
        )
    return reason


@functools.cache
def _why_not_installed(platform: str) -> str | None:
    """The reason why the kernel for "cpu" or "cuda" cannot be registered, or None if it can."""
    if platform == "cuda":
        return _why_no_cuda_kernel(_cuda, ffi_version_of_jaxlib())
    return _why_no_cpu_kernel(_cpu, ffi_version_of_jaxlib())


@functools.cache
def _why_not_on_this_machine() -> str | None:
    """The reason why this machine cannot run the CUDA kernel that is installed, or None."""
    # Not on import: listing the GPUs starts the driver, and then forked processes cannot use it.
    return _why_driver_is_too_old(_cuda) or _why_no_gpu_runs_it(_cuda)


def missing(platform: str) -> str | None:
    """Why the kernel for "cpu" or "cuda" is not available, with the fix; None if it is."""
    reason = _why_not_installed(platform)
    return _why_not_on_this_machine() if platform == "cuda" and reason is None else reason


def fails() -> str | None:
    """Why no result of the CUDA kernel can be used on this machine, or None.

    Tests each GPU that JAX has started, once; the module remembers the answers.
    """
    if reason := _why_not_on_this_machine():
        return reason
    failure = _cuda.known_answer()
    if failure.endswith("out of memory"):
        return (
            f"its known-answer test finds no memory on {failure.partition(':')[0]}: leave it a few "
            "MB, for example with XLA_PYTHON_CLIENT_MEM_FRACTION=0.7"
        )
    if failure:
        return (
            f"it fails its known-answer test on {failure}: upgrade the NVIDIA driver, or reinstall "
            "jax_bce; if that does not help, please report it"
        )
    return None


def pinned() -> str | None:
    """What the environment says `implementation=None` is to be on an NVIDIA GPU, if anything."""
    value = os.environ.get("JAX_BCE_GPU") or None
    if value not in (None, "xla", "cuda"):
        raise ValueError(
            f"JAX_BCE_GPU must be xla or cuda, got {value!r}: correct or unset this environment "
            "variable."
        )
    return value


def why_xla_with_modifiers(
    operands: Sequence[Any],
    modifiers: Mapping[str, Any],
    gradient: np.dtype | None,
    reduced_rank: int,
    devices: int = 1,
) -> str | None:
    """Why weights, masks and denominators make a call on an NVIDIA GPU XLA's; None: they do not.

    Operands (logits, labels, scale and smoothing) and modifiers have shapes and dtypes. `gradient`
    is the gradient's dtype, if there is one, and `devices` the number among which jit shards all.
    The kernel is fast where it reads four elements of each at once: of a number for each element,
    or for each column or row of one matrix, whose rows begin at multiples of four (`plan_for` in
    csrc/bce_cuda.cu). With one weight or mask, it then takes no longer than XLA by the model of
    tests/gpu_model.py; with a weight and soft or smoothed labels, 3% longer on an H200.
    """
    if any(each.size != 1 for name, each in modifiers.items() if name.startswith("divisor")):
        return "a denominator per row: XLA sums weights while it makes them"
    names = {name for name in modifiers if not name.startswith("divisor")}
    if not names:
        return None
    if len(names) > 1:
        return "several weights or masks: with soft labels, XLA takes fewer instructions"
    logits, labels, *factors = operands
    (name,) = names
    modifier = modifiers[name]
    if name == "pos_weight":
        return "pos_weight: with soft or smoothed labels, XLA takes fewer instructions"
    if gradient != logits.dtype:
        return "a weight or mask, and no gradient or one of another dtype: XLA scales it on the way"
    if devices > 1:  # _call.py hands each of them a number for each element
        return "a weight or mask on several devices: XLA broadcasts it on the way"
    usual = {"where": np.dtype(bool), "ignore_label": labels.dtype}.get(name, np.float32)
    if modifier.dtype != usual or labels.dtype.itemsize == 8:
        return f"{name}, or its labels, of an unusual dtype: XLA converts them on the way"
    shape = jnp.broadcast_shapes(*(each.shape for each in (*operands, modifier)))
    alike = logits.shape == shape and (labels.shape == shape or labels.size == 1)
    kept, length = _rows(shape, modifier.shape)
    shapes = len(kept) <= 2 and not (name == "ignore_label" and True in kept)
    if not alike or not shapes or any(each.size != 1 for each in factors):
        return f"the shapes of {name} and others: XLA broadcasts them on the way"
    columns = math.prod(shape[len(shape) - reduced_rank :])
    whole = columns <= _TILED or columns == logits.size or columns % 4 == 0
    if not whole or (len(kept) == 2 and length % 4):
        return "a weight or mask, and rows of no multiple of four elements"
    return None


# Rows of up to so many elements are evaluated in tiles, which begin at multiples of four.
_TILED = 1024


def _rows(shape: Sequence[int], own: Sequence[int]) -> tuple[list[bool], int]:
    """How an array is broadcast to a shape: which dimensions it has, merged, and the last size."""
    kept: list[bool] = []
    length = 1
    for size, own_size in zip(shape, (1,) * (len(shape) - len(own)) + tuple(own), strict=True):
        if size == 1:
            continue
        if not kept or kept[-1] != (own_size != 1):
            kept.append(own_size != 1)
            length = 1
        length *= size
    return kept, length


def why_xla_on_gpu(
    kind: str,
    reduced_rank: int,
    dtype: np.dtype,
    transposed: bool = False,
    modifiers: str | None = None,
    focal: bool = False,
) -> str | None:
    """The table: why `implementation=None` is XLA for a call on an NVIDIA GPU; None: the kernel.

    The kernel's advantage is that it reads logits and labels once, for loss and gradient, and sums
    in the same pass. `kind` is the primitive's, and so is `transposed`; dtype is the logits'.
    `modifiers` is what `why_xla_with_modifiers` says, and `focal` whether the loss is focal or
    asymmetric.
    """
    if kind == "total":
        return "a denominator: XLA sums weights while it makes them"
    if kind == "grad" or reduced_rank == 0:
        # Whether there are neighbours cannot be seen from the call.
        return "a result per element: XLA fuses it with the operations before and after"
    if transposed:
        return "axes that are not the last: XLA sums them in place, without a copy"
    if dtype == np.float64:
        return "float64: the time goes to arithmetic, which is the same"
    if focal:
        return "a focal loss: the time of the kernel is not compared with that of XLA"
    return modifiers


def runs(
    platform: str,
    implementation: str | None,
    kind: str,
    reduced_rank: int,
    dtype: np.dtype,
    transposed: bool,
    modifiers: str | None,
    focal: bool,
) -> bool:
    """Whether the kernel of a platform, rather than XLA, evaluates a call that it can evaluate.

    Raises RuntimeError where XLA must not take over from the CUDA kernel.
    """
    if platform == "cpu":
        return missing("cpu") is None
    if kind == "hess_and_grad":  # XLA fuses it into one pass: there is no CUDA kernel
        return False
    wanted = implementation or pinned()
    if wanted == "xla":
        return False
    if wanted is None and why_xla_on_gpu(kind, reduced_rank, dtype, transposed, modifiers, focal):
        return False
    reason = _why_not_installed("cuda")
    if reason and wanted is None:
        return False
    reason = reason or fails()
    if reason is None:
        return True
    if wanted == "cuda":
        name = "implementation='cuda'" if implementation else "JAX_BCE_GPU=cuda"
        raise RuntimeError(f"jax_bce: {name} is not available: {reason}.")
    if jax.process_count() > 1:
        raise RuntimeError(
            f"jax_bce: process {jax.process_index()} cannot run the CUDA kernel: {reason}. Other "
            "processes may run it, and all must run the same program: fix this one, or set "
            "JAX_BCE_GPU=xla in all of them."
        )
    _warn(reason)
    return False


@functools.cache
def _warn(reason: str) -> None:
    warnings.warn(
        f"jax_bce runs on XLA, because this machine cannot run its CUDA kernel: {reason}. "
        "JAX_BCE_GPU=xla turns this warning off.",
        RuntimeWarning,
        stacklevel=2,
    )


def workspace(rows: Any, columns: Any) -> Any:
    """How many float64 numbers the CUDA kernel needs for its sums; at most, for symbolic sizes.

    The number is proportional to the rows.
    """
    if isinstance(columns, int):
        return rows * _cuda.workspace(1, columns)
    return rows * ((columns + _cuda.group - 1) // _cuda.group)


def register() -> None:
    """Registers the kernels with XLA, where this jaxlib can use them."""
    modules: dict[str, Any] = {"cpu": _cpu, "CUDA": _cuda}
    for platform, module in modules.items():
        mismatch = module and _why_not_registered(module, ffi_version_of_jaxlib())
        if mismatch:
            where = "GPUs" if platform == "CUDA" else "CPUs, several times slower"
            warnings.warn(
                f"jax_bce runs on XLA on {where}, because its {platform.lower()} kernel is not "
                f"usable: {mismatch}.",
                RuntimeWarning,
                stacklevel=2,
            )
        elif _why_not_installed(platform.lower()) is None:
            for target, handler in module.registrations().items():
                jax.ffi.register_ffi_target(target, handler, platform=platform)
    for target in _cpu.registrations():
        jax.ffi.register_ffi_target_as_batch_partitionable(target)
