"""The relatives of the loss: against their bare definitions, published values, and the loss.

The definitions are evaluated by mpmath in digits enough to differentiate them by differences, so
that nothing here repeats how the package forms a logarithm, a power or a derivative.
"""

import json
from collections.abc import Callable, Sequence
from functools import cache, partial
from pathlib import Path

import jax
import jax.numpy as jnp
import ml_dtypes
import mpmath
import numpy as np
import oracle
import platforms
import pytest
from oracle import BFLOAT16, FLOAT16, FLOAT32, FLOAT64

import jax_bce

pytestmark = pytest.mark.any_jax

CASES = {c["id"]: c for c in json.loads(Path(__file__).with_name("cases.json").read_text())}

# Digits for second differences of what is as small as float32 numbers are.
_MP = mpmath.MPContext()
_MP.prec = 448
_STEP = _MP.mpf(2) ** -140

MAGNITUDES = [1e-30, 0.1, 1, 2.5, 10, 17, 20, 43, 80, 88, 1e4]
LOGITS = np.array([*np.negative(MAGNITUDES), 0, *MAGNITUDES], FLOAT32)
ORDERS = ("loss", "gradient", "hessian")
LABELS = np.array([0, 1, 0.1, 0.5, 0.75], FLOAT32)
KINDS = {"hard": slice(0, 2), "soft": slice(2, None)}
GAMMA = np.array([0, 0.5, 1, 2, 5], FLOAT32)
GAMMA_NEG, GAMMA_POS = np.array([[4, 0, 2, 4, 1], [1, 0, 2, 0, 0.5]], FLOAT32)


@pytest.fixture(params=platforms.PLATFORMS, autouse=True)
def anywhere(request: pytest.FixtureRequest):
    """Where XLA compiles them."""
    with platforms.on(request.param):
        yield


# --- definitions ---------------------------------------------------------------------------------


def sigmoid(x):
    return 1 / (1 + _MP.exp(-x))


def softplus(x):
    return -_MP.log(sigmoid(-x))


def focal(x, y, gamma, alpha=0.5):
    """Times 2, so that an alpha of 1/2 is none."""
    power = (y * sigmoid(-x) + (1 - y) * sigmoid(x)) ** gamma
    balance = 2 * (alpha * y + (1 - alpha) * (1 - y))
    return balance * power * (y * softplus(-x) + (1 - y) * softplus(x))


def asymmetric(x, y, gamma_neg, gamma_pos, clip, at=None):
    """The power is taken at another logit if one is given."""
    shifted = max(sigmoid(x) - clip, _MP.mpf(0))
    entropy = y * softplus(-x) + (1 - y) * (-_MP.log(1 - shifted) if clip else softplus(x))
    at = x if at is None else at
    # A difference in the label steps below 0, where the base has no power.
    base = max(y * sigmoid(-at) + (1 - y) * max(sigmoid(at) - clip, _MP.mpf(0)), _MP.mpf(0))
    gamma = y * gamma_pos + (1 - y) * gamma_neg
    return entropy * (base**gamma if gamma else 1)


def of_probability(p, y, q=1, shift=0):
    return -q * y * _MP.log(p + shift) - (1 - y) * _MP.log(1 - p + shift)


def exact(definition: Callable, *arguments, by: int = 0) -> tuple[np.ndarray, ...]:
    """The value and its first and second derivative in the argument number `by`, in float64."""

    def element(*numbers):
        numbers = [_MP.mpf(float(number)) for number in numbers]
        shifted = [[n + d * (i == by) for i, n in enumerate(numbers)] for d in (-_STEP, 0, _STEP)]
        left, value, right = (definition(*row) for row in shifted)
        slope, bend = (right - left) / (2 * _STEP), (right - 2 * value + left) / _STEP**2
        return tuple(map(float, (value, slope, bend)))

    return np.frompyfunc(element, len(arguments), 3)(*arguments)


def derivatives(function: Callable) -> Callable:
    """An elementwise function's value, first and second derivative."""

    def of(x):
        gradient = jax.grad(lambda x: jnp.sum(function(x)))
        return function(x), *jax.jvp(gradient, (x,), (jnp.ones_like(x),))

    return jax.jit(of)


def compiled(function: Callable, *arguments: object, **options: object):
    """As one program, which takes a tenth of the time that operation by operation would."""
    return jax.jit(partial(function, **options))(*arguments)


def in_float64(x, y) -> tuple[np.ndarray, ...]:
    """Logits, labels, and both sigmoids, whose range holds exp(-10,000)."""
    x, y = np.asarray(x).astype(np.longdouble), np.asarray(y).astype(np.longdouble)
    return x, y, 1 / (1 + np.exp(-x)), 1 / (1 + np.exp(x))


def scales(power, log_base, gamma, ratio, entropy: Sequence) -> list[np.ndarray]:
    """The largest that the terms of the product rule are, for power base^gamma times an entropy."""
    first = gamma * ratio
    second = abs(gamma * (gamma - 1)) * ratio**2 + gamma * ratio
    terms = (
        entropy[0],
        first * entropy[0] + entropy[1],
        second * entropy[0] + 2 * first * entropy[1] + entropy[2],
    )
    return [np.asarray(power * (1 + abs(gamma * log_base)) * t, np.float64) for t in terms]


def focal_scales(x, y, gamma) -> list[np.ndarray]:
    x, y, p, m = in_float64(x, y)
    base = y * m + (1 - y) * p
    entropy = (y * np.logaddexp(0, -x) + (1 - y) * np.logaddexp(0, x), y * m + (1 - y) * p, p * m)
    return scales(base**gamma, np.log(base), gamma, p * m / base, entropy)


def asymmetric_scales(x, y, gamma_neg, gamma_pos, clip) -> list[np.ndarray]:
    x, y, p, m = in_float64(x, y)
    shifted = np.maximum(p - clip, 0)
    base, gamma = y * m + (1 - y) * shifted, y * gamma_pos + (1 - y) * gamma_neg
    floored = m + np.minimum(clip, p)
    negative = p * (m / floored if clip else 1) * (shifted > 0)
    likely = -np.log(floored) if clip else np.logaddexp(0, x)
    entropy = (
        y * np.logaddexp(0, -x) + (1 - y) * likely,
        y * m + (1 - y) * negative,
        y * p * m + (1 - y) * (negative**2 + negative),
    )
    known = np.where(base == 0, 1, base)
    return scales(base**gamma, np.log(known), gamma, p * m * (base > 0) / known, entropy)


