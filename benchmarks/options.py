"""Measures the cost of weights, masks, short rows and the related losses on a CPU.

    python benchmarks/options.py --rows 4096 --columns 8192 --short-rows 1048576 --seconds 30

Times compiled `value_and_grad` of the mean loss of float32 logits with uint8 labels. Each round
takes one sample of every case, in a rotating order. The table shows medians over the rounds: of the
time, and of its ratio to the case it is compared with. A second table is for many rows of two
logits, with per-row options, computed by the kernel and by XLA. A third is for `grad_and_hess` with
XGBoost's floor, beside plain jnp. `temporary` is the memory that XLA allocates in addition to
operands and results. The process uses the default memory settings ("fresh"
in bench.py). If it kept its memory ("warm"), XLA would reuse memory only in programs that are a
single call, and the unweighted call would be compared with calls that suffer page faults.

If PyTorch is installed, focal and asymmetric loss are also compared with eager PyTorch, by the
formulas of torchvision's sigmoid_focal_loss and timm's AsymmetricLossMultiLabel. The temporary
memory of PyTorch is not measured.
"""

import argparse
import json
import os
import statistics
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import optax
from bench import _processor
from records import now, versions
from rich.console import Console
from rich.table import Table

import jax_bce

Case = tuple[Callable[..., jax.Array], dict[str, jax.Array], str]


def multiplied(logits, labels, *, where, pos_weight):
    """What an optax user writes."""
    y = labels.astype(logits.dtype)
    losses = optax.sigmoid_binary_cross_entropy(logits, y) * (1 + (pos_weight - 1) * y)
    return jnp.sum(losses * where[:, None]) / (jnp.sum(where) * logits.shape[1])


def optax_focal(logits, labels):
    return jnp.mean(optax.sigmoid_focal_loss(logits, labels.astype(logits.dtype), gamma=2.0))


def cases(rows: int, columns: int) -> dict[str, Case]:
    keys = jax.random.split(jax.random.key(0), 4)
    pos_weight, weight = jnp.linspace(0.5, 4, columns), jnp.linspace(0.1, 2, columns)
    sample_weight = jax.random.uniform(keys[0], rows)
    row_mask = jax.random.bernoulli(keys[1], 0.8, rows)
    mask = jax.random.bernoulli(keys[2], 0.9, (rows, columns))
    both = {"pos_weight": pos_weight, "where": row_mask}
    loss, plain = jax_bce.loss, "unweighted"
    return {
        plain: (loss, {}, plain),
        "pos_weight (C,)": (loss, {"pos_weight": pos_weight}, plain),
        "row mask": (loss, {"where": row_mask}, plain),
        "pos_weight (C,), row mask": (loss, both, plain),
        "label_smoothing": (partial(loss, label_smoothing=0.1), {}, plain),
        "sample_weight (B,)": (loss, {"sample_weight": sample_weight}, plain),
        "weight (C,), sample_weight (B,)": (
            loss,
            {"weight": weight, "sample_weight": sample_weight},
            plain,
        ),
        "mask (B, C)": (loss, {"where": mask}, plain),
        "ignore_label": (loss, {"ignore_label": jnp.uint8(2)}, plain),
    }


def by_rows(factor: jax.Array, **keywords) -> Callable[..., jax.Array]:
    """The sum of the rows' losses, each multiplied by its own factor."""

    def function(logits, labels, implementation=None, **arrays):
        losses = jax_bce.loss(
            logits, labels, axis=-1, implementation=implementation, **keywords, **arrays
        )
        return jnp.dot(losses, factor)

    return function


