"""linear_loss and siglip_loss on several devices: the results of one, and what the devices send.

Eight devices of a CPU, as a mesh of four by two, by jit on automatic and explicit axes and in a
shard_map; and GPUs that only XLA's compiler sees. Neither features nor weight nor a block of logits
is gathered. Of SigLIP's texts, a device holds those of another at most.
"""

import multiprocessing
import re
from collections.abc import Callable, Iterator
from concurrent.futures import ProcessPoolExecutor
from functools import cache, partial
from pathlib import Path
from typing import Any

import gpu_compiler
import jax
import jax.export
import jax.numpy as jnp
import numpy as np
import oracle
import pytest
from hlo import collectives, kernel_calls
from jax.sharding import AxisType, Mesh, NamedSharding, PartitionSpec
from platforms import QUICKLY

import jax_bce

pytestmark = pytest.mark.quickly

P = PartitionSpec
WIDTH = 16
SIZES = {"labels": (64, 512), "rows": (512, 64)}  # by the dimension that is walked
BLOCK = 16384  # bytes: several blocks, and sums over them that fit
# The axes of the mesh over which rows and labels are sharded.
SHARDED = {
    "rows": ("data", None),
    "labels": (None, "model"),
    "rows and labels": ("data", "model"),
    "rows over all": (("data", "model"), None),
    "labels over all": (None, ("data", "model")),
}
MOVING = ("features", "weight", "bias", "scale")

every_way = pytest.mark.parametrize("sharded", SHARDED)
both_walks = pytest.mark.parametrize("sizes", SIZES)


@pytest.fixture(params=[AxisType.Auto, AxisType.Explicit], ids=lambda kind: kind.name)
def mesh(request: pytest.FixtureRequest, cpu: str) -> Iterator[Mesh]:
    mesh = mesh_of(request.param)
    with jax.set_mesh(mesh):
        yield mesh


@pytest.fixture(params=[True, False], ids=["check_vma", "unchecked"])
def checked(request: pytest.FixtureRequest) -> bool:
    return request.param


def mesh_of(kind: AxisType) -> Mesh:
    return jax.make_mesh((4, 2), ("data", "model"), (kind,) * 2, devices=jax.devices("cpu"))


