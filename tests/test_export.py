"""A program for another platform, another batch or another process: lowered, exported, kept.

What leaves the process holds no call of a kernel that may not be there, unless it was asked for by
name.
"""

import json
import re
import subprocess
import sys
from collections.abc import Callable
from functools import partial
from pathlib import Path

import jax
import numpy as np
import oracle
import platforms
import pytest
from jax import export
from jax.sharding import Mesh, NamedSharding, PartitionSpec
from oracle import FLOAT32

import jax_bce

TARGET = "jax_bce_v3_loss_and_grad"
SHAPE = (8, 19)
# jax-metal registers the platform in capitals.
OTHERS = ("tpu", "rocm", "METAL")


def per_row(x: jax.Array, y: jax.Array, **keywords: object) -> tuple[jax.Array, jax.Array]:
    return jax.vmap(jax.value_and_grad(partial(jax_bce.loss, **keywords)))(x, y)


def hessian_vector_product(x: jax.Array, y: jax.Array, **keywords: object) -> tuple:
    """Beside the gradient."""
    return jax.jvp(jax.grad(partial(jax_bce.loss, labels=y, **keywords)), (x,), (x,))


FUNCTIONS = {
    "loss": jax_bce.loss,
    "loss_and_grad": jax_bce.loss_and_grad,
    "value_and_grad": jax.value_and_grad(jax_bce.loss),
    "recompute": jax.value_and_grad(partial(jax_bce.loss, residuals="recompute")),
    "vmap": per_row,
    "hessian-vector product": hessian_vector_product,
}
REDUCTIONS = [{"reduction": "none"}, {"reduction": "sum"}, {"axis": 0}, {"axis": 1}]
SYMBOLIC = FUNCTIONS | {
    str(keywords): partial(jax_bce.loss_and_grad, **keywords) for keywords in REDUCTIONS
}


def inputs(rows: int = SHAPE[0], columns: int = SHAPE[1]) -> tuple[np.ndarray, np.ndarray]:
    shape = (rows, columns)
    return (
        oracle.random_logits(FLOAT32, shape, seed=1),
        oracle.random_labels(np.uint8, shape, seed=2),
    )


def symbolic(sizes: str = f"batch, {SHAPE[1]}") -> tuple[jax.ShapeDtypeStruct, ...]:
    shape = export.symbolic_shape(sizes)
    return jax.ShapeDtypeStruct(shape, FLOAT32), jax.ShapeDtypeStruct(shape, np.uint8)


def custom_calls(module: str) -> set[str]:
    """The targets, but that of JAX's own check of a symbolic size."""
    return set(re.findall(r"custom_call @(\w+)", module)) - {"shape_assertion"}


@pytest.mark.parametrize("name", FUNCTIONS)
def test_other_platforms_hold_no_call(name: str) -> None:
    traced = jax.jit(FUNCTIONS[name]).trace(*inputs())
    for platform in OTHERS:
        assert not custom_calls(traced.lower(lowering_platforms=(platform,)).as_text())


@pytest.mark.parametrize("name", FUNCTIONS)
def test_the_cpu_holds_one(cpu: str, name: str) -> None:
    """Or the test above could not fail."""
    traced = jax.jit(FUNCTIONS[name]).trace(*inputs())
    calls = custom_calls(traced.lower(lowering_platforms=(cpu,)).as_text())
    assert calls
    assert all(call.startswith("jax_bce_v3_") for call in calls)


@pytest.mark.parametrize("name", FUNCTIONS)
def test_compiled_ahead_of_time(platform: str, name: str) -> None:
    function = jax.jit(partial(FUNCTIONS[name], implementation=platform))
    operands = inputs()
    shapes = [jax.ShapeDtypeStruct(array.shape, array.dtype) for array in operands]
    results = function.lower(*shapes).compile()(*operands)
    oracle.assert_same_bits(results, function(*operands))


@pytest.mark.parametrize("wanted", [("cpu",), ("tpu",), ("cpu", "cuda", "rocm", "tpu", "METAL")])
@pytest.mark.parametrize("implementation", [None, "xla"])
def test_export(check, implementation: str | None, wanted: tuple[str, ...]) -> None:
    logits, labels = inputs()
    function = jax.jit(partial(FUNCTIONS["value_and_grad"], implementation=implementation))
    exported = export.export(function, platforms=wanted)(logits, labels)
    assert exported.platforms == wanted
    assert not custom_calls(exported.mlir_module())
    if "cpu" in wanted:
        with platforms.on("cpu"):
            loss, gradient = exported.call(logits, labels)
        check.reduced("xla", loss, oracle.exact(logits, labels).loss.mean())
        check.elements("xla", logits, labels, gradient=gradient, factor=1 / logits.size)


