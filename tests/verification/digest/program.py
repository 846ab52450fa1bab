"""Prints the digests of losses and gradients over fixed inputs and options, as JSON.

python program.py IMPLEMENTATION [LIBRARY]

The inputs are made of integers: no library's random numbers or functions take part. With LIBRARY,
the handlers of that file take the place of the CPU kernel's (cuda_on_host.cc).
"""

import ctypes
import functools
import hashlib
import importlib.util
import json
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from types import ModuleType

import jax
import jax.numpy as jnp
import numpy as np

TARGETS = ("loss", "loss_and_grad", "grad", "total")


def use_handlers_of(library: str) -> None:
    """Before jax_bce is imported, which registers those of its module _cpu."""
    (folder,) = importlib.util.find_spec("jax_bce").submodule_search_locations
    (file,) = Path(folder).glob("_cpu.*.so")
    spec = importlib.util.spec_from_file_location("jax_bce._cpu", file)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    symbols = ctypes.CDLL(library)
    handlers = {f"jax_bce_v3_{name}": getattr(symbols, f"jax_bce_v3_{name}") for name in TARGETS}
    module.registrations = lambda: {
        name: {"execute": jax.ffi.pycapsule(handler)} for name, handler in handlers.items()
    }
    sys.modules["jax_bce._cpu"] = module


def integers(size: int, seed: int) -> np.ndarray:
    """64 random bits each (SplitMix64)."""
    bits = (np.arange(size, dtype=np.uint64) + np.uint64(seed << 32)) * np.uint64(
        0x9E3779B97F4A7C15
    )
    for shift, factor in ((30, 0xBF58476D1CE4E5B9), (27, 0x94D049BB133111EB)):
        bits = (bits ^ bits >> np.uint64(shift)) * np.uint64(factor)
    return bits ^ bits >> np.uint64(31)


def numbers(shape: tuple[int, ...], seed: int, low: int, high: int) -> np.ndarray:
    """In float64, with 20 bits behind the point."""
    bits = integers(int(np.prod(shape)), seed) % np.uint64((high - low) << 20)
    return (bits.astype(np.float64) / 2.0**20 + low).reshape(shape)


EXTREMES = (0.0, -0.0, np.inf, -np.inf, 1e-30, -40.0, 44.5, -88.75, 95.0, -104.0, 710.0, -745.0)
SHAPES = ((37,), (5, 1030), (3, 30_011))
DTYPES = ("float16", "bfloat16", "float32", "float64")


def dense(dtype: str) -> np.ndarray:
    """Every number of a 16-bit type that is finite; of others a million, where exp is not flat.

    A constant of the arithmetic whose last bit is another one shows in a few of them.
    """
    kind = np.dtype(jnp.dtype(dtype))
    unsigned = f"u{kind.itemsize}"
    if kind.itemsize == 2:
        every = np.arange(2**16, dtype=np.uint16).view(kind)
        with np.errstate(invalid="ignore"):  # signalling NaNs
            return every[np.isfinite(every.astype(np.float64))]
    low, high = (int(np.array(x, kind).view(unsigned)) for x in (2.0**-5, 2.0**7))
    step = (high - low) >> 19 | 1
    positive = np.arange(low, high, step, dtype=np.uint64).astype(unsigned).view(kind)
    return np.concatenate([positive, -positive])


def cases(shape: tuple[int, ...]) -> Iterator[tuple[str, dict]]:
    row, last = shape[:1], shape[-1:]
    weight, column = numbers(shape, 3, 0, 3), numbers(last, 4, 0, 4)
    where = numbers(shape, 5, 0, 1) < 0.75
    yield "mean", {}
    yield "none", {"reduction": "none"}
    yield "rows", {"axis": -1, "label_smoothing": 0.125}
    yield "sum", {"reduction": "sum", "pos_weight": column, "normalizer": 7.0}
    yield "weighted mean", {"reduction": "weighted_mean", "weight": weight, "where": where}
    yield "tiny normalizer", {"reduction": "sum", "normalizer": 1e-35}
    yield "no weight", {"reduction": "weighted_mean", "weight": np.zeros(shape)}
    yield "ignored", {"ignore_label": 1, "sample_weight": numbers(row, 6, 0, 2), "weight": column}
    yield (
        "every modifier",
        {
            "reduction": "weighted_mean",
            "axis": -1,
            "weight": weight,
            "sample_weight": numbers(row, 6, 1, 2),
            "pos_weight": column,
            "where": where,
            "ignore_label": 0,
            "label_smoothing": 0.25,
        },
    )


def focal_cases(shape: tuple[int, ...]) -> Iterator[tuple[str, dict]]:
    gammas = np.float32([0, 1, 2, 4, 0.5, 1.5, 2.5])[np.arange(shape[-1]) % 7]
    where = numbers(shape, 5, 0, 1) < 0.75
    yield "focal", {"gamma": 2.0}
    yield "focal, any gamma", {"gamma": 1.5, "alpha": 0.25, "reduction": "none"}
    yield (
        "focal, every modifier",
        {
            "gamma": gammas,
            "alpha": 0.75,
            "axis": -1,
            "reduction": "weighted_mean",
            "weight": numbers(shape, 3, 0, 3),
            "where": where,
            "label_smoothing": 0.125,
        },
    )
    yield "asymmetric", {"gamma_neg": 4.0, "gamma_pos": 1.0, "clip": 0.05}
    yield (
        "asymmetric, constant power",
        {
            "gamma_neg": gammas,
            "gamma_pos": 0.5,
            "clip": 0.2,
            "stop_gradient_weight": True,
            "reduction": "sum",
        },
    )


