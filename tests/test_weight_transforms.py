"""Weights, masks and denominators under every transformation: what stays one call, and where.

A mapped operand is a loop, whichever it is; a mesh keeps elements where they lie, and sends one
number for the loss and one for its denominator. The relatives of the loss, which XLA compiles, are
asked the same.
"""

import importlib
import multiprocessing
import re
from collections.abc import Callable
from concurrent.futures import ProcessPoolExecutor
from functools import partial
from pathlib import Path
from typing import Any

import gpu_compiler
import jax
import jax.numpy as jnp
import numpy as np
import oracle
import pytest
from hlo import collectives, kernel_calls, passes_outside_loops
from jax import export, lax
from jax.sharding import AxisType, Mesh, NamedSharding, PartitionSpec
from oracle import FLOAT32
from platforms import QUICKLY

import jax_bce

pytestmark = pytest.mark.quickly

P = PartitionSpec
Operands = dict[str, Any]

ROWS, COLUMNS = SHAPE = 16, 64
BATCH = 3
PLACES = {
    "logits": SHAPE,
    "labels": SHAPE,
    "weight": (COLUMNS,),
    "sample_weight": (ROWS,),
    "pos_weight": (COLUMNS,),
    "where": (ROWS,),
    "ignore_label": (),
    "label_smoothing": (),
    "normalizer": (),
}
IGNORED = np.int8(-1)


def drawn(name: str, shape: tuple[int, ...], seed: int = 0) -> np.ndarray:
    """Weights are multiples of 1/4: sums of them are exact in any order."""
    rng = np.random.default_rng([seed, *name.encode()])
    match name:
        case "logits":
            return rng.normal(0, 4, shape).astype(FLOAT32)
        case "labels":
            return rng.integers(-1, 2, shape, np.int8)
        case "where":
            return rng.random(shape) < 0.7
        case "ignore_label":
            return rng.integers(-1, 2, shape, np.int8)
        case "label_smoothing":
            return rng.uniform(0, 0.5, shape).astype(FLOAT32)
        case "normalizer":
            return rng.uniform(1, 9, shape).astype(FLOAT32)
    return (rng.integers(0, 9, shape) / 4).astype(FLOAT32)


def inputs(*names: str, **shapes: tuple[int, ...]) -> Operands:
    """Logits, labels and the named operands, of the shapes of `PLACES` or the given ones."""
    places = {name: PLACES[name] for name in ("logits", "labels", *names)} | shapes
    return {name: drawn(name, shape) for name, shape in places.items()}


def loss_of(operands: Operands, **keywords: object) -> jax.Array:
    return jax_bce.loss(**operands, **keywords)


def value_and_grad(operands: Operands, loss: Callable = loss_of, **keywords: object) -> tuple:
    """With respect to the logits."""

    def of_logits(logits: jax.Array) -> jax.Array:
        return jnp.sum(loss(operands | {"logits": logits}, **keywords))

    return jax.value_and_grad(of_logits)(operands["logits"])


def assert_close(actual: Any, expected: Any) -> None:
    def close(a: jax.Array, b: jax.Array) -> None:
        a, b = np.asarray(a, np.float64), np.asarray(b, np.float64)
        largest = np.max(abs(b), initial=0)
        np.testing.assert_allclose(a, b, 0, atol=oracle.SURROUNDINGS * largest, strict=True)

    jax.tree.map(close, actual, expected)


EVERY = tuple(PLACES)[2:]
MAPPED = [
    *((name,) for name in PLACES if name != "normalizer"),
    ("normalizer",),
    ("logits", "labels"),
    ("logits", "where", "pos_weight"),
    tuple(PLACES),
]


def mapped_and_in_turn(implementation: str, mapped: tuple[str, ...]) -> tuple:
    """The compiled vmap, its results, and those of a loop."""
    names = [name for name in EVERY if name != "normalizer" or name in mapped]
    operands = inputs(*names)
    axes = {name: -1 if name == "weight" else 0 for name in mapped}
    for name, axis in axes.items():
        turns = [drawn(name, operands[name].shape, seed) for seed in range(BATCH)]
        operands[name] = np.stack(turns, axis)
    function = partial(value_and_grad, reduction="weighted_mean", implementation=implementation)
    mapping = jax.vmap(function, ({name: axes.get(name) for name in operands},))
    compiled = jax.jit(mapping).lower(operands).compile()
    one = jax.jit(function)
    turns = [
        one({n: np.take(v, i, axes[n]) if n in axes else v for n, v in operands.items()})
        for i in range(BATCH)
    ]
    return compiled, compiled(operands), tuple(map(np.stack, zip(*turns, strict=True)))


