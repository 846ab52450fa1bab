"""jax_bce.keras against Keras itself: the same numbers where Keras is right, exact ones where not.

`DIFFERENCES` holds both values of each place that differs on purpose: a Keras that fixes itself
shows up here.
"""

import inspect
import os
import re
import runpy
import subprocess
import sys
import warnings
from collections.abc import Callable
from doctest import DocTestFinder, DocTestRunner
from functools import cache, partial
from types import ModuleType
from typing import NamedTuple

os.environ["KERAS_BACKEND"] = "jax"  # read when Keras is imported

import jax
import jax.numpy as jnp
import keras
import numpy as np
import oracle
import pytest
from platforms import QUICKLY

import jax_bce
import jax_bce.keras as ours

peer = keras.losses
PEERS = {"ours": ours, "Keras": peer}

pytestmark = [
    pytest.mark.quickly,
    pytest.mark.any_jax,
    # Once per process, by whichever test comes first; test_probabilities_warn_once asks for it.
    pytest.mark.filterwarnings("ignore:from_logits=False"),
    # From Keras's own variables, as NumPy 2 reads them.
    pytest.mark.filterwarnings("ignore:__array__ implementation:DeprecationWarning"),
]

ROWS, STEPS, FEATURES = 48, 6, 4
REDUCTIONS = ("sum_over_batch_size", "sum", "mean_with_sample_weight", "none")
CLOSE = oracle.TOLERANCE["xla"].sum
assert_close = partial(np.testing.assert_allclose, rtol=CLOSE, atol=CLOSE)


class Masks(keras.layers.Layer):
    """Hands on its input and a mask, as layers do that know of padding."""

    def __init__(self, mask: np.ndarray) -> None:
        super().__init__()
        self.mask = mask

    def call(self, inputs: jax.Array) -> jax.Array:
        return inputs + 0

    def compute_mask(self, inputs: jax.Array, previous_mask: object = None) -> np.ndarray:
        return self.mask


class Shapes(NamedTuple):
    """Of labels, predictions, weights and mask; the latter two may be missing."""

    y_true: tuple[int, ...]
    y_pred: tuple[int, ...]
    weight: tuple[int, ...] | None = None
    mask: tuple[int, ...] | None = None


SHAPES = (
    Shapes((6,), (6,)),
    Shapes((6, 1), (6, 1), (6,), (6,)),
    Shapes((6,), (6, 1), (6, 1), (6, 1)),
    Shapes((6, 1), (6,), None, (6,)),
    Shapes((1, 3), (1, 3), (1,), (1,)),
    Shapes((4, 3), (4, 3, 1), (4,)),
    Shapes((4, 5, 3), (4, 5, 3), (4, 5), (4, 5)),
    Shapes((4, 5, 3), (4, 5, 3), (4, 5, 1), (4, 5)),
    Shapes((4, 5, 1), (4, 5, 1), (), None),
    Shapes((4, 5, 1), (4, 5, 1), (4, 1), (4, 5)),
)
# Where Keras divides by weights that it has not broadcast; see DIFFERENCES.
NARROW_WEIGHTS = SHAPES[-2:]


def data(shapes: Shapes, from_logits: bool) -> tuple[np.ndarray | None, ...]:
    rng = np.random.default_rng(0)
    y_pred = rng.normal(0, 3, shapes.y_pred).astype(np.float32)
    y_true = rng.choice([0, 0.25, 1], shapes.y_true).astype(np.float32)
    weight = None if shapes.weight is None else rng.uniform(0, 2, shapes.weight).astype(np.float32)
    mask = None if shapes.mask is None else rng.uniform(size=shapes.mask) < 0.6
    return y_true, y_pred if from_logits else 1 / (1 + np.exp(-y_pred)), weight, mask


def losses_and_gradient(create: Callable, shapes: Shapes, from_logits: bool) -> tuple:
    """The loss by each reduction, and the gradient of what all of them are part of."""
    y_true, y_pred, weight, mask = data(shapes, from_logits)
    masks = None if mask is None else Masks(mask)

    def all_losses(y_pred: jax.Array) -> tuple[jax.Array, dict]:
        results = {}
        for reduction in REDUCTIONS:
            if reduction == "mean_with_sample_weight" and shapes in NARROW_WEIGHTS:
                continue
            predictions = masks(y_pred) if masks else y_pred
            results[reduction] = create(reduction=reduction)(y_true, predictions, weight)
        values = enumerate(results.values(), 1)
        return sum(i * jnp.sum(jnp.sin(value)) for i, value in values), results

    of_all = jax.value_and_grad(all_losses, has_aux=True)
    (_, losses), gradient = jax.jit(of_all, compiler_options=QUICKLY)(y_pred)
    return losses, gradient


