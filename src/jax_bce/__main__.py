"""`python -m jax_bce` prints what is installed, what is used and why, and how to fix problems."""

import os
import platform
from importlib.metadata import version
from typing import Any

import jax
import numpy as np

from jax_bce import _cpu, _kernels
from jax_bce._check import is_on
from jax_bce._kernels import ffi_version_of_jaxlib, missing

_F32, _F64 = np.dtype(np.float32), np.dtype(np.float64)


def _with(*names: str) -> str | None:
    """Why a call with those weights, a number for each of 80 classes, is XLA's; None: it is not."""
    logits, one, weight = (np.zeros(shape, _F32) for shape in ((100, 80), (), (80,)))
    operands, modifiers = (logits, logits, one, one), dict.fromkeys(names, weight)
    return _kernels.why_xla_with_modifiers(operands, modifiers, _F32, 2)


# Calls that `implementation=None` may treat differently, as arguments of `why_xla_on_gpu`.
_CASES: dict[str, Any] = {
    "sums and means, with their gradient": ("loss_and_grad", 1, _F32),
    "the same over axes that are not the last": ("loss_and_grad", 1, _F32, True),
    "the same with a weight or a mask": ("loss_and_grad", 1, _F32, False, _with("weight")),
    "the same with several": ("loss_and_grad", 1, _F32, False, _with("weight", "where")),
    "the same of float64 logits": ("loss_and_grad", 1, _F64),
    "focal and asymmetric losses": ("loss_and_grad", 1, _F32, False, None, True),
    'reduction="none"': ("loss", 0, _F32),
    'the gradient of residuals="recompute"': ("grad", 1, _F32),
    "denominators of weights or masks": ("total", 1, _F32),
}


def _cuda_state(backend: str) -> str:
    if reason := missing("cuda"):
        return f"not {'built' if _kernels._cuda is None else 'usable'}: {reason}"
    _cuda = _kernels._cuda
    code, ptx = (", ".join(map(str, codes)) for codes in (_cuda.machine_code, _cuda.ptx))
    built = f"built with CUDA {_cuda.runtime_version // 1000} for sm {code}, PTX of {ptx}"
    if backend == "gpu":
        if reason := _kernels.fails():
            return f"not usable: {reason}"
        return f"loaded, {built}; its known-answer test passed"
    fix = (
        "to use this machine's GPU, run pip install 'jax[cuda13]'"
        if _cuda.driver_version()
        else "no NVIDIA driver found"
    )
    return f"not in use, {built}: JAX found no GPU ({fix})"


def report() -> dict[str, str]:
    """The facts by name, for this report and for benchmark records."""
    built, running = _cpu.xla_ffi_api_version, ffi_version_of_jaxlib()
    cpu = missing("cpu")
    backend = jax.default_backend()
    # XLA sizes its thread pool by NPROC, or by the cores that this process may use.
    threads = os.environ.get("NPROC") or len(os.sched_getaffinity(0))
    return {
        "jax_bce": version("jax-bce"),
        "python": platform.python_version(),
        "jax": f"{jax.__version__}, jaxlib {version('jaxlib')}",
        "XLA FFI": f"{running[0]}.{running[1]}, kernels built for {built[0]}.{built[1]}",
        "cpu kernel": f"not usable: {cpu}" if cpu else f"loaded, {_cpu.instruction_set()}",
        "cpu threads": str(threads),
        "cuda kernel": _cuda_state(backend),
        "default platform": backend,
        "JAX_BCE_GPU": _kernels.pinned() or "not set; xla or cuda pins implementation=None on GPUs",
        "value check": "on" if is_on() else "off; JAX_BCE_CHECK=1 turns it on",
    }


def choices() -> list[tuple[str, str, str, str]]:
    """What `implementation=None` is: the case, then on a CPU, on an NVIDIA GPU, and why there."""
    on_cpu = "xla" if missing("cpu") else "the kernel"
    missing_on_gpu, pinned = missing("cuda"), _kernels.pinned()
    if missing_on_gpu is None and jax.default_backend() == "gpu":
        missing_on_gpu = _kernels.fails()
    rows = []
    for case, call in _CASES.items():
        reason = _kernels.why_xla_on_gpu(*call)
        on_gpu = "xla" if reason else "the kernel"
        if pinned:
            on_gpu, reason = {"xla": "xla", "cuda": "the kernel"}[pinned], f"JAX_BCE_GPU={pinned}"
        if missing_on_gpu and on_gpu == "the kernel":
            on_gpu, reason = "an error" if pinned else "xla", "the kernel is not usable"
        rows.append((case, on_cpu, on_gpu, reason or ""))
    return [*rows, ("jax.export", "xla", "xla", "for machines without this package")]


if __name__ == "__main__":
    for fact, value in report().items():
        print(f"{fact:20} {value}")
    print("\nimplementation=None is xla on other platforms, and here:")
    for case, on_cpu, on_gpu, reason in choices():
        print(f"{case:41} CPU: {on_cpu:12} NVIDIA GPU: {on_gpu:12} {reason}".rstrip())
