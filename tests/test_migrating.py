"""docs/migrating.md says what is so, and the three scripts that were ported train as they say.

Every code of its tables is evaluated, and equals what stands beside it. Every number of a last
column is computed; those of a peer as well, where no test of another file compares with the peer
itself. `STAND_INS` are the formulas of the peers that are not installed.
"""

import os
import re
import runpy
import sys
from collections.abc import Callable
from functools import cache, partial
from pathlib import Path
from types import SimpleNamespace
from typing import Any, NamedTuple

os.environ["KERAS_BACKEND"] = "jax"  # read when Keras is imported

import jax
import jax.numpy as jnp
import keras
import numpy as np
import optax
import oracle
import pytest
from sklearn.metrics import log_loss

import jax_bce

pytestmark = [
    pytest.mark.quickly,
    pytest.mark.any_jax,
    # From Keras's own variables, as NumPy 2 reads them.
    pytest.mark.filterwarnings("ignore:__array__ implementation:DeprecationWarning"),
]

ROOT = Path(__file__).parent.parent
SECTIONS = re.split(r"^##? ", (ROOT / "docs/migrating.md").read_text(), flags=re.M)[1:]
CODE, SPAN = re.compile(r"```python\n(.*?)```", re.S), re.compile(r"`([^`]+)`")
INF, NAN = np.inf, np.nan


class Row(NamedTuple):
    section: str
    cells: list[str]


ROWS = [
    Row(section.split("\n")[0], line.strip("| ").split(" | "))
    for section in SECTIONS
    for line in section.split("\n")
    if line.startswith("| ") and not line.startswith("| ---")
]
HEADS = ("now", "optax", "Keras", "PyTorch", "torchvision, timm", "peer", "scikit-learn", "by hand")
CALLS = [row for row in ROWS if len(row.cells) == 2 and row.cells[0] not in HEADS]
DIFFERENCES = [r for r in ROWS if len(r.cells) == 3 and not r.cells[0].startswith("difference")]


def in_logarithms(x: jax.Array, y: jax.Array, floor: float = 0.0) -> jax.Array:
    p = jax.nn.sigmoid(x)
    return -(y * jnp.log(p + floor) + (1 - y) * jnp.log(1 - p + floor))


def with_abs(x: jax.Array, y: jax.Array) -> jax.Array:
    return jnp.maximum(x, 0) - x * y + jnp.log1p(jnp.exp(-jnp.abs(x)))


def with_softplus(x: jax.Array, y: jax.Array) -> jax.Array:
    return jax.nn.softplus(x) - x * y


def weighted_tf(x: jax.Array, y: jax.Array, q: float) -> jax.Array:
    log = jnp.log1p(jnp.exp(-abs(x))) + jax.nn.relu(-x)
    return (1 - y) * x + (1 + (q - 1) * y) * log


def with_log_sigmoid(x: jax.Array, y: jax.Array) -> jax.Array:
    return -(y * jax.nn.log_sigmoid(x) + (1 - y) * jax.nn.log_sigmoid(-x))


def scenic(logits, labels, weights=None, label_weights=1.0, normalized: bool = True) -> jax.Array:
    losses = with_log_sigmoid(logits, labels) * label_weights
    count = labels[..., 0].size if weights is None else weights.sum()
    losses = losses if weights is None else losses * weights[:, None]
    return losses.sum() / count if normalized else losses


def focal(x, y, alpha: float = 0.25, gamma: float = 2, reduction: str = "none") -> jax.Array:
    p = jax.nn.sigmoid(x)
    losses = with_abs(x, y) * (1 - (p * y + (1 - p) * (1 - y))) ** gamma
    losses = losses * (alpha * y + (1 - alpha) * (1 - y)) if alpha >= 0 else losses
    return losses.sum() if reduction == "sum" else losses


def timm(smoothing: float = 0.1, target_threshold: float | None = None, pos_weight=1.0) -> Callable:
    def loss(x: jax.Array, y: jax.Array) -> jax.Array:
        if y.shape != x.shape:
            classes = x.shape[-1]
            y = jnp.eye(classes)[y] * (1 - smoothing) + smoothing / classes
        y = y if target_threshold is None else 1.0 * (y > target_threshold)
        return weighted_tf(x, y, pos_weight).mean()

    return loss


