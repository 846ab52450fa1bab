"""The JAX primitive: the only module that knows FFI targets, batching and lowering.

    loss     = scale / count * (element losses, summed over the last reduced_rank dimensions)
    gradient = scale / count * (element gradients)

The operands logits, labels and scale have one rank and are broadcast against each other. scale has
the arithmetic's type, float32 (float64 for float64 logits), and size 1 in the summed dimensions. A
summed loss has the arithmetic's type too; an element's loss and gradient may be rounded to a 16-bit
type. A vmapped axis is one more leading dimension. Three kinds differ in their results: "loss",
"loss_and_grad", "grad".

On CPU a kind is one call of the FFI target `jax_bce_v1_<kind>`; where that is not to be had, and on
every other platform, XLA compiles `_reference.py`.
"""

import functools
import re
import warnings
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array
from jax.extend.core import Primitive
from jax.interpreters import batching, mlir

from jax_bce._reference import reference

try:
    from jax_bce import _cpu
except ImportError as error:
    raise ImportError(
        "jax_bce: built modules missing. Run `pip install .` in the source folder, and import "
        f"jax_bce from elsewhere (this is {Path(__file__).parent}). The cause: {error}"
    ) from error


def ffi_version_of_jaxlib() -> tuple[int, int]:
    """The FFI version of the running jaxlib, which states it in its headers only."""
    header = Path(jax.ffi.include_dir(), "xla", "ffi", "api", "c_api.h").read_text()
    major, minor = (
        int(re.search(rf"#define XLA_FFI_API_{part} (\d+)", header)[1])  # type: ignore[index]
        for part in ("MAJOR", "MINOR")
    )
    return major, minor


def _why_no_cpu_kernel(module: Any, runtime: tuple[int, int]) -> str | None:
    """The reason why the CPU kernel cannot run, or None if it can."""
    built = module.xla_ffi_api_version
    # A handler newer than the running jaxlib would keep the whole CPU backend from starting.
    if built[0] != runtime[0] or built[1] > runtime[1]:
        return (
            f"it was built for XLA FFI {built[0]}.{built[1]}, but the running jaxlib has "
            f"{runtime[0]}.{runtime[1]}: upgrade jaxlib, or reinstall jax_bce with "
            "`pip install --force-reinstall --no-cache-dir jax-bce`"
        )
    if not module.instruction_set():
        return (
            "this processor lacks AVX2, FMA or F16C (x86-64-v3), or the environment variable "
            "JAX_BCE_CPU names an instruction set it does not have: unset it"
        )
    return None


@functools.cache
def missing(platform: str) -> str | None:
    """Why the kernel for "cpu" or "cuda" is not there, with the remedy; None if it is."""
    if platform == "cuda":
        return (
            "this version of jax_bce has no CUDA kernel: leave implementation=None, and XLA "
            "compiles the loss for the GPU"
        )
    return _why_no_cpu_kernel(_cpu, ffi_version_of_jaxlib())


def _register() -> None:
    reason = missing("cpu")
    if reason is None:
        for target, handler in _cpu.registrations().items():
            jax.ffi.register_ffi_target(target, handler, platform="cpu")
    elif _cpu.instruction_set():
        warnings.warn(
            f"jax_bce runs on XLA, several times slower, because its CPU kernel is not usable: "
            f"{reason}.",
            RuntimeWarning,
            stacklevel=2,
        )


bce_p = Primitive("jax_bce")
bce_p.multiple_results = True


def bce(
    logits: Array,
    labels: Array,
    scale: Array,
    *,
    kind: str,
    reduced_rank: int,
    count: int,
    implementation: str | None,
    loss_dtype: np.dtype,
    gradient_dtype: np.dtype | None = None,
) -> list[Array]:
    """Binds the primitive; the gradient has the logits' dtype unless another is given."""
    return bce_p.bind(  # type: ignore[no-any-return]
        logits,
        labels,
        scale,
        kind=kind,
        reduced_rank=reduced_rank,
        count=count,
        implementation=implementation,
        loss_dtype=loss_dtype,
        gradient_dtype=np.dtype(gradient_dtype or logits.dtype),
    )


@bce_p.def_impl
def _evaluate(*operands: Array, **params: Any) -> list[Array]:
    # An evaluation is a compiled call also where the user has switched jit off: there is no other.
    with jax.disable_jit(False):
        return _compiled(**params)(*operands)  # type: ignore[no-any-return]


@functools.cache
def _compiled(**params: Any) -> Callable[..., Any]:
    return jax.jit(functools.partial(bce_p.bind, **params))


@bce_p.def_abstract_eval
def _shapes(
    logits: Any, labels: Any, scale: Any, *, kind: str, reduced_rank: int, **params: Any
) -> list[jax.core.ShapedArray]:
    shape = jnp.broadcast_shapes(logits.shape, labels.shape, scale.shape)
    results = []
    if kind != "grad":
        results.append(
            jax.core.ShapedArray(shape[: len(shape) - reduced_rank], params["loss_dtype"])
        )
    if kind != "loss":
        results.append(jax.core.ShapedArray(shape, params["gradient_dtype"]))
    return results


def _batch(
    operands: Sequence[Array], axes: Sequence[int | None], **params: Any
) -> tuple[list[Array], list[int]]:
    """An operand that is not mapped gets a leading dimension of size 1: nothing is copied."""
    batched = [
        jnp.expand_dims(operand, 0) if axis is None else jnp.moveaxis(operand, axis, 0)
        for operand, axis in zip(operands, axes, strict=True)
    ]
    results = bce_p.bind(*batched, **params)
    return results, [0] * len(results)


batching.primitive_batchers[bce_p] = _batch


def _lowering(platform: str | None) -> Callable[..., Any]:
    """The rule for one platform, or for all that have no rule of their own (None)."""

    def rule(
        context: mlir.LoweringRuleContext,
        *operands: Any,
        implementation: str | None,
        **params: Any,
    ) -> Any:
        if implementation not in (None, "xla", platform):
            raise RuntimeError(
                f"jax_bce.loss(implementation={implementation!r}) is compiled for "
                f"{platform or 'another platform'}, where that kernel cannot run: use "
                "implementation=None."
            )
        if platform is None or implementation == "xla" or missing(platform) is not None:
            fallback = mlir.lower_fun(reference, multiple_results=True)
            return fallback(context, *operands, **params)
        call = jax.ffi.ffi_lowering(f"jax_bce_v1_{params['kind']}")
        return call(
            context,
            *operands,
            reduced_rank=np.int64(params["reduced_rank"]),
            count=np.int64(params["count"]),
        )

    return rule


mlir.register_lowering(bce_p, _lowering(None))
mlir.register_lowering(bce_p, _lowering("cpu"), platform="cpu")
_register()