def compare(check, what: str, actual, expected, scale, bound: float, inputs: tuple) -> None:
    actual = np.asarray(actual)
    assert np.isfinite(actual).all()
    far = scale < oracle.FLUSHED
    assert (abs(actual - expected)[far] <= oracle.FLUSHED).all()
    expected, actual = (np.where(far, 0, v).astype(v.dtype) for v in (expected, actual))
    check.ulps(what, actual, expected.astype(np.float64), bound, scale=scale, inputs=inputs)


# --- values, first and second derivatives --------------------------------------------------------


# Every label with every logit and every focus, which is the last axis.
X, Y = np.broadcast_arrays(LOGITS[:, None], LABELS[:, None, None], GAMMA)[:2]


@cache
def focal_results(platform: str) -> tuple:
    of = partial(jax_bce.focal_loss, labels=Y, gamma=GAMMA, reduction="none")
    return derivatives(of)(X), exact(focal, X, Y, GAMMA), focal_scales(X, Y, GAMMA)


@cache
def asymmetric_results(clip: float, platform: str) -> tuple:
    gammas = {"gamma_neg": GAMMA_NEG, "gamma_pos": GAMMA_POS, "clip": np.float32(clip)}
    of = partial(jax_bce.asymmetric_loss, labels=Y, **gammas, reduction="none")
    arguments = (X, Y, *gammas.values())
    return derivatives(of)(X), exact(asymmetric, *arguments), asymmetric_scales(*arguments)


@pytest.fixture
def platform_name(request: pytest.FixtureRequest) -> str:
    return request.node.callspec.params["anywhere"]


def compare_kind(check, name: str, kind: str, what: str, results: tuple, bound: float) -> None:
    own = KINDS[kind]
    actual, expected, scale = (np.asarray(r[ORDERS.index(what)])[own] for r in results)
    name = f"{name} {what}, {kind} labels"
    compare(check, name, actual, expected, scale, bound, (X[own], Y[own], GAMMA))


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("what", ORDERS)
def test_focal(check, platform_name: str, what: str, kind: str) -> None:
    """Exact in both tails: no power of a rounded probability, and p_t linear in a soft label."""
    compare_kind(check, "focal", kind, what, focal_results(platform_name), oracle.FOCAL)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("clip", [0.0, 0.05])
@pytest.mark.parametrize("what", ORDERS)
def test_asymmetric(check, platform_name: str, what: str, clip: float, kind: str) -> None:
    """Misclassified negatives, too, whose loss is bounded by the clip, keep their gradient."""
    results = asymmetric_results(clip, platform_name)
    compare_kind(check, f"asymmetric, clip={clip},", kind, what, results, oracle.ASYMMETRIC)


# Logits, labels and powers at which a square, or the square of a reciprocal, overflows; and where
# a clip is small.
FAR = np.array([1e-40, 5, 30, 43.5, 60, 75, 87, 104, 65504, 1e19, 1e30, 3e38], FLOAT32)
EXTREME_X = np.array([*FAR, *-FAR, np.finfo(FLOAT32).max, np.finfo(FLOAT32).min], FLOAT32)
EXTREME_Y = np.array([0, 1, 2e-38, 1e-30, 1e-19, 1e-7, 0.5, 1 - 1e-7], FLOAT32)
EXTREME = np.broadcast_arrays(EXTREME_X[:, None, None], EXTREME_Y[:, None], GAMMA)


@partial(jax.jit, static_argnums=0)  # one program for every clip
def three_derivatives(relative: Callable, x, y, numbers: dict) -> tuple:
    """The elements and three derivatives, the third by either mode."""

    def of(x):
        return relative(x, y, **numbers, reduction="none")

    def along(function):
        return lambda x: jax.jvp(function, (x,), (jnp.ones_like(x),))[1]

    gradient = jax.grad(lambda x: jnp.sum(of(x)))
    twice = jax.grad(lambda x: jnp.sum(gradient(x)))
    return of(x), gradient(x), along(gradient)(x), along(along(gradient))(x), along(twice)(x)


@pytest.mark.parametrize(
    ("dtype", "clip"),
    [*((FLOAT32, clip) for clip in (None, 0.0, 1e-20, 0.05)), (FLOAT64, None), (FLOAT64, 0.05)],
    ids=str,
    indirect=["dtype"],
)
@pytest.mark.thorough
def test_extreme_logits_and_labels(check, dtype: np.dtype, clip: float | None) -> None:
    """Three finite derivatives, by either mode; exact loss and gradient. Without a clip: focal."""
    x, y, gamma = (v.astype(dtype) for v in EXTREME)
    if dtype == FLOAT64:
        x = np.where(abs(x) == np.finfo(FLOAT32).max, np.copysign(np.finfo(FLOAT64).max, x), x)
    if clip is None:
        relative, numbers = jax_bce.focal_loss, {"gamma": gamma}
        definition, of_scales = focal, focal_scales
    else:
        relative = jax_bce.asymmetric_loss
        numbers = {"gamma_neg": gamma, "gamma_pos": 5 - gamma, "clip": np.asarray(clip, dtype)}
        definition, of_scales = asymmetric, asymmetric_scales
    arguments = (x, y, *numbers.values())
    found = three_derivatives(relative, x, y, numbers)
    for order, actual in enumerate(found):
        finite = np.isfinite(actual)
        assert finite.all(), (order, [v[~finite][:3] for v in (x, y, gamma)])
    if dtype == FLOAT64:
        return
    # XLA flushes subnormal factors of a normal result: a power of a large loss, and exp(-|x|).
    known = ((abs(x) < FAR[-3]) | np.isin(y, [0, 0.5, 1])) & (abs(x) != 104)
    arguments = [v[known] if v.ndim else v for v in arguments]
    with np.errstate(all="ignore"):
        scales_of_orders = map(np.nan_to_num, of_scales(*arguments))
    bound = oracle.FOCAL if clip is None else oracle.ASYMMETRIC
    results = zip(ORDERS[:2], found, exact(definition, *arguments), scales_of_orders, strict=False)
    for what, actual, expected, scale in results:
        actual = np.asarray(actual)[known]
        compare(check, f"extreme {what}", actual, expected, scale, bound, tuple(arguments))


