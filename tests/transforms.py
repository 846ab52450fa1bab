"""What each transformation of the loss costs: kernel launches and memory traffic, off the HLO.

    python tests/transforms.py          # the table of docs/transforms.md

Compiled for a CPU that seems to be eight devices. Of the body of a loop only calls are counted.
"""

import math
from collections.abc import Callable
from contextlib import nullcontext
from dataclasses import dataclass
from functools import partial

import platforms  # noqa: F401  # isort: skip  # before jax: eight devices
import jax
import jax.numpy as jnp
import jaxlib
import optax
from hlo import bytes_moved, collectives, kernel_calls, passes_outside_loops
from jax import grad, jvp, value_and_grad, vjp, vmap
from jax.sharding import AxisType, NamedSharding, PartitionSpec

import jax_bce

SHAPE = (1024, 1024)
SIZE = math.prod(SHAPE)
loss = jax_bce.loss
elementwise = partial(loss, reduction="none")
recompute = partial(loss, residuals="recompute")
xla = partial(loss, implementation="xla")
P = PartitionSpec


def optax_mean(x, y):
    return jnp.mean(optax.sigmoid_binary_cross_entropy(x, y.astype(x.dtype)))


def scaled(x, y):
    """As for mixed precision: the gradient meets its factor in a pass of its own."""
    return 1024 * loss(x, y)


def scaled_recompute(x, y):
    return 1024 * recompute(x, y)


def tangent(x, y):
    return jvp(lambda x: loss(x, y), (x,), (y,))


def pulled_back(x, y):
    losses, pullback = vjp(lambda x: elementwise(x, y), x)
    return losses, pullback(y)


def forward_over_reverse(x, y):
    return jvp(lambda x: grad(loss)(x, y), (x,), (y,))[1]


def reverse_over_reverse(x, y):
    return vjp(lambda x: grad(loss)(x, y), x)[1](y)


def reverse_over_forward(x, y):
    return grad(lambda x: jvp(lambda x: loss(x, y), (x,), (y,))[1])(x)


def scanned(x, y):
    return jax.lax.scan(lambda total, row: (total + loss(*row), None), 0.0, (x, y))[0]


def shards(x, y):
    value, gradient = value_and_grad(loss)(x, y)
    return jax.lax.pmean(value, ("data", "model")), gradient


def layer(x, w):
    """Its logits have the shape of the others, and are several blocks on each device."""
    return jax_bce.linear_loss(x, w, 1, block_bytes=2**18)


def pairs(x, t):
    return jax_bce.siglip_loss(x, t, 10.0, -10.0, block_bytes=2**18)


@dataclass(frozen=True)
class Mode:
    """A function of logits and labels; of features and weight; or of images and texts."""

    function: Callable
    logits: tuple[int, ...] = SHAPE
    labels: tuple[int, ...] = SHAPE
    dtypes: tuple[str, str] = ("float32", "float32")
    spread: PartitionSpec | tuple[PartitionSpec, ...] | None = None  # over four by two devices
    axes: AxisType = AxisType.Auto
    manual: bool = False  # in a shard_map