@pytest.mark.any_jax
@pytest.mark.parametrize("mapped", MAPPED, ids="+".join)
def test_vmap_is_a_loop(platform: str, mapped: tuple[str, ...]) -> None:
    """And one call of the kernel, or two with the denominator's, with the bits of each turn."""
    compiled, actual, expected = mapped_and_in_turn(platform, mapped)
    denominator = [] if "normalizer" in mapped else ["jax_bce_v3_total"]
    assert kernel_calls(compiled) == [*denominator, "jax_bce_v3_loss_and_grad"]
    oracle.assert_same_bits(tuple(actual), expected)


@pytest.mark.any_jax
def test_vmap_of_xla_is_a_loop() -> None:
    _, actual, expected = mapped_and_in_turn("xla", tuple(PLACES))
    assert_close(actual, expected)


def scanned(operands: Operands, **keywords: object) -> jax.Array:
    """Row by row."""
    shared = {n: v for n, v in operands.items() if v.shape[:1] != (ROWS,)}
    rows = {n: v for n, v in operands.items() if n not in shared}

    def step(total: jax.Array, row: Operands) -> tuple:
        return total + loss_of(shared | row, reduction="sum", **keywords), None

    return lax.scan(step, jnp.float32(0), rows)[0]


def chosen(operands: Operands, **keywords: object) -> jax.Array:
    branch = partial(loss_of, reduction="sum", **keywords)
    return lax.cond(operands["where"][0] | True, branch, lambda o: jnp.sum(o["logits"]), operands)


def checkpointed(operands: Operands, **keywords: object) -> jax.Array:
    return jax.checkpoint(partial(loss_of, reduction="sum", **keywords))(operands)


@pytest.mark.any_jax
@pytest.mark.parametrize("way", [scanned, chosen, checkpointed])
def test_control_flow(platform: str, way: Callable) -> None:
    operands = inputs(*EVERY[:-1])
    keywords = {"implementation": platform}
    expected = value_and_grad(operands, reduction="sum", **keywords)
    value, gradient = jax.jit(partial(value_and_grad, loss=way, **keywords))(operands)
    assert_close(value, expected[0])
    oracle.assert_same_bits(gradient, expected[1])


def mesh_of(kind: AxisType) -> Mesh:
    return jax.make_mesh((4, 2), ("data", "model"), (kind,) * 2, devices=jax.devices("cpu"))


def spec_of(shape: tuple[int, ...], spread: PartitionSpec) -> PartitionSpec:
    """As the logits are spread, along the dimensions that an operand has."""
    rows, columns = (*spread, None)[:2]
    return {SHAPE: P(rows, columns), (ROWS,): P(rows), (COLUMNS,): P(columns)}.get(shape, P())


def put(mesh: Mesh, operands: Operands, spread: PartitionSpec) -> Operands:
    return {
        name: jax.device_put(value, NamedSharding(mesh, spec_of(value.shape, spread)))
        for name, value in operands.items()
    }


WEIGHTS = ("weight", "sample_weight", "pos_weight")
SPREADS = [P("data"), P(None, "model"), P("data", "model")]
MASKS = {
    "row mask": {"where": (ROWS,)},
    "element mask": {"where": SHAPE, "ignore_label": ()},
}


@pytest.mark.parametrize(
    ("kind", "spread"),
    [*((AxisType.Auto, spread) for spread in SPREADS), (AxisType.Explicit, SPREADS[-1])],
    ids=str,
)
@pytest.mark.parametrize(
    ("reduction", "mask"),
    [("mean", "row mask"), ("mean", "element mask"), ("weighted_mean", "element mask")],
)
def test_mesh(cpu: str, kind: AxisType, spread: PartitionSpec, mask: str, reduction: str) -> None:
    """The bits of one device; one number is sent for each axis that is summed over.

    And one more where the factors of the denominator vary along it.
    """
    operands = inputs(*WEIGHTS, **MASKS[mask])
    function = jax.jit(partial(value_and_grad, reduction=reduction))
    expected = function(operands)
    mesh = mesh_of(kind)
    with jax.set_mesh(mesh):
        placed = put(mesh, operands, spread)
        compiled = function.lower(placed).compile()
        value, gradient = compiled(placed)
    oracle.assert_same_bits(gradient, expected[1])
    np.testing.assert_allclose(value, expected[0], np.finfo(FLOAT32).eps)
    assert gradient.sharding.is_equivalent_to(placed["logits"].sharding, 2)
    sent = collectives(compiled)
    axes = {name for name in spread if name}
    varying = {"row mask": {"data"}, "element mask": {"data", "model"}}[mask]
    numbers = [re.fullmatch(r"all-reduce ([a-z]\d\d)\[[1,]*\]", what) for what in sent]
    assert all(numbers), sent
    assert all(number[1] == "f64" for number in numbers)
    assert len(numbers) == len(axes) + len(axes & varying)