def hessian_cases(shape: tuple[int, ...]) -> Iterator[tuple[str, dict]]:
    yield "second derivatives", {}
    yield (
        "second derivatives, every option",
        {
            "weight": numbers(shape, 3, 0, 3),
            "sample_weight": numbers(shape[:1], 6, 1, 2),
            "pos_weight": numbers(shape[-1:], 4, 0, 4),
            "hess_floor": numbers(shape[-1:], 7, 0, 1) / 8,
        },
    )


OF_PAIRS = {"reduction": "sum", "axis": -1, "dtype": "float64"}
FOCAL_OF_DENSE = (
    ("focal, dense", {"gamma": 2.0}),
    ("focal, any gamma, dense", {"gamma": 1.5}),
    ("asymmetric, dense", {"gamma_neg": 4.0, "gamma_pos": 1.0, "clip": 0.05}),
)
# Cases of soft labels.
SOFT = {
    "none",
    "every modifier",
    "rows",
    "focal, any gamma",
    "focal, every modifier",
    "asymmetric, constant power",
}


def results_of(losses: ModuleType, name: str, options: dict, implementation: str) -> Callable:
    """Loss and gradient of logits and labels."""
    kind = name.partition(",")[0]
    if kind not in ("focal", "asymmetric"):
        return lambda x, y: losses.loss_and_grad(x, y, **options, implementation=implementation)
    loss = getattr(losses, f"{kind}_loss")

    def results(x: jax.Array, y: jax.Array) -> tuple[jax.Array, jax.Array]:
        value, pullback = jax.vjp(lambda x: loss(x, y, **options, implementation=implementation), x)
        return value, pullback(jnp.ones_like(value))[0]

    return results


def digests(implementation: str, losses: ModuleType, focal: bool) -> dict[str, str]:
    """Of each case, that of the loss and that of the gradient, or those of two derivatives."""
    found = {}

    def add(key: str, call: Callable, *operands: jax.Array) -> None:
        results = ("gradient", "hessian") if "second" in key else ("loss", "gradient")
        for what, result in zip(results, jax.jit(call)(*operands), strict=True):
            array = np.asarray(result)
            assert not np.isnan(array.astype(np.float64)).any(), key
            found[f"{what}, {key}"] = hashlib.sha256(array.tobytes()).hexdigest()[:16]

    for dtype in DTYPES:
        logits = jnp.asarray(dense(dtype))
        for name, options in (("dense", {}), *(FOCAL_OF_DENSE if focal else ())):
            call = results_of(losses, name, {"reduction": "none"} | options, implementation)
            for label in (0, 1, 0.3):
                labels = jnp.full(logits.shape, label, dtype)
                add(f"{name}, {dtype}, label {label}", call, logits, labels)
                if name == "dense":  # sums show more digits than elements do
                    pairs = logits[: logits.size & ~1].reshape(-1, 2)
                    add(
                        f"dense pairs, {dtype}, label {label}",
                        results_of(losses, name, OF_PAIRS, implementation),
                        pairs,
                        jnp.full(pairs.shape, label, dtype),
                    )
        for label in (0, 1, 0.3) if focal else ():
            labels = jnp.full(logits.shape, label, dtype)
            key = f"second derivatives, dense, {dtype}, label {label}"
            add(key, losses.grad_and_hess, logits, labels)
    for number, shape in enumerate(SHAPES):
        for dtype in DTYPES:
            logits = numbers(shape, number, -16, 16)
            logits.ravel()[: len(EXTREMES)] = EXTREMES[: logits.size]
            for kind, soft in (("uint8", False), (dtype, True)):
                labels = numbers(shape, 10 + number, 0, 1)
                labels = jnp.asarray(labels if soft else labels < 0.5, kind)
                for name, options in (*cases(shape), *(focal_cases(shape) if focal else ())):
                    if soft != (name in SOFT):
                        continue
                    call = results_of(losses, name, options, implementation)
                    key = f"{name}, {dtype}, {' x '.join(map(str, shape))}"
                    add(key, call, jnp.asarray(logits, dtype), labels)
                for name, options in hessian_cases(shape) if focal else ():
                    key = f"{name}, {kind} labels, {dtype}, {' x '.join(map(str, shape))}"
                    call = functools.partial(losses.grad_and_hess, **options)
                    add(key, call, jnp.asarray(logits, dtype), labels)
    return found


def main() -> None:
    implementation, *library = sys.argv[1:]
    if library:
        use_handlers_of(library[0])
    import jax_bce

    jax.config.update("jax_enable_x64", True)
    # Of focal losses and second derivatives there is only the CPU's kernel.
    focal = implementation == "cpu" and not library
    print(json.dumps(digests(implementation, jax_bce, focal), indent=1))


if __name__ == "__main__":
    main()