@pytest.mark.parametrize(
    ("shapes", "from_logits"), [*((shapes, True) for shapes in SHAPES), (SHAPES[6], False)], ids=str
)
def test_weights_masks_and_reductions(shapes: Shapes, from_logits: bool) -> None:
    results = [
        losses_and_gradient(
            partial(module.BinaryCrossentropy, from_logits, 0.1), shapes, from_logits
        )
        for module in (ours, peer)
    ]
    jax.tree.map(assert_close, *results)
    assert jax.tree.map(jnp.shape, results[0]) == jax.tree.map(jnp.shape, results[1])


@pytest.mark.parametrize(("one", "other"), [("mean", "sum_over_batch_size"), (None, "none")])
def test_two_names_of_one_reduction(one: str | None, other: str) -> None:
    y_true, y_pred, weight, mask = data(SHAPES[6], True)
    losses = [
        ours.BinaryCrossentropy(True, reduction=reduction)(y_true, Masks(mask)(y_pred), weight)
        for reduction in (one, other)
    ]
    oracle.assert_same_bits(*losses)


def test_weights_masks_and_reductions_of_the_focal_loss() -> None:
    jax.tree.map(
        assert_close,
        *(
            losses_and_gradient(
                partial(module.BinaryFocalCrossentropy, True, 0.3, 1.5, True, 0.1), SHAPES[6], True
            )
            for module in (ours, peer)
        ),
    )


@pytest.mark.parametrize("from_logits", [True, False], ids=["logits", "probabilities"])
@pytest.mark.parametrize(
    ("name", "arguments"),
    [
        ("binary_crossentropy", {}),
        ("binary_crossentropy", {"label_smoothing": 0.2, "axis": (0, 2)}),
        ("binary_focal_crossentropy", {"axis": 0}),
        ("binary_focal_crossentropy", {"gamma": 0.5, "label_smoothing": 0.2, "axis": 1}),
        (
            "binary_focal_crossentropy",
            {"apply_class_balancing": True, "alpha": 0.1, "gamma": 3, "axis": None},
        ),
    ],
    ids=str,
)
def test_functions(name: str, arguments: dict, from_logits: bool) -> None:
    """The loss, and its gradient in labels and predictions."""
    y_true, y_pred, _, _ = data(Shapes((4, 5, 3), (4, 5, 3)), from_logits)
    arguments = arguments | {"from_logits": from_logits}

    @partial(jax.jit, static_argnums=0, compiler_options=QUICKLY)
    def both(module_name: str, y_true: jax.Array, y_pred: jax.Array) -> tuple:
        function = partial(getattr(PEERS[module_name], name), **arguments)
        cotangent = jnp.cos(jnp.arange(60.0)[: jax.eval_shape(function, y_true, y_pred).size])
        loss, pullback = jax.vjp(function, y_true, y_pred)
        return loss, pullback(cotangent.reshape(loss.shape))

    jax.tree.map(assert_close, both("ours", y_true, y_pred), both("Keras", y_true, y_pred))


@pytest.mark.parametrize("dtype", [oracle.BFLOAT16, oracle.FLOAT16], ids=str)
@pytest.mark.parametrize("from_logits", [True, False], ids=["logits", "probabilities"])
def test_16_bit_losses_are_rounded_once(check, dtype: np.dtype, from_logits: bool) -> None:
    """Predictions are rounded to the policy's type; from there on it is Keras's float32 loss."""
    y_true, y_pred, weight, _ = data(Shapes((64, 3), (64, 3), (64,)), from_logits)
    rounded = oracle.round_to(y_pred, dtype)
    bound = oracle.ROUNDED + 2 * CLOSE / float(oracle.ulp(1, dtype))

    @partial(jax.jit, static_argnums=(0, 1))
    def losses(module_name: str, policy: str, y_pred: jax.Array) -> list[jax.Array]:
        create = partial(PEERS[module_name].BinaryCrossentropy, from_logits, dtype=policy)
        return [create(reduction=name)(y_true, y_pred, weight) for name in REDUCTIONS]

    exact = losses("Keras", "float32", rounded.astype(np.float32))
    for name, actual, expected in zip(
        REDUCTIONS, losses("ours", f"mixed_{dtype}", y_pred), exact, strict=True
    ):
        assert actual.dtype == dtype
        check.ulps(f"jax_bce.keras, {name}", actual, np.float64(expected), bound)


@pytest.mark.parametrize("dtype", ["float32", "bfloat16", "float16"])
def test_the_functions_return_the_predictions_dtype(dtype: str) -> None:
    y_true, y_pred = jnp.ones((2, 1), jnp.uint8), jnp.ones((2, 1), dtype)
    for module in PEERS.values():
        for name in ("binary_crossentropy", "binary_focal_crossentropy"):
            for from_logits in (True, False):
                function = partial(getattr(module, name), from_logits=from_logits)
                assert jax.eval_shape(function, y_true, y_pred).dtype == dtype


# --- deliberate differences ----------------------------------------------------------------------

X, Y = np.array([[1.0, -2.0], [0.5, 3.0]], np.float32), np.array([[0, 1], [1, 0]], np.float32)
NAN, INF = np.nan, np.inf