@pytest.mark.parametrize("checked", [True, False], ids=["check_vma", "unchecked"])
@pytest.mark.parametrize(
    ("spread", "residuals"),
    [(P("data"), "gradient"), (P("data", "model"), "gradient"), (P("data", "model"), "recompute")],
    ids=str,
)
def test_shard_map(cpu: str, spread: PartitionSpec, residuals: str, checked: bool) -> None:
    """Weights that shards share collect the gradients of all of them."""
    operands = inputs(*WEIGHTS, where=SHAPE, label_smoothing=())
    floats = {n: v for n, v in operands.items() if v.dtype == FLOAT32}
    others = {n: v for n, v in operands.items() if n not in floats} | {"ignore_label": IGNORED}
    axes = tuple(name for name in spread if name)

    def total(floats: Operands, others: Operands) -> jax.Array:
        return loss_of(floats | others, reduction="sum", residuals=residuals)

    specs = [
        {n: spec_of(np.shape(v), spread) for n, v in group.items()} for group in (floats, others)
    ]
    shards = jax.shard_map(
        lambda *groups: lax.psum(total(*groups), axes),
        mesh=mesh_of(AxisType.Auto),
        in_specs=tuple(specs),
        out_specs=P(),
        check_vma=checked,
    )
    actual = jax.jit(jax.value_and_grad(shards))(floats, others)
    expected = jax.jit(jax.value_and_grad(total))(floats, others)
    assert_close(actual, expected)


@pytest.mark.parametrize("checked", [True, False], ids=["check_vma", "unchecked"])
def test_shard_map_of_a_weight_alone(cpu: str, checked: bool) -> None:
    """The loss of logits that all shards share differs between them as its weight does."""
    operands = inputs()
    weights = np.random.default_rng(0).uniform(0, 2, (4, COLUMNS)).astype(FLOAT32)

    def of_shard(logits: jax.Array, weight: jax.Array) -> jax.Array:
        return loss_of({"logits": logits, "labels": operands["labels"], "weight": weight[0]})

    shards = jax.shard_map(
        lambda *arguments: lax.psum(of_shard(*arguments), "data"),
        mesh=mesh_of(AxisType.Auto),
        in_specs=(P(), P("data")),
        out_specs=P(),
        check_vma=checked,
    )

    def expected(logits: jax.Array, weights: jax.Array) -> jax.Array:
        return sum(of_shard(logits, weights[i : i + 1]) for i in range(4))

    actual = jax.jit(jax.value_and_grad(shards, (0, 1)))(operands["logits"], weights)
    assert_close(actual, jax.value_and_grad(expected, (0, 1))(operands["logits"], weights))


@pytest.mark.parametrize("implementation", [None, "cpu"])
@pytest.mark.parametrize("reduction", ["mean", "weighted_mean", "none"])
@pytest.mark.second
def test_export_of_any_batch(cpu: str, reduction: str, implementation: str | None) -> None:
    """One program, which counts the elements of the batch at hand."""
    function = partial(value_and_grad, reduction=reduction)
    (batch,) = export.symbolic_shape("batch")
    shapes = {
        name: jax.ShapeDtypeStruct(
            tuple(batch if d == ROWS else d for d in value.shape), value.dtype
        )
        for name, value in inputs(*EVERY[:-1]).items()
    }
    exported = export.export(
        jax.jit(partial(function, implementation=implementation)),
        platforms=("cpu", "tpu") if implementation is None else (cpu,),
        disabled_checks=[
            export.DisabledSafetyCheck.custom_call(f"jax_bce_v3_{kind}")
            for kind in ("total", "loss_and_grad")
        ],
    )(shapes)
    assert ("jax_bce_v3" in exported.mlir_module()) == (implementation == cpu)
    for rows in 1, 9:
        operands = {
            name: value[:rows] if ROWS in value.shape else value
            for name, value in inputs(*EVERY[:-1]).items()
        }

        @partial(jax.jit, compiler_options=QUICKLY)
        def both(operands: Operands) -> tuple:
            return exported.call(operands), function(operands, implementation="xla")

        assert_close(*both(operands))


WIDE = (512, 65536)
ON_GPUS = {
    "logits": (WIDE, P("gpu"), FLOAT32),
    "labels": (WIDE, P("gpu"), np.uint8),
    "pos_weight": (WIDE[1:], P(), FLOAT32),
    "where": (WIDE[:1], P("gpu"), bool),
}


