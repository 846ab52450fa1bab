"""Focal and asymmetric losses by the kernel: accurate, in one pass, and in every mode.

`test_relatives.py` has their definitions, tails, options and other derivatives, by every
implementation; here is what the kernel promises beyond that.
"""

from collections.abc import Callable
from functools import partial

import hlo
import jax
import jax.numpy as jnp
import numpy as np
import oracle
import pytest
from jax.sharding import AxisType, NamedSharding, PartitionSpec
from oracle import BFLOAT16, FLOAT16, FLOAT32, FLOAT64
from platforms import QUICKLY

import jax_bce

pytestmark = pytest.mark.any_jax

P = PartitionSpec
LOSSES = {
    "focal": jax_bce.focal_loss,
    "gamma 1.5": partial(jax_bce.focal_loss, gamma=1.5, alpha=0.25),
    "asymmetric": jax_bce.asymmetric_loss,
    "constant power": partial(
        jax_bce.asymmetric_loss, gamma_neg=2.5, clip=0.2, stop_gradient_weight=True
    ),
}
every_loss = pytest.mark.parametrize("loss", LOSSES.values(), ids=LOSSES)

# (gamma_neg, gamma_pos, clip)
NUMBERS = [
    *((gamma, gamma, 0) for gamma in (0, 0.5, 1, 1.5, 2, 3, 4, 5)),
    *((4, 1, 0.05), (5, 0.5, 0.05), (2.5, 2, 0.2), (4, 1, 0.7), (0.5, 5, 1e-3), (0, 0, 0.05)),
]


def walk(stride: int, clip: float) -> np.ndarray:
    """Every so many float32 logits, and, around the one where a clip ends, each of thousands."""
    logits = np.arange(0, 2**32, stride, dtype=np.uint64).astype(np.uint32).view(FLOAT32)
    logits = logits[np.isfinite(logits)]
    if clip == 0:
        return logits
    middle = np.float32(np.log(clip / (1 - clip)))
    near = middle + np.spacing(middle) * np.arange(-4000, 4000, dtype=FLOAT32)
    wide = middle + np.linspace(-1, 1, 100_000, dtype=FLOAT32)
    return np.concatenate([logits, near, wide])


def both(gamma_neg: float, gamma_pos: float, clip: float, **keywords) -> Callable:
    """The loss of each element and its derivative."""
    if clip == 0:
        assert gamma_neg == gamma_pos
        loss = partial(jax_bce.focal_loss, gamma=np.float32(gamma_neg), **keywords)
    else:
        numbers = {"gamma_neg": gamma_neg, "gamma_pos": gamma_pos, "clip": clip}
        numbers = {name: np.float32(number) for name, number in numbers.items()}
        loss = partial(jax_bce.asymmetric_loss, **numbers, **keywords)

    def results(x: jax.Array, y: jax.Array) -> tuple[jax.Array, jax.Array]:
        values, pullback = jax.vjp(lambda x: loss(x, y, reduction="none"), x)
        return values, pullback(jnp.ones_like(values))[0]

    return jax.jit(results)


@pytest.mark.parametrize("label", [0, 1])
@pytest.mark.parametrize("numbers", NUMBERS, ids=str)
def test_every_logit_is_within_the_contract(check, numbers: tuple, label: int) -> None:
    gamma_neg, gamma_pos, clip = numbers
    logits = walk(65_521, clip)
    labels = np.full_like(logits, label)
    exact = oracle.exact_focal(logits, labels, gamma_neg, gamma_pos, np.float32(clip))
    bound = oracle.KERNEL_FOCAL if clip == 0 else oracle.KERNEL_ASYMMETRIC
    found = both(*numbers, implementation="cpu")(logits, labels)
    for what, actual, expected in zip(("loss", "gradient"), found, exact[:2], strict=True):
        name = f"{'focal' if clip == 0 else 'asymmetric'} {what}, labels 0 and 1"
        # exp(-x) is rounded to 0 beyond 105: a gradient divided by a small clip shows it.
        besides = 2.0**-148 / clip if clip else 0
        check.ulps(name, actual, expected, bound, besides=besides, inputs=(logits, labels))