def asymmetric(reduction: str = "batchmean") -> Callable:
    def loss(x: jax.Array, y: jax.Array) -> jax.Array:
        p = jax.nn.sigmoid(x)
        q = jnp.minimum(1 - p + 0.05, 1)
        losses = y * jnp.log(jnp.maximum(p, 1e-8)) + (1 - y) * jnp.log(jnp.maximum(q, 1e-8))
        losses *= -((1 - (p * y + q * (1 - y))) ** (y + 4 * (1 - y)))
        return losses.sum() / (len(x) if reduction == "batchmean" else 1)

    return loss


def xgboost(x: jax.Array, y: jax.Array, scale_pos_weight: float = 1.0) -> tuple:
    p, w = jax.nn.sigmoid(x), 1 + (scale_pos_weight - 1) * y
    return (p - y) * w, jnp.maximum(p * (1 - p), 1e-16) * w


STAND_INS = {
    "tf": SimpleNamespace(
        nn=SimpleNamespace(
            sigmoid_cross_entropy_with_logits=lambda labels, logits: with_abs(logits, labels),
            weighted_cross_entropy_with_logits=lambda labels, logits, pos_weight: weighted_tf(
                logits, labels, pos_weight
            ),
        )
    ),
    "torchvision": SimpleNamespace(ops=SimpleNamespace(sigmoid_focal_loss=focal)),
    "timm": SimpleNamespace(
        loss=SimpleNamespace(BinaryCrossEntropy=timm, AsymmetricLossMultiLabel=asymmetric)
    ),
    "scenic": SimpleNamespace(
        weighted_sigmoid_cross_entropy=scenic,
        weighted_unnormalized_sigmoid_cross_entropy=partial(scenic, normalized=False),
    ),
    "big_vision": SimpleNamespace(
        sigmoid_xent=lambda logits, labels: with_log_sigmoid(logits, labels).sum(-1).mean()
    ),
}


@cache
def names() -> dict[str, Any]:
    found = {"optax": optax, "keras": keras, "log_loss": log_loss, **STAND_INS}
    exec(CODE.search(SECTIONS[0])[1], found)
    return found


def of_torch() -> dict[str, Any]:
    import torch

    arrays = {
        k: torch.tensor(np.asarray(v)) for k, v in names().items() if isinstance(v, jax.Array)
    }
    return {"nn": torch.nn, "F": torch.nn.functional, **arrays}


def compiled(codes: list[str]) -> list[Any]:
    """What each is worth, by one program."""
    found = dict(names())
    return jax.jit(lambda: [eval(code, found) for code in codes])()


def of_peer(code: str, require: Callable[[str], None]) -> Any:
    """What JAX does not compile."""
    if "log_loss" in code:
        return eval(code, dict(names()))
    require("torch")
    return eval(code, of_torch())


@pytest.mark.parametrize("row", CALLS, ids=lambda row: f"{row.section}: {row.cells[0]}")
def test_calls(cpu: str, require: Callable[[str], None], row: Row) -> None:
    theirs, ours = map(SPAN.findall, row.cells)
    ours = [code for code in ours if code.startswith("jax_bce.")]
    assert theirs
    assert ours
    foreign = [code for code in theirs if re.search(r"^(F|nn)\.|log_loss", code)]
    in_jax = [code for code in theirs if code not in foreign]
    values = compiled(ours + in_jax)
    actual, expected = values[: len(ours)], values[len(ours) :]
    for value in expected + [of_peer(code, require) for code in foreign]:
        for own in actual:
            assert_close = partial(np.testing.assert_allclose, rtol=oracle.SURROUNDINGS)
            jax.tree.map(assert_close, own, value)


def test_no_code_is_passed_over() -> None:
    """All of the right-hand column, but for the one word that names an option."""
    spans = [span for row in CALLS for span in SPAN.findall(row.cells[1])]
    assert [span for span in spans if not span.startswith("jax_bce.")] == ["label_smoothing"]
    assert len(CALLS) > 40