def value_and_gradient(loss: Callable, at: float) -> tuple[jax.Array, jax.Array]:
    return jax.value_and_grad(lambda x: jnp.sum(loss(jnp.full((1, 1), x))))(jnp.float32(at))


def of_logit(logit: float, label: float, name: str = "binary_crossentropy", **keywords) -> Callable:
    def at_logit(module: ModuleType) -> tuple:
        function = partial(getattr(module, name), np.float32([[label]]), **keywords)
        return value_and_gradient(partial(function, from_logits=True), logit)

    return at_logit


def of_probability(probability: float, label: float, name: str, **keywords) -> Callable:
    def at_probability(module: ModuleType) -> tuple:
        function = partial(getattr(module, name), np.float32([[label]]), **keywords)
        return value_and_gradient(function, probability)

    return at_probability


def masked_nan(module: ModuleType) -> tuple:
    """The second of three losses is dropped; the others are 1.3132617 and 0.31326166."""
    masks = Masks(np.array([True, False, True]))

    def loss(y_pred: jax.Array) -> jax.Array:
        return module.BinaryCrossentropy(True)(np.float32([[0], [NAN], [0]]), masks(y_pred))

    return jax.value_and_grad(loss)(np.float32([[1], [NAN], [-1]]))


def masked_nan_weight(module: ModuleType) -> jax.Array:
    y_pred = Masks(np.array([True, False, True]))(np.float32([[1], [2], [-1]]))
    return module.BinaryCrossentropy(True)(np.float32([[0], [1], [0]]), y_pred, [1, NAN, 2])


def weighted_mean(y_true: np.ndarray, y_pred: np.ndarray, weight: object) -> Callable:
    return lambda module: module.BinaryCrossentropy(True, reduction="mean_with_sample_weight")(
        y_true, y_pred, weight
    )


def empty(**keywords) -> Callable:
    nothing = np.zeros((0, 1), np.float32)
    return lambda module: module.BinaryCrossentropy(True, **keywords)(nothing, nothing)


# What is computed, jax_bce's value, Keras's value.
DIFFERENCES: dict[str, tuple[Callable, object, object]] = {
    "logit inf, label 1": (of_logit(INF, 1), (0, 0), (NAN, 0)),
    "logit -inf, label 0": (of_logit(-INF, 0), (0, 0), (NAN, 0)),
    "probability 1 of bfloat16": (
        lambda module: module.BinaryCrossentropy(dtype="mixed_bfloat16")([[1.0]], [[1.0]]),
        oracle.round_to(1.1920929e-7, oracle.BFLOAT16).astype(np.float32),
        NAN,
    ),
    "probability 1 of float16": (
        lambda module: module.BinaryCrossentropy(dtype="mixed_float16")([[1.0]], [[1.0]]),
        oracle.round_to(1.1920929e-7, oracle.FLOAT16).astype(np.float32),
        NAN,
    ),
    "a label is not rounded to bfloat16": (
        lambda module: module.binary_crossentropy(
            np.float32([[0.997]]), jnp.full((1, 1), 8, jnp.bfloat16), True
        ),
        [oracle.round_to(0.024335344, oracle.BFLOAT16).astype(np.float32)],
        [oracle.round_to(0.031585391, oracle.BFLOAT16).astype(np.float32)],
    ),
    "a label is not truncated to integers": (
        lambda module: module.binary_crossentropy(np.float32([[0.7]]), [[2]], True),
        [0.72692805],
        [2.126928],
    ),
    "one label for all": (
        lambda module: module.binary_crossentropy(1.0, [[2.0]], True),
        [0.12692801],
        ValueError,
    ),
    "label_smoothing 1.5": (
        lambda module: module.binary_crossentropy([[1.0]], [[2.0]], True, 1.5),
        ValueError,
        [1.626928],
    ),
    "labels of uint32": (
        lambda module: module.binary_crossentropy(np.uint32([[1]]), [[2.0]], True),
        TypeError,
        [0.12692801],
    ),
    "NaN in what a mask drops": (
        masked_nan,
        (0.81326169, [[0.36552929], [0], [0.13447071]]),
        (NAN, [[0.36552929], [NAN], [0.13447071]]),
    ),
    "NaN in a weight that a mask drops": (masked_nan_weight, 0.96989250, NAN),
    "weighted mean, scalar weight": (weighted_mean(Y, X, 2.0), 1.7407135, 3.4814271),
    "weighted mean, one weight for each of two losses": (
        weighted_mean(Y[..., None], X[..., None], np.float32([[1], [3]])),
        1.7510228,
        3.5020456,
    ),
    "weighted mean of one loss": (weighted_mean(Y[0], X[0], 2.0), 1.7200948, 3.4401898),
    "mean of an empty batch": (empty(), 0, []),
    "sum of an empty batch": (empty(reduction="sum"), 0, []),
    "70,000 losses in float16": (
        lambda module: module.BinaryCrossentropy(True, dtype="float16")(
            np.zeros((70_000, 1)), np.zeros((70_000, 1))
        ),
        oracle.round_to(np.log(2), oracle.FLOAT16).astype(np.float32),
        0,
    ),
    "focal loss, logit 30, label 0": (
        of_logit(30, 0, "binary_focal_crossentropy"),
        (30, 1),
        (15.942385, 0),
    ),
    "focal loss, logit 20, label 1, gamma 1/2": (
        of_logit(20, 1, "binary_focal_crossentropy", gamma=0.5),
        (9.3576230e-14, -1.4036435e-13),
        (0, NAN),
    ),
    "focal loss, probability 1, label 1, gamma 0": (
        of_probability(1, 1, "binary_focal_crossentropy", gamma=0.0),
        (1.1920929e-7, 0),
        (1.1920929e-7, NAN),
    ),
}


