"""What XLA compiles for NVIDIA GPUs that are not there: kernels, traffic, memory, collectives.

    python tests/gpu_compiler.py          # the programs of this file, as a Markdown table

Needs JAX's CUDA plugin, but no GPU and no driver: the one that is installed, or the one that
`make test-all` puts into the environment's folder cuda_plugin. (Where there is no CUDA, an
installed plugin would make every start of JAX complain.) No kernel is run. h200.txtpb describes the
GPU: XLA decides by its figures.
"""

import functools
import importlib.util
import math
import sys
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import jax
import jax.numpy as jnp
import jaxlib
import numpy as np
import optax
from hlo import COLLECTIVE, bytes_moved, collectives, kernel_calls, passes_outside_loops
from jax import export, value_and_grad, vmap
from jax.experimental import topologies
from jax.sharding import Mesh, NamedSharding, PartitionSpec

import jax_bce
from jax_bce import _kernels

PLUGIN = Path(sys.prefix, "cuda_plugin")
SHAPE = (512, 65536)  # of the logits, each row of several blocks
SHORT = (32768, 1000)  # an eighth of a row is less than a block
UNEVEN = (32764, 1000)  # rows for 4 GPUs, but not for 8
LAYER = (4096, 131072, 512)  # of linear_loss: rows, labels and width


def missing() -> str | None:
    """Why no program with the CUDA kernel can be compiled; None if it can."""
    if reason := _kernels.missing("cuda"):
        return reason
    if importlib.util.find_spec("jax_cuda13_plugin") or (PLUGIN / "jax_cuda13_plugin").exists():
        return None
    return f"JAX's CUDA plugin is neither installed nor in {PLUGIN}, where `make test-all` puts it"


def optax_mean(x, y):
    return optax.sigmoid_binary_cross_entropy(x, y.astype(x.dtype)).mean()


def jnp_mean(x, y):
    x, y = x.astype(jnp.float32), y.astype(jnp.float32)
    return jnp.mean(jnp.maximum(x, 0) - x * y + jnp.log1p(jnp.exp(-jnp.abs(x))))


def of_shards(x, y):
    value, gradient = value_and_grad(partial(loss, reduction="sum"))(x, y)
    return jax.lax.psum(value, "gpu"), gradient


loss = partial(jax_bce.loss, implementation="cuda")


def of_columns(x, y, **keywords):
    return jnp.sum(jax_bce.loss(x, y, axis=0, **keywords))


def weighted(x, y):
    weight = jnp.arange(1, 1 + x.shape[1], dtype=jnp.float32)
    return jax_bce.loss(x, y, weight=weight)


def product(x, y):
    """The Hessian times the logits."""
    return jax.jvp(lambda x: jax.grad(loss)(x, y), (x,), (x,))[1]


def of_any_sizes(x, y):
    """The mean and its gradient, exported with sizes that are known only here."""
    sizes = export.symbolic_shape("rows, columns")
    known = [export.DisabledSafetyCheck.custom_call("jax_bce_v3_loss_and_grad")]
    function = jax.jit(value_and_grad(loss))
    exported = export.export(function, platforms=("cuda",), disabled_checks=known)
    return exported(*(jax.ShapeDtypeStruct(sizes, a.dtype) for a in (x, y))).call(x, y)


@dataclass(frozen=True)
class Program:
    function: Callable
    gpus: str = "1x1x1"  # hosts, processes of a host, GPUs of a process
    manual: bool = False  # in a shard_map
    columns: int = 1  # among how many GPUs a row is divided
    shape: tuple[int, int] = SHAPE


PROGRAMS = {
    "value_and_grad": Program(value_and_grad(loss)),
    "value_and_grad, smoothed labels": Program(value_and_grad(partial(loss, label_smoothing=0.1))),
    "value_and_grad, recompute": Program(value_and_grad(partial(loss, residuals="recompute"))),
    "value_and_grad, exported for any sizes": Program(of_any_sizes),
    "vmap of value_and_grad": Program(vmap(value_and_grad(loss))),
    "loss alone": Program(loss),
    "value_and_grad, 8 GPUs": Program(value_and_grad(loss), "1x1x8"),
    "value_and_grad, 2 hosts of 8 GPUs": Program(value_and_grad(loss), "2x1x8"),
    "rows and columns, 8 GPUs": Program(value_and_grad(loss), "1x1x8", columns=2),
    "rows and columns, 2 hosts of 8 GPUs": Program(value_and_grad(loss), "2x1x8", columns=4),
    "short rows, 8 GPUs": Program(value_and_grad(loss), "1x1x8", shape=SHORT),
    "columns of short rows, 8 GPUs": Program(value_and_grad(loss), "1x1x8", columns=8, shape=SHORT),
    "rows and columns of short rows, 8 GPUs": Program(
        value_and_grad(loss), "1x1x8", columns=2, shape=SHORT
    ),
    "uneven rows, 8 GPUs": Program(value_and_grad(loss), "1x1x8", columns=2, shape=UNEVEN),
    "Hessian times vector, 8 GPUs": Program(product, "1x1x8"),
    "shard_map, 8 GPUs": Program(of_shards, "1x1x8", manual=True),
    "shard_map, 2 hosts of 8 GPUs": Program(of_shards, "2x1x8", manual=True),
    "implementation=None": Program(value_and_grad(jax_bce.loss)),
    "implementation=None, 8 GPUs": Program(value_and_grad(jax_bce.loss), "1x1x8"),
    "implementation=None, 2 hosts of 8 GPUs": Program(value_and_grad(jax_bce.loss), "2x1x8"),
    "implementation=None, weight per class": Program(value_and_grad(weighted)),
    "implementation=None, weight per class, 8 GPUs": Program(value_and_grad(weighted), "1x1x8"),
    "implementation=None, axis=0": Program(value_and_grad(of_columns)),
    'implementation="cuda", axis=0': Program(
        value_and_grad(partial(of_columns, implementation="cuda"))
    ),
    'implementation=None, reduction="none"': Program(partial(jax_bce.loss, reduction="none")),
    'implementation="xla"': Program(value_and_grad(partial(jax_bce.loss, implementation="xla"))),
    "optax": Program(value_and_grad(optax_mean)),
    "plain jnp": Program(value_and_grad(jnp_mean)),
}


