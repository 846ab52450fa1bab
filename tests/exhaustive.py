"""Every logit there is: all 2^32 of float32, all 2^16 of float16 and bfloat16.

    python tests/exhaustive.py              # `make exhaustive`
    python tests/exhaustive.py --stride 4096 --implementation xla
    python tests/exhaustive.py --implementation cuda    # on a GPU; the others on the CPU
    python tests/exhaustive.py --loss focal --stride 61 # float32 logits; or asymmetric
    python tests/exhaustive.py --loss hessian           # of grad_and_hess, on the CPU

Prints, as a table for docs/accuracy.md, the largest error in ulp, where it occurs, and the share of
results that are the exact value rounded once. Fails if one of them is outside the contract.

A float32 magnitude a is asked four times, (a, 0), (-a, 1), (a, 1) and (-a, 0); the first two have
one exact loss and opposite exact gradients, and so have the last two.
"""

import argparse
import functools
import json
import multiprocessing
import os
import sys
from collections.abc import Iterator
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass
from pathlib import Path

import jax
import numpy as np
import oracle
from rich import box
from rich.console import Console
from rich.progress import track
from rich.table import Table

import jax_bce
from jax_bce import _kernels

CHUNK = 2**20
MAGNITUDES = 2**31  # with the sign bit clear: infinity and the NaNs are among them
SOFT_LABELS = (0.1, 0.9)
FOCAL = {"focal": (2, 2, 0.0), "asymmetric": (4, 1, 0.05)}  # gamma_neg, gamma_pos, clip


@dataclass
class Worst:
    """The error of many results against their exact values."""

    ulp: float = 0.0
    logit: float = 0.0
    label: float = 0.0
    results: int = 0
    inexact: int = 0

    def merge(self, other: "Worst") -> "Worst":
        worse = other if other.ulp > self.ulp else self
        return Worst(
            worse.ulp,
            worse.logit,
            worse.label,
            self.results + other.results,
            self.inexact + other.inexact,
        )

    @property
    def exact(self) -> str:
        """How many results are the exact value rounded once: a share, or how many are not."""
        if self.results >= 2**20:
            return f"{1 - self.inexact / self.results:.5%}"
        return f"all but {self.inexact}" if self.inexact else "all"


def measure(
    actual: np.ndarray, exact: np.ndarray, logits: np.ndarray, label: float, scale: np.ndarray
) -> Worst:
    """The distance is computed for those results only that are not the exact value rounded once."""
    rounded = oracle.round_to(exact, actual.dtype) if actual.itemsize == 2 else _to_float32(exact)
    differs = ~((actual == rounded) | (np.isnan(actual) & np.isnan(exact)))
    where = np.flatnonzero(differs)
    if not where.size:
        return Worst(results=actual.size)
    distance = oracle.ulp_distance(actual[where], exact[where], actual.dtype, scale[where])
    worst = int(np.argmax(distance))
    return Worst(
        float(distance[worst]), float(logits[where[worst]]), label, actual.size, where.size
    )


def _to_float32(exact: np.ndarray) -> np.ndarray:
    with np.errstate(over="ignore"):
        return exact.astype(np.float32)


@functools.cache
def _kernel(implementation: str | None):
    # Before JAX starts in this process, one of many that share a GPU.
    os.environ["XLA_PYTHON_CLIENT_PREALLOCATE"] = "false"
    jax.config.update("jax_platforms", "cuda" if implementation == "cuda" else "cpu")
    return jax.jit(
        functools.partial(jax_bce.loss_and_grad, reduction="none", implementation=implementation)
    )