def test_a_keras_model_loses_its_sigmoid(cpu: str) -> None:
    """By the page's code, in the three ways that it names."""
    (section,) = (s for s in SECTIONS if s.startswith("Keras 3"))
    layers = [keras.layers.Dense(1), keras.layers.Activation("sigmoid")]
    found = names() | {"model": keras.Sequential([keras.Input((4,)), *layers])}
    probabilities = found["model"](logits := np.asarray(names()["logits"]))
    (earlier,) = re.findall(r"`(keras\.Model\(.*?\))`", section)
    ways = [eval(earlier, found)(logits), jax_bce.logits_of(found["model"])(logits)]
    exec(CODE.search(section)[1], found)
    assert_close = partial(np.testing.assert_allclose, rtol=oracle.SURROUNDINGS)
    for scores in (*ways, found["model"].predict(logits, verbose=0)):
        assert_close(jax.nn.sigmoid(scores), probabilities)
    labels = np.array([[1], [0], [1]])
    expected = keras.metrics.BinaryAccuracy()(labels, probabilities)
    values = found["model"].evaluate(logits, labels, verbose=0, return_dict=True)
    assert_close(values["binary_accuracy"], expected)


def test_metrics_of_logits_in_keras(cpu: str) -> None:
    """Those that the page names see logits as Keras's defaults see probabilities, which differ."""
    (section,) = (s for s in SECTIONS if s.startswith("Keras 3"))
    codes = set(re.findall(r"`(keras\.metrics\.\w+\(\w+=\w+\))`", section))
    assert len(codes) == 5
    docstring = jax_bce.keras.BinaryCrossentropy.__doc__
    for call in re.findall(r"``([\w.]+\((?:thresholds?=0|from_logits=True)\))``", docstring):
        codes.add(f"keras.metrics.{call.removeprefix('keras.metrics.')}")
    assert len(codes) == 5
    scores = oracle.random_logits(np.float32, (64, 1), 3) / 10
    labels = np.asarray(np.abs(scores) % 1 < jax.nn.sigmoid(scores), np.float32)
    for code in codes:
        expected = eval(f"{code.partition('(')[0]}()", names())(labels, jax.nn.sigmoid(scores))
        of_logits = eval(code, names())(labels, scores)
        np.testing.assert_allclose(of_logits, expected, rtol=oracle.SURROUNDINGS)
    wrong = keras.metrics.BinaryAccuracy()(labels, scores)
    assert wrong != keras.metrics.BinaryAccuracy(threshold=0)(labels, scores)


PROBLEMS = (ROOT / "docs/problems.md").read_text()
OTHER_NAMES = [
    line.strip("| ").split(" | ")
    for line in PROBLEMS.partition("| there |")[2].partition("\n## ")[0].split("\n")[2:]
    if line
]


@pytest.mark.parametrize("row", OTHER_NAMES, ids=lambda row: row[0])
def test_what_other_libraries_call_a_keyword(row: list[str]) -> None:
    """Python refuses their names, and takes ours."""
    theirs, ours = map(SPAN.findall, row)
    found = names() | {"w0": 0.5, "w1": 2.0, "w": 3.0, "m": jnp.ones(3, bool)}
    for code in theirs:
        with pytest.raises(TypeError, match=f"unexpected keyword argument '{code.split('=')[0]}'"):
            eval(f"jax_bce.loss(logits, labels, {code})", found)
    assert ours
    for code in ours:
        called = code if code.startswith("jax_bce.") else "jax_bce.loss"
        eval(called if called == code else f"jax_bce.loss(logits, labels, {code})", found)


def test_a_weight_for_each_class_of_keras() -> None:
    """As class_weight; the ratio alone is it up to the weight of class 0."""
    found = names() | {"w0": 0.5, "w1": 2.0}
    by_class, by_ratio = SPAN.findall(OTHER_NAMES[0][1])
    one = eval(f"jax_bce.loss(logits, labels, {by_class})", found)
    other = found["w0"] * eval(f"jax_bce.loss(logits, labels, {by_ratio})", found)
    np.testing.assert_allclose(one, other, rtol=oracle.SURROUNDINGS)


def test_a_loss_of_ones_own_in_keras(cpu: str) -> None:
    code = re.search(r"`(lambda y_true, y_pred: .*?)`", "".join(SECTIONS))[1]
    arguments = names()["labels"], names()["logits"]
    expected = jax_bce.keras.binary_crossentropy(*arguments, from_logits=True)
    losses = eval(code, names())(*arguments)
    np.testing.assert_allclose(losses, expected, rtol=oracle.SURROUNDINGS)