@dataclass(frozen=True)
class Compiled:
    """What one GPU executes."""

    kernels: list[str]  # a custom call by its target, everything else by its opcode
    bytes_per_element: float  # that the kernels read and write
    temporary_bytes: int
    collectives: list[str]  # and the shapes of their results


def prepare() -> None:
    """Lets this process compile for GPUs; to be called before JAX looks for devices."""
    sys.path.append(str(PLUGIN))
    jax.config.update("jax_platforms", "cpu")


@functools.cache
def mesh(gpus: str, columns: int = 1) -> Mesh:
    topology = topologies.get_topology_desc(
        platform="cuda",
        topology_name="",
        target_config=Path(__file__).with_name("h200.txtpb").read_text(),
        topology=gpus,
    )
    return Mesh(np.array(topology.devices).reshape(-1, columns), ("gpu", "column"))


def compile_for(program: Program, *dtypes: str) -> jax.stages.Compiled:
    """With the logits' rows, and the labels', spread over the GPUs, and perhaps the columns."""
    gpus, split = mesh(program.gpus, program.columns), PartitionSpec("gpu", "column")
    function = program.function
    if program.manual:
        specs = {"in_specs": (split, split), "out_specs": (PartitionSpec(), split)}
        function = jax.shard_map(function, mesh=gpus, check_vma=False, **specs)
    sharding = NamedSharding(gpus, split)
    operands = [jax.ShapeDtypeStruct(program.shape, dtype, sharding=sharding) for dtype in dtypes]
    return jax.jit(function).trace(*operands).lower(lowering_platforms=("cuda",)).compile()


def compiled(name: str, *dtypes: str) -> Compiled:
    """Of one of the programs, for logits and labels of these dtypes."""
    program = PROGRAMS[name]
    result = compile_for(program, *dtypes)
    kernels = [what for what in passes_outside_loops(result, 0) if not COLLECTIVE.match(what)]
    return Compiled(
        kernels,
        bytes_moved(result) / (math.prod(program.shape) / mesh(program.gpus).size),
        result.memory_analysis().temp_size_in_bytes,
        collectives(result),
    )


def linear_loss(
    gpus: str, columns: int, rows: str | None, labels: str | None, dtype: str
) -> tuple[list[str], list[str], int]:
    """Kernels, collectives and temporary bytes of the gradients of a layer with labels' indices."""
    n, c, d = LAYER
    shapes = {
        "features": ((n, d), dtype, PartitionSpec(rows)),
        "weight": ((d, c), dtype, PartitionSpec(None, labels)),
        "bias": ((c,), dtype, PartitionSpec(labels)),
        "positives": ((n, 8), "int32", PartitionSpec(rows)),
    }
    arrays = {
        name: jax.ShapeDtypeStruct(shape, dtype, sharding=NamedSharding(mesh(gpus, columns), spec))
        for name, (shape, dtype, spec) in shapes.items()
    }
    positives = arrays.pop("positives")

    def objective(parameters, positives):
        return jax_bce.linear_loss(**parameters, positives=positives, implementation="cuda")

    traced = jax.jit(value_and_grad(objective)).trace(arrays, positives)
    program = traced.lower(lowering_platforms=("cuda",)).compile()
    return (
        kernel_calls(program),
        collectives(program),
        program.memory_analysis().temp_size_in_bytes,
    )


def main() -> None:
    if reason := missing():
        sys.exit(reason)
    prepare()
    print(f"jaxlib {jaxlib.__version__}, optax {optax.__version__}; logits {SHAPE}.\n")
    print(
        "| program | logits, labels | kernels | bytes per element | temporary bytes | collectives |"
    )
    print("| --- | --- | --: | --: | --: | --- |")
    for name in PROGRAMS:
        for dtypes in (("float32", "float32"), ("bfloat16", "uint8")):
            found = compiled(name, *dtypes)
            print(
                f"| {name} | {', '.join(dtypes)} | {len(found.kernels)} "
                f"| {found.bytes_per_element:.2f} | {found.temporary_bytes:,} "
                f"| {', '.join(found.collectives) or 'none'} |",
                flush=True,
            )


if __name__ == "__main__":
    main()