@pytest.mark.parametrize("relative", ["focal_loss", "asymmetric_loss"])
def test_infinite_logits(relative: str) -> None:
    """The limit: no loss on the right side, an infinite one on the wrong side; NaN stays NaN."""
    function = getattr(jax_bce, relative)
    logits = np.array([np.inf, -np.inf, -np.inf, np.nan], FLOAT32)
    found = compiled(function, logits, labels=np.array([1, 0, 1, 1]), reduction="none")
    oracle.assert_same_bits(found, np.array([0, 0, np.inf, np.nan], FLOAT32))


OPTIONS = {
    "plain": {},
    "weights": {"weight": np.float32([1, 2, 0]), "sample_weight": np.float32([3, 1, 0.5, 2])},
    "mask": {"where": np.array([True, False, True, True]), "ignore_label": 1},
    "smoothed": {"label_smoothing": 0.1, "reduction": "sum", "axis": 0},
    "elements": {"reduction": "none", "dtype": np.float16},
    "divided": {"reduction": "weighted_mean", "weight": np.float32([1, 2, 3]), "axis": -1},
    "normalized": {"normalizer": np.float32(7), "implementation": "xla"},
}


def test_without_a_focus_it_is_the_loss() -> None:
    """Bit for bit, by the same kernel, with every keyword."""
    assert CASES["F09"]["expected"] == "property"
    logits = oracle.random_logits(FLOAT32, (4, 3), 0, scale=20)
    labels = oracle.random_labels(np.uint8, (4, 3), 1)

    def every(function):
        of = jax.jit(lambda x, y: [function(x, y, **options) for options in OPTIONS.values()])
        return of(logits, labels)

    expected = every(jax_bce.loss)
    for function in (
        partial(jax_bce.focal_loss, gamma=0),
        partial(jax_bce.focal_loss, gamma=np.float32(0)),
        partial(jax_bce.asymmetric_loss, gamma_neg=0, gamma_pos=0.0, clip=0),
    ):
        oracle.assert_same_bits(every(function), expected)


def test_without_a_focus_it_is_the_loss_for_soft_labels_and_gradients() -> None:
    logits = oracle.random_logits(FLOAT32, 1000, 0, scale=20)
    labels = oracle.random_labels(FLOAT32, 1000, 1)
    none = {"gamma_neg": 0, "gamma_pos": 0, "clip": 0}
    expected = jax.value_and_grad(jax_bce.loss)(logits, labels)
    for of in partial(jax_bce.focal_loss, gamma=0), partial(jax_bce.asymmetric_loss, **none):
        oracle.assert_same_bits(jax.value_and_grad(of)(logits, labels), expected)


def test_a_traced_focus_of_zero_agrees(check) -> None:
    """Also of a logit and a label whose power is 0^0."""
    logits = np.array([*LOGITS, np.inf, -np.inf, np.inf, -np.inf], FLOAT32)
    labels = (np.arange(len(logits)) % 2).astype(np.uint8)
    bound = oracle.TOLERANCE["xla"].elements["float32", "hard"].loss
    exact_loss = oracle.exact(logits, labels).loss
    for of in (
        lambda zero: jax_bce.focal_loss(logits, labels, gamma=zero, reduction="none"),
        lambda zero: jax_bce.asymmetric_loss(
            logits, labels, gamma_neg=zero, gamma_pos=zero, clip=zero, reduction="none"
        ),
    ):
        found = jax.jit(of)(jnp.float32(0))
        check.ulps("traced focus of 0", found, exact_loss, bound, flushes=True)


def test_alpha_is_one_for_each_class(check) -> None:
    logits = oracle.random_logits(FLOAT32, (50, 3), 0)
    labels = oracle.random_labels(FLOAT32, (50, 3), 1)
    alpha = np.array([0.25, 0.5, 0.9], FLOAT32)
    found = compiled(jax_bce.focal_loss, logits, labels, alpha=alpha, gamma=2, reduction="none")
    expected, _, _ = exact(focal, logits, labels, 2, alpha)
    scale, _, _ = focal_scales(logits, labels, 2)
    compare(
        check, "balanced focal loss", found, expected / 2, scale, oracle.FOCAL, (logits, labels)
    )


# --- published values ----------------------------------------------------------------------------

TENSORFLOW = {
    "logits": np.float32([-100, -2, -2, 0, 2, 2, 2, 100]),
    "labels": [0, 0, 1, 0, 0, 1, 0.5, 1],
}


def stack_overflow(**keywords: object) -> Callable:
    def of(y_true: list, y_pred: list) -> jax.Array:
        return jax_bce.loss_from_probs(np.float32(y_pred), y_true, **keywords)

    return of


def scenic(logits: list, labels: list) -> list[jax.Array]:
    """Divided by the examples that count; label weights are none."""
    of = partial(jax_bce.loss, np.float32(logits), labels)
    examples = np.float32([1, 0])
    summed = {"weight": np.float32([1, 2, 3]), "reduction": "sum"}
    return [
        of(normalizer=2.0),
        of(sample_weight=examples, normalizer=1.0),
        of(**summed) / 2,
        of(**summed, sample_weight=examples),
    ]


def big_vision(logits: list, labels: list) -> jax.Array:
    return jnp.mean(jax_bce.loss(np.float32(logits), labels, reduction="sum", axis=-1))


def torch_issue(logits: list, labels: list, weight: list) -> dict:
    of = partial(jax_bce.loss, np.float32(logits), labels)
    weighted = partial(of, weight=np.float32(weight))
    return {
        "unweighted": of(),
        "mean": weighted(),
        "weighted_mean": weighted(reduction="weighted_mean"),
    }


def timm(logits: list, target: list) -> list[jax.Array]:
    """Targets of s / C and 1 - s + s / C: what else is smoothed labels with 2 s / C and a share."""
    labels = jax.nn.one_hot(np.array(target), 3) * 0.9 + 0.1 / 3
    of = partial(jax_bce.loss, np.float32(logits), labels)
    return [of(), of(normalizer=2.0)]


def boosted(preds: list, labels: list) -> dict:
    return dict(
        zip(("grad", "hess"), jax_bce.grad_and_hess(np.float32(preds), labels), strict=True)
    )