@pytest.mark.parametrize("name", PEERS)
@pytest.mark.parametrize("case", DIFFERENCES)
def test_differences(case: str, name: str) -> None:
    compute, mine, theirs = DIFFERENCES[case]
    expected = mine if name == "ours" else theirs
    compiled = jax.jit(partial(compute, PEERS[name]))
    if isinstance(expected, type):
        with pytest.raises(expected):
            compiled()
        return
    actual = jax.tree.map(lambda value: np.asarray(value, np.float32), compiled())
    np.testing.assert_allclose(
        np.concatenate(list(map(np.ravel, jax.tree.leaves(actual)))),
        np.concatenate([np.float32([]), *map(np.ravel, jax.tree.leaves(expected))]),
        rtol=CLOSE,
    )


@pytest.mark.parametrize("what", ["mask", "weights"])
def test_a_mean_of_nothing_is_0(what: str) -> None:
    """And so is its gradient."""
    masks = Masks(np.full(2, what == "weights"))
    weights = np.zeros(2, np.float32) if what == "weights" else None

    @jax.jit
    @jax.value_and_grad
    def total(y_pred: jax.Array) -> jax.Array:
        means = ("mean", "mean_with_sample_weight")
        losses = [ours.BinaryCrossentropy(True, reduction=mean) for mean in means]
        return sum(loss(Y, masks(y_pred), weights) for loss in losses)

    loss, gradient = total(X)
    assert loss == 0
    assert not np.any(gradient)


def test_tails(cpu: str) -> None:
    """The kernel's subnormal losses are not flushed on the way; Keras's are."""
    loss, label = partial(ours.binary_crossentropy, from_logits=True), np.float32([[0]])
    at = np.float32([[-90]])
    assert oracle.ulp_distance(loss(label, at), oracle.exact(-90.0, 0).loss, np.float32) <= 1
    assert peer.binary_crossentropy(label, at, from_logits=True) == 0


@pytest.mark.parametrize("name", PEERS)
@pytest.mark.parametrize(("smoothing", "expected"), [(0.0, 5.3726988), (0.1, 5.6354766)])
def test_probabilities_are_clipped(name: str, smoothing: float, expected: float) -> None:
    loss = PEERS[name].BinaryCrossentropy(label_smoothing=smoothing)
    assert_close(jax.jit(loss)(np.ones(3), np.float32([1, 1, 0])), expected)


@pytest.mark.parametrize("name", PEERS)
def test_probabilities_are_clipped_where_keras_says(name: str) -> None:
    epsilon = keras.config.epsilon()
    keras.config.set_epsilon(1e-3)
    try:
        loss = PEERS[name].binary_crossentropy([[1.0]], [[0.0]])
    finally:
        keras.config.set_epsilon(epsilon)
    assert_close(loss, [-np.log(1e-3)])


@pytest.mark.parametrize("name", PEERS)
def test_probabilities_do_not_train_beyond_17(name: str) -> None:
    """What the warning says, and what logits do instead."""
    module, label = PEERS[name], np.float32([[0]])

    def of_sigmoid(logit: jax.Array) -> jax.Array:
        return module.binary_crossentropy(label, jax.nn.sigmoid(logit))

    gradient = jax.jit(lambda x: value_and_gradient(of_sigmoid, x)[1])
    assert gradient(16.5) > 0
    assert gradient(17.0) == 0
    assert_close(jax.jit(partial(of_logit(17.0, 0), module))()[1], 1)


def a_model(*layers: keras.layers.Layer) -> keras.Model:
    keras.utils.set_random_seed(0)
    return keras.Sequential([keras.Input((FEATURES,)), *layers])


def fits(compiled: bool) -> None:
    model = a_model(keras.layers.Dense(1, "sigmoid"))
    model.compile("sgd", ours.BinaryCrossentropy(), run_eagerly=not compiled)
    model.fit(np.ones((2, FEATURES)), np.ones((2, 1)), verbose=0)


WARNS = {
    "class": lambda: ours.BinaryCrossentropy()([[1.0]], [[0.5]]),
    "class under jit": lambda: jax.jit(ours.BinaryFocalCrossentropy())([[1.0]], [[0.5]]),
    "function": lambda: ours.binary_focal_crossentropy([[1.0]], [[0.5]]),
    "fit": lambda: fits(compiled=True),
    "fit, eagerly": lambda: fits(compiled=False),
}