@pytest.mark.parametrize("numbers", NUMBERS, ids=str)
def test_soft_labels(check, numbers: tuple) -> None:
    """The error of a gradient is relative to the largest of its three terms."""
    gamma_neg, gamma_pos, clip = numbers
    logits = walk(4_194_301, clip)
    labels = oracle.random_labels(FLOAT32, logits.shape, 3)
    exact = oracle.exact_focal(logits, labels, gamma_neg, gamma_pos, np.float32(clip))
    loss, gradient = both(*numbers, implementation="cpu")(logits, labels)
    inputs = (logits, labels)
    bound = oracle.KERNEL_SOFT
    check.ulps("focal loss, soft labels", loss, exact[0], bound, inputs=inputs)
    check.ulps(
        "focal gradient, soft labels", gradient, exact[1], bound, scale=exact[2], inputs=inputs
    )


@pytest.mark.parametrize("dtype", [FLOAT16, BFLOAT16], ids=str)
def test_16_bit_results_are_rounded_once(check, dtype: np.dtype) -> None:
    logits = oracle.every_16_bit(dtype)
    logits = logits[np.isfinite(logits.astype(FLOAT32))]
    for label in (0, 1):
        labels = np.full(logits.shape, label, np.uint8)
        exact = oracle.exact_focal(logits.astype(FLOAT32), labels, 2, 2, np.float32(0))
        found = both(2, 2, 0, implementation="cpu")(logits, labels)
        for what, actual, expected in zip(("loss", "gradient"), found, exact[:2], strict=True):
            check.ulps(
                f"focal {what}", actual, expected, oracle.KERNEL_16_BIT, inputs=(logits, labels)
            )


@every_loss
@pytest.mark.parametrize("dtype", [FLOAT32, BFLOAT16, FLOAT64], ids=str)
def test_one_pass(cpu: str, loss: Callable, dtype: np.dtype) -> None:
    """Loss and gradient are one call of the kernel, and nothing else has the logits' size."""
    with jax.enable_x64(True):
        operands = [jax.ShapeDtypeStruct((1024, 512), t) for t in (dtype, np.uint8)]
        compiled = jax.jit(jax.value_and_grad(loss)).lower(*operands).compile()
    (call,) = hlo.kernel_calls(compiled)
    assert hlo.passes(compiled, 1024 * 512) == [call]
    assert compiled.memory_analysis().temp_size_in_bytes < 2**17


@every_loss
def test_an_element_does_not_depend_on_its_neighbors(cpu: str, loss: Callable) -> None:
    """A soft label or a large logit beside it takes other code, which gives the same bits."""
    logits = oracle.random_logits(FLOAT32, (64, 40), 1, scale=20)
    labels = oracle.random_labels(bool, (64, 40), 2).astype(FLOAT32)
    of = jax.jit(lambda x, y: jax.vjp(lambda x: loss(x, y, reduction="none"), x)[0])
    expected = of(logits, labels)
    mixed, soft = logits.copy(), labels.copy()
    mixed[:, ::4], soft[:, 1::4] = 100, 0.5
    for x, y in ((mixed, labels), (logits, soft), (mixed, soft)):
        oracle.assert_same_bits(of(x, y)[:, 2::4], expected[:, 2::4])
    oracle.assert_same_bits(of(logits[3, 5:6], labels[3, 5:6]), expected[3, 5:6])


def test_numbers_per_class_have_the_bits_they_have_alone(cpu: str) -> None:
    logits, labels = (
        oracle.random_logits(FLOAT32, (33, 5), 1),
        oracle.random_labels(bool, (33, 5), 2),
    )
    gammas, clips = np.float32([0, 1, 2, 2.5, 4]), np.float32([0, 0.05, 0.2, 1e-6, 0.9])
    of = jax.jit(
        lambda x, y, gamma, clip: jax.value_and_grad(
            lambda x: jax_bce.asymmetric_loss(
                x, y, gamma_neg=gamma, gamma_pos=gamma[::-1], clip=clip, axis=0
            ).sum()
        )(x)[1]
    )
    found = of(logits, labels, gammas, clips)
    for c in range(5):
        one = [gammas[c : c + 1], clips[c : c + 1]]
        alone = jax.jit(
            lambda x, y, gamma, other, clip: jax.grad(
                lambda x: jax_bce.asymmetric_loss(
                    x, y, gamma_neg=gamma, gamma_pos=other, clip=clip, axis=0
                ).sum()
            )(x)
        )(logits[:, c : c + 1], labels[:, c : c + 1], one[0], gammas[4 - c : 5 - c], one[1])
        oracle.assert_same_bits(found[:, c : c + 1], alone)


