"""What the comparisons with other packages share.

A peer is asked in float64, at the very numbers that ours takes in any dtype: logits are multiples
of 1/8 up to 16, labels of 1/4. There each peer's formula is right to 1e-7, which not all are in
float32 (PyTorch subtracts log(sigmoid(x)) from -x; Keras clips probabilities at 1e-7, which is
sigmoid(-16.1)), and the terms of a gradient do not cancel but to exactly 0.
"""

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np
import oracle
import pytest
import sample
from hypothesis import Phase, settings
from hypothesis import strategies as st
from numpy.typing import ArrayLike

# Drawn alike in every run, so that a failure is one of the code. Examples are small as they are: to
# shrink one, with a compilation for each step, would take minutes.
EXAMPLES = settings(
    max_examples=sample.examples(15),
    deadline=None,
    derandomize=True,
    database=None,
    phases=[Phase.generate],
)
LOGITS = st.integers(-128, 128).map(lambda n: n / 8)


class Peers:
    """The options of hypothesis, what it draws, and the comparison."""

    examples = EXAMPLES

    @staticmethod
    def array(draw: Callable, shape: tuple[int, ...], elements: st.SearchStrategy) -> np.ndarray:
        size = int(np.prod(shape))
        return np.reshape(draw(st.lists(elements, min_size=size, max_size=size)), shape)

    @classmethod
    def logits(cls, draw: Callable, shape: tuple[int, ...]) -> np.ndarray:
        return cls.array(draw, shape, LOGITS)

    @classmethod
    def labels(cls, draw: Callable, shape: tuple[int, ...], soft: bool = True) -> np.ndarray:
        values = [0.0, 0.25, 0.5, 0.75, 1.0] if soft and draw(st.booleans()) else [0.0, 1.0]
        return cls.array(draw, shape, st.sampled_from(values))

    @classmethod
    def weights(cls, draw: Callable, shape: tuple[int, ...]) -> np.ndarray:
        return cls.array(draw, shape, st.sampled_from([0.0, 0.5, 1.0, 2.0, 3.0]))

    @staticmethod
    def both(function: Callable[..., jax.Array], *operands: Any) -> tuple[Any, ...]:
        """A loss, and the gradients of its sum, compiled as in training."""

        def loss_and_gradients(*operands: Any) -> tuple[Any, ...]:
            loss, pull = jax.vjp(function, *operands)
            return loss, *pull(jnp.ones_like(loss))

        # Each is run once: compiling it takes the time.
        options = {"xla_backend_optimization_level": 0, "xla_llvm_disable_expensive_passes": True}
        return jax.jit(loss_and_gradients, compiler_options=options)(*operands)

    @staticmethod
    def agree(actual: ArrayLike, expected: ArrayLike) -> None:
        """To the accuracy of arithmetic around the loss, and one rounding to the result's type."""
        __tracebackhide__ = True
        actual, expected = np.asarray(actual), np.asarray(expected, np.float64)
        assert actual.shape == expected.shape
        relative = oracle.SURROUNDINGS * 2.0 ** (ml_dtypes.finfo(actual.dtype).nmant + 1)
        distance = oracle.ulp_distance(actual, expected, actual.dtype)
        assert distance.max(initial=0.0) <= oracle.ROUNDED + relative, f"{actual} is not {expected}"

    @staticmethod
    def still_wrong(theirs: float, listed: float, exact: float) -> None:
        """The peer returns what the table says, and that is not what is right."""
        __tracebackhide__ = True
        np.testing.assert_allclose(
            theirs, listed, rtol=oracle.PUBLISHED, err_msg="not what the table lists"
        )
        assert not np.isclose(theirs, exact, rtol=oracle.WRONG, atol=0), "nothing is wrong with it"


@pytest.fixture(scope="session")
def peers() -> type[Peers]:
    return Peers
