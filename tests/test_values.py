"""The accuracy contract of the elementwise loss and its gradient, DESIGN.md section 2.

Against the oracle: chosen inputs, bit patterns at a stride (every logit for the 16-bit types),
random ones, and published values.
"""

import json
from collections.abc import Callable
from functools import partial
from pathlib import Path

import jax
import numpy as np
import oracle
import pytest
from oracle import BFLOAT16, FLOAT16, FLOAT32, FLOAT64

import jax_bce

pytestmark = pytest.mark.any_jax

CASES = {c["id"]: c for c in json.loads(Path(__file__).with_name("cases.json").read_text())}
ELEMENTS = [case for name, case in CASES.items() if name.startswith("E")]
LABELS = (0.0, 1.0, 0.1, 0.9)
# A label's bit pattern matters most at its ends, and where 1 - y is inexact.
SOFT_LABELS = np.array(
    [1e-45, 1e-38, 1e-10, 2**-25, 1e-4, 0.1, 0.25, 1 / 3, 0.5, 0.7, 0.9, 1 - 2**-12, 1 - 2**-24],
    FLOAT32,
)
# Bit patterns walked for one label and one implementation: a tenth of a second each.
WALK = 1 << 18


def check_elements(check, implementation: str, logits: np.ndarray, labels: np.ndarray) -> None:
    """Loss and gradient of one call, whose gradient is that of the sum: each element's own."""
    loss, gradient = jax_bce.loss_and_grad(
        logits, labels, reduction="none", implementation=implementation
    )
    assert loss.dtype == gradient.dtype == logits.dtype
    check.elements(implementation, logits, labels, loss=loss, gradient=gradient)