def mmcv(input: list, target: list) -> dict:
    """Divided by the rows, not by the elements."""
    logits, labels = np.float32(input), jax.nn.one_hot(np.array(target), len(input[0]))
    of = partial(jax_bce.focal_loss, labels=labels, alpha=0.25, normalizer=float(len(input)))
    loss, grad = jax.value_and_grad(of)(logits)
    return {"loss": loss, "mmcv": loss, "grad": grad}


def monai() -> jax.Array:
    logits, labels = np.float32([1, 1, 0.5, 0, 0.5]), [1, 0, 0, 0, 1]
    return jax_bce.focal_loss(logits, labels, reduction="none")


def tensorflow_addons() -> jax.Array:
    """The docstring's probabilities, as logits."""
    probs = np.array([0.97, 0.91, 0.03])
    logits = np.float32(np.log(probs) - np.log1p(-probs))
    return jax_bce.focal_loss(logits, [1, 1, 0], alpha=0.25, reduction="none")


def without_a_floor(x: float, y: float) -> dict:
    loss, grad = jax.value_and_grad(jax_bce.asymmetric_loss)(np.float32(x), y)
    return {"loss": loss, "grad": grad}


def clip_of_the_logit(p: list, y: list) -> dict:
    of = partial(jax_bce.loss_from_probs, np.float32(p), y, epsilon=1e-7)
    return {"each": of(reduction="none"), "mean": of()}


# The tolerance is the one that the case names, relative but for S07.
PUBLISHED = {
    "S01": (stack_overflow(epsilon=1e-7, log_epsilon=1e-7), {"rtol": 1e-6}),
    "S02": (stack_overflow(epsilon=1e-7), {"rtol": 1e-6}),
    "S04": (lambda p, y: jax_bce.loss_from_probs(np.float32(p), y), {"rtol": 0}),
    "S05": (stack_overflow(epsilon=1e-7, label_smoothing=0.1), {"rtol": 1e-5}),
    "S07": (clip_of_the_logit, {"rtol": 0, "atol": 1e-13}),
    "T01": (
        lambda: jax_bce.loss(np.full((10, 64), 1.5, FLOAT32), 1, pos_weight=np.ones(64, FLOAT32)),
        {"rtol": 1e-6},
    ),
    "T06": (torch_issue, {"rtol": 1e-6}),
    "T07": (scenic, {"rtol": 1e-6}),
    "T08": (big_vision, {"rtol": 1e-6}),
    "T09": (boosted, {"rtol": 1e-6}),
    "T10": (timm, {"rtol": 1e-6}),
    "F01": (mmcv, {"rtol": 1e-6}),
    "F02": (mmcv, {"rtol": 1e-6}),
    "F03": (mmcv, {"rtol": 1e-6}),
    "F04": (monai, {"rtol": 1e-6}),
    "F05": (tensorflow_addons, {"rtol": 1e-5}),
    "F06": (
        lambda: jax_bce.asymmetric_loss(np.float32([1, 2, 3]), [1, 0, 1], reduction="sum"),
        {"rtol": 1e-6},
    ),
    "F07": (
        lambda: jax_bce.asymmetric_loss(
            np.float32([1, 1, -5, -100]), [0, 1, 0, 0], reduction="none"
        ),
        {"rtol": 1e-6},
    ),
    "F08": (without_a_floor, {"rtol": 1e-5}),
}


@pytest.mark.parametrize("name", PUBLISHED)
def test_published(name: str) -> None:
    function, tolerance = PUBLISHED[name]
    case = CASES[name]
    found, expected = jax.jit(partial(function, **case["inputs"]))(), case["expected"]
    if isinstance(expected, dict) and not isinstance(found, dict):
        expected = expected["f32"]
    if not isinstance(expected, dict):
        found, expected = {"value": found}, {"value": expected}
    for key, value in found.items():
        np.testing.assert_allclose(value, np.float64(expected[key]), **tolerance)


def test_published_elements_of_keras() -> None:
    """S02 before the mean: one rounding below 1 is the clip of what is right."""
    case = CASES["S02"]
    losses = stack_overflow(epsilon=1e-7, reduction="none")(**case["inputs"])
    np.testing.assert_allclose(losses, case["expected"]["per_element"], rtol=oracle.PUBLISHED)


@pytest.mark.parametrize("dtype", [FLOAT64], ids=str, indirect=True)
def test_published_in_float64(dtype: np.dtype) -> None:
    """tf.keras 2, and PyTorch's logarithm of at least -100, which has no name in float32."""
    p, y = np.array([1, 1, 0], FLOAT64), [1, 1, 1]
    both = compiled(jax_bce.loss_from_probs, p, labels=y, epsilon=1e-7, log_epsilon=1e-7)
    np.testing.assert_allclose(both, CASES["S01"]["expected"]["f64"], rtol=oracle.PUBLISHED)
    floor = compiled(jax_bce.loss_from_probs, p, labels=y, log_epsilon=np.exp(-100.0))
    np.testing.assert_allclose(floor, CASES["S03"]["expected"], rtol=oracle.PUBLISHED)


@pytest.mark.parametrize("name", ["T03", "T04", "T05"])
@pytest.mark.parametrize("dtype", [FLOAT32, FLOAT64], ids=str, indirect=True)
def test_published_pos_weight(check, platform: str, dtype: np.dtype, name: str) -> None:
    """To 4 ulp; decimal inputs are only those of the case in float64."""
    case = CASES[name]
    x, y = (np.array(v, dtype) for v in list(case["inputs"].values())[:2])
    q = case["inputs"].get("pos_weight", 3.0)
    loss, grad = jax_bce.loss_and_grad(x, y, pos_weight=q, reduction="none")
    _, hess = jax_bce.grad_and_hess(x, y, pos_weight=q)
    exact_element = oracle.exact(x, y, pos_weight=q)
    found = {"loss": loss, "grad": grad, "hess": hess}
    own = {"loss": "loss", "grad": "gradient", "hess": "hessian"}
    for key, value in case["expected"].items():
        if np.any(x.astype(FLOAT64) != next(iter(case["inputs"].values()))):
            value = getattr(exact_element, own[key])
        check.ulps(f"published {key}, pos_weight", found[key], np.asarray(value), 4)


