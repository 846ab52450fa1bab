"""Results are as near to the exact ones as the contract says, where a search found the worst.

worst_case.py looks for them. Sums have many elements, in orders that are hard on a sum. In full,
tests/exhaustive.py runs on each of this processor's instruction sets.
"""

import json
import math
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import oracle
import platforms
import pytest
import worst_case
from oracle import FLOAT32, FLOAT64

import jax_bce

TESTS = Path(__file__).parent.parent
# A run of all float32 logits takes the time of a hundred with this stride.
STRIDE = 101


@pytest.mark.parametrize("kind", worst_case.KINDS)
@pytest.mark.parametrize("dtype", [FLOAT32, FLOAT64], ids=str)
def test_worst_case(cpu: str, dtype: np.dtype, kind: str, full: bool, record: Callable) -> None:
    wide = dtype == FLOAT64
    size, steps = (512, 30) if wide and full else (128, 1) if wide else (4096, 300 if full else 10)
    with jax.enable_x64(wide):
        found = worst_case.search(dtype, kind, size, steps)
    for result, worst in found.items():
        assert worst.ulp <= worst.allowed, (result, worst)
        record(
            f"exactness, worst case, {dtype}, {kind}, {result}",
            dtype=dtype.name,
            kind=kind,
            result=result,
            ulp=worst.ulp,
            allowed=worst.allowed,
            at=dict(worst.at),
            inputs=size * steps,
        )


# Numbers, one after the other, that are hard to add up.
ORDERS = {
    "all alike": lambda n: np.ones(n),
    "one huge, first": lambda n: np.where(np.arange(n) == 0, n, 1.0),
    "one huge, last": lambda n: np.where(np.arange(n) == n - 1, n, 1.0),
    "one huge in the middle": lambda n: np.where(np.arange(n) == n // 2 + 1, 2.0**24, 1.0),
    "alternating": lambda n: np.where(np.arange(n) % 2 == 0, 1.0, 2.0**-24),
    "growing": lambda n: np.exp2(np.linspace(-60, 40, n)),
    "falling": lambda n: np.exp2(np.linspace(40, -60, n)),
}


@pytest.mark.parametrize("order", ORDERS)
def test_sums_in_adverse_orders(
    check, platform: str, order: str, full: bool, record: Callable
) -> None:
    """Against the sum that is rounded once, of losses and of weighted losses."""
    size = 2**24 + 3 if full else 2**17 + 3
    numbers = ORDERS[order](size).astype(FLOAT32)
    for what in ("weights", "losses"):
        # The loss of a logit far from its label is that logit, as exp(-x) is far below its digits.
        logits, weight = (0.5, numbers) if what == "weights" else (numbers * 2.0**66, 1.0)
        logits = np.broadcast_to(np.float32(logits), size)
        loss = jax_bce.loss(logits, 0, weight=weight, reduction="sum", implementation=platform)
        one = float(oracle.exact(np.float64(0.5), 0.0).loss) if what == "weights" else 2.0**66
        exact = one * math.fsum(numbers.tolist())
        check.reduced(platform, loss, np.float64(exact), f"sum of {what}, {order}")
        error = float(oracle.relative_error(loss, np.float64(exact)))
        record(f"exactness, sum of {what}, {order}", elements=size, relative_error=error)


# The same of 2^31 elements: a weight for each row, and one for each column.
PRODUCTS = {
    "all alike": (lambda n: np.ones(n), lambda n: np.ones(n)),
    "one huge row": (ORDERS["one huge, first"], lambda n: np.full(n, 0.1)),
    "alternating": (ORDERS["alternating"], ORDERS["alternating"]),
    "growing, falling": (ORDERS["growing"], ORDERS["falling"]),
}


@pytest.mark.any_jax
@pytest.mark.parametrize("order", PRODUCTS)
def test_sums_of_2_to_the_31_elements(
    check, cpu: str, order: str, full: bool, record: Callable
) -> None:
    """The handler broadcasts their logit, label and weights, which take no memory."""
    rows, columns = 2**16 if full else 2**4, 2**15
    of_rows, of_columns = (
        of(n).astype(FLOAT32) for of, n in zip(PRODUCTS[order], (rows, columns), strict=True)
    )
    call = jax.ffi.ffi_call("jax_bce_v3_loss", jax.ShapeDtypeStruct((), FLOAT32))
    zero, one = jnp.float32(0), jnp.float32(1)
    size = rows * columns
    loss = call(
        jnp.full((1, 1), 0.5, FLOAT32),
        *(one, one, zero),  # label, scale, smoothing
        jnp.asarray(of_rows[:, None]),
        jnp.asarray(of_columns[None, :]),
        modifiers=0b11,
        reduced_rank=2,
        count=size,
    )
    element = float(oracle.exact(np.float64(0.5), 1.0).loss)
    exact = element * math.fsum(of_rows.tolist()) * math.fsum(of_columns.tolist()) / size
    check.reduced(cpu, loss, np.float64(exact), f"mean of products, {order}")
    error = float(oracle.relative_error(loss, np.float64(exact)))
    record(f"exactness, 2^31 elements, {order}", elements=size, relative_error=error)


@pytest.mark.any_jax
@pytest.mark.thorough
@pytest.mark.parametrize("loss", ["loss", "focal", "asymmetric", "hessian"])
@pytest.mark.parametrize("instruction_set", ["x86-64-v3", "x86-64-v4", "aarch64"])
def test_every_logit(
    cpu: str, tmp_path: Path, instruction_set: str, loss: str, full: bool, record: Callable
) -> None:
    if not full:
        pytest.skip("in full only (make verify-exactness): it takes minutes")
    stride = 1 if loss == "loss" else STRIDE
    file = tmp_path / "rows.json"
    options = ["--loss", loss, "--stride", str(stride), "--json", str(file)]
    done = subprocess.run(
        [sys.executable, TESTS / "exhaustive.py", *options],
        env=platforms.environment("cpu") | {"JAX_BCE_CPU": instruction_set},
        capture_output=True,
        text=True,
    )
    if "names an instruction set it does not have" in done.stderr:
        pytest.skip(f"this processor has no {instruction_set}")
    assert done.returncode == 0, done.stdout[-3000:] + done.stderr[-3000:]
    for row in json.loads(file.read_text()):
        step = f"exactness, every logit, {instruction_set}, {loss}, {row['dtype']}"
        record(
            f"{step}, labels {row['labels']}, {row['result']}",
            loss=loss,
            instruction_set=instruction_set,
            stride=stride if row["dtype"] == "float32" else 1,
            **row,
        )