@cache
def inputs(sizes: str, indices: bool) -> dict[str, np.ndarray]:
    rows, labels = SIZES[sizes]
    random = np.random.default_rng(2)
    arrays = {
        "features": random.normal(size=(rows, WIDTH)).astype(np.float32),
        "weight": random.normal(size=(WIDTH, labels)).astype(np.float32),
        "bias": random.normal(size=labels).astype(np.float32),
        "scale": np.float32(0.7),
        "sample_weight": random.random(rows).astype(np.float32),
        "pos_weight": random.uniform(0, 9, labels).astype(np.float32),
    }
    if indices:
        positives = random.integers(-labels // 2, labels, (rows, 4))
        return arrays | {"positives": np.maximum(positives, -1).astype(np.int32)}
    return arrays | {"labels": (random.random((rows, labels)) < 0.3).astype(np.uint8)}


def specs_of(rows: Any, labels: Any, arrays: dict[str, np.ndarray]) -> dict[str, PartitionSpec]:
    of = {
        "features": P(rows),
        "weight": P(None, labels),
        "bias": P(labels),
        "scale": P(),
        "sample_weight": P(rows),
        "pos_weight": P(labels),
        "labels": P(rows, labels),
        "positives": P(rows),
    }
    return {name: of[name] for name in arrays}


def loss(arrays: dict[str, jax.Array], **keywords: Any) -> jax.Array:
    arrays = dict(arrays)
    features, weight = arrays.pop("features"), arrays.pop("weight")
    return jax_bce.linear_loss(features, weight, **arrays, block_bytes=BLOCK, **keywords)


def with_gradients(function: Callable, keywords: dict[str, Any]) -> Callable:
    def objective(moving: dict[str, jax.Array], others: dict[str, jax.Array]) -> Any:
        losses = function(moving | others, **keywords)
        return jnp.sum(jnp.sin(losses)), losses

    return lambda arrays: jax.value_and_grad(objective, has_aux=True)(
        {name: arrays[name] for name in MOVING},
        {name: a for name, a in arrays.items() if name not in MOVING},
    )


REDUCTIONS = {"mean": {}, "weighted mean": {"reduction": "weighted_mean"}, "rows": {"axis": 1}}


@cache
def on_one_device(sizes: str, indices: bool, reduction: str, without: str = "") -> Any:
    function = with_gradients(loss, REDUCTIONS[reduction])
    arrays = {name: a for name, a in inputs(sizes, indices).items() if name != without}
    with jax.set_mesh(jax.sharding.Mesh(np.array(jax.devices("cpu")[:1]), "one")):
        return jax.tree.map(np.asarray, jax.jit(function)(arrays))


def assert_close(actual: Any, expected: Any) -> None:
    """Up to float32 sums in another order, relative to the largest."""

    def close(a: Any, b: Any) -> None:
        a, b = np.asarray(a), np.asarray(b)
        assert a.shape == b.shape
        np.testing.assert_allclose(a, b, 0, oracle.SURROUNDINGS * np.max(abs(b)))

    jax.tree.map(close, actual, expected)


def assert_sends_only_gradients(program: jax.stages.Compiled, explicit: bool) -> None:
    """Sums of gradients and losses, none of which has the size of a block."""
    for what in collectives(program):
        assert what.startswith("all-reduce "), what
        for dimensions in re.findall(r"\[([\d,]+)\]", what):
            assert WIDTH in map(int, dimensions.split(",")) or dimensions.count(",") < 2
    if explicit:  # the features' gradient and the weight's, at most once each
        sent = re.findall(rf"\[(\d+,{WIDTH}|{WIDTH},\d+)\]", " ".join(collectives(program)))
        assert len(sent) == len(set(sent)) <= 2


@both_walks
@every_way
@pytest.mark.parametrize(
    ("reduction", "indices"),
    [("mean", True), ("weighted mean", False), ("rows", True)],
)
def test_by_jit(mesh: Mesh, reduction: str, sharded: str, sizes: str, indices: bool) -> None:
    arrays = inputs(sizes, indices)
    specs = specs_of(*SHARDED[sharded], arrays)
    spread = {n: jax.device_put(a, NamedSharding(mesh, specs[n])) for n, a in arrays.items()}
    function = with_gradients(loss, REDUCTIONS[reduction])
    program = jax.jit(function).lower(spread).compile(QUICKLY)
    found = program(spread)
    assert_close(found, on_one_device(sizes, indices, reduction))
    for name in ("features", "weight"):
        assert found[1][name].sharding.is_equivalent_to(spread[name].sharding, 2)
    assert_sends_only_gradients(program, AxisType.Explicit in mesh.axis_types)
    if reduction == "mean":
        calls = [name for name in kernel_calls(program) if name != "jax_bce_v3_total"]
        assert calls == ["jax_bce_v3_loss_and_grad"]


@both_walks
@every_way
def test_one_all_reduce_for_each_gradient(cpu: str, sharded: str, sizes: str) -> None:
    """On explicit axes: the features' over labels, the weight's and the bias's over rows."""
    mesh = mesh_of(AxisType.Explicit)
    arrays = inputs(sizes, True)
    rows, labels = SHARDED[sharded]
    specs = specs_of(rows, labels, arrays)
    with jax.set_mesh(mesh):
        spread = {n: jax.device_put(a, NamedSharding(mesh, specs[n])) for n, a in arrays.items()}
        program = jax.jit(with_gradients(loss, {})).lower(spread).compile()
    sent = re.findall(r"f32\[(\d+,\d+)\]", " ".join(collectives(program)))
    of_rows, of_labels = SIZES[sizes]
    wanted = []
    if rows:
        own = of_labels // (2 if labels else 1)
        wanted += [f"1,{own}", f"{WIDTH},{own}"]
    if labels:
        wanted += [f"{of_rows // (4 if rows else 1)},{WIDTH}"]
    assert sorted(sent) == sorted(wanted)


def test_an_explicit_mesh_that_is_not_set(cpu: str) -> None:
    """The arguments alone say which mesh it is."""
    mesh = mesh_of(AxisType.Explicit)
    arrays = inputs("labels", True)
    specs = specs_of("data", "model", arrays)
    spread = {n: jax.device_put(a, NamedSharding(mesh, specs[n])) for n, a in arrays.items()}
    assert_close(jax.jit(with_gradients(loss, {}))(spread), on_one_device("labels", True, "mean"))
    found = jax.jit(gradients_of(siglip))(*spread_pairs(mesh, ALONG["both"]))
    assert_close(found, of_pairs("gradients"))


@both_walks
def test_sums_that_do_not_fit_are_reduced_in_each_block(cpu: str, sizes: str) -> None:
    """Right as well, and still without a gather."""
    mesh = mesh_of(AxisType.Auto)
    arrays = inputs(sizes, False)
    specs = specs_of("data", "model", arrays)
    spread = {n: jax.device_put(a, NamedSharding(mesh, specs[n])) for n, a in arrays.items()}

    def small(arrays: dict[str, jax.Array]) -> jax.Array:
        arrays = dict(arrays)
        features, weight = arrays.pop("features"), arrays.pop("weight")
        return jax_bce.linear_loss(features, weight, **arrays, block_bytes=2000)

    program = jax.jit(with_gradients(small, {})).lower(spread).compile()
    assert_close(program(spread), on_one_device(sizes, False, "mean"))
    assert_sends_only_gradients(program, explicit=False)


@both_walks
@pytest.mark.parametrize("sharded", ["rows", "labels", "rows and labels"])
@pytest.mark.parametrize("reduction", ["mean", "rows"])
def test_in_a_shard_map(checked: bool, cpu: str, reduction: str, sharded: str, sizes: str) -> None:
    """The labels' index is that of the shard; a mean is that of the shards' means."""
    mesh = mesh_of(AxisType.Auto)
    arrays = {n: a for n, a in inputs(sizes, True).items() if n != "sample_weight"}
    rows, labels = SHARDED[sharded]
    specs = specs_of(rows, labels, arrays)

    def of_shard(arrays: dict[str, jax.Array]) -> jax.Array:
        if labels:
            first = jax.lax.axis_index(labels) * arrays["weight"].shape[1]
            arrays = arrays | {"positives": arrays["positives"] - first}
        losses = loss(arrays, **REDUCTIONS[reduction])
        over = [axes for axes in (rows, labels) if axes and (axes == labels or not losses.ndim)]
        return jax.lax.pmean(losses, tuple(over)) if over else losses

    function = jax.shard_map(
        of_shard,
        mesh=mesh,
        in_specs=(specs,),
        out_specs=P(rows) if reduction == "rows" else P(),
        check_vma=checked,
    )
    program = jax.jit(with_gradients(function, {})).lower(arrays).compile(QUICKLY)
    assert_close(program(arrays), on_one_device(sizes, True, reduction, "sample_weight"))
    assert_sends_only_gradients(program, explicit=False)


@both_walks
def test_second_derivatives(mesh: Mesh, sizes: str) -> None:
    arrays = inputs(sizes, False)
    specs = specs_of("data", "model", arrays)
    spread = {n: jax.device_put(a, NamedSharding(mesh, specs[n])) for n, a in arrays.items()}

    def product(arrays: dict[str, jax.Array]) -> Any:
        w = arrays["weight"]
        return jax.jvp(jax.grad(lambda w: loss(arrays | {"weight": w})), (w,), (w,))[1]

    found = jax.jit(product)(spread)
    with jax.set_mesh(jax.sharding.Mesh(np.array(jax.devices("cpu")[:1]), "one")):
        wanted = np.asarray(jax.jit(product)(arrays))
    assert_close(found, wanted)


@pytest.mark.parametrize(
    ("name", "spec", "words"),
    [
        ("features", P(None, "data"), "features is sharded over its width"),
        ("weight", P("model"), "weight is sharded over its width"),
        ("positives", P("model"), "in the same dimension"),
        (
            "weight",
            P(None, "data"),
            r"rows of features .* over \('data',\) and the labels of weight",
        ),
        ("weight", P(None, ("data", "model")), "rows of features .* and the labels of weight"),
    ],
)
def test_refused(cpu: str, name: str, spec: PartitionSpec, words: str) -> None:
    mesh = mesh_of(AxisType.Explicit)
    arrays = inputs("labels", True)
    specs = specs_of("data", None, arrays) | {name: spec}
    with jax.set_mesh(mesh), pytest.raises(ValueError, match=words) as caught:
        loss({n: jax.device_put(a, NamedSharding(mesh, specs[n])) for n, a in arrays.items()})
    assert "jax.sharding.reshard" in str(caught.value)


@pytest.mark.any_jax
def test_refused_in_a_gradient(cpu: str) -> None:
    """Of the weight alone, before anything is reshaped."""
    mesh = mesh_of(AxisType.Explicit)
    features = jax.device_put(jnp.ones((8, 4)), NamedSharding(mesh, P("data")))
    weight = jax.device_put(jnp.ones((4, 16)), NamedSharding(mesh, P(None, "data")))
    gradient = jax.jit(jax.grad(lambda w: jax_bce.linear_loss(features, w, 0)))
    with jax.set_mesh(mesh):
        with pytest.raises(ValueError, match=r"reshard\(weight, PartitionSpec\(\)\)"):
            gradient(weight)
        gathered = jax.sharding.reshard(weight, PartitionSpec())
        assert np.isfinite(gradient(gathered)).all()


def test_the_example_of_the_documentation(cpu: str) -> None:
    """That of docs/transforms.md: in shards as by jit, and as on one device."""
    page = (Path(__file__).parent.parent / "docs" / "transforms.md").read_text()
    examples = re.findall(r"```python\n(.*?)```", page, re.DOTALL)
    (example,) = (text for text in examples if "linear_loss" in text)
    found: dict = {}
    with jax.set_mesh(mesh_of(AxisType.Explicit)):  # and back
        exec(compile(example, "transforms.md", "exec"), found)
    arrays = [jnp.asarray(np.asarray(found[name])) for name in ("features", "weight")]
    positives = np.asarray(found["positives"])
    wanted = jax.value_and_grad(
        lambda x, w: jax_bce.linear_loss(x, w, positives=positives), argnums=(0, 1)
    )(*arrays)
    assert_close((found["loss"], found["gradients"]), wanted)
    assert_close(found["same"], wanted[0])
    assert_close(found["same_pairs"], found["pairs"][0])
    images = np.asarray(found["images"])
    assert_close(found["same_pairs"], jax_bce.siglip_loss(images, images, 10.0, -10.0))


# --- GPUs ----------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def of_gpus(require: Callable[[str], None]) -> Iterator[Callable]:
    require("gpu-compiler")
    spawn = multiprocessing.get_context("spawn")
    with ProcessPoolExecutor(1, spawn, initializer=gpu_compiler.prepare) as process:
        yield cache(
            lambda *arguments: process.submit(gpu_compiler.linear_loss, *arguments).result()
        )


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize(
    ("gpus", "columns", "rows", "labels"),
    [
        ("1x1x1", 1, None, None),
        ("1x1x8", 1, "gpu", None),
        ("1x1x8", 8, None, "column"),
        ("1x1x8", 2, "gpu", "column"),
        ("2x1x8", 4, "gpu", "column"),
    ],
)
def test_on_gpus(
    of_gpus: Callable, gpus: str, columns: int, rows: Any, labels: Any, dtype: str
) -> None:
    """One kernel in the loop; sums of gradients are sent, and nothing is gathered.

    The sums of the features' gradient are as large as features of all devices together.
    """
    kernels, sent, temporary_bytes = of_gpus(gpus, columns, rows, labels, dtype)
    assert kernels.count("jax_bce_v3_loss_and_grad") == 1
    assert all(what.startswith("all-reduce ") for what in sent)
    n, _, d = gpu_compiler.LAYER
    assert temporary_bytes <= 1.1 * 2**26 + 2 * n * d * 4
    if not rows and not labels:
        assert sent == []
        assert temporary_bytes <= 1.1 * 2**26


# --- SigLIP --------------------------------------------------------------------------------------

COUNT = 64
OPERANDS = ("images", "texts", "scale", "bias")


@cache
def pairs() -> tuple[np.ndarray, ...]:
    random = np.random.default_rng(3)
    images, texts = random.normal(size=(2, COUNT, WIDTH)).astype(np.float32)
    return images, texts, np.float32(1.3), np.float32(-2)


def siglip(*operands: jax.Array, **keywords: Any) -> jax.Array:
    return jax_bce.siglip_loss(*operands, block_bytes=4096, **keywords)


def dense(images: jax.Array, texts: jax.Array, scale: jax.Array, bias: jax.Array) -> jax.Array:
    logits = images @ texts.T * scale + bias
    return jax_bce.loss(logits, jnp.eye(len(images)), reduction="sum") / len(images)


def gradients_of(function: Callable) -> Callable:
    return jax.value_and_grad(function, argnums=(0, 1, 2, 3))


def product_of(function: Callable) -> Callable:
    return lambda *a: jax.jvp(jax.grad(function, argnums=(0, 1, 2, 3)), a, a)[1]


MODES = {
    "gradients": gradients_of,
    "tangent": lambda f: lambda *a: jax.jvp(f, a, a),
    "Hessian": product_of,
}


@cache
def of_pairs(mode: str) -> Any:
    with jax.set_mesh(jax.sharding.Mesh(np.array(jax.devices("cpu")[:1]), "one")):
        return jax.tree.map(np.asarray, jax.jit(MODES[mode](dense))(*pairs()))


@pytest.mark.parametrize("mode", MODES)
def test_siglip_on_one_device(mode: str) -> None:
    found = jax.jit(MODES[mode](siglip))(*pairs())
    assert_close(found, of_pairs(mode))


def test_siglip_without_jit() -> None:
    assert_close(siglip(*pairs()), of_pairs("gradients")[0])


def test_the_number_of_the_papers_pseudocode() -> None:
    """-sum(log_sigmoid(labels * logits)) / n."""
    images, texts, scale, bias = (np.asarray(a, np.float64) for a in pairs())
    logits = images @ texts.T * scale + bias
    signs = 2 * np.eye(COUNT) - 1
    wanted = np.sum(np.logaddexp(0, -signs * logits)) / COUNT
    np.testing.assert_allclose(siglip(*pairs()), wanted, oracle.SURROUNDINGS)


ALONG = {"data": P("data"), "both": P(("data", "model"))}


def spread_pairs(mesh: Mesh, spec: PartitionSpec) -> tuple[jax.Array, ...]:
    specs = (spec, spec, P(), P())
    return tuple(
        jax.device_put(a, NamedSharding(mesh, s)) for a, s in zip(pairs(), specs, strict=True)
    )


def received(program: jax.stages.Compiled) -> int:
    """The size of the largest array that a device gets from others, in numbers."""
    found = re.findall(r"\w+\[([\d,]+)\]", " ".join(collectives(program)))
    return max(int(np.prod([int(d) for d in dimensions.split(",")])) for dimensions in found)


@pytest.mark.parametrize("along", ALONG)
@pytest.mark.parametrize("mode", MODES)
def test_siglip_by_jit(mesh: Mesh, mode: str, along: str) -> None:
    operands = spread_pairs(mesh, ALONG[along])
    program = jax.jit(MODES[mode](siglip)).lower(*operands).compile()
    assert_close(program(*operands), of_pairs(mode))
    if mode == "gradients":
        sent = str(collectives(program))
        explicit = AxisType.Explicit in mesh.axis_types
        assert ("collective-permute" in sent) == explicit
        # Of the texts, those of a device, or a block.
        own = COUNT * WIDTH // (4 if along == "data" else 8)
        assert received(program) <= (own if explicit else COUNT * WIDTH // 4)


@pytest.mark.parametrize("along", ALONG)
@pytest.mark.parametrize("mode", MODES)
def test_siglip_in_a_shard_map(checked: bool, cpu: str, mode: str, along: str) -> None:
    """In a ring: no device receives more than the texts of another, and their gradient."""
    spec = ALONG[along]
    function = jax.shard_map(
        partial(siglip, axis_name=spec[0]),
        mesh=mesh_of(AxisType.Auto),
        in_specs=(spec, spec, P(), P()),
        out_specs=P(),
        check_vma=checked,
    )
    program = jax.jit(MODES[mode](function)).lower(*pairs()).compile()
    assert_close(program(*pairs()), of_pairs(mode))
    if mode == "gradients" and along == "both":
        sent = collectives(program)
        own = f"f32[{COUNT // 8},{WIDTH}]"
        assert sent.count(f"collective-permute {own}") == 2
        assert all(what.startswith(("collective-permute", "all-reduce")) for what in sent)
        assert received(program) == COUNT // 8 * WIDTH


def test_siglip_differentiated_inside(cpu: str) -> None:
    spec = ALONG["both"]
    step = jax.shard_map(
        gradients_of(partial(siglip, axis_name=spec[0])),
        mesh=mesh_of(AxisType.Auto),
        in_specs=(spec, spec, P(), P()),
        out_specs=(P(), (spec, spec, P(), P())),
    )
    assert_close(jax.jit(step)(*pairs()), of_pairs("gradients"))


def test_siglip_types(dtype: np.dtype) -> None:
    """Gradients have their argument's type, and float32 sums."""
    operands = tuple(oracle.round_to(a, dtype) for a in pairs())
    found = jax.jit(gradients_of(siglip))(*operands)
    exact = jax.jit(gradients_of(dense))(*(np.asarray(a, np.float32) for a in operands))
    tolerance = max(oracle.LINEAR[dtype.name], oracle.SURROUNDINGS)
    for a, b, operand in zip(found[1], exact[1], operands, strict=True):
        assert a.dtype == operand.dtype
        a, b = np.asarray(a, np.float64), np.asarray(b, np.float64)
        np.testing.assert_allclose(a, b, 0, tolerance * np.max(abs(b)))
    np.testing.assert_allclose(found[0], exact[0], oracle.SURROUNDINGS)


def test_siglip_memory(cpu: str) -> None:
    shapes = [jax.ShapeDtypeStruct(s, "float32") for s in ((4096, 64), (4096, 64), (), ())]
    function = gradients_of(partial(jax_bce.siglip_loss, block_bytes=2**22))
    program = jax.jit(function).lower(*shapes).compile()
    assert program.memory_analysis().temp_size_in_bytes <= 1.1 * 2**22 + 2 * 4096 * 64 * 4


X = np.ones((4, 3), np.float32)


@pytest.mark.parametrize(
    ("arguments", "error", "words"),
    [
        ((X, X[:3], 1, 0), ValueError, ("(4, 3)", "(3, 3)", "(n, width)")),
        ((X[0], X[0], 1, 0), ValueError, ("(3,)", "(n, width)")),
        ((X, X, X[0], 0), ValueError, ("scale must be one number", "(3,)")),
        ((X, X, 1, X[0]), ValueError, ("bias must be one number", "(3,)")),
        ((X, X.astype(int), 1, 0), TypeError, ("texts", "float32")),
        ((X[None], X[None], 1, 0), ValueError, ("(1, 4, 3)", ".reshape(-1, width)")),
        ((X, X, 1, 0, {"axis_name": [["data"]]}), TypeError, ("axis_name", "[['data']]")),
        ((X, X, 1, 0, {"axis_name": "data"}), NameError, ("axis_name='data'", "jax.shard_map")),
    ],
    ids=lambda value: None,
)
def test_siglip_errors(arguments: tuple, error: type, words: tuple[str, ...]) -> None:
    operands, keywords = arguments[:4], dict(*arguments[4:])
    with pytest.raises(error, match=re.escape(words[0])) as caught:
        jax_bce.siglip_loss(*operands, **keywords)
    for word in words:
        assert word in str(caught.value)


def test_siglip_of_unknown_sizes() -> None:
    symbolic = jax.ShapeDtypeStruct(jax.export.symbolic_shape("n, 3"), "float32")
    loss = jax.jit(lambda images: jax_bce.siglip_loss(images, images, 1, 0))
    with pytest.raises(ValueError, match=r"siglip_loss needs known sizes, got \(n, 3\)"):
        jax.export.export(loss)(symbolic)


@pytest.mark.any_jax
def test_siglip_of_no_pairs(cpu: str) -> None:
    """JAX 0.8 itself cannot shard an array without elements in a shard_map outside of jit."""
    none = np.zeros((0, 3), np.float32)
    spec = ALONG["both"]
    in_a_ring = jax.shard_map(
        partial(siglip, axis_name=spec[0]),
        mesh=mesh_of(AxisType.Auto),
        in_specs=(spec, spec, P(), P()),
        out_specs=P(),
    )
    for function in (siglip, in_a_ring):
        loss, gradients = gradients_of(function)(none, none, 1.0, 0.0)
        assert loss == 0
        assert [np.shape(gradient) for gradient in gradients] == [(0, 3), (0, 3), (), ()]
        assert not any(np.any(gradient) for gradient in gradients)


def test_siglip_names_an_implementation() -> None:
    with pytest.raises(ValueError, match="'gpu'"):
        jax_bce.siglip_loss(X, X, 1, 0, implementation="gpu")
    found = jax_bce.siglip_loss(X, X, 1, 0, implementation="xla")
    np.testing.assert_allclose(found, jax_bce.siglip_loss(X, X, 1, 0), oracle.SURROUNDINGS)


def test_siglip_width_is_not_sharded(cpu: str) -> None:
    mesh = mesh_of(AxisType.Explicit)
    images, texts, scale, bias = pairs()
    images = jax.device_put(images, NamedSharding(mesh, P(None, "data")))
    with jax.set_mesh(mesh), pytest.raises(ValueError, match="images is sharded over its width"):
        siglip(images, texts, scale, bias)
