"""loss, focal_loss and loss_from_probs against Keras 3 on JAX: the same results where it is right.

`jax_bce.keras`, the drop-in, has its tests in tests/test_keras.py.
"""

import os
from collections.abc import Callable
from functools import partial

os.environ["KERAS_BACKEND"] = "jax"  # read when Keras is imported

import jax
import keras
import numpy as np
import oracle
import pytest
from hypothesis import assume, given
from hypothesis import strategies as st
from oracle import FLOAT64, FLOATS

import jax_bce

pytestmark = pytest.mark.any_jax

INF, NAN = np.inf, np.nan
EPSILON = 1e-7  # keras.config.epsilon()
SHAPES = [(1,), (5,), (2, 3), (3, 1), (2, 1, 4)]
Function = Callable[[jax.Array], jax.Array]


def test_backend() -> None:
    assert keras.backend.backend() == "jax"
    assert keras.config.epsilon() == EPSILON


def compare(peers, theirs: Function, ours: Function, values: np.ndarray, dtype: np.dtype) -> None:
    with jax.enable_x64(True):
        expected = peers.both(theirs, values)
    with jax.enable_x64(dtype == FLOAT64):
        actual = peers.both(ours, values.astype(dtype))
    for one, other in zip(actual, expected, strict=True):
        peers.agree(one, other)


def test_binary_crossentropy(cpu: str, peers) -> None:
    """From logits: the mean over an axis, with smoothed labels."""

    @peers.examples
    @given(st.data())
    def agree(data: st.DataObject) -> None:
        shape, dtype = data.draw(st.sampled_from(SHAPES)), data.draw(st.sampled_from(FLOATS))
        labels = peers.labels(data.draw, shape)
        options = {
            "axis": data.draw(st.integers(-len(shape), len(shape) - 1)),
            "label_smoothing": data.draw(st.sampled_from([0.0, 0.125, 1.0])),
        }
        theirs = partial(keras.losses.binary_crossentropy, labels, from_logits=True, **options)
        ours = partial(jax_bce.loss, labels=labels, **options)
        compare(peers, theirs, ours, peers.logits(data.draw, shape), dtype)

    agree()


def test_binary_crossentropy_from_probabilities(cpu: str, peers) -> None:
    """Clipped at the same epsilon; in float64, so that 1 - p has digits to compare."""

    @peers.examples
    @given(st.data())
    def agree(data: st.DataObject) -> None:
        shape = data.draw(st.sampled_from(SHAPES))
        labels = peers.labels(data.draw, shape)
        probs = peers.array(
            data.draw, shape, st.sampled_from([0.0, 1e-9, 1e-6, 0.125, 0.6, 0.99, 1.0])
        )
        options = {"label_smoothing": data.draw(st.sampled_from([0.0, 0.125]))}
        theirs = partial(keras.losses.binary_crossentropy, labels, **options)
        ours = partial(jax_bce.loss_from_probs, labels=labels, epsilon=EPSILON, axis=-1, **options)
        compare(peers, theirs, ours, probs, FLOAT64)

    agree()


def test_binary_focal_crossentropy(cpu: str, peers) -> None:
    @peers.examples
    @given(st.data())
    def agree(data: st.DataObject) -> None:
        shape, dtype = data.draw(st.sampled_from(SHAPES)), data.draw(st.sampled_from(FLOATS))
        labels = peers.labels(data.draw, shape, soft=False)  # the terms of others cancel
        alpha = data.draw(st.sampled_from([None, 0.25, 0.75]))
        gamma = data.draw(st.sampled_from([0.0, 0.5, 2.0, 3.5]))
        balance = {} if alpha is None else {"apply_class_balancing": True, "alpha": alpha}
        theirs = partial(
            keras.losses.binary_focal_crossentropy, labels, from_logits=True, gamma=gamma, **balance
        )
        ours = partial(jax_bce.focal_loss, labels=labels, alpha=alpha, gamma=gamma, axis=-1)
        compare(peers, theirs, ours, peers.logits(data.draw, shape), dtype)

    agree()


REDUCTIONS = {
    None: {"axis": -1},
    "sum": {"reduction": "sum"},  # of means over the last axis
    "sum_over_batch_size": {},
    "mean_with_sample_weight": {"reduction": "weighted_mean"},
}