@every_loss
@pytest.mark.thorough
def test_modes(cpu: str, loss: Callable) -> None:
    """The derivatives of the kernel's result are those of plain JAX."""
    x, y = oracle.random_logits(FLOAT32, (6, 7), 1), oracle.random_labels(FLOAT32, (6, 7), 2)
    weight = oracle.random_logits(FLOAT32, (7,), 3) ** 2

    def every(implementation: str, x: jax.Array) -> list:
        of = partial(loss, labels=y, weight=weight, implementation=implementation)
        gradient = jax.grad(of)
        return [
            of(x),
            gradient(x),
            jax.grad(partial(of, residuals="recompute"))(x),
            jax.grad(jax.checkpoint(of))(x),
            jax.jvp(of, (x,), (x,)),
            jax.jvp(gradient, (x,), (x,)),
            jax.grad(lambda x: jnp.sum(gradient(x) ** 2))(x),
            jax.vmap(gradient)(x[None])[0],
            jax.vmap(lambda x, y, w: loss(x, y, weight=w, implementation=implementation))(
                x, y, x**2
            ),
            jax.grad(lambda w: loss(x, y, weight=w, implementation=implementation))(weight),
            jax.lax.scan(lambda s, x: (s + loss(x, 1), gradient(jnp.tile(x, (6, 1)))[0]), 0.0, x),
        ]

    def compiled(implementation: str) -> list:
        program = jax.jit(partial(every, implementation)).lower(x)
        return program.compile(compiler_options=QUICKLY)(x)

    kernel, plain = map(compiled, ("cpu", "xla"))
    jax.tree.map(partial(np.testing.assert_allclose, **oracle.FOCAL_MODES), kernel, plain)


@every_loss
@pytest.mark.parametrize("spec", [P("a"), P(None, "b"), P("a", "b"), P(("a", "b"))], ids=str)
@pytest.mark.parametrize("kind", [AxisType.Auto, AxisType.Explicit], ids=lambda kind: kind.name)
def test_on_a_mesh(cpu: str, loss: Callable, spec: PartitionSpec, kind: AxisType) -> None:
    """One number is added up; the results are those of one device."""
    x, y = oracle.random_logits(FLOAT32, (16, 64), 1), oracle.random_labels(np.uint8, (16, 64), 2)
    of = jax.jit(jax.value_and_grad(loss))
    expected = of(x, y)
    mesh = jax.make_mesh((4, 2), ("a", "b"), (kind,) * 2, devices=jax.devices("cpu"))
    with jax.set_mesh(mesh):
        spread = [jax.device_put(v, NamedSharding(mesh, spec)) for v in (x, y)]
        compiled = of.lower(*spread).compile()
        found = compiled(*spread)
    assert {sent.split()[0] for sent in hlo.collectives(compiled)} <= {"all-reduce"}
    assert found[1].sharding.is_equivalent_to(spread[0].sharding, 2)
    np.testing.assert_allclose(found[0], expected[0], rtol=oracle.FOCAL_MEAN)
    oracle.assert_same_bits(found[1], expected[1])


@pytest.mark.parametrize("some", [0.0, 0.5, 1.0])
def test_masked_elements_have_no_negative_zeros(cpu: str, some: float) -> None:
    """Whether their neighbours are masked, too, or not."""
    x, y = oracle.random_logits(FLOAT32, (64, 64), 1), oracle.random_labels(np.uint8, (64, 64), 2)
    where = np.random.default_rng(3).random(x.shape) < some
    loss = partial(
        jax_bce.asymmetric_loss, clip=0.9, label_smoothing=0.2, where=where, reduction="sum"
    )
    gradient = np.asarray(jax.jit(jax.grad(loss))(x, y))
    assert np.any(gradient != 0) == (some > 0)
    assert not np.any(np.signbit(gradient[~where]))


def test_none_is_xla_on_other_platforms() -> None:
    """On a GPU, too, where the kernel has to be named."""
    x, y = np.zeros(4, FLOAT32), np.zeros(4, FLOAT32)
    for platform in ("cuda", "tpu"):
        text = (
            jax.jit(jax_bce.focal_loss).trace(x, y).lower(lowering_platforms=(platform,)).as_text()
        )
        assert "jax_bce_v" not in text