def of_short_rows(rows: int) -> dict[str, Case]:
    """Cases with per-row options."""
    keys = jax.random.split(jax.random.key(3), 4)
    factor = jax.random.uniform(keys[0], rows, minval=0.5)
    row_mask = jax.random.bernoulli(keys[1], 0.9, rows)
    mask = jax.random.bernoulli(keys[2], 0.9, (rows, 2))
    plain, own = "rows of 2", by_rows(factor)

    def shared(logits, labels, implementation=None):
        """Labels over which vmap does not map."""
        logits = logits.reshape(-1, 1024, 2)
        mapped = jax.vmap(
            lambda x: jax_bce.loss(x, labels[:1024], axis=-1, implementation=implementation)
        )
        return jnp.dot(mapped(logits).ravel(), factor)

    found: dict[str, Case] = {
        plain: (own, {}, plain),
        "recompute": (by_rows(factor, residuals="recompute"), {}, plain),
        "normalizer (B,)": (own, {"normalizer": 1 + factor}, plain),
        "row mask": (own, {"where": row_mask}, plain),
        "mask (B, 2)": (own, {"where": mask}, plain),
        "vmap, shared labels": (shared, {}, plain),
    }
    by_xla = {
        f"XLA: {name}": (partial(function, implementation="xla"), options, name)
        for name, (function, options, _) in found.items()
    }
    return found | by_xla


def peers(options: dict[str, Case]) -> list[dict[str, Case]]:
    """Pairs, each measured separately: memory that one frees slows down the next."""
    both, focal = "pos_weight (C,), row mask", "focal_loss"
    return [
        {both: options[both], f"optax: {both}": (multiplied, options[both][1], both)},
        {
            "loss": (jax_bce.loss, {}, "loss"),
            focal: (jax_bce.focal_loss, {}, "loss"),
            "focal_loss, gamma 1.5": (partial(jax_bce.focal_loss, gamma=1.5), {}, "loss"),
            "asymmetric_loss": (jax_bce.asymmetric_loss, {}, "loss"),
            "optax: sigmoid_focal_loss": (optax_focal, {}, focal),
        },
    ]


def plain_derivatives(logits, labels):
    """What a user of a boosting library writes."""
    p = jax.nn.sigmoid(logits)
    return p - labels, jnp.maximum(p * (1 - p), 1e-16)


def of_derivatives() -> dict[str, Case]:
    own = "grad_and_hess"
    return {
        own: (partial(jax_bce.grad_and_hess, hess_floor=1e-16), {}, own),
        "plain jnp": (plain_derivatives, {}, own),
        "loss_and_grad, not reduced": (partial(jax_bce.loss_and_grad, reduction="none"), {}, own),
    }


def torch_peers(logits: jax.Array, labels: jax.Array) -> dict[str, tuple[Callable[[], None], str]]:
    """Calls of PyTorch, and the case that each is compared with."""
    try:
        import torch
    except ImportError:
        return {}
    from torch.nn.functional import binary_cross_entropy_with_logits

    x = torch.from_numpy(np.array(logits)).requires_grad_()
    y = torch.from_numpy(np.array(labels, np.float32))

    def focal() -> torch.Tensor:
        p = torch.sigmoid(x)
        p_t = p * y + (1 - p) * (1 - y)
        return binary_cross_entropy_with_logits(x, y, reduction="none") * (1 - p_t) ** 2

    def asymmetric() -> torch.Tensor:
        p = torch.sigmoid(x)
        n = (1 - p + 0.05).clamp(max=1)
        log_p_t = y * torch.log(p.clamp(min=1e-8)) + (1 - y) * torch.log(n.clamp(min=1e-8))
        p_t = p * y + n * (1 - y)
        return -log_p_t * torch.pow(1 - p_t, y + 4 * (1 - y))

    def call(losses: Callable[[], torch.Tensor]) -> None:
        x.grad = None
        losses().mean().backward()

    return {
        "PyTorch: torchvision's focal loss": (partial(call, focal), "focal_loss"),
        "PyTorch: timm's asymmetric loss": (partial(call, asymmetric), "asymmetric_loss"),
    }


def donated(logits: jax.Array, labels: jax.Array) -> dict[str, tuple[Callable[[], None], str]]:
    """The call whose gradient is written over that of the last one: no page is new."""

    def value_and_grad(logits, labels, buffer):
        return jax.value_and_grad(jax_bce.loss)(logits, labels)

    function = jax.jit(value_and_grad, donate_argnums=2, keep_unused=True)
    buffers = [jnp.zeros_like(logits)]

    def call() -> None:
        _, gradient = jax.block_until_ready(function(logits, labels, buffers.pop()))
        buffers.append(gradient)

    return {"into a donated buffer": (call, "unweighted")}