@pytest.mark.parametrize("residuals", ["gradient", "recompute"])
def test_exported_derivative(check, residuals: str) -> None:
    """An exported loss is differentiated with the derivative that is exported with it."""
    logits, labels = inputs()
    function = jax.jit(partial(jax_bce.loss, residuals=residuals))
    with platforms.on("cpu"):
        pullback = export.export(function, platforms=("cpu", "tpu"))(logits, labels).vjp()
        assert not custom_calls(pullback.mlir_module())
        gradient, _ = pullback.call(logits, labels, np.float32(1))
    check.elements("xla", logits, labels, gradient=gradient, factor=1 / logits.size, flushes=True)


@pytest.mark.parametrize("name", SYMBOLIC)
@pytest.mark.second
def test_symbolic_batch(name: str) -> None:
    """One program for every batch, whose 1/N is that of the batch at hand."""
    for wanted in (("cpu", "tpu"), ("cpu",)):
        exported = export.export(jax.jit(SYMBOLIC[name]), platforms=wanted)(*symbolic())
        assert not custom_calls(exported.mlir_module())
    tolerance = oracle.TOLERANCE["xla"].sum
    close = partial(np.testing.assert_allclose, rtol=tolerance, atol=tolerance, strict=True)
    for rows in (1, 1000):
        logits, labels = inputs(rows)
        of_sizes = partial(SYMBOLIC[name], implementation="xla")

        @partial(jax.jit, compiler_options=platforms.QUICKLY)
        def both(*operands: jax.Array, of_sizes: Callable = of_sizes) -> tuple:
            return exported.call(*operands), of_sizes(*operands)

        with platforms.on("cpu"):
            jax.tree.map(close, *both(logits, labels))


def test_exported_kernel(platform: str) -> None:
    """By name, for whoever knows that it is there as well where the program will run."""
    logits, labels = inputs()
    function = jax.jit(partial(FUNCTIONS["value_and_grad"], implementation=platform))
    known = [export.DisabledSafetyCheck.custom_call(TARGET)]
    exported = export.export(function, platforms=(platform,), disabled_checks=known)(logits, labels)
    assert custom_calls(exported.mlir_module()) == {TARGET}
    oracle.assert_same_bits(exported.call(logits, labels), function(logits, labels))


def test_a_kernel_is_not_exported_unknowingly(cpu: str) -> None:
    function = jax.jit(partial(FUNCTIONS["value_and_grad"], implementation=cpu))
    with pytest.raises(ValueError, match=TARGET):
        export.export(function, platforms=(cpu,))(*inputs())


def test_a_kernel_is_not_exported_elsewhere(cpu: str) -> None:
    function = jax.jit(partial(FUNCTIONS["value_and_grad"], implementation=cpu))
    known = [export.DisabledSafetyCheck.custom_call(TARGET)]
    with pytest.raises(RuntimeError, match="use implementation=None"):
        export.export(function, platforms=(cpu, "tpu"), disabled_checks=known)(*inputs())


KERNELS = {f"jax_bce_v3_{kind}" for kind in ("loss", "loss_and_grad", "grad")}
OPEN = {f"batch, {SHAPE[1]}": [(1, 19), (300, 19)], "rows, columns": [(1, 1), (7, 1), (3, 9000)]}


def export_kernel(name: str, sizes: str, platform: str) -> export.Exported:
    """By name, for sizes that are left open."""
    function = jax.jit(partial(SYMBOLIC[name], implementation=platform))
    known = [export.DisabledSafetyCheck.custom_call(kernel) for kernel in KERNELS]
    exported = export.export(function, platforms=(platform,), disabled_checks=known)
    return exported(*symbolic(sizes))


@pytest.mark.parametrize("sizes", OPEN)
@pytest.mark.parametrize("name", SYMBOLIC)
def test_exported_kernel_for_any_sizes(cpu: str, name: str, sizes: str) -> None:
    """The mean alone differs from a program for these sizes: 1/N is an operand."""
    exported = export_kernel(name, sizes, cpu)
    assert custom_calls(exported.mlir_module()) <= KERNELS
    assert custom_calls(exported.mlir_module()) or name == "hessian-vector product"
    # Second derivatives are XLA's.
    tolerance = oracle.TOLERANCE["xla" if name == "hessian-vector product" else cpu].sum
    close = partial(np.testing.assert_allclose, rtol=tolerance, atol=0, strict=True)
    for shape in OPEN[sizes]:
        operands = inputs(*shape)
        expected = jax.jit(partial(SYMBOLIC[name], implementation=cpu))(*operands)
        jax.tree.map(close, exported.call(*operands), expected)