@pytest.mark.parametrize("call", WARNS)
def test_probabilities_warn_once(recwarn: pytest.WarningsRecorder, call: str) -> None:
    """At the caller's line, whatever of Keras and JAX lies between."""
    warnings.filterwarnings("always", "from_logits")
    ours._warn_of_probabilities.cache_clear()
    WARNS[call]()
    (warning,) = recwarn.list
    assert warning.category is UserWarning
    assert warning.filename == __file__
    for remedy in (
        *("activation=None", "from_logits=True", "jax_bce.logits_of", ".linear"),
        "BinaryAccuracy(threshold=0)",
    ):
        assert remedy in str(warning.message)
    ours.binary_crossentropy([[1.0]], [[0.5]])
    ours.binary_focal_crossentropy([[1.0]], [[0.5]])
    assert len(recwarn) == 1


def test_logits_do_not_warn(recwarn: pytest.WarningsRecorder) -> None:
    warnings.simplefilter("always")
    ours._warn_of_probabilities.cache_clear()
    ours.BinaryCrossentropy(True)([[1.0]], [[0.5]])
    ours.binary_focal_crossentropy([[1.0]], [[0.5]], from_logits=True)
    assert not recwarn.list


# --- as a Keras object ---------------------------------------------------------------------------


@pytest.mark.parametrize("name", ours.__all__)
def test_signature(name: str) -> None:
    """The names, the order and the defaults are Keras's."""
    arguments = [
        [(p.name, p.default, p.kind) for p in inspect.signature(found).parameters.values()]
        for found in (getattr(ours, name), getattr(peer, name))
    ]
    assert arguments[0] == arguments[1]


def test_signature_of_the_interface() -> None:
    """As documented, whatever a later Keras does."""
    assert {p.name: p.default for p in signature_of("BinaryCrossentropy")} == {
        "from_logits": False,
        "label_smoothing": 0.0,
        "axis": -1,
        "reduction": "sum_over_batch_size",
        "name": "binary_crossentropy",
        "dtype": None,
    }


def signature_of(name: str) -> list[inspect.Parameter]:
    return list(inspect.signature(getattr(ours, name)).parameters.values())


LOSSES = {
    "BinaryCrossentropy": {"from_logits": True, "label_smoothing": 0.1, "axis": 1, "name": "mine"},
    "BinaryFocalCrossentropy": {"apply_class_balancing": True, "alpha": 0.1, "gamma": 3.0},
}


@pytest.mark.parametrize("name", LOSSES)
def test_config(name: str) -> None:
    arguments = LOSSES[name] | {"reduction": "mean"}
    loss = getattr(ours, name)(**arguments)
    assert isinstance(loss, keras.losses.Loss)
    config = loss.get_config()
    assert config == getattr(peer, name)(**arguments).get_config()
    assert arguments.items() <= config.items()
    assert type(loss).from_config(config).get_config() == config
    again = keras.saving.deserialize_keras_object(keras.saving.serialize_keras_object(loss))
    assert type(again) is type(loss)
    assert again.get_config() == config


@pytest.mark.parametrize("name", ["binary_crossentropy", "binary_focal_crossentropy"])
def test_a_function_is_found_again(name: str) -> None:
    function = getattr(ours, name)
    assert keras.losses.deserialize(keras.losses.serialize(function)) is function


@pytest.mark.parametrize("name", LOSSES)
@pytest.mark.parametrize("module", PEERS)
def test_unknown_reduction(module: str, name: str) -> None:
    with pytest.raises(ValueError, match="reduction=average"):
        getattr(PEERS[module], name)(reduction="average")


ELEMENTS = np.ones((4, 3), np.float32)


@pytest.mark.parametrize("name", LOSSES)
@pytest.mark.parametrize("rows", [4, 3, 1])
def test_weights_of_elements(name: str, rows: int) -> None:
    """An error, also where sizes happen to agree, whose fix is that of the other test."""
    loss, elements = getattr(ours, name)(from_logits=True), ELEMENTS[:rows]
    with pytest.raises(ValueError, match=r"axis=-1.*axis=\(\).*jax_bce\.loss\(.*weight=") as error:
        loss(elements, elements, elements)
    assert f"sample_weight of shape {elements.shape}" in str(error.value)
    assert f"losses of shape {(rows,)}" in str(error.value)


@pytest.mark.parametrize("module", PEERS)
@pytest.mark.parametrize("name", LOSSES)
def test_weights_of_elements_whose_losses_are_not_averaged(name: str, module: str) -> None:
    y_true, y_pred, weight, _ = data(Shapes((4, 3), (4, 3), (4, 3)), True)
    for reduction in ("sum_over_batch_size", "mean_with_sample_weight"):
        create = partial(getattr(PEERS[module], name), from_logits=True, reduction=reduction)
        direct = jax_bce.loss if name == "BinaryCrossentropy" else jax_bce.focal_loss
        mean = "mean" if reduction == "sum_over_batch_size" else "weighted_mean"
        expected = direct(y_pred, y_true, weight=weight, reduction=mean)
        assert_close(create(axis=())(y_true, y_pred, weight), expected)


