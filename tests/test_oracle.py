"""The oracle itself: what every other test leans on is checked against independent sources.

Those are the published values of cases.json, exact fractions, and mpmath against float64.
"""

import json
from fractions import Fraction
from pathlib import Path

import numpy as np
import oracle
import pytest
from oracle import BFLOAT16, FLOAT16, FLOAT32, FLOAT64

pytestmark = pytest.mark.any_jax

CASES = json.loads(Path(__file__).with_name("cases.json").read_text())
ELEMENTS = [case for case in CASES if case["id"].startswith("E")]


@pytest.mark.parametrize("case", ELEMENTS, ids=[case["id"] for case in ELEMENTS])
def test_agrees_with_published_values(case: dict) -> None:
    exact = oracle.exact(np.float64(case["inputs"]["x"]), case["inputs"]["y"])
    for name, attribute in {"loss": "loss", "grad": "gradient", "hess": "hessian"}.items():
        if name in case["expected"]:
            value = getattr(exact, attribute)
            assert oracle.ulp_distance(case["expected"][name], value, FLOAT64) <= oracle.CASE


@pytest.mark.parametrize("label", [0.0, 1.0, 0.3, 2.0**-40, 1 - 2.0**-40])
@pytest.mark.parametrize(
    "name", ["loss", "gradient", "hessian", "third", "loss_scale", "gradient_scale"]
)
def test_float64_agrees_with_mpmath(label: float, name: str) -> None:
    logits = oracle.chosen_logits(FLOAT32)
    values = getattr(oracle.exact(logits, label), name)
    with_more_digits = oracle.exact(logits.astype(np.float64), label)
    scale = {"gradient": "gradient_scale", "third": "hessian"}.get(name, name)
    distance = oracle.ulp_distance(
        values,
        getattr(with_more_digits, name),
        FLOAT64,
        scale=getattr(with_more_digits, scale).astype(np.float64),
    )
    assert distance.max() <= oracle.TOLERANCE["cpu"].elements["float64", "soft"].loss


@pytest.mark.parametrize("label", [0.0, 1.0, 0.3])
def test_derivatives_are_those_of_the_loss(label: float) -> None:
    step = 2.0**-20
    logits = np.array([-30.0, -3.0, -0.5, 0.7, 2.0, 30.0])
    left, middle, right = (oracle.exact(logits + d, label) for d in (-step, 0.0, step))
    for value, derivative in (("loss", "gradient"), ("gradient", "hessian"), ("hessian", "third")):
        slope = (getattr(right, value) - getattr(left, value)) / (2 * step)
        error = abs(slope - getattr(middle, derivative)).astype(np.float64)
        assert (error <= step**2 * middle.loss_scale.astype(np.float64)).all()


def _nearest(value: float, dtype: np.dtype) -> float:
    """The number of a 16-bit type nearest to a value, ties to the even pattern, by trying all."""
    numbers = oracle.finite(oracle.every_16_bit(dtype))
    odd = numbers.view(np.uint16) % 2
    near = np.argsort(abs(numbers.astype(np.float64) - value))[:4]
    return float(
        numbers[
            min(near, key=lambda i: (abs(Fraction(float(numbers[i])) - Fraction(value)), odd[i]))
        ]
    )


@pytest.mark.parametrize("dtype", [BFLOAT16, FLOAT16], ids=str)
def test_rounds_once(dtype: np.dtype) -> None:
    nmant = oracle.ml_dtypes.finfo(dtype).nmant
    tie = 1 + 2.0 ** -(nmant + 1)
    smallest = float(oracle.ml_dtypes.finfo(dtype).smallest_subnormal)
    values = [tie, tie + 2.0**-40, tie - 2.0**-40, 3 * tie, 0.1, 1e-3, 2.5 * smallest]
    values += [1.5 * smallest, 0.5 * smallest, 0.75 * smallest, *np.negative([tie + 2.0**-40, 0.3])]
    rounded = oracle.round_to(values, dtype)
    assert rounded.dtype == dtype
    assert rounded.astype(np.float64).tolist() == [_nearest(value, dtype) for value in values]