# --- derivatives in everything else --------------------------------------------------------------

# Where a label's own derivative is not that of a vanishing probability.
NEAR = np.array([-25, -17, -5, -1, 0.5, 2, 10, 18, 25], FLOAT32)[:, None]


def compare_by(check, relative: Callable, definition: Callable, by: str, others: dict) -> None:
    """The derivative in one argument, at hard labels the limit of those at labels nearby."""
    arguments = {"logits": NEAR, "labels": np.array([0, 1, 0.1, 0.75], FLOAT32), **others}
    arguments = {name: np.broadcast_to(v, (len(NEAR), 4)) for name, v in arguments.items()}

    def of(value):
        return jnp.sum(relative(**{**arguments, by: value}, reduction="none"))

    found = jax.jit(jax.grad(of))(arguments[by])
    value, expected, _ = exact(definition, *arguments.values(), by=list(arguments).index(by))
    value, expected = value.astype(np.float64), expected.astype(np.float64)
    scale = np.maximum(value, abs(expected))
    inputs = (arguments["logits"], arguments["labels"])
    name = f"{relative.__name__} by {by}"
    check.ulps(name, found, expected, oracle.IN_ARGUMENTS, scale=scale, flushes=True, inputs=inputs)


@pytest.mark.parametrize("by", ["labels", "gamma", "alpha"])
def test_focal_by(check, by: str) -> None:
    others = {"gamma": np.float32(2), "alpha": np.float32(0.5)}

    def twice(**arguments):
        return 2 * jax_bce.focal_loss(**arguments)

    twice.__name__ = "focal_loss"
    compare_by(check, twice, focal, by, others)


@pytest.mark.parametrize(
    ("by", "clip"),
    [
        *((by, clip) for by in ("labels", "gamma_neg", "gamma_pos") for clip in (0, 0.05)),
        ("clip", 0.05),
    ],
)
def test_asymmetric_by(check, by: str, clip: float) -> None:
    others = {"gamma_neg": np.float32(4), "gamma_pos": np.float32(1), "clip": np.float32(clip)}
    compare_by(check, jax_bce.asymmetric_loss, asymmetric, by, others)


@pytest.mark.parametrize("clip", [0.0, 0.05])
def test_asymmetric_with_a_constant_power(check, clip: float) -> None:
    """stop_gradient_weight: the value is the same, the gradient that of the entropy alone."""
    with pytest.raises(TypeError, match="stop_gradient_weight must be True or False"):
        jax_bce.asymmetric_loss(np.ones(2, np.float32), 0, stop_gradient_weight="no")
    x, y = np.broadcast_arrays(NEAR, np.array([0, 1, 0.1, 0.5], FLOAT32))
    of = partial(jax_bce.asymmetric_loss, labels=y, clip=clip, reduction="none")
    clip = np.float32(clip)
    constant = partial(of, stop_gradient_weight=True)
    found = compiled(jax.grad(lambda x: jnp.sum(constant(x))), x)
    _, expected, _ = exact(asymmetric, x, y, 4, 1, clip, x)
    _, scale, _ = asymmetric_scales(x, y, 4, 1, clip)
    compare(
        check,
        "asymmetric gradient, constant power",
        found,
        expected,
        scale,
        oracle.ASYMMETRIC,
        (x, y),
    )
    oracle.assert_same_bits(compiled(constant, x), compiled(of, x))


def test_easy_negatives_are_dropped() -> None:
    """Below the clip neither the value nor any derivative is anything but 0."""
    logits = np.array([-2.95, -5, -100, -1e4], FLOAT32)
    for result in derivatives(partial(jax_bce.asymmetric_loss, labels=0, reduction="none"))(logits):
        assert not np.asarray(result).any()
    above = compiled(jax.grad(jax_bce.asymmetric_loss), np.float32(-2.9), labels=0)
    assert above > 0


# --- the rules of the loss -----------------------------------------------------------------------

RELATIVES = {
    "focal": partial(jax_bce.focal_loss, alpha=0.25),
    "asymmetric": jax_bce.asymmetric_loss,
    "probabilities": jax_bce.loss_from_probs,
}


@pytest.fixture(params=RELATIVES)
def relative(request: pytest.FixtureRequest) -> Callable:
    return RELATIVES[request.param]


def scores(relative: Callable, shape: tuple[int, ...], dtype=FLOAT32) -> np.ndarray:
    """Logits, or probabilities for what takes those."""
    logits = oracle.random_logits(FLOAT32, shape, 0, scale=2)
    return (
        logits if relative is not RELATIVES["probabilities"] else 1 / (1 + np.exp(-logits))
    ).astype(dtype)


MASK = np.array([True, True, False, True])
RULES = {
    "mean": {},
    "sum": {"reduction": "sum"},
    "elements": {"reduction": "none"},
    "axis": {"axis": 0},
    "axes": {"axis": (2, -3), "reduction": "sum"},
    "normalizer": {"normalizer": np.float32(7)},
    "normalizer for each": {
        "normalizer": np.arange(1, 7, dtype=np.float32).reshape(2, 3),
        "axis": 0,
    },
    "weight": {"weight": np.array([1, 2, 0.5], FLOAT32)},
    "sample_weight": {"sample_weight": np.array([1, 0, 2, 3], np.uint8), "axis": (0, 1)},
    "weighted_mean": {
        "weight": np.array([[1, 2, 0.5], [3, 0, 1]], FLOAT32),
        "sample_weight": np.array([1, 0.25, 2, 3], FLOAT32),
        "reduction": "weighted_mean",
    },
    "where": {"where": MASK},
    "where, weighted mean": {
        "where": MASK[:, None, None],
        "sample_weight": np.array([1, 0.25, 2, 3], FLOAT32),
        "reduction": "weighted_mean",
        "axis": 0,
    },
    "ignore_label": {"ignore_label": 1, "axis": -1},
    "ignore_label, where": {"ignore_label": 0, "where": MASK, "weight": 2.0, "reduction": "none"},
    "nothing left": {"where": np.zeros((4, 2, 3), bool)},
}