def test_objective_of_boosting(monkeypatch: pytest.MonkeyPatch) -> None:
    """XGBoost's formula, as NumPy arrays, compiled once; tests/conformance has both libraries."""
    (section,) = (s for s in SECTIONS if s.startswith("XGBoost"))
    found, traces = dict(names()), []
    grad_and_hess = jax_bce.grad_and_hess
    monkeypatch.setattr(
        jax_bce,
        "grad_and_hess",
        lambda *arguments, **options: traces.append(1) or grad_and_hess(*arguments, **options),
    )
    exec(CODE.search(section)[1], found)
    margin, label = np.ravel(found["logits"]), np.ravel(found["labels"])
    for _ in range(2):
        data = SimpleNamespace(get_label=lambda: label, get_weight=lambda: None)
        actual = found["objective"](margin, data)
        assert all(type(array) is np.ndarray for array in actual)
        np.testing.assert_allclose(actual, xgboost(margin, label), rtol=oracle.SURROUNDINGS)
    assert len(traces) == 1


loss = partial(jax_bce.loss, reduction="none")
focal_loss = partial(jax_bce.focal_loss, reduction="none")
keras_loss = jax_bce.keras.BinaryCrossentropy
torch_loss = jax_bce.torch_like.binary_cross_entropy_with_logits
torch_probs = jax_bce.torch_like.binary_cross_entropy


def of_keras(name: str) -> Callable:
    return lambda x, y: getattr(jax_bce.keras, name)(y[None], x[None], from_logits=True)


# Ours and, where no other test asks the peer, theirs, at a logit and a label.
AT: dict[tuple[str, str], tuple[Callable, Callable | None]] = {
    ("optax", ""): (jax_bce.optax.sigmoid_binary_cross_entropy, None),
    ("optax", "focal loss"): (jax_bce.optax.sigmoid_focal_loss, None),
    ("Keras 3", ""): (of_keras("binary_crossentropy"), None),
    ("Keras 3", "focal loss"): (of_keras("binary_focal_crossentropy"), None),
    ("PyTorch", ""): (torch_loss, None),
    ("torchvision and timm", "focal loss, gamma 2, no alpha"): (
        focal_loss,
        partial(focal, alpha=-1),
    ),
    ("torchvision and timm", "focal loss, gamma 0.5, no alpha"): (
        partial(focal_loss, gamma=0.5),
        partial(focal, alpha=-1, gamma=0.5),
    ),
    ("torchvision and timm", "asymmetric loss"): (jax_bce.asymmetric_loss, asymmetric("sum")),
    ("TensorFlow, scenic, big_vision", "TensorFlow"): (loss, with_abs),
    ("TensorFlow, scenic, big_vision", "big_vision and scenic"): (loss, with_log_sigmoid),
    ("XGBoost", ""): (loss, with_softplus),
    ("Written by hand", "logarithms of p"): (loss, in_logarithms),
    ("Written by hand", "logarithms of p + 1e-7"): (loss, partial(in_logarithms, floor=1e-7)),
    ("Written by hand", "softplus(x) - x y"): (loss, with_softplus),
    ("Written by hand", "with abs(x)"): (loss, with_abs),
}


def dropped(masked_mean: Callable) -> jax.Array:
    """The gradient of a logit that is NaN, and dropped."""
    keep = jnp.array([True, False])
    return jax.grad(lambda x: masked_mean(x, jnp.ones(2), keep))(jnp.array([1.0, NAN]))[1]


def where_by_hand(x: jax.Array, y: jax.Array, keep: jax.Array) -> jax.Array:
    return jnp.where(keep, with_softplus(x, y), 0).sum() / keep.sum()


def where_by_us(x: jax.Array, y: jax.Array, keep: jax.Array) -> jax.Array:
    return jax_bce.loss(x, y, where=keep)


def in_float64(function: Callable, x: float, y: int) -> jax.Array:
    with jax.enable_x64(True):
        return function(jnp.array([x], jnp.float64), jnp.array([y]))