def test_a_kernel_is_not_exported_for_any_sizes_on_several_devices(cpu: str) -> None:
    """What is said names the way out."""
    rows = NamedSharding(Mesh(np.array(jax.devices(cpu)), "rows"), PartitionSpec("rows"))
    function = jax.jit(partial(FUNCTIONS["value_and_grad"], implementation=cpu), in_shardings=rows)
    with pytest.raises(RuntimeError, match=r"symbolic sizes .*implementation=None"):
        export.export(function, platforms=(cpu,))(*symbolic(f"8*batch, {SHAPE[1]}"))


ELSEWHERE = """
import sys
from pathlib import Path
import jax, numpy as np
import jax_bce

folder = Path(sys.argv[1])
inputs = list(folder.glob("*.npz"))
for file in folder.glob("*.exported"):
    exported = jax.export.deserialize(file.read_bytes())
    for operands in inputs:
        results = exported.call(*np.load(operands).values())
        np.savez(folder / f"{file.stem} of {operands.stem}", *jax.tree.leaves(results))
"""


@pytest.mark.second
def test_exported_kernels_in_another_process(platform: str, tmp_path: Path) -> None:
    shapes = [(1, 1), (5, 4000), (3, 9000)]
    exported = [export_kernel(name, "rows, columns", platform) for name in SYMBOLIC]
    for i, kernel in enumerate(exported):
        (tmp_path / f"{i}.exported").write_bytes(kernel.serialize())
    for shape in shapes:
        np.savez(tmp_path / f"{shape}.npz", *inputs(*shape))
    code = [sys.executable, "-P", "-W", "error", "-c", ELSEWHERE, str(tmp_path)]
    environment = platforms.environment(platform)
    done = subprocess.run(code, env=environment, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr
    for i, kernel in enumerate(exported):
        for shape in shapes:
            found = list(np.load(tmp_path / f"{i} of {shape}.npz").values())
            oracle.assert_same_bits(found, jax.tree.leaves(kernel.call(*inputs(*shape))))


@pytest.mark.parametrize("name", ["value_and_grad", "recompute"])
def test_sharded_export(check, cpu: str, name: str) -> None:
    """A batch over 8 devices: each keeps its rows, and the mean is that of all of them."""
    logits, labels = inputs()
    rows = NamedSharding(Mesh(np.array(jax.devices(cpu)), "rows"), PartitionSpec("rows"))
    function = jax.jit(FUNCTIONS[name], in_shardings=rows)
    exported = export.export(function, platforms=(cpu, "tpu"))(logits, labels)
    assert exported.nr_devices == len(jax.devices(cpu)) == 8
    loss, gradient = exported.call(*jax.device_put((logits, labels), rows))
    assert gradient.sharding.is_equivalent_to(rows, gradient.ndim)
    check.reduced("xla", loss, oracle.exact(logits, labels).loss.mean())
    check.elements("xla", logits, labels, gradient=gradient, factor=1 / logits.size, flushes=True)


CACHED = """
import hashlib, json, sys
import jax, numpy as np
from jax import monitoring

events = []
monitoring.register_event_listener(lambda event, **_: events.append(event.rsplit("/", 1)[-1]))
import jax_bce

logits = np.linspace(-30, 30, 1003, dtype=np.float32)
call = jax.jit(jax.value_and_grad(lambda x: jax_bce.loss(x, 1, implementation=sys.argv[1])))
bits = b"".join(np.asarray(result).tobytes() for result in call(logits))
print(json.dumps({
    "bits": hashlib.sha256(bits).hexdigest(),
    "hits": events.count("cache_hits"),
    "misses": events.count("cache_misses"),
}))
"""


def test_persistent_cache(platform: str, tmp_path: Path) -> None:
    """The second process compiles nothing, and the kept program finds the kernel."""
    environment = platforms.environment(platform) | {
        "JAX_COMPILATION_CACHE_DIR": str(tmp_path),
        "JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS": "0",
    }
    first, second = (
        json.loads(
            subprocess.run(
                [sys.executable, "-P", "-W", "error", "-c", CACHED, platform],
                env=environment,
                capture_output=True,
                text=True,
                check=True,
                timeout=300,
            ).stdout
        )
        for _ in range(2)
    )
    assert first["misses"] == second["hits"] > 0
    assert second["misses"] == 0
    assert second["bits"] == first["bits"]
