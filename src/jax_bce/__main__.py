"""`python -m jax_bce` prints what is installed, what is used and why, and how to fix problems."""

import os
import platform
from importlib.metadata import version

import jax

from jax_bce import _cpu
from jax_bce._check import is_on
from jax_bce._primitive import _cuda, ffi_version_of_jaxlib, missing


def _cuda_state(backend: str) -> str:
    if reason := missing("cuda"):
        return f"not usable: {reason}"
    code, ptx = (", ".join(map(str, codes)) for codes in (_cuda.machine_code, _cuda.ptx))
    built = f"built with CUDA {_cuda.runtime_version // 1000} for sm {code}, PTX of {ptx}"
    if backend == "gpu":
        return f"loaded, {built}; used with implementation='cuda'"
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
        # The CUDA kernel is only used if requested: it has not been measured yet.
        "implementation=None": "the cpu kernel" if backend == "cpu" and not cpu else "xla",
        "value check": "on" if is_on() else "off; JAX_BCE_CHECK=1 turns it on",
    }


if __name__ == "__main__":
    for fact, value in report().items():
        print(f"{fact:20} {value}")