TWO, NOTHING = jnp.zeros(2), jnp.zeros(2, bool)
MANY = jnp.full(70_000, -2, jnp.float16), jnp.ones(70_000)
COLUMN, FIVE = jnp.zeros((5, 1)), jnp.zeros(5)
HALVES = np.zeros((70_000, 1))
# The numbers of the last column, one after the other, and that of the peer as above.
OTHERS: dict[str, tuple[list[Callable], Callable | None]] = {
    "bfloat16 logit 100, float32 label 0.999, which optax rounds to 1": (
        [lambda: jax_bce.loss(jnp.bfloat16(100), jnp.float32(0.999))],
        None,
    ),
    "mean, nothing kept": (
        [lambda: where_by_us(TWO, TWO, NOTHING)],
        lambda: jnp.mean(optax.sigmoid_binary_cross_entropy(TWO, TWO), where=NOTHING),
    ),
    "logits of shape (5, 1), labels of shape (5,): the number of losses": (
        [
            lambda: jax_bce.loss(COLUMN, FIVE),
            lambda: jax_bce.optax.sigmoid_binary_cross_entropy(COLUMN, FIVE).size,
        ],
        lambda: optax.sigmoid_binary_cross_entropy(COLUMN, FIVE).size,
    ),
    "probability 1, label 1, in float16": (
        [
            lambda: jax_bce.loss_from_probs(
                jnp.float16(1), 1, epsilon=keras.config.epsilon(), dtype=jnp.float32
            )
        ],
        None,
    ),
    "70,000 losses of 0.693 in float16, mean": (
        [lambda: keras_loss(True, dtype="float16")(HALVES, HALVES)],
        None,
    ),
    "`mean_with_sample_weight` of two losses of 0.693, each with weight 2": (
        [lambda: keras_loss(True, reduction="mean_with_sample_weight")(TWO[:, None], TWO, 2.0)],
        lambda: keras.losses.BinaryCrossentropy(True, reduction="mean_with_sample_weight")(
            TWO[:, None], TWO[:, None], 2.0
        ),
    ),
    "mean of an empty batch, of shape (0, 1)": (
        [lambda: keras_loss(True)(np.zeros((0, 1)), np.zeros((0, 1)))],
        None,
    ),
    "`F.binary_cross_entropy`, probability 0, label 1: the logarithm has a floor": (
        [
            lambda: jax_bce.loss_from_probs(jnp.zeros(1), 1),
            lambda: torch_probs(jnp.zeros(1), jnp.ones(1)),
        ],
        None,
    ),
    "`F.binary_cross_entropy`: its gradient there": (
        [
            lambda: jax.grad(jax_bce.loss_from_probs)(0.0, 1),
            lambda: jax.grad(torch_probs)(0.0, 1.0),
        ],
        None,
    ),
    "mean of no elements": ([lambda: torch_loss(jnp.zeros(0), jnp.zeros(0))], None),
    "sum over 70,000 float16 logits of -2, label 1": (
        [
            lambda: jax_bce.loss(*MANY, reduction="sum"),
            lambda: torch_loss(*MANY, reduction="sum"),
        ],
        None,
    ),
    "probability 0, label 1, float64, which scikit-learn clips at 2.2e-16": (
        [lambda: in_float64(jax_bce.loss_from_probs, 0.0, 1)],
        lambda: log_loss([1], [0.0], labels=[0, 1]),
    ),
    "logit 40, label 0, float64, whose probability is 1": (
        [lambda: in_float64(jax_bce.loss, 40.0, 0)],
        lambda: log_loss([0], [1.0], labels=[0, 1]),
    ),
    "second derivative at (20, 1)": (
        [lambda: jax_bce.grad_and_hess(20.0, 1)[1]],
        lambda: xgboost(jnp.float32(20), 1)[1],
    ),
    "logloss of the logit 40, label 0: the logarithm has a floor": (
        [lambda: jax_bce.loss(40.0, 0, reduction="weighted_mean")],
        lambda: -jnp.log(jnp.maximum(1 - jax.nn.sigmoid(40.0), 1e-16)),
    ),
    "where(keep, losses, 0): gradient of a dropped element, logit nan": (
        [lambda: dropped(where_by_us)],
        lambda: dropped(where_by_hand),
    ),
    "where(keep, losses, 0) / keep.sum(): nothing kept": (
        [lambda: where_by_us(TWO, TWO, NOTHING)],
        lambda: where_by_hand(TWO, TWO, NOTHING),
    ),
}


def at(function: Callable, what: str, logit: str, label: str) -> list[Callable]:
    """Compiled, as in training: outside of jit XLA multiplies gradients, and flushes small ones."""
    x, y = jnp.float32(logit), jnp.float32(label)

    def value(x: jax.Array) -> jax.Array:
        return jnp.squeeze(function(x, y))

    modes = {"loss": value, "gradient": jax.grad(value)}
    wanted = what.split(" and ")
    program = jax.jit(lambda x: {mode: modes[mode](x) for mode in wanted})
    return [lambda mode=mode: program(x)[mode] for mode in wanted]