def combine(
    values: np.ndarray,
    labels: np.ndarray,
    weight=1.0,
    sample_weight=1.0,
    where=True,
    ignore_label=None,
    reduction="mean",
    axis=None,
    normalizer=None,
) -> np.ndarray:
    """What NumPy makes of the elements."""

    def leading(v):
        v = np.asarray(v)
        return np.broadcast_to(v.reshape(v.shape + (1,) * (values.ndim - v.ndim)), values.shape)

    keep = leading(where) & (labels != ignore_label)
    factors = np.where(keep, np.float64(weight) * leading(sample_weight), 0)
    values = np.where(keep, values * factors, 0)
    if reduction == "none":
        return values
    counts = {"mean": keep, "weighted_mean": factors, "sum": np.nan}[reduction]
    divisor = np.sum(counts, axis=axis) if reduction != "sum" else 1.0
    divisor = divisor if normalizer is None else normalizer
    total = np.sum(values, axis=axis)
    return np.where(divisor == 0, 0, total / np.where(divisor == 0, 1, divisor))


def test_rules(check, relative: Callable) -> None:
    """Weights, masks, reductions and denominators are those of the loss."""
    x, y = scores(relative, (4, 2, 3)), oracle.random_labels(np.int8, (4, 2, 3), 1)

    @partial(jax.jit, compiler_options=platforms.QUICKLY)
    def every(x, y):
        return {rule: relative(x, y, **RULES[rule]) for rule in RULES}

    found = every(x, y)
    elements = np.asarray(found["elements"], np.float64)
    for rule in RULES:
        expected = combine(elements, y, **RULES[rule])
        check.reduced("xla", found[rule], expected, f"a relative, {rule}")


def test_smoothed_labels(check, relative: Callable) -> None:
    """Smoothed before anything else is made of them."""
    x, y = scores(relative, (4, 3)), oracle.random_labels(np.uint8, (4, 3), 1)
    found = compiled(relative, x, y, label_smoothing=0.25, reduction="none")
    smoothed = y * np.float32(0.75) + np.float32(0.125)
    expected = compiled(relative, x, smoothed, reduction="none")
    check.reduced("xla", found, np.asarray(expected, np.float64), "a relative, smoothed")


def test_16_bit(relative: Callable) -> None:
    """Reduced losses are float32, elements and gradients have the logits' dtype, rounded once."""
    y = oracle.random_labels(np.uint8, (4, 300), 1)

    @partial(jax.jit, compiler_options=platforms.QUICKLY)
    def every(x):
        of = partial(relative, labels=y)
        gradient = jax.grad(partial(of, reduction="sum"))(x)
        return of(x), of(x, reduction="none"), gradient

    for dtype in FLOAT16, BFLOAT16:
        x = scores(relative, (4, 300), dtype)
        mean, *elements = every(x.astype(FLOAT32))
        oracle.assert_same_bits(every(x), (mean, *(v.astype(dtype) for v in elements)))
        assert jax.eval_shape(partial(relative, dtype=dtype), x, y).dtype == dtype


@pytest.mark.parametrize("dtype", [FLOAT64], ids=str, indirect=True)
def test_float64(check, relative: Callable, dtype: np.dtype) -> None:
    x, y = scores(relative, (5, 7), FLOAT64), oracle.random_labels(FLOAT64, (5, 7), 1)
    found = compiled(relative, x, y, reduction="none")
    assert found.dtype == jax.eval_shape(relative, x, y).dtype == FLOAT64
    if relative is RELATIVES["focal"]:
        value, scale, bound = (
            exact(focal, x, y, 2, 0.25)[0] / 2,
            focal_scales(x, y, 2),
            oracle.FOCAL,
        )
    elif relative is RELATIVES["asymmetric"]:
        value, scale = (
            of(x, y, 4, 1, 0.05) for of in (partial(exact, asymmetric), asymmetric_scales)
        )
        value, bound = value[0], oracle.ASYMMETRIC
    else:
        value, scale, bound = (
            exact(of_probability, x, y)[0],
            [None],
            oracle.ARITHMETIC,
        )
    value = value.astype(np.float64)
    check.ulps("a relative in float64", found, value, bound, scale=scale[0], inputs=(x, y))


@pytest.mark.parametrize("mask", ["where", "ignore_label"])
def test_nothing_of_a_dropped_element_is_seen(relative: Callable, mask: str) -> None:
    """Neither its logit, nor its label, nor its weights: all results have the same bits."""
    x, y = scores(relative, (3, 4)), oracle.random_labels(FLOAT32, (3, 4), 1)
    y[1] = -1
    options = {"where": np.array([True, False, True])} if mask == "where" else {"ignore_label": -1}

    @partial(jax.jit, compiler_options=platforms.QUICKLY)
    def evaluate(*operands):
        def of(x, y, weight, sample_weight):
            options_of = partial(relative, x, y, **options, label_smoothing=0.1)
            return sum(
                jnp.sum(options_of(weight=weight, sample_weight=sample_weight, reduction=r))
                for r in ("none", "weighted_mean")
            )

        return jax.value_and_grad(of, range(4))(*operands)

    operands = (x, y, np.ones((3, 4), FLOAT32), np.array([1, 2, 3], FLOAT32))
    expected = evaluate(*operands)
    assert np.isfinite(expected[0])
    assert not any(np.asarray(gradient)[1].any() for gradient in expected[1])
    for bad in np.nan, np.inf, -np.inf:
        spoilt = [operand.copy() for operand in operands]
        for values in spoilt[:1] + spoilt[2:] if mask == "ignore_label" else spoilt:
            values[1] = bad
        oracle.assert_same_bits(evaluate(*spoilt), expected)


def test_a_weight_of_zero_wins_over_an_infinite_loss() -> None:
    """Value and gradient."""
    for of in (
        lambda x: jax_bce.focal_loss(x, [0, 1, 1], weight=np.float32([0, 0, 1])),
        lambda x: jax_bce.asymmetric_loss(x, [0, 1, 1], weight=np.float32([0, 0, 1])),
    ):
        logits = np.array([np.inf, -np.inf, 0], FLOAT32)
        value, gradient = compiled(jax.value_and_grad(of), logits)
        assert 0 < value < 1
        assert np.asarray(gradient)[2] < 0
        assert not np.asarray(gradient)[:2].any()


# --- probabilities -------------------------------------------------------------------------------

