"""Where tests run: which platforms there are, why another is not, and JAX put on one of them.

A platform has JAX's name for it, which is also that of the kernel: "cpu", and "cuda" where JAX has
an NVIDIA GPU. Imported before JAX: what XLA reads when it starts is set here.
"""

import functools
import importlib.util
import os
import shutil
from collections.abc import Iterator
from contextlib import contextmanager

os.environ["XLA_FLAGS"] = (
    f"{os.environ.get('XLA_FLAGS', '')} --xla_force_host_platform_device_count=8".strip()
)
os.environ.setdefault(
    "JAX_PLATFORMS", "cuda,cpu" if "cuda" in os.environ.get("JAX_BCE_REQUIRE", "") else "cpu"
)
# The processes of pytest-xdist share the GPU.
os.environ.setdefault("XLA_PYTHON_CLIENT_PREALLOCATE", "false")

import jax
import pytest

# Kernels, and tools for CUDA without a GPU, whose absence is an error: in CI a skip must not hide
# that nothing was tested.
REQUIRED = set(filter(None, os.environ.get("JAX_BCE_REQUIRE", "").split(",")))
# Compiler options for a program that is run once and whose last bits do not matter: XLA compiles it
# in about half the time.
QUICKLY = {"xla_backend_optimization_level": 0, "xla_llvm_disable_expensive_passes": True}


@functools.cache
def missing(name: str) -> str | None:
    """Why nothing can be tested on a platform, or with a tool; None if it can."""
    if name == "nvcc":
        return None if shutil.which("nvcc") else "nvcc is not on the PATH"
    if name in ("torch", "xgboost", "lightgbm"):
        hint = "the Makefile's TORCH" if name == "torch" else 'the extra "test"'
        return None if importlib.util.find_spec(name) else f"it is not installed ({hint})"
    try:
        if name == "gpu-compiler":
            import gpu_compiler

            return gpu_compiler.missing()
        if name == "cuobjdump":
            import disassembly

            return disassembly.missing()
        from jax_bce import _kernels

        if name == "gpu-code":  # of the built module, whether there is a GPU to run it or not
            return _kernels.missing("cuda")
        reason = _kernels.missing(name)
    except (ImportError, AttributeError) as error:
        reason = str(error)
    if reason is None and name == "cuda":
        reason = _why_no_gpu()
    return reason


def _why_no_gpu() -> str | None:
    if os.environ["JAX_PLATFORMS"] == "cpu":
        return "JAX_PLATFORMS is cpu (JAX_BCE_REQUIRE=cpu,cuda asks for the GPU)"
    try:
        jax.devices("cuda")
    except RuntimeError as error:
        # JAX refuses every platform where one that it was told to use does not start.
        jax.config.update("jax_platforms", "cpu")
        return f"JAX has no GPU: {error}"
    return None


def require(name: str) -> None:
    """Skips the test where `missing` has a reason, or fails it where it is required."""
    reason = missing(name)
    if reason is not None and name in REQUIRED:
        pytest.fail(f"JAX_BCE_REQUIRE names {name}, but {reason}", pytrace=False)
    if reason is not None:
        pytest.skip(f"{name}: {reason}")


# Without a GPU there are no tests of it that could be skipped by the thousand.
PLATFORMS = ["cpu", *(["cuda"] if "cuda" in REQUIRED or missing("cuda") is None else [])]
# The formula as XLA compiles it, and the kernel, on each platform.
IMPLEMENTATIONS = [f"{platform}-{way}" for platform in PLATFORMS for way in ("xla", "kernel")]


def environment(platform: str) -> dict[str, str]:
    """For a process of its own, which has the platform by default."""
    return os.environ | {"JAX_PLATFORMS": "cuda,cpu" if platform == "cuda" else platform}


@contextmanager
def on(platform: str) -> Iterator[None]:
    """Puts there what this thread evaluates or compiles."""
    with jax.default_device(jax.devices(platform)[0]):
        yield


@contextmanager
def kernel(platform: str) -> Iterator[str]:
    """The same with the platform's kernel, whose name it gives; skips or fails without one."""
    require(platform)
    with on(platform):
        yield platform