def measure(
    found: dict[str, Case],
    others: dict[str, Callable[[], object]],
    logits: jax.Array,
    labels: jax.Array,
    seconds: float,
    transform: Callable[..., Callable[..., object]],
) -> tuple[dict[str, list[float]], dict[str, int]]:
    """Seconds per call, one number per round, and bytes of temporary memory of those found."""
    calls, temporary = dict(others), {}
    for call in others.values():
        call()
    for name, (function, options, _) in found.items():
        compiled = jax.jit(transform(function)).lower(logits, labels, **options).compile()
        temporary[name] = compiled.memory_analysis().temp_size_in_bytes
        calls[name] = lambda compiled=compiled, options=options: jax.block_until_ready(
            compiled(logits, labels, **options)
        )
        calls[name]()
    times: dict[str, list[float]] = {name: [] for name in calls}
    names = list(calls)
    end = time.perf_counter() + seconds
    while len(times[names[-1]]) < 7 or time.perf_counter() < end:
        names.append(names.pop(0))
        for name in names:
            calls[name]()  # not timed: the previous call used other memory
            start = time.perf_counter()
            calls[name]()
            times[name].append(time.perf_counter() - start)
    return times, temporary


def main() -> None:
    parser = argparse.ArgumentParser(description="the cost of jax_bce's options on this CPU")
    parser.add_argument("--rows", type=int, default=4096)
    parser.add_argument("--columns", type=int, default=8192)
    parser.add_argument("--short-rows", type=int, default=2**20)
    parser.add_argument("--seconds", type=float, default=30.0)
    parser.add_argument("--output", type=Path, help="JSON lines")
    options = parser.parse_args()
    shape = options.rows, options.columns
    found = cases(*shape)
    short = options.short_rows, 2
    records = []
    for title, size, groups, transform in (
        ("value_and_grad of the mean", shape, [found, *peers(found)], jax.value_and_grad),
        ("value_and_grad of rows of two", short, [of_short_rows(short[0])], jax.value_and_grad),
        ("first and second derivatives", shape, [of_derivatives()], lambda function: function),
    ):
        records += table_of(title, size, groups, options.seconds / 3, transform)
    if options.output:
        options.output.write_text("".join(json.dumps(record) + "\n" for record in records))


def table_of(
    title: str,
    shape: tuple[int, int],
    groups: list[dict[str, Case]],
    seconds: float,
    transform: Callable[..., Callable[..., object]],
) -> list[dict]:
    """Measures and prints groups of cases; returns a record for each."""
    logits = 4 * jax.random.normal(jax.random.key(1), shape)
    labels = jax.random.bernoulli(jax.random.key(2), 0.3, shape).astype(jnp.uint8)
    table = Table(title=f"{title}, {shape[0]} x {shape[1]} float32, uint8 labels")
    for column in "", "ms", "ratio", "to", "temporary bytes":
        table.add_column(column, justify="left" if column in ("", "to") else "right")
    records = []
    for group in groups:
        others = torch_peers(logits, labels) if "asymmetric_loss" in group else {}
        others |= donated(logits, labels) if "unweighted" in group else {}
        calls = {name: call for name, (call, _) in others.items()}
        times, temporary = measure(group, calls, logits, labels, seconds, transform)
        bases = {name: base for name, (_, _, base) in group.items()}
        bases |= {name: base for name, (_, base) in others.items()}
        for name, base in bases.items():
            if base not in times:
                continue
            ratio = statistics.median(a / b for a, b in zip(times[name], times[base], strict=True))
            milliseconds = statistics.median(times[name]) * 1e3
            memory = f"{temporary[name]:,}" if name in temporary else ""
            table.add_row(name, f"{milliseconds:.1f}", f"{ratio:.2f}", base, memory)
            records.append(
                {
                    "date": now(),
                    "processor": _processor(),
                    "cores": len(os.sched_getaffinity(0)),
                    "versions": versions(),
                    "shape": shape,
                    "case": name,
                    "rounds": len(times[name]),
                    "median_ms": milliseconds,
                    "compared_with": base,
                    "ratio": ratio,
                    "temporary_bytes": temporary.get(name),
                }
            )
    Console(width=110).print(table)
    return records


if __name__ == "__main__":
    main()