PROBABILITIES = np.array([1e-30, 1e-7, 0.01, 0.3, 0.5, 0.9, 1 - 2**-12, 1 - 2**-24], FLOAT32)


@pytest.mark.parametrize("label", [0, 1, 0.25])
@pytest.mark.parametrize("pos_weight", [None, 3.0])
def test_probabilities(check, label: float, pos_weight: float | None) -> None:
    """Logarithms without a floor, and log1p of what is nearly nothing; first derivatives, too."""
    of = partial(
        jax_bce.loss_from_probs, labels=np.float32(label), pos_weight=pos_weight, reduction="none"
    )
    found = derivatives(of)(PROBABILITIES)
    expected = exact(of_probability, PROBABILITIES, label, pos_weight or 1)
    for what, actual, value in zip(ORDERS[:2], found, expected, strict=False):
        value = value.astype(np.float64)
        check.ulps(
            f"{what} of probabilities", actual, value, oracle.ARITHMETIC, inputs=(PROBABILITIES,)
        )


def test_probabilities_of_0_and_1() -> None:
    """Infinite where they are wrong, with a finite gradient of 1 where they are right."""
    probs, labels = np.array([0, 1, 0, 1], FLOAT32), np.array([0, 1, 1, 0])
    losses = compiled(jax_bce.loss_from_probs, probs, labels, reduction="none")
    np.testing.assert_array_equal(losses, [0, 0, np.inf, np.inf])
    of = partial(jax_bce.loss_from_probs, labels=labels[:2], reduction="none")
    np.testing.assert_array_equal(derivatives(of)(probs[:2]), [[0, 0], [1, -1], [1, 1]])
    dropped = {"where": np.array([True, True, False, False]), "reduction": "sum"}
    of = jax.value_and_grad(partial(jax_bce.loss_from_probs, labels=labels, **dropped))
    value, gradient = compiled(of, probs)
    np.testing.assert_array_equal([value, *gradient], [0, 1, -1, 0, 0])


def rounded(dtype: np.dtype) -> float:
    """The bound of an element by XLA's arithmetic, rounded once to the dtype."""
    bound = oracle.ARITHMETIC * oracle.ulp_of_arithmetic(dtype)
    return bound + oracle.ROUNDED * (oracle.arithmetic_dtype(dtype) != dtype)


@jax.jit  # one program for every shift
def shifted(p, shift, label) -> tuple:
    """The losses, and their derivatives with respect to both."""

    def of(p, shift):
        return jax_bce.loss_from_probs(p, label, log_epsilon=shift, reduction="none")

    gradients = jax.grad(lambda *operands: jnp.sum(of(*operands)), (0, 1))
    return of(p, shift), gradients(p, shift)


@pytest.mark.parametrize("shift", [0.0, 1e-12, 1e-7, 1e-3])
def test_both_logarithms_are_exact(check, dtype: np.dtype, shift: float) -> None:
    """Neither p + log_epsilon nor 1 - p + log_epsilon is rounded: value, gradient, by the shift."""
    rng = np.random.default_rng(0)
    small = 10 ** rng.uniform(-6, -0.3, 60)
    probs = oracle.round_to([*small, *(1 - small), *rng.uniform(0, 1, 60)], dtype)
    probs = probs[(probs > 0) & (probs < 1)]
    shift = np.asarray(shift, oracle.arithmetic_dtype(dtype))
    shifts = np.full(probs.shape, shift)
    for label in 0.0, 1.0, 0.25:
        value, (by_p, by_shift) = shifted(probs, shifts, label)
        arguments = (probs, label, 1, shifts)
        expected = exact(of_probability, *arguments)[:2]
        expected = (*expected, exact(of_probability, *arguments, by=3)[1])
        largest = np.maximum(
            label / (probs + shift), (1 - label) / (1 - probs.astype(float) + shift)
        )
        for what, actual, own, scale in zip(
            ("loss", "gradient", "by the shift"),
            (value, by_p, by_shift),
            expected,
            (None, largest, largest),
            strict=True,
        ):
            own = own.astype(np.float64)
            bound = rounded(np.asarray(actual).dtype)
            check.ulps(f"shifted {what}", actual, own, bound, scale=scale, inputs=(probs,))


tf_keras = jax.jit(
    partial(jax_bce.loss_from_probs, epsilon=1e-7, log_epsilon=1e-7, reduction="none")
)


@pytest.mark.parametrize("prob", [0.0, 1e-9, 1e-7, 1e-3, 0.4, 0.5, 0.9, 1 - 1e-6, 1 - 1e-7, 1.0])
def test_log_epsilon_is_that_of_tf_keras(prob: float) -> None:
    """Its formula in float64, of the probability that it clips in float32."""
    prob, epsilon = np.float32(prob), np.float32(1e-7)
    clipped = np.float64(np.clip(prob, epsilon, 1 - epsilon))
    found = tf_keras(np.full(2, prob), np.float32([1, 0]))
    expected = -np.log(np.array([clipped, 1 - clipped]) + 1e-7)
    np.testing.assert_allclose(found, expected, rtol=oracle.PUBLISHED, atol=oracle.PUBLISHED)


OUTSIDE = [-np.inf, -1, -1e-3, -1e-40, 1.01, 1.5, 2, np.inf, np.nan]
OUTSIDE_OPTIONS = {
    "plain": {},
    "pos_weight": {"pos_weight": np.float32(2)},
    "weight of 0, smoothed": {"weight": np.float32(0), "label_smoothing": 0.1},
    "mean, shifted": {"reduction": "mean", "log_epsilon": 1e-3},
    "weighted_mean": {"reduction": "weighted_mean", "weight": np.float32(2)},
}