def test_other_weights_that_do_not_fit() -> None:
    with pytest.raises(ValueError, match=r"shape \(5,\).*losses of shape \(4,\): pass one weight"):
        ours.BinaryCrossentropy(True)(ELEMENTS, ELEMENTS, np.ones(5))
    loss, rows = ours.BinaryCrossentropy(True, axis=()), np.arange(4.0)
    with pytest.raises(ValueError, match=r"sample_weight\[:, None\] for weights along") as error:
        loss(ELEMENTS, ELEMENTS, rows)
    fix = re.search(r"sample_weight\[.*?\]", str(error.value))[0]
    fixed = loss(ELEMENTS, ELEMENTS, eval(fix, {"sample_weight": rows}))
    assert_close(fixed, jax_bce.loss(ELEMENTS, ELEMENTS, sample_weight=rows))


@pytest.mark.parametrize("from_logits", [True, False], ids=["logits", "probabilities"])
@pytest.mark.parametrize("name", ["binary_crossentropy", "binary_focal_crossentropy"])
def test_errors_call_the_arguments_as_keras_does(name: str, from_logits: bool) -> None:
    function = partial(getattr(ours, name), from_logits=from_logits)
    for y_true, y_pred, options in (
        (np.ones((3, 2)), np.ones((3, 4)), {}),
        (np.ones(3, complex), np.ones(3, np.float32), {}),
        (np.ones(3), np.ones(3), {"axis": 3}),
        (np.ones(3), (np.ones(3), np.ones(3)), {}),
    ):
        with pytest.raises((ValueError, TypeError), match=r"y_(true|pred)") as error:
            function(y_true, y_pred, **options)
        assert not re.search("logits|probs|labels", str(error.value))


@pytest.mark.parametrize("more", [None, {}, np.ones(3)], ids=str)
def test_the_outputs_of_a_model_are_no_prediction(more: object) -> None:
    """Neither of a function nor of a class, which asks Keras for a mask as well."""
    function = partial(ours.binary_crossentropy, from_logits=True)
    for loss in (function, ours.BinaryCrossentropy(True)):
        with pytest.raises(TypeError, match=r"tuple of 2: pass one of them, such as y_pred\[0\]"):
            loss(np.ones(3), (np.ones(3), more))


@pytest.mark.parametrize("module", PEERS)
@pytest.mark.parametrize("shapes", [((3, 2), (3, 1)), ((3,), (3, 2)), ((), (3, 1))], ids=str)
def test_shapes_that_do_not_fit(module: str, shapes: tuple) -> None:
    for from_logits in (True, False):
        with pytest.raises(ValueError, match="shape"):
            PEERS[module].BinaryCrossentropy(from_logits)(*map(np.ones, shapes))
    with pytest.raises(ValueError, match="shape"):
        PEERS[module].binary_crossentropy(np.ones(3), np.ones((3, 1)))


def test_a_mask_of_another_shape() -> None:
    with pytest.raises(ValueError, match="Incompatible"):
        ours.BinaryCrossentropy(True)(np.ones((3, 1)), Masks(np.ones(2, bool))(np.ones((3, 1))))


# --- training ------------------------------------------------------------------------------------


