"""Measures the overhead of a call: eager, jitted, compile time and import time.

    python benchmarks/calls.py --n 128 --seconds 2

Reports microseconds per call on a few float32 logits, next to what a user of optax would call for
the same result. Each round takes one sample of every call, in a rotating order; medians are
reported. `compile` is the time to trace and compile `value_and_grad` with empty caches. `import` is
the time to import the package in a new process that has already imported jax.
"""

import argparse
import datetime
import json
import os
import statistics
import subprocess
import sys
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
from bench import SAMPLE_SECONDS, _processor
from peers import optax_losses
from records import RESULTS, Record, now, versions
from rich.console import Console
from rich.table import Table

import jax_bce

Function = Callable[..., object]
WARM_UP = 5
IMPORT = (
    "import jax, time; start = time.perf_counter(); import {}; print(time.perf_counter() - start)"
)


def optax_mean(logits: jax.Array, labels: jax.Array) -> jax.Array:
    return optax_losses(logits, labels).mean()


def optax_weighted(logits, labels, *, weight, where):
    """What an optax user writes."""
    losses = weight * optax_losses(logits, labels)
    return jnp.where(where, losses, 0).sum() / where.sum()


def optax_focal(logits: jax.Array, labels: jax.Array) -> jax.Array:
    import optax

    return optax.sigmoid_focal_loss(logits, labels).mean()


def functions(n: int) -> dict[str, tuple[Function, Function]]:
    """Each jax_bce function with its optax equivalent, or with optax's mean loss if it has none."""
    random = np.random.default_rng(n)
    options = {
        "weight": jnp.asarray(random.random(n), jnp.float32),
        "where": jnp.asarray(random.random(n) < 0.9),
    }
    return {
        "loss": (jax_bce.loss, optax_mean),
        "loss, weight, where": (
            partial(jax_bce.loss, **options),
            partial(optax_weighted, **options),
        ),
        "value_and_grad(loss)": (jax.value_and_grad(jax_bce.loss), jax.value_and_grad(optax_mean)),
        "loss_and_grad": (jax_bce.loss_and_grad, jax.value_and_grad(optax_mean)),
        "focal_loss": (jax_bce.focal_loss, optax_focal),
        "asymmetric_loss": (jax_bce.asymmetric_loss, optax_mean),
        "loss_from_probs": (
            lambda logits, labels: jax_bce.loss_from_probs(labels, labels),
            optax_mean,
        ),
        "grad_and_hess": (jax_bce.grad_and_hess, optax_mean),
    }


def seconds_of(calls: dict[str, Function], seconds: float) -> dict[str, float]:
    """The median seconds per call."""
    times: dict[str, list[float]] = {name: [] for name in calls}
    number, names = {}, list(calls)
    for name, call in calls.items():
        for _ in range(WARM_UP):
            start = time.perf_counter()
            jax.block_until_ready(call())
            last = time.perf_counter() - start
        number[name] = max(1, round(SAMPLE_SECONDS / last))
    end = time.perf_counter() + seconds
    while len(times[names[-1]]) < 7 or time.perf_counter() < end:
        names.append(names.pop(0))
        for name in names:
            for _ in range(WARM_UP):  # the caches hold what was called before
                jax.block_until_ready(calls[name]())
            start = time.perf_counter()
            for _ in range(number[name]):
                jax.block_until_ready(calls[name]())
            times[name].append((time.perf_counter() - start) / number[name])
    return {name: statistics.median(values) for name, values in times.items()}


def seconds_to_compile(function: Function, repeats: int, *operands: jax.Array) -> float:
    times = []
    for _ in range(repeats):
        jax.clear_caches()
        start = time.perf_counter()
        jax.jit(jax.value_and_grad(function)).lower(*operands).compile()
        times.append(time.perf_counter() - start)
    return statistics.median(times)


def seconds_to_import(module: str, repeats: int) -> float:
    command = [sys.executable, "-c", IMPORT.format(module)]
    runs = (subprocess.run(command, capture_output=True, check=True) for _ in range(repeats))
    return statistics.median(float(run.stdout) for run in runs)


def measure(n: int, seconds: float, repeats: int) -> list[Record]:
    random = np.random.default_rng(n)
    logits = jnp.asarray(3 * random.standard_normal(n), jnp.float32)
    labels = jnp.asarray(random.integers(0, 2, n), jnp.float32)
    pairs = functions(n)
    calls = {}
    for name, (ours, optax) in pairs.items():
        for who, function in (("jax_bce", ours), ("optax", optax)):
            calls[name, "eager", who] = partial(function, logits, labels)
            calls[name, "jitted", who] = partial(jax.jit(function), logits, labels)
    found = seconds_of(calls, seconds * len(pairs))
    for who, function in (("jax_bce", jax_bce.loss), ("optax", optax_mean)):
        found["value_and_grad(loss)", "compile", who] = seconds_to_compile(
            function, repeats, logits, labels
        )
        found["import", "import", who] = seconds_to_import(who, repeats)
    common = {
        "date": now(),
        "processor": _processor(),
        "cores": len(os.sched_getaffinity(0)),
        "versions": versions(),
        "n": n,
    }
    return [
        common | {"call": name, "case": case, "implementation": who, "median_us": value * 1e6}
        for (name, case, who), value in found.items()
    ]


def table_of(results: list[Record]) -> Table:
    found = {(r["call"], r["case"], r["implementation"]): r["median_us"] for r in results}
    table = Table(title=f"microseconds, n = {results[0]['n']}")
    for column in ("", "", "jax_bce", "optax", "jax_bce / optax"):
        table.add_column(column, justify="right" if column else "left")
    for name, case in dict.fromkeys((name, case) for name, case, _ in found):
        ours, optax = (float(str(found[name, case, who])) for who in ("jax_bce", "optax"))
        table.add_row(name, case, f"{ours:,.1f}", f"{optax:,.1f}", f"{ours / optax:.2f}")
    return table


def main() -> None:
    parser = argparse.ArgumentParser(description="the overhead of a jax_bce call on this CPU")
    parser.add_argument("--n", type=int, default=128)
    parser.add_argument("--seconds", type=float, default=2.0, help="for each function")
    parser.add_argument("--repeats", type=int, default=5, help="number of compilations and imports")
    parser.add_argument("--output", type=Path, help="JSON lines; default in benchmarks/results")
    options = parser.parse_args()
    output = options.output or RESULTS / f"cpu-calls-{datetime.date.today().isoformat()}.jsonl"
    results = measure(options.n, options.seconds, options.repeats)
    output.write_text("".join(json.dumps(record) + "\n" for record in results))
    console = Console(width=110)
    console.print(table_of(results))
    console.print(f"records: {output}")


if __name__ == "__main__":
    main()
