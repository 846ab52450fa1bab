"""loss_from_probs and loss against scikit-learn's log_loss, which is float64 NumPy."""

import jax
import numpy as np
import oracle
import pytest
from hypothesis import assume, given
from hypothesis import strategies as st
from oracle import FLOAT32, FLOAT64
from sklearn.metrics import log_loss

import jax_bce

pytestmark = pytest.mark.any_jax


def theirs(labels: np.ndarray, probs: np.ndarray, **options) -> float:
    return log_loss(labels.astype(int), probs, labels=[0, 1], **options)


def sigmoid(logits: np.ndarray) -> np.ndarray:
    return 1 / (1 + np.exp(-logits))


def test_log_loss(cpu: str, peers) -> None:
    """Its mean is the one over weights; without normalize it is a sum."""

    @peers.examples
    @given(st.data())
    def agree(data: st.DataObject) -> None:
        size, dtype = data.draw(st.sampled_from([1, 2, 7])), data.draw(st.sampled_from([4, 8]))
        logits = peers.logits(data.draw, (size,))
        labels = peers.labels(data.draw, (size,), soft=False)
        weights = peers.weights(data.draw, (size,)) if data.draw(st.booleans()) else None
        assume(weights is None or weights.any())
        normalize = data.draw(st.booleans())
        options = {"reduction": "weighted_mean" if normalize else "sum", "sample_weight": weights}

        expected = theirs(labels, sigmoid(logits), normalize=normalize, sample_weight=weights)
        with jax.enable_x64(dtype == 8):
            actual = jax_bce.loss(logits.astype(f"f{dtype}"), labels.astype(np.uint8), **options)
        peers.agree(actual, expected)
        # In float32, 1 - probs would have lost the digits that are compared.
        with jax.enable_x64(True):
            actual = jax_bce.loss_from_probs(sigmoid(logits), labels.astype(np.uint8), **options)
        peers.agree(actual, expected)

    agree()


# probability, label, dtype, scikit-learn's value: it clips to the machine epsilon.
WRONG = [
    (0.0, 1, FLOAT64, 36.04365338911715),
    (1.0, 1, FLOAT64, 2.220446049250313e-16),
    (1e-30, 1, FLOAT64, 36.04365338911715),
    (1e-30, 0, FLOAT64, 2.220446049250313e-16),
    (0.0, 1, FLOAT32, 15.942385152878742),
    (1e-30, 1, FLOAT32, 15.942385152878742),
    (1.0, 1, FLOAT32, 1.1920929665620834e-07),
]


@pytest.mark.parametrize(("probability", "label", "dtype", "listed"), WRONG)
def test_where_scikit_learn_clips(
    cpu: str, peers, probability: float, label: int, dtype: np.dtype, listed: float
) -> None:
    """With the same epsilon, so do we; without, the loss is what the probability says."""
    probs, labels = np.full(1, probability, dtype), np.array([label])
    with np.errstate(divide="ignore"):
        wide = probs.astype(np.float64)
        exact = float(-(np.log(wide) if label else np.log1p(-wide))[0])
    peers.still_wrong(theirs(labels, probs), listed, exact)
    with jax.enable_x64(dtype == FLOAT64):
        peers.agree(jax_bce.loss_from_probs(probs, labels), exact)
        epsilon = float(np.finfo(dtype).eps)
        clipped = jax_bce.loss_from_probs(probs, labels, epsilon=epsilon)
    # 1 - epsilon and its complement are rounded by either side in its own way.
    np.testing.assert_allclose(clipped, listed, rtol=oracle.SURROUNDINGS)


def test_the_logit_knows_more_than_the_probability(check, cpu: str) -> None:
    """From logit 37 on the probability is 1 in float64, and the loss is lost."""
    assert theirs(np.array([0]), sigmoid(np.array([40.0]))) == pytest.approx(36.04365338911715)
    assert theirs(np.array([1]), sigmoid(np.array([40.0]))) == pytest.approx(2.220446049250313e-16)
    logits, labels = np.float32([40, 40]), np.array([0, 1])
    check.elements(cpu, logits, labels, loss=jax_bce.loss(logits, labels, reduction="none"))