def test_sample_weight(cpu: str, peers) -> None:
    """Each of Keras's reductions has its own here."""

    @peers.examples
    @given(st.data())
    def agree(data: st.DataObject) -> None:
        shape = data.draw(st.sampled_from([(2, 3), (3, 1), (2, 1, 4)]))
        dtype = data.draw(st.sampled_from(FLOATS))
        labels = peers.labels(data.draw, shape)
        weights = peers.weights(data.draw, shape[:-1])
        reduction = data.draw(st.sampled_from(list(REDUCTIONS)))
        assume(weights.any())
        keras_loss = keras.losses.BinaryCrossentropy(
            from_logits=True, reduction=reduction, dtype="float64"
        )
        options = dict(REDUCTIONS[reduction], sample_weight=weights)
        if reduction == "sum":
            options["normalizer"] = shape[-1]
        theirs = partial(keras_loss, labels, sample_weight=weights)
        compare(
            peers,
            lambda logits: theirs(y_pred=logits),
            partial(jax_bce.loss, labels=labels, **options),
            peers.logits(data.draw, shape),
            dtype,
        )

    agree()


# logit, label, what, the value of Keras from probabilities, in float32.
WRONG = [
    (20.0, 1.0, "loss", 1.1920929e-07),
    (-20.0, 0.0, "loss", 1.1920929e-07),
    (30.0, 0.0, "loss", 15.942385),
    (18.0, 1.0, "gradient", 0.0),
    (20.0, 0.0, "gradient", 0.0),
    (INF, 1.0, "loss", 1.1920929e-07),
    (INF, 0.0, "gradient", 0.0),
]
# The same from logits.
WRONG_FROM_LOGITS = [
    (-90.0, 0.0, "loss", 0.0),
    (90.0, 1.0, "gradient", 0.0),
    (INF, 1.0, "loss", NAN),
    (-INF, 0.0, "loss", NAN),
]


@pytest.mark.parametrize(
    ("from_logits", "logit", "label", "what", "listed"),
    [*((False, *case) for case in WRONG), *((True, *case) for case in WRONG_FROM_LOGITS)],
)
def test_where_keras_is_wrong(
    check, cpu: str, peers, from_logits: bool, logit: float, label: float, what: str, listed: float
) -> None:
    x, y = np.float32([logit]), np.float32([label])

    def theirs(x: jax.Array) -> jax.Array:
        output = x if from_logits else jax.nn.sigmoid(x)
        return keras.losses.binary_crossentropy(y, output, from_logits=from_logits)

    loss, gradient = jax.jit(jax.value_and_grad(theirs))(x)
    peers.still_wrong(
        loss if what == "loss" else gradient[0], listed, getattr(oracle.exact(x, y), what)[0]
    )
    loss, gradient = jax_bce.loss_and_grad(x, y)
    check.elements(cpu, x, y, **{what: loss[None] if what == "loss" else gradient})


# gamma, logit, label, what, Keras's value from logits, the exact one.
WRONG_FOCAL = [
    (2.0, 20.0, 1.0, "loss", 0.0, 8.7565108e-27),
    (2.0, 30.0, 0.0, "loss", 15.942385, 30.0),
    (2.0, 30.0, 0.0, "gradient", 0.0, 1.0),
    (0.5, 20.0, 1.0, "gradient", NAN, -1.4036435e-13),
]


@pytest.mark.parametrize(("gamma", "logit", "label", "what", "listed", "exact"), WRONG_FOCAL)
def test_where_keras_is_wrong_about_the_focal_loss(
    cpu: str,
    peers,
    gamma: float,
    logit: float,
    label: float,
    what: str,
    listed: float,
    exact: float,
) -> None:
    x, y = np.float32([logit]), np.float32([label])
    which = ["loss", "gradient"].index(what)
    theirs = partial(keras.losses.binary_focal_crossentropy, y, from_logits=True, gamma=gamma)
    peers.still_wrong(np.ravel(peers.both(theirs, x)[which])[0], listed, exact)
    ours = peers.both(partial(jax_bce.focal_loss, labels=y, gamma=gamma), x)[which]
    peers.agree(np.ravel(ours), [exact])


def test_keras_divides_by_one_weight_for_all(cpu: str, peers) -> None:
    """A scalar weight is taken for the sum of all: the mean is a sum."""
    x, y = np.zeros((4, 1), np.float32), np.ones((4, 1), np.float32)
    keras_loss = keras.losses.BinaryCrossentropy(
        from_logits=True, reduction="mean_with_sample_weight"
    )
    peers.still_wrong(keras_loss(y, x, sample_weight=2.0), 4 * np.log(2), np.log(2))
    ours = jax_bce.loss(x, y, sample_weight=2.0, reduction="weighted_mean")
    peers.agree(ours, np.log(2))


def test_keras_multiplies_what_is_masked(cpu: str, peers) -> None:
    """A NaN times a weight of 0 is NaN, where `where` leaves it out."""
    x, y = np.float32([[0], [NAN]]), np.ones((2, 1), np.float32)
    mask = np.array([True, False])
    keras_loss = keras.losses.BinaryCrossentropy(from_logits=True)
    peers.still_wrong(keras_loss(y, x, sample_weight=mask), NAN, np.log(2))
    peers.agree(jax_bce.loss(x, y, where=mask), np.log(2))
