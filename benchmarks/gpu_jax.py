"""The JAX implementations for gpu.py, and a copy by XLA.

In a program, an optimization barrier ties each call's operands to the results of the previous call.
It costs nothing on the device and keeps XLA from fusing, merging or reordering the calls. Each
replay donates the results of the previous one, so that all addresses stay the same and XLA never
has to update the program's CUDA graph.
"""

import re
import tempfile
from collections.abc import Callable
from concurrent.futures import Future, ThreadPoolExecutor
from functools import partial
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
from gpu_cases import GATE_WORDS, Builders, Case, Program
from peers import Loss, jnp_losses, optax_losses

import jax_bce
from jax_bce.__main__ import report

# Make a graph even of a few kernels: by default, XLA needs at least 5.
ONE_GRAPH = {"xla_gpu_graph_min_graph_size": 1}

Function = Callable[..., Any]


def facts() -> dict[str, str]:
    return {
        "platform": jax.default_backend(),
        "processor": jax.devices()[0].device_kind,
        "kernel": report()["cuda kernel"],
    }


def gate() -> Program:
    """One kernel that takes long and works in place."""
    invert = jax.jit(jnp.invert, donate_argnums=0)
    words = jnp.zeros(GATE_WORDS[jax.default_backend()], jnp.uint32)

    def enqueue() -> None:
        nonlocal words
        words = invert(words)

    return Program(enqueue, lambda: words.block_until_ready(), False)


def _ours(case: Case, implementation: str) -> Loss:
    reductions: dict[str, dict[str, Any]] = {
        "mean": {"reduction": "mean"},
        "rows": {"reduction": "mean", "axis": -1},
    }
    options = reductions.get(case.reduction, {"reduction": "none"})
    return partial(jax_bce.loss, implementation=implementation, **options)


def _peer(case: Case, losses: Loss) -> Loss:
    means = {"mean": jnp.mean, "rows": partial(jnp.mean, axis=-1)}
    reduce = means.get(case.reduction, lambda values: values)
    return lambda logits, labels: reduce(losses(logits, labels))


def _in_float32(logits: jax.Array, labels: jax.Array) -> jax.Array:
    return jnp_losses(logits.astype(jnp.float32), labels.astype(jnp.float32))


def _call(case: Case, loss: Loss, *operands: jax.Array) -> tuple[jax.Array, ...]:
    """The results of the mode, in the dtypes that jax_bce returns."""
    dtype = case.logits if case.reduction == "none" else "float32"

    def value(logits: jax.Array, labels: jax.Array, *weights: jax.Array) -> jax.Array:
        losses = loss(logits, labels)
        for weight in weights:
            losses = jnp.mean(weight * losses)
        return losses.astype(dtype)

    if case.mode == "value":
        return (value(*operands),)
    result, pullback = jax.vjp(lambda logits: value(logits, *operands[1:]), operands[0])
    return result, *pullback(jnp.ones_like(result))


@partial(jax.jit, static_argnums=(1, 2, 3))
def _data(
    key: jax.Array, shape: tuple[int, ...], logits: str, labels: str
) -> tuple[jax.Array, jax.Array]:
    normal, coin = jax.random.split(key)
    x = (3 * jax.random.normal(normal, shape)).astype(logits)
    return x, jax.random.bernoulli(coin, shape=shape).astype(labels)


def _operands(case: Case) -> list[tuple[jax.Array, ...]]:
    keys = jax.random.split(jax.random.key(case.power), case.calls)
    pairs = [_data(key, case.shape, case.logits, case.labels) for key in keys]
    if case.reduction != "weighted":
        return pairs
    return [(*pair, jnp.full(case.shape, i + 1, jnp.float32)) for i, pair in enumerate(pairs)]


def _empty_results(function: Function, operands: list[Any]) -> list[Any]:
    shapes = [jax.eval_shape(function, *operand) for operand in operands]
    return jax.tree.map(lambda shape: jnp.zeros(shape.shape, shape.dtype), shapes)


def chained(function: Function) -> Any:
    """Calls of a function one after the other, into the buffers of the previous replay."""
    once = jax.jit(function)  # traced once, called many times

    def program(operands: list[Any], previous: list[Any]) -> list[Any]:
        results: list[Any] = []
        for operand in operands:
            if results:
                operand, results[-1] = jax.lax.optimization_barrier((operand, results[-1]))
            results.append(once(*operand))
        return results

    return jax.jit(program, donate_argnums=1, keep_unused=True)


def _compile(function: Function, operands: list[Any], results: list[Any]) -> tuple[Function, bool]:
    """The program, and whether it is one CUDA graph."""
    lowered = chained(function).lower(operands, results)
    if jax.default_backend() != "gpu":
        return lowered.compile(), False
    with tempfile.TemporaryDirectory() as folder:
        compiled = lowered.compile(compiler_options=ONE_GRAPH | {"xla_dump_to": folder})
        dumped = Path(folder).glob("*thunk_sequence_after_thunk_passes.txt")
        thunks = [re.findall(r"^\d+: (\w+)", path.read_text(), re.MULTILINE) for path in dumped]
        return compiled, ["kCommandBuffer"] in thunks  # XLA's word for a graph


def builders(case: Case) -> Builders:
    """A builder raises the error of its implementation's compilation, if there was one."""
    losses = {
        "jax_bce": _ours(case, "cuda" if jax.default_backend() == "gpu" else "cpu"),
        "jax_bce, xla": _ours(case, "xla"),
        "optax": _peer(case, optax_losses),
        "jnp": _peer(case, _in_float32),
    }
    if case.logits != "float32":
        losses[f"jnp in {case.logits}"] = _peer(case, jnp_losses)
    functions: dict[str, Function] = {
        name: partial(_call, case, loss) for name, loss in losses.items()
    }
    operands = _operands(case)
    words = case.bytes_moved // 8
    sources = [(jnp.full(words, i, jnp.uint32),) for i in range(case.calls)]
    # Two sets of buffers are enough: all implementations return the same shapes and dtypes.
    buffers = {
        "results": _empty_results(functions["jnp"], operands),
        "copies": _empty_results(jnp.invert, sources),
    }
    jobs = {name: (function, operands, "results") for name, function in functions.items()}
    jobs["copy, XLA"] = (jnp.invert, sources, "copies")

    def build(name: str, compilation: Future[tuple[Function, bool]]) -> Program:
        function, inputs, own = jobs[name]
        program, is_graph = compilation.result()

        def enqueue() -> None:
            try:
                buffers[own] = program(inputs, buffers[own])
            except Exception:
                buffers[own] = _empty_results(function, inputs)  # the donated ones are gone
                raise

        # Wait for the last results only: asking for all takes the host as long as the calls.
        return Program(enqueue, lambda: jax.block_until_ready(buffers[own][-1]), is_graph)

    with ThreadPoolExecutor() as pool:
        return {
            name: partial(build, name, pool.submit(_compile, function, inputs, buffers[own]))
            for name, (function, inputs, own) in jobs.items()
        }