def check_magnitudes(
    first: int, size: int, stride: int, implementation: str | None
) -> dict[str, Worst]:
    last = min(first + size * stride, MAGNITUDES)
    patterns = np.arange(first, last, stride, dtype=np.uint32)
    magnitude = patterns.view(np.float32)
    found = {"loss": Worst(), "gradient": Worst()}
    for label in (0.0, 1.0):
        exact = oracle.exact(magnitude, np.float64(label))
        for sign in (1, -1):
            logits = np.copysign(magnitude, np.float32(sign))
            asked = label if sign == 1 else 1 - label
            loss, gradient = map(np.asarray, _kernel(implementation)(logits, np.float32(asked)))
            worst = {
                "loss": measure(loss, exact.loss, logits, asked, exact.loss),
                "gradient": measure(gradient, sign * exact.gradient, logits, asked, exact.gradient),
            }
            found = {name: found[name].merge(worst[name]) for name in found}
    return found


@functools.cache
def _focal_kernel(gamma_neg: float, gamma_pos: float, clip: float):
    jax.config.update("jax_platforms", "cpu")
    numbers = {"gamma_neg": gamma_neg, "gamma_pos": gamma_pos, "clip": clip}

    def results(x: jax.Array, y: jax.Array) -> tuple[jax.Array, jax.Array]:
        of = functools.partial(jax_bce.asymmetric_loss, labels=y, reduction="none", **numbers)
        loss, pullback = jax.vjp(of, x)
        return loss, pullback(jax.numpy.ones_like(loss))[0]

    return jax.jit(results)


def check_focal(first: int, size: int, stride: int, loss: str) -> dict[str, Worst]:
    """Of magnitudes, as above, with both signs and labels."""
    last = min(first + size * stride, MAGNITUDES)
    magnitude = np.arange(first, last, stride, dtype=np.uint32).view(np.float32)
    magnitude = magnitude[np.isfinite(magnitude)]
    found = {"loss": Worst(), "gradient": Worst()}
    for sign, label in ((1, 0.0), (-1, 0.0), (1, 1.0), (-1, 1.0)):
        logits, labels = sign * magnitude, np.full_like(magnitude, label)
        numbers = FOCAL[loss]
        exact = oracle.exact_focal(logits, labels, *numbers[:2], np.float32(numbers[2]))
        results = map(np.asarray, _focal_kernel(*numbers)(logits, labels))
        for name, actual, expected in zip(found, results, exact, strict=False):
            worst = measure(actual, expected, logits, label, expected)
            found[name] = found[name].merge(worst)
    return found


@functools.cache
def _hessian_kernel():
    jax.config.update("jax_platforms", "cpu")
    return jax.jit(lambda x: jax_bce.grad_and_hess(x, 0)[1])


def measure_hessians(logits: np.ndarray) -> Worst:
    """No label changes them."""
    exact = oracle.exact(logits, np.float64(0)).hessian
    return measure(np.asarray(_hessian_kernel()(logits)), exact, logits, 0, exact)


def check_hessians(first: int, size: int, stride: int, _: object) -> dict[str, Worst]:
    last = min(first + size * stride, MAGNITUDES)
    magnitude = np.arange(first, last, stride, dtype=np.uint32).view(np.float32)
    return {"hessian": measure_hessians(magnitude).merge(measure_hessians(-magnitude))}


