"""Compares linear_loss with the dense loss and with loops over chunks of labels: time and memory.

    python benchmarks/linear.py --labels 1000 10000 100000 1000000 --seconds 10

The case: the mean loss of a linear layer and its gradients with respect to features, weight and
bias, in float32, with a few positive labels per row, given as indices. The peers compute dense
labels from them: `dense` for all logits at once, with jax_bce.loss or optax; `chunks` in a loop
over chunks of labels whose logits are computed again in the backward pass (jax.checkpoint, and its
equivalent in PyTorch). Chunks have the size of linear_loss's blocks.

Each implementation runs in its own process. They take turns, one call each, so that other load on
the machine affects all alike; the times are medians, and the ratios are medians over the turns. The
memory is how much larger the process becomes than it was with its inputs, so it includes the
gradients. The last lines say whether linear_loss takes at most 1.15 times as long as the dense
loss. `--only` names one implementation.

    python benchmarks/linear.py --only linear_loss --rows 4096 --labels 262144 --width 256

is a case whose float32 logits alone would be 4 GiB.
"""

import argparse
import datetime
import json
import os
import resource
import statistics
import subprocess
import sys
import time
from collections.abc import Callable
from importlib.util import find_spec
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import optax
from bench import _processor
from records import RESULTS, Record, now, versions
from rich.console import Console
from rich.progress import track
from rich.table import Table

import jax_bce

POSITIVES = 5
BLOCK_BYTES = 64 * 2**20
MIB = 2**20
LONGER = 1.15  # how much longer than the loss of all logits it may take, where they fit

Arrays = dict[str, np.ndarray]
Call = Callable[[], object]


def inputs(rows: int, labels: int, width: int) -> Arrays:
    random = np.random.default_rng(labels)
    weight = random.standard_normal((width, labels), np.float32)
    weight /= np.float32(width**0.5)
    return {
        "features": random.standard_normal((rows, width), np.float32),
        "weight": weight,
        "bias": np.full(labels, -5, np.float32),
        "positives": random.integers(0, labels, (rows, POSITIVES)).astype(np.int32),
    }