@pytest.mark.parametrize("dtype", [FLOAT16, BFLOAT16, FLOAT32], ids=str)
def test_rounding_at_the_ends(dtype: np.dtype) -> None:
    largest = float(oracle.ml_dtypes.finfo(dtype).max)
    half = oracle.ulp(largest, dtype) / 2
    assert oracle.round_to(largest + half * (1 - 2.0**-20), dtype) == largest
    assert np.isinf(oracle.round_to(largest + half, dtype))
    assert np.isinf(oracle.round_to(-np.inf, dtype))
    assert np.isnan(oracle.round_to(np.nan, dtype))
    assert np.signbit(oracle.round_to(-0.0, dtype).astype(np.float64))


def test_rounding_agrees_with_numpy_in_float32() -> None:
    bits = np.random.default_rng(0).integers(0, 2**64, 10_000, dtype=np.uint64)
    with np.errstate(all="ignore"):
        oracle.assert_same_bits(
            oracle.round_to(bits.view(np.float64), FLOAT32), bits.view(np.float64).astype("f4")
        )


@pytest.mark.parametrize(
    ("actual", "exact", "dtype", "distance"),
    [
        (1.0, 1.0, FLOAT32, 0.0),
        (1 + 2.0**-23, 1.0, FLOAT32, 1.0),
        (1 - 2.0**-24, 1.0, FLOAT32, 0.5),
        (1.0, 1.0 + 2.0**-25, FLOAT32, 0.25),
        (2.0, 2 - 2.0**-23, FLOAT32, 1.0),
        (1 + 2.0**-7, 1.0, BFLOAT16, 1.0),
        (1 + 2.0**-10, 1.0, FLOAT16, 1.0),
        (1 + 2.0**-52, 1.0, FLOAT64, 1.0),
        (0.0, 2.0**-149, FLOAT32, 1.0),
        (2.0**-149, 0.0, FLOAT32, 1.0),
        (2.0**-148, 2.0**-127, FLOAT32, 2.0**22 - 2.0),
        (0.0, 2.0**-24, FLOAT16, 1.0),
        (0.0, 5e-324, FLOAT64, 1.0),
        (np.inf, np.inf, FLOAT32, 0.0),
        (-np.inf, np.inf, FLOAT32, np.inf),
        (3e38, np.inf, FLOAT32, np.inf),
        (np.inf, 3e38, FLOAT32, np.inf),
        (np.inf, 1e39, FLOAT32, 0.0),
        (np.inf, 65520.0, FLOAT16, 0.0),
        (np.inf, 65519.0, FLOAT16, np.inf),
        (65504.0, 65519.0, FLOAT16, 15 / 32),
        (np.nan, np.nan, FLOAT32, 0.0),
        (np.nan, 1.0, FLOAT32, np.inf),
        (1.0, np.nan, FLOAT32, np.inf),
        (np.nan, np.inf, FLOAT32, np.inf),
    ],
)
def test_distance(actual: float, exact: float, dtype: np.dtype, distance: float) -> None:
    assert oracle.ulp_distance(actual, exact, dtype) == distance
    assert oracle.ulp_distance(-actual, -exact, dtype) == distance


def test_distance_to_more_digits_than_float64_holds() -> None:
    third = oracle._to_mpmath(np.array([1.0])) / 3
    below = np.array([1 / 3])
    assert oracle.ulp_distance(below, third, FLOAT64) == pytest.approx(1 / 3)


def test_walk_covers_both_signs_and_the_specials() -> None:
    values = oracle.walk(FLOAT32, 2**16)
    assert values.size == 2**16
    assert np.isnan(values).any()
    assert np.signbit(values).sum() == values.size // 2
    assert np.unique(values.view(np.uint32)).size == values.size
    tail = oracle.walk(FLOAT32, 1000, low=80.0, high=110.0)
    assert (abs(tail) >= 80).all()
    assert (abs(tail) < 110).all()