def float32_rows(
    stride: int, implementation: str | None, console: Console, loss: str = "loss"
) -> dict[str, Worst]:
    size = min(CHUNK, MAGNITUDES // stride)
    starts = range(0, MAGNITUDES, size * stride)
    check, last = (check_focal, loss) if loss in FOCAL else (check_magnitudes, implementation)
    found = {"loss": Worst(), "gradient": Worst()}
    if loss == "hessian":
        check, found = check_hessians, {"hessian": Worst()}
    workers = len(os.sched_getaffinity(0))
    context = multiprocessing.get_context("spawn")
    with ProcessPoolExecutor(workers, mp_context=context) as pool:
        jobs = [pool.submit(check, s, size, stride, last) for s in starts]
        for job in track(jobs, f"float32 logits, {loss}", console=console):
            found = {name: found[name].merge(worst) for name, worst in job.result().items()}
    return found


def rows_16_bit(dtype: np.dtype, labels: tuple[float, ...], implementation: str | None):
    logits = oracle.every_16_bit(dtype)
    found = {"loss": Worst(), "gradient": Worst()}
    for value in labels:
        label = np.full_like(logits, value)
        exact = oracle.exact(logits, label)
        loss, gradient = map(np.asarray, _kernel(implementation)(logits, label))
        scale = exact.gradient if value in (0, 1) else exact.gradient_scale
        worst = {
            "loss": measure(loss, exact.loss, logits, value, exact.loss),
            "gradient": measure(gradient, exact.gradient, logits, value, scale),
        }
        found = {name: found[name].merge(worst[name]) for name in found}
    return found


def rows(
    stride: int, implementation: str | None, console: Console, loss: str
) -> Iterator[tuple[str, str, str, Worst]]:
    if loss in FOCAL:
        for quantity, worst in float32_rows(stride, None, console, loss).items():
            yield "float32", "hard", quantity, worst
        return
    if loss == "hessian":
        found = float32_rows(stride, None, console, loss)["hessian"]
        yield "float32", "hard", "hessian", found
        for dtype in (oracle.BFLOAT16, oracle.FLOAT16):
            yield dtype.name, "hard", "hessian", measure_hessians(oracle.every_16_bit(dtype))
        return
    contract_rows = [("float32", "hard", float32_rows(stride, implementation, console))]
    for dtype in (oracle.BFLOAT16, oracle.FLOAT16):
        contract_rows.append((dtype.name, "hard", rows_16_bit(dtype, (0.0, 1.0), implementation)))
        contract_rows.append((dtype.name, "soft", rows_16_bit(dtype, SOFT_LABELS, implementation)))
    for dtype_name, kind, found in contract_rows:
        for quantity, worst in found.items():
            yield dtype_name, kind, quantity, worst


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--stride", type=int, default=1, help="between float32 bit patterns")
    parser.add_argument("--implementation", choices=("cpu", "cuda", "xla"))
    parser.add_argument("--loss", choices=("loss", *FOCAL, "hessian"), default="loss")
    parser.add_argument("--json", type=Path, help="a file for the table, as a list of rows")
    arguments = parser.parse_args()
    if arguments.implementation in (None, "cpu") and (reason := _kernels.missing("cpu")):
        parser.error(f"there is no CPU kernel: {reason}")
    tolerance = oracle.TOLERANCE[arguments.implementation or "cpu"]
    console = Console(stderr=True)
    labels = {"hard": "0, 1", "soft": ", ".join(map(str, SOFT_LABELS))}

    table = Table(box=box.MARKDOWN)
    for column in (
        "dtype",
        "labels",
        "result",
        "values",
        "max ulp",
        "at logit, label",
        "correctly rounded",
    ):
        table.add_column(column, no_wrap=True)
    failed = False
    listed = []
    every = rows(arguments.stride, arguments.implementation, console, arguments.loss)
    for dtype, kind, quantity, worst in every:
        # A Hessian is as accurate as a gradient.
        allowed = getattr(
            tolerance.elements[dtype, kind], "gradient" if quantity == "hessian" else quantity
        )
        if arguments.loss in FOCAL:
            allowed = getattr(oracle, f"KERNEL_{arguments.loss.upper()}")
        failed |= not worst.ulp <= allowed
        listed.append(
            {"dtype": dtype, "labels": labels[kind], "result": quantity, "allowed": allowed}
            | vars(worst)
        )
        table.add_row(
            dtype,
            labels[kind],
            quantity,
            f"{worst.results:,}",
            (f"{worst.ulp:.4f}" if worst.inexact else "0.5")
            + ("" if worst.ulp <= allowed else f" > {allowed}"),
            f"{worst.logit:.9g}, {worst.label:g}" if worst.inexact else "",
            worst.exact,
        )
    Console(width=140).print(table)
    if arguments.json:
        arguments.json.write_text(json.dumps(listed))
    return int(failed)


if __name__ == "__main__":
    sys.exit(main())