@pytest.mark.parametrize("dtype", [FLOAT32, FLOAT64], ids=str, indirect=True)
@pytest.mark.thorough
def test_what_is_no_probability_is_nan(dtype: np.dtype) -> None:
    """For every label, option and derivative; but clipped, or dropped, it is not."""
    if dtype == FLOAT64:
        outside = np.array([-5e-324, 1 + 2**-52], dtype)[:, None]
    else:
        outside = np.array(OUTSIDE, FLOAT32).astype(dtype)[:, None]
    labels = np.float32([0, 1, 0.3])

    @jax.jit
    def every(p):
        def alone(of):  # one probability with each label
            value_and_gradient = jax.value_and_grad(of, (0, 1))
            second = jax.grad(jax.grad(of))
            each = jax.vmap(lambda p, y: (value_and_gradient(p, y), second(p, y)))
            return each(jnp.repeat(p, len(labels)), jnp.tile(labels, len(p)))

        options = [{"reduction": "sum", **options} for options in OUTSIDE_OPTIONS.values()]
        return [
            alone(lambda p, y, options=options: jax_bce.loss_from_probs(p[None], y, **options))
            for options in options
        ]

    for name, found in zip(OUTSIDE_OPTIONS, every(outside), strict=True):
        assert all(np.isnan(np.asarray(v)).all() for v in jax.tree.leaves(found)), name
    clipped = jax_bce.loss_from_probs(outside[:3], 0.5, epsilon=0.1, reduction="none")
    assert np.isfinite(np.asarray(clipped)).all()
    dropped = partial(jax_bce.loss_from_probs, labels=1, where=np.zeros(outside.shape, bool))
    value, gradient = compiled(jax.value_and_grad(dropped), outside)
    assert value == 0
    assert not np.asarray(gradient).any()


@pytest.mark.parametrize("dtype", oracle.FLOATS, ids=str, indirect=True)
@pytest.mark.thorough
def test_subnormal_probabilities(check, dtype: np.dtype) -> None:
    """Read through their bits, in every mode; 1 / p stops at the largest finite number."""
    info = ml_dtypes.finfo(dtype)
    smallest, tiny = float(info.smallest_subnormal), float(info.tiny)
    probs = oracle.round_to([smallest, 3 * smallest, tiny / 3, tiny - smallest, tiny], dtype)
    of = partial(jax_bce.loss_from_probs, labels=1, reduction="none")
    gradient = jax.grad(lambda p: jnp.sum(of(p)))
    # The other label's logarithm drops out, with all its derivatives.
    zero = jax.grad(partial(jax_bce.loss_from_probs, labels=0, reduction="sum"))

    @jax.jit
    def every(p):
        losses = {
            "compiled": of(p),
            "clipped at a constant, compiled": of(p, epsilon=0.0),
            "clipped in a sum, compiled": jax.vmap(partial(of, epsilon=0.0, reduction="sum"))(
                p[:, None]
            ),
        }
        slopes = gradient(p), jax.jvp(of, (p,), (jnp.ones_like(p),))[1]
        second = jax.grad(lambda p: jnp.sum(gradient(p)))(p)
        return losses, slopes, second, zero(p), jax.grad(lambda p: jnp.sum(zero(p)))(p)

    losses, slopes, second, *of_zero = every(probs)
    losses |= {
        "as it is": of(probs),
        "mapped": jax.vmap(of)(probs),
        "clipped": of(probs, epsilon=0.0),
    }
    slopes = (*slopes, gradient(probs))
    wide = probs.astype(np.float64)
    for how, loss in losses.items():
        check.ulps(f"subnormal, {how}", loss, -np.log(wide), rounded(dtype))
    with np.errstate(over="ignore"):
        exact_slopes = np.maximum(-1 / wide, -oracle.largest_derivative(dtype))
    for slope in slopes:
        check.ulps("subnormal gradient", slope, exact_slopes, rounded(dtype))
    if dtype != FLOAT16:  # whose range the exact ones exceed
        assert np.isfinite(np.asarray(slopes, np.float64)).all()
        assert np.isfinite(np.asarray(second, np.float64)).all()
    assert (np.asarray(second) > 0).all()
    np.testing.assert_array_equal(of_zero, np.ones((2, *probs.shape)))


def test_a_weight_of_zero_drops_an_infinite_loss_of_probabilities() -> None:
    of = partial(jax_bce.loss_from_probs, labels=[1, 0], weight=np.float32([0, 0]), reduction="sum")
    value, gradient = compiled(jax.value_and_grad(of), np.float32([0, 1]))
    np.testing.assert_array_equal([value, *gradient], [0, 0, 0])


def test_clipped_probabilities(check) -> None:
    """As Keras 3 has it: no gradient beyond the clip, and that of the definition within."""
    probs = np.array([0, 1e-8, 1e-6, 0.5, 1, -0.1, 1.1], FLOAT32)
    of = partial(jax_bce.loss_from_probs, labels=1, epsilon=1e-7, reduction="none")
    value, gradient, _ = derivatives(of)(probs)
    clipped = np.clip(probs, np.float32(1e-7), 1 - np.float32(1e-7))
    expected = exact(of_probability, clipped, 1)
    check.ulps("clipped probabilities", value, expected[0].astype(np.float64), oracle.ARITHMETIC)
    slope = np.where(clipped == probs, expected[1].astype(np.float64), 0)
    check.ulps("gradient of clipped probabilities", gradient, slope, oracle.ARITHMETIC)
    assert np.isnan(compiled(jax_bce.loss_from_probs, np.float32(-0.1), labels=1))


def test_clipped_at_a_subnormal_number(check) -> None:
    probs = np.array([0, 1e-45, 1e-41, 1e-39, 0.5], FLOAT32)
    epsilon = np.float32(1e-40)
    of = partial(jax_bce.loss_from_probs, labels=1, epsilon=epsilon, reduction="none")
    exact_losses = -np.log(np.maximum(probs, epsilon).astype(np.float64))
    check.ulps("clipped at a subnormal", of(probs), exact_losses, oracle.ARITHMETIC)
    check.ulps("clipped at a subnormal", compiled(of, probs), exact_losses, oracle.ARITHMETIC)


@pytest.mark.parametrize("dtype", [FLOAT16, BFLOAT16], ids=str)
def test_16_bit_probabilities_are_clipped_in_float32(dtype: np.dtype) -> None:
    """1 - 1e-7 is 1 in 16 bits, and 1 - p then 0, whose logarithm Keras takes."""
    probs = np.array([0, 1], dtype)
    of = partial(jax_bce.loss_from_probs, labels=np.array([1, 0]), epsilon=1e-7, reduction="sum")
    value, gradient = compiled(jax.value_and_grad(of), probs)
    # 1 - 1e-7 is 1 - 2^-23 in float32.
    np.testing.assert_allclose(value, 7 * np.log(10) + 23 * np.log(2), rtol=oracle.PUBLISHED)
    assert not np.asarray(gradient).any()