@cache
def sequences() -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Features and labels of sequences, and which steps are more than padding."""
    rng = np.random.default_rng(0)
    features = rng.normal(size=(ROWS, STEPS, FEATURES)).astype(np.float32)
    kept = np.arange(STEPS) < rng.integers(1, STEPS + 1, (ROWS, 1))
    features[~kept] = 0
    labels = (features[..., :1] + features[..., 1:2] > 0.2).astype(np.float32)
    return features, labels, kept


def model_of(shape: tuple[int, ...], loss: keras.losses.Loss, *first: keras.layers.Layer):
    keras.utils.set_random_seed(0)
    model = keras.Sequential([keras.Input(shape), *first, keras.layers.Dense(1)])
    model.compile(keras.optimizers.SGD(0.5), loss, weighted_metrics=[], jit_compile=True)
    return model


def trained(model: keras.Model, *data: np.ndarray, **keywords) -> list:
    """The loss of each epoch, that of an evaluation, and what was learnt."""
    fit = model.fit(*data, batch_size=16, epochs=3, verbose=0, shuffle=False, **keywords)
    return [*fit.history["loss"], model.evaluate(*data, verbose=0), *model.get_weights()]


@pytest.mark.parametrize(
    ("name", "weights"),
    [
        ("BinaryCrossentropy", {"sample_weight": np.linspace(0, 2, ROWS)}),
        ("BinaryFocalCrossentropy", {"class_weight": {0: 1.0, 1: 3.0}}),
    ],
)
def test_fit(name: str, weights: dict) -> None:
    features, labels, _ = sequences()
    rows = features[:, 0], labels[:, 0, 0].astype(np.uint8)
    losses = [getattr(module, name)(from_logits=True) for module in (ours, peer)]
    results = [trained(model_of((FEATURES,), loss), *rows, **weights) for loss in losses]
    assert results[0][2] < 0.9 * results[0][0]
    jax.tree.map(assert_close, *results)


def test_fit_of_sequences_whose_padding_is_nan() -> None:
    """With weights of each step; Keras gets labels that say nothing of the padding, and agrees."""
    features, labels, kept = sequences()
    weights = np.linspace(0, 2, ROWS * STEPS, dtype=np.float32).reshape(ROWS, STEPS)
    unknown = np.where(kept[..., None], labels, NAN)

    def train(loss: keras.losses.Loss, labels: np.ndarray) -> list:
        model = model_of((STEPS, FEATURES), loss, keras.layers.Masking())
        return trained(model, features, labels, sample_weight=weights)

    mine = train(ours.BinaryCrossentropy(True), unknown)
    theirs = train(peer.BinaryCrossentropy(True), labels)
    np.testing.assert_allclose(mine[:3], theirs[:3], rtol=CLOSE)
    jax.tree.map(assert_close, mine[4:], theirs[4:])


DENSE = keras.layers.Dense
WITH_SIGMOID = {
    "in the last layer": lambda: a_model(DENSE(1, "sigmoid")),
    "in a layer of its own": lambda: a_model(DENSE(1), keras.layers.Activation("sigmoid")),
}


@pytest.mark.parametrize("sigmoid", WITH_SIGMOID)
@pytest.mark.second
def test_a_model_loses_its_sigmoid_and_keeps_fit(sigmoid: str, tmp_path) -> None:
    """As the warning and docs/migrating.md say: it trains like one that never had it."""
    features, labels, _ = sequences()
    rows = features[:, 0], labels[:, 0]
    model, twin = WITH_SIGMOID[sigmoid](), a_model(DENSE(1))
    twin.set_weights(model.get_weights())
    model.compile("sgd", "binary_crossentropy")
    model.evaluate(*rows, verbose=0)  # what was compiled is compiled again
    model.layers[-1].activation = keras.activations.linear
    for changed in (model, twin):
        changed.compile(keras.optimizers.SGD(0.5), ours.BinaryCrossentropy(True))
    jax.tree.map(assert_close, trained(model, *rows), trained(twin, *rows))
    model.save(tmp_path / "model.keras")
    loaded = keras.saving.load_model(tmp_path / "model.keras")
    assert_close(loaded.predict(rows[0], verbose=0), twin.predict(rows[0], verbose=0))


def test_a_model_up_to_the_layer_before() -> None:
    features, labels, _ = sequences()
    whole = WITH_SIGMOID["in a layer of its own"]()
    model = keras.Model(whole.inputs[0], whole.layers[-2].output)
    model.compile(keras.optimizers.SGD(0.5), ours.BinaryCrossentropy(True))
    losses = trained(model, features[:, 0], labels[:, 0])
    assert losses[2] < losses[0]
    assert_close(jax.nn.sigmoid(model(features[:, 0])), whole(features[:, 0]))


LOGITS_FIRST = {
    "loss": jax_bce.loss,
    "partial": partial(jax_bce.loss, axis=-1),
    "jit": jax.jit(jax_bce.loss),
    "focal_loss": jax_bce.focal_loss,
    "asymmetric_loss": jax_bce.asymmetric_loss,
    "loss_from_probs": jax_bce.loss_from_probs,
    "jax_bce.optax": jax_bce.optax.sigmoid_binary_cross_entropy,
    "torch_like": jax_bce.torch_like.binary_cross_entropy_with_logits,
    "torch_like, object": jax_bce.torch_like.BCEWithLogitsLoss(),
}


@pytest.mark.parametrize("what", ["loss", "weighted_metrics"])
@pytest.mark.parametrize("name", LOGITS_FIRST)
def test_functions_that_take_labels_second_are_refused(name: str, what: str) -> None:
    """Keras would train on swapped arguments: a loss far below 0, an accuracy of 0.5."""
    model = a_model(DENSE(1))
    arguments = {"loss": ours.BinaryCrossentropy(True)} | {
        what: LOGITS_FIRST[name] if what == "loss" else [LOGITS_FIRST[name]]
    }
    model.compile("sgd", **arguments)
    with pytest.raises(TypeError, match=r"y_true first.*jax_bce\.keras\.BinaryCrossentropy"):
        model.fit(np.ones((2, FEATURES)), np.ones((2, 1)), verbose=0)


def test_functions_that_take_labels_first_are_not() -> None:
    """Keras's own signature, be it ours or written around a function that takes labels second."""
    data = np.ones((2, FEATURES)), np.ones((2, 1))
    losses = []
    for function in (
        partial(ours.binary_crossentropy, from_logits=True),
        lambda y_true, y_pred: jax_bce.loss(y_pred, y_true, axis=-1),
    ):
        keras.utils.set_random_seed(0)  # a layer draws its seed when it is made
        model = a_model(DENSE(1))
        model.compile("sgd", function, weighted_metrics=[function])
        losses.append(model.fit(*data, verbose=0).history["loss"])
    assert_close(*losses)
    tree = keras.tree.map_structure(jax_bce.loss, {"a": X}, {"a": Y})  # logits first, as it says
    oracle.assert_same_bits(tree["a"], jax_bce.loss(X, Y))


