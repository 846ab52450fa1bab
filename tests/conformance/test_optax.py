"""jax_bce.optax against optax: the same results where optax is right, and a list of where not."""

import inspect
from functools import partial

import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np
import optax
import oracle
import pytest
from hypothesis import given
from hypothesis import strategies as st
from oracle import BFLOAT16, FLOAT32, FLOAT64, FLOATS

import jax_bce.optax

pytestmark = pytest.mark.any_jax

INF, NAN = np.inf, np.nan
# Of logits and labels.
SHAPES = [
    ((), ()),
    ((5,), (5,)),
    ((2, 3), (2, 3)),
    ((2, 1, 3), (2, 1, 3)),
    ((5,), ()),
    ((), (3,)),
    ((2, 3), (3,)),
    ((3,), (2, 3)),
    ((2, 1), (3,)),
    ((0,), (1,)),
]
NAMES = ["sigmoid_binary_cross_entropy", "sigmoid_focal_loss"]


@pytest.mark.parametrize("name", NAMES)
def test_signature(name: str) -> None:
    ours, theirs = (
        [(p.name, p.kind, p.default) for p in inspect.signature(f).parameters.values()]
        for f in (getattr(jax_bce.optax, name), getattr(optax, name))
    )
    assert ours == theirs


@pytest.mark.parametrize("name", NAMES)
def test_values_and_gradients(cpu: str, peers, name: str) -> None:
    @peers.examples
    @given(st.data())
    def agree(data: st.DataObject) -> None:
        shapes = data.draw(st.sampled_from(SHAPES))
        # A gradient that is summed over what was broadcast is rounded before it is, so not to 16
        # bits; and of soft labels its terms might cancel.
        alike = shapes[0] == shapes[1]
        dtype = data.draw(st.sampled_from(FLOATS if alike else (FLOAT32, FLOAT64)))
        logits = peers.logits(data.draw, shapes[0])
        labels = peers.labels(data.draw, shapes[1], soft=alike)
        options = {}
        if name == "sigmoid_focal_loss":
            options["alpha"] = data.draw(st.sampled_from([None, 0.0, 0.25, 0.75]))
            options["gamma"] = data.draw(st.sampled_from([0.0, 0.5, 1.0, 2.0, 3.5]))
        one_dtype = data.draw(st.booleans())
        label_dtype = dtype if one_dtype else data.draw(st.sampled_from([FLOAT32, BFLOAT16]))

        with jax.enable_x64(True):
            theirs = partial(getattr(optax, name), **options)
            expected, *expected_gradients = peers.both(theirs, logits, labels)
        with jax.enable_x64(dtype == FLOAT64):
            ours = partial(getattr(jax_bce.optax, name), **options)
            operands = logits.astype(dtype), labels.astype(label_dtype)
            actual, *gradients = peers.both(ours, *operands)
            assert actual.dtype == jax.eval_shape(theirs, *operands).dtype
        peers.agree(actual, expected)
        # The terms of a focal gradient cancel somewhere between soft labels.
        if name == "sigmoid_binary_cross_entropy" or oracle.kind_of(labels) == "hard":
            peers.agree(gradients[0], expected_gradients[0])
        if name == "sigmoid_binary_cross_entropy" and alike:
            peers.agree(gradients[1], expected_gradients[1])

    agree()


@pytest.mark.parametrize("label_dtype", [bool, np.uint8, np.int32], ids=lambda d: d.__name__)
@pytest.mark.parametrize("name", NAMES)
def test_integer_labels(cpu: str, peers, name: str, label_dtype: type) -> None:
    logits, labels = np.linspace(-8, 8, 5, dtype=np.float32), np.array([0, 1, 1, 0, 1], label_dtype)
    peers.agree(
        getattr(jax_bce.optax, name)(logits, labels),
        getattr(optax, name)(jnp.asarray(logits), labels),
    )


def element(peers, module, name: str, x: np.ndarray, y: np.ndarray, what: str) -> jax.Array:
    """Its loss, or its gradient."""
    function = partial(getattr(module, name), labels=y)
    return peers.both(function, x)[["loss", "gradient"].index(what)]


# logit, label, what, optax's value, in float32.
WRONG = [
    (-90.0, 0.0, "loss", 0.0),
    (-90.0, 0.0, "gradient", 0.0),
    (90.0, 1.0, "loss", 0.0),
    (90.0, 1.0, "gradient", 0.0),
    (INF, 1.0, "loss", NAN),
    (-INF, 0.0, "loss", NAN),
]


@pytest.mark.parametrize(("logit", "label", "what", "listed"), WRONG)
def test_where_optax_is_wrong(
    check, cpu: str, peers, logit: float, label: float, what: str, listed: float
) -> None:
    x, y = np.float32([logit]), np.float32([label])
    exact = getattr(oracle.exact(x, y), what)[0]
    peers.still_wrong(element(peers, optax, NAMES[0], x, y, what)[0], listed, exact)
    check.elements(cpu, x, y, **{what: element(peers, jax_bce.optax, NAMES[0], x, y, what)})


# The same for the focal loss with gamma 2, and the exact value.
WRONG_FOCAL = [
    (INF, 1.0, "loss", NAN, 0.0),
    (INF, 1.0, "gradient", NAN, 0.0),
    (-INF, 0.0, "loss", NAN, 0.0),
    (INF, 0.0, "gradient", NAN, 1.0),
    (-INF, 1.0, "gradient", NAN, -1.0),
]


@pytest.mark.parametrize(("logit", "label", "what", "listed", "exact"), WRONG_FOCAL)
def test_where_optax_is_wrong_about_the_focal_loss(
    cpu: str, peers, logit: float, label: float, what: str, listed: float, exact: float
) -> None:
    x, y = np.float32([logit]), np.float32([label])
    peers.still_wrong(element(peers, optax, NAMES[1], x, y, what)[0], listed, exact)
    assert element(peers, jax_bce.optax, NAMES[1], x, y, what) == exact


def test_optax_rounds_labels(cpu: str, peers) -> None:
    """To the logits' dtype: 0.999 is 1 in bfloat16, and this loss of 0.1 is none."""
    x, y = jnp.full(1, 100, BFLOAT16), jnp.full(1, 0.999, jnp.float32)
    exact = oracle.exact(x, y).loss[0]
    peers.still_wrong(float(optax.sigmoid_binary_cross_entropy(x, y)[0]), 0.0, exact)
    ours = jax_bce.optax.sigmoid_binary_cross_entropy(x, y)
    assert ours[0] == ml_dtypes.bfloat16(exact)