def assert_shown(cell: str, computed: list[Callable]) -> None:
    """Numbers divided by "; " or ", but ", at their digits; or the name of an error."""
    shown = [re.match(r"\S+", part)[0].rstrip(",") for part in re.split("; |, but ", cell)]
    for text, compute in zip(shown, computed, strict=True):
        if text == "`ValueError`":
            with pytest.raises(ValueError, match="shape"):
                compute()
            continue
        digits = len(re.sub(r"e.*|\D", "", text).lstrip("0")) or 3
        np.testing.assert_equal(float(f"{float(compute()):.{digits}g}"), float(text))


@pytest.mark.parametrize("row", DIFFERENCES, ids=lambda row: f"{row.section}: {row.cells[0]}")
@pytest.mark.thorough
def test_differences(cpu: str, row: Row) -> None:
    what, theirs, ours = row.cells
    if what in OTHERS:
        mine, peer = OTHERS[what]
        expected = peer and [peer]
    else:
        pattern = r"(?:(.+): )?(loss and gradient|loss|gradient) at \((.+), (.+?)\)(?:,.*)?"
        name, *point = re.fullmatch(pattern, what).groups()
        function, peer = AT[row.section, name or ""]
        mine, expected = at(function, *point), peer and at(peer, *point)
    assert_shown(ours, mine)
    if expected:
        assert_shown(theirs, expected)


def test_nan_among_the_inputs_reaches_the_weights(cpu: str) -> None:
    """Though the loss is finite, and the gradient in the logits 0."""
    features = jnp.array([[1.0], [NAN]])
    value, gradient = jax.value_and_grad(
        lambda weights: where_by_us(features @ weights, jnp.ones(2), jnp.array([True, False]))
    )(jnp.ones(1))
    assert np.isfinite(value)
    assert np.isnan(gradient)


def test_differences_are_on_the_page() -> None:
    assert set(OTHERS) <= {row.cells[0] for row in DIFFERENCES}


Run = Callable[..., tuple[dict[str, list[str]], float]]


@pytest.fixture
def run(cpu: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture) -> Run:
    """The columns of a table, and the largest difference; in one process, which imports once."""

    def script(name: str, epochs: int) -> tuple[dict[str, list[str]], float]:
        monkeypatch.setattr(sys, "argv", [name, "--epochs", str(epochs)])
        runpy.run_path(str(ROOT / "examples" / name), run_name="__main__")
        output = capsys.readouterr().out
        lines = [re.split("[│┃]", line) for line in output.split("\n")]
        _, *columns = zip(*(line[1:-1] for line in lines if len(line) > 2), strict=True)
        cells = ([cell.strip() for cell in column] for column in columns)
        largest = re.search(r"largest relative difference between .*: (\S+)", output)
        return {title: values for title, *values in cells}, float(largest[1]) if largest else NAN

    return script


def falls(column: list[str]) -> bool:
    values = list(map(float, column))
    return values == sorted(values, reverse=True) and values[-1] < values[0]


@pytest.mark.thorough
def test_port_optax(run: Run) -> None:
    curves, difference = run("port_optax.py", 3)
    assert curves["optax, times the mask"] == ["nan"] * 3
    assert falls(curves["jax_bce"])
    assert difference <= oracle.SURROUNDINGS


@pytest.mark.thorough
def test_port_keras(run: Run, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("KERAS_BACKEND")
    curves, difference = run("port_keras.py", 10)
    assert os.environ["KERAS_BACKEND"] == "jax"
    accuracy = {name: float(column.pop()) for name, column in curves.items()}
    assert accuracy["Keras, sigmoid"] <= 0.52
    assert accuracy["jax_bce"] == accuracy["Keras, from logits"] >= 0.75
    assert falls(curves["jax_bce"])
    assert difference <= oracle.SURROUNDINGS


@pytest.mark.thorough
def test_port_torch(run: Run, require: Callable[[str], None]) -> None:
    require("torch")
    curves, difference = run("port_torch.py", 30)
    assert set(curves) == {"jax_bce", "PyTorch"}
    assert falls(curves["jax_bce"])
    assert difference <= oracle.SURROUNDINGS


def test_port_torch_without_pytorch(run: Run, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    curves, difference = run("port_torch.py", 2)
    assert set(curves) == {"jax_bce"}
    assert np.isnan(difference)