def compiled_for_gpus(gpus: str) -> tuple[list[str], list[str], int, list[str]]:
    """All kernels, those that touch as many elements as a GPU has, temporaries, collectives."""
    mesh = gpu_compiler.mesh(gpus)
    operands = {
        name: jax.ShapeDtypeStruct(shape, dtype, sharding=NamedSharding(mesh, spec))
        for name, (shape, spec, dtype) in ON_GPUS.items()
    }
    function = jax.jit(partial(value_and_grad, implementation="cuda"))
    compiled = function.trace(operands).lower(lowering_platforms=("cuda",)).compile()
    large = passes_outside_loops(compiled, WIDE[0] * WIDE[1] // mesh.size)
    temporaries = compiled.memory_analysis().temp_size_in_bytes
    return kernel_calls(compiled), large, temporaries, collectives(compiled)


def test_on_gpus_that_are_not_there(require: Callable[[str], None]) -> None:
    """A mask of rows, counted in its own call, and a weight of classes stay as small as they are.

    But among several GPUs the weight is spread out first.
    """
    require("gpu-compiler")
    # By the name under which the other process finds this file.
    compiled = importlib.import_module(Path(__file__).stem).compiled_for_gpus
    spawn = multiprocessing.get_context("spawn")
    with ProcessPoolExecutor(1, spawn, initializer=gpu_compiler.prepare) as process:
        calls, large, temporaries, sent = process.submit(compiled, "1x1x1").result()
        assert calls == ["jax_bce_v3_total", "jax_bce_v3_loss_and_grad"]
        assert large == calls[1:]
        assert temporaries < 2**20
        assert sent == []
        calls, _, _, sent = process.submit(compiled, "1x1x8").result()
        assert len(calls) == 2
        assert len(sent) == 2
        assert all(re.fullmatch(r"all-reduce [a-z]\d\d\[\]", what) for what in sent)


RELATIVES = {
    "focal": partial(jax_bce.focal_loss, alpha=0.25),
    "focal, traced": lambda *o, **k: jax_bce.focal_loss(*o, gamma=jnp.float32(1.5), **k),
    "asymmetric": jax_bce.asymmetric_loss,
    "probabilities": lambda x, y, **k: jax_bce.loss_from_probs(jax.nn.sigmoid(x), y, **k),
}


def relative_of(name: str) -> Callable:
    def loss(operands: Operands, **keywords: object) -> jax.Array:
        return RELATIVES[name](
            operands["logits"],
            operands["labels"],
            **{n: v for n, v in operands.items() if n not in ("logits", "labels")},
            **keywords,
        )

    return loss


def inputs_of_relatives(seed: int = 0) -> Operands:
    """Labels are 0 and 1 where they are not ignored."""
    names = ("logits", "labels", "weight", "sample_weight", "where")
    return {name: drawn(name, PLACES[name], seed) for name in names} | {"ignore_label": IGNORED}


@pytest.mark.any_jax
@pytest.mark.parametrize("name", RELATIVES)
@pytest.mark.second
def test_relatives(name: str) -> None:
    """vmap is a loop, of the value, the gradient and the Hessian times a vector: all finite."""
    function = partial(value_and_grad, loss=relative_of(name), reduction="weighted_mean")

    def derivatives(operands: Operands) -> tuple:
        def of_logits(logits: jax.Array) -> tuple:
            return function(operands | {"logits": logits})

        logits = operands["logits"]
        return jax.jvp(of_logits, (logits,), (jnp.cos(logits),))

    turns = [inputs_of_relatives(seed) for seed in range(BATCH)]
    stacked = jax.tree.map(lambda *values: np.stack(values), *turns)
    one = jax.jit(derivatives, compiler_options=QUICKLY)
    expected = jax.tree.map(lambda *values: np.stack(values), *map(one, turns))
    assert all(np.isfinite(values).all() for values in jax.tree.leaves(expected))
    mapped = jax.jit(jax.vmap(derivatives), compiler_options=QUICKLY)
    assert_close(mapped(stacked), expected)


@pytest.mark.parametrize(
    ("name", "kind"),
    [
        ("focal", AxisType.Auto),
        ("focal", AxisType.Explicit),
        ("asymmetric", AxisType.Auto),
        ("probabilities", AxisType.Explicit),
    ],
    ids=str,
)
def test_relatives_on_a_mesh(cpu: str, name: str, kind: AxisType) -> None:
    """XLA spreads a formula by itself: nothing is gathered."""
    operands = inputs_of_relatives()
    function = partial(value_and_grad, loss=relative_of(name))
    function = jax.jit(function, compiler_options=QUICKLY)
    expected = function(operands)
    mesh = mesh_of(kind)
    with jax.set_mesh(mesh):
        placed = put(mesh, operands, P("data", "model"))
        compiled = function.lower(placed).compile()
        assert_close(compiled(placed), expected)
    assert {what.split()[0] for what in collectives(compiled)} == {"all-reduce"}