def chunks_of(rows: int, labels: int) -> int:
    """How many chunks of logits and their gradient fill a block; they divide the labels."""
    least = -(-8 * rows * labels // BLOCK_BYTES)
    return next(n for n in range(least, labels + 1) if labels % n == 0)


def dense_labels(positives: jax.Array, first: jax.Array | int, count: int) -> jax.Array:
    index = positives - first
    index = jnp.where((index >= 0) & (index < count), index, count)
    return jax.vmap(lambda row: jnp.zeros(count).at[row].set(1, mode="drop"))(index)


def linear_loss(features, weight, bias, positives):
    return jax_bce.linear_loss(
        features, weight, bias=bias, positives=positives, block_bytes=BLOCK_BYTES
    )


def dense(features, weight, bias, positives):
    y = dense_labels(positives, 0, weight.shape[1])
    return jax_bce.loss(features @ weight + bias, y)


def dense_optax(features, weight, bias, positives):
    y = dense_labels(positives, 0, weight.shape[1])
    return optax.sigmoid_binary_cross_entropy(features @ weight + bias, y).mean()


def chunks_optax(features, weight, bias, positives):
    """As a user writes it: the weight's chunks are the loop's inputs, not slices of a constant."""
    (width, labels), rows = weight.shape, len(features)
    number = chunks_of(rows, labels)
    size = labels // number
    xs = (
        jnp.moveaxis(weight.reshape(width, number, size), 1, 0),
        bias.reshape(number, size),
        jnp.arange(number) * size,
    )

    @jax.checkpoint
    def step(total, chunk):
        w, b, first = chunk
        y = dense_labels(positives, first, size)
        return total + optax.sigmoid_binary_cross_entropy(features @ w + b, y).sum(), None

    total, _ = jax.lax.scan(step, jnp.zeros(()), xs)
    return total / (rows * labels)


def _of_jax(loss: Callable, arrays: Arrays) -> Call:
    operands = jax.block_until_ready(jax.device_put(tuple(arrays.values())))
    arrays.clear()
    compiled = jax.jit(jax.value_and_grad(loss, argnums=(0, 1, 2))).lower(*operands).compile()
    return lambda: jax.block_until_ready(compiled(*operands))


def chunks_torch(arrays: Arrays) -> Call:
    import torch
    from torch.utils.checkpoint import checkpoint

    torch.set_num_threads(len(os.sched_getaffinity(0)))
    rows, labels = len(arrays["features"]), arrays["weight"].shape[1]
    number = chunks_of(rows, labels)
    size = labels // number
    features, weight, bias, positives = (torch.from_numpy(a) for a in arrays.values())
    positives = positives.long()
    moving = [array.requires_grad_() for array in (features, weight, bias)]

    def of_chunk(x, w, b, first):
        index = positives - first
        inside = (index >= 0) & (index < size)
        y = torch.zeros(rows, size + 1).scatter_(1, torch.where(inside, index, size), 1.0)
        return torch.nn.functional.binary_cross_entropy_with_logits(
            x @ w + b, y[:, :size], reduction="sum"
        )

    def call() -> object:
        for array in moving:
            array.grad = None
        for first in range(0, labels, size):
            part = slice(first, first + size)
            operands = (features, weight[:, part], bias[part], first)
            loss = checkpoint(of_chunk, *operands, use_reentrant=False) / (rows * labels)
            loss.backward()  # one chunk at a time: its graph is freed
        return weight.grad

    return call


LOSSES = {
    "linear_loss": linear_loss,
    "dense, jax_bce": dense,
    "dense, optax": dense_optax,
    "chunks, optax": chunks_optax,
}
IMPLEMENTATIONS = (*LOSSES, "chunks, PyTorch")


def resident() -> int:
    pages = int(Path("/proc/self/statm").read_text().split()[1])
    return pages * resource.getpagesize()


def serve(name: str, rows: int, labels: int, width: int, warm_up: bool) -> None:
    """Makes a call for each line of the input, and prints its seconds; at the end, the memory."""
    arrays = inputs(rows, labels, width)
    call = _of_jax(LOSSES[name], arrays) if name in LOSSES else chunks_torch(arrays)
    before = resident()
    if warm_up:
        call()
    print("ready", flush=True)
    for _ in sys.stdin:
        start = time.perf_counter()
        call()
        print(time.perf_counter() - start, flush=True)
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
    memory = {
        "mib_beyond_inputs": (peak - before) / MIB,
        "mib_resident": peak / MIB,
        "mib_of_gradients": 4 * (rows * width + width * labels + labels) / MIB,
    }
    print(json.dumps(memory))


def measure(names: list[str], rows: int, labels: int, width: int, seconds: float) -> list[Record]:
    """The records of one number of labels. The processes take turns, one call each."""
    sizes = ["--rows", str(rows), "--labels", str(labels), "--width", str(width)]
    sizes += ["--seconds", str(seconds)]
    common: Record = {
        "date": now(),
        "processor": _processor(),
        "cores": len(os.sched_getaffinity(0)),
        "versions": versions(),
        "case": "value_and_grad of a linear layer, mean",
        "rows": rows,
        "width": width,
        "labels": labels,
    }
    processes = {}
    for name in names:  # one after the other: compiling would disturb the others
        processes[name] = subprocess.Popen(
            [sys.executable, __file__, "--case", name, *sizes],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
        )
        assert processes[name].stdout.readline() == "ready\n", f"{name} failed"
    times: dict[str, list[float]] = {name: [] for name in names}
    end = time.perf_counter() + seconds * len(names)
    while len(times[names[-1]]) < (3 if seconds else 1) or time.perf_counter() < end:
        for name, process in processes.items():
            process.stdin.write("call\n")
            process.stdin.flush()
            times[name].append(float(process.stdout.readline()))
    results = []
    for name, process in processes.items():
        memory = json.loads(process.communicate()[0])
        ratios = [t / ours for t, ours in zip(times[name], times[names[0]], strict=True)]
        own = {
            "implementation": name,
            "rounds": len(ratios),
            "median_seconds": statistics.median(times[name]),
            f"times_{names[0]}": statistics.median(ratios),
        }
        results.append(common | own | memory)
    return results


def table_of(results: list[Record]) -> Table:
    first = results[0]
    table = Table(title=f"{first['rows']} rows, width {first['width']}: seconds, MiB beyond inputs")
    names = list(dict.fromkeys(str(result["implementation"]) for result in results))
    for column in ("labels", *names):
        table.add_column(column, justify="right")
    for labels in dict.fromkeys(int(str(result["labels"])) for result in results):
        found = {str(r["implementation"]): r for r in results if r["labels"] == labels}
        cells = (
            f"{found[n]['median_seconds']:.3g} s, {found[n]['mib_beyond_inputs']:,.0f}"
            for n in names
        )
        table.add_row(f"{labels:,}", *cells)
    return table


def verdicts(results: list[Record]) -> list[str]:
    """Whether linear_loss is at most LONGER times as slow as the loss of all logits."""
    lines = []
    for result in results:
        if result["implementation"] == "dense, jax_bce":
            ratio = 1 / float(str(result["times_linear_loss"]))
            verdict = "passed" if ratio <= LONGER else "FAILED"
            lines.append(
                f"{result['labels']:,} labels: {ratio:.2f} times as long as the dense loss, "
                f"at most {LONGER}: {verdict}"
            )
    return lines


def main() -> None:
    parser = argparse.ArgumentParser(description="linear_loss, dense losses and chunk loops")
    parser.add_argument("--labels", type=int, nargs="+", default=[10**3, 10**4, 10**5, 10**6])
    parser.add_argument("--rows", type=int, default=256)
    parser.add_argument("--width", type=int, default=128)
    parser.add_argument(
        "--seconds",
        type=float,
        default=10.0,
        help="for each case, at least 3 calls; 0: the first alone",
    )
    parser.add_argument("--only", choices=IMPLEMENTATIONS, help="one implementation")
    parser.add_argument("--output", type=Path, help="JSON lines; default in benchmarks/results")
    parser.add_argument("--case", help=argparse.SUPPRESS)  # run one case, in its own process
    options = parser.parse_args()
    if options.case:
        (labels,) = options.labels
        serve(options.case, options.rows, labels, options.width, options.seconds > 0)
        return

    # Idle OpenMP threads would spin on the cores that the next implementation needs.
    os.environ |= {"JAX_PLATFORMS": "cpu", "OMP_WAIT_POLICY": "PASSIVE", "GOMP_SPINCOUNT": "0"}
    names = [options.only] if options.only else [*IMPLEMENTATIONS]
    console = Console(width=150)
    if not find_spec("torch") and "chunks, PyTorch" in names:
        names.remove("chunks, PyTorch")
        console.print("PyTorch is not installed and is left out.")
    output = options.output or RESULTS / f"cpu-linear-{datetime.date.today().isoformat()}.jsonl"
    results: list[Record] = []
    with output.open("w") as file:
        for labels in track(options.labels, "measuring", console=Console(stderr=True)):
            own = measure(names, options.rows, labels, options.width, options.seconds)
            file.writelines(json.dumps(result) + "\n" for result in own)
            results += own
    console.print(table_of(results))
    for line in verdicts(results):
        console.print(line)
    if options.only:
        for result in results:
            console.print({k: v for k, v in result.items() if k.startswith(("mib", "median"))})
    console.print(f"records: {output}")


if __name__ == "__main__":
    main()