def float32_logits(seed: int) -> np.ndarray:
    return np.concatenate(
        [
            oracle.chosen_logits(FLOAT32),
            oracle.walk(FLOAT32, WALK, offset=seed),
            # Where the result is neither x nor a constant.
            oracle.walk(FLOAT32, WALK, low=2**-27, high=105.0, offset=seed),
            oracle.random_logits(FLOAT32, WALK // 4, seed),
        ]
    )


@pytest.mark.parametrize("label", [0, 1])
def test_float32_hard_labels(check, implementation: str, label: int) -> None:
    logits = float32_logits(seed=label)
    check_elements(check, implementation, logits, np.full(logits.shape, label, np.uint8))


@pytest.mark.parametrize("label", [0, 1])
def test_float32_hard_label_for_all(check, implementation: str, label: int) -> None:
    logits = oracle.chosen_logits(FLOAT32)
    loss, gradient = jax_bce.loss_and_grad(
        logits, label, reduction="none", implementation=implementation
    )
    labels = np.full(logits.shape, label, np.int32)
    check.elements(implementation, logits, labels, loss=loss, gradient=gradient)


@pytest.mark.parametrize("label", SOFT_LABELS, ids=lambda label: f"{label:.9g}")
def test_float32_soft_labels(check, implementation: str, label: np.float32) -> None:
    if implementation == "xla" and label < np.finfo(np.float32).tiny:
        pytest.skip("XLA's arithmetic takes a subnormal label for 0")
    logits = oracle.walk(FLOAT32, WALK // 4, low=2**-27, high=110.0, offset=int(1e6 * label))
    logits = np.concatenate([oracle.chosen_logits(FLOAT32), logits])
    check_elements(check, implementation, logits, np.full_like(logits, label))


@pytest.mark.parametrize("scale", [0.5, 4.0, 30.0])
def test_float32_random_soft_labels(check, implementation: str, scale: float) -> None:
    logits = oracle.random_logits(FLOAT32, WALK, seed=1, scale=scale)
    check_elements(check, implementation, logits, oracle.random_labels(FLOAT32, WALK, seed=2))


def test_float32_labels_of_any_size(check, platform: str) -> None:
    """Labels whose bit patterns, not values, are even: as many at 1e-30 as at 0.5."""
    rng = np.random.default_rng(3)
    logits = rng.permutation(oracle.walk(FLOAT32, WALK, low=2**-27, high=110.0))
    labels = abs(rng.permutation(oracle.walk(FLOAT32, WALK, high=1.0)))
    check_elements(check, platform, logits, labels)


def test_float32_near_the_zero_of_the_gradient(check, implementation: str) -> None:
    """Where sigmoid(x) is nearly y the gradient's terms cancel."""
    labels = oracle.random_labels(FLOAT32, WALK, seed=4)
    with np.errstate(divide="ignore"):
        root = np.log(labels.astype(np.float64)) - np.log1p(-labels.astype(np.float64))
    distance = 10.0 ** np.random.default_rng(5).uniform(-8, 0, WALK)
    check_elements(check, implementation, oracle.round_to(root + distance, FLOAT32), labels)


@pytest.mark.parametrize("label_type", ["own", "float32"])
@pytest.mark.parametrize("dtype", [BFLOAT16, FLOAT16], ids=str, indirect=True)
def test_16_bit_near_the_zero_of_the_gradient(
    check, implementation: str, dtype: np.dtype, label_type: str
) -> None:
    """The worst cases known of soft labels, dense ones around each zero, and random ones."""
    rng = np.random.default_rng(6)
    labels = oracle.random_labels(dtype if label_type == "own" else FLOAT32, WALK, seed=4)
    labels[:2] = oracle.round_to([0.57803142, 0.26767638], labels.dtype)
    wide = np.clip(labels.astype(np.float64), 2.0**-24, 1 - 2.0**-24)
    root = np.log(wide) - np.log1p(-wide)
    distance = 10.0 ** rng.uniform(-8, 0, WALK) * rng.choice([-1, 0, 1], WALK)
    logits = oracle.round_to(root + distance, dtype)
    logits[:2] = oracle.round_to([0.314697265625, -1.007], dtype)
    check_elements(check, implementation, logits, labels)
    check_elements(check, implementation, oracle.random_logits(dtype, WALK, seed=5), labels)


@pytest.mark.parametrize("label", LABELS)
@pytest.mark.parametrize("label_dtype", ["own", "float32"])
@pytest.mark.parametrize("dtype", [BFLOAT16, FLOAT16], ids=str, indirect=True)
def test_16_bit_all_logits(
    check,
    record_property: Callable[[str, object], None],
    implementation: str,
    dtype: np.dtype,
    label_dtype: str,
    label: float,
) -> None:
    logits = oracle.every_16_bit(dtype)
    label_type = dtype if label_dtype == "own" else FLOAT32
    labels = np.full(logits.shape, oracle.round_to(label, label_type))
    loss, gradient = jax_bce.loss_and_grad(
        logits, labels, reduction="none", implementation=implementation
    )
    exact = oracle.exact(logits, labels)
    for name, actual, value in (
        ("loss", loss, exact.loss),
        ("gradient", gradient, exact.gradient),
    ):
        # How often the 0.002 ulp above one half are used: next to never where that costs nothing.
        distance = oracle.ulp_distance(np.asarray(actual), oracle.round_to(value, dtype), dtype)
        kind = f"{implementation}, {oracle.kind_of(labels)} labels, {dtype}"
        record_property(f"{name}, {kind} [of 65536 not rounded once]", float(np.sum(distance > 0)))
        if implementation == "cpu" and (dtype == FLOAT16 or label in (0, 1)):
            assert np.sum(distance > 0) <= (6 if dtype == FLOAT16 else 0)
    check.elements(implementation, logits, labels, loss=loss, gradient=gradient)


@pytest.mark.parametrize("label", [0.0, 1.0, 0.3, 5e-324, 1 - 2**-53])
@pytest.mark.parametrize("dtype", [FLOAT64], ids=str, indirect=True)
def test_float64(check, implementation: str, dtype: np.dtype, label: float) -> None:
    if implementation == "xla" and 0 < label < np.finfo(np.float64).tiny:
        pytest.skip("XLA's arithmetic takes a subnormal label for 0")
    logits = np.concatenate(
        [
            oracle.chosen_logits(dtype),
            oracle.walk(dtype, 500, offset=int(1e9 * label)),
            oracle.walk(dtype, 2000, low=2**-55, high=750.0, offset=int(1e9 * label)),
            oracle.random_logits(dtype, 500, seed=6),
        ]
    )
    check_elements(check, implementation, logits, np.full_like(logits, label))


@pytest.mark.parametrize("dtype", [FLOAT64], ids=str, indirect=True)
def test_float64_random_labels(check, implementation: str, dtype: np.dtype) -> None:
    logits = oracle.random_logits(dtype, 3000, seed=7, scale=20.0)
    labels = oracle.random_labels(dtype, 3000, seed=8)
    check_elements(check, implementation, logits, labels)


@pytest.mark.parametrize("case", ELEMENTS, ids=[case["id"] for case in ELEMENTS])
@pytest.mark.parametrize("dtype", [FLOAT32, FLOAT64], ids=str, indirect=True)
def test_published_elements(check, implementation: str, dtype: np.dtype, case: dict) -> None:
    x, y = (case["inputs"][name] for name in ("x", "y"))
    logits, labels = np.array([x], dtype), np.array([y], dtype)
    tolerance = oracle.TOLERANCE[implementation]
    bound = tolerance.elements[dtype.name, oracle.kind_of(labels)]
    loss, gradient = jax_bce.loss_and_grad(
        logits, labels, reduction="none", implementation=implementation
    )
    # In float32 the published value is that of another logit, unless the decimal number is one.
    expected = {"loss": [case["expected"]["loss"]], "grad": [case["expected"].get("grad", np.nan)]}
    if (float(logits[0]), float(labels[0])) != (x, y):
        exact = oracle.exact(logits, labels)
        expected = {"loss": exact.loss, "grad": exact.gradient}
    flushes = {"flushes": tolerance.flushes}
    what = f"published case, {implementation}"
    check.ulps(what, loss, expected["loss"], bound.loss + oracle.CASE, **flushes)
    if "grad" in case["expected"]:
        check.ulps(what, gradient, expected["grad"], bound.gradient + oracle.CASE, **flushes)


def test_published_floor(check, implementation: str) -> None:
    """The mean loss of {(-a, 0), (a, 1)} keeps falling past a = 16."""
    case = CASES["S06"]
    losses = [
        jax_bce.loss(np.array([-a, a], FLOAT32), np.array([0, 1]), implementation=implementation)
        for a in case["inputs"]["a"]
    ]
    bound = oracle.TOLERANCE[implementation].elements["float32", "hard"].loss
    check.ulps(f"published case, {implementation}", np.array(losses), case["expected"], bound)
    assert (np.diff(losses) < 0).all()


def test_published_gradients_are_alive(implementation: str) -> None:
    case = CASES["S09"]
    logits, labels = (np.array(case["inputs"][name], FLOAT32) for name in ("x", "y"))
    _, gradient = jax_bce.loss_and_grad(
        logits, labels, reduction="none", implementation=implementation
    )
    oracle.assert_same_bits(gradient, np.array(case["expected"]["grad_none"], FLOAT32))


def test_published_tensorflow(check, implementation: str) -> None:
    case = CASES["T02"]
    logits, labels = (np.array(case["inputs"][name], FLOAT32) for name in ("logits", "labels"))
    loss = jax_bce.loss(logits, labels, reduction="none", implementation=implementation)
    tolerance = oracle.TOLERANCE[implementation]
    bound = tolerance.elements["float32", "soft"].loss
    check.ulps(
        f"published case, {implementation}",
        loss,
        case["expected"],
        bound,
        flushes=tolerance.flushes,
    )


@pytest.mark.parametrize("label", [0.0, 0.25, 1.0])
@pytest.mark.parametrize("smoothing", [0.0, 0.25, 0.5, 1.0])
def test_label_smoothing(check, implementation: str, label: float, smoothing: float) -> None:
    """y (1 - s) + s / 2: with these s and y the smoothed label is exact."""
    logits = oracle.walk(FLOAT32, 2048, low=2**-20, high=100.0)
    loss, gradient = jax_bce.loss_and_grad(
        logits,
        np.full_like(logits, label),
        label_smoothing=smoothing,
        reduction="none",
        implementation=implementation,
    )
    smoothed = np.full_like(logits, label * (1 - smoothing) + smoothing / 2)
    check.elements(implementation, logits, smoothed, loss=loss, gradient=gradient)


@pytest.mark.parametrize("smoothing", [0.1, 1 / 3, 1e-3, 1e-6])
def test_label_smoothing_keeps_every_digit(check, platform: str, smoothing: float) -> None:
    """Neither the smoothed label nor its complement is rounded before it is used."""
    logits = oracle.random_logits(FLOAT32, 1 << 14, seed=21)
    for labels in (0, 1, oracle.random_labels(FLOAT32, logits.shape, seed=22)):
        loss, gradient = jax_bce.loss_and_grad(
            logits, labels, label_smoothing=smoothing, reduction="none", implementation=platform
        )
        exact = oracle.exact(logits, labels, float(np.float32(smoothing)))
        bound = oracle.TOLERANCE[platform].elements["float32", "soft"]
        check.ulps("loss, smoothed label", loss, exact.loss, bound.loss)
        scale = exact.gradient_scale
        check.ulps(
            "gradient, smoothed label", gradient, exact.gradient, bound.gradient, scale=scale
        )


@pytest.mark.parametrize("smoothing", [1e-9, 1e-6, 1e-3, 0.1])
def test_label_smoothing_is_symmetric(implementation: str, smoothing: float) -> None:
    """A smoothing too small for 1 - s to differ from 1 in float32 still has its effect."""
    logits = oracle.walk(FLOAT32, 2048, low=2**-20, high=100.0)
    results = [
        jax_bce.loss_and_grad(
            sign * logits,
            label,
            label_smoothing=smoothing,
            reduction="none",
            implementation=implementation,
        )
        for sign, label in ((1, 1), (-1, 0))
    ]
    oracle.assert_same_bits(results[0][0], results[1][0])
    np.testing.assert_array_equal(results[0][1], -np.asarray(results[1][1]))


@pytest.mark.parametrize("dtype", [BFLOAT16, FLOAT16], ids=str, indirect=True)
def test_dtype_widens_before_rounding(check, implementation: str, dtype: np.dtype) -> None:
    """A loss asked for in float32 is rounded once, not to the logits' 16 bits on the way."""
    logits = oracle.random_logits(dtype, 4096, seed=9)
    labels = oracle.random_labels(np.uint8, 4096, seed=10)
    loss = jax_bce.loss(
        logits, labels, reduction="none", dtype=np.float32, implementation=implementation
    )
    assert loss.dtype == np.float32
    check.elements(implementation, logits, labels, loss=loss)


def test_dtype_narrows(check, implementation: str) -> None:
    logits = oracle.random_logits(FLOAT32, 4096, seed=11)
    labels = oracle.random_labels(np.uint8, 4096, seed=12)
    loss = jax_bce.loss(
        logits, labels, reduction="none", dtype=BFLOAT16, implementation=implementation
    )
    assert loss.dtype == BFLOAT16
    check.elements(implementation, logits, labels, loss=loss)


FACTORS = [
    ("weight",),
    ("pos_weight",),
    ("weight", "sample_weight"),
    ("weight", "sample_weight", "pos_weight"),
]


@pytest.mark.parametrize("names", FACTORS, ids=",".join)
@pytest.mark.parametrize("kind", ["hard", "soft"])
def test_weighted_elements(
    check, platform: str, dtype: np.dtype, kind: str, names: tuple[str, ...]
) -> None:
    """One ulp more for each factor, also where the product is just below a power of 2."""
    size = 1 << 10 if dtype == FLOAT64 else 1 << 15
    rng = np.random.default_rng(7)
    logits = oracle.random_logits(dtype, size, seed=8, scale=8)
    labels = oracle.random_labels(np.uint8 if kind == "hard" else dtype, size, seed=9)
    plain = oracle.exact(logits, labels)
    factors = {name: rng.uniform(1, 2, size).astype(dtype) for name in names}
    # There an ulp is half of what it is, relative to the number, just above that power.
    other = np.prod([v.astype(np.float64) for v in list(factors.values())[1:]], axis=0)
    for result in "loss", "gradient_scale":
        target = getattr(plain, result).astype(np.float64) * other
        below = 1 - 10 ** rng.uniform(-4, -2, size)
        factors[names[0]] = (below / np.frexp(target)[0]).astype(dtype)
        wide = {name: v.astype(np.float64) for name, v in factors.items()}
        weight = wide.get("weight", 1.0) * wide.get("sample_weight", 1.0)
        exact = oracle.exact(logits, labels, pos_weight=factors.get("pos_weight", 1.0))
        loss, gradient = jax_bce.loss_and_grad(
            logits, labels, **factors, reduction="none", implementation=platform
        )
        tolerance = oracle.TOLERANCE[platform]
        own = tolerance.elements[dtype.name, kind]
        more = tolerance.factor * len(names) * oracle.ulp_of_arithmetic(dtype)
        check.ulps(f"loss with {len(names)} factors", loss, exact.loss * weight, own.loss + more)
        term = exact.gradient_scale * weight
        full = oracle.arithmetic_dtype(dtype) == dtype
        check.ulps(
            f"gradient with {len(names)} factors",
            gradient,
            exact.gradient * weight,
            own.gradient + more,
            scale=term if full else None,
            besides=own.cancelled * term if own.cancelled else 0.0,
        )


@pytest.mark.parametrize("columns", [1, 2, 3, 16, 100])
@pytest.mark.parametrize("kind", ["hard", "soft"])
def test_weighted_and_masked_sums(check, platform: str, kind: str, columns: int) -> None:
    """Rows of any length hold the bound of a sum, also weighted and masked."""
    shape = (3000, columns)
    rng = np.random.default_rng(columns)
    logits = oracle.random_logits(FLOAT32, shape, seed=columns)
    labels = oracle.random_labels(np.uint8 if kind == "hard" else FLOAT32, shape, seed=columns)
    options = {
        name: rng.uniform(0.1, 3, shape).astype(FLOAT32)
        for name in ("weight", "sample_weight", "pos_weight")
    }
    options["where"] = rng.uniform(0, 1, shape) < 0.7
    for names in (*FACTORS, ("where",), tuple(options)):
        given = {name: options[name] for name in names}
        exact = oracle.exact(logits, labels, pos_weight=given.get("pos_weight", 1.0)).loss
        for name in {"weight", "sample_weight", "where"} & given.keys():
            exact = exact * given[name].astype(np.float64)
        loss = jax_bce.loss(
            logits, labels, **given, reduction="sum", axis=-1, implementation=platform
        )
        check.reduced(platform, loss, exact.sum(-1), "weighted sum of a row")


def test_wide_labels_are_rounded_to_the_arithmetic(implementation: str) -> None:
    """Float64 labels beside float32 logits are taken as float32 ones, also in 1 - y."""
    logits = np.array([20, -20, 3], FLOAT32)
    with jax.enable_x64(True):
        labels = np.array([1 - 1e-9, 1e-9, 1 / 3])
        of = partial(jax_bce.loss_and_grad, reduction="none", implementation=implementation)
        oracle.assert_same_bits(of(logits, labels), of(logits, labels.astype(FLOAT32)))