HALF = ("bfloat16", "uint8")
LAYER = (value_and_grad(layer, (0, 1)), (1024, 64), (64, 1024))
PAIRS = (value_and_grad(pairs, (0, 1)), (1024, 64), (1024, 64))
ROWS_AND_LABELS = (P("data"), P(None, "model"))
IN_ROWS = (P(("data", "model")),) * 2
MODES = {
    "loss": Mode(loss),
    'loss, reduction="none"': Mode(elementwise),
    "value_and_grad": Mode(value_and_grad(loss)),
    "value_and_grad, bfloat16 logits, uint8 labels": Mode(value_and_grad(loss), dtypes=HALF),
    "value_and_grad, label smoothing": Mode(value_and_grad(partial(loss, label_smoothing=0.1))),
    "value_and_grad, axis=0": Mode(value_and_grad(lambda x, y: jnp.sum(loss(x, y, axis=0)))),
    "value_and_grad with respect to labels, too": Mode(value_and_grad(loss, (0, 1))),
    'value_and_grad, residuals="recompute"': Mode(value_and_grad(recompute)),
    "value_and_grad of a multiple": Mode(value_and_grad(scaled)),
    'value_and_grad of a multiple, residuals="recompute"': Mode(value_and_grad(scaled_recompute)),
    'vjp, reduction="none"': Mode(pulled_back),
    "jvp": Mode(tangent),
    "Hessian times vector, forward over reverse": Mode(forward_over_reverse),
    "Hessian times vector, reverse over reverse": Mode(reverse_over_reverse),
    "Hessian times vector, reverse over forward": Mode(reverse_over_forward),
    "value_and_grad of checkpoint": Mode(value_and_grad(jax.checkpoint(loss))),
    "vmap of value_and_grad": Mode(vmap(value_and_grad(loss))),
    "vmap of value_and_grad, logits alone": Mode(
        vmap(value_and_grad(loss), (0, None)), labels=SHAPE[1:]
    ),
    "vmap of value_and_grad, labels alone": Mode(
        vmap(value_and_grad(loss), (None, 0)), logits=SHAPE[1:]
    ),
    "vmap of vmap of value_and_grad": Mode(
        vmap(vmap(value_and_grad(loss))), (4, 256, 1024), (4, 256, 1024)
    ),
    "scan over rows": Mode(scanned),
    "value_and_grad of a scan over rows": Mode(value_and_grad(scanned)),
    "jit, rows on 8 devices": Mode(value_and_grad(loss), spread=P(("data", "model"))),
    "jit, columns on 8 devices": Mode(value_and_grad(loss), spread=P(None, ("data", "model"))),
    "jit, rows of 8 elements on 8 devices": Mode(
        value_and_grad(loss), (SIZE // 8, 8), (SIZE // 8, 8), spread=P(("data", "model"))
    ),
    "jit, vmap of logits alone on 8 devices": Mode(
        vmap(value_and_grad(loss), (0, None)), labels=SHAPE[1:], spread=P(("data", "model"))
    ),
    "jit, rows and columns": Mode(value_and_grad(loss), spread=P("data", "model")),
    "jit, rows and columns, recompute": Mode(value_and_grad(recompute), spread=P("data", "model")),
    "jit, rows and columns, Hessian times vector": Mode(
        forward_over_reverse, spread=P("data", "model")
    ),
    "shard_map, rows and columns": Mode(shards, spread=P("data", "model"), manual=True),
    "linear_loss": Mode(*LAYER),
    "linear_loss, rows and labels, automatic axes": Mode(*LAYER, spread=ROWS_AND_LABELS),
    "linear_loss, rows and labels, explicit axes": Mode(
        *LAYER, spread=ROWS_AND_LABELS, axes=AxisType.Explicit
    ),
    "siglip_loss": Mode(*PAIRS),
    "siglip_loss, rows, automatic axes": Mode(*PAIRS, spread=IN_ROWS),
    "siglip_loss, rows, explicit axes": Mode(*PAIRS, spread=IN_ROWS, axes=AxisType.Explicit),
    'value_and_grad, implementation="xla"': Mode(value_and_grad(xla)),
    "value_and_grad of optax": Mode(value_and_grad(optax_mean)),
    "optax, rows and columns": Mode(value_and_grad(optax_mean), spread=P("data", "model")),
}


@dataclass(frozen=True)
class Cost:
    """Of what one device executes."""

    kernels: int
    other_passes: int
    bytes_per_element: float
    temporary_bytes: int
    sent: str


def compile_for(mode: Mode) -> jax.stages.Compiled:
    devices = jax.devices("cpu")
    mesh = jax.make_mesh((4, 2), ("data", "model"), (mode.axes,) * 2, devices=devices)
    function, shapes = mode.function, (mode.logits, mode.labels)
    specs = mode.spread
    if specs is None or isinstance(specs, PartitionSpec):
        # What vmap does not map, every device has.
        specs = [specs if len(shape) == len(SHAPE) else P() for shape in shapes]
    shardings = [mode.spread and NamedSharding(mesh, spec) for spec in specs]
    if mode.manual:
        places = {"in_specs": mode.spread, "out_specs": (P(), mode.spread)}
        function = jax.shard_map(function, mesh=mesh, **places)
    operands = [
        jax.ShapeDtypeStruct(shape, dtype, sharding=sharding)
        for shape, dtype, sharding in zip(shapes, mode.dtypes, shardings, strict=True)
    ]
    with jax.set_mesh(mesh) if mode.axes is AxisType.Explicit else nullcontext():
        return jax.jit(function).lower(*operands).compile()


def cost(name: str) -> Cost:
    mode = MODES[name]
    compiled = compile_for(mode)
    devices = 1 if mode.spread is None else 8
    touching = passes_outside_loops(compiled, SIZE // devices)
    calls = len(kernel_calls(compiled))
    return Cost(
        kernels=calls,
        other_passes=sum(not what.startswith("jax_bce") for what in touching),
        bytes_per_element=round(bytes_moved(compiled) / (SIZE / devices), 1),
        temporary_bytes=compiled.memory_analysis().temp_size_in_bytes,
        sent=", ".join(collectives(compiled)) or "nothing",
    )


def cells(found: Cost) -> list[str]:
    """A row of the table."""
    return [
        f"{found.kernels}",
        f"{found.other_passes}",
        f"{found.bytes_per_element}",
        f"{found.temporary_bytes:,}",
        found.sent,
    ]


def main() -> None:
    print(f"jaxlib {jaxlib.__version__}, optax {optax.__version__}; logits {SHAPE}.\n")
    print("| mode | kernel launches | other passes | bytes per element | temporary | sent |")
    print("| --- | --: | --: | --: | --: | --- |")
    for name in MODES:
        print("|", " | ".join([name, *cells(cost(name))]), "|")


if __name__ == "__main__":
    main()