def test_a_saved_model_keeps_its_loss(tmp_path) -> None:
    features, labels, _ = sequences()
    rows = features[:, 0], labels[:, 0]
    model = model_of((FEATURES,), ours.BinaryCrossentropy(True, 0.1, reduction="sum"))
    trained(model, *rows)
    model.save(tmp_path / "model.keras")
    loaded = keras.saving.load_model(tmp_path / "model.keras")
    assert type(loaded.loss) is ours.BinaryCrossentropy
    assert loaded.loss.get_config() == model.loss.get_config()
    assert loaded.evaluate(*rows, verbose=0) == model.evaluate(*rows, verbose=0)


def test_mixed_precision_trains() -> None:
    """Predictions of exactly 1 and 0 in bfloat16, right and wrong ones, and a loss in bfloat16."""
    features, labels, _ = sequences()
    loss = ours.BinaryCrossentropy(dtype="mixed_bfloat16")
    keras.utils.set_random_seed(0)
    dense = keras.layers.Dense(1, "sigmoid", dtype="mixed_bfloat16")
    model = keras.Sequential([keras.Input((FEATURES,)), dense])
    model.compile(keras.optimizers.SGD(0.5), loss)
    assert {0, 1} <= set(np.ravel(model(1000 * features[:, 0])).tolist())
    results = trained(model, 1000 * features[:, 0], labels[:, 0])
    assert all(np.all(np.isfinite(result)) for result in results)


# --- without Keras, or with another backend ------------------------------------------------------


def test_without_keras(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "keras", None)
    with pytest.raises(ImportError, match="pip install keras"):
        runpy.run_path(ours.__file__)


@pytest.mark.parametrize(
    ("source", "error", "message"),
    [
        ("import tensorflow", RuntimeError, "tensorflow instead of JAX: set KERAS_BACKEND=jax"),
        ("import other", ModuleNotFoundError, "No module named 'other'"),
        (
            "class config:\n    backend = staticmethod(lambda: 'torch')",
            RuntimeError,
            "torch instead of JAX: set KERAS_BACKEND=jax",
        ),
    ],
    ids=["backend that is not there", "broken", "another backend"],
)
def test_keras_that_does_not_run_on_jax(
    monkeypatch: pytest.MonkeyPatch, tmp_path, source: str, error: type, message: str
) -> None:
    (tmp_path / "keras.py").write_text(source)
    monkeypatch.syspath_prepend(tmp_path)
    monkeypatch.setitem(sys.modules, "tensorflow", None)
    monkeypatch.delitem(sys.modules, "keras")
    with pytest.raises(error, match=message):
        runpy.run_path(ours.__file__)


def test_keras_as_it_comes(tmp_path) -> None:
    """Without a word about a backend, Keras takes TensorFlow, be it there or not."""
    environment = {k: v for k, v in os.environ.items() if k != "KERAS_BACKEND"}
    environment["KERAS_HOME"] = str(tmp_path)
    done = subprocess.run(
        [sys.executable, "-c", "import jax_bce.keras"],
        env=environment,
        capture_output=True,
        text=True,
    )
    assert done.returncode == 1
    assert "RuntimeError: Keras" in done.stderr
    assert "set KERAS_BACKEND=jax" in done.stderr


@pytest.mark.parametrize("name", ours.__all__)
def test_docstring_examples(cpu: str, name: str) -> None:
    tests = [test for test in DocTestFinder().find(getattr(ours, name), name) if test.examples]
    assert [test.name for test in tests] == [name]
    assert DocTestRunner().run(tests[0]).failed == 0


def test_the_module_is_an_attribute_of_the_package() -> None:
    assert jax_bce.keras is ours


@pytest.mark.parametrize("from_logits", [True, False])
def test_a_variable_of_keras_as_gamma(from_logits: bool) -> None:
    """Known, and traced in fit."""
    y, x = np.float32([[0, 1], [1, 1]]), np.float32([[0.2, 0.7], [0.9, 0.1]])
    gamma = keras.Variable(2.0)
    loss = ours.BinaryFocalCrossentropy(gamma=gamma, from_logits=from_logits)
    number = ours.BinaryFocalCrossentropy(gamma=2.0, from_logits=from_logits)
    oracle.assert_same_bits(np.asarray(loss(y, x)), np.asarray(number(y, x)))
    model = keras.Sequential([keras.Input((2,)), keras.layers.Dense(2)])
    model.compile("sgd", loss)
    history = model.fit(x, y, epochs=2, verbose=0).history["loss"]
    assert np.isfinite(history).all()
